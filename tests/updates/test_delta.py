"""A difference gives back the newer file, and is nearly empty where learning only appended."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

from cdl_edge.artefacts.external import Record
from cdl_edge.errors import InputError
from cdl_edge.packing import pack
from cdl_edge.updates.delta import apply, by_location, difference


def packed(**arrays: np.ndarray) -> tuple[bytes, list[Record]]:
    content, where = pack(arrays)
    return content, [Record(n, "prompts.bin", *where[n], a.shape, str(a.dtype)) for n, a in arrays.items()]


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_tensor_that_grew_costs_what_is_new(axis):
    whole = random(200, 200)
    old = whole[:180] if axis == 0 else np.ascontiguousarray(whole[:, :180])
    (before, records), (after, newer) = packed(head=old, key=random(3)), packed(head=whole, key=random(3))
    delta = difference(before, after, records, newer)
    assert apply(before, delta, records, newer) == after
    assert len(zlib.compress(delta, 9)) < 0.13 * len(after)


def test_any_change_comes_back():
    before, records = packed(a=random(5, 4), b=random(7), gone=random(9), kind=np.arange(6, dtype=np.int8))
    after, newer = packed(
        a=random(4, 6), b=random(7) + 1, new=random(2, 2), kind=random(6), scalar=np.float32(3).reshape(())
    )
    delta = difference(before, after, records, newer)
    assert apply(before, delta, records, newer) == after
    assert apply(before, difference(before, before, records, records), records, records) == before


@pytest.mark.parametrize(
    "lie",
    [{"offset": 200}, {"offset": -64}, {"length": 4096}, {"dims": (4, 5)}, {"dims": (-5, -4)}, {"dims": (1,) * 40}],
)
def test_records_that_lie_read_nothing_beyond_the_file(lie):
    content, records = packed(a=random(5, 5))
    wrong = [Record(**{**vars(records[0]), **lie})]
    with pytest.raises(InputError, match="does not fit"):
        difference(content, content, records, wrong)
    if len(wrong[0].dims) == 2:  # of another rank it is not read
        with pytest.raises(InputError, match="does not fit"):
            difference(content, content, wrong, records)


def test_the_graphs_of_a_bundle_share_their_constants():
    _, records = packed(a=random(5, 5), b=random(2))
    assert by_location([*records, *records]) == {"prompts.bin": records}
