"""Models of the Hugging Face hub: a name to a folder on this machine.

The package huggingface_hub does the work; it is an extra (`pip install 'lmx[hf]'`). What a machine has once fetched it
has in huggingface_hub's cache (HF_HOME), and then no network is needed.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path
from typing import Any

from lmx.core.errors import FolderError

PREFIX = "hf:"
SECONDS = 10.0  # to hear from the hub at all; fetching may then take as long as it takes
# What is fetched of a model, no pickles, and of its tokenizer alone, with the configs that say how texts end.
MODEL = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.spm")
TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt", "*.spm",
    "spiece.model", "sentencepiece*", "config.json", "generation_config.json",
)  # fmt: skip
PROOFS = {MODEL: "*.safetensors", TOKENIZER: "tokenizer.json"}  # what the cache must hold of it to be of use
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_name(text: str | os.PathLike) -> bool:
    """Whether this names a model of the hub: `hf:NAME`, or `owner/name` where there is no folder `owner`."""
    text = os.fspath(text)
    if text.startswith(PREFIX):
        return True
    looks = _NAME.fullmatch(text) and not text.endswith(".json")
    return bool(looks) and not Path(text).exists() and not Path(text.split("/")[0]).exists()


def folder(text: str | os.PathLike, wanted: tuple[str, ...] = MODEL) -> Path:
    """The folder that a user means: a path as it is, and for a name of the hub the fetched files (MODEL, TOKENIZER).

    Raises FolderError, within seconds, for a name that cannot be fetched.
    """
    text = os.fspath(text)
    return fetch(text.removeprefix(PREFIX), wanted) if is_name(text) else Path(text).expanduser()


def fetch(name: str, wanted: tuple[str, ...] = MODEL) -> Path:
    """The files of a model of the hub, all (MODEL) or the TOKENIZER's, fetched unless they are in the cache.

    Raises FolderError, within seconds, if it is not cached and there is no package, no network or no such model.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors
    except ImportError as error:
        raise FolderError(
            f"there is no folder {name!r}; to fetch the model of this name from the Hugging Face hub, install the "
            "package huggingface_hub (pip install 'lmx[hf]')"
        ) from error
    cached = _cached(huggingface_hub, name, wanted)
    if constants.HF_HUB_OFFLINE:
        return _or_raise(cached, name, "HF_HUB_OFFLINE is set, so it is not asked for")
    answer = _within(SECONDS, lambda: huggingface_hub.HfApi().model_info(name, timeout=SECONDS / 2))
    if isinstance(answer, errors.RepositoryNotFoundError):
        raise FolderError(
            f"there is neither a folder nor a model of the Hugging Face hub named {name!r} (or it is private: log in "
            "with `hf auth login`)"
        ) from answer
    if isinstance(answer, errors.GatedRepoError):
        raise FolderError(f"the model {name!r} of the Hugging Face hub asks for consent: give it there, and log in")
    if answer is None or isinstance(answer, BaseException):
        return _or_raise(cached, name, "the hub could not be reached; check the network", answer)
    files = [sibling.rfilename for sibling in answer.siblings or ()]
    if wanted == MODEL and files and not any(file.endswith(".safetensors") for file in files):
        raise FolderError(f"the model {name!r} of the Hugging Face hub {only_pickles(files)}")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(wanted)))
    except Exception as error:  # of whatever package it fetches with
        return _or_raise(None, name, f"fetching it failed ({error})", error)


def only_pickles(files: list[str]) -> str:
    """What is wrong with a model that has these files and no safetensors, and how to mend it."""
    pickles = [file for file in files if file.endswith(PICKLES)]
    if not pickles:
        return f"has no weights in safetensors files (it holds {', '.join(sorted(files)[:8]) or 'nothing'})"
    return (
        f"has its weights only as {', '.join(pickles[:3])}. lmx opens no pickles, since they can run code; with "
        "transformers and torch: `model.from_pretrained(FOLDER).save_pretrained(NEW)` of its class writes safetensors"
    )


def _cached(hub: Any, name: str, wanted: tuple[str, ...]) -> Path | None:
    try:
        place = Path(hub.snapshot_download(name, allow_patterns=list(wanted), local_files_only=True))
    except Exception:  # there is nothing usable, whatever the reason
        return None
    return place if any(place.glob(PROOFS[wanted])) else None


def _or_raise(cached: Path | None, name: str, why: str, cause: Any = None) -> Path:
    if cached is not None:
        return cached
    raise FolderError(
        f"{name!r} is no folder here, and as a model of the Hugging Face hub it is not in the cache: {why}. Fetch it "
        "where there is a network (`hf download`), and give the folder"
    ) from (cause if isinstance(cause, BaseException) else None)


def _within(seconds: float, work: Any) -> Any:
    """What `work()` returns or raises, or None if it takes longer: a resolver may hang, whatever timeouts are set."""
    answer: list[Any] = []

    def run() -> None:
        try:
            answer.append(work())
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None
