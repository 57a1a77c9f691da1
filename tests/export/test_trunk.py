"""A pretrained trunk in front of a student: its graph computes the same, at even and odd sizes, in every profile."""

from __future__ import annotations

import numpy as np
import pytest

from cdl_edge.export.profiles import PROFILES
from cdl_edge.images import Preprocessing
from cdl_edge.train.backbone import Architecture


@pytest.fixture(scope="module")
def hybrid(lab):
    """hybrid(size): 3 x 3 patches behind EfficientNet-Lite0 with random weights."""
    made = {}

    def make(size):
        if size not in made:
            vit = Architecture(size, 32, 32, 2, 2, 0, trunk="efficientnet_lite0").build()
            made[size] = lab.randomise(vit)
        return made[size]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("size", [96, 75])
def test_profiles(lab, hybrid, size, profile):
    preprocessing = Preprocessing(size, size, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.4, 0.3))
    student = lab.student("apt", backbone=hybrid(size))
    pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    pixels[0] = 0
    graph = lab.export(student, profile=PROFILES[profile], preprocessing=preprocessing)
    got, expected = graph.each(pixels)["logits"], lab.truth(student, pixels, preprocessing)["logits"]
    assert got.shape == expected.shape and np.abs(got - expected).max() < 1e-4
    assert np.abs(expected[0] - expected[1]).max() > 1e-3  # pixels matter
