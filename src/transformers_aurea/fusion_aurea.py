# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Fusions: the semantic and the spatial encoder's feature maps become one sequence of visual tokens.

    semantic (B, H, W, Cs) ─┐
                            ├─ AureaFusion ─► (B, num_tokens, output_dim)
    spatial  (B, H, W, Cd) ─┘

`FUSIONS` lists them by name; `register_fusion` adds to it. The published one, `AureaSpatialRangeFusion`:

    semantic (B, H, W, Cs) ── norm, linear ──► (B, H, W, D) ──┐ semantic layers, reading the spatial map
    spatial  (B, H, W, D)  ── norm ───────────────────────────┤
                                      concatenation, 2D ──────┘ joint layers, reading the maps as they came in
                                      linear ──► (B, H·W, 2D)

Each of its layers gathers, for every position, its neighbours in a *source* map; a *guidance* map, the running state
of the stack, decides how much each neighbour counts (`AureaSpatialRangeAttention`). The sources stay fixed.
"""

import math
from inspect import Parameter, signature

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .spatial_range_attention_aurea import AureaNeighborhoodAggregate, AureaSpatialRangeWeights


logger = logging.get_logger(__name__)

FUSIONS: dict[str, type["AureaFusion"]] = {}
# One encoder's features alone, as they were called in version 0.1.
FORMER_FUSIONS = {"semantic": "vision", "spatial": "spatial_vision"}


def register_fusion(name: str, fusion_class: type["AureaFusion"]) -> type["AureaFusion"]:
    """Makes a fusion known by name: `feature_fusion_config={"fusion_type": name}`.

    Raises:
        TypeError: `fusion_class` is no subclass of [`AureaFusion`], declares names otherwise than as a tuple, or a map
            or attentions that its `forward` cannot be asked for.
        ValueError: another class has the name, or it is none.
    """
    if not isinstance(name, str) or not name or name in FORMER_FUSIONS:
        raise ValueError(f"{name!r} is no name for a fusion of yours: choose another.")
    # By name: a folder's fusion derives from the folder's own copy of the class.
    if not (isinstance(fusion_class, type) and "AureaFusion" in {base.__name__ for base in fusion_class.__mro__}):
        raise TypeError(f"A fusion is a subclass of `AureaFusion`, got {fusion_class!r}.")
    for declared in ("kept_in_fp32", "not_quantized", "no_split"):
        names = getattr(fusion_class, declared)
        if not isinstance(names, tuple) or not all(isinstance(one, str) for one in names):
            raise TypeError(f"`{fusion_class.__name__}.{declared}` is a tuple of names, got {names!r}.")
    parameters = signature(fusion_class.forward).parameters
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    for declared, argument in (("gives_map", "return_map"), ("gives_attentions", "output_attentions")):
        if getattr(fusion_class, declared) and argument not in parameters and not takes_any:
            raise TypeError(
                f"{fusion_class.__name__} declares `{declared}`, but its `forward` takes no `{argument}`. Let it, or "
                f"leave `{declared}` out."
            )
    known = FUSIONS.setdefault(name, fusion_class)
    if (known.__module__, known.__qualname__) != (fusion_class.__module__, fusion_class.__qualname__):
        raise ValueError(f"'{name}' is {known.__module__}.{known.__qualname__} already: choose another name.")
    if fusion_class.__module__ == "__main__":
        logger.warning_once(f"The fusion '{name}' cannot be saved from `__main__`: put it into a file of its own.")
    FUSIONS[name] = fusion_class  # a notebook's cell, or a file that was loaded again
    return fusion_class


class AureaFusion(nn.Module):
    """What every fusion is. A subclass makes its layers from the [`AureaConfig`] alone, in `__init__`, sets (or has)

        output_dim (`int`): channels of its tokens, and
        num_tokens (`int`): tokens that it makes of a picture; by default one for each of the first encoder's,

    and declares what others must know about it:

    Attributes:
        needs_map: whether features must be maps. Of a fusion that has no need, `forward` takes tokens `(batch, N,
            channels)` too, class and register tokens among them; `config.feature_shapes` tells which are which.
        needs_one_grid: whether both encoders must give the same rows and columns of patches.
        gives_map: whether `forward` takes `return_map=True` and then returns `(tokens, map)`, the fused map
            `(batch, height, width, channels)` that the feature consistency loss is about.
        gives_attentions: whether `forward` takes `output_attentions=True` and then also returns, last, a tuple with
            the attention weights of each layer, whose first dimension is the batch.
        kept_in_fp32: names of parameters that stay in float32 beside weights of another dtype.
        not_quantized: names of modules whose linear layers stay precise when the model is loaded in 8 or 4 bits.
        no_split: names of classes of modules that are not split over devices.
    """

    needs_map: bool = True
    needs_one_grid: bool = True
    gives_map: bool = False
    gives_attentions: bool = False
    kept_in_fp32: tuple[str, ...] = ()
    not_quantized: tuple[str, ...] = ()
    no_split: tuple[str, ...] = ()
    output_dim: int | None = None
    num_tokens: int | None = None

    def __init__(self, config):
        super().__init__()
        if self.num_tokens is None:
            self.num_tokens = math.prod(config.feature_shapes[0])

    @classmethod
    def encoders(cls, config) -> tuple[str, ...]:
        """Names of the encoders that it needs, among those of `config.encoder_configs`."""
        return ("vision_config", "spatial_vision_config")

    @classmethod
    def validate_config(cls, config) -> None:
        """Raises ValueError, with the values, for an [`AureaConfig`] of which no such fusion can be made."""
        if cls.needs_one_grid and len({*config.grid_sizes}) > 1:
            raise ValueError(
                f"The fusion '{config.feature_fusion_config.fusion_type}' needs one grid, but the semantic encoder "
                f"gives {config.grid_sizes[0]} patches and the spatial encoder {config.grid_sizes[1]}. Choose "
                "`vision_image_size` and `spatial_vision_image_size` so that they agree."
            )

    def token_grid(self, config) -> tuple[int, int] | None:
        """Rows and columns of its tokens, the last of them, over the view of the first of its encoders; None if they
        lie on no grid. By default there is a token for each feature of that encoder, or they lie on none."""
        place = [*config.encoder_configs].index(self.encoders(config)[0])
        return config.grid_sizes[place] if self.num_tokens == math.prod(config.feature_shapes[place]) else None

    def init_weights(self) -> None:
        """Fills parameters that are the fusion's own, with `transformers.initialization`, and none of its layers'."""

    def begin_as(self, single: "AureaNoFusion") -> None:
        """Fills parameters so that the tokens are those of one encoder alone, as `single` gives them, whatever the
        other one shows: what [`AureaForConditionalGeneration.add_encoder`] begins with. Not every fusion can.

        Raises:
            ValueError: with these settings it cannot.
        """
        raise NotImplementedError

    def forward(self, semantic_features: torch.Tensor | None, spatial_features: torch.Tensor | None) -> torch.Tensor:
        """Maps `(batch, height, width, channels)` of any floating dtype, None for an encoder that it does not need →
        tokens `(batch, num_tokens, output_dim)` in the dtype of the weights."""
        raise NotImplementedError


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

    def forward(
        self, source: torch.Tensor, guidance: torch.Tensor, output_attentions: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Two maps `(batch, height, width, dim)` → one and, if asked, the corrected weights `(batch, height, width,
        (2·radius + 1)²)`; ValueError if the grid is not larger than the radius."""
        weights = self.spatial_range_weights(self.range_proj(guidance), self.sigma_spatial.squeeze(0), self.radius)
        weights = weights.to(guidance.dtype)  # (B, H, W, K)
        fixup = self.fixup_proj(torch.cat([weights, guidance], dim=-1))
        weights = weights + weights * fixup.sigmoid()
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-7)
        output = self.output_proj(self.neighborhood_aggregate(source, weights, self.radius))
        return (output, weights) if output_attentions else output


