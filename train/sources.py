"""Where weights come from besides our own files: timm's tags, the Hugging Face hub, a folder, a file of timm's.

All of them end in the same three things: the name of a timm model, what its config says, a safetensors file. The hub
is read by `huggingface_hub`, so its cache, HF_HUB_OFFLINE and HF_ENDPOINT (a mirror) work as its users know them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_names
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_names
from torch import Tensor, nn

from ..errors import InputError, choose
from ..files import sha256
from ..images import Preprocessing

WEIGHTS = ("model.safetensors", "open_clip_model.safetensors")
"names of the weights in a hub repository or a folder, the first that is there"
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
CONVERT = (
    'python -c "import sys, torch, safetensors.torch as s; d = torch.load(sys.argv[1], weights_only=True); '
    "d = d.get('state_dict', d.get('model', d)); "
    "s.save_file({k: v.clone().contiguous() for k, v in d.items() if hasattr(v, 'clone')}, sys.argv[2])\" "
)
"followed by the pickle and the file to write"


@dataclass(frozen=True)
class Described:
    """A timm model without its weights, as a config.json or timm's own list describes it."""

    architecture: str
    "name of a timm model"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    "what its constructor is given besides"
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    "input_size, crop_pct, mean, std, interpolation: what the weights were trained with"


# -- what there is ----------------------------------------------------------------------------------------------------


def random_model(name: str) -> tuple[nn.Module, Preprocessing]:
    """An untrained timm model, the same every time. Raises: InputError for an unknown name."""
    choose("timm model", name.split(".")[0], timm.list_models())
    return _build(f"random:{name}", Described(name))


def from_tag(tag: str) -> tuple[nn.Module, Preprocessing]:
    """A model by its full timm tag, from the hub or its cache. Raises: InputError."""
    name = tag.split(".")[0]
    choose("timm model", name, timm.list_models())
    tags = timm.list_pretrained(f"{name}.*")
    if "." not in tag:
        raise InputError(
            f"{tag}: the tag is missing, and timm's default changes between releases",
            expected="a full tag: " + (", ".join(tags) or "none is published"),
        )
    choose("timm tag", tag, tags)
    config = timm.models.get_pretrained_cfg(tag)
    assert config is not None
    if not config.hf_hub_id:
        raise InputError(f"{tag}: not on the hub", got=config.url, fix="download it and use file:PATH.safetensors")
    names = (config.hf_hub_filename, *WEIGHTS) if config.hf_hub_filename else WEIGHTS
    path = _first_of(tag, config.hf_hub_id, [n for n in names if n.endswith(".safetensors")])
    return _filled(tag, Described(name, {}, config.to_dict()), path)


def from_hub(source: str, repository: str) -> tuple[nn.Module, Preprocessing, str]:
    """A timm model of a hub repository, ORG/NAME or ORG/NAME@REVISION, and its identity. Raises: InputError."""
    if repository.count("/") != 1 or repository.startswith("/") or repository.endswith("/"):
        raise InputError(f"{source}: not a repository", got=repository, expected="hf-hub:ORG/NAME")
    config = fetch(source, repository, "config.json")
    if config is None:
        raise InputError(f"{source}: no config.json in it", expected="a timm model of the Hugging Face hub")
    described = read_config(config)
    path = _first_of(source, repository, WEIGHTS)
    return *_filled(source, described, path), "sha256:" + sha256(path)


def from_folder(source: str, folder: Path) -> tuple[nn.Module, Preprocessing, str]:
    """config.json and model.safetensors of a folder, as hub repositories hold them. Raises: InputError."""
    if not (folder / "config.json").is_file():
        missing = "no config.json there" if folder.is_dir() else "no such folder"
        raise InputError(f"{source}: {missing}", expected="a folder with config.json and model.safetensors")
    described = read_config(folder / "config.json")
    files = [folder / n for n in WEIGHTS if (folder / n).is_file()] or sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
        raise InputError(
            f"{source}: which weights?" if files else f"{source}: no weights that can be read there",
            got=", ".join(p.name for p in files or pickles) or "no file of weights",
            expected="one safetensors file, model.safetensors: a pickle can run programs and is not read",
            fix=f"{CONVERT}{pickles[0]} {folder / WEIGHTS[0]}" if pickles and not files else None,
        )
    return *_filled(source, described, files[0]), "sha256:" + sha256(files[0])


