# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Whether a decoder reads visual tokens in the place of words, told by what it does when it is run on a few tokens.

    over ids, and over their embeddings    it must compute the same of both: nothing more of ids than to look them up
    with the mask of `prefix_mask`         it must run
    with that mask, over numbers           its first token must show that it sees the second

The last needs weights. So do, without data, a few decoders that ask their tensors for numbers. What is not seen while
a model is built is looked at when it is first used.
"""

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.utils import logging

from .configuration_aurea import AureaUnfitLanguageModelError
from .connectors_aurea import AureaConnector
from .vision_encoder_aurea import in_evaluation_mode
from .weaving_aurea import copy_on_meta


logger = logging.get_logger(__name__)

# What decoders raise that cannot run.
FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class AureaFunctionCounter(TorchFunctionMode):
    """Counts the functions of torch that give floating numbers: those that read ids, or what was made of ids, apart.

    Args:
        ids: of the text.
    """

    def __init__(self, ids: torch.Tensor):
        super().__init__()
        self.of_ids = [ids]
        self.calls = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if isinstance(result, torch.Tensor):
            reads_ids = any(one is known for one in (*args, *kwargs.values()) for known in self.of_ids)
            if result.is_floating_point():
                self.calls[function, reads_ids] += 1
            elif reads_ids:
                self.of_ids.append(result)
        return result


def reads_prefix(decoder: PreTrainedModel, connector: AureaConnector) -> bool:
    """Whether a decoder was seen to read visual tokens in the place of words; False if not all of it could be seen.

    It is run on the meta device and, if that cannot be, or numbers are wanted, where its weights are.

    Raises:
        AureaUnfitLanguageModelError: it does not.
    """
    if decoder.device.type != "meta" and connector.prefix_mask != "causal":
        return reads_prefix_here(decoder, connector, decoder.device)
    try:
        on_meta = copy_on_meta(decoder)
        on_meta.config.dtype = on_meta.dtype  # of which masks are made
    except RuntimeError as error:
        logger.debug(f"{type(error).__name__} in copying a language model without its data: {error}")
        return False
    is_read = reads_prefix_here(on_meta, connector, on_meta.device)
    if not is_read and decoder.device.type != "meta":
        is_read = reads_prefix_here(decoder, connector, decoder.device)
    return is_read


@torch.no_grad()
def reads_prefix_here(decoder: PreTrainedModel, connector: AureaConnector, device: torch.device) -> bool:
    """As `reads_prefix`, by running the decoder itself, whose inputs are on `device`."""
    with in_evaluation_mode(list(decoder.modules())):
        if not _reads_embeddings(decoder, device):
            return False
        return connector.prefix_mask == "causal" or _obeys_mask(decoder, connector, device)


def _reads_embeddings(decoder: PreTrainedModel, device: torch.device) -> bool:
    """Whether a decoder reads embeddings as it reads ids; False if it could not be run.

    Raises:
        AureaUnfitLanguageModelError: it reads ids otherwise.
    """
    name, embed = type(decoder).__name__, decoder.get_input_embeddings()
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    try:  # with a cache, for without one some look whether the row is one of several texts
        decoder(input_ids=ids, use_cache=True)  # what is computed once, as some rotary frequencies are, is not counted
        with AureaFunctionCounter(ids) as over_ids:
            decoder(input_ids=ids, use_cache=True)
    except FAILURES as error:
        logger.debug(f"{type(error).__name__} in the trial run of a language model: {error}")
        return False
    try:
        with AureaFunctionCounter(ids) as over_embeddings:
            inputs_embeds = embed(ids) + 0.5  # those of no word, from which ids could be guessed
            decoder(inputs_embeds=inputs_embeds, use_cache=True)
    except FAILURES as error:
        raise AureaUnfitLanguageModelError(
            decoder.config,
            f"whose {name} reads ids, but not embeddings in their place, as which visual tokens come "
            f"({type(error).__name__})",
        ) from error
    if over_ids.calls - over_embeddings.calls:
        raise AureaUnfitLanguageModelError(
            decoder.config,
            f"whose {name} makes more of ids than their embeddings: of a text with visual tokens in it, which comes "
            "as embeddings, it would make something else",
        )
    if inputs_embeds.shape[-1] != decoder.config.hidden_size:
        raise AureaUnfitLanguageModelError(
            decoder.config,
            f"whose embeddings have {inputs_embeds.shape[-1]} channels, not those of its layers "
            f"({decoder.config.hidden_size}), which visual tokens have",
        )
    return True


def _obeys_mask(decoder: PreTrainedModel, connector: AureaConnector, device: torch.device) -> bool:
    """Whether a decoder was seen to let a token see the next one where the mask says so; False where it has no data,
    or no token shows in another yet.

    Raises:
        AureaUnfitLanguageModelError: it does not let it, or does not run with such a mask.
    """
    name, embed = type(decoder).__name__, decoder.get_input_embeddings()
    tokens = torch.randn(3, decoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    rows = tokens[torch.tensor([[0, 1], [0, 2], [2, 1]])].to(device, embed(torch.zeros(1, 1).long().to(device)).dtype)
    mask = connector.mask_of(torch.zeros(3, 2, dtype=torch.long, device=device), None, decoder.config)
    try:
        outputs = decoder(inputs_embeds=rows, attention_mask=mask, use_cache=True).last_hidden_state
    except FAILURES as error:
        raise AureaUnfitLanguageModelError(
            decoder.config,
            f"whose {name} does not run with a mask of single tokens ({type(error).__name__}), which `prefix_mask="
            f'{connector.prefix_mask!r}` makes; `"causal"` makes none',
        ) from error
    if outputs.is_meta:
        return False
    first, second = outputs.unbind(1)
    if not torch.equal(first[0], first[1]):
        return True
    masks = mask.values() if isinstance(mask, dict) else [mask]
    if torch.equal(second[0], second[2]) or any(one is None for one in masks):
        return (
            False  # as where what attention adds begins with zeros: the second sees nothing either, or by recurrence
        )
    raise AureaUnfitLanguageModelError(
        decoder.config,
        f"whose {name} lets no token see a later one, whatever its mask says, as `prefix_mask="
        f'{connector.prefix_mask!r}` wants it; `"causal"` does not',
    )


__all__ = ["AureaFunctionCounter", "reads_prefix", "reads_prefix_here"]
