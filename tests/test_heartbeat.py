"""No command is silent for long."""

from __future__ import annotations

import contextlib
import io
import sys
import threading

import pytest

from cdl_edge.heartbeat import Watched, at, heartbeat
from cdl_edge.train import baseline, evaluate, phase


class Stream(io.StringIO):
    """Tells when a line of the heartbeat has come."""

    def __init__(self) -> None:
        super().__init__()
        self.beat = threading.Event()

    def write(self, text: str) -> int:
        if "..." in text:
            self.beat.set()
        return super().write(text)


@pytest.fixture
def stream():
    return Stream()


def test_a_long_silence_is_broken_with_what_was_said_last(stream):
    with contextlib.redirect_stderr(stream), heartbeat(0.05):
        print("decoding", file=sys.stderr)
        assert stream.beat.wait(60)
        stream.beat.clear()
        assert stream.beat.wait(60)  # again and again, with the line that the command itself wrote
    lines = stream.getvalue().splitlines()
    assert lines[0] == "decoding"
    assert all(line.startswith("... decoding (no other message for ") for line in lines[1:3])
    assert not isinstance(sys.stderr, Watched)  # as it was
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())


def test_a_step_tells_where_it_stands(stream):
    with contextlib.redirect_stderr(stream), heartbeat(0.05):
        at("task 1/2 teacher: epoch 3/20, loss 0.512")
        assert stream.beat.wait(60)
    assert "... task 1/2 teacher: epoch 3/20, loss 0.512 (" in stream.getvalue()


def test_what_an_earlier_command_was_at_is_not_told(stream):
    at("something of before")
    with contextlib.redirect_stderr(stream), heartbeat(0.05):
        assert stream.beat.wait(60)
    assert "... at work (" in stream.getvalue()


def test_a_bar_that_has_not_ended_keeps_its_line(stream):
    watched = Watched(stream)
    watched.write("\rtask 1/2: 40 %")
    watched.beat(0.0)
    assert stream.getvalue().startswith("\rtask 1/2: 40 %\n... ")


def test_while_lines_come_it_is_quiet(stream):
    watched = Watched(stream)
    watched.write("a line\n")
    watched.beat(3600.0)
    assert stream.getvalue() == "a line\n" and not watched.isatty()


def test_of_several_processes_the_first_talks(stream, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with contextlib.redirect_stderr(stream), heartbeat(0.05):
        assert sys.stderr is stream


def test_commands_have_one_and_a_server_has_none(cli, monkeypatch):
    seen = []
    real = heartbeat

    def counted():
        seen.append(sys.argv[1])
        return real()

    monkeypatch.setattr("cdl_edge.cli.heartbeat", counted)
    cli("doctor", "--help")
    cli("serve", "--help")
    assert seen == ["doctor"]


@pytest.mark.slow
def test_a_phase_of_training_says_its_epoch_and_loss(cli, tmp_path, fast_options, monkeypatch):
    """Also where no bar is shown, as in a log file."""
    told = []
    for module in (phase, evaluate, baseline):
        monkeypatch.setattr(module, "at", told.append)
    answer = cli("train", *fast_options, "--learner", "coda", "--min-steps", 0, "--out", tmp_path / "run")
    assert answer.code == 0, answer.err
    assert any(line.startswith("task 1/2 student: epoch 2/2, loss ") for line in told), told[-1:]
    # Not "reading pictures: 128 of 128" while they are computed, for minutes.
    assert any(line.startswith("student: features of the pictures: ") for line in told)
    assert any(line.startswith("frozen baseline: features of the pictures: ") for line in told)
