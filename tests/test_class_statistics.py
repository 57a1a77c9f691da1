"""Class statistics are sums: independent of order, exact when something is taken out again, the same bytes always."""

import numpy as np
import pytest

from cdl_edge.class_statistics import ClassStatistics, FeatureMap, merged
from cdl_edge.errors import InputError

WIDTH = 6
MAPS = {
    "plain": FeatureMap(("class", "patches"), WIDTH),
    "unit": FeatureMap(("class", "patches"), WIDTH, "unit"),
    "random": FeatureMap(("class", "patches"), WIDTH, "random", 40, 3),
    "weighted": FeatureMap(("class", "kd", "patches"), WIDTH, "random", 40, 3, 0.5),
}
kinds = pytest.mark.parametrize("map", MAPS.values(), ids=MAPS)


def images(name, count, shift=0.0):
    """float32 (count, WIDTH) of one class."""
    rng = np.random.default_rng([ord(c) for c in name])
    return (rng.standard_normal((count, WIDTH)) + shift).astype(np.float32)


def task(map, *classes):
    """Statistics of one task: (name, number of images)..."""
    x = np.concatenate([images(name, count) for name, count in classes])
    labels = np.concatenate([np.full(count, i) for i, (_, count) in enumerate(classes)])
    return ClassStatistics.of(map, x, labels, [name for name, _ in classes])


def assert_same(a, b, tolerance=1e-9):
    assert a.map == b.map and set(a.classes) == set(b.classes)
    b = b.ordered(a.classes)
    assert np.array_equal(a.counts, b.counts)
    for mine, theirs in ((a.sums, b.sums), (a.moment, b.moment)):
        assert np.abs(mine - theirs).max() <= tolerance * np.abs(theirs).max()


@kinds
def test_they_are_what_their_definition_says(map):
    found = task(map, ("cat", 5), ("dog", 3))
    rows = []
    for name, count in (("cat", 5), ("dog", 3)):
        for x in images(name, count).astype(np.float64):
            if map.kind == "unit":
                x = x / np.sqrt(sum(v * v for v in x))
            if map.kind == "random":
                drawn = np.random.default_rng([3, 0x4A9]).standard_normal((WIDTH, 40), np.float32).astype(np.float64)
                weights = np.repeat([map.token_weight if p in ("class", "kd") else 1 for p in map.parts], WIDTH)
                x = np.array([max(0.0, sum(x * weights[:: len(map.parts)] * column)) for column in drawn.T])
            rows.append((name, x))
    assert found.counts.tolist() == [5, 3] and found.images == 8 and found.map.features == len(rows[0][1])
    for i, name in enumerate(("cat", "dog")):
        assert np.allclose(found.sums[i], sum(x for n, x in rows if n == name), rtol=1e-12, atol=1e-12)
    assert np.allclose(found.moment, sum(np.outer(x, x) for _, x in rows), rtol=1e-12, atol=1e-12)
    means = {n: sum(x for m, x in rows if m == n) / c for n, c in (("cat", 5), ("dog", 3))}
    within = sum(np.outer(x - means[n], x - means[n]) for n, x in rows) / 8
    assert np.allclose(found.means, list(means.values())) and np.allclose(found.scatter(), within, atol=1e-12)


def test_more_images_than_are_mapped_at_once():
    x, labels = images("many", 2500), np.arange(2500) % 2
    whole = ClassStatistics.of(MAPS["plain"], x, labels, ["a", "b"])
    x = x.astype(np.float64)
    assert np.allclose(whole.moment, x.T @ x) and np.allclose(whole.sums[1], x[1::2].sum(axis=0))


@kinds
def test_merging_does_not_depend_on_the_order(map):
    parts = [task(map, ("a", 4), ("b", 7)), task(map, ("c", 2)), task(map, ("d", 9), ("e", 1))]
    forward, backward = merged(parts), merged(reversed(parts))
    assert forward.classes == ("a", "b", "c", "d", "e") and backward.classes == ("d", "e", "c", "a", "b")
    assert_same(forward, backward)
    assert_same(merged([parts[1], parts[0], parts[2]]), forward)
    assert forward.images == 23


def test_pictures_of_a_known_class_are_added_to_it():
    both = task(MAPS["plain"], ("a", 4)) + task(MAPS["plain"], ("b", 2), ("a", 4))
    assert both.classes == ("a", "b") and both.counts.tolist() == [8, 2]
    assert np.allclose(both.means[0], task(MAPS["plain"], ("a", 4)).means[0])


@kinds
def test_a_task_that_is_taken_out_and_learnt_again(map):
    # Features of a real network do not have mean 0: what is left is a difference of large numbers.
    first, second = task(map, ("a", 40), ("b", 30)), task(map, ("c", 50), ("d", 20))
    never = first + second
    without = never - first
    assert_same(without, second)
    assert_same(without + first, never)
    again = never
    for _ in range(20):
        again = (again - second) + second
    assert_same(again, never)


@kinds
def test_a_class_that_is_taken_out_has_never_been_in(map):
    rest = task(map, ("a", 5), ("c", 6))
    got = (rest + task(map, ("b", 4))) - task(map, ("b", 4))
    assert got.classes == ("a", "c")
    assert_same(got, rest)


