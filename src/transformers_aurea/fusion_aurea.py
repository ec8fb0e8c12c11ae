# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Fusions: the semantic and the spatial encoder's feature maps become one sequence of visual tokens.

    semantic (B, H, W, Cs) ── norm, linear ──► (B, H, W, D) ──┐ semantic layers, reading the spatial map
    spatial  (B, H, W, D)  ── norm ───────────────────────────┤
                                      concatenation, 2D ──────┘ joint layers, reading the maps as they came in
                                      linear ──► (B, H·W, 2D)

Each layer of `AureaSpatialRangeFusion` gathers, for every position, its neighbours in a *source* map; a *guidance*
map, the running state of the stack, decides how much each neighbour counts (`AureaSpatialRangeAttention`). The sources
stay fixed. A fusion takes plain numbers, so that it can live in any model; `FUSIONS` lists them by name. All of them
need the two maps on one grid and have `output_dim` channels.
"""

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .spatial_range_attention_aurea import AureaNeighborhoodAggregate, AureaSpatialRangeWeights


class AureaPointwiseProjection(nn.Module):
    """Linear, LayerNorm, activation, linear at each position. The norm's statistics are float32 in every dtype.

    Maps `(batch, height, width, channels)` pass as tokens, which is what quantised linear layers take, and in the
    norm's dtype.
    """

    def __init__(self, input_dim: int, output_dim: int, activation: nn.Module):
        super().__init__()
        self.fc1 = nn.Linear(input_dim, output_dim)
        self.norm = nn.LayerNorm(output_dim, eps=1e-6)
        self.activation = activation
        self.fc2 = nn.Linear(output_dim, output_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        tokens = features.flatten(1, 2).to(self.norm.weight.dtype)
        tokens = self.fc2(self.activation(self.norm(self.fc1(tokens))))
        return tokens.unflatten(1, features.shape[1:3])


class AureaSpatialRangeAttention(GradientCheckpointingLayer):
    """Attention over the neighbourhood of each position, with weights that a small network corrects before use.

    The residual is the caller's. `sigma_spatial`, the width of the spatial kernel, may stay float32 beside weights of
    another dtype: the weights are computed in at least float32 anyway.

    Formula: FeatUp's joint bilateral upsampler (https://arxiv.org/abs/2403.10516) without the upsampling.

    Args:
        dim: channels of source and guidance.
        radius: half side of the window; the grid must be larger.
    """

    def __init__(self, dim: int, radius: int):
        super().__init__()
        self.radius = radius
        num_neighbors = (2 * radius + 1) ** 2
        self.range_proj = AureaPointwiseProjection(dim, dim, nn.SiLU())
        self.fixup_proj = AureaPointwiseProjection(num_neighbors + dim, num_neighbors, nn.SiLU())
        self.output_proj = AureaPointwiseProjection(dim, dim, nn.Identity())
        self.sigma_spatial = nn.Parameter(torch.ones(1, dtype=torch.float32))  # FSDP2 shards no 0-dimensional one
        self.spatial_range_weights = AureaSpatialRangeWeights()
        self.neighborhood_aggregate = AureaNeighborhoodAggregate()

    def forward(self, source: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """Two maps of `(batch, height, width, dim)` → one; ValueError if the grid is not larger than the radius."""
        weights = self.spatial_range_weights(self.range_proj(guidance), self.sigma_spatial.squeeze(0), self.radius)
        weights = weights.to(guidance.dtype)  # (B, H, W, K)
        fixup = self.fixup_proj(torch.cat([weights, guidance], dim=-1))
        weights = weights + weights * fixup.sigmoid()
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-7)
        return self.output_proj(self.neighborhood_aggregate(source, weights, self.radius))


def _check_grids(semantic_features: torch.Tensor, spatial_features: torch.Tensor) -> None:
    if semantic_features.ndim != 4 or semantic_features.shape[:3] != spatial_features.shape[:3]:
        raise ValueError(
            "The fusion needs two maps (batch, height, width, channels) on one grid, got semantic features of shape "
            f"{tuple(semantic_features.shape)} and spatial features of shape {tuple(spatial_features.shape)}."
        )


class AureaSpatialRangeFusion(nn.Module):
    """The published fusion: spatial-range attention refines the semantic map, then both maps together.

    Args:
        semantic_dim: channels of the semantic features.
        spatial_dim: channels D of the spatial features; the output has 2D.
        depth: stages of each of the two stacks; a stage is two layers.
        radius: half side of the attention window; the grid must be larger.
        layer_norm_eps: epsilon of the norms of the input features.
    """

    def __init__(self, semantic_dim: int, spatial_dim: int, depth: int, radius: int, layer_norm_eps: float = 1e-5):
        super().__init__()
        self.output_dim = 2 * spatial_dim
        self.semantic_norm = nn.LayerNorm(semantic_dim, eps=layer_norm_eps)
        self.spatial_norm = nn.LayerNorm(spatial_dim, eps=layer_norm_eps)
        self.semantic_proj = nn.Linear(semantic_dim, spatial_dim, bias=False)
        self.semantic_layers = nn.ModuleList(AureaSpatialRangeAttention(spatial_dim, radius) for _ in range(2 * depth))
        self.joint_layers = nn.ModuleList(
            AureaSpatialRangeAttention(self.output_dim, radius) for _ in range(2 * depth)
        )
        self.output_proj = nn.Linear(self.output_dim, self.output_dim, bias=False)

    def forward(
        self, semantic_features: torch.Tensor, spatial_features: torch.Tensor, return_map: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Maps of one grid → tokens `(batch, height·width, output_dim)`, in the dtype of the weights.

        Args:
            semantic_features: `(batch, height, width, semantic_dim)`, any floating dtype.
            spatial_features: `(batch, height, width, spatial_dim)`, any floating dtype.
            return_map: also give the fused map before its last linear layer, `(batch, height, width, channels)`.

        Raises:
            ValueError: if the grids differ, or are not larger than the radius.
        """
        _check_grids(semantic_features, spatial_features)
        dtype = self.spatial_norm.weight.dtype
        # A matrix, lest an 8-bit layer gives a view: see `AureaMultiModalProjector`.
        semantic = self.semantic_proj(self.semantic_norm(semantic_features.to(dtype)).flatten(0, 2))
        semantic = semantic.unflatten(0, semantic_features.shape[:3])  # (B, H, W, D)
        spatial = self.spatial_norm(spatial_features.to(dtype))
        joint_source = torch.cat([spatial, semantic], dim=-1)  # (B, H, W, 2D)
        for layer in self.semantic_layers:
            semantic = layer(spatial, semantic) + semantic
        joint = torch.cat([spatial, semantic], dim=-1)
        for layer in self.joint_layers:
            joint = layer(joint_source, joint) + joint
        tokens = self.output_proj(joint.flatten(1, 2))  # (B, H·W, 2D)
        return (tokens, joint) if return_map else tokens


