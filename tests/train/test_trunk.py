"""The folded trunk is timm's EfficientNet-Lite, at even and odd sizes; only the published weights' shapes are taken."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from cdl_edge.errors import InputError
from cdl_edge.train.trunk import TRUNKS, build_trunk, load_trunk, same_padding


@torch.no_grad()
def randomise(network, seed=0):
    """Batch statistics as a trained network has them: none is 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif name.endswith(("running_mean", "bias")):
            value.copy_(0.2 * noise)
        elif ".bn" in name or name.startswith("bn"):
            value.copy_(1 + 0.2 * noise) if value.is_floating_point() else None
    return network.eval()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """published(name) -> (timm's network with random weights, the file of them), made once."""
    made = {}

    def make(name):
        if name not in made:
            network = randomise(timm.create_model(f"tf_{name}", pretrained=False))
            path = tmp_path_factory.mktemp("published") / f"{name}.safetensors"
            save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
            made[name] = network, path
        return made[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("size", [64, 65, 75, 96, 128, 160])
@torch.no_grad()
def test_it_is_the_network_without_its_last_convolution(published, name, size):
    network, path = published(name)
    trunk, whole = load_trunk(name, path)
    x = 2 * torch.rand((2, 3, size, size), generator=torch.Generator().manual_seed(size)) - 1
    expected = network.blocks(network.bn1(network.conv_stem(x)))
    got = trunk(x)
    side = -(-size // 32)
    assert got.shape == expected.shape == (2, TRUNKS[name], side, side)
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(whole(x), network(x))
    assert not any(p.requires_grad for p in trunk.parameters()) and not trunk.training


@pytest.mark.slow
def test_the_padding_of_every_layer_is_the_one_that_is_exported(published):
    trunk, _ = load_trunk("efficientnet_lite0", published("efficientnet_lite0")[1])
    seen = set()
    for layer in trunk.modules():
        if not isinstance(layer, torch.nn.Conv2d):
            continue
        for size in (32, 33):
            before, behind = same_padding(layer, size)
            x = torch.rand((1, layer.in_channels, size, size))
            padded = torch.nn.functional.pad(x, (before, behind, before, behind))
            same = torch.nn.functional.conv2d(padded, layer.weight, layer.bias, layer.stride, groups=layer.groups)
            assert torch.allclose(layer(x), same, atol=1e-4), layer
            seen.add((before, behind))
    assert {(0, 1), (1, 1)} <= seen  # odd and even ones are among them


@pytest.mark.slow
def test_names_are_of_no_account_order_is(published, tmp_path):
    network, path = published("efficientnet_lite0")
    values = [v.contiguous() for v in network.state_dict().values() if v.ndim]
    save_file({f"{i:04d}": v for i, v in enumerate(values)}, tmp_path / "numbers.safetensors")
    one, two = (load_trunk("efficientnet_lite0", p)[0].state_dict() for p in (path, tmp_path / "numbers.safetensors"))
    assert all(torch.equal(v, two[k]) for k, v in one.items())


@pytest.mark.slow
def test_what_is_no_checkpoint_of_it(published, tmp_path):
    _, path = published("efficientnet_lite0")
    pickle, cut, other = (tmp_path / n for n in ("w.pth", "cut.safetensors", "other.safetensors"))
    torch.save({"a": torch.ones(3)}, pickle)
    cut.write_bytes(path.read_bytes()[:-100])
    save_file({"a": torch.ones(3)}, other)
    for given, name, words in (
        (tmp_path / "none", "efficientnet_lite0", "no such file"),
        (pickle, "efficientnet_lite0", "not a safetensors file"),
        (cut, "efficientnet_lite0", "not a safetensors file"),
        (other, "efficientnet_lite0", "not a checkpoint of efficientnet_lite0"),
        (path, "efficientnet_lite2", "not a checkpoint of efficientnet_lite2"),
        (path, "efficientnet_lite9", "efficientnet_lite0"),
    ):
        with pytest.raises(InputError, match=words):
            load_trunk(name, given)


def test_it_has_no_batch_norm():
    kinds = {type(m).__name__ for m in build_trunk("efficientnet_lite0").modules()}
    assert kinds == {"Sequential", "ResidualLayers", "Conv2d", "Conv2dSame", "ReLU6"}
