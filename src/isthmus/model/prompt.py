"""What the language model reads: one function for training and decoding.

A prompt is a list of segments: trusted text of the template, the user's text, and the place of the
audio. The transcript and its end token follow, and alone carry loss; without a transcript the same
function gives the decoding prompt, a prefix of the training sequence by construction.

The ids are those of the joint text, which is everything in its place and the audio taken out. White
space at a cut (where the audio stands, and in front of the transcript) is there once: blanks are
the beginning of what follows, because tokenizers join them to the next word, and line breaks the
end of what stands before. Where every blank is a token of its own, as in tokenizers of letters,
they stay as the template has them.

To add a template: a class here with `segments`, and its name in PromptSettings below. Tokenizers
are any of transformers'; most of their methods have no types.
"""

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from enum import Enum
from functools import cached_property, lru_cache
from itertools import takewhile
from typing import Annotated, Any, Literal, Self

from jinja2 import TemplateError
from pydantic import Field

from isthmus.errors import IsthmusError
from isthmus.settings.base import PartSettings

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
    TOKENIZER_PREFIX = "tokenizer prefix"  # what it puts before a text by itself, if anything


@dataclass(frozen=True)
class Segment:
    """A piece of the prompt."""

    kind: Kind
    text: str = ""


AUDIO = Segment(Kind.AUDIO)
BEGIN = Segment(Kind.BEGIN)
TOKENIZER_PREFIX = Segment(Kind.TOKENIZER_PREFIX)


class Prompt(PartSettings):
    """A template: where audio and instruction stand before the transcript."""

    @abstractmethod
    def segments(self, tokenizer: Any) -> list[Segment]:
        """The sequence up to where the transcript begins."""

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
    """`USER: <S> <P> ASSISTANT: <T>` (SLAM-ASR, section 3.3).

    Without an instruction only the tag ASSISTANT is left (appendix A.2).
    """

    template: Literal["paper"] = "paper"

    def segments(self, tokenizer: Any) -> list[Segment]:
        if not self.words:
            return [BEGIN, AUDIO, Segment(Kind.TEMPLATE, "ASSISTANT: ")]
        user, assistant = Segment(Kind.TEMPLATE, "USER: "), Segment(Kind.TEMPLATE, " ASSISTANT: ")
        return [BEGIN, user, AUDIO, Segment(Kind.TEXT, f" {self.words}"), assistant]


class SlamPrompt(InstructedPrompt):
    """Audio first, then `USER: <P>\\n ASSISTANT:<T>`: the authors' released SLAM-LLM code.

    BOS stands behind the audio if the tokenizer puts one before every text, as LLaMA's does.
    """

    template: Literal["slam-llm"] = "slam-llm"
    instruction: Instruction = (
        "Transcribe speech to text. Output the transcription directly without redundant content. "
        "Ensure that the output is not duplicated. "
    )

    def segments(self, tokenizer: Any) -> list[Segment]:
        before, after = Segment(Kind.TEMPLATE, "USER: "), Segment(Kind.TEMPLATE, "\n ASSISTANT:")
        return [AUDIO, TOKENIZER_PREFIX, before, Segment(Kind.TEXT, self.words), after]


class BarePrompt(Prompt):
    """Audio, BOS, transcript (Fathullah et al., arXiv 2307.11795): no instruction."""

    template: Literal["bare"] = "bare"

    def segments(self, tokenizer: Any) -> list[Segment]:
        return [AUDIO, BEGIN]


class ChatPrompt(InstructedPrompt):
    """The tokenizer's own chat template: audio and instruction in the user's turn.

    The template is rendered with marks in the place of what it is given and split at them, so that
    neither instruction nor transcript is ever read as part of the template.
    """

    template: Literal["chat"] = "chat"
    system: str = ""

    def segments(self, tokenizer: Any) -> list[Segment]:
        given = {AUDIO_MARK: AUDIO, INSTRUCTION_MARK: Segment(Kind.TEXT, self.words)}
        if self.system:
            given[SYSTEM_MARK] = Segment(Kind.TEXT, self.system)
        text = self._render(tokenizer, with_reply=False)
        replied = self._render(tokenizer, with_reply=True).partition(REPLY_MARK)[0]
        if replied.strip() == text.strip():
            text = replied  # with the blank that Llama 2 has before a reply
        pieces = re.split("|".join(f"({mark})" for mark in given), text)
        return [given.get(piece, Segment(Kind.TEMPLATE, piece)) for piece in pieces if piece]

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
    """A part of the sequence in tokens; None marks the place of the audio."""

    tokens: list[int] | None
    loss: bool


def tokenise(prompt: Prompt, tokenizer: Any, transcript: str | None = None) -> list[Piece]:
    """Token ids piece by piece; behind the prompt, with loss, the transcript and its end token.

    Only the template's own text may become special tokens. Where the joint text has a token that
    reaches over a cut, the prompt has the tokens of its own text all the same, and the transcript
    those that it has behind a line break.
    """
    found = _tokenised(prompt, tokenizer)
    if transcript is None:
        return list(found.pieces)
    return [*found.pieces, Piece(found.transcript(transcript), True), Piece([found.end], True)]


def transcript_tokens(prompt: Prompt, tokenizer: Any, transcript: str) -> list[int]:
    """Those of a transcript behind its prompt, the end token apart."""
    return _tokenised(prompt, tokenizer).transcript(transcript)


