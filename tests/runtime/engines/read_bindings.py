"""Ask the real TensorRT bindings of many versions which names they have; writes bindings.json. Run by hand, with gcc.

    python tests/runtime/engines/read_bindings.py

Proves: the names that the product uses exist, under the classes it uses them of, in each version listed. Does not prove
what they do: the bindings' wheels come from PyPI without NVIDIA's libraries, so empty libraries of the same names stand
in for them. That is enough to import the bindings and look at their classes, never to call them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = (
    "10.3.0",  # JetPack 6.1 and 6.2
    "10.7.0",
    "10.13.2.6",
    "10.14.1.48.post1",
    "10.16.1.11",
    "11.0.0.114",
    "11.2.1.2",
    "11.4.0.106",
)
NEEDED = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
"what the bindings take from NVIDIA's libraries (nm -D --undefined-only)"
LIST = """
import inspect, json, tensorrt_bindings as trt
print(json.dumps({name: sorted(n for n in dir(value) if n[0] != "_") if inspect.isclass(value) else []
                  for name, value in vars(trt).items() if name[0] != "_"}))
"""


def names(version: str, folder: Path) -> dict[str, list[str]]:
    """Class -> its public names, of one version."""
    wheels = folder / version
    package = f"tensorrt-cu12-bindings=={version}"
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, package], check=True)
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        wheel.extractall(wheels)
    major = version.split(".")[0]
    source = wheels / "empty.c"
    source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in NEEDED))
    for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        target = f"lib{library}.so.{major}"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", wheels / target, f"-Wl,-soname,{target}", source], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(wheels), "PYTHONPATH": str(wheels)}
    done = subprocess.run([sys.executable, "-c", LIST], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    """For each name in use, the versions that lack it."""
    from test_bindings import used_names  # beside this file: run as a script

    with tempfile.TemporaryDirectory() as folder:
        found = {version: names(version, Path(folder)) for version in VERSIONS}
    lacking = {}
    for name in sorted(used_names()):
        owner, _, attribute = name.partition(".")
        lacking[name] = [
            v for v in VERSIONS if owner not in found[v] or (attribute and attribute not in found[v][owner])
        ]
    document = {"versions": list(VERSIONS), "lacking": lacking}
    Path(__file__).with_name("bindings.json").write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
