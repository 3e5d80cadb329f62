"""Reading a compiled program's text: which collectives it runs, how often in a step, and how many bytes they move.

XLA's own totals take the body of a loop once. Here what stands in a loop counts as often as the loop runs, where that
can be read: from the compiler's annotation, or from a condition that compares a counter with a constant.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip
BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
}  # fmt: skip
_SCATTERING = "all-reduce-scatter"  # what the TPU compiler calls a fusion that sums, and leaves each device a slice
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a program."""

    kind: str
    count: int  # how often it runs in one run of the program
    bytes: int  # of the whole array a time: what is gathered, reduced or exchanged
    group: tuple[int, ...]  # devices of the first group, as positions in the mesh
    counted: bool = True  # False: it stands in a loop whose length cannot be read, and is counted once

    @property
    def wire(self) -> float:
        """Bytes that each device sends a time, by a ring (Chan et al. 2007, "Collective communication", table 2)."""
        n = len(self.group)
        part = 1.0 if self.kind in ("collective-permute", "collective-broadcast") else (n - 1) / max(n, 1)
        return self.bytes * part * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes
    root: bool = False  # what its computation returns

    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest[: _closing(self.rest)])

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found.group(1) if found else None


def collectives(text: str) -> list[Collective]:
    """Every collective that the program runs, from the text of a compiled program (`compiled.as_text()`).

    Pieces that the TPU compiler has cut one collective into are one, and an all-reduce in one of its fusions that leave
    each device a slice is a reduce-scatter; both branches of a condition count.
    """
    computations, entry = _parse(text)
    devices = int(found.group(1)) if (found := re.search(r"num_partitions=(\d+)", text)) else 1
    result: list[Collective] = []

    def walk(name: str, times: int, counted: bool, seen: set, fused: bool) -> None:
        for i in computations.get(name, ()):
            kind = i.opcode.removesuffix("-start")
            if kind == "all-reduce" and name.startswith(_SCATTERING):
                kind = "reduce-scatter"
            if kind in KINDS:
                one = _collective(i, kind, times, counted, devices)
                channel = i.attribute("channel_id")
                key = (one.kind, channel) if fused and channel else (name, i.name)
                if key not in seen:
                    seen.add(key)
                    result.append(one)
            elif i.opcode == "while":
                trips = _trips(i, computations, name)
                walk(i.attribute("body"), times * (trips or 1), counted and trips is not None, set(), False)
            elif i.opcode == "fusion":
                walk(i.attribute("calls"), times, counted, seen, True)
            elif i.opcode in ("call", "async-start", "conditional"):
                for called in _called(i.rest):
                    walk(called, times, counted, seen if i.opcode == "async-start" else set(), fused)

    walk(entry, 1, True, set(), False)
    return result


def nbytes(shape: str) -> int:
    """Bytes of a shape as HLO writes it; of a tuple, of all its arrays."""
    total = 0.0
    for kind, sizes in _ARRAY.findall(re.sub(r"\{[^{}]*\}", "", shape)):
        width = BYTES.get(kind, 1 if kind.startswith("f8") else 0)
        total += width * math.prod(int(n) for n in sizes.split(",") if n)
    return int(total)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """(instructions of every computation, the entry's name)."""
    computations: dict[str, list[_Instruction]] = {}
    current, entry = None, ""
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            current = computations.setdefault(header.group(2), [])
            entry = header.group(2) if header.group(1) else entry
        elif line == "}" or line.startswith("}, execution_thread="):  # a kernel's attributes begin lines with }} too
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            root, *parts = found.groups()
            current.append(_Instruction(*parts, root=root is not None))
    return computations, entry


def _closing(text: str) -> int:
    """Where the parenthesis that is open at the beginning of the text closes."""
    depth = 1
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return position
    return len(text)


def _called(rest: str) -> list[str]:
    found = re.findall(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)", rest)
    for several in re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", rest):
        found += re.findall(r"[\w.\-]+", several)
    return found


