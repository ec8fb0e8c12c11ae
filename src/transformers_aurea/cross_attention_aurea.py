# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Cross-attention blocks, woven into the layers of any decoder.

decoder layer i  ─►  its class after AureaWovenDecoderLayerMixin: block, then the layer, then a closing block
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.integrations import use_kernel_forward_from_hub
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_aurea import AureaConfig, AureaUnfitLanguageModelError
from .weaving_aurea import layers_of, woven_class


# Names of the blocks in a decoder layer, and of the layers in them that begin with zeros where a model is made of
# parts: until they are trained, a block then adds nothing.
BLOCK_NAMES = ("cross_attention_block", "closing_cross_attention_block")
ZERO_LAYERS = ("cross_attn.o_proj", "mlp.down_proj")


@use_kernel_forward_from_hub("RMSNorm")
class AureaRMSNorm(nn.Module):
    """Root mean square norm over the last dimension, with statistics in float32: https://arxiv.org/abs/1910.07467."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(hidden_states.float(), self.weight.shape, eps=self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)


def eager_attention_forward(
    module: "AureaCrossAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention that also gives its weights, softmax in float32: `(batch, tokens, heads, head_dim)` and
    `(batch, heads, tokens, keys)`, for `query` `(batch, heads, tokens, head_dim)` and an additive mask."""
    key, value = (states.repeat_interleave(module.num_key_value_groups, dim=1) for states in (key, value))
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


