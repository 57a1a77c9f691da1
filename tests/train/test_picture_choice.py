"""Which validation pictures a run chooses for its report."""

import numpy as np

from cdl_edge.artefacts.run_record import PICTURES_EACH, ExamplePicture
from cdl_edge.artefacts.typed import parse
from cdl_edge.splits import Split
from cdl_edge.train.picture_choice import ALIKE, PictureChoice


def answered(labels, predicted, probability, first=0, unreadable=()):
    """A choice that was told of one task's images, of one grey level each."""
    labels = np.asarray(labels)
    pixels = np.broadcast_to(
        np.arange(first, first + len(labels), dtype=np.uint8)[:, None, None, None], (len(labels), 2, 2, 3)
    )
    read = np.asarray([i for i in range(len(labels)) if i not in unreadable])
    choice = PictureChoice()
    shares = np.asarray(probability, np.float32)
    choice.add(
        Split(np.ascontiguousarray(pixels), labels), read, np.asarray(predicted)[read], shares[read], shares[read]
    )
    return choice


def grey(entry):
    """Which image an entry is, by its hash."""
    pixels = np.repeat(np.arange(256, dtype=np.uint8), 12).reshape(256, 2, 2, 3)
    split = Split(pixels, np.zeros(256, np.int64))
    return next(i for i in range(256) if split.digest(i) == entry["sha256"])


def test_the_surest_mistakes_and_the_least_sure_right_ones_come_first():
    labels = [0] * 20 + [1] * 20
    predicted = [1] * 4 + [0] * 16 + [2] + [1] * 19
    probability = np.linspace(0.2, 0.99, 40)
    found = answered(labels, predicted, probability).chosen(seed=0)
    by_kind = {k: [grey(e) for e in found if e["kind"] == k] for k in ("wrong", "unsure", "drawn")}
    assert by_kind["wrong"] == [20, 3, 2]  # of 0 taken for 1 the surest ALIKE
    assert ALIKE == 2 and by_kind["unsure"] == list(range(4, 4 + PICTURES_EACH))
    assert len(by_kind["drawn"]) == PICTURES_EACH
    everything = [i for part in by_kind.values() for i in part]
    assert len(everything) == len(set(everything))
    for e in found:
        record = parse(ExamplePicture, e, "metrics.json")
        assert record.place == grey(e) - 20 * record.true and record.true == labels[grey(e)]


def test_the_seed_draws_and_nothing_else_is_random():
    choice = answered([0] * 60, [0] * 60, np.full(60, 0.9))
    first, second = choice.chosen(seed=0), choice.chosen(seed=1)
    assert first == choice.chosen(seed=0)
    drawn = [[e["sha256"] for e in part if e["kind"] == "drawn"] for part in (first, second)]
    assert drawn[0] != drawn[1]
    assert [e for e in first if e["kind"] != "drawn"] == [e for e in second if e["kind"] != "drawn"]


def test_unreadable_images_shift_no_place():
    found = answered([0] * 5, [0] * 5, np.linspace(0.5, 0.9, 5), unreadable=(0, 2)).chosen(seed=0)
    assert [(e["place"], grey(e)) for e in found] == [(1, 1), (3, 3), (4, 4)]


def test_a_file_that_vanished_is_left_out(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"a picture")
    choice = PictureChoice()
    split = Split([path, tmp_path / "gone.png"], np.zeros(2, np.int64))
    choice.add(split, np.arange(2), np.zeros(2, np.int64), np.full(2, 0.9), np.full(2, 0.9))
    assert [e["place"] for e in choice.chosen(seed=0)] == [0]


def test_nothing_answered_nothing_chosen():
    assert PictureChoice().chosen(seed=0) == []
