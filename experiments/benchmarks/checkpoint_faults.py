"""What checkpoints survive, counted: kill -9, flipped bits, a full disk; and what the checksums cost.

    python experiments/benchmarks/checkpoint_faults.py [--json] [--quick] [--results FOLDER]

kills   A child saves in a loop, sometimes the same step again, and is killed at a random moment. Afterwards the newest
        complete checkpoint must restore with the right content and be no older than what the child knew to be saved.
flips   One random bit of one file of a checkpoint is flipped. The restore must either give exactly what was saved
        (harmless) or name the file and the array (named); wrong values without an error are silent, an error that does
        not name both is unnamed. The peer is orbax alone, reading the same damaged files.
full    A 64 MB tmpfs is filled by checkpoints of 12 MB: a clear error with both numbers, every earlier step intact,
        nothing half-written left, and saving goes on once there is room. Where mounting is not allowed, skipped.
times   Saving and restoring 128 MB in 16 arrays: lmx (checksums, seals, no compression), orbax as lmx sets it (the same
        without checksums), orbax as it comes. The floor is a plain write with fsync and a read of as many bytes.

`ratio` is the time orbax as it comes takes to save and restore over that of lmx. Expect no lost and no silent one of
100 kills and 200 flips, about 65 of the 200 silent with orbax alone, and a ratio of 1 to 1.5.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from lmx.core.errors import FolderError
from lmx.train.checkpoints import Checkpoints

SIZE = 1 << 14  # numbers of the state of a child that is killed: 4 files of 64 kB and all else orbax writes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="a tenth of the counts, within a minute")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="write the JSON object there too")
    parser.add_argument("--fork-savers", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fork_savers:
        fork_savers(options.fork_savers)
        return
    few = options.quick
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        rows = [
            kills(place / "kills", 10 if few else 100),
            *flips(place / "flips", 20 if few else 200),
            full(place / "full"),
            *times(place / "times", 3 if few else 9),
        ]
    for row in rows:
        print(row, file=sys.stderr)
    medians = {row["case"]: row["seconds"] for row in rows if "seconds" in row}
    medians |= {name: medians[f"{name} save"] + medians[f"{name} restore"] for name in ("lmx", "orbax")}
    versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint", "tensorstore")}
    result = {
        "name": "checkpoint_faults",
        "ratio": medians["orbax"] / medians["lmx"],
        "medians": medians,
        "floor": medians["floor save"] + medians["floor restore"],
        "versions": versions | {"cpus": os.cpu_count()},
        "cases": rows,
    }
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "checkpoint_faults.json").write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result))


def kills(folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Kill a saving process `count` times: {"kills", "lost", "damaged", "killed while writing", "newest step"}."""
    rng, found = random.Random(seed), Counter(kills=count, lost=0, damaged=0, unfinished=0)
    folder.mkdir()
    command = [sys.executable, __file__, "--fork-savers", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as forker:
        for _ in range(count):
            print("go", file=forker.stdin, flush=True)
            pid = int(forker.stdout.readline())
            known = int(forker.stdout.readline())  # the first save of this child is complete
            time.sleep(rng.uniform(0, 0.25))
            os.kill(pid, signal.SIGKILL)
            while (line := forker.stdout.readline()) != "ended\n":
                known = int(line)
            found["unfinished"] += any(not path.name.isdigit() for path in folder.iterdir())
            said: list[str] = []
            with Checkpoints(folder, report=said.append) as checkpoints:
                newest = checkpoints.latest()
                state, extra = checkpoints.restore(jax.eval_shape(lambda: loop_state(0)))
            right = all(bool((leaf == newest).all()) for leaf in jax.tree.leaves(state)) and extra == {"step": newest}
            found["lost"] += newest is None or newest < known or not right
            found["damaged"] += bool(said)
        forker.stdin.close()
    with Checkpoints(folder) as checkpoints:  # the next start removes what the killed ones left
        checkpoints.save(newest + 1, loop_state(newest + 1))
    litter = sorted(path.name for path in folder.iterdir() if not path.name.isdigit())
    return {"case": "kill -9", **found, "litter": litter, "newest": newest}


def loop_state(step: int) -> dict[str, Any]:
    return {f"w{i}": jnp.full((SIZE,), step, jnp.float32) for i in range(4)} | {"step": jnp.int32(step)}


def fork_savers(folder: str) -> None:
    """For every line on stdin: fork a process that saves for ever, and wait until it was killed.

    The packages are imported once, here, and jax makes its devices only in the children.
    """
    for _ in sys.stdin:
        pid = os.fork()
        if pid == 0:
            save_for_ever(folder)
        os.waitpid(pid, 0)
        os.write(1, b"ended\n")


def save_for_ever(folder: str) -> None:
    """Save step after step, every third one twice; write the steps that are known to be complete to stdout."""
    os.write(1, f"{os.getpid()}\n".encode())
    with Checkpoints(folder) as checkpoints:
        start = checkpoints.latest()
        for step in itertools.count(0 if start is None else start + 1):
            for _ in range(2 if step % 3 == 0 else 1):
                checkpoints.save(step, loop_state(step), {"step": step})
            checkpoints.wait()
            os.write(1, f"{step}\n".encode())


def flips(folder: Path, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Flip `count` bits one after the other: a row each for lmx and for orbax alone, and the sizes of what was hit.

    Half of the files are drawn evenly, half by their size.
    """
    rng = random.Random(seed)
    state = flip_state()
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, state, {"data": {"seen": 17}})
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    sizes = [path.stat().st_size for path in files]
    found, alone, unnamed = Counter(), Counter(), []
    for i in range(count):
        path = rng.choice(files) if i % 2 else rng.choices(files, sizes)[0]
        with flipped(path, rng.randrange(path.stat().st_size * 8)):
            verdict = lmx_says(folder, state, path)
            alone[orbax_says(folder / "1", state)] += 1
        found[verdict] += 1
        if verdict in ("silent", "unnamed"):
            unnamed.append(str(path.relative_to(folder)))
    kinds = ("harmless", "named", "unnamed", "silent")
    return [
        {"case": "flips, lmx", "flips": count, "files": len(files), **{k: found[k] for k in kinds}, "wrong": unnamed},
        {"case": "flips, orbax alone", "flips": count, **{k: alone[k] for k in ("harmless", "error", "silent")}},
    ]


def flip_state() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    draw = lambda shape, dtype: jnp.asarray(rng.normal(size=shape) * 3, dtype)  # noqa: E731
    return {
        "wide": draw((64, 32), jnp.float32),
        "half": draw((40, 16), jnp.bfloat16),
        "bytes": draw((300,), jnp.int8),
        "mask": draw((50,), jnp.bool_),
        "step": jnp.int32(1),
        "key": jax.random.key_data(jax.random.key(7)),
    }


@contextlib.contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """One bit of a file is the other way round."""
    right = path.read_bytes()
    wrong = bytearray(right)
    wrong[bit // 8] ^= 1 << bit % 8
    path.write_bytes(wrong)
    try:
        yield
    finally:
        path.write_bytes(right)


def lmx_says(folder: Path, state: dict[str, Any], path: Path) -> str:
    """harmless, named, unnamed (an error without the file or without an array) or silent."""
    try:
        restored, extra = Checkpoints(folder).restore(jax.eval_shape(lambda: state), step=1)
    except FolderError as error:
        arrays = any(word in str(error) for word in (*state, "all of its arrays"))
        return "named" if str(path) in str(error) and arrays else "unnamed"
    return "harmless" if same(restored, state) and extra == {"data": {"seen": 17}} else "silent"


def orbax_says(path: Path, state: dict[str, Any]) -> str:
    """harmless, error or silent: what orbax makes of the same files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            restored = ocp.load_checkpointables(path, {"state": jax.tree.map(np.asarray, state)})["state"]
        except Exception:
            restored = None
        gc.collect()
    return "error" if restored is None else "harmless" if same(restored, state) else "silent"


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes() for name in b)


def full(folder: Path) -> dict[str, Any]:
    """Fill a small disk; {"skipped": why} where none can be mounted."""
    folder.mkdir()
    with small_disk(folder) as why:
        if why is not None:
            return {"case": "full disk", "skipped": why}
        state = lambda step: {"w": jnp.full((3, 1 << 20), step, jnp.float32)}  # noqa: E731
        refused = None
        with Checkpoints(folder / "run", keep=100) as checkpoints:
            while refused is None:
                step = len(checkpoints.steps())
                try:
                    checkpoints.save(step, state(step))
                    checkpoints.wait()
                except FolderError as error:
                    refused = str(error)
            steps = checkpoints.steps()
            intact = all(bool((checkpoints.restore(state(0), s)[0]["w"] == s).all()) for s in steps)
            litter = sorted(path.name for path in (folder / "run").iterdir() if not path.name.isdigit())
            shutil.rmtree(folder / "run" / "0")
            checkpoints.save(step, state(step))
            checkpoints.wait()
            goes_on = checkpoints.latest() == step
        numbers = "needs" in refused and "free" in refused
        return {"case": "full disk", "steps": steps, "intact": intact, "clear": numbers, "litter": litter,
                "goes on": goes_on, "message": refused}  # fmt: skip


@contextlib.contextmanager
def small_disk(folder: Path, size: str = "64m") -> Iterator[str | None]:
    """A tmpfs of this size at the folder; yields why not where that is not allowed."""
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        why = done.stderr.strip() if done.returncode else None
    except OSError as error:
        why = str(error)
    try:
        yield why
    finally:
        if why is None:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def times(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Medians of saving (until it is on the disk) and restoring, the contenders in turn."""
    rng = np.random.default_rng(0)
    state = {f"w{i}": jnp.asarray(rng.normal(size=1 << 21).astype(np.float32)) for i in range(16)}
    targets = jax.eval_shape(lambda: state)
    nbytes = sum(leaf.nbytes for leaf in state.values())
    plain = ocp.Context()
    plain.array.saving.use_compression = False

    def lmx_save(path: Path) -> None:
        with Checkpoints(path) as checkpoints:
            checkpoints.save(1, state)

    def orbax_save(path: Path, context: ocp.Context) -> None:
        with context:
            ocp.save_checkpointables_async(path / "1", {"state": state}).result()

    def orbax_restore(path: Path) -> None:
        jax.block_until_ready(ocp.load_checkpointables(path / "1", {"state": state}))

    def write(path: Path) -> None:
        path.mkdir()
        with open(path / "1", "wb") as file:
            for leaf in state.values():
                file.write(np.asarray(leaf).data)
            file.flush()
            os.fsync(file.fileno())

    contenders = {
        "lmx": (lmx_save, lambda path: jax.block_until_ready(Checkpoints(path).restore(targets)[0])),
        "orbax without checksums": (lambda path: orbax_save(path, plain), orbax_restore),
        "orbax": (lambda path: orbax_save(path, ocp.Context()), orbax_restore),
        "floor": (write, lambda path: (path / "1").read_bytes()),
    }
    taken: dict[str, list[float]] = {f"{name} {what}": [] for name in contenders for what in ("save", "restore")}
    for _ in range(rounds + 1):
        for name, actions in contenders.items():
            path = folder / name.replace(" ", "_")
            shutil.rmtree(path, ignore_errors=True)
            path.parent.mkdir(exist_ok=True)
            for what, action in zip(("save", "restore"), actions, strict=True):
                start = time.perf_counter()
                action(path)
                taken[f"{name} {what}"].append(time.perf_counter() - start)
    cases = {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}  # the first round compiles
    return [{"case": name, "seconds": s, "gigabytes_per_second": nbytes / s / 1e9} for name, s in cases.items()]


if __name__ == "__main__":
    main()
