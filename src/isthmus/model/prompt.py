"""What the language model reads: one function for training and decoding.

A prompt is a list of segments: trusted text of the template, the user's text, the place of the
audio, and the transcript with its end token, which alone carry loss. Without a transcript the same
function gives the decoding prompt, a prefix of the training sequence by construction.

To add a template: a class here with `segments`, and its name in PromptSettings below.
"""

from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from transformers import PreTrainedTokenizerBase

from isthmus.errors import IsthmusError
from isthmus.model.parts import PartSettings

INSTRUCTION = "Transcribe speech to text."  # SLAM-ASR, section 3.2
AUDIO_MARK, USER_MARK, REPLY_MARK = "<<audio>>", "<<instruction>>", "<<reply>>"


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
    def segments(
        self, tokenizer: PreTrainedTokenizerBase, transcript: str | None = None
    ) -> list[Segment]:
        """The sequence up to where the transcript begins, and the transcript if there is one."""

    def end_token(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """The token that ends a transcript: supervised in training, awaited in decoding."""
        if tokenizer.eos_token_id is None:
            raise IsthmusError(f"The tokenizer of {tokenizer.name_or_path} has no end token.")
        return int(tokenizer.eos_token_id)


class PaperPrompt(Prompt):
    """`USER: <S> <P> ASSISTANT: <T>` (SLAM-ASR, section 3.2)."""

    template: Literal["paper"] = "paper"
    instruction: str = INSTRUCTION

    def segments(
        self, tokenizer: PreTrainedTokenizerBase, transcript: str | None = None
    ) -> list[Segment]:
        instruction = [Segment(Kind.TEXT, f" {self.instruction}")] if self.instruction else []
        before, after = Segment(Kind.TEMPLATE, "USER: "), Segment(Kind.TEMPLATE, " ASSISTANT: ")
        return [BEGIN, before, AUDIO, *instruction, after, *reply(transcript)]


class SlamPrompt(Prompt):
    """Audio first, then BOS and `USER: <P>\\n ASSISTANT:`: the authors' released SLAM-LLM code."""

    template: Literal["slam-llm"] = "slam-llm"
    instruction: str = (
        "Transcribe speech to text. Output the transcription directly without redundant content. "
        "Ensure that the output is not duplicated. "
    )

    def segments(
        self, tokenizer: PreTrainedTokenizerBase, transcript: str | None = None
    ) -> list[Segment]:
        before, after = Segment(Kind.TEMPLATE, "USER: "), Segment(Kind.TEMPLATE, "\n ASSISTANT:")
        instruction = Segment(Kind.TEXT, self.instruction)
        return [AUDIO, BEGIN, before, instruction, after, *reply(transcript)]


class BarePrompt(Prompt):
    """Audio, BOS, transcript (Fathullah et al., arXiv 2307.11795): no instruction."""

    template: Literal["bare"] = "bare"

    def segments(
        self, tokenizer: PreTrainedTokenizerBase, transcript: str | None = None
    ) -> list[Segment]:
        return [AUDIO, BEGIN, *reply(transcript)]


class ChatPrompt(Prompt):
    """The tokenizer's own chat template: audio and instruction in the user's turn.

    The template is rendered once with marks in the place of audio and instruction and split at
    them, so that neither the instruction nor a transcript is ever read as part of the template.
    """

    template: Literal["chat"] = "chat"
    instruction: str = INSTRUCTION
    system: str = ""

    def segments(
        self, tokenizer: PreTrainedTokenizerBase, transcript: str | None = None
    ) -> list[Segment]:
        text = self._render(tokenizer, with_reply=False)
        before, _, rest = text.partition(AUDIO_MARK)
        between, _, after = rest.partition(USER_MARK)
        return [
            Segment(Kind.TEMPLATE, before),
            AUDIO,
            Segment(Kind.TEMPLATE, between),
            Segment(Kind.TEXT, self.instruction),
            Segment(Kind.TEMPLATE, after),
            *reply(transcript),
        ]

    def end_token(self, tokenizer: PreTrainedTokenizerBase) -> int:
        """What the template puts right behind a reply."""
        tail = self._render(tokenizer, with_reply=True).partition(REPLY_MARK)[2]
        ids = tokenizer.encode(tail, add_special_tokens=False)
        if not ids:
            return super().end_token(tokenizer)
        return int(ids[0])

    def _render(self, tokenizer: PreTrainedTokenizerBase, with_reply: bool) -> str:
        if not tokenizer.chat_template:
            raise IsthmusError(
                f"prompt: the tokenizer of {tokenizer.name_or_path} has no chat template. Use "
                "`template: paper`, or a chat model."
            )
        turns = [{"role": "system", "content": self.system}] if self.system else []
        turns.append({"role": "user", "content": f"{AUDIO_MARK}\n{USER_MARK}"})
        if with_reply:
            turns.append({"role": "assistant", "content": REPLY_MARK})
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=not with_reply
        )
        assert isinstance(text, str)
        for mark in (AUDIO_MARK, USER_MARK, *([REPLY_MARK] if with_reply else [])):
            if text.count(mark) != 1:
                raise IsthmusError(
                    f"prompt: the chat template of {tokenizer.name_or_path} does not print the "
                    f"user's text once as it is ({mark} comes {text.count(mark)} times)."
                )
        return text


PromptSettings = PaperPrompt | SlamPrompt | BarePrompt | ChatPrompt


@dataclass(frozen=True)
class Piece:
    """A segment in tokens; None marks the place of the audio."""

    tokens: list[int] | None
    loss: bool


def tokenise(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, transcript: str | None = None
) -> list[Piece]:
    """Token ids piece by piece: only the template's own text may become special tokens."""
    pieces = []
    for segment in prompt.segments(tokenizer, transcript):
        match segment.kind:
            case Kind.AUDIO:
                tokens = None
            case Kind.BEGIN:
                tokens = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
            case Kind.END:
                tokens = [prompt.end_token(tokenizer)]
            case Kind.TEMPLATE:
                tokens = tokenizer.encode(segment.text, add_special_tokens=False)
            case Kind.TEXT:
                tokens = plain_tokens(tokenizer, segment.text)
        pieces.append(Piece(tokens, segment.loss))
    return pieces


def plain_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of text that is not trusted: the names of special tokens are spelt out."""
    tokens = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    special = set(tokenizer.all_special_ids) & set(tokens)
    unknown = {tokenizer.unk_token_id}
    if special - unknown:
        raise IsthmusError(
            f"The text {text!r} holds the special token {tokenizer.convert_ids_to_tokens(min(special))!r}."
        )
    return list(tokens)
