"""A model's tensors and modules by the names that PEFT's adapters have for them, and which family an adapter fits."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmx.core.errors import ConfigError, FolderError
from lmx.hf import tables, writing
from lmx.hf.families import FAMILIES
from lmx.hf.family import Family
from lmx.models import transformer
from lmx.models.transformer import Model

FOLD = "fold the model (lmx.fold) and save it whole"


@dataclasses.dataclass(frozen=True)
class Names:
    """The tensors of a model, by the names that adapters of one family have for them."""

    family: Family
    class_name: str
    bound: tables.Bound

    @classmethod
    def of(cls, model: Model, origin: Any) -> Names:
        """By the family of `origin`, as `writing.describe` takes it. Raises ConfigError if it has no such model."""
        family, class_name, _ = writing.describe(model.config, origin)
        table = family.entries(model.config, class_name)
        return cls(family, class_name, tables.bind(table, transformer.abstract(model.config)))

    def known(self) -> dict[str, str]:
        """Every spelling of a tensor's name -> that of the table."""
        every = {name: name for name in self.bound.tensors} | self.bound.copies
        return {other: of for name, of in every.items() for other in self.family.spelled(name, self.class_name)}

    def today(self, name: str) -> str:
        """The name that the table has for what an older version called so."""
        for pattern, replacement in self.family.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def modules(self) -> list[str]:
        """Everything that has a weight."""
        names = (*self.bound.tensors, *self.bound.copies)
        return [self.module(name) for name in names if name.endswith(".weight")]

    def module(self, name: str) -> str:
        """The module of a tensor of the table, as its class spells it. Raises ConfigError for a tensor of no module."""
        spelled = self.spelled(name)
        if not spelled.endswith(".weight"):
            raise ConfigError(f"{spelled} is the weight of no module, and PEFT's adapters know nothing else; {FOLD}")
        return spelled.removesuffix(".weight")

    def spelled(self, name: str) -> str:
        """A tensor of the table as its class spells it."""
        return self.family.spelled(name, self.class_name)[0]

    def is_tied(self, name: str) -> bool:
        """Whether two modules share the tensor."""
        return name in self.bound.copies.values()


def fitting(model: Model, path: Path, modules: Iterable[str], whole: Iterable[str]) -> Names:
    """The names of the family, of those that can express the model, that has what an adapter names.

    modules: that it adapts; whole: tensors that it replaces. Raises FolderError, naming what is not there, if no family
    has all of them, ConfigError if none can express the model.
    """
    best: tuple[list[str], Names] | None = None
    reason = None
    for family in FAMILIES:
        try:
            names = Names.of(model, family)
        except ConfigError as error:
            reason = error
            continue
        known = names.known()
        lost = [name for name in modules if names.today(f"{name}.weight") not in known]
        lost += [name for name in whole if names.today(name) not in known]
        if best is None or len(lost) < len(best[0]):
            best = (lost, names)
    if best is None:
        raise ConfigError(f"no family of Hugging Face's has such a model, so an adapter's names say nothing: {reason}")
    lost, names = best
    if lost:
        raise FolderError(
            f"{path} is an adapter for another base: it has {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}, "
            f"and the modules of this {names.class_name} are such as {', '.join(names.modules()[:8:2])}"
        )
    return names
