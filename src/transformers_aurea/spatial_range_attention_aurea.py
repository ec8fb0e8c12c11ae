# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Spatial-range ("joint bilateral") attention over a feature map, as in FeatUp (https://arxiv.org/abs/2403.10516).

Each position of a map looks at its d × d neighbours (d = 2·radius + 1, reflected at the borders).
`spatial_range_weights` says how much each neighbour counts, from a guidance map and the distance;
`neighborhood_aggregate` sums a source map with such weights. They are two functions because a network may refine the
weights in between.

Both rest on two products of a map with its neighbourhoods, `_neighbor_dot` and `_neighbor_sum`, each the other's
derivative. Neither gathers the neighbourhoods: the map is cut into tiles, and a tile of queries and the halo of keys
around it meet in one matrix product, of which the neighbours' entries are read (dot) or written (sum). Work and memory
grow linearly with the map. Shapes: B batch, H W map, C channels, K = d² neighbours, d = 2·radius + 1.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn
from transformers.integrations import use_kernel_forward_from_hub


class _Tile(NamedTuple):
    """Queries of one tile, the keys within `radius` of them, and where their products lie in the tile's matrix."""

    query_rows: slice
    query_columns: slice
    key_rows: slice
    key_columns: slice
    entries: torch.Tensor  # (queries · K,) of neighbour n of query q, in the flattened (keys, queries) matrix


def _tile_shape(height: int, width: int, device_type: str) -> tuple[int, int]:
    """Rows and columns of a tile: whole rows are not copied, small tiles waste little, large ones save calls."""
    if device_type != "cpu":
        return 32, 32
    return (4, width) if width <= 32 else (8, 8)


def _neighbor_coordinates(start: int, stop: int, length: int, radius: int, device: torch.device) -> torch.Tensor:
    """Coordinates of the neighbours along one axis, (stop - start, d), reflected without repeating the border."""
    offsets = torch.arange(-radius, radius + 1, device=device)
    coordinates = torch.arange(start, stop, device=device)[:, None] + offsets
    return (length - 1) - ((length - 1) - coordinates.abs()).abs()


def _build_tiles(
    height: int, width: int, radius: int, tile_shape: tuple[int, int], device: torch.device
) -> tuple[_Tile, ...]:
    """Cut a map into tiles. Reflection never leaves a tile's halo, so the halo is simply clipped to the map."""

    def spans(length: int, size: int):
        for start in range(0, length, size):
            stop = min(start + size, length)
            halo = slice(max(start - radius, 0), min(stop + radius, length))
            yield slice(start, stop), halo, _neighbor_coordinates(start, stop, length, radius, device) - halo.start

    tiles = []
    column_spans = list(spans(width, tile_shape[1]))
    for query_rows, key_rows, rows in spans(height, tile_shape[0]):
        for query_columns, key_columns, columns in column_spans:
            key_width = key_columns.stop - key_columns.start
            keys = rows[:, None, :, None] * key_width + columns[None, :, None, :]  # (H, W, d, d)
            keys = keys.flatten(2).flatten(0, 1)  # (queries, K)
            queries = torch.arange(len(keys), device=device)[:, None]
            entries = (keys * len(keys) + queries).flatten()
            tiles.append(_Tile(query_rows, query_columns, key_rows, key_columns, entries))
    return tuple(tiles)


def _build_transposition(height: int, width: int, radius: int, device: torch.device) -> torch.Tensor:
    """For each weight (q, n), flattened: the place (k, m) where k is neighbour n of q, and q is k's neighbour m."""
    extent = 2 * radius + 1
    rows = _neighbor_coordinates(0, height, height, radius, device)
    columns = _neighbor_coordinates(0, width, width, radius, device)
    row_offsets = torch.arange(height, device=device)[:, None] - rows + radius  # (H, d)
    column_offsets = torch.arange(width, device=device)[:, None] - columns + radius  # (W, d)
    keys = rows[:, None, :, None] * width + columns[None, :, None, :]  # (H, W, d, d)
    offsets = row_offsets[:, None, :, None] * extent + column_offsets[None, :, None, :]
    return (keys * extent**2 + offsets).flatten()


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _cached(build, *args):
    return build(*args)


def _table(build, reference: torch.Tensor, *args):
    """Index tables, kept for the next call unless `reference` shows that this one is traced and not computed."""
    traced = torch.compiler.is_compiling() or type(reference) not in (torch.Tensor, nn.Parameter)
    if traced or (reference.is_cuda and torch.cuda.is_current_stream_capturing()):
        return build(*args, reference.device)
    return _cached(build, *args, reference.device)


def _tiles(reference: torch.Tensor, radius: int) -> tuple[_Tile, ...]:
    _, height, width, _ = reference.shape
    return _table(_build_tiles, reference, height, width, radius, _tile_shape(height, width, reference.device.type))


