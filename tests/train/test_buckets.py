"""Checkpoints on gs://, in a bucket that a server on this machine holds: kept, damaged, killed, forbidden, silent."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core.errors import ConfigError, FolderError
from lmx.recipes import checkpointed
from lmx.train import buckets, steps
from lmx.train.checkpoints import Checkpoints, open_path

if importlib.util.find_spec("gcsfs") is None:  # not imported yet: it reads a variable then
    pytest.skip("needs gcsfs", allow_module_level=True)
STORE = importlib.util.spec_from_file_location("lmx_tests_object_store", Path(__file__).with_name("object_store.py"))
object_store = importlib.util.module_from_spec(STORE)
sys.modules[STORE.name] = object_store
STORE.loader.exec_module(object_store)
bucket = object_store.bucket
RUN = "gs://bucket/run"


@pytest.fixture
def store(bucket):
    """The bucket, empty."""
    bucket.empty()
    return bucket


def state(step: int) -> dict:
    return {"a": np.full((2048,), step, np.float32), "b": {"c": np.arange(10, dtype=np.int32) + step}}


def is_state(restored: dict, step: int) -> bool:
    return bool((restored["a"] == step).all() and (restored["b"]["c"] == np.arange(10) + step).all())


def save(*numbers: int, metrics: dict[int, float] | None = None, **how) -> None:
    with Checkpoints(RUN, **how) as checkpoints:
        for number in numbers:
            loss = {"loss": metrics[number]} if metrics else None
            checkpoints.save(number, state(number), {"step": number}, loss)


def folders(store) -> set[str]:
    return {name.split("/")[1] for name in store.objects}


def test_round_trip_sharded_onto_another_mesh(store):
    def sharding(count):
        return NamedSharding(jax.make_mesh((count,), ("fsdp",), axis_types=(AxisType.Auto,)), P("fsdp"))

    saved = {"w": jax.device_put(jnp.arange(4096.0).reshape(64, 64), sharding(8)), "key": jax.random.key(3)}
    about = {"tokenizer": "x" * (6 << 20)}  # so much is uploaded in parts
    with Checkpoints(RUN) as checkpoints:
        checkpoints.save(7, saved, about)
        target = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=sharding(4)), "key": jax.random.key(0)}
        restored, extra = checkpoints.restore(target)
    assert extra == about and restored["w"].sharding == sharding(4)
    np.testing.assert_array_equal(restored["w"], saved["w"])
    np.testing.assert_array_equal(jax.random.key_data(restored["key"]), jax.random.key_data(saved["key"]))
    assert {"run/7/commit_success.txt", "run/7/about/data.json"} < set(store.objects)
    assert checkpointed.found_in(RUN) == checkpointed.found_in(f"{RUN}/7") == [open_path(f"{RUN}/7")]


def test_the_newest_the_multiples_and_the_best_stay(store):
    save(1, 2, 3, 4, 5, metrics={1: 9.0, 2: 1.0, 3: 2.0, 4: 8.0, 5: 7.0}, keep=1, keep_every=4, best="loss")
    assert folders(store) == {"2", "4", "5"}
    save(5, 6, keep=1)  # 5 is replaced, and all others superseded
    assert folders(store) == {"6"} and Checkpoints(RUN).steps() == [6]
    with pytest.raises(FolderError, match="holds step 6, later than 3"):
        save(3)
    assert is_state(Checkpoints(RUN).restore(state(0))[0], 6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flipped", "gone", "index"])
def test_damage_is_named_and_the_older_step_restored(store, kind):
    save(1, 2)
    arrays = next(n for n, content in store.objects.items() if state(2)["a"].tobytes() in content)
    content = bytearray(store.objects[arrays])
    at = content.index(state(2)["a"].tobytes())
    if kind == "flipped":
        content[at + 9] ^= 4
        store.put(arrays, bytes(content))
    elif kind == "gone":
        del store.objects[arrays], store.generations[arrays]
    else:
        store.put("run/2/state/manifest.ocdbt", store.objects["run/2/state/manifest.ocdbt"][:-9])
    told: list[str] = []
    restored, extra = Checkpoints(RUN, report=told.append).restore(state(0))
    assert is_state(restored, 1) and extra == {"step": 1}
    named = {"flipped": "the array a", "gone": "all of its arrays|the array a", "index": "all of its arrays"}[kind]
    assert len(told) == 1 and f"{RUN}/2 is damaged" in told[0] and re.search(named, told[0])
    assert "It is now called 2.damaged, and step 1 is restored instead" in told[0]
    assert folders(store) == {"1", "2.damaged"}
    save(2)
    assert Checkpoints(RUN).steps() == [1, 2] and "2.damaged" in folders(store)


KILLED = """
import sys, numpy as np
sys.path[:0] = {path!r}
from lmx.train import buckets
from lmx.train.checkpoints import Checkpoints
buckets.PATIENCE = 300
checkpoints = Checkpoints({run!r})
for step in (1, 2):
    a, c = np.full((2048,), step, np.float32), np.arange(10, dtype=np.int32) + step
    checkpoints.save(step, {{"a": a, "b": {{"c": c}}}})
    if step == 1:
        checkpoints.wait()
        print("one", flush=True)
