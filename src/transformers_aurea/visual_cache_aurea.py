# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The decoder's cache, which also keeps the pictures: keys and values of the cross-attention blocks."""

from collections.abc import Callable

import torch
from transformers import Cache, DynamicCache

from .weaving_aurea import woven_class


class AureaVisualStatesCacheMixin:
    """A cache that also keeps the cross-attention blocks' keys and values, for every way a cache is reordered.

    `visual` holds one layer per block. It may have fewer rows than the text, each for as many of its rows that follow
    each other: beams of one text see the same pictures. `num_images` (batch,) counts the pictures of each row; it is
    None where every token sees every visual state. `image_counts` (batch, tokens) counts the placeholders up to each
    token of the cached text, so that a cache that was cropped still knows; a static cache, which cannot be, keeps the
    last only.
    """

    visual: DynamicCache
    num_images: torch.Tensor | None
    image_counts: torch.Tensor | None

    @property
    def images_seen(self) -> torch.Tensor | None:
        """Placeholders in the cached text, (batch,); None for none counted."""
        if self.image_counts is None or self.is_compileable:
            return None if self.image_counts is None else self.image_counts[:, -1]
        length = min(self.get_seq_length(), self.image_counts.shape[1])
        return self.image_counts[:, length - 1] if length > 0 else None

    @property
    def has_visual_states(self) -> bool:
        return len(self.visual.layers) > 0

    def forget_visual_states(self):
        self.visual = DynamicCache()  # without a config: with one, sliding windows would cut it
        self.num_images = None

    def count_images(self, image_tokens: torch.Tensor, placeholders_per_image: int = 1) -> torch.Tensor:
        """Placeholders at or before each token (batch, T), those of the cached text included.

        One beyond those of the row's pictures was generated, and is a word from the next call on.
        """
        counts = image_tokens.long().cumsum(dim=1)
        seen = self.images_seen
        if seen is not None:
            counts = counts + seen[:, None]
        placeholders = counts
        if self.num_images is not None:
            counts = torch.minimum(counts, placeholders_per_image * self.num_images[:, None])
        if not self.is_compileable:
            past_length = self.get_seq_length()
            past = counts.new_zeros(len(counts), 0) if seen is None else self.image_counts[:, :past_length]
            # Tokens that nobody counted: none before the first picture, or all of a row that sees everything.
            missing = past_length - past.shape[1]
            uncounted = (torch.zeros_like(counts[:, 0]) if seen is None else seen)[:, None].expand(-1, missing)
            self.image_counts = torch.cat([past, uncounted, counts], dim=1)
        elif seen is None:
            self.image_counts = counts[:, -1:].clone()
        else:
            self.image_counts.copy_(counts[:, -1:])  # in place, as all of a static cache
        return placeholders

    def reset(self):
        self.forget_text()
        self.forget_visual_states()

    def forget_text(self):
        super().reset()
        self.image_counts = None

    def reorder_cache(self, beam_idx: torch.LongTensor):
        super().reorder_cache(beam_idx)
        if self.has_visual_states:
            num_rows = self.image_counts.shape[0]
            beams = num_rows // self.visual.layers[0].keys.shape[0]
            pictures = torch.arange(num_rows, device=beam_idx.device) // beams
            # Where each row goes on as one that sees the same pictures, all their keys would be copied for nothing.
            if beams == 1 or not torch.equal(beam_idx // beams, pictures):
                self._select_visual_rows(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int):
        super().batch_repeat_interleave(repeats)  # each row of `visual` then serves so many more
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor):
        super().batch_select_indices(indices)
        if self.has_visual_states:
            self._select_visual_rows(indices)
        self._map_rows(lambda rows: rows[indices])

    def _select_visual_rows(self, indices: torch.Tensor):
        """Give each row of the text its own row in `visual`, and select among these."""
        beams = self.image_counts.shape[0] // self.visual.layers[0].keys.shape[0]
        if beams > 1:
            self.visual.batch_repeat_interleave(beams)
        self.visual.batch_select_indices(indices)

    def _map_rows(self, function: Callable[[torch.Tensor], torch.Tensor]):
        self.num_images = None if self.num_images is None else function(self.num_images)
        self.image_counts = None if self.image_counts is None else function(self.image_counts)


def weave_cache(cache: Cache):
    """Make the caller's own cache keep visual states, in place."""
    if not isinstance(cache, AureaVisualStatesCacheMixin):
        cache.__class__ = woven_class(AureaVisualStatesCacheMixin, type(cache))
        cache.image_counts = None
        cache.forget_visual_states()


def move_visual_states(visual: DynamicCache, num_images: torch.Tensor | None, image_counts, cache: Cache):
    """Give a cache, which has no visual states yet, those that another held or that were made without one."""
    weave_cache(cache)
    cache.visual, cache.num_images = visual, num_images
    cache.image_counts = (
        image_counts[:, -1:].clone() if image_counts is not None and cache.is_compileable else image_counts
    )


def holds_visual_states(cache: Cache | None) -> bool:
    return isinstance(cache, AureaVisualStatesCacheMixin) and cache.has_visual_states


__all__ = ["AureaVisualStatesCacheMixin", "holds_visual_states", "move_visual_states", "weave_cache"]
