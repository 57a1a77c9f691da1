"""New prompts into an engine: which change needs what.

Proves the plan (pure logic) and, with the stand-in for TensorRT, that each constant of a real student's new
prompts.bin reaches the place of its name. Whether TensorRT exchanges it rightly is shown by test_gpu.py and, each time,
by the gate.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from cdl_edge.runtime import load
from cdl_edge.runtime.backends.tensorrt import build_engine
from cdl_edge.runtime.engines.refit import possible

DOCUMENT = {"refittable": ["a", "b"]}


@pytest.mark.parametrize(
    ("changed", "learnt", "document", "answer"),
    [
        (["prompts.bin"], ["a", "b"], DOCUMENT, None),
        (["prompts.bin"], ["a"], DOCUMENT, None),
        (["prompts.bin"], ["a", "c"], DOCUMENT, "cannot exchange c"),
        (["prompts.bin"], ["a"], {"refittable": []}, "built without refit"),
        (["backbone.bin", "prompts.bin"], ["a"], DOCUMENT, "backbone.bin, prompts.bin changed"),
        (["graph", "prompts.bin"], ["a"], DOCUMENT, "graph, prompts.bin changed"),
        (["TensorRT version"], ["a"], DOCUMENT, "TensorRT version changed"),
        (["GPU", "compute capability", "prompts.bin"], ["a"], DOCUMENT, "GPU, compute capability"),
        (["build options"], ["a"], DOCUMENT, "build options changed"),
    ],
)
def test_only_prompts_of_the_same_shapes_are_exchanged(changed, learnt, document, answer):
    found = possible(changed, learnt, document)
    assert found is None if answer is None else answer in found


@torch.no_grad()
def learnt_more(student):
    """The same student after more steps: every learnt value moved."""
    other = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(9)
    for parameter in [*other.learner.parameters(), *other.head.parameters(), *other.kd.parameters()]:
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return other


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("learner", ["l2p", "dualprompt", "coda", "apt"])
def test_a_student_that_learnt_more(fake, lab, make_student, capsys, learner, precision):
    student = lab.student(learner)
    precisions = ("fp32",) if precision == "fp32" else ("fp32", precision)
    old = make_student(student, "old", precisions=precisions)
    new = make_student(learnt_more(student), "new", precisions=precisions)
    files = {name for name, entry in old.manifest.files.items() if new.manifest.files[name] != entry}
    assert files == {"prompts.bin", "selftest.npz"}, "all that learning changes is in one file"
    build_engine(old, precision=precision)
    (old.path / "engines").rename(new.path / "engines")
    with load(new, "tensorrt", precision=precision) as runner, load(new, "cpu", threads=1) as cpu:
        assert runner.engine.sidecar["refits"] == 1 and len(fake.built) == 1
        images = lab.pixels(3)
        np.testing.assert_allclose(runner.infer(images), cpu.infer(images), atol=1e-4 if precision == "fp32" else 0.05)


@pytest.mark.slow
def test_a_student_that_learnt_another_task_is_built_anew(fake, lab, make_student, capsys):
    """More entries are learnt: shapes change."""
    old = make_student(lab.student("coda", learnt=2), "old")
    new = make_student(lab.student("coda", learnt=3), "new")
    build_engine(old)
    (old.path / "engines").rename(new.path / "engines")
    load(new, "tensorrt").close()
    assert len(fake.built) == 2 and "graph, prompts.bin changed" in capsys.readouterr().err
