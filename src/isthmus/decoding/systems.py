"""Whatever can transcribe, by its name: runs, and pretrained models, which are systems too."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isthmus.decoding.recogniser import Recogniser
from isthmus.decoding.transcriber import RUN_FILES, decode_settings, load, run_folder
from isthmus.errors import IsthmusError
from isthmus.model.device import on_device
from isthmus.model.hub import download
from isthmus.model.parts import resolve
from isthmus.recipe import change_settings
from isthmus.runs.folder import CONFIG, RECIPE, holds_run, local_system
from isthmus.settings.search import DecodeSettings, RecogniserSettings

log = logging.getLogger(__name__)


def system_folder(name: str | Path) -> Path:
    """The folder of a run or of a pretrained recogniser, downloaded if it is of the hub.

    It holds a recipe if it is a run. Raises IsthmusError.
    """
    local = local_system(name)
    if local is None and not str(name).startswith("isthmus/"):
        known = download(str(name), None, [RECIPE, CONFIG])  # one small file says what it is
        if holds_run(known):
            return download(str(name), None, RUN_FILES)
    elif local is not None and holds_run(local):
        return local
    return resolve(str(local or name))


def system_settings(
    folder: Path, changes: Mapping[str, Any], ears: str | None = None
) -> RecogniserSettings:
    """The settings of what is in a `system_folder`, some of them replaced; None leaves one.

    `ears` are those of `load_system`. Warns of settings that have no effect on it. No model is
    loaded. Raises IsthmusError.
    """
    given = {name: value for name, value in changes.items() if value is not None}
    if holds_run(folder):
        if given.pop("language", None):
            log.warning("language has no effect on a run: its instruction says what it is to do.")
        return decode_settings(folder, given, None if ears is None else run_folder(ears))
    from isthmus.decoding.pretrained import pretrained_settings  # of which runs need nothing

    own = pretrained_settings(folder)
    idle = [name for name in given if name not in type(own).model_fields]
    if idle:
        log.warning("no effect on %s: %s", folder, ", ".join(idle))
    return change_settings(own, {name: given[name] for name in given if name not in idle})


def load_system(
    name: str | Path,
    *,
    cached: bool = False,
    align_model: str | None = None,
    ears: str | None = None,
    device: str | None = None,
    **settings: Any,
) -> Recogniser:
    """What transcribes, by its name: a run, a pretrained model, or a run of `pretrain-ctc`.

    `cached`, `align_model`, `ears` and `device` are those of `transcriber.load`, as are the
    settings, of which pretrained models have few, and `language` besides. They compute in float32.
    Raises IsthmusError.
    """
    folder = system_folder(name)
    own = system_settings(folder, settings, ears)
    if isinstance(own, DecodeSettings):
        arguments: dict[str, Any] = {"cached": cached, "ears": ears, "device": device}
        return load(folder, align_model=align_model, **arguments, **own.model_dump())
    if ears is not None:
        raise IsthmusError(f"--ears: {name} is no run, and hears for itself. Leave it out.")
    from isthmus.decoding.pretrained import load_pretrained

    with on_device(device):
        return load_pretrained(folder, own, str(name), align_model)
