# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Connectors: how the visual tokens of pictures reach the decoder.

    cross_attention   blocks woven into the decoder's layers read them; the text holds one placeholder per picture
    prefix            they take the place of the placeholders, of which the text holds one for each
    both              the two at once

The encoder of the text's pictures, the fusion and the projector are the same for all of them.
"""

from collections.abc import Callable

import torch
from transformers import Cache, PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate

from .configuration_aurea import AureaConfig, AureaUnfitLanguageModelError
from .versions_aurea import CACHE_NAME
from .visual_context_aurea import AureaVisualContext


class AureaConnector:
    """The connector of a model's configuration. It has no weights: those of the blocks are in the decoder's layers.

    Args:
        config: the model's.
    """

    def __init__(self, config: AureaConfig):
        self.type = config.connector_type
        self.prefix_mask = config.prefix_mask
        self.first_position_id = config.first_position_id
        self.weaves = config.connector_type in ("cross_attention", "both")
        self.fills = config.fills_placeholders
        self.tokens_per_image = config.tokens_per_image
        self.placeholders_per_image = config.placeholders_per_image

    def inputs(self, visual_tokens: torch.Tensor, num_images: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Visual tokens (rows, M·N, C) and pictures per row as arguments of the model."""
        readers = {"cross_attention_states": self.weaves, "image_embeds": self.fills}
        return {name: visual_tokens for name, reads in readers.items() if reads} | {"num_images": num_images}

    def context(
        self,
        image_tokens: torch.Tensor,
        cross_attention_states: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        num_images: torch.Tensor | None = None,
    ) -> AureaVisualContext:
        """Visual tokens beside the text (batch, T) that sees them.

        Raises:
            ValueError: they are for another connector.
        """
        ours = {"cross_attention_states": self.weaves, "image_embeds": self.fills}
        given = {"cross_attention_states": cross_attention_states, "image_embeds": image_embeds}
        if wrong := [name for name, tokens in given.items() if tokens is not None and not ours[name]]:
            right = next(name for name in ours if ours[name])
            raise ValueError(
                f"`{wrong[0]}` were given, but the model's `connector_type` is {self.type!r}, which has no use for "
                f"them. Give `{right}`."
            )
        if self.type == "both" and cross_attention_states is not None and image_embeds is None:
            raise ValueError(
                "`cross_attention_states` were given without `image_embeds`, but the model's `connector_type` is "
                '"both": its placeholders would stay words. Give the same visual tokens as `image_embeds` too.'
            )
        sizes = self.tokens_per_image, self.placeholders_per_image
        return AureaVisualContext(image_tokens, num_images, cross_attention_states, image_embeds, *sizes)

    def fill(
        self,
        context: AureaVisualContext,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        embed: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, torch.Tensor | None]:
        """The text as ids or, where visual tokens stand in it, as embeddings."""
        if context.image_embeds is None:
            return {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        if inputs_embeds is None:  # a placeholder's id may be beyond the vocabulary
            inputs_embeds = embed(input_ids.masked_fill(context.filled, 0))
        return {"input_ids": None, "inputs_embeds": context.fill(inputs_embeds)}

    def position_ids(
        self, position_ids: torch.Tensor | None, image_tokens: torch.Tensor, cache: Cache | None
    ) -> torch.Tensor | None:
        """(1, T), from `first_position_id` on, where none are given and the language model would begin at 0."""
        if position_ids is not None or self.first_position_id == 0:
            return position_ids
        places = torch.arange(image_tokens.shape[1], device=image_tokens.device)[None]
        return places + self.first_position_id + (0 if cache is None else cache.get_seq_length())

    def prompt_blocks(
        self,
        labels: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """(batch, T): 0 where a token's type is 0 or, without types, where it stands before the first label of its
        row; -1 elsewhere. In rows of several texts, told by positions that begin anew, each has a number of its own.
        None where nothing asks for it."""
        told = labels if token_type_ids is None else token_type_ids
        if told is None or self.prefix_mask != "prompt":
            return None
        is_answer = ((labels != -100) if token_type_ids is None else (token_type_ids != 0)).long()
        has_texts = position_ids is not None and position_ids.shape == told.shape
        starts = position_ids == self.first_position_id if has_texts else torch.zeros_like(told, dtype=torch.bool)
        if token_type_ids is not None:
            return torch.where(is_answer == 0, starts.cumsum(dim=1), -1)
        answers_so_far = is_answer.cumsum(dim=1)
        answers_before_text = torch.where(starts, answers_so_far - is_answer, 0).cummax(dim=1).values
        return torch.where(answers_so_far == answers_before_text, starts.cumsum(dim=1), -1)

    def mask(
        self,
        context: AureaVisualContext,
        attention_mask: torch.Tensor | dict | None,
        prompt_blocks: torch.Tensor | None,
        config: PreTrainedConfig,
        cache: Cache | None,
        position_ids: torch.Tensor | None,
        is_training: bool,
    ) -> torch.Tensor | dict | None:
        """The decoder's attention mask, of `prefix_mask`. One that is made ready already stays as it is.

        Raises:
            ValueError: in training, nothing tells the prompt from the answer.
        """
        is_ready = isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.ndim > 2)
        if is_ready or self.prefix_mask == "causal":
            return attention_mask
        blocks = context.picture_blocks if context.image_embeds is not None else None
        if self.prefix_mask == "prompt":
            if prompt_blocks is None and is_training:
                raise ValueError(
                    'With `prefix_mask="prompt"`, what is prompt is told by `labels`, and this step of training gives '
                    "none to `AureaForConditionalGeneration.forward` (TRL's fused heads, GRPO): the model would see "
                    'the answers. Choose `prefix_mask="causal"` or `"pictures"`.'
                )
            is_prompt = cache is None or cache.get_seq_length() == 0
            blocks = torch.full_like(context.image_tokens, 0 if is_prompt else -1, dtype=torch.long)
            blocks = blocks if prompt_blocks is None else prompt_blocks
        return attention_mask if blocks is None else self.mask_of(blocks, attention_mask, config, cache, position_ids)

    def mask_of(
        self,
        blocks: torch.Tensor,
        attention_mask: torch.Tensor | None,
        config: PreTrainedConfig,
        cache: Cache | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor | dict | None:
        """The decoder's attention mask where tokens of one number in `blocks` (batch, T) see each other, but -1 none.

        Raises:
            AureaUnfitLanguageModelError: the attention takes no mask of single tokens.
        """
        mask = create_masks_for_generate(
            config=config,
            inputs_embeds=torch.empty(*blocks.shape, 0, dtype=config.dtype, device=blocks.device),
            attention_mask=attention_mask,
            position_ids=position_ids,
            block_sequence_ids=blocks,
            **{CACHE_NAME: cache},
        )
        masks = mask.values() if isinstance(mask, dict) else [mask]  # of kinds of layers: recurrent ones have none
        if blocks.shape[1] > 1 and not any(one is not None and len(one.shape) == 4 for one in masks):
            raise AureaUnfitLanguageModelError(
                config,
                f"whose attention {config._attn_implementation!r} takes no mask of single tokens, as `prefix_mask="
                f'{self.prefix_mask!r}` makes, and would read the text causally. `attn_implementation="sdpa"` may '
                'take one, `prefix_mask="causal"` needs none',
            )
        return mask


__all__ = ["AureaConnector"]
