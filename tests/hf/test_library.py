"""Models as users handle them: loading onto the mesh in force, shapes without arrays, logits in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core import sharding, specs
from lmx.hf import library
from lmx.models import forward, transformer
from lmx.models.presets import preset


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a model, the folder it was saved to)."""
    model = transformer.init(preset("llama-tiny"), jax.random.key(0))
    folder = tmp_path_factory.mktemp("saved") / "model"
    library.save(model, folder)
    return model, folder


@pytest.mark.parametrize("given", [True, False], ids=["mesh=", "in force"])
def test_load_places_every_array_as_the_rules_say(saved, given):
    model, folder = saved
    with sharding.use_mesh(None if given else "fsdp=4,tensor=2"):
        loaded = library.load(folder, mesh="fsdp=4,tensor=2" if given else None)
    up = loaded.params.decoder.layers.stacks[0][0].mlp.up  # (layers, embed by fsdp, mlp by tensor)
    assert {shard.data.shape for shard in up.addressable_shards} == {(2, 64 // 4, 176 // 2)}
    jax.tree.map(np.testing.assert_array_equal, loaded.params, model.params)


def test_shapes_say_where_a_load_would_put_what(saved):
    _, folder = saved
    with sharding.use_mesh("fsdp=8"):
        shapes, loaded = library.load_shapes(folder), library.load(folder)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding == b.sharding  # noqa: E731
    assert jax.tree.all(jax.tree.map(same, shapes, loaded))
    assert specs.count(shapes) == specs.count(loaded)


def test_logits_of_a_bfloat16_model_are_not_rounded_to_bfloat16(saved):
    model, _ = saved
    low = model.replace(config=model.config.replace(compute_dtype="bfloat16"))
    logits = forward.logits(low, jnp.arange(64)[None])
    assert logits.dtype == jnp.float32
    assert not np.array_equal(logits, logits.astype(jnp.bfloat16).astype(jnp.float32))
