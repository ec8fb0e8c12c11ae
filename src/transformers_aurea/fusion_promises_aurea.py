# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A fusion as the rest of the model meets it: built, run, and held to what it promises, by name."""

import torch

from .fusion_aurea import AureaFusion


def make_fusion(config) -> AureaFusion:
    """The fusion of an [`AureaConfig`], new.

    Raises:
        RuntimeError: it cannot be built; its own error is the cause.
        ValueError: it does not say how many tokens and channels it gives.
    """
    fusion_class = config.fusion_class
    named = _named(config, fusion_class)
    try:
        fusion = fusion_class(config)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError, TypeError) as error:
        raise RuntimeError(
            f"{named} cannot be built: {error} Its `__init__` calls `super().__init__(config)` first, and runs on the "
            "meta device too, where tensors have no values: what is computed of them belongs in `init_weights`."
        ) from error
    for name, what in (("output_dim", "the channels of its tokens"), ("num_tokens", "its tokens of a picture")):
        value = vars(fusion).get(name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{named} must set `{name}`, {what}, to an int from 1 on in its `__init__`; it is {value!r}."
            )
    return fusion


def fuse(
    config, fusion: AureaFusion, features: list[torch.Tensor | None], wants_map: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Tokens (images, num_tokens, output_dim) of the encoders' maps, and the fused map (images, height, width, C) if
    it is wanted and given.

    Raises:
        RuntimeError: they are not what the fusion promises.
    """
    named, fused_map = _named(config, type(fusion)), None
    num_images = next(one.shape[0] for one in features if one is not None)
    if wants_map and fusion.gives_map:
        given = fusion(*features, return_map=True)
        shapes = tuple(map(_shape, given)) if isinstance(given, tuple) else _shape(given)
        if not (len(shapes) == 2 and len(shapes[1]) == 4 and shapes[1][0] == num_images):
            raise RuntimeError(
                f"{named} declares `gives_map`: with `return_map=True`, its `forward` gives tokens and a map "
                f"({num_images}, height, width, channels). It gives {shapes}."
            )
        tokens, fused_map = given
    else:
        tokens = fusion(*features)
    promised = (num_images, fusion.num_tokens, fusion.output_dim)
    if _shape(tokens) != promised:
        raise RuntimeError(
            f"{named} promises tokens of the shape {promised} (pictures, `num_tokens`, `output_dim`) and gives "
            f"{_shape(tokens)}. Correct its `__init__` or its `forward`."
        )
    if not tokens.is_floating_point():
        raise RuntimeError(f"{named} promises tokens in the dtype of its weights and gives {tokens.dtype}.")
    return tokens, fused_map


def _shape(value) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _named(config, fusion_class: type[AureaFusion]) -> str:
    return f"The fusion '{config.feature_fusion_config.fusion_type}' ({fusion_class.__name__})"


__all__ = ["fuse", "make_fusion"]