checkpoints.wait()
"""


@pytest.mark.slow
def test_what_a_killed_save_left_is_not_taken_for_whole(store):
    """Killed once its arrays are there, while it writes the marker."""
    reached = []

    def kill(call):
        if call.kind == "insert" and call.name == "run/2/commit_success.txt":
            reached.append(True)
            process.kill()
            process.wait()
            return 503
        return None

    store.refuse = kill
    source = KILLED.format(path=sys.path, run=RUN)
    process = subprocess.Popen([sys.executable, "-c", source], env=os.environ, stdout=subprocess.PIPE)
    assert process.communicate(timeout=300)[0] == b"one\n" and reached
    store.refuse = lambda call: None
    left = {name for name in store.objects if name.startswith("run/2/")}
    assert any(state(2)["a"].tobytes() in store.objects[name] for name in left)
    assert Checkpoints(RUN).steps() == [1] and checkpointed.found_in(f"{RUN}/2") == []
    assert is_state(Checkpoints(RUN).restore(state(0))[0], 1)
    save(3)
    assert folders(store) == {"1", "3"}


def interrupted(store, work, most: int = 100):
    """Yields for each number of changes after which `work` is cut short; undoes them after that."""
    for changes in range(1, most):
        before, count = (dict(store.objects), dict(store.generations)), iter(range(most))
        store.refuse = lambda call, count=count, changes=changes: (
            403 if call.kind in ("rewrite", "delete", "insert") and next(count) >= changes else None
        )
        try:
            work()
        except FolderError:
            store.refuse = lambda call: None
            yield
            store.objects, store.generations = before
        else:
            store.refuse = lambda call: None
            return


@pytest.mark.slow
def test_a_move_or_removal_that_is_cut_short_loses_nothing(store):
    save(1, 2)
    folder, all_of_it, cuts = open_path(RUN), dict(store.objects), []
    for _ in interrupted(store, lambda: steps.make_room_for(folder, 2)):
        cuts.append("move")
        assert list(steps.find(folder)) == [1, 2]
        steps.clean(folder)
        assert store.objects == all_of_it
    assert folders(store) == {"1", "2.replaced"}
    for _ in interrupted(store, lambda: steps.clean(folder)):
        cuts.append("move back")
        assert list(steps.find(folder)) == [1, 2]
        steps.clean(folder)
        assert store.objects == all_of_it
    assert store.objects == all_of_it
    for _ in interrupted(store, lambda: steps.remove(folder / "2")):
        cuts.append("removal")
        assert list(steps.find(folder)) == [1]
        steps.clean(folder)
        assert folders(store) == {"1"}
    assert folders(store) == {"1"}
    assert min(cuts.count("move"), cuts.count("move back")) >= 20 and cuts.count("removal") >= 9


def test_a_failed_save_is_told_and_leaves_nothing(store):
    save(1)
    store.refuse = lambda call: 403 if call.kind == "insert" and "ocdbt.process_0" in call.name else None
    with pytest.raises(FolderError, match="of step 2 could not be written to gs://bucket/run; earlier ones are intact"):
        save(2)
    assert folders(store) == {"1"}
    store.refuse = lambda call: None
    assert is_state(Checkpoints(RUN).restore(state(0))[0], 1)


@pytest.mark.slow
def test_a_short_outage_is_waited_for(store):
    """The first writing of each kind fails: tensorstore's of an array, gcsfs's of anything else."""
    failed = set()

    def down(call):
        kind = "ocdbt" in call.name
        return None if call.kind != "insert" or kind in failed else failed.add(kind) or 503

    store.refuse = down
    save(1)
    assert is_state(Checkpoints(RUN).restore(state(0))[0], 1) and failed == {True, False}


def test_a_bucket_that_is_forbidden_or_not_there(store):
    store.refuse = lambda call: 403
    for ask in (lambda: save(1), lambda: Checkpoints(RUN).steps(), lambda: Checkpoints(RUN).restore(state(0))):
        with pytest.raises(FolderError, match="gs://bucket/run.*cannot be reached: Forbidden"):
            ask()
    with pytest.raises(FolderError, match="there is no bucket gs://another"):
        Checkpoints("gs://another/run").steps()


def test_a_bucket_that_does_not_answer(store, monkeypatch):
    monkeypatch.setattr(buckets, "PATIENCE", 1.0)
    monkeypatch.setattr(buckets, "_reached", set())
    with socket.socket() as nobody:  # it is bound and does not listen: connections are refused
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        with pytest.raises(FolderError, match="gs://bucket did not answer within 1 seconds; is there a way to it"):
            save(1)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", store.url)
    monkeypatch.setattr(buckets, "PATIENCE", 300.0)
    save(1)
    assert Checkpoints(RUN).steps() == [1]


@pytest.mark.parametrize("path", ["s3://bucket/run", "gs://bucket", "gs:///run"])
def test_places_that_are_none(path):
    with pytest.raises(ConfigError, match=re.escape(f"a local folder or in gs://BUCKET/FOLDER, not in {path}")):
        Checkpoints(path)


def test_without_gcsfs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'lmx[gcs]'")):
        Checkpoints(RUN)


PROCESSES = """
import json, jax, jax.numpy as jnp, numpy as np
from lmx.core import sharding
from lmx.train import buckets
from lmx.train.checkpoints import Checkpoints

