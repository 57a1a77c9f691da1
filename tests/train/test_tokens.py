"""What of the patches heads made from statistics read."""

from types import SimpleNamespace

import pytest
import torch

from cdl_edge.train.tokens import CONTRAST, pooled


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (3, 3), (2, 5), (1, 1)])
def test_pooled_patches_say_what_and_where(grid):
    vit = SimpleNamespace(patch_embed=SimpleNamespace(grid_size=grid))
    x = torch.rand((3, *grid, 7), generator=torch.Generator().manual_seed(0))
    height, width = grid
    top, bottom = x[:, : height // 2].sum((1, 2)), x[:, height - height // 2 :].sum((1, 2))
    left, right = x[:, :, : width // 2].sum((1, 2)), x[:, :, width - width // 2 :].sum((1, 2))
    up, down = x[:, : height // 2], x[:, height - height // 2 :]
    falling = up[:, :, : width // 2].sum((1, 2)) + down[:, :, width - width // 2 :].sum((1, 2))
    rising = up[:, :, width - width // 2 :].sum((1, 2)) + down[:, :, : width // 2].sum((1, 2))
    contrasts = [CONTRAST * pair for pair in (bottom - top, right - left, falling - rising)]
    expected = torch.cat([x.sum((1, 2)), *contrasts], dim=1) / (height * width)
    got = pooled(vit, x.flatten(1, 2))
    assert got.shape == (3, 28) and torch.allclose(got, expected, atol=1e-6)
