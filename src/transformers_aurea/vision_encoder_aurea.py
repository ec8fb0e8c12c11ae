# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""One eye of an Aurea: any vision encoder of transformers, and all in which one of them differs from the next.

pixels       its own view, cut out of the canvas that the views share
precision    float32 as published, or the model's (`encoder_dtype`), without autocast
positions    interpolated where its view has another size than it was trained with
gradients    none, and no activations kept, while nothing in it trains; where it does, parameters that have no use here
             (mask tokens, poolers, layers above the one that is asked) take part with nothing, for
             DistributedDataParallel waits for every gradient
features     of the last layer or of those asked for, side by side; those of the patches as a map, class and register
             tokens, which come first, being dropped or, where they are asked for, all of them as tokens
batch norms  keep the statistics that they were pretrained with
"""

import math
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature

import torch
from torch import nn
from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from .configuration_aurea import AureaConfig, AureaView, optional_field
from .weaving_aurea import woven_class


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class AureaVisionEncoderMixin:
    """A vision encoder of transformers that looks at its view of the pictures, with `encode`."""

    view: AureaView
    update_batch_norms: bool

    def encode(
        self, pixel_values: torch.Tensor, compositions: dict | None = None, **kwargs
    ) -> tuple[ModelOutput, torch.Tensor]:
        """Pictures `(images, views, 3, H, W)`, or `(images, 3, H, W)` of one view → the encoder's outputs, and its
        features: of patches `(images, h, w, C)`, or of all tokens `(images, N, C)`. See [`AureaComposition.over`] for
        `compositions`.

        Raises:
            ValueError: the encoder gives other features than its configuration promises.
        """
        height, width = self.view.size
        pixel_values = pixel_values[:, None] if pixel_values.ndim == 4 else pixel_values
        index = min(self.view.index, pixel_values.shape[1] - 1)  # of a single encoder's pictures there is one view
        pixels = pixel_values[:, index, :, :height, :width].to(self.dtype)
        readers = [parameter for layer, _ in (compositions or {}).values() for parameter in layer.parameters()]
        tensors = [pixels, *(source for _, source in (compositions or {}).values()), *self.parameters(), *readers]
        trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        arguments = self.own_arguments(pixels, trains) | kwargs
        if compositions is not None:
            arguments["compositions"] = compositions
        if self.view.feature_layers is not None:
            arguments["output_hidden_states"] = True
        with torch.set_grad_enabled(trains), torch.autocast(pixels.device.type, enabled=False):
            outputs = self(pixels, **arguments)
        features, idle = outputs.last_hidden_state, [outputs.get("pooler_output")]
        if self.view.feature_layers is not None:
            idle.append(features)
            features = torch.cat([outputs.hidden_states[layer] for layer in self.view.feature_layers], dim=-1)
            if not kwargs.get("output_hidden_states", self.config.output_hidden_states):
                outputs = replace(outputs, hidden_states=None)
        for output in idle:
            if trains and output is not None:
                features = features + 0 * output.sum()
        return outputs, self._select(features)

    def own_arguments(self, pixels: torch.Tensor, trains: bool) -> dict:
        """Arguments that some encoders need."""
        arguments = {}
        trained_size = optional_field(self.config, "image_size") or self.view.size
        trained_size = (trained_size, trained_size) if isinstance(trained_size, int) else tuple(trained_size)
        if trained_size != self.view.size and "interpolate_pos_encoding" in signature(self.forward).parameters:
            arguments["interpolate_pos_encoding"] = True  # others, as DINOv2, do so by themselves
        if trains and any(name.endswith("mask_token") for name, _ in self.named_parameters()):
            rows, columns = self.view.grid
            arguments["bool_masked_pos"] = pixels.new_zeros((pixels.shape[0], rows * columns), dtype=torch.bool)
        return arguments

    def _select(self, features: torch.Tensor) -> torch.Tensor:
        """Tokens (images, N, C), or a convolutional encoder's map (images, C, h, w) → (images, *feature_shape, C)."""
        shape = self.view.feature_shape
        is_map = features.ndim == 4
        if is_map:
            features = features.flatten(2).transpose(1, 2)
        if features.shape[1] < math.prod(shape) or (is_map and features.shape[1] > math.prod(shape)):
            height, width = self.view.size
            raise ValueError(
                f"{type(self).__name__} gives {features.shape[1]} patch features for a view of {height}×{width} "
                f"pixels, which are not the {'×'.join(map(str, shape))} that its configuration promises."
            )
        return features[:, -math.prod(shape) :].unflatten(1, shape)

    def train(self, mode: bool = True):
        """As usual, but that batch norms keep the statistics they were pretrained with.

        Otherwise a picture's features would hang on the others of its batch: processes, and a reference model that is
        in evaluation mode, would differ. `config.update_batch_norms` lets those follow their batches that train.
        """
        super().train(mode)
        for module in batch_norms(self):
            trains = any(parameter.requires_grad for parameter in module.parameters())
            module.train(mode and self.update_batch_norms and trains)
        return self


def make_encoder(config: AureaConfig, name: str) -> PreTrainedModel | None:
    """The encoder of this name among `config.encoder_configs`, new, in `encoder_dtype`; None if it is not there."""
    if name not in config.encoder_configs:
        return None
    encoder_config = config.encoder_configs[name]
    implementation = encoder_attention(encoder_config, encoder_config._attn_implementation)
    settings = {"attn_implementation": implementation, **pooling_settings(encoder_config)}
    if config.encoder_dtype == "float32":
        settings["dtype"] = torch.float32
    encoder = AutoModel.from_config(encoder_config, **settings)
    encoder.__class__ = woven_class(AureaVisionEncoderMixin, type(encoder))
    encoder.view, encoder.update_batch_norms = config.views[name], config.update_batch_norms
    return encoder


def pooling_settings(config: PreTrainedConfig) -> dict[str, bool]:
    """Arguments with which an encoder of this configuration is made without the pooling layer that some have on top.

    Nothing reads it, and checkpoints of classifiers lack its weights.
    """
    encoder_class = MODEL_MAPPING.get(type(config), None)
    has_switch = encoder_class is not None and "add_pooling_layer" in signature(encoder_class).parameters
    return {"add_pooling_layer": False} if has_switch else {}


def encoder_attention(config: PreTrainedConfig, implementation: str | None) -> str | None:
    """The attention implementation asked for, or `"eager"` for an encoder that lacks it, as convolutional ones do."""
    encoder_class = MODEL_MAPPING.get(type(config), None)  # none for remote code
    if encoder_class is None or implementation is None:
        return implementation
    is_supported = {
        "sdpa": encoder_class._supports_sdpa,
        "flex": encoder_class._supports_flex_attn,
        "flash": encoder_class._supports_flash_attn,
    }
    is_lacking = any(name in implementation and not is_supported[name] for name in is_supported)
    return "eager" if is_lacking else implementation


def batch_norms(*modules: nn.Module) -> list[nn.Module]:
    return [module for root in modules for module in root.modules() if isinstance(module, BATCH_NORMS)]


@contextmanager
def in_evaluation_mode(modules: list[nn.Module]):
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False  # not those inside, each of which has a mode of its own
    try:
        yield
    finally:
        for module in training:
            module.training = True


__all__ = [
    "AureaVisionEncoderMixin",
    "batch_norms",
    "encoder_attention",
    "in_evaluation_mode",
    "make_encoder",
    "pooling_settings",
]
