"""Order, parallelism, locks and stopping, without a training."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cdl_edge.errors import InputError
from cdl_edge.sweep import processes
from cdl_edge.sweep.processes import Schedule, alone, hold, last_lines, make_slots, run_cells


class Job:
    def __init__(self, polls=1, status=0):
        self.polls, self.status, self.stopped = polls, status, False

    def poll(self):
        self.polls -= 1
        return None if self.polls > 0 else self.status

    def stop(self):
        self.stopped = True


@pytest.fixture
def cells(plan_of):
    """Two groups (learners) of one seed, four distillers each; the first needs no teacher."""
    return plan_of(learners="l2p,apt", distillers="none,kd,kdp,fitnets", seeds="0").cells


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(processes, "PAUSE_S", 0.001)


def drain(schedule, busy=()):
    started = []
    while (cell := schedule.next(busy)) is not None:
        started.append(cell)
    return [c.name for c in started]


def test_one_of_a_group_makes_the_teacher_while_the_others_wait(cells):
    schedule = Schedule(cells)
    # Both teachers first, then what needs none; nobody else of the two groups may start.
    assert drain(schedule) == ["l2p-kd-0", "apt-kd-0", "l2p-none-0", "apt-none-0"]
    schedule.done(cells[1], True)
    assert drain(schedule) == ["l2p-kdp-0", "l2p-fitnets-0"]
    assert schedule.waiting == [c for c in cells if c.name in ("apt-kdp-0", "apt-fitnets-0")]


def test_after_a_failure_the_next_makes_the_teacher(cells):
    schedule = Schedule(cells)
    drain(schedule)
    schedule.done(cells[1], False)
    assert drain(schedule) == ["l2p-kdp-0"]
    schedule.done(next(c for c in cells if c.name == "l2p-kdp-0"), True)
    assert drain(schedule) == ["l2p-fitnets-0"]


def test_what_is_finished_is_not_run_and_has_made_its_teacher(cells):
    schedule = Schedule(cells, finished={"l2p-kd-0", "apt-none-0"})
    assert drain(schedule) == ["apt-kd-0", "l2p-none-0", "l2p-kdp-0", "l2p-fitnets-0"]


def test_a_busy_cell_comes_later(cells):
    schedule = Schedule(cells)
    first = schedule.next()
    schedule.put_back(first)
    assert schedule.waiting[0] is first and not schedule.running
    # Whoever works on it makes the teacher of its group.
    assert drain(schedule, busy={first.name}) == ["apt-kd-0", "l2p-none-0", "apt-none-0"]
    assert schedule.waiting[0] is first


def test_as_many_at_a_time_as_slots(cells):
    running, most, order = set(), 0, []

    def start(cell, slot):
        nonlocal most
        running.add(cell.name)
        order.append(cell.name)
        most = max(most, len(running))
        return Job(polls=3)

    def ended(cell, status):
        running.remove(cell.name)
        return status == 0

    run_cells(Schedule(cells), make_slots("cpu", 8, 3, 1), start, ended)
    assert most == 3 and sorted(order) == sorted(c.name for c in cells)


def test_one_slot_runs_the_teachers_first(cells):
    order = []

    def start(cell, slot):
        order.append(cell.name)
        return Job()

    run_cells(Schedule(cells), make_slots("cpu", 8, 1, 1), start, lambda c, s: True)
    assert order[:2] == ["l2p-kd-0", "apt-kd-0"]


def test_a_failure_does_not_stop_the_others(cells):
    statuses = {}

    def ended(cell, status):
        statuses[cell.name] = status
        return status == 0

    def start(cell, slot):
        return Job(status=-9 if cell.name == "l2p-kd-0" else 0)

    run_cells(Schedule(cells), make_slots("cpu", 8, 2, 1), start, ended)
    assert len(statuses) == 8 and statuses["l2p-kd-0"] == -9 and statuses["l2p-kdp-0"] == 0


def test_a_cell_that_another_process_holds_is_waited_for(cells):
    refusals = {"l2p-kd-0": 5}
    order = []

    def start(cell, slot):
        if refusals.get(cell.name, 0):
            refusals[cell.name] -= 1
            return None
        order.append(cell.name)
        return Job()

    run_cells(Schedule(cells), make_slots("cpu", 8, 2, 1), start, lambda c, s: True)
    assert len(order) == 8 and refusals["l2p-kd-0"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_jobs(cells, number, request):
    # A shell that starts the tests in the background has SIGINT ignored.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, inherited))
    jobs = []
    before = signal.getsignal(signal.SIGTERM)

    def start(cell, slot):
        jobs.append(Job(polls=10**9))
        if len(jobs) == 2:
            os.kill(os.getpid(), number)
        return jobs[-1]

    with pytest.raises(KeyboardInterrupt):
        run_cells(Schedule(cells), make_slots("cpu", 8, 2, 1), start, lambda c, s: True)
    assert jobs[0].stopped
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_error_of_the_sweep_itself_stops_the_jobs(cells):
    jobs = []

    def start(cell, slot):
        jobs.append(Job(polls=1 if not jobs else 10**9))
        return jobs[-1]

    def ended(cell, status):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run_cells(Schedule(cells), make_slots("cpu", 8, 2, 1), start, ended)
    assert jobs[1].stopped


def test_outside_the_main_thread_no_handler_is_set(cells):
    done = []

    def work():
        run_cells(Schedule(cells), make_slots("cpu", 8, 2, 1), lambda c, s: Job(), lambda c, s: True)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


# -- slots ------------------------------------------------------------------------------------------------------------


def test_slots_of_a_processor(monkeypatch):
    monkeypatch.setattr(processes, "usable_cores", lambda: 8)
    monkeypatch.setattr(processes, "_memory_bytes", lambda: 1 << 50)
    monkeypatch.setattr(processes, "_gpus", lambda: ["0", "1"])
    assert [(s.threads, s.gpu) for s in make_slots("cpu", 20, None, None)] == [(1, None)] * 8
    assert [s.threads for s in make_slots("cpu", 3, None, None)] == [2, 2, 2]  # fewer cells than cores
    assert [s.threads for s in make_slots("cpu", 20, 4, None)] == [2] * 4
    assert [s.threads for s in make_slots("cpu", 20, 4, 3)] == [3] * 4
    monkeypatch.setattr(processes, "_memory_bytes", lambda: 3 * processes.CELL_BYTES)
    assert len(make_slots("cpu", 20, None, None)) == 3
    monkeypatch.setattr(processes, "_memory_bytes", lambda: 1)
    assert len(make_slots("cpu", 20, None, None)) == 1


def test_slots_of_gpus(monkeypatch):
    monkeypatch.setattr(processes, "usable_cores", lambda: 8)
    monkeypatch.setattr(processes, "_gpus", lambda: ["2", "5"])
    assert [(s.threads, s.gpu) for s in make_slots("auto", 20, None, None)] == [(4, "2"), (4, "5")]
    assert [s.gpu for s in make_slots("cuda", 20, 3, None)] == ["2", "5", "2"]


def test_gpus_keep_the_names_they_were_given(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 7")
    assert processes._gpus() == ["3", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert processes._gpus() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes._gpus() == []


def test_memory_is_known_here():
    assert processes._memory_bytes() > 0


# -- locks and processes ----------------------------------------------------------------------------------------------


def test_a_lock_is_held_once_and_by_whoever_inherits_it(tmp_path):
    lock = hold(tmp_path / "a" / ".lock")
    assert lock is not None and hold(tmp_path / "a" / ".lock") is None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.fileno(),))
    lock.close()
    assert hold(tmp_path / "a" / ".lock") is None  # the orphan still has it
    child.communicate(b"\n")
    again = hold(tmp_path / "a" / ".lock")
    assert again is not None
    again.close()


def test_two_sweeps_in_one_folder(tmp_path):
    with alone(tmp_path), pytest.raises(InputError, match="a sweep runs there now"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


@pytest.fixture
def process(cells, tmp_path, monkeypatch):
    """start(code): a cell whose `train` is a piece of Python; its log is tmp_path / "log"."""
    started = []

    def start(code, threads=3, gpu=None):
        real = subprocess.Popen
        monkeypatch.setattr(
            subprocess, "Popen", lambda command, **options: real([command[0], "-c", code, *command[3:]], **options)
        )
        lock = hold(tmp_path / ".lock")
        made = processes.Process(cells[0], processes.Slot(threads, gpu), tmp_path / "cell.json", tmp_path / "log", lock)
        monkeypatch.undo()
        started.append(made)
        return made

    yield start
    for made in started:
        made.stop()


def wait(process):
    while (status := process.poll()) is None:
        time.sleep(0.01)
    return status


def test_a_cell_is_told_its_options_threads_and_gpu(process, tmp_path):
    code = "import os, sys; print(sys.argv[1:], os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'])"
    assert wait(process(code, threads=3, gpu="5")) == 0
    options = [
        "train",
        "--config",
        str(tmp_path / "cell.json"),
        "--resume",
        "--no-pictures",
        "--json",
        "--threads",
        "3",
    ]
    assert (tmp_path / "log").read_text() == f"{options} 3 5\n"
    assert hold(tmp_path / ".lock") is not None
    assert wait(process("import sys; sys.exit('again')")) == 1
    assert (tmp_path / "log").read_text().endswith("3 5\nagain\n")  # a log is continued


def test_stop_ends_a_cell_that_ignores_sigterm(process, tmp_path, monkeypatch):
    made = process("import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)")
    while "up" not in (tmp_path / "log").read_text():
        time.sleep(0.01)
    monkeypatch.setattr(processes, "PATIENCE_S", 0.2)
    made.stop()
    assert made.poll() == -signal.SIGKILL
    assert hold(tmp_path / ".lock") is not None
    made.stop()  # of what has ended: nothing happens


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
def test_a_cell_dies_with_the_sweep(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "from cdl_edge.sweep.processes import _end_with_parent\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True,\n"
        "                         preexec_fn=_end_with_parent())\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    sweep = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert sweep.stdout is not None
    pid = int(sweep.stdout.readline())
    assert alive(pid)
    sweep.kill()
    sweep.communicate()
    while alive(pid):  # the kernel does it when the parent is gone; without it this test would never end
        time.sleep(0.01)


def alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_last_lines(tmp_path):
    log = tmp_path / "log"
    assert last_lines(log) == []
    log.write_bytes(b"x" * 9000 + b"\n" + b"\n".join(b"line %d" % i for i in range(9)) + b"\n\n\xff\n")
    assert last_lines(log, 3) == ["line 7", "line 8", "\ufffd"]
