"""What the language model learns to repeat is the sequence that it will be decoded with."""

from collections.abc import Callable

import numpy as np
import pytest

from isthmus.lab.language_model import IGNORE, mishear, repetition
from isthmus.model.llm import LLM
from isthmus.model.prompt import (
    BarePrompt,
    ChatPrompt,
    PaperPrompt,
    Prompt,
    SlamPrompt,
    plain_tokens,
    tokenise,
)


@pytest.mark.parametrize("prompt", [PaperPrompt(), SlamPrompt(), BarePrompt(), ChatPrompt()])
def test_a_repetition_is_the_prompt_with_letters_for_audio(
    prompt: Prompt, load_llm: Callable[..., LLM]
) -> None:
    llm = load_llm("llama")
    llm.tokenizer.eos_token = "<pad>"  # the prompt's end token, which may be another, is taken
    text = "say </s> now"
    told = plain_tokens(llm.tokenizer, mishear(text, np.random.default_rng(3), 0.2))
    tokens, labels = repetition(llm, prompt, text, np.random.default_rng(3), 0.2)
    pieces = tokenise(prompt, llm.tokenizer, text)
    expected = [told if piece.tokens is None else piece.tokens for piece in pieces]
    assert tokens == [token for ids in expected for token in ids]
    reply = [token for piece in pieces if piece.loss for token in piece.tokens or []]
    assert labels == [IGNORE] * (len(tokens) - len(reply)) + reply
    assert llm.tokenizer.convert_tokens_to_ids("</s>") not in reply
