"""A snapshot rebuilt is the model of its time, bit by bit."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call

from cdl_edge.train.checkpoint import load_state, save_state
from cdl_edge.train.snapshots import NETWORK, Snapshots
from cdl_edge.train.student import ModelSpec, PromptedViT

CLASSES, TASKS = 6, 3


def make(backbone, learner="finetune", one_pass=False):
    return PromptedViT(backbone.model, ModelSpec(learner, CLASSES, TASKS, seed=0, one_pass=one_pass)).eval()


def inputs_of(model):
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(9))
    return model.prepare(images)


def learn(model, snapshots, task, steps=3):
    """Steps as in a phase: an optimiser of its own, gradients of kept weights taken away in front of it."""
    generator = torch.Generator().manual_seed(task)
    model.learner.begin_task(task)
    optimiser = torch.optim.Adam(model.trainable(), lr=0.01)
    inputs = inputs_of(model)
    for _ in range(steps):
        labels = torch.randint(0, CLASSES, (5,), generator=generator)
        output = model(inputs, training=True)
        loss = nn.functional.cross_entropy(output.cls_logits, labels)
        optimiser.zero_grad()
        (loss if output.key_loss is None else loss + output.key_loss).backward()
        snapshots.freeze(model)
        optimiser.step()
    model.learner.end_task(task)
    snapshots.take(model)


def state_of(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("learner", "one_pass"),
    [("finetune", False), ("l2p", False), ("l2p", True), ("dualprompt", False), ("coda", False), ("apt", False)],
)
def test_every_snapshot_is_what_the_model_was(backbone, tmp_path, learner, one_pass):
    model, snapshots = make(backbone, learner, one_pass), Snapshots(TASKS)
    inputs, states, answers = inputs_of(model), [], []
    for task in range(TASKS):
        learn(model, snapshots, task)
        states.append(state_of(model))
        with torch.no_grad():
            answers.append(model(inputs, hidden=True))
    save_state(tmp_path / "kept.safetensors", snapshots.to_state())
    restored = Snapshots(TASKS)
    restored.load(load_state(tmp_path / "kept.safetensors"), torch.device("cpu"))
    assert len(snapshots) == len(restored) == TASKS
    for i, (state, answer) in enumerate(zip(states, answers, strict=True)):
        for kept in (snapshots, restored):
            rebuilt = kept.rebuild(i, model)
            assert rebuilt.keys() == state.keys()
            assert all(torch.equal(rebuilt[k], v) for k, v in state.items()), i
            with torch.no_grad():
                again = functional_call(model, rebuilt, (inputs,), {"hidden": True})
            assert torch.equal(again.cls_logits, answer.cls_logits)
            assert all(torch.equal(a, b) for a, b in zip(again.hidden, answer.hidden, strict=True))
    assert not torch.equal(answers[0].cls_logits, answers[1].cls_logits)
    # Asking a snapshot leaves the model as it is.
    assert all(torch.equal(v, states[-1][k]) for k, v in model.state_dict().items())


def test_each_task_keeps_an_equal_share_of_every_tensor(backbone):
    model, snapshots = make(backbone), Snapshots(TASKS)
    names = {k for k, _ in model.network.named_parameters()}
    for task in range(TASKS):
        learn(model, snapshots, task)
        assert snapshots.owners.keys() == names
        for name, owner in snapshots.owners.items():
            assert owner.dtype == torch.uint8
            assert int((owner > 0).sum()) <= owner.numel() * (task + 1) // TASKS, name
    # Two tasks leave a third of a tensor that all of them want to change.
    owner = snapshots.owners["blocks.0.mlp.fc1.weight"]
    assert [int((owner == i).sum()) for i in range(4)] == [0, 341, 341, 342]


def test_a_weight_that_is_not_kept_is_the_pretrained_one(backbone):
    model, snapshots = make(backbone), Snapshots(TASKS)
    learn(model, snapshots, 0)
    start = dict(backbone.model.named_parameters())
    for name, weight in model.network.named_parameters():
        free = snapshots.owners[name] == 0
        assert torch.equal(weight[free], start[name][free])
        assert (weight[~free] != start[name][~free]).all()


def test_the_weights_that_changed_most_are_kept():
    start, weight = torch.zeros(2, 4), torch.tensor([[0.1, -0.5, 0.0, 0.3], [0.3, 0.2, -0.4, 0.05]])
    model = one_tensor(weight, start)
    snapshots = Snapshots(2)
    snapshots.take(model)
    assert snapshots.owners["w"].tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert torch.equal(model.backbone.w, torch.where(snapshots.owners["w"] > 0, weight, start))


def test_equal_changes_are_chosen_in_order_and_unchanged_weights_are_nobodys():
    model = one_tensor(torch.tensor([0.0, 1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0]), torch.zeros(8))
    snapshots = Snapshots(4)
    snapshots.take(model)
    assert snapshots.owners["w"].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    model.backbone.w.data[5] = 1.0
    snapshots.take(model)  # its share is two, and one weight has changed
    assert snapshots.owners["w"].tolist() == [0, 1, 1, 0, 0, 2, 0, 0]
    model.backbone.w.data += torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 1])
    snapshots.take(model)  # what was left over is there for those who come later
    assert snapshots.owners["w"].tolist() == [3, 1, 1, 3, 3, 2, 0, 0]


def test_pruned_to_zero_as_packnet_does(backbone):
    model, snapshots = make(backbone), Snapshots(TASKS, "zero")
    inputs, answers = inputs_of(model), []
    for task in range(TASKS):
        learn(model, snapshots, task)
        with torch.no_grad():
            answers.append(model(inputs).cls_logits)
        for name, weight in model.network.named_parameters():
            owner = snapshots.owners[name]
            if weight.ndim < 2 or name in ("cls_token", "pos_embed"):
                assert (owner == 1).all(), name  # never pruned, and fixed behind the first task
            else:
                assert (weight[owner == 0] == 0).all(), name
    owner = snapshots.owners["blocks.0.mlp.fc1.weight"]
    assert [int((owner == i).sum()) for i in range(4)] == [0, 341, 341, 342]
    for i, answer in enumerate(answers):
        with torch.no_grad():
            assert torch.equal(functional_call(model, snapshots.rebuild(i, model), (inputs,)).cls_logits, answer)


def test_the_largest_weights_are_kept_where_the_others_become_zero():
    weight = torch.tensor([[0.1, -0.5, 0.0, 0.3], [0.3, 0.2, -0.4, 0.05]])
    model = one_tensor(weight, torch.full((2, 4), 0.3))
    snapshots = Snapshots(2, "zero")
    snapshots.take(model)
    assert snapshots.owners["w"].tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert torch.equal(model.backbone.w, torch.where(snapshots.owners["w"] > 0, weight, torch.zeros(2, 4)))


def test_a_checkpoint_of_before_retraining_is_read(backbone):
    model, snapshots = make(backbone), Snapshots(TASKS)
    learn(model, snapshots, 0)
    state = snapshots.to_state()
    del state["pruned"]
    restored = Snapshots(TASKS)
    restored.load(state, torch.device("cpu"))
    assert restored.pruned == 1


def test_more_tasks_than_a_byte_can_count():
    model = one_tensor(torch.ones(600), torch.zeros(600))
    snapshots = Snapshots(300)
    for _ in range(300):
        model.backbone.w.data[snapshots.owners.get("w", torch.zeros(600)) == 0] = 1.0
        snapshots.take(model)
    assert torch.equal(snapshots.owners["w"].unique(), torch.arange(1, 301, dtype=torch.int16))


def test_kept_weights_get_no_gradient_even_where_it_is_not_a_number():
    model = one_tensor(torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.zeros(4))
    snapshots = Snapshots(2)
    model.backbone.w.grad = torch.ones(4)
    snapshots.freeze(model)  # before the first task is over nothing is kept
    assert model.backbone.w.grad.tolist() == [1, 1, 1, 1]
    snapshots.take(model)
    model.backbone.w.grad = torch.tensor([torch.nan, torch.inf, 3.0, 4.0])
    snapshots.freeze(model)
    assert model.backbone.w.grad.tolist() == [0, 0, 3, 4]


def test_the_memory_of_all_snapshots_is_close_to_one_network(backbone):
    model, snapshots = make(backbone), Snapshots(TASKS)
    for task in range(TASKS):
        learn(model, snapshots, task)
    more = [{"weight": torch.zeros(CLASSES, 16), "bias": torch.zeros(CLASSES)} for _ in range(TASKS)]
    sizes = snapshots.sizes(model, more)
    weights = sum(p.numel() for p in model.network.parameters())
    heads = TASKS * (2 * 4 * (16 * CLASSES + CLASSES) + 8)  # two heads, and the count of tasks
    assert sizes == {
        "snapshots": TASKS,
        "network_bytes": 4 * weights,
        "owner_map_bytes": weights,
        "learnt_bytes": heads,
        "total_bytes": 5 * weights + heads,
        "full_copies_bytes": TASKS * 4 * weights + heads,
        "networks": (5 * weights + heads) / (4 * weights),
    }


def test_a_prompt_learners_snapshots_hold_nothing_of_the_backbone(backbone):
    model, snapshots = make(backbone, "apt"), Snapshots(TASKS)
    learn(model, snapshots, 0)
    assert snapshots.owners == {}
    assert not any(k.startswith(NETWORK) for k in snapshots.kept[0])
    assert snapshots.kept[0].keys() == model.state_dict().keys()
    assert snapshots.sizes(model, [])["learnt_bytes"] == sum(
        v.numel() * v.element_size() for v in model.state_dict().values()
    )


def one_tensor(weight, start):
    """What Snapshots reads of a student, with a network of one tensor."""
    network, given = nn.Module(), nn.Module()
    network.w, given.w = nn.Parameter(weight.clone()), nn.Parameter(start.clone())
    return SimpleNamespace(
        learner=SimpleNamespace(whole_network=True), backbone=network, pretrained=given, state_dict=dict
    )
