"""Training equals torch's: Hugging Face's GPT-2 and Llama, the same weights, batches, AdamW, clipping and schedule."""

from __future__ import annotations

import copy

import jax
import numpy as np
import pytest

from lmx.core import tree
from lmx.losses import cross_entropy
from lmx.models.stacks import unstack
from lmx.train import adamw, cosine, make_train_step, start

pytest.importorskip("torch", reason="torch is the oracle of training; install the extra 'oracle'")
pytestmark = pytest.mark.usefixtures("quick")
STEPS, WARMUP, PEAK = 50, 5, 3e-3
BATCHES = np.random.default_rng(0).integers(0, 61, (5, 4, 16)).astype(np.int32)  # five, seen ten times each


def torch_loss(model, tokens):
    import torch

    ids = torch.tensor(tokens, dtype=torch.long)
    return model(ids, labels=ids).loss


def numbers(items) -> dict[str, np.ndarray]:
    return {name: x.detach().numpy() for name, x in items}


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama tied"])
def test_first_gradients(hugging_face, name):
    torch_model, convert = hugging_face(name)
    torch_model.zero_grad()
    torch_loss(torch_model, BATCHES[0]).backward()
    wanted = convert(numbers((n, p.grad) for n, p in torch_model.named_parameters()))
    model = convert(numbers(torch_model.state_dict().items()))

    def mean(model):
        total, weight, _ = cross_entropy(model, {"tokens": BATCHES[0]}, chunk=7)
        return total / weight

    got = jax.jit(jax.grad(mean))(model)
    whole = np.sqrt(sum(np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(wanted)))
    for (path, g), (_, w) in zip(tree.paths(unstack(got)), tree.paths(unstack(wanted)), strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        # Keys' biases have no gradient (a softmax does not see them), so what both have there is rounding: that is
        # measured by the whole gradient.
        assert np.linalg.norm(g - w) <= 1e-5 * np.linalg.norm(w) + 1e-7 * whole, path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_fifty_steps(hugging_face, name):
    import torch

    torch_model, convert = hugging_face(name)
    torch_model = copy.deepcopy(torch_model)
    model = convert(numbers(copy.deepcopy(torch_model).state_dict().items()))

    matrices = [p for p in torch_model.parameters() if p.ndim >= 2]
    vectors = [p for p in torch_model.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    theirs = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), eps=1e-8)
    schedule = cosine(PEAK, STEPS, WARMUP)
    ours = adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    state, step = start(model, ours), make_train_step(cross_entropy, ours, clip_norm=1.0)

    losses, norms = [], []
    for i in range(STEPS):
        # The schedule by hand: linear to the peak, then half a cosine to a tenth of it.
        done = (i - WARMUP) / (STEPS - WARMUP)
        rate = PEAK * i / WARMUP if i < WARMUP else PEAK * (0.1 + 0.9 * (1 + np.cos(np.pi * done)) / 2)
        for group in theirs.param_groups:
            group["lr"] = rate
        theirs.zero_grad()
        loss = torch_loss(torch_model, BATCHES[i % 5])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(torch_model.parameters(), 1.0)
        theirs.step()
        state, metrics = step(state, {"tokens": BATCHES[i % 5]})
        losses.append((float(metrics["loss"]), loss.item()))
        norms.append((float(metrics["grad_norm"]), norm.item()))
    losses, norms = np.array(losses), np.array(norms)
    # Float32 rounding (1e-6 at first) grows with the steps: Adam divides small gradients by their own size.
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], atol=1e-3, rtol=0)
    np.testing.assert_allclose(norms[:, 0], norms[:, 1], rtol=1e-2)
    assert losses[-5:].mean() < losses[:5].mean() - 1  # it has learned: the comparison is not of models at rest
    assert norms[0, 1] > 1  # and clipping has cut
    wanted = convert(numbers(torch_model.state_dict().items()))
    for (path, g), (_, w) in zip(tree.paths(state.model), tree.paths(wanted), strict=True):
        if "attention/key_bias" not in str(path):  # no gradient, see above: Adam makes a walk of its rounding
            assert np.linalg.norm(g - w) < 1e-3 * np.linalg.norm(w), path
