"""Commands that are killed at random moments: afterwards the old or the new artefact is there, whole.

The same command then works, and leaves nothing of the killed one behind. Bundles and runs are of backbones of some
thousand numbers, so that a command takes seconds.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from attack_files import MEMORY_MB, Found  # of this folder
from attack_server import measure
from PIL import Image

from cdl_edge.artefacts.bundle import open_bundle
from cdl_edge.errors import InputError
from cdl_edge.updates.enrolment_record import Enrolled
from cdl_edge.updates.enrolment_version import base_of, statistics_of
from cdl_edge.updates.packfile import open_pack
from cdl_edge.updates.store import locked


def kill(
    command: list[str],
    count: int,
    check: Callable[[bool], str | None],
    seed: int,
    fresh: Callable[[], None],
    most_mb: float = MEMORY_MB,
) -> Found:
    """Kill a command at random moments.

    fresh: before each. check: what is wrong; told whether the command ended. most_mb: of its memory.
    """
    rng, found = random.Random(f"{seed} {command[3:5]}"), Found()
    fresh()
    begin = time.monotonic()
    code, said, _ = ended(command)
    usual = time.monotonic() - begin
    if code:
        raise RuntimeError(f"{command} ends with {code}: {said}")
    for number in range(count):
        fresh()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(rng.uniform(0, 1.05 * usual))
        process.kill()
        killed = process.wait() == -signal.SIGKILL
        if wrong := check(False):
            found.faults.append(f"kill {number}: {wrong}")
        code, said, peak_mb = ended(command)
        found.peak_mb = max(found.peak_mb, peak_mb)
        refused = code == 2 and "--force" in said
        done_before = "already installed" in said or "nearly the same" in said
        if code and not refused and not done_before:
            found.faults.append(f"kill {number}: the next command ends with {code}: {said[-300:]}")
        if wrong := check(True):
            found.faults.append(f"kill {number}, after the next command: {wrong}")
        found.outcomes["killed" if killed else "was done"] += 1
        found.cases += 1
    if found.peak_mb > most_mb:
        found.faults.append(f"{found.peak_mb:.0f} MB")
    return found


def ended(command: list[str]) -> tuple[int, str, float]:
    """Run it to its end: (exit code, what it said on stderr, most memory that it held in MB)."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        peaks: dict[int, float] = {}
        stop = threading.Event()
        # The kernel's own maximum counts what the parent held when it started the command.
        watch = threading.Thread(target=measure, args=(process.pid, peaks, stop))
        watch.start()
        process.wait()
        stop.set()
        watch.join()
        said.seek(0)
        return process.returncode, said.read(), max(peaks.values(), default=0.0)


def leftovers(folder: Path) -> list[str]:
    """Hidden entries that are not there in a finished artefact."""
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def workshop_mb() -> float:
    """Most memory of a command that trains or exports: the bound of all, and what its libraries take when imported."""
    return MEMORY_MB + ended([sys.executable, "-c", "import timm"])[2]


def kill_bundle_command(command: list[str], out: Path, count: int, seed: int) -> Found:
    """Of a command that writes a bundle at `out`."""

    def check(finished: bool) -> str | None:
        if out.exists():
            try:
                open_bundle(out)
            except InputError as error:
                return str(error)
        elif finished:
            return "no bundle"
        return f"left behind: {left}" if finished and (left := leftovers(out.parent)) else None

    most_mb = workshop_mb() if "export" in command else MEMORY_MB
    return kill(command, count, check, seed, lambda: shutil.rmtree(out, ignore_errors=True), most_mb)


def kill_installs(pack: Path, old: Path, count: int, work: Path, seed: int, cli: list[str]) -> Found:
    """Of a pack, into a fresh copy of a device's bundle each."""
    device = work / "killed-device"
    with open_pack(pack) as opened:
        versions = [opened.document["from"], opened.document["to"]]

    def fresh() -> None:
        shutil.rmtree(device, ignore_errors=True)
        shutil.copytree(old, device)

    def check(finished: bool) -> str | None:
        try:
            version = open_bundle(device).manifest.manifest_sha256
        except InputError as error:
            return str(error)
        return None if version in versions[finished:] else f"version {version}"

    return kill([*cli, "pack", "install", str(pack), str(device), "--threads", "1"], count, check, seed, fresh)


