# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What a model answers in conversations, of which many may be about the same pictures: each is encoded once.

    conversations ── answer_all ── batches of like length ── AnsweringModel ── one Answer each
                                                               └── pictures ── features, kept while somebody will ask

That is so for every connector: an Aurea's `generate` takes visual tokens that are ready as `cross_attention_states` or
`image_embeds`. A model of another kind is shown its pictures anew in each question.
"""

import copy
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, groupby, repeat
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from tqdm.auto import tqdm
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from .configuration_aurea import AureaConfig
from .pictures_aurea import ENCODED, read_picture
from .visual_context_aurea import group_by_row


STAND_IN = PIL.Image.new("RGB", (1, 1))
NEAR = 8  # batches whose conversations are ordered by length; their pictures are kept meanwhile


class Answer(NamedTuple):
    """What was said, without the white space around it, and whether it ended by itself."""

    text: str
    ended: bool


def user_message(pictures: Sequence, text: str) -> dict:
    """A turn of the user that shows pictures, in any form that `read_picture` understands or in memory, and asks."""
    return {
        "role": "user",
        "content": [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": text}],
    }


def pictures_of(conversation: list[dict]) -> list:
    """The pictures in the parts of a conversation, in order."""
    contents = [turn["content"] for turn in conversation if not isinstance(turn["content"], str)]
    return [part["image"] for content in contents for part in content if part["type"] == "image"]


def picture_key(picture) -> Hashable:
    """What pictures have in common that are the same: path or URL, encoded bytes, or pixels."""
    if isinstance(picture, Mapping):
        picture = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, (str, os.PathLike)):
        return os.fspath(picture)
    if isinstance(picture, PIL.Image.Image):
        kind = picture.mode, picture.size, picture.getpalette(), picture.info.get("transparency")
        data = picture.tobytes()
    elif isinstance(picture, (bytes, bytearray, memoryview)):
        kind, data = "encoded", picture
    else:
        array = np.asarray(picture)
        kind, data = (array.dtype, array.shape), array.tobytes()
    return str(kind), hashlib.sha256(data).digest()


class AnsweringModel:
    """A model that answers conversations, each with its pictures in the parts `{"type": "image", "image": picture}`.

    Args:
        model: from pictures and text to text.
        processor: its own.
        change_pixels: what is done to the `pixel_values` of pictures before they are encoded, by an Aurea.
        generation: arguments of `generate`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        change_pixels: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **generation,
    ):
        self.model, self.processor, self.generation = model, processor, generation
        self.change_pixels = change_pixels
        self._is_aurea = model.config.model_type == AureaConfig.model_type
        self._features: dict[Hashable, torch.Tensor] = {}  # of each picture (N, C)
        self._asked_later: Counter[Hashable] = Counter()

    def expect(self, pictures: Iterable) -> None:
        """Each of these will be shown once more, until when its features are kept."""
        self._asked_later.update(map(picture_key, pictures))

    def generation_arguments(self, prompt_length: int) -> dict:
        """Arguments of `generate` where prompts have so many tokens, padding included."""
        return self.generation

    @torch.inference_mode()
    def __call__(self, conversations: list[list[dict]], **generation) -> list[Answer]:
        """What is said next in each, by one call of `generate`, which gets `generation` too.

        Raises:
            ValueError: a picture cannot be read; the message names it.
        """
        inputs = self.inputs(conversations)
        length = inputs["input_ids"].shape[1]
        generated = self.model.generate(**inputs, **(self.generation_arguments(length) | generation))[:, length:]
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else ends, dtype=generated.dtype, device=generated.device)
        texts = self.processor.batch_decode(generated, skip_special_tokens=True)
        return [*map(Answer, map(str.strip, texts), torch.isin(generated, ends).any(dim=1).tolist())]

    def inputs(self, conversations: list[list[dict]]) -> BatchFeature:
        """Arguments of `generate`, with an Aurea's pictures as visual tokens: `cross_attention_states` or
        `image_embeds` `(batch_size, most pictures · num_visual_tokens, hidden_size)`, and `num_images`."""
        processor, pictures = self.processor, [pictures_of(one) for one in conversations]
        every = [*chain.from_iterable(pictures)]
        if self._is_aurea:
            processor, shown = copy_without_pixels(processor), repeat(STAND_IN)
        else:
            shown = map(_opened, every)
        inputs = processor.apply_chat_template(
            [_showing(one, shown) for one in conversations],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.model.device)
        if self._is_aurea and every:
            del inputs["pixel_values"]
            counts = torch.tensor([len(one) for one in pictures])
            states, num_images = group_by_row(self._encode(every), counts)
            inputs |= self.model.model.connector.inputs(states, num_images)
        return inputs

    def _encode(self, pictures: list) -> torch.Tensor:
        """Visual tokens of pictures (images, N, C), for which only those are encoded that were not before."""
        keys = [picture_key(picture) for picture in pictures]
        if new := {key: picture for key, picture in zip(keys, pictures) if key not in self._features}:
            opened = [_opened(picture) for picture in new.values()]
            pixels = self.processor(images=opened, return_tensors="pt")["pixel_values"].to(self.model.device)
            pixels = pixels if self.change_pixels is None else self.change_pixels(pixels)
            features = self.model.get_image_features(pixels).pooler_output
            self._features |= {key: one.clone() for key, one in zip(new, features)}
        features = torch.stack([self._features[key] for key in keys])
        self._asked_later.subtract(keys)
        for key in {key for key in keys if self._asked_later[key] <= 0}:
            del self._features[key], self._asked_later[key]
        return features


