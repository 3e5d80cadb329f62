"""Nodes: frozen pytree dataclasses known by name; and the search for the nearest right name."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from lmx.core.errors import ConfigError, DataError, FolderError, LmxError, NonFiniteError, nearest
from lmx.core.nodes import node, node_class, static


@node
class Pair:
    first: object
    second: object
    name: str = static(default="pair")


def test_a_node_is_a_frozen_pytree():
    pair = Pair(jnp.ones(2), None)
    assert len(jax.tree.leaves(pair)) == 1
    assert jax.tree.structure(pair) != jax.tree.structure(pair.replace(name="other"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        pair.name = "other"


def test_a_node_is_found_by_name():
    assert node_class("Pair") is Pair
    with pytest.raises(FolderError, match="part of kind 'Pairs'.*did you mean 'Pair'"):
        node_class("Pairs")


def test_two_nodes_cannot_share_a_name():
    def again():
        @node
        class Pair:
            first: object

    with pytest.raises(ValueError, match="two classes named Pair"):
        again()


def test_nearest():
    assert nearest("tempurature", ["top_k", "temperature"]) == "; did you mean 'temperature'?"
    assert nearest("zzz", ["top_k"]) == ""


def test_errors_are_also_the_builtin_ones():
    kinds = {
        ConfigError: ValueError,
        DataError: ValueError,
        FolderError: OSError,
        NonFiniteError: ArithmeticError,
    }
    assert all(issubclass(ours, LmxError) and issubclass(ours, builtin) for ours, builtin in kinds.items())
