# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Conversations with pictures → datasets and batches for training.

    LLaVA JSON + image folder ── load_llava_dataset ──┐
    any dataset of conversations ─── to_chat_rows ────┴─ rows ── AureaDataCollator ── input_ids, labels, pixel_values
                                                             └── check_dataset ────── which rows are bad, and why

A row has an `id`, `messages` (`role`, and a `content` of parts `{"type": "image"}` and `{"type": "text", "text": …}`)
and `images`, one for each part of type image, in order; TRL's trainers take it as well. A bad row is never mended and
never loses its pictures: it is reported under its identity, and either stops the training or is left out.

Needs the package `datasets` for all but the collator.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from jinja2 import TemplateError
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from .pictures_aurea import ENCODED, read_picture
from .processing_aurea import AureaProcessor


if TYPE_CHECKING:
    import datasets

logger = logging.get_logger(__name__)

ROLES = ("system", "user", "assistant")
LLAVA_ROLES = {"human": "user", "gpt": "assistant"}
PICTURE_KEYS = ("image", "path", "url", "base64", "image_url")  # under which a part of a content holds its picture
# What is wrong with a row's structure or pictures, and what chat templates run into.
ROW_ERRORS = (ValueError, TypeError, AttributeError, LookupError, TemplateError)
IGNORED = -100  # the label of a token that is not trained on

# The line break with which LLaVA sets a placeholder apart is no part of the text.
_PLACEHOLDER = re.compile(r"\n?<(image|video)>\n?")
_GENERATION_MARK = re.compile(r"{%[-+]?\s*generation\s*-?%}")


# datasets


def load_llava_dataset(
    json_file: str | os.PathLike | list[str | os.PathLike],
    image_folder: str | os.PathLike | None = None,
    *,
    streaming: bool = False,
) -> "datasets.Dataset | datasets.IterableDataset":
    """Conversations in LLaVA's format as rows of `id`, `messages` and `images`, the paths of the pictures.

    A record is `{"id", "image": path | [path, ...], "conversations": [{"from": "human" | "gpt", "value": text}]}`,
    with one `<image>` in the texts per picture; `image` may be absent. Records without an id are given their file and
    number. Pictures are not opened here, and bad records are kept: the collator and `check_dataset` report them.

    Args:
        json_file: a JSON array, or one JSON object a line (`.jsonl`), or a list of such files. Streaming reads lines
            one by one, but an array as a whole; several files are shared out among the workers that stream.
        image_folder: what relative paths are relative to; by default the working directory.

    Raises:
        FileNotFoundError: a file or the folder does not exist.
        ValueError: a file is no JSON, or a record no object; the message names the file and the line or record.
    """
    import datasets

    files = [str(file) for file in (json_file if isinstance(json_file, (list, tuple)) else [json_file])]
    for path in [*files, *([] if image_folder is None else [image_folder])]:
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path} does not exist")
    # `datasets` keeps what it has read in its cache, by these arguments; a file that has changed is read again.
    stamps = [[os.stat(file).st_mtime_ns, os.stat(file).st_size] for file in files]
    arguments = {"files": files, "stamps": stamps, "image_folder": image_folder and str(image_folder)}
    features = _row_features(datasets.Value("string"))
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    try:
        return kind.from_generator(_read_llava, features=features, gen_kwargs=arguments)
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None


def to_chat_rows(
    dataset: "datasets.Dataset | datasets.IterableDataset",
    *,
    image_folder: str | os.PathLike | None = None,
) -> "datasets.Dataset | datasets.IterableDataset":
    """A dataset of conversations as rows of `id`, `messages` and `images`; see `to_chat_row` for what is understood.

    Pictures stay encoded until the collator decodes them; only so can it say which row holds a corrupt one. TRL's
    trainers want them decoded: `rows.cast_column("images", [datasets.Image()])`.

    Args:
        image_folder: what relative paths of pictures are relative to.
    """
    import datasets

    columns = dataset.column_names or list(next(iter(dataset)))  # a stream may not know them
    for name, feature in (dataset.features or {}).items():
        if (encoded := without_decoding(feature)) != feature:
            dataset = dataset.cast_column(name, encoded)
    return dataset.map(
        to_chat_row,
        with_indices=True,
        fn_kwargs={"image_folder": image_folder and str(image_folder)},
        remove_columns=columns,
        features=_row_features(datasets.Image(decode=False)),
    )


