"""isthmus: give any language model ears.

A speech encoder, a small trained projector, and a language model that writes the transcript.

    import isthmus
    print(isthmus.load().transcribe("a.wav").text)
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.decoding.transcriber import Transcriber, load
    from isthmus.decoding.transcript import Transcript
    from isthmus.errors import IsthmusError
    from isthmus.recipe import Recipe, load_recipe

__version__ = version("isthmus")
__all__ = [
    "IsthmusError",
    "Recipe",
    "Transcriber",
    "Transcript",
    "__version__",
    "load",
    "load_recipe",
]

_HOMES = {
    "IsthmusError": "isthmus.errors",
    "Recipe": "isthmus.recipe",
    "Transcriber": "isthmus.decoding.transcriber",
    "Transcript": "isthmus.decoding.transcript",
    "load": "isthmus.decoding.transcriber",
    "load_recipe": "isthmus.recipe",
}


def __getattr__(name: str) -> Any:
    """Public names load their room when first asked for: importing isthmus itself is cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