class AureaCrossAttention(nn.Module):
    """Text tokens ask, visual tokens answer; queries and keys are normalised per head."""

    is_causal = False

    def __init__(self, config: AureaConfig, text_config, block_idx: int):
        super().__init__()
        self.config = text_config  # the decoder's own object: its attention implementation is ours
        self.block_idx = block_idx
        hidden_size = text_config.hidden_size
        num_heads, num_key_value_heads = config.cross_attention_num_heads, config.cross_attention_num_key_value_heads
        self.head_dim = config.cross_attention_head_dim
        self.num_key_value_groups = num_heads // num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=False)
        self.q_norm = AureaRMSNorm(self.head_dim, eps=config.cross_attention_norm_eps)
        self.k_norm = AureaRMSNorm(self.head_dim, eps=config.cross_attention_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cross_attention_states: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        visual_cache: DynamicCache | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        if cross_attention_states is not None:
            key_states = self.k_norm(self._split_heads(self.k_proj(cross_attention_states)))
            value_states = self._split_heads(self.v_proj(cross_attention_states))
            # Once: a few decoders run a layer twice.
            if visual_cache is not None and len(visual_cache.layers) <= self.block_idx:
                visual_cache.update(key_states, value_states, self.block_idx)
        else:
            cached = visual_cache.layers[self.block_idx]
            key_states, value_states = cached.keys, cached.values
        # Rows of the text that see the same pictures, as beams do, are one row here: nothing is stored twice.
        hidden_states = hidden_states.reshape(key_states.shape[0], -1, hidden_states.shape[-1])
        query_states = self.q_norm(self._split_heads(self.q_proj(hidden_states)))  # (rows, heads, tokens, head_dim)

        implementation = self.config._attn_implementation
        if attention_mask is not None and "flash" in implementation:
            implementation = "sdpa"  # flash attention takes masks of whole rows only
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        attn_output, attn_weights = attention_interface(
            self, query_states, key_states, value_states, attention_mask, scaling=self.scaling
        )
        if attn_weights is not None:
            attn_weights = attn_weights.unflatten(2, (-1, input_shape[1])).transpose(1, 2).flatten(0, 1)
        return self.o_proj(attn_output.reshape(*input_shape, -1)), attn_weights

    def _split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.view(*states.shape[:-1], -1, self.head_dim).transpose(1, 2)


class AureaCrossAttentionMLP(nn.Module):
    def __init__(self, config: AureaConfig, hidden_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, config.cross_attention_intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, config.cross_attention_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.cross_attention_intermediate_size, hidden_size, bias=False)
        self.act_fn = ACT2FN["silu"]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class AureaCrossAttentionBlock(nn.Module):
    """Cross-attention and a gated MLP, each with its residual. Rows without a picture pass through unchanged."""

    def __init__(self, config: AureaConfig, text_config, block_idx: int):
        super().__init__()
        self.input_layernorm = AureaRMSNorm(text_config.hidden_size, eps=config.cross_attention_norm_eps)
        self.cross_attn = AureaCrossAttention(config, text_config, block_idx)
        self.post_attention_layernorm = AureaRMSNorm(text_config.hidden_size, eps=config.cross_attention_norm_eps)
        self.mlp = AureaCrossAttentionMLP(config, text_config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cross_attention_states: torch.Tensor | None,
        cross_attention_mask: torch.Tensor | None = None,
        rows_with_image: torch.Tensor | None = None,
        visual_cache: DynamicCache | None = None,
        cross_attentions: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        attn_output, attn_weights = self.cross_attn(
            self.input_layernorm(hidden_states), cross_attention_states, cross_attention_mask, visual_cache
        )
        if cross_attentions is not None and attn_weights is not None:
            cross_attentions.append(attn_weights)
        output = hidden_states + attn_output
        output = output + self.mlp(self.post_attention_layernorm(output))
        # A selection, not a product with zero: the contribution of a row without a picture is exactly none.
        return output if rows_with_image is None else torch.where(rows_with_image, output, hidden_states)


class AureaWovenDecoderLayerMixin:
    """A decoder layer with a cross-attention block before it (and, the last one, a closing block after it).

    `__call__` turns the visual states from a keyword into the last positional argument: under reentrant gradient
    checkpointing only positional tensors get gradients.
    """

    cross_attention_block: AureaCrossAttentionBlock | None
    closing_cross_attention_block: AureaCrossAttentionBlock | None

    def __call__(self, hidden_states, *args, cross_attention_states=None, **kwargs):
        is_checkpointed = isinstance(self, GradientCheckpointingLayer) and self.gradient_checkpointing
        is_replayed = is_checkpointed and self.training and torch.is_grad_enabled()
        if is_replayed and cross_attention_states is not None:
            kwargs["visual_cache"] = None  # a replayed forward must not write a second time
        return super().__call__(hidden_states, *args, cross_attention_states, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args,
        cross_attention_mask: torch.Tensor | None = None,
        rows_with_image: torch.Tensor | None = None,
        visual_cache: DynamicCache | None = None,
        cross_attentions: list[torch.Tensor] | None = None,
        **kwargs,
    ):
        *args, cross_attention_states = args
        visual_inputs = (cross_attention_states, cross_attention_mask, rows_with_image)
        # By name: accelerate's hooks, which copy lists, leave these alone.
        kept = {"visual_cache": visual_cache, "cross_attentions": cross_attentions}
        has_image = cross_attention_states is not None or visual_cache is not None
        if has_image and self.cross_attention_block is not None:
            hidden_states = self.cross_attention_block(hidden_states, *visual_inputs, **kept)
        output = super().forward(hidden_states, *args, **kwargs)
        if has_image and self.closing_cross_attention_block is not None:
            if isinstance(output, tuple):
                return (self.closing_cross_attention_block(output[0], *visual_inputs, **kept), *output[1:])
            return self.closing_cross_attention_block(output, *visual_inputs, **kept)
        return output


def decoder_layers(language_model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and module of the list of decoder layers.

    Raises:
        AureaUnfitLanguageModelError: there is none.
    """
    named = layers_of(language_model)
    if named is None:
        raise AureaUnfitLanguageModelError(
            language_model.config,
            f"whose {type(language_model).__name__} has no list of {language_model.config.num_hidden_layers} layers "
            "(`num_hidden_layers`) into which cross-attention blocks could be woven",
        )
    return named


def weave_cross_attention(language_model: PreTrainedModel, config: AureaConfig) -> None:
    """Gives the decoder's layers the blocks of `config.cross_attention_positions`, in place."""
    _, layers = decoder_layers(language_model)
    block_idx = {position: idx for idx, position in enumerate(config.cross_attention_positions)}

    def block(position: int) -> AureaCrossAttentionBlock | None:
        if position not in block_idx:
            return None
        return AureaCrossAttentionBlock(config, language_model.config, block_idx[position])

    # Every layer, also those without a block, so that no keyword of ours reaches the decoder's attention.
    for position, layer in enumerate(layers):
        layer.__class__ = woven_class(AureaWovenDecoderLayerMixin, type(layer))
        layer.cross_attention_block = block(position)
        layer.closing_cross_attention_block = block(len(layers)) if position + 1 == len(layers) else None


def cross_attention_tp_plan(language_model: PreTrainedModel) -> dict[str, str]:
    """How tensor parallelism splits the blocks, by patterns of names inside the language model."""
    plan = {
        **dict.fromkeys(("cross_attn.q_proj", "cross_attn.k_proj", "cross_attn.v_proj"), "colwise"),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "colwise"),
        **dict.fromkeys(("cross_attn.o_proj", "mlp.down_proj"), "rowwise"),
        # Each process has some of the heads, and with them a part of these norms' gradients.
        **dict.fromkeys(("cross_attn.q_norm", "cross_attn.k_norm"), "replicated_with_grad_allreduce"),
    }
    prefix = f"{decoder_layers(language_model)[0]}.*"
    return {f"{prefix}.{block}.{name}": style for block in BLOCK_NAMES for name, style in plan.items()}


__all__ = [
    "BLOCK_NAMES",
    "ZERO_LAYERS",
    "AureaCrossAttentionBlock",
    "AureaWovenDecoderLayerMixin",
    "cross_attention_tp_plan",
    "decoder_layers",
    "weave_cross_attention",
]
