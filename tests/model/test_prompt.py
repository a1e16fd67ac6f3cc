"""Prompts: golden sequences, loss masks, and text that only looks like special tokens."""

from typing import Any

import pytest
from tokenizers import AddedToken

from isthmus.errors import IsthmusError
from isthmus.model.llm import character_tokenizer
from isthmus.model.prompt import (
    AUDIO_MARK,
    BarePrompt,
    ChatPrompt,
    PaperPrompt,
    Prompt,
    SlamPrompt,
    special_tokens,
    tokenise,
)

BOS, EOS = 1, 2
LLAMA_3 = (
    "{{ bos_token }}{% for turn in messages %}<|start|>{{ turn['role'] }}<|end|>\n\n"
    "{{ turn['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for turn in messages %}"
    "{% if turn['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPACED = (  # as Llama 2: a blank before the end token
    "{% for turn in messages %}{% if turn['role'] == 'user' %}"
    "{{ bos_token }}[INST] {{ turn['content'] }} [/INST]"
    "{% elif turn['role'] == 'assistant' %} {{ turn['content'] }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
TEXT_ONLY = (  # no token of its own ends a turn
    "{% for turn in messages %}### {{ turn['role'] }}: {{ turn['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant: {% endif %}"
)


def chat_tokenizer(template: str) -> Any:
    """Characters, and the special tokens of a chat template as one token each."""
    tokenizer = character_tokenizer()
    names = ("<|start|>", "<|end|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.chat_template = template
    return tokenizer


def sequence(prompt: Prompt, tokenizer: Any, transcript: str | None) -> list[tuple[str, bool]]:
    """Tokens by name with their loss; the audio is one token."""
    return [
        (name, piece.loss)
        for piece in tokenise(prompt, tokenizer, transcript)
        for name in (
            ["AUDIO"]
            if piece.tokens is None
            else tokenizer.convert_ids_to_tokens(list(piece.tokens))
        )
    ]


def spell(*parts: str, loss: bool = False) -> list[tuple[str, bool]]:
    """Parts in angle brackets and AUDIO are tokens, others are spelt."""
    tokens = []
    for part in parts:
        whole = part == "AUDIO" or (part.startswith("<") and part.endswith(">") and len(part) > 2)
        tokens += [part] if whole else list(part)
    return [(token, loss) for token in tokens]


PAPER = ("<s>", "USER: ", "AUDIO", " Say it. ASSISTANT: ")
SLAM = ("AUDIO", "USER: Say it.\n ASSISTANT:")
BARE = ("AUDIO", "<s>")
CHAT = ("USER: ", "AUDIO", "\nSay it. ASSISTANT: ")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (PaperPrompt(instruction="Say it."), PAPER),
        (PaperPrompt(instruction=""), ("<s>", "AUDIO", "ASSISTANT: ")),
        (SlamPrompt(instruction="Say it."), SLAM),
        (BarePrompt(), BARE),
        (ChatPrompt(instruction="Say it."), CHAT),
    ],
)
def test_golden_sequences(prompt: Prompt, expected: tuple[str, ...]) -> None:
    tokenizer = character_tokenizer(chat=True)
    reply = spell("three", "</s>", loss=True)
    assert sequence(prompt, tokenizer, "three") == spell(*expected) + reply
    assert sequence(prompt, tokenizer, None) == spell(*expected)
    assert sequence(prompt, tokenizer, "") == spell(*expected) + reply[-1:]


def test_golden_ids() -> None:
    pieces = tokenise(PaperPrompt(instruction="Go"), character_tokenizer(), "hi")
    letters = {letter: 5 + ord(letter) - 32 for letter in "USER: GoASITNhi"}
    assert [piece.tokens for piece in pieces] == [
        [BOS],
        [letters[letter] for letter in "USER: "],
        None,
        [letters[letter] for letter in " Go ASSISTANT: "],
        [letters[letter] for letter in "hi"],
        [EOS],
    ]
    assert [piece.loss for piece in pieces] == [False] * 4 + [True] * 2


def test_end_token_is_supervised_even_if_it_is_the_padding() -> None:
    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert sequence(PaperPrompt(), tokenizer, "a")[-1] == ("</s>", True)


def test_without_beginning_token() -> None:
    tokenizer = character_tokenizer()
    tokenizer.bos_token = None
    assert sequence(BarePrompt(), tokenizer, "a") == [
        ("AUDIO", False),
        *spell("a", "</s>", loss=True),
    ]


def test_without_end_token() -> None:
    tokenizer = character_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(IsthmusError, match="no end token"):
        PaperPrompt().end_token(tokenizer)


@pytest.mark.parametrize(
    "text", ["</s>", "<s>", "a</s>b", "<</s>/s>", "<pad>", "<unk>", "<|im_end|>", "<|eot_id|>"]
)
@pytest.mark.parametrize("prompt", [PaperPrompt(), SlamPrompt(), BarePrompt(), ChatPrompt()])
def test_text_never_becomes_special_tokens(prompt: Prompt, text: str) -> None:
    tokenizer = chat_tokenizer(CHATML)
    special = special_tokens(tokenizer)
    told = {"instruction": text} if "instruction" in type(prompt).model_fields else {}
    told |= {"system": text} if isinstance(prompt, ChatPrompt) else {}
    plain = dict.fromkeys(told, "x")
    expected = tokenise(prompt.model_copy(update=plain), tokenizer, "x")
    found = tokenise(prompt.model_copy(update=told), tokenizer, text)
    for ours, theirs in zip(found, expected, strict=True):
        specials = [token for token in ours.tokens or [] if token in special]
        assert specials == [token for token in theirs.tokens or [] if token in special]
    transcript = found[-2].tokens
    assert transcript is not None
    assert tokenizer.decode(transcript) == text


