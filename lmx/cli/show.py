"""How results look on a terminal."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Console
from rich.table import Table

from lmx.train.progress import PLAIN, si

NEXT = {  # commands to try after a training, by its objective
    "causal": (
        'generate {out} --prompt "def "', "eval {out} --data some/text.txt --split all",
        "train --data some/folder --output runs/mine",
    ),
    "masked": (),
    "spans": ("train --objective pairs --data SOURCE,TARGET --init {out} --output runs/mine",),
    "pairs": ('generate {out} --num-beams 4 --prompt "..."',),
    "chat": ('generate {out} --chat --prompt "..."',),
}  # fmt: skip
COLUMNS = ("part", "kind", "shape", "dtype", "parameters")  # of a part of a model


def bits_table(rows: dict[str, dict[str, float]], console: Console) -> None:
    """Bits per byte, a column a domain, a row a model or reference."""
    domains = list(next(iter(rows.values())))
    table = Table("bits per byte", *domains, box=None, header_style="bold")
    for name, bits in rows.items():
        table.add_row(name, *(f"{bits[domain]:.3f}" for domain in domains))
    console.print(table)


def training(result: dict[str, Any], console: Console) -> None:
    """What `lmx train` ends with."""
    causal, out = result["objective"] == "causal", shlex.quote(result["output"])
    console.print("\nOn the test split:")
    if causal:
        bits_table({"this model": result["bits_per_byte"], **result["references"]}, console)
        console.print("\nA sample:\n")
        console.out(result["sample"], highlight=False)
    else:
        console.print(
            f"{result['loss']:.3f} nats, perplexity {result['perplexity']:.2f}, over the {result['targets']}", **PLAIN
        )
    speed = f", trained at {si(result['tokens_per_second'])}tokens/s" if result["tokens_per_second"] else ""
    console.print(
        f"\n{result['parameters'] / 1e6:.2f} M parameters{speed}. In {out}: model/, {'unigram/, ' if causal else ''}"
        "loss.png, metrics.jsonl, result.json, checkpoints/, data/.\n\nTry next:\n"
        + "".join(f"  lmx {words}\n" for words in NEXT[result["objective"]]).format(out=out)
        + f"  lmx describe {out}",
        **PLAIN,
    )


def evaluation(result: dict[str, Any], console: Console) -> None:
    """What `lmx eval` ends with."""
    bits_table({"this model": result["bits_per_byte"], **result["references"]}, console)
    console.print(
        f"{result['tokens']} tokens, {result['bytes']} bytes, in windows of {result['length']}; "
        f"{result['nats_per_token']:.3f} nats a token, perplexity {result['perplexity']:.1f}",
        highlight=False,
        soft_wrap=True,
    )


def description(result: dict[str, Any], console: Console) -> None:
    """What `lmx describe` shows."""
    rows = [COLUMNS]
    for part in result["parts"]:
        shape = " x ".join(map(str, part["shape"]))
        rows.append((part["path"], part["kind"], shape, part["dtype"], f"{part['parameters']:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # not rich's table, which cuts paths short where there is no room
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        console.print("  ".join(cells).rstrip(), highlight=False, markup=False, soft_wrap=True)
    r = result
    console.print(
        f"\n{r['parameters']:,} parameters, {si(r['bytes'])}bytes. A token at length {r['length']}: "
        f"{si(r['forward_flops'])}FLOPs forward, {si(r['train_flops'])}FLOPs to train; decoding one reads "
        f"{si(r['decode_bytes'])}bytes ({si(r['cache_bytes'])}bytes of them the cache).",
        highlight=False,
        soft_wrap=True,
    )


def conversion(result: dict[str, Any], console: Console) -> None:
    """What `lmx convert` ends with."""
    console.print(
        f"{result['target']}: {result['parameters'] / 1e6:.2f} M parameters, {result['bytes'] / 1e6:.1f} MB, in "
        f"{result['seconds']:.1f} s; {', '.join(result['files'])}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
