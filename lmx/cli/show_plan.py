"""How the result of `lmx plan` looks on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from lmx.train.progress import PLAIN, si

PARTS = ("parameters", "optimizer", "cache", "inputs", "temporaries", "program")


def plan(result: dict[str, Any], console: Console) -> None:
    """What `lmx plan` ends with."""
    r = result
    decoding, rows = r["mode"] == "decode", r["batch_size"]
    what = f"decoding {rows} rows" if decoding else f"{rows} rows a step, {r['optimizer']}"
    console.print(
        f"{r['model']}: {r['parameters']:,} parameters, {what}, {r['length']} tokens a row, {r['compute_dtype']}, "
        f"{r['attention']} attention, on {r['topology']} ({r['devices']} devices)",
        **PLAIN,
    )
    if r["mode"] == "search":
        _ranking(r, console)
    else:
        _case(r, console)
    if r["mode"] == "decode":
        p = r["prefill"]
        console.print(f"\nthe prefill {_verdict(p)}: temporaries {_gib(p['memory']['temporaries'])}", **PLAIN)
        _collectives(p["collectives"], console)
    if r.get("advice"):
        _advice(r["advice"], r, console)
    console.print("\nassumed:", **PLAIN)
    for line in r["assumptions"]:
        console.print(f"  {line}", **PLAIN)
    console.print("figures of the chip from:", **PLAIN)
    documents: dict[str, list[str]] = {}
    for figure, document in r["chip"]["sources"].items():
        documents.setdefault(document, []).append(figure)
    for document, figures in documents.items():
        console.print(f"  {', '.join(figures)}: {document}", **PLAIN)
    console.print(f"\ncompiled in {r['compile_cpu_seconds']:.0f} seconds of CPU; no figure was measured.", **PLAIN)


def _case(row: dict[str, Any], console: Console) -> None:
    console.print(f"\n{_name(row)}: {_verdict(row)}", **PLAIN)
    m = row["memory"]
    parts = ", ".join(f"{name} {_gib(m[name])}" for name in PARTS if m[name])
    most = "at most " if row["memory_is_upper_bound"] else ""
    console.print(f"  a device: {parts}; peak {most}{_gib(m['peak'])} of {_gib(m['available'])}", **PLAIN)
    _collectives(row["collectives"], console)
    _time(row, console)


def _collectives(found: list[dict[str, Any]] | None, console: Console) -> None:
    if found is None:
        return
    if not found:
        console.print("  collectives a step: none", **PLAIN)
        return
    console.print("  collectives a step        count        bytes   sent a device", **PLAIN)
    for one in found:
        more = "" if one["counted"] else "  (some in loops of unknown length, counted once)"
        size, sent = si(one["bytes"]) + "B", si(one["sent"]) + "B"
        console.print(f"    {one['kind']:<20} {one['count']:>8} {size:>12} {sent:>15}{more}", **PLAIN)


def _time(row: dict[str, Any], console: Console) -> None:
    line, flops = row["roofline"], row["flops"]
    console.print(f"  a step: {si(flops['model'])}FLOPs of the model, {si(flops['executed'])}FLOPs executed", **PLAIN)
    if line is None:
        return
    console.print(
        f"  a step takes at least {_s(line['step'])}, bound by {line['bound']} (compute {_s(line['compute'])}, memory "
        f"{_s(line['memory'])}, interconnect {_s(line['interconnect'])}; {_s(line['without_overlap'])} without "
        f"overlap): at most {si(line['tokens_per_second'])}tokens/s, MFU {line['mfu']:.1%}",
        **PLAIN,
    )


def _ranking(result: dict[str, Any], console: Console) -> None:
    r = result
    console.print(
        f"\n{r['considered']} cases, {r['excluded']} excluded by arithmetic, {len(r['ranked'])} compiled:", **PLAIN
    )
    header = ("mesh", "remat", "peak", "fits", "step", "bound by", "MFU")
    rows = [header]
    for row in r["ranked"]:
        line = row["roofline"]
        times = ("-", "-", "-") if line is None else (_s(line["step"]), line["bound"], f"{line['mfu']:.1%}")
        rows.append((row["mesh"], row["remat"], _gib(row["memory"]["peak"]), "yes" if row["fits"] else "no", *times))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        console.print("  " + "  ".join(cells).rstrip(), **PLAIN)
    if r["fits"]:
        _case(r | r["ranked"][0], console)
    else:
        console.print(_least(r["least_devices"], r), **PLAIN)


def _advice(advice: dict[str, Any], result: dict[str, Any], console: Console) -> None:
    for row in advice["tried"]:
        console.print(f"\ntried {_name(row)}: {_verdict(row)}", **PLAIN)
    if advice["found"]:
        row = advice["found"]
        more = f" --accumulate {row['accumulate']}" if row["accumulate"] > 1 else ""
        console.print(f"to make it fit: --mesh {row['mesh']} --remat {row['remat']}{more}", **PLAIN)
        _time(row, console)
    else:
        console.print(_least(advice["least_devices"], result), **PLAIN)


def _least(count: int, result: dict[str, Any]) -> str:
    return (
        f"\nnothing that was tried fits. Parameters, optimizer state and gradients alone fill {count} such device"
        f"{'s' if count > 1 else ''} (there are {result['devices']}); activations come on top: use more devices, a "
        "smaller batch_size or length, or another optimizer"
    )


def _name(row: dict[str, Any]) -> str:
    more = f", accumulate {row['accumulate']}" if row["accumulate"] > 1 else ""
    return f"{row['mesh']}, remat {row['remat']}{more}"


def _verdict(row: dict[str, Any]) -> str:
    spare = row["memory"]["spare"]
    return f"fits, {_gib(spare)} to spare" if row["fits"] else f"does not fit, {_gib(-spare)} too much"


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