class AureaConcatFusion(nn.Module):
    """The plain alternative: both maps, normalised, side by side, and one linear layer. Looks at no neighbours.

    Takes the arguments of `AureaSpatialRangeFusion`; depth and radius mean nothing here.
    """

    encoders = ("spatial", "semantic")

    def __init__(self, semantic_dim: int, spatial_dim: int, depth: int, radius: int, layer_norm_eps: float = 1e-5):
        super().__init__()
        self.output_dim = 2 * spatial_dim
        dims = {"spatial": spatial_dim, "semantic": semantic_dim}
        for encoder in self.encoders:
            self.add_module(f"{encoder}_norm", nn.LayerNorm(dims[encoder], eps=layer_norm_eps))
        self.output_proj = nn.Linear(sum(dims[encoder] for encoder in self.encoders), self.output_dim, bias=False)

    def forward(
        self, semantic_features: torch.Tensor, spatial_features: torch.Tensor, return_map: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Maps of one grid → tokens `(batch, height·width, output_dim)`; ValueError if the grids differ.

        With `return_map` also the joint map `(batch, height, width, channels)` before the linear layer.
        """
        _check_grids(semantic_features, spatial_features)
        maps = {"spatial": spatial_features, "semantic": semantic_features}
        norms = {encoder: self.get_submodule(f"{encoder}_norm") for encoder in self.encoders}
        joint = torch.cat([norm(maps[encoder].to(norm.weight.dtype)) for encoder, norm in norms.items()], dim=-1)
        tokens = self.output_proj(joint.flatten(1, 2))  # (B, H·W, 2D)
        return (tokens, joint) if return_map else tokens


class AureaSemanticFusion(AureaConcatFusion):
    """No fusion: the semantic encoder's map alone, normalised, and one linear layer. A baseline of comparisons.

    The spatial encoder runs, but is not used: freeze it, lest several processes wait for its gradients.
    """

    encoders = ("semantic",)


class AureaSpatialFusion(AureaConcatFusion):
    """No fusion: the spatial encoder's map alone. As [`AureaSemanticFusion`], with the encoders' parts exchanged."""

    encoders = ("spatial",)


FUSIONS = {
    "spatial_range": AureaSpatialRangeFusion,
    "concat": AureaConcatFusion,
    "semantic": AureaSemanticFusion,
    "spatial": AureaSpatialFusion,
}
