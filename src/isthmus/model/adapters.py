"""LoRA adapters (arXiv 2106.09685) alone: in a folder that peft opens, or in the weights."""

from pathlib import Path
from typing import Any

import torch

from isthmus.model.llm import LLM
from isthmus.model.parts import no_bars


def save_adapter(llm: LLM, folder: Path, base: str, revision: str | None = None) -> None:
    """Write the adapters of a language model into a folder that `PeftModel.from_pretrained` opens.

    `base` and `revision` are the model they belong to, as its settings name it.
    """
    network: Any = llm.network
    config = network.peft_config[network.active_adapters()[0]]
    config.task_type = "CAUSAL_LM"
    config.inference_mode = True
    config.base_model_name_or_path = None  # or else peft asks the hub for it
    with no_bars():
        network.save_pretrained(folder)
    config.base_model_name_or_path, config.revision = base, revision
    config.save_pretrained(folder)


@torch.no_grad()
def merge_adapters(llm: LLM) -> None:
    """Add the adapters to the weights they stand beside, for good."""
    from peft.tuners.tuners_utils import BaseTunerLayer  # takes seconds to import

    for module in llm.network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