def prompt_tokens(prompt: Prompt, tokenizer: Any) -> int:
    """How many tokens a prompt has, the audio apart."""
    return sum(len(piece.tokens or ()) for piece in tokenise(prompt, tokenizer))


class _TokenisedPrompt:
    """A prompt in tokens, from which any number of transcripts go on."""

    def __init__(self, prompt: Prompt, tokenizer: Any):
        self.prompt, self.tokenizer = prompt, tokenizer
        self.text, self.tokens = "", list[int]()  # all text so far, and what became of it
        self.pieces: list[Piece] = []
        texts: list[Segment] = []  # not tokenised yet
        self.blank = ""  # in front of the next cut, to go behind it
        for segment in prompt.segments(tokenizer):
            if segment.kind in (Kind.TEMPLATE, Kind.TEXT):
                texts += [segment] * bool(segment.text)
                continue
            self._add(texts)
            texts = []
            tokens = None if segment.kind is Kind.AUDIO else _beginning(tokenizer, segment.kind)
            self.pieces += [Piece(tokens, False)] * (tokens != [])
        self._add(texts)

    @cached_property
    def end(self) -> int:
        return self.prompt.end_token(self.tokenizer)

    def transcript(self, text: str) -> list[int]:
        return self._continuation([Segment(Kind.TEXT, self._after_cut(text))])

    def _add(self, texts: list[Segment]) -> None:
        """Put texts up to the next cut into tokens."""
        if not texts:
            return
        first, *others = texts
        texts = [replace(first, text=self._after_cut(first.text)), *others]
        last = texts[-1].text
        kept = last.rstrip(" ") if _joins_blanks(self.tokenizer) else last
        self.blank, texts[-1] = last[len(kept) :], replace(texts[-1], text=kept)
        tokens = self._continuation(texts)
        self.pieces.append(Piece(tokens, False))
        self.tokens += tokens
        self.text += "".join(segment.text for segment in texts)

    def _after_cut(self, text: str) -> str:
        """With the white space around the cut before it once."""
        words = text.lstrip()
        if not (text and _joins_blanks(self.tokenizer)):
            return text
        broken = self.text[-1:].isspace()  # the line, before the cut
        own = "" if broken else text[: len(text) - len(words)]
        return (self.blank or own) + words

    def _continuation(self, texts: Sequence[Segment]) -> list[int]:
        """Tokens of texts behind those so far: what the joint text has there."""
        tokenizer, start = self.tokenizer, len(self.tokens)
        joint = template_tokens(tokenizer, self.text + "".join(one.text for one in texts))
        named = [
            token
            for one in texts
            if one.kind is Kind.TEMPLATE
            for token in template_tokens(tokenizer, one.text)
        ]
        special = [_special_ids(tokenizer, tokens) for tokens in (joint[start:], named)]
        unknown = tokenizer.unk_token  # by name, not for want of a letter
        spelt = special[0] != special[1] or any(
            unknown in one.text for one in texts if unknown and one.kind is Kind.TEXT
        )
        if joint[:start] != self.tokens or spelt:
            return [token for one in texts for token in self._separate_ids(one)]
        return joint[start:]

    def _separate_ids(self, segment: Segment) -> list[int]:
        """Tokens of a text whatever stands before it."""
        encode = template_tokens if segment.kind is Kind.TEMPLATE else plain_tokens
        if self.text:  # in no tokenizer's first place, where some put a blank before a text
            start = encode(self.tokenizer, "\n")
            tokens = encode(self.tokenizer, f"\n{segment.text}")
            if tokens[: len(start)] == start:
                return tokens[len(start) :]
        return encode(self.tokenizer, segment.text)


# an utterance costs the tokens of its joint text, once
_tokenised = lru_cache(maxsize=64)(_TokenisedPrompt)


def _beginning(tokenizer: Any, kind: Kind) -> list[int]:
    if kind is Kind.TOKENIZER_PREFIX:
        first = template_tokens(tokenizer, "a")[0]
        return list(takewhile(lambda token: token != first, tokenizer.encode("a")))
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


@lru_cache(maxsize=64)
def _joins_blanks(tokenizer: Any) -> bool:
    """Whether a blank becomes one token with the word behind it."""
    apart = [token for text in ("a", " ", "a") for token in template_tokens(tokenizer, text)]
    return template_tokens(tokenizer, "a a") != apart


def _special_ids(tokenizer: Any, tokens: Sequence[int]) -> list[int]:
    """The special ones among tokens; unknown letters are none."""
    special = special_tokens(tokenizer) - {tokenizer.unk_token_id}
    return [token for token in tokens if token in special]


def template_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of trusted text, which may name special tokens."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def plain_tokens(tokenizer: Any, text: str) -> list[int]:
    """Tokens of text that is not trusted: the names of special tokens are spelt out."""
    tokens = list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
    if special := set(_special_ids(tokenizer, tokens)):
        names = tokenizer.convert_ids_to_tokens(sorted(special))
        raise IsthmusError(
            f"The tokenizer of {tokenizer.name_or_path} reads special tokens ({', '.join(names)}) "
            f"in {text!r}. Take them out of the text."
        )
    return tokens


@lru_cache(maxsize=64)
def special_tokens(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that steer the model, also those without a role such as eos."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {n for n, token in added if token.special}
