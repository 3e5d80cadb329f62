"""What a folder says of generating: which file counts, and files that make no sense."""

from __future__ import annotations

import json

import pytest

from lmx.core.errors import FolderError
from lmx.models import generation


def put(folder, **files):
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def test_which_file_counts(tmp_path):
    assert generation.eos_ids(tmp_path) is None and generation.setting(tmp_path, "pad_token_id") is None
    put(tmp_path, config={"eos_token_id": [5, 6], "pad_token_id": 7})
    assert generation.eos_ids(tmp_path) == (5, 6)
    put(tmp_path, generation_config={"eos_token_id": 4})
    assert generation.eos_ids(tmp_path) == (4,) and generation.setting(tmp_path, "pad_token_id") == 7
    put(tmp_path, generation_config={"eos_token_id": None, "pad_token_id": 0})
    assert generation.eos_ids(tmp_path) == (5, 6) and generation.setting(tmp_path, "pad_token_id") == 0


def test_lmx_folders_remember_where_they_came_from(tmp_path):
    put(tmp_path, config={"vocab_size": 3}, structure={"format": "lmx"})
    assert generation.origin(tmp_path) is None and generation.eos_ids(tmp_path) is None
    put(tmp_path, structure={"format": "lmx", "notes": {generation.NOTES: {"eos_token_id": [1, 2]}}})
    assert generation.eos_ids(tmp_path) == (1, 2)


@pytest.mark.parametrize("ids", [[], ["</s>"], -1, True, {"a": 1}])
def test_what_is_no_token_id(tmp_path, ids):
    with pytest.raises(FolderError, match="it must be a token id or several: mend generation_config.json"):
        generation.eos_ids(put(tmp_path, config={"eos_token_id": ids}))


def test_damaged_files(tmp_path):
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(FolderError, match="generation_config.json is damaged"):
        generation.eos_ids(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(FolderError, match="holds no JSON object"):
        generation.eos_ids(tmp_path)
