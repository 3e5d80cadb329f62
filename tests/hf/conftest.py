"""Tiny models of transformers with random weights, and what every family is put to.

A family's tests are one file in tests/hf/families: a hypothesis strategy of config fields, given to `parity`, and the
fields that `wrong` breaks one at a time.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lmx
from lmx import hf
from lmx.core.errors import LmxError
from lmx.models import transformer

LENGTH = 12
# Nothing is computed by these: how weights are drawn, how long a text may be, how rotary positions are spelled.
NEUTRAL = {
    "initializer_range", "max_position_embeddings", "rope_theta", "rope_scaling", "partial_rotary_factor",
}  # fmt: skip


class Torch:
    """A model of transformers, in float64, and the tokens that it is compared on.

    The field "untied" gives it a head beside its token table: the files of T5 1.1 have one, no config asks for it.
    """

    def __init__(self, class_name: str, fields: dict[str, Any], seed: int = 0) -> None:
        import torch
        import transformers

        logging.getLogger("transformers").setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        self.cls = getattr(transformers, class_name)
        torch.manual_seed(seed)
        special, fields = {name: None for name in ("bos_token_id", "eos_token_id")}, dict(fields)
        untied = fields.pop("untied", False)
        config = self.cls.config_class(**(special | fields))
        config._attn_implementation = "eager"  # the only one with soft caps
        self.model = self.cls(config).eval()
        tied = getattr(config, "tie_word_embeddings", False)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if not p.requires_grad:  # sinusoids
                    continue
                if p.ndim == 1:
                    p.add_(0.3 * torch.randn_like(p))  # norms are ones and biases zeros: exchange them and see nothing
                else:
                    p.normal_(0, 0.3 if tied and p.shape[0] == config.vocab_size else p.shape[1] ** -0.5 * 1.5)
                if name.endswith("Attention.q.weight"):  # T5 scales no scores, and begins with queries so small
                    p.mul_(config.d_kv**-0.5)
            if untied:
                self.model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(self.model.lm_head.weight))
            if hasattr(self.model, "final_logits_bias"):  # a buffer
                self.model.final_logits_bias.normal_()

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def fixed(self) -> set[str]:
        """The names of what is not trained: sinusoids, for as many positions as config.json says."""
        return {name for name, p in self.model.named_parameters() if not p.requires_grad}

    def save(self, folder: Path, **options: Any) -> Path:
        self.model.save_pretrained(folder, **options)
        return folder

    def again(self, folder: Path) -> Torch:
        """What transformers loads from a folder, which must hold all it looks for and nothing else."""
        made = object.__new__(Torch)
        made.cls = self.cls
        made.model, info = self.cls.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
        made.model.eval()
        made.config.eos_token_id = self.config.eos_token_id  # by which some find the end; lmx knows a tokenizer's alone
        info["missing_keys"] -= self.fixed  # MarianModel saves and misses its sinusoids, MarianMTModel does neither
        assert not any(info.values()), info
        return made

    def same_tensors(self, other: Torch) -> bool:
        import torch

        fixed = self.fixed | other.fixed
        one, two = ({n: x for n, x in t.model.state_dict().items() if n not in fixed} for t in (self, other))
        return one.keys() == two.keys() and all(
            torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in one
        )

    def answer(self, given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """(last hidden states, logits or what else the class ends with), float64."""
        import copy

        import torch

        with torch.no_grad():
            names = {name: torch.tensor(values) for name, values in given.items()}
            out = copy.deepcopy(self.model).double()(**names, output_hidden_states=True)
        hidden = out.get("decoder_hidden_states", out.get("hidden_states"))[-1]
        if "start_logits" in out:
            end = torch.stack([out.start_logits, out.end_logits], -1)
        else:
            end = next((out[name] for name in ("logits", "pooler_output") if name in out), out.get("last_hidden_state"))
        return hidden.numpy(), end.numpy()


def inputs(model: Any, config: Any, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arguments of transformers, of lmx) for the same tokens: padded rows where there is an encoder."""
    rng, vocab, c = np.random.default_rng(seed), config.vocab_size, model.config
    rows = 1 if c.head == "sequence" and c.architecture == "decoder" else 2
    tokens = rng.integers(3, vocab, (rows, LENGTH))
    if c.architecture == "decoder":
        return {"input_ids": tokens}, {"tokens": tokens}
    mask = (np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 4]])).astype(np.int64)
    pad = getattr(config, "pad_token_id", None) or 0
    tokens = np.where(mask, tokens, pad)
    if c.architecture == "encoder_decoder" and c.head == "sequence":  # theirs is the vector where the source has </s>
        tokens[np.arange(rows), mask.sum(1) - 1] = config.eos_token_id
        after, masks = rng.integers(3, vocab, tokens.shape), {"segment_ids": mask, "encoder_segment_ids": mask}
        theirs = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": after}
        return theirs, {"tokens": after, "encoder_tokens": tokens, **masks}
    if c.architecture == "encoder_decoder":
        after = rng.integers(3, vocab, (rows, LENGTH - 3))
        theirs = {"input_ids": tokens, "attention_mask": mask, "decoder_input_ids": after}
        ours = {"tokens": after, "encoder_tokens": tokens, "segment_ids": np.ones_like(after)}
        return theirs, {**ours, "encoder_segment_ids": mask}
    theirs, ours = {"input_ids": tokens, "attention_mask": mask}, {"tokens": tokens, "segment_ids": mask}
    if c.type_vocab_size > 1:
        types = rng.integers(0, c.type_vocab_size, tokens.shape)
        theirs["token_type_ids"], ours["types"] = types, types
    return theirs, ours


