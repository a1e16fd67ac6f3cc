"""Prompts of subword tokenizers: the ids of the joint text, cut at the audio and the transcript."""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from isthmus.lab.sentences import sentence
from isthmus.model import prompt as prompt_module
from isthmus.model.llm import character_tokenizer
from isthmus.model.prompt import (
    INSTRUCTION,
    BarePrompt,
    ChatPrompt,
    PaperPrompt,
    Prompt,
    PromptSettings,
    SlamPrompt,
    special_tokens,
    tokenise,
    transcript_tokens,
)

SPECIAL = ["<unk>", "<s>", "</s>"]
CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (  # a blank in front of the reply, which the generation prompt does not have
    "{% for turn in messages %}{% if turn['role'] == 'user' %}"
    "{{ bos_token }}[INST] {{ turn['content'] }} [/INST]"
    "{% else %} {{ turn['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (  # text behind a special token, as TinyLlama's
    "{% for turn in messages %}<|{{ turn['role'] }}|>\n{{ turn['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# Kinds of tokenizers, and the texts into which a token of the authors' prompt reaches
JOINED: dict[str, set[str]] = {
    "llama": set(),
    "llama-legacy": set(),
    "llama-bos": set(),
    "gpt2": set(),
    "qwen2": set(),
    "smollm2": {"'tis so", "(laughs) no"},
}
KINDS = tuple(JOINED)
STARTS = {"", "...", "'tis so", "(laughs) no", "3 4 5", "¿qué?", "naïve", "a\nb", "日本", "<b>"}


def transcripts(number: int) -> list[str]:
    """Sentences in lower and upper case, with digits, accents, and what they rarely begin with."""
    rng = np.random.default_rng(0)
    forms = (str.lower, str.upper, str.capitalize, "7 {}.".format)
    found = sorted(STARTS)
    while len(found) < number:
        form: Callable[[str], str] = forms[len(found) % len(forms)]
        found.append(form(sentence(rng)))
    return found


TEXTS = transcripts(1000)


@pytest.fixture(scope="module")
def learnt() -> Callable[[Any], dict[str, Any]]:
    """Vocabulary and merges of a byte-pair tokenizer that splits texts in the given way."""
    told = [f"USER: {INSTRUCTION} ASSISTANT: {text}" for text in TEXTS[::2]]

    def learn(splitter: Any) -> dict[str, Any]:
        tokenizer: Any = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = splitter
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            told + TEXTS,
            trainers.BpeTrainer(
                vocab_size=900,
                special_tokens=SPECIAL,
                initial_alphabet=[] if isinstance(splitter, pre_tokenizers.Metaspace) else alphabet,
                show_progress=False,
            ),
        )
        model = json.loads(tokenizer.to_str())["model"]
        return {"vocab": model["vocab"], "merges": [tuple(pair) for pair in model["merges"]]}

    return learn


