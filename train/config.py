"""Everything a training run depends on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from ..errors import InputError, choose
from ..images import DECODER, RESIZE_RULES, check_decoder
from .closed_form import statistics_heads
from .distill import DISTILLERS
from .learners import LEARNERS
from .snapshots import PRUNED
from .student import HEADS

QUERIES = ("two-pass", "one-pass", "one-pass-patches")
PRECISIONS = ("auto", "fp32", "bf16")
AUGMENTATIONS = ("auto", "none", "crop-flip")
KD_HEADS = ("learner", *HEADS)
REPLAY = "--distill m2kd --head learned"
PRUNING = "--distill m2kd --learner finetune"
PROMPT_OPTIONS = {
    *("teacher", "teacher_arch", "teacher_image_size", "teachers", "distill", "alpha", "tau", "compat"),
    *("query", "query_regulariser", "prompt_tasks", "kd_blocks", "kd_length", "kd_head", "apt_momentum"),
    *("epochs", "learning_rate", "min_steps", "exemplars", "retrain_epochs", "pruned"),
}
"options that do nothing without prompts, or a network, that learn"
FIRST_SCHEMA = {"head": "learned", "min_steps": 0, "decoder": 1, "token_weight": 1.0}
"options that runs had before there was a name for them"
RULES = ("decoder", "token_weight")
"fields without an option, which stay as they were when a run or a sweep was begun"


def head_kinds() -> tuple[str, ...]:
    """All values that --head may have."""
    return ("auto", "learned", *statistics_heads())


@dataclass(frozen=True)
class TrainConfig:
    """One run: a data source, a pair of backbones, a learner, a distiller."""

    data: str
    "image source: digits | folder:PATH | cifar100[:PATH] | imagenet-r:PATH"
    out: str
    "run folder"
    teacher: str = "builtin:teacher"
    "backbone: full timm tag | hf-hub:ORG/NAME | local-dir:PATH | file:PATH.safetensors | builtin:teacher"
    student: str = "builtin:student"
    "backbone of the student, likewise"
    learner: str = "auto"
    """prompt learner, of teacher and student; frozen: no prompts, only the head is made; auto: coda where an
    option asks for prompts (PROMPT_OPTIONS), else frozen, which they have to beat (docs/results.md)"""
    distill: str = "auto"
    "distiller; none trains no teacher; auto: kdp for learners of prompts, none for frozen and finetune"
    query: str = "two-pass"
    "where pool learners get their query: the bare backbone's class token, or each block's own (one pass)"
    tasks: int | None = None
    "number of tasks the classes are cut into; None: 1"
    epochs: int = 20
    "passes over a task's images, for the teacher and for the student (papers: 20 CIFAR-100, 35 ImageNet-R)"
    batch_size: int = 64
    "images a step (papers: 64)"
    learning_rate: float | None = None
    "Adam's peak, cosine to 0 within each task; None: 0.005, and the papers' 0.001 with --compat"
    min_steps: int | None = None
    """steps of a task at least: few images get more epochs; None: 200, and 0 with --compat"""
    seed: int = 0
    "of class order, initial values, batches and augmentation"
    limit_per_class: int | None = None
    "training images a class; None: all"
    augment: str = "auto"
    """crop-flip: random resized crop and mirror; none: every image as it is, and what the frozen parts compute is kept;
    auto: crop-flip for photographs where heads are learnt; none for digits, and for heads from statistics, which
    are of the images as they are"""
    alpha: float = 0.5
    "share of the distillation term, and of the KD head at inference (papers: 0.5)"
    tau: float | None = None
    "temperature; None: the distiller's own (papers: 2, DKD 4)"
    query_regulariser: float = 0.0
    "one-pass training only: weight of the term that ties selections to those of the full query (OS-Prompt: 0.0001)"
    head: str = "auto"
    """what answers: learned (the heads that the prompts learn with, as in the papers), or made from class statistics
    after each task: ncm | slda | ranpac | aligned; auto: ranpac, but learned with --compat and for a whole network"""
    random_features: int = 2000
    "of --head ranpac, and of the frozen baseline; statistics grow with their square, time with their cube"
    token_weight: float = 0.5
    """of --head ranpac on a student with a KD token: what class and KD token count beside the patches. Chosen on
    training images that nothing had learnt from (LOG.md, 2026-11-28); a run that was started keeps its own"""
    prompt_tasks: int | None = None
    """tasks in which prompts learn, from the first; None: all for learned heads, 1 for heads from statistics, which
    would otherwise grow stale (first-session adaptation: APER, RanPAC)"""
    kd_blocks: int = 12
    "blocks with KD prompts, token included (papers: 12)"
    kd_length: int = 6
    "KD rows a block, half keys, half values (papers: 6)"
    kd_head: str = "learner"
    "kind of the head on the KD token; learner: that of the learner's own head (papers)"
    apt_momentum: float = 0.7
    "c, the share of the old prompt in APT's merged one (its paper: 0.7 CIFAR-100, 0.8 ImageNet-R)"
    exemplars: int = 0
    "M2KD only: training images of each earlier class that come with those of a task; 0: none"
    retrain_epochs: int = 0
    "M2KD with a whole network only: epochs behind pruning, at a tenth of the rate; 0: none"
    pruned: str = "pretrained"
    "M2KD with a whole network only: what a weight that no task keeps becomes; zero: PackNet's way"
    compat: bool = False
    "the authors' behaviour where it differs: see docs/methods.md"
    compat_schema: int = 2
    "what `compat` was when the run was made: 1 until 2026-11-27 (see stored), 2 since"
    resize_rule: str = "cut"
    "how a picture becomes a square: cut | pad | squash, see images.Preprocessing"
    decoder: int = DECODER
    "rule of decoding, see images.DECODER; a run that was started keeps its own"
    precision: str = "auto"
    "of training; auto: bf16 autocast where the device computes it natively. Evaluation is always fp32"
    range_images: int = 256
    "training images of each task whose ranges are kept for INT8 (ranges.npz); 0: none"
    teachers: str | None = None
    "folder of trained teachers, filled and used by every run with the same teacher; None: train it anew"
    extend: str | None = None
    "finished run that this one goes on from: `tasks` are then the new ones (None: 1); see extend.py"
    devices: str = "auto"
    "auto: CUDA if there is one, otherwise CPU; or cpu | cuda"
    teacher_arch: str | None = None
    "timm model whose weights `teacher` is; for a file that does not say so itself"
    student_arch: str | None = None
    "likewise of `student`"
    image_size: int | None = None
    "side of the images of teacher and student, pixels; None: what each backbone was trained with"
    teacher_image_size: int | None = None
    "of the teacher's images alone; None: image_size"

    def __post_init__(self) -> None:
        for field in fields(self):  # a JSON file may hold anything
            self._check_type(field.name, str(field.type))
        if self.learner == "auto":
            object.__setattr__(self, "learner", "coda" if self._asks_for_prompts() else "frozen")
        choose("learner", self.learner, LEARNERS)
        choose("head", self.head, head_kinds())
        if self.distill == "auto":
            without = self.learner == "frozen" or LEARNERS[self.learner].whole_network
            object.__setattr__(self, "distill", "none" if without else "kdp")
        if self.head == "auto":
            object.__setattr__(self, "head", self.usual_head)
        choose("distiller", self.distill, DISTILLERS)
        choose("query", self.query, QUERIES)
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", self.usual_rate)
        if self.min_steps is None:
            object.__setattr__(self, "min_steps", self.usual_steps)
        self._check_pair()
        choose("precision", self.precision, PRECISIONS)
        choose("augmentation", self.augment, AUGMENTATIONS)
        choose("KD head", self.kd_head, KD_HEADS)
        choose("resize rule", self.resize_rule, RESIZE_RULES)
        check_decoder(self.decoder)
        choose("device", self.devices, ("auto", "cpu", "cuda"))
        if self.kd_length % 2 or self.kd_length < 0:
            raise InputError("KD rows are half keys, half values", got=self.kd_length, expected="an even --kd-length")
        choose("value of pruned weights", self.pruned, PRUNED)
        counts = ("tasks", "epochs", "batch_size", "kd_blocks", "limit_per_class", "prompt_tasks", "random_features")
        for name in (*counts, "image_size", "teacher_image_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} is too small", got=value, expected="at least 1")

        for name, holds, expected in (
            ("alpha", 0 <= self.alpha <= 1, "0 to 1"),
            ("tau", self.tau is None or 0 < self.tau < float("inf"), "a number above 0"),
            ("query_regulariser", 0 <= self.query_regulariser < float("inf"), "0 or more"),
            ("learning_rate", 0 < (self.learning_rate or 0) < float("inf"), "a number above 0"),
            ("min_steps", (self.min_steps or 0) >= 0, "0 or more"),
            ("seed", self.seed >= 0, "0 or more"),
            ("range_images", self.range_images >= 0, "0 or more"),
            ("apt_momentum", 0 <= self.apt_momentum <= 1, "0 to 1"),
            ("exemplars", self.exemplars >= 0, "0 or more"),
            ("retrain_epochs", self.retrain_epochs >= 0, "0 or more"),
            ("compat_schema", self.compat_schema in (1, 2), "1 or 2"),
            ("token_weight", 0 < self.token_weight <= 1, "above 0, at most 1"),
        ):
            if not holds:
                option = name.replace("_", "-")
                raise InputError(f"--{option} is out of range", got=getattr(self, name), expected=expected)

    def _asks_for_prompts(self) -> bool:
        """Whether an option was given that does nothing without prompts."""
        given = {f.name for f in fields(self) if getattr(self, f.name) != f.default} & PROMPT_OPTIONS
        return bool(given - {"distill"}) or self.head == "learned" or self.distill not in ("auto", "none")

    def _check_pair(self) -> None:
        """Refuse a distiller that makes no sense with the learner."""
        if self.learner == "frozen" and self.distill != "none":
            raise InputError(
                "--learner frozen has nothing that could be taught", got=f"--distill {self.distill}", expected="none"
            )
        distiller = DISTILLERS[self.distill]
        if not distiller.works_with(LEARNERS[self.learner]):
            others = (name for name, kind in LEARNERS.items() if name != "frozen" and distiller.works_with(kind))
            raise InputError(
                f"--distill {self.distill} does not work with --learner {self.learner}: {distiller.refusal}",
                got=self.learner,
                expected=" | ".join(others),
            )
        if distiller.maps_prompts and self.query != "two-pass":
            raise InputError(
                f"--distill {self.distill} does not work with --query {self.query}: the teacher's keys then have the "
                "teacher's width, and the student has no query of that width to ask its pool with",
                got=self.query,
                expected="two-pass",
            )
        network = LEARNERS[self.learner].whole_network
        for name, given, allowed, wanted in (
            # Statistics heads count every image that a task brings as one of its own classes.
            ("exemplars", self.exemplars > 0, self.distill == "m2kd" and self.head == "learned", REPLAY),
            ("retrain-epochs", self.retrain_epochs > 0, self.distill == "m2kd" and network, PRUNING),
            ("pruned", self.pruned != "pretrained", self.distill == "m2kd" and network, PRUNING),
        ):
            if given and not allowed:
                raise InputError(
                    f"--{name} is of M2KD" + (", where it prunes a whole network" if wanted == PRUNING else ""),
                    got=f"--distill {self.distill} --learner {self.learner} --head {self.head}",
                    expected=wanted,
                    fix=f"leave --{name} out",
                )

        if LEARNERS[self.learner].whole_network and self.head != "learned":
            raise InputError(
                f"--learner {self.learner} changes the features of earlier classes, and their statistics with them",
                got=f"--head {self.head}",
                expected="learned",
            )
        if self.compat and self.head != "learned":
            raise InputError(
                "--compat is the papers' setting, whose heads are learnt", got=f"--head {self.head}", expected="learned"
            )

    def epochs_of(self, images: int) -> int:
        """Epochs of a task with so many images: `epochs`, or as many as `min_steps` take."""
        return max(self.epochs, -(-(self.min_steps or 0) // -(-images // self.batch_size)))

    @property
    def without_effect(self) -> dict[str, str]:
        """Options that were given and change nothing beside the others: name -> why."""
        learner, distiller = LEARNERS[self.learner], DISTILLERS[self.distill]
        why: dict[str, str] = {}

        def idle(reason: str, *names: str) -> None:
            why.update(dict.fromkeys(names, reason))

        if not distiller.needs_teacher:
            names = ("teacher", "teacher_arch", "teacher_image_size", "teachers")
            idle(f"with --distill {self.distill} there is no teacher", *names)
        if self.distill == "none":
            idle("with --distill none nothing is distilled", "alpha", "tau")
        if not distiller.kd_token:
            idle(f"--distill {self.distill} has no KD token", "kd_blocks", "kd_length", "kd_head")
        if not learner.needs_query:
            idle(f"--learner {self.learner} asks no query", "query", "query_regulariser")
        if self.query == "two-pass":
            idle("with --query two-pass there is nothing to tie it to", "query_regulariser")
        if self.learner != "apt":
            idle("it is of --learner apt", "apt_momentum")
        if self.learner == "frozen" and self.head != "learned":
            options = ("epochs", "batch_size", "learning_rate", "min_steps", "augment", "prompt_tasks")
            idle(f"with --learner frozen --head {self.head} nothing learns by gradient", *options)
        usual = {f.name: f.default for f in fields(self)}
        usual |= {"learning_rate": self.usual_rate, "min_steps": self.usual_steps}
        return {name: reason for name, reason in why.items() if getattr(self, name) != usual[name]}

    @property
    def usual_head(self) -> str:
        """What answers where no head is given."""
        return "learned" if self.compat or LEARNERS[self.learner].whole_network else "ranpac"

    @property
    def usual_rate(self) -> float:
        """Adam's peak where none is given."""
        return 1e-3 if self.compat else 5e-3

    @property
    def usual_steps(self) -> int:
        """Steps of a task at least, where no number is given."""
        return 0 if self.compat else 200

    @property
    def as_authors(self) -> bool:
        """Whether inference is that of the authors' code, as --compat has it today: masks, heads, test images."""
        return self.compat and self.compat_schema > 1

    def learns_prompts(self, task: int) -> bool:
        """Whether anything is trained by gradient in a task, 0-based."""
        if self.head == "learned":
            return self.prompt_tasks is None or task < self.prompt_tasks
        return self.learner != "frozen" and task < (self.prompt_tasks or 1)

    def check_tasks(self, tasks: int) -> None:
        """Raises: InputError where the head of some of so many tasks would never learn: it learns when prompts do."""
        if self.head == "learned" and not self.learns_prompts(tasks - 1):
            raise InputError(
                f"--prompt-tasks {self.prompt_tasks}: learnt heads learn with the prompts, those of later tasks never",
                got=f"--head learned, {tasks} tasks",
                expected=f"--prompt-tasks {tasks}, or a head that is made from class statistics",
                fix="leave --prompt-tasks out, or give --head ranpac"
                if self.extend is None
                else "train again with all classes: what the run was begun with belongs to its weights",
            )

    def _check_type(self, name: str, annotation: str) -> None:
        """annotation: the text of the field's type, such as "int | None"."""
        allowed = {"str": (str,), "int": (int,), "float": (float, int), "bool": (bool,), "None": (type(None),)}
        types = [t for part in annotation.split(" | ") for t in allowed[part]]
        value = getattr(self, name)
        # True is an int for Python, not for a user.
        if not isinstance(value, tuple(types)) or (isinstance(value, bool) and bool not in types):
            raise InputError(f"training option {name!r} has the wrong type", got=repr(value), expected=annotation)

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values, field by field."""
        return asdict(self)

    @classmethod
    def stored(cls, document: dict[str, Any]) -> TrainConfig:
        """The config of a run as it was written, perhaps before an option existed."""
        old = {"compat_schema": 1} if document.get("compat") else {}
        return cls.from_json({**FIRST_SCHEMA, **old, **document})

    @classmethod
    def read(cls, path: Path) -> TrainConfig:
        """The config.json of a run. Raises: InputError for a damaged one."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # also no UTF-8
            raise InputError(f"{path}: damaged run", got=str(error), expected="JSON") from error
        if not isinstance(document, dict):
            raise InputError(f"{path}: damaged run", got=type(document).__name__, expected="a JSON object")
        return cls.stored(document)

    def with_rules_of(self, begun: TrainConfig) -> TrainConfig:
        """The same options, but the RULES of another config."""
        return replace(self, **{name: getattr(begun, name) for name in RULES})

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_json`; an unknown key is an InputError with the closest match."""
        names = [f.name for f in fields(cls)]
        for key in document:
            choose("training option", key, names)
        for required in ("data", "out"):
            if required not in document:
                raise InputError(
                    "a training option is missing",
                    got=f"no {required}",
                    expected="where the images are and the folder to write: --data folder:PATH --out RUN",
                )
        return cls(**document)