def _collective(i: _Instruction, kind: str, times: int, counted: bool, devices: int) -> Collective:
    group = _group(i.rest, devices)
    size = nbytes(i.shape)
    if i.opcode in ("all-gather-start", "reduce-scatter-start"):  # (operands, results), one n times the other
        size = size * len(group) // (len(group) + 1)
    elif i.opcode == "collective-permute-start":  # (operand, result, contexts)
        size = size // 2
    elif i.opcode == "reduce-scatter":
        size = size * len(group)
    return Collective(kind, times, size, group, counted)


def _group(rest: str, devices: int) -> tuple[int, ...]:
    """The first group of devices, in any of the ways that HLO writes groups."""
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return tuple(map(int, found.groups()))
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(map(int, found.group(1).split(",")))
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return tuple(_iota(found.group(2)).reshape(_numbers(found.group(1)))[0].tolist())
    pattern = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\[[\d,]+\](?:T\([\d,]+\))?)\))? \{([^}]*)\}"
    if found := re.search(pattern, rest):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found.group(1))}
        ids = _iota(found.group(2)) if found.group(2) else np.arange(math.prod(axes.values()))
        grouped = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found.group(3))
        return _of_mesh(ids.reshape(tuple(axes.values())), list(axes), grouped)
    return tuple(range(devices))


def _of_mesh(ids: np.ndarray, axes: list[str], grouped: list[tuple[str, str, str]]) -> tuple[int, ...]:
    """The devices that differ from the first only along the named axes; `'a':(m)n` is n parts after m of axis a."""
    chosen = [np.array([0]) for _ in axes]
    for name, before, size in grouped:
        place = axes.index(name)
        whole = ids.shape[place]
        before, size = (int(before), int(size)) if size else (1, whole)
        chosen[place] = np.arange(size) * (whole // (before * size))
    return tuple(ids[np.ix_(*chosen)].reshape(-1).tolist())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _iota(text: str) -> np.ndarray:
    """`[8,2]T(1,0)`: the numbers from 0 in that shape, transposed."""
    sizes, _, order = text.strip("()").partition("]T(")
    shape = _numbers(sizes.strip("[]"))
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order.rstrip(")"))) if order else ids


def _trips(loop: _Instruction, computations: dict[str, list[_Instruction]], caller: str) -> int | None:
    """How often a while loop runs, or None where that cannot be read."""
    if found := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(found.group(1))
    condition = {i.name: i for i in computations.get(loop.attribute("condition"), ())}
    compare = next((i for i in condition.values() if i.opcode == "compare" and "direction=LT" in i.rest), None)
    if compare is None or len(compare.operands()) != 2:
        return None
    counter, limit = (_origin(name, condition) for name in compare.operands())
    bound = _constant(limit)
    if bound is None or counter is None or counter.opcode != "get-tuple-element":
        return None
    index = counter.attribute("index")
    outer = {i.name: i for i in computations.get(caller, ())}
    begin = _element(outer.get(loop.operands()[0]), int(index), outer)
    body = {i.name: i for i in computations.get(loop.attribute("body"), ())}
    root = next((i for i in body.values() if i.root), None)
    step = _element(root, int(index), body)
    added = [] if step is None or step.opcode != "add" else [_constant(_origin(o, body)) for o in step.operands()]
    first, by = _constant(begin), next((n for n in added if n is not None), 0)
    return None if first is None or by <= 0 else max(0, -(-(bound - first) // by))


def _origin(name: str, among: dict[str, _Instruction]) -> _Instruction | None:
    """The instruction of that name, seen through copies."""
    found = among.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "convert") and found.operands():
        found = among.get(found.operands()[0])
    return found


def _element(made: _Instruction | None, index: int, among: dict[str, _Instruction]) -> _Instruction | None:
    if made is None or made.opcode != "tuple" or index >= len(made.operands()):
        return None
    return _origin(made.operands()[index], among)


def _constant(i: _Instruction | None) -> int | None:
    if i is None or i.opcode != "constant":
        return None
    found = re.match(r"(-?\d+)\)", i.rest)
    return int(found.group(1)) if found else None
