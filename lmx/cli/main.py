"""`lmx train`, `lmx eval`, `lmx generate`, `lmx describe`, `lmx convert`, `lmx factorize`, `lmx compare`, `lmx fold`,
`lmx lora`, `lmx prune`, `lmx plan`.

With --json the result is one JSON object on the last line of stdout and everything else goes to stderr. Exit codes:
0 done, or stopped on request and saved; 2 a mistake in what was given (told without a traceback); 75 another process of
the run was lost (start all again with --resume); 130 interrupted. Of several processes, process 0 prints.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console

from lmx.cli import show, show_plan, show_surgery
from lmx.cli.parse import named, parse
from lmx.core.errors import LmxError, ending
from lmx.recipes import (
    compare,
    convert,
    describe,
    evaluate,
    factorize,
    fold,
    generate,
    lora,
    plan,
    prune,
    supervise,
    train,
)
from lmx.recipes.compare import CompareOptions
from lmx.recipes.convert import ConvertOptions
from lmx.recipes.describe import DescribeOptions
from lmx.recipes.evaluate import EvalOptions
from lmx.recipes.factorize import FactorizeOptions
from lmx.recipes.fold import FoldOptions
from lmx.recipes.generate import GenerateOptions
from lmx.recipes.lora import AttachOptions, ExtractOptions, MergeOptions, RerankOptions
from lmx.recipes.options import DEFAULTS, PRESETS, TrainOptions
from lmx.recipes.plan import PlanOptions
from lmx.recipes.prune import PruneOptions
from lmx.recipes.supervise import SuperviseOptions
from lmx.train import interrupt, processes
from lmx.train.processes import ProcessOptions
from lmx.train.progress import PLAIN

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]


@dataclasses.dataclass(frozen=True)
class Printed:
    """What every command can be told about its result."""

    json: bool = False
    """Print the result as one JSON object on the last line of stdout; all else goes to stderr."""


@dataclasses.dataclass(frozen=True)
class Train(Printed, SuperviseOptions, ProcessOptions, TrainOptions):
    __doc__ = TrainOptions.__doc__


@dataclasses.dataclass(frozen=True)
class Eval(Printed, ProcessOptions, EvalOptions):
    __doc__ = EvalOptions.__doc__

    model: Model
    """The folder of a run or a model."""


@dataclasses.dataclass(frozen=True)
class Generate(Printed, GenerateOptions):
    __doc__ = GenerateOptions.__doc__

    model: Model
    """The folder of a run or a model."""


@dataclasses.dataclass(frozen=True)
class Describe(Printed, DescribeOptions):
    __doc__ = DescribeOptions.__doc__

    model: Model
    """The folder of a run or a model, or the name of a preset such as llama-7b."""


@dataclasses.dataclass(frozen=True)
class Convert(Printed, ConvertOptions):
    __doc__ = ConvertOptions.__doc__

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The folder of a run, a model or a checkpoint, of lmx or of Hugging Face, or the name of a model of the hub."""
    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")]
    """The folder to write."""


@dataclasses.dataclass(frozen=True)
class Factorize(Printed, FactorizeOptions):
    __doc__ = FactorizeOptions.__doc__

    model: Model
    """The folder of a run or a model, or the name of a model of the hub."""


@dataclasses.dataclass(frozen=True)
class Compare(Printed, CompareOptions):
    __doc__ = CompareOptions.__doc__


@dataclasses.dataclass(frozen=True)
class Fold(Printed, FoldOptions):
    __doc__ = FoldOptions.__doc__

    model: Model
    """The folder of a run or a model."""


@dataclasses.dataclass(frozen=True)
class LoraAttach(Printed, AttachOptions):
    __doc__ = AttachOptions.__doc__

    model: Model
    """The folder of a run or a model, or the name of a model of the hub."""


@dataclasses.dataclass(frozen=True)
class LoraMerge(Printed, MergeOptions):
    __doc__ = MergeOptions.__doc__

    model: Model
    """The folder of a run or a model, or the name of a model of the hub."""


@dataclasses.dataclass(frozen=True)
class LoraExtract(Printed, ExtractOptions):
    __doc__ = ExtractOptions.__doc__

    model: Model
    """The folder of the tuned model."""


@dataclasses.dataclass(frozen=True)
class LoraRerank(Printed, RerankOptions):
    __doc__ = RerankOptions.__doc__

    model: Model
    """The folder of a model with adapters, or of the base of --adapter."""


@dataclasses.dataclass(frozen=True)
class Prune(Printed, PruneOptions):
    __doc__ = PruneOptions.__doc__

    model: Model
    """The folder of a run or a model, or the name of a model of the hub."""


