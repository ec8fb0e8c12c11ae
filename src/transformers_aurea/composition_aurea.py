# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Composition: the semantic encoder reads the spatial one while it looks, layer by layer.

    spatial encoder   layer M/n ──────┐      layer 2M/n ─────┐       …
                                  mapping                mapping
    semantic encoder  layer N/n ─► composition ─► … 2N/n ─► composition ─► …  its features

Both may stay frozen: what trains is the composition. Of n of them, the i-th stands after layer i·N/n of the semantic
encoder's N, those whose features are read, and hands its result to the next layer; it reads the hidden states after
layer i·M/n of the spatial encoder's M.
"Composition to Augment Language Models" for two vision encoders: https://arxiv.org/abs/2401.02412
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .configuration_aurea import AureaConfig
from .fusion_aurea import AureaFusionAttention
from .vision_encoder_aurea import AureaVisionEncoderMixin
from .weaving_aurea import copy_on_meta, layers_of, woven_class


class AureaAttentionMapping(nn.Module):
    """`y = W s;  y + Attention(LN(y), LN(y))` over the tokens of one picture."""

    def __init__(self, source_dim: int, dim: int, num_heads: int, eps: float):
        super().__init__()
        self.proj = nn.Linear(source_dim, dim)
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.self_attn = AureaFusionAttention(dim, dim, num_heads)

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        states = self.proj(source)
        normed = self.norm(states)
        return states + self.self_attn(normed, normed)


