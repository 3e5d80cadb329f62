"""Faults, a tenth of what experiments/benchmarks/checkpoint_faults.py does: kills, flipped bits, a full disk; and what
a run sees of damage, of failing saves and of saves that were killed while they replaced something."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.errors import ConfigError, FolderError
from lmx.train import seals, steps
from lmx.train.checkpoints import Checkpoints, open_path

BENCHMARK = Path(__file__).parents[2] / "experiments" / "benchmarks" / "checkpoint_faults.py"


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("checkpoint_faults", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def state(step: int) -> dict:
    return {"a": np.full((2048,), step, np.float32), "b": {"c": np.arange(10, dtype=np.int32) + step}}


def is_state(restored: dict, step: int) -> bool:
    return bool((restored["a"] == step).all() and (restored["b"]["c"] == np.arange(10) + step).all())


def save(folder, *numbers, **how) -> None:
    with Checkpoints(folder, **how) as checkpoints:
        for number in numbers:
            checkpoints.save(number, state(number), {"step": number})


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(path) -> Path:
    """Turn one bit of the array a; returns its file."""
    step = int(path.name)
    blob = next(p for p in path.rglob("*") if p.is_file() and state(step)["a"].tobytes() in p.read_bytes())
    content = bytearray(blob.read_bytes())
    content[content.index(state(step)["a"].tobytes()) + 9] ^= 4
    blob.write_bytes(content)
    return blob


@pytest.mark.slow
def test_kills(faults, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    found = faults.kills(tmp_path / "run", 10)
    assert (found["kills"], found["lost"], found["damaged"], found["litter"]) == (10, 0, 0, [])
    assert found["newest"] >= 9  # each child has saved one at least, from step 0 on


def test_flipped_bits(faults, tmp_path):
    gc.freeze()  # reading damage collects garbage, which takes a second where the tests before left many objects
    try:
        lmx, orbax = faults.flips(tmp_path / "run", 20)
    finally:
        gc.unfreeze()
    assert lmx["silent"] == lmx["unnamed"] == 0 and lmx["named"] > 0, lmx
    assert lmx["harmless"] + lmx["named"] == orbax["flips"] == 20
    assert orbax["silent"] > 0  # what the checksums are for


def test_a_full_disk(faults, tmp_path):
    found = faults.full(tmp_path / "small")
    if "skipped" in found:
        pytest.skip(f"no tmpfs: {found['skipped']}")
    assert len(found["steps"]) == 5 and found["intact"] and found["goes on"] and found["litter"] == []
    assert re.search(r"it needs 12\.6 MB and its disk has \d+\.\d MB free", found["message"])


def test_no_room_is_told_before_anything_is_written(tmp_path):
    save(tmp_path, 1)
    huge = shutil.disk_usage(tmp_path).free // 4
    with pytest.raises(FolderError, match=r"it needs \d+\.\d MB and its disk has \d+\.\d MB free") as error:
        steps.require_room(open_path(tmp_path), 5 * huge)
    assert "keep fewer" in str(error.value)
    assert names(tmp_path) == ["1"]


def test_what_lacks_a_file_is_damaged_and_not_litter(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "2" / "about" / "data.json").unlink()
    save(tmp_path, 3, keep=5)
    assert names(tmp_path) == ["1", "2", "3"]
    (tmp_path / "3" / "about" / "data.json").unlink()
    said = []
    restored, _ = Checkpoints(tmp_path, report=said.append).restore(state(0))
    assert is_state(restored, 1) and names(tmp_path) == ["1", "2.damaged", "3.damaged"]
    assert len(said) == 2 and "about/data.json cannot be read" in said[0]


def test_the_newest_is_damaged(tmp_path):
    save(tmp_path, 1, 2, 3, keep=5)
    blobs, said = [damage(tmp_path / "2"), damage(tmp_path / "3")], []
    with pytest.raises(FolderError, match=f"{tmp_path}/3 is damaged: {blobs[1]} has changed.*the array a$"):
        Checkpoints(tmp_path).restore(state(0), step=3)
    with Checkpoints(tmp_path, report=said.append, keep=5) as checkpoints:
        restored, extra = checkpoints.restore(state(0))
        assert is_state(restored, 1) and extra == {"step": 1}
        for text, blob, step in zip(said, reversed(blobs), (3, 2), strict=True):
            assert f"{blob} has changed" in text and "the array a." in text
            assert text.endswith(f"It is now called {step}.damaged, and step 1 is restored instead")
        assert names(tmp_path) == ["1", "2.damaged", "3.damaged"] and checkpoints.latest() == 1
        for step in (2, 3):  # the run goes on and saves these steps again
            checkpoints.save(step, state(step))
    assert names(tmp_path) == ["1", "2", "2.damaged", "3", "3.damaged"]
    damage(tmp_path / "3")
    with pytest.warns(UserWarning, match=r"It is now called 3\.damaged-2"):
        assert is_state(Checkpoints(tmp_path).restore(state(0))[0], 2)


def test_nothing_sound_is_left(tmp_path):
    save(tmp_path, 1, 2)
    for step in "12":
        damage(tmp_path / step)
    with pytest.raises(FolderError, match=r"has no sound checkpoint: .*/2 is damaged.*/1 is damaged"):
        Checkpoints(tmp_path).restore(state(0))
    assert names(tmp_path) == ["1", "2"]  # left for the user: a resumed run must not begin anew in silence


@pytest.mark.slow
@pytest.mark.parametrize("hurt", ["missing", "shorter", "about", "unsealed"])
def test_every_kind_of_damage_is_named(tmp_path, hurt):
    save(tmp_path, 1)
    if hurt == "missing":
        (tmp_path / "1" / "state" / "manifest.ocdbt").unlink()
        says = "manifest.ocdbt is missing.*all of its arrays"
    elif hurt == "shorter":
        blob = damage(tmp_path / "1")
        os.truncate(blob, 100)
        says = f"{blob} has 100 bytes instead of .*the array"
    elif hurt == "about":
        about = tmp_path / "1" / "about" / "data.json"
        about.write_text(about.read_text().replace("step", "stop"))
        says = r"about/data\.json cannot be read \(its checksum is wrong\).*all of its arrays"
    else:  # killed before the files were sealed: the array is still known
        (tmp_path / "1" / "seal.process_0.json").unlink()
        damage(tmp_path / "1")
        says = r"a file in .*/1/state \(which one is not known.*the array a$"
    with pytest.raises(FolderError, match=says):
        Checkpoints(tmp_path).restore(state(0), step=1)


def test_damage_leaves_the_terminal_quiet(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "2" / "state" / "manifest.ocdbt").write_bytes(b"what?")
    code = (
        "import sys, jax, numpy as np\nfrom lmx.train.checkpoints import Checkpoints\n"
        "s = {'a': np.zeros(2048, 'f4'), 'b': {'c': np.zeros(10, 'i4')}}\n"
        "restored, extra = Checkpoints(sys.argv[1], report=print).restore(s); print(extra)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=environment)
    cuda = ("cudart_stub", "absl::InitializeLog")  # what jax's CUDA plugin says where it is installed without a GPU
    errors = [line for line in done.stderr.splitlines() if not any(word in line for word in cuda)]
    assert errors == [] and done.stdout.splitlines()[-1] == "{'step': 1}", done.stderr
    assert "manifest.ocdbt has" in done.stdout and "all of its arrays" in done.stdout


def test_a_failed_save_surfaces_at_once(tmp_path):
    """In the background nothing fits any more; the next check raises."""
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"w": np.random.default_rng(0).normal(size=1 << 17)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.check()
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            checkpoints.save(2, big)
            with pytest.raises(FolderError, match=r"step 2 could not be written .*earlier ones are intact.*too large"):
                for _ in range(6000):
                    checkpoints.check()
                    time.sleep(0.05)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names(tmp_path) == ["1"]
        checkpoints.check()
        checkpoints.save(2, state(2))
    assert names(tmp_path) == ["1", "2"] and is_state(Checkpoints(tmp_path).restore(state(0))[0], 2)


def test_a_check_does_not_wait(tmp_path, monkeypatch):
    go_on, settle = threading.Event(), Checkpoints._settle
    monkeypatch.setattr(Checkpoints, "_settle", lambda *save: (go_on.wait(300), settle(*save)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.check()
        assert checkpoints._saving.is_alive()
        go_on.set()
    assert names(tmp_path) == ["1"]


class Lost:
    """What orbax answers whose barrier has failed."""

    def result(self) -> None:
        try:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: a task has died")
        except jax.errors.JaxRuntimeError as error:
            raise ValueError("the barrier has failed") from error


def test_a_lost_process_is_no_fault_of_the_folder(tmp_path, monkeypatch):
    """What fails in the devices' programs stays what it is: `lmx.train.processes` knows, or learns, why."""
    save(tmp_path, 1)

    def fails(arrays):
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")

    with monkeypatch.context() as patched, Checkpoints(tmp_path) as checkpoints:
        patched.setattr("lmx.train.checkpoints.checksums", fails)
        with pytest.raises(jax.errors.JaxRuntimeError, match="Gloo"):
            checkpoints.save(2, state(2))
    with monkeypatch.context() as patched, Checkpoints(tmp_path) as checkpoints:  # in the background
        patched.setattr("lmx.train.storage.write", lambda *_: Lost())
        checkpoints.save(2, state(2))
        with pytest.raises(ValueError, match="the barrier has failed") as error:
            checkpoints.wait()
        assert not isinstance(error.value, FolderError)
    assert names(tmp_path) == ["1"]


