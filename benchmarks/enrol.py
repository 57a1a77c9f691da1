"""Classes learnt on the device from a few pictures, beside the same classes learnt in the workshop from all of them.

    python benchmarks/enrol.py --data PATH --out OUT [--new 10] [--pictures 1 5 10 20] [--draws 1]
                               [any further options of `cdl-edge train`]

PATH holds train/<class>/* and val/<class>/*. The last classes by name are new; the others are learnt by `train`. The
new ones are then learnt by `train --extend` with all their training images, and by `enrol` one after the other, from
so many of them, drawn anew for each draw. Accuracy is that of the heads in the bundles on all validation images, whose
features the bundle's graph gives. "Beyond the passes" is the time of one core that a class takes besides running the
graph on its pictures and on the self-test. Folders that are in OUT already are used again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from cdl_edge.artefacts.bundle import open_bundle
from cdl_edge.errors import InputError
from cdl_edge.files import atomic_folder
from cdl_edge.folders import class_folders, pictures_below
from cdl_edge.runtime import load
from cdl_edge.updates import enrol as room
from cdl_edge.updates.enrolment_version import SAME, answers, base_of, present_head, statistics_of
from cdl_edge.updates.store import Store


def cli(*words: object) -> None:
    """`cdl-edge ...`, at one thread. Raises: CalledProcessError."""
    print("cdl-edge", *words, flush=True)
    subprocess.run([sys.executable, "-m", "cdl_edge.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def make(out: Path, *words: object) -> Path:
    """Run a command that writes `out`, unless it is there."""
    if not out.exists():
        cli(*words, "--out", out)
    return out


def without(data: Path, names: list[str], out: Path) -> Path:
    """The same folder without some classes, as links."""
    if not out.exists():
        with atomic_folder(out) as folder:
            for part in ("train", "val"):
                (folder / part).mkdir()
                for kept in class_folders(data / part):
                    if kept.name not in names:
                        (folder / part / kept.name).symlink_to(kept.resolve())
    return out


def features(bundle: Path, pictures: list[Path]) -> np.ndarray:
    """float32 (N, D)."""
    opened, found = open_bundle(bundle), []
    with load(opened, "onnxruntime", threads=1, precision="fp32") as runner:
        for start in range(0, len(pictures), 32):
            pixels = np.stack([opened.preprocessing.read(p) for p in pictures[start : start + 32]])
            found.append(runner.compute({runner.signature.images: pixels})["features"])
    return np.concatenate(found)


class Validation:
    """The pictures that accuracy is measured on."""

    def __init__(self, data: Path, new: list[str], bundle: Path) -> None:
        self.new, self.pictures, self.labels = set(new), [], []
        for folder in class_folders(data / "val"):
            below = pictures_below(folder, Counter())
            self.pictures += below
            self.labels += [folder.name] * len(below)
        self.x = features(bundle, self.pictures)

    def accuracy(self, bundle: Path) -> dict[str, float]:
        """% of the pictures of new and of old classes. Raises: InputError for a bundle with other features."""
        opened = open_bundle(bundle)
        few = list(range(0, len(self.pictures), max(1, len(self.pictures) // 20)))
        own = features(bundle, [self.pictures[i] for i in few])
        if np.abs(own - self.x[few]).max() > SAME * np.abs(own).max():
            raise InputError(f"{bundle}: other features", fix="--learner frozen: features depend on no task then")
        store_ = Store(bundle)
        map_ = statistics_of(base_of(store_)).map
        logits = answers(present_head(opened), map_, self.x)
        right = np.array([opened.classes[i] for i in logits.argmax(axis=1)]) == np.array(self.labels)
        is_new = np.array([label in self.new for label in self.labels])
        parts = {"old": right[~is_new], "new": right[is_new]}
        return {name: 100 * float(part.mean()) for name, part in parts.items() if len(part)}


def enrolled(bundle: Path, out: Path, data: Path, new: list[str], count: int, seed: int) -> dict[str, Any]:
    """Enrol every new class from so many pictures: the device's bundle is `out`, and what the judgements were."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(bundle, out)
    refusals, beyond, rng = 0, [], np.random.default_rng([seed, count])
    for name in new:
        below = sorted((data / "train" / name).iterdir())
        chosen = [below[i] for i in rng.permutation(len(below))[:count]]
        try:
            room.judge(out, name, chosen, threads=1)
        except InputError:
            refusals += 1
        clock, room.time = room.time, _Cpu  # type: ignore[assignment]
        try:
            result = room.enrol(out, name, chosen, max_drop=100, threads=1, anyway=True)
        finally:
            room.time = clock
        beyond.append(result["seconds"]["other"])
    return {"refused": refusals, "beyond_s": beyond}


class _Cpu:
    """The clock of this process, so that what others do on the machine is not counted."""

    perf_counter = staticmethod(time.process_time)
    strftime, gmtime = staticmethod(time.strftime), staticmethod(time.gmtime)


def main() -> None:
    """Parse, learn, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--new", type=int, default=10, help="classes")
    parser.add_argument("--pictures", type=int, nargs="+", default=[1, 5, 10, 20])
    parser.add_argument("--draws", type=int, default=1)
    given, options = parser.parse_known_args()
    data, out = given.data, given.out
    new = [folder.name for folder in class_folders(data / "train")][-given.new :]
    first = without(data, new, out / "first")
    tasks = [] if "--tasks" in options else ["--tasks", 9]
    run = make(out / "run", "train", "--data", f"folder:{first}", "--threads", 1, *tasks, *options)
    bundle = make(out / "bundle", "export", run, "--statistics")
    extended = make(out / "extended", "train", "--extend", run, "--data", f"folder:{data}", "--threads", 1)
    workshop = make(out / "workshop", "export", extended, "--statistics")
    validation = Validation(data, new, bundle)
    before, after = validation.accuracy(bundle), validation.accuracy(workshop)
    rows: list[dict[str, Any]] = [
        {"how": "before", **before},
        {"how": "train --extend, all training images", **after},
    ]
    for count in given.pictures:
        for draw in range(given.draws):
            learnt = enrolled(bundle, out / "device", data, new, count, draw)
            row = {"how": f"enrol, {count} pictures", "draw": draw, **validation.accuracy(out / "device"), **learnt}
            rows.append(row)
            print(f"{count} pictures, draw {draw}: {row}", flush=True)
    print("\n| how | new classes % | old classes % | old, to before | beyond the passes, s | refused |")
    print("|---|---|---|---|---|---|")
    for how in dict.fromkeys(row["how"] for row in rows):
        same = [row for row in rows if row["how"] == how]
        mean = {k: statistics.mean(r[k] for r in same) for k in ("new", "old") if k in same[0]}
        beyond = [s for row in same for s in row.get("beyond_s", [])]
        refused = sum(row.get("refused", 0) for row in same)
        cells = [f"{mean['new']:.2f}" if "new" in mean and how != "before" else "-", f"{mean['old']:.2f}"]
        cells += [f"{mean['old'] - before['old']:+.2f}", f"{statistics.median(beyond):.2f}" if beyond else "-"]
        cells += [f"{refused} of {len(new) * len(same)}" if beyond else "-"]
        print("| " + " | ".join([how, *cells]) + " |")
    print(json.dumps({"new": new, "rows": rows}))


if __name__ == "__main__":
    main()