def from_file(path: Path, architecture: str | None) -> tuple[nn.Module, Preprocessing]:
    """A file of timm's: sizes from `architecture` (a timm model), or the config.json beside it. Raises: InputError."""
    beside = path.parent / "config.json"
    if architecture is not None:
        choose("timm model", architecture.split(".")[0], timm.list_models())
        config = timm.models.get_pretrained_cfg(architecture)
        described = Described(architecture.split(".")[0], {}, config.to_dict() if config else {})
    elif beside.is_file():
        described = read_config(beside)
    else:
        raise InputError(
            f"{path}: which ViT is it? The file's metadata is missing, and there is no config.json beside it",
            expected="a file made by `cdl-edge pretrain`, or one of timm's with its config.json beside it",
            fix="put the hub's config.json beside it, or name the timm model: --student-arch (or --teacher-arch) "
            "vit_tiny_patch16_224",
        )
    return _filled(str(path), described, path)


def has_own_metadata(path: Path) -> bool:
    """Whether a file says its sizes itself, as those of `pretrain` do. Raises: InputError for no safetensors file."""
    with _opened(path) as file:
        return "embed_dim" in (file.metadata() or {})


# -- the hub ----------------------------------------------------------------------------------------------------------


def fetch(source: str, repository: str, name: str) -> Path | None:
    """A file of a hub repository in the hub's cache, downloaded where needed; None: the repository has no such file.

    Raises: InputError, with what the hub or the network answered.
    """
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = repository.partition("@")
    login = "check the name; a private or gated repository needs `hf auth login`, or HF_TOKEN"
    fix = "check the network (HF_ENDPOINT names a mirror), or use file:PATH.safetensors or builtin:student"

    def refused(reason: BaseException, fix: str = fix) -> InputError:
        text = " ".join(str(reason).split())
        return InputError(
            f"{source}: the weights could not be fetched from {constants.ENDPOINT}/{repository}",
            got=(text[:200] or type(reason).__name__),
            fix=fix,
        )

    try:
        return Path(hf_hub_download(repository, name, revision=revision or None))
    except LocalEntryNotFoundError as error:  # a subclass of the next one with another meaning
        cached = "it is not in the hub's cache and HF_HUB_OFFLINE is set: " if constants.HF_HUB_OFFLINE else ""
        raise refused(error.__cause__ or error, cached + fix) from error
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise refused(error, login) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # the libraries below it change: their errors have no common class
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None:  # nobody answered: what is in the cache will do
            with suppress(LocalEntryNotFoundError):
                return Path(hf_hub_download(repository, name, revision=revision or None, local_files_only=True))
        raise refused(error, login if status in (401, 403) else fix) from error


def _first_of(source: str, repository: str, names: tuple[str, ...] | list[str]) -> Path:
    for name in names:
        path = fetch(source, repository, name)
        if path is not None:
            return path
    raise InputError(
        f"{source}: no safetensors file in {repository}",
        expected=" or ".join(names),
        fix=f"download what is there, convert it: {CONVERT}pytorch_model.bin model.safetensors; then local-dir:FOLDER",
    )


# -- reading ----------------------------------------------------------------------------------------------------------


