"""Sort photographs into classes on the device: numpy, Pillow and onnxruntime only, no torch.

    python examples/classify_folder.py bundles/fruit photos

One line for each picture (file, class, probability in %, prompts that fired; separated by tabs), then how many a
second. Pictures that cannot be read are named and left out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import cdl_edge.runtime as runtime
from cdl_edge.images import UnreadableImage
from cdl_edge.runtime.predict import predict

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


def main(bundle: str, folder: str) -> int:
    """Returns: how many pictures were classified."""
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in SUFFIXES)
    done, begin = 0, time.perf_counter()
    with runtime.load(bundle) as student:  # once; then call it as often as you like
        for file in files:
            try:
                answer = predict(student, [file])["predictions"][0]
            except UnreadableImage as error:
                print(error, file=sys.stderr)
                continue
            prompts = ",".join(map(str, answer["prompts"]["selected"] or []))
            print(file, answer["label"], f"{100 * answer['probability']:.1f}", prompts, sep="\t")
            done += 1
    seconds = time.perf_counter() - begin
    print(f"{done} of {len(files)} pictures, {done / seconds:.0f} a second", file=sys.stderr)
    return done


if __name__ == "__main__":
    main(*sys.argv[1:])