buckets.PATIENCE, told = 300, []
with sharding.use_mesh(f"fsdp={jax.device_count()}") as mesh:
    split = jax.NamedSharding(mesh, jax.P("fsdp"))
    state = lambda by: {"w": jax.jit(lambda: jnp.arange(4096.0).reshape(64, 64) + by, out_shardings=split)()}
    with Checkpoints(arguments[0], report=told.append) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step))
        steps = checkpoints.steps()
        checkpoints.wait()
        restored, _ = checkpoints.restore(jax.eval_shape(lambda: state(0)) | {"w": jax.ShapeDtypeStruct(
            (64, 64), jnp.float32, sharding=split)})
        right = all((np.asarray(s.data) == np.arange(4096.0).reshape(64, 64)[s.index] + 3).all()
                    for s in restored["w"].addressable_shards)
        print(json.dumps([checkpoints.steps(), bool(right), told]))
jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes(store, loopback):
    for out in loopback(PROCESSES, 2, RUN):
        assert json.loads(out.splitlines()[-1]) == [[2, 3], True, []]
    parts = {name.split("/")[3] for name in store.objects if "ocdbt.process_" in name}
    assert parts == {"ocdbt.process_0", "ocdbt.process_1"}
    restored, _ = Checkpoints(RUN).restore({"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)})
    np.testing.assert_array_equal(restored["w"], np.arange(4096.0).reshape(64, 64) + 3)
