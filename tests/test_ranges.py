"""Histograms that merge exactly, and the file of ranges."""

import subprocess
import sys

import numpy as np
import pytest

from cdl_edge.errors import InputError
from cdl_edge.ranges import (
    BINS,
    CARRIED,
    TAILS,
    Histogram,
    Ranges,
    TaskRanges,
    TensorRange,
    drift,
    merge,
    merge_tensors,
    tails,
)

RNG = np.random.default_rng(0)
DATA = {
    "normal": RNG.standard_normal(4000),
    "gelu": np.maximum(RNG.standard_normal(4000) * 3, -0.17),
    "far from zero": 1000 + RNG.random(500),
    "outlier": np.append(RNG.standard_normal(500) * 1e-3, 700.0),
    "negative": -RNG.random(300),
    "zeros": np.zeros(10),
    "one value": np.full(7, -3.7),
    "edges": np.arange(-64, 65) / 64,
    "large": RNG.standard_normal(50) * 1e6,
    "tiny": RNG.standard_normal(50) * 1e-30,
}
DATA = {name: values.astype(np.float32) for name, values in DATA.items()}


def assert_equal(one, other):
    assert (one.low, one.high, one.width, one.first) == (other.low, other.high, other.width, other.first)
    assert np.array_equal(one.counts, other.counts)


@pytest.mark.parametrize("name", DATA)
def test_a_histogram_counts_every_value_in_its_bin(name):
    values = DATA[name]
    made = Histogram.of(values)
    assert (made.low, made.high, made.values) == (values.min(), values.max(), values.size)
    assert made.counts.shape == (BINS,) and made.counts.dtype == np.int64
    expected, _ = np.histogram(values.astype(np.float64), made.edges)
    # numpy's last bin has its right edge inside; ours never needs it.
    assert made.edges[-1] > made.high and np.array_equal(made.counts, expected)


@pytest.mark.parametrize("name", DATA)
def test_merged_parts_are_the_histogram_of_the_whole(name):
    values = DATA[name]
    whole = Histogram.of(values)
    for parts in (2, 3, 7):
        pieces = [p for p in np.array_split(RNG.permutation(values), parts) if p.size]
        assert_equal(merge([Histogram.of(p) for p in pieces]), whole)
        sizes = sorted(pieces, key=lambda p: np.abs(p).max())  # widths grow, step by step
        grown = Histogram.of(sizes[0])
        for piece in sizes[1:]:
            grown = merge([grown, Histogram.of(piece)])
        assert_equal(grown, whole)


def test_any_two_kinds_of_data_merge_exactly():
    for one in DATA.values():
        for other in DATA.values():
            assert_equal(merge([Histogram.of(one), Histogram.of(other)]), Histogram.of(np.append(one, other)))


@pytest.mark.parametrize("name", ["normal", "gelu", "outlier", "negative"])
def test_half_of_the_bins_at_least_lie_between_the_ends(name):
    made = Histogram.of(DATA[name])
    assert BINS / 2 - 1 <= (made.high - made.low) / made.width <= BINS


@pytest.mark.parametrize("name", DATA)
def test_a_percentile_is_right_to_a_bin(name):
    values, made = DATA[name].astype(np.float64), Histogram.of(DATA[name])
    for share in (0, 0.001, 0.2, 0.5, 0.999, 1):
        exact = np.quantile(values, share, method="inverted_cdf"), np.quantile(values, share, method="higher")
        assert min(exact) - made.width <= made.percentile(share) <= max(exact) + made.width
    assert (made.percentile(0), made.percentile(1)) == (made.low, made.high)


@pytest.mark.parametrize("name", DATA)
def test_scaling_moves_both_sides_of_zero_and_loses_no_value(name):
    values = DATA[name].astype(np.float64)
    made = Histogram.of(DATA[name])
    for low, high in ((1, 1), (1.3, 0.8), (0.25, 2), (1, 3.001)):
        moved = made.scaled(low, high)
        true = np.where(values < 0, values * low, values * high)
        assert (moved.low, moved.high) == pytest.approx((true.min(), true.max()), rel=1e-12)
        assert moved.values == made.values and moved.counts.min() >= 0
        exact = np.cumsum(np.histogram(true, moved.edges)[0])
        room = max(low, high) * made.width + moved.width  # of a value inside its old and its new bin
        below, above = (np.searchsorted(np.sort(true), moved.edges[1:] + s * room) for s in (-1, 1))
        got = np.cumsum(moved.counts)
        assert (below - 1 <= got).all() and (got <= above + 1).all()
        if (low, high) == (1, 1):
            assert np.abs(got - exact).max() <= np.count_nonzero(values == made.high)


