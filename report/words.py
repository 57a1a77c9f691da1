"""Numbers, units, names and flags as a person reads them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LEARNERS = {
    "l2p": "L2P",
    "dualprompt": "DualPrompt",
    "coda": "CODA-Prompt",
    "apt": "APT",
    "finetune": "Fine-tuning",
    "frozen": "frozen backbone",
}
DISTILLERS = {
    "none": "no distillation",
    "kd": "KD",
    "dkd": "DKD",
    "fitnets": "FitNets",
    "reviewkd": "ReviewKD",
    "two-heads": "two heads, no teacher",
    "kd-token": "KD token",
    "kdp": "KDP",
    "cdl-prompt": "CDL-Prompt",
    "blockwise": "block-wise logits",
    "m2kd": "M2KD",
}
HEADS = {"learned": "learnt head", "ncm": "NCM", "slda": "SLDA", "ranpac": "RanPAC", "aligned": "aligned head"}
FLAGS = {
    "unstable": "The standard deviation is more than 2.5 % of the mean: the machine was busy or its clock moved. Close "
    "other programs, fix the clock and measure again before comparing.",
    "jitter": "p99 is more than 1.5 times p50: most pictures are quick, some wait. Plan for p99, not for p50.",
    "enqueue-bound": "Handing work to the GPU takes more than 80 % of the GPU's own time: the processor is the limit, "
    "a CUDA graph would help.",
    "throttled": "The device lowered its clock while it was measured: heat or power. Cool it, or lower its power mode.",
}
ACRONYMS = {"cpu", "gpu", "os", "sha256", "onnx", "rss", "kd", "id", "url"}
WORDS = {
    "cpu_count": "Processor cores",
    "peak_rss_bytes": "Peak memory of the process",
    "first_inference_ms": "First inference",
    "load_ms": "Load the session",
    "check_ms": "Check the bundle",
    "load_average": "Load average (1 min)",
    "limit_per_class": "Training images a class",
    "kd_blocks": "Blocks with KD prompts",
    "kd_length": "KD rows a block",
    "kd_head": "Kind of the KD head",
    "out": "Run folder",
    "extend": "Goes on from the run",
    "distill": "Distiller",
    "batch": "Images in one call",
    "compat": "Authors' behaviour (compat)",
    "compat_schema": "Version of compat",
    "apt_momentum": "Share of the old prompt in APT's merge (c)",
    "exemplars": "Images kept of each earlier class",
    "retrain_epochs": "Epochs after pruning",
    "pruned": "Value of pruned weights",
    "augment": "Augmentation",
    "resize_rule": "How a picture becomes a square",
    "decoder": "Decoder rule",
    "token_weight": "Weight of class and KD token in the head's features",
    "tau": "Temperature (tau)",
    "alpha": "Distillation share (alpha)",
    "head": "Head",
    "prompt_tasks": "Tasks in which prompts learn",
    "min_steps": "Steps of a task at least",
    "baseline": "Frozen baseline",
    "forgetting_of_joint": "Forgetting with all images at once",
}


def size_text(count: float) -> str:
    """A number of bytes in decimal units: "22.4 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return (
        f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}" if count < 1000 else f"{count:.0f} {unit}"
    )


