"""The throughput benchmark: its arithmetic, what it puts around foreign code, and one run beside a stand-in of it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

STAND_IN = """
import torch

class CODAPrompt:
    '''As little as the benchmark drives: two models, two epochs of each.'''

    def __init__(self, settings):
        self.settings = settings
        self.model, self.s_model = Model(), Model()

    def add_valid_output_dim(self, count):
        print("their code prints", count)

    def learn_batch(self, loader, dataset, folder, args, val=None):
        for model in (self.model, self.s_model):
            optimiser = torch.optim.Adam(model.parameters(), 1e-3)
            for _ in range(self.settings["schedule"][-1]):
                for x, y, task in loader:
                    if model is self.s_model:
                        with torch.no_grad():
                            self.model.forward(x.cuda())
                    loss = torch.nn.functional.cross_entropy(model(x.cuda()), y.cuda())
                    optimiser.zero_grad()
                    loss.backward()
                    optimiser.step()

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.s_feat, self.last = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)

    def forward(self, x):
        x = x.mean((2, 3))
        with torch.no_grad():
            self.s_feat(x)
        return self.last(x)
"""
FLOPS = {"query": 2 * 3 * 3, "forward": 2 * 3 * 2}
"of the stand-in, an image"


@pytest.fixture(scope="module")
def benchmarks(root):
    """The two scripts as modules."""
    sys.path.insert(0, str(root / "benchmarks"))
    try:
        return importlib.import_module("throughput"), importlib.import_module("authors")
    finally:
        sys.path.pop(0)


def side(seconds, once=0.0, images=10, flops=2e9):
    clocks = {"wall": seconds * 2, "cpu": seconds, "once": {"wall": once, "cpu": once}}
    return {**clocks, "images": images, "flops": flops, "parts": {"forward": seconds / 2, "rest": seconds / 2}}


def measured(seconds, **more):
    return {"teacher": side(seconds, **more), "student": side(seconds, **more), "precision": "fp32", "peak_gb": 1.0}


def test_time_in_a_part_does_not_count_for_the_part_around_it(benchmarks, monkeypatch):
    recorder = benchmarks[0].Recorder("cpu", False)
    clock = iter(float(i) for i in range(100))
    monkeypatch.setattr(recorder, "now", lambda: {"cpu": next(clock), "wall": 0.0})
    recorder.epochs["teacher"] = [{"flops": 1.0}]  # no FLOPs are counted in a second epoch
    recorder.begin("teacher")  # 0
    with recorder.part("forward"):  # 1 .. 6
        with recorder.part("query"):  # 2 .. 3
            pass
        with recorder.part("query"):  # 4 .. 5
            pass
    recorder.end("teacher", 4)  # 7
    epoch = recorder.epochs["teacher"][1]
    assert epoch["cpu"] == 7
    assert epoch["parts"] == {"forward": 3.0, "query": 2.0, "rest": 2.0}


def test_a_missing_epoch_is_an_error(benchmarks):
    with pytest.raises(RuntimeError, match="teacher: 0 epoch"):
        benchmarks[0].Recorder("cpu", False).result("fp32")


def test_what_is_done_once_is_spread_over_the_epochs_of_the_papers(benchmarks):
    assert benchmarks[0].images_per_second(side(2.0), "cpu") == pytest.approx(5.0)
    assert benchmarks[0].images_per_second(side(2.0, once=20.0), "cpu") == pytest.approx(10 / 3)


def test_ratios_are_taken_within_a_round(benchmarks):
    throughput = benchmarks[0]
    rounds = {
        "authors": [measured(8.0), measured(4.0), None],  # the machine was slower in the first round
        "ours": [measured(2.0), measured(1.0), measured(1.0)],
    }
    row = throughput.summary("ours", rounds, "cpu", {"fp32": {"torch": 10.0, "oneDNN": 20.0}})
    assert row["student"]["ratio"] == {"median": 4.0, "range": [4.0, 4.0]}
    assert row["student"]["ratio_to_loader"] == {"median": None, "range": None}
    assert row["student"]["images_per_second"] == 10.0
    # 2 GFLOP an image at 20 GFLOP/s are 100 ms; 10 images a second take 100 ms each.
    assert row["student"]["floor_ms_per_image"] == pytest.approx(100.0)
    assert row["student"]["floor_share"] == pytest.approx(1.0)
    assert row["student"]["ms_per_image"]["forward"] == pytest.approx(50.0)
    assert row["student"]["ms_per_image"]["query"] == 0.0


def test_a_variant_that_never_ran_is_null(benchmarks, capsys):
    throughput = benchmarks[0]
    assert throughput.summary("ours", {"ours": [None]}, "cpu", {}) is None
    throughput.show("coda, kdp", {"ours": None, "authors": throughput.summary("a", {"a": [measured(1.0)]}, "cpu", {})})
    assert "ours" in capsys.readouterr().out


def test_a_worker_that_fails_says_why(benchmarks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "false")
    assert benchmarks[0].spawn({"variant": "ours", "learner": "coda", "distiller": "kdp", "threads": 1}) is None
    assert capsys.readouterr().err == "ours, coda, kdp: exit status 1\n"


def test_cuda_without_a_gpu_is_no_copy_but_of_a_leaf_that_learns(benchmarks):
    stay = benchmarks[1].stay
    plain, leaf = torch.zeros(2), torch.zeros(1, requires_grad=True)
    assert stay(plain) is plain
    moved = stay(leaf, "cuda:0")
    moved += 1  # torch refuses this for the leaf
    assert leaf.item() == 0 and not moved.is_leaf


def test_an_unknown_variant_is_refused(root, tmp_path):
    script = str(root / "benchmarks" / "throughput.py")
    command = [sys.executable, script, "--authors", str(tmp_path), "--variants", "authors,our"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2 and "our" in process.stderr


@pytest.mark.slow
def test_one_run_beside_a_stand_in(root, tmp_path):
    package = tmp_path / "checkout" / "learners"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import prompt\n")
    (package / "prompt.py").write_text(STAND_IN)
    options = {
        "--authors": package.parent, "--size": "tiny", "--batch-size": 2, "--steps": 1, "--repeats": 1, "--threads": 1,
        "--learners": "coda", "--distillers": "kdp", "--variants": "authors,ours-kept",
    }  # fmt: skip
    command = [sys.executable, str(root / "benchmarks" / "throughput.py")]
    command += [str(part) for pair in options.items() for part in pair]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout.splitlines()[-1])
    rows = document["cells"]["coda"]["kdp"]
    # A linear layer whose input wants no gradient: backward is one product, for the weights.
    query, forward = FLOPS["query"], FLOPS["forward"]
    for name, flops in (("teacher", query + 2 * forward), ("student", 2 * query + 3 * forward)):
        theirs, ours = rows["authors"][name], rows["ours-kept"][name]
        assert theirs["gflop_per_image"] * 1e9 == pytest.approx(flops)
        assert ours["ratio"]["median"] == pytest.approx(ours["images_per_second"] / theirs["images_per_second"])
        # One pass forward and one backward through ViT-Ti (1.25 GMAC), which was asked for the query before.
        assert 4 < ours["gflop_per_image"] < 6
        assert ours["once_seconds"] > 0 and theirs["once_seconds"] == 0
        assert ours["ms_per_image"]["query"] == 0 and ours["ms_per_image"]["backward"] > 0
    assert rows["authors"]["student"]["ms_per_image"]["teacher"] > 0
    assert set(document["product_gflop_per_second"]) == {"fp32", "bf16"}
    assert list(Path(package).glob("__pycache__")) == []  # nothing is written into the checkout
