"""The matrices at a model's ends: what they see, against models that are built to show it, and what they become."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx import reparam
from lmx.core.errors import ConfigError
from lmx.core.kinds import LowRank, Pivoted
from lmx.models.cost import cost
from lmx.reparam import ends
from lmx.reparam.grams import LINEARS, moments

ENDS = "^(embed/tokens|head/out)$"
KINDS = ("input", "absolute", "output", "fisher")
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def untied(tiny):
    """A decoder whose logits are scaled, capped and biased."""
    return tiny("llama", vocab_size=97, logit_scale=0.7, logit_softcap=9.0, head_bias=True)


def collect(model, batches, want=KINDS, pattern=ENDS):
    found = {}
    for seen in moments(model, batches, pattern, want=want, key=KEY):
        found |= seen
    return found


def features(model, batch):
    return model.features(batch["tokens"], segment_ids=batch["segment_ids"])


def gradients(model, batch, key) -> np.ndarray:
    """The gradient at every position's row, (b, t, e), through a model in which each position has a row of its own."""
    b, t = batch["tokens"].shape
    label = ends.draw_labels(model.readout(), features(model, batch), key)[1]
    rows = model.params.embed.tokens[batch["tokens"]].reshape(b * t, -1)

    def loss(rows):
        own = model.replace(params=model.params.replace(embed=model.params.embed.replace(tokens=rows)))
        x = own.features(jnp.arange(b * t).reshape(b, t), segment_ids=batch["segment_ids"])
        chosen = jnp.take_along_axis(model.log_probs(x), label[..., None], -1)[..., 0]
        return -(chosen * batch["segment_ids"]).sum()

    return np.asarray(jax.grad(loss)(rows), np.float64).reshape(b, t, -1)


def pooled(model, batches):
    """All that the ends see, of the tokens that are no padding, in float64: tokens, gradients at their rows, features,
    p, and the slope of each logit."""
    keys, found = jax.random.split(KEY, len(batches)), []
    for batch, key in zip(batches, keys, strict=True):
        real = np.asarray(batch["segment_ids"], bool)
        f = features(model, batch)
        raw = 0.7 * np.asarray(f, np.float64) @ np.asarray(model.params.head.out, np.float64)
        raw += np.asarray(model.params.head.out_bias, np.float64)
        p = np.exp(np.asarray(model.log_probs(f), np.float64))
        slope = 0.7 / np.cosh(raw / 9.0) ** 2
        found.append([np.asarray(x)[real] for x in (batch["tokens"], gradients(model, batch, key), f, p, slope)])
    return [np.concatenate(x) for x in zip(*found, strict=True)]


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, atol=3e-5 * np.abs(wanted).max())


@pytest.fixture(scope="module")
def seen(untied, batches):
    return collect(untied, batches)


@pytest.mark.slow
def test_what_they_see(untied, batches, seen):
    assert list(seen) == ["head/out", "embed/tokens"]  # the last comes first
    tokens, g, h, p, slope = pooled(untied, batches)
    n = len(tokens)
    table, out = seen["embed/tokens"], seen["head/out"]
    assert table.tokens == out.tokens == n
    counts = np.bincount(tokens, minlength=97)
    close(table.input, (counts + 1) / (n + 97))
    close(table.absolute, (counts + 1) / (n + 97))
    close(table.output, g.T @ g / n)
    close(table.fisher, (np.bincount(tokens, (g**2).sum(1), 97) + (g**2).sum(1).mean()) / (n + 97))
    squares = p * (1 - p) * slope**2
    close(out.input, h.T @ h / n)
    close(out.absolute, np.abs(h).mean(0))
    close(out.output, squares.mean(0))
    close(out.fisher, (h.astype(np.float64) ** 2 * squares.sum(1, keepdims=True)).mean(0))


def test_going_forward_alone_sees_the_same_inputs(untied, batches, seen):
    both = ("input", "absolute")
    got = collect(untied, batches, both)
    assert list(got) == ["embed/tokens", "head/out"]
    for path in seen:
        for kind in both:
            close(getattr(got[path], kind), getattr(seen[path], kind))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tied", "t5"])
