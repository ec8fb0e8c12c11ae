# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""An object of any class of transformers, given abilities of ours in place: `thing.__class__ = woven_class(...)`.

    decoder layer  ─► cross-attention block before it            cache    ─► keys and values of the blocks
    language model ─► modules that are another model's           encoder  ─► one eye of an Aurea
    encoder layer  ─► composition with another encoder after it

The class keeps its name, so parameter names, recorders, plans and patterns of transformers stay what they are.
"""

import copy
import functools
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel


@functools.cache
def woven_class(mixin: type, base: type) -> type:
    """The subclass of `base` with `mixin` in front, under the name of `base`, by which tools find decoder layers."""
    return type(base.__name__, (mixin, base), {"__module__": base.__module__, "__reduce__": _reduce_woven})


def _reduce_woven(self):
    mixin, base = type(self).__bases__
    return _rebuild_woven, (mixin, base), self.__dict__


def _rebuild_woven(mixin: type, base: type):
    woven = woven_class(mixin, base)
    return woven.__new__(woven)


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList] | None:
    """Name and module of the list of a model's layers: the outermost list of `num_hidden_layers` modules, if any."""
    num_layers = model.config.num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    return min(lists, key=lambda named: named[0].count("."), default=None)


def copy_on_meta(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules over tensors without data, in bfloat16, which routers of experts want there."""

    def without_data(tensor: torch.Tensor) -> torch.Tensor:
        dtype = torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
        return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty

    tensors = chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): without_data(tensor) for tensor in tensors})


__all__ = ["copy_on_meta", "layers_of", "woven_class"]
