"""The frozen learner: the bare backbone, and heads on it."""

import pytest
import torch

from cdl_edge.errors import InputError
from cdl_edge.train.config import TrainConfig
from cdl_edge.train.learners.base import LearnerSpec
from cdl_edge.train.learners.frozen import Frozen
from cdl_edge.train.loop import train
from cdl_edge.train.run import load_run


def test_nothing_of_it_learns_and_no_block_is_changed():
    learner = Frozen(LearnerSpec(16, 6, 16, 3, 0))
    for task in range(3):
        learner.begin_task(task)
        learner.end_task(task)
    assert list(learner.parameters()) == [] and learner.blocks() == () and not learner.needs_query
    assert all(learner.at_block(i, None, training) is None for i in range(6) for training in (False, True))


@pytest.mark.parametrize("head", ["learned", "slda"])
def test_its_class_token_is_that_of_the_backbone(make_model, backbone, tokens, head):
    model = make_model("frozen", kd=False, head=head)
    output = model(tokens)
    expected = model.query(tokens)
    assert torch.allclose(output.cls_logits, model.head(expected), atol=1e-6)
    if head == "slda":
        x = tokens
        for block in backbone.model.blocks[:-1]:
            x = block(x)
        a, b, c, d = backbone.model.norm(x)[:, 1:].unbind(dim=1)  # 2 x 2 patches in front of the last block
        pooled = [a + b + c + d, (c + d - a - b) / 2, (b + d - a - c) / 2, (a + d - b - c) / 2]
        assert torch.allclose(output.features, torch.cat([expected, *(p / 4 for p in pooled)], dim=1), atol=1e-5)


@pytest.mark.slow
def test_a_learned_head_learns_and_one_from_statistics_takes_no_step(tmp_path, make_config):
    steps = {}
    for head in ("learned", "ncm"):
        config = make_config(tmp_path / head, learner="frozen", distill="none", head=head)
        metrics = train(config, quiet=True)
        steps[head] = [len(task) for task in metrics["student"]["loss"]]
        assert metrics["teacher"] is None and load_run(tmp_path / head).config.learner == "frozen"
    assert steps == {"learned": [2, 2], "ncm": [0, 0]}


def test_there_is_nothing_to_teach():
    assert TrainConfig(data="digits", out="x", learner="frozen").distill == "none"
    with pytest.raises(InputError, match="nothing that could be taught"):
        TrainConfig(data="digits", out="x", learner="frozen", distill="kdp")
