"""`lmx plan`: bytes and FLOPs against closed forms, what does not fit, the search, and what it refuses.

The programs are small and compiled once for all tests; those for TPUs need libtpu, those for GPUs jax's CUDA plugin.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import pytest
from rich.console import Console

import lmx
from lmx import losses, train
from lmx.core import chips, specs, topology
from lmx.core.errors import ConfigError, FolderError
from lmx.models import cost, transformer
from lmx.models.presets import preset
from lmx.nn import kernels
from lmx.recipes import checkpointed, plan
from lmx.recipes.plan import PlanOptions
from lmx.recipes.planning import programs, roofline, search
from lmx.recipes.planning.programs import Case, Work
from lmx.train.checkpoints import Checkpoints

TPU = pytest.mark.skipif(topology.missing("tpu") is not None, reason=f"libtpu: {topology.missing('tpu')}")
CUDA = pytest.mark.skipif(topology.missing("cuda") is not None, reason=f"CUDA plugin: {topology.missing('cuda')}")
L, D, F, V, HEADS, KV, C = 2, 64, 176, 512, 4, 2, 16  # llama-tiny, whose embedding is the head too
LAYER = D * HEADS * C * 2 + D * KV * C * 2 + 3 * D * F  # numbers of a layer's matrices


def planned(**options) -> dict:
    usual = dict(model="llama-tiny", topology="v5e:2x2", attention="reference")
    return plan.run(PlanOptions(**(usual | options)), Console(quiet=True))


@pytest.fixture(scope="module")
def trained():
    return planned(mesh="fsdp=2,tensor=2", length=128, batch_size=8)


@pytest.fixture(scope="module")
def small_chip():
    """A v5e of 60 MiB in the table of chips: what does not fit need not be large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chips.CHIPS, "v5e", dataclasses.replace(chips.CHIPS["v5e"], memory=60 << 20))
        yield chips.CHIPS["v5e"]


@pytest.fixture(scope="module")
def too_much(small_chip):
    """Without remat 8 rows' attention weights of two layers are kept: 2 x 8 x 4 x 512 x 512 in float32, and more."""
    return planned(length=512, batch_size=32, remat="none")


@TPU
def test_state_takes_what_the_closed_form_says(trained):
    """Matrices are split four ways, norms are whole; AdamW keeps two moments and a count; tokens are int32."""
    numbers = (V * D + L * LAYER) // 4 + (2 * L + 1) * D
    m = trained["memory"]
    assert m["parameters"] == 4 * numbers
    assert m["optimizer"] == 4 * (2 * numbers + 1)
    assert m["inputs"] >= 8 // 2 * 128 * 4
    assert m["peak"] == sum(m[k] for k in ("parameters", "optimizer", "cache", "inputs", "temporaries", "program"))
    assert m["spare"] == m["available"] - m["peak"] > 0 and trained["fits"]


@TPU
def test_flops_are_six_a_parameter_and_attention(trained):
    tokens, chip = 8 * 128, trained["chip"]
    products = 6 * (L * LAYER + V * D) * tokens
    causal = 12 * L * HEADS * C * (128 + 1) / 2 * tokens
    assert trained["flops"]["model"] == products + causal
    whole = 12 * L * HEADS * C * 128 * tokens  # the reference attention multiplies with every key
    again = 2 * L * (LAYER - D * F) * tokens + whole / 3  # the layers forward once more, but for the product with down
    assert trained["flops"]["executed"] == pytest.approx(products + whole + again)
    line = trained["roofline"]
    assert line["compute"] == trained["flops"]["executed"] / 4 / chip["flops"]
    assert line["step"] == max(line[k] for k in ("compute", "memory", "interconnect")) == line[line["bound"]]
    assert line["mfu"] == pytest.approx(trained["flops"]["model"] / (4 * chip["flops"] * line["step"]))
    assert line["tokens_per_second"] == pytest.approx(tokens / line["step"])


