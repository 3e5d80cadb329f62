"""Configs: canonical, hashable values; errors that say how to mend them."""

from __future__ import annotations

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.errors import ConfigError
from lmx.models.config import VERSION, Config

SHAPE = dict(vocab_size=64, num_layers=2, hidden_size=32, num_heads=4, intermediate_size=48)


def test_equal_configs_are_one_key():
    given = dict(SHAPE, num_layers=np.int64(2), norm_eps=np.float64(1e-5), rope_theta=10_000, norm_bias=np.bool_(False))
    ours = Config(**given, dtype=jnp.float32, compute_dtype=np.dtype("float32"))
    assert ours == Config(**SHAPE) and hash(ours) == hash(Config(**SHAPE))
    assert {type(v) for v in ours.to_dict().values()} <= {str, int, float, bool, type(None), tuple}
    assert (type(ours.num_layers), type(ours.rope_theta), ours.dtype) == (int, float, "float32")
    assert Config(**SHAPE, dtype=jnp.bfloat16).dtype == "bfloat16"


def test_defaults_follow_from_the_shape():
    ours = Config(**SHAPE)
    assert (ours.num_kv_heads, ours.head_dim, ours.max_length) == (4, 8, None)
    assert Config(**SHAPE, position="learned").max_length == 1024
    assert Config(**SHAPE, head_dim=6).head_dim == 6
    assert Config(**SHAPE, architecture="encoder_decoder").num_encoder_layers == 2


def test_pairs_of_a_scaling_are_one_key_in_any_order():
    pairs = (("rope_type", "linear"), ("factor", 2.0))
    assert Config(**SHAPE, rope_scaling=pairs) == Config(**SHAPE, rope_scaling=pairs[::-1])


def test_a_dict_and_back():
    ours = Config(**SHAPE, num_kv_heads=2, position="learned", max_length=99, compute_dtype="bfloat16")
    values = json.loads(json.dumps(ours.to_dict()))
    assert values["config_version"] == VERSION
    assert Config.from_dict(values) == ours
    scaled = ours.replace(position="rotary", max_length=None, window=8, layer_pattern=("local", "global"))
    scaled = scaled.replace(rope_scaling=(("rope_type", "linear"), ("factor", 2.0)))
    assert Config.from_dict(json.loads(json.dumps(scaled.to_dict()))) == scaled  # JSON makes lists of tuples


