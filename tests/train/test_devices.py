"""Shares of a step, precision, and one process that is its own group; several are in test_distributed.py."""

import pytest
import torch

from cdl_edge.errors import InputError
from cdl_edge.train.devices import Devices, Share, native_bf16


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
    devices = Devices("cpu", "fp32")
    assert devices.is_main and devices.share == Share(0, 1) and devices.device.type == "cpu"
    value, flags = torch.tensor([1.0, 2.0]), torch.tensor([True, False])
    assert devices.sum(value) is value and devices.any(flags) is flags
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    devices.sum_gradients([parameter, torch.nn.Parameter(torch.ones(1))])
    assert parameter.grad.tolist() == [3.0, 4.0]
    done = []
    devices.on_main(lambda: done.append(1))
    devices.wait()
    devices.close()
    assert done == [1]


def test_what_the_first_process_raises_comes_through():
    devices = Devices("cpu", "fp32")
    with pytest.raises(InputError, match="no such thing"):
        devices.on_main(lambda: (_ for _ in ()).throw(InputError("no such thing")))


def test_the_others_stop_with_the_first(monkeypatch):
    devices = Devices("cpu", "fp32")
    devices.share = Share(1, 2)
    monkeypatch.setattr(devices, "sum", lambda value: value + 0.0)  # the first has added nothing
    with pytest.raises(InputError, match="the first process has stopped"):
        devices.on_main(lambda: pytest.fail("this is not the first process"))
    monkeypatch.setattr(devices, "sum", lambda value: value + 1.0)
    devices.on_main(lambda: pytest.fail("this is not the first process"))


def test_precision():
    assert Devices("cpu", "bf16").bf16 and not Devices("cpu", "fp32").bf16
    assert Devices("cpu", "auto").bf16 == native_bf16(torch.device("cpu"))
    with Devices("cpu", "bf16").autocast():
        assert torch.is_autocast_enabled("cpu")
    with Devices("cpu", "fp32").autocast():
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said():
    with pytest.raises(InputError, match="no CUDA device"):
        Devices("cuda", "auto")
    assert Devices("auto", "auto").device.type == "cpu"
