"""Settings of the language model; `model.llm` builds it."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from isthmus.errors import IsthmusError
from isthmus.settings.base import PartSettings, PretrainedSettings, Tune


class LoraSettings(PartSettings):
    """Low-rank adapters (arXiv 2106.09685) on the named linear layers."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


class LLMSettings(PretrainedSettings):
    """Any causal language model by Hugging Face name or folder."""

    gguf: str | None = None
    """The GGUF file to take of the repository or folder; `path` may also name such a file."""
    tune: Tune = "frozen"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the weights; auto is what the training has, and without one the files' own."""
    quantise: Literal["none", "int8", "int4", "fp8"] = "none"
    """Frozen weights in 8 or 4 bits, or products of float8 numbers (GPUs since Ada)."""
    lora: LoraSettings = LoraSettings()
    """Used with `tune: lora`."""

    @property
    def mergeable(self) -> bool:
        """Whether there are adapters, beside weights that they can be added to."""
        return self.tune == "lora" and self.quantise == "none"

    @model_validator(mode="after")
    def _one_file(self) -> "LLMSettings":
        if self.gguf is not None and self.path.endswith(".gguf"):
            raise ValueError("path names a GGUF file already: leave out gguf, or name its folder")
        return self

    @property
    def files(self) -> tuple[str, str | None, str | None]:
        """Model, revision and GGUF file, whichever way the latter is named."""
        if not self.path.endswith(".gguf"):
            return self.path, self.revision, self.gguf
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise IsthmusError(
                f"llm.path: there is no file {file}. For one of the hub, set llm.path to its "
                "repository and llm.gguf to the file."
            )
        return str(file.parent), None, file.name


class LLMArchitecture(PartSettings):
    """Sizes of a small language model to be trained from nothing."""

    family: Literal["llama", "bloom"] = "llama"
    """bloom's feed-forward is always 4 times its width, and it takes any length."""
    hidden_size: int = 192
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 512
    max_position_embeddings: int = 1024
