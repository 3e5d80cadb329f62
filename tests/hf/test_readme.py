"""The README's table of families is what the registry says."""

from __future__ import annotations

from pathlib import Path

from lmx.hf.families import FAMILIES
from lmx.hf.family import Family

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- families -->\n", "<!-- /families -->"
COLUMNS = {
    "text": ("lm",), "sequences": ("sequence",), "tokens": ("tokens",), "spans": ("spans",), "body": ("none", "pooled"),
}  # fmt: skip


def row(name: str, family: Family) -> str:
    cells, kinds = [], set()
    for heads in COLUMNS.values():
        found = [c for c, chosen in family.classes.items() if chosen.head in heads]
        kinds |= {family.config({}, c).architecture for c in found}
        cells.append("yes" if found else "")
    kind = ", ".join(sorted(kind.replace("_", "-") for kind in kinds))
    return f"| `{name}` | {kind} | " + " | ".join(cells) + " |"


def test_the_table_of_families():
    head = f"| `model_type` | kind | {' | '.join(COLUMNS)} |\n|---|---|{'---|' * len(COLUMNS)}\n"
    wanted = head + "\n".join(row(name, family) for name, family in FAMILIES.items()) + "\n"
    found = README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    assert found == wanted, f"the README's table of families should be:\n{wanted}"
