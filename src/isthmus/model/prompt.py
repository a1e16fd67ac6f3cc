"""What the language model reads: one function for training and decoding.

A prompt is a list of segments: trusted text of the template, the user's text, the place of the
audio, and the transcript with its end token, which alone carry loss. Without a transcript the same
function gives the decoding prompt, a prefix of the training sequence by construction.

To add a template: a class here with `segments`, and its name in PromptSettings below. Tokenizers
are any of transformers'; most of their methods have no types.
"""

import re
from abc import abstractmethod
from dataclasses import dataclass
from datetime import date
from enum import Enum
from typing import Annotated, Any, Literal, Self

from jinja2 import TemplateError
from pydantic import Field

from isthmus.errors import IsthmusError
from isthmus.model.parts import PartSettings

INSTRUCTION = "Transcribe speech to text."  # SLAM-ASR, section 3.2
SYSTEM_MARK, AUDIO_MARK = "<<system>>", "<<audio>>"  # stand in for what a chat template is given
INSTRUCTION_MARK, REPLY_MARK = "<<instruction>>", "<<reply>>"
# One text, or several of which each utterance is given one (SLAM-ASR, table 10).
Instruction = str | Annotated[tuple[str, ...], Field(min_length=1)]
DATE = date(2024, 7, 26)  # of every prompt: Llama 3's own where it is given none
# Put before a chat template, this hides transformers' clock: a model must be asked in decoding, on
# any day, what it was asked in training. The newline is the one that jinja drops behind a block.
STOPPED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format | replace('%-', '%')"
    + "".join(f" | replace('%{letter}', '{DATE:%{letter}}')" for letter in "aAbBcdDeFHIjmMpSTxXyY")
    + " }}{% endmacro %}\n"
)


class Kind(Enum):
    TEMPLATE = "template"  # may name special tokens
    TEXT = "text"  # never becomes special tokens
    AUDIO = "audio"  # the projector's embeddings
    BEGIN = "begin"  # the tokenizer's beginning of sequence, if it has one
    END = "end"  # the token that ends a transcript


@dataclass(frozen=True)
class Segment:
    """A piece of the sequence."""

    kind: Kind
    text: str = ""
    loss: bool = False  # True only for the transcript and its end token


AUDIO = Segment(Kind.AUDIO)
BEGIN = Segment(Kind.BEGIN)


def reply(transcript: str | None) -> list[Segment]:
    """The supervised tail of a training sequence; nothing when decoding."""
    if transcript is None:
        return []
    return [Segment(Kind.TEXT, transcript, loss=True), Segment(Kind.END, loss=True)]


class Prompt(PartSettings):
    """A template: where audio, instruction and transcript stand."""

    @abstractmethod
    def segments(self, tokenizer: Any, transcript: str | None = None) -> list[Segment]:
        """The sequence up to where the transcript begins, and the transcript if there is one."""

    def variants(self) -> tuple[Self, ...]:
        """The prompts with one instruction each that this one stands for."""
        return (self,)

    def end_token(self, tokenizer: Any) -> int:
        """The token that ends a transcript: supervised in training, awaited in decoding."""
        if tokenizer.eos_token_id is None:
            raise IsthmusError(f"The tokenizer of {tokenizer.name_or_path} has no end token.")
        return int(tokenizer.eos_token_id)


class InstructedPrompt(Prompt):
    """A template with the user's words."""

    instruction: Instruction = INSTRUCTION
    """A list is a choice: each utterance is given one of them."""

    def variants(self) -> tuple[Self, ...]:
        if isinstance(self.instruction, str):
            return (self,)
        return tuple(self.model_copy(update={"instruction": one}) for one in self.instruction)

    @property
    def words(self) -> str:
        """The instruction of a prompt that has one."""
        assert isinstance(self.instruction, str), "one of its variants() is what an utterance gets"
        return self.instruction


class PaperPrompt(InstructedPrompt):
    """`USER: <S> <P> ASSISTANT: <T>` (SLAM-ASR, section 3.2)."""

    template: Literal["paper"] = "paper"

    def segments(self, tokenizer: Any, transcript: str | None = None) -> list[Segment]:
        instruction = [Segment(Kind.TEXT, f" {self.words}")] if self.words else []
        before, after = Segment(Kind.TEMPLATE, "USER: "), Segment(Kind.TEMPLATE, " ASSISTANT: ")
        return [BEGIN, before, AUDIO, *instruction, after, *reply(transcript)]


class SlamPrompt(InstructedPrompt):
    """Audio first, then BOS and `USER: <P>\\n ASSISTANT:`: the authors' released SLAM-LLM code."""

    template: Literal["slam-llm"] = "slam-llm"
    instruction: Instruction = (
        "Transcribe speech to text. Output the transcription directly without redundant content. "
        "Ensure that the output is not duplicated. "
    )

    def segments(self, tokenizer: Any, transcript: str | None = None) -> list[Segment]:
        before, after = Segment(Kind.TEMPLATE, "USER: "), Segment(Kind.TEMPLATE, "\n ASSISTANT:")
        instruction = Segment(Kind.TEXT, self.words)
        return [AUDIO, BEGIN, before, instruction, after, *reply(transcript)]


