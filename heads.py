"""Classifier heads in closed form, from class statistics: no image, no gradient, no order of tasks.

- ncm: nearest class mean by cosine (SimpleCIL: Zhou et al., "Revisiting class-incremental learning with pre-trained
  models: generalizability and adaptivity are all you need", 2023).
- slda: class means and one shared covariance, that is linear discriminant analysis (Hayes and Kanan, "Lifelong machine
  learning with deep streaming linear discriminant analysis", 2020), shrunk as oracle approximating shrinkage says (Chen
  et al., "Shrinkage algorithms for MMSE covariance estimation", 2010).
- ranpac: ridge regression on random ReLU features (McDonnell et al., "RanPAC: random projections and pre-trained models
  for continual learning", NeurIPS 2023), the ridge chosen by generalised cross-validation (Golub et al., 1979).

Shrinkage and ridge depend on the statistics alone: on no held-out image, and not on the order of tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .class_statistics import ClassStatistics, FeatureMap

COSINE_SCALE = 30.0
"what the cosines of ncm are multiplied by, so that their softmax can be a probability"
RIDGE_SCALE = 6.0
"likewise for ranpac, whose outputs estimate 0 or 1"
GAP = 16.0
"""at most what the mean of a class stands above the other classes, on average: log posteriors of hundreds would be told
apart by float32 to 1e-4 only, and the temperature that `export` fits undoes a factor"""
RIDGES = 10.0 ** np.arange(-7, 2.1, 0.5)
"candidates, in units of the mean eigenvalue of the second moment"
RESERVED = ("auto", "learned", "aligned")
"heads that are not made in closed form"
RANDOM_FEATURES = 2000
"of ranpac, unless another number is given: more are a little better and cost memory and time (square and cube)"


@dataclass(frozen=True)
class LinearMap:
    """What a head is in the end: logits = features W^T + b."""

    weight: np.ndarray
    "float64 (C, F)"
    bias: np.ndarray
    "float64 (C,)"
    chosen: float
    "the shrinkage or ridge that was chosen; 0 where there is none"


Maker = Callable[[ClassStatistics], LinearMap]
CLOSED_FORM: dict[str, tuple[str, Maker]] = {}
"name, as `--head` takes it -> kind of its feature map, and how it is made; filled by `register`"


def register(name: str, features: str = "plain") -> Callable[[Maker], Maker]:
    """Make a function known as the head of that name: that is all a new head needs.

    features: kind of the feature map that it reads, see FeatureMap. Raises: ValueError for a name that is taken.
    """

    def add(make: Maker) -> Maker:
        if name in CLOSED_FORM or name in RESERVED:
            raise ValueError(f"two heads of the name {name!r}")
        CLOSED_FORM[name] = features, make
        return make

    return add


@register("ncm", "unit")
def ncm(statistics: ClassStatistics) -> LinearMap:
    """Cosine to the class means, of unit features."""
    means = statistics.means
    weight = COSINE_SCALE * means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return LinearMap(weight, np.zeros(len(weight)), 0.0)


@register("slda")
def slda(statistics: ClassStatistics) -> LinearMap:
    """Log posterior of Gaussians with one covariance S and equal priors: W = S^-1 m, b = -m^T S^-1 m / 2.

    Both divided by one number where classes would stand further apart than GAP.
    """
    scatter, means = statistics.scatter(), statistics.means
    size = len(scatter)
    level = float(np.trace(scatter)) / size
    share = shrinkage(scatter, statistics.images)
    target = max(level, 1e-12) * np.eye(size)
    # A share of 0 with fewer images than features would leave a singular matrix.
    share = max(share, 1e-4)
    weight = np.linalg.solve((1 - share) * scatter + share * target, means.T).T
    bias = -0.5 * (weight * means).sum(axis=1)
    # A constant for all classes changes no answer; it keeps float32 logits small.
    return LinearMap(*moderate(weight - weight.mean(axis=0), bias - bias.mean(), means), share)


def moderate(weight: np.ndarray, bias: np.ndarray, means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight (C, F) and bias (C,) divided by one number where classes would stand further apart than GAP.

    means: (C, F) of the classes. No answer changes.
    """
    logits = means @ weight.T + bias
    factor = GAP / max(GAP, float((np.diag(logits) - logits.mean(axis=1)).mean()))
    return factor * weight, factor * bias


@register("ranpac", "random")
def ranpac(statistics: ClassStatistics, ridge: float | None = None) -> LinearMap:
    """Ridge regression onto one-hot labels: W = (G + ridge I)^-1 Q with G the second moment, Q the class sums.

    ridge: None: `best_ridge`, which takes ten times as long as all the rest.
    """
    return ridge_regression(statistics, best_ridge(statistics) if ridge is None else ridge, statistics.sums[:0])[0]


def ridge_regression(statistics: ClassStatistics, ridge: float, h: np.ndarray) -> tuple[LinearMap, np.ndarray]:
    """The head of `ranpac`, and the leverages h_i^T (G + ridge I)^-1 h_i, float64 (N,), of the rows of h (N, F).

    Together: what takes the time is one factorisation.
    """
    matrix, count = statistics.moment.copy(), len(statistics.sums)
    matrix[np.diag_indices_from(matrix)] += ridge
    solved = np.linalg.solve(matrix, np.concatenate([statistics.sums, h]).T).T
    head = LinearMap(RIDGE_SCALE * solved[:count], np.zeros(count), ridge)
    return head, (h * solved[count:]).sum(axis=1)


def shrinkage(covariance: np.ndarray, images: int) -> float:
    """Oracle approximating shrinkage, 0 to 1, of a covariance (F, F) estimated from `images` vectors."""
    size = len(covariance)
    trace, squares = float(np.trace(covariance)), float((covariance * covariance).sum())
    above = (1 - 2 / size) * squares + trace * trace
    below = (images + 1 - 2 / size) * (squares - trace * trace / size)
    return float(np.clip(above / below, 0, 1)) if below > 0 else 1.0


def best_ridge(statistics: ClassStatistics) -> float:
    """The ridge of RIDGES with the least generalised cross-validation error n RSS / (n - df)^2."""
    values, vectors = np.linalg.eigh(statistics.moment)
    values = np.maximum(values, 0)
    turned = vectors.T @ statistics.sums.T  # (F, C)
    power, images = (turned * turned).sum(axis=1), statistics.images
    ridges = RIDGES * max(float(values.mean()), 1e-12)
    errors = []
    for ridge in ridges:
        inverse = 1 / (values + ridge)
        # ||Y||^2 is n: every image has one label.
        rss = images - 2 * float((inverse * power).sum()) + float((inverse**2 * values * power).sum())
        degrees = float((inverse * values).sum())
        errors.append(images * max(rss, 0.0) / (images - degrees) ** 2 if degrees < 0.999 * images else np.inf)
    return float(ridges[int(np.argmin(errors))]) if np.isfinite(errors).any() else float(ridges[-1])


def feature_map(
    head: str,
    parts: tuple[str, ...],
    width: int,
    random_features: int = RANDOM_FEATURES,
    token_weight: float = 1.0,
) -> FeatureMap:
    """The features that a head of CLOSED_FORM (or `aligned`, which reads plain ones) reads.

    parts: see FeatureMap. width: of their concatenation. random_features: of ranpac, L. token_weight: likewise; what
    the other heads answer hardly depends on the scale of a part.
    """
    kind = CLOSED_FORM[head][0] if head in CLOSED_FORM else "plain"
    if kind != "random":
        return FeatureMap(parts, width, kind)
    return FeatureMap(parts, width, kind, random_features, token_weight=token_weight)