def test_a_table_with_two_uses_has_the_partial_traces_of_their_sum(tiny, batches, name):
    """The head of a tied model sees what it does in an untied one with the same matrices."""
    tied = tiny(name, vocab_size=97, tie_embeddings=True)
    if name == "t5":
        batches = [b | {"encoder_tokens": b["tokens"][:, :7] // 2} for b in batches]
    head = tied.params.head.replace(out=tied.params.embed.tokens.T)
    apart = tied.replace(config=tied.config.replace(tie_embeddings=False), params=tied.params.replace(head=head))
    two = collect(apart, batches)
    table, out = two["embed/tokens"], two["head/out"]
    assert (out.tokens < table.tokens) == (name == "t5")
    got = collect(tied, batches, ("input", "output"))["embed/tokens"]
    assert got.tokens == table.tokens
    share = out.tokens / table.tokens  # the mean is over all tokens that are read
    whole = np.kron(np.diag(table.input), table.output) + share * np.kron(np.diag(out.output), out.input)
    whole = whole.reshape(97, 16, 97, 16)
    close(np.diag(got.input) * np.trace(got.output), np.einsum("ikjk->ij", whole))
    close(got.output * got.input.sum(), np.einsum("kikj->ij", whole))


@pytest.mark.slow
def test_both_towers_read_the_table(tiny, batches):
    model = tiny("t5", vocab_size=97)
    batch = {"tokens": batches[0]["tokens"][:2, :5], "encoder_tokens": batches[0]["tokens"][2:4, :7]}
    seen = collect(model, [batch])
    together = np.concatenate([np.ravel(batch["tokens"]), np.ravel(batch["encoder_tokens"])])
    assert seen["embed/tokens"].tokens == len(together) and seen["head/out"].tokens == 10
    close(seen["embed/tokens"].input, (np.bincount(together, minlength=97) + 1) / (len(together) + 97))
    memory = model.encoded(batch["encoder_tokens"])
    h = np.asarray(model.decoded(batch["tokens"], memory), np.float64).reshape(10, -1)
    close(seen["head/out"].input, h.T @ h / 10)
    assert np.linalg.matrix_rank(seen["embed/tokens"].output) == 16


@pytest.mark.slow
def test_in_chunks_and_half_precision(tiny, batches):
    """Rows longer than a chunk, and activations in bfloat16, whose moments are sums in float32."""
    long = [{name: jnp.tile(x, (1, 3)) for name, x in batch.items()} for batch in batches]
    assert long[0]["tokens"].shape[1] > ends.CHUNK
    exact = tiny("llama", vocab_size=97)
    half = exact.replace(config=exact.config.replace(compute_dtype="bfloat16"))
    one, other = (collect(m, long) for m in (exact, half))
    h = np.concatenate([np.asarray(features(exact, b), np.float64)[np.asarray(b["segment_ids"], bool)] for b in long])
    p = np.exp(np.concatenate([
        np.asarray(exact.log_probs(features(exact, b)), np.float64)[np.asarray(b["segment_ids"], bool)] for b in long
    ]))  # fmt: skip
    close(one["head/out"].input, h.T @ h / len(h))
    close(one["head/out"].output, (p * (1 - p)).mean(0))
    for kind in ("input", "output"):  # no labels are drawn for these
        a, b = getattr(one["head/out"], kind), getattr(other["head/out"], kind)
        np.testing.assert_allclose(a, b, atol=0.05 * np.abs(a).max())
    small = reparam.factorize(half, 0.6, long, pattern=ENDS, key=KEY)  # moments that are none would be refused
    assert np.isfinite(divergence(half, small, long))


@pytest.fixture(scope="module")
def split(tiny, batches):
    """A model whose vocabulary a mesh splits, and what its ends see without one."""
    model = tiny("llama", vocab_size=104, logit_softcap=9.0, head_bias=True)
    return model, collect(model, batches)


@pytest.mark.slow
def test_on_a_mesh(split, batches, mesh):
    model, wanted = split
    got = collect(jax.device_put(model, lmx.specs.shardings(model.specs())), batches)
    for path in wanted:
        for kind in KINDS:
            close(getattr(got[path], kind), getattr(wanted[path], kind))


@pytest.mark.slow
@pytest.mark.parametrize("form", [LowRank, Pivoted])
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_they_are_factorized_with_the_layers(tiny, batches, sound, name, form):
    model = tiny(name, vocab_size=97)
    pattern = f"{ENDS}|{LINEARS}"
    stored_as = "pivoted" if form is Pivoted else "two-factor"
    parts = reparam.decompose_model(model, batches, pattern=pattern, key=KEY)
    ranks = reparam.choose_ranks(model, parts, 0.4, form=stored_as) | dict.fromkeys(ends.paths(model), 5)
    small = reparam.rebuild(model, parts, ranks, form=stored_as)
    loaded = sound(small)
    at_ends = [small.params.embed.tokens, *([] if name == "tied" else [small.params.head.out])]
    assert all(isinstance(w, form) for w in at_ends)
    np.testing.assert_array_equal(lmx.logits(loaded, batches[0]["tokens"]), lmx.logits(small, batches[0]["tokens"]))
    full = {path: min(part.site.shape) for path, part in parts.items()}
    same = reparam.rebuild(model, parts, full, form="two-factor")
    np.testing.assert_allclose(
        lmx.logits(same, batches[0]["tokens"]), lmx.logits(model, batches[0]["tokens"]), atol=2e-3
    )


def test_what_a_lookup_costs(tiny):
    """Of a table a row is read; of its factors the second is read and multiplied whole."""
    model = tiny("llama", vocab_size=97)
    small = reparam.factorize(model, 0.5, method="svd", pattern="embed/tokens", form="two-factor", allocation="uniform")
    rank = small.params.embed.tokens.rank
    before, after = cost(model, 8), cost(small, 8)
    assert after.forward_flops - before.forward_flops == 2 * rank * 16
    assert after.decode_bytes - before.decode_bytes == 4 * rank * 16  # the row itself is nothing beside it


def divergence(model, other, batches) -> float:
    total = count = 0.0
    for b in batches:
        p, q = (m.log_probs(features(m, b)) for m in (model, other))
        real = b["segment_ids"] != 0
        total, count = total + float(((jnp.exp(p) * (p - q)).sum(-1) * real).sum()), count + float(real.sum())
    return total / count


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_what_is_seen_brings_the_model_nearer(tiny, batches, name):
    """Of a table and a head alone, cut to half, on the text that was seen."""
    model = tiny(name, vocab_size=97)
    skewed = [b | {"tokens": jnp.minimum(b["tokens"], 9)} for b in batches]
    off = {}
    for method in ("svd", "two-sided"):
        small = reparam.factorize(model, 0.5, skewed, method=method, pattern=ENDS, form="two-factor", key=KEY)
        off[method] = divergence(model, small, skewed)
    assert off["two-sided"] < 0.8 * off["svd"]


@pytest.mark.slow
def test_layers_are_fitted_behind_them(tiny, batches):
    model = tiny("llama", vocab_size=97)
    parts = reparam.decompose_model(model, batches, pattern=f"{ENDS}|{LINEARS}", sequential=True, key=KEY)
    full = {path: min(part.site.shape) for path, part in parts.items()}
    same = reparam.rebuild(model, parts, full, form="dense", batches=batches)
    assert divergence(model, same, batches) < 1e-5
    ranks = full | {"embed/tokens": 12, "head/out": None}
    plain = reparam.rebuild(model, parts, ranks, form="dense")
    fitted = reparam.rebuild(model, parts, ranks, form="dense", batches=batches)
    assert divergence(model, fitted, batches) < divergence(model, plain, batches)


def test_bad_input(tiny, batches):
    for want in (("input",), ("fisher",), KINDS):
        with pytest.raises(ConfigError, match="embed/tokens is the head's matrix too: .*'two-sided'"):
            next(moments(tiny("tied", vocab_size=97), batches, ENDS, want=want))
    with pytest.raises(ConfigError, match="selects head/out, which is no matrix of a layer, nor one of embed/tokens"):
        next(moments(tiny("modernbert"), batches, "head/out"))
    with pytest.raises(ConfigError, match="selects embed/types, which is no matrix"):
        next(moments(tiny("bert"), batches, "embed/types"))
