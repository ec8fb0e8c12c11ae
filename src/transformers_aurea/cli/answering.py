# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A model that was named on the command line, and what it answers. Imports torch: for `run` alone."""

import os
import sys
from argparse import Namespace
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    TextStreamer,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging

from .. import NEUTRAL_SAMPLING, embedded_model_path, published_sampling
from ..answering import AnsweringModel, user_message
from ..pictures_aurea import read_picture


MAX_NEW_TOKENS = 256  # where neither the user nor the model says how many


def load_config(model: str | None, trust_remote_code: bool = False) -> tuple[str, PreTrainedConfig]:
    """Folder or hub id and configuration of a model; of the embedded one for None.

    Raises:
        ValueError: there is no such model, or it answers no questions about pictures.
    """
    folder = model or embedded_model_path()
    if os.path.exists(folder) and not Path(folder, "config.json").is_file():
        raise ValueError(f"{folder} is no model: it is not a folder with a config.json.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, HFValidationError) as error:
        where = "cannot be read" if os.path.exists(folder) else "is no folder, and no hub's model that could be had"
        raise ValueError(f"{folder} {where}: {error}") from error
    if not trust_remote_code and config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"{folder} is a '{config.model_type}', which answers no questions about pictures. If it brings code by "
            "which it does, give --trust_remote_code."
        )
    return folder, config


def load(args: Namespace) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model that is named by `add_model_arguments`, and its processor."""
    device = args.device
    try:
        if device != "auto":
            torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # the former of a torch without CUDA
        args.parser.error(f"--device {device}: {str(error).splitlines()[0]}")
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    folder, config = load_config(args.model, args.trust_remote_code)
    trust = {"trust_remote_code": args.trust_remote_code}
    model = AutoModelForImageTextToText.from_pretrained(
        folder, config=config, dtype=args.dtype, device_map=device, use_kernels=args.use_kernels, **trust
    )
    return model, AutoProcessor.from_pretrained(folder, **trust)


def open_picture(name: str) -> Image.Image:
    """A picture in memory: of a file, a URL, or of standard input for `-`.

    Raises:
        ValueError: it is none; the message names it.
    """
    if name != "-":
        return read_picture(name)
    if not (data := sys.stdin.buffer.read()):
        raise ValueError("Standard input is empty: - stands for a picture there.")
    return read_picture(data)


class Printer(TextStreamer):
    """Prints an answer while it is made, without the white space around it."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.has_begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False):
        text = text if self.has_begun else text.lstrip()
        self.has_begun = self.has_begun or bool(text)
        super().on_finalized_text(text, stream_end)


class Answerer(AnsweringModel):
    """A model that answers as `add_generation_arguments` says."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, args: Namespace):
        super().__init__(model, processor)
        self.args = args
        self.num_beams = args.num_beams or model.generation_config.num_beams or 1
        if args.seed is not None:
            set_seed(args.seed)

    def __call__(self, conversations: list[list[dict]], stream: bool = False) -> list[str]:
        """One answer to each conversation; `stream`: to the only one, which is printed meanwhile."""
        is_streamed = stream and self.num_beams == 1
        streamer = Printer(self.processor.tokenizer) if is_streamed else None
        texts = [answer.text for answer in super().__call__(conversations, streamer=streamer)]
        if stream and not is_streamed:
            print(*texts, flush=True)
        return texts

    def generation_arguments(self, prompt_length: int) -> dict:
        """Arguments of `generate`."""
        args = self.args
        max_new_tokens = args.max_new_tokens or self.model.generation_config.max_new_tokens or MAX_NEW_TOKENS
        arguments = {"max_new_tokens": max_new_tokens, "num_beams": self.num_beams}
        if args.dynamic_top_k:
            settings = {} if args.temperature is None else {"temperature": args.temperature}
            bounds = dict(zip(("min_top_k", "max_top_k"), args.dynamic_top_k))
            sampling = published_sampling(
                prompt_length, **settings, **bounds, dynamic_top_k=True, max_new_tokens=max_new_tokens
            )
            return arguments | NEUTRAL_SAMPLING | {"logits_processor": sampling}
        given = {name: vars(args)[name] for name in ("temperature", "top_p", "top_k")}
        given = {name: value for name, value in given.items() if value is not None}
        if args.temperature == 0:
            return arguments | {"do_sample": False}
        return arguments | given | ({"do_sample": True} if given else {})


__all__ = ["Answerer", "load", "load_config", "open_picture", "user_message"]
