"""The CDL authors' code, driven from outside for throughput.py: imported from a checkout, nothing of it is copied.

Their `learners` are built with the settings of their configs/*.yaml and experiments/*.sh, and their loop over a task,
`learn_batch`, is called as their trainer.py does. It also needs torchvision.

What is put around it, and why none of it makes it slower:
- `timm.models.vit_*(pretrained=True)` gives random weights instead of a download: before anything is measured;
- on a CPU, `Tensor.cuda()` gives the tensor itself, or a copy of a leaf that wants a gradient (as a move to a GPU
  would: their forward adds to it in place): copying a batch to a device costs nothing here. The learner runs with
  `gpuid -1`, its own CPU setting, or with `gpuid 0`, one GPU; either way without DataParallel;
- `numpy.fromstring` of bytes, gone from numpy 2.3, is frombuffer and a copy, as it was (only with their data loader);
- clocks around query, forward, backward and step: microseconds each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LEARNERS = {  # name: class, and its parameters in experiments/*.sh
    "coda": ("CODAPrompt", [100, 8, 0.0]),
    "dualprompt": ("DualPrompt", [10, 20, 6]),
    "l2p": ("L2P", [30, 20, -1]),
    "apt": ("APT", [0.01]),
}
DISTILLERS = {"kd": "KD", "kdp": "KD_Token", "dkd": "DKD", "fitnets": "FitNets", "reviewkd": "ReviewKD"}


def run(job: dict[str, Any], recorder: Any) -> str:
    """Two epochs of teacher and student on one task, clocks around the parts; returns the precision it ran in."""
    import torch

    cuda = job["device"] == "cuda"
    sys.path.insert(0, job["authors"])
    prepare([job["teacher"], job["student"]], cuda)
    import learners

    files = sorted((Path(job["folder"]) / "train").glob("*/*.jpg"))
    labels = [int(f.parent.name[1:]) for f in files]
    classes = max(labels) + 1
    learner = build(learners, job, classes, cuda)
    learner.add_valid_output_dim(classes)
    for model in (learner.model, learner.s_model):
        model.task_id = 0
        model.s_feat.forward = recorder.wrap(model.s_feat.forward, "query")
        model.forward = recorder.wrap(model.forward, lambda: "forward" if torch.is_grad_enabled() else "teacher")
    source = (their_loader if job["variant"] == "authors-loader" else in_memory)(job, files, labels)

    class Feed:
        """What their loop takes for a data loader: an iteration of it is an epoch."""

        count = 0

        def __iter__(self) -> Iterator[Any]:
            side = "teacher" if self.count < 2 else "student"  # two epochs of the one, then two of the other
            self.count += 1
            recorder.begin(side)
            iterator, images = iter(source), 0
            while True:
                with recorder.part("data"):
                    batch = next(iterator, None)
                if batch is None:
                    break
                images += len(batch[1])
                yield batch
            recorder.end(side, images)

    learner.learn_batch(Feed(), None, "", None, None)
    return "fp32"


def prepare(models: list[str], cuda: bool) -> None:
    """What the docstring above lists. models: timm names; cuda: whether there is a device to move tensors to."""
    import timm
    import torch

    def untrained(name: str) -> Callable[..., Any]:
        def make(pretrained: bool = False, **options: Any) -> Any:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return timm.create_model(name, pretrained=False, **options)

        return make

    for name in models:
        setattr(timm.models, name, untrained(name))
    if cuda:
        torch.backends.cudnn.deterministic = True  # as their run.py
    else:
        torch.Tensor.cuda = stay  # type: ignore[assignment]
    np.fromstring = lambda data, dtype=float: np.frombuffer(data, dtype).copy()  # type: ignore[assignment]


def stay(tensor: Any, *_: Any, **__: Any) -> Any:
    """`Tensor.cuda` without a GPU."""
    return tensor.clone() if tensor.requires_grad and tensor.is_leaf else tensor


def build(learners: Any, job: dict[str, Any], classes: int, cuda: bool) -> Any:
    """Their learner for one task. learners: their package."""
    name, parameters = LEARNERS[job["learner"]]
    settings = {
        # configs/*.yaml
        **{"schedule": [2], "schedule_type": "cosine", "optimizer": "Adam", "lr": 1e-3, "momentum": 0.9},
        **{"weight_decay": 0, "model_type": "zoo", "model_name": "vit_pt_imnet", "batch_size": job["batch_size"]},
        # run.py and trainer.py
        **{"num_classes": classes, "out_dim": classes, "tasks": [list(range(classes))], "top_k": 1, "memory": 0},
        **{"DW": False, "overwrite": True, "upper_bound_flag": False, "debug_mode": False, "ema_coeff": 0.7},
        **{"gpuid": [0 if cuda else -1], "prompt_param": [1, parameters], "learner_name": name},
        **{"t_model": job["teacher"], "s_model": job["student"], "KD_method": DISTILLERS[job["distiller"]]},
        **{"kd_alpha": 0.5, "Soft_T": 2.0, "kd_prompt_param": [12, 6]},
    }
    return getattr(learners.prompt, name)(settings)


def in_memory(job: dict[str, Any], files: list[Path], labels: list[int]) -> Iterable[Any]:
    """Batches (images in [0, 1], labels, task) as their loader gives them, made before anything is measured."""
    import torch

    order = np.random.default_rng(0).permutation(len(files))
    x = torch.from_numpy(np.stack([np.asarray(Image.open(files[i]).convert("RGB")) for i in order]))
    images = (x.permute(0, 3, 1, 2).float() / 255).split(job["batch_size"])
    targets = torch.tensor(labels)[order].split(job["batch_size"])
    return [(a, b, torch.zeros(len(b))) for a, b in zip(images, targets, strict=True)]


def their_loader(job: dict[str, Any], files: list[Path], labels: list[int]) -> Iterable[Any]:
    """Their ImageNet-R data set with their training transforms; only its list of files is another."""
    import dataloaders
    from torch.utils.data import DataLoader

    class Photographs(dataloaders.iIMAGENET_R):
        """Files and labels from outside in place of their YAML file."""

        def load(self) -> None:
            self.data, self.targets = [str(f) for f in files], labels

    transform = dataloaders.utils.get_transform(dataset="ImageNet_R", phase="train", aug=True, resize_imnet=True)
    tasks = [list(range(max(labels) + 1))]
    dataset = Photographs(job["folder"], train=True, tasks=tasks, transform=transform, seed=0, rand_split=True)
    dataset.load_dataset(0, train=True)
    return DataLoader(dataset, batch_size=job["batch_size"], shuffle=True, drop_last=True, num_workers=job["workers"])
