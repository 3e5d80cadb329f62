"""Logits and gradients against Hugging Face's GPT-2 and Llama of the same weights, theirs in float64."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.tree import paths
from lmx.models.transformer import model_specs

NAMES = ("gpt2", "llama", "llama tied")
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 24))


def state(torch_model) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in torch_model.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_logits(hugging_face, name):
    import torch

    theirs, convert = hugging_face(name)
    model = convert(state(theirs))
    with torch.no_grad():
        wanted = copy.deepcopy(theirs).double()(torch.tensor(TOKENS)).logits.numpy()
    assert wanted.std() > 0.5
    # Three layers in float32 against float64, logits up to about 5.
    np.testing.assert_allclose(model.logits(jnp.asarray(TOKENS)), wanted, atol=2e-5)
    assert jax.tree.map(lambda s: s.shape, model_specs(model)) == jax.tree.map(lambda x: x.shape, model.params)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(hugging_face, name):
    import torch

    theirs, convert = hugging_face(name)
    model = convert(state(theirs))
    theirs = copy.deepcopy(theirs).double()
    theirs(torch.tensor(TOKENS), labels=torch.tensor(TOKENS)).loss.backward()
    gradients = {key: p.grad.numpy() for key, p in theirs.named_parameters()}
    loss = lambda model: -model.score(jnp.asarray(TOKENS)).mean()  # noqa: E731
    got = jax.jit(jax.grad(loss))(model)
    for (path, g), (_, w) in zip(paths(got), paths(convert(gradients)), strict=True):
        # Sums of 46 positions through three float32 layers: 1e-5 of the largest entry. The key's bias cancels
        # in the softmax: its gradient is rounding alone.
        bound = 1e-5 * float(jnp.abs(w).max()) + 1e-8
        np.testing.assert_allclose(g, w, rtol=0, atol=bound, err_msg=str(path))
