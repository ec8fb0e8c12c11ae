# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The auxiliary losses of an Aurea's training: when they are computed, of what, and what they add to the loss.

fusion that trains ─ `fusion_losses` ─ (images,) each ─ `share_of_loss` ─ added to the loss of the next token
"""

import torch

from .configuration_aurea import AureaConfig
from .losses_aurea import feature_consistency_loss, feature_diversity_loss, share_of_batch


def fusion_losses(
    config: AureaConfig, tokens: torch.Tensor, fused_map: torch.Tensor | None, features: list[torch.Tensor | None]
) -> dict[str, torch.Tensor] | None:
    """The losses that `config` asks for, `(images,)` each, not weighted; None if the fusion does not train.

    Args:
        tokens: `(images, N, C)`, the fusion's output.
        fused_map: `(images, h, w, C)`, what it was made of; None of a fusion that has none.
        features: the encoders' maps `(images, h, w, ...)`, which say what belongs together.
    """
    if not tokens.requires_grad:
        return None
    losses = {}
    if "feature_consistency" in config.auxiliary_loss_coefs:
        settings = {"radius": config.feature_fusion_config.radius, **config.feature_consistency_kernel}
        # An encoder that trains is not to learn to say what pays.
        losses["feature_consistency"] = sum(
            feature_consistency_loss(guidance.detach(), fused_map, **settings, reduction="none")
            for guidance in features
            if guidance is not None
        )
    if "feature_diversity" in config.auxiliary_loss_coefs:
        losses["feature_diversity"] = feature_diversity_loss(tokens, reduction="none")
    return losses


def check_are_trained(auxiliary_losses: dict[str, torch.Tensor] | None, are_in_loss: bool) -> None:
    """Raises ValueError if there are such losses, and nothing that adds them to the loss."""
    if auxiliary_losses and not are_in_loss:
        coefs = " and ".join(f"`{name}_coef`" for name in auxiliary_losses)
        raise ValueError(
            f"The configuration sets {coefs}, but these losses would not be trained: they are part of the loss "
            "that `AureaForConditionalGeneration` makes of `labels`, and here the loss is made by others, from its "
            "logits or from the base model's output (TRL's trainers, label smoothing, a `compute_loss_func`). Train "
            f"with `transformers.Trainer`, or set {coefs} of the model's configuration to 0."
        )


def share_of_loss(
    config: AureaConfig,
    auxiliary_losses: dict[str, torch.Tensor],
    image_tokens: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor,
) -> torch.Tensor:
    """What they add to the loss of a batch or of a part of one, see `share_of_batch`."""
    coefs = config.auxiliary_loss_coefs
    weighted = sum(coefs[name] * values for name, values in auxiliary_losses.items())
    return share_of_batch(weighted, image_tokens, labels, num_items_in_batch, config.placeholders_per_image)


__all__ = ["check_are_trained", "fusion_losses", "share_of_loss"]
