"""The source `tfds:NAME[/CONFIG][:SPLIT][@KEY]`: text of TensorFlow Datasets, without TensorFlow.

    tfds:ag_news_subset                     the split "train", its text chosen by the key's name
    tfds:imdb_reviews/plain_text:test@text
    tfds:/data/tiny/1.0.0:train             a folder that was prepared before

What was prepared (as array_record) is read where tensorflow_datasets keeps it: ~/tensorflow_datasets, or
TFDS_DATA_DIR. What was not is downloaded and prepared first, in a process of its own (prepare_tfds.py), for the
builders of some datasets import TensorFlow.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lmx.core.errors import DataError, FolderError, nearest
from lmx.data import dataset_names
from lmx.data.documents import Document

FORMAT = "array_record"


def read_tfds(argument: str, data_dir: str | Path | None = None) -> list[Document]:
    """The documents of `tfds:argument`; `data_dir` is the folder of prepared datasets, tfds's own if not given.

    Raises DataError: without the package, for a dataset, split or key that nobody knows, for one that was prepared in
    another format, and for one that cannot be downloaded (within seconds where there is no network); FolderError for a
    folder that holds none.
    """
    wanted = dataset_names.parse(argument, "tfds")
    where = f"tfds:{wanted.name}"
    tfds = _package()
    if Path(wanted.name).expanduser().is_dir():
        builder = _from_folder(tfds, Path(wanted.name).expanduser())
    else:
        builder = _prepared(tfds, wanted.name, data_dir)
        if builder is None:
            _prepare(tfds, wanted.name, data_dir)
            builder = _prepared(tfds, wanted.name, data_dir)
    if builder is None:
        raise DataError(f"{where} was prepared, but is not found in {_home(tfds, data_dir)}; name its folder instead.")
    if builder.info.file_format.value != FORMAT:
        raise DataError(
            f"{where} was prepared as {builder.info.file_format.value}, which takes TensorFlow to read. Prepare it "
            f"again: tfds build {builder.name} --file_format={FORMAT}"
        )
    dataset_names.check_split(wanted.split, list(builder.info.splits), where)
    features = dict(builder.info.features.items()) if hasattr(builder.info.features, "items") else {}
    textual = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
    others = [key for key in features if key not in textual]
    key = dataset_names.choose_key(wanted.key, textual, others, where)
    source = builder.as_data_source(split=wanted.split)
    texts = (source[number][key] for number in range(len(source)))
    return dataset_names.documents(texts, f"{where}:{wanted.split}", builder.name)


def _package() -> Any:
    try:
        import array_record  # noqa: F401  tensorflow_datasets imports it late, and says less
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"the source 'tfds:' needs tensorflow_datasets and array_record ({error}); pip install 'lmx[tfds]'."
        ) from error
    return tfds


def _home(tfds: Any, data_dir: str | Path | None) -> str:
    return str(data_dir or os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR)


def _from_folder(tfds: Any, folder: Path) -> Any:
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # tfds raises what it likes
        raise FolderError(
            f"the folder {str(folder)!r} holds no prepared dataset ({_brief(error)}); give the folder of a version, "
            "with dataset_info.json in it."
        ) from error


def _prepared(tfds: Any, name: str, data_dir: str | Path | None) -> Any | None:
    """The dataset as it lies prepared on this machine, found by its files alone; None if it does not."""
    try:
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir, file_format=None)
    except tfds.core.DatasetNotFoundError:
        return None
    except Exception as error:  # a name that tfds cannot parse, files that are damaged
        raise DataError(f"tfds:{name} cannot be read from {_home(tfds, data_dir)}: {_brief(error)}.") from error


def _prepare(tfds: Any, name: str, data_dir: str | Path | None) -> None:
    """Download and prepare a dataset in another process, which shows its progress on stderr."""
    bare = name.split("/")[0].split(":")[0]
    known = tfds.list_builders(with_community_datasets=False)
    if bare not in known:
        close = nearest(bare, known) or "."
        raise DataError(f"no dataset {bare!r} is prepared in {_home(tfds, data_dir)}, and tfds knows none{close}")
    command = [sys.executable, "-m", "lmx.data.prepare_tfds", name, *([] if data_dir is None else [str(data_dir)])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode == 0:
        return
    try:
        failed = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        failed = {"kind": "other", "message": f"its process ended with code {done.returncode}"}
    mend = {
        "network": "Is there a network? Prepare it where there is one, and copy the folder or set TFDS_DATA_DIR.",
        "package": f"Install what its builder needs, or prepare it elsewhere: tfds build {bare} --file_format={FORMAT}",
    }.get(failed["kind"], f"Prepare it by hand: tfds build {bare} --file_format={FORMAT}")
    raise DataError(
        f"tfds:{name} is not prepared in {_home(tfds, data_dir)}, and preparing it failed: {failed['message']}. {mend}"
    )


def _brief(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
