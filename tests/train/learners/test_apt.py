"""APT: additive rows of the class token, merged after each task."""

import pytest
import torch

from cdl_edge.train.learners.apt import APT
from cdl_edge.train.learners.base import LearnerSpec


@pytest.fixture
def learner():
    return APT(LearnerSpec(16, 6, 16, 3, 0))


def test_merge(learner):
    generator = torch.Generator().manual_seed(0)
    learner.begin_task(0)
    first = learner.prompt.data.normal_(generator=generator).clone()
    learner.end_task(0)
    assert torch.equal(learner.merged, first)  # the first task has nothing to be merged with
    assert torch.equal(learner.prompt.data, first)
    learner.begin_task(1)
    second = learner.prompt.data.normal_(generator=generator).clone()
    learner.end_task(1)
    expected = 0.7 * first + 0.3 * second
    assert torch.allclose(learner.merged, expected, atol=1e-6)
    assert torch.equal(learner.prompt.data, learner.merged)  # the next task starts there
    third = learner.prompt.data.normal_(generator=generator).clone()
    learner.end_task(2)
    assert torch.allclose(learner.merged, 0.7 * expected + 0.3 * third, atol=1e-6)


def test_training_uses_the_new_prompt_inference_the_merged(learner):
    learner.begin_task(0)
    learner.prompt.data.normal_()
    for block in range(6):
        during = learner.at_block(block, None, training=True)
        assert torch.equal(during.cls_key, learner.prompt[block, 0])
        assert torch.equal(during.cls_value, learner.prompt[block, 1])
        assert during.keys is None and during.values is None
        after = learner.at_block(block, None, training=False)
        assert after.cls_key.abs().sum() == 0  # zeros until the task has ended


def test_merged_and_prompt_do_not_share_memory(learner):
    learner.end_task(0)
    kept = learner.merged.clone()
    learner.prompt.data += 1
    assert torch.equal(learner.merged, kept)


def test_no_query_is_needed(learner):
    assert not learner.needs_query and learner.head == "normalised" and learner.blocks() == ()


def test_only_the_class_tokens_key_and_value_are_changed(make_model, backbone, tokens):
    from cdl_edge.train.student import run_block

    model = make_model("apt")
    block = backbone.model.blocks[0]
    seen = {}
    real = block.attn.qkv.forward
    with torch.no_grad():
        prompt = model.learner.at_block(0, None, training=False)
        qkv = real(block.norm1(tokens)).reshape(5, 5, 3, 16)
        k, v = qkv[:, :, 1].clone(), qkv[:, :, 2].clone()
        k[:, 0] += prompt.cls_key
        v[:, 0] += prompt.cls_value
        changed = torch.stack([qkv[:, :, 0], k, v], dim=2).reshape(5, 5, 48)
        block.attn.qkv.forward = lambda x: changed
        try:
            seen["by hand"] = block(tokens)
        finally:
            del block.attn.qkv.forward
        seen["ours"] = run_block(block, tokens, prompt)
    assert torch.allclose(seen["ours"], seen["by hand"], atol=1e-5)


@pytest.mark.parametrize("compat", [False, True])
def test_where_the_next_task_goes_on(compat):
    learner = APT(LearnerSpec(16, 6, 16, 3, 0, compat=compat, apt_momentum=0.8))
    generator = torch.Generator().manual_seed(0)
    merged = torch.zeros(6, 2, 16)
    for task in range(3):
        learner.begin_task(task)
        new = learner.prompt.data.normal_(generator=generator).clone()
        learner.end_task(task)
        merged = new if task == 0 else 0.8 * merged + 0.2 * new
        assert torch.allclose(learner.merged, merged, atol=1e-6)
        assert torch.allclose(learner.prompt.data, new if compat else merged, atol=1e-6)
