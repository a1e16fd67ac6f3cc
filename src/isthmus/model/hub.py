"""What is fetched from the Hugging Face hub, and what it says when it does not give it."""

import re
from pathlib import Path
from typing import Any

from isthmus.errors import IsthmusError, one_line
from isthmus.model.weights import PICKLED, SAFE, indexed

DESCRIBING = ["*.json", "*.model", "*.txt", "*.jinja"]  # all of a model but its weights


def download_model(path: str, revision: str | None) -> Path:
    """The files of a model that are read: all but the weights in other formats and precisions."""
    folder = download(path, revision, [*DESCRIBING, SAFE])
    commit = folder.name
    if (folder / SAFE).is_file():
        return folder
    if shards := indexed(folder, SAFE):
        return download(path, commit, shards)
    return download(path, commit, indexed(folder, PICKLED) or [PICKLED])


def download(path: str, revision: str | None, patterns: list[str]) -> Path:
    """The files of a Hugging Face repository that match `patterns`, in a folder of its cache."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w.-]+", path) or path.startswith("."):
        raise IsthmusError(f"{path}: no such folder, and not a Hugging Face name.")
    from huggingface_hub import get_session, snapshot_download

    hooks = get_session().event_hooks
    if _limit_wait not in hooks["request"]:
        get_session().event_hooks = {**hooks, "request": [*hooks["request"], _limit_wait]}
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many unrelated kinds
        at = f" at revision {revision!r}" if revision else ""
        raise IsthmusError(
            f"{path}{at}: neither a local folder nor to be had from the Hugging Face hub "
            f"({type(error).__name__}: {one_line(error)}). {_remedy(error, path)}"
        ) from error


def _limit_wait(request: Any) -> None:
    """A hub that is silent is given up: its client would wait for ever for most answers."""
    from huggingface_hub import constants

    waits = request.extensions.get("timeout", {})
    kinds = ("connect", "read", "write", "pool")
    limit = constants.HF_HUB_DOWNLOAD_TIMEOUT
    request.extensions["timeout"] = {kind: waits.get(kind) or limit for kind in kinds}


def _remedy(error: Exception, path: str) -> str:
    """What to do when the hub does not give model `path`."""
    from huggingface_hub import constants, errors

    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    match error:
        case errors.GatedRepoError():
            page = f"{constants.ENDPOINT}/{path}"
            return f"It is gated: accept its terms at {page}, then {log_in}."
        case errors.RepositoryNotFoundError():
            return f"Correct the name; if the repository is private, {log_in}."
        case errors.RevisionNotFoundError():
            return "There is no such revision: correct it, or leave it out."
    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set, and the cache lacks files of it: unset it, or give a folder."
    return "Check the name and the connection and try again, or download it to a folder."