@pytest.fixture(scope="module")
def make(learnt: Any, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Tokenizers in the classes of language models, by kind."""

    def build(kind: str) -> Any:
        if kind == "letters":
            return character_tokenizer(chat=True)
        if kind == "smollm2":
            folder: Path = request.getfixturevalue("parts") / "smollm2-135m-instruct"
            return AutoTokenizer.from_pretrained(folder)
        if kind.startswith("llama"):
            pieces = learnt(pre_tokenizers.Metaspace(prepend_scheme="always", split=True))
            for byte in range(256):
                pieces["vocab"].setdefault(f"<0x{byte:02X}>", len(pieces["vocab"]))
            return LlamaTokenizer(
                **pieces, legacy=kind == "llama-legacy", add_bos_token=kind == "llama-bos"
            )
        named = {"unk_token": "<unk>", "eos_token": "</s>"}
        if kind == "gpt2":
            own = learnt(pre_tokenizers.ByteLevel(add_prefix_space=False))
            return GPT2Tokenizer(**own, **named, bos_token="<s>")
        return Qwen2Tokenizer(**learnt(Qwen2Tokenizer().backend_tokenizer.pre_tokenizer), **named)

    made: dict[str, Any] = {}

    def get(kind: str, chat_template: str | None = None) -> Any:
        if kind not in made:
            made[kind] = build(kind)
        tokenizer = copy.deepcopy(made[kind])
        if chat_template:
            names = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>")
            tokenizer.add_tokens([AddedToken(name, special=True) for name in names])
            tokenizer.chat_template = chat_template
        return tokenizer

    return get


def flat(tokenizer: Any, prompt: Prompt, text: str | None) -> list[int | None]:
    """The sequence, None in the place of the audio."""
    pieces = tokenise(prompt, tokenizer, text)
    return [t for p in pieces for t in ([None] if p.tokens is None else p.tokens)]


def cut(tokenizer: Any, joint: str, places: Sequence[int]) -> list[list[int]]:
    """Ids of the joint text between places in it, by the letters that each token stands for."""
    found = tokenizer(joint, add_special_tokens=False, return_offsets_mapping=True)
    parts: list[list[int]] = [[] for _ in range(len(places) + 1)]
    for token, (start, _) in zip(found.input_ids, found.offset_mapping, strict=True):
        parts[sum(start >= place for place in places)].append(token)
    return parts


def expected(tokenizer: Any, prompt: Prompt, text: str) -> list[int | None] | None:
    """The sequence by the joint text, each template written out once more.

    None where a token of the authors' reaches from their prompt into the transcript.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [prompt.end_token(tokenizer)]
    match prompt:
        case PaperPrompt(instruction=""):
            joint = f"ASSISTANT: {text}" if text else "ASSISTANT:"
            before, after = cut(tokenizer, joint, [len("ASSISTANT:")])
            return [*begin, None, *before, *after, *end]
        case PaperPrompt():
            asked = f"USER: {prompt.instruction} ASSISTANT:"
            joint = f"{asked} {text}" if text else asked
            user, told, said = cut(tokenizer, joint, [len("USER:"), len(asked)])
            return [*begin, *user, None, *told, *said, *end]
        case BarePrompt():
            return [None, *begin, *tokenizer.encode(text, add_special_tokens=False), *end]
        case SlamPrompt():  # as the authors' dataset has it
            prompt_ids = tokenizer.encode(f"USER: {prompt.instruction}\n ASSISTANT:")
            example = tokenizer.encode(f"USER: {prompt.instruction}\n ASSISTANT:{text}")
            if example[: len(prompt_ids)] != prompt_ids:
                return None
            return [None, *example, tokenizer.eos_token_id]
        case ChatPrompt():
            turns = [("user", INSTRUCTION), ("assistant", "REPLY")]
            chat = [{"role": role, "content": content} for role, content in turns]
            joint = tokenizer.apply_chat_template(chat, tokenize=False).partition("REPLY")[0]
            joint = joint.rstrip(" ") if not text else joint + text
            place = joint.index(INSTRUCTION)
            place -= joint[place - 1] == " "
            heard, told = cut(tokenizer, joint, [place])
            return [*heard, None, *told, *end]
    raise AssertionError(prompt)


PROMPTS = {
    "paper": PaperPrompt(),
    "only the tag": PaperPrompt(instruction=""),
    "slam-llm": SlamPrompt(),
    "slam-llm short": SlamPrompt(instruction="Transcribe speech to text. "),
    "bare": BarePrompt(),
    "chatml": ChatPrompt(),
    "llama-2": ChatPrompt(),
    "zephyr": ChatPrompt(),
}
TEMPLATES = {"chatml": CHATML, "llama-2": LLAMA_2, "zephyr": ZEPHYR}


def test_all_templates_are_here() -> None:
    assert {type(prompt) for prompt in PROMPTS.values()} == set(get_args(PromptSettings))


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_joint_text(kind: str, name: str, make: Callable[..., Any]) -> None:
    tokenizer, prompt = make(kind, TEMPLATES.get(name)), PROMPTS[name]
    joint = {text: expected(tokenizer, prompt, text) for text in TEXTS}
    same = {text: ids for text, ids in joint.items() if ids is not None}
    assert {text: flat(tokenizer, prompt, text) for text in same} == same
    assert set(joint) - set(same) == (JOINED[kind] if isinstance(prompt, SlamPrompt) else set())


def test_a_tokenizer_without_unknown_token_has_no_name_for_it(make: Callable[..., Any]) -> None:
    tokenizer, prompt = make("qwen2"), SlamPrompt(instruction="None of it. ")
    tokenizer.unk_token = None
    assert flat(tokenizer, prompt, "go") == expected(tokenizer, prompt, "go")


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", [*KINDS, "letters"])
def test_the_decoding_prompt_is_the_beginning_of_every_sequence(
    kind: str, name: str, make: Callable[..., Any]
) -> None:
    tokenizer, prompt = make(kind, TEMPLATES.get(name)), PROMPTS[name]
    decoding = tokenise(prompt, tokenizer)
    for text in [*STARTS, *TEXTS[:100]]:
        training = tokenise(prompt, tokenizer, text)
        assert training[: len(decoding)] == decoding
        supervised = [piece.tokens for piece in training if piece.loss]
        said = transcript_tokens(prompt, tokenizer, text)
        assert supervised == [said, [prompt.end_token(tokenizer)]]
        if kind != "letters":  # which knows no letters but those of English
            assert tokenizer.decode(said).strip() == text.strip()


@pytest.mark.parametrize("kind", KINDS)
def test_no_space_is_left_alone_and_none_is_lost(kind: str, make: Callable[..., Any]) -> None:
    tokenizer = make(kind)
    ids = [token for token in flat(tokenizer, PaperPrompt(), "go on") if token is not None]
    names = tokenizer.convert_ids_to_tokens(ids)
    spaces = f"USER: {INSTRUCTION} ASSISTANT: go on".count(" ") + kind.startswith("llama")
    assert sum(name[0] in "\u2581\u0120" for name in names) == spaces
    assert not {"\u2581", "\u0120"} & set(names)


@pytest.mark.parametrize("start", [":", ":)", ".", "\n", "\n\nx", " ", "b", ""])
def test_a_token_that_reaches_over_the_cut(start: str) -> None:
    """With a tokenizer that makes one token of a colon and what stands behind it."""
    pieces = [f":{letter}" for letter in ":).\nb "]
    vocabulary = {token: n for n, token in enumerate(["<unk>", "</s>", *map(chr, range(128))])}
    vocabulary |= {piece: len(vocabulary) + n for n, piece in enumerate(pieces)}
    model = models.BPE(
        vocabulary, [(":", piece[1:]) for piece in pieces], unk_token="<unk>", fuse_unk=False
    )
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), eos_token="</s>", unk_token="<unk>"
    )
    prompt, text = SlamPrompt(instruction="Go"), f"{start}a"
    decoding, training = (flat(tokenizer, prompt, told) for told in (None, text))
    asked = tokenizer.encode("USER: Go\n ASSISTANT:", add_special_tokens=False)
    assert decoding == [None, *asked]
    assert training[: len(decoding)] == decoding
    assert tokenizer.decode(training[len(decoding) : -1]).replace(" ", "") == text.replace(" ", "")


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("named", ["eos_token", "unk_token"])
def test_names_of_special_tokens_are_spelt(
    named: str, kind: str, name: str, make: Callable[..., Any]
) -> None:
    tokenizer, prompt = make(kind, TEMPLATES.get(name)), PROMPTS[name]
    text = f"say {getattr(tokenizer, named)} twice"
    instructed = {"instruction": text} if getattr(prompt, "instruction", "") else {}
    told = prompt.model_copy(update=instructed)
    steering = special_tokens(tokenizer)
    counts = [
        [sum(token in steering for token in piece.tokens or []) for piece in found]
        for found in (tokenise(told, tokenizer, text), tokenise(prompt, tokenizer, "say it"))
    ]
    assert counts[0] == counts[1]
    assert tokenizer.decode(transcript_tokens(told, tokenizer, text)).strip() == text


def test_the_authors_tokenizer_call_decides_whether_bos_stands_behind_the_audio(
    make: Callable[..., Any],
) -> None:
    for kind, begin in (("llama-bos", 1), ("llama", None), ("smollm2", None)):
        tokenizer = make(kind)
        found = flat(tokenizer, SlamPrompt(), "go")
        assert found[0] is None
        assert (found[1] == tokenizer.bos_token_id) == (begin is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_rule_for_blanks_the_ids_are_others(
    kind: str, make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_module, "_joins_blanks", lambda tokenizer: False)
    tokenizer = make(kind)
    assert flat(tokenizer, PaperPrompt(), "go") != expected(tokenizer, PaperPrompt(), "go")
