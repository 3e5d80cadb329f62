import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx.core.errors import ConfigError
from lmx.models import blocks
from lmx.reparam import ends, grams
from lmx.reparam.grams import moments
from lmx.reparam.walk import Walk, leave

KINDS = ("input", "absolute", "output", "fisher")


def collect(model, batches, want=KINDS, **more) -> dict[str, grams.Moments]:
    found = {}
    for seen in moments(model, batches, want=want, **more):
        found |= seen
    return found


def assert_close(got, wanted, kinds=KINDS, tolerance=1e-5) -> None:
    assert got.keys() == wanted.keys()
    for path in wanted:
        for kind in kinds:
            a, b = getattr(got[path], kind), getattr(wanted[path], kind)
            np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max(), err_msg=f"{path} {kind}")


@pytest.fixture(scope="module")
def seen(model, batches):
    return collect(model, batches, key=jax.random.key(5))


def labels_of(model, batches, key) -> list[np.ndarray]:
    """The labels that the collector draws."""
    keys = jax.random.split(key, len(batches))
    features = [model.features(b["tokens"], segment_ids=b["segment_ids"]) for b in batches]
    return [np.asarray(ends.draw_labels(model.readout(), f, k)[1]) for f, k in zip(features, keys, strict=True)]


def hooked(torch_model, names, run) -> dict[str, list]:
    """The inputs of torch's linear layers and the gradients at their outputs, of every time that they run."""
    shown: dict[str, list] = {name: [] for name in names}

    def watch(name: str, module) -> None:
        def after(module, args, out) -> None:
            out.register_hook(lambda g: shown[name].append((args[0].detach().numpy(), g.numpy())))

        module.register_forward_hook(after)

    for name, module in torch_model.named_modules():
        if name in shown:
            watch(name, module)
    run(torch_model)
    return shown


def assert_as_hooked(got: grams.Moments, pairs: list, real: np.ndarray) -> None:
    """pairs: of each run (x, g), (b, t, ...) each; real: (b, t), those that count."""
    x, g = (np.concatenate([pair[i][real] for pair in pairs]) for i in (0, 1))
    assert got.tokens == len(x)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())  # noqa: E731
    close(got.input, x.T @ x / len(x))
    close(got.absolute, np.abs(x).mean(0))
    close(got.output, g.T @ g / len(g))
    close(got.fisher, ((x**2) * (g**2).sum(1, keepdims=True)).mean(0))


DECODER = {
    "attention/query": "self_attn.q_proj", "attention/key": "self_attn.k_proj", "attention/out": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj", "mlp/down": "mlp.down_proj",
}  # fmt: skip


@pytest.mark.slow
def test_as_hooks_of_torch_see_them(model, batches, seen, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lmx.save(model, tmp_path / "hf", format="hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").double()
    labels = labels_of(model, batches, jax.random.key(5))
    modules = {f"model.layers.{i}.{b}": f"decoder/layers[{i}]/{a}" for i in range(3) for a, b in DECODER.items()}
    reals = [np.asarray(batch["segment_ids"]) for batch in batches]

    def run(torch_model) -> None:
        for batch, real, y in zip(batches, reals, labels, strict=True):
            tokens, real = torch.tensor(np.asarray(batch["tokens"])).long(), torch.tensor(real)
            logits = torch_model(tokens, attention_mask=real).logits
            lost = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.tensor(y).long(), reduction="none")
            (lost * real).sum().backward()

    for name, pairs in hooked(theirs, modules, run).items():
        stacked = [tuple(np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))]
        assert_as_hooked(seen[modules[name]], stacked, np.concatenate(reals).astype(bool))


