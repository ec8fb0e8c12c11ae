# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Spatial-range ("joint bilateral") attention over a feature map, as in FeatUp (https://arxiv.org/abs/2403.10516)."""

from . import layers
from .functional import neighborhood_aggregate, spatial_range_weights


__all__ = ["layers", "neighborhood_aggregate", "spatial_range_weights"]
