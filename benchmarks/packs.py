"""What an update weighs, and whether an install survives being killed.

    python benchmarks/packs.py [--model small] [--learners apt,coda] [--tasks 10] [--classes 200] [--images 8]
                               [--photos FOLDER] [--kills 200] [--seed 0]

Sizes: a student (random ViT/16 at 224, KDP) after all but one task, and after the last. Every task is one Adam step on
random images with the loss of training (the columns of the task's own classes): what a task changes is what has a
gradient, as in a real run. Self-test images are photographs where --photos names a folder of some, else noise, which
no compression makes smaller: the worst case. Each pack is installed, too.

Kills: a process installs a pack into a bundle with the shipped student, in turn a plain bundle folder and a store, and
gets SIGKILL at a random moment between the start of the install and its usual end. Meanwhile this process opens,
verifies and asks the bundle again and again, and once more after the kill: what it answers must be the answer of the
version that the manifest names. Then the next install, or a rollback, must work and leave nothing behind.

Prints tables; the last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from cdl_edge.artefacts.bundle import open_bundle, write_bundle
from cdl_edge.errors import InputError
from cdl_edge.export.assembly import assemble
from cdl_edge.export.export_bundle import SELFTEST_IMAGES
from cdl_edge.export.student_graph import StudentGraph
from cdl_edge.machine import cpu_model
from cdl_edge.runtime import load
from cdl_edge.train.augment import Normalise
from cdl_edge.train.backbone import Backbone, load_backbone
from cdl_edge.train.student import ModelSpec, PromptedViT
from cdl_edge.updates.packs import create, install, listed, rollback

LIMITS = {"apt": 1.0, "coda": 10.0}
"learner -> largest share of the bundle that a pack for one new task may have, in %"
INSTALL = """
import sys
from cdl_edge.updates.packs import install
import onnxruntime
print("ready", flush=True)
install(sys.argv[1], sys.argv[2], threads=1)
"""


def learn(student: PromptedViT, normalise: Normalise, task: int, span: range) -> None:
    """One step of training on a task's classes, strong enough to change every bit of what learns."""
    student.learner.begin_task(task)
    student.train()
    optimiser = torch.optim.Adam([p for p in student.trainable() if p.requires_grad], lr=0.02)
    side = int(student.backbone.patch_embed.img_size[0])
    pixels = np.random.default_rng(task).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    labels = torch.tensor([0, len(span) - 1])
    output = student(student.prepare(normalise(pixels)), training=True)
    sides = [s for s in (output.cls_logits, output.kd_logits) if s is not None]
    losses = [torch.nn.functional.cross_entropy(s[:, span.start : span.stop], labels) for s in sides]
    optimiser.zero_grad()
    torch.stack(losses).sum().backward()
    optimiser.step()
    student.learner.end_task(task)
    student.eval()


