"""Frozen features: the tokens of the network, wherever they are taken."""

from __future__ import annotations

import torch

from dinov2.features.features import patch_features, volume_features
from dinov2.models.vision_transformer import DinoVisionTransformer3d


def small_net() -> DinoVisionTransformer3d:
    torch.manual_seed(0)
    return DinoVisionTransformer3d(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, pos_encoding="rope").eval()


def test_patch_features_are_the_last_layers_side_by_side() -> None:
    net, x = small_net(), torch.randn(5, 1, 8, 8, 8)
    features = patch_features(net, x, layers=2, batch_size=2)
    last = net(x, is_training=True)["x_norm_patchtokens"].view(5, 2, 2, 2, 12)
    assert features.shape == (5, 2, 2, 2, 24)
    torch.testing.assert_close(features[..., 12:], last)


def test_volume_features_average_every_window_over_a_cell_and_skip_background() -> None:
    net = small_net()
    volume = torch.full((1, 18, 15, 13), -1.0)
    volume[0, 2:8, 3:9, 4:10] = torch.rand(6, 6, 6)
    features = volume_features(net, volume, window=8, shift=2)
    assert features.shape == (9, 8, 7, 12)
    assert not features[8, 7, 0].any()  # far from the object
    padded = torch.nn.functional.pad(volume[0], [8] * 6, value=-1.0)
    expected = []  # the cell at voxel (4, 4, 4) by hand: patches of all windows that start 0 or 4 voxels before it
    for a in (0, 4):
        for b in (0, 4):
            for c in (0, 4):
                i, j, k = 8 + 4 - a, 8 + 4 - b, 8 + 4 - c
                tokens = patch_features(net, padded[None, None, i : i + 8, j : j + 8, k : k + 8], layers=1)
                expected.append(tokens[0, a // 4, b // 4, c // 4])
    torch.testing.assert_close(features[2, 2, 2], torch.stack(expected).mean(0))