def test_a_step_that_is_replaced_is_not_lost(tmp_path):
    """What a kill leaves: the old checkpoint under its other name, the new one not there or not whole."""
    save(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "2.replaced")
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.steps() == [1, 2] and is_state(checkpoints.restore(state(0))[0], 2)
    assert is_state(checkpoints.restore(state(0), step=2)[0], 2)
    save(tmp_path, 3)
    assert names(tmp_path) == ["2", "3"] and is_state(Checkpoints(tmp_path).restore(state(0), step=2)[0], 2)
    shutil.copytree(tmp_path / "3", tmp_path / "3.replaced")  # killed when the new one was whole already
    (tmp_path / "1.removed").mkdir()
    save(tmp_path, 4, keep=3)
    assert names(tmp_path) == ["2", "3", "4"]


def test_a_failed_replacement_brings_the_old_one_back(tmp_path):
    save(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(FolderError, match="too large"), Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, {"w": np.random.default_rng(0).normal(size=1 << 17)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["1"] and is_state(Checkpoints(tmp_path).restore(state(0))[0], 1)


def test_what_stays(tmp_path):
    losses = {1: 5.0, 2: 3.0, 3: 4.0, 4: float("nan"), 5: 6.0, 6: 7.0}
    for step, loss in losses.items():  # each by a process of its own: the metrics are read from the checkpoints
        with Checkpoints(tmp_path, keep=1, keep_every=3, best="loss") as checkpoints:
            checkpoints.save(step, state(step), metrics={"loss": loss, "other": -step})
    assert names(tmp_path) == ["2", "3", "6"]
    with Checkpoints(tmp_path, keep=1, keep_every=3, best="loss") as checkpoints:
        checkpoints.save(7, state(7), metrics={"loss": 1.0})
        checkpoints.save(8, state(8))
    assert names(tmp_path) == ["3", "6", "7", "8"]
    assert steps.kept([1, 2, 3], {}, 2, None) == {2, 3}
    assert steps.kept([1, 2, 3], {1: 2.0, 2: 2.0}, 1, None) == {2, 3}
    for wrong in (dict(keep=0), dict(keep_every=0)):
        with pytest.raises(ConfigError, match="must be at least 1"):
            Checkpoints(tmp_path, **wrong)


def test_only_a_part_is_restored(tmp_path):
    tree = {"model": {"up": jnp.ones((4, 4)), "down": jnp.full((4,), 2.0)}, "optimizer": {"mu": jnp.zeros((4,))}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {"x": 1})
        mine = {"model": {"up": jnp.zeros((4, 4)), "down": jnp.zeros((4,))}, "other": jnp.full((2,), 9.0)}
        restored, extra = checkpoints.restore(mine, only="model/up")
        assert extra == {"x": 1} and restored["model"]["down"] is mine["model"]["down"]
        assert (restored["model"]["up"] == 1).all() and restored["other"] is mine["other"]
        with pytest.raises(ConfigError, match="it lacks other"):
            checkpoints.restore(mine, only="other")
        with pytest.raises(ConfigError, match="selects nothing"):
            checkpoints.restore(mine, only="modle")


def test_seals_name_files(tmp_path):
    save(tmp_path, 1)
    one = tmp_path / "1"
    assert seals.changed(one) == {}
    blob = damage(one)
    assert seals.changed(one) == {str(blob.relative_to(one)): "has changed"}
    sealed = one / "seal.process_0.json"
    sealed.write_text(json.dumps(json.loads(sealed.read_text()) | {"crc": 0}))
    assert seals.changed(one) is None  # a damaged seal says nothing


def test_a_process_that_ends_without_closing_does_end(tmp_path):
    """Python 3.11 lets the save finish; newer ones may not, and say so. What was there before is sound."""
    save(tmp_path, 1)
    code = (
        "import sys, numpy as np\nfrom lmx.train.checkpoints import Checkpoints\n"
        "c = Checkpoints(sys.argv[1]); c.save(2, {'a': np.zeros(1 << 22)}); raise SystemExit(3)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=environment, timeout=300
    )
    finished = Checkpoints(tmp_path).latest() == 2
    if done.returncode == 3:  # as the program wished
        assert finished, done.stderr
    else:  # it may have lacked no more than its seal
        assert done.returncode == 1, done.stderr
        assert "ended while its last checkpoint was written" in done.stderr
    if finished:
        assert (Checkpoints(tmp_path).restore({"a": np.ones(1 << 22)}, step=2)[0]["a"] == 0).all()
    assert is_state(Checkpoints(tmp_path).restore(state(0), step=1)[0], 1)
    save(tmp_path, 3)
    assert names(tmp_path) == (["2", "3"] if finished else ["1", "3"])
