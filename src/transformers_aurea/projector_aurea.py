# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The projector: visual tokens from the fusion's channels to the language model's."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_aurea import AureaConfig


class AureaMultiModalProjector(nn.Module):
    """Linear layers with an activation between them: `W₁ x`, `W₂ act(W₁ x)` or `W₃ act(W₂ act(W₁ x))`.

    Args:
        config: of the model; `projector_...` and the language model's width.
        fused_size: channels of the fusion's tokens.
    """

    def __init__(self, config: AureaConfig, fused_size: int):
        super().__init__()
        num_layers, bias = config.projector_num_layers, config.projector_bias
        sizes = [fused_size, config.projector_hidden_size, *[config.text_config.hidden_size] * num_layers]
        if num_layers == 1:
            del sizes[1]
        self.act = ACT2FN[config.projector_hidden_act] if num_layers > 1 else None
        self.linear_1 = nn.Linear(*sizes[0:2], bias=bias)
        self.linear_2 = nn.Linear(*sizes[1:3], bias=bias) if num_layers > 1 else None
        self.linear_3 = nn.Linear(*sizes[2:4], bias=bias) if num_layers > 2 else None

    def forward(self, fused_features: torch.Tensor) -> torch.Tensor:
        """(images, N, fused_size) → (images, N, hidden_size)."""
        # As a matrix: of a batch of tokens an 8-bit layer of bitsandbytes gives a view that autograd lets nobody write
        # to, and the 8-bit layers that read it, here the blocks' `k_proj` and `v_proj`, do so on a CPU.
        projected = self.linear_1(fused_features.flatten(0, 1))
        for linear in (self.linear_2, self.linear_3):
            if linear is not None:
                projected = linear(self.act(projected))
        return projected.unflatten(0, fused_features.shape[:2])


__all__ = ["AureaMultiModalProjector"]
