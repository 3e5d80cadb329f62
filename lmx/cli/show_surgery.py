"""How `lmx fold`, `lmx lora` and `lmx prune` show what they did."""

from __future__ import annotations

from typing import Any

from rich.console import Console

PLAIN = dict(markup=False, highlight=False, soft_wrap=True)


def _written(result: dict[str, Any]) -> str:
    size = f"{result['parameters'] / 1e6:.2f} M parameters, " if "parameters" in result else ""
    return f"{result['output']}: {size}in {result['seconds']:.1f} s; {', '.join(result['files'])}"


def folding(result: dict[str, Any], console: Console) -> None:
    """What `lmx fold` ends with."""
    for path in result["folded"]:
        console.print(f"folded  {path}", **PLAIN)
    for path, reason in result["kept"].items():
        console.print(f"kept    {path}: {reason}", **PLAIN)
    console.print(_written(result), **PLAIN)


def adapters(result: dict[str, Any], console: Console) -> None:
    """What the commands of `lmx lora` end with."""
    ranks = ", ".join(map(str, result["ranks"]))
    console.print(
        f"{result['adapters']} matrices with an adapter, of rank {ranks}: {result['trainable']:,} numbers", **PLAIN
    )
    console.print(_written(result), **PLAIN)


def pruning(result: dict[str, Any], console: Console) -> None:
    """What `lmx prune` ends with."""
    for tower, layers in result["dropped_layers"].items():
        console.print(f"dropped layers of the {tower}: {', '.join(map(str, layers))}", **PLAIN)
    for name, (before, after) in result["changed"].items():
        console.print(f"{name}: {before} -> {after}", **PLAIN)
    share = result["parameters"] / result["parameters_before"]
    console.print(f"{share:.1%} of the parameters are left. {_written(result)}", **PLAIN)
