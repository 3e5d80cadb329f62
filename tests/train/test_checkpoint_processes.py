"""Checkpoints of several real processes: onto other numbers of them, and one outcome for all."""

from __future__ import annotations

import json

import pytest

SAVE = """
import json, os, jax, jax.numpy as jnp, numpy as np
from lmx.core import sharding
from lmx.core.errors import FolderError
from lmx.train.checkpoints import Checkpoints

folder, step = arguments[0], int(arguments[1])
said = []
with sharding.use_mesh(f"fsdp={jax.device_count()}") as mesh:
    split, whole = jax.NamedSharding(mesh, jax.P("fsdp")), jax.NamedSharding(mesh, jax.P())
    def state(by):
        w = jax.jit(lambda: jnp.arange(4096.0).reshape(64, 64) + by, out_shardings=split)()
        return {"w": w, "b": jax.jit(lambda: jnp.ones(3) * by, out_shardings=whole)(), "step": jnp.int32(by),
                "key": jax.random.key(by)}
    def right(restored, by):
        mine = all((np.asarray(s.data) == np.arange(4096.0).reshape(64, 64)[s.index] + by).all()
                   for s in restored["w"].addressable_shards)
        return bool(mine and restored["w"].sharding == split and (restored["b"] == by).all() and restored["step"] == by
                    and (jax.random.key_data(restored["key"]) == jax.random.key_data(jax.random.key(by))).all())
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
    target |= {"step": jax.ShapeDtypeStruct((), jnp.int32), "key": jax.random.key(0)}
"""

HAND_ON = SAVE + """
    with Checkpoints(folder, keep=9) as checkpoints:
        for earlier in checkpoints.steps():
            restored, extra = checkpoints.restore(target, step=earlier)
            said.append([right(restored, earlier), extra["by"]])
        checkpoints.save(step + 1, state(step + 1), {"by": jax.process_count()})
        checkpoints.check()
    said.append(checkpoints.steps())
print(json.dumps(said))
jax.distributed.shutdown()
"""

FAULTS = SAVE + """
    import fcntl
    index = jax.process_index()
    if index == 1:
        alive = open(folder + ".alive", "w")
        fcntl.flock(alive, fcntl.LOCK_EX)  # until this process has ended
    with Checkpoints(folder, keep=9, report=said.append) as checkpoints:
        checkpoints.save(1, state(1))
        checkpoints.save(2, state(2))
        checkpoints.wait()
        if index == 0:  # process 0 of two has written half of w: hurt what the other one reads, too
            part = np.asarray(jnp.arange(4096.0, dtype=jnp.float32) + 2)[2048:2112].tobytes()
            path = next(os.path.join(d, f) for d, _, files in os.walk(folder + "/2") for f in files
                        if part in open(os.path.join(d, f), "rb").read())
            content = open(path, "rb").read()
            open(path, "wb").write(content.replace(part, bytes(len(part))))
        restored, extra = checkpoints.restore(target)
        said += [right(restored, 1), checkpoints.steps()]
        try:
            checkpoints.save(0, state(0))
        except FolderError as error:
            said.append(str(error))
        if index == 1:  # this process alone cannot write
            import resource
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        checkpoints.save(5, state(5))
        try:
            checkpoints.wait()
        except FolderError as error:
            said.append(str(error))
        if index == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said.append(checkpoints.steps())
print(json.dumps(said), flush=True)
if index == 0:  # jax.distributed lives in this process, and ends the other one with it
    fcntl.flock(open(folder + ".alive", "w"), fcntl.LOCK_EX)
os._exit(0)  # orbax of process 0 waits at a barrier for the part that was not written
"""


@pytest.mark.slow
def test_other_numbers_of_processes(loopback, tmp_path):
    """Each saves a step, and restores all that the others saved."""
    folder, counts = tmp_path / "run", (1, 4, 2, 1)
    for step, count in enumerate(counts):
        for out in loopback(HAND_ON, count, folder, step, devices=2):
            *restored, found = json.loads(out.splitlines()[-1])
            assert restored == [[True, by] for by in counts[:step]]
            assert found == list(range(1, step + 2))
    seals = sorted(path.name for path in (folder / "2").glob("seal.*"))
    assert seals == [f"seal.process_{i}.json" for i in range(4)]


@pytest.mark.slow
def test_all_processes_learn_the_same(loopback, tmp_path):
    first, second = (json.loads(out.splitlines()[-1]) for out in loopback(FAULTS, 2, tmp_path / "run", 0))
    report, *first = first
    assert "has changed" in report and "the array w. It is now called 2.damaged, and step 1 is restored" in report
    assert first[:2] == second[:2] == [True, [1]]
    assert first[2] == second[2] and "holds step 1, later than 0" in first[2]
    for said in (first[3], second[3]):
        assert "the checkpoint of step 5 could not be written" in said and "File too large" in said
    assert "process 1: " in first[3] and first[4] == second[4] == [1]
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.isdigit()) == ["1"]