SMALL = dict(vocab_size=31, bos_token_id=None, eos_token_id=None)
OTHERS = {
    "shared layers": (
        "AlbertForMaskedLM",
        dict(SMALL, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24),
        {
            "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.value": "encoder/layers[0]/attention/value",
            "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output": "encoder/layers[0]/mlp/down",
        },
    ),
    "encoder-decoder": (
        "T5ForConditionalGeneration",
        dict(SMALL, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0),
        {
            "encoder.block.0.layer.0.SelfAttention.q": "encoder/layers[0]/attention/query",
            "encoder.block.1.layer.1.DenseReluDense.wo": "encoder/layers[1]/mlp/down",
            "decoder.block.0.layer.1.EncDecAttention.q": "decoder/layers[0]/cross/query",
            "decoder.block.1.layer.1.EncDecAttention.k": "decoder/layers[1]/cross/key",
            "decoder.block.1.layer.2.DenseReluDense.wi": "decoder/layers[1]/mlp/up",
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_as_hooks_of_torch_see_them(kind, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    class_name, fields, modules = OTHERS[kind]
    torch.manual_seed(0)
    cls = getattr(transformers, class_name)
    theirs = cls(cls.config_class(**fields)).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.ndim > 1:
                p.normal_(0, p.shape[1] ** -0.5)
    theirs.save_pretrained(tmp_path)
    model, both = lmx.load(tmp_path), kind == "encoder-decoder"
    tokens = np.random.default_rng(0).integers(0, 31, (3, 8))
    real = np.arange(8) < np.array([8, 5, 8])[:, None]
    batch = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(real, jnp.int32)}
    given = dict(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(real).long())
    of_encoder = real
    if both:
        source, of_encoder = (tokens[:, :6] + 3) % 31, real[:, 2:]
        batch |= {"encoder_tokens": jnp.asarray(source), "encoder_segment_ids": jnp.asarray(of_encoder, jnp.int32)}
        given = dict(input_ids=torch.tensor(source), attention_mask=torch.tensor(of_encoder).long())
        given |= dict(decoder_input_ids=torch.tensor(tokens), decoder_attention_mask=torch.tensor(real).long())
    key = jax.random.key(7)
    features = model.features(**batch)
    labels = np.asarray(ends.draw_labels(model.readout(), features, jax.random.split(key, 1)[0])[1])

    def run(torch_model) -> None:
        logits = torch_model(**given).logits.transpose(1, 2)
        lost = torch.nn.functional.cross_entropy(logits, torch.tensor(labels).long(), reduction="none")
        (lost * torch.tensor(real)).sum().backward()

    got = collect(model, [batch], key=key)
    for name, pairs in hooked(theirs.double(), modules, run).items():
        path = modules[name]
        of_tower = of_encoder if path.startswith("encoder") or "cross/key" in path else real
        assert_as_hooked(got[path], pairs, of_tower)


@pytest.mark.slow
def test_labels_are_drawn_from_the_model(model, batches):
    """Averages over draws approach the Fisher information, in which every label has its probability."""
    features = model.features(batches[0]["tokens"][:2, :4])
    p = np.exp(np.asarray(model.log_probs(features), np.float64))
    keys = jax.random.split(jax.random.key(0), 4000)
    labels = np.asarray(jax.jit(jax.vmap(lambda k: ends.draw_labels(model.readout(), features, k)[1]))(keys))
    counts = np.stack([(labels == v).mean(0) for v in range(97)], -1)
    assert np.abs(counts - p).max() < 4.5 * np.sqrt(0.25 / 4000)
    gradient, y = ends.draw_labels(model.readout(), features, keys[0])
    loss = lambda f: -jnp.take_along_axis(model.log_probs(f), y[..., None], -1).sum()  # noqa: E731
    np.testing.assert_allclose(gradient, jax.grad(loss)(features), atol=1e-5)


def test_going_forward_alone_sees_the_same_inputs(model, batches, seen):
    forward = list(moments(model, batches, want=("input", "absolute")))
    assert [next(iter(layer)).split("/")[1] for layer in forward] == ["layers[0]", "layers[1]", "layers[2]"]
    got = {path: m for layer in forward for path, m in layer.items()}
    assert_close({path: got[path] for path in seen}, seen, ("input", "absolute"))
    assert all(m.output is None for m in got.values())


def test_a_pattern_chooses_and_the_last_layer_comes_first(model, batches, seen):
    layers = list(moments(model, batches, "layers[1:]/mlp/up$", want=KINDS, key=jax.random.key(5)))
    assert [list(layer) for layer in layers] == [["decoder/layers[2]/mlp/up"], ["decoder/layers[1]/mlp/up"]]
    got = layers[0] | layers[1]
    assert_close(got, {path: seen[path] for path in got})


@pytest.mark.slow
def test_on_a_mesh(model, batches, seen, mesh):
    placed = jax.device_put(model, lmx.specs.shardings(model.specs()))
    assert_close(collect(placed, batches, key=jax.random.key(5)), seen)


def test_one_layer_and_the_activations_are_held(model, batches):
    """Beside arrays that are there before: each batch's x behind every layer, and the moments of one layer."""
    before = {id(x) for x in jax.live_arrays()}
    walk = moments(model, batches, want=("input", "output"))
    most = 0
    for _ in walk:
        held = [x for x in jax.live_arrays() if id(x) not in before]
        most = max(most, sum(x.nbytes for x in held))
    activations = 2 * 8 * 24 * 32 * 4 * (3 + 2)  # behind the embedding and each layer, and one gradient
    weights = lmx.specs.nbytes(model)  # unstacked
    assert most < activations + 2 * weights + 2 * 8 * 24 * 4 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(want=("inputs",)), "no moments 'inputs', there are .*; did you mean 'input'"),
        (dict(batches=[]), "at least one batch with a token"),
        (dict(batches=[{"tokens": jnp.ones((2, 4), int), "segment_ids": jnp.zeros((2, 4), int)}]), "no padding"),
        (dict(batches=[{"text": "x"}]), "a dict with 'tokens' .b, t.; it has .'text'"),
        (dict(pattern="embed/tokens", want=("input",)), "embed/tokens is the head's matrix too"),
        (dict(pattern="mlp_norm"), "no matrix of a layer"),
        (dict(pattern="mpl/up"), "selects nothing; did you mean"),
    ],
)
def test_bad_input(model, batches, change, message):
    with pytest.raises(ConfigError, match=message):
        list(moments(**(dict(model=model, batches=batches) | change)))


def test_a_layer_is_what_the_model_runs(model, batches):
    """`blocks.layer`, through which the collector goes, is the layer of `blocks.run`."""
    walk = Walk(model, batches[:1])
    (x,) = walk.enter("decoder")
    for block in walk.layers["decoder"]:
        assert isinstance(block, blocks.Block)
        (x,) = walk.step("decoder", block, [x])
    features = model.features(batches[0]["tokens"], segment_ids=batches[0]["segment_ids"])
    np.testing.assert_allclose(leave(walk.shell, "decoder", x), features, atol=1e-5)
