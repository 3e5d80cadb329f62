"""Checkpoints of a training run: any pytree, saved while training goes on, restored and proven in its shardings.

    with Checkpoints("run/checkpoints", keep=2, keep_every=1000, best="valid_loss") as checkpoints:
        checkpoints.save(step, state, extra, metrics)         # the state may be donated at once
        checkpoints.check()                                   # every step: raises as soon as a save has failed
    state, extra = checkpoints.restore(abstract_state)        # the newest sound one, onto any mesh

With several processes every method is called by all of them at the same points, and the folder is one that all share:
process 0 names, moves and removes, each writes its part of the arrays, and all learn the same outcome. What a state
goes through: names and descriptions (`lmx.train.leaves`), checksums on the devices (`lmx.train.checksums`), orbax
(`lmx.train.storage`), file seals (`lmx.train.seals`), and back with proof (`lmx.train.verified`).
"""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

from lmx.core import tree
from lmx.core.errors import ConfigError, FolderError
from lmx.train import agreement, buckets, leaves, seals, steps, storage, verified
from lmx.train.background import Save
from lmx.train.checksums import checksums
from lmx.train.verified import Damaged

OVERHEAD = 1 << 16  # bytes of a checkpoint beside its arrays and its JSON, and per 64 arrays


class Checkpoints:
    """The checkpoints of one run, in `folder/<step>`; use it as a context manager, or call `close`.

    Args:
      folder: a local path, or gs://bucket/run (which needs `pip install 'lmx[gcs]'`). Made by the first save.
      keep: how many of the newest checkpoints stay.
      keep_every: those of steps that it divides stay too.
      best: a name in the `metrics` given to `save`; the checkpoint with its lowest value stays too.
      report: told when a damaged checkpoint was passed over (in process 0); a warning by default.
    Raises ConfigError for a number that keeps nothing, and for a path of another kind.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep: int = 2,
        keep_every: int | None = None,
        best: str | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        if keep < 1 or keep_every is not None and keep_every < 1:
            raise ConfigError(f"keep and keep_every must be at least 1, not {keep} and {keep_every}")
        self.folder = open_path(folder)
        self.keep, self.keep_every, self.best = keep, keep_every, best
        self._report = report or (lambda text: warnings.warn(text, stacklevel=4))
        self._metrics: dict[int, float] = {}
        self._cleaned = False
        self._saving: Save | None = None

    def save(
        self, step: int, state: Any, extra: dict | None = None, metrics: dict[str, float] | None = None
    ) -> None:
        """Begin to save a state; it is written in the background, and may be donated or changed at once.

        A checkpoint of the same step is replaced once the new one is whole. `extra` is JSON data; `metrics` are
        numbers, of which `best` looks at one.

        Raises:
          FolderError: this or the previous save could not be written, the disk has no room for it, or a later step
            is there. Earlier checkpoints are intact and nothing half-written stays.
          ConfigError: a leaf is no array or number, or `extra` is not JSON.
        """
        self.wait()
        named = leaves.named(state)
        described = {name: leaves.describe(leaf) for name, leaf in named.items()}
        arrays = {name: leaves.storable(leaf) for name, leaf in named.items() if 0 not in leaf.shape}
        if not arrays:
            raise ConfigError("the state has no arrays to save")  # orbax refuses empty ones
        about = {"leaves": described, "sums": {}, "extra": extra or {}, "metrics": metrics or {}}
        size = leaves.json_size(about) + sum(array.nbytes for array in arrays.values())
        with self._told(step):
            agreement.first(lambda: self._prepare(step, size + OVERHEAD * (1 + len(arrays) // 64)))
            about["sums"] = checksums(arrays)
            response = storage.write(self.folder / str(step), arrays, about)
        self._saving = Save(step, response, lambda: self._settle(step, metrics or {}))

    def check(self) -> None:
        """Raise FolderError if the save in the background has failed; returns at once. For the loop, every step."""
        if self._saving is not None and self._saving.has_failed():
            self.wait()

    def wait(self) -> None:
        """Return when everything saved is on the disk. Raises FolderError if it could not be written."""
        if self._saving is not None:
            self._saving.join()
            saving, self._saving = self._saving, None
            if saving.error is not None:
                with self._told(saving.step):
                    raise saving.error

    def steps(self) -> list[int]:
        """The steps with a complete checkpoint, in order; unfinished ones do not count."""
        return [step for step, _ in self._find()]

    def latest(self) -> int | None:
        """The newest step with a complete checkpoint, or None."""
        return max(self.steps(), default=None)

    def restore(self, abstract_state: Any, step: int | None = None, only: str | None = None) -> tuple[Any, dict]:
        """Read a checkpoint straight into the shardings that `abstract_state` asks for, and prove it.

        Args:
          abstract_state: the state's tree with `jax.ShapeDtypeStruct` leaves (or arrays). A leaf with a
            sharding is read into it; one without goes to the default device, uncommitted.
          step: which checkpoint; by default the newest sound one. Newer ones that are damaged are reported and
            renamed to <step>.damaged, so that the run can save those steps again.
          only: a path pattern (`lmx.core.tree`); other leaves are returned as given, and the checkpoint may hold
            others.

        Returns:
          (state, extra), the leaves read being jax arrays.

        Raises:
          FolderError: there is no such checkpoint, or it is damaged (all of them, if none is asked for): the message
            names files and arrays.
          ConfigError: the checkpoint holds another state; the message names the paths that differ.
        """
        self.wait()
        found = dict(self._find())
        if not found or step is not None and step not in found:
            has = f"it has the steps {', '.join(map(str, found))}" if found else "it has none"
            raise FolderError(f"{self.folder} has no checkpoint{'' if step is None else f' of step {step}'}; {has}")
        wanted = leaves.named(abstract_state)
        if only is not None:
            wanted = _selected(abstract_state, wanted, only)
        if step is not None:
            arrays, extra = verified.fetch(self.folder / found[step], wanted, others=only is not None)
        else:
            arrays, extra = self._newest_sound(found, wanted, others=only is not None)
        filled = [arrays.get(name, leaf) for name, leaf in leaves.named(abstract_state).items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), filled), extra

    def close(self) -> None:
        """Wait for what is being saved. Raises what `wait` raises."""
        self.wait()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _find(self) -> list[tuple[int, str]]:
        """(step, name of its folder), as process 0 sees them."""
        found = agreement.first(lambda: [[step, path.name] for step, path in steps.find(self.folder).items()])
        return [(step, name) for step, name in found]

    def _newest_sound(self, found: dict[int, str], wanted: dict, others: bool) -> tuple[dict, dict]:
        damaged: list[tuple[str, Damaged]] = []
        for step in sorted(found, reverse=True):
            try:
                restored = verified.fetch(self.folder / found[step], wanted, others=others)
            except Damaged as error:
                damaged.append((found[step], error))
                continue
            for name, error in damaged:
                moved = agreement.first(lambda name=name: steps.move_aside(self.folder / name).name)
                if jax.process_index() == 0:
                    self._report(f"{error}. It is now called {moved}, and step {step} is restored instead")
            return restored
        raise FolderError(f"{self.folder} has no sound checkpoint: " + "; ".join(str(e) for _, e in damaged))

    def _prepare(self, step: int, size: int) -> None:
        """Process 0, before a save: the folder is fit for it."""
        if not self._cleaned:
            steps.clean(self.folder)
        self._cleaned = True
        later = [other for other in steps.find(self.folder) if other > step]
        if later:
            raise FolderError(
                f"{self.folder} holds step {later[-1]}, later than {step}, which a resumed run would prefer; "
                "go on from that one, remove it, or choose another folder"
            )
        steps.require_room(self.folder, size)
        steps.make_room_for(self.folder, step)

    def _settle(self, step: int, metrics: dict[str, float]) -> None:
        """In the background, once a checkpoint is whole: seal it, and let go of those that it supersedes."""
        with contextlib.suppress(OSError):  # sound all the same
            seals.seal(self.folder / str(step), jax.process_index())
        if jax.process_index() == 0:
            try:
                self._let_go(step, metrics)
            except OSError as error:  # the new one is whole, which is what was asked for
                self._report(f"a superseded checkpoint in {self.folder} could not be removed: {error}")

    def _let_go(self, step: int, metrics: dict[str, float]) -> None:
        """Remove the checkpoints that are not to stay."""
        steps.remove(self.folder / f"{step}{steps.REPLACED}")
        found = steps.find(self.folder)
        if self.best is not None:
            self._metrics = {s: self._metric(s, path) for s, path in found.items()}
            self._metrics[step] = metrics.get(self.best, math.nan)
        stay = steps.kept(list(found), self._metrics, self.keep, self.keep_every)
        for other in found.keys() - stay:
            steps.remove(found[other])

    def _metric(self, step: int, path: Any) -> float:
        if step not in self._metrics:
            with contextlib.suppress(FolderError):
                return verified.about(path)["metrics"].get(self.best, math.nan)
        return self._metrics.get(step, math.nan)

    @contextlib.contextmanager
    def _told(self, step: int) -> Iterator[None]:
        """Turn what went wrong while saving into a FolderError that says so, and leave no litter.

        What fails in a device's program is none: a lost process fails the collectives of a step, or of the checksums.
        """
        try:
            yield
        except Exception as caught:
            with contextlib.suppress(OSError):
                if jax.process_index() == 0 and self._cleaned:  # else nothing was written
                    steps.clean(self.folder)
            error = caught
        else:
            return
        if isinstance(storage.root_of(error), jax.errors.JaxRuntimeError):
            raise error
        told = FolderError(
            f"the checkpoint of step {step} could not be written to {self.folder}; earlier ones are intact. The cause: "
            f"{storage.cause_of(error)}"
        )
        told.agreed = getattr(error, "agreed", False)  # by `agreement`: then nobody has to be told
        raise told


def open_path(folder: str | os.PathLike) -> epath.Path:
    """The path of a folder, absolute if it is local. Raises ConfigError for one that is neither local nor gs://."""
    path = os.fspath(folder)
    buckets.check(path)
    return epath.Path(path if "://" in path else os.path.abspath(os.path.expanduser(path)))


def _selected(abstract_state: Any, named: dict[str, Any], only: str) -> dict[str, Any]:
    """The leaves that the pattern selects. Raises ConfigError if it selects none, or some layers of one."""
    chosen = {}
    for (name, leaf), (path, _, hit) in zip(named.items(), tree.matches(abstract_state, only), strict=True):
        if hit.any() and not hit.all():
            raise ConfigError(f"path pattern {only!r} cuts the stack of {path}; checkpoints are read by whole leaves")
        if hit.all():
            chosen[name] = leaf
    return chosen
