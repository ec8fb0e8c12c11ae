# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""An object of any class of transformers, given abilities of ours in place: `thing.__class__ = woven_class(...)`.

    decoder layer  ─► cross-attention block before it            cache    ─► keys and values of the blocks
    language model ─► modules that are another model's           encoder  ─► one eye of an Aurea

The class keeps its name, so parameter names, recorders, plans and patterns of transformers stay what they are.
"""

import functools


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


__all__ = ["woven_class"]
