# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Auxiliary losses of a fusion's training, and two metrics of what it learned: functions of tensors.

    feature_consistency_loss   neighbours that belong together should have features of one direction
    feature_diversity_loss     the tokens of a picture should not all have one direction
    feature_diversity          mean cosine distance between the tokens of a picture
    linear_cka                 do two sets of features say alike which tokens are alike?
    share_of_batch             losses of pictures → what a part of a batch adds to its loss

All compute in float32 (float64 for float64 inputs) whatever the inputs' dtype and under autocast. None gathers
neighbourhoods or writes out pairs of tokens where that is more than the features themselves: distances and cosines
come from dot products, sums over pairs from sums over tokens. Shapes: B batch, H W map, N tokens, C channels,
K = (2·radius + 1)² neighbours.
"""

from typing import Literal

import torch

from .spatial_range_attention_aurea import _check, _compute_dtype, _NeighborDot


def _directions(features: torch.Tensor, eps: float) -> torch.Tensor:
    """Features of unit length. One of no length has no direction: it stays zero, and so does its gradient."""
    norms = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return features / torch.where(norms > eps, norms, torch.inf)


def _reduce(losses: torch.Tensor, reduction: str) -> torch.Tensor:
    """(B,) → (B,) or its mean."""
    if reduction not in ("mean", "none"):
        raise ValueError(f'`reduction` must be "mean" or "none", got {reduction!r}.')
    if reduction == "mean" and len(losses) == 0:
        raise ValueError('The mean over a batch of 0 pictures does not exist. Use `reduction="none"` for one.')
    return losses.mean() if reduction == "mean" else losses


def _squared_distances(features: torch.Tensor, radius: int) -> torch.Tensor:
    """‖x_n - x‖² = ‖x_n‖² + ‖x‖² - 2 <x, x_n> of each position and its neighbours: (B, H, W, C) → (B, H, W, K)."""
    # What all positions share would drown the differences in rounding.
    features = features - features.mean(dim=(1, 2), keepdim=True).detach()
    squares = features.square().sum(dim=-1, keepdim=True)
    neighbor_squares = _NeighborDot.apply(torch.ones_like(squares), squares, radius)
    return (squares + neighbor_squares - 2 * _NeighborDot.apply(features, None, radius)).clamp(min=0)


def feature_consistency_loss(
    guidance: torch.Tensor,
    features: torch.Tensor,
    radius: int,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    w1: float,
    w2: float,
    shift: float,
    reduction: Literal["mean", "none"] = "mean",
) -> torch.Tensor:
    """Features should point where those of near positions, and of near positions that look alike, point.

        weight[n] = w1 · exp(-‖n‖² / 2α - ‖g_n - g‖² / 2β) + w2 · exp(-‖n‖² / 2γ) - shift
        loss = mean over positions and neighbours of weight[n] · max(0, 1 - cos(f_n, f)),   n = (dy, dx) / radius

    The neighbourhood is reflected at the borders. `shift` makes the weights of neighbours that have nothing to do with
    each other negative: their features are pushed apart. β is a squared distance summed over channels, so it has to
    suit the scale and the width of the guidance. After the CRF loss of STEGO, https://arxiv.org/abs/2203.08414.

    Args:
        guidance: `(batch, height, width, guidance_channels)`, any floating dtype; both sides of the grid exceed
            `radius`.
        features: `(batch, height, width, channels)`, any floating dtype.
        radius: half side of the neighbourhood, at least 1.
        reduction: `"mean"` over the batch, or `"none"` for one loss per map.

    Returns:
        A scalar or `(batch,)`, in at least float32. Gradients flow to `features` and to `guidance`.

    Raises:
        ValueError: if the maps are not 4-dimensional floating-point tensors of one batch and grid, the grid is not
            larger than the radius, α, β or γ is not positive, or the mean is asked of no maps.
    """
    _check(guidance, "guidance", radius)
    _check(features, "features", radius)
    if guidance.shape[:3] != features.shape[:3]:
        raise ValueError(
            f"`guidance` and `features` must have the same batch and grid, got shapes {tuple(guidance.shape)} and "
            f"{tuple(features.shape)}."
        )
    for name, value in {"alpha": alpha, "beta": beta, "gamma": gamma}.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    dtype = torch.promote_types(_compute_dtype(guidance), features.dtype)
    offsets = torch.arange(-radius, radius + 1, dtype=dtype, device=features.device) / radius
    offsets = (offsets[:, None] ** 2 + offsets**2).flatten()  # (K,)
    guidance_distances = _squared_distances(guidance.to(dtype), radius)  # (B, H, W, K)
    weights = w1 * torch.exp(-offsets / (2 * alpha) - guidance_distances / (2 * beta))
    weights = weights + (w2 * torch.exp(-offsets / (2 * gamma)) - shift)
    cosines = _NeighborDot.apply(_directions(features.to(dtype), eps=1e-8), None, radius)
    return _reduce((weights * (1 - cosines).clamp(min=0)).mean(dim=(1, 2, 3)), reduction)


def _tokens(features: torch.Tensor, name: str) -> torch.Tensor:
    """(B, N, C) or (B, H, W, C) → (B, N, C) in the dtype to compute in."""
    if features.ndim not in (3, 4):
        raise ValueError(
            f"`{name}` must have shape (batch, tokens, channels) or (batch, height, width, channels), got "
            f"{tuple(features.shape)}."
        )
    if not features.is_floating_point():
        raise ValueError(f"`{name}` must be a floating-point tensor, got {features.dtype}.")
    features = features.flatten(1, -2)
    if features.shape[1] < 2:
        raise ValueError(f"`{name}` must have at least 2 tokens to compare, got {features.shape[1]}.")
    return features.to(_compute_dtype(features))


def _mean_similarity(features: torch.Tensor) -> torch.Tensor:
    """Mean cosine of all pairs of different tokens, Σ_{i≠j} <x_i, x_j> = ‖Σ x_i‖² - Σ ‖x_i‖²: (B, N, C) → (B,)."""
    num_tokens = features.shape[1]
    directions = _directions(features, eps=1e-12)
    pairs = directions.sum(dim=1).square().sum(dim=-1) - directions.square().sum(dim=(1, 2))
    return pairs / (num_tokens * (num_tokens - 1))


def feature_diversity_loss(
    features: torch.Tensor, alpha: float = 2.0, reduction: Literal["mean", "none"] = "mean"
) -> torch.Tensor:
    """Mean cosine similarity of the pairs of different tokens of a picture, times `alpha`.

        loss = α · mean over i ≠ j of cos(x_i, x_j)

    Args:
        features: `(batch, tokens, channels)` or `(batch, height, width, channels)`, any floating dtype.
        alpha: weight of the loss.
        reduction: `"mean"` over the batch, or `"none"` for one loss per picture.

    Returns:
        A scalar or `(batch,)`, in at least float32.

    Raises:
        ValueError: if the features are not such a floating-point tensor, have fewer than two tokens, or the mean is
            asked of no pictures.
    """
    return _reduce(alpha * _mean_similarity(_tokens(features, "features")), reduction)


def feature_diversity(features: torch.Tensor) -> torch.Tensor:
    """Mean cosine distance 1 - cos(x_i, x_j) of the pairs of different tokens of a picture, between 0 and about 1.

    Arguments and errors are those of [`feature_diversity_loss`]; the result is a scalar in at least float32.
    """
    return _reduce(1 - _mean_similarity(_tokens(features, "features")), "mean")


def _gram_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """<X Xᵀ, Y Yᵀ> = ‖Xᵀ Y‖², by whichever has the smaller matrices: (B, N, C), (B, N, D) → (B,)."""
    with torch.autocast(left.device.type, enabled=False):
        if left.shape[1] < max(left.shape[2], right.shape[2]):
            return ((left @ left.mT) * (right @ right.mT)).sum(dim=(1, 2))
        return (left.mT @ right).square().sum(dim=(1, 2))


def linear_cka(features: torch.Tensor, other_features: torch.Tensor) -> torch.Tensor:
    """Linear centred kernel alignment of two sets of features, by their directions: 0 unrelated, 1 alike.

        CKA = <K, L> / (‖K‖ ‖L‖),   K, L the centred matrices of cosines between tokens

    Of two sets with unlike numbers of tokens, the first tokens of the larger are compared. A set whose tokens all have
    one direction is related to nothing: 0. Formula: https://arxiv.org/abs/1905.00414.

    Args:
        features: `(batch, tokens, channels)` or `(batch, height, width, channels)`, any floating dtype.
        other_features: likewise, with the same batch and any number of channels.

    Returns:
        The mean over the batch, a scalar in at least float32.

    Raises:
        ValueError: if the features are not such floating-point tensors, their batches differ or are empty, or there
            are fewer than two tokens.
    """
    left, right = _tokens(features, "features"), _tokens(other_features, "other_features")
    if len(left) != len(right):
        raise ValueError(
            f"`features` and `other_features` must have the same batch size, got {len(left)} and {len(right)}."
        )
    num_tokens = min(left.shape[1], right.shape[1])
    dtype = torch.promote_types(left.dtype, right.dtype)

    def centred(tokens: torch.Tensor) -> torch.Tensor:
        directions = _directions(tokens[:, :num_tokens].to(dtype), eps=1e-12)
        return directions - directions.mean(dim=1, keepdim=True)

    left, right = centred(left), centred(right)
    norms = (_gram_product(left, left) * _gram_product(right, right)).clamp_min(1e-20).sqrt()
    return _reduce(_gram_product(left, right) / norms, "mean")


def share_of_batch(
    losses: torch.Tensor,
    image_tokens: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    placeholders_per_image: int = 1,
) -> torch.Tensor:
    """The losses of pictures as a part of a batch's loss, which is a mean over the tokens to predict.

    The pictures of a row weigh together what the row's tokens to predict do. So the shares of the parts of a batch,
    rows dealt out to steps of accumulation or to processes, add up to that of the whole, wherever the pictures are.

    Args:
        losses: `(num_images,)`, in the order of the placeholders.
        image_tokens: `(batch, tokens)`, True at each picture's placeholders.
        labels: `(batch, tokens)`, -100 where nothing is to be predicted; the first token of a row never is.
        num_items_in_batch: tokens to predict in the whole batch; by default those in `labels`.
        placeholders_per_image: of each picture.

    Returns:
        A scalar.
    """
    num_targets = (labels[:, 1:] != -100).sum(dim=1)  # (B,)
    num_images = image_tokens.sum(dim=1) / placeholders_per_image  # (B,)
    weights = (num_targets / num_images)[image_tokens.nonzero()[::placeholders_per_image, 0]]  # (num_images,)
    total = num_targets.sum() if num_items_in_batch is None else num_items_in_batch
    return (losses.to(weights.device) * weights).sum() / total


__all__ = ["feature_consistency_loss", "feature_diversity", "feature_diversity_loss", "linear_cka", "share_of_batch"]
