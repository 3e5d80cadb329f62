"""What `lmx train` can be told: its options, the presets that fill them in, and what can be wrong with them."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from lmx.core.errors import ConfigError, nearest
from lmx.models.presets import preset
from lmx.recipes import models, objectives
from lmx.train import optimizers, tensorboard
from lmx.train.checkpoints import open_path

# What a preset fills in where an option is not given.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": dict(model="llama-2m", steps=400, batch_size=16, length=256),
    "small": dict(model="llama-4m", steps=1100, batch_size=8, length=512),
}
DEFAULTS: dict[str, Any] = dict(
    objective="causal", data="local", tokenizer="bpe", vocab_size=4096, optimizer="muon",
    learning_rate=1e-2, schedule="cosine", weight_decay=0.1, z_loss=0.0, clip_norm=1.0, accumulate=1, train=".", seed=0,
    evaluate_every=100, save_every=200, keep=2,
)  # fmt: skip
CHANGEABLE = (  # what may differ when a run goes on
    "mesh", "keep", "keep_every", "keep_best", "tensorboard", "evaluate_every", "save_every",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Train a language model on text, evaluate it, print a sample and save it.

    Without options: a small decoder on text that every Python machine has, in a few minutes on two cores. Options left
    out are taken from the preset.
    """

    preset: str = "quick"
    """A set of options: quick (about 2 M parameters, minutes) or small (about 4 M parameters, half an hour)."""
    output: str | None = None
    """The folder of the run: model, tokenizer, checkpoints, metrics, plot; runs/PRESET if not given."""
    checkpoint_folder: str | None = None
    """Where the checkpoints go instead: a folder that all processes see, or gs://BUCKET/FOLDER."""
    resume: bool = False
    """Go on with the run in the output folder, with the options it was started with."""
    overwrite: bool = False
    """Replace the run in the output folder; it is kept until the new one has begun to train."""
    objective: str | None = None
    """What is learnt: causal (the next token), masked (hidden tokens, by an encoder), spans (removed spans, by an
    encoder-decoder), pairs (a text from another, likewise) or chat (what the assistant of a conversation says)."""
    data: str | None = None
    """Text, by commas: local, tfds:NAME, hf:NAME, .txt or .jsonl files (.gz), folders, globs; DOMAIN=... names it.
    Pairs: a .jsonl file with the keys source and target, or SOURCE,TARGET, two files of lines. Chat: a .jsonl file with
    messages under the key messages."""
    tokenizer: str | None = None
    """bpe (trained on the text), byte, or a folder with a tokenizer.json."""
    vocab_size: int | None = None
    """How many kinds of token a trained tokenizer has."""
    model: str | None = None
    """The shape of the model: a preset of lmx.preset, such as llama-2m or gpt2-2m, in the objective's architecture."""
    init: str | None = None
    """Start from the model (and tokenizer) in this folder instead of a new one: fine-tuning."""
    train: str | None = None
    """Path pattern of the parameters to train, such as "layers[2:4]/mlp|head"; the others are frozen."""
    steps: int | None = None
    """Optimizer steps."""
    batch_size: int | None = None
    """Rows a step, over all devices."""
    length: int | None = None
    """Tokens a row."""
    accumulate: int | None = None
    """Microbatches that a step's rows are computed in, one after another, to save memory."""
    optimizer: str | None = None
    """adamw, adafactor or muon."""
    learning_rate: float | None = None
    """The highest learning rate."""
    schedule: str | None = None
    """How the learning rate changes after warming up: cosine, or wsd (constant, then down)."""
    warmup: int | None = None
    """Steps in which the learning rate rises from 0; a twentieth of all if not given."""
    weight_decay: float | None = None
    """Decoupled weight decay of matrices."""
    clip_norm: float | None = None
    """The largest gradient norm; 0 clips nothing."""
    z_loss: float | None = None
    """Coefficient of the squared log-normaliser, such as 1e-4; 0 is off."""
    ema_decay: float | None = None
    """Keep a moving average of the weights with this decay, such as 0.999, and evaluate and save that."""
    compute_dtype: str | None = None
    """Of activations and matrix products: float32 or bfloat16; the model's own (float32 if new) if not given."""
    remat: str | None = None
    """What the backward pass computes again instead of keeping: none, dots or full; the model's own if not given."""
    mesh: str | None = None
    """Devices to split over, such as fsdp=4,tensor=2; all of them by fsdp if not given."""
    seed: int | None = None
    """Of initial weights, the order of the data and the sample."""
    evaluate_every: int | None = None
    """Steps between validations."""
    save_every: int | None = None
    """Steps between checkpoints."""
    keep: int | None = None
    """Newest checkpoints to keep."""
    keep_every: int | None = None
    """Also keep every checkpoint whose step is a multiple of this."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest validation loss."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into the folder tensorboard of the run."""


def folder(options: TrainOptions) -> Path:
    """The folder of the run."""
    return Path(options.output or f"runs/{options.preset}").expanduser()


