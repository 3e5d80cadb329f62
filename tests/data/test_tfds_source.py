"""The source tfds: reads array_record datasets that tfds itself wrote, in a process that TensorFlow cannot enter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("array_record")
pytest.importorskip("importlib_resources")  # what tfds needs to write a dataset
tfds = pytest.importorskip("tensorflow_datasets")

from lmx.core.errors import DataError, FolderError  # noqa: E402
from lmx.data import read  # noqa: E402
from lmx.data.dataset_names import choose_key, documents  # noqa: E402
from lmx.data.tfds_source import read_tfds  # noqa: E402

BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"text": text, "summary": text, "label": np.int64})
        )

    def _split_generators(self, download):
        return {"train": self._generate_examples(20), "test": self._generate_examples(5)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"document {i} é" if i else " ", "summary": f"summary {i}", "label": i}
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder in which tfds prepared the dataset `tiny`."""
    home = tmp_path_factory.mktemp("tfds")
    (home / "code" / "tiny").mkdir(parents=True)
    (home / "code" / "tiny" / "tiny_dataset_builder.py").write_text(BUILDER)
    program = (
        f"import sys; sys.path.insert(0, {str(home / 'code' / 'tiny')!r})\n"
        "from tiny_dataset_builder import Tiny\n"
        f"Tiny(data_dir={str(home / 'data')!r}, file_format='array_record').download_and_prepare()\n"
        "assert 'tensorflow' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return home / "data"


def test_splits_slices_and_keys(prepared):
    train = read_tfds("tiny", prepared)
    assert {document.text for document in train} == {f"document {i} é" for i in range(1, 20)}
    assert {document.domain for document in train} == {"tiny"}
    assert len({document.origin for document in train}) == 19 and train[0].origin.startswith("tfds:tiny:train:")
    assert sorted(d.text for d in read_tfds("tiny:test@summary", prepared)) == [f"summary {i}" for i in range(5)]
    assert [d.text for d in read_tfds("tiny:train[:30%]+test@summary", prepared)[:6]] == [
        d.text for d in read_tfds("tiny@summary", prepared)[:6]
    ]
    assert len(read_tfds("tiny:1.0.0:train[:30%]+test@summary", prepared)) == 11


def test_a_folder_as_a_source(prepared):
    documents = read(f"news=tfds:{prepared}/tiny/1.0.0:test@summary")
    assert len(documents) == 5 and documents[0].domain == "news"
    assert read(f"tfds:{prepared}/tiny/1.0.0:test@summary")[0].domain == "tiny"


def test_tfds_finds_its_own_folder_and_tensorflow_stays_out(prepared, tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
    program = "import sys; from lmx.data import read; print(len(read('tfds:tiny')), 'tensorflow' in sys.modules)"
    environment = os.environ | {
        "TFDS_DATA_DIR": str(prepared),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])
    }
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.split() == ["19", "False"], done.stderr[-2000:]


@pytest.mark.parametrize(
    ("argument", "error", "message"),
    [
        ("", DataError, "the source 'tfds:' names no dataset; write tfds:NAME"),
        ("tiny:tset", DataError, "tfds:tiny has no split 'tset'; did you mean 'test'. Its splits: train, test"),
        ("tiny@txt", DataError, "no key 'txt'; did you mean 'text'. Keys that hold text: .*summary.*; others: label"),
        ("tiny@label", DataError, "has no text 'label'"),
        ("tinny", DataError, "no dataset 'tinny' is prepared in .*, and tfds knows none; did you mean"),
        ("a b", DataError, "tfds:a b cannot be read"),
    ],
)
def test_bad_names(prepared, argument, error, message):
    with pytest.raises(error, match=message):
        read_tfds(argument, prepared)


def test_a_folder_without_a_dataset(tmp_path):
    with pytest.raises(FolderError, match="holds no prepared dataset .*give the folder of a version"):
        read(f"tfds:{tmp_path}")


def test_which_text_is_meant():
    assert choose_key(None, ["a"], ["b"], "x") == "a" == choose_key("a", ["a", "text"], [], "x")
    assert choose_key(None, ["title", "text"], [], "x") == "text"
    with pytest.raises(DataError, match="which text of x is meant is not clear; add @KEY .*: a, b; others: c"):
        choose_key(None, ["a", "b"], ["c"], "x")
    with pytest.raises(DataError, match="which text of x .*Keys that hold text: none; others: c"):
        choose_key(None, [], ["c"], "x")


def test_another_format_is_refused_with_the_command_that_mends_it(prepared, tmp_path):
    copy = shutil.copytree(prepared / "tiny" / "1.0.0", tmp_path / "tiny" / "1.0.0")
    info = copy / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match="prepared as tfrecord, .*tfds build tiny --file_format=array_record"):
        read(f"tfds:{copy}")


@pytest.mark.slow
def test_no_network_is_told_within_seconds(tmp_path):
    """imdb_reviews downloads from a web server: all requests go to a proxy that is not there."""
    proxies = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")
    environment = os.environ | dict.fromkeys(proxies, "http://localhost:9") | {"TFDS_DATA_DIR": str(tmp_path)}
    program = (
        "import time; slept, sleep = [0], time.sleep\n"
        "time.sleep = lambda seconds: (slept.append(seconds), sleep(seconds))\n"
        "from lmx.data import read; from lmx.core.errors import DataError\n"
        "try: read('tfds:imdb_reviews/plain_text')\n"
        "except DataError as error: print(error)\n"
        "print(sum(slept))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment)
    assert "preparing it failed: " in done.stdout and "Is there a network?" in done.stdout, done.stdout + done.stderr
    assert "TFDS_DATA_DIR" in done.stdout
    assert float(done.stdout.split()[-1]) < 60  # tfds alone sleeps for more than 100 s


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(DataError, match=r"needs tensorflow_datasets and array_record .*pip install 'lmx\[tfds\]'"):
        read("tfds:tiny")


def test_text_that_is_not_utf8():
    assert documents([b"a", "b", None, "  "], "x", "d")[1].origin == "x:1"
    with pytest.raises(DataError, match="x, example 1: not UTF-8 .*name another key"):
        documents([b"a", np.bytes_(b"\xff")], "x", "d")
    with pytest.raises(DataError, match="holds no text: every example is blank"):
        documents([b" ", None], "x", "d")
