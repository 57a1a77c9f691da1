"""A run that was stopped anywhere ends in the numbers of the run that never was."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_lines import train_options
from safetensors.torch import load_file

from cdl_edge.errors import InputError
from cdl_edge.train import loop
from cdl_edge.train.checkpoint import load_state
from cdl_edge.train.loop import train


class Stopped(Exception):
    pass


def results(folder):
    """Everything of a run but times."""
    metrics = json.loads((folder / "metrics.json").read_text())
    sides = {
        s: {k: v for k, v in metrics[s].items() if k not in ("seconds", "images_per_second")} if metrics[s] else None
        for s in ("teacher", "student")
    }
    tensors = {p.name: load_file(p) for p in folder.glob("*.safetensors")}
    texts = {p.name: p.read_text() for p in folder.glob("*.csv")}
    texts["ranges.npz"] = (folder / "ranges.npz").read_bytes()
    return {"sides": sides, "classes": metrics["classes"], "skipped": metrics["skipped"], **texts}, tensors


def assert_same(one, two):
    (numbers, tensors), (other_numbers, other_tensors) = results(one), results(two)
    assert numbers == other_numbers
    assert tensors.keys() == other_tensors.keys()
    for name in tensors:
        assert tensors[name].keys() == other_tensors[name].keys()
        for key, value in tensors[name].items():
            assert torch.equal(value, other_tensors[name][key]), f"{name}: {key}"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, make_config):
    """The folder of a run of the usual options that was never stopped."""
    folder = tmp_path_factory.mktemp("unbroken")
    train(make_config(folder), quiet=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "options"),
    [
        ("behind", {"learner": "coda"}),
        ("before", {"learner": "coda", "augment": "crop-flip"}),
        ("behind", {"learner": "l2p", "augment": "crop-flip"}),
        ("before", {"learner": "dualprompt", "query": "one-pass", "distill": "kd"}),
        ("behind", {"learner": "apt", "compat": True, "augment": "crop-flip"}),
        ("behind", {"learner": "l2p", "distill": "none", "epochs": 3}),
        ("behind", {"learner": "apt", "distill": "reviewkd"}),
        ("before", {"learner": "dualprompt", "distill": "blockwise", "augment": "crop-flip"}),
        ("behind", {"learner": "coda", "distill": "fitnets", "query": "one-pass", "query_regulariser": 0.1}),
    ],
    ids=lambda o: o if isinstance(o, str) else f"{o['learner']}-{o.get('distill', 'kdp')}",
)
def test_stopped_at_every_checkpoint(tmp_path, make_config, monkeypatch, moment, options):
    unbroken = make_config(tmp_path / "unbroken", **options)
    train(unbroken, quiet=True)
    real = loop.save_state
    broken = make_config(tmp_path / "broken", **options)
    stops, finished = 0, False
    while not finished:
        calls = 0

        def save(path, state):
            nonlocal calls
            calls += 1
            # Before the write, the one in front of it has to succeed: otherwise nothing ever moves on.
            if moment == "before" and calls == 2:
                raise Stopped
            real(path, state)
            if moment == "behind":
                raise Stopped

        monkeypatch.setattr(loop, "save_state", save)
        torch.manual_seed(stops)  # what other processes do to the global generator is of no account
        try:
            train(broken, resume=stops > 0, quiet=True)
            finished = True
        except Stopped:
            stops += 1
            assert stops < 20
    sides = 1 if options.get("distill") == "none" else 2
    per_task = sides * (unbroken.epochs - 1) + (sides - 1) + 1
    assert stops == 2 * per_task - (moment == "before")
    assert_same(tmp_path / "unbroken", tmp_path / "broken")


@pytest.mark.slow
def test_stopped_while_the_results_are_written(tmp_path, make_config, monkeypatch, unbroken):
    def write(run, document):
        raise Stopped

    monkeypatch.setattr(loop, "write_metrics", write)
    with pytest.raises(Stopped):
        train(make_config(tmp_path / "broken"), quiet=True)
    monkeypatch.undo()
    assert not (tmp_path / "broken" / "metrics.json").exists()
    train(make_config(tmp_path / "broken"), resume=True, quiet=True)
    assert_same(unbroken, tmp_path / "broken")


@pytest.mark.slow
def test_stopped_before_the_first_checkpoint(tmp_path, make_config, monkeypatch, unbroken):
    monkeypatch.setattr(loop, "save_state", lambda *_: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        train(make_config(tmp_path / "broken"), quiet=True)
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "broken").iterdir()] == ["config.json"]
    train(make_config(tmp_path / "broken"), resume=True, quiet=True)
    assert_same(unbroken, tmp_path / "broken")


@pytest.mark.slow
def test_resume_with_nothing_there_is_a_start(tmp_path, make_config, unbroken):
    train(make_config(tmp_path / "run"), resume=True, quiet=True)
    assert_same(unbroken, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("distill", "part"),
    [("fitnets", "regressor.weight"), ("reviewkd", "fusions.0.leave.weight"), ("blockwise", "connectors.2.weight")],
)
def test_connectors_are_in_the_checkpoint_and_not_in_the_student(tmp_path, make_config, monkeypatch, distill, part):
    states = []
    real = loop.save_state
    monkeypatch.setattr(loop, "save_state", lambda path, state: real(path, state) or states.append(load_state(path)))
    train(make_config(tmp_path / "run", distill=distill, learner="apt"), quiet=True)
    held = [s["distiller"][part] for s in states]
    where = [tuple(s["position"]) for s in states]
    # They start from the seed, learn with the student, and go on from task to task.
    assert where[:3] == [(0, "teacher", 1), (0, "student", 0), (0, "student", 1)]
    assert torch.equal(held[0], held[1]) and not torch.equal(held[1], held[2]) and not torch.equal(held[2], held[-1])
    student = load_state(tmp_path / "run" / "student.safetensors")["state"]
    teacher = load_state(tmp_path / "run" / "teacher.safetensors")["state"]
    assert {k.split(".")[0] for k in student} == {"learner", "head"} == {k.split(".")[0] for k in teacher}
    plain = make_config(tmp_path / "plain", distill="kd", learner="apt")
    train(plain, quiet=True)
    assert student.keys() == load_state(tmp_path / "plain" / "student.safetensors")["state"].keys()


def test_a_damaged_checkpoint_is_one_message(tmp_path, make_config, monkeypatch):
    real = loop.save_state

    def save(path, state):
        real(path, state)
        raise Stopped

    monkeypatch.setattr(loop, "save_state", save)
    with pytest.raises(Stopped):
        train(make_config(tmp_path / "run"), quiet=True)
    path = tmp_path / "run" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="not a checkpoint of this project"):
        train(make_config(tmp_path / "run"), resume=True, quiet=True)


# -- SIGKILL ----------------------------------------------------------------------------------------------------------


def command(config, *more):
    code = "from cdl_edge.cli import main; main()"
    return [sys.executable, "-c", code, "train", *train_options(config), "--threads", "1", "--json", *more]


def kill_when(config, condition, *more):
    """Start the run, kill it by SIGKILL as soon as `condition(position)` holds; returns the position left on disk."""
    checkpoint = Path(config.out) / "checkpoint.safetensors"
    process = subprocess.Popen(command(config, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 300
        last = None
        while time.monotonic() < until:
            assert process.poll() is None, f"ended by itself with {process.returncode} before it was killed"
            if checkpoint.exists():
                modified = checkpoint.stat().st_mtime_ns
                if modified != last:  # a new checkpoint: the write is atomic, so it is whole
                    last = modified
                    if condition(tuple(load_state(checkpoint)["position"])):
                        time.sleep(random.random() * 0.03)  # anywhere in the epoch, or in the next write
                        break
            time.sleep(0.003)
        else:
            pytest.fail("the position was never reached")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (Path(config.out) / "metrics.json").exists()
    return tuple(load_state(checkpoint)["position"])


@pytest.mark.slow
def test_killed_in_both_phases(tmp_path, make_config):
    options = {"epochs": 6, "learner": "coda", "distill": "kdp"}
    unbroken, broken = make_config(tmp_path / "unbroken", **options), make_config(tmp_path / "broken", **options)
    train(unbroken, quiet=True)
    first = kill_when(broken, lambda p: p >= (0, "teacher", 1))
    assert first[0] == 0  # of the teacher, unless this process was kept waiting
    second = kill_when(broken, lambda p: p[:2] == (1, "student") and p[2] >= 1, "--resume")
    assert second[0] == 1
    train(broken, resume=True, quiet=True)
    assert_same(tmp_path / "unbroken", tmp_path / "broken")
    assert not (tmp_path / "broken" / "checkpoint.safetensors").exists()
