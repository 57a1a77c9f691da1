"""`cdl-edge pretrain`: make a small backbone from an image folder, restartable, on a CPU if need be.

The recipe: a residual network first; then ViTs with a convolutional stem learn from its soft answers on the same mixed
images ("a good teacher is patient and consistent", arXiv 2106.05237; DeiT, arXiv 2012.12877).
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import Dataset, Fingerprint, load_dataset
from ..errors import InputError, choose
from ..files import write_json
from ..images import Preprocessing
from ..log import LOG
from . import augment
from .backbone import Architecture, StemSpec, save_backbone
from .checkpoint import keep_before, load_kept, load_state, save_state
from .convnet import ConvNet
from .folder import check_images

WIDE_STEM: StemSpec = ((48, 4, 2, 0), (80, 3, 2, 1), (80, 3, 1, 1), (160, 3, 2, 1), (160, 3, 1, 1))
NARROW_STEM: StemSpec = ((24, 4, 2, 0), (48, 3, 2, 1), (48, 3, 1, 1), (96, 3, 2, 1), (96, 3, 1, 1), (96, 3, 2, 1))
# The first convolution pads nothing, so that export folds the image normalisation into it exactly.
VITS: dict[str, tuple[int, int, StemSpec]] = {
    "teacher": (192, 3, (*WIDE_STEM, (192, 3, 2, 1))),
    "student": (96, 3, NARROW_STEM),
    "teacher-plain": (192, 3, ()),
    "student-plain": (96, 3, ()),
}
"name -> width, heads, stem; all 64 x 64 pixels, 16 tokens and the class token, 12 blocks"
ARCHITECTURES = ("convnet", *VITS)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PretrainConfig:
    """Everything a pre-training run depends on."""

    data: str
    "image source, only its classes are ever seen"
    arch: str
    "one of ARCHITECTURES"
    out: str
    "the .safetensors file to write; checkpoint and curve stand beside it"
    epochs: int = 40
    "passes over the training images"
    batch_size: int = 256
    "images a step"
    learning_rate: float | None = None
    "peak; None: 0.2 (SGD, convnet), 0.001 (AdamW, ViT)"
    distill_from: str | None = None
    "a convnet made by this command; None: labels only"
    freeze_stem: bool = False
    """teacher only, with distill_from: keep the residual network's stem as it is, computed once for both"""
    small_until: float = 0.5
    "convnet only: this share of the epochs runs at three quarters of the resolution (cheaper, and a regulariser)"
    seed: int = 0
    "of initialisation, order and augmentation"


def matching_checkpoint(path: Path, signature: str, dataset: Dataset) -> dict[str, Any]:
    """What a stopped pretraining has kept. Raises: InputError for another configuration, or other images."""
    state = load_kept(path)
    if "data" not in state or state["signature"] != signature:
        raise InputError(
            f"{path}: from another configuration, or an earlier version",
            fix="give the same options and files, or choose another --out",
        )
    check_images(path, Fingerprint.from_json(state["data"]), dataset)
    return state


