"""The source `hf:NAME[/CONFIG][:SPLIT][@KEY]`: text of Hugging Face datasets.

    hf:Salesforce/wikitext/wikitext-2-raw-v1:validation   ORG/NAME, its configuration, its split ("train" if not given)
    hf:stanfordnlp/imdb:train[:10%]@text                  part of a split; the text's key, where its name does not tell
    hf:/data/tiny:train                                   a folder: of save_to_disk, or of json, csv, parquet or txt

A dataset that lies in the cache of the `datasets` package (HF_HOME, HF_DATASETS_CACHE) is read without a network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmx.core.errors import DataError
from lmx.data import dataset_names
from lmx.data.documents import Document

SECONDS = 5  # for the hub to give any answer; without one the cache has to do


def read_hf(argument: str) -> list[Document]:
    """The documents of `hf:argument`.

    Raises DataError: without the package, for a dataset, configuration, split or key that there is none of, and within
    seconds for a dataset that is not on this machine where there is no network.
    """
    wanted = dataset_names.parse(argument, "hf")
    where = f"hf:{wanted.name}"
    datasets = _package()
    folder = Path(wanted.name).expanduser()
    with contextlib.ExitStack() as stack:
        reached = False
        if not folder.is_dir():
            reached = _answers()
        if not reached:
            stack.enter_context(_offline(datasets))
        try:
            found = _load_folder(datasets, folder) if folder.is_dir() else _load(datasets, wanted.name)
            table = _table(datasets, found, wanted.split, where)
        except DataError:
            raise
        except Exception as error:  # the library raises what it likes
            raise _failure(datasets, where, error, reached or folder.is_dir()) from error
    kinds = {key: getattr(feature, "dtype", None) for key, feature in table.features.items()}
    textual = [key for key, kind in kinds.items() if kind in ("string", "large_string")]
    key = dataset_names.choose_key(wanted.key, textual, [key for key in kinds if key not in textual], where)
    texts = (row[key] for row in table.select_columns([key]))
    return dataset_names.documents(texts, f"{where}:{wanted.split}", folder.name)


def _package() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"the source 'hf:' needs the package datasets ({error}); pip install 'lmx[datasets]'."
        ) from error
    return datasets


def _answers() -> bool:
    """Whether the hub gives any answer, through whatever proxy is set."""
    import huggingface_hub

    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=SECONDS)
    except Exception:  # no name, no route, no answer in time, or told to stay offline
        return False
    return True


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Let both packages ask nobody, as HF_HUB_OFFLINE=1 would have: else they try for half a minute."""
    from huggingface_hub import constants

    flags = [(constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")]
    before = [getattr(module, name) for module, name in flags]
    try:
        for module, name in flags:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(flags, before, strict=True):
            setattr(module, name, value)


def _load_folder(datasets: Any, folder: Path) -> Any:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(str(folder))
    return datasets.load_dataset(str(folder))


def _load(datasets: Any, name: str) -> Any:
    parts = name.split("/")
    if len(parts) > 3 or not all(parts):
        raise DataError(f"hf:{name} is neither a folder nor of the form ORG/NAME or ORG/NAME/CONFIG.")
    return datasets.load_dataset("/".join(parts[:2]), *parts[2:])


def _table(datasets: Any, found: Any, split: str, where: str) -> Any:
    """The rows of a split; a folder that save_to_disk wrote for one split is that split, whatever its name."""
    if isinstance(found, datasets.Dataset):
        return found
    dataset_names.check_split(split, list(found), where)
    lengths = {name: len(part) for name, part in found.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (AssertionError, ValueError) as error:
        raise DataError(f"{where}: {split!r} is no part of a split ({error}); write such as train[:10%].") from error
    return datasets.concatenate_datasets(
        [found[part.splitname].select(range(part.from_ or 0, lengths[part.splitname] if part.to is None else part.to))
         for part in parts]
    )  # fmt: skip


def _failure(datasets: Any, where: str, error: Exception, reached: bool) -> DataError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    if reached:
        return DataError(f"{where} cannot be loaded ({said}); check its name (ORG/NAME or ORG/NAME/CONFIG) or folder.")
    return DataError(
        f"{where} is not in the cache {str(datasets.config.HF_DATASETS_CACHE)!r}, and the Hugging Face hub does not "
        f"answer ({said}). Load it once where there is a network, or give a folder that save_to_disk wrote."
    )
