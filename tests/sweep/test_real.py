"""Sweeps whose cells are real trainings of tiny backbones."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cdl_edge import api
from cdl_edge.sweep import processes, sweep
from cdl_edge.sweep.processes import hold

pytestmark = pytest.mark.slow


def learnt(run):
    """Everything of a finished run but times."""
    metrics = json.loads((run / "metrics.json").read_text())
    timed = ("seconds", "images_per_second")
    sides = {s: {k: v for k, v in (metrics[s] or {}).items() if k not in timed} for s in ("student", "teacher")}
    return {**sides, "classes": metrics["classes"]}, load_file(run / "student.safetensors")


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, "the sweep has ended before"
        time.sleep(0.002)


def test_a_killed_sweep_loses_at_most_the_running_cell(tmp_path, tiny_vit):
    options = {"data": "digits", "teacher": tiny_vit("teacher", 24), "student": tiny_vit("student", 16)}
    options |= {"tasks": 2, "epochs": 8, "limit_per_class": 8, "batch_size": 16, "learning_rate": 0.02}
    options |= {"learners": ["apt"], "distillers": ["kd", "kdp"], "seeds": [0], "parallel": 1, "threads": 1}
    (tmp_path / "options.json").write_text(json.dumps(options))
    out = tmp_path / "sweep"
    command = [
        sys.executable,
        "-m",
        "cdl_edge.cli",
        "sweep",
        "--config",
        str(tmp_path / "options.json"),
        "--out",
        str(out),
    ]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*command, "--json"], stdout=log, stderr=log)
        # The first cell has finished, the second is behind its first epoch.
        wait_for(out / "runs" / "apt-kdp-0" / "checkpoint.safetensors", process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    killed, finished = out / "runs" / "apt-kdp-0", out / "runs" / "apt-kd-0" / "metrics.json"
    while (lock := hold(out / "cells" / ".apt-kdp-0.lock")) is None:  # until its process is gone
        time.sleep(0.01)
    lock.close()
    assert not (killed / "metrics.json").exists()
    before = finished.stat()

    with open(tmp_path / "log") as log:
        assert "[1/2] apt-kd-0: accuracy" in log.read()
    document = api.sweep(out=out, say=lambda line: None, **options)
    assert [c["state"] for c in document["cells"]] == ["finished", "finished"]
    assert (finished.stat().st_ino, finished.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    log_text = (out / "logs" / "apt-kdp-0.log").read_text()
    assert "resumed in task 1" in log_text
    assert "teacher: kept" in log_text  # the one that the first cell has trained
    assert document["rows"][1]["teacher"] is not None
    assert 'id="pair-1"' in (out / "report.html").read_text()

    # The same run, unbroken, with a teacher of its own.
    config = json.loads((out / "cells" / "apt-kdp-0.json").read_text())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    api.train(quiet=True, **{**config, "out": str(tmp_path / "unbroken"), "teachers": None})
    torch.set_num_threads(threads)
    (numbers, tensors), (expected, unbroken) = learnt(killed), learnt(tmp_path / "unbroken")
    numbers["teacher"].pop("tasks_reused", None), expected["teacher"].pop("tasks_reused", None)
    assert numbers == expected
    assert all(torch.equal(tensors[k], unbroken[k]) for k in unbroken)


class InProcess:
    """A cell that is trained here and now: what a process would do, without the seconds that its imports take."""

    def __init__(self, cell, slot, options, log, lock):
        self.lock = lock
        api.train(resume=True, quiet=True, **json.loads(options.read_text()))

    def poll(self):
        self.lock.close()
        return 0

    def stop(self):
        self.lock.close()


@pytest.fixture
def in_process(monkeypatch):
    monkeypatch.setattr(sweep, "Process", InProcess)
    monkeypatch.setattr(processes, "PAUSE_S", 0.0)


def write_cifar(folder, classes, train, test):
    """The layout of cifar-100-binary.tar.gz: <coarse byte><fine byte><3072 pixel bytes>; the class sets the colour."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, each in (("train.bin", train), ("test.bin", test)):
        records = []
        for label in np.tile(np.arange(classes), each):
            planes = rng.integers(0, 120, (3, 32, 32))
            planes[label % 3] += 100
            records.append(bytes([0, label]) + planes.astype(np.uint8).tobytes())
        (folder / name).write_bytes(b"".join(records))
    (folder / "fine_label_names.txt").write_text("\n".join(f"thing{i:02d}" for i in range(classes)) + "\n")


def tiny(tiny_vit):
    models = ("--teacher", tiny_vit("teacher", 24), "--student", tiny_vit("student", 16))
    return (*models, "--epochs", 1, "--limit-per-class", 2)


def test_paper_cifar100_in_miniature(cli, in_process, tmp_path, tiny_vit):
    write_cifar(tmp_path / "cifar-100-binary", 20, 3, 1)
    arguments = ("sweep", "--preset", "paper-cifar100", "--data", f"cifar100:{tmp_path}", "--out", tmp_path / "s")
    arguments += (*tiny(tiny_vit), "--compat", "--distillers", "none,kd,fitnets,kdp", "--seeds", "0", "--threads", 1)
    answer = cli(*arguments, "--json")
    assert answer.code == 0, answer.err
    document = answer.json
    assert len(document["cells"]) == 4 * 4 and {c["state"] for c in document["cells"]} == {"finished"}
    paper = document["paper"]
    assert [(r["learner"], r["figure"]) for r in paper[:3]] == [
        ("coda", "none"),
        ("coda", "best other KD"),
        ("coda", "kdp"),
    ]
    assert len(paper) == 4 * 3 and all(r["pair"] == "vitb-vits" for r in paper)
    for row in paper:
        assert row["average_accuracy"]["difference"] == pytest.approx(
            row["average_accuracy"]["ours"] - row["average_accuracy"]["published"]
        )
        assert row["distiller"] in (("kd", "fitnets") if row["figure"] == "best other KD" else (row["figure"],))
    # compat: the order of the folder, for every seed.
    assert document["class_orders"]["0"] == [f"thing{i:02d}" for i in range(20)]
    assert document["preset"]["departures"][:2] == ["epochs 1 (there 20)", "limit-per-class 2 (there None)"]
    text = (tmp_path / "s" / "sweep.md").read_text()
    assert "## Beside the published figures of arXiv 2407.13911" in text and "84.31" in text and "5.63" in text
    assert "as the authors' code does (--compat)" in text
    assert "84.31" in (tmp_path / "s" / "report.html").read_text()


def test_paper_imagenet_r_in_miniature(cli, tmp_path, tiny_vit, image_folder):
    image_folder(tmp_path / "imagenet-r", unsplit={f"n{i:08d}": 4 for i in range(20)})
    arguments = ("sweep", "--preset", "paper-imagenet-r", "--data", f"imagenet-r:{tmp_path / 'imagenet-r'}")
    arguments += ("--out", tmp_path / "s", *tiny(tiny_vit), "--learners", "apt", "--distillers", "none,kdp")
    answer = cli(*arguments, "--seeds", "0", "--parallel", 2, "--threads", 1)
    assert answer.code == 0, answer.err
    assert (
        "| vitb-vits | apt     | kdp " in answer.out
        and "73.29" in answer.out
        and "corrected (--no-compat)" in answer.out
    )
    assert "best other KD" in answer.out  # none of ours was run: the published figure stands alone
    document = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert {c["state"] for c in document["cells"]} == {"finished"}
    assert document["class_orders"]["0"] != sorted(document["class_orders"]["0"])
    assert list((tmp_path / "s" / "teachers").glob("*/task-10.safetensors"))
