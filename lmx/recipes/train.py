"""`lmx train`: from text to a language model in a folder, as a script read from top to bottom."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from rich.console import Console

from lmx import data, decode, evaluate, losses
from lmx.core import sharding, specs
from lmx.core.errors import Stopped
from lmx.data.stepwise import Stepwise
from lmx.models import cost, folders, generation, transformer, unigram
from lmx.models.presets import preset
from lmx.recipes import checkpointed, models, objectives, rows
from lmx.recipes import corpus as texts
from lmx.recipes import options as told
from lmx.recipes.claim import METRICS, checkpoints_of, claim
from lmx.recipes.corpus import Corpus
from lmx.recipes.meshes import fit_mesh
from lmx.recipes.options import TrainOptions
from lmx.train import abstract_start, agreement, make_train_step, processes, start, tensorboard
from lmx.train.checkpoints import Checkpoints
from lmx.train.feed import part_of_process, place_batch
from lmx.train.interrupt import sigterm_interrupts, stop_requests
from lmx.train.loop import Every, Outcome, train
from lmx.train.metrics import MetricsLog, plot
from lmx.train.progress import PLAIN, ProgressReport, si


def run(options: TrainOptions, console: Console | None = None, started_by: str = "") -> dict[str, Any]:
    """Train as the options say and return the result that `lmx train --json` prints.

    Raises LmxErrors for what cannot be: options, text, folders. A start that fails leaves the output folder as it was.
    A run that is asked to stop (Ctrl-C, SIGTERM) saves and returns {"stopped": True, ...} and the command to go on; so
    does one whose training is done. Before the first step it raises KeyboardInterrupt, as for a start that fails.

    started_by: words that start all processes of the run, such as "--coordinator auto", for that command.

    Several processes (`lmx.train.processes.joined`) all call it with a folder that all of them see. Process 0 claims
    the folder, prepares the text, writes and prints; all train, evaluate and return the same.
    """
    console = (console or Console()) if processes.leads() else Console(quiet=True)
    folder, asked_mesh = told.folder(options), options.mesh
    again = resume_command(folder, started_by)
    with contextlib.ExitStack() as stack:
        settled = stack.enter_context(sigterm_interrupts())
        options = TrainOptions(**agreement.first(lambda: told.values(stack.enter_context(claim(options, folder)))))
        processes.advise(f"Start all processes again to go on: {again}")
        with agreement.agreed():
            mesh = _mesh(options, asked_mesh, console)
        stack.enter_context(sharding.use_mesh(mesh))
        corpus = _corpus(options, folder, console)
        outcome, model = _fit(options, folder, corpus, console, settled)
        stopped = {"stopped": True, "step": outcome.step, "resume": again, "output": str(folder)}
        if outcome.stopped:
            console.print(f"stopped and saved at step {outcome.step}. Go on with: {again}", **PLAIN)
            return stopped
        try:
            return _finish(options, folder, corpus, outcome, model, console)
        except KeyboardInterrupt:
            said = f"training is done and saved, its evaluation is not. Go on with: {again}"
            if jax.process_count() > 1:  # the others, who may wait for this one, have to be told
                raise Stopped(said) from None
            console.print(said, **PLAIN)
            return stopped


def _mesh(options: TrainOptions, asked: str | None, console: Console) -> Mesh | None:
    rows, devices = options.batch_size // options.accumulate, jax.device_count()
    text = fit_mesh(options.mesh, rows, devices, jax.process_count(), asked=asked is not None)
    if options.mesh is not None and text != options.mesh:
        console.print(f"the run began on mesh {options.mesh}; going on with {devices} devices as {text}", **PLAIN)
    return None if text is None else sharding.make_mesh(text)


def _corpus(options: TrainOptions, folder: Path, console: Console) -> Corpus:
    place = folder / "data"

    def prepare() -> None:
        if options.resume and (place / "corpus.json").exists():
            return
        texts.prepare(options, place, console)

    agreement.first(prepare)
    with agreement.agreed():
        return texts.reopen(place)


def _model(options: TrainOptions, corpus: Corpus, abstract: bool) -> Any:
    """The model to start from: arrays, or shapes with shardings where a checkpoint will fill them."""
    changes = told.computed(options)
    if options.init is not None:
        model = models.load_shapes(options.init) if abstract else models.load_model(options.init)
        data.check_fits(corpus.tokenizer, model.vocab_size)
        return _widened(model.replace(config=model.config.replace(**changes)))
    changes |= {"architecture": objectives.kind(options.objective).architecture}
    config = preset(options.model, vocab_size=corpus.tokenizer.vocab_size, **changes)
    if abstract:
        return transformer.Model(config, specs.shapes(transformer.abstract(config)))
    return transformer.init(config, jax.random.key(options.seed))


def _widened(model: transformer.Model) -> transformer.Model:
    """float16 parameters, or their shapes, in float32: gradients and updates leave the range of the former."""
    if model.config.dtype != "float16":
        return model

    def widen(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=x.sharding)
        return x.astype(jnp.float32)

    return transformer.retyped(jax.tree.map(widen, model), jnp.float32)


def _fit(
    options: TrainOptions, folder: Path, corpus: Corpus, console: Console, settled: Callable[[], None]
) -> tuple[Outcome, Any]:
    """Train to the end, or until asked to stop; then `settled` is called: other processes may be asked later."""
    o = options
    loss = functools.partial(losses.cross_entropy, z_loss=o.z_loss)
    with agreement.agreed():
        batches = rows.batches(o, corpus)
        optimizer = told.make_optimizer(o)
        step = make_train_step(loss, optimizer, accumulate=o.accumulate, clip_norm=o.clip_norm or None)
        keep = dict(keep=o.keep, keep_every=o.keep_every, best="valid_loss" if o.keep_best else None)
        say = functools.partial(console.print, **PLAIN)
        checkpoints = Checkpoints(checkpoints_of(folder, o), report=say, **keep)
        state = _state(o, corpus, optimizer, checkpoints, batches)
        first, price = int(state.step), cost.cost(state.model, o.length)
        log = _log(o, folder, first)
        travels = checkpointed.travelling(state.model, corpus.tokenizer_files, _notes(o))
    _say_what(o, price, specs.count(state.trained), first, console)
    index, count = part_of_process(o.batch_size)
    place = functools.partial(place_batch, index=index, count=count)
    placed = map(place, batches.iterate(first, process_index=index, process_count=count))
    report = ProgressReport(console, o.steps, price.train_flops, first)
    with contextlib.ExitStack() as stack:
        for part in filter(None, (checkpoints, log, report.shown())):
            stack.enter_context(part)
        asked = stack.enter_context(stop_requests())
        stack.enter_context(processes.shared_fate())
        outcome = train(
            state, step, placed, steps=o.steps, every=Every(10, o.evaluate_every, o.save_every),
            evaluate=_validation(o, corpus), checkpoints=checkpoints,
            extra=lambda step: {"data": batches.state(step), "model": travels}, log=log, report=report,
            asked_to_stop=agreement.agree_to_stop(asked),
        )  # fmt: skip
        if outcome.stopped:
            settled()
    return outcome, outcome.state.ema_model


def _state(options: TrainOptions, corpus: Corpus, optimizer: Any, checkpoints: Checkpoints, batches: Stepwise):
    """The state of a new run, or of the newest sound checkpoint of one that goes on."""
    o = options
    going_on = o.resume and checkpoints.latest() is not None
    model = _model(o, corpus, abstract=going_on)
    how = dict(train=o.train, ema_decay=o.ema_decay, key=jax.random.key(o.seed))
    if not going_on:
        return start(model, optimizer, **how)
    state, extra = checkpoints.restore(abstract_start(model, optimizer, **how))
    batches.check(extra["data"])
    return state


def _log(options: TrainOptions, folder: Path, first: int) -> MetricsLog | None:
    """Where one process writes the metrics."""
    if not processes.leads():
        return None
    mirror = tensorboard.Mirror(folder / "tensorboard", first) if options.tensorboard else None
    return MetricsLog(folder / METRICS, resume_step=first, mirror=mirror)


def _say_what(options: TrainOptions, price: cost.Cost, trained: int, first: int, console: Console) -> None:
    o = options
    console.print(
        f"{o.model if o.init is None else o.init}: {price.parameters / 1e6:.2f} M parameters, {trained / 1e6:.2f} M "
        f"trained, {si(price.train_flops)}FLOPs a token; {o.steps} steps of {o.batch_size} x {o.length} tokens"
        + (f", going on at step {first}" if first else ""),
        **PLAIN,
    )


def _validation(options: TrainOptions, corpus: Corpus, most: int = 24):
    """An evaluation on up to `most` batches spread over the validation split."""

    def validate(state: Any) -> dict[str, float]:
        some = rows.held_out(options, corpus, "valid", most)
        return {"valid_loss": evaluate.mean_nll(state.ema_model, some, place=place_batch)}

    return validate


def resume_command(folder: Path, started_by: str = "") -> str:
    """What to type to go on with the run in a folder."""
    return f"lmx train --resume --output {shlex.quote(str(folder))} {started_by}".rstrip()


def _notes(options: TrainOptions) -> dict[str, Any]:
    """What a model of this run says of itself, with the config that it came with, so that it can go back as it came."""
    origin = models.came_from(options.init)
    return {"options": told.values(options)} | ({} if origin is None else {generation.NOTES: origin})


def _finish(
    options: TrainOptions, folder: Path, corpus: Corpus, outcome: Outcome, model: Any, console: Console
) -> dict[str, Any]:
    """Evaluate on the test split, save and draw."""
    measure = _measure_text if options.objective == "causal" else _measure_targets
    notes = {"made by": "lmx train", "options": told.values(options)}
    found = measure(options, folder, corpus, model, notes, console)
    result = {
        "objective": options.objective,
        **found,
        "parameters": specs.count(model),
        "tokens_per_second": outcome.tokens_per_second,
        "output": str(folder),
        "steps": outcome.step,
        "skipped": outcome.skipped,
    }
    kept = notes | _notes(options)
    folders.save(model, folder / "model", tokenizer=corpus.tokenizer_files, overwrite=True, notes=kept)

    def show() -> dict[str, Any]:
        bits = found.get("bits_per_byte")
        said = f"{found['loss']:.3f} nats a target" if bits is None else f"{bits['all']:.3f} bits per byte"
        plot(folder / METRICS, folder / "loss.png", title=f"{folder.name}: {said}")
        (folder / "result.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        return result

    return agreement.first(show)


def _measure_text(
    options: TrainOptions, folder: Path, corpus: Corpus, model: Any, notes: dict, console: Console
) -> dict[str, Any]:
    """Bits per byte of the test split beside its references, and a sample. Saves the unigram model."""
    baseline = unigram.fit(corpus.caches["train"].tokens, corpus.tokenizer.vocab_size)
    with console.status("evaluating on the test split"):
        bits = split_bits(model, corpus, options.length, options.batch_size)
        reference = split_bits(baseline, corpus, options.length, options.batch_size)
    with console.status("sampling"):
        sample = decode.generate_text(
            model, corpus.tokenizer, "", max_new_tokens=min(200, options.length - 1), temperature=0.8, top_p=0.95,
            key=jax.random.key(options.seed),
        )[0]  # fmt: skip
    folders.save(baseline, folder / "unigram", tokenizer=corpus.tokenizer, overwrite=True, notes=notes)
    return {"bits_per_byte": bits, "references": {"unigram": reference, "lzma": corpus.lzma}, "sample": sample}


def _measure_targets(
    options: TrainOptions, folder: Path, corpus: Corpus, model: Any, notes: dict, console: Console
) -> dict[str, Any]:
    """What the objective predicts on the test split, in nats a target: these targets are no text of known bytes."""
    with console.status("evaluating on the test split"):
        loss = evaluate.mean_nll(model, rows.held_out(options, corpus, "test"), place=place_batch)
    return {"loss": loss, "perplexity": math.exp(loss), "targets": objectives.kind(options.objective).targets}


def split_bits(model: Any, corpus: Corpus, length: int, batch_size: int) -> dict[str, float]:
    """Bits per byte on the test split: windows overlap by half, so that every target has context."""
    cache = corpus.caches["test"]
    rows = data.evaluation_rows(cache, length, overlap=length // 2, batch_size=batch_size)
    return evaluate.bits_per_byte(model, rows, cache.domain_bytes, place=place_batch)
