"""Metrics: lines that are always JSON, resuming without doubled steps, torn lines, and the picture."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lmx.core.errors import FolderError
from lmx.train import metrics
from lmx.train.metrics import MetricsLog


def test_lines_are_flushed_json(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.log(1, {"loss": jnp.float32(2.5), "count": np.int64(3), "ok": True, "name": "a", "none": None})
        assert metrics.read(path) == [
            {"step": 1, "loss": 2.5, "count": 3, "ok": True, "name": "a", "none": None}
        ]
        values = {"loss": math.nan, "norm": np.float32("inf"), "valid": {"code": -math.inf, "docs": 1.0}}
        log.log(np.int32(2), values)
    last = path.read_text().splitlines()[-1]
    found = json.loads(last, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found == {
        "step": 2,
        "loss": None,
        "norm": None,
        "valid": {"code": None, "docs": 1.0},
        "nonfinite": ["loss", "norm", "valid.code"],
    }


def test_a_resumed_run_has_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        for step in range(1, 8):
            log.log(step, {"loss": float(step)})
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')
    with MetricsLog(path, resume_step=4) as log:
        log.log(5, {"loss": 50.0})
    assert [line["loss"] for line in metrics.read(path)] == [1, 2, 3, 4, 50]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_torn_last_line_is_left_out_and_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "name": "\xc3')
    assert metrics.read(path) == [{"step": 1, "loss": 2.0}]
    with MetricsLog(path) as log:
        log.log(2, {"loss": 1.0})
    assert [line["step"] for line in metrics.read(path)] == [1, 2]
    path.write_bytes(b'{"step": 1}\n{"step": 2}')  # whole, but without its newline
    with MetricsLog(path) as log:
        log.log(3, {})
    assert [line["step"] for line in metrics.read(path)] == [1, 2, 3]


def test_bad_files(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(FolderError, match="cannot be read: No such file"):
        metrics.read(path)
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(FolderError, match="line 2 of .* is damaged"):
        metrics.read(path)
    with pytest.raises(FolderError, match="line 2 of .* is damaged"):
        MetricsLog(path)
    with pytest.raises(FolderError, match="cannot be written"):
        MetricsLog(path / "below" / "metrics.jsonl")
    path.write_text('{"step": 1, "loss": null}\n')
    with pytest.raises(FolderError, match="no finite loss or valid_loss"):
        metrics.plot(path, tmp_path / "loss.png")


def draw(folder: Path, steps=400) -> Path:
    random = np.random.default_rng(0)
    with MetricsLog(folder / "metrics.jsonl") as log:
        for step in range(1, steps + 1):
            loss = 2 + 4 * math.exp(-step / 60) + 0.1 * random.normal()
            log.log(step, {"loss": math.nan if step == 90 else loss, "tokens": step * 8192})
            if step % 50 == 0:
                log.log(step, {"valid_loss": 2.05 + 4 * math.exp(-step / 60)})
    metrics.plot(folder / "metrics.jsonl", folder / "loss.png", title="llama-1m on local")
    return folder / "loss.png"


@pytest.mark.parametrize("steps", [400, 20])
def test_the_picture(tmp_path, steps):
    png = draw(tmp_path, steps)
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 10_000
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    assert "matplotlib.pyplot" not in sys.modules  # the caller's choice of backend is left alone
