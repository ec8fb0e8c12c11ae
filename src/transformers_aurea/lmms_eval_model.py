# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""An Aurea, or any other model from pictures and text to text, for lmms-eval (https://github.com/EvolvingLMMs-Lab/lmms-eval).

    lmms-eval eval --model aurea --model_args pretrained=FOLDER --tasks TASK --batch_size 16

lmms-eval finds `manifest` by the entry point `lmms_eval.models` of this package, which does not need lmms-eval itself.
Each picture is encoded once for all its questions.
"""

import json
from collections.abc import Sequence
from itertools import groupby

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.utils import logging

from . import embedded_model_path
from .answering import AnsweringModel, answer_all


logger = logging.get_logger(__name__)

MAX_NEW_TOKENS = 1024  # where neither the task nor the model says how many


def manifest() -> ModelManifest:
    """What lmms-eval knows the model by."""
    return ModelManifest("aurea", chat_class_path=f"{__name__}.AureaForLmmsEval")


class Chats(Sequence[list[dict]]):
    """The conversations of requests, whose pictures are read when they are asked for."""

    def __init__(self, requests: list[Instance], task_dict: dict):
        self.requests, self.task_dict = requests, task_dict

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, index: int) -> list[dict]:
        _, doc_to_messages, _, doc_id, task, split = self.requests[index].args
        chat = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id])).to_hf_messages()
        for message in chat:
            for part in message["content"]:
                if part["type"] not in ("image", "text"):
                    raise ValueError(
                        f"{task}: document {doc_id} shows {part['type']}; this model sees pictures alone."
                    )
        return chat


class AureaForLmmsEval(lmms):
    """A model that answers the generative tasks of lmms-eval, in its chat interface.

    Args:
        pretrained: folder or hub id; by default the embedded model.
        device: where to; by default wherever there is room.
        dtype: of the weights; by default as they were saved.
        batch_size: questions at a time.
        attn_implementation, trust_remote_code, use_kernels: as for `from_pretrained`.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        use_kernels: bool = False,
    ):
        super().__init__()
        folder = pretrained or embedded_model_path()
        trust = {"trust_remote_code": trust_remote_code}
        self.model = AutoModelForImageTextToText.from_pretrained(
            folder,
            device_map=device or "auto",
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_kernels=use_kernels,
            **trust,
        )
        self.processor = AutoProcessor.from_pretrained(folder, **trust)
        self.batch_size = int(batch_size)

    @property
    def device(self):
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request, up to what ends it (`until`)."""
        answers = {}

        def settings(index: int) -> str:
            return json.dumps(requests[index].args[2], sort_keys=True)

        for kwargs, group in groupby(sorted(range(len(requests)), key=settings), key=settings):
            group = list(group)
            generation = json.loads(kwargs)
            until = generation.pop("until", None) or []
            until = [until] if isinstance(until, str) else until
            model = AnsweringModel(self.model, self.processor, **self.generation_arguments(generation))
            chats = Chats([requests[index] for index in group], self.task_dict)
            for index, answer in zip(group, answer_all(model, chats, self.batch_size)):
                answers[index] = before(answer.text, until)
                self.cache_hook.add_partial("generate_until", requests[index].args[:3:2], answers[index])
        return [answers[index] for index in range(len(requests))]

    def generation_arguments(self, wanted: dict) -> dict:
        """Arguments of `generate` for what a task wants: temperature 0 does not sample."""
        known = GenerationConfig().to_dict().keys()
        if others := sorted(wanted.keys() - known):
            logger.warning_once(f"No arguments of `generate`, and left out: {', '.join(others)} of the task.")
        wanted = {name: value for name, value in wanted.items() if name in known and value is not None}
        do_sample = wanted.pop("do_sample", wanted.get("temperature", 0) > 0)
        if not do_sample:
            wanted = {name: value for name, value in wanted.items() if name not in ("temperature", "top_p", "top_k")}
        most = self.model.generation_config.max_new_tokens or MAX_NEW_TOKENS
        return {"max_new_tokens": most, "do_sample": do_sample} | wanted

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "lmms-eval asks models of its chat interface for no likelihoods: use generative tasks."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("Tasks of several rounds, which show what was said before, are not for this model.")


def before(text: str, ends: list[str]) -> str:
    """A text up to the first of these."""
    for end in ends:
        text = text.partition(end)[0]
    return text.strip()
