"""Published tables as sweeps: settings, backbones and the figures that ours are printed beside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..train.distill import DISTILLERS

POOL_LEARNERS = ("l2p", "dualprompt", "coda")
"learners that select from a pool of prompts by a query"
PAPER_LEARNERS = ("coda", "dualprompt", "l2p", "apt")

# The authors' code names the models without a tag and installs the newest timm, whose defaults have been these since
# 2023: augreg2 for B, augreg for the others (timm before 0.8 took augreg for B too). Pinned, because they may change.
VIT_S = "vit_small_patch16_224.augreg_in21k_ft_in1k"
VIT_B = "vit_base_patch16_224.augreg2_in21k_ft_in1k"
VIT_L = "vit_large_patch16_224.augreg_in21k_ft_in1k"

LISTS = (
    "validation images: a fifth of each class, unless the folder has train/ and val/ (there two fixed lists, which lie "
    "in a repository without a licence and are not ours to pass on)"
)
NONE, BEST_OTHER, KDP = "none", "best other KD", "kdp"
Published = Mapping[str, tuple[float, float]]
"NONE, BEST_OTHER and KDP -> (final average accuracy in %, forgetting in points)"


@dataclass(frozen=True)
class Pair:
    """A teacher and a student backbone."""

    name: str
    "prefix of the cells' names; empty where a sweep has one pair only"
    teacher: str
    "backbone, as for train"
    student: str
    "backbone, as for train"


@dataclass(frozen=True)
class Preset:
    """A sweep that somebody has published."""

    name: str
    source: str
    "paper"
    data: str
    "kind of data source that the figures are for"
    pairs: tuple[Pair, ...]
    learners: tuple[str, ...]
    distillers: tuple[str, ...]
    settings: Mapping[str, Any]
    "options of train"
    published: Mapping[tuple[str, str], Published] = field(default_factory=dict)
    "(pair, learner) -> figures"
    unlike: tuple[str, ...] = ()
    "what is not as published, whatever the options"


def paper_cifar100() -> Preset:
    """arXiv 2407.13911, CIFAR-100: 10 tasks of 10 classes, 20 epochs."""
    table = {
        "coda": ((82.18, 6.48), (83.79, 6.58), (84.31, 5.63), (86.16, 5.63), (86.78, 5.43), (87.13, 5.30)),
        "dualprompt": ((79.85, 6.12), (80.70, 5.73), (81.78, 3.63), (84.66, 5.91), (85.73, 5.05), (86.92, 4.77)),
        "l2p": ((77.71, 7.12), (79.64, 6.35), (81.79, 4.31), (83.02, 6.06), (85.00, 4.48), (86.56, 4.97)),
        "apt": ((83.30, 4.35), (84.27, 4.67), (84.28, 3.89), (88.26, 3.31), (88.79, 2.85), (89.41, 2.74)),
    }
    return _cdl("paper-cifar100", "cifar100", table, {"data": "cifar100", "epochs": 20})


def paper_imagenet_r() -> Preset:
    """arXiv 2407.13911, ImageNet-R: 10 tasks of 20 classes, 35 epochs.

    c of APT is its paper's for ImageNet-R; the scripts of the CDL authors' code have 0.7 there too.
    """
    table = {
        "coda": ((67.44, 8.52), (70.74, 6.66), (71.92, 5.61), (76.42, 4.31), (77.83, 4.51), (78.62, 3.46)),
        "dualprompt": ((65.51, 5.93), (66.20, 5.93), (68.77, 3.13), (73.18, 3.45), (76.03, 3.90), (76.06, 3.77)),
        "l2p": ((63.82, 6.52), (64.99, 3.83), (68.18, 2.08), (73.94, 4.41), (74.58, 4.69), (76.91, 3.15)),
        "apt": ((71.71, 4.25), (72.75, 4.03), (73.29, 3.73), (78.67, 4.06), (79.43, 3.61), (79.83, 3.87)),
    }
    settings = {"epochs": 35, "apt_momentum": 0.8}  # its folder has no usual place: --data
    return _cdl("paper-imagenet-r", "imagenet-r", table, settings, (LISTS,))


def _cdl(
    name: str,
    data: str,
    table: Mapping[str, tuple[tuple[float, float], ...]],
    settings: Mapping[str, Any],
    unlike: tuple[str, ...] = (),
) -> Preset:
    """table: learner -> none, best other, KDP of ViT-B -> ViT-S, then the same of ViT-L -> ViT-B."""
    pairs = (Pair("vitb-vits", VIT_B, VIT_S), Pair("vitl-vitb", VIT_L, VIT_B))
    columns = (NONE, BEST_OTHER, KDP)
    published = {
        (pair.name, learner): dict(zip(columns, figures[3 * i : 3 * i + 3], strict=True))
        for i, pair in enumerate(pairs)
        for learner, figures in table.items()
    }
    # What learns from no teacher (M2KD: from its own past) is no row of this table.
    return Preset(
        name,
        "arXiv 2407.13911",
        data,
        pairs,
        PAPER_LEARNERS,
        ("none", *(d for d, kind in DISTILLERS.items() if kind.needs_teacher and d != "kdp"), "kdp"),
        {"tasks": 10, "batch_size": 64, "learning_rate": 1e-3, "min_steps": 0, "heads": ("learned",), **settings},
        published,
        unlike,
    )


PRESETS: dict[str, Callable[[], Preset]] = {"paper-cifar100": paper_cifar100, "paper-imagenet-r": paper_imagenet_r}
