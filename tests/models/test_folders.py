"""Model folders: round trips bit for bit, sharded loading, atomic replacement, and every error's message."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lmx.core import nodes
from lmx.core.errors import FolderError
from lmx.core.nodes import node, static
from lmx.models import folders


@dataclasses.dataclass(frozen=True)
class FolderConfig:
    """Stands for a model's Config: frozen, registered, with to_dict and from_dict."""

    vocab_size: int
    activation: str = "gelu"

    def to_dict(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        return cls(**values)


nodes.REGISTRY["FolderConfig"] = FolderConfig


@node
class FolderFactors:
    left: Any
    right: Any
    inputs: int = static(default=1)
    scales: tuple = static(default=(1.0, float("inf"), None, ("a", True)))


@node
class FolderModel:
    config: FolderConfig = static()
    params: Any = None


def build(key=0, rows=16):
    a, b = jax.random.split(jax.random.key(key))
    base = FolderFactors(jax.random.normal(a, (rows, 4)), jax.random.normal(b, (4, 8), jnp.bfloat16))
    params = {
        "layers": (FolderFactors(base, None, inputs=2), [jnp.arange(6, dtype=jnp.int8), jnp.float32(0.1)]),
        "half": jnp.linspace(0, 1, 5, dtype=jnp.float16),
        "ids": jnp.array([[1, -2], [3, 4]], jnp.int32),
        "empty": jnp.zeros((0, 3)),
        "mask": jnp.array([True, False]),
        "nothing": (),
    }
    return FolderModel(config=FolderConfig(300), params=params)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def entries(folder):
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.fixture
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 2)


def test_round_trip_bit_for_bit(tmp_path):
    model = build()
    folders.save(model, tmp_path / "m", notes={"made": "by hand"})
    assert entries(tmp_path) == ["m"]
    assert entries(tmp_path / "m") == ["config.json", "model.safetensors", "structure.json"]
    assert_same(folders.load(tmp_path / "m"), model)
    about = json.loads((tmp_path / "m" / "structure.json").read_text())
    assert (about["format"], about["version"], about["notes"]) == ("lmx", 1, {"made": "by hand"})
    assert about["tree"]["static"]["config"] == {"kind": "FolderConfig", "file": "config.json"}
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config == {"vocab_size": 300, "activation": "gelu"}


def test_a_reload_is_the_same_key_of_the_jit_cache(tmp_path):
    model, traces = build(), []

    @jax.jit
    def total(model):
        traces.append(1)
        return sum(leaf.sum() for leaf in jax.tree.leaves(model))

    total(model)
    folders.save(model, tmp_path / "m")
    total(folders.load(tmp_path / "m"))
    assert len(traces) == 1


@pytest.mark.parametrize("tree", [jnp.arange(3), (None, [jnp.ones(2)]), {"a": None}, None])
def test_trees_without_a_node(tmp_path, tree):
    folders.save(tree, tmp_path / "m")
    assert_same(folders.load(tmp_path / "m"), tree)


