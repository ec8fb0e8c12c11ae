# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What Aurea's models give back."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    ModelOutput,
)

from .versions_aurea import CACHE_NAME


@dataclass
class AureaImageFeaturesOutput(BaseModelOutputWithPooling):
    r"""
    Features of pictures, one row per picture.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(num_images, sequence_length, hidden_size)`):
            Output of the semantic encoder.
        pooler_output (`torch.FloatTensor` of shape `(num_images, num_patches, text_hidden_size)`):
            Fused and projected features, what the cross-attention blocks read.
        spatial_last_hidden_state (`torch.FloatTensor` of shape `(num_images, sequence_length, spatial_hidden_size)`):
            Output of the spatial encoder.
        spatial_hidden_states, spatial_attentions (`tuple(torch.FloatTensor)`, *optional*):
            Those of the spatial encoder, on request, as `hidden_states` and `attentions` are the semantic encoder's.
        fusion_attentions (`tuple(torch.FloatTensor)`, *optional*, with `output_attentions=True`):
            Weights of the fusion's layers, if it has any that attend. Of `"spatial_range"`, one `(num_images, height,
            width, (2·radius + 1)²)` per layer, those of the semantic stack first: at each patch, what each neighbour
            counts, row by row of the window, reflected at the borders, after the correction, with a sum of 1. Of
            `"cross_attention"`, one `(num_images, num_heads, num_patches, num_spatial_patches)` per layer.
        auxiliary_losses (`dict[str, torch.FloatTensor]`, *optional*, in training if the configuration has them):
            `(num_images,)` each, by name: `"feature_consistency"` and `"feature_diversity"`, not weighted.
    """

    spatial_last_hidden_state: torch.FloatTensor | None = None
    spatial_hidden_states: tuple[torch.FloatTensor, ...] | None = None
    spatial_attentions: tuple[torch.FloatTensor, ...] | None = None
    fusion_attentions: tuple[torch.FloatTensor, ...] | None = None
    auxiliary_losses: dict[str, torch.FloatTensor] | None = None


@dataclass
class AureaModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    The cache is called as in the installed transformers: `past_key_values`, or `cache` from 5.24 on.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`):
            Hidden states at the output of the decoder.
        past_key_values or cache (`Cache`, *optional*):
            The decoder's keys and values and, once a picture was seen, those of the cross-attention blocks.
        hidden_states, attentions (`tuple(torch.FloatTensor)`, *optional*):
            The decoder's, one per layer; a layer's hidden state is the one after its cross-attention block and itself.
        cross_attentions (`tuple(torch.FloatTensor)`, *optional*):
            One `(batch_size, num_heads, sequence_length, num_visual_tokens)` per cross-attention block.
        fusion_attentions (`tuple(torch.FloatTensor)`, *optional*):
            See [`AureaImageFeaturesOutput`]; of the pictures given in this call.
        image_hidden_states (`torch.FloatTensor` of shape `(num_images, num_patches, hidden_size)`, *optional*):
            The projected features of the pictures given in this call.
        image_outputs ([`AureaImageFeaturesOutput`], *optional*):
            All that the encoders, fusion and projector made of these pictures.
        auxiliary_losses (`dict[str, torch.FloatTensor]`, *optional*):
            See [`AureaImageFeaturesOutput`].
        decoder_output (`ModelOutput`, *optional*, with `return_decoder_output=True`):
            The decoder's own output, with all that it has in it; the language model's head reads it.
    """

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    fusion_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: AureaImageFeaturesOutput | None = None
    auxiliary_losses: dict[str, torch.FloatTensor] | None = None
    decoder_output: ModelOutput | None = None


@dataclass
class AureaCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, returned when `labels` is given):
            The language model's own loss of the next token and, in training, the weighted auxiliary losses.
        logits (`torch.FloatTensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores of the language modelling head before the softmax.
        past_key_values or cache, hidden_states, attentions, cross_attentions, fusion_attentions, image_hidden_states,
        image_outputs:
            See [`AureaModelOutputWithPast`].
        auxiliary_losses (`dict[str, torch.FloatTensor]`, *optional*, in training if the configuration has them):
            Means over the pictures of this call, not weighted and without gradient, to be logged.
        aux_loss, router_logits (*optional*):
            As the language model gives them, if its layers route tokens to experts.
    """

    cross_attentions: tuple[torch.FloatTensor, ...] | None = None
    fusion_attentions: tuple[torch.FloatTensor, ...] | None = None
    image_hidden_states: torch.FloatTensor | None = None
    image_outputs: AureaImageFeaturesOutput | None = None
    auxiliary_losses: dict[str, torch.FloatTensor] | None = None
    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None

    @classmethod
    def of(
        cls, loss: torch.FloatTensor | None, lm_outputs: ModelOutput, outputs: AureaModelOutputWithPast
    ) -> "AureaCausalLMOutputWithPast":
        """What the head and what the model beneath it gave, together."""
        losses = outputs.auxiliary_losses
        is_logged = losses and outputs.image_hidden_states is not None  # those of no picture are no figure
        return cls(
            loss=loss,
            logits=lm_outputs.logits,  # (batch, T, vocabulary)
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
            fusion_attentions=outputs.fusion_attentions,
            image_hidden_states=outputs.image_hidden_states,
            image_outputs=outputs.image_outputs,
            auxiliary_losses={name: loss.detach().mean() for name, loss in losses.items()} if is_logged else None,
            aux_loss=lm_outputs.get("aux_loss"),
            router_logits=lm_outputs.get("router_logits"),
        )


__all__ = ["AureaCausalLMOutputWithPast", "AureaImageFeaturesOutput", "AureaModelOutputWithPast"]
