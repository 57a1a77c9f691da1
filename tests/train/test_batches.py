"""What a step sees: each image once, kept or computed anew to the same numbers."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from cdl_edge.data import Split
from cdl_edge.train import batches
from cdl_edge.train.augment import random_boxes
from cdl_edge.train.backbone import load_backbone
from cdl_edge.train.batches import CROP_AREA, Pipeline, TaskImages
from cdl_edge.train.devices import Share
from cdl_edge.train.student import ModelSpec, PromptedViT

CPU = torch.device("cpu")


@pytest.fixture
def sides(backbone, tiny_vit, make_model):
    wide = load_backbone(tiny_vit("teacher", 24))
    teacher = PromptedViT(wide.model, ModelSpec("l2p", 6, 3, 1, key_width=backbone.width))
    return {
        "student": Pipeline(make_model("l2p"), backbone.preprocessing, CPU),
        "teacher": Pipeline(teacher, wide.preprocessing, CPU),
    }


def boxes(count, seed):
    return random_boxes(count, torch.Generator().manual_seed(seed), CROP_AREA)


@pytest.fixture
def split():
    pixels = np.random.default_rng(0).integers(0, 256, (11, 20, 24, 3), dtype=np.uint8)
    return Split(pixels, np.arange(11) % 6)


def test_an_epoch_is_every_image_once_in_an_order_of_the_generator(sides, split):
    images = TaskImages(split, sides, CPU)
    orders = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        parts = list(images.epoch(["student"], 4, nullcontext, generator, augmented=False))
        assert [len(b.index) for b in parts] == [4, 4, 3]
        order = np.concatenate([b.index for b in parts])
        assert sorted(order) == list(range(11))
        for b in parts:
            assert torch.equal(b.labels, torch.from_numpy(split.labels[b.index])) and b.weight == 1.0
        orders.append(order.tolist())
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("processes", [2, 3, 8])
def test_processes_share_the_steps_of_one(sides, split, augmented, processes):
    # 11 images in steps of 4: shares of 2, of 1 and 2, and none at all for some of 8.
    images = TaskImages(split, sides, CPU)

    def steps(share=None):
        more = () if share is None else (share,)
        return list(images.epoch(["student"], 4, nullcontext, torch.Generator().manual_seed(3), augmented, *more))

    for alone, *parts in zip(steps(), *(steps(Share(r, processes)) for r in range(processes)), strict=True):
        assert sum(p.weight for p in parts) == pytest.approx(1.0)
        mine = [p for p in parts if p.weight]
        assert np.array_equal(np.concatenate([p.index for p in mine]), alone.index)
        assert all(p.weight == len(p.index) / len(alone.index) for p in mine)
        for name in ("inputs", "queries"):
            joined = torch.cat([getattr(p, name)["student"] for p in mine])
            assert torch.allclose(joined, getattr(alone, name)["student"], atol=1e-4)  # the same crops
        assert all(len(p.index) == 1 for p in parts if not p.weight)


def test_what_is_kept_is_what_would_be_computed(sides, split):
    fresh, kept = TaskImages(split, sides, CPU), TaskImages(split, sides, CPU)
    kept.keep(["student", "teacher"], nullcontext, 4)
    index = np.array([7, 0, 3])
    one = fresh.batch(index, ["student", "teacher"], nullcontext)
    two = kept.batch(index, ["student", "teacher"], nullcontext)
    for name in ("student", "teacher"):
        assert (one.inputs[name] - two.inputs[name]).abs().max() < 1e-4
        assert (one.queries[name] - two.queries[name]).abs().max() < 1e-4
    assert torch.equal(two.queries["student"], two.queries["teacher"])  # the student's, for both


def test_what_does_not_fit_into_memory_is_computed_again(sides, split, monkeypatch):
    monkeypatch.setattr(batches, "KEPT_BYTES", 10)
    images = TaskImages(split, sides, CPU)
    images.keep(["student", "teacher"], nullcontext, 4)
    assert images._inputs == {} and images._queries == {}
    got = images.batch(np.arange(3), ["teacher"], nullcontext)
    assert set(got.inputs) == {"teacher"} and got.queries["teacher"].shape == (3, 16)


def test_augmentation_is_in_the_boxes_and_shared(sides, split):
    images = TaskImages(split, sides, CPU)
    index = np.arange(4)
    got = [images.batch(index, ["student", "teacher"], nullcontext, boxes(4, s)) for s in (0, 0, 1)]
    assert torch.equal(got[0].inputs["student"], got[1].inputs["student"])
    assert torch.equal(got[0].queries["student"], got[1].queries["student"])
    assert not torch.equal(got[0].inputs["student"], got[2].inputs["student"])
    # The teacher alone sees the same crops as teacher and student together, and what is kept does not interfere.
    images.keep(["student", "teacher"], nullcontext, 4)
    alone = images.batch(index, ["teacher"], nullcontext, boxes(4, 0))
    assert torch.equal(alone.inputs["teacher"], got[0].inputs["teacher"])
    assert torch.equal(alone.queries["teacher"], got[0].queries["student"])


def test_sides_of_other_sizes_see_the_same_part_of_the_picture(backbone, make_model, split, monkeypatch):
    # Two ways of decoding: the box is the same share of both.
    from dataclasses import replace

    coarse = replace(backbone.preprocessing, resize=16)
    sides = {
        "student": Pipeline(make_model("apt"), backbone.preprocessing, CPU),
        "teacher": Pipeline(make_model("apt"), coarse, CPU),
    }
    assert sides["student"].decoding != sides["teacher"].decoding
    flat = Split(
        np.broadcast_to(np.arange(24, dtype=np.uint8)[None, None, :, None] * 10, (4, 20, 24, 3)).copy(), np.zeros(4)
    )
    images = TaskImages(flat, sides, CPU)
    seen = []
    real = batches.augment.cut_out
    monkeypatch.setattr(batches.augment, "cut_out", lambda x, b: seen.append(real(x, b)) or seen[-1])
    images.batch(np.arange(4), ["student", "teacher"], nullcontext, boxes(4, 0))
    assert len(seen) == 2
    rising = [(x[:, 0, 8, 0] < x[:, 0, 8, -1]).tolist() for x in seen]
    assert rising[0] == rising[1]  # mirrored together or not at all


def test_learners_without_a_query_compute_none(backbone, make_model, split):
    sides = {"student": Pipeline(make_model("apt"), backbone.preprocessing, CPU)}
    images = TaskImages(split, sides, CPU)
    images.keep(["student"], nullcontext, 4)
    assert images.batch(np.arange(2), ["student"], nullcontext).queries == {"student": None}
    one_pass = {"student": Pipeline(make_model("coda", one_pass=True), backbone.preprocessing, CPU)}
    assert TaskImages(split, one_pass, CPU).batch(np.arange(2), ["student"], nullcontext).queries == {"student": None}


@pytest.mark.parametrize("kept", [False, True])
def test_with_the_regulariser_each_side_asks_its_own_full_query(sides, split, kept):
    for name in ("student", "teacher"):
        model = sides[name].model
        made = PromptedViT(
            model.backbone, ModelSpec("coda", 6, 3, 0, key_width=16, one_pass=True, query_regulariser=0.1)
        )
        sides[name] = Pipeline(made, sides[name].preprocessing, CPU)
    images = TaskImages(split, sides, CPU)
    if kept:
        images.keep(["student", "teacher"], nullcontext, 4)
    got = images.batch(np.arange(3), ["student", "teacher"], nullcontext)
    for name, width in (("student", 16), ("teacher", 24)):
        assert got.queries[name].shape == (3, width)
        assert torch.allclose(got.queries[name], sides[name].model.query(got.inputs[name]), atol=1e-4)


def test_a_network_whose_stem_learns_is_given_images(backbone, split):
    side = Pipeline(PromptedViT(backbone.model, ModelSpec("finetune", 6, 3, 0)), backbone.preprocessing, CPU)
    images = TaskImages(split, {"student": side}, CPU)
    before = images.batch(np.arange(3), ["student"], nullcontext)
    images.keep(["student"], nullcontext, 4)
    after = images.batch(np.arange(3), ["student"], nullcontext)
    assert before.inputs["student"].shape == (3, 3, 16, 16) and before.queries == {"student": None}
    assert torch.allclose(before.inputs["student"], after.inputs["student"], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("compat", "low", "expected"), [(False, 0.5, 0.75), (True, 0.08, 0.54)])
def test_the_area_of_random_crops(sides, split, monkeypatch, compat, low, expected):
    images = TaskImages(split, {"student": sides["student"]}, CPU)
    areas = []

    def note(x, boxes):
        areas.extend((boxes[:, 0, 0].abs() * boxes[:, 1, 1]).tolist())
        return x

    monkeypatch.setattr(batches.augment, "cut_out", note)
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        list(images.epoch(["student"], 4, nullcontext, generator, True, compat=compat))
    assert low <= min(areas) < low + 0.05 and max(areas) <= 1  # no wider than the picture
    assert sum(areas) / len(areas) == pytest.approx(expected, abs=0.04)
