# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The functions as layers that `kernels` puts in the place of a model's modules."""

import torch
from torch import nn

from .functional import neighborhood_aggregate, spatial_range_weights


class SpatialRangeWeights(nn.Module):
    """`spatial_range_weights` as a module without parameters."""

    can_torch_compile: bool = True
    has_backward: bool = True

    def forward(self, guidance: torch.Tensor, sigma: torch.Tensor, radius: int) -> torch.Tensor:
        return spatial_range_weights(guidance, sigma, radius)


class NeighborhoodAggregate(nn.Module):
    """`neighborhood_aggregate` as a module without parameters."""

    can_torch_compile: bool = True
    has_backward: bool = True

    def forward(self, source: torch.Tensor, weights: torch.Tensor, radius: int) -> torch.Tensor:
        return neighborhood_aggregate(source, weights, radius)