def values(options: TrainOptions) -> dict[str, Any]:
    """The options by name, without what a command adds to them."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(TrainOptions)}


def resolve(options: TrainOptions) -> TrainOptions:
    """The options in full and checked, from their preset where they are None. Raises ConfigError."""
    if options.preset not in PRESETS:
        there = ", ".join(PRESETS)
        raise ConfigError(f"no preset {options.preset!r}, there are {there}{nearest(options.preset, PRESETS)}")
    filled = DEFAULTS | PRESETS[options.preset]
    given = {k: v for k, v in values(options).items() if v is not None}
    settled = [name for name in ("model", "tokenizer", "vocab_size") if name in given and options.init is not None]
    if settled:
        raise ConfigError(f"init brings its own model and tokenizer; leave out {', '.join(settled)}")
    full = dataclasses.replace(options, **(filled | given | _place(options)))
    if full.warmup is None:
        full = dataclasses.replace(full, warmup=full.steps // 20)
    _check(full)
    return full


def resumed(options: TrainOptions, stored: dict[str, Any]) -> TrainOptions:
    """The stored options of a run; what may change is changed, what may not and was given otherwise is refused."""
    given = {k: v for k, v in values(options).items() if v is not None and v is not False} | _place(options)
    unknown = sorted(set(stored) - set(values(options)))
    if unknown:
        raise ConfigError(
            f"this run has options unknown to this lmx: {', '.join(unknown)}; a newer one may have begun it"
        )
    stored = DEFAULTS | stored  # an option that is newer than the run has its default
    own = ("preset", "output", "resume", "overwrite", *CHANGEABLE)
    unlike = [f"{k} (was {stored.get(k)!r}, is {v!r})" for k, v in given.items() if k not in own and stored.get(k) != v]
    if unlike:
        raise ConfigError(
            f"a resumed run keeps its options, but these differ: {', '.join(unlike)}; leave them out, or start "
            "another run in another --output"
        )
    changed = {k: v for k, v in given.items() if k in CHANGEABLE}
    full = TrainOptions(**(stored | changed | {"output": options.output, "resume": True}))
    _check(full)
    return full


def computed(options: TrainOptions) -> dict[str, str]:
    """The fields of a config that say how the model is computed, as far as they were given."""
    return {k: v for k in ("compute_dtype", "remat") if (v := getattr(options, k)) is not None}


def make_optimizer(options: TrainOptions) -> Any:
    """The optimizer with its schedule. Raises ConfigError for a name there is not."""
    rate = optimizers.schedule(options.schedule, options.learning_rate, options.steps, options.warmup)
    return optimizers.optimizer(options.optimizer, rate, weight_decay=options.weight_decay)


def _place(options: TrainOptions) -> dict[str, str]:
    """The checkpoint folder, if it was given, as it reads from any working directory. Raises ConfigError."""
    if options.checkpoint_folder is None:
        return {}
    return {"checkpoint_folder": os.fspath(open_path(options.checkpoint_folder))}


def _check(options: TrainOptions) -> None:
    """Raise ConfigError for what can be seen to be wrong before any text is read or folder made."""
    o = options
    if "://" in (o.output or ""):
        raise ConfigError(
            f"output {o.output} is no local path; a run maps its tokens into memory and appends to its metrics. Train "
            f"into a local folder, with --checkpoint-folder {o.output} for its checkpoints (of several processes: a "
            "folder that all of them see)"
        )
    if o.length < 2:
        raise ConfigError(f"rows need a length of at least 2 tokens, not {o.length}")
    for name in ("steps", "batch_size", "length", "accumulate", "vocab_size", "evaluate_every", "save_every", "keep"):
        if getattr(o, name) < 1:
            raise ConfigError(f"{name} must be at least 1, not {getattr(o, name)}")
    if o.keep_every is not None and o.keep_every < 1:
        raise ConfigError(f"keep_every must be at least 1, not {o.keep_every}")
    if o.keep_best and o.save_every % o.evaluate_every:
        raise ConfigError(
            f"keep_best needs an evaluation of every checkpoint: save_every ({o.save_every}) must be a multiple of "
            f"evaluate_every ({o.evaluate_every})"
        )
    if o.tensorboard:
        tensorboard.check()
    for name in ("learning_rate", "weight_decay", "clip_norm", "z_loss"):
        if not 0 <= getattr(o, name) < math.inf:
            raise ConfigError(f"{name} must be 0 or above, and finite, not {getattr(o, name)}")
    if o.ema_decay is not None and not 0 < o.ema_decay < 1:
        raise ConfigError(f"ema_decay must lie between 0 and 1, such as 0.999, not {o.ema_decay}")
    if not 0 <= o.seed < 2**32:
        raise ConfigError(f"seed must be at least 0 and below 2**32, not {o.seed}")
    if o.batch_size % o.accumulate:
        raise ConfigError(
            f"a batch_size of {o.batch_size} does not divide into {o.accumulate} microbatches (accumulate)"
        )
    make_optimizer(o)
    _check_objective(o)
    if o.init is not None:
        return
    config = preset(o.model, **computed(o))
    if config.max_length is not None and o.length > config.max_length:
        raise ConfigError(
            f"rows of {o.length} tokens exceed the {config.max_length} learned positions of {o.model}; "
            f"give --length {config.max_length} or less"
        )


def _check_objective(options: TrainOptions) -> None:
    """Raise ConfigError for an objective that the model, or the tokenizer of a chat, cannot have."""
    o = options
    objectives.kind(o.objective)
    if o.init is not None:
        models.check(o.init)
        objectives.check_model(o.objective, models.load_shapes(o.init), repr(o.init))
    elif o.objective == "chat" and o.tokenizer in ("bpe", "byte"):
        raise ConfigError(
            f"the objective 'chat' needs a chat template, and the tokenizer {o.tokenizer!r} has none: give --init or "
            "--tokenizer a folder that has one (chat_template.jinja)"
        )