def kill_enrolments(bundle: Path, count: int, work: Path, seed: int, cli: list[str]) -> Found:
    """Of a class from eight pictures, into a fresh copy of a device's bundle each."""
    device, name = work / "killed-enrolments", "new"
    before = open_bundle(bundle).manifest.version
    pictures = draw_pictures(work / "pictures", 8, seed)

    def fresh() -> None:
        shutil.rmtree(device, ignore_errors=True)
        shutil.copytree(bundle, device)

    def check(finished: bool) -> str | None:
        try:
            with locked(device) as store:
                enrolled = Enrolled.of(store.bundle)
                total = enrolled.added_to(statistics_of(base_of(store)))
                classes = store.bundle.classes
        except InputError as error:
            return str(error)
        learnt = [(entry.name, entry.images) for entry in enrolled.entries]
        whole = total.classes == classes and total.images == held + len(enrolled.features)
        if learnt not in [[(name, 8)], []][: 1 if finished else 2] or not whole:
            return f"{learnt}, {len(enrolled.features)} features, {total.images} pictures, classes {classes}"
        if not learnt and open_bundle(device).manifest.version != before:
            return "another version without an enrolment"
        return None

    held = statistics_of(open_bundle(bundle)).images
    command = [*cli, "enrol", str(device), name, str(pictures), "--anyway", "--max-drop", "100", "--threads", "1"]
    return kill(command, count, check, seed, fresh)


def draw_pictures(folder: Path, count: int, seed: int) -> Path:
    """PNG pictures of 96 x 96 pixels that have little in common."""
    rng = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for i in range(count):
        cells = rng.integers(0, 256, (4 + i, 4 + i, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((96, 96), Image.Resampling.NEAREST).save(folder / f"{i}.png")
    return folder


def kill_trainings(command: list[str], out: Path, count: int, seed: int) -> Found:
    """Of `train`; the next command resumes, and comes to the matrix of a run that was never killed."""
    wanted: list[Any] = []

    def check(finished: bool) -> str | None:
        if not finished:
            return None
        if not (out / "metrics.json").is_file():
            return "not finished"
        matrix = json.loads((out / "metrics.json").read_text())["student"]["matrix"]
        wanted.append(matrix)
        if matrix != wanted[0]:
            return "other numbers than without the kill"
        return f"left behind: {left}" if (left := leftovers(out)) else None

    return kill(
        [*command, "--resume"], count, check, seed, lambda: shutil.rmtree(out, ignore_errors=True), workshop_mb()
    )


# -- what is killed ---------------------------------------------------------------------------------------------------


def prepare(work: Path, cli: list[str]) -> dict[str, Path]:
    """Two small runs, their bundles, a pack from the first to the second."""
    paths = {name: work / name for name in ("run0", "run1", "old", "new", "update.pack")}
    done([sys.executable, __file__, str(work)])
    for seed in (0, 1):
        done(train_command(cli, work, paths[f"run{seed}"], seed))
    for run, bundle in (("run0", "old"), ("run1", "new")):
        done([*cli, "export", str(paths[run]), "--out", str(paths[bundle]), "--images", "8"])
    old, new, out = (str(paths[name]) for name in ("old", "new", "update.pack"))
    done([*cli, "pack", "create", old, new, "--out", out, "--sequence", str(1 << 33)])
    return paths


def prepare_enrolments(work: Path, cli: list[str]) -> Path:
    """A bundle that a class can be enrolled in: of the backbone that is shipped, which tells pictures apart."""
    run, bundle = work / "run-frozen", work / "teachable"
    options = ["--data", "digits", "--learner", "frozen", "--tasks", "2", "--limit-per-class", "8", "--threads", "1"]
    done([*cli, "train", *options, "--random-features", "64", "--out", str(run)])
    done([*cli, "export", str(run), "--out", str(bundle), "--images", "8", "--statistics"])
    return bundle


def done(command: list[str]) -> None:
    """Run it. Raises: RuntimeError when it fails."""
    code, said, _ = ended(command)
    if code:
        raise RuntimeError(f"{command} ends with {code}: {said}")


def train_command(cli: list[str], work: Path, out: Path, seed: int = 0) -> list[str]:
    """A training of seconds."""
    options = {"data": "digits", "learner": "coda", "distill": "kdp", "tasks": 2, "epochs": 1, "limit-per-class": 8}
    options |= {"min-steps": 0, "random-features": 64, "seed": seed, "threads": 1, "out": out}
    options |= {side: f"file:{work / side}.safetensors" for side in ("teacher", "student")}
    return [*cli, "train", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]


def main() -> None:
    """Write teacher.safetensors and student.safetensors into the folder that is named: ViTs of random weights.

    In a process of its own: torch would count as memory of every process that is started from here.
    """
    import torch

    from cdl_edge.images import Preprocessing
    from cdl_edge.train.backbone import Architecture, save_backbone

    for side, width in (("teacher", 24), ("student", 16)):
        architecture = Architecture(16, 8, width, 6, 2, 3)
        generator, model = torch.Generator().manual_seed(0), architecture.build()
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
        made = Path(sys.argv[1]) / f"{side}.safetensors"
        save_backbone(made, architecture, model.eval(), Preprocessing(16, 18), {"trained_on": "nothing"})


if __name__ == "__main__":
    main()