@TPU
def test_collectives_of_a_tpu_program(trained):
    """Every loop's length is read. Each matrix of a layer is gathered at least twice and its gradient scattered."""
    rows = {row["kind"]: row for row in trained["collectives"]}
    assert all(row["counted"] for row in rows.values())
    moved = sum(row["bytes"] for row in rows.values())
    assert moved >= 3 * 4 * L * LAYER // 2  # halves: tensor=2
    assert rows["all-reduce"]["count"] >= 4 * L
    assert 4 * L * LAYER // 2 <= rows["reduce-scatter"]["bytes"] <= 4 * L * LAYER // 2 + 2 * 4 * V * D // 2
    line = trained["roofline"]
    assert line["interconnect_bytes"] == sum(row["sent"] for row in rows.values())
    links = trained["chip"]["links"]
    assert line["interconnect_bytes"] / links <= line["interconnect"] <= 2 * line["interconnect_bytes"] / links


@TPU
def test_with_low_effort_the_compiler_makes_another_program_of_the_same_step(trained):
    found = planned(mesh="fsdp=2,tensor=2", length=128, batch_size=8, effort="low")
    low, full = found["memory"], trained["memory"]
    assert all(low[name] == full[name] for name in ("parameters", "optimizer", "inputs"))
    assert low["program"] != full["program"] and found["flops"] == trained["flops"]
    more = set(found["assumptions"]) - set(trained["assumptions"])
    assert [line.partition(":")[0] for line in more] == ["effort"] and found["effort"] == "low"


@pytest.mark.slow
@TPU
def test_a_compiler_out_of_memory_is_a_result():
    """The 8 B preset on four chips: the compiler refuses; its number and the state's closed form are told."""
    found = planned(model="llama-8b")
    assert not found["fits"] and found["collectives"] is None and found["roofline"] is None
    layer = 4096 * (2 * 32 + 2 * 8) * 128 + 3 * 4096 * 14336
    whole = (2 * 32 + 1) * 4096
    m, numbers = found["memory"], (32 * layer + 2 * 128256 * 4096) // 4 + whole
    assert m["parameters"] == 2 * numbers and m["optimizer"] == 2 * m["parameters"] + 4  # bfloat16, so are the moments
    assert m["temporaries"] > m["available"] == int(15.75 * 2**30)  # which is what it complains of
    assert m["spare"] == m["available"] - m["peak"] < 0
    assert found["advice"] == {"tried": [], "found": None, "least_devices": 4}  # 4 x 8 G x 2 bytes fill 3.8 chips


@TPU
@pytest.mark.slow
def test_what_does_not_fit_comes_with_a_remedy(too_much, small_chip):
    """The policy that is named has been compiled, and fits."""
    assert not too_much["fits"] and too_much["memory"]["temporaries"] > 2 * 8 * HEADS * 512**2 * 4
    advice = too_much["advice"]
    assert advice["tried"][-1] == advice["found"] and advice["found"]["fits"]
    assert (advice["found"]["mesh"], advice["found"]["remat"]) == ("fsdp=4", "dots")
    assert advice["found"]["memory"]["peak"] <= small_chip.memory < too_much["memory"]["peak"]
    json.dumps(too_much)


@TPU
@pytest.mark.slow
def test_arithmetic_never_excludes_what_fits(too_much, trained):
    """The least memory of a case is no more than what its compiled program takes, and not much less where activations
    rule."""
    hardware = topology.target("v5e:2x2")
    source = programs.source("llama-tiny", {"attention": "reference"})
    long, short = Work(source, 32, 512, "adamw"), Work(source, 8, 128, "adamw")
    for work, row in [(long, too_much), (long, too_much["advice"]["found"]), (short, trained)]:
        least = search.judge(work, Case(row["mesh"], row["remat"]), hardware).memory
        assert 0 < least <= row["memory"]["peak"]
    assert search.judge(long, Case("fsdp=4", "none"), hardware).memory > 0.3 * too_much["memory"]["peak"]


@pytest.mark.slow
@TPU
def test_search_ranks_what_it_compiled():
    found = planned(search=True, tries=2, length=64, batch_size=8)
    assert found["considered"] == 3 * 6  # policies, and (data, fsdp, tensor) of 4 devices
    times = [row["roofline"]["step"] for row in found["ranked"]]
    assert found["fits"] and len(times) == 2 and times == sorted(times)


@TPU
def test_decoding_holds_a_cache_and_reads_every_weight():
    found = planned(decode=True, mesh="tensor=2,data=2", length=64, batch_size=4)
    cache = 2 * L * 4 * KV * C * 64 * 4  # keys and values of four rows, float32
    m, line = found["memory"], found["roofline"]
    assert cache // 4 <= m["cache"] <= cache // 4 + 100 and m["optimizer"] == 0
    matrices = 4 * (L * LAYER + V * D) // 2
    assert line["memory_bytes"] == matrices + m["cache"]
    assert found["prefill"]["fits"] and found["fits"]
    assert {row["kind"] for row in found["collectives"]} <= {"all-reduce", "all-gather", "collective-permute"}


