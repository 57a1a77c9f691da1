"""Try every ViT that timm lists, small and with random weights, and write docs/backbones.md.

    python docs/make_backbones.py            # minutes on one core
    python docs/make_backbones.py --full     # five of them at their own width, depth and image size, too

Each supported one is exported for APT and for CODA + KDP and compared with torch in ONNX Runtime, fp32 (those that
are equal when small, once).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from cdl_edge.export.assembly import assemble
from cdl_edge.export.student_graph import StudentGraph
from cdl_edge.images import Preprocessing
from cdl_edge.train.attention import RotaryAttention
from cdl_edge.train.augment import Normalise
from cdl_edge.train.backbone import load_backbone
from cdl_edge.train.families import plain_vit, refusal
from cdl_edge.train.student import ModelSpec, PromptedViT
from cdl_edge.train.tokens import registers

PAGE = Path(__file__).parent / "backbones.md"
MARKS = ("<!-- table -->", "<!-- end of the table -->")
MODULES = (
    *("vision_transformer", "deit", "eva", "beit", "vision_transformer_hybrid", "vision_transformer_relpos"),
    *("vision_transformer_sam", "naflexvit", "vitamin", "cait", "xcit", "crossvit", "convit", "volo", "tnt", "pit"),
)
"of timm: its Vision Transformers and what is often taken for one"
SIDE_PATCHES, DEPTH, WIDTHS, HEADS = 3, 2, (64, 96), 4
TOLERANCE = 1e-4
FULL = (
    *("deit3_small_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"),
    *("vit_base_patch32_clip_224", "vit_small_patch16_dinov3"),
)
LEARNERS = {"APT": ("apt", None), "CODA + KDP": ("coda", (12, 6))}


def names() -> list[str]:
    """Every model of MODULES."""
    known = {m.rpartition(".")[2] for m in sys.modules if m.startswith("timm.models.")}
    return [n for module in MODULES if module in known for n in timm.list_models(module=module)]


def small(name: str) -> Any:
    """The model with its parts, but narrow and of few blocks; where it takes no such sizes, its shapes only."""
    patch = 16
    for part in name.split("_"):
        if part.startswith("patch") and part[5:].isdigit():
            patch = int(part[5:])
    sizes = {"img_size": SIDE_PATCHES * patch, "depth": DEPTH, "num_heads": HEADS, "num_classes": 0}
    for width in WIDTHS:
        try:
            return timm.create_model(name, embed_dim=width, **sizes)
        except (TypeError, ValueError, RuntimeError, AssertionError, KeyError):
            continue
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0)


@torch.no_grad()
def parity(vit: VisionTransformer, preprocessing: Preprocessing, count: int = 3) -> float:
    """Largest difference between the graphs of LEARNERS and torch on random images."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, *[preprocessing.size] * 2, 3), dtype=np.uint8)
    worst = 0.0
    for learner, kd in LEARNERS.values():
        student = PromptedViT(vit, ModelSpec(learner, 5, 2, 0, kd=kd)).eval()
        generator = torch.Generator().manual_seed(0)
        for task in range(2):
            student.learner.begin_task(task)
            for parameter in student.trainable():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            student.learner.end_task(task)
        student.requires_grad_(False)
        expected = student.combine(student(student.embed(Normalise(preprocessing, torch.device("cpu"))(pixels))))
        files = assemble({"student": StudentGraph(student, preprocessing, 5, 1).build()}, {"classes": ["a"]})
        with tempfile.TemporaryDirectory() as folder:
            for file, content in {"student.onnx": files.models["student"], **files.constants}.items():
                (Path(folder) / file).write_bytes(content)
            session = onnxruntime.InferenceSession(f"{folder}/student.onnx", providers=["CPUExecutionProvider"])
            got = np.concatenate([session.run(["logits"], {"images": p[None]})[0] for p in pixels])
        worst = max(worst, float(np.abs(got - expected.numpy()).max()))
    return worst


def randomise(vit: VisionTransformer) -> None:
    """Weights of which every one matters: timm starts with zero biases and tiny tokens."""
    generator = torch.Generator().manual_seed(0)
    for name, value in vit.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            value.data = 1 + 0.3 * noise
        elif value.ndim == 1 or name.endswith(("token", "pos_embed")):
            value.data = 0.3 * noise
        else:
            value.data = noise / value[0].numel() ** 0.5
    vit.eval().requires_grad_(False)


