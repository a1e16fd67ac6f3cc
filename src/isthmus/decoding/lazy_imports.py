"""For a process that decodes recordings and does nothing else: what it can do without.

To define any network, transformers imports torch's compiler and the tensors and checkpoints that
are spread over processes, and it lists its hundreds of models a second time. That takes as long as
torch itself, and hearing a recording needs none of it.
"""

import sys
from collections.abc import Callable, Mapping
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from transformers.utils.import_utils import is_torch_distributed_available


def defer_compiler_imports() -> None:
    """Leave out what compiles networks or spreads them, for as long as this process lives.

    To be called before the first network is imported: what was is not undone. The modules of
    POSTPONED are then known but not run, until one is asked for more than its answers. That
    the results are then the same is known of the versions that tests/test_cold_start.py is run
    with: the pinned ones, and the newest (`make newest`).
    """
    with patch.object(torch.distributed, "is_available", lambda: False):
        is_torch_distributed_available()  # it remembers
    for name, answers in POSTPONED.items():
        spec = PathFinder.find_spec(name, _folders(name.rpartition(".")[0]))
        if name not in sys.modules and spec is not None:
            module = module_from_spec(spec)
            module.__class__ = _Postponed
            if name not in APART:
                vars(module).pop("__path__", None)
            vars(module).update(answers)
            _enter(name, module)


class _Postponed(ModuleType):
    """A module that is run when it is asked for something that it has no answer to."""

    def __getattr__(self, name: str) -> Any:
        path = name == "__path__" and _folders(self.__name__)  # a part of a package is imported
        if name.startswith("__") and not path:  # Python asks any module for such names
            raise AttributeError(name)
        return getattr(_run(self.__name__), name)


def _run(name: str) -> ModuleType:
    """The module itself, after the package that it is a part of."""
    parent = name.rpartition(".")[0]
    if parent:
        _run(parent)
    module = sys.modules[name]
    spec, postponed = module.__spec__, isinstance(module, _Postponed)
    if postponed and spec is not None and spec.loader is not None:
        module.__class__ = ModuleType
        for answer in POSTPONED[name]:
            delattr(module, answer)
        if folders := _folders(name):
            vars(module)["__path__"] = folders
        spec.loader.exec_module(module)
        if sys.modules[name] is not module:  # it has put another into its place
            _enter(name, sys.modules[name])
            module.__class__ = _Postponed  # who holds it is led there
    return sys.modules[name]


def _folders(package: str) -> Any:
    """Where the parts of a package lie, None for a module without parts."""
    spec = sys.modules[package].__spec__
    return spec and spec.submodule_search_locations


def _enter(name: str, module: ModuleType) -> None:
    sys.modules[name] = module
    parent, _, own = name.rpartition(".")
    setattr(sys.modules[parent], own, module)


def _as_it_is(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """What a decorator that tells the compiler something makes of a function."""
    return _as_it_is if function is None else function


INDEXING = "torch._dynamo._trace_wrapped_higher_order_op"


def _indexing(*arguments: Any) -> Any:
    """How masks that are functions are computed."""
    return _run(INDEXING).TransformGetItemToIndex(*arguments)


POSTPONED: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "torch._dynamo": dict.fromkeys(
        ("allow_in_graph", "assume_constant_result", "disable"), _as_it_is
    ),
    INDEXING: {"TransformGetItemToIndex": _indexing},
    # peft and others take for granted that transformers has imported these
    "torch.distributed.checkpoint": {},
    "torch.distributed.fsdp": {},
    "torch.distributed.tensor": {},
    "transformers.models": {},  # its list of models is part of that of transformers
}
APART = {"transformers.models"}  # whose parts do not need the package to be run
