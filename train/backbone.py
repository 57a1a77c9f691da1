"""The frozen Vision Transformer: one of timm's, a safetensors file, or the pair shipped here."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.layers import HybridEmbed, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..errors import InputError, choose
from ..files import atomic_file, sha256
from ..images import Preprocessing
from .families import plain_vit, refusal
from .sources import from_file, from_folder, from_hub, from_tag, has_own_metadata, random_model
from .trunk import ResidualLayers, build_trunk

BUILTIN = {
    name: Path(__file__).parent / "weights" / f"{name}.safetensors" for name in ("teacher", "student", "student-v1")
}
"student-v1: the student shipped until 2026-11-27, for the runs that were trained with it"
StemSpec = tuple[tuple[int, int, int, int], ...]
"one (channels out, kernel, stride, padding) for each convolution of a convolutional stem"


@dataclass(frozen=True)
class Architecture:
    """Sizes of a ViT of our own files; a timm tag carries its own."""

    img_size: int
    "side of the input, pixels"
    patch_size: int
    "side of a patch, pixels; with a stem, the stem's whole stride"
    embed_dim: int
    "width of a token"
    depth: int
    "transformer blocks"
    num_heads: int
    "attention heads"
    num_classes: int
    "classes of the pre-training head, kept in the file so that its accuracy can be measured again"
    stem: StemSpec = ()
    """Convolutions in front of the blocks in place of the patch embedding ("Early convolutions help transformers see
    better", arXiv 2106.14881). Empty: a plain patch embedding."""
    trunk: str = ""
    "key of trunk.TRUNKS: a pretrained network as the stem, whose stride is the patch size; empty: none"
    mlp_ratio: float = 4.0
    "width of the MLP in units of embed_dim"

    def build(self, batch_norm: bool = False) -> VisionTransformer:
        """A randomly initialised timm model. `batch_norm` is for pre-training only: saved files have it folded."""
        embed: dict[str, Any] = {}
        if self.trunk or self.stem:
            front = build_trunk(self.trunk) if self.trunk else conv_stem(self.stem, batch_norm)
            embed["embed_layer"] = partial(HybridEmbed, backbone=front)
        return VisionTransformer(
            img_size=self.img_size,
            patch_size=1 if embed else self.patch_size,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            num_classes=self.num_classes,
            **embed,
        )


def conv_stem(spec: StemSpec, batch_norm: bool) -> nn.Sequential:
    """Convolution, (BatchNorm,) ReLU for each entry. (B, 3, S, S) -> (B, channels, S / stride, S / stride)."""
    layers: list[nn.Module] = []
    channels = 3
    for out, kernel, stride, padding in spec:
        layers.append(nn.Conv2d(channels, out, kernel, stride, padding, bias=not batch_norm))
        if batch_norm:
            layers.append(nn.BatchNorm2d(out))
        layers.append(nn.ReLU())
        channels = out
    return nn.Sequential(*layers)


def fold_batch_norm(stem: nn.Sequential) -> nn.Sequential:
    """The same function without BatchNorm: its scale and shift moved into the convolutions."""
    layers: list[nn.Module] = []
    for layer in stem:
        if isinstance(layer, nn.BatchNorm2d):
            conv = layers.pop()
            assert isinstance(conv, nn.Conv2d)
            layers.append(nn.utils.fusion.fuse_conv_bn_eval(conv.eval(), layer.eval()))
        else:
            layers.append(layer)
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Backbone:
    """A frozen ViT with what belongs to it."""

    source: str
    "as the user named it"
    identity: str
    "full timm tag, or sha256 of the weight file, and the image size if not its own: what a run was trained on"
    model: VisionTransformer
    "in eval mode, no parameter wants a gradient"
    preprocessing: Preprocessing

    @property
    def width(self) -> int:
        """Channels of a token."""
        return int(self.model.embed_dim)

    @property
    def grid(self) -> int:
        """Patches along a side of the image."""
        return int(self.model.patch_embed.grid_size[0])

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.model.blocks)


def load_backbone(
    source: str, image_size: int | None = None, architecture: str | None = None, identity: str | None = None
) -> Backbone:
    """A frozen ViT by name.

    source: `builtin:teacher|student`, a full timm tag, `hf-hub:ORG/NAME`, `local-dir:PATH`, `file:PATH.safetensors`,
    or `random:NAME` (untrained).
    image_size: side of the images, pixels; positions are resampled as timm does. None: what it was trained with.
    architecture: timm model of a `file:` that does not say its sizes.
    identity: of the weights that a run was trained on: a builtin of an earlier release is found by it. None: any.

    Raises: InputError for an unknown name, an unreachable hub, weights that do not fit, a ViT with parts that prompts
    and export do not support, or a size that its patches do not divide.
    """
    kind, _, rest = source.partition(":")
    if architecture is not None and kind != "file":
        raise InputError(f"{source}: says itself which ViT it is", got=architecture, fix="leave --...-arch out")
    if kind == "builtin":
        path = BUILTIN[choose("builtin backbone", rest, BUILTIN)]
        wanted = identity.partition(" at ")[0] if identity is not None else None  # without the image size
        if wanted is not None and wanted != "sha256:" + sha256(path):  # an earlier one of this name
            path = next((p for p in BUILTIN.values() if "sha256:" + sha256(p) == wanted), path)
        model, preprocessing = load_file(path)
        identity = "sha256:" + sha256(path)
    elif kind == "file":
        path = Path(rest).expanduser()
        if not path.is_file():
            here = f"it is looked for in {Path.cwd()}: name its whole path, or start where the run was trained"
            fix = None if path.is_absolute() else here
            raise InputError(f"{path}: no such file", expected="file:PATH.safetensors", fix=fix)
        if architecture is None and has_own_metadata(path):
            model, preprocessing = load_file(path)
        else:
            model, preprocessing = from_file(path, architecture)
        identity = "sha256:" + sha256(path)
    elif kind == "hf-hub":
        model, preprocessing, identity = from_hub(source, rest)
    elif kind == "local-dir":
        model, preprocessing, identity = from_folder(source, Path(rest).expanduser())
    elif kind == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # "untrained" must be the same weights again when the run is exported
            model, preprocessing = random_model(rest)
        identity = source
    else:
        model, preprocessing = from_tag(source)
        identity = source
    _check_supported(source, model)
    if image_size is not None and image_size != preprocessing.size:
        preprocessing = _resized(source, model, preprocessing, image_size)
        identity += f" at {image_size} pixels"
    vit = plain_vit(model)
    vit.eval().requires_grad_(False)
    return Backbone(source, identity, vit, preprocessing)


