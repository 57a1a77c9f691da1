"""Does `cdl-edge watch` keep up with the slower of decoding and inference? A 1080p video, one thread each.

    python benchmarks/watch.py [--bundle BUNDLE | --vit tiny] [--frames 150] [--rounds 8] [--policy exact] [--fourcc F]

Four calls over the same video, in an order drawn anew each round (see rounds.py): decoding it alone, computing as many
frames that are decoded and scaled already, watching it, and the loop that one writes without `watch`: OpenCV reads and
scales, ONNX Runtime computes, one after the other. The share is the slower of the two alone over watching, within a
round: 1 where decoding, scaling and computing overlap wholly. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rounds import Ratio, machine, race, ratio, version_of

from cdl_edge.artefacts.bundle import Bundle
from cdl_edge.runtime.policy import Selector, open_policy
from cdl_edge.streams.video import opencv, opened_by_opencv
from cdl_edge.streams.watch import source_of, watch

WIDTH, HEIGHT = 1920, 1080
SHARE = 0.95
"what is asked for"


def write_video(path: Path, count: int, fourcc: str) -> None:
    """A coarse picture that moves, with noise: `count` frames of 1080p."""
    cv2 = opencv()
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (HEIGHT // 40, WIDTH // 40, 3), dtype=np.uint8)
    scene = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), 25, (WIDTH, HEIGHT))
    for i in range(count):
        writer.write(cv2.add(np.roll(scene, 8 * i, axis=1), rng.integers(0, 12, scene.shape, dtype=np.uint8)))
    writer.release()


def decoded(path: Path, limit: int | None = None) -> list[np.ndarray]:
    """The first frames of a video."""
    capture = opened_by_opencv(str(path), "file", 1)
    found: list[np.ndarray] = []
    while (limit is None or len(found) < limit) and (shot := capture.read())[0]:
        found.append(shot[1])
    capture.release()
    return found


def decode(path: Path) -> None:
    """Every frame, and away with it."""
    capture = opened_by_opencv(str(path), "file", 1)
    while capture.read()[0]:
        pass
    capture.release()


def loop(path: Path, session: Any, size: int) -> int:
    """What one writes without `watch`; the whole frame is squashed to the graph's size, not cut as training did."""
    cv2, count = opencv(), 0
    video = cv2.VideoCapture(str(path))
    while (shot := video.read())[0]:
        frame = cv2.cvtColor(cv2.resize(shot[1], (size, size), interpolation=cv2.INTER_AREA), cv2.COLOR_BGR2RGB)
        session.run(["logits"], {"images": frame[None]})[0].argmax()
        count += 1
    video.release()
    return count


def plain_session(bundle: Bundle) -> Any:
    """The bundle's graph in ONNX Runtime, one thread, read from its file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(bundle.graph()), options, providers=["CPUExecutionProvider"])


def measured(student: Selector, path: Path, count: int, rounds: int) -> dict[str, Any]:
    """Milliseconds a frame of the three, and the share with its interval."""
    student.close = lambda: None  # type: ignore[method-assign]  # it is watched with again and again
    ready = [student.bundle.preprocessing.frame(f, "bgr")[None] for f in decoded(path, 20)]

    def compute() -> None:
        for i in range(count):
            student.step(ready[i % len(ready)])

    def watched() -> None:
        source, newest = source_of(path, threads=1)
        assert sum(1 for _ in watch(student, source, source.open(), newest)) == count

    session, size = plain_session(student.bundle), student.bundle.preprocessing.size
    calls = {"decode": lambda: decode(path), "compute": compute, "watch": watched}
    times = race({**calls, "loop": lambda: loop(path, session, size)}, rounds, warm_up=1)
    alone = np.maximum(times["decode"], times["compute"])
    share, beside = ratio(alone, times["watch"]), ratio(times["watch"], times["loop"])
    return {
        "ms_a_frame": {name: float(np.median(ms)) / count for name, ms in times.items()},
        "share": {"median": share.median, "low": share.low, "high": share.high},
        "asked": SHARE,
        "watch_over_loop": beside._asdict(),
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--vit", default="tiny", help="of random weights, where there is no bundle: tiny, small, base")
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--policy", default="exact", help="exact | sticky")
    parser.add_argument("--fourcc", default="mp4v", help="mp4v (MPEG-4) | MJPG")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("video.avi" if arguments.fourcc == "MJPG" else "video.mp4")
        write_video(path, arguments.frames, arguments.fourcc)
        bundle: Any = arguments.bundle
        if bundle is None:
            from stream import random_bundle

            some = np.stack([np.asarray(f[:224, :224]) for f in decoded(path, 20)])
            bundle = random_bundle(arguments.vit, Path(folder), some)
        before = psutil.Process().memory_info().rss
        with open_policy(bundle, arguments.policy, threads=1) as student:
            found = measured(student, path, arguments.frames, arguments.rounds)
            name = student.bundle.name
        grown = psutil.Process().memory_info().rss - before
    share, ms = found["share"], found["ms_a_frame"]
    print(f"{name}: decoding {ms['decode']:.1f} ms a frame, computing {ms['compute']:.1f}, watching {ms['watch']:.1f}")
    print(f"a plain loop {ms['loop']:.1f} ms a frame; watching takes {Ratio(**found['watch_over_loop'])} of it")
    print(f"share {share['median']:.3f} ({share['low']:.3f} .. {share['high']:.3f}), asked {SHARE}")
    print(
        json.dumps(
            {
                "benchmark": "watch",
                "bundle": name,
                "video": f"{WIDTH} x {HEIGHT}, {arguments.fourcc}, {arguments.frames} frames",
                "policy": arguments.policy,
                "rounds": arguments.rounds,
                **found,
                "grown_bytes": grown,
                "machine": machine(),
                "versions": {p: version_of(p) for p in ("cdl-edge", "onnxruntime", "numpy", "opencv-python-headless")},
            }
        )
    )


if __name__ == "__main__":
    main()