def test_the_safetensors_library_reads_what_lmx_writes_and_the_other_way(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    model = build()
    folders.save(model, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    read = library.load_file(file)
    assert {"params.layers.0.left.right", "params.half", "params.layers.1.0"} < set(read)
    assert np.array_equal(read["params.layers.0.left.right"], model.params["layers"][0].left.right)
    library.save_file(read, file)
    assert_same(folders.load(tmp_path / "m"), model)


def test_large_models_are_spread_over_files_with_an_index(tmp_path):
    model = build()
    folders.save(model, tmp_path / "m", max_file_bytes=100)
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    assert_same(folders.load(tmp_path / "m"), model)
    (tmp_path / "m" / files[1]).unlink()
    with pytest.raises(FolderError, match=f"{files[1]} is missing"):
        folders.load(tmp_path / "m")


def test_dtype_casts_floating_arrays_only(tmp_path):
    folders.save(build(), tmp_path / "m")
    loaded = folders.load(tmp_path / "m", dtype=jnp.bfloat16)
    wanted = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype.kind in "fV" else x, build())
    assert_same(loaded, wanted)


def test_every_device_gets_only_its_shard(tmp_path, mesh, monkeypatch):
    folders.save(build(rows=32), tmp_path / "m")
    sharding, copied = NamedSharding(mesh, P("fsdp", None)), []

    def shardings(abstract):
        assert isinstance(abstract, FolderModel)
        return jax.tree.map(lambda leaf: sharding if leaf.shape == (32, 4) else None, abstract)

    def array(values, dtype, real=np.array):
        copied.append(values.shape)
        return real(values, dtype)

    monkeypatch.setattr(folders.np, "array", array)
    loaded = folders.load(tmp_path / "m", shardings=shardings, dtype=jnp.float32)
    left = loaded.params["layers"][0].left.left
    assert left.sharding == sharding
    assert [shard.data.shape for shard in left.addressable_shards] == [(8, 4)] * 8
    assert copied.count((8, 4)) == 4 and (32, 4) not in copied  # a replica does not read again
    assert np.array_equal(left, build(rows=32).params["layers"][0].left.left)


def test_a_sharded_model_saves_as_a_whole(tmp_path, mesh):
    values = jnp.arange(64.0).reshape(8, 8)
    folders.save((jax.device_put(values, NamedSharding(mesh, P("fsdp", "tensor"))),), tmp_path / "m")
    assert_same(folders.load(tmp_path / "m"), (values,))


class Tokenizer:
    def __init__(self, fails=False):
        self.fails = fails

    def save(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")
        if self.fails:
            raise RuntimeError("in the middle")


def test_the_tokenizer_goes_into_the_folder(tmp_path):
    folders.save(build(), tmp_path / "m", tokenizer=Tokenizer())
    assert "tokenizer.json" in entries(tmp_path / "m")


def test_a_taken_folder_is_refused_and_overwritten_when_told(tmp_path):
    old, new = build(0), build(1)
    folders.save(old, tmp_path / "m", tokenizer=Tokenizer())
    with pytest.raises(FolderError, match=r"m exists.*overwrite=True \(--overwrite\)"):
        folders.save(new, tmp_path / "m")
    assert_same(folders.load(tmp_path / "m"), old)
    folders.save(new, tmp_path / "m", overwrite=True)
    assert_same(folders.load(tmp_path / "m"), new)
    assert entries(tmp_path) == ["m"] and "tokenizer.json" not in entries(tmp_path / "m")


def test_overwrite_replaces_model_folders_only(tmp_path):
    (tmp_path / "empty").mkdir()
    folders.save(build(), tmp_path / "empty")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    with pytest.raises(FolderError, match="holds no model of lmx .* not overwritten"):
        folders.save(build(), tmp_path / "thesis", overwrite=True)
    with pytest.raises(FolderError, match="thesis.tex is a file"):
        folders.save(build(), tmp_path / "thesis" / "thesis.tex", overwrite=True)
    with pytest.raises(FolderError, match="no local path"):
        folders.save(build(), "gs://bucket/model")
    assert entries(tmp_path / "thesis") == ["thesis.tex"]


@pytest.mark.parametrize("where", ["arrays", "tokenizer", "rename", "interrupt"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, where, exists):
    old, tokenizer, expected = build(0), None, FolderError
    if exists:
        folders.save(old, tmp_path / "m")
    if where == "tokenizer":
        tokenizer, expected = Tokenizer(fails=True), RuntimeError
    elif where == "rename":
        real = os.rename

        def rename(source, target):
            if "saving" in str(source):
                raise OSError(5, "Input/output error")
            real(source, target)

        monkeypatch.setattr(os, "rename", rename)
    else:
        expected = KeyboardInterrupt if where == "interrupt" else FolderError
        error = KeyboardInterrupt() if where == "interrupt" else OSError(28, "No space left on device")
        seen = []

        def whole(array):
            seen.append(1)
            if len(seen) == 3:
                raise error
            return np.asarray(array)

        monkeypatch.setattr(folders, "whole", whole)
    with pytest.raises(expected, match="could not write" if expected is FolderError else None):
        folders.save(build(1), tmp_path / "m", overwrite=True, tokenizer=tokenizer)
    assert entries(tmp_path) == (["m"] if exists else [])
    if exists:
        assert_same(folders.load(tmp_path / "m"), old)


def test_what_killed_saves_left_is_in_nobodys_way(tmp_path):
    (tmp_path / ".m.saving-00000000").mkdir()
    folders.save(build(), tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / ".m.replaced-00000000")
    with pytest.raises(FolderError, match="not there; .*m.replaced-00000000 is what an interrupted save"):
        folders.load(tmp_path / "m")
    folders.save(build(), tmp_path / "m")
    assert_same(folders.load(tmp_path / "m"), build())


def test_a_parent_that_cannot_be_written_is_named():
    parent = Path(tempfile.mkdtemp(dir="/tmp"))
    parent.chmod(0o555)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)  # root may write anywhere
        with pytest.raises(FolderError, match=f"{parent} is not writable .Permission denied"):
            folders.save(jnp.ones(3), parent / "m")
        assert entries(parent) == []
    finally:
        if is_root:
            os.seteuid(0)
        shutil.rmtree(parent)


@dataclasses.dataclass
class Foreign:
    value: int = 0


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": (Foreign(),)}, "a.0 is a Foreign, which a folder cannot hold"),
        ({"a": 1.0}, "a is a float, which a folder cannot hold"),
        ({1: jnp.ones(1)}, "dict with the key 1"),
        ({"a.b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, "two arrays would be named 'a.b'"),
        ({"a": jax.random.key(0)}, "dtype key<fry>, which safetensors cannot hold"),
        (FolderFactors(None, None, scales=[1]), "static value scales is a list"),
    ],
)
def test_what_a_folder_cannot_hold_is_named(tmp_path, tree, message):
    with pytest.raises(FolderError, match=message):
        folders.save(tree, tmp_path / "m")
    assert entries(tmp_path) == []


def edit(folder, change):
    path = folder / "structure.json"
    about = json.loads(path.read_text())
    change(about)
    path.write_text(json.dumps(about))


def damage_structure(folder):
    (folder / "structure.json").write_text('{"format": "lmx"')


def damage_config(folder):
    (folder / "config.json").unlink()


def make_newer(folder):
    edit(folder, lambda about: about.update(version=2, lmx="9.0"))


def rename_node(folder):
    edit(folder, lambda about: about["tree"].update(node="FolderModell"))


def rename_field(folder):
    edit(folder, lambda about: about["tree"]["fields"].update(parms=None))


def drop_static(folder):
    edit(folder, lambda about: about["tree"]["static"].clear())


def lose_part(folder):
    edit(folder, lambda about: about["tree"]["fields"]["params"].update(dict={}))


def drop_tensor(folder):
    edit(folder, lambda about: about["tree"]["fields"]["params"]["dict"].pop("half"))


def want_tensor(folder):
    entry = {"array": {"name": "params.other", "shape": [2], "dtype": "float32"}}
    edit(folder, lambda about: about["tree"]["fields"]["params"]["dict"].update(other=entry))


def want_shape(folder):
    edit(folder, lambda about: about["tree"]["fields"]["params"]["dict"]["half"]["array"].update(shape=[6]))


def unknown_dtype(folder):
    edit(folder, lambda about: about["tree"]["fields"]["params"]["dict"]["half"]["array"].update(dtype="f99"))


def unknown_part(folder):
    edit(folder, lambda about: about["tree"]["fields"].update(params={"pickle": "gASV"}))


def truncate(folder):
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 1)


def truncate_header(folder):
    os.truncate(folder / "model.safetensors", 40)


def empty_file(folder):
    os.truncate(folder / "model.safetensors", 0)


def lose_file(folder):
    (folder / "model.safetensors").unlink()


def look_like_hugging_face(folder):
    (folder / "structure.json").unlink()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def lose_structure(folder):
    (folder / "structure.json").unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damage_structure, "structure.json is damaged: Expecting"),
        (damage_config, "config.json is missing"),
        (make_newer, r"version 2 of the format \(written by lmx 9.0\).*reads up to 1: install a newer"),
        (rename_node, "kind 'FolderModell'.*did you mean 'FolderModel'"),
        (rename_field, "FolderModel a field 'parms', which is unknown here; did you mean 'params'"),
        (drop_static, "damaged: FolderModel lacks config"),
        (lose_part, r"they also hold params.empty, params.half, .*\.\.\."),
        (drop_tensor, "they also hold params.half$"),
        (want_tensor, "they lack params.other"),
        (want_shape, r"params.half in .* has shape \(5,\) .* says \(6,\)"),
        (unknown_dtype, "structure.json is damaged.*f99"),
        (unknown_part, r"structure.json is damaged: no part has the keys \['pickle'\]"),
        (truncate, "model.safetensors is damaged or truncated .its header describes"),
        (truncate_header, "model.safetensors is damaged or truncated .its header claims"),
        (empty_file, "model.safetensors is damaged or truncated"),
        (lose_file, "model.safetensors is missing"),
        (look_like_hugging_face, "Hugging Face's format: `lmx.load` reads it"),
        (lose_structure, "no structure.json; it has config.json, model.safetensors"),
    ],
)
def test_a_damaged_folder_says_what_is_wrong(tmp_path, harm, message):
    folders.save(build(), tmp_path / "m")
    harm(tmp_path / "m")
    with pytest.raises(FolderError, match=message):
        folders.load(tmp_path / "m")


def test_what_is_no_folder(tmp_path):
    with pytest.raises(FolderError, match="m is not there$"):
        folders.load(tmp_path / "m")
    (tmp_path / "m").write_text("")
    with pytest.raises(FolderError, match="a file, not a folder"):
        folders.load(tmp_path / "m")