def pictures(side: int, count: int, photos: Path | None, seed: int) -> np.ndarray:
    """uint8 (count, side, side, 3): the folder's photographs from the seed-th on, or noise."""
    rng = np.random.default_rng(seed)
    if photos is None:
        return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    files = sorted(p for p in photos.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    chosen = rng.choice(len(files), count, replace=False)
    return np.stack([np.asarray(Image.open(files[i]).convert("RGB").resize((side, side))) for i in chosen])


@torch.no_grad()
def write(student: PromptedViT, backbone: Backbone, done: int, per_task: int, images: np.ndarray, out: Path) -> Path:
    """Write what `export` writes of a student after `done` tasks."""
    classes = done * per_task
    names = [f"class {i:03d}" for i in range(classes)]
    parts = ("student", "query", "prompted") if student.two_pass else ("student",)
    graphs = {part: StudentGraph(student, backbone.preprocessing, classes, 1).build(part) for part in parts}
    preprocessing = backbone.preprocessing.to_json()
    artefact = assemble(graphs, {"classes": names, "preprocessing": preprocessing})
    x = Normalise(backbone.preprocessing, torch.device("cpu"))(images)
    logits = student.combine(student(student.prepare(x)))[:, :classes].numpy()
    stored = io.BytesIO()
    np.savez_compressed(stored, images=images, logits=logits)
    files: dict[str, Path | bytes] = {f"{name}.onnx": model for name, model in artefact.models.items()}
    files |= {**artefact.constants, "selftest.npz": stored.getvalue()}
    outputs = graphs["student"].outputs
    entries = outputs["prompt_weights"][1] if "prompt_weights" in outputs else 0
    selection = {**student.learner.selection, "blocks": list(student.learner.blocks())}
    rng = np.random.default_rng(done)
    matrix = [[round(float(v), 2) for v in row] for row in rng.uniform(50, 100, (done, done))]
    manifest = {
        "name": out.name,
        "created": f"2026-11-21T00:00:{done:02d}Z",
        "classes": names,
        "tasks": [list(range(t * per_task, (t + 1) * per_task)) for t in range(done)],
        "input": {
            "name": "images",
            "shape": [1, *images.shape[1:]],
            "layout": "NHWC",
            "dtype": "uint8",
            "dynamic_batch": False,
            "preprocessing": preprocessing,
            "normalisation": "in graph",
        },
        "outputs": {key: [1, *shape] for key, shape in outputs.items()},
        "selection": {**selection, "k": min(int(str(selection["k"])), entries)},
        "graphs": {name: f"{name}.onnx" for name in graphs},
        "signatures": {name: graph.signature for name, graph in graphs.items()},
        "selftest": "selftest.npz",
        "training": {"student": {"matrix": matrix}, "teacher": {"matrix": matrix[::-1]}},
    }
    return write_bundle(out, manifest, files).path


def learnt(
    name: str, learner: str, tasks: int, classes: int, images: int, photos: Path | None, out: Path, keep: int = 2
) -> list[Path]:
    """Bundles of one student after each of its last `keep` tasks."""
    backbone = load_backbone(name)
    student = PromptedViT(backbone.model, ModelSpec(learner, classes, tasks, 0, kd=(12, 6)))
    normalise = Normalise(backbone.preprocessing, torch.device("cpu"))
    per_task = classes // tasks
    made = []
    for task in range(tasks):
        learn(student, normalise, task, range(task * per_task, (task + 1) * per_task))
        if task >= tasks - keep:
            pixels = pictures(backbone.preprocessing.size, images, photos, task)
            made.append(write(student, backbone, task + 1, per_task, pixels, out / f"{learner}-{task + 1}"))
    return made


def weigh(learner: str, old: Path, new: Path, folder: Path) -> dict[str, Any]:
    """Make the pack, install it, print what is in it."""
    begin = time.perf_counter()
    made = create(old, new, folder / f"{learner}.pack")
    made["create_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    made["installed"] = install(made["pack"], old, threads=1)["version"]
    made["install_s"] = time.perf_counter() - begin
    assert open_bundle(old).manifest == open_bundle(new).manifest
    print(f"{learner}: {made['bytes']} bytes, {100 * made['share']:.3f} % of {made['bundle_bytes']}", end="")
    print(f" (limit {LIMITS.get(learner, float('nan')):g} %); installed in {made['install_s']:.1f} s")
    for name, entry in made["files"].items():
        print(f"    {name:16s} {entry['encoding']:6s} {entry['bytes']:9d} of {entry['of']:9d}", flush=True)
    return made


def answer(bundle: Path, image: np.ndarray) -> tuple[str, bytes]:
    """Open, verify, ask: the version that answered, and its logits."""
    with load(bundle, threads=1) as runner:
        return runner.bundle.manifest.version, runner.infer(image).tobytes()


class Killer:
    """Three versions of a small bundle, packs between them, and templates to begin from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bundle = folder, folder / "device"
        versions = learnt("builtin:student", "coda", 6, 24, 8, None, folder, keep=3)
        self.packs = [folder / "0.pack", folder / "1.pack"]
        for i, pack in enumerate(self.packs):
            create(versions[i], versions[i + 1], pack)
        side = open_bundle(versions[0]).preprocessing.size
        self.image = pictures(side, 1, None, 99)
        self.truth = dict(answer(v, self.image) for v in versions)
        self.names = list(self.truth)
        self.templates = [versions[0], folder / "store"]
        shutil.copytree(versions[0], self.templates[1])
        install(self.packs[0], self.templates[1], threads=1)
        rollback(self.templates[1], threads=1)
        rollback(self.templates[1], self.names[1], threads=1)
        self.reads = 0

    def asked(self, stage: int) -> bool:
        """Whether the new version answers. Raises: AssertionError for neither, or for a mixture."""
        name, logits = answer(self.bundle, self.image)
        self.reads += 1
        assert name in self.names[stage : stage + 2], f"neither: {name}"
        assert logits == self.truth[name], f"a mixture under the name {name}"
        return name == self.names[stage + 1]

    def once(self, stage: int, delay: float, aimed: bool = False) -> tuple[float, bool, bool]:
        """Install, and kill after `delay` s: how long the install ran, whether it was killed, whether the new runs.

        aimed: the delay counts from when the new version has its name, milliseconds before the swap.
        """
        shutil.rmtree(self.bundle, ignore_errors=True)
        shutil.copytree(self.templates[stage], self.bundle, symlinks=True)
        command = [sys.executable, "-c", INSTALL, str(self.packs[stage]), str(self.bundle)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        begin = time.perf_counter()
        target = self.bundle / "versions" / self.names[stage + 1]
        while aimed and process.poll() is None and not target.exists():
            time.sleep(0.0002)
        end = delay + (time.perf_counter() if aimed else begin)
        while process.poll() is None and time.perf_counter() < end:
            if end - time.perf_counter() > 0.15:
                self.asked(stage)  # readers at the same time
            else:
                time.sleep(0.0002)
        process.kill()
        _, told = process.communicate()
        took, killed = time.perf_counter() - begin, process.returncode == -signal.SIGKILL
        assert killed or process.returncode == 0, told.decode()
        return took, killed, self.asked(stage)

    def recover(self, stage: int, new: bool) -> None:
        """The next command works, and leaves nothing behind. Raises: AssertionError, InputError."""
        if not new:
            install(self.packs[stage], self.bundle, threads=1)
        rollback(self.bundle, threads=1)
        rollback(self.bundle, self.names[stage + 1], threads=1)
        assert self.asked(stage)
        kept = {p.name for p in (self.bundle / "versions").iterdir()}
        assert kept == {entry["version"] for entry in listed(self.bundle)} == set(self.names[: stage + 2])
        assert {p.name for p in self.bundle.iterdir()} == {"current", "versions", "store.json"}

    def run(self, count: int, seed: int) -> dict[str, Any]:
        """Kill `count` installs: every other one anywhere, every other one near the swap."""
        usual = statistics.median(self.once(i % 2, 60)[0] for i in range(5))
        rng = random.Random(seed)
        tried = killed = new = 0
        problems: list[str] = []
        while killed < count:
            stage, aimed = tried % 2, tried // 2 % 2 == 1
            tried += 1
            try:
                # A little beyond the usual end: moments behind the swap count too.
                delay = rng.uniform(0, 0.03 if aimed else 1.1 * usual)
                _, was_killed, is_new = self.once(stage, delay, aimed)
                killed, new = killed + was_killed, new + (was_killed and is_new)
                self.recover(stage, is_new)
            except (AssertionError, InputError) as error:
                problems.append(f"{tried}: {error}")
                print(problems[-1], file=sys.stderr)
                if len(problems) > 20:
                    break
        result: dict[str, Any] = {"killed": killed, "old": killed - new, "new": new, "ended_before": tried - killed}
        result |= {"neither_or_mixed": len(problems), "verified_reads": self.reads, "usual_s": usual}
        print(json.dumps(result), flush=True)
        return {**result, "problems": problems}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="tiny, small, base: ViT/16 at 224")
    parser.add_argument("--learners", default="apt,coda", help="empty: no sizes")
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--images", type=int, default=SELFTEST_IMAGES, help="in the self-test")
    parser.add_argument("--photos", type=Path, help="folder of photographs for the self-test")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes, kills = {}, None
    with tempfile.TemporaryDirectory(prefix="cdl-edge-packs-") as name:
        for learner in filter(None, arguments.learners.split(",")):
            backbone = f"random:vit_{arguments.model}_patch16_224"
            folder = Path(name) / learner
            folder.mkdir()
            options = (arguments.tasks, arguments.classes, arguments.images, arguments.photos)
            old, new = learnt(backbone, learner, *options, folder)
            sizes[learner] = weigh(learner, old, new, folder)
            shutil.rmtree(folder)
        if arguments.kills:
            (Path(name) / "kills").mkdir()
            kills = Killer(Path(name) / "kills").run(arguments.kills, arguments.seed)
    machine = {"cpu": cpu_model(), "python": platform.python_version()}
    print(json.dumps({**machine, "model": arguments.model, "sizes": sizes, "kills": kills}))


if __name__ == "__main__":
    main()
