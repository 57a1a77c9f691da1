"""Ranges kept while learning: what the collector sees, and that a run's file stands for images that are gone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cdl_edge.data import Split
from cdl_edge.ranges import Histogram, Ranges, merge_tensors
from cdl_edge.train import range_keeper as ranges_module
from cdl_edge.train.batches import Pipeline, TaskImages
from cdl_edge.train.loop import _Training, train
from cdl_edge.train.range_keeper import RangeKeeper, collect, range_of

DEVICE = torch.device("cpu")
ENDS = ("qkv", "proj", "fc1", "fc2")


@pytest.fixture
def images(backbone):
    """images(model, count) -> a task of that many."""

    def make(model, count=9):
        pixels = np.random.default_rng(3).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
        side = Pipeline(model, backbone.preprocessing, DEVICE)
        return TaskImages(Split(pixels, np.zeros(count, np.int64)), {"student": side}, DEVICE)

    return make


@torch.no_grad()
def by_hand(model, tokens, name, query):
    """{tensor: values (B, N, D)} of one pass, from the weights alone."""
    vit, found = model.backbone, {}
    x = tokens
    prompted = name == "prompted"
    if prompted and model.kd is not None:
        x = torch.cat([x, model.kd.token.expand(len(x), 1, -1)], 1)
    for i, block in enumerate(vit.blocks):
        normed = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-6)
        found[f"{name}.blocks.{i}.qkv"] = normed
        q, k, v = (normed @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, -1)
        if prompted:
            own = model.learner.at_block(i, query, False)
            for rows in ((own.keys, own.values) if own else None, model.kd.at_block(i) if model.kd else None):
                if rows is not None:
                    k, v = (
                        torch.cat([old, new.expand(len(x), -1, -1)], 1) for old, new in zip((k, v), rows, strict=True)
                    )
        if i == len(vit.blocks) - 1:  # only the rows that a head reads
            rows = [0, -1] if prompted and model.kd is not None else [0]
            q, x = q[:, rows], x[:, rows]
        heads, size = block.attn.num_heads, x.shape[-1] // block.attn.num_heads
        mixed = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / size**0.5
            mixed.append(scores.softmax(-1) @ v[..., part])
        found[f"{name}.blocks.{i}.proj"] = torch.cat(mixed, -1)
        x = x + torch.cat(mixed, -1) @ block.attn.proj.weight.T + block.attn.proj.bias
        normed = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, 1e-6)
        found[f"{name}.blocks.{i}.fc1"] = normed
        hidden = F.gelu(normed @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        found[f"{name}.blocks.{i}.fc2"] = hidden
        x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return found


@pytest.mark.parametrize(("learner", "kd"), [("dualprompt", True), ("coda", False)])
def test_the_collector_sees_what_is_computed_by_hand(make_model, images, learner, kd):
    model = make_model(learner, kd=kd)
    task = images(model)
    tokens = task.prepare("student", np.arange(9))
    query = model.query(tokens)
    expected = {**by_hand(model, tokens, "query", None), **by_hand(model, tokens, "prompted", query)}
    found = collect(task, 9)
    assert list(found) == list(expected)
    assert set(found) == {f"{p}.blocks.{i}.{e}" for p in ("query", "prompted") for i in range(6) for e in ENDS}
    for name, values in expected.items():
        true = range_of("qkv", values)
        got = found[name].histogram
        assert got.values == values.numel(), name
        assert (got.low, got.high) == pytest.approx((true.histogram.low, true.histogram.high), rel=1e-4), name
        for share in (0.01, 0.3, 0.9, 0.999):
            assert abs(got.percentile(share) - true.histogram.percentile(share)) <= 2 * got.width, name
        if name.endswith(("qkv", "fc1")):
            assert np.allclose(found[name].channels, true.channels, rtol=1e-4, atol=1e-5), name
        else:
            assert found[name].channels is None
    assert all(not m._forward_pre_hooks for m in model.backbone.modules())


def test_a_one_pass_student_has_one_pass(make_model, images):
    for model in (make_model("apt"), make_model("l2p", one_pass=True)):
        assert {n.split(".")[0] for n in collect(images(model), 4)} == {"prompted"}


def test_the_query_pass_can_be_left_out(make_model, images):
    task = images(make_model("l2p"))
    with_query, without = collect(task, 9), collect(task, 9, query=False)
    assert list(without) == [n for n in with_query if n.startswith("prompted")]
    assert all(np.array_equal(without[n].histogram.counts, with_query[n].histogram.counts) for n in without)


def test_images_are_spread_over_the_task_and_chunks_change_nothing(make_model, images, monkeypatch):
    model = make_model("apt")
    task = images(model, 10)
    seen = []
    monkeypatch.setattr(
        task, "prepare", lambda name, index: seen.extend(index) or TaskImages.prepare(task, name, index)
    )
    few = collect(task, 4)
    assert seen == [0, 2, 5, 7] and few["prompted.blocks.0.fc2"].histogram.values == 4 * 6 * 64
    whole = collect(task, 10)
    monkeypatch.setattr(ranges_module, "CHUNK", 3)
    chunked = collect(task, 10)
    for name, tensor in whole.items():
        other = chunked[name].histogram
        assert other.values == tensor.histogram.values
        assert (other.low, other.high) == pytest.approx((tensor.histogram.low, tensor.histogram.high), rel=1e-5)


@pytest.mark.parametrize("shape", [(5, 3, 8), (70, 16)])
def test_a_tensors_range(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3 - 1
    made = range_of("query.blocks.0.fc1", x)
    assert np.array_equal(made.histogram.counts, Histogram.of(x.numpy()).counts)
    flat = x.reshape(-1, shape[-1])
    assert torch.equal(torch.from_numpy(made.channels), torch.stack([flat.min(0).values, flat.max(0).values]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_has_no_range(value):
    with pytest.raises(FloatingPointError, match=r"query\.blocks\.2\.proj: not finite"):
        range_of("query.blocks.2.proj", torch.tensor([[1.0, value], [2.0, 3.0]]))


# -- drift ------------------------------------------------------------------------------------------------------------


def test_drift_of_a_change_made_by_hand(make_model, images, tmp_path):
    model = make_model("dualprompt")
    keeper = RangeKeeper(tmp_path / "ranges.npz", 100)
    task = images(model)
    keeper.begin(task)
    assert keeper.before == {}  # nothing was learnt before the first task
    keeper.end(task)
    keeper.begin(task)
    block = model.backbone.blocks[3]
    handle = block.attn.proj.register_forward_pre_hook(lambda _, x: x[0] * 1.25)  # in front of the collector's
    keeper.end(task)
    handle.remove()
    moved = Ranges.load(tmp_path / "ranges.npz").tasks[1].drift
    for i in range(3):
        for end in ENDS:
            assert moved[f"prompted.blocks.{i}.{end}"] == (1.0, 1.0)
    assert moved["prompted.blocks.3.proj"] == pytest.approx((1.25, 1.25), rel=0.01)
    assert moved["prompted.blocks.5.fc1"] != (1.0, 1.0)
    assert all(d == (1.0, 1.0) for n, d in moved.items() if n.startswith("query"))


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_keeps_its_ranges(tmp_path, make_config):
    out = tmp_path / "run"
    train(make_config(out, range_images=30), quiet=True)
    kept = Ranges.load(out / "ranges.npz")
    assert [t.images for t in kept.tasks] == [30, 30]  # of 40 a task
    assert len(kept.tasks[0].tensors) == 2 * 6 * 4
    assert all(d == (1.0, 1.0) for d in kept.tasks[0].drift.values())
    moved = {n: d for n, d in kept.tasks[1].drift.items() if d != (1.0, 1.0)}
    assert moved and all(n.startswith("prompted") for n in moved)


@pytest.mark.slow
def test_looking_at_ranges_changes_no_number_of_the_run(tmp_path, make_config):
    for images in (0, 256):
        train(make_config(tmp_path / str(images), range_images=images), quiet=True)
    assert not (tmp_path / "0" / "ranges.npz").exists()
    assert [t.images for t in Ranges.load(tmp_path / "256" / "ranges.npz").tasks] == [40, 40]
    student, same = ((tmp_path / n / "student.safetensors").read_bytes() for n in ("0", "256"))
    assert student == same


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["coda", "dualprompt", "apt", "finetune"])
def test_kept_ranges_stand_for_images_that_are_gone(tmp_path, make_config, learner):
    distill = "none" if learner == "finetune" else "kdp"
    options = {"learner": learner, "distill": distill, "tasks": 5, "limit_per_class": 20, "precision": "fp32"}
    run = _Training(make_config(tmp_path / "run", **options), False, True)
    run.run()
    kept = Ranges.load(tmp_path / "run" / "ranges.npz")
    parts = [
        collect(TaskImages(run.scenario.split(run.dataset.train, t), run.pipelines, DEVICE), kept.tasks[t].images)
        for t in range(5)
    ]
    errors = {}
    for drift in (True, False):
        merged, errors[drift] = kept.merged(drift), []
        for name in parts[0]:
            oracle, mine = merge_tensors([p[name] for p in parts]).histogram, merged[name].histogram
            assert mine.values == oracle.values
            if name.startswith("query"):  # frozen: nothing is lost
                assert np.array_equal(mine.counts, oracle.counts) and (mine.low, mine.high) == (oracle.low, oracle.high)
            else:
                errors[drift] += [abs(mine.percentile(s) / oracle.percentile(s) - 1) for s in (0.001, 0.999)]
    assert np.mean(errors[True]) < 0.04 and max(errors[True]) < 0.25
    assert np.mean(errors[True]) < np.mean(errors[False])
