"""Changed bundles, packs and pictures: what may come out is an answer or one clear refusal.

One byte of a file changed, and files made anew by somebody who knows the format (manifests, archives, graphs and packs
with odd content and right hashes). Each is opened, asked and inspected, fifty in a process. What may not come out: any
exception but InputError, a crash, a byte that was changed without a new hash and was accepted, a device whose version
changed by a refused pack, a process above MEMORY_MB. The same seed gives the same files.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cdl_edge.artefacts.bundle import Bundle, open_bundle
from cdl_edge.artefacts.layout import MANIFEST
from cdl_edge.artefacts.manifest import canonical, sealed
from cdl_edge.errors import InputError
from cdl_edge.images import Preprocessing
from cdl_edge.measurement.inspect import inspect
from cdl_edge.runtime import load
from cdl_edge.runtime.predict import predict
from cdl_edge.updates import packs
from cdl_edge.updates.packfile import open_pack, write_pack

BATCH = 50
"cases that share a process"
LIMIT_S = 120
"for a batch, after which it counts as one that never ends"
MEMORY_MB = 600
"that no process may exceed, of its resident memory"
ODD: list[Any] = [
    None, True, -1, 0, 1, 3, 7.5, 1e308, 2**40, 2**70, "", "x", "../x", "/etc/passwd", "\x1b[31mred\x1b[0m", "\u202e",
    "a/b/c", "n" * 5000, [], {}, [[]], [None], {"x": 1}, [0] * 1000, [1, 2, 3], ["a", "a"], {"": {}},
]  # fmt: skip
"values that nobody writes where they are put"


@dataclass
class Found:
    """What an attack has brought; memory is the most that a process took, in MB of 2^20 bytes; see `attack`."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    peak_mb: float = 0.0
    seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    "figures of this kind of attack"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**vars(self), "outcomes": dict(self.outcomes), "peak_mb": round(self.peak_mb)}


# -- mutations --------------------------------------------------------------------------------------------------------


def flipped(content: bytes, rng: random.Random) -> bytes:
    """With one to four bytes changed, or cut, or longer."""
    changed = bytearray(content)
    kind = rng.randrange(8)
    if kind == 0:
        return bytes(changed[: rng.randrange(len(changed) + 1)])
    if kind == 1:
        return bytes(changed) + rng.randbytes(rng.randrange(1, 50))
    for _ in range(rng.randrange(1, 5)):
        if changed:
            changed[rng.randrange(len(changed))] ^= rng.randrange(1, 256)
    return bytes(changed)


def odd_document(document: Any, rng: random.Random) -> Any:
    """A JSON document with one value exchanged, removed or added somewhere."""
    copy = json.loads(json.dumps(document))
    node, ways = copy, rng.randrange(1, 6)
    for _ in range(ways):
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            break
        key = rng.choice(keys)
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        if rng.random() < 0.15:
            del node[key]
        else:
            node[key] = rng.choice(ODD)
        break
    return copy


