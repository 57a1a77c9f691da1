"""Which images of a source are taken, and as which classes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cdl_edge.calibrate import calibration_images as module
from cdl_edge.calibrate.calibration_images import images_of
from cdl_edge.data import load_dataset
from cdl_edge.errors import InputError
from cdl_edge.runtime import open_bundle
from cdl_edge.scored import find_scored


@pytest.fixture
def bundle(exported):
    return open_bundle(exported())


def test_all_classes(bundle, source):
    found = images_of(bundle, source, 12, None)
    side = bundle.preprocessing.size
    assert found.training.shape == (36, side, side, 3) and found.training.dtype == np.uint8
    assert found.validation.shape == (80, side, side, 3) and found.labels.shape == (80,)
    assert found.tasks == (0, 1, 2) and found.whole
    # The labels are the bundle's: its classes stand in another order than the folders.
    dataset = load_dataset(source)
    expected = [bundle.classes.index(dataset.classes[label]) for label in dataset.val.labels]
    assert found.labels.tolist() == expected and expected != dataset.val.labels.tolist()


def test_classes_of_the_last_task_and_one_that_was_never_learnt(bundle, digits, tmp_path):
    last = [bundle.classes[c] for c in bundle.tasks[-1]]
    source = digits(last)
    folder = source.removeprefix("folder:")
    for part in ("train", "val"):  # a folder of another name
        new = tmp_path / part / "unknown"
        new.mkdir(parents=True)
        for name in last:
            (tmp_path / part / name).symlink_to(f"{folder}/{part}/{name}", target_is_directory=True)
        (new / "0.png").write_bytes(next((tmp_path / part / last[0]).iterdir()).read_bytes())
    found = images_of(bundle, f"folder:{tmp_path}", 100, None)
    assert found.tasks == (2,) and not found.whole
    assert len(found.training) == 24 * len(last) and len(found.validation) == 8 * len(last)
    assert set(found.labels) == set(bundle.tasks[-1])


def test_a_class_whose_training_images_are_gone_is_measured_only(bundle, source, tmp_path):
    root, first = Path(source.removeprefix("folder:")), bundle.classes[bundle.tasks[0][0]]
    (tmp_path / "train").mkdir()
    (tmp_path / "val").symlink_to(root / "val", target_is_directory=True)
    last = [bundle.classes[c] for c in bundle.tasks[-1]]
    for name in last:
        (tmp_path / "train" / name).symlink_to(root / "train" / name, target_is_directory=True)
    found = images_of(bundle, f"folder:{tmp_path}", 12, None)
    assert found.tasks == (2,) and not found.whole and len(found.training) == 12
    assert bundle.classes.index(first) in found.labels and len(found.validation) == 80


def test_limits(bundle, source):
    found = images_of(bundle, source, 1, 3)
    assert len(found.training) == 3 and len(found.validation) == 30
    assert np.bincount(found.labels).tolist() == [3] * 10
    again = images_of(bundle, source, 1, 3)
    assert np.array_equal(found.validation, again.validation) and np.array_equal(found.training, again.training)


def test_a_sample_is_that_of_evaluate(bundle, source):
    """Both draw by the run's seed, so that their accuracies are of the same images."""
    training = {**bundle.manifest.training, "config": {**bundle.manifest.config, "seed": 5}}
    bundle = replace(bundle, manifest=replace(bundle.manifest, training=training))
    scored = find_scored(source, "auto", training, bundle.classes).limited(3, 5)
    found = images_of(bundle, source, 1, 3)
    assert np.array_equal(found.validation, scored.images.decode(bundle.preprocessing).pixels)


def test_a_sample_may_lose_a_class_to_a_picture_that_cannot_be_read(bundle, source, tmp_path):
    root = Path(shutil.copytree(source.removeprefix("folder:"), tmp_path / "copy"))
    scored = find_scored(f"folder:{root}", "auto", bundle.manifest.training, bundle.classes)
    Path(scored.limited(1, 0).images.items[0]).write_bytes(b"no picture")
    found = images_of(bundle, f"folder:{root}", 4, 1)
    assert len(found.validation) == len(set(found.labels)) == 9


def test_training_images_are_spread_over_the_classes_of_a_task(bundle, source):
    """So many as a task has classes: at least two of them are seen."""
    found = images_of(bundle, source, 4, None)
    assert len({image.tobytes() for image in found.training}) == len(found.training) == 12


def test_wrong_sources(bundle, digits, image_folder, tmp_path, monkeypatch):
    other = image_folder(tmp_path / "other", train={"cat": 2, "dog": 2}, val={"cat": 1, "dog": 1})
    with pytest.raises(InputError, match="no class of the bundle") as error:
        images_of(bundle, f"folder:{other}", 4, None)
    assert "cat, dog" in str(error.value) and bundle.classes[0] in str(error.value)
    with pytest.raises(InputError, match="nowhere"):
        images_of(bundle, f"folder:{tmp_path / 'nowhere'}", 4, None)
    monkeypatch.setattr(module, "LARGEST_BYTES", 1000)
    with pytest.raises(InputError, match="too many images to be held"):
        images_of(bundle, digits(), 4, None)
