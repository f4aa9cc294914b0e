"""Geometry and intensity changes of one crop: compiled (`csrc/augmentation/`) for the devices that have kernels, else PyTorch.

A volume is [1, H, W, D], int16 (voxel / 32767 is its value) or float32; a crop is [1, s, s, s] float32, contiguous, and is
changed in place. The two implementations agree to float tolerance; noise agrees in distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2.ops.extension import compiled_operators

Size3 = tuple[int, int, int]
Sigma = tuple[float, float, float]

TRUNCATED = 4.0  # standard deviations at which a Gaussian kernel is cut, MONAI's default


def crop_resize(
    volume: Tensor,
    start: Size3,
    stop: Size3,
    size: int,
    source_axes: Size3,
    flipped: Size3,
    angles: tuple[float, float, float] = (0.0, 0.0, 0.0),
    scale: float = 1.0,
) -> Tensor:
    """Cut a box, resize it trilinearly to a cube (align_corners=False), flip and turn it.

    Args:
        volume: [1, H, W, D] int16 or float32, last axis contiguous.
        start, stop: Half-open box in voxels.
        size: Edge of the result.
        source_axes: The volume's axis (0 to 2) that becomes each axis of the result.
        flipped: Per axis of the result, 1 where it runs backwards.
        angles: Radians about the three axes, applied in this order, of the resized cube about its centre, before flips and
            turns. What lies beside the box is read from the volume, and beyond that its border (plain PyTorch only).
        scale: What voxels are multiplied by.

    Returns:
        [1, size, size, size] float32.

    Raises:
        ValueError: Wrong shape, dtype or memory order, an empty box or one that leaves the volume, no permutation.
    """
    _check_crop_resize(volume, start, stop, size, source_axes, flipped)
    if any(angles):
        x = _crop_rotated(volume, start, stop, size, angles, scale)
        return _permuted(x, source_axes, flipped)
    if volume.device.type in COMPILED_FOR:
        return torch.ops.dinov2.crop_resize(volume, start, stop, size, source_axes, flipped, scale)
    (a, b, c), (d, e, f) = start, stop
    x = F.interpolate(volume[None, :, a:d, b:e, c:f].float() * scale, (size,) * 3, mode="trilinear", align_corners=False)
    return _permuted(x[0, 0], source_axes, flipped)


def _check_crop_resize(
    volume: Tensor, start: Sequence[int], stop: Sequence[int], size: int, source_axes: Sequence[int], flipped: Sequence[int]
) -> None:
    """What the compiled operator checks too: here, so that a caller's mistake meets no C++ exception."""
    if volume.dim() != 4 or volume.shape[0] != 1:
        raise ValueError(f"volume must be [1, H, W, D], got {list(volume.shape)}")
    if volume.dtype not in (torch.int16, torch.float32):
        raise ValueError(f"volume must be int16 or float32, got {volume.dtype}")
    if volume.stride(3) != 1:
        raise ValueError(f"volume's last axis must be contiguous, its strides are {volume.stride()}")
    if not len(start) == len(stop) == len(source_axes) == len(flipped) == 3:
        raise ValueError("start, stop, source_axes and flipped must have three numbers each")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if sorted(source_axes) != [0, 1, 2]:
        raise ValueError(f"source_axes must be a permutation of 0, 1, 2, got {list(source_axes)}")
    if any(not 0 <= a < b <= n for a, b, n in zip(start, stop, volume.shape[1:], strict=True)):
        raise ValueError(f"box from {start} to {stop} is empty or leaves the volume {list(volume.shape)}")


def _check_crop(x: Tensor) -> None:
    if x.dim() != 4 or x.shape[0] != 1 or not x.numel():
        raise ValueError(f"crop must be [1, H, W, D], got {list(x.shape)}")
    if x.dtype != torch.float32:
        raise ValueError(f"crop must be float32, got {x.dtype}")
    if not x.is_contiguous():
        raise ValueError(f"crop must be contiguous, its strides are {x.stride()}")


def _check_sigma(sigma: Sequence[float]) -> None:
    if len(sigma) != 3:
        raise ValueError(f"sigma must have three numbers (voxels), got {len(sigma)}")
    if any(not s > 0 for s in sigma):
        raise ValueError(f"sigma must be positive, got {list(sigma)}")


def _permuted(x: Tensor, source_axes: Size3, flipped: Size3) -> Tensor:
    """[s, s, s] -> [1, s, s, s], turned."""
    return x.permute(*source_axes).flip([axis for axis in range(3) if flipped[axis]])[None].contiguous()