class BarePrompt(Prompt):
    """Audio, BOS, transcript (Fathullah et al., arXiv 2307.11795): no instruction."""

    template: Literal["bare"] = "bare"

    def segments(self, tokenizer: Any, transcript: str | None = None) -> list[Segment]:
        return [AUDIO, BEGIN, *reply(transcript)]


class ChatPrompt(InstructedPrompt):
    """The tokenizer's own chat template: audio and instruction in the user's turn.

    The template is rendered with marks in the place of what it is given and split at them, so that
    neither instruction nor transcript is ever read as part of the template.
    """

    template: Literal["chat"] = "chat"
    system: str = ""

    def segments(self, tokenizer: Any, transcript: str | None = None) -> list[Segment]:
        given = {AUDIO_MARK: AUDIO, INSTRUCTION_MARK: Segment(Kind.TEXT, self.words)}
        if self.system:
            given[SYSTEM_MARK] = Segment(Kind.TEXT, self.system)
        text = self._render(tokenizer, with_reply=False)
        pieces = re.split("|".join(f"({mark})" for mark in given), text)
        prompt = [given.get(piece, Segment(Kind.TEMPLATE, piece)) for piece in pieces if piece]
        return [*prompt, *reply(transcript)]

    def end_token(self, tokenizer: Any) -> int:
        """The first special token that the template puts behind a reply."""
        tail = self._render(tokenizer, with_reply=True).partition(REPLY_MARK)[2]
        special = special_tokens(tokenizer)
        for token in template_tokens(tokenizer, tail):
            if token in special:
                return token
        return super().end_token(tokenizer)

    def _render(self, tokenizer: Any, with_reply: bool) -> str:
        """The conversation with marks, up to the reply, or with one and what follows it."""
        if not tokenizer.chat_template:
            raise IsthmusError(
                f"prompt: the tokenizer of {tokenizer.name_or_path} has no chat template. Use "
                "`template: paper`, or a chat model."
            )
        turns = [{"role": "system", "content": SYSTEM_MARK}] if self.system else []
        turns.append({"role": "user", "content": f"{AUDIO_MARK}\n{INSTRUCTION_MARK}"})
        if with_reply:
            turns.append({"role": "assistant", "content": REPLY_MARK})
        try:
            text = str(
                tokenizer.apply_chat_template(
                    turns,
                    chat_template=STOPPED_CLOCK + tokenizer.get_chat_template(),
                    tokenize=False,
                    add_generation_prompt=not with_reply,
                    date_string=f"{DATE:%d %b %Y}",
                )
            )
        except TemplateError as error:
            raise IsthmusError(
                f"prompt: the chat template of {tokenizer.name_or_path} refuses the conversation: "
                f"{error}.{' Leave out prompt.system.' if self.system else ''}"
            ) from error
        given = [SYSTEM_MARK] * bool(self.system) + [AUDIO_MARK, INSTRUCTION_MARK]
        for mark in given + [REPLY_MARK] * with_reply:
            if text.count(mark) != 1:
                raise IsthmusError(
                    f"prompt: the chat template of {tokenizer.name_or_path} prints the "
                    f"{mark.strip('<>')} {text.count(mark)} times, not once. Use another template, "
                    "such as `template: paper`."
                )
        return text


PromptSettings = PaperPrompt | SlamPrompt | BarePrompt | ChatPrompt


@dataclass(frozen=True)
class Piece:
    """A segment in tokens; None marks the place of the audio."""

    tokens: list[int] | None
    loss: bool


def tokenise(prompt: Prompt, tokenizer: Any, transcript: str | None = None) -> list[Piece]:
    """Token ids piece by piece: only the template's own text may become special tokens."""
    pieces = []
    for segment in prompt.segments(tokenizer, transcript):
        tokens: list[int] | None
        match segment.kind:
            case Kind.AUDIO:
                tokens = None
            case Kind.BEGIN:
                tokens = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            case Kind.END:
                tokens = [prompt.end_token(tokenizer)]
            case Kind.TEMPLATE:
                tokens = template_tokens(tokenizer, segment.text)
            case Kind.TEXT:
                tokens = plain_tokens(tokenizer, segment.text)
        pieces.append(Piece(tokens, segment.loss))
    return pieces


def prompt_tokens(prompt: Prompt, tokenizer: Any) -> int:
    """How many tokens a prompt has, the audio apart."""
    return sum(len(piece.tokens or ()) for piece in tokenise(prompt, tokenizer))


def template_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of trusted text, which may name special tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of text that is not trusted: the names of special tokens are spelt out."""
    tokens = list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    special = set(tokens) & special_tokens(tokenizer) - {tokenizer.unk_token_id}
    if special:
        names = tokenizer.convert_ids_to_tokens(sorted(special))
        raise IsthmusError(
            f"The tokenizer of {tokenizer.name_or_path} reads special tokens ({', '.join(names)}) "
            f"in {text!r}. Take them out of the text."
        )
    return tokens


def special_tokens(tokenizer: Any) -> set[int]:
    """Ids of the tokens that steer the model, also those without a role such as eos."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
