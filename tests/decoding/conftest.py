"""What several tests of decoding share."""

import pytest
import torch

from isthmus.model.llm import LLM, character_tokenizer, new_llm
from isthmus.settings.llms import LLMArchitecture


@pytest.fixture(scope="package")
def llm() -> LLM:
    """A language model of letters that knows nothing."""
    torch.manual_seed(0)
    sizes = LLMArchitecture(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    return new_llm(sizes, character_tokenizer()).eval()