def test_a_tokenizer_that_reads_special_tokens_anyway_is_refused() -> None:
    class Careless:
        name_or_path = "careless"
        unk_token_id = None

        def __getattr__(self, name: str) -> Any:
            return getattr(character_tokenizer(), name)

        def encode(self, text: str, **options: Any) -> list[int]:
            return [EOS]

    with pytest.raises(IsthmusError, match=r"careless reads special tokens \(</s>\)"):
        tokenise(PaperPrompt(), Careless(), "hello</s>")


INSTRUCTED = ("AUDIO", "\nTranscribe speech to text.")
LLAMA_3_USER = ("<s>", "<|start|>", "user", "<|end|>")
LLAMA_3_REPLY = ("<|start|>", "assistant", "<|end|>")
CHATML_REPLY = ("\n", "<|im_start|>", "assistant\n")


@pytest.mark.parametrize(
    ("template", "expected", "end"),
    [
        (
            LLAMA_3,
            (*LLAMA_3_USER, "\n\n", *INSTRUCTED, "<|eot_id|>", *LLAMA_3_REPLY, "\n\n"),
            "<|eot_id|>",
        ),
        (
            CHATML,
            ("<|im_start|>", "user\n", *INSTRUCTED, "<|im_end|>", *CHATML_REPLY),
            "<|im_end|>",
        ),
        (SPACED, ("<s>", "[INST] ", *INSTRUCTED, " [/INST] "), "</s>"),
        (TEXT_ONLY, ("### user: ", *INSTRUCTED, "\n\n### assistant: "), "</s>"),
    ],
    ids=["llama-3", "chatml", "spaced", "text-only"],
)
def test_chat_templates(template: str, expected: tuple[str, ...], end: str) -> None:
    tokenizer = chat_tokenizer(template)
    prompt = ChatPrompt()
    assert sequence(prompt, tokenizer, None) == spell(*expected)
    reply = spell("yes", end, loss=True)
    assert sequence(prompt, tokenizer, "yes") == spell(*expected) + reply
    assert tokenizer.convert_ids_to_tokens(prompt.end_token(tokenizer)) == end


DATED = (  # as Llama 3.2, and with a macro as others have
    "{% macro today() %}{{ strftime_now('%d %B %Y, %-m') }}{% endmacro %}"
    "{%- if not date_string is defined %}"
    "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- endif %}{%- endif %}"
    "Today: {{ date_string }} = {{ today() }}, {{ strftime_now('%A %H:%M:%S') }}\n"
)


@pytest.mark.parametrize("given", [True, False])
def test_chat_prompts_are_the_same_on_every_day(given: bool) -> None:
    template = DATED if given else DATED.replace("date_string", "day")
    found = tokenise(ChatPrompt(), tokenizer := chat_tokenizer(template + CHATML))[0].tokens
    expected = "Today: 26 Jul 2024 = 26 July 2024, 07, Friday 00:00:00\n<|im_start|>user\n"
    assert tokenizer.decode(found) == expected


@pytest.mark.parametrize("start", ["\n", "  {% if true %}{% endif %}", "{%- if true %}{% endif %}"])
def test_stopping_the_clock_changes_no_other_template(start: str) -> None:
    tokenizer = chat_tokenizer(start + CHATML)
    turns = [{"role": "user", "content": f"{AUDIO_MARK}\nx"}]
    own = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    found = tokenise(ChatPrompt(instruction="x"), tokenizer)
    assert tokenizer.decode(found[0].tokens) == own.partition(AUDIO_MARK)[0]


def test_chat_with_system_turn() -> None:
    found = sequence(ChatPrompt(system="Be brief."), chat_tokenizer(CHATML), None)
    system = spell("<|im_start|>", "system\nBe brief.", "<|im_end|>", "\n")
    assert found[: len(system)] == system


def test_chat_template_without_system_turn() -> None:
    tokenizer = chat_tokenizer(NO_SYSTEM)
    assert sequence(ChatPrompt(), tokenizer, "a")[-1] == ("<|im_end|>", True)
    with pytest.raises(IsthmusError, match=r"System role not supported.*Leave out prompt\.system"):
        tokenise(ChatPrompt(system="Be brief."), tokenizer)


def test_chat_template_that_drops_the_system_turn() -> None:
    with pytest.raises(IsthmusError, match="prints the system 0 times"):
        tokenise(ChatPrompt(system="Be brief."), chat_tokenizer(SPACED))


@pytest.mark.parametrize(
    "template", ["{% for turn in messages %}{{ turn['role'] }}{% endfor %}", CHATML + CHATML]
)
def test_chat_template_that_does_not_print_the_text_once(template: str) -> None:
    with pytest.raises(IsthmusError, match=r"prints the audio (0|2) times.*template: paper"):
        tokenise(ChatPrompt(), chat_tokenizer(template))


def test_tokenizer_without_chat_template() -> None:
    with pytest.raises(IsthmusError, match=r"no chat template.*template: paper"):
        tokenise(ChatPrompt(), character_tokenizer())