def with_lengths(dataset: "datasets.Dataset", processor: AureaProcessor) -> "datasets.Dataset":
    """Rows of `load_llava_dataset` or `to_chat_rows` with a column `length`, the number of tokens of their words and
    pictures, by which `Trainer` forms batches of like length: `train_sampling_strategy="group_by_length"` or
    `"batch_rebalance"`."""
    lengths = []
    for row in dataset.select_columns("messages"):
        parts = [part for message in row["messages"] for part in message["content"]]
        texts = [part["text"] or "" for part in parts]
        tokens = processor.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        num_images = sum(part["type"] == "image" for part in parts)
        lengths.append(sum(map(len, tokens)) + processor.image_seq_length * num_images)
    return dataset.add_column("length", lengths)


def to_chat_row(row: dict[str, Any], index: int | None = None, image_folder: str | None = None) -> dict[str, Any]:
    """One conversation as `{"id", "messages", "images"}`, whatever is wrong with it.

    Args:
        row: its turns stand under `messages` or `conversations`, each with `role` and `content` or, in LLaVA's words,
            `from` and `value`. A content is a text, with one `<image>` per picture, or a list of parts. Pictures stand
            under `images` or `image`, or inside the parts (`image`, `path`, `url`, `base64`, `image_url`). If none
            of the `content` texts has an `<image>`, the pictures come before the first text of the user, as in TRL.
        index: the id of a row that has none.
        image_folder: what relative paths are relative to.
    """
    turns = _listed(row.get("messages")) or _listed(row.get("conversations"))
    column = _listed(row.get("images")) + _listed(row.get("image"))
    if all(image is None or (isinstance(image, str) and not image.strip()) for image in column):
        column = []

    messages = []
    for turn in turns:
        turn = turn if isinstance(turn, Mapping) else {}
        role = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
        content = next((turn[key] for key in ("content", "value") if turn.get(key) is not None), None)
        outside = [f"pictures under '{key}'" for key in ("images", "image") if _is_given(turn.get(key))]
        outside += [f"`{key}` beside the content" for key in ("reasoning_content", "tool_calls") if turn.get(key)]
        messages.append(
            {
                "role": LLAVA_ROLES.get(str(role), str(role)),
                "content": _to_parts(content) + [{"type": kind} for kind in outside],
            }
        )

    parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
    plain = all(isinstance(turn, Mapping) and isinstance(turn.get("content"), str) for turn in turns)
    if column and not parts and plain:
        first = next((message for message in messages if message["role"] == "user"), {"content": []})
        parts = [{"type": "image"} for _ in column]
        first["content"][:0] = parts
    images, column = [], iter(column)
    for part in parts:
        images += [part.pop("image")] if "image" in part else [*islice(column, 1)]
    images = [_locate(image, image_folder) for image in (*images, *column)]
    identity = row.get("id") if row.get("id") is not None else index
    return {"id": None if identity is None else str(identity), "messages": messages, "images": images}


def _listed(value) -> list:
    """The elements of a list, also as pandas and NumPy give it; one element by itself is a list of one."""
    if value is None:
        return []
    is_list = isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype.kind in "OUS")
    return list(value) if is_list else [value]


def _is_given(value) -> bool:
    """Whether it is more than what the columns of other rows leave behind: None, or nothing but None in a struct."""
    if isinstance(value, (Mapping, list, tuple)):
        return any(map(_is_given, value.values() if isinstance(value, Mapping) else value))
    return value is not None and not (isinstance(value, str) and not value)


