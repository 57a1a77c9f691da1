"""`cdl-edge pretrain --arch hybrid-student | hybrid-teacher`: blocks behind a frozen, pretrained convolutional trunk.

The ViT's stem is an EfficientNet-Lite trunk (trunk.py) with its published weights. Its projection to the tokens' width
is the first principal components of the trunk's own outputs, and the blocks start near the identity (LayerScale
0.1, arXiv 2103.17239), so that the mean of the patches is the trunk's feature from the first step on. The blocks then
learn, on the images of `--data`, their labels and the answers of a larger network of the same family to its ImageNet
classes. The trunk does not learn: what it gives is computed once and kept beside the file that is made.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..data import Decoded, Fingerprint, Split, load_dataset
from ..errors import InputError
from ..files import atomic_file, sha256, write_json
from ..images import Preprocessing
from ..log import LOG
from . import augment
from .backbone import Architecture, save_backbone
from .checkpoint import keep_before, save_state
from .pretrain import matching_checkpoint
from .trunk import MEAN, STD, load_trunk

LICENCE = (
    "trunk: EfficientNet-Lite, Google, Apache-2.0, trained on ImageNet-1k "
    "(PyTorch files of efficientnet-lite-pytorch, Apache-2.0)"
)


@dataclass(frozen=True)
class Hybrid:
    """Sizes of one hybrid of convolutions and attention."""

    trunk: str
    "key of trunk.TRUNKS"
    side: int
    "of the input, pixels"
    width: int
    "of a token"
    heads: int
    "of attention"
    depth: int = 4
    "blocks"
    mlp_ratio: float = 2.0


HYBRIDS = {
    "hybrid-student": Hybrid("efficientnet_lite0", 128, 192, 3),
    "hybrid-teacher": Hybrid("efficientnet_lite2", 160, 256, 4),
}
ANSWERS = Hybrid("efficientnet_lite2", 160, 0, 0)
"the network whose answers both learn from"
LAYER_SCALE = 0.1
CHUNK = 500
"images of one kept file"
CROP = (0.5, 1.0)
"area of a random crop, the views behind the first"


@dataclass(frozen=True)
class HybridConfig:
    """Everything that the pre-training of a hybrid depends on."""

    data: str
    "image source"
    arch: str
    "key of HYBRIDS"
    out: str
    "the .safetensors file to write; checkpoint, curve and kept features stand beside it"
    trunk: str
    "file with the published weights of the trunk"
    distill_from: str
    "file with the published weights of efficientnet_lite2, whose answers are learnt"
    epochs: int = 5
    "passes over all views"
    batch_size: int = 256
    "images a step"
    learning_rate: float = 5e-4
    "AdamW's peak"
    views: int = 2
    "of each training image: itself, then random crops, half of them mirrored"
    limit_per_class: int | None = None
    "training images a class; None: all"
    seed: int = 0
    "of initialisation, order and crops"


def pretrain_hybrid(config: HybridConfig, resume: bool = False) -> dict[str, Any]:
    """Learn the blocks, write the weights; returns {"val_accuracy", "epochs", "seconds", "out", "data"}.

    Raises: InputError for a checkpoint of the trunk that does not fit, a file that is there already, or a checkpoint
        of another configuration or other images.
    """
    hybrid, out = HYBRIDS[config.arch], Path(config.out)
    checkpoint, curve_file = out.with_suffix(".checkpoint"), out.with_suffix(".curve.json")
    if (checkpoint.exists() or out.exists()) and not (resume and checkpoint.exists()):
        raise InputError(
            f"{out}: is there already", fix="choose another --out; with its checkpoint beside it, --resume goes on"
        )
    dataset = load_dataset(config.data)
    LOG.info(dataset.line)
    split = dataset.train
    if config.limit_per_class is not None:
        split = split.limited(config.limit_per_class, config.seed)
    source = Features(config, hybrid, dataset.fingerprint)
    files = ("out", "data", "trunk", "distill_from")  # wherever they are; what is in them is compared
    options = {k: v for k, v in vars(config).items() if k not in files}
    signature = json.dumps({**options, "files": source.identity}, sort_keys=True)
    state: dict[str, Any] | None = None
    if resume and checkpoint.exists():
        state = matching_checkpoint(checkpoint, signature, dataset)
    train = [source.of(split, "train", view) for view in range(config.views)]
    val = source.of(dataset.val, "val", 0)
    skipped = sorted({line for part in (*train, val) for line in part["skipped"].tolist()})
    for line in skipped:
        LOG.info(f"skipped: {line}")
    maps = torch.from_numpy(np.concatenate([t["maps"] for t in train]))
    answers = torch.from_numpy(np.concatenate([t["answers"] for t in train]))
    labels = torch.from_numpy(np.concatenate([t["labels"] for t in train]))

    torch.manual_seed(config.seed)
    architecture = Architecture(
        hybrid.side,
        32,
        hybrid.width,
        hybrid.depth,
        hybrid.heads,
        len(dataset.classes),
        trunk=hybrid.trunk,
        mlp_ratio=hybrid.mlp_ratio,
    )
    model = Blocks(architecture, maps, answers.shape[1])
    optimiser = torch.optim.AdamW(model.groups(), lr=config.learning_rate)
    epoch, curve, seconds = 0, [], 0.0
    if state is not None:
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        epoch, curve, seconds = state["epoch"], state["curve"], state["seconds"]
        LOG.info(f"resumed after epoch {epoch}")
    steps = math.ceil(len(labels) / config.batch_size)
    while epoch < config.epochs:
        started, total = time.perf_counter(), 0.0
        generator = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        order = torch.randperm(len(labels), generator=generator)
        model.train()
        for step in range(steps):
            rows = order[step * config.batch_size : (step + 1) * config.batch_size]
            share = (epoch * steps + step) / (config.epochs * steps)
            for group in optimiser.param_groups:
                group["lr"] = config.learning_rate * min(1.0, share * 20 + 0.01) * 0.5 * (1 + math.cos(math.pi * share))
            own, imagenet = model(maps[rows].float())
            soft = F.softmax(answers[rows].float(), dim=1)
            loss = F.kl_div(F.log_softmax(imagenet, dim=1), soft, reduction="batchmean")
            loss = loss + 0.5 * F.cross_entropy(own, labels[rows], label_smoothing=0.1)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            total += loss.item()
        epoch += 1
        accuracy = model.accuracy(torch.from_numpy(val["maps"]), torch.from_numpy(val["labels"]))
        seconds += time.perf_counter() - started
        curve.append({"epoch": epoch, "loss": total / steps, "val_accuracy": accuracy, "seconds": seconds})
        keep_before(checkpoint)
        save_state(
            checkpoint,
            {
                "model": model.state_dict(),
                "optimiser": optimiser.state_dict(),
                "epoch": epoch,
                "curve": curve,
                "seconds": seconds,
                "signature": signature,
                "data": dataset.fingerprint.to_json(),
            },
        )
        write_json(curve_file, {"config": vars(config), "curve": curve})
        LOG.info(f"epoch {epoch}/{config.epochs}  loss {total / steps:.3f}  val {accuracy:.2f} %  {seconds:.0f} s")
    preprocessing = Preprocessing(hybrid.side, hybrid.side, "bicubic", MEAN, STD)
    vit = model.assembled(architecture, source.trunk)
    notes = {
        "trained_on": f"{config.data} (blocks); ImageNet-1k (trunk, frozen)",
        "epochs": str(epoch),
        "val_accuracy": f"{curve[-1]['val_accuracy']:.2f}" if curve else "",
        "licence": LICENCE,
    }
    save_backbone(out, architecture, vit, preprocessing, notes)
    return {
        "val_accuracy": curve[-1]["val_accuracy"] if curve else None,
        "epochs": epoch,
        "seconds": seconds,
        "out": str(out),
        "data": {**dataset.summary, **({"unreadable": len(skipped)} if skipped else {})},
    }


class Features:
    """What the frozen trunk gives and the answering network says, computed once and kept, CHUNK images a file."""

    def __init__(self, config: HybridConfig, hybrid: Hybrid, images: Fingerprint) -> None:
        """images: what `of` is given parts of. Raises: InputError for a checkpoint of a trunk that does not fit."""
        self.config, self.hybrid = config, hybrid
        self.trunk, _ = load_trunk(hybrid.trunk, Path(config.trunk))
        network: Any
        self._behind, network = load_trunk(ANSWERS.trunk, Path(config.distill_from))
        self._answer = nn.Sequential(network.conv_head, network.bn2, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self._answer.append(network.classifier)
        self.identity = [sha256(Path(f)) for f in (config.trunk, config.distill_from)]
        # What is kept is of these networks, images and crops: others have a folder of their own.
        depends = [vars(hybrid), vars(ANSWERS), self.identity, images.whole, config.seed, config.limit_per_class]
        kept = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = Path(config.out).with_suffix(".features") / kept

    def of(self, split: Split, name: str, view: int) -> dict[str, np.ndarray]:
        """maps float16 (N, P, C), answers float16 (N, 1000), labels int64 (N,), skipped: lines for people."""
        side = max(self.hybrid.side, ANSWERS.side)
        parts = []
        for start in range(0, len(split), CHUNK):
            path = self.folder / f"{self.config.arch}-{name}-{view}-{start}.npz"
            if not path.exists():
                # The smaller one sees the same crop, resampled: decoded at the larger side.
                rows = split.take(np.arange(start, min(start + CHUNK, len(split))))
                decoded = rows.decode(Preprocessing(side, side, "bicubic", MEAN, STD))
                self._make(path, decoded, view, start)
                LOG.info(f"{name}, view {view}: {min(start + CHUNK, len(split))} of {len(split)} images")
            with np.load(path, allow_pickle=False) as file:
                parts.append({k: file[k] for k in ("maps", "answers", "labels", "skipped")})
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    @torch.no_grad()
    def _make(self, path: Path, decoded: Decoded, view: int, start: int) -> None:
        generator = torch.Generator().manual_seed(self.config.seed * 7919 + view * 104_729 + start)
        maps, answers = [], []
        for i in range(0, len(decoded.pixels), 50):
            x = torch.from_numpy(decoded.pixels[i : i + 50]).permute(0, 3, 1, 2).float() / 127.5 - 1
            if view:
                x = augment.random_resized_crop_flip(x, generator, CROP)
            x = x.contiguous(memory_format=torch.channels_last)
            small = _resized(x, self.hybrid.side)
            behind = self._behind(_resized(x, ANSWERS.side))
            answers.append(self._answer(behind).half())
            same = (self.hybrid.trunk, self.hybrid.side) == (ANSWERS.trunk, ANSWERS.side)
            found = behind if same else self.trunk(small)
            maps.append(found.flatten(2).transpose(1, 2).half())
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary, open(temporary, "wb") as stream:
            np.savez(
                stream,
                maps=torch.cat(maps).numpy(),
                answers=torch.cat(answers).numpy(),
                labels=decoded.labels,
                skipped=np.array(decoded.skipped, dtype=np.str_),
            )


def _resized(x: Tensor, side: int) -> Tensor:
    if x.shape[-1] == side:
        return x
    return F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False)


class Blocks(nn.Module):
    """The part of a hybrid that learns, from the trunk's outputs: projection, positions, class token, blocks, heads."""

    def __init__(self, architecture: Architecture, maps: Tensor, answers: int) -> None:
        """maps: (N, P, C) outputs of the trunk, whose principal components the projection starts from."""
        super().__init__()
        width = architecture.embed_dim
        patches = maps.shape[1]
        self.vit = VisionTransformer(
            img_size=round(patches**0.5),
            patch_size=1,
            in_chans=maps.shape[2],
            embed_dim=width,
            depth=architecture.depth,
            num_heads=architecture.num_heads,
            mlp_ratio=architecture.mlp_ratio,
            num_classes=architecture.num_classes,
            init_values=LAYER_SCALE,
        )
        self.answers = nn.Linear(2 * width, answers)
        weight, bias = principal(maps, width)
        with torch.no_grad():
            self.vit.patch_embed.proj.weight.copy_(weight[:, :, None, None])
            self.vit.patch_embed.proj.bias.copy_(bias)
        module: Any
        for module in self.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = torch.cuda.is_available()  # its backward is many times slower on a CPU

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """(B, P, C) -> logits of the own classes (B, c), logits of the answering network's classes (B, A)."""
        side = round(maps.shape[1] ** 0.5)
        tokens = self.vit.forward_features(maps.transpose(1, 2).reshape(len(maps), -1, side, side))
        both = torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=1)
        return self.vit.head(tokens[:, 0]), self.answers(both)

    def groups(self) -> list[dict[str, Any]]:
        """For the optimiser: no decay of vectors; the projection, which is good already, learns at a tenth."""
        slow = {id(p) for p in self.vit.patch_embed.parameters()}
        decayed = [p for p in self.parameters() if p.ndim > 1 and id(p) not in slow and p.shape[0] > 1]
        held = {id(p) for p in decayed} | slow
        others = [p for p in self.parameters() if id(p) not in held]
        return [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]

    @torch.no_grad()
    def accuracy(self, maps: Tensor, labels: Tensor) -> float:
        """Accuracy in % of the own classes, from kept feature maps and labels."""
        self.eval()
        right = [
            (self(m.float())[0].argmax(1) == y).sum() for m, y in zip(maps.split(500), labels.split(500), strict=True)
        ]
        return 100.0 * float(torch.stack(right).sum()) / len(labels)

    def assembled(self, architecture: Architecture, trunk: nn.Sequential) -> VisionTransformer:
        """The whole ViT, LayerScale in the weights in front of it."""
        vit = architecture.build().eval()
        state = self.vit.state_dict()
        for i in range(architecture.depth):
            for layer, scale in (("attn.proj", "ls1"), ("mlp.fc2", "ls2")):
                gamma = state.pop(f"blocks.{i}.{scale}.gamma")
                state[f"blocks.{i}.{layer}.weight"] = state[f"blocks.{i}.{layer}.weight"] * gamma[:, None]
                state[f"blocks.{i}.{layer}.bias"] = state[f"blocks.{i}.{layer}.bias"] * gamma
        state |= {f"patch_embed.backbone.{k}": v for k, v in trunk.state_dict().items()}
        vit.load_state_dict(state)
        return vit


def principal(maps: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Weight (width, C) and bias (width,) that give the first principal components of (N, P, C), of mean variance 1.

    width: at most C. Not whitened: on held-out classes of the images of pre-training, random features and ridge on the
    mean of the patches lost 1.2 points by whitening.
    """
    rows = maps.reshape(-1, maps.shape[2])[:: max(1, maps.shape[0] * maps.shape[1] // 200_000)].double()
    mean = rows.mean(0)
    values, vectors = torch.linalg.eigh((rows - mean).T @ (rows - mean) / len(rows))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    weight = (vectors / values.mean().sqrt()).T
    return weight.float(), (-weight @ mean).float()
