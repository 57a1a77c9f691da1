"""A new learner and a new head are one file each: here they are this file, from training to a prediction."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest

from cdl_edge.class_statistics import ClassStatistics
from cdl_edge.data import load_dataset
from cdl_edge.errors import InputError
from cdl_edge.export.export_bundle import export
from cdl_edge.heads import CLOSED_FORM, LinearMap
from cdl_edge.heads import register as register_head
from cdl_edge.runtime import load
from cdl_edge.runtime.predict import predict
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.learners import LEARNERS, BlockPrompt, Learner
from cdl_edge.train.learners.base import Entries, cosine, halves, register, uniform
from cdl_edge.train.loop import train


class Toy(Learner):
    """A row for all images in block 0, the two nearest of three entries in block 2."""

    selection: ClassVar[dict[str, object]] = {"kind": "top-k", "k": 2}

    def __init__(self, spec):
        super().__init__(spec)
        self.shared = uniform((2, spec.width), self.generator(0))
        self.rows = uniform((3, 4, spec.width), self.generator(1))
        self.keys = uniform((3, spec.key_width), self.generator(2))

    def blocks(self):
        return (2,)

    def entries(self, block):
        return Entries(self.rows, self.keys, (0, 1, 2))

    def similarity(self, block, query):
        return cosine(query, self.keys)

    def at_block(self, block, query, training):
        if block == 0:
            keys, values = halves(self.shared)
            return BlockPrompt(keys[None], values[None])
        if block != 2:
            return None
        similarity = self.similarity(block, query)
        chosen = similarity.topk(2, dim=1)
        keys, values = halves(self.rows[chosen.indices])
        loss = (1 - chosen.values).mean() if training else None
        return BlockPrompt(keys.flatten(1, 2), values.flatten(1, 2), loss=loss, weights=similarity.detach())


def toy_head(statistics: ClassStatistics) -> LinearMap:
    """Scalar products with the class means."""
    means = statistics.means
    return LinearMap(means, -0.5 * (means * means).sum(axis=1), 0.0)


@pytest.fixture
def way(short_training, tmp_path):
    """make(**options of the training) -> what train returned, and what the bundle says of three digits."""

    def make(**options):
        settings = {**short_training, "tasks": 2, "limit_per_class": 3, "batch_size": 16, "range_images": 4}
        config = TrainConfig("digits", str(tmp_path / "run"), **{**settings, **options})
        metrics = train(config, quiet=True)
        result = export(tmp_path / "run", tmp_path / "bundle", images=8)
        assert 0 <= result["parity"]["max_abs_error"] <= result["parity"]["tolerance"]
        digits = [np.asarray(item).reshape(8, 8, -1)[:, :, :1] for item in load_dataset("digits").val.items[:3]]
        with load(tmp_path / "bundle", threads=1) as runner:
            return metrics, predict(runner, [digit.repeat(3, axis=2).astype(np.uint8) for digit in digits])

    return make


@pytest.mark.parametrize("distill", ["none", pytest.param("cdl-prompt", marks=pytest.mark.slow)])
def test_a_toy_learner(way, distill):
    register("toy")(Toy)
    try:
        metrics, found = way(learner="toy", distill=distill, head="learned")
    finally:
        del LEARNERS["toy"]
    assert metrics["config"]["learner"] == "toy" and len(metrics["student"]["matrix"]) == 2
    for answer in found["predictions"]:
        assert len(answer["prompts"]["selected"]) == len(answer["prompts"]["weights"]) == 2
        assert 0 <= answer["probability"] <= 1


def test_a_toy_head(way):
    register_head("toy")(toy_head)
    try:
        metrics, found = way(learner="frozen", distill="none", head="toy")
    finally:
        del CLOSED_FORM["toy"]
    assert metrics["config"]["head"] == "toy" and len(found["predictions"]) == 3


@pytest.mark.slow
def test_a_learner_that_does_not_say_what_its_prompts_are_made_of(way, monkeypatch):
    class Silent(Toy):
        def entries(self, block):
            return None

    monkeypatch.setitem(LEARNERS, "silent", Silent)
    with pytest.raises(InputError, match="the learner Silent cannot be exported"):
        way(learner="silent", distill="none", head="learned", epochs=1)


def test_two_of_one_name():
    with pytest.raises(ValueError, match="two learners of the name 'l2p'"):
        register("l2p")(Toy)
    with pytest.raises(ValueError, match="two heads of the name 'aligned'"):
        register_head("aligned")(toy_head)
    assert LEARNERS["l2p"] is not Toy and CLOSED_FORM.keys() == {"ncm", "slda", "ranpac"}
