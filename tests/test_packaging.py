"""The package from outside: what importing it costs, its names, its version, its command."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lmx
import lmx.version
from lmx.version import __version__

# No part of lmx may need these, however much of it is imported.
FOREIGN = ("torch", "tensorflow", "transformers", "tensorflow_datasets")
# These are slow to import, and only some of lmx needs them.
HEAVY = ("matplotlib", "grain", "orbax", "tokenizers", "lmx.models")

EVERYTHING = """
import importlib, pkgutil, lmx
for name in lmx.__all__:
    getattr(lmx, name)
for module in pkgutil.walk_packages(lmx.__path__, "lmx."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def modules_after(code: str) -> set[str]:
    """The names in sys.modules of a fresh process that has run this code."""
    code += "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def installed() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution("lmx")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("lmx is on the path but not installed: pip install -e .")


def test_importing_lmx_loads_no_part_of_it():
    assert not modules_after("import lmx").intersection(HEAVY + FOREIGN)


def test_all_of_lmx_imports_without_torch_and_tensorflow():
    loaded = modules_after(EVERYTHING)
    assert "lmx.models" in loaded
    assert not loaded.intersection(FOREIGN)


def test_every_public_name_resolves_and_is_listed():
    assert lmx.__all__ and len(set(lmx.__all__)) == len(lmx.__all__)
    for name in lmx.__all__:
        assert getattr(lmx, name) is not None
    assert set(lmx.__all__) <= set(dir(lmx))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        lmx.no_such_name  # noqa: B018


def test_the_version_is_the_same_everywhere():
    assert lmx.__version__ == __version__
    assert installed().version == __version__


def test_every_folder_is_a_package():
    """An installed lmx, and the check of the floors, leave out folders without an `__init__.py`."""
    root = Path(lmx.version.__file__).parent
    folders = {path.parent for path in root.rglob("*.py")}
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()


def test_the_lmx_command_is_installed():
    commands = [e for e in installed().entry_points if e.group == "console_scripts"]
    assert [e.name for e in commands] == ["lmx"]
    assert callable(commands[0].load())