@CUDA
def test_gpus_gather_every_weight_twice_and_scatter_its_gradient_once():
    """XLA's GPU compiler keeps the collectives of the program: a layer's seven matrices forward, again for the backward
    pass, and the embedding for its rows and as the head."""
    found = planned(topology="h100:8", length=64)
    rows = {row["kind"]: row for row in found["collectives"]}
    table, layers = 4 * V * D, 4 * L * LAYER
    assert 2 * layers + table <= rows["all-gather"]["bytes"] <= 2 * layers + 4 * table
    assert layers <= rows["reduce-scatter"]["bytes"] + rows["all-reduce"]["bytes"] <= 1.1 * layers + 4 * table
    assert found["fits"] and found["memory"]["available"] == int(84942979072 * 0.95)


@pytest.mark.slow
@TPU
def test_the_command_prints_one_object():
    words = "plan llama-tiny --topology v5e:1x1 --length 128 --json".split()
    made = subprocess.run([sys.executable, "-m", "lmx", *words], capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr
    result = json.loads(made.stdout.splitlines()[-1])
    assert result["devices"] == 1 and result["collectives"] == [] and result["memory"]["parameters"] == 4 * 125248
    assert result["attention"] == "splash"  # which suits a TPU, where the model says auto
    assert "fits" in made.stderr + made.stdout and "Google Cloud" in made.stderr + made.stdout


def test_a_folder_is_planned_as_its_preset(tmp_path):
    model = transformer.init(preset("llama-tiny"), jax.random.key(0))
    lmx.save(model, tmp_path / "model")
    shapes = programs.source(str(tmp_path), {"compute_dtype": "bfloat16"})(remat="dots")
    assert (shapes.config.compute_dtype, shapes.config.remat) == ("bfloat16", "dots")
    assert specs.nbytes(shapes) == specs.nbytes(model) and cost.cost(shapes, 64).parameters == 125248


@pytest.mark.slow
def test_what_remat_computes_again_is_what_xla_counts():
    """The FLOPs of a compiled step with a policy less those of one without: of one of two layers, as XLA counts a
    loop's body once. It counts elementwise operations too, which a wide model has few of."""
    shape = dict(hidden_size=512, intermediate_size=1024, num_heads=4, num_kv_heads=4, vocab_size=1024)
    source, optimizer = programs.source("llama-tiny", {"attention": "reference", **shape}), train.adamw(1e-3)
    step, batch = train.make_train_step(losses.cross_entropy, optimizer), jax.ShapeDtypeStruct((2, 128), "int32")
    counted, executed = {}, {}
    for remat in ("none", "dots", "full"):
        model = source(remat=remat)
        lowered = jax.jit(step).lower(train.abstract_start(model, optimizer), {"tokens": batch})
        counted[remat] = lowered.compile().cost_analysis()["flops"]
        executed[remat] = roofline.train_flops(model, 2 * 128, 128)[1]
    for remat, width in [("dots", 0.1), ("full", 0.02)]:
        again = (executed[remat] - executed["none"]) / L
        assert counted[remat] - counted["none"] == pytest.approx(again, rel=width)


def test_what_waits_for_the_backward_pass():
    """Every layer's input; with "dots" its products too, but for the two that are added to the residual; with "none"
    also attention's weights."""
    source, sizes, tokens = programs.source("llama-tiny", {"attention": "reference"}), {"fsdp": 2, "tensor": 2}, 4 * 128
    inputs, products, weights = L * D, L * (HEADS * C + 2 * KV * C + 2 * F) // 2, L * HEADS * 128 // 2
    for remat, numbers in [("full", inputs), ("dots", inputs + products), ("none", inputs + products + weights)]:
        model = source(remat=remat)
        at = roofline.local(model, sizes, batch_size=8, length=128)
        assert roofline.saved_activations(model, at) == 4 * tokens * numbers


@pytest.mark.parametrize(("there", "chosen"), [(False, "reference"), (True, "cudnn")])
def test_a_gpu_planned_without_cudnn_is_said_to_be(monkeypatch, there, chosen):
    """What is compiled follows this machine; the result says where the real one would choose another."""
    monkeypatch.setattr(kernels, "has_cudnn", lambda: there)
    gpus = topology.Target("h100:8", chips.CHIPS["h100"], (None,) * 8)
    for options, differs in [(dict(), not there), (dict(attention="reference"), False), (dict(decode=True), False)]:
        options = PlanOptions("llama-tiny", "h100:8", compute_dtype="bfloat16", **options)
        _, model, fell_back = plan._work(options, gpus)
        assert fell_back is differs
        assert model.config.attention == (chosen if options.attention is None and not options.decode else "reference")
    _, model, fell_back = plan._work(PlanOptions("llama-tiny", "h100:8", compute_dtype="float32"), gpus)
    assert (model.config.attention, fell_back) == ("reference", False)  # which cuDNN does not take there either


def test_checkpoints_are_planned_as_their_model(tmp_path):
    model = transformer.init(preset("llama-tiny"), jax.random.key(0))
    state = train.start(model, train.optimizers.optimizer("adamw", 1e-3))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, state, {"model": checkpointed.travelling(state.model, None)})
    for folder in (tmp_path / "checkpoints", tmp_path / "checkpoints" / "3"):
        shapes = programs.source(str(folder), {"compute_dtype": "bfloat16"})(remat="dots")
        assert (shapes.config.compute_dtype, shapes.config.remat) == ("bfloat16", "dots")
        assert specs.nbytes(shapes) == specs.nbytes(model)


