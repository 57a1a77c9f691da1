"""BUNDLE -> model repository for NVIDIA Triton: what its ONNX Runtime backend needs, and nothing to edit by hand.

Fields and rules: triton-inference-server/common, protobuf/model_config.proto, and Triton's model configuration guide.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..artefacts.bundle import Bundle, Shape
from ..artefacts.external import external_files
from ..errors import InputError
from ..files import PREFIX, atomic_folder, check_out, sha256

CONFIG, LABELS, VERSION = "config.pbtxt", "labels.txt", "1"
MARK = "cdl_edge.manifest_sha256"
"the parameter that tells our models from others"
FILES = "cdl_edge.files"
"the parameter with the SHA-256 of every other file of the model"
MAX_BATCH = 8
"images that Triton may put into one call, of a bundle with a free batch"


def write_repository(
    bundle: Bundle,
    out: Path | str,
    graphs: Sequence[str] = ("student",),
    name: str | None = None,
    replace: bool = False,
) -> Path:
    """Write OUT/<model>/{config.pbtxt, labels.txt, 1/model.onnx, 1/*.bin}, one model for each graph.

    All models are written aside first, none of them appears before each is whole; other models of OUT stay.

    Args:
        graphs: keys of the manifest's "graphs": "student", "query", "prompted", also "student.fp16".
        name: of the model of "student", the bundle's by default; the others are <name>-<graph>.
        replace: models of that name that this function wrote; without, they stay and are an error.

    Returns: OUT, for `tritonserver --model-repository=OUT`.

    Raises: InputError when OUT has something in it that is no model of ours, for a graph that the bundle lacks, and for
        names of model or classes that Triton cannot take.
    """
    out, name = Path(out), name or bundle.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise InputError("not a name for a Triton model", got=repr(name), expected="letters, digits, '_', '-', '.'")
    if broken := [c for c in bundle.classes if len(c.splitlines()) != 1]:
        raise InputError("a class name of several lines", got=repr(broken[0]), expected=f"one line each, in {LABELS}")
    check_repository(out)
    models = {key: name if key == "student" else f"{name}-{key.replace('.', '-')}" for key in graphs}
    for model in models.values():
        check_out(out / model, "a model", foreign, replace)
    with ExitStack() as stack:
        for key, model in models.items():
            _write_model(bundle, key, model, stack.enter_context(atomic_folder(out / model, foreign)))
    return out


def check_repository(out: Path) -> None:
    """Raises: InputError when OUT has something in it that is no model of ours."""
    if not out.exists():
        return
    entries = [p for p in sorted(out.iterdir()) if not p.name.startswith(PREFIX)] if out.is_dir() else [out]
    others = [p.name for p in entries if MARK not in _config(p)]
    if others:
        raise InputError(
            f"{out}: is there and is no model repository of cdl-edge",
            got=", ".join(others[:5]),
            expected="a new or empty folder, or a repository that cdl-edge wrote",
            fix="choose another folder; copy the model into your own repository when it is written",
        )


def foreign(model: Path) -> str | None:
    """What in a model's folder is not as `write_repository` wrote it, by the hashes in its config; see check_out."""
    found = re.search(r'"' + re.escape(FILES) + r'" value \{ string_value: "(.*)" \} \}', _config(model))
    hashes = dict(re.findall(r"([^ =]+)=([0-9a-f]{64})", found[1])) if found else {}
    for path in sorted(p for p in model.rglob("*") if p.is_symlink() or not p.is_dir()):
        name = path.relative_to(model).as_posix()
        if name != CONFIG and (path.is_symlink() or hashes.get(name) != sha256(path)):
            return f"{name}, which is not as cdl-edge wrote it"
    return None if hashes else f"no {CONFIG} of cdl-edge"


def _config(model: Path) -> str:
    file = model / CONFIG
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _write_model(bundle: Bundle, key: str, model: str, folder: Path) -> None:
    graph = bundle.graph(key)
    names = {graph: "model.onnx"} | {graph.parent / file: file for file in sorted(external_files(graph))}
    for source, target in names.items():
        copy = folder / VERSION / target
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        expected = bundle.manifest.files[source.relative_to(bundle.path).as_posix()].sha256
        if (digest := sha256(copy)) != expected:
            raise InputError(f"{source}: changed since the bundle was opened", got=digest, expected=expected)
    if "logits" in bundle.signature(key).outputs:
        (folder / LABELS).write_text("".join(f"{c}\n" for c in bundle.classes), encoding="utf-8")
    hashes = {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / CONFIG).write_text(config(bundle, key, model, hashes), encoding="ascii")


def config(bundle: Bundle, key: str, model: str, hashes: Mapping[str, str] | None = None) -> str:
    """The text of config.pbtxt, ASCII.

    max_batch_size > 0 tells Triton that it may add a first axis to every shape below and fill it with several requests;
    a graph of fixed batch has that axis in its shapes and takes it as it is: 0.
    """
    signature, free = bundle.signature(key), bundle.batch is None
    preprocessing = json.dumps(bundle.preprocessing.to_json())
    parameters = {
        MARK: bundle.manifest.manifest_sha256,
        "cdl_edge.graph": key,
        "cdl_edge.preprocessing": preprocessing,
        FILES: " ".join(f"{name}={digest}" for name, digest in (hashes or {}).items()),
    }
    lines = [
        f"# Written by `cdl-edge export --target triton`. ONNX opset {bundle.manifest.opset}"
        + ("; it needs ONNX Runtime 1.23 or newer in Triton." if (bundle.manifest.opset or 0) >= 23 else "."),
        f"name: {_quoted(model)}",
        'backend: "onnxruntime"',
        f"max_batch_size: {MAX_BATCH if free else 0}",
    ]
    for name, shape in signature.inputs.items():
        kind = "TYPE_UINT8" if name == signature.images else "TYPE_FP32"
        lines.append(f"input {{ name: {_quoted(name)} data_type: {kind} dims: {_dims(shape)} }}")
    for name, shape in signature.outputs.items():
        labels = f" label_filename: {_quoted(LABELS)}" if name == "logits" else ""
        lines.append(f"output {{ name: {_quoted(name)} data_type: TYPE_FP32 dims: {_dims(shape)}{labels} }}")
    lines.append("instance_group { kind: KIND_AUTO count: 1 }  # the GPU where there is one")
    if free:
        lines.append("dynamic_batching { }")
    lines += _warmup(signature.images, signature.inputs)
    lines += [
        f"parameters {{ key: {_quoted(k)} value {{ string_value: {_quoted(v)} }} }}" for k, v in parameters.items()
    ]
    return "\n".join(lines) + "\n"


def _warmup(images: str, inputs: dict[str, Shape]) -> Iterator[str]:
    """One black image, so that the first request does not pay for what an engine sets up late."""
    yield 'model_warmup { name: "black" batch_size: 1'
    for name, shape in inputs.items():
        kind = "TYPE_UINT8" if name == images else "TYPE_FP32"
        value = f"data_type: {kind} dims: {_dims(shape)} zero_data: true"
        yield f"  inputs {{ key: {_quoted(name)} value {{ {value} }} }}"
    yield "}"


def _dims(shape: Shape) -> str:
    """A free first axis is Triton's own."""
    return json.dumps([size for size in shape if size is not None])


def _quoted(text: str) -> str:
    """A protobuf text literal; bytes that are not plain ASCII in octal."""
    escapes = {'"': '\\"', "\\": "\\\\"}
    plain = "".join(escapes.get(chr(b), chr(b)) if 32 <= b < 127 else f"\\{b:03o}" for b in text.encode())
    return f'"{plain}"'
