"""Which prompt an utterance is decoded with."""

import logging
import zlib
from collections.abc import Sequence

import numpy as np

from isthmus.errors import IsthmusError
from isthmus.model.prompt import InstructedPrompt, Prompt, prompt_tokens
from isthmus.model.speech_llm import SpeechLLM

log = logging.getLogger(__name__)


def prompts_to_ask(model: SpeechLLM, instruction: str | None) -> tuple[Prompt, ...]:
    """Those that the model was trained with, or its template with another instruction.

    Raises IsthmusError where the template has no place for one.
    """
    if instruction is None:
        return model.prompts
    prompt = model.prompt
    if not isinstance(prompt, InstructedPrompt):
        raise IsthmusError(
            f"decode.instruction is {instruction!r}, but the run's prompt has no instruction "
            "(template: bare). Leave it out."
        )
    other = prompt.model_copy(update={"instruction": instruction})
    if other not in prompt.variants():
        log.warning(
            "decode.instruction: %r is not what the run was trained with (%s). Models read such "
            "instructions badly: compare the error rates.",
            instruction,
            ", ".join(repr(known.words) for known in prompt.variants()),
        )
    return (other,)


def prompt_for(prompts: Sequence[Prompt], waveform: np.ndarray) -> Prompt:
    """One of the prompts, chosen by the utterance (S,) alone: by a checksum of its samples."""
    return prompts[zlib.crc32(np.ascontiguousarray(waveform).tobytes()) % len(prompts)]


def tokens_beyond(model: SpeechLLM, prompts: Sequence[Prompt]) -> int:
    """Positions that the longest of these prompts takes beyond those `model` counts on."""
    longest = max(prompt_tokens(prompt, model.llm.tokenizer) for prompt in prompts)
    return max(0, longest - model.prompt_tokens)