def test_meshes_divide_rows_heads_and_width():
    model = programs.source("llama-tiny", {})()
    assert search.meshes(4, 2, model) == ["data=2,tensor=2", "fsdp=2,tensor=2", "tensor=4"]
    assert search.meshes(16, 3, model) == []  # 4 heads at most, and 3 rows divide by nothing


def test_the_search_learns_what_a_policy_takes():
    """What would not fit if it took as many times its bound as others of its policy comes later."""
    small, large = (
        search.Candidate(Case("fsdp=8", "none"), 2.0, 1.0),
        search.Candidate(Case("fsdp=4", "none"), 5.0, 1.0),
    )
    full = search.Candidate(Case("fsdp=8", "full"), 5.0, 2.0)
    assert search.promising([large, small, full], {}, 10.0) is large
    assert search.promising([large, small, full], {"none": 3.0}, 10.0) is small
    assert search.promising([large, small, full], {"none": 6.0}, 10.0) is full
    assert search.promising([large, small], {"none": 6.0}, 10.0) is large


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("HLO temporaries (16.52G) exceeds available HBM (15.75G)", int(16.52 * 2**30)),
        ("Used 20.00G of 15.75G hbm. Exceeded hbm capacity by 4.25G.", 20 * 2**30 - 1000),
        ("something else", 5000 - 1000 + 1),
    ],
)
def test_numbers_of_a_compiler_out_of_memory(message, wanted):
    assert programs.wanted_bytes(message, given=1000, available=5000) == wanted


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (dict(topology="v9:2x2"), ConfigError, "no chip 'v9'"),
        (dict(optimizer="adam"), ConfigError, "did you mean 'adamw'"),
        (dict(length=1), ConfigError, "at least 2 tokens"),
        (dict(batch_size=0), ConfigError, "batch_size must be at least 1"),
        (dict(decode=True, search=True), ConfigError, "leave out --search or --decode"),
        (dict(search=True, mesh="fsdp=4"), ConfigError, "leave out --mesh"),
        pytest.param(dict(model="lama-tiny"), FolderError, "did you mean 'llama-tiny'", marks=TPU),
        pytest.param(dict(mesh="fsdp=3"), ConfigError, "describes 3 devices, but there are 4", marks=TPU),
        pytest.param(dict(batch_size=6, accumulate=4), ConfigError, "does not divide into 4", marks=TPU),
        (dict(effort="lo"), ConfigError, "effort must be full or low, not 'lo'; did you mean 'low'"),
        pytest.param(dict(remat="some"), ConfigError, "remat 'some' is none of", marks=TPU),
        pytest.param(dict(model="gpt2-tiny", length=4096), ConfigError, "exceed the 256 learned", marks=TPU),
    ],
)
def test_what_cannot_be_planned(options, error, said):
    with pytest.raises(error, match=said):
        planned(**options)
