"""State in one safetensors file, without pickle."""

import pytest
import torch
from safetensors.torch import save_file

from cdl_edge.errors import InputError
from cdl_edge.log import told
from cdl_edge.train import checkpoint as checkpoint_module
from cdl_edge.train.checkpoint import before, keep_before, load_kept, load_state, save_state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_round_trip(tmp_path):
    state = {
        "nested": {"deep": {"w": torch.randn(2, 3), 0: "int key", "0": "string key"}},
        "list": [1, 2.5, None, True, "é", [torch.arange(3)], {}],
        "tuple": (1, torch.tensor(7)),
        "empty": torch.zeros(0, 4),
        "types": [torch.ones(2, dtype=d) for d in (torch.bool, torch.int64, torch.bfloat16, torch.float64)],
        "none": None,
        1e-9: 1e300,
    }
    save_state(tmp_path / "a", state)
    assert same(state, load_state(tmp_path / "a"))


def test_keys_that_read_alike_stay_apart(tmp_path):
    one, two, three = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    save_state(tmp_path / "a", {"x.y": one, "x": {"y": two}, 0: one, "0": three})
    got = load_state(tmp_path / "a")
    assert (got["x.y"], got["x"]["y"], got[0], got["0"]) == (one, two, one, three)


def test_a_user_may_have_any_key(tmp_path):
    state = {"__tensor__": "x", "__dict__": {"__tensor__": torch.ones(1)}}
    save_state(tmp_path / "a", state)
    assert same(state, load_state(tmp_path / "a"))


def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    state = {"a": base, "b": base, "row": base[1], "column": base[:, 1], "turned": base.t()}
    save_state(tmp_path / "a", state)
    assert same(state, load_state(tmp_path / "a"))


def test_an_optimiser_continues_exactly(tmp_path):
    def step(weight, optimiser, i):
        optimiser.zero_grad()
        (weight * (i + 1)).square().sum().backward()
        optimiser.step()

    start = torch.randn(4, generator=torch.Generator().manual_seed(0))
    results = []
    for stop in (None, 3):
        weight = torch.nn.Parameter(start.clone())
        optimiser = torch.optim.Adam([weight], lr=0.1, betas=(0.9, 0.999))
        for i in range(6):
            if i == stop:
                save_state(tmp_path / "a", {"optimiser": optimiser.state_dict(), "w": weight.data})
                state = load_state(tmp_path / "a")
                weight = torch.nn.Parameter(state["w"])
                optimiser = torch.optim.Adam([weight], lr=0.5)
                optimiser.load_state_dict(state["optimiser"])
            step(weight, optimiser, i)
        results.append(weight.data)
    assert torch.equal(*results)


def test_a_failing_write_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "a"
    save_state(path, {"epoch": 1})

    def fail(tensors, name, metadata):
        name.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint_module, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_state(path, {"epoch": 2})
    assert load_state(path) == {"epoch": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_a_flipped_bit_anywhere_never_comes_back_as_something_else(tmp_path):
    path = tmp_path / "a"
    state = {"w": torch.arange(6.0).reshape(2, 3), "half": torch.ones(2, dtype=torch.bfloat16), "n": 3, "flag": True}
    save_state(path, state)
    whole = path.read_bytes()
    refused_at = 0
    for position in range(0, len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            got = load_state(path)
        except InputError:
            refused_at += 1
        else:  # a space between the header and the tensors, or the name of the checksum
            assert same(state, got), position
    assert refused_at > 0.8 * len(whole)
    flipped = bytearray(whole)
    flipped[-3] ^= 16
    path.write_bytes(flipped)
    with pytest.raises(InputError, match="damaged since it was written"):
        load_state(path)


def test_a_file_of_an_early_version_has_no_checksum(tmp_path):
    tree = '{"__dict__": [["w", {"__tensor__": "0"}]]}'
    save_file({"0": torch.ones(2)}, tmp_path / "a", metadata={"tree": tree})
    assert same(load_state(tmp_path / "a"), {"w": torch.ones(2)})


def test_the_one_before_is_kept(tmp_path):
    path, lines = tmp_path / "a.safetensors", []
    for epoch in range(3):
        keep_before(path)
        save_state(path, {"epoch": epoch})
    assert load_state(path) == {"epoch": 2} and load_state(before(path)) == {"epoch": 1}
    path.write_bytes(b"no")
    with told(lines.append):
        assert load_kept(path) == {"epoch": 1} == load_state(path)
    assert len(lines) == 1 and not before(path).exists()
    path.write_bytes(b"no")
    refused(path)
    with pytest.raises(InputError):
        load_kept(path)


def refused(path):
    with pytest.raises(InputError) as info:
        load_state(path)
    assert str(path) in str(info.value) and "not a checkpoint of this project" in str(info.value)


def test_foreign_files(tmp_path):
    path = tmp_path / "a"
    refused(path)  # missing
    for content in (b"", b"hello, this is text", b"\x80\x03}q\x00."):
        path.write_bytes(content)
        refused(path)
    save_file({"w": torch.ones(1)}, path)
    refused(path)
    save_file({"w": torch.ones(1)}, path, metadata={"tree": "{not json"})
    refused(path)
    save_state(path, {"w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-50])  # cut off
    refused(path)
