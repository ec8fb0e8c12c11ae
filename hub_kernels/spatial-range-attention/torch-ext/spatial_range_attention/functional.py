# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The two functions: what they accept, and the operators behind them."""

import torch
from torch.autograd import forward_ad

from ._ops import ops
from .autograd import FIRST_DERIVATIVES_ONLY  # and the derivatives are registered


MAX_RADIUS = 6
FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def spatial_range_weights(guidance: torch.Tensor, sigma: torch.Tensor, radius: int) -> torch.Tensor:
    """How much each neighbour counts: similarity of the guidance (range) times nearness (space), not renormalised.

        weights[n] = softmax_n(<g, g_n> / √C) · exp(-(u_dy² + u_dx²) / (2σ²)),   n = (dy, dx),   u = linspace(-1, 1, d)

    The neighbours are those of a window of d × d positions, d = 2·radius + 1, reflected at the borders of the grid
    without repeating the border. Formula: FeatUp, https://arxiv.org/abs/2403.10516, with the similarity scaled by the
    square root of the width. σ is read on the device, so no value of it is refused: a negative σ counts as |σ|, zero
    leaves the centre alone, infinity drops the Gaussian, NaN gives NaN.

    Args:
        guidance: `(batch, height, width, channels)` in float32, bfloat16, float16 or float64; both sides of the grid
            exceed `radius`. Any strides; an empty batch gives an empty result.
        sigma: 0-dimensional tensor σ on the same device, the width of the spatial kernel in units of the window's
            half side.
        radius: half side of the window, 1 to 6.

    Returns:
        `(batch, height, width, (2·radius + 1)²)`, neighbours row by row; float32, or float64 for float64 guidance.
        Similarities, softmax and Gaussian are computed in that dtype. Gradients flow to `guidance` and `sigma`.

    Raises:
        ValueError: if the guidance is not a 4-dimensional tensor of one of the dtypes, σ is not a 0-dimensional tensor
            on its device, the radius is not an integer from 1 to 6, or the grid is not larger than the radius.
    """
    _check_features(guidance, "guidance", radius)
    _check_tensor(sigma, "sigma", "Wrap the number: torch.tensor(value, device=guidance.device).")
    if sigma.ndim != 0:
        raise ValueError(f"`sigma` must be a 0-dimensional tensor, got shape {tuple(sigma.shape)}.")
    if sigma.is_complex() or sigma.dtype == torch.bool:
        raise ValueError(f"`sigma` must be a real number, got {sigma.dtype}.")
    _check_device(sigma, "sigma", guidance, "guidance")
    sigma = sigma.to(_compute_dtype(guidance))
    return ops.spatial_range_weights(guidance, sigma, radius, _allow_tf32(guidance))[0]


def neighborhood_aggregate(source: torch.Tensor, weights: torch.Tensor, radius: int) -> torch.Tensor:
    """Sum each position's neighbours by its weights:  out = Σ_n weights[n] · source_n.

    The neighbours are those of `spatial_range_weights`.

    Args:
        source: `(batch, height, width, channels)` in float32, bfloat16, float16 or float64; both sides of the grid
            exceed `radius`. Any strides; an empty batch gives an empty result.
        weights: `(batch, height, width, (2·radius + 1)²)`, neighbours row by row, any floating dtype, on the device
            of `source`.
        radius: half side of the window, 1 to 6.

    Returns:
        `(batch, height, width, channels)` in the dtype of `source`; half-precision products are accumulated in
        float32. Gradients flow to `source` and `weights`.

    Raises:
        ValueError: if the source is not a 4-dimensional tensor of one of the dtypes, the weights do not fit it or are
            elsewhere, the radius is not an integer from 1 to 6, or the grid is not larger than the radius.
    """
    _check_features(source, "source", radius)
    _check_tensor(weights, "weights", "They are the result of `spatial_range_weights`.")
    expected = (*source.shape[:3], (2 * radius + 1) ** 2)
    if weights.shape != expected:
        raise ValueError(
            f"`weights` must have shape {tuple(expected)} for radius {radius} and a source of shape "
            f"{tuple(source.shape)}, got {tuple(weights.shape)}."
        )
    if not weights.is_floating_point():
        raise ValueError(f"`weights` must be a floating-point tensor, got {weights.dtype}.")
    _check_device(weights, "weights", source, "source")
    if weights.dtype != source.dtype:
        weights = weights.to(_compute_dtype(source))
    return ops.neighborhood_aggregate(source, weights, radius, _allow_tf32(source))


def _check_tensor(value, name: str, remedy: str) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor, got {value!r:.100}. {remedy}")
    if value.layout is not torch.strided:
        raise ValueError(f"`{name}` must be a dense tensor, got {value.layout}. Call `to_dense()` on it.")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(f"`{name}` has a forward-mode tangent. {FIRST_DERIVATIVES_ONLY}")


def _check_features(features: torch.Tensor, name: str, radius: int) -> None:
    if isinstance(radius, bool) or not isinstance(radius, int) or radius < 1:
        raise ValueError(f"`radius` must be an integer of at least 1, got {radius!r}.")
    if radius > MAX_RADIUS:
        raise ValueError(
            f"`radius` must be at most {MAX_RADIUS} in this kernel, got {radius}. Use a smaller radius or the PyTorch "
            "implementation (`use_kernels=False`)."
        )
    _check_tensor(features, name, "It has shape (batch, height, width, channels).")
    if features.ndim != 4:
        raise ValueError(f"`{name}` must have shape (batch, height, width, channels), got {tuple(features.shape)}.")
    if not features.is_floating_point():
        raise ValueError(f"`{name}` must be a floating-point tensor, got {features.dtype}.")
    if features.dtype not in FEATURE_DTYPES:
        raise ValueError(
            f"`{name}` must be float32, bfloat16, float16 or float64, got {features.dtype}. Convert it first."
        )
    if features.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(
            f"`{name}` is on {features.device}; this kernel runs on cpu and cuda. Move it there, or use the PyTorch "
            "implementation (`use_kernels=False`)."
        )
    _, height, width, channels = features.shape
    if height <= radius or width <= radius:
        raise ValueError(
            f"A grid of {height} x {width} positions is too small for radius {radius}: reflection at the borders "
            "needs both sides larger than the radius. Use a smaller radius or larger images."
        )
    if channels == 0:
        raise ValueError(f"`{name}` must have at least one channel, got shape {tuple(features.shape)}.")


def _check_device(tensor: torch.Tensor, name: str, reference: torch.Tensor, reference_name: str) -> None:
    if tensor.device != reference.device:
        raise ValueError(
            f"`{name}` is on {tensor.device}, but `{reference_name}` is on {reference.device}. Move `{name}` there."
        )


def _compute_dtype(features: torch.Tensor) -> torch.dtype:
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def _allow_tf32(features: torch.Tensor) -> bool:
    """Whether the user lets float32 matrix products round their operands to TF32."""
    return features.is_cuda and _matmul_in_tf32()


@torch.compiler.assume_constant_result  # compiled code is guarded by the setting
def _matmul_in_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
