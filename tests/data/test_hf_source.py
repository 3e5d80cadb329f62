"""The source hf: reads folders and the cache of the datasets package, and says at once that there is no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lmx.core.errors import DataError
from lmx.data import read


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """The package, with a cache of its own."""
    module = pytest.importorskip("datasets")
    before, module.config.HF_DATASETS_CACHE = module.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("cache")
    yield module
    module.config.HF_DATASETS_CACHE = before


@pytest.fixture(scope="module")
def home(datasets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    rows = {"text": [f"doc {i} é" for i in range(20)] + [" ", None], "label": list(range(22))}
    table = datasets.Dataset.from_dict(rows)
    datasets.DatasetDict({"train": table, "test": table.select(range(5))}).save_to_disk(str(folder / "saved"))
    table.save_to_disk(str(folder / "one"))
    (folder / "empty").mkdir()
    (folder / "lines").mkdir()
    for name in ("train", "test"):
        lines = (json.dumps({"first": f"{name} {i}", "second": "s", "n": i}) for i in range(4))
        (folder / "lines" / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def test_what_save_to_disk_wrote(home):
    documents = read(f"hf:{home}/saved")
    assert [document.text for document in documents] == [f"doc {i} é" for i in range(20)]
    assert documents[3].origin == f"hf:{home}/saved:train:3" and documents[3].domain == "saved"
    assert len(read(f"hf:{home}/saved:test")) == 5
    assert [d.text for d in read(f"hf:{home}/saved:train[2:4]+test")][:3] == ["doc 2 é", "doc 3 é", "doc 0 é"]
    assert len(read(f"hf:{home}/saved:train[:50%]")) == 11
    assert read(f"news=hf:{home}/one")[0].domain == "news"


def test_a_folder_of_files(home):
    assert [d.text for d in read(f"hf:{home}/lines:test@first")] == [f"test {i}" for i in range(4)]
    with pytest.raises(DataError, match="which text of .* is meant is not clear; .*@KEY.*: first, second; others: n"):
        read(f"hf:{home}/lines")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the source 'hf:' names no dataset; write hf:NAME"),
        ("{home}/saved:tset", "has no split 'tset'; did you mean 'test'. Its splits: train, test"),
        ("{home}/saved:train[:3x]", r"'train\[:3x\]' is no part of a split"),
        ("{home}/saved@txt", "no key 'txt'; did you mean 'text'. Keys that hold text: text; others: label"),
        ("{home}/saved@label", "has no text 'label'"),
        ("{home}/empty", "cannot be loaded .*check its name .*or folder"),
        ("a/b/c/d", "neither a folder nor of the form ORG/NAME or ORG/NAME/CONFIG"),
    ],
)
def test_bad_names(home, name, message):
    with pytest.raises(DataError, match=message):
        read(f"hf:{name.format(home=home)}")


@pytest.mark.slow
def test_without_a_network_the_cache_serves_or_the_answer_comes_at_once(home, datasets, tmp_path):
    """All requests go to a proxy that is not there."""
    read(f"hf:{home}/lines@first")  # from now on a dataset of that name is in the cache
    proxies = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://localhost:9")
    environment = os.environ | proxies | {
        "HF_HOME": str(tmp_path),
        "HF_DATASETS_CACHE": str(datasets.config.HF_DATASETS_CACHE),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }  # fmt: skip
    program = (
        "from lmx.data import read; from lmx.core.errors import DataError\n"
        "import datasets, time\n"
        "print(len(read('hf:lines:test@first')), datasets.config.HF_HUB_OFFLINE)\n"
        "slept, sleep = [0], time.sleep\n"
        "time.sleep = lambda seconds: (slept.append(seconds), sleep(seconds))\n"
        "try: read('hf:somebody/something')\n"
        "except DataError as error: print(error)\n"
        "print(sum(slept))"
    )
    more = dict(env=environment, cwd=tmp_path)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, **more)
    assert done.stdout.startswith("4 False\nhf:somebody/something is not in the cache"), done.stdout + done.stderr
    assert "hub does not answer" in done.stdout and "save_to_disk" in done.stdout
    assert float(done.stdout.split()[-1]) < 15  # slept; the package alone tries for more than 20 s


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package datasets .*pip install 'lmx\[datasets\]'"):
        read("hf:somebody/something")
