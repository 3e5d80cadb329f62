"""How `lmx fold` shows what it did."""

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
