# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""How long things take on this machine, and the memory that they take. Imports torch: for `run` alone."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import PIL.Image
import torch
import transformers
from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel, ProcessorMixin

from ..answering import user_message
from ..configuration_aurea import AureaConfig
from ..hub_kernels_aurea import kernel_status


def peak_memory() -> int:
    """The most bytes that this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def times(function: Callable, *args, repeats: int, warmup: int = 1) -> list[float]:
    """Seconds of several runs after some that do not count; work on an accelerator is waited for."""
    found = []
    for number in range(warmup + repeats):
        synchronize()
        start = time.perf_counter()
        function(*args)
        synchronize()
        if number >= warmup:
            found.append(time.perf_counter() - start)
    return found


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def question_about(
    processor: ProcessorMixin, picture: PIL.Image.Image, question: str, batch_size: int
) -> BatchFeature:
    """Arguments of `generate` for as many questions about a picture each."""
    return processor.apply_chat_template(
        [[user_message([picture], question)]] * batch_size,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


@torch.inference_mode()
def time_answers(
    model: PreTrainedModel, inputs: BatchFeature, new_tokens: int, repeats: int, warmup: int
) -> dict[str, dict[str, float] | int | None]:
    """Milliseconds of a batch's first tokens, its pictures among them, of each further token of all its rows, and of
    each picture that is encoded (an Aurea's); tokens per second; the most bytes held.

    Each further token is the difference of an answer of one token and one of `new_tokens` more, run by turns.
    """
    batch_size = len(inputs["input_ids"])
    settings = {"repeats": repeats, "warmup": warmup}
    on_cuda = model.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()

    def generate(number: int):
        model.generate(**inputs, do_sample=False, max_new_tokens=number, min_new_tokens=number)

    encoding = None
    if model.config.model_type == AureaConfig.model_type:
        encoding = times(model.get_image_features, inputs["pixel_values"], **settings)
        encoding = spread([1000 * one / batch_size for one in encoding])
    first, last = [], []
    for number in range(warmup + repeats):
        pair = [times(generate, tokens, repeats=1, warmup=0)[0] for tokens in (1, 1 + new_tokens)]
        if number >= warmup:
            first.append(1000 * pair[0])
            last.append(1000 * pair[1])
    tokens = spread([(long - short) / new_tokens for short, long in zip(first, last)])
    return {
        "batch_size": batch_size,
        "prompt_tokens": inputs["input_ids"].shape[1],
        "ms_per_picture": encoding,
        "ms_to_first_token": spread(first),
        "ms_per_token": tokens,
        "tokens_per_second": 1000 * batch_size / tokens["median"] if tokens["median"] > 0 else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_cuda else peak_memory(),
    }


def describe_machine(model: PreTrainedModel) -> dict:
    """What the times are times of."""
    device = model.device
    parts = {name: value for name, value in vars(model.config).items() if isinstance(value, PreTrainedConfig)}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": {name: part._attn_implementation for name, part in parts.items() if part._attn_implementation},
        "fusion": kernel_status(model)._asdict(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
