"""Checkpoints: round trips onto other meshes, donation while saving, failures, and a quiet terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core.errors import ConfigError, FolderError
from lmx.core.nodes import node, static
from lmx.train.checkpoints import Checkpoints


@node
class CheckpointState:
    params: Any
    optimizer: Any
    step: Any
    key: Any
    name: str = static(default="run")


def build(sharding=None, key=0):
    params = {
        "up": jnp.arange(128.0).reshape(16, 8) + key,
        "down": None,
        "half": jnp.ones((8,), jnp.bfloat16),
    }
    params["nothing"] = jnp.zeros((0, 4))
    if sharding is not None:
        params["up"] = jax.device_put(params["up"], sharding)
    optimizer = optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init(params)
    return CheckpointState(params, optimizer, jnp.int32(7), jax.random.split(jax.random.key(key), 3))


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def abstract(state):
    return jax.eval_shape(lambda: state)


def mesh(shape, names, count=8):
    return jax.make_mesh(
        shape, names, devices=jax.devices()[:count], axis_types=(AxisType.Auto,) * len(shape)
    )


def test_round_trip_with_keys_and_holes(tmp_path):
    state, extra = build(), {"data": {"epoch": 1, "seen": 2**70, "list": [1, None, "x"]}}
    with Checkpoints(tmp_path / "run") as checkpoints:
        assert checkpoints.latest() is None and checkpoints.steps() == []
        checkpoints.save(3, state, extra)
        checkpoints.wait()
        assert checkpoints.latest() == 3
    restored, found = Checkpoints(tmp_path / "run").restore(abstract(state))
    assert found == extra
    assert_same(restored, state)
    assert not restored.params["up"].committed
    assert_same(
        jax.random.uniform(restored.key[0], (3,)),
        jax.random.uniform(state.key[0], (3,)),
    )


def test_another_generator_survives(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"key": jax.random.key(5, impl="rbg")})
        restored, extra = checkpoints.restore(jax.eval_shape(lambda: {"key": jax.random.key(5, impl="rbg")}))
        assert extra == {}
        assert_same(restored, {"key": jax.random.key(5, impl="rbg")})
        with pytest.raises(ConfigError, match=r"key \(saved \(\) key<rbg>, asked for \(\) key<fry>\)"):
            checkpoints.restore(jax.eval_shape(lambda: {"key": jax.random.key(5)}))


def test_onto_another_mesh(tmp_path):
    state = build(NamedSharding(mesh((8,), ("fsdp",)), P("fsdp")))
    other = NamedSharding(mesh((2, 2), ("fsdp", "tensor"), 4), P("fsdp", "tensor"))
    whole = NamedSharding(other.mesh, P())

    def target(leaf):
        sharding = other if leaf.shape == (16, 8) else whole
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        restored, _ = checkpoints.restore(jax.tree.map(target, abstract(state)))
    assert restored.params["up"].sharding == other
    assert {shard.data.shape for shard in restored.params["up"].addressable_shards} == {(8, 4)}
    assert restored.key.sharding.is_fully_replicated and len(restored.key.sharding.device_set) == 4
    assert_same(restored, state)


def test_only_the_newest_stay_and_a_step_is_replaced(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 5, 10):
            checkpoints.save(step, build(key=step))
        checkpoints.save(10, build(key=11))
        checkpoints.wait()
        assert checkpoints.steps() == [5, 10]
        assert_same(checkpoints.restore(abstract(build()))[0], build(key=11))
        assert_same(checkpoints.restore(abstract(build()), step=5)[0], build(key=5))
        with pytest.raises(FolderError, match="no checkpoint of step 1; it has the steps 5, 10"):
            checkpoints.restore(abstract(build()), step=1)
        with pytest.raises(FolderError, match="holds step 10, later than 7"):
            checkpoints.save(7, build())
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(12, build())
    assert Checkpoints(tmp_path).steps() == [10, 12]


@pytest.mark.parametrize("spec", [None, P("fsdp"), P()])
def test_a_state_may_be_donated_right_after_save(tmp_path, spec):
    sharding = None if spec is None else NamedSharding(mesh((8,), ("fsdp",)), spec)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = {i: jax.device_put(jnp.zeros((256, 1024)), sharding) for i in range(4)}
    host = {"numpy": np.zeros(4)}
    with Checkpoints(tmp_path, keep=10) as checkpoints:
        for i in range(5):
            checkpoints.save(i, (state, host))
            host["numpy"] += 1
            for _ in range(3):
                state = step(state)
        for i in range(5):
            saved, saved_host = checkpoints.restore((abstract(state), abstract(host)), step=i)[0]
            assert all(bool((leaf == 3 * i).all()) for leaf in saved.values())
            assert bool((saved_host["numpy"] == i).all())


def test_another_state_is_named(tmp_path):
    state = build()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        wrong = abstract(state)
        wrong.params.update(up=jax.ShapeDtypeStruct((16, 9), jnp.float32), gate=wrong.params["half"])
        wrong.params.pop("half")
        with pytest.raises(ConfigError) as error:
            checkpoints.restore(wrong)
    message = str(error.value)
    assert "it lacks params.gate; it also holds params.half; these differ: params.up" in message
    assert "(saved (16, 8) float32, asked for (16, 9) float32)" in message


def test_unfinished_folders_do_not_count_and_are_removed(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, build())
    (tmp_path / "9.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "8").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [1] and checkpoints.latest() == 1
        checkpoints.save(2, build())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_bad_input(tmp_path):
    with Checkpoints(tmp_path / "none") as checkpoints:
        with pytest.raises(FolderError, match="none has no checkpoint; it has none"):
            checkpoints.restore(abstract(build()))
        with pytest.raises(ConfigError, match="holds arrays and numbers, not a str: 'x'"):
            checkpoints.save(1, {"a": "x"})
        with pytest.raises(ConfigError, match="extra must be JSON data"):
            checkpoints.save(1, build(), {"a": jnp.ones(1)})
        with pytest.raises(ConfigError, match="the state has no arrays"):
            checkpoints.save(1, {"a": None})
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="step 1 could not be written to .*file.*File exists"):
        with Checkpoints(tmp_path / "file") as checkpoints:
            checkpoints.save(1, build())


def run_script(tmp_path, text):
    script = "import sys\nfolder = sys.argv[1]\n" + textwrap.dedent(text)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    cuda = ("cudart_stub", "absl::InitializeLog")  # what jax's CUDA plugin says where it is installed without a GPU
    lines = done.stderr.splitlines(keepends=True)
    done.stderr = "".join(line for line in lines if not any(word in line for word in cuda))
    return done


def test_the_terminal_stays_quiet(tmp_path):
    done = run_script(
        tmp_path,
        """
        import jax, jax.numpy as jnp
        from lmx.train.checkpoints import Checkpoints
        state = {"a": jnp.arange(4.0), "key": jax.random.key(0), "none": None}
        for start in (0, 3):
            with Checkpoints(folder) as checkpoints:
                if checkpoints.latest() is not None:
                    checkpoints.restore(jax.eval_shape(lambda: state))
                    checkpoints.restore(state)
                for step in range(start, start + 3):
                    checkpoints.save(step, state, {"step": step})
        try:
            with Checkpoints(folder) as checkpoints:
                checkpoints.save(9, state)
                raise KeyError("training failed")
        except KeyError:
            pass
        print(Checkpoints(folder).steps())
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[5, 9]\n", "")


def test_a_full_disk_is_told_and_the_next_save_works(tmp_path):
    done = run_script(
        tmp_path,
        """
        import json, os, resource
        import jax, jax.numpy as jnp, numpy as np
        from lmx.core.errors import FolderError
        from lmx.train.checkpoints import Checkpoints
        values = np.random.default_rng(0).normal(size=1 << 18).astype("float32")
        state, messages = {"a": jnp.asarray(values)}, []
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, state)
            checkpoints.wait()
            for end in (checkpoints.wait, lambda: checkpoints.save(3, state)):
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
                try:
                    checkpoints.save(2, state)
                    end()
                except FolderError as error:
                    messages.append(str(error))
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            left = sorted(os.listdir(folder))
            checkpoints.save(4, state)
        restored = Checkpoints(folder).restore(jax.eval_shape(lambda: state))[0]
        same = bool((restored["a"] == values).all())
        print(json.dumps([messages, left, sorted(os.listdir(folder)), same]))
        """,
    )
    assert done.returncode == 0, done.stderr
    messages, left, after, same = json.loads(done.stdout)
    assert len(messages) == 2 and all("the checkpoint of step 2 could not be written" in m for m in messages)
    assert left == ["1"] and after == ["1", "4"] and same
    assert done.stderr == ""