class AureaCompositionLayer(nn.Module):
    """One composition, `m` being the mapped hidden states of the spatial encoder, `m = mapping(LN(d))`:

        cross_attention   x ← x + Attention(LN(x), m)
        gated_attention   a = Attention(LN(x), m);  x ← x + sigmoid(W [LN(x); a]) · a
        simple_add        x ← x + W m,  patch by patch, on one grid

    The norm stands before the attention, so that where its last layer is zero, the encoder is itself.

    Args:
        config: the model's, with a `composition_config`.

    Attributes:
        zero_layers: names of the layers that begin with zeros where a model is made of parts.
    """

    zero_layers = ("cross_attn.o_proj", "output_proj")

    def __init__(self, config: AureaConfig):
        super().__init__()
        settings = config.composition_config
        source_dim, dim = config.spatial_vision_config.hidden_size, config.vision_config.hidden_size
        num_heads, eps = settings.num_attention_heads, settings.layer_norm_eps
        self.source_norm = nn.LayerNorm(source_dim, eps=eps)
        self.mapping = {
            "linear": lambda: nn.Linear(source_dim, dim),
            "mlp": lambda: nn.Sequential(nn.Linear(source_dim, dim), nn.GELU(), nn.Linear(dim, dim)),
            "attention": lambda: AureaAttentionMapping(source_dim, dim, num_heads, eps),
        }[settings.mapping_type]()
        self.num_patches = None
        if settings.composition_type == "simple_add":
            self.output_proj = nn.Linear(dim, dim, bias=False)
            rows, columns = config.grid_sizes[0]
            self.num_patches = rows * columns
            return
        self.norm = nn.LayerNorm(dim, eps=eps)
        self.cross_attn = AureaFusionAttention(dim, dim, num_heads)
        is_gated = settings.composition_type == "gated_attention"
        self.gate_proj = nn.Linear(2 * dim, dim) if is_gated else None

    def forward(self, hidden_states: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        """`(images, tokens, C)` and the spatial encoder's `(images, its tokens, its C)`, class and register tokens
        among them → as the first, in its dtype."""
        dtype = self.source_norm.weight.dtype
        mapped = self.mapping(self.source_norm(source.to(dtype)))
        if self.num_patches is not None:  # class tokens come first, and stay
            others = hidden_states.shape[1] - self.num_patches
            added = self.output_proj(mapped[:, -self.num_patches :])
            added = nn.functional.pad(added, (0, 0, others, 0))
            return hidden_states + added.to(hidden_states.dtype)
        normed = self.norm(hidden_states.to(dtype))
        added = self.cross_attn(normed, mapped)
        if self.gate_proj is not None:
            added = self.gate_proj(torch.cat([normed, added], dim=-1)).sigmoid() * added
        return hidden_states + added.to(hidden_states.dtype)


class AureaComposition(nn.Module):
    """The compositions of a model, and where they stand.

    Args:
        config: the model's, with a `composition_config`.
        encoder: the semantic encoder, whose layers are woven in place.

    Raises:
        ValueError: what the compositions read does not reach the encoder's layers.
    """

    def __init__(self, config: AureaConfig, encoder: PreTrainedModel):
        super().__init__()
        self.positions = config.composition_positions
        self.layers = nn.ModuleList(AureaCompositionLayer(config) for _ in self.positions)
        _, layers = layers_of(encoder) or (None, ())
        for idx, layer in enumerate(layers):
            layer.__class__ = woven_class(AureaComposedLayerMixin, type(layer))
            layer.composition_position = idx + 1
        _check_carries_compositions(encoder)

    def over(self, spatial_hidden_states: tuple[torch.Tensor, ...]) -> dict:
        """As the argument `compositions` of the semantic encoder's forward: what is done after which of its layers,
        of the spatial encoder's hidden states, embeddings first."""
        return {
            position: (layer, spatial_hidden_states[source])
            for layer, (position, source) in zip(self.layers, self.positions)
        }


class AureaComposedLayerMixin:
    """A layer of the semantic encoder, after which a composition may stand."""

    composition_position: int

    def forward(self, hidden_states: torch.Tensor, *args, compositions: dict | None = None, **kwargs):
        output = super().forward(hidden_states, *args, **kwargs)
        if compositions is None or self.composition_position not in compositions:
            return output
        layer, source = compositions[self.composition_position]
        if isinstance(output, tuple):
            return (layer(output[0], source), *output[1:])
        return layer(output, source)


class _Witness(nn.Module):
    """In the place of a composition: tells that it was reached."""

    is_reached = False

    def forward(self, hidden_states: torch.Tensor, source: None) -> torch.Tensor:
        self.is_reached = True
        return hidden_states


@torch.no_grad()
def _check_carries_compositions(encoder: AureaVisionEncoderMixin) -> None:
    """Lets a copy of the encoder without weights look at a picture without pixels.

    Raises:
        ValueError: compositions do not reach all its layers.
    """
    depth, reason = encoder.config.num_hidden_layers, None
    witnesses = {position: _Witness() for position in range(1, depth + 1)}
    compositions = {position: (witness, None) for position, witness in witnesses.items()}
    model = copy_on_meta(encoder)
    pixels = torch.empty(1, 3, *model.view.size, dtype=model.dtype, device="meta")
    try:
        model(pixels, compositions=compositions, **model.own_arguments(pixels, trains=False))
    except (TypeError, RuntimeError) as error:  # it does not know the keyword, or cannot do without data
        reason = error
    if not all(witness.is_reached for witness in witnesses.values()):
        raise ValueError(
            f"`vision_config` is of type '{encoder.config.model_type}', whose {type(encoder).__name__} was not seen "
            f"to hand keyword arguments on to its {depth} layers: nothing could be composed with them. Choose another "
            "semantic encoder (SigLIP, CLIP, ViT, DINOv2, … fit), or leave `composition_config` out."
        ) from reason


def look_through(
    semantic_encoder: AureaVisionEncoderMixin | None,
    spatial_encoder: AureaVisionEncoderMixin | None,
    composition: AureaComposition | None,
    pixel_values: torch.Tensor,
    **kwargs,
) -> list[tuple[ModelOutput | None, torch.Tensor | None]]:
    """Outputs and features of both encoders, as `AureaVisionEncoderMixin.encode` gives them; None of an absent one."""
    if composition is not None:
        outputs, features = spatial_encoder.encode(pixel_values, **kwargs | {"output_hidden_states": True})
        *hidden_states, last = outputs.hidden_states
        if features.requires_grad:
            last = last + 0 * features.sum()  # a fusion may not read them: what they hang on takes part with nothing
        compositions = composition.over((*hidden_states, last))
        if not kwargs.get("output_hidden_states", spatial_encoder.config.output_hidden_states):
            outputs = replace(outputs, hidden_states=None)
        return [semantic_encoder.encode(pixel_values, compositions, **kwargs), (outputs, features)]
    encoders = (semantic_encoder, spatial_encoder)
    return [(None, None) if encoder is None else encoder.encode(pixel_values, **kwargs) for encoder in encoders]


__all__ = ["AureaComposition", "AureaCompositionLayer", "look_through"]
