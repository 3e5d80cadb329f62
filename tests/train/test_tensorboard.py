"""Metrics for TensorBoard, read back with its own reader."""

from __future__ import annotations

import sys

import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.errors import ConfigError
from lmx.train import tensorboard
from lmx.train.metrics import MetricsLog


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_is_logged_is_read_back(tmp_path):
    pytest.importorskip("tensorboard")
    mirror = tensorboard.Mirror(tmp_path / "tensorboard")
    with MetricsLog(tmp_path / "metrics.jsonl", mirror=mirror) as log:
        log.log(1, {"loss": 2.5, "tokens": 10, "note": "text", "parts": {"a": 1.0}})
        log.log(2, {"loss": jnp.float32(1.5), "tokens": np.int64(20)})
        log.log(3, {"valid_loss": float("inf")})
    found = scalars(tmp_path / "tensorboard")
    assert found == {"loss": [(1, 2.5), (2, 1.5)], "tokens": [(1, 10), (2, 20)], "valid_loss": [(3, float("inf"))]}


def test_a_resumed_run_has_no_step_twice(tmp_path):
    pytest.importorskip("tensorboard")
    first = tensorboard.Mirror(tmp_path)
    for step in range(1, 6):
        first.log(step, {"loss": float(step)})
    first.close()
    second = tensorboard.Mirror(tmp_path, first=3)
    second.log(4, {"loss": 40.0})
    second.close()
    assert scalars(tmp_path)["loss"] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(ConfigError, match=r"pip install 'lmx\[tensorboard\]'"):
        tensorboard.check()
