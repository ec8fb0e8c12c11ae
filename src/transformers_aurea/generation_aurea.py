# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The published way of sampling, as logits processors for `generate`.

Published order: repetition penalty over what has been generated, never over the prompt; top-k, then top-p on the
probabilities at temperature 1; the temperature last. `generate` on its own applies the temperature first and
penalises the prompt as well. What it gets as `logits_processor` comes on top of what the generation configuration
says, so that is switched off:

    inputs = processor(images=image, text=prompt, return_tensors="pt")
    sampling = published_sampling(prompt_length=inputs["input_ids"].shape[1])
    model.generate(**inputs, **NEUTRAL_SAMPLING, logits_processor=sampling, max_new_tokens=50)

`generate` draws from the resulting probabilities; the original takes the argmax after adding Gumbel noise, which has
the same distribution. It has no greedy mode.
"""

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


NEUTRAL_SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
"""Arguments of `generate` that leave all filtering and scaling to `published_sampling`."""


class DynamicTopKLogitsWarper(LogitsProcessor):
    """Top-k with a k that shrinks from step to step: `k = int(max_top_k * (1 - f) + min_top_k * f)`.

    `f = i / max_new_tokens` with `i` the number of tokens generated so far, so the first step has `max_top_k`, and
    `min_top_k` is approached but not reached. Further steps than `max_new_tokens` have `min_top_k`.

    Args:
        prompt_length (`int`): length of `input_ids` as given to `generate`, padding included; 0 with `inputs_embeds`.
        max_new_tokens (`int`): as given to `generate`.
        min_top_k (`int`), max_top_k (`int`): the bounds, `1 <= min_top_k <= max_top_k`.

    Raises:
        ValueError: a number is out of range; or, when called, `input_ids` are shorter than `prompt_length`.
    """

    def __init__(self, prompt_length: int, max_new_tokens: int, min_top_k: int = 50, max_top_k: int = 90):
        _check_integer("prompt_length", prompt_length, minimum=0)
        _check_integer("max_new_tokens", max_new_tokens, minimum=1)
        _check_integer("min_top_k", min_top_k, minimum=1)
        _check_integer("max_top_k", max_top_k, minimum=min_top_k)
        self.prompt_length = prompt_length
        self.max_new_tokens = max_new_tokens
        self.min_top_k = min_top_k
        self.max_top_k = max_top_k

    def top_k_at(self, step: int) -> int:
        """k at a step, counted from 0."""
        fraction = min(step / self.max_new_tokens, 1.0)
        return int(self.max_top_k * (1 - fraction) + self.min_top_k * fraction)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        step = input_ids.shape[1] - self.prompt_length
        if step < 0:
            raise ValueError(
                f"`prompt_length` is {self.prompt_length}, but `input_ids` have only {input_ids.shape[1]} tokens: "
                f"give it the length of the `input_ids` that `generate` gets"
            )
        return TopKLogitsWarper(self.top_k_at(step))(input_ids, scores)


def published_sampling(
    prompt_length: int,
    temperature: float = 0.1,
    repetition_penalty: float = 1.1,
    top_k: int = 50,
    top_p: float = 0.9,
    dynamic_top_k: bool = False,
    min_top_k: int = 50,
    max_top_k: int = 90,
    max_new_tokens: int | None = None,
) -> LogitsProcessorList:
    """The published processors in the published order, with the published defaults; see the top of the file.

    Args:
        prompt_length (`int`): length of `input_ids` as given to `generate`, padding included; 0 with `inputs_embeds`.
        temperature (`float`): divides the logits, after all filtering.
        repetition_penalty (`float`): positive logits of generated tokens are divided by it, negative ones multiplied.
        top_k (`int`): how many tokens are kept at most.
        top_p (`float`): tokens are dropped that have more than this probability in front of them.
        dynamic_top_k (`bool`): `DynamicTopKLogitsWarper` with `min_top_k`, `max_top_k` and `max_new_tokens` in place
            of `top_k` and `top_p`.

    Raises:
        ValueError: an argument is out of range or missing.
    """
    _check_integer("prompt_length", prompt_length, minimum=0)
    for name, value in (("temperature", temperature), ("repetition_penalty", repetition_penalty)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise ValueError(f"`{name}` must be a positive number, got {value!r}")
    processors = LogitsProcessorList()
    if repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(float(repetition_penalty), prompt_length or None))
    if dynamic_top_k:
        if max_new_tokens is None:
            raise ValueError("`dynamic_top_k` needs `max_new_tokens`, the number that `generate` gets as well")
        processors.append(DynamicTopKLogitsWarper(prompt_length, max_new_tokens, min_top_k, max_top_k))
    else:
        _check_integer("top_k", top_k, minimum=1)
        if isinstance(top_p, bool) or not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
            raise ValueError(f"`top_p` must lie in 0…1 and not be 0, got {top_p!r}")
        processors.append(TopKLogitsWarper(top_k))
        processors.append(TopPLogitsWarper(top_p))
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(float(temperature)))
    return processors


def _check_integer(name: str, value: int, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{name}` must be an integer of at least {minimum}, got {value!r}")
