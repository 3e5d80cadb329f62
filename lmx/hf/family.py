"""What a family of models is: its classes, the fields of its config.json, its table.

A family is one file of lmx/hf/families that ends with a `Family`. It serves both directions: `read` turns the fields of
config.json into those of lmx's Config, `write` turns them back, `table` (lmx.hf.tables) names the tensors. Whether a
model can be written as a family is not for the family to say: what `write` wrote is read again and compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lmx.core.errors import ConfigError, nearest
from lmx.hf.tables import Table
from lmx.models.config import Config

# Fields of Config that say how to compute, not what: they neither come from config.json nor go there.
HOW = ("dtype", "compute_dtype", "attention", "remat")
PER_LAYER = ("layer_types", "no_rope_layers")  # fields of config.json with a value a layer
LABELLED = ("sequence", "tokens")  # heads with as many outputs as there are labels
BARE = ("none", "pooled")  # heads of classes that are the body alone
NO_HEAD = {  # what a Config says of a head there is none of
    "head": "none", "head_activation": None, "head_hidden_bias": True, "head_norm": False, "head_bias": False,
    "pool": "first",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Class:
    """One class of a family, such as LlamaForCausalLM.

    head:   the value of Config.head.
    table:  the entries of its head.
    config: further fields of Config that the class sets (how it pools, an activation in its head).
    prefix: of the body's names, where it is not the family's; a class that is the body alone ("none", "pooled") has "".
    optional: whether files may lack the head (BERT's pooler): then the model has none.
    """

    head: str
    table: Table = ()
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prefix: str | None = None
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    model_type: as in config.json.
    classes:    class name -> Class; the first is meant where config.json names none, and the first of a head is what a
                model with that head is saved as.
    defaults:   every field of config.json that `read` reads, with the default of transformers' config class, which
                config.json may leave out.
    read:       (the fields, defaults filled in) -> the arguments of Config, without those of the head.
    write:      Config -> the fields of config.json that it decides, the inverse of `read`.
    table:      of the body, with `prefix`; a tuple of entries, or a function of Config that gives one.
    fixed:      fields that must have this value (or one of a tuple's), because lmx computes nothing else.
    prefix:     what the table's names of the body begin with, "model." for Llama, as they do in classes that have a
                head. Names are taken with or without it, as transformers does, and written as the class has them.
    renames:    (regular expression, replacement) applied to stored names that older versions wrote.
    tied_by_files: (head, token table), the tensors of a family whose config.json does not say whether the two are one
                (T5): they are unless the files hold both, with different numbers.
    """

    model_type: str
    classes: Mapping[str, Class]
    defaults: Mapping[str, Any]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Config], dict[str, Any]]
    table: Table | Callable[[Config], Table]
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    renames: tuple[tuple[str, str], ...] = ()
    tied_by_files: tuple[str, str] | None = None

    def entries(self, config: Config, class_name: str) -> Table:
        """The whole table of one config and class."""
        body = self.table(config) if callable(self.table) else self.table
        return (body, self.classes[class_name].table)

    def spelled(self, name: str, class_name: str) -> tuple[str, ...]:
        """The names under which files may hold a tensor of the table: first that of the class, then those of others."""
        if not self.prefix or not name.startswith(self.prefix):
            return (name,)
        chosen, bare = self.classes[class_name], name.removeprefix(self.prefix)
        own = chosen.prefix if chosen.prefix is not None else "" if chosen.head in BARE else self.prefix
        return tuple(dict.fromkeys((own + bare, name, bare)))

    def class_of(self, values: Mapping[str, Any]) -> str:
        """The class that a config.json names. Raises ConfigError for one that this family has not."""
        named = values.get("architectures") or [next(iter(self.classes))]
        for name in named:
            if name in self.classes:
                return name
        raise ConfigError(
            f"config.json names the class {', '.join(map(str, named))}; of model_type {self.model_type!r} lmx reads "
            f"{', '.join(self.classes)}{nearest(str(named[0]), self.classes)}"
        )

    def config(
        self, values: Mapping[str, Any], class_name: str, tied: bool | None = None, headless: bool = False
    ) -> Config:
        """The Config of a config.json, of which `read` finds the class under "architectures".

        tied: whether the head is the token table, for a family whose files decide it (`tied_by_files`); headless:
        whether the files lack the head, for a class whose files may (`optional`).
        Raises ConfigError for a field with a value that lmx does not compute.
        """
        if values.get("quantization_config"):
            raise ConfigError(
                "config.json has a quantization_config; lmx reads plain float32, bfloat16 and float16 weights: "
                "dequantize it with transformers (model.dequantize()) and save it again"
            )
        filled = {**self.defaults, **values, "architectures": [class_name]}
        for name in PER_LAYER:
            given, layers = filled.get(name), filled.get("num_hidden_layers")
            if isinstance(given, list) and len(given) != layers:
                raise ConfigError(f"config.json has {name} for {len(given)} layers, and num_hidden_layers {layers}")
        for name, wanted in self.fixed.items():
            allowed = wanted if isinstance(wanted, tuple) else (wanted,)
            if filled.get(name, allowed[0]) not in allowed:
                raise ConfigError(
                    f"config.json has {name} {filled[name]!r}; lmx computes {self.model_type} models only with "
                    f"{' or '.join(map(repr, allowed))}"
                )
        try:
            by_files = {} if tied is None or self.tied_by_files is None else {"tie_embeddings": tied}
            return Config(**{**self.read(filled), **self._head(filled, class_name, headless), **by_files})
        except ConfigError as error:
            raise ConfigError(f"config.json of model_type {self.model_type!r}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
            raise ConfigError(
                f"config.json of model_type {self.model_type!r} makes no sense ({type(error).__name__}: {error})"
            ) from error

    def _head(self, values: Mapping[str, Any], class_name: str, headless: bool) -> dict[str, Any]:
        chosen = self.classes[class_name]
        if chosen.optional and headless:
            return NO_HEAD
        if chosen.head == "none":
            return {**NO_HEAD, **chosen.config}
        labels = {"num_labels": num_labels(values)} if chosen.head in LABELLED else {}
        return {"head": chosen.head, **labels, **chosen.config}

    def describe(self, config: Config, class_name: str) -> dict[str, Any]:
        """The fields of config.json that a Config decides."""
        fields = self.write(config)
        if self.classes[class_name].head in LABELLED:
            names = {str(i): f"LABEL_{i}" for i in range(config.num_labels)}
            fields |= {"id2label": names, "label2id": {label: int(i) for i, label in names.items()}}
        return fields

    def class_for(self, config: Config) -> str | None:
        """The class that has the config's head, or None."""

        def fits(chosen: Class) -> bool:
            if chosen.optional and config.head == "none":
                return True
            return chosen.head == config.head and all(getattr(config, n) == v for n, v in chosen.config.items())

        return next((name for name, chosen in self.classes.items() if fits(chosen)), None)


def num_labels(values: Mapping[str, Any]) -> int:
    """How many labels a config.json names; transformers' default is 2."""
    return len(values["id2label"]) if values.get("id2label") else int(values.get("num_labels") or 2)


def differences(one: Config, other: Config) -> list[str]:
    """The fields in which two configs compute something else."""
    names = [field.name for field in dataclasses.fields(Config) if field.name not in HOW]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def layer_pattern(kinds: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """The shortest pattern that, repeated over the layers, gives these kinds: Config.layer_pattern."""
    kinds = tuple(kinds)
    fits = lambda n: all(kind == kinds[i % n] for i, kind in enumerate(kinds))  # noqa: E731
    return kinds[: next((n for n in range(1, len(kinds)) if fits(n)), len(kinds))]
