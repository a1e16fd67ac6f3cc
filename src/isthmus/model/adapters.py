"""LoRA adapters (arXiv 2106.09685) alone: in a folder that peft opens, or in the weights."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from isthmus.model.llm import LLM


def save_adapter(llm: LLM, folder: Path, base: str, revision: str | None = None) -> None:
    """Write the adapters of a language model into a folder that `PeftModel.from_pretrained` opens.

    `base` and `revision` are the model they belong to, as its settings name it.
    """
    from peft import get_peft_model_state_dict  # takes seconds to import

    network: Any = llm.network
    (config,) = network.peft_config.values()
    config.base_model_name_or_path = None  # or else peft asks the hub for it
    weights = get_peft_model_state_dict(network, save_embedding_layers=False)
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    config.base_model_name_or_path, config.revision = base, revision
    config.save_pretrained(folder)  # makes it
    save_file(
        {f"base_model.model.{name}": value.contiguous() for name, value in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )


@torch.no_grad()
def merge_adapters(llm: LLM) -> None:
    """Add the adapters to the weights they stand beside, for good."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # takes seconds to import

    for module in llm.network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
