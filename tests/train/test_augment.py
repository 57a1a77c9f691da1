"""Augmentations: the same generator, the same images; targets stay shares."""

import numpy as np
import pytest
import torch

from cdl_edge.images import Preprocessing
from cdl_edge.train.augment import Normalise, colour_jitter, cut_out, mix, random_boxes, random_resized_crop_flip

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=6, side=12):
    return torch.rand(n, 3, side, side, generator=generator(9)) * 255


def test_normalise():
    made = Preprocessing(2, 2, mean=(0.1, 0.5, 0.9), std=(0.5, 0.25, 1.0))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 3), dtype=np.uint8)
    got = Normalise(made, CPU)(pixels)
    expected = (pixels / 255.0 - np.array(made.mean)) / np.array(made.std)
    assert got.shape == (3, 3, 2, 2) and got.dtype == torch.float32
    assert np.abs(got.numpy() - expected.transpose(0, 3, 1, 2)).max() < 1e-5
    raw = Normalise(Preprocessing(2, 2, mean=(0, 0, 0), std=(1, 1, 1)), CPU)(pixels)
    assert np.abs(raw.numpy() - pixels.transpose(0, 3, 1, 2) / 255.0).max() < 1e-6


@pytest.mark.parametrize(
    "function",
    [
        lambda x, g: random_resized_crop_flip(x, g, (0.3, 1.0)),
        lambda x, g: colour_jitter(x, g, 0.3),
        lambda x, g: torch.cat([mix(x, torch.eye(6), g, 0.4)[0] for _ in range(4)]),
    ],
)
def test_the_same_generator_gives_the_same_images(function):
    x = images()
    before = x.clone()
    one, two, other = function(x, generator()), function(x, generator()), function(x, generator(1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(x, before)  # nothing in place
    torch.manual_seed(1)
    assert torch.equal(function(x, generator()), one)  # the global generator has no say
    assert torch.isfinite(one).all()


def test_two_models_see_the_same_crops():
    # Boxes are drawn once and cut twice: teacher and student look at one picture, whatever their sizes.
    boxes = random_boxes(6, generator(), (0.5, 1.0))
    one = cut_out(images(), boxes)
    assert torch.equal(cut_out(images(), boxes), one)
    assert torch.equal(random_resized_crop_flip(images(), generator(), (0.5, 1.0)), one)
    ramp = torch.linspace(0, 1, 48).expand(6, 3, 48, 48)
    small = torch.nn.functional.avg_pool2d(ramp, 4)
    assert (cut_out(ramp, boxes, 12) - cut_out(small, boxes, 12)).abs().max() < 0.03
    part = cut_out(images()[2:4], boxes[2:4])
    assert torch.allclose(part, one[2:4], atol=1e-3)  # a process cuts its own share of the step


def test_boxes_stay_inside_and_have_the_area_asked_for():
    boxes = random_boxes(500, generator(), (0.3, 0.6))
    assert boxes.shape == (500, 2, 3) and boxes[:, 0, 1].abs().max() == boxes[:, 1, 0].abs().max() == 0
    width, height = boxes[:, 0, 0].abs(), boxes[:, 1, 1]
    area, aspect = width * height, width / height
    assert area.min() >= 0.2999 and area.max() <= 0.6001 and aspect.min() >= 0.749 and aspect.max() <= 1.334
    for half, centre in ((width, boxes[:, 0, 2]), (height, boxes[:, 1, 2])):
        assert (half + centre.abs()).max() <= 1 + 1e-6
    assert 0.4 < (boxes[:, 0, 0] < 0).float().mean() < 0.6
    assert (random_boxes(500, generator(), (0.3, 0.6), flip=False)[:, 0, 0] > 0).all()


def test_a_crop_of_everything_is_the_image():
    x = images()
    # area 1 with an aspect other than 1 still cuts one side: a constant image shows that nothing is invented
    flat = torch.full((5, 3, 8, 8), 7.0)
    assert torch.allclose(random_resized_crop_flip(flat, generator(), (0.3, 1.0)), flat, atol=1e-4)
    got = random_resized_crop_flip(x, generator(), (0.5, 1.0))
    assert got.min() >= x.min() - 1e-3 and got.max() <= x.max() + 1e-3


def test_crops_have_the_size_asked_for_and_every_image_its_own():
    x = images(1).expand(8, -1, -1, -1)
    got = random_resized_crop_flip(x, generator(), (0.3, 0.6), size=9)
    assert got.shape == (8, 3, 9, 9)
    assert len({tuple(g.flatten().tolist()) for g in got}) == 8


def test_about_half_is_mirrored():
    ramp = torch.arange(16.0).expand(400, 3, 16, 16)
    got = random_resized_crop_flip(ramp, generator(), (0.9, 1.0))
    mirrored = (got[:, 0, 0, 0] > got[:, 0, 0, -1]).float().mean()
    assert 0.4 < mirrored < 0.6
    never = random_resized_crop_flip(ramp, generator(), (0.9, 1.0), flip=False)
    assert (never[:, 0, 0, 0] < never[:, 0, 0, -1]).all()


def test_mixed_targets_are_shares():
    targets = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 3, 1, 0]), 4).float()
    kinds = set()
    for seed in range(40):
        x, y = mix(images(), targets, generator(seed), 0.4)
        assert torch.allclose(y.sum(1), torch.ones(6), atol=1e-6)
        assert y.min() >= 0 and y.max() <= 1 and torch.isfinite(x).all()
        kinds.add(bool((x == images()).any()))
    assert kinds == {True, False}  # CutMix keeps pixels, mixup changes all


def test_the_share_of_cutmix_is_the_share_of_the_pixels():
    x = torch.zeros(2, 3, 16, 16)
    x[1] = 1
    for seed in range(60):
        y, targets = mix(x, torch.eye(2), generator(seed), 0.4)
        for i in range(2):  # holds for mixup too
            assert y[i].mean().item() == pytest.approx(targets[i, 1].item(), abs=1e-5)