def rotated_places(start: Size3, stop: Size3, size: int, angles: tuple[float, float, float]) -> Tensor:
    """Where the voxels of a turned crop lie in the volume: [3, s, s, s] float64, voxels of the volume along H, W, D."""
    about = (torch.arange(size, dtype=torch.float64) - (size - 1) / 2) / size
    cube = torch.stack(torch.meshgrid(about, about, about, indexing="ij"))  # [3, s, s, s]
    turn = torch.eye(3, dtype=torch.float64)
    for axis, angle in enumerate(angles):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        one = torch.eye(3, dtype=torch.float64)
        one[a, a] = one[b, b] = math.cos(angle)
        one[a, b], one[b, a] = -math.sin(angle), math.sin(angle)
        turn = one @ turn
    edges = torch.tensor([b - a for a, b in zip(start, stop, strict=True)], dtype=torch.float64)
    middle = torch.tensor([(a + b - 1) / 2 for a, b in zip(start, stop, strict=True)], dtype=torch.float64)
    return torch.einsum("ij,jhwd->ihwd", edges[:, None] * turn, cube) + middle[:, None, None, None]


def _crop_rotated(
    volume: Tensor, start: Size3, stop: Size3, size: int, angles: tuple[float, float, float], scale: float
) -> Tensor:
    """[s, s, s] float32 of a turned box; only the part of the volume that it reaches is converted."""
    places = rotated_places(start, stop, size, angles)
    shape = torch.tensor(volume.shape[1:])
    low = places.amin((1, 2, 3)).floor().long().clamp(min=0).minimum(shape - 1)
    high = (places.amax((1, 2, 3)).floor().long() + 2).clamp(min=1).minimum(shape)
    (a, b, c), (d, e, f) = low.tolist(), high.tolist()
    part = volume[:, a:d, b:e, c:f].float() * scale  # [1, h, w, d]
    inside = (places - low[:, None, None, None]).permute(1, 2, 3, 0)  # [s, s, s, 3]
    grid = (2 * inside + 1) / torch.tensor(part.shape[1:]) - 1
    grid = grid.flip(-1).to(part.device, torch.float32)  # grid_sample counts axes from the last
    return F.grid_sample(part[None], grid[None], mode="bilinear", padding_mode="border", align_corners=False)[0, 0]


def adjust_gamma_(x: Tensor, gamma: float) -> Tensor:
    """((x - min) / range) ** gamma * range + min."""
    _check_crop(x)
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    if x.device.type in COMPILED_FOR:
        torch.ops.dinov2.adjust_gamma_(x, gamma)
        return x
    low, high = x.aminmax()
    return x.sub_(low).div_(high - low + 1e-7).pow_(gamma).mul_(high - low).add_(low)


def shift_histogram_(x: Tensor, points: Sequence[float]) -> Tensor:
    """Piecewise-linear map of [min, max] onto itself through equally spaced points and these values (from 0 to 1)."""
    _check_crop(x)
    if len(points) < 2:
        raise ValueError(f"points must have at least 2 numbers, got {len(points)}")
    if x.device.type in COMPILED_FOR:
        torch.ops.dinov2.shift_histogram_(x, points)
        return x
    low, high = x.aminmax()
    values = torch.tensor(points, dtype=x.dtype, device=x.device)
    segments = len(points) - 1
    u = (x - low) * (segments / (high - low))
    first = u.long().clamp_(0, segments - 1)  # of a constant crop's u, which is not a number, as well
    shifted = values[first] + (u - first) * (values[first + 1] - values[first])
    return x.copy_(torch.where(high > low, shifted * (high - low) + low, x))  # a constant crop stays: no device is waited for


def add_gaussian_noise_(x: Tensor, std: float, seed: int) -> Tensor:
    """Adds std * N(0, 1), a function of the seed; which numbers differs between the implementations."""
    _check_crop(x)
    if x.device.type in COMPILED_FOR:
        torch.ops.dinov2.add_gaussian_noise_(x, std, seed)
        return x
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))  # on the CPU: the same numbers for any device
    return x.add_(noise.to(x.device), alpha=std)


def gaussian_smooth_(x: Tensor, sigma: Sigma) -> Tensor:
    """Separable Gaussian, sigma in voxels along H, W, D, zeros outside, cut at four sigma (MONAI's GaussianSmooth)."""
    _check_crop(x)
    _check_sigma(sigma)
    if x.device.type in COMPILED_FOR:
        torch.ops.dinov2.gaussian_smooth_(x, sigma)
        return x
    for axis, s in enumerate(sigma):
        matrix = _smoothing_matrix(x.shape[axis + 1], s).to(x.device)
        x.copy_(torch.tensordot(x, matrix, ([axis + 1], [1])).movedim(-1, axis + 1))
    return x