def answer_all(
    model: AnsweringModel,
    conversations: Sequence[list[dict]],
    batch_size: int,
    desc: str | None = None,
    are_expected: bool = False,
) -> list[Answer]:
    """What is said next in each conversation, in their order, with a progress bar on a terminal.

    Those about the same pictures are answered soon after each other. Conversations are read twice: to tell their
    pictures and lengths, and to be answered. `are_expected`: the model was told to `expect` all these pictures.
    """
    keys, lengths = [], []
    for conversation in conversations:
        pictures = pictures_of(conversation)
        model.expect(() if are_expected else pictures)
        keys.append([picture_key(picture) for picture in pictures])
        lengths.append(sum(len(text) for turn in conversation for text in _texts(turn)))
    found: list[Answer | None] = [None] * len(keys)
    with tqdm(total=len(keys), desc=desc, unit="question", disable=None) as bar:
        for batch in batches(keys, lengths, batch_size):
            for index, answer in zip(batch, model([conversations[index] for index in batch])):
                found[index] = answer
            bar.update(len(batch))
    return found


def batches(keys: list[list[Hashable]], lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Numbers of conversations that are answered together: as many pictures, and texts of like length, near to others
    about the same pictures."""
    first = {}
    for key in chain.from_iterable(keys):
        first.setdefault(key, len(first))
    order = sorted(range(len(keys)), key=lambda index: first[keys[index][0]] if keys[index] else -1)
    for start in range(0, len(order), NEAR * batch_size):
        near = order[start : start + NEAR * batch_size]
        near.sort(key=lambda index: (len(keys[index]), lengths[index]))
        for _, alike in groupby(near, key=lambda index: len(keys[index])):
            alike = list(alike)
            yield from (alike[begin : begin + batch_size] for begin in range(0, len(alike), batch_size))


def _opened(picture):
    """A picture in memory."""
    return read_picture(picture) if isinstance(picture, ENCODED) else picture


class NoPixels:
    """In an image processor's place where pictures are encoded already: all that remains of them is placeholders."""

    def fetch_images(self, images):
        return images

    def __call__(self, images: list, **kwargs) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.empty(len(images), 1, 3, 0, 0)}


def copy_without_pixels(processor: ProcessorMixin) -> ProcessorMixin:
    """A processor that does all but make pixels of pictures, for which any stand in."""
    processor = copy.copy(processor)
    processor.image_processor = NoPixels()
    return processor


def _texts(turn: dict) -> list[str]:
    content = turn["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]


def _showing(conversation: list[dict], pictures: Iterator) -> list[dict]:
    """The conversation with these in the place of its pictures."""
    return [
        turn
        if isinstance(turn["content"], str)
        else {
            **turn,
            "content": [
                {**part, "image": next(pictures)} if part["type"] == "image" else part for part in turn["content"]
            ],
        }
        for turn in conversation
    ]


__all__ = ["Answer", "AnsweringModel", "answer_all", "user_message"]