@dataclasses.dataclass(frozen=True)
class Plan(Printed, PlanOptions):
    __doc__ = PlanOptions.__doc__

    model: Model
    """The folder of a run or a model, or the name of a preset such as llama-8b."""


def _train(options: Train, console: Console) -> dict[str, Any] | None:
    supervise.check(options, options)
    if options.supervise:
        sys.exit(supervise.run(options, options, options, json=options.json))
    with processes.joined(options):
        result = train.run(options, console, supervise.started_by(options, options))
        first = processes.leads()
        if "stopped" in result:  # by a request that may reach another process first, and this one only now
            interrupt.ignore_sigterm()
    if first and "stopped" not in result:
        show.training(result, console)
    return result if first else None


def _eval(options: Eval, console: Console) -> dict[str, Any] | None:
    with processes.joined(options):
        result, first = evaluate.run(options, console), processes.leads()
    if first:
        show.evaluation(result, console)
    return result if first else None


def _generate(options: Generate, console: Console) -> dict[str, Any]:
    piece = lambda text: console.out(text, end="", highlight=False)  # noqa: E731
    result = generate.run(options, None if options.json else piece)
    if not options.json:
        console.out("")
    return result


def _describe(options: Describe, console: Console) -> dict[str, Any]:
    result = describe.run(options)
    show.description(result, console)
    return result


def _convert(options: Convert, console: Console) -> dict[str, Any]:
    result = convert.run(options)
    show.conversion(result, console)
    return result


def _factorize(options: Factorize, console: Console) -> dict[str, Any]:
    result = factorize.run(options, console)
    show_surgery.factorizing(result, console)
    return result


def _compare(options: Compare, console: Console) -> dict[str, Any]:
    result = compare.run(options, console)
    show_surgery.comparing(result, console)
    return result


def _fold(options: Fold, console: Console) -> dict[str, Any]:
    result = fold.run(options)
    show_surgery.folding(result, console)
    return result


def _attach(options: LoraAttach, console: Console) -> dict[str, Any]:
    result = lora.attach(options, console)
    show_surgery.adapters(result, console)
    return result


def _merge(options: LoraMerge, console: Console) -> dict[str, Any]:
    result = lora.merge(options)
    show_surgery.adapters(result, console)
    return result


def _extract(options: LoraExtract, console: Console) -> dict[str, Any]:
    result = lora.extract(options)
    show_surgery.adapters(result, console)
    return result


def _rerank(options: LoraRerank, console: Console) -> dict[str, Any]:
    result = lora.rerank(options, console)
    show_surgery.adapters(result, console)
    return result


def _prune(options: Prune, console: Console) -> dict[str, Any]:
    result = prune.run(options, console)
    show_surgery.pruning(result, console)
    return result


def _plan(options: Plan, console: Console) -> dict[str, Any]:
    plan.need_no_device()
    result = plan.run(options, Console(stderr=True))
    show_plan.plan(result, console)
    return result


COMMANDS: dict[str, tuple[type, Callable[[Any, Console], dict[str, Any] | None]]] = {
    "train": (Train, _train),
    "eval": (Eval, _eval),
    "generate": (Generate, _generate),
    "describe": (Describe, _describe),
    "convert": (Convert, _convert),
    "factorize": (Factorize, _factorize),
    "compare": (Compare, _compare),
    "fold": (Fold, _fold),
    "lora attach": (LoraAttach, _attach),
    "lora merge": (LoraMerge, _merge),
    "lora extract": (LoraExtract, _extract),
    "lora rerank": (LoraRerank, _rerank),
    "prune": (Prune, _prune),
    "plan": (Plan, _plan),
}


def _train_defaults(arguments: Sequence[str]) -> dict[str, Any]:
    """What the preset fills in, for the help to show; otherwise nothing, so that what was given can be told."""
    if not {"-h", "--help"} & set(arguments):
        return {}
    words = " ".join(arguments).replace("--preset=", "--preset ").split()
    name = next((after for word, after in zip(words, words[1:], strict=False) if word == "--preset"), "quick")
    return DEFAULTS | PRESETS.get(name, {})


def main(arguments: Sequence[str] | None = None) -> None:
    """The console entry point; exits with the code that the module's docstring names."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    kinds = {name: kind for name, (kind, _) in COMMANDS.items()}
    try:
        options = parse(arguments, kinds, {Train: _train_defaults(arguments)})
        result = COMMANDS[named(arguments, COMMANDS)[0]][1](options, Console(stderr=options.json))
    except (LmxError, KeyboardInterrupt) as error:
        code, words = ending(error)
        Console(stderr=True).print(words, **PLAIN)
        sys.exit(code)
    if options.json and result is not None:
        print(json.dumps(result), flush=True)