def read_config(path: Path) -> Described:
    """A config.json as timm writes it, of any of its versions. Raises: InputError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: damaged", got=str(error), expected="JSON") from error
    name = document.get("architecture") if isinstance(document, dict) else None
    if not isinstance(name, str):
        other = isinstance(document, dict) and ("model_type" in document or "architectures" in document)
        raise InputError(
            f"{path}: not a config of timm",
            got="one of transformers" if other else "no architecture",
            expected='{"architecture": "vit_tiny_patch16_224", ...}',
            fix="use the model's timm version: hf-hub:timm/NAME" if other else None,
        )
    choose("timm model", name, timm.list_models())
    preprocessing, arguments = document.get("pretrained_cfg", document), document.get("model_args") or {}
    if not isinstance(preprocessing, dict) or not isinstance(arguments, dict):
        raise InputError(f"{path}: damaged", got="pretrained_cfg or model_args is no object", expected="JSON objects")
    return Described(name, arguments, preprocessing)


def _build(source: str, described: Described) -> tuple[nn.Module, Preprocessing]:
    arguments = {k: v for k, v in described.arguments.items() if k not in ("num_classes", "pretrained")}
    known = {f.name for f in fields(PretrainedCfg)}
    usual = timm.models.get_pretrained_cfg(described.architecture, allow_unregistered=True)
    merged = usual.to_dict() if usual else {}
    merged |= {k: v for k, v in described.preprocessing.items() if k in known and v is not None}
    try:
        model = timm.create_model(
            described.architecture, pretrained=False, pretrained_cfg=merged, num_classes=0, **arguments
        )
        config = timm.data.resolve_data_config({}, pretrained_cfg=merged)
        sides = {int(v) for v in config["input_size"][-2:]}
        size = max(sides)
        preprocessing = Preprocessing(
            size,
            max(size, int(size / float(config["crop_pct"]))),
            config["interpolation"],
            tuple(float(v) for v in config["mean"]),  # type: ignore[arg-type]
            tuple(float(v) for v in config["std"]),  # type: ignore[arg-type]
        )
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"{source}: timm cannot build {described.architecture} from it", got=reason[0]) from error
    if len(sides) != 1:
        raise InputError(f"{source}: not for square images", got=tuple(config["input_size"]))
    return model, preprocessing


def _filled(source: str, described: Described, path: Path) -> tuple[nn.Module, Preprocessing]:
    """The model with the weights of a file; every tensor must have its place, but those of a classifier."""
    model, preprocessing = _build(source, described)
    conversions: dict[type, Callable[..., dict[str, Tensor]]] = {
        VisionTransformer: lambda s, m: vit_names(s, m, adapt_layer_scale=True),
        Eva: eva_names,
    }
    convert = conversions.get(type(model))
    if convert is None:
        return model, preprocessing  # refused by its class, whatever its weights
    with _opened(path) as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    try:
        state = {k: v.float() for k, v in convert(state, model).items() if not k.startswith(("head.", "head_dist."))}
        missing, surplus = model.load_state_dict(state, strict=False)
    except (RuntimeError, KeyError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise _misfit(path, described, lines[min(1, len(lines) - 1)] if lines else type(error).__name__) from error
    if missing or surplus:
        words = [f"{len(missing)} missing: {', '.join(missing[:3])}"] if missing else []
        words += [f"{len(surplus)} too many: {', '.join(surplus[:3])}"] if surplus else []
        raise _misfit(path, described, "; ".join(words))
    return model, preprocessing


def _misfit(path: Path, described: Described, got: str) -> InputError:
    return InputError(
        f"{path}: the tensors do not fit {described.architecture}",
        got=got,
        expected="the weights of that timm model, under timm's names or those that timm converts",
        fix="name the right model: --student-arch or --teacher-arch, or its own config.json beside the file",
    )


def _opened(path: Path) -> Any:
    """safe_open. Raises: InputError, for a pickle with the line that converts it."""
    try:
        return safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        with path.open("rb") as stream:
            start = stream.read(4)
        pickled = path.suffix in PICKLES or start[:2] == b"PK" or start[:1] == b"\x80"
        raise InputError(
            f"{path}: not a safetensors file",
            got="a pickle, which can run programs and is not read" if pickled else str(error),
            fix=f"{CONVERT}{path} {path.with_suffix('.safetensors')}" if pickled else "download it again",
        ) from error
