"""isthmus: give any language model ears.

A speech encoder, a small trained projector, and a language model that writes the transcript.

    import isthmus
    print(isthmus.load().transcribe("a.wav").text)
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from isthmus.decoding.evaluate import Evaluation, evaluate
    from isthmus.decoding.transcriber import Transcriber, load
    from isthmus.decoding.transcript import Alternative, Segment, Transcript, Word
    from isthmus.errors import IsthmusError, RetryLater
    from isthmus.recipe import Recipe, load_recipe
    from isthmus.runs.checkpoint import Progress
    from isthmus.scoring import Comparison, Score, compare, score
    from isthmus.training.runs import Opening, train

__version__ = version("isthmus")
__all__ = [
    "Alternative",
    "Comparison",
    "Evaluation",
    "IsthmusError",
    "Opening",
    "Progress",
    "Recipe",
    "RetryLater",
    "Score",
    "Segment",
    "Transcriber",
    "Transcript",
    "Word",
    "__version__",
    "compare",
    "evaluate",
    "load",
    "load_recipe",
    "score",
    "train",
]

_HOMES = {
    "Alternative": "isthmus.decoding.transcript",
    "Comparison": "isthmus.scoring",
    "Evaluation": "isthmus.decoding.evaluate",
    "IsthmusError": "isthmus.errors",
    "Opening": "isthmus.training.runs",
    "Progress": "isthmus.runs.checkpoint",
    "Recipe": "isthmus.recipe",
    "RetryLater": "isthmus.errors",
    "Score": "isthmus.scoring",
    "Segment": "isthmus.decoding.transcript",
    "Transcriber": "isthmus.decoding.transcriber",
    "Transcript": "isthmus.decoding.transcript",
    "Word": "isthmus.decoding.transcript",
    "compare": "isthmus.scoring",
    "evaluate": "isthmus.decoding.evaluate",
    "load": "isthmus.decoding.transcriber",
    "load_recipe": "isthmus.recipe",
    "score": "isthmus.scoring",
    "train": "isthmus.training.runs",
}


def __getattr__(name: str) -> Any:
    """Public names load their room when first asked for: importing isthmus itself is cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module 'isthmus' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names, whether or not they were asked for yet."""
    return sorted(__all__)
