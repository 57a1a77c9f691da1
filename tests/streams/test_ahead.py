"""Items are made while the last one is used; nothing hangs at the end."""

import threading

import pytest

from cdl_edge.streams.ahead import Ahead


def threads():
    return [t for t in threading.enumerate() if t.name == "ahead"]


def test_all_items_in_their_order_and_never_more_ahead_than_allowed():
    made, taken, most = [], [], []

    def make(pause):
        for i in range(50):
            made.append(i)
            most.append(len(made) - len(taken))
            yield i

    with Ahead(make, depth=3) as items:
        for item in items:
            taken.append(item)
    assert taken == list(range(50))
    assert max(most) <= 3 + 2  # three wait, one is being used, one is being made
    assert threads() == []


def test_the_newest_item_takes_the_place_of_an_older_one():
    taken, go = threading.Event(), threading.Event()

    def make(pause):
        yield 1
        taken.wait(5)
        yield from (2, 3, 4)
        go.set()
        taken.clear()

    with Ahead(make, newest=True) as items:
        assert next(items) == 1
        taken.set()
        assert go.wait(5)
        assert list(items) == [4]


def test_an_error_comes_to_the_reader_behind_what_was_made_before():
    def make(pause):
        yield 1
        raise OSError("the cable")

    with Ahead(make) as items:
        assert next(items) == 1
        with pytest.raises(OSError, match="the cable"):
            next(items)


@pytest.mark.parametrize("newest", [True, False])
def test_the_end_finds_whoever_waits(newest):
    closed = threading.Event()

    def make(pause):
        try:
            while not pause(60 if newest else 0):
                yield 0
        finally:
            closed.set()

    with Ahead(make, newest=newest) as items:
        if not newest:
            assert next(items) == 0
    assert closed.is_set() and threads() == []
    assert list(items) == []
    items.close()


def test_one_behind_the_other_end_together():
    with Ahead(lambda pause: iter_until(pause)) as first, Ahead(lambda pause: (x for x in first)) as second:
        assert next(second) == 0
        first.stop()
        assert list(second) in ([], [0], [0, 0], [0, 0, 0])
    assert threads() == []


def iter_until(pause):
    while not pause(0):
        yield 0
