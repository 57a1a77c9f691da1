"""benchmarks/gpu.py: packs of photographs, a section that crashes or does not end, and the whole of it on a CPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from cdl_edge.errors import InputError


@pytest.fixture(scope="module")
def gpu(root):
    """benchmarks/gpu.py as a module, by its path: a checkout may be called gpu itself."""
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", root / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module


@pytest.fixture
def job(tmp_path):
    return {"folder": str(tmp_path)}


def stand_in(gpu, monkeypatch, tmp_path, code):
    """Sections are this script."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "gpu_sections.py").write_text("import json, os, sys, time\n" + code)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)


def test_a_pack_holds_as_many_of_each_class_and_comes_back_as_it_was(gpu, tmp_path, photo):
    for part, count in (("train", 6), ("val", 3)):
        for name in ("x", "y"):
            for i in range(count):
                photo(tmp_path / "photos" / part / name / f"{i}.png", seed=i)
    # 16 x 16 pixels: in a MiB there is room for all.
    found = gpu.pack(tmp_path / "photos", tmp_path / "photos.npz", 16, 1)
    assert (found["classes"], found["train"], found["val"]) == (2, 12, 6)
    assert found["bytes"] == (tmp_path / "photos.npz").stat().st_size < 1 << 20
    root = gpu.unpack(tmp_path / "photos.npz", tmp_path / "out", per_class=2)
    with np.load(tmp_path / "photos.npz", allow_pickle=False) as file:
        pixels = file["train_pixels"][file["train_labels"] == 1]
    assert sorted(p.name for p in (root / "train" / "y").iterdir()) == ["00000.png", "00001.png"]
    assert np.array_equal(np.asarray(Image.open(root / "train" / "y" / "00001.png")), pixels[1])
    assert {p.name for p in tmp_path.iterdir()} == {"photos", "photos.npz", "out"}


def test_photographs_that_do_not_fit_are_refused(gpu, tmp_path, photo):
    for name in ("x", "y"):
        for i in range(3):
            photo(tmp_path / "photos" / "train" / name / f"{i}.png", seed=i)
            photo(tmp_path / "photos" / "val" / name / f"{i}.png", seed=i)
    with pytest.raises(InputError, match="do not fit"):
        gpu.pack(tmp_path / "photos", tmp_path / "photos.npz", 512, 1)
    assert not list(tmp_path.glob("*.npz"))


def test_a_file_that_is_no_pack_is_refused(gpu, tmp_path):
    (tmp_path / "other.npz").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match="not a pack"):
        gpu.unpack(tmp_path / "other.npz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_section_that_crashes_keeps_what_it_had(gpu, monkeypatch, tmp_path, job):
    notes = "json.dump({'results': {'a': 1}, 'failed': []}, open(sys.argv[2], 'w'))\n"
    stand_in(gpu, monkeypatch, tmp_path, notes + "print('no memory', file=sys.stderr)\nos._exit(3)\n")
    found = gpu.run_section("speed", job, 60)
    assert (found["status"], found["reason"], found["results"]) == ("failed", "no memory", {"a": 1})


def test_a_part_that_failed_makes_the_section_fail(gpu, monkeypatch, tmp_path, job):
    stand_in(gpu, monkeypatch, tmp_path, "json.dump({'results': {}, 'failed': ['coda: bad']}, open(sys.argv[2], 'w'))")
    found = gpu.run_section("agreement", job, 60)
    assert (found["status"], found["reason"], found["results"]) == ("failed", "coda: bad", None)


@pytest.mark.slow
def test_a_section_is_stopped_with_what_it_has_started(gpu, monkeypatch, tmp_path, job):
    import psutil

    code = (
        "import subprocess\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "json.dump({'results': {'child': child.pid}, 'failed': []}, open(sys.argv[2], 'w'))\ntime.sleep(600)\n"
    )
    stand_in(gpu, monkeypatch, tmp_path, code)
    found = gpu.run_section("speed", job, 15)
    assert found["status"] == "stopped" and "15 s" in found["reason"]
    child = found["results"]["child"]
    until = time.monotonic() + 60  # it has the signal; a busy machine takes its time to end it
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "what the section had started is still running"
        time.sleep(0.05)


@pytest.mark.slow
def test_with_no_time_left_nothing_is_run_and_the_document_is_whole(gpu, root):
    command = [sys.executable, str(root / "benchmarks" / "gpu.py"), "--device", "cpu", "--minutes", "0.1"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    document = json.loads(process.stdout.splitlines()[-1])
    assert list(document["sections"]) == list(gpu.SHARES)
    for section in document["sections"].values():
        assert section["status"] == "not run" and section["results"] is None and "left" in section["reason"]


@pytest.mark.slow
def test_all_that_a_cpu_can(root):
    command = [sys.executable, str(root / "benchmarks" / "gpu.py"), "--device", "cpu", "--minutes", "60"]
    process = subprocess.run([*command, "--learners", "coda,frozen"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    sections = json.loads(process.stdout.splitlines()[-1])["sections"]
    assert {name: section["status"] for name, section in sections.items()} == dict.fromkeys(sections, "done"), sections
    results = {name: section["results"] for name, section in sections.items()}
    for learner in ("coda", "frozen"):
        again = results["agreement"][learner]["cpu fp32 again"]["to_cpu_fp32"]
        assert again == {"loss_share": 0.0, "accuracy_points": 0.0, "identical_losses": True}
    # bf16 is another arithmetic: losses that do not differ at all were not computed in it.
    assert 0 < results["agreement"]["coda"]["cpu bf16"]["to_cpu_fp32"]["loss_share"] < 0.2
    assert results["resume"]["resume"]["identical_losses"] and results["resume"]["resume"]["identical_matrices"]
    assert results["torchrun"]["torchrun"]["backend"] == "gloo" and results["torchrun"]["torchrun"]["loss_share"] < 1e-5
    pair = results["speed"]["ViT-tiny -> ViT-tiny"]
    assert min(pair["ours-kept"]["images_per_second"].values()) > 0 and pair["authors"] is None
    engine = results["engines"]["onnxruntime"]["fp32"]
    assert engine["largest_difference"] < 1e-3 and engine["latency"]["compute_ms"]["p50"] > 0
    assert "GPU" in results["engines"]["tensorrt"]["refit"]["not_run"]
    assert set(results["pretrain"]) == {"convnet", "teacher", "student"}
