"""What several tests of decoding share."""

import pytest
import torch

from isthmus.model.llm import LLM, LLMArchitecture, character_tokenizer


@pytest.fixture(scope="package")
def llm() -> LLM:
    """A language model of letters that knows nothing."""
    torch.manual_seed(0)
    sizes = LLMArchitecture(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return sizes.build(character_tokenizer()).eval()