def pretrain(config: PretrainConfig, resume: bool = False) -> dict[str, Any]:
    """Train, print a line an epoch, write the weights; returns {"val_accuracy", "epochs", "seconds", "out", "data"}.

    Raises: InputError for unknown names, or a checkpoint of another configuration or other images.
    """
    choose("architecture", config.arch, ARCHITECTURES)
    out = Path(config.out)
    checkpoint, curve_file = out.with_suffix(".checkpoint"), out.with_suffix(".curve.json")
    signature = json.dumps({k: v for k, v in vars(config).items() if k not in ("out", "data")}, sort_keys=True)

    dataset = load_dataset(config.data)
    LOG.info(dataset.line)
    preprocessing = Preprocessing(64, 64, "bicubic", MEAN, STD)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    model, teacher = _models(config, len(dataset.classes), device)
    optimiser, peak = _optimiser(config, model)
    size = sum(p.numel() for p in model.parameters())
    LOG.info(f"{config.arch}: {size:,} parameters; decoding {len(dataset.train):,} images")
    train, val = dataset.train.decode(preprocessing), dataset.val.decode(preprocessing)
    skipped = [*train.skipped, *val.skipped]
    for line in skipped:
        LOG.info(f"skipped: {line}")
    if skipped:
        LOG.info(f"{len(skipped)} unreadable image(s) skipped")

    if (checkpoint.exists() or out.exists()) and not (resume and checkpoint.exists()):
        raise InputError(
            f"{out}: is there already", fix="choose another --out; with its checkpoint beside it, --resume goes on"
        )
    epoch, curve, seconds = 0, [], 0.0
    if resume and checkpoint.exists():
        state = matching_checkpoint(checkpoint, signature, dataset)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        epoch, curve, seconds = state["epoch"], state["curve"], state["seconds"]
        LOG.info(f"resumed after epoch {epoch}")

    normalise = augment.Normalise(preprocessing, device)
    steps = math.ceil(len(train.labels) / config.batch_size)
    while epoch < config.epochs:
        started = time.perf_counter()
        # Everything random of an epoch comes from (seed, epoch): a resumed run needs no generator state.
        generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        order = torch.randperm(len(train.labels), generator=generator).numpy()
        small = config.arch == "convnet" and epoch < config.small_until * config.epochs
        calm = epoch >= 0.9 * config.epochs
        model.train()
        total = 0.0
        for step in range(steps):
            rate = _cosine(peak, epoch * steps + step, config.epochs * steps, warmup=2 * steps)
            for group in optimiser.param_groups:
                group["lr"] = rate
            index = order[step * config.batch_size : (step + 1) * config.batch_size]
            targets = F.one_hot(torch.from_numpy(train.labels[index]), len(dataset.classes)).float().to(device)
            x = normalise(train.pixels[index])
            x = augment.random_resized_crop_flip(
                x, generator, (0.6, 1.0) if calm else (0.3, 1.0), preprocessing.size * 3 // 4 if small else None
            )
            x = augment.colour_jitter(x, generator, 0.3)
            if torch.rand(1, generator=generator).item() < (0.2 if calm else 0.6):
                x, targets = augment.mix(x, targets, generator, mixup_alpha=0.4)
            x = x.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16):
                loss = _loss(model, teacher, x, targets, config.freeze_stem)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            total += loss.item()
        epoch += 1
        front = teacher.stem if teacher is not None and config.freeze_stem else nn.Identity()
        accuracy = _accuracy(nn.Sequential(front, model), val.pixels, val.labels, normalise)
        seconds += time.perf_counter() - started
        curve.append({"epoch": epoch, "loss": total / steps, "val_accuracy": accuracy, "seconds": seconds})
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict()}
        state |= {"signature": signature, "data": dataset.fingerprint.to_json()}
        keep_before(checkpoint)
        save_state(checkpoint, {**state, "epoch": epoch, "curve": curve, "seconds": seconds})
        write_json(curve_file, {"config": vars(config), "curve": curve})
        LOG.info(f"epoch {epoch}/{config.epochs}  loss {total / steps:.3f}  val {accuracy:.2f} %  {seconds:.0f} s")

    data = {**dataset.summary, **({"unreadable": len(skipped)} if skipped else {})}
    result = {
        "val_accuracy": curve[-1]["val_accuracy"],
        "epochs": epoch,
        "seconds": seconds,
        "out": str(out),
        "data": data,
    }
    if isinstance(model, ConvNet):
        save_state(out, {"model": model.half().state_dict()})
        return result
    if teacher is not None and config.freeze_stem:
        model.patch_embed.backbone = nn.Sequential(*teacher.stem, *model.patch_embed.backbone)  # type: ignore
    notes = {"trained_on": config.data, "epochs": str(epoch), "val_accuracy": f"{curve[-1]['val_accuracy']:.2f}"}
    save_backbone(out, _vit(config.arch, len(dataset.classes)), model.eval(), preprocessing, notes)
    return result


