"""The mesh of a run on other devices than those it began on."""

from __future__ import annotations

import pytest

from lmx.core.errors import ConfigError
from lmx.recipes.meshes import fit_mesh


@pytest.mark.parametrize(
    ("text", "rows", "devices", "processes", "wanted"),
    [
        (None, 8, 1, 1, None),
        (None, 6, 8, 1, "fsdp=8"),  # one process: rows that do not divide are kept whole, which is reported
        (None, 8, 4, 2, "fsdp=4"),
        ("fsdp=2,tensor=2", 8, 4, 2, "fsdp=2,tensor=2"),  # as many devices as it began with
        ("fsdp=4,tensor=2", 8, 4, 2, "fsdp=2,tensor=2"),
        ("data=2,fsdp=2", 8, 8, 4, "data=2,fsdp=4"),
        ("data=4,fsdp=2", 8, 2, 1, "fsdp=2"),
        ("fsdp=4", 8, 1, 1, None),
    ],
)
def test_the_mesh_follows_the_devices(text, rows, devices, processes, wanted):
    assert fit_mesh(text, rows, devices, processes) == wanted


def test_what_was_asked_for_now_is_taken_as_it_is():
    assert fit_mesh("fsdp=2", 8, 6, 3, asked=True) == "fsdp=2"


@pytest.mark.parametrize(
    ("text", "rows", "devices", "processes", "nearest"),
    [
        (None, 8, 6, 3, r"6 devices of 3 processes; the nearest that do are 2 processes \(4 devices\) and 4 processes"),
        ("fsdp=8", 8, 6, 3, "the nearest that do are 2 processes"),
        ("fsdp=4,tensor=2", 4, 6, 1, "tensor=2 apart, do not divide over 6 devices of 1 process; the near.* 4 .* 8"),
    ],
)
def test_rows_that_do_not_divide_are_refused_with_what_would(text, rows, devices, processes, nearest):
    with pytest.raises(ConfigError, match=nearest):
        fit_mesh(text, rows, devices, processes)
