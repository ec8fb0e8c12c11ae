# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What the text of a call sees of pictures: which visual tokens belong to which row, and which of them each word sees.

    pictures (images, N, C), placeholders (batch, T) ─ `count_images`, `group_by_row` ─ (rows, M·N, C) ─┐
        ┌───────────────────────────────────────────────────────────────────────────────────────────────┘
    AureaVisualContext ─┬─ .layer_inputs   keywords that the decoder hands to its layers, for cross-attention blocks:
                        │                  states, mask, rows with a picture, the blocks' own cache
                        └─ .fill           embeddings of the text with visual tokens in the place of its placeholders

To a cross-attention block, a word sees the pictures whose placeholder is at or before it, and those before the first
placeholder see the first picture. A row without pictures sees nothing.
"""

import copy

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import is_tracing, torch_compilable_check

from .visual_cache_aurea import AureaVisualStatesCacheMixin, holds_visual_states, move_visual_states, weave_cache


class AureaVisualContext:
    """Visual tokens beside the text that sees them.

    Args:
        image_tokens: `(batch, tokens)`, True at each placeholder.
        num_images: `(rows,)`, how many pictures stand at the front of each row; None where each row has one.
        states: `(rows, visual tokens, channels)`, right-padded, for the cross-attention blocks; each row serves as
            many rows of the text that follow each other. None if there are none, or in the cache.
        image_embeds: as `states`, for the placeholders, each of which gets one; None where they stay words.
        tokens_per_image: visual tokens of a picture.
        placeholders_per_image: 1, or `tokens_per_image` where they are filled.

    Raises:
        ValueError: the rows of the visual tokens do not divide those of the text, or `num_images` is for others.
    """

    def __init__(
        self,
        image_tokens: torch.Tensor,
        num_images: torch.Tensor | None = None,
        states: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        tokens_per_image: int = 1,
        placeholders_per_image: int = 1,
    ):
        self.image_tokens = image_tokens
        self.states = states
        self.image_embeds = image_embeds
        self.tokens_per_image = tokens_per_image
        self.placeholders_per_image = placeholders_per_image
        rows = image_embeds if states is None else states
        self.num_images = None if rows is None else repeat_for_text(num_images, rows.shape[0], image_tokens.shape[0])
        self.placeholders = None

    def number_images(self, embedding: nn.Embedding) -> None:
        """Adds to the states of each picture the embedding of its number in its row, or the last there is."""
        numbers = torch.arange(self.states.shape[1], device=self.states.device) // self.tokens_per_image
        self.states = self.states + embedding(numbers.clamp(max=embedding.num_embeddings - 1))

    def enter(self, cache: Cache | None) -> None:
        """Lets new pictures take the place of those in the cache, which counts the placeholders of its text."""
        if cache is None:
            self.placeholders = self.image_tokens.long().cumsum(dim=1)
            if self.image_embeds is not None:
                torch_compilable_check(
                    (self.placeholders[:, -1:] >= self.tokens_to_place).all(),
                    lambda: (
                        f"The text has {self.placeholders[:, -1].tolist()} placeholders per row for "
                        f"{self.tokens_to_place} visual tokens in `image_embeds`, some of which would not be seen. "
                        f"Give {self.placeholders_per_image} placeholders per picture, or `num_images`."
                    ),
                )
            return
        if self.states is not None:
            weave_cache(cache)
            cache.forget_visual_states()
        elif self.image_embeds is not None:
            weave_cache(cache)
        elif holds_visual_states(cache):
            self.num_images = cache.num_images
        if self.is_shown:
            cache.num_images = self.num_images
        if self.is_shown or self.num_images is not None:
            self.placeholders = cache.count_images(self.image_tokens, self.placeholders_per_image)

    def layer_inputs(
        self, cache: Cache | None, use_cache: bool, text_config: PreTrainedConfig
    ) -> dict[str, torch.Tensor | DynamicCache | None]:
        """The keywords that the decoder hands to its layers; none where blocks have no picture to see."""
        is_new = self.states is not None
        if not is_new and not holds_visual_states(cache):
            return {}
        own_cache = DynamicCache() if use_cache else None  # until the decoder has made a cache
        visual_cache = own_cache if cache is None else cache.visual
        inputs = {"cross_attention_states": self.states, "visual_cache": visual_cache}
        if self.num_images is None:
            return inputs
        states = self.states if is_new else visual_cache.layers[0].keys[:, 0]  # (rows, N, …)
        # A row without a picture is given an empty one to look at, so that no softmax runs over nothing, and its
        # result is discarded.
        seen = -(-self.placeholders // self.placeholders_per_image)  # a picture is seen from its first placeholder on
        seen = torch.minimum(seen, self.num_images[:, None]).clamp(min=1)
        seen = seen.reshape(states.shape[0], -1)  # as the blocks see the text
        return {
            **inputs,
            "cross_attention_mask": cross_attention_mask(seen, states, text_config, self.tokens_per_image),
            "rows_with_image": (self.num_images > 0)[:, None, None],
        }

    @property
    def filled(self) -> torch.Tensor:
        """(batch, T): the placeholders that a visual token fills; one that was generated stays a word."""
        return self.image_tokens & (self.placeholders <= self.tokens_to_place)

    @property
    def tokens_to_place(self) -> torch.Tensor | int:
        """Visual tokens of each row, (batch, 1) or a number for all."""
        if self.num_images is None:
            return self.image_embeds.shape[1]
        return self.num_images[:, None] * self.placeholders_per_image

    def fill(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """The text's embeddings (batch, T, C) with visual tokens in the place of its placeholders."""
        num_rows, num_tokens, _ = self.image_embeds.shape
        batch_size = inputs_embeds.shape[0]
        rows = torch.arange(batch_size, device=inputs_embeds.device)[:, None] // (batch_size // num_rows)
        visual_tokens = self.image_embeds[rows, (self.placeholders - 1).clamp(0, num_tokens - 1)]  # (batch, T, C)
        return torch.where(self.filled[..., None], visual_tokens.to(inputs_embeds), inputs_embeds)

    @property
    def picture_blocks(self) -> torch.Tensor:
        """(batch, T): the number of the picture whose visual token fills a placeholder, -1 elsewhere."""
        return torch.where(self.filled, (self.placeholders - 1) // self.placeholders_per_image, -1)

    @property
    def is_shown(self) -> bool:
        """Whether there are visual tokens beside those in the cache."""
        return self.states is not None or self.image_embeds is not None

    def move_to(self, kept: Cache, given: Cache | None, visual: DynamicCache | None) -> None:
        """Gives the cache that the decoder made, instead of the one given, the states that its layers have kept."""
        counts = self.placeholders if given is None else given.image_counts
        num_images = self.num_images if given is None else given.num_images
        move_visual_states(DynamicCache() if visual is None else visual, num_images, counts, kept)


def images_in_cache(cache: Cache | None) -> torch.Tensor | None:
    """Placeholders in the cached text, (batch,); None for none counted."""
    return cache.images_seen if isinstance(cache, AureaVisualStatesCacheMixin) else None


def count_images(
    image_tokens: torch.Tensor,
    num_images: int,
    images_seen: torch.Tensor | None = None,
    placeholders_per_image: int = 1,
) -> torch.Tensor:
    """Pictures of each row (batch,), from its placeholders (batch, T) and those in the cached text before them.

    Raises:
        ValueError: they are not `num_images` together.
    """
    counts = image_tokens.sum(dim=1)
    if images_seen is not None:
        counts = counts + images_seen.to(counts.device)
    per_image = placeholders_per_image
    torch_compilable_check(
        (counts.sum() == num_images * per_image) & (counts % per_image == 0).all(),
        lambda: (
            f"Image features and image tokens do not match: {num_images} pictures for {int(counts.sum())} "
            f"placeholders ({counts.tolist()} per row). Give {per_image} per picture, which is what a processor with "
            f"`image_seq_length={per_image}` does, and the pictures in the order of the rows. Where a placeholder's "
            "token is a word of the text, say so by a 0 at its place in `mm_token_type_ids`, with a 1 at those of "
            "pictures."
        ),
    )
    return counts // placeholders_per_image


def has_text_that_should_have_seen(cache: Cache | None, counts: torch.Tensor) -> bool:
    """Whether rows that now have pictures were cached before their first: that text sees it when nothing is cached."""
    if cache is None or is_tracing(counts) or cache.get_seq_length() == 0:
        return False
    if not holds_visual_states(cache):
        return bool(counts.any())
    return cache.num_images is not None and bool(((counts > 0) & (cache.num_images == 0)).any())


def group_by_row(image_features: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features of single pictures (images, N, C) → those of rows (batch, most images · N, C) and pictures per row.

    The second is None where each row has exactly one picture, which all its tokens see. In a graph that is traced, no
    shape may hang on what the text says: there each row has room for all pictures.
    """
    counts = counts.to(image_features.device)
    if is_tracing(counts):
        most = image_features.shape[0]
    elif (counts == 1).all():
        return image_features, None
    else:
        most = int(counts.max())
    slots = torch.arange(most, device=counts.device)
    is_taken = slots < counts[:, None]  # (batch, most images)
    image_idx = ((counts.cumsum(dim=0) - counts)[:, None] + slots).where(is_taken, 0)
    rows = image_features[image_idx].masked_fill(~is_taken[..., None, None], 0)
    return rows.flatten(1, 2), counts


def repeat_for_text(num_images: torch.Tensor | None, num_rows: int, num_text_rows: int) -> torch.Tensor | None:
    """Pictures of each row of visual states → of each row of the text, of which several may share one of those."""
    if num_text_rows % num_rows != 0:
        raise ValueError(
            f"`cross_attention_states` has {num_rows} rows, which do not divide the {num_text_rows} rows of the text: "
            "give one for each, or for as many that follow each other."
        )
    if num_images is None:
        return None
    if num_images.shape[0] != num_rows:
        raise ValueError(
            f"`num_images` counts the pictures of {num_images.shape[0]} rows, but `cross_attention_states` has "
            f"{num_rows}: give one number for each of these."
        )
    return num_images.repeat_interleave(num_text_rows // num_rows)


def cross_attention_mask(
    visible_images: torch.Tensor, states: torch.Tensor, text_config: PreTrainedConfig, tokens_per_image: int
) -> torch.Tensor:
    """Which visual tokens each text token sees, from the number of pictures (rows, T) that it sees."""
    if "flash" in text_config._attn_implementation:
        text_config = copy.copy(text_config)
        text_config._attn_implementation = "sdpa"

    def is_visible(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx < visible_images[batch_idx, q_idx] * tokens_per_image

    return create_bidirectional_mask(
        config=text_config,
        inputs_embeds=states.new_empty((*visible_images.shape, 0)),
        attention_mask=None,
        encoder_hidden_states=states,
        and_mask_function=is_visible,
    )


__all__ = ["AureaVisualContext", "count_images", "group_by_row", "has_text_that_should_have_seen", "images_in_cache"]