def _vit(arch: str, num_classes: int) -> Architecture:
    width, heads, stem = VITS[arch]
    return Architecture(64, 16, width, 12, heads, num_classes, stem)


def _convnet(num_classes: int) -> ConvNet:
    return ConvNet(WIDE_STEM, ((160, 1), (320, 2), (320, 1)), num_classes)


def _models(config: PretrainConfig, num_classes: int, device: torch.device) -> tuple[nn.Module, ConvNet | None]:
    teacher = None
    if config.distill_from is not None:
        path = Path(config.distill_from)
        if not path.is_file():
            raise InputError(f"{path}: no such file", expected="a convnet made by `pretrain --arch convnet`")
        teacher = _convnet(num_classes)
        state = load_state(path).get("model", {})
        try:
            teacher.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
        except RuntimeError as error:
            raise InputError(
                f"{path}: not a convnet for these {num_classes} classes",
                got=str(error).splitlines()[1].strip(),
                expected="a convnet made by `pretrain --arch convnet` on the same classes",
            ) from error
        teacher.eval().requires_grad_(False)
        teacher.to(device).to(memory_format=torch.channels_last)
    if config.arch == "convnet":
        return _convnet(num_classes).to(device).to(memory_format=torch.channels_last), teacher
    model = _vit(config.arch, num_classes).build(batch_norm=True)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = device.type == "cuda"  # its backward is many times slower on a CPU
    if teacher is not None and VITS[config.arch][2][: len(WIDE_STEM)] == WIDE_STEM:
        # The stem starts as the one the residual network has learnt.
        model.patch_embed.backbone.load_state_dict(teacher.stem.state_dict(), strict=False)
        if config.freeze_stem:
            model.patch_embed.backbone = model.patch_embed.backbone[len(teacher.stem) :]
    elif config.freeze_stem:
        raise InputError(
            "--freeze-stem has no stem to keep", got=config.arch, expected="--arch teacher --distill-from FILE"
        )
    return model.to(device).to(memory_format=torch.channels_last), teacher


def _optimiser(config: PretrainConfig, model: nn.Module) -> tuple[torch.optim.Optimizer, float]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    if config.arch == "convnet":
        peak = config.learning_rate or 0.2
        groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.SGD(groups, lr=peak, momentum=0.9, nesterov=True), peak
    peak = config.learning_rate or 1e-3
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak), peak


def _cosine(peak: float, step: int, total: int, warmup: int) -> float:
    warmup = min(warmup, total // 10)
    if step < warmup:
        return peak * (step + 1) / warmup
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _loss(model: nn.Module, teacher: ConvNet | None, x: Tensor, targets: Tensor, behind_stem: bool) -> Tensor:
    """Cross entropy with smoothing 0.1; with a teacher: 0.1 of it and 0.9 of the divergence to its answers.

    behind_stem: the model starts from what the teacher's stem gives.
    """
    if teacher is None:
        return F.cross_entropy(model(x).float(), targets, label_smoothing=0.1)
    with torch.no_grad():
        features = teacher.stem(x)
        soft = F.softmax(teacher.behind_stem(features).float(), dim=1)
    logits = model(features if behind_stem else x).float()
    hard = F.cross_entropy(logits, targets, label_smoothing=0.1)
    return 0.1 * hard + 0.9 * F.kl_div(F.log_softmax(logits, dim=1), soft, reduction="batchmean")


@torch.no_grad()
def _accuracy(model: nn.Module, pixels: np.ndarray, labels: np.ndarray, normalise: augment.Normalise) -> float:
    model.eval()
    correct = 0
    for start in range(0, len(labels), 512):
        x = normalise(pixels[start : start + 512]).contiguous(memory_format=torch.channels_last)
        with torch.autocast(x.device.type, torch.bfloat16):
            answer = model(x).argmax(1).cpu().numpy()
        correct += int((answer == labels[start : start + 512]).sum())
    return 100.0 * correct / len(labels)
