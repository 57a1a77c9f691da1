"""Two processes under torchrun are one run: the same numbers as one process within float noise, one set of files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from command_lines import train_options
from safetensors.torch import load_file

from cdl_edge.train.checkpoint import load_state
from cdl_edge.train.loop import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch without gloo"),
]
# 35 images a task in steps of 17, 17 and 1: the first process has nothing of its own in the last one.
OPTIONS = {"limit_per_class": 7, "batch_size": 17, "learning_rate": 0.005, "precision": "fp32", "devices": "cpu"}


def start(config, *more):
    """`torchrun --nproc_per_node 2 -m cdl_edge.cli train ...`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = dict(os.environ)
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # no network, no names
    return subprocess.Popen(
        [*launcher, "-m", "cdl_edge.cli", "train", *train_options(config), "--threads", "1", "--json", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process):
    try:
        out, err = process.communicate(timeout=550)
    finally:
        end(process)
    return process.returncode, out, err


def end(process):
    """Launcher and workers, whatever they are doing."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for member in [*family, process]:
        try:
            member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=60)
    process.wait()


def assert_close(one, two, dataset_counts):
    """The folders of two runs: losses, matrices and what was learnt within float noise."""
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (one, two))
    assert a["classes"] == b["classes"] and a["tasks"] == b["tasks"] and a["images"] == b["images"]
    for side in ("teacher", "student"):
        for mine, theirs in zip(a[side]["loss"], b[side]["loss"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4)
        for row, other in zip(a[side]["matrix"], b[side]["matrix"], strict=True):
            for task, (x, y) in enumerate(zip(row, other, strict=True)):
                assert (x is None) == (y is None)
                if x is not None:
                    assert abs(x - y) <= 100.0 / dataset_counts[task] + 1e-9  # one image
        tensors = [load_file(folder / f"{side}.safetensors") for folder in (one, two)]
        for name, value in tensors[0].items():
            if value.dtype == torch.bool:
                assert torch.equal(value, tensors[1][name]), name  # L2P: what any process has selected
            else:
                # Adam moves a number by up to the rate even where its gradient is noise: most must agree.
                close = (value - tensors[1][name]).abs() <= 1e-3
                assert close.float().mean() > 0.99, name


@pytest.fixture(scope="module")
def counts():
    """Validation images of each task of these runs."""
    from cdl_edge.data import load_dataset
    from cdl_edge.train.scenario import make_scenario

    dataset = load_dataset("digits")
    scenario = make_scenario(dataset.classes, 2, 0)
    return [len(scenario.split(dataset.val, t)) for t in range(2)]


@pytest.fixture(scope="module")
def together(tmp_path_factory, make_config):
    """(folder, rc, stdout, stderr) of CODA + KDP, nothing augmented, on two processes."""
    config = make_config(tmp_path_factory.mktemp("two") / "run", learner="coda", distill="kdp", **OPTIONS)
    return (Path(config.out), *finish(start(config)))


def test_two_processes_give_the_numbers_of_one(tmp_path, make_config, together, counts):
    folder, code, _, err = together
    assert code == 0, err
    train(make_config(tmp_path / "one", learner="coda", distill="kdp", **OPTIONS), quiet=True)
    assert_close(folder, tmp_path / "one", counts)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["processes"] == 2 and metrics["device"].startswith("cpu")
    assert json.loads((tmp_path / "one" / "metrics.json").read_text())["processes"] == 1


def test_one_of_them_writes_and_talks(together):
    folder, _, out, err = together
    assert sorted(p.name for p in folder.iterdir()) == [
        *("config.json", "metrics.json", "ranges.npz", "report.html", "statistics"),
        *("student.safetensors", "student_matrix.csv", "teacher.safetensors", "teacher_matrix.csv"),
    ]
    assert len(out.strip().splitlines()) == 1 and json.loads(out)["run"] == str(folder)
    assert err.count("task 1/2 teacher: loss") == err.count("task 2/2 student: average accuracy") == 1


def test_a_refusal_is_said_once(make_config, together):
    folder = together[0]
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    code, out, err = finish(start(make_config(folder, learner="coda", distill="kdp", **OPTIONS)))
    assert code != 0 and out == ""
    assert err.count("error: ") == 1 and err.count("a run is there already") == 1
    assert re.search(r"exitcode\s*:\s*2\b", err), err  # of the process; torchrun's own is always 1
    assert "the first process has stopped" not in err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_killed_and_resumed(tmp_path, make_config, counts):
    options = {**OPTIONS, "learner": "l2p", "distill": "fitnets", "augment": "crop-flip", "epochs": 3}
    options["teachers"] = str(tmp_path / "kept")
    broken = make_config(tmp_path / "broken", **options)
    checkpoint, process = tmp_path / "broken" / "checkpoint.safetensors", start(broken)
    try:
        until, last = time.monotonic() + 500, None
        while True:
            assert process.poll() is None and time.monotonic() < until
            if checkpoint.exists() and checkpoint.stat().st_mtime_ns != last:
                last = checkpoint.stat().st_mtime_ns
                if load_state(checkpoint)["position"][:2] == [1, "student"]:
                    break
            time.sleep(0.003)
    finally:
        end(process)
    task, side, epochs = load_state(checkpoint)["position"]
    assert task == 1 and (side, epochs) != ("student", 3)
    assert not (tmp_path / "broken" / "metrics.json").exists()
    code, _, err = finish(start(broken, "--resume"))
    assert code == 0, err
    assert err.count("resumed in task 2") == 1 and not checkpoint.exists()
    options["teachers"] = None
    train(make_config(tmp_path / "one", **options), quiet=True)
    assert_close(tmp_path / "broken", tmp_path / "one", counts)
    # The teacher was kept once, whole, by one of them.
    assert sorted(p.name for p in (tmp_path / "kept").rglob("*.*")) == [
        "key.json",
        "task-01.safetensors",
        "task-02.safetensors",
    ]
