"""The output folder of a run: refused, claimed, and put back as it was if the start fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmx.core.errors import ConfigError, DataError, FolderError
from lmx.recipes.claim import METRICS, claim
from lmx.recipes.options import TrainOptions

OPTIONS = TrainOptions(steps=4, warmup=0)


def begin(folder: Path) -> None:
    (folder / METRICS).write_text('{"step": 1}\n')


def finished(folder: Path) -> Path:
    with claim(OPTIONS, folder):
        begin(folder)
        (folder / "model").mkdir()
        (folder / "model" / "weights").write_text("old")
    return folder


def holds(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_claimed_folder_records_the_options_in_full(tmp_path):
    with claim(OPTIONS, tmp_path / "a" / "run") as options:
        begin(tmp_path / "a" / "run")
    stored = json.loads((tmp_path / "a" / "run" / "run.json").read_text())["options"]
    assert stored["steps"] == options.steps == 4
    assert stored["optimizer"] == options.optimizer is not None
    with claim(TrainOptions(resume=True, output=str(tmp_path / "a" / "run"), keep=7), tmp_path / "a" / "run") as again:
        assert (again.steps, again.optimizer, again.keep) == (4, options.optimizer, 7)


@pytest.mark.parametrize("error", [DataError("no text"), KeyboardInterrupt(), ZeroDivisionError()])
def test_a_start_that_fails_leaves_nothing(error, tmp_path):
    with pytest.raises(type(error)), claim(OPTIONS, tmp_path / "a" / "b" / "run"):
        (tmp_path / "a" / "b" / "run" / "data").mkdir()
        (tmp_path / "a" / "b" / "run" / METRICS).touch()  # opened, and nothing logged
        raise error
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(type(error)), claim(OPTIONS, tmp_path / "empty"):
        raise error
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]  # which was there before


def test_a_run_that_has_begun_stays_when_it_fails(tmp_path):
    with pytest.raises(DataError), claim(OPTIONS, tmp_path / "run"):
        begin(tmp_path / "run")
        raise DataError("later")
    assert (tmp_path / "run" / "run.json").exists()
    with pytest.raises(FolderError, match="holds another run; go on with it by --resume, replace it by --overwrite"):
        claim(OPTIONS, tmp_path / "run").__enter__()


def test_what_is_overwritten_goes_when_the_new_run_has_begun(tmp_path, monkeypatch):
    folder = finished(tmp_path / "run")
    monkeypatch.chdir(folder)  # the working directory cannot be renamed or removed, and need not be
    before = holds(folder)
    with pytest.raises(DataError), claim(TrainOptions(overwrite=True), Path(".")):
        assert "model" not in [path.name for path in folder.iterdir()]
        (folder / "model").mkdir()
        raise DataError("no text")
    assert holds(folder) == before
    with claim(TrainOptions(overwrite=True, steps=9), Path(".")):
        begin(folder)
    assert sorted(holds(folder)) == [METRICS, "run.json"]


def test_a_process_killed_while_it_overwrote_is_no_obstacle(tmp_path):
    folder = finished(tmp_path / "run")
    claim(TrainOptions(overwrite=True), folder).gen.send(None)  # and never goes on
    with claim(TrainOptions(overwrite=True), folder):
        begin(folder)
    assert sorted(holds(folder)) == [METRICS, "run.json"]


def test_a_run_survives_an_overwrite_that_was_killed_before_it_began(tmp_path):
    folder = finished(tmp_path / "run")
    before = holds(folder)
    claim(TrainOptions(overwrite=True), folder).gen.send(None)  # and never goes on
    with pytest.raises(FolderError, match="holds another run"):
        claim(OPTIONS, folder).__enter__()
    assert holds(folder) == before


def test_folders_that_cannot_be_claimed(tmp_path, monkeypatch):
    with pytest.raises(FolderError, match="there is no run in .* to resume; leave out --resume to start one"):
        claim(TrainOptions(resume=True), tmp_path / "run").__enter__()
    with pytest.raises(ConfigError, match="give one of them"):
        claim(TrainOptions(resume=True, overwrite=True), tmp_path).__enter__()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(FolderError, match=r"run.json is damaged .* start over with --overwrite"):
        claim(TrainOptions(resume=True), tmp_path).__enter__()

    def deny(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "write_text", deny)
    with pytest.raises(FolderError, match=r"cannot be written \(Permission denied\); choose another --output"):
        claim(OPTIONS, tmp_path / "read" / "only").__enter__()
    assert not (tmp_path / "read").exists()