def _dim(config) -> int:
    return config.feature_fusion_config.output_dim or 2 * config.feature_sizes[1]


def _norm(config, size: int) -> nn.Module:
    settings = config.feature_fusion_config
    return nn.LayerNorm(size, eps=settings.layer_norm_eps) if settings.norm_features else nn.Identity()


def _normed(norm: nn.Module, features: torch.Tensor) -> torch.Tensor:
    return norm(features.to(norm.weight.dtype)) if isinstance(norm, nn.LayerNorm) else features


def _begin_stem(single: "AureaNoFusion", norm: nn.Module, weight: torch.Tensor) -> None:
    """Fills a norm and a linear layer's weight (or its columns) with what `single` does to its encoder's features.

    Raises:
        ValueError: one has a norm, and the other has none.
    """
    if single.is_identity == isinstance(norm, nn.LayerNorm):
        raise ValueError(
            f"`feature_fusion_config.norm_features` must be {not single.is_identity} here: the features of the first "
            f"encoder are {'not ' if single.is_identity else ''}normalised so far."
        )
    if single.is_identity:
        weight.copy_(torch.eye(len(weight)))
    else:
        norm.load_state_dict(single.get_submodule(single.norm_name).state_dict())
        weight.copy_(single.output_proj.weight)


def _refined(layers, source: torch.Tensor, features: torch.Tensor, attentions: list | None) -> torch.Tensor:
    """A map after layers with their residuals, whose weights go into `attentions`."""
    for layer in layers:
        added = layer(source, features, output_attentions=attentions is not None)
        if attentions is not None:
            added, weights = added
            attentions.append(weights)
        features = added + features
    return features


