"""Tiny students in the state they have after several tasks, and their graphs in ONNX Runtime."""

from __future__ import annotations

import copy
import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from cdl_edge.export.assembly import Artefact, assemble
from cdl_edge.export.student_graph import StudentGraph
from cdl_edge.images import Preprocessing
from cdl_edge.train.augment import Normalise
from cdl_edge.train.backbone import Architecture, fold_batch_norm
from cdl_edge.train.learners.apt import APT
from cdl_edge.train.learners.l2p import L2P
from cdl_edge.train.student import ModelSpec, PromptedViT

SIDE, CLASSES, TASKS, LEARNT = 32, 7, 4, 3
PREPROCESSING = Preprocessing(SIDE, SIDE, "bilinear", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
STEMS = {
    "plain": (),
    "stem": ((8, 2, 2, 0), (12, 3, 2, 1), (16, 3, 1, 1)),
    "padded stem": ((8, 3, 2, 1), (12, 3, 2, 1)),
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every one of them matters (timm starts with zero biases and tiny positions)."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif not value.is_floating_point():
            continue
        elif name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            value.copy_(1 + 0.3 * noise)
        elif name.endswith(("bias", "pos_embed", "cls_token", "running_mean")):
            value.copy_(0.3 * noise)
        else:
            value.copy_(noise / max(1, value[0].numel()) ** 0.5)


def make_backbone(
    stem: str = "plain", depth: int = 6, layer_scale: bool = False, qkv_bias: bool = True, seed: int = 0, patch: int = 8
) -> VisionTransformer:
    """32 pixels, patches of 8 (stems: stride 4), width 32, 2 heads."""
    if STEMS[stem]:
        model = Architecture(SIDE, 4, 32, depth, 2, 0, STEMS[stem]).build(batch_norm=True)
    else:
        model = VisionTransformer(
            img_size=SIDE,
            patch_size=patch,
            embed_dim=32,
            depth=depth,
            num_heads=2,
            num_classes=0,
            init_values=0.5 if layer_scale else None,
            qkv_bias=qkv_bias,
        )
    randomise(model, seed)
    if STEMS[stem]:  # as saving a pre-trained backbone does
        model.patch_embed.backbone = fold_batch_norm(model.eval().patch_embed.backbone)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def make_student(
    learner: str = "coda",
    kd: tuple[int, int] | None = (12, 6),
    one_pass: bool = False,
    *,
    backbone: VisionTransformer | None = None,
    learnt: int = LEARNT,
    seed: int = 1,
    kd_head: str = "learner",
    query_of: str = "class",
    compat: bool = False,
    **options: Any,
) -> PromptedViT:
    """A student that has learnt `learnt` of TASKS tasks, with random prompts, keys and heads."""
    backbone = backbone or make_backbone(**options)
    ways = {"one_pass": one_pass, "query_of": query_of, "kd_head": kd_head, "compat": compat}
    student = PromptedViT(backbone, ModelSpec(learner, CLASSES, TASKS, seed, kd=kd, alpha=0.3, **ways))
    generator = torch.Generator().manual_seed(seed)
    for task in range(learnt):
        student.learner.begin_task(task)
        for parameter in student.trainable():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
        student.learner.end_task(task)
    if isinstance(student.learner, L2P):
        student.learner.used[torch.randperm(30, generator=generator)[:11]] = True
    if isinstance(student.learner, APT):
        assert student.learner.merged.abs().sum() > 0
    return student.eval().requires_grad_(False)


@dataclass(frozen=True)
class Exported:
    """A graph on disk with its session."""

    artefact: Artefact
    proto: onnx.ModelProto
    "without the external constants"
    outputs: dict[str, list[int]]
    session: onnxruntime.InferenceSession

    def run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """All images in one call."""
        names = [o.name for o in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, {"images": pixels}), strict=True))

    def each(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """One image a call, joined."""
        parts = [self.run(pixels[i : i + 1]) for i in range(len(pixels))]
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def digests(artefact: Artefact) -> dict[str, str]:
    """File name -> SHA-256: what tests compare, since pytest takes minutes to explain how two blobs differ."""
    files = {"student.onnx": artefact.models["student"], **artefact.constants}
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


@dataclass(frozen=True)
class Lab:
    """What the tests of this folder use."""

    folder: Path
    numbers: itertools.count
    students: dict[tuple[Any, ...], PromptedViT] = field(default_factory=dict)
    side: int = SIDE
    classes: int = CLASSES
    learnt: int = LEARNT
    preprocessing: Preprocessing = PREPROCESSING

    def backbone(self, *arguments: Any, **options: Any) -> VisionTransformer:
        """`make_backbone`."""
        return make_backbone(*arguments, **options)

    def randomise(self, vit: VisionTransformer) -> VisionTransformer:
        """Weights large enough that every one of them matters; frozen."""
        randomise(vit, 0)
        return vit.eval().requires_grad_(False)

    def student(self, *arguments: Any, **options: Any) -> PromptedViT:
        """`make_student`: a copy of one's own of what was made once (CODA's components cost half a second)."""
        key = (arguments, tuple(sorted(options.items())))
        if key not in self.students:
            self.students[key] = make_student(*arguments, **options)
        backbone = options.get("backbone")
        return copy.deepcopy(self.students[key], {id(backbone): backbone} if backbone is not None else {})

    def digests(self, *arguments: Any, **options: Any) -> dict[str, str]:
        """SHA-256 of the files that `artefact` gives."""
        return digests(self.artefact(*arguments, **options)[0])

    def artefact(
        self,
        student: PromptedViT,
        classes: int = CLASSES,
        batch: int | None = 1,
        preprocessing: Preprocessing = PREPROCESSING,
        part: str = "student",
        **options: Any,
    ) -> tuple[Artefact, dict[str, list[int]]]:
        """student.onnx and its constants in memory, and the outputs' shapes behind the batch."""
        graph = StudentGraph(student, preprocessing, classes, batch, **options).build(part)
        return assemble({"student": graph}, {"classes": ["a"]}), graph.outputs

    def export(self, student: PromptedViT, **options: Any) -> Exported:
        """Build, write, check, load."""
        artefact, outputs = self.artefact(student, **options)
        folder = self.folder / str(next(self.numbers))
        folder.mkdir()
        (folder / "student.onnx").write_bytes(artefact.models["student"])
        for name, content in artefact.constants.items():
            (folder / name).write_bytes(content)
        onnx.checker.check_model(str(folder / "student.onnx"), full_check=True)
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(
            str(folder / "student.onnx"), settings, providers=["CPUExecutionProvider"]
        )
        return Exported(artefact, onnx.load_from_string(artefact.models["student"]), outputs, session)

    @torch.no_grad()
    def truth(
        self, student: PromptedViT, pixels: np.ndarray, preprocessing: Preprocessing = PREPROCESSING
    ) -> dict[str, np.ndarray]:
        """What torch computes; weights of entries that inference may not select are left out."""
        output = student(student.embed(Normalise(preprocessing, torch.device("cpu"))(pixels)))
        found = {"logits": student.combine(output).numpy()}
        if output.prompt_weights is not None:
            weights = output.prompt_weights
            if isinstance(student.learner, L2P):
                weights = weights[:, :, student.learner.learnt_entries()]
            found["prompt_weights"] = weights.numpy()
        return found

    def pixels(self, count: int = 5, seed: int = 0) -> np.ndarray:
        """Random images with extremes among them: uint8 (count, S, S, 3)."""
        images = np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
        images[0] = 0
        images[-1] //= 3
        return images


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Makes students, exports them, tells the truth."""
    return Lab(tmp_path_factory.mktemp("graphs"), itertools.count())