def test_channels_merge_and_scale():
    one = TensorRange(Histogram.of(DATA["normal"]), np.float32([[-1, 1], [2, 3]]))
    two = TensorRange(Histogram.of(DATA["normal"]), np.float32([[-2, 2], [1, 5]]))
    merged = merge_tensors([one, two])
    assert merged.channels.tolist() == [[-2, 1], [2, 5]] and merged.histogram.values == 8000
    assert merged.scaled(2, 3).channels.tolist() == [[-4, 3], [6, 15]]
    assert merge_tensors([TensorRange(one.histogram)]).channels is None


def test_drift_of_a_change_made_by_hand():
    before = np.random.default_rng(5).standard_normal(200_000).astype(np.float32)
    after = np.where(before < 0, before * 1.5, before * 0.75)
    assert drift(*(tails(Histogram.of(v)) for v in (before, after))) == pytest.approx((1.5, 0.75), rel=0.01)
    assert tails(Histogram.of(before)) == pytest.approx(np.quantile(before, TAILS), rel=0.01)
    # An end at zero, or one that has changed its sign, has no ratio.
    assert drift((0.0, 2.0), (-1.0, 3.0)) == (1.0, 1.5) and drift((0.5, 1.0), (-0.5, 1.0)) == (1.0, 1.0)


def three_tasks():
    """Ranges of two tensors; the second never drifts."""
    tasks = []
    for t in range(3):
        values = np.random.default_rng(t).standard_normal(3000).astype(np.float32)
        channels = np.stack([values.reshape(-1, 4).min(0), values.reshape(-1, 4).max(0)])
        moved = {"prompted.blocks.0.qkv": (1.0 + t, 1.0 / (1 + t))} if t else {}
        query = TensorRange(Histogram.of(values * np.float32(2)))
        prompted = TensorRange(Histogram.of(values), channels)
        tasks.append(TaskRanges(10 + t, {"prompted.blocks.0.qkv": prompted, "query.blocks.0.fc2": query}, moved))
    return Ranges(tuple(tasks))


def test_earlier_tasks_are_scaled_by_all_that_came_behind_them():
    kept = three_tasks()
    name = "prompted.blocks.0.qkv"
    parts = [task.tensors[name] for task in kept.tasks]
    factors = [((2 * 3) ** CARRIED, (1 / 6) ** CARRIED), (3**CARRIED, (1 / 3) ** CARRIED), (1.0, 1.0)]
    merged = kept.merged()[name]
    assert merged.histogram.low == pytest.approx(
        min(p.histogram.low * f[0] for p, f in zip(parts, factors, strict=True))
    )
    assert merged.histogram.high == pytest.approx(parts[2].histogram.high)
    assert merged.histogram.values == 9000
    assert merged.channels[0] == pytest.approx(
        np.min([p.channels[0] * f[0] for p, f in zip(parts, factors, strict=True)], 0)
    )
    still = kept.merged(drift=False)
    assert_equal(still[name].histogram, merge([p.histogram for p in parts]))
    frozen = "query.blocks.0.fc2"
    assert (kept.merged()[frozen].histogram.low, kept.merged()[frozen].histogram.high) == (
        still[frozen].histogram.low,
        still[frozen].histogram.high,
    )


def test_the_file_holds_everything_and_is_the_same_each_time(tmp_path):
    kept = three_tasks()
    kept.save(tmp_path / "a.npz")
    read = Ranges.load(tmp_path / "a.npz")
    assert [t.images for t in read.tasks] == [10, 11, 12]
    for mine, theirs in zip(kept.tasks, read.tasks, strict=True):
        assert list(mine.tensors) == list(theirs.tensors)
        for name, tensor in mine.tensors.items():
            assert_equal(theirs.tensors[name].histogram, tensor.histogram)
            channels = theirs.tensors[name].channels
            assert channels is None if tensor.channels is None else np.array_equal(channels, tensor.channels)
            assert theirs.drift[name] == mine.drift.get(name, (1.0, 1.0))
    read.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.npz", "b.npz"]


def test_a_file_that_is_none_is_one_message(tmp_path):
    three_tasks().save(tmp_path / "good.npz")
    whole = (tmp_path / "good.npz").read_bytes()
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", schema=np.array([{}], dtype=object))
    np.savez(tmp_path / "newer.npz", schema=np.array(99))
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(whole[:2000] + bytes(100) + whole[2100:])
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("absent", "other", "pickle", "newer", "half", "flipped", "empty"):
        with pytest.raises(InputError) as info:
            Ranges.load(tmp_path / f"{name}.npz")
        assert ("newer cdl-edge" if name == "newer" else "no ranges kept while learning") in str(info.value), name


def test_the_reader_needs_numpy_only(tmp_path):
    three_tasks().save(tmp_path / "ranges.npz")
    code = (
        "import sys; from cdl_edge.ranges import Ranges; from pathlib import Path; "
        "print(len(Ranges.load(Path(sys.argv[1])).merged()), {'torch', 'onnx', 'onnxruntime', 'timm'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ranges.npz")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["2", "set()"]