def odd_archive(content: bytes, rng: random.Random) -> bytes:
    """An .npz with other arrays: missing, of other types and sizes, or a header that claims more than there is."""
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    name = rng.choice(list(arrays))
    kind = rng.randrange(6)
    stream = io.BytesIO()
    if kind == 0:
        del arrays[name]
    elif kind == 1:
        arrays[name] = arrays[name].astype(rng.choice(["float64", "int8", "complex64", "U3"]))
    elif kind == 2:
        arrays[name] = np.zeros((rng.randrange(1, 3000), rng.randrange(1, 3000)), np.uint8)
    elif kind == 3:
        arrays[name] = arrays[name][..., :1]
    elif kind == 4:
        arrays[f"{name}/x"] = arrays[name]
    np.savez_compressed(stream, **arrays)
    if kind < 5:
        return stream.getvalue()
    lied = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(stream.getvalue())) as old, zipfile.ZipFile(lied, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            whole = old.read(member)
            new.writestr(member.filename, whole.replace(b"'shape': (", b"'shape': (9999999, ")[: len(whole)])
    return lied.getvalue()


def mutated_bundle(source: Bundle, target: Path, rng: random.Random) -> bool:
    """Write a changed copy; returns whether its hashes were made anew."""
    shutil.copytree(source.path, target)
    names = [*source.manifest.files, MANIFEST]
    if rng.random() < 0.3:
        file = target / rng.choice(names)
        before = file.read_bytes()
        after = flipped(before, rng)
        while after == before:
            after = flipped(before, rng)
        file.write_bytes(after)
        return False
    document = json.loads(json.dumps(source.manifest.document))
    if rng.random() < 0.6:
        document = odd_document(document, rng)
    else:
        name = rng.choice([n for n in names if n.endswith((".npz", ".onnx"))])
        content = (target / name).read_bytes()
        archive = name.endswith(".npz") and name != source.manifest.ranges and rng.random() < 0.7
        content = odd_archive(content, rng) if archive else flipped(content, rng)
        (target / name).write_bytes(content)
        document["files"][name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (target / MANIFEST).write_bytes(canonical(sealed(document)).encode("utf-8", "surrogatepass"))
    return True


def use(path: Path, backend: str) -> None:
    """All that a device does with a bundle."""
    bundle = open_bundle(path)
    inspect(bundle)
    with load(bundle, backend, threads=1) as runner:
        side = bundle.preprocessing.size
        stream = io.BytesIO()
        Image.new("RGB", (side, side), "red").save(stream, "PNG")
        predict(runner, [stream.getvalue()])
    if bundle.manifest.selftest:
        bundle.selftest()


# -- batches ----------------------------------------------------------------------------------------------------------


def attack(found: Found, count: int, case: Callable[[int], str]) -> Found:
    """Run `count` cases, BATCH of them in each child: case(number) -> outcome; an exception is a fault.

    Memory is what a child took beyond what it began with, which is this process.
    """
    for start in range(0, count, BATCH):
        numbers = range(start, min(count, start + BATCH))
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(LIMIT_S)
            inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # of the parent: a test's holds torch
            with os.fdopen(writing, "w") as told:
                for number in numbers:
                    print(number, file=told, flush=True)
                    try:
                        outcome = case(number)
                    except BaseException as error:
                        outcome = f"fault {type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
                    print(json.dumps([outcome, peak - inherited]), file=told, flush=True)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as heard:
            lines = heard.read().splitlines()
        status = os.waitpid(child, 0)[1]
        for case_number, line in zip(lines[::2], lines[1::2], strict=False):
            outcome, peak = json.loads(line)
            found.outcomes[outcome.split(":")[0]] += 1
            found.peak_mb = max(found.peak_mb, peak)
            if outcome.startswith("fault"):
                found.faults.append(f"case {case_number}: {outcome}")
        if status:
            found.faults.append(f"case {lines[-1] if lines else start}: the process ended with status {status}")
        if found.peak_mb > MEMORY_MB:
            found.faults.append(f"cases {numbers}: {found.peak_mb:.0f} MB")
        found.cases += len(numbers)
    return found


def attack_bundles(source: Path, count: int, work: Path, seed: int = 0, backend: str = "onnxruntime") -> Found:
    """Changed copies of a bundle."""
    bundle = open_bundle(source)

    def case(number: int) -> str:
        rng, target = random.Random(f"{seed} bundle {number}"), work / f"bundle{number}"
        try:
            anew = mutated_bundle(bundle, target, rng)
            use(target, backend)
        except InputError:
            return "refused"
        finally:
            shutil.rmtree(target, ignore_errors=True)
        return "answered" if anew else "fault: changed bytes were accepted"

    return attack(Found(), count, case)


def attack_packs(pack: Path, device: Path, count: int, work: Path, seed: int = 0) -> Found:
    """Changed packs, put into copies of a device's bundle."""
    before = open_bundle(device).manifest.manifest_sha256
    with open_pack(pack) as opened:
        head = {k: opened.document[k] for k in ("name", "from", "to", "sequence", "backbone")}
        members = {n: (e["encoding"], opened.read(n)) for n, e in opened.document["files"].items()}

    def case(number: int) -> str:
        rng, changed = random.Random(f"{seed} pack {number}"), work / f"{number}.pack"
        target = Path(shutil.copytree(device, work / f"device{number}"))
        anew = rng.random() < 0.6
        try:
            if anew:
                other, header = dict(members), dict(head)
                name = rng.choice(list(other))
                encoding, content = other[name]
                if name == MANIFEST and rng.random() < 0.8:
                    document = sealed(odd_document(json.loads(content), rng))
                    content, header["to"] = canonical(document).encode(), document["manifest_sha256"]
                else:
                    content = flipped(content, rng)
                other[name] = (encoding, content)
                if rng.random() < 0.2:
                    other[rng.choice(["q", "q/r", "n" * 300, f"{name}/x"])] = ("whole", b"x")
                write_pack(changed, header, other)
            else:
                changed.write_bytes(flipped(pack.read_bytes(), rng))
            packs.install(changed, target, threads=1)
        except InputError:
            if open_bundle(target).manifest.manifest_sha256 != before:
                return "fault: a refused pack changed the device"
            return "refused"
        finally:
            changed.unlink(missing_ok=True)
            opens = open_bundle(target)
            shutil.rmtree(target)
        return "installed" if anew and opens else "fault: changed bytes were accepted"

    return attack(Found(), count, case)


def attack_pictures(count: int, seed: int = 0) -> Found:
    """Changed pictures of every format that is written here."""
    noise = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    formats = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
    preprocessing = Preprocessing(16, 16)

    def case(number: int) -> str:
        rng, stream = random.Random(f"{seed} picture {number}"), io.BytesIO()
        Image.fromarray(noise).save(stream, formats[number % len(formats)])
        try:
            preprocessing.read(flipped(stream.getvalue(), rng))
        except InputError:
            return "refused"
        return "read"

    return attack(Found(), count, case)
