"""The RUN folder: what training leaves for evaluation, export and report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..artefacts.layout import CONFIG, METRICS, RUN_SCHEMA, STUDENT_WEIGHTS
from ..artefacts.run_record import Metrics, ParentRun, read_metrics
from ..errors import InputError
from ..files import sha256
from ..images import Preprocessing
from .backbone import Backbone, load_backbone
from .checkpoint import load_state, save_state
from .config import TrainConfig
from .distill import DISTILLERS, DistillSpec
from .student import ModelSpec, PromptedViT
from .tokens import registers


@dataclass(frozen=True)
class Run:
    """A finished run, its student ready for inference."""

    path: Path
    config: TrainConfig
    metrics: Metrics
    "metrics.json"
    backbone: Backbone
    student: PromptedViT
    preprocessing: Preprocessing


def backbone_of(config: TrainConfig, side: str, identity: str | None = None) -> Backbone:
    """The backbone of "teacher" or "student" as a run's options describe it. Raises: InputError.

    identity: see load_backbone.
    """
    size = config.image_size
    if side == "teacher" and config.teacher_image_size is not None:
        size = config.teacher_image_size
    return load_backbone(getattr(config, side), size, getattr(config, f"{side}_arch"), identity)


def preprocessing_of(backbone: Backbone, config: TrainConfig) -> Preprocessing:
    """The backbone's own. The authors' code feeds raw [0, 1] whatever the weights expect, and scales bilinearly.

    Its images are scaled to the size of the input and cut nowhere, those of ImageNet-R to 256 / 224 of it and cut.
    """
    own = replace(backbone.preprocessing, resize_rule=config.resize_rule, decoder=config.decoder)
    if not config.compat:
        return own
    raw = replace(own, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    if not config.as_authors:
        return raw
    cut = 256 / 224 if config.data.startswith("imagenet-r:") else 1.0
    return replace(raw, resize=round(cut * own.size), interpolation="bilinear")


def build_model(
    config: TrainConfig,
    backbone: Backbone,
    classes: int,
    key_width: int,
    is_student: bool,
    teacher: tuple[int, int] | None = None,
    extends: ParentRun | None = None,
) -> PromptedViT:
    """A prompted ViT for one side of a run, with its initial values.

    key_width: the student's width. teacher: width and depth of the teacher, where there is one.
    extends: what metrics.json says of the run that this one goes on from, where there is one.
    """
    distiller = DISTILLERS[config.distill]
    kd = None
    if is_student and distiller.kd_token:
        kd = (config.kd_blocks, config.kd_length) if distiller.kd_rows else (1, 0)
    other = 0 if is_student else 1  # teacher and student of one width must not start from the same numbers
    return PromptedViT(
        backbone.model,
        ModelSpec(
            config.learner,
            classes,
            (config.tasks or 1) + (extends.tasks if extends else 0),  # the loop has put a number there
            seed=2 * config.seed + other,
            key_width=key_width,
            kd=kd,
            alpha=config.alpha,
            pool_tasks=extends.pool_tasks if extends else 0,
            one_pass=config.query != "two-pass",
            query_of="patches" if config.query == "one-pass-patches" else "class",
            query_regulariser=config.query_regulariser,
            mapped=teacher if is_student and distiller.maps_prompts else None,
            kd_head=config.kd_head,
            compat=config.as_authors,
            apt_momentum=config.apt_momentum,
            head=config.head,
            random_features=config.random_features,
            token_weight=config.token_weight,
        ),
    )


def save_learnt(path: Path, model: PromptedViT, backbone: Backbone) -> None:
    """Prompts, keys, heads and counts, with the identity of the backbone that they belong to."""
    save_state(path, {"schema": RUN_SCHEMA, "backbone": backbone.identity, "state": model.state_dict()})


def read_run(path: Path) -> tuple[TrainConfig, Metrics]:
    """Options and metrics of a finished run. Raises: InputError for a folder without one."""
    for name in (CONFIG, METRICS, STUDENT_WEIGHTS):
        if not (path / name).is_file():
            fix = "run `cdl-edge train ... --resume` to finish it" if (path / CONFIG).is_file() else None
            got = f"no {name}" if path.exists() else "no such folder"
            raise InputError(f"{path}: not a finished run", got=got, expected="a folder written by train", fix=fix)
    return TrainConfig.read(path / CONFIG), read_metrics(path)


def load_run(path: Path) -> Run:
    """Open a finished run. Raises: InputError for a folder without one, or weights that are not the ones trained on."""
    path = Path(path)
    config, metrics = read_run(path)
    state = load_state(path / STUDENT_WEIGHTS)
    backbone = backbone_of(config, "student", state["backbone"])
    if state["backbone"] != backbone.identity:
        raise InputError(
            f"{path}: the student was trained on another backbone",
            got=f"{config.student} = {backbone.identity}",
            expected=state["backbone"],
            fix="bring back the weights of the time of training, or train again",
        )
    sizes = metrics.backbones.get("teacher")
    teacher = (sizes.width, sizes.depth) if sizes else None
    student = build_model(config, backbone, len(metrics.classes), backbone.width, True, teacher, metrics.extends)
    student.load_state_dict(state["state"])
    student.eval().requires_grad_(False)
    if student.learner.whole_network:  # what inference runs on is no longer the file that training started from
        backbone = replace(backbone, identity="sha256:" + sha256(path / STUDENT_WEIGHTS), model=student.backbone)
    return Run(path, config, metrics, backbone, student, preprocessing_of(backbone, config))


def distill_spec(
    config: TrainConfig,
    student: Backbone,
    teacher: Backbone | None,
    classes: int,
    class_ranges: tuple[tuple[int, int], ...],
) -> DistillSpec:
    """What a run's distiller is built for. class_ranges: first and last + 1 learned class position of each task."""
    return DistillSpec(
        alpha=config.alpha,
        tau=config.tau or 1.0,
        student_width=student.width,
        student_depth=student.depth,
        student_grid=student.grid,
        teacher_width=teacher.width if teacher else 0,
        teacher_depth=teacher.depth if teacher else 0,
        teacher_grid=teacher.grid if teacher else 0,
        classes=classes,
        class_ranges=class_ranges,
        seed=config.seed,
        compat=config.as_authors,
        exemplars=config.exemplars > 0,
        pruned=config.pruned,
    )


def check_tail(config: TrainConfig, teacher: Backbone) -> None:
    """Refuse a distiller that puts the student's tokens into a teacher that wants registers among them."""
    if DISTILLERS[config.distill].needs_tail and registers(teacher.model):
        raise InputError(
            f"--distill {config.distill} does not work with this teacher: its blocks expect register tokens, which the "
            "student has none of",
            got=f"{config.teacher} with {registers(teacher.model)} register tokens",
            expected="a teacher without register tokens",
        )
