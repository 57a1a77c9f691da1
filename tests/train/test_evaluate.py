"""Accuracy of a finished run in torch."""

import numpy as np
import pytest
import torch

from cdl_edge.errors import InputError
from cdl_edge.log import told
from cdl_edge.train.batches import Pipeline, TaskImages
from cdl_edge.train.devices import Devices, Share
from cdl_edge.train.evaluate import accuracy, answers, evaluate_run, logits_of
from cdl_edge.train.loop import train


@pytest.fixture(scope="module")
def photos(tmp_path_factory, image_folder):
    root = tmp_path_factory.mktemp("photos")
    return image_folder(root, train=dict.fromkeys("abcd", 6), val=dict.fromkeys("abcd", 4))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_config, photos):
    out = tmp_path_factory.mktemp("runs") / "run"
    metrics = train(make_config(out, data=f"folder:{photos}", epochs=4, learner="coda"), quiet=True)
    return out, metrics


@pytest.mark.slow
def test_the_numbers_of_training_are_found_again(finished, photos):
    out, metrics = finished
    got = evaluate_run(out, f"folder:{photos}")
    assert got["per_task"] == pytest.approx(metrics["student"]["matrix"][-1])
    assert got["average_accuracy"] == pytest.approx(metrics["student"]["average_accuracy"])
    assert got["forgetting"] == pytest.approx(metrics["student"]["forgetting"])
    assert (got["images"], got["backend"], got["precision"], got["skipped"]) == (16, "torch", "fp32", [])
    assert got["baseline"]["heads"] == pytest.approx(metrics["baseline"]["heads"])
    assert set(got["definitions"]) == {"average_accuracy", "forgetting", "baseline"}


@pytest.mark.slow
def test_the_frozen_baseline_of_a_whole_network_is_of_the_bare_one(tmp_path, make_config):
    metrics = train(make_config(tmp_path / "run", learner="finetune", distill="none", epochs=1), quiet=True)
    got = evaluate_run(tmp_path / "run", "digits")
    assert got["baseline"]["heads"] == pytest.approx(metrics["baseline"]["heads"])


@pytest.mark.slow
def test_a_run_of_before_has_no_baseline(finished, photos, tmp_path):
    import shutil

    old = shutil.copytree(finished[0], tmp_path / "old")
    shutil.rmtree(old / "statistics")
    got = evaluate_run(old, f"folder:{photos}")
    assert got["baseline"] is None and got["images"] == 16


def test_fewer_images(finished, photos):
    got = evaluate_run(finished[0], f"folder:{photos}", limit_per_class=1)
    assert got["images"] == 4 and got["forgetting"] is None


def test_classes_go_by_name_and_others_do_not_matter(finished, photos, tmp_path, image_folder):
    # The same pictures, more classes around them: names decide, not positions.
    import shutil

    more = shutil.copytree(photos, tmp_path / "more")
    for part in ("train", "val"):
        for name in ("0first", "bb", "zzz"):
            shutil.copytree(more / part / "a", more / part / name)
    assert (
        evaluate_run(finished[0], f"folder:{more}")["per_task"]
        == evaluate_run(finished[0], f"folder:{photos}")["per_task"]
    )


def test_classes_that_are_missing(finished, tmp_path, image_folder):
    root = image_folder(tmp_path / "p", val=dict.fromkeys("abx", 2))  # no train/ is needed
    lines = []
    with told(lines.append):
        got = evaluate_run(finished[0], f"folder:{root}")
    assert got["images"] == 4 and sorted(got["missing"]) == ["c", "d"]
    assert got["forgetting"] is None and "2 of the 4 classes have no image here" in lines[-1]
    assert got["left_out"] == {"classes": 1, "images": 2}
    other = image_folder(tmp_path / "q", val={"x": 1})
    with pytest.raises(InputError, match="none of the 4 classes"):
        evaluate_run(finished[0], f"folder:{other}")


def test_of_a_test_set_in_class_folders_all_images_count(finished, tmp_path, image_folder):
    root = image_folder(tmp_path / "p", unsplit=dict.fromkeys("abcd", 5))
    for file in root.rglob("*.png"):  # as they are drawn they are the training images
        file.write_bytes(file.read_bytes() + b" ")
    assert evaluate_run(finished[0], f"folder:{root}")["images"] == 20
    assert evaluate_run(finished[0], f"folder:{root}", split="val")["images"] == 4


def test_corrupt_validation_images_are_named(finished, photos, tmp_path):
    import shutil

    root = shutil.copytree(photos, tmp_path / "p")
    (root / "val" / "b" / "000.png").write_bytes(b"no")
    got = evaluate_run(finished[0], f"folder:{root}")
    assert got["images"] == 15 and len(got["skipped"]) == 1 and "b/000.png" in got["skipped"][0]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 40])
def test_processes_count_each_image_once(backbone, make_model, processes):
    from cdl_edge.data import Split

    device = torch.device("cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (25, 16, 16, 3), dtype=np.uint8)
    sides = {"student": Pipeline(make_model("coda"), backbone.preprocessing, device)}
    images = TaskImages(Split(pixels, logits_labels(pixels, sides, device)), sides, device)
    assert accuracy(images, "student", 6) == 100.0  # every label is what the model says
    devices = Devices("cpu", "fp32")
    parts = []
    devices.sum = lambda value: parts.append(value.numpy().copy()) or value
    for rank in range(processes):
        devices.share = Share(rank, processes)
        accuracy(images, "student", 6, devices)
    found, probability, of_true = sum(parts)
    assert len(parts) == processes and (found == images.labels).all()  # nothing twice, nothing left out
    alone = answers(images, "student", 6)
    assert np.allclose(probability, alone[1], atol=1e-6) and np.array_equal(probability, of_true)
    assert probability.min() >= 1 / 6 and probability.max() <= 1


def test_a_class_that_is_not_among_those_seen_has_no_probability(backbone, make_model):
    from cdl_edge.data import Split

    device = torch.device("cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    sides = {"student": Pipeline(make_model("coda"), backbone.preprocessing, device)}
    predicted, probability, of_true = answers(
        TaskImages(Split(pixels, np.array([0, 1, 5, 5])), sides, device), "student", 2
    )
    assert set(predicted) <= {0, 1} and (probability >= 0.5).all()
    assert of_true[2:].tolist() == [0.0, 0.0] and (of_true[:2] > 0).all()


def logits_labels(pixels, sides, device):
    from cdl_edge.data import Split

    return logits_of(TaskImages(Split(pixels, np.zeros(len(pixels), np.int64)), sides, device), "student").argmax(1)


def test_accuracy_is_over_the_classes_seen(backbone, make_model, monkeypatch):
    from cdl_edge.data import Split

    device = torch.device("cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (150, 16, 16, 3), dtype=np.uint8)  # more than one chunk
    images = TaskImages(
        Split(pixels, np.arange(150) % 6),
        {"student": Pipeline(make_model("coda"), backbone.preprocessing, device)},
        device,
    )
    logits = logits_of(images, "student")
    assert logits.shape == (150, 6) and logits.dtype == np.float32
    assert np.array_equal(logits_of(images, "student", 3), logits[:, :3])
    for seen in (3, 6):
        expected = 100 * np.mean([int(np.argmax(row[:seen])) == i % 6 for i, row in enumerate(logits)])
        assert accuracy(images, "student", seen) == pytest.approx(expected)
    assert not torch.is_grad_enabled() or not images._inputs["student"].requires_grad
