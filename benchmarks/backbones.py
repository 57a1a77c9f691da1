"""Top-1 of the backbones in the package on the validation images of the classes they were made from, in fp32.

    python benchmarks/backbones.py --data folder:PATH/base [--backbone builtin:teacher ...]

The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import json

import torch

from cdl_edge.data import load_dataset
from cdl_edge.train.augment import Normalise
from cdl_edge.train.backbone import load_backbone


@torch.no_grad()
def top1(source: str, data: str) -> dict[str, object]:
    """Accuracy in % with the pre-training head that the file keeps."""
    backbone = load_backbone(source)
    val = load_dataset(data).val.decode(backbone.preprocessing)
    normalise = Normalise(backbone.preprocessing, torch.device("cpu"))
    correct = 0
    for start in range(0, len(val.labels), 256):
        answer = backbone.model(normalise(val.pixels[start : start + 256])).argmax(1).numpy()
        correct += int((answer == val.labels[start : start + 256]).sum())
    parameters = sum(p.numel() for p in backbone.model.parameters())
    return {
        "backbone": source,
        "top1": 100 * correct / len(val.labels),
        "images": len(val.labels),
        "parameters": parameters,
        "identity": backbone.identity,
    }


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--backbone", nargs="+", default=["builtin:teacher", "builtin:student"])
    arguments = parser.parse_args()
    results = [top1(source, arguments.data) for source in arguments.backbone]
    for r in results:
        print(f"{r['backbone']}: {r['top1']:.2f} % of {r['images']} images, {r['parameters']:,} parameters")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
