"""The loop: when it logs, evaluates and saves; how it stops, asked or for cause; that a stopped run resumes."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from lmx.core import sharding, specs
from lmx.core.errors import DataError, NonFiniteError
from lmx.losses import cross_entropy
from lmx.models.transformer import Model
from lmx.train import abstract_start, adamw, loop, make_train_step, start
from lmx.train.checkpoints import Checkpoints
from lmx.train.feed import place_batch
from lmx.train.interrupt import interrupts_call, sigterm_interrupts, stop_requests
from lmx.train.loop import Every
from lmx.train.progress import ProgressReport, si

pytestmark = pytest.mark.usefixtures("quick")


class Log(list):
    """What the loop logs, and the notes it gives, in place of a file or a bar."""

    def __init__(self):
        self.notes, self.evaluations = [], []

    def log(self, step, values):
        self.append((step, dict(values)))

    metrics = log

    def evaluation(self, step, values):
        self.evaluations.append((step, dict(values)))

    def note(self, text):
        self.notes.append(text)


class Saves(list):
    """In place of `Checkpoints`."""

    waited = False

    def __init__(self):
        self.metrics = []

    def check(self):
        self.checked = getattr(self, "checked", 0) + 1

    def save(self, step, state, extra, metrics):
        self.append((step, int(state.step), extra))
        self.metrics.append(metrics)

    def wait(self):
        self.waited = True


@functools.cache
def square():
    """A step on a "model" of one number, whose batch is what its loss is multiplied by."""
    optimizer = optax.sgd(0.1)
    loss = lambda x, batch, key: (batch["scale"].sum() * (x["w"] ** 2).sum(), jnp.float32(1), {})  # noqa: E731
    return make_train_step(loss, optimizer), lambda: start({"w": jnp.ones(1)}, optimizer)


def ones(first: int = 0, bad: range = range(0), closed: list | None = None):
    """Batches without end from a step on; NaN at the `bad` ones."""
    try:
        for i in range(first, 10_000):
            scale = np.full((2, 3), np.nan if i + 1 in bad else 1.0, np.float32)
            yield {"tokens": np.zeros((2, 3), np.int32), "scale": scale}
    finally:
        if closed is not None:
            closed.append(True)


def train(batches=None, state=None, **options):
    step, begin = square()
    return loop.train(state or begin(), step, batches or ones(), **({"steps": 10} | options))


def test_cadence():
    log, report, saves, closed = Log(), Log(), Saves(), []
    evaluate = lambda state: {"valid_loss": float(state.step)}  # noqa: E731
    outcome = train(
        ones(closed=closed), every=Every(log=4, evaluate=3, save=5), evaluate=evaluate, checkpoints=saves, log=log,
        report=report, extra=lambda step: {"data": {"rows": 2 * step}},
    )  # fmt: skip
    # The first and the last always, and beside every evaluation.
    assert [step for step, values in log if "loss" in values] == [1, 3, 4, 6, 8, 9, 10]
    assert [step for step, _ in report] == [1, 3, 4, 6, 8, 9, 10]
    assert [(s, v) for s, v in log if "valid_loss" in v] == report.evaluations
    assert report.evaluations == [(i, {"valid_loss": i}) for i in (3, 6, 9, 10)]
    assert saves == [(5, 5, {"data": {"rows": 10}}), (10, 10, {"data": {"rows": 20}})] and saves.waited
    assert saves.checked == 10 and saves.metrics == [{}, {"valid_loss": 10}]  # step 5 was not evaluated, 3 was
    assert (outcome.step, outcome.stopped, outcome.skipped, int(outcome.state.step)) == (10, False, 0, 10)
    assert outcome.tokens_per_second > 0 and log[-1][1].keys() == {"valid_loss"} and closed == [True]
    assert {"loss", "grad_norm", "weight", "skipped", "tokens_per_second"} <= log[0][1].keys()
    assert [values["tokens"] for _, values in report] == [6 * step for step, _ in report]  # rows of 3, two a batch
    assert log[0][1]["tokens_per_second"] == 0 < log[-2][1]["tokens_per_second"]  # the first step compiles


def test_zero_is_never_but_the_last_step_counts():
    log, saves, seen = Log(), Saves(), []
    train(every=Every(log=0), evaluate=lambda state: seen.append(int(state.step)) or {}, checkpoints=saves, log=log)
    assert [step for step, values in log if values] == [1, 10] and seen == [10] and [s for s, *_ in saves] == [10]


def test_saving_where_two_reasons_meet_saves_once():
    saves = Saves()
    train(every=Every(save=5), checkpoints=saves, steps=10)
    assert [step for step, *_ in saves] == [5, 10]


def test_a_finished_run_does_nothing():
    _, begin = square()
    state = begin().replace(step=jnp.int32(10))
    outcome = train(state=state, evaluate=lambda state: 1 / 0)
    assert (outcome.step, outcome.stopped, outcome.tokens_per_second) == (10, False, 0)


def test_stopping_finishes_the_step_and_saves():
    saves, log, answers = Saves(), Log(), iter([False, False, True])
    outcome = train(checkpoints=saves, log=log, asked_to_stop=lambda: next(answers), evaluate=lambda state: 1 / 0)
    assert (outcome.step, outcome.stopped) == (3, True)
    assert [step for step, *_ in saves] == [3] and saves.waited and [step for step, _ in log] == [1, 3]


def test_asked_to_stop_at_the_last_step_is_the_end():
    saves = Saves()
    outcome = train(steps=2, checkpoints=saves, asked_to_stop=lambda: True)
    assert (outcome.step, outcome.stopped) == (1, True)
    assert not train(steps=1, asked_to_stop=lambda: True).stopped


def test_too_few_batches():
    with pytest.raises(DataError, match="the batches ended after step 4, but 10 steps were asked for"):
        train(iter(list(batch for batch, _ in zip(ones(), range(4), strict=False))))


def test_skipped_steps_are_reported_and_counted():
    log, report = Log(), Log()
    outcome = train(ones(bad=range(3, 6)), every=Every(log=2), log=log, report=report)
    assert outcome.skipped == 3 and outcome.step == 10 and log[-1][1]["skipped"] == 3
    assert report.notes == [
        "2 step(s) up to 4 had a non-finite loss or gradient and were skipped",
        "1 step(s) up to 6 had a non-finite loss or gradient and were skipped",
    ]


def test_a_run_of_bad_steps_stops_with_an_error():
    log, saves, closed = Log(), Saves(), []
    with pytest.raises(NonFiniteError) as error:
        batches = ones(bad=range(4, 100), closed=closed)
        train(batches, every=Every(log=2, save=3), max_skipped=3, log=log, checkpoints=saves)
    assert str(error.value).startswith(
        "3 steps in a row up to step 6 had a non-finite loss or gradient (loss nan); the parameters are those before "
        "them. Lower the learning rate"
    )
    assert closed == [True] and [step for step, *_ in saves] == [3]
    assert [step for step, _ in log] == [1, 2, 4, 6]  # the bad step is on record, once


def test_skipping_that_is_mended_is_no_error():
    assert train(ones(bad=range(2, 4)), every=Every(log=1), max_skipped=3).skipped == 2


# Signals


@contextlib.contextmanager
def handlers():
    """That the handlers of before are there again."""
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_loop_at_the_end_of_the_step(number):
    def batches():
        for i, batch in enumerate(ones()):
            if i == 3:
                os.kill(os.getpid(), number)
            yield batch

    saves = Saves()
    with handlers(), stop_requests() as asked:
        outcome = train(batches(), asked_to_stop=asked, checkpoints=saves)
    assert (outcome.step, outcome.stopped) == (4, True) and [step for step, *_ in saves] == [4]


def test_a_second_interrupt_is_immediate():
    with handlers(), pytest.raises(KeyboardInterrupt), stop_requests() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_sigterm_is_not_an_interrupt():
    with handlers(), stop_requests() as asked:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked()


def test_sigterm_may_interrupt():
    with handlers(), pytest.raises(KeyboardInterrupt), sigterm_interrupts():
        with stop_requests() as asked:  # which come first
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked()
        os.kill(os.getpid(), signal.SIGTERM)


def test_once_it_is_settled_sigterm_is_no_interrupt():
    with handlers(), sigterm_interrupts() as settled:
        settled()
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_signal_falls_between_two_handlers(number, monkeypatch):
    """It comes as soon as the new handler is there, and as long as it is."""
    real, called = signal.signal, threading.Semaphore(0)

    def install(which, handler):
        before = real(which, handler)
        if which == number and signal.getsignal(number) is handler and handler is not mine:
            os.kill(os.getpid(), number)
        return before

    mine = lambda *_: None  # noqa: E731
    before = real(number, mine)
    try:
        with monkeypatch.context() as patched:
            patched.setattr(signal, "signal", install)
            with interrupts_call(called.release):
                assert called.acquire(timeout=300)
    finally:
        real(number, before)


def test_signals_in_another_thread_are_left_alone():
    answers = []

    def other():
        with stop_requests() as asked:
            answers.append(asked())

    with handlers():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert answers == [False]


# Resuming


@functools.cache
def real_step():
    """Two microbatches, clipping, an average, and a loss that draws random numbers: all that resuming must keep."""

    def noisy(model, batch, key):
        tokens = jnp.where(jax.random.bernoulli(key, 0.1, batch["tokens"].shape), 0, batch["tokens"])
        return cross_entropy(model, batch | {"targets": batch["tokens"], "tokens": tokens})

    optimizer = adamw(0.01)
    return optimizer, make_train_step(noisy, optimizer, accumulate=2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "explicit", "auto"])
def test_a_stopped_run_resumes_bit_for_bit(tiny, packed, tmp_path, kind):
    optimizer, step = real_step()
    options = dict(train="decoder|head", ema_decay=0.9, key=jax.random.key(5))
    with sharding.use_mesh(kind and "fsdp=4,tensor=2", explicit=kind == "explicit"):
        model = tiny()
        if kind:
            model = Model(model.config, jax.device_put(model.params, specs.shardings(model.specs().params)))
        batches = lambda first: (place_batch(packed(i)) for i in range(first, 100))  # noqa: E731
        go = functools.partial(loop.train, step=step, steps=8, every=Every(log=1))

        straight = Log()
        wanted = go(start(model, optimizer, **options), batches=batches(0), log=straight)

        before, answers = Log(), iter([False, False, False, False, True])
        with Checkpoints(tmp_path / "run") as checkpoints:
            outcome = go(
                start(model, optimizer, **options), batches=batches(0), log=before, checkpoints=checkpoints,
                asked_to_stop=lambda: next(answers),
            )  # fmt: skip
        assert outcome.stopped and outcome.step == 5

        after = Log()
        target = abstract_start(Model(model.config, specs.shapes(model.specs().params)), optimizer, **options)
        with Checkpoints(tmp_path / "run") as checkpoints:
            state, extra = checkpoints.restore(target)
            assert extra == {"data": {"step": 5}} and int(state.step) == 5
            for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(outcome.state), strict=True):
                assert not kind or not a.ndim or a.sharding.is_equivalent_to(b.sharding, a.ndim)
            got = go(state, batches=batches(extra["data"]["step"]), log=after, checkpoints=checkpoints)
            assert checkpoints.latest() == 8
        losses = lambda log: {step: (values["loss"], values["grad_norm"]) for step, values in log}  # noqa: E731
        assert losses(before) | losses(after) == losses(straight) and len(straight) == 8
        numbers = lambda state: jax.device_get(state.replace(key=jax.random.key_data(state.key)))  # noqa: E731
        jax.tree.map(np.testing.assert_array_equal, numbers(got.state), numbers(wanted.state))


# The bar


def test_progress_away_from_a_terminal_prints_evaluations_and_notes():
    text = io.StringIO()
    report = ProgressReport(Console(file=text, width=100), steps=10, flops_per_token=1e6)
    with report.shown():
        evaluate = lambda state: {"valid_loss": 1.5}  # noqa: E731
        train(ones(bad=range(2, 3)), every=Every(log=1, evaluate=5), evaluate=evaluate, report=report)
    lines = text.getvalue().splitlines()
    assert lines[0] == "1 step(s) up to 2 had a non-finite loss or gradient and were skipped"
    assert lines[1] == "step 5/10  loss 2.940  valid loss 1.500"  # 6 w^2, three steps of 0.1 after w = 1
    assert lines[2].startswith("step 10/10") and len(lines) == 3


def test_progress_on_a_terminal():
    text = io.StringIO()
    report = ProgressReport(Console(file=text, width=100, force_terminal=True), steps=10, flops_per_token=1e6)
    with report.shown():
        train(every=Every(log=1), report=report)
        report.bar.refresh()
    assert "step 10/10" in text.getvalue() and "FLOP/s" in text.getvalue()


@pytest.mark.parametrize(
    ("number", "text"), [(12345.6, "12.3 k"), (999, "999 "), (1.5e9, "1.5 G"), (0, "0 "), (2e18, "2 E"), (-2e6, "-2 M")]
)
def test_si(number, text):
    assert si(number) == text