def test_replace_checks_and_lets_heads_follow():
    ours = Config(**SHAPE)
    assert ours.replace(num_layers=5).num_layers == 5
    wide = ours.replace(hidden_size=64, num_heads=2)
    assert (wide.num_kv_heads, wide.head_dim) == (2, 32)
    grouped = Config(**SHAPE, num_kv_heads=2, head_dim=6).replace(hidden_size=64)
    assert (grouped.num_kv_heads, grouped.head_dim) == (2, 6)  # given, so they stay
    with pytest.raises(ConfigError, match="no field 'num_layer'; did you mean 'num_layers'"):
        ours.replace(num_layer=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(num_heads=5),
            "hidden_size 32 does not divide by num_heads 5; choose heads that divide it, or give head_dim",
        ),
        (dict(num_kv_heads=3), "num_heads 4 does not divide by num_kv_heads 3"),
        (dict(num_layers=0), "num_layers must be a positive whole number, not 0"),
        (dict(num_kv_heads=0), "num_kv_heads must be a positive whole number, not 0"),
        (dict(hidden_size=32.0), "hidden_size must be a positive whole number, not 32.0"),
        (dict(vocab_size=True), "vocab_size must be a positive whole number, not True"),
        (dict(vocab_size=None), "vocab_size must be a positive whole number, not None"),
        (dict(position="learned", max_length=0), "max_length must be a positive whole number, not 0"),
        (dict(max_length=10), "max_length 10 only means something with position='learned'"),
        (dict(head_dim=7), "7 channels, so head_dim must be even and no more, not 7"),
        (dict(norm_eps=float("nan")), "norm_eps is NaN"),
        (dict(rope_theta=-1), "rope_theta must be a positive number, not -1"),
        (dict(norm_eps="1e-5"), "norm_eps must be a positive number, not '1e-5'"),
        (dict(tie_embeddings="no"), "tie_embeddings must be true or false, not 'no'"),
        (dict(num_layers=np.ones(1, int)), "num_layers must be a string, .* or a tuple of them, not ndarray"),
        (dict(num_layers=jnp.ones((), int)), "num_layers must be a string, .* or a tuple of them, not Array"),
        (dict(activation=["gelu"]), "activation must be a string, a number, a bool, None or a tuple of them, not list"),
        (dict(architecture="decoders"), "architecture 'decoders' is none of decoder, .*did you mean 'decoder'"),
        (dict(layer_pattern=()), "layer_pattern must name at least one kind"),
        (dict(layer_pattern=("locl",)), "layer_pattern 'locl' is none of global, .*did you mean 'local'"),
        (dict(layer_pattern=("local",)), "local layers need a window"),
        (dict(window=4), r"window 4 and layer_pattern \('global',\) contradict each other"),
        (dict(window=0, layer_pattern=("local",)), "window must be a positive whole number, not 0"),
        (dict(rotary_dim=10), "rotary_dim must be even and no more, not 10"),
        (dict(rope_scaling=(("rope_type", "yarm"),)), "rope_type 'yarm' is none of .*did you mean 'yarn'"),
        (dict(rope_scaling=(("rope_type", "linear"),)), "rope_scaling of type 'linear' lacks factor"),
        (dict(num_encoder_layers=2), "num_encoder_layers 2 only means something with architecture='encoder_decoder'"),
        (dict(head="sequence"), "head 'sequence' and num_labels None contradict each other"),
        (dict(num_labels=3), "head 'lm' and num_labels 3 contradict each other"),
        (dict(head_activation="swiglu"), "head_activation 'swiglu' is none of gelu, "),
        (dict(head_norm=True), "head_norm is of the head's hidden layer, which head_activation gives it"),
        (dict(parallel_residual=True, norm_placement="both"), "parallel_residual is for norm_placement='pre'"),
        (dict(rope_scaling=("linear", 2.0)), "rope_scaling is pairs of a name and a value"),
        (dict(rope_scaling=(("rope_type", "linear"), ("factor", -1.0))), "factor -1.0, which must be a number above 0"),
        (dict(position="relative", relative_max_distance=16), "relative_max_distance 16: none are left for near or"),
        (dict(attention_softcap=-1.0), "attention_softcap must be a positive number, not -1.0"),
        (dict(type_vocab_size=-1), "type_vocab_size must be a whole number, 0 or above, not -1"),
        (dict(activation="swiglo"), "activation 'swiglo' is none of gelu, .*did you mean 'swiglu'"),
        (dict(remat="ful"), "remat 'ful' is none of none, dots, full; did you mean 'full'"),
        (dict(dtype="int8"), "dtype 'int8' is none of float32, bfloat16, float16"),
        (dict(dtype="auto"), "dtype 'auto' is not a dtype"),
        (dict(compute_dtype="int8"), "compute_dtype 'int8' is none of float32, bfloat16, float16, auto"),
        (dict(compute_dtype="floaty"), "compute_dtype 'floaty' is not a dtype; try float32 or bfloat16"),
    ],
)
def test_wrong_values(changes, message):
    with pytest.raises(ConfigError, match=message):
        Config(**(SHAPE | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_head=4), "no field 'num_head'; did you mean 'num_heads'"),
        (
            dict(config_version=VERSION + 1),
            f"has version {VERSION + 1}, this lmx reads up to {VERSION}; install a newer",
        ),
        (dict(config_version=99, sinks=4), "(it has sinks, unknown here); install a newer lmx"),
        (dict(config_version="next"), "has version 'next'"),
    ],
)
def test_wrong_dicts(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Config.from_dict(Config(**SHAPE).to_dict() | change)


def test_a_dict_that_lacks_a_field():
    with pytest.raises(ConfigError, match="lacks vocab_size, num_heads"):
        Config.from_dict({k: v for k, v in SHAPE.items() if k not in ("vocab_size", "num_heads")})
