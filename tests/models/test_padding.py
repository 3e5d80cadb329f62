"""Few lengths, little padding, and nothing lost."""

from __future__ import annotations

import numpy as np
import pytest

from lmx.models.padding import pad, padded_length


def test_the_lengths_of_the_docstring():
    known = {0: 8, 1: 8, 8: 8, 9: 16, 64: 64, 65: 80, 80: 80, 97: 112, 128: 128, 129: 160}
    assert {n: padded_length(n) for n in known} == known


@pytest.mark.parametrize("least", [8, 32])
def test_lengths_are_few_and_close(least):
    lengths = np.arange(1, 64 * least + 1)
    padded = np.array([padded_length(int(n), least) for n in lengths])
    assert (padded >= lengths).all() and (np.diff(padded) >= 0).all() and len(set(padded.tolist())) == 20
    assert (padded % least == 0).all() and (padded - lengths < least)[lengths <= 8 * least].all()
    assert ((padded - lengths) / padded)[lengths > 8 * least].max() < 1 / 5


def test_rows_stand_on_the_left_and_above():
    made = pad([[1, 2, 3], np.array([4])], 4, 3)
    np.testing.assert_array_equal(made, [[1, 2, 3, 0], [4, 0, 0, 0], [0, 0, 0, 0]])
    assert made.dtype == np.int32 and pad([[1], [2]], 2).shape == (2, 2)
    with pytest.raises(ValueError, match="broadcast"):
        pad([[1, 2, 3]], 2)
