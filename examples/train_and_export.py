"""From images to a bundle in Python, on the handwritten digits that scikit-learn brings.

    python examples/train_and_export.py digits-run digits-bundle 5

Trains teacher and student task by task (the last argument: epochs), folds the student into a static graph, proves it
equal on real images, and asks the bundle about its own self-test. One sees accuracy, forgetting, the parity error and
the answers. Your own photographs: data="folder:photos".
"""

from __future__ import annotations

import sys

import numpy as np

import cdl_edge.runtime as runtime
from cdl_edge import export, train


def main(run: str, bundle: str, epochs: str = "5", limit: int | None = None, images: int = 500) -> float:
    """limit: of training images a class; images: of the parity gate. Returns: the largest difference from torch."""
    metrics = train(
        data="digits",
        learner="coda",
        distill="kdp",
        tasks=5,
        epochs=int(epochs),
        learning_rate=0.005,
        limit_per_class=limit,
        out=run,
    )
    student = metrics["student"]
    print(f"average accuracy {student['average_accuracy']:.1f} %, forgetting {student['forgetting']:.1f} points")
    parity = export(run, bundle, images=images)["parity"]
    print(f"largest difference of logits from torch {parity['max_abs_error']:.1e} on {parity['images']} images")
    with runtime.load(bundle) as runner:
        pixels, expected = runner.bundle.selftest()
        logits = runner.infer(pixels)  # uint8 (n, S, S, 3) -> float32 (n, classes)
        print("the bundle says", [runner.bundle.classes[i] for i in logits.argmax(1)])
    return float(np.abs(logits - expected).max())


if __name__ == "__main__":
    main(*sys.argv[1:])