def _bmm(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Batched matrix product that keeps its operands' dtype also under autocast, which leaves in-place ones alone."""
    result = left.new_empty(left.shape[0], left.shape[1], right.shape[2])
    return result.baddbmm_(left, right, beta=0)


def _neighbor_dot(queries: torch.Tensor, keys: torch.Tensor, radius: int) -> torch.Tensor:
    """Dot product of each position of `queries` with its neighbours in `keys`: two (B, H, W, C) → (B, H, W, K)."""
    dots = queries.new_empty(*queries.shape[:3], (2 * radius + 1) ** 2)
    for tile in _tiles(queries, radius):
        tile_queries = queries[:, tile.query_rows, tile.query_columns].flatten(1, 2)
        tile_keys = keys[:, tile.key_rows, tile.key_columns].flatten(1, 2)
        products = _bmm(tile_keys, tile_queries.mT).flatten(1)
        target = dots[:, tile.query_rows, tile.query_columns]
        target.copy_(products.gather(1, tile.entries.expand(products.shape[0], -1)).view_as(target))
    return dots


def _neighbor_sum(keys: torch.Tensor, weights: torch.Tensor, radius: int) -> torch.Tensor:
    """Sum of the neighbours in `keys` by `weights`: (B, H, W, C), (B, H, W, K) → (B, H, W, C)."""
    sums = torch.empty_like(keys, memory_format=torch.contiguous_format)
    for tile in _tiles(keys, radius):
        tile_keys = keys[:, tile.key_rows, tile.key_columns].flatten(1, 2)
        tile_weights = weights[:, tile.query_rows, tile.query_columns].flatten(1)
        num_keys, num_queries = tile_keys.shape[1], tile_weights.shape[1] // weights.shape[3]
        matrix = weights.new_zeros(weights.shape[0], num_keys * num_queries)
        # A reflected neighbour appears several times: its weights add up.
        matrix.scatter_add_(1, tile.entries.expand(weights.shape[0], -1), tile_weights)
        matrix = matrix.to(keys.dtype).view(weights.shape[0], num_keys, num_queries).mT
        target = sums[:, tile.query_rows, tile.query_columns]
        if target.shape[2] == keys.shape[2]:  # whole rows: in place
            target.flatten(1, 2).baddbmm_(matrix, tile_keys, beta=0)
        else:
            target.copy_(_bmm(matrix, tile_keys).view_as(target))
    return sums


def _transpose(weights: torch.Tensor, radius: int) -> torch.Tensor:
    """The weights seen from the neighbours: summing with them is the adjoint of summing with `weights`."""
    _, height, width, _ = weights.shape
    entries = _table(_build_transposition, weights, height, width, radius)
    flat = weights.flatten(1)
    return torch.zeros_like(flat).scatter_add_(1, entries.expand(flat.shape[0], -1), flat).view_as(weights)


class _NeighborDot(torch.autograd.Function):
    """`_neighbor_dot`; without keys, of the queries with themselves, whose derivative is one product, not two."""

    @staticmethod
    def forward(ctx, queries, keys, radius):
        ctx.save_for_backward(queries, keys)
        ctx.radius = radius
        return _neighbor_dot(queries, queries if keys is None else keys, radius)

    @staticmethod
    def backward(ctx, grad):
        queries, keys = ctx.saved_tensors
        transposed = _transpose(grad, ctx.radius)
        if keys is None:
            return _NeighborSum.apply(queries, grad + transposed, ctx.radius), None, None
        grad_queries = _NeighborSum.apply(keys, grad, ctx.radius)
        grad_keys = _NeighborSum.apply(queries, transposed, ctx.radius)
        return grad_queries, grad_keys, None


class _NeighborSum(torch.autograd.Function):
    """`_neighbor_sum`. Weights are float32, or float64 for float64 keys, whatever the dtype of the keys."""

    @staticmethod
    def forward(ctx, keys, weights, radius):
        ctx.save_for_backward(keys, weights)
        ctx.radius = radius
        return _neighbor_sum(keys, weights, radius)

    @staticmethod
    def backward(ctx, grad):
        keys, weights = ctx.saved_tensors
        grad_keys = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_keys = _NeighborSum.apply(grad, _transpose(weights, ctx.radius), ctx.radius)
        if ctx.needs_input_grad[1]:
            grad_weights = _NeighborDot.apply(grad.to(weights.dtype), keys.to(weights.dtype), ctx.radius)
        return grad_keys, grad_weights, None


def _check_tensor(value: torch.Tensor, name: str, device: torch.device | None = None) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor, got {value!r:.100}.")
    if device is not None and value.device != device:
        raise ValueError(f"`{name}` is on {value.device}, but the features are on {device}. Move `{name}` there.")


def _check(features: torch.Tensor, name: str, radius: int) -> None:
    if isinstance(radius, bool) or not isinstance(radius, int) or radius < 1:
        raise ValueError(f"`radius` must be an integer of at least 1, got {radius!r}.")
    _check_tensor(features, name)
    if features.ndim != 4:
        raise ValueError(f"`{name}` must have shape (batch, height, width, channels), got {tuple(features.shape)}.")
    if not features.is_floating_point():
        raise ValueError(f"`{name}` must be a floating-point tensor, got {features.dtype}.")
    _, height, width, _ = features.shape
    if min(height, width) <= radius:
        raise ValueError(
            f"A grid of {height} x {width} positions is too small for radius {radius}: reflection at the borders "
            "needs both sides larger than the radius. Use a smaller radius or larger images."
        )


def _compute_dtype(features: torch.Tensor) -> torch.dtype:
    return torch.promote_types(features.dtype, torch.float32)


def spatial_range_weights(guidance: torch.Tensor, sigma: torch.Tensor, radius: int) -> torch.Tensor:
    """How much each neighbour counts: similarity of the guidance (range) times nearness (space), not renormalised.

        weights[n] = softmax_n(<g, g_n> / √C) · exp(-(u_dy² + u_dx²) / (2σ²)),   n = (dy, dx),   u = linspace(-1, 1, d)

    Formula: FeatUp, https://arxiv.org/abs/2403.10516, with the similarity scaled by the square root of the width.

    Args:
        guidance: `(batch, height, width, channels)`, any floating dtype; both sides of the grid exceed `radius`.
        sigma: 0-dimensional tensor σ, the width of the spatial kernel in units of the window's half side. At 0 the
            centre alone counts, at infinity all positions do alike, both with a zero gradient; -σ is as σ.
        radius: half side of the window, at least 1.

    Returns:
        `(batch, height, width, (2·radius + 1)²)`, neighbours row by row; float32, or float64 for float64 guidance.
        Similarities, softmax and Gaussian are computed in that dtype. Gradients flow to `guidance` and `sigma`.

    Raises:
        ValueError: if the guidance is not a 4-dimensional floating-point tensor, σ is not a real scalar tensor on its
            device, the radius is not a positive integer, or the grid is not larger than the radius.
    """
    _check(guidance, "guidance", radius)
    _check_tensor(sigma, "sigma", guidance.device)
    if sigma.ndim != 0:
        raise ValueError(f"`sigma` must be a 0-dimensional tensor, got shape {tuple(sigma.shape)}.")
    if sigma.is_complex() or sigma.dtype == torch.bool:
        raise ValueError(f"`sigma` must be a real number, got {sigma.dtype}.")
    dtype = _compute_dtype(guidance)
    similarities = _NeighborDot.apply(guidance.to(dtype), None, radius) * guidance.shape[3] ** -0.5
    range_kernel = similarities.softmax(dim=-1)
    u = torch.linspace(-1, 1, 2 * radius + 1, dtype=dtype, device=guidance.device)
    squared_distances = (u[:, None] ** 2 + u**2).flatten()
    width = sigma.to(dtype).abs().clamp(5e-13**0.5, 1e15)  # so that 0 and infinity reach their limits, and not NaN
    spatial_kernel = torch.exp(-squared_distances / (2 * width**2))
    return range_kernel * spatial_kernel


def neighborhood_aggregate(source: torch.Tensor, weights: torch.Tensor, radius: int) -> torch.Tensor:
    """Sum each position's neighbours by its weights:  out = Σ_n weights[n] · source_n.

    Args:
        source: `(batch, height, width, channels)`, any floating dtype; both sides of the grid exceed `radius`.
        weights: `(batch, height, width, (2·radius + 1)²)`, neighbours row by row, any floating dtype.
        radius: half side of the window, at least 1.

    Returns:
        `(batch, height, width, channels)` in the dtype of `source`; half-precision products are accumulated as the
        device's matrix products do, in float32. Gradients flow to `source` and `weights`.

    Raises:
        ValueError: if the source is not a 4-dimensional floating-point tensor, the weights do not fit it or are on
            another device, the radius is not a positive integer, or the grid is not larger than the radius.
    """
    _check(source, "source", radius)
    _check_tensor(weights, "weights", source.device)
    expected = (*source.shape[:3], (2 * radius + 1) ** 2)
    if weights.shape != expected:
        raise ValueError(
            f"`weights` must have shape {tuple(expected)} for radius {radius} and a source of shape "
            f"{tuple(source.shape)}, got {tuple(weights.shape)}."
        )
    if not weights.is_floating_point():
        raise ValueError(f"`weights` must be a floating-point tensor, got {weights.dtype}.")
    return _NeighborSum.apply(source, weights.to(_compute_dtype(source)), radius)


@use_kernel_forward_from_hub("SpatialRangeWeights")
class AureaSpatialRangeWeights(nn.Module):
    """`spatial_range_weights` as a module without parameters, whose place a kernel may take."""

    def forward(self, guidance: torch.Tensor, sigma: torch.Tensor, radius: int) -> torch.Tensor:
        return spatial_range_weights(guidance, sigma, radius)


@use_kernel_forward_from_hub("NeighborhoodAggregate")
class AureaNeighborhoodAggregate(nn.Module):
    """`neighborhood_aggregate` as a module without parameters, whose place a kernel may take."""

    def forward(self, source: torch.Tensor, weights: torch.Tensor, radius: int) -> torch.Tensor:
        return neighborhood_aggregate(source, weights, radius)