def run(model: Any, given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(features, what the head ends with) of lmx. Compiled with few optimisations: tests compile more than they run."""

    def both(m: Any, x: dict[str, Any]) -> tuple[Any, Any]:  # m.logits(**x) would compute the features again
        features = m.features(**x)
        return features, features if m.config.head == "none" else m.read(features, x.get("segment_ids"))

    given = {name: jnp.asarray(value, jnp.int32) for name, value in given.items()}
    few = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(both).lower(model, given).compile(compiler_options=few)(model, given)


def close(ours: Any, theirs: np.ndarray, mask: np.ndarray | None) -> float:
    """The largest difference where there is a token."""
    apart = np.abs(np.asarray(ours, np.float64) - theirs)
    if mask is not None and apart.shape[:2] == mask.shape:
        apart = apart[mask.astype(bool)]
    return float(apart.max())


@pytest.fixture(scope="session")
def torch_model():
    """`torch_model(class name, config fields) -> Torch`."""
    pytest.importorskip("torch", reason="the oracle is transformers' models in torch; install the extra 'oracle'")
    return Torch


@pytest.fixture(scope="session")
def parity(torch_model, tmp_path_factory):
    """`parity(class name, config fields)`: loads with their hidden states and logits, and saves what loads there.

    Numbers agree within 2e-5 (float32 against their float64). The folder saved as the family describes it gives the
    same tensors, bit for bit, and computes the same in transformers; the folder saved like the original has its config.
    """

    def check(class_name: str, fields: dict[str, Any], atol: float = 2e-5, spread: float = 0.1) -> Any:
        folder = tmp_path_factory.mktemp("parity")
        theirs = torch_model(class_name, fields)
        theirs.save(folder / "theirs")
        model = hf.load(folder / "theirs")
        given, ours = inputs(model, theirs.config)
        hidden, end = theirs.answer(given)
        assert end.std() > spread, "these weights compare nothing"
        features, logits = run(model, ours)
        mask = None if model.config.architecture == "decoder" else ours["segment_ids"]
        assert close(features, hidden, mask) <= atol * max(1.0, float(np.abs(hidden).max()) / 4), "hidden states"
        assert close(logits, end, mask) <= atol, "logits"
        hf.save(model, folder / "ours", format="hf", like=theirs.config.model_type)
        again = theirs.again(folder / "ours")
        assert theirs.same_tensors(again)
        np.testing.assert_allclose(again.answer(given)[1], end, atol=1e-9)
        hf.save(model, folder / "alike", format="hf", like=folder / "theirs")
        read = lambda name: json.loads((folder / name / "config.json").read_text())  # noqa: E731
        assert read("alike") == read("theirs")
        assert theirs.same_tensors(theirs.again(folder / "alike"))
        return model

    return check


@pytest.fixture(scope="session")
def wrong(torch_model, tmp_path_factory):
    """`wrong(class name, config fields, field, value)`: with this value in config.json the parity is lost."""

    def check(class_name: str, fields: dict[str, Any], field: str, value: Any) -> None:
        folder = tmp_path_factory.mktemp("wrong")
        theirs = torch_model(class_name, fields)
        config = theirs.save(folder) / "config.json"
        values = json.loads(config.read_text())
        assert values.get(field) != value
        config.write_text(json.dumps(values | {field: value}))
        try:
            model = hf.load(folder)
        except LmxError:
            return
        given, ours = inputs(model, theirs.config)
        mask = None if model.config.architecture == "decoder" else ours["segment_ids"]
        assert close(run(model, ours)[1], theirs.answer(given)[1], mask) > 1e-3

    return check


@pytest.fixture(scope="session")
def complete():
    """`complete(model type, fields of `wrong`, neutral)`: every field that the family reads is broken by a test."""

    def check(model_type: str, broken: Any, neutral: set[str] = frozenset()) -> None:
        assert set(hf.FAMILIES[model_type].defaults) - set(broken) <= NEUTRAL | neutral

    return check


@pytest.fixture(scope="session")
def defaults():
    """`defaults(model type)`: an empty config.json means what transformers' config class without fields does."""
    transformers = pytest.importorskip("transformers")

    def check(model_type: str) -> None:
        family = hf.FAMILIES[model_type]
        class_name = next(iter(family.classes))
        full = transformers.AutoConfig.for_model(model_type).to_dict()
        assert family.config({}, class_name) == family.config(full, class_name)

    return check


TINY = {
    "vocab_size": 40, "num_layers": 3, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 32,
    "tie_embeddings": False, "compute_dtype": "auto",
}  # fmt: skip


@pytest.fixture(scope="session")
def made():
    """`made(config)`: a model with random numbers, without compiling anything."""

    def make(config: Any) -> Any:
        rng = np.random.default_rng(0)
        draw = lambda spec: jnp.asarray(rng.normal(size=spec.shape), spec.dtype)  # noqa: E731
        return transformer.Model(config, jax.tree.map(draw, transformer.abstract(config)))

    return make


@pytest.fixture(scope="session")
def tiny(made):
    """A decoder of lmx's own, shaped as Llama."""
    return made(lmx.Config(**TINY))


@pytest.fixture
def folder(tiny, tmp_path):
    """The same in Hugging Face's format, in one file; torch has no part in it."""
    hf.save(tiny, tmp_path / "model", format="hf", like="llama")
    return tmp_path / "model"


@pytest.fixture
def edit(folder):
    """Change fields of the folder's config.json: `edit(hidden_size=8)`."""

    def change(**fields: Any) -> Path:
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
        return folder

    return change
