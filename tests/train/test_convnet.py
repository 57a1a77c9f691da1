"""The residual network that teaches the ViTs."""

import torch

from cdl_edge.train.convnet import ConvNet, Residual

STEM = ((4, 4, 2, 0), (8, 3, 2, 1))


def test_shapes_and_the_cut_behind_the_stem():
    torch.manual_seed(0)
    net = ConvNet(STEM, ((8, 1), (12, 2)), 5).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert net(x).shape == (2, 5)
        assert torch.equal(net(x), net.behind_stem(net.stem(x)))
        assert net(torch.randn(2, 3, 24, 24)).shape == (2, 5)  # pre-training runs at two resolutions


def test_a_shortcut_is_plain_where_shapes_agree():
    same, wider = Residual(8, 8, 1).eval(), Residual(8, 12, 2).eval()
    assert isinstance(same.shortcut, torch.nn.Identity) and not isinstance(wider.shortcut, torch.nn.Identity)
    for p in same.body.parameters():
        p.data.zero_()
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        assert torch.equal(same(x), x.relu())
        assert wider(x).shape == (1, 12, 2, 2)
