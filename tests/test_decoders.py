"""Pictures in processes of their own: the same pixels, and an end to whatever takes too long, too much, or crashes."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading

import numpy as np
import pytest
from PIL import Image

import cdl_edge.decoders as module
from cdl_edge.decoders import Decoders
from cdl_edge.images import Preprocessing, UnreadableImage

MADE = Preprocessing(16, 20)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def decoders():
    made = Decoders()
    yield made
    made.close()


PICTURE = encoded(Image.linear_gradient("L").resize((70, 50)).convert("RGB"))


@pytest.mark.parametrize("made", [MADE, Preprocessing(16, 20, decoder=1), Preprocessing(24, 24, resize_rule="pad")])
def test_the_same_pixels(decoders, made):
    assert np.array_equal(decoders.read(made, PICTURE), made.read(PICTURE))


def test_a_process_is_kept(decoders):
    decoders.read(MADE, PICTURE)
    before = decoders.processes()
    decoders.read(MADE, PICTURE)
    with pytest.raises(UnreadableImage, match="not a readable image"):
        decoders.read(MADE, b"nothing")
    assert decoders.processes() == before


def test_what_takes_too_long_is_ended(decoders, slow_jpeg):
    decoders.read(MADE, PICTURE)
    before = decoders.processes()
    with pytest.raises(UnreadableImage, match="takes too long to decode"):
        decoders.read(MADE, slow_jpeg, 0.05)
    for process in set(before) - set(decoders.processes()):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    assert set(before) - set(decoders.processes())
    assert decoders.read(MADE, PICTURE).shape == (16, 16, 3)


def test_a_process_that_does_nothing_at_all_is_ended(decoders):
    decoders.read(MADE, PICTURE)
    for process in decoders.processes():
        os.kill(process, signal.SIGSTOP)  # killed all the same
    with pytest.raises(UnreadableImage, match="takes too long"):
        decoders.read(MADE, PICTURE * 1000, 0.2)  # more than a pipe takes
    assert decoders.read(MADE, PICTURE).shape == (16, 16, 3)


@pytest.mark.slow
def test_a_crash_ends_one_picture(decoders, slow_jpeg):
    """What a broken decoder, or a system without memory, does to the process."""
    decoders.read(MADE, PICTURE)

    def crash():
        for process in decoders.processes():
            os.kill(process, signal.SIGSEGV)

    killer = threading.Timer(0.05, crash)
    killer.start()
    with pytest.raises(UnreadableImage, match=r"decoder crashed\n  got: +exit code -11"):
        decoders.read(MADE, slow_jpeg)
    killer.join()
    assert decoders.read(MADE, PICTURE).shape == (16, 16, 3)


def test_one_that_died_while_idle_is_replaced(decoders):
    decoders.read(MADE, PICTURE)
    for process in decoders.processes():
        os.kill(process, signal.SIGKILL)
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert decoders.read(MADE, PICTURE).shape == (16, 16, 3)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded on Linux only")
def test_memory_has_a_bound_whatever_a_header_says(decoders):
    decoders.read(MADE, PICTURE)
    for process in decoders.processes():
        with open(f"/proc/{process}/limits") as limits:
            (line,) = [line for line in limits if line.startswith("Max address space")]
        with open(f"/proc/{process}/statm") as statm:
            taken = int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        left = module.decoder.MAX_BYTES + module.SPARE_BYTES
        assert 0 < int(line.split()[3]) - taken <= left + (1 << 20)  # what it has given back since


def test_signals_for_all_do_not_stop_it(decoders):
    decoders.read(MADE, PICTURE)
    before = decoders.processes()
    for process in before:
        os.kill(process, signal.SIGTERM)
        os.kill(process, signal.SIGINT)
    assert decoders.read(MADE, PICTURE).shape == (16, 16, 3)
    assert decoders.processes() == before


@pytest.mark.slow
def test_many_threads_have_a_process_each():
    with Decoders() as decoders:
        pictures = [encoded(Image.new("RGB", (40, 40), (40 * i, 0, 0))) for i in range(4)]
        wrong = []

        def ask(number):
            for _ in range(20):
                if decoders.read(MADE, pictures[number])[0, 0, 0] != 40 * number:
                    wrong.append(number)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == [] and 1 <= len(decoders.processes()) <= 4
    assert decoders.processes() == []


def test_a_bug_is_no_fault_of_the_picture(decoders):
    broken = Preprocessing(16, 20)
    object.__setattr__(broken, "resize", "20")
    with pytest.raises(RuntimeError, match="TypeError"):
        decoders.read(broken, PICTURE)
    assert decoders.read(MADE, PICTURE).shape == (16, 16, 3)