def _check_grids(semantic_features: torch.Tensor, spatial_features: torch.Tensor) -> None:
    if semantic_features.ndim != 4 or semantic_features.shape[:3] != spatial_features.shape[:3]:
        raise ValueError(
            "The fusion needs two maps (batch, height, width, channels) on one grid, got semantic features of shape "
            f"{tuple(semantic_features.shape)} and spatial features of shape {tuple(spatial_features.shape)}."
        )


class AureaSpatialRangeFusion(AureaFusion):
    """The published fusion: spatial-range attention refines the semantic map, then both maps together.

    `depth` stages of two layers in each of the two stacks, windows of `radius`; `output_dim` is twice the spatial
    encoder's channels. https://github.com/Dcas89/Aurea
    """

    gives_map = True
    gives_attentions = True
    kept_in_fp32 = ("sigma_spatial",)
    not_quantized = ("fixup_proj",)  # small networks, whose widths no group of weights divides
    no_split = ("AureaSpatialRangeAttention",)

    def __init__(self, config):
        super().__init__(config)
        settings = config.feature_fusion_config
        semantic_dim, spatial_dim = config.feature_sizes
        self.output_dim = 2 * spatial_dim
        self.semantic_norm = nn.LayerNorm(semantic_dim, eps=settings.layer_norm_eps)
        self.spatial_norm = nn.LayerNorm(spatial_dim, eps=settings.layer_norm_eps)
        self.semantic_proj = nn.Linear(semantic_dim, spatial_dim, bias=False)
        self.semantic_layers, self.joint_layers = (
            nn.ModuleList(AureaSpatialRangeAttention(dim, settings.radius) for _ in range(2 * settings.depth))
            for dim in (spatial_dim, self.output_dim)
        )
        self.output_proj = nn.Linear(self.output_dim, self.output_dim, bias=False)

    @classmethod
    def validate_config(cls, config) -> None:
        super().validate_config(config)
        output_dim = config.feature_fusion_config.output_dim
        if output_dim not in (None, 2 * config.feature_sizes[1]):
            raise ValueError(
                f"`feature_fusion_config.output_dim` is {output_dim}, but the fusion 'spatial_range' has twice the "
                f"channels of the spatial encoder, {2 * config.feature_sizes[1]}. Leave it out."
            )
        grid, radius = config.grid_sizes[0], config.feature_fusion_config.radius
        if min(grid) <= radius:
            raise ValueError(
                f"The grid of {grid} patches must be larger than `feature_fusion_config.radius` ({radius}) on both "
                "sides. Use larger pictures or a smaller radius."
            )

    def init_weights(self) -> None:
        for layer in (*self.semantic_layers, *self.joint_layers):
            init.ones_(layer.sigma_spatial)

    def forward(
        self, semantic_features, spatial_features, return_map: bool = False, output_attentions: bool = False
    ) -> torch.Tensor | tuple:
        """See [`AureaFusion`]; ValueError if the grids differ, or are not larger than the radius."""
        _check_grids(semantic_features, spatial_features)
        dtype = self.spatial_norm.weight.dtype
        # A matrix, lest an 8-bit layer gives a view: see `AureaMultiModalProjector`.
        semantic = self.semantic_proj(self.semantic_norm(semantic_features.to(dtype)).flatten(0, 2))
        semantic = semantic.unflatten(0, semantic_features.shape[:3])  # (B, H, W, D)
        spatial = self.spatial_norm(spatial_features.to(dtype))
        joint_source = torch.cat([spatial, semantic], dim=-1)  # (B, H, W, 2D)
        attentions = [] if output_attentions else None
        semantic = _refined(self.semantic_layers, spatial, semantic, attentions)
        joint = _refined(self.joint_layers, joint_source, torch.cat([spatial, semantic], dim=-1), attentions)
        tokens = self.output_proj(joint.flatten(1, 2))  # (B, H·W, 2D)
        extras = ([joint] if return_map else []) + ([tuple(attentions)] if output_attentions else [])
        return (tokens, *extras) if extras else tokens


