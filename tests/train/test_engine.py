"""Shares of a step, precision, and one process that is its own group; several are in test_distributed.py."""

import pytest
import torch

from cdl_edge.errors import InputError
from cdl_edge.train.engine import Engine, Share, native_bf16


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 2, 5, 16, 17])
def test_shares_are_a_partition(count, processes):
    rows, weights = [], []
    for rank in range(processes):
        part, weight = Share(rank, processes).of(count)
        mine = list(range(count))[part]
        assert mine, "every process takes part in every step"
        assert weight in (0.0, len(mine) / count)
        rows += mine if weight else []
        weights.append(weight)
    assert rows == list(range(count)) and sum(weights) == pytest.approx(1.0)
    assert max(weights) <= (count // processes + 1) / count


def test_a_process_without_an_image_lends_a_hand_with_weight_zero():
    assert [Share(r, 3).of(2) for r in range(3)] == [(slice(0, 1), 0.0), (slice(0, 1), 0.5), (slice(1, 2), 0.5)]


def test_one_process_is_its_own_group():
    engine = Engine("cpu", "fp32")
    assert engine.is_main and engine.share == Share(0, 1) and engine.device.type == "cpu"
    value, flags = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    assert engine.sum(value) is value and engine.any(flags) is flags
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    engine.sum_gradients([parameter, torch.nn.Parameter(torch.ones(1))])
    assert parameter.grad.tolist() == [3.0, 4.0]
    done = []
    engine.on_main(lambda: done.append(1))
    engine.wait()
    engine.close()
    assert done == [1]


def test_what_the_first_process_raises_comes_through():
    engine = Engine("cpu", "fp32")
    with pytest.raises(InputError, match="no such thing"):
        engine.on_main(lambda: (_ for _ in ()).throw(InputError("no such thing")))


def test_the_others_stop_with_the_first(monkeypatch):
    engine = Engine("cpu", "fp32")
    engine.share = Share(1, 2)
    monkeypatch.setattr(engine, "sum", lambda value: value + 0.0)  # the first has added nothing
    with pytest.raises(InputError, match="the first process has stopped"):
        engine.on_main(lambda: pytest.fail("this is not the first process"))
    monkeypatch.setattr(engine, "sum", lambda value: value + 1.0)
    engine.on_main(lambda: pytest.fail("this is not the first process"))


def test_precision():
    assert Engine("cpu", "bf16").bf16 and not Engine("cpu", "fp32").bf16
    assert Engine("cpu", "auto").bf16 == native_bf16(torch.device("cpu"))
    with Engine("cpu", "bf16").autocast():
        assert torch.is_autocast_enabled("cpu")
    with Engine("cpu", "fp32").autocast():
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said():
    with pytest.raises(InputError, match="no CUDA device"):
        Engine("cuda", "auto")
    assert Engine("auto", "auto").device.type == "cpu"