def test_some_pictures_of_a_class():
    map = MAPS["plain"]
    x = images("a", 5)
    whole = ClassStatistics.of(map, x, np.zeros(5, int), ["a"])
    part = ClassStatistics.of(map, x[:2], np.zeros(2, int), ["a"])
    assert_same(whole - part, ClassStatistics.of(map, x[2:], np.zeros(3, int), ["a"]))


def test_what_is_not_in_them_cannot_be_taken_out():
    held = task(MAPS["plain"], ("a", 3))
    for other, words in ((task(MAPS["plain"], ("b", 1)), "'b'"), (task(MAPS["plain"], ("a", 4)), "at most 3")):
        with pytest.raises(InputError, match=words):
            held - other


def test_statistics_of_other_features():
    plain = task(MAPS["plain"], ("a", 3))
    for map in (MAPS["unit"], MAPS["random"], FeatureMap(("class", "kd"), WIDTH)):
        for combine in (plain.__add__, plain.__sub__):
            with pytest.raises(InputError, match="different features"):
                combine(task(map, ("a", 3)))


def test_tokens_may_count_less_than_patches():
    plain = FeatureMap(("class", "kd", "patches"), WIDTH, "random", 40, 3)
    x, scale = images("a", 5), np.repeat([0.5, 0.5, 1.0], WIDTH // 3)
    assert np.allclose(MAPS["weighted"].apply(x), plain.apply(x * scale), rtol=1e-6)
    # A map without a weight is written and read as it was before there was one.
    assert "token_weight" not in plain.to_json() and FeatureMap.from_json(plain.to_json()) == plain
    document = MAPS["weighted"].to_json()
    assert FeatureMap.from_json(document) == MAPS["weighted"]
    for wrong in (0.0, 2.0, "much", float("nan")):
        with pytest.raises(ValueError, match="weight of tokens"):
            FeatureMap.from_json({**document, "token_weight": wrong})


def test_the_order_of_classes():
    held = task(MAPS["plain"], ("a", 3), ("b", 2))
    turned = held.ordered(["b", "a"])
    assert turned.counts.tolist() == [2, 3] and np.array_equal(turned.sums[0], held.sums[1])
    with pytest.raises(InputError, match="other classes"):
        held.ordered(["a", "c"])


@kinds
def test_a_file_gives_them_back_and_its_bytes_are_always_the_same(tmp_path, map):
    held = task(map, ("Äpfel", 3), ("b", 2))
    for name in ("one.npz", "two.npz"):
        held.save(tmp_path / name)
    read = ClassStatistics.load(tmp_path / "one.npz")
    assert read.map == held.map and read.classes == held.classes and read.counts.dtype == np.int64
    assert np.array_equal(read.counts, held.counts) and np.array_equal(read.sums, held.sums)
    assert np.array_equal(np.triu(read.moment), np.triu(held.moment)) and np.array_equal(read.moment, read.moment.T)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    read.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.npz", "one.npz", "two.npz"]


def test_a_file_that_is_not_theirs(tmp_path):
    task(MAPS["plain"], ("a", 3)).save(tmp_path / "good.npz")
    content = (tmp_path / "good.npz").read_bytes()
    path = tmp_path / "bad.npz"
    cases = {f"cut at {share}": content[: int(share * len(content))] for share in (0.0, 0.1, 0.5, 0.9, 0.999)}
    cases |= {"text": b"not an archive", "a plain array": b"\x93NUMPY\x01\x00" + b"v\x00{"}
    for at in range(0, len(content), 37):
        flipped = bytearray(content)
        flipped[at] ^= 0xFF
        cases[f"byte {at}"] = bytes(flipped)
    messages = []
    for damaged in cases.values():
        path.write_bytes(damaged)
        try:
            ClassStatistics.load(path)
        except InputError as error:
            messages.append(str(error))
    assert all(str(path) in message and message.count("expected:") == 1 for message in messages)
    assert len(messages) >= 0.8 * len(cases)  # a byte that nobody reads may be any (time stamps of the archive)
    with pytest.raises(InputError, match="no class statistics"):
        ClassStatistics.load(tmp_path / "missing.npz")


@pytest.mark.parametrize(
    "change",
    [
        {"schema": np.array(99)},
        {"schema": np.array("x")},
        {"map": np.array("[1]")},
        {"map": np.array("{")},
        {"map": np.array('{"parts": ["class"], "width": 6, "kind": "other"}')},
        {"map": np.array('{"parts": ["class"], "width": -1}')},
        {"map": np.array('{"parts": ["class"], "width": 1000000000000}')},
        {"counts": np.array([3, 4])},
        {"counts": np.array([-3])},
        {"sums": np.zeros((1, 5))},
        {"sums": np.full((1, 6), np.nan)},
        {"moment": np.zeros(3)},
        {"moment": np.full(21, np.inf)},
        {"classes": np.array(["a", "a"]), "counts": np.array([1, 2]), "sums": np.zeros((2, 6))},
        {"classes": None},
    ],
    ids=str,
)
def test_fields_that_contradict_each_other(tmp_path, change):
    path = tmp_path / "statistics.npz"
    task(MAPS["plain"], ("a", 3)).save(path)
    with np.load(path) as file:
        fields = {k: file[k] for k in file.files}
    fields |= change
    np.savez(path, **{k: v for k, v in fields.items() if v is not None})
    with pytest.raises(InputError, match=str(path.name)):
        ClassStatistics.load(path)
