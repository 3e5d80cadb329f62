"""The notebooks in colab/ run from top to bottom in a fresh kernel, and are committed without outputs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture
def python3(tmp_path, monkeypatch):
    """The kernel that notebooks name, run by this interpreter, seeing lmx and one device."""
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    about = {"argv": command, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(about))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    return "python3"


def test_there_are_notebooks():
    assert {"01_train_and_sample", "02_bring_your_model", "03_factorize"} <= {path.stem for path in NOTEBOOKS}


@each
def test_no_outputs_are_committed(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


@each
@pytest.mark.slow
def test_a_notebook_runs(path, python3, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="notebooks are run with nbclient: pip install -e '.[test]'")
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run with nbclient: pip install -e '.[test]'")
    pytest.importorskip("ipykernel", reason="notebooks need a kernel: pip install -e '.[test]'")
    notebook = nbformat.read(path, as_version=4)
    place = tmp_path / "work"
    place.mkdir()
    resources = {"metadata": {"path": str(place)}}
    patience = dict(timeout=300, startup_timeout=300)
    nbclient.NotebookClient(notebook, kernel_name=python3, resources=resources, **patience).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the loss is drawn inline"
