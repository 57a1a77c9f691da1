"""Threads by what the machine has free: affinity, control group, and what others keep busy."""

from __future__ import annotations

import pytest

import cdl_edge.cores as cores
from cdl_edge.cores import cgroup_quota, default_threads, free_cores, usable_cores
from cdl_edge.errors import InputError
from cdl_edge.runtime.runner import check_threads


@pytest.fixture(autouse=True)
def four(monkeypatch):
    """Cores 0 to 3 may be used; nobody waits."""
    monkeypatch.setattr(cores, "_allowed", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(cores, "SAMPLE_S", 0.0)
    default_threads.cache_clear()
    yield
    default_threads.cache_clear()


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
            },
            2.0,
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_a_quota(tmp_path, files, quota):
    root = write(tmp_path, files)
    assert cgroup_quota(root) == quota
    assert usable_cores(root) == (4 if quota is None else max(1, int(-(-quota // 1))))


def stat(busy):
    """/proc/stat before and after: core -> share of the ticks that were busy."""
    before = dict.fromkeys(busy, (1000, 500))
    after = {core: (1000 + 100, 500 + round(100 * (1 - share))) for core, share in busy.items()}
    return iter([before, after])


@pytest.mark.parametrize(
    ("busy", "free"),
    [
        ({0: 0.0, 1: 0.0, 2: 0.0, 3: 0.0}, 4),
        ({0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0}, 3),
        ({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, 1),  # one thread at least
        ({0: 0.5, 1: 0.5, 2: 0.0, 3: 0.0, 7: 1.0}, 3),  # core 7 is not ours
    ],
)
def test_what_others_keep_busy_is_not_taken(tmp_path, monkeypatch, busy, free):
    samples = stat(busy)
    monkeypatch.setattr(cores, "_ticks", lambda root: next(samples))
    assert free_cores(tmp_path) == free


def test_the_kernels_counters(tmp_path):
    root = write(tmp_path, {"proc/stat": "cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 10 1 2 80 7 0 0 0 5 0\nintr 12\n"})
    assert cores._ticks(root) == {0: (100, 87)}
    assert cores._ticks(tmp_path / "nowhere") == {}


def test_without_proc_the_load_average_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(cores.os, "getloadavg", lambda: (2.2, 0.0, 0.0))
    assert free_cores(tmp_path) == 2


def test_what_is_asked_for_comes_first(monkeypatch):
    monkeypatch.setattr(cores, "free_cores", lambda: 3)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert default_threads() == 2 == check_threads(None)
    assert check_threads(5) == 5
    default_threads.cache_clear()
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert default_threads() == 3
    with pytest.raises(InputError, match="number of threads"):
        check_threads(0)


def test_training_takes_the_free_cores_and_a_resumed_run_its_own(monkeypatch):
    import torch

    from cdl_edge.api import limit_threads

    monkeypatch.setattr(cores, "free_cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    try:
        limit_threads(None)
        assert torch.get_num_threads() == 2
        limit_threads(3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