def parts(vit: VisionTransformer, pooled: bool) -> str:
    """What it has beyond the first ViTs. pooled: whether it was trained to answer by attention pooling."""
    block: Any = vit.blocks[0]
    count = registers(vit)
    found = {
        "LayerScale": not isinstance(block.ls1, torch.nn.Identity),
        f"{count} register{'s' if count > 1 else ''}": count > 0,
        "class token without position": vit.no_embed_class and vit.pos_embed is not None,
        "norm in front": not isinstance(vit.norm_pre, torch.nn.Identity),
        "gated MLP": type(block.mlp).__name__ == "GluMlp",
        type(block.mlp.act).__name__: type(block.mlp).__name__ != "GluMlp" and type(block.mlp.act) is not torch.nn.GELU,
        "q/k norm": not isinstance(block.attn.q_norm, torch.nn.Identity),
        "norm in MLP": not isinstance(block.mlp.norm, torch.nn.Identity),
        "RoPE": isinstance(block.attn, RotaryAttention),
        "attention pooling left out": pooled,
    }
    return ", ".join(k for k, v in found.items() if v) or "-"


def tried() -> tuple[dict[str, tuple[float, list[str]]], dict[str, list[str]]]:
    """Parts -> worst difference, names of those that are supported; reason -> names of the others."""
    supported: dict[str, tuple[float, list[str]]] = {}
    refused: dict[str, list[str]] = defaultdict(list)
    exported: dict[tuple[Any, ...], float] = {}
    for name in names():
        model = small(name)
        reason = refusal(model)
        if reason is None and hasattr(model.patch_embed, "backbone"):
            reason = "a HybridEmbed that is more than convolutions and ReLUs"
        if reason is None and next(model.parameters()).is_meta:
            reason = "could not be made small: not tried"
        if reason is not None:
            refused[reason].append(name)
            continue
        side, pooled = model.patch_embed.img_size[0], getattr(model, "attn_pool", None) is not None
        vit = plain_vit(model)
        has = parts(vit, pooled)
        kind = (has, side, tuple((k, tuple(v.shape)) for k, v in vit.state_dict().items()))
        if kind not in exported:  # equal but for its name: once is enough
            randomise(vit)
            exported[kind] = parity(vit, Preprocessing(side, side))
            print(f"{name}: {has}, {exported[kind]:.1e}", file=sys.stderr, flush=True)
        worst, group = supported.get(has, (0.0, []))
        supported[has] = (max(worst, exported[kind]), [*group, name])
    return supported, refused


def full() -> list[str]:
    """Rows of FULL."""
    rows = []
    for name in FULL:
        backbone = load_backbone(f"random:{name}")
        randomise(backbone.model)
        worst = parity(backbone.model, backbone.preprocessing, count=1)
        size = backbone.preprocessing.size
        rows.append(f"| `{name}` | {backbone.width} | {backbone.depth} | {size} | {worst:.1e} |")
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def table(with_full: bool) -> str:
    """The part of the page between MARKS."""
    supported, refused = tried()
    worst = max(difference for difference, _ in supported.values())
    assert worst <= TOLERANCE, worst
    count = sum(len(models) for _, models in supported.values())
    total = count + sum(len(v) for v in refused.values())
    lines = [f"timm {timm.__version__}: {count} of {total} are supported.", ""]
    lines += ["| supported, with | largest difference | models |", "|---|---|---|"]
    for has, (difference, models) in sorted(supported.items(), key=lambda item: -len(item[1][1])):
        lines.append(f"| {has} | {difference:.1e} | {', '.join(f'`{m}`' for m in models)} |")
    lines += ["", "| refused, as | models |", "|---|---|"]
    for reason, models in sorted(refused.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {reason} | {', '.join(f'`{m}`' for m in models)} |")
    if with_full:
        lines += ["", "At their own size, random weights, one image:", ""]
        lines += ["| model | width | blocks | pixels | largest difference |", "|---|---|---|---|---|", *full()]
    return "\n".join(lines)


def main() -> None:
    """Write the table into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="five models at their own size, too")
    text = PAGE.read_text("utf-8")
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    PAGE.write_text(f"{text[:start]}\n{table(parser.parse_args().full)}\n{text[end:]}", "utf-8")


if __name__ == "__main__":
    main()
