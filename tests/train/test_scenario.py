"""Classes cut into tasks."""

import numpy as np
import pytest

from cdl_edge.data import Dataset, Split
from cdl_edge.errors import InputError
from cdl_edge.train.scenario import Scenario, make_scenario

NAMES = [f"c{i}" for i in range(10)]


def dataset(classes=10, each=3):
    labels = np.tile(np.arange(classes), each)
    pixels = np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1)
    split = Split(pixels, labels)
    return Dataset("x", tuple(f"c{i}" for i in range(classes)), split, split)


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("shuffle", [True, False])
def test_tasks_are_disjoint_and_cover_everything(tasks, shuffle):
    made = make_scenario(NAMES, tasks, 3, shuffle)
    assert len(made.tasks) == tasks and all(made.tasks)
    flat = [p for t in made.tasks for p in t]
    assert flat == list(range(10))  # consecutive: the first n heads are the classes seen so far
    assert sorted(made.order) == list(range(10))
    assert [made.seen(t) for t in range(tasks)] == np.cumsum([len(t) for t in made.tasks]).tolist()


def test_what_does_not_divide_goes_to_the_first_tasks():
    assert [len(t) for t in make_scenario(NAMES, 4, 0).tasks] == [3, 3, 2, 2]


def test_seeds_draw_different_orders():
    # Trap 4: elsewhere a seed changes only the initial values.
    orders = {make_scenario(NAMES, 5, seed).order for seed in range(5)}
    assert len(orders) == 5
    assert make_scenario(NAMES, 5, 1).order == make_scenario(NAMES, 5, 1).order
    assert tuple(range(10)) not in orders


def test_the_order_does_not_depend_on_the_number_of_tasks():
    assert make_scenario(NAMES, 2, 1).order == make_scenario(NAMES, 5, 1).order


def test_unshuffled_is_the_order_of_the_names():
    for seed in (0, 1):
        assert make_scenario(NAMES, 5, seed, shuffle=False).order == tuple(range(10))


@pytest.mark.parametrize("tasks", [11, 0, -1])
def test_more_tasks_than_classes(tasks):
    with pytest.raises(InputError) as info:
        make_scenario(NAMES, tasks, 0)
    for word in ("10 classes", f"{tasks} tasks", "1 to 10 tasks", "--tasks"):
        assert word in str(info.value)


def test_a_tasks_images_are_labelled_with_learned_positions():
    data = dataset()
    made = make_scenario(data.classes, 4, 2)
    names = made.classes_of(data)
    seen = []
    for task in range(4):
        part = made.split(data.train, task)
        assert set(part.labels) == set(made.tasks[task])
        for item, label in zip(part.items.ravel(), part.labels, strict=True):
            assert names[label] == data.classes[item % 10]
        seen += part.items.ravel().tolist()
    assert sorted(seen) == list(range(30))


def test_classes_that_were_never_learnt_are_in_no_task():
    # A run of 3 classes, evaluated on a source that has 10.
    data = dataset()
    made = Scenario((9, 2, 5), ((0, 1), (2,)))
    first, second = made.split(data.val, 0), made.split(data.val, 1)
    assert sorted(set((first.items.ravel() % 10).tolist())) == [2, 9]
    assert [{9: 0, 2: 1}[i % 10] for i in first.items.ravel()] == first.labels.tolist()
    assert set(second.labels) == {2} and set((second.items.ravel() % 10).tolist()) == {5}
