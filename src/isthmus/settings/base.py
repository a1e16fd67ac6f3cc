"""What the settings of all parts share. No room of settings loads torch."""

from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

Tune = Literal["frozen", "lora", "full"]
Precision = Literal["float32", "bfloat16"]
DEFAULT_LANGUAGE = "default"  # stands for those that a mapping by language does not name

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SHIPPED = {
    "isthmus/tiny-conformer": ASSETS / "tiny-conformer",
    "isthmus/tiny-llama": ASSETS / "tiny-llama",
    "isthmus/tiny-llama-chat": ASSETS / "tiny-llama-chat",
}


class PartSettings(BaseModel):
    """What every part of the model shares: strict, immutable settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def build(self, *parts: Any) -> Any:
        """What these settings describe, made by isthmus.build, which loads torch.

        `parts` is what it stands between: encoder and LLM for a projector. Raises IsthmusError.
        """
        return import_module("isthmus.build").build(self, *parts)  # a room above this one


class PretrainedSettings(PartSettings):
    """A part that is loaded from a folder or a Hugging Face repository."""

    path: str
    """Hugging Face name, local folder, or a model shipped with isthmus (`isthmus/tiny-llama`) or
    fetched by it (`isthmus/whisper-base`)."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face repository."""

    def at(self, commit: str | None) -> Self:
        """These settings with the commit that a run recorded, if it did."""
        return self.model_copy(update={"revision": commit}) if commit else self
