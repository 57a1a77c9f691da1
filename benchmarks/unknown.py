"""Which score tells pictures of unknown classes best, on the frozen student: AUROC on classes that were left out.

    python benchmarks/unknown.py --data folder:PATH/novel --limit-per-class 100

A fifth of the classes is left out, drawn anew for each seed. Heads and covariances are made from four fifths of the
others' training images, temperatures are fitted on the last fifth. Calibration error: of the known classes, 15 bins.
The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cdl_edge.class_statistics import ClassStatistics
from cdl_edge.data import load_dataset
from cdl_edge.heads import CLOSED_FORM, shrinkage
from cdl_edge.splits import Split
from cdl_edge.train.backbone import Backbone, load_backbone
from cdl_edge.train.baseline import FrozenBaseline
from cdl_edge.train.closed_form import StatisticsKeeper
from cdl_edge.train.tokens import embed

BINS = 15


def features(backbone: Backbone, baseline: FrozenBaseline, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """What heads read of every image, float64 (N, D), and labels int (N,)."""
    from cdl_edge.train.augment import Normalise

    decoded = split.decode(backbone.preprocessing)
    normalise, pixels = Normalise(backbone.preprocessing, torch.device("cpu")), torch.from_numpy(decoded.pixels)

    def tokens(_: str, index: np.ndarray) -> torch.Tensor:
        with torch.no_grad():
            return embed(backbone.model, normalise(pixels[torch.from_numpy(index)]))

    class _Images(SimpleNamespace):
        def __len__(self) -> int:
            return len(pixels)

    images: Any = _Images(bare_tokens=tokens)
    return baseline.features(images).astype(np.float64), decoded.labels


def auroc(known: np.ndarray, unknown: np.ndarray) -> float:
    """In %: how often a known picture scores above an unknown one."""
    ranks = np.concatenate([known, unknown]).argsort().argsort() + 1.0
    wins = ranks[: len(known)].sum() - len(known) * (len(known) + 1) / 2
    return 100 * float(wins) / len(known) / len(unknown)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error in points."""
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    parts = [(bins == b) for b in range(BINS) if (bins == b).any()]
    return 100 * float(sum(abs(confidence[p].mean() - right[p].mean()) * p.mean() for p in parts))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Of rows."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The one of a grid with the least cross entropy."""
    rows = np.arange(len(labels))
    return float(
        min(np.geomspace(0.02, 30, 120), key=lambda t: -np.log(softmax(logits / t)[rows, labels] + 1e-12).mean())
    )


def distances(x: np.ndarray, statistics: ClassStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Squared Mahalanobis distances to every class (N, C), with one covariance, and to all training images (N,)."""
    size, means = statistics.map.width, statistics.means
    scatter = statistics.scatter()
    share = max(shrinkage(scatter, statistics.images), 1e-4)

    def squared(covariance: np.ndarray, centres: np.ndarray) -> np.ndarray:
        level = np.trace(covariance) / size
        root = np.linalg.cholesky(np.linalg.inv((1 - share) * covariance + share * level * np.eye(size)))
        a, b = x @ root, centres @ root
        return np.asarray((a * a).sum(1)[:, None] - 2 * a @ b.T + (b * b).sum(1))

    mean = statistics.sums.sum(0) / statistics.images
    whole = statistics.moment / statistics.images - np.outer(mean, mean)
    return squared(scatter, means), squared(whole, mean[None])[:, 0]


def measure(
    seed: int, maps: dict[str, Any], train: tuple[np.ndarray, np.ndarray], val: tuple[np.ndarray, np.ndarray]
) -> dict[str, tuple[float, float | None]]:
    """Score -> (AUROC, calibration error of the known classes or None)."""
    classes = int(train[1].max()) + 1
    known = np.sort(np.random.default_rng(seed).permutation(classes)[: classes - classes // 5])
    place = np.full(classes, -1)
    place[known] = np.arange(len(known))
    x, labels = (part[place[train[1]] >= 0] for part in (train[0], place[train[1]]))
    fitted = np.random.default_rng(seed).random(len(x)) < 0.8  # the others are for the temperature
    target, names = place[val[1]], [str(c) for c in known]
    inside, found = target >= 0, {}

    def note(name: str, score: np.ndarray, shares: np.ndarray | None = None) -> None:
        error = None
        if shares is not None:
            error = calibration_error(shares[inside].max(1), shares[inside].argmax(1) == target[inside])
        found[name] = (auroc(score[inside], score[~inside]), error)

    for head in ("ranpac", "slda"):
        made = CLOSED_FORM[head][1](ClassStatistics.of(maps[head], x[fitted], labels[fitted], names))
        logits, tuning = (maps[head].apply(z) @ made.weight.T + made.bias for z in (val[0], x[~fitted]))
        warmth = temperature(tuning, labels[~fitted])
        shares = softmax(logits / warmth)
        note(f"{head}: largest probability", shares.max(1), shares)
        note(f"{head}: energy", np.log(np.exp((logits - logits.max()) / warmth).sum(1)))
        note(f"{head}: largest logit", logits.max(1))
    statistics = ClassStatistics.of(maps["slda"], x[fitted], labels[fitted], names)
    to_class, to_all = distances(val[0], statistics)
    warmth = temperature(-distances(x[~fitted], statistics)[0] / 2, labels[~fitted])
    shares = softmax(-to_class / 2 / warmth)
    note("Gaussian posterior", shares.max(1), shares)
    note("Mahalanobis distance", -to_class.min(1))
    note("relative Mahalanobis distance", to_all - to_class.min(1))
    return found


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="image source, as of train")
    parser.add_argument("--student", default="builtin:student")
    parser.add_argument("--limit-per-class", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    dataset, backbone = load_dataset(given.data), load_backbone(given.student)
    split = dataset.train if given.limit_per_class is None else dataset.train.limited(given.limit_per_class, 0)
    baseline = FrozenBaseline(backbone, 2000, StatisticsKeeper(Path(), write=False))
    train, val = (features(backbone, baseline, part) for part in (split, dataset.val))
    runs = [measure(seed, baseline.maps, train, val) for seed in range(given.seeds)]
    rows = []
    print("| score | AUROC % | calibration error, points |\n|---|---|---|")
    for name in runs[0]:
        areas = [run[name][0] for run in runs]
        errors = [e for run in runs if (e := run[name][1]) is not None]
        spread = float(np.std(areas, ddof=1)) if len(areas) > 1 else 0.0
        rows.append({"score": name, "auroc": areas, "calibration_error": errors})
        print(f"| {name} | {np.mean(areas):.2f} ± {spread:.2f} | {f'{np.mean(errors):.2f}' if errors else ''} |")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
