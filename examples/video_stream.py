"""A video under the three policies: who decides which prompts a frame gets, and what that costs.

    python examples/video_stream.py bundles/fruit photos 200

The frames are made of the pictures of a folder, each shown for a second (25 frames). For each policy one line: mean
ms a frame, which way the frames went, how many answers are those of `exact`.
- exact: query and prompted pass on every frame;
- sticky: the query runs when the scene changes, its selection is used again until then;
- pinned: you know the task (here: the first), no query at all; frames of other tasks then get the wrong prompts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from cdl_edge.runtime import Bundle, open_bundle
from cdl_edge.runtime.policy import POLICIES, open_policy

FRAMES_EACH = 25


def frames(bundle: Bundle, folder: str, count: int) -> list[np.ndarray]:
    """`count` frames, uint8 (1, S, S, 3) each; a camera's go through `bundle.preprocessing` as well."""
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".png"))
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    shown = [bundle.preprocessing.read(f)[None] for f in files[: -(-count // FRAMES_EACH)]]
    return [shown[i // FRAMES_EACH % len(shown)] for i in range(count)]


def main(path: str, folder: str, count: str = "200") -> dict[str, float]:
    """Returns: policy -> mean ms a frame."""
    bundle = open_bundle(path)
    video = frames(bundle, folder, int(count))
    cost, exact = {}, np.empty(0)
    for policy in POLICIES:
        with open_policy(bundle, policy, threads=1, task=0 if policy == "pinned" else None) as stream:
            begin = time.perf_counter()
            steps = [stream.step(frame) for frame in video]
            cost[policy] = 1e3 * (time.perf_counter() - begin) / len(video)
            ways = stream.describe()["frames"]
        answers = np.array([step.logits[0].argmax() for step in steps])
        exact = answers if policy == "exact" else exact
        print(f"{policy:7} {cost[policy]:6.2f} ms a frame, {ways}, {100 * np.mean(answers == exact):.1f} % as exact")
    return cost


if __name__ == "__main__":
    main(*sys.argv[1:])