def duration_text(seconds: float) -> str:
    """Seconds as text: "38.2 s", "12 min 5 s", "3 h 20 min"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def ms_text(value: float) -> str:
    """Milliseconds with three or more significant digits and no unit: "0.123", "4.56", "1,234"."""
    if value and abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"


def power_text(value: float) -> str:
    """A very small number: "3.1 × 10⁻⁶"."""
    if not value or 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    digits, _, exponent = f"{value:.1e}".partition("e")
    return f"{digits} × 10{str(int(exponent)).translate(str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def source_text(source: str) -> str:
    """A data source as a title: the folder's name, or the data set's."""
    kind, _, path = source.partition(":")
    names = {"digits": "Digits", "cifar100": "CIFAR-100", "imagenet-r": "ImageNet-R"}
    return (Path(path).name or path) if kind == "folder" and path else names.get(kind, source)


def label_text(key: str) -> str:
    """A JSON key as a label, without its unit: "peak_rss_bytes" -> "Peak memory of the process"."""
    if key in WORDS:
        return WORDS[key]
    stem = key
    for unit in ("_ms", "_bytes", "_c", "_w", "_mj", "_mhz"):
        stem = stem.removesuffix(unit)
    words = [w.upper() if w in ACRONYMS and w != "sha256" else w for w in stem.replace("-", " ").split("_")]
    text = " ".join(words)
    return text[:1].upper() + text[1:]


def value_text(key: str, value: object) -> str | None:
    """A JSON value in words; None for what is not known."""
    if value is None or value == {} or value == []:
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        if value.get("source", "") is None and value.get("reason"):  # something that could not be measured
            return f"not measured: {value['reason']}"
        inner = {k: value_text(key if key.endswith("_bytes") else k, v) for k, v in value.items()}
        return ", ".join(f"{k} {v}" for k, v in inner.items() if v is not None) or None
    if isinstance(value, list):
        texts = [value_text("", v) or "none" for v in value]
        return " × ".join(texts) if key in ("shape", "logits", "prompt_weights") else ", ".join(texts)
    if isinstance(value, (int, float)):
        if key.endswith("_bytes"):
            return size_text(value)
        units = {"_ms": "ms", "_c": "°C", "_w": "W", "_mj": "mJ", "_mhz": "MHz"}
        unit = next((u for suffix, u in units.items() if key.endswith(suffix)), None)
        number = ms_text(value) if key.endswith("_ms") else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
        if key in ("seed", "opset", "schema"):
            number = str(value)
        return f"{number} {unit}" if unit else number
    return str(value)


def labelled(fields: Mapping[str, Any], leave_out: Iterable[str] = ()) -> list[tuple[str, str]]:
    """Label and value of every known field, in the order of the fields."""
    pairs = [(label_text(key), value_text(key, value)) for key, value in fields.items() if key not in leave_out]
    return [(label, value) for label, value in pairs if value is not None]


def method_text(learner: object, distiller: object) -> str:
    """Name of a method from its learner and distiller: "CODA-Prompt + KDP"."""
    first = LEARNERS.get(str(learner), str(learner))
    if not distiller or learner == "frozen":  # nothing of it could be taught
        return first
    return f"{first} + {DISTILLERS.get(str(distiller), str(distiller))}"


def spread_text(measure: Mapping[str, Any] | None, digits: int = 2) -> str | None:
    """ "81.23 ± 0.45" from {"mean", "std"}, without ± where there is no standard deviation; None for no measure."""
    if measure is None or measure["mean"] is None:
        return None
    text = f"{measure['mean']:.{digits}f}"
    return text if measure["std"] is None else f"{text} ± {measure['std']:.{digits}f}"


def signed_text(value: float | None) -> str | None:
    """A number with its sign: "+1.23", "-0.50"; zero has a sign too."""
    return None if value is None else f"{value:+.2f}"


def p_text(value: float | None) -> str | None:
    """A p-value as text: "0.034", "<0.001"."""
    return None if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


def flag_text(flag: str) -> str | None:
    """What a profile's flag means; None for one that this code does not know."""
    return next((text for known, text in FLAGS.items() if flag.startswith(known)), None)


# How the manifest's parity numbers are named and written, in this order; documents.py checks that these are numbers.
PARITY = {
    "max_abs_error": ("Largest error of a logit", power_text),
    "tolerance": ("Tolerance", power_text),
    "mean_abs_error": ("Mean error", power_text),
    "top1_agreement": ("Same first class", lambda v: f"{v:.2f} %"),
    "images": ("Images compared", lambda v: f"{v:,.0f}"),
}
