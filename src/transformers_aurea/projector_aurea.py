# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The projector: visual tokens from the fusion's channels to the language model's."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_aurea import AureaConfig


class AureaMultiModalProjector(nn.Module):
    """Two linear layers with an activation between them, `W₂ act(W₁ x)`, or with `projector_num_layers=1` one, `W₁ x`.

    Args:
        config: of the model; `projector_...` and the language model's width.
        fused_size: channels of the fusion's tokens.
    """

    def __init__(self, config: AureaConfig, fused_size: int):
        super().__init__()
        sizes = [fused_size, config.projector_hidden_size, config.text_config.hidden_size]
        if config.projector_num_layers == 1:
            del sizes[1]
        self.linear_1 = nn.Linear(*sizes[:2], bias=config.projector_bias)
        self.act, self.linear_2 = None, None
        if config.projector_num_layers == 2:
            self.act = ACT2FN[config.projector_hidden_act]
            self.linear_2 = nn.Linear(*sizes[1:], bias=config.projector_bias)

    def forward(self, fused_features: torch.Tensor) -> torch.Tensor:
        """(images, N, fused_size) → (images, N, hidden_size)."""
        # As a matrix: of a batch of tokens an 8-bit layer of bitsandbytes gives a view that autograd lets nobody write
        # to, and the 8-bit layers that read it, here the blocks' `k_proj` and `v_proj`, do so on a CPU.
        projected = self.linear_1(fused_features.flatten(0, 1))
        if self.linear_2 is not None:
            projected = self.linear_2(self.act(projected))
        return projected.unflatten(0, fused_features.shape[:2])


__all__ = ["AureaMultiModalProjector"]