class AureaConcatFusion(AureaFusion):
    """Both maps, normalised, side by side: `x = W [LN(d); LN(s)]`, one token for each position.

    Without `norm_features` and `project_output` it is the plain `x = [d; s]` of Prismatic VLMs
    (https://arxiv.org/abs/2402.07865). Hard to beat at scale: https://arxiv.org/abs/2408.15998.
    """

    gives_map = True

    def __init__(self, config):
        super().__init__(config)
        semantic_dim, spatial_dim = config.feature_sizes
        self.spatial_norm = _norm(config, spatial_dim)
        self.semantic_norm = _norm(config, semantic_dim)
        self.output_dim, self.output_proj = spatial_dim + semantic_dim, None
        if config.feature_fusion_config.project_output:
            self.output_dim = _dim(config)
            self.output_proj = nn.Linear(spatial_dim + semantic_dim, self.output_dim, bias=False)

    @classmethod
    def validate_config(cls, config) -> None:
        super().validate_config(config)
        settings, total = config.feature_fusion_config, sum(config.feature_sizes)
        if not settings.project_output and settings.output_dim not in (None, total):
            raise ValueError(
                f"`feature_fusion_config.output_dim` is {settings.output_dim}, but without `project_output` tokens "
                f"of 'concat' have the channels of both encoders, {total}. Leave one of the two out."
            )

    @torch.no_grad()
    def begin_as(self, single: "AureaNoFusion") -> None:
        """See [`AureaFusion`]: the other encoder's columns of `W` are zero."""
        if self.output_proj is None:
            raise ValueError("`feature_fusion_config.project_output` must be True, for its zeros hide an encoder.")
        weight = self.output_proj.weight.zero_()
        sizes = (weight.shape[1] - single.feature_size, single.feature_size)
        if single.norm_name == "semantic_norm":
            _begin_stem(single, self.semantic_norm, weight.split(sizes, dim=1)[1])
        else:
            _begin_stem(single, self.spatial_norm, weight.split(sizes[::-1], dim=1)[0])

    def forward(
        self, semantic_features: torch.Tensor, spatial_features: torch.Tensor, return_map: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See [`AureaFusion`]; ValueError if the grids differ. The map is the one before the linear layer."""
        _check_grids(semantic_features, spatial_features)
        spatial = _normed(self.spatial_norm, spatial_features)
        joint = torch.cat([spatial, _normed(self.semantic_norm, semantic_features)], dim=-1)
        tokens = joint.flatten(1, 2)  # (B, H·W, both encoders' channels)
        tokens = tokens if self.output_proj is None else self.output_proj(tokens)
        return (tokens, joint) if return_map else tokens


class AureaResidualFusion(AureaFusion):
    """One encoder's map, to which the other's is added behind a gate that begins at zero:

        x = W₀ LN(s) + tanh(g) · W₁ LN(d)

    `encoder` names the one that leads, `s`. The gate is Flamingo's: https://arxiv.org/abs/2204.14198.
    """

    gives_map = True

    def __init__(self, config):
        super().__init__(config)
        settings, sizes = config.feature_fusion_config, config.feature_sizes
        self.is_led_by_semantic = settings.encoder == "vision"
        size, added_size = sizes if self.is_led_by_semantic else sizes[::-1]
        self.output_dim = settings.output_dim or size
        self.norm = _norm(config, size)
        self.proj = nn.Linear(size, self.output_dim, bias=False)
        self.added_norm = nn.LayerNorm(added_size, eps=settings.layer_norm_eps)
        self.added_proj = nn.Linear(added_size, self.output_dim, bias=False)
        self.gate = nn.Parameter(torch.zeros(self.output_dim))

    def init_weights(self) -> None:
        init.zeros_(self.gate)

    @torch.no_grad()
    def begin_as(self, single: "AureaNoFusion") -> None:
        """See [`AureaFusion`]: the gate is zero."""
        if self.is_led_by_semantic != (single.norm_name == "semantic_norm"):
            raise ValueError("`feature_fusion_config.encoder` must name the encoder that was there before.")
        _begin_stem(single, self.norm, self.proj.weight)
        self.gate.zero_()

    def forward(
        self, semantic_features: torch.Tensor, spatial_features: torch.Tensor, return_map: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See [`AureaFusion`]; ValueError if the grids differ. The map is that of the tokens."""
        _check_grids(semantic_features, spatial_features)
        maps = (semantic_features, spatial_features)
        features, added = maps if self.is_led_by_semantic else maps[::-1]
        added = self.added_proj(_normed(self.added_norm, added).flatten(1, 2))
        tokens = self.proj(_normed(self.norm, features).flatten(1, 2)) + self.gate.tanh() * added
        return (tokens, tokens.unflatten(1, features.shape[1:3])) if return_map else tokens


class AureaInterleaveFusion(AureaFusion):
    """Tokens of both encoders in turn, each after a norm and a linear layer of its own:

        x = (W₀ LN(s₁), W₁ LN(d₁), W₀ LN(s₂), W₁ LN(d₂), …)

    Of two grids that differ, each token stands where its share of the sequence puts it. https://arxiv.org/abs/2401.06209
    """

    needs_map = False
    needs_one_grid = False

    def __init__(self, config):
        super().__init__(config)
        settings = config.feature_fusion_config
        semantic_dim, spatial_dim = config.feature_sizes
        self.output_dim = _dim(config)
        self.num_tokens = sum(math.prod(shape) for shape in config.feature_shapes)
        self.semantic_norm = nn.LayerNorm(semantic_dim, eps=settings.layer_norm_eps)
        self.spatial_norm = nn.LayerNorm(spatial_dim, eps=settings.layer_norm_eps)
        self.semantic_proj = nn.Linear(semantic_dim, self.output_dim, bias=False)
        self.spatial_proj = nn.Linear(spatial_dim, self.output_dim, bias=False)

    def forward(self, semantic_features: torch.Tensor, spatial_features: torch.Tensor) -> torch.Tensor:
        """See [`AureaFusion`]; there are as many tokens as both encoders have together."""
        dtype = self.semantic_norm.weight.dtype
        semantic = self.semantic_proj(self.semantic_norm(semantic_features.to(dtype)).flatten(1, -2))
        spatial = self.spatial_proj(self.spatial_norm(spatial_features.to(dtype)).flatten(1, -2))
        places = [(torch.arange(n, device=semantic.device) + 0.5) / n for n in (semantic.shape[1], spatial.shape[1])]
        order = torch.cat(places).argsort(stable=True)  # of equals, the semantic one first
        return torch.cat([semantic, spatial], dim=1)[:, order]


class AureaFusionAttention(nn.Module):
    """Multi-head attention of tokens `(batch, N, dim)` to others `(batch, M, source_dim)`, with its output's residual
    left to the caller."""

    def __init__(self, dim: int, source_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(source_dim, dim, bias=False)
        self.v_proj = nn.Linear(source_dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, tokens: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        states = self.q_proj(tokens), self.k_proj(source), self.v_proj(source)
        heads = (self._split(state) for state in states)
        return self.o_proj(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    def weights(self, tokens: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """How much each token looks at each of the others: `(batch, heads, N, M)`, in float32."""
        query, key = self._split(self.q_proj(tokens)).float(), self._split(self.k_proj(source)).float()
        return (query @ key.mT * query.shape[-1] ** -0.5).softmax(dim=-1)

    def _split(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _validate_heads(config) -> None:
    dim = _dim(config)
    num_heads = config.feature_fusion_config.num_heads_for(dim)
    if dim % num_heads:
        raise ValueError(
            f"`feature_fusion_config.num_attention_heads` ({num_heads}) must divide the channels of the fused tokens "
            f"({dim}, see `output_dim`)."
        )


class AureaCrossAttentionFusion(AureaFusion):
    """The semantic encoder's tokens ask, the spatial encoder's answer, `depth` times:

        x ← W LN(s);   x ← x + Attention(LN(x), LN(d))

    Helps small language models: https://arxiv.org/abs/2509.00664.
    """

    needs_map = False
    needs_one_grid = False
    gives_attentions = True

    def __init__(self, config):
        super().__init__(config)
        settings = config.feature_fusion_config
        semantic_dim, spatial_dim = config.feature_sizes
        dim = self.output_dim = _dim(config)
        num_heads = settings.num_heads_for(dim)
        self.semantic_norm = _norm(config, semantic_dim)
        self.spatial_norm = nn.LayerNorm(spatial_dim, eps=settings.layer_norm_eps)
        self.semantic_proj = nn.Linear(semantic_dim, dim, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=settings.layer_norm_eps) for _ in range(settings.depth))
        self.layers = nn.ModuleList(AureaFusionAttention(dim, spatial_dim, num_heads) for _ in range(settings.depth))

    @classmethod
    def validate_config(cls, config) -> None:
        _validate_heads(config)

    @torch.no_grad()
    def begin_as(self, single: "AureaNoFusion") -> None:
        """See [`AureaFusion`]: the attention's output is zero."""
        if single.norm_name != "semantic_norm":
            raise ValueError("The spatial encoder answers in 'cross_attention', and was alone so far.")
        _begin_stem(single, self.semantic_norm, self.semantic_proj.weight)
        for layer in self.layers:
            layer.o_proj.weight.zero_()

    def forward(
        self, semantic_features: torch.Tensor, spatial_features: torch.Tensor, output_attentions: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """See [`AureaFusion`]; there are as many tokens as the semantic encoder has. Attentions are `(batch, heads,
        semantic tokens, spatial tokens)`."""
        tokens = self.semantic_proj(_normed(self.semantic_norm, semantic_features).flatten(1, -2))
        source = _normed(self.spatial_norm, spatial_features).flatten(1, -2)
        attentions = []
        for norm, layer in zip(self.norms, self.layers):
            normed = norm(tokens)
            if output_attentions:
                attentions.append(layer.weights(normed, source))
            tokens = tokens + layer(normed, source)
        return (tokens, tuple(attentions)) if output_attentions else tokens


class AureaSpatialVisionAggregator(AureaFusion):
    """Learnable queries on a coarse grid, each of which looks at its window in both encoders' maps, `depth` times:

        x_ij ← q_ij;   x_ij ← x_ij + Attention(LN(x_ij), [W₀ LN(s); W₁ LN(d)] in window ij)

    `query_grid` rows and columns of queries divide both encoders' grids; half the semantic encoder's unless given.
    Cambrian-1's aggregator: https://arxiv.org/abs/2406.16860.
    """

    needs_one_grid = False

    def __init__(self, config):
        super().__init__(config)
        settings = config.feature_fusion_config
        dim = self.output_dim = _dim(config)
        self.query_grid = settings.query_grid_for(config.grid_sizes[0])
        self.num_tokens = math.prod(self.query_grid)
        self.queries = nn.Parameter(torch.randn(self.num_tokens, dim) * dim**-0.5)
        self.source_norms = nn.ModuleList(nn.LayerNorm(n, eps=settings.layer_norm_eps) for n in config.feature_sizes)
        self.source_projs = nn.ModuleList(nn.Linear(size, dim, bias=False) for size in config.feature_sizes)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=settings.layer_norm_eps) for _ in range(settings.depth))
        num_heads = settings.num_heads_for(dim)
        self.layers = nn.ModuleList(AureaFusionAttention(dim, dim, num_heads) for _ in range(settings.depth))

    @classmethod
    def validate_config(cls, config) -> None:
        _validate_heads(config)
        queries = config.feature_fusion_config.query_grid_for(config.grid_sizes[0])
        for grid in config.grid_sizes:
            if min(queries) < 1 or any(side % number for side, number in zip(grid, queries)):
                raise ValueError(
                    f"`feature_fusion_config.query_grid` {queries} must divide the encoders' grids of patches, "
                    f"{config.grid_sizes[0]} and {config.grid_sizes[1]}."
                )

    def init_weights(self) -> None:
        init.normal_(self.queries, std=self.output_dim**-0.5)

    def token_grid(self, config) -> tuple[int, int]:
        return self.query_grid

    def _windows(self, features: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) → (B · queries, patches of a window, C)"""
        rows, columns = self.query_grid
        batch_size, height, width, channels = features.shape
        windows = features.view(batch_size, rows, height // rows, columns, width // columns, channels)
        return windows.transpose(2, 3).reshape(batch_size * self.num_tokens, -1, channels)

    def forward(self, semantic_features: torch.Tensor, spatial_features: torch.Tensor) -> torch.Tensor:
        """See [`AureaFusion`]."""
        maps = (semantic_features, spatial_features)
        parts = zip(maps, self.source_norms, self.source_projs)
        sources = [proj(norm(self._windows(features.to(norm.weight.dtype)))) for features, norm, proj in parts]
        source = torch.cat(sources, dim=1)  # (B · queries, patches of both windows, D)
        tokens = self.queries.repeat(semantic_features.shape[0], 1)[:, None]  # (B · queries, 1, D)
        for norm, layer in zip(self.norms, self.layers):
            tokens = tokens + layer(norm(tokens), source)
        return tokens.view(-1, self.num_tokens, self.output_dim)


class AureaNoFusion(AureaFusion):
    """One encoder alone, that of `feature_fusion_config.encoder`; the other is not there, unless composed with it.

    Its features as they are or, with an `output_dim`, `x = W LN(s)`.
    """

    needs_map = False
    needs_one_grid = False
    gives_map = True

    def __init__(self, config):
        super().__init__(config)
        settings = config.feature_fusion_config
        [place] = (idx for idx, name in enumerate(config.encoder_configs) if name in self.encoders(config))
        self.num_tokens = math.prod(config.feature_shapes[place])
        self.feature_size = config.feature_sizes[place]
        self.output_dim = settings.output_dim or self.feature_size
        self.norm_name = {"vision": "semantic_norm", "spatial_vision": "spatial_norm"}[settings.encoder]
        self.is_identity = settings.output_dim is None
        if not self.is_identity:
            self.add_module(self.norm_name, nn.LayerNorm(self.feature_size, eps=settings.layer_norm_eps))
            self.output_proj = nn.Linear(self.feature_size, self.output_dim, bias=False)

    @classmethod
    def encoders(cls, config) -> tuple[str, ...]:
        return (f"{config.feature_fusion_config.encoder}_config",)

    def forward(
        self, semantic_features: torch.Tensor | None, spatial_features: torch.Tensor | None, return_map: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """See [`AureaFusion`]; one of the two is read. The map is the one before the linear layer."""
        features = semantic_features if self.norm_name == "semantic_norm" else spatial_features
        if not self.is_identity:
            norm = self.get_submodule(self.norm_name)
            features = norm(features.to(norm.weight.dtype))
        tokens = features.flatten(1, -2)  # (B, N, C)
        tokens = tokens if self.is_identity else self.output_proj(tokens)
        return (tokens, features) if return_map else tokens


register_fusion("spatial_range", AureaSpatialRangeFusion)
register_fusion("concat", AureaConcatFusion)
register_fusion("residual", AureaResidualFusion)
register_fusion("interleave", AureaInterleaveFusion)
register_fusion("cross_attention", AureaCrossAttentionFusion)
register_fusion("sva", AureaSpatialVisionAggregator)
register_fusion("none", AureaNoFusion)

__all__ = ["FUSIONS", "AureaFusion", "AureaSpatialRangeAttention", "AureaSpatialRangeFusion", "register_fusion"]