def _to_parts(content) -> list[dict[str, Any]]:
    """A content as parts `{"type": "text", "text"}` and `{"type": "image"}`, with its `image` where it has one. What
    is neither keeps its place under a type that says what it is."""
    if isinstance(content, str):
        pieces = _PLACEHOLDER.split(content)  # text, then by turns the kind of a placeholder and text
        parts = [
            {"type": piece} if number % 2 else {"type": "text", "text": piece} for number, piece in enumerate(pieces)
        ]
        return [part for part in parts if part.get("text") != ""]
    return [_to_part(part) for part in _listed(content)]


def _to_part(part) -> dict[str, Any]:
    if isinstance(part, (str, int, float)):
        return {"type": "text", "text": str(part)}
    if isinstance(part, PIL.Image.Image):
        return {"type": "image", "image": part}
    if not isinstance(part, Mapping):
        return {"type": type(part).__name__}
    kind = "image" if part.get("type") == "image_url" else str(part.get("type"))
    words = "" if part.get("text") is None else part["text"]
    picture = next((part[key] for key in PICTURE_KEYS if _is_given(part.get(key))), None)
    if kind == "text":
        if picture is not None:
            return {"type": "text with a picture"}
        return _to_part(words) if isinstance(words, (str, int, float)) else {"type": f"text of {type(words).__name__}"}
    if kind != "image":
        return {"type": kind}
    if words != "":
        return {"type": "image with a text"}
    if isinstance(picture, Mapping) and "url" in picture:
        picture = picture["url"]
    return {"type": "image"} | ({} if picture is None else {"image": picture})


def _locate(picture, folder: str | None):
    """A relative path seen from `folder`; anything else as it is."""
    if isinstance(picture, dict) and picture.get("bytes") is None:
        picture = picture.get("path")
    if folder is None or not isinstance(picture, str) or picture.startswith(("http://", "https://", "data:")):
        return picture
    return os.path.join(folder, picture)


def _read_llava(files: list[str], stamps: list, image_folder: str | None) -> Iterator[dict]:
    for file in files:
        number = None
        for number, record in enumerate(read_records(file)):
            if not isinstance(record, dict):
                raise ValueError(f"{file}: record {number} is no object, but {record!r:.100}")
            row = to_chat_row(record, f"{Path(file).name}:{number}", image_folder)
            yield {**row, "images": [image and str(image) for image in row["images"]]}
        if number is None:
            raise ValueError(f"{file} holds no records")


def read_records(file: str) -> Iterator[Any]:
    with open(file, "rb") as stream:
        is_array = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
        stream.seek(0)
        if is_array:
            yield from _parse(stream.read(), file)
            return
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _parse(line, f"{file}, line {number},")


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is no JSON: {error}") from error


def _row_features(image) -> "datasets.Features":
    import datasets

    text = datasets.Value("string")
    messages = [{"role": text, "content": [{"type": text, "text": text}]}]
    return datasets.Features({"id": text, "messages": messages, "images": [image]})


