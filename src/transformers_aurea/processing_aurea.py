# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Text and pictures → `input_ids`, `attention_mask`, `pixel_values`, and the published prompt as a chat template.

A picture is one placeholder in the text, `<|image|>`. It stays one token where visual features reach the language
model through cross-attention, and becomes as many as there are visual tokens where these stand in the text. Every row
must have as many placeholders as pictures, and words of a conversation which look like a placeholder or the end of a
turn stay words.
"""

import os
import re
import threading
from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from functools import lru_cache

import numpy as np
import torch
from tokenizers import normalizers, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput, is_pil_image
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import PreTokenizedInput, TextInput

from .configuration_aurea import AureaConfig
from .image_processing_aurea import AureaImageProcessor
from .parts_aurea import IMAGE_TOKEN, Part, load_tokenizer, parts_config, view_settings
from .parts_aurea import image_token as image_token_of


# Stands inside a word that is no control token although it reads like one, and is dropped as the text is tokenized.
MARK = "\uf8f0"  # of the private use area, which normalizers leave alone
# The same for a tokenizer that cannot drop it: invisible, and kept.
KEPT_MARK = "\u2060"  # word joiner
PROMPT_FIELDS = ("{images}", "{text}")
TOKENIZER_LOCK = threading.RLock()  # while one of them drops marks

SYSTEM_PROMPT = (
    "You are AureaPhi4, a helpful vision-language assistant skilled in analyzing images and text for tasks such as "
    "detailed captioning, visual Q&A, spatial reasoning, object detection, classification, OCR, and advanced "
    "multimodal reasoning."
)

_RENDER = """{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is not none -%}
        {%- for part in content -%}
            {%- if part['type'] in ['image', 'image_url'] -%}
                {{- '<|image|>' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] or '' -}}
            {%- else -%}
                {{- raise_exception("Content must be of type 'text' or 'image', got '" ~ part['type'] ~ "'") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

# The published prompt has no separators between its parts, hence no line may leave white space behind. `<|assistant|>`
# swallows the spaces after it when it is tokenized; stripping them here keeps the assistant mask off that token.
CHAT_TEMPLATE = (
    _RENDER
    + """{%- set found = namespace(image=false, system=false) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set found.system = true -%}
    {%- elif '<|image|>' in render(message['content']) -%}
        {%- set found.image = true -%}
    {%- endif -%}
{%- endfor -%}
{%- if found.image and not found.system -%}
    {{- '<|system|>"""
    + SYSTEM_PROMPT
    + """<|end|>' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}
        {%- generation -%}
            {{- render(message['content']).lstrip() + '<|end|>' -}}
        {%- endgeneration -%}
    {%- elif message['role'] in ['system', 'user'] -%}
        {{- '<|' + message['role'] + '|>' + render(message['content']) + '<|end|>' -}}
    {%- else -%}
        {{- raise_exception("Roles are 'system', 'user' and 'assistant', got '" ~ message['role'] ~ "'") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""
)

# For a language model without a template of its own.
PLAIN_CHAT_TEMPLATE = (
    _RENDER
    + """{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'Assistant:\n' -}}
        {%- generation -%}
            {{- render(message['content']).lstrip() + eos_token -}}
        {%- endgeneration -%}
    {%- elif message['role'] in ['system', 'user'] -%}
        {{- message['role'] | capitalize + ':\n' + render(message['content']) + '\n' -}}
    {%- else -%}
        {{- raise_exception("Roles are 'system', 'user' and 'assistant', got '" ~ message['role'] ~ "'") -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Assistant:\n' -}}
{%- endif -%}
"""
)

# For a processor whose `prompt_format` has what else a prompt needs.
CONTENT_TEMPLATE = _RENDER + "{%- for message in messages -%}{{- render(message['content']) -}}{%- endfor -%}"

# In front of a language model's own template, which knows only text: lists of parts become text. The last tag leaves
# the white space behind it alone.
FLATTENING_PREFIX = (
    _RENDER
    + """{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message['content'] is defined and message['content'] is not none -%}
        {%- set message = dict(message, content=render(message['content'])) -%}
    {%- endif -%}
    {%- set flat.messages = flat.messages + [message] -%}
{%- endfor -%}
{%- set messages = flat.messages +%}"""
)


def chat_template_for(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own template if it marks its answers for training; else the published one if the tokenizer has
    its tokens; else its own; else a plain one. One of its own is taught about pictures.

    Raises:
        ValueError: the tokenizer has neither a template nor an `eos_token` to end an answer.
    """
    vocabulary = tokenizer.get_vocab()
    own = None if tokenizer.chat_template is None else tokenizer.get_chat_template()
    has_published_tokens = all(f"<|{name}|>" in vocabulary for name in ("system", "user", "assistant", "end"))
    if has_published_tokens and not (own and re.search(r"{%[-+]?\s*generation\b", own)):
        template = CHAT_TEMPLATE
    elif own is not None:
        template = FLATTENING_PREFIX + own
    elif tokenizer.eos_token is not None:
        template = PLAIN_CHAT_TEMPLATE
    else:
        raise ValueError(
            "The tokenizer has neither a chat template nor an `eos_token` that could end an answer: give "
            "`chat_template`, or set `tokenizer.eos_token`."
        )
    return template.replace(IMAGE_TOKEN, image_token_of(tokenizer))


class AureaProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {
        "text_kwargs": {
            "padding": False,
            "add_special_tokens": False,  # the prompt is complete as the chat template writes it
            "return_mm_token_type_ids": True,  # what is generated after it is no picture, whichever token it is
        },
    }


class AureaProcessor(ProcessorMixin):
    r"""An image processor and a tokenizer as one, with the published prompt as chat template.

    Args:
        image_processor (`AureaImageProcessor`): turns pictures into `pixel_values`.
        tokenizer (`PreTrainedTokenizerBase`): its vocabulary must contain the image token, `tokenizer.image_token`
            where it has one, else `<|image|>`. Control tokens that it looks for after normalization it then looks for
            before: what normalization makes of other words is none.
        chat_template (`str`, *optional*): a Jinja template; the published one by default. The default system message
            is part of it: it is written if the conversation contains a picture and no system message of its own.
        image_seq_length (`int`, *optional*, defaults to 1): how many tokens a placeholder becomes, the model's
            `config.placeholders_per_image`: 1 with `connector_type="cross_attention"`, else one per visual token.
        image_token (`str`, *optional*): the placeholder, where it is not the one above.
        adds_special_tokens (`bool`, *optional*, defaults to `False`): whether the tokenizer puts tokens of its own,
            such as one for the beginning, around each text. The default chat template writes all that there is.
        prompt_format (`str`, *optional*): what each text becomes, such as `"{images}<bos>{text}\\n"`: `{images}` is
            all of it up to its last placeholder, `{text}` the rest. Where no text has a placeholder, pictures come
            first. Answers may then be given as `suffix`.

    Raises:
        ValueError: the image token is not in the tokenizer's vocabulary, `image_seq_length` is less than 1, or
            `prompt_format` has other fields, or not both.
    """

    valid_processor_kwargs = AureaProcessorKwargs

    def __init__(
        self,
        image_processor,
        tokenizer,
        chat_template=None,
        image_seq_length: int = 1,
        image_token: str | None = None,
        adds_special_tokens: bool = False,
        prompt_format: str | None = None,
    ):
        if image_seq_length < 1:
            raise ValueError(f"`image_seq_length` must be at least 1, got {image_seq_length}.")
        if prompt_format is not None and not all(prompt_format.count(field) == 1 for field in PROMPT_FIELDS):
            raise ValueError(f"`prompt_format` must have {' and '.join(PROMPT_FIELDS)}, got {prompt_format!r}.")
        self.image_seq_length = image_seq_length
        self.adds_special_tokens = adds_special_tokens
        self.prompt_format = prompt_format
        self.image_token = image_token_of(tokenizer) if image_token is None else image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        if self.image_token_id is None or tokenizer.convert_ids_to_tokens(self.image_token_id) != self.image_token:
            raise ValueError(
                f"The tokenizer does not know the image token {self.image_token!r}: add it with "
                f'`tokenizer.add_special_tokens({{"extra_special_tokens": ["{self.image_token}"]}})` and resize the '
                f"model's embeddings to fit"
            )
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            late = [token for token in _special_tokens(tokenizer, self.image_token) if token.normalized]
            tokenizer.add_tokens([AddedToken(**{**token.__getstate__(), "normalized": False}) for token in late])
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        # Saving sets it, loading drops it; a processor saved and loaded is to be the one that it was.
        self.auto_map = {"AutoProcessor": "processing_aurea.AureaProcessor"}

    @classmethod
    def from_pretrained_parts(
        cls,
        vision: Part | None,
        spatial_vision: Part | None,
        text: Part,
        *,
        tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
        image_processor: AureaImageProcessor | None = None,
        config: AureaConfig | None = None,
        chat_template: str | None = None,
    ) -> "AureaProcessor":
        r"""The processor of [`AureaForConditionalGeneration.from_pretrained_parts`], which takes the same parts.

        Args:
            vision, spatial_vision (`str`, `os.PathLike` or `PreTrainedModel`):
                The encoders. Each view is the whole picture, normalised and interpolated as the image processor where
                the encoder comes from has it; where there is none, as SigLIP's and DINOv2's do.
            text (`str`, `os.PathLike` or `PreTrainedModel`):
                The language model, for its tokenizer, unless `tokenizer` gives one.
            tokenizer: As given for the model. It gets an image token if it has none.
            image_processor (`AureaImageProcessor`, *optional*): Used as it is, in place of the above.
            config (`AureaConfig`, *optional*):
                The model's configuration, for the sizes of the views, and the tokens of a picture where its connector
                fills placeholders. By default that of these parts as they are.
            chat_template (`str`, *optional*):
                By default the tokenizer's own, taught to write the image token, if it marks its answers for training
                (`{% generation %}`); else the published one if the tokenizer has its tokens; else the tokenizer's own,
                or a plain one.

        Raises:
            OSError, TypeError, ValueError: as for the model; `config` is of another tokenizer.
        """
        tokenizer = load_tokenizer(text, tokenizer)
        if image_processor is None:
            encoders = {"vision_config": vision, "spatial_vision_config": spatial_vision}
            # The sizes are the same for any fusion of two, and this one has nothing to refuse.
            fusion = {} if None in encoders.values() else {"feature_fusion_config": {"fusion_type": "concat"}}
            sizes = config or parts_config(vision, spatial_vision, text, **fusion)
            views = zip(sizes.encoder_configs, sizes.view_sizes, ("", "spatial_"))
            settings = [view_settings(encoders[name], size, prefix) for name, size, prefix in views]
            image_processor = AureaImageProcessor(do_spatial_view=len(settings) > 1, **dict(ChainMap(*settings)))
        processor = cls(
            image_processor,
            tokenizer,
            chat_template=chat_template or chat_template_for(tokenizer),
            image_seq_length=1 if config is None else config.placeholders_per_image,
        )
        if config is not None and config.image_token_id != processor.image_token_id:
            raise ValueError(
                f"`config.image_token_id` is {config.image_token_id}, but {processor.image_token!r} has the id "
                f"{processor.image_token_id} in the tokenizer. Give the tokenizer that the model was made with."
            )
        return processor

    def add_encoder(self, encoder: Part, config: AureaConfig, name: str = "spatial_vision") -> None:
        r"""Makes two views of a picture, for a model that was given this encoder by its `add_encoder`, in place.

        The first view stays what it is; the new one shows what that does, cropped alike, in the new encoder's size
        and normalisation.

        Args:
            encoder (`str`, `os.PathLike` or `PreTrainedModel`): As given for the model.
            config ([`AureaConfig`]): The model's, with both encoders.
            name (`str`, *optional*, defaults to `"spatial_vision"`): Which of the model's encoders is the new one.

        Raises:
            ValueError: `config` has one encoder, or there are two views already.
        """
        old, views = self.image_processor.to_dict(), config.views
        if len(views) == 1 or old.get("do_spatial_view"):
            raise ValueError(
                f"The processor makes {1 + bool(old.get('do_spatial_view'))} views for a model of {len(views)} "
                "encoders: `add_encoder` of the model comes first, and once."
            )
        new = views.pop(f"{name}_config")
        [first] = views.values()
        settings = {key: old[key] for key in ("size", "resample", "image_mean", "image_std")}
        settings["crop_size"] = old["crop_size"] if old.get("do_center_crop") else None
        added = view_settings(encoder, new.size, "") | _cropped_alike(settings, first.size, new.size)
        both = dict(zip(("", "spatial_"), (settings, added) if new.index == 1 else (added, settings)))
        named = {f"{prefix}{key}": value for prefix, view in both.items() for key, value in view.items()}
        if not isinstance(self.image_processor, AureaImageProcessor):
            if new.index == 0:
                raise ValueError("An image processor of another kind makes the first view, where the new one belongs.")
            named["first_view"] = old
        switches = ("do_convert_rgb", "do_resize", "do_rescale", "rescale_factor", "do_normalize")
        named |= {key: old[key] for key in switches}
        self.image_processor = AureaImageProcessor(**named, do_spatial_view=True)
        self.image_seq_length = config.placeholders_per_image

    def __call__(
        self,
        images: ImageInput | None = None,
        text: TextInput | PreTokenizedInput | list[TextInput] | list[PreTokenizedInput] | None = None,
        suffix: TextInput | list[TextInput] | None = None,
        **kwargs: Unpack[AureaProcessorKwargs],
    ) -> BatchFeature:
        r"""
        Args:
            images: one picture or many, see `AureaImageProcessor`. A flat list is dealt out to the texts in order, by
                the number of placeholders in each; a nested list has one entry per text: a list, a picture or `None`.
            text: one text or a list of texts, each with one `<|image|>` per picture.
            suffix: the answer to each, to train on, for a processor with a `prompt_format`.

        Returns:
            `input_ids`, `attention_mask` and `mm_token_type_ids` (1 at each placeholder), all
            `(batch_size, sequence_length)`, and, if there are pictures, `pixel_values`
            `(num_images, num_views, 3, height, width)`, in the order of the placeholders. With a `prompt_format` also
            `token_type_ids`, 1 in the answer, and with answers their `labels`.

        Raises:
            ValueError: texts and pictures do not match, or neither is given; what the image processor raises.
            TypeError: a text is no string.
        """
        given = kwargs.keys() | kwargs.get("text_kwargs", {}).keys()
        if self.adds_special_tokens and "add_special_tokens" not in given:
            kwargs["add_special_tokens"] = True
        if self.prompt_format is not None:
            kwargs["return_token_type_ids"] = True
        if suffix is not None:
            kwargs["text_pair"] = self._answers(suffix)
        texts = text if isinstance(text, (list, tuple)) else [text]
        is_marked = any(isinstance(one, str) and MARK in one for one in texts)
        with _dropping_marks(self.tokenizer, self._control_words().spelled) if is_marked else nullcontext():
            inputs = super().__call__(images=images, text=text, **kwargs)
        if suffix is not None:
            inputs["labels"] = _labels(inputs["input_ids"], inputs["token_type_ids"])
        return inputs

    def _answers(self, suffix: TextInput | list[TextInput]) -> list[str]:
        if self.prompt_format is None:
            raise ValueError(
                f"`suffix` is {suffix!r:.100}, but this processor has no `prompt_format`, after which it could stand. "
                "Write the answer into the text or the conversation."
            )
        suffixes = suffix if isinstance(suffix, (list, tuple)) else [suffix]
        return [one + self.tokenizer.eos_token for one in suffixes]

    def _control_words(self, placeholders: bool = True) -> "_ControlWords":
        return _control_words(self.tokenizer, len(self.tokenizer), self.image_token, placeholders)

    def apply_chat_template(self, conversation, chat_template=None, tools=None, documents=None, **kwargs):
        r"""As for any processor, but what a conversation says is text: a control token of the tokenizer (`<|image|>`,
        `<|end|>`) that stands in it is tokenized as the characters that it is made of, and pictures and turns are
        those of the conversation's structure alone.

        With `tokenize=False` such words are marked by a character of the private use area, by which the processor
        knows them when it is given the text, and which it drops. There, conversations whose contents are strings, not
        lists of parts, may hold placeholders, for pictures that are given with the text.

        Raises:
            ValueError: the chat template does not write `tools`, `documents`, or what a message says under another
                key than `content`, as `reasoning_content`; or a message has pictures beside its content.
            TypeError: a message is no dictionary, dataclass or pydantic model.
        """
        conversation = _as_dictionaries(conversation)
        for message in _messages(conversation):
            if beside := [name for name in ("image", "images") if message.get(name)]:
                raise ValueError(
                    f"A message has `{beside[0]}` beside its `content`, where no picture is looked for. Put each into "
                    'the content: [{"type": "image", "image": ...}, {"type": "text", "text": ...}].'
                )
        words = self._control_words()
        conversation = self.mark_words(conversation, keep_placeholders=not kwargs.get("tokenize"))
        tools, documents = _mark(tools, words), _mark(documents, words)
        self._check_all_is_written(
            conversation, chat_template=chat_template, tools=tools, documents=documents, **kwargs
        )
        return super().apply_chat_template(conversation, chat_template, tools, documents, **kwargs)

    def mark_words(self, conversation, keep_placeholders: bool = False):
        """A conversation, or a list of them, with a mark in every word that reads like a control token; see
        `apply_chat_template`, which does it. `keep_placeholders`: except image tokens, in conversations whose contents
        are all strings."""
        if _is_batched(conversation):
            return [self.mark_words(one, keep_placeholders) for one in conversation]
        has_parts = any(isinstance(message.get("content"), (list, tuple)) for message in _messages(conversation))
        words = self._control_words(placeholders=has_parts or not keep_placeholders)
        return [_mark(message, words) for message in _messages(conversation)]

    def _check_all_is_written(self, conversation, sanitize_control_tokens=False, **kwargs) -> None:
        def render(conversation, **changes) -> str | list[str]:
            settings = {**kwargs, "tokenize": False, **changes}  # without sanitizing, which needs token ids
            return super(AureaProcessor, self).apply_chat_template(conversation, **settings)

        for name in ("tools", "documents"):
            if kwargs[name] and render(conversation) == render(conversation, **{name: []}):
                raise ValueError(
                    f"The chat template does not write `{name}`, so the model would not see them. Describe them in a "
                    "system message, or give a `chat_template` that writes them."
                )
        last = {"add_generation_prompt": False, "continue_final_message": False}
        for (role, key), (number, messages, changed) in _beside_contents(conversation).items():
            # Templates may leave out what was thought before the last question: it counts as if nothing followed.
            end = number + 1
            if render(messages) == render(changed) and render(messages[:end], **last) == render(changed[:end], **last):
                raise ValueError(
                    f"The chat template does not write `{key}` of a message of role {role!r}, so the model would not "
                    f"see it. Write it into the `content`, leave it out, or give a `chat_template` that writes it."
                )

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if text is not None:
            for item in text if isinstance(text, (list, tuple)) else [text]:
                if not isinstance(item, str):
                    raise TypeError(f"A text must be a string, got {type(item).__name__}: {item!r:.100}")
        images, text, videos, audio = super().prepare_inputs_layout(
            _without_none(images), text, videos, audio, **kwargs
        )
        if text is not None and self.prompt_format is not None:
            text = self._prompts(text, images)
        if text is not None:
            self._check_placeholders(text, images)
        if images is not None and sum(_count_images(images)) == 0:
            images = None
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        for name, value in (("videos", videos), ("audio", audio)):
            if value is not None:
                raise ValueError(f"{type(self).__name__} takes text and images, but no {name}")
        # One list of pictures: releases differ in what nesting they make out.
        super().validate_inputs(images=None if images is None else _single_images(images), text=text, **kwargs)

    def _prompts(self, texts: list[str], images) -> list[str]:
        """The texts in their `prompt_format`."""
        if images is not None and not any(self.image_token in text for text in texts):
            counts = _count_images(images)
            if len(counts) != len(texts):
                raise ValueError(
                    f"Image features and image tokens do not match: no text has a placeholder {self.image_token!r}, "
                    f"and {len(counts)} images or lists of images cannot be dealt out to {len(texts)} texts."
                )
            texts = [self.image_token * count + text for count, text in zip(counts, texts)]
        return [self._prompt(*text.rpartition(self.image_token)) for text in texts]

    def _prompt(self, images: str, placeholder: str, text: str) -> str:
        values = dict(zip(PROMPT_FIELDS, (images + placeholder, text)))
        return re.sub("|".join(PROMPT_FIELDS), lambda field: values[field[0]], self.prompt_format)

    def _check_placeholders(self, text: list[str], images) -> None:
        """Compares pictures and placeholders: in all, and row by row where the nesting says whose a picture is."""
        placeholders = [row.count(self.image_token) for row in text]
        nested = isinstance(images, (list, tuple)) and any(_is_row(entry) for entry in images)
        counts = _count_images(images) if images is not None else [0]
        if nested and len(counts) != len(text):
            mismatch = f"the nested list of images has {len(counts)} rows for {len(text)} texts"
        elif nested and counts != placeholders:
            row = next(row for row, count in enumerate(counts) if count != placeholders[row])
            mismatch = f"row {row} has {counts[row]} images and {placeholders[row]} placeholders {self.image_token!r}"
        elif sum(counts) != sum(placeholders):
            tokens = f"{sum(placeholders)} placeholders {self.image_token!r}, by row {placeholders}"
            mismatch = f"{sum(counts)} images for {tokens}"
        else:
            return
        raise ValueError(
            f"Image features and image tokens do not match: {mismatch}. The number of image tokens in the prompts "
            "should be the same as the number of images: a text holds one placeholder per picture, which the chat "
            "template writes (`apply_chat_template`, or a chat for a pipeline). Give a flat list of images, or one "
            "list per text"
        )

    def _process_images(self, images: ImageInput, **kwargs):
        pictures = _single_images(images)
        outputs = self.image_processor(pictures, **kwargs)
        pixel_values = outputs["pixel_values"]
        if pixel_values[0].ndim == 3:  # of an image processor that knows of no views
            is_list = isinstance(pixel_values, list)
            outputs["pixel_values"] = [one[None] for one in pixel_values] if is_list else pixel_values[:, None]
        return outputs, [self.image_token * self.image_seq_length] * len(pictures)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What a placeholder becomes."""
        return self.image_token * self.image_seq_length

    def _get_num_multimodal_tokens(self, image_sizes: list[tuple[int, int]] | None = None, **kwargs) -> MultiModalData:
        """Placeholder tokens, and rows of `pixel_values`, for pictures of these sizes: the same for all."""
        if image_sizes is None:
            return MultiModalData()
        counts = {"num_image_tokens": self.image_seq_length, "num_image_patches": 1}
        return MultiModalData(**{name: [count] * len(image_sizes) for name, count in counts.items()})

    @property
    def model_input_names(self) -> list[str]:
        answers = [] if self.prompt_format is None else ["token_type_ids", "labels"]
        return [*super().model_input_names, "mm_token_type_ids", *answers]

    @property
    def pad_token_id(self) -> int | None:
        """The tokenizer's, else what ends its texts; `Seq2SeqTrainer` pads what it generates with it."""
        pad_token_id = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad_token_id is None else pad_token_id

    @property
    def unused_input_names(self) -> list[str]:
        return ["token_type_ids"] if self.prompt_format is None else []


def _special_tokens(tokenizer: PreTrainedTokenizerBase, image_token: str) -> list[AddedToken]:
    """The control tokens that can be marked, which a single character cannot."""
    tokens = tokenizer.added_tokens_decoder.values()
    return [token for token in tokens if (token.special or token.content == image_token) and len(token.content) > 1]


def _cropped_alike(settings: dict, size: tuple[int, int], new_size: tuple[int, int]) -> dict:
    """Size and crop of a view of `new_size` that shows what one of `size` with these settings does."""
    if settings["crop_size"] is None:
        return {}
    (height, width), (new_height, new_width) = size, new_size
    ratios = {"height": new_height / height, "width": new_width / width, "shortest_edge": new_height / height}
    resized = {key: round(length * ratios[key]) for key, length in settings["size"].items()}
    return {"size": resized, "crop_size": {"height": new_height, "width": new_width}}


class _ControlWords:
    """Marks words that a tokenizer would read as one of these control tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tokens: list[str]):
        self.pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self.mark, self.spelled, self.normalizer = KEPT_MARK, False, None
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            self.mark = MARK
            ids = set(tokenizer.convert_tokens_to_ids(tokens))
            with _dropping_marks(tokenizer):
                words = tokenizer(["", *map(self.marked, tokens)], add_special_tokens=False)["input_ids"]
            # A Unigram model, unlike byte-level BPE, has them among its pieces, and makes them of characters too.
            self.spelled = any(not ids.isdisjoint(word) for word in words)
            self.normalizer = tokenizer.backend_tokenizer.normalizer if self.spelled else None

    def marked(self, text: str) -> str:
        if self.normalizer is not None and self.pattern.search(normalized := self.normalizer.normalize_str(text)):
            text = normalized
        position = 0
        while found := self.pattern.search(text, position):
            position = found.start() + 1
            text = text[:position] + self.mark + text[position:]
        return text


@lru_cache(maxsize=4)
def _control_words(tokenizer: PreTrainedTokenizerBase, size: int, image_token: str, placeholders: bool):
    """`size` tells whether there are new tokens: some tokenizers have thousands, which takes a while to list.
    `placeholders`: whether the image token is one of them."""
    tokens = [token.content for token in _special_tokens(tokenizer, image_token)]
    return _ControlWords(tokenizer, [token for token in tokens if placeholders or token != image_token])


def _mark(value, words: _ControlWords):
    """The same message, or what stands in it, with a mark in every word that reads like a control token."""
    if isinstance(value, str):
        return words.marked(value.replace(MARK, ""))
    if isinstance(value, Mapping):
        if value.get("type") in ("image", "image_url"):
            return value
        return {_mark(name, words): _mark(inner, words) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return _part_texts([_mark(inner, words) for inner in value], words)
    return value


def _part_texts(parts: list, words: _ControlWords) -> list:
    """Parts of which one begins a token and the next ends it are parted by a mark."""
    text = ""
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            text = ""
            continue
        joined = text + part["text"]
        if text and words.marked(joined) != joined:
            parts[number] = {**part, "text": words.mark + part["text"]}
            joined = part["text"]
        text = joined
    return parts


def _as_dictionaries(value):
    """Messages, and what stands in them, that are dataclasses or pydantic models, as dictionaries."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif callable(getattr(value, "model_dump", None)):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return {name: _as_dictionaries(inner) for name, inner in value.items()}
    return type(value)(map(_as_dictionaries, value)) if type(value) in (list, tuple) else value


def _is_batched(conversation) -> bool:
    return isinstance(conversation, (list, tuple)) and not all(isinstance(one, Mapping) for one in conversation)


def _messages(conversation) -> Iterator[Mapping]:
    """The messages of one conversation or of many."""
    if isinstance(conversation, Mapping):
        yield conversation
    elif isinstance(conversation, (list, tuple)):
        for one in conversation:
            yield from _messages(one)
    else:
        raise TypeError(f"A message must be a dictionary, got {type(conversation).__name__}: {conversation!r:.100}")


def _beside_contents(conversation) -> dict[tuple[str, str], tuple[int, list, list]]:
    """For each role and key under which a message says something beside its content: the last such message's number,
    its conversation, and that with other words under the key. A `tool` message says there which call it answers."""
    found = {}
    for messages in conversation if _is_batched(conversation) else [conversation]:
        for number, message in enumerate(messages):
            beside = {key: value for key, value in message.items() if key not in ("role", "content")}
            for key, value in beside.items() if message.get("role") != "tool" else ():
                if (other := _blank(value)) != value:
                    # The same words under two keys (`reasoning`, `reasoning_content`) are written once.
                    blank = {name: other for name, same in beside.items() if same == value}
                    changed = [*messages[:number], {**message, **blank}, *messages[number + 1 :]]
                    found[message.get("role"), key] = number, messages, changed
    return found


def _blank(value):
    """The same value with marks in the place of its words."""
    if isinstance(value, str):
        return re.sub(r"\S", MARK, value)
    if isinstance(value, Mapping):
        return {name: _blank(inner) for name, inner in value.items()}
    return [_blank(inner) for inner in value] if isinstance(value, list) else value


@contextmanager
def _dropping_marks(tokenizer: PreTrainedTokenizerFast, spelled: bool = False) -> Iterator[None]:
    """Meanwhile texts lose their marks, after control tokens have been looked for; `spelled`: after the text has been
    split into pieces, which the marks split further."""
    backend = tokenizer.backend_tokenizer
    with TOKENIZER_LOCK:
        normalizer, pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        if spelled:
            drop = pre_tokenizers.Split(MARK, "removed")
            backend.pre_tokenizer = pre_tokenizers.Sequence([*filter(None, [pre_tokenizer]), drop])
        else:
            drop = normalizers.Replace(MARK, "")
            backend.normalizer = normalizers.Sequence([drop, *filter(None, [normalizer])])
        try:
            yield
        finally:
            backend.normalizer, backend.pre_tokenizer = normalizer, pre_tokenizer


def _is_row(entry) -> bool:
    """Whether an entry of a list of images stands for all pictures of one text, not for a single picture."""
    return isinstance(entry, (list, tuple)) or (not is_pil_image(entry) and entry.ndim == 4)


def _without_none(images):
    """The same nesting, with an empty list where a text has no picture."""
    return [[] if image is None else _without_none(image) for image in images] if isinstance(images, list) else images


def _labels(input_ids, token_type_ids):
    """Ids where the type is not 0, else -100: in lists, an array or a tensor."""
    if isinstance(input_ids, list):
        return [_labels(*pair) for pair in zip(input_ids, token_type_ids)]
    if isinstance(input_ids, int):
        return input_ids if token_type_ids else -100
    if isinstance(input_ids, torch.Tensor):
        return input_ids.masked_fill(token_type_ids == 0, -100)
    return np.where(token_type_ids == 0, -100, input_ids)


def _single_images(images) -> list:
    """The pictures themselves, whatever their nesting."""
    if isinstance(images, (list, tuple)) or _is_row(images):
        return [image for entry in images for image in _single_images(entry)]
    return [images]


def _count_images(images) -> list[int]:
    """The number of pictures in each entry of what was given, which the image processor has already read."""
    return [len(_single_images(entry)) for entry in (images if isinstance(images, (list, tuple)) else [images])]


__all__ = ["AureaProcessor", "AureaProcessorKwargs"]
