"""How `lmx factorize`, `lmx compare`, `lmx fold`, `lmx lora` and `lmx prune` show what they did."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

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


def factorizing(result: dict[str, Any], console: Console) -> None:
    """What `lmx factorize` ends with."""
    ranks = [rank for rank in result["ranks"].values() if rank is not None]
    dense = len(result["ranks"]) - len(ranks)
    spread = f"of rank {min(ranks)} to {max(ranks)}" if ranks else "factorized"
    console.print(f"{len(ranks)} matrices {spread}, {dense} left dense: {result['kept']:.1%} of their size", **PLAIN)
    if "kl" in result:
        console.print(
            f"perplexity {result['perplexity_before']:.2f} -> {result['perplexity']:.2f} on held-out text, "
            f"{result['kl']:.4f} nats a token (KL) from the original",
            **PLAIN,
        )
    share = result["parameters"] / result["parameters_before"]
    console.print(f"{share:.1%} of the parameters are left. {_written(result)}", **PLAIN)
    if result["format"] == "hf":
        console.print(
            "Hugging Face's format has no such matrices: the quality travels, the size does not", **PLAIN
        )


def comparing(result: dict[str, Any], console: Console) -> None:
    """What `lmx compare` ends with: the table."""
    heads = ("method", "kept", "perpl.", "bits/B", "KL", "param.", "MB", "MFLOP", "prefill", "decode", "s")
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for head in heads:
        table.add_column(head, no_wrap=True, justify="left" if head == "method" else "right")
    for row in result["rows"]:
        table.add_row(
            row["method"], "" if row["keep"] is None else f"{row['keep']:.0%}", f"{row['perplexity']:.2f}",
            f"{row['bits_per_byte']:.3f}", f"{row['kl']:.4f}", f"{row['parameters'] / 1e6:.2f}M",
            f"{row['bytes'] / 1e6:.2f}", f"{row['flops_per_token'] / 1e6:.2f}",
            *(f"{row[f'{phase}_tokens_per_second']:.0f}" for phase in ("prefill", "decode")), f"{row['seconds']:.1f}",
        )  # fmt: skip
    console.print(table)
    console.print("KL: nats a token from the original; MFLOP: a token; prefill, decode: tokens/s; s: to make", **PLAIN)
    rows = "one row" if result["batch"] == 1 else f"{result['batch']} rows"
    for phase, doing in (("prefill", "reading"), ("decode", "decoding")):
        speed = f"{phase}_tokens_per_second"
        slower = [_named(row) for row in result["rows"] if row[speed] < result["rows"][0][speed]]
        if slower:
            console.print(f"slower than the original at {doing} {rows} here: {', '.join(slower)}", **PLAIN)
    console.print(f"In {result['output']}: {', '.join(result['files'])}; {result['seconds']:.0f} s", **PLAIN)


def _named(row: dict[str, Any]) -> str:
    return row["method"] if row["keep"] is None else f"{row['method']} at {row['keep']:.0%}"
