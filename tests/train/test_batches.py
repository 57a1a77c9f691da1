"""What a step sees: each image once, kept or computed anew to the same numbers."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from cdl_edge.data import Split
from cdl_edge.train import batches
from cdl_edge.train.backbone import load_backbone
from cdl_edge.train.batches import Images, Side
from cdl_edge.train.student import PromptedViT

CPU = torch.device("cpu")


@pytest.fixture
def sides(backbone, tiny_vit, make_model):
    wide = load_backbone(tiny_vit("teacher", 24))
    teacher = PromptedViT(wide.model, "coda", 6, 3, 1, key_width=backbone.width)
    return {
        "student": Side(make_model("coda"), backbone.preprocessing, CPU),
        "teacher": Side(teacher, wide.preprocessing, CPU),
    }


@pytest.fixture
def split():
    pixels = np.random.default_rng(0).integers(0, 256, (11, 20, 24, 3), dtype=np.uint8)
    return Split(pixels, np.arange(11) % 6)


def test_an_epoch_is_every_image_once_in_an_order_of_the_generator(sides, split):
    images = Images(split, sides, CPU)
    orders = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        parts = list(images.epoch(["student"], 4, nullcontext, generator, augmented=False))
        assert [len(b.index) for b in parts] == [4, 4, 3]
        order = np.concatenate([b.index for b in parts])
        assert sorted(order) == list(range(11))
        for b in parts:
            assert torch.equal(b.labels, torch.from_numpy(split.labels[b.index]))
        orders.append(order.tolist())
    assert orders[0] == orders[1] != orders[2]


def test_what_is_kept_is_what_would_be_computed(sides, split):
    fresh, kept = Images(split, sides, CPU), Images(split, sides, CPU)
    kept.keep(["student", "teacher"], nullcontext, 4)
    index = np.array([7, 0, 3])
    one = fresh.batch(index, ["student", "teacher"], nullcontext)
    two = kept.batch(index, ["student", "teacher"], nullcontext)
    for name in ("student", "teacher"):
        assert (one.tokens[name] - two.tokens[name]).abs().max() < 1e-4
    assert (one.query - two.query).abs().max() < 1e-4


def test_what_does_not_fit_into_memory_is_computed_again(sides, split, monkeypatch):
    monkeypatch.setattr(batches, "KEPT_BYTES", 10)
    images = Images(split, sides, CPU)
    images.keep(["student", "teacher"], nullcontext, 4)
    assert images._tokens == {}
    got = images.batch(np.arange(3), ["teacher"], nullcontext)
    assert set(got.tokens) == {"teacher"} and got.query.shape == (3, 16)


def test_augmentation_repeats_with_the_generator_and_is_shared(sides, split):
    images = Images(split, sides, CPU)
    index = np.arange(4)
    got = [
        images.batch(index, ["student", "teacher"], nullcontext, torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    ]
    assert torch.equal(got[0].tokens["student"], got[1].tokens["student"])
    assert torch.equal(got[0].query, got[1].query)
    assert not torch.equal(got[0].tokens["student"], got[2].tokens["student"])
    # The teacher alone draws the same crops as teacher and student together.
    alone = images.batch(index, ["teacher"], nullcontext, torch.Generator().manual_seed(0))
    assert torch.equal(alone.tokens["teacher"], got[0].tokens["teacher"])


def test_sides_of_other_sizes_see_the_same_part_of_the_picture(backbone, make_model, split):
    # Two input sizes: the generator is rewound, so that the box is the same share of both.
    from dataclasses import replace

    coarse = replace(backbone.preprocessing, resize=16)
    sides = {
        "student": Side(make_model("apt"), backbone.preprocessing, CPU),
        "teacher": Side(make_model("apt"), coarse, CPU),
    }
    assert sides["student"].decoding != sides["teacher"].decoding
    flat = Split(
        np.broadcast_to(np.arange(24, dtype=np.uint8)[None, None, :, None] * 10, (4, 20, 24, 3)).copy(), np.zeros(4)
    )
    images = Images(flat, sides, CPU)
    seen = []
    real = batches.augment.random_resized_crop_flip
    try:
        batches.augment.random_resized_crop_flip = lambda x, g, s: seen.append(real(x, g, s)) or seen[-1]
        images.batch(np.arange(4), ["student", "teacher"], nullcontext, torch.Generator().manual_seed(0))
    finally:
        batches.augment.random_resized_crop_flip = real
    assert len(seen) == 2
    rising = [(x[:, 0, 8, 0] < x[:, 0, 8, -1]).tolist() for x in seen]
    assert rising[0] == rising[1]  # mirrored together or not at all


def test_learners_without_a_query_compute_none(backbone, make_model, split):
    sides = {"student": Side(make_model("apt"), backbone.preprocessing, CPU)}
    images = Images(split, sides, CPU)
    images.keep(["student"], nullcontext, 4)
    assert images.batch(np.arange(2), ["student"], nullcontext).query is None
    one_pass = {"student": Side(make_model("coda", one_pass=True), backbone.preprocessing, CPU)}
    assert Images(split, one_pass, CPU).batch(np.arange(2), ["student"], nullcontext).query is None