def gaussian_sharpen_(x: Tensor, sigma1: Sigma, sigma2: Sigma, alpha: float) -> Tensor:
    """blur1 + alpha * (blur1 - blur2(blur1)) (MONAI's GaussianSharpen)."""
    _check_crop(x)
    for sigma in (sigma1, sigma2):
        _check_sigma(sigma)
    if x.device.type in COMPILED_FOR:
        torch.ops.dinov2.gaussian_sharpen_(x, sigma1, sigma2, alpha)
        return x
    gaussian_smooth_(x, sigma1)
    twice = gaussian_smooth_(x.clone(), sigma2)
    return x.mul_(1 + alpha).sub_(twice, alpha=alpha)


def gibbs_(x: Tensor, alpha: float) -> Tensor:
    """Cuts frequencies beyond (1 - alpha) of the largest in-plane radius (MONAI's GibbsNoise), by a real FFT.

    MONAI's mask is centred between two frequencies for an even size, so it is not symmetric, and the real part of what comes
    back is taken; that equals a real transform with the mean of the mask and its mirror image.
    """
    n, mask = x.shape[-1], _gibbs_mask(x.shape[-1], alpha).to(x.device)
    low = mask.shape[-1]
    if len(mask) == n:
        return x.copy_(torch.fft.irfftn(torch.fft.rfftn(x[0]).mul_(mask), s=x.shape[1:])[None])
    spectrum = torch.fft.rfft(x[0])[..., :low]  # [n, n, low]; axis by axis, so that what is cut is not transformed
    for axis in (1, 0):
        spectrum = torch.fft.fft(spectrum, dim=axis)
        spectrum = torch.cat([spectrum.narrow(axis, 0, low), spectrum.narrow(axis, n + 1 - low, low - 1)], axis)
    spectrum *= mask
    for axis in (0, 1):
        first, last = spectrum.split([low, low - 1], axis)
        cut = spectrum.new_zeros([n - len(mask) if i == axis else length for i, length in enumerate(spectrum.shape)])
        spectrum = torch.fft.ifft(torch.cat([first, cut, last], axis), dim=axis)
    return x.copy_(torch.fft.irfft(spectrum, n=n)[None])


def _smoothing_matrix(n: int, sigma: float) -> Tensor:
    """[n, n] banded: row i weighs voxels by a Gaussian's integral over each, around voxel i."""
    distance = torch.arange(n).view(-1, 1) - torch.arange(n)
    tail = int(max(sigma * TRUNCATED, 0.5) + 0.5)
    t = 0.70710678 / sigma
    weights = 0.5 * (torch.erf(t * (distance + 0.5)) - torch.erf(t * (distance - 0.5)))
    return weights.clamp_(min=0.0) * (distance.abs() <= tail)


@lru_cache(maxsize=4)
def _squared_distances(n: int) -> tuple[Tensor, Tensor]:
    """Squared distance of each frequency, in FFT order, from MONAI's centre, and the same of its mirror image; [n] each."""
    frequency = torch.arange(n)
    squared = ((frequency + n // 2) % n - (n - 1) / 2) ** 2
    return squared, squared[-frequency % n]


def _gibbs_mask(n: int, alpha: float) -> Tensor:
    """Mean of MONAI's mask and its mirror image on the half spectrum, [k, k, low], in FFT order.

    Only the frequencies below `low` along each axis, of which some are kept, k = 2 low - 1 of n; all where they are many.
    """
    radius = (1 - alpha) * n * 2**0.5 / 2
    distance = abs(np.arange(n // 2 + 1) - (0.5 if n % 2 == 0 else 0.0))  # of the nearer of a frequency and its mirror image
    reach = radius**2 * (1 + 1e-6) - 2 * distance[0] ** 2  # with room for what float32 rounds; no device is asked
    low = max(1, int((distance**2 <= reach).sum()))
    is_whole = 3 * low > n  # cutting them out would take longer
    low = n // 2 + 1 if is_whole else low
    places = torch.arange(n) if is_whole else torch.arange(1 - low, low).roll(1 - low)
    mask = torch.zeros(len(places), len(places), low)
    for squared in _squared_distances(n):
        along = squared[places]
        left = radius**2 - (along[:, None] + along)  # what remains for the last axis
        mask += squared[:low] <= left[..., None]
    return mask.mul_(0.5)


def _fake_crop_resize(volume: Tensor, start: Size3, stop: Size3, size: int, *_: object) -> Tensor:
    return volume.new_empty(1, size, size, size, dtype=torch.float32)


def _register() -> frozenset[str]:
    """Join these functions to the compiled operators; the devices that have kernels (folders of `csrc/augmentation`)."""
    if not compiled_operators()[0]:
        return frozenset()
    torch.library.register_fake("dinov2::crop_resize", _fake_crop_resize)  # torch makes those of operators that return nothing
    return frozenset(["cpu"])


COMPILED_FOR = _register()  # when imported: torch.compile cannot look for files while it traces a function