def without_decoding(feature):
    """The feature with every `Image` in it, however deep, yielding what is stored."""
    import datasets

    if isinstance(feature, datasets.Image):
        return replace(feature, decode=False)
    if isinstance(feature, dict):
        return {name: without_decoding(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [without_decoding(inner) for inner in feature]
    if isinstance(feature, (datasets.Sequence, datasets.LargeList)):
        return replace(feature, feature=without_decoding(feature.feature))
    return feature


# batches


class AureaDataCollator:
    r"""Rows of conversations and pictures → a batch for `Trainer`, trained on the assistant's answers only.

    Takes any mixture of rows with no, one and several pictures, in every form that `to_chat_row` understands.
    `Trainer` needs `remove_unused_columns=False` to hand them on, and `with_lengths` to group them by length. A
    dataset that is streamed to several processes needs `accelerator_config={"dispatch_batches": False}` too:
    accelerate would cut a batch's pictures by its rows.

    Args:
        processor (`AureaProcessor`): its chat template decides what is trained on: what it writes between
            `{% generation %}` and `{% endgeneration %}`; without these marks, what an answer adds to the prompt before
            it, up to its end token. That takes two more renderings for each answer.
        max_length (`int`, *optional*): longer rows are cut off there. One that would lose a picture's placeholder, or
            all its answers, is bad instead.
        on_error (`str`, defaults to `"raise"`): `"skip"` leaves bad rows out, with a warning each, and keeps them in
            `skipped` as `(identity, reason)`. In the place of each stands a row of one token that is not trained on,
            so that batches keep their size and processes their step. With `num_workers` every worker has a list of
            its own; `check_dataset` finds all of them beforehand.
        train_on (`str`, defaults to `"assistant"`): `"all"` trains on every token but the pictures' placeholders.
        independent_turns (`bool`, defaults to `False`): each question and its answer are a conversation of their own
            about the row's pictures, which are encoded once for all of them. What was said before is not seen, so no
            answer gives away the next one. System messages at the front are repeated. They stand one after another
            in a packed row: batches have `position_ids`, which start anew with each, and no `attention_mask`. From
            that, transformers masks the others for eager, sdpa and flex attention, as long as no cache is used
            (`Trainer` uses none). A row that itself says `independent_turns: False` stays one conversation, in which
            each answer follows from all before it.
        pad_to_multiple_of (`int`, *optional*): the length of a batch is made a multiple of this.

    Raises:
        ValueError: for a bad row, with its identity: its `id`, else its place in the batch and first words. A row is
            bad if it has no turn, no answer or an empty one, an unknown role, a picture that is missing or corrupt, or
            not as many pictures as placeholders.
    """

    def __init__(
        self,
        processor: AureaProcessor,
        max_length: int | None = None,
        on_error: str = "raise",
        train_on: str = "assistant",
        independent_turns: bool = False,
        pad_to_multiple_of: int | None = None,
    ):
        if on_error not in ("raise", "skip"):
            raise ValueError(f'`on_error` must be "raise" or "skip", got {on_error!r}')
        if train_on not in ("assistant", "all"):
            raise ValueError(f'`train_on` must be "assistant" or "all", got {train_on!r}')
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be positive, got {value}")
        self.processor = processor
        self.max_length = max_length
        self.on_error = on_error
        self.train_on = train_on
        self.independent_turns = independent_turns
        self.pad_to_multiple_of = pad_to_multiple_of
        self.skipped: list[tuple[str, str]] = []
        tokenizer = processor.tokenizer
        known = (token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None)
        self._padding = next(known, 0)  # masked, so any id will do
        template = processor.chat_template
        template = template["default"] if isinstance(template, dict) else template
        self._template_marks_answers = bool(_GENERATION_MARK.search(template or ""))

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Returns:
            `input_ids`, `labels` and `attention_mask` (`position_ids` if turns are independent), all
            `(batch_size, sequence_length)`, padded on the right. If there are pictures, `pixel_values`
            `(num_images, num_views, 3, height, width)`, in the order of the placeholders.
        """
        encoded = []
        for position, row in enumerate(rows):
            try:
                encoded.append(self.encode(row))
            except ROW_ERRORS as error:
                identity, reason = _identify(row, position), _explain(error)
                if self.on_error == "raise":
                    raise ValueError(f"{identity}: {reason}") from error
                logger.warning(f"{identity} is left out: {reason}")
                self.skipped.append((identity, reason))
                encoded.append(self._nothing())
        return self._pad(encoded)

    def _nothing(self) -> dict[str, torch.Tensor]:
        """A row in the place of a bad one."""
        input_ids = torch.tensor([self._padding])
        return {"input_ids": input_ids, "labels": torch.tensor([IGNORED]), "position_ids": torch.tensor([0])}

    def encode(self, row: dict[str, Any]) -> dict[str, torch.Tensor]:
        """One row as `input_ids`, `labels` and `position_ids`, all `(sequence_length,)`, and, if it has pictures,
        `pixel_values`.

        Raises:
            ValueError: what is wrong with the row, without its identity; or what its template or pictures raise.
        """
        if not row.keys() & {"messages", "conversations"}:
            raise ValueError(
                f"it has no `messages` or `conversations`, but only {sorted(row)}: use `to_chat_rows`, and "
                f"`remove_unused_columns=False` in the arguments of the Trainer"
            )
        independent_turns = self.independent_turns and row.get("independent_turns", True)
        row = to_chat_row(row)
        messages = row["messages"]
        self._check(messages, len(row["images"]))
        if missing := [number for number, image in enumerate(row["images"]) if image is None]:
            raise ValueError(f"picture {missing[0]} is missing: it is None")
        images = [_open_picture(image, number) for number, image in enumerate(row["images"])]
        conversations = _separate(messages) if independent_turns else [messages]
        if images and len(conversations) > 1 and self.processor.image_seq_length > 1:
            raise ValueError(
                f"it has pictures and {len(conversations)} answers: with `independent_turns` the pictures stand "
                f"before the first alone, and a model whose text holds {self.processor.image_seq_length} tokens of "
                "each (`image_seq_length`) would show them to no other. Give a row for each answer"
            )
        inputs, trained = self._tokenize(conversations, images)
        lengths = [len(tokens) for tokens in inputs["input_ids"]]
        input_ids = torch.tensor([token for tokens in inputs["input_ids"] for token in tokens])  # (T,)
        position_ids = torch.cat([torch.arange(length) for length in lengths])
        is_picture = input_ids == self.processor.image_token_id
        labels = input_ids.masked_fill((trained == 0) | is_picture, IGNORED)
        if self.max_length is not None:
            if num_cut := int(is_picture[self.max_length :].sum()):
                raise ValueError(
                    f"it has {len(input_ids)} tokens, and `max_length={self.max_length}` would cut off the "
                    f"placeholders of {-(-num_cut // self.processor.image_seq_length)} of its {len(images)} pictures"
                )
            input_ids, labels, position_ids = (
                tensor[: self.max_length] for tensor in (input_ids, labels, position_ids)
            )
        if (labels[1:] == IGNORED).all():  # the first token is never predicted
            limit = "" if self.max_length is None else f" within `max_length={self.max_length}`"
            raise ValueError(f"none of its {len(trained)} tokens{limit} is trained on")
        pixels = {"pixel_values": torch.from_numpy(np.stack(inputs["pixel_values"]))} if images else {}
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids, **pixels}

    def _check(self, messages: list[dict], num_images: int) -> None:
        if not messages:
            raise ValueError("its conversation is empty: no turns under `messages` or `conversations`")
        for number, message in enumerate(messages):
            role, parts = message["role"], message["content"]
            if role not in ROLES:
                raise ValueError(f"turn {number} has the unknown role {role!r}; roles are {', '.join(ROLES)}")
            for part in parts:
                if part["type"] not in ("image", "text"):
                    raise ValueError(
                        f"turn {number} contains {part['type']!r}; contents are text and image, and pictures stand "
                        f"in parts of type image or under `images` of the row"
                    )
            if role == "assistant" and not any(part.get("text", "").strip() for part in parts):
                raise ValueError(f"turn {number} is an answer without text")
        if self.train_on == "assistant" and not any(message["role"] == "assistant" for message in messages):
            raise ValueError("it has no turn of the assistant, so there is nothing to train on")
        placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
        if placeholders != num_images:
            raise ValueError(
                f"Image features and image tokens do not match: {num_images} images for {placeholders} placeholders"
            )

    def _tokenize(self, conversations: list[list[dict]], images: list) -> tuple[dict, torch.Tensor]:
        """The processor's outputs for a row's conversations, the first with all pictures, and which of their tokens
        are trained on, `(T,)`, one conversation after another."""
        # Lists, since the assistant mask is made token by token, which takes far longer with tensors.
        if self.train_on == "assistant" and not self._template_marks_answers:
            conversations = self.processor.mark_words(conversations)
            texts, spans = zip(*(self._render(messages) for messages in conversations))
            spans = [self._after_expansion(text, answers) for text, answers in zip(texts, spans)]
            rows_of_images = [images, *[[]] * (len(texts) - 1)] if images else None
            inputs = self.processor(text=list(texts), images=rows_of_images, return_offsets_mapping=True)
            trained = []
            for offsets, answers in zip(map(torch.tensor, inputs.pop("offset_mapping")), spans):  # (T, 2), characters
                trained.append(sum((offsets[:, 0] < end) & (offsets[:, 1] > start) for start, end in answers))
            return inputs, torch.cat(trained)
        pictures = iter(images)
        conversations = [
            [{**turn, "content": [_fill(part, pictures) for part in turn["content"]]} for turn in messages]
            for messages in conversations
        ]
        only_answers = self.train_on == "assistant"
        inputs = self.processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_assistant_tokens_mask=only_answers
        )
        masks = inputs["assistant_masks"] if only_answers else inputs["attention_mask"]
        return inputs, torch.tensor([marked for mask in masks for marked in mask])

    def _after_expansion(self, text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Where these parts of a text stand once each placeholder has become `image_seq_length` tokens."""
        token, added = self.processor.image_token, self.processor.image_seq_length - 1
        return [tuple(place + added * len(token) * text.count(token, 0, place) for place in span) for span in spans]

    def _render(self, messages: list[dict]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and from where to where its answers stand in it, end tokens included.

        Raises:
            ValueError: the template changes an answer, so that it cannot be found.
        """
        render, ends = self.processor.apply_chat_template, tuple(self.processor.tokenizer.get_added_vocab())
        text, spans = render(messages), []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = render(messages[:number], add_generation_prompt=True) if number else None
            through = render(messages[: number + 1])
            if prompt is None or not (text.startswith(through) and through.startswith(prompt)):
                return text, self._find_answers(messages, text, ends)
            through = _end_of_turn(through, ends)
            spans.append((len(prompt), len(through)))
        return text, spans

    def _find_answers(self, messages: list[dict], text: str, ends: tuple[str, ...]) -> list[tuple[int, int]]:
        """The same for a template that writes the beginning of a conversation in another way if more turns follow, as
        Qwen3's, which thinks in the last answer alone: what stands around the answers is told by marks in their place.
        """
        marks = [f"⟦answer {number}⟧" for number in range(len(messages))]
        answers = {
            number: "".join(part.get("text", "") for part in message["content"])
            for number, message in enumerate(messages)
            if message["role"] == "assistant"
        }
        marked = [
            {**message, "content": [{"type": "text", "text": marks[number]}]} if number in answers else message
            for number, message in enumerate(messages)
        ]
        last = max(answers)
        render = self.processor.apply_chat_template
        closing = render(marked[: last + 1]).partition(marks[last])[2]
        closing = _end_of_turn(closing, ends)  # what ends an answer, and not what begins the next turn
        rest, position, spans = render(marked), 0, []
        for number, answer in answers.items():
            before, mark, rest = rest.partition(marks[number])
            start = position + len(before)
            answer = next((one for one in (answer, answer.strip()) if text.startswith(before + one, position)), None)
            if answer is None or not mark:
                raise ValueError(
                    f"the chat template writes the answer of turn {number} in another way than it is given, so it "
                    f"cannot be found: mark answers with {{% generation %}} in the template"
                )
            end = start + len(answer)
            prompt = render(messages[:number], add_generation_prompt=True) if number else None
            if prompt is not None and position <= len(prompt) < start and text.startswith(prompt):
                start = len(prompt)  # what the template itself adds to it, as an empty thought, is part of the answer
            position = end
            spans.append((start, end + (len(closing) if rest.startswith(closing) else 0)))
        if text[position:] != rest:
            raise ValueError(
                "the chat template writes what follows the answers by what they say, so they cannot be told apart: "
                "mark answers with {% generation %} in the template"
            )
        return spans

    def _pad(self, encoded: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        columns = {
            "input_ids": ([row["input_ids"] for row in encoded], self._padding),
            "labels": ([row["labels"] for row in encoded], IGNORED),
        }
        if self.independent_turns:
            columns["position_ids"] = ([row["position_ids"] for row in encoded], 0)
        else:
            columns["attention_mask"] = ([torch.ones_like(row["input_ids"]) for row in encoded], 0)
        batch = {}
        for name, (values, padding) in columns.items():
            batch[name] = pad_sequence(values, batch_first=True, padding_value=padding)  # (B, T)
            if self.pad_to_multiple_of is not None:
                missing = -batch[name].shape[1] % self.pad_to_multiple_of
                batch[name] = pad(batch[name], (0, missing), value=padding)
        pixels = [row["pixel_values"] for row in encoded if "pixel_values" in row]
        return batch | ({"pixel_values": torch.cat(pixels)} if pixels else {})


def check_dataset(
    dataset: Iterable[dict[str, Any]], processor: AureaProcessor, **kwargs: Any
) -> list[tuple[str, str]]:
    """`(identity, reason)` of every row that `AureaDataCollator(processor, **kwargs)` would refuse.

    Opens every picture. A row without an `id` is named by its index.
    """
    collator = AureaDataCollator(processor, **kwargs)
    bad_rows = []
    for index, row in enumerate(logging.tqdm(dataset, desc="Checking rows", unit="row")):
        try:
            collator.encode(row)
        except ROW_ERRORS as error:
            bad_rows.append((_identify({"id": f"row {index}"} | _without_none(row)), _explain(error)))
    return bad_rows


def _identify(row: dict[str, Any], position: int | None = None) -> str:
    if not isinstance(row, Mapping):
        return f"row {position} of its batch"
    if row.get("id") is not None:
        return str(row["id"])
    parts = (part for message in to_chat_row(row)["messages"] for part in message["content"])
    words = " ".join(part["text"] for part in parts if part["type"] == "text")
    return f"row {position} of its batch, {words[:60]!r}"


def _explain(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def _separate(messages: list[dict]) -> list[list[dict]]:
    """A conversation of its own for each answer: the system messages at the front, and what leads up to it.

    Raises:
        ValueError: a picture is shown after the first answer (the questions before it must not see it), or an answer
            follows no question.
    """
    start = next((number for number, message in enumerate(messages) if message["role"] != "system"), len(messages))
    ends = [number + 1 for number, message in enumerate(messages) if message["role"] == "assistant"]
    for number in range(ends[0] if ends else len(messages), len(messages)):
        if any(part["type"] == "image" for part in messages[number]["content"]):
            raise ValueError(
                f"turn {number} shows a picture: with `independent_turns` all come before the first answer"
            )
    begins = [start, *ends[:-1]]
    for begin, end in zip(begins, ends):
        if begin == end - 1:
            raise ValueError(f"turn {begin} answers no question: with `independent_turns` each answer follows one")
    ends[-1:] = [len(messages)]
    return [messages[:start] + messages[begin:end] for begin, end in zip(begins, ends)]


def _end_of_turn(text: str, ends: tuple[str, ...]) -> str:
    """The text without the white space behind its end token, which is never generated."""
    return text.rstrip() if text.rstrip().endswith(ends) else text


def _without_none(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if value is not None}


def _fill(part: dict[str, Any], pictures: Iterator) -> dict[str, Any]:
    return {**part, "image": next(pictures)} if part["type"] == "image" else part


def _open_picture(picture, number: int):
    """Decodes what is encoded.

    Raises:
        ValueError: it cannot be read; the message has its number and path.
    """
    if not isinstance(picture, ENCODED):
        return picture
    try:
        return read_picture(picture)
    except ValueError as error:
        name = picture.get("path") if isinstance(picture, Mapping) else picture
        source = f", {str(name)[:1000]}" if isinstance(name, (str, os.PathLike)) else ""
        raise ValueError(f"picture {number}{source}, cannot be read: {error.__cause__}") from error


__all__ = ["AureaDataCollator", "check_dataset", "load_llava_dataset", "to_chat_row", "to_chat_rows", "with_lengths"]