def _resized(source: str, model: nn.Module, preprocessing: Preprocessing, size: int) -> Preprocessing:
    """Make the model one for images of another size; the share of an image that is seen stays what it was."""
    step = int(model.patch_embed.feat_ratio())  # type: ignore[operator,union-attr]
    if size < 1 or size % step:
        near = max(1, size // step) * step
        raise InputError(
            f"{source}: its patches do not divide the image size",
            got=f"{size} pixels",
            expected=f"a multiple of {step} pixels",
            fix=f"--image-size {near} or {near + step}",
        )
    model.set_input_size(img_size=(size, size))  # type: ignore[operator]
    return replace(preprocessing, size=size, resize=max(size, size * preprocessing.resize // preprocessing.size))


def _check_supported(source: str, model: nn.Module) -> None:
    """Prompts are inserted block by block and the graph is written by hand: refuse what either would get wrong."""
    found = refusal(model)
    if found is None and not _plain_stem(model.patch_embed):  # type: ignore[arg-type]
        found = f"a {type(model.patch_embed).__name__} that is more than convolutions and ReLUs"
    if found:
        raise InputError(
            f"{source}: this backbone is not supported",
            got=found,
            expected="a plain timm ViT with a class token; docs/backbones.md lists them",
        )


def _plain_stem(embed: nn.Module) -> bool:
    """A patch embedding, our convolutional stem or a trunk: other hybrids' residual networks are not exported."""
    if isinstance(embed, HybridEmbed):
        return isinstance(embed.backbone, nn.Sequential) and _plain_layers(embed.backbone)
    return isinstance(embed, PatchEmbed)


def _plain_layers(layers: nn.Sequential) -> bool:
    return all(
        _plain_layers(layer) if isinstance(layer, ResidualLayers) else isinstance(layer, (nn.Conv2d, nn.ReLU, nn.ReLU6))
        for layer in layers
    )


def load_file(path: Path) -> tuple[VisionTransformer, Preprocessing]:
    """Read a safetensors file with timm key names and our metadata (all values strings). Raises: InputError."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a safetensors file", got=str(error)) from error
    sizes = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    missing = [k for k in (*sizes, "mean", "std") if k not in metadata]
    if missing:
        raise InputError(
            f"{path}: metadata is missing",
            got=", ".join(missing),
            expected="a file made by `cdl-edge pretrain`",
            fix="add the sizes to the file's metadata as strings",
        )
    try:
        stem = tuple(tuple(int(v) for v in layer) for layer in json.loads(metadata.get("stem", "[]")))
        architecture = Architecture(
            **{k: int(metadata[k]) for k in sizes},
            stem=stem,  # type: ignore[arg-type]
            trunk=metadata.get("trunk", ""),
            mlp_ratio=float(metadata.get("mlp_ratio", "4")),
        )
        mean, std = (tuple(float(v) for v in metadata[k].split(",")) for k in ("mean", "std"))
        resize = int(metadata.get("resize", architecture.img_size))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: metadata is damaged", got=str(error), expected="numbers as strings") from error
    model = architecture.build()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"{path}: the tensors do not fit the metadata", got=str(error).splitlines()[1].strip()
        ) from error
    return model, Preprocessing(architecture.img_size, resize, metadata.get("interpolation", "bicubic"), mean, std)  # type: ignore[arg-type]


def save_backbone(
    path: Path,
    architecture: Architecture,
    model: VisionTransformer,
    preprocessing: Preprocessing,
    notes: dict[str, str],
) -> None:
    """Write fp16 safetensors with timm key names, BatchNorm folded, sizes and preprocessing in the metadata."""
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("patch_embed.backbone.")}
    if architecture.trunk:
        state |= {f"patch_embed.backbone.{k}": v for k, v in model.patch_embed.backbone.state_dict().items()}
    elif architecture.stem:
        stem = fold_batch_norm(model.patch_embed.backbone)
        state |= {f"patch_embed.backbone.{k}": v for k, v in stem.state_dict().items()}
    metadata = {
        "architecture": "vision_transformer",
        **{k: str(getattr(architecture, k)) for k in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")},
        "num_classes": str(architecture.num_classes),
        "stem": json.dumps(architecture.stem),
        "trunk": architecture.trunk,
        "mlp_ratio": str(architecture.mlp_ratio),
        "mean": ",".join(str(v) for v in preprocessing.mean),
        "std": ",".join(str(v) for v in preprocessing.std),
        "resize": str(preprocessing.resize),
        "interpolation": preprocessing.interpolation,
        **notes,
    }
    tensors = {k: v.detach().to(torch.float16).contiguous() for k, v in state.items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
