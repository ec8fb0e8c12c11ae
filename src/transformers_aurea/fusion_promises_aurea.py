# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A fusion as the rest of the model meets it: built, run, and held to what it promises, by name."""

from inspect import signature

import torch

from .fusion_aurea import AureaFusion


def make_fusion(config) -> AureaFusion:
    """The fusion of an [`AureaConfig`], new.

    Raises:
        RuntimeError: it cannot be built; its own error is the cause.
        TypeError: its `forward` takes other arguments than the two encoders' features.
        ValueError: it does not say how many tokens and channels it gives.
    """
    fusion_class = config.fusion_class
    named = _named(config, fusion_class)
    try:
        fusion = fusion_class(config)
        list(fusion.children())  # fails unless `nn.Module.__init__` has run
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError, TypeError) as error:
        raise RuntimeError(
            f"{named} cannot be built: {str(error).rstrip('.')}. Its `__init__` calls `super().__init__(config)` "
            "first, and runs on the meta device too, where tensors have no values: what is computed of them belongs "
            "in `init_weights`."
        ) from error
    for name, what in (("output_dim", "the channels of its tokens"), ("num_tokens", "its tokens of a picture")):
        value = getattr(fusion, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"{named} must set `{name}`, {what}, to an int from 1 on in its `__init__`; it is {value!r}."
            )
    try:
        signature(fusion.forward).bind(None, None)
    except TypeError as error:
        raise TypeError(
            f"{named} has a `forward` that cannot be called with `(semantic_features, spatial_features)`: {error}."
        ) from error
    return fusion


def fuse(
    config,
    fusion: AureaFusion,
    features: list[torch.Tensor | None],
    wants_map: bool = False,
    wants_attentions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...] | None]:
    """Tokens (images, num_tokens, output_dim) of the encoders' maps and, where wanted and given, the fused map
    (images, height, width, C) and the weights of the fusion's attentions.

    Raises:
        RuntimeError: they are not what the fusion promises.
    """
    named = _named(config, type(fusion))
    num_images = next(one.shape[0] for one in features if one is not None)
    asked = {"return_map": True} if wants_map and fusion.gives_map else {}
    asked |= {"output_attentions": True} if wants_attentions and fusion.gives_attentions else {}
    given = fusion(*features, **asked)
    tokens, *extras = given if asked and isinstance(given, tuple) and len(given) == 1 + len(asked) else [given]
    extras = dict(zip(asked, extras))
    fused_map, attentions = extras.get("return_map"), extras.get("output_attentions")
    grids = [_shape(one)[:3] for one in features if one is not None and one.ndim == 4]
    if "return_map" in asked and _shape(fused_map)[:-1] not in grids:
        raise RuntimeError(
            f"{named} declares `gives_map`: with `return_map=True`, its `forward` gives tokens and a map (images, "
            f"height, width, channels) on an encoder's grid, {' or '.join(map(str, grids))}. It gives "
            f"{_shape(fused_map)}."
        )
    if "output_attentions" in asked and not (
        isinstance(attentions, tuple) and all(_shape(weights)[:1] == (num_images,) for weights in attentions)
    ):
        shapes = [*map(_shape, attentions)] if isinstance(attentions, tuple) else _shape(attentions)
        raise RuntimeError(
            f"{named} declares `gives_attentions`: with `output_attentions=True`, its `forward` gives, last, a tuple "
            f"of weights of {num_images} pictures each. It gives {shapes}."
        )
    promised = (num_images, fusion.num_tokens, fusion.output_dim)
    if _shape(tokens) != promised:
        raise RuntimeError(
            f"{named} promises tokens of the shape {promised} (pictures, `num_tokens`, `output_dim`) and gives "
            f"{_shape(tokens)}. Correct its `__init__` or its `forward`."
        )
    if not tokens.is_floating_point():
        raise RuntimeError(f"{named} promises tokens in the dtype of its weights and gives {tokens.dtype}.")
    return tokens, fused_map, attentions


def _shape(value) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _named(config, fusion_class: type[AureaFusion]) -> str:
    return f"The fusion '{config.feature_fusion_config.fusion_type}' ({fusion_class.__name__})"


__all__ = ["fuse", "make_fusion"]
