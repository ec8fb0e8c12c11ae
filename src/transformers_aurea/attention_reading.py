# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What an Aurea attends to, as plain tensors, and where in the pictures that is. `visualization` draws it.

    read_attention(pictures, question, model, processor) ─► AttentionReading
      ├─ layers[name]            patch → patches    spatial-range or cross-attention fusion, composition
      ├─ words, word_attention   word → visual tokens    cross-attention blocks, or a prefix read by self-attention
      ├─ grids                   patch ↔ pixels of the original, for each picture and view
      └─ eyes                    what the answer loses when an encoder is blinded

All tensors are float32 on the CPU. The model may have any attention implementation, with or without the kernel, and be
in any mode; when `read_attention` returns, or raises, it is as it was, and so is the state of random numbers.
Meanwhile nothing else may use the model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.image_utils import ImageInput

from .configuration_aurea import AureaView
from .cross_attention_aurea import BLOCK_NAMES, decoder_layers
from .image_processing_aurea import AureaImageProcessor, flatten_pictures
from .patch_grids import PatchGrid, patch_grids
from .pretrained_model_aurea import aurea_model
from .processing_aurea import AureaProcessor
from .spatial_range_attention_aurea import neighborhood_aggregate
from .visual_context_aurea import group_by_row


@dataclass(frozen=True)
class NeighborAttention:
    """A layer of spatial-range attention, whose grid is that of both encoders.

    Args:
        weights (`torch.FloatTensor` of shape `(num_images, rows, columns, (2·radius + 1)²)`):
            What each neighbour of each patch counts, row by row of the window, as the layer sums them; 1 in all.
        uncorrected (`torch.FloatTensor` of the same shape):
            The same before the small network corrects them, similarity times nearness; below 1 in all.
        radius: half side of the window.
        view_pairs: the views in which the patch that looks and those that it looks at lie.
    """

    weights: torch.Tensor
    uncorrected: torch.Tensor
    radius: int
    view_pairs: tuple[tuple[str, str], ...]

    def of_patch(self, image: int, row: int, column: int) -> torch.Tensor:
        """`(rows, columns)`: what the patch in this row and column of a picture looks at. At a border the window is
        reflected, and the weights of a neighbour that is in it twice add up."""
        return _laid_on_grid(self.weights[image], row, column, self.radius)

    def uncorrected_of_patch(self, image: int, row: int, column: int) -> torch.Tensor:
        return _laid_on_grid(self.uncorrected[image], row, column, self.radius)


@dataclass(frozen=True)
class PatchAttention:
    """A layer in which the semantic encoder's patches look at those of the spatial encoder.

    Args:
        weights (`torch.FloatTensor` of shape `(num_images, num_heads, rows, columns, spatial rows, spatial columns)`):
            What each spatial patch counts for each semantic one; the rest up to 1 is for class and register tokens.
        view_pairs: the views in which the patch that looks and those that it looks at lie.
    """

    weights: torch.Tensor
    view_pairs: tuple[tuple[str, str], ...] = (("vision", "spatial_vision"),)

    def of_patch(self, image: int, row: int, column: int) -> torch.Tensor:
        """`(spatial rows, spatial columns)`: what the patch in this row and column looks at, the mean of all heads."""
        return self.weights[image, :, row, column].mean(dim=0)

    def uncorrected_of_patch(self, image: int, row: int, column: int) -> None:
        return None


class PatchReading(NamedTuple):
    """What one patch of a picture looks at, in one layer.

    Args:
        views: those in which the patch lies, and what it looks at.
        query_grid, key_grid: their patches.
        patch: its row and column.
        weights (`torch.FloatTensor` of shape `(rows, columns)` of `key_grid`): what each patch there counts.
        uncorrected (`torch.FloatTensor` of the same shape, *optional*): before the correction, if there is one.
    """

    views: tuple[str, str]
    query_grid: PatchGrid
    key_grid: PatchGrid
    patch: tuple[int, int]
    weights: torch.Tensor
    uncorrected: torch.Tensor | None


class EyeReading(NamedTuple):
    """What the encoders contribute to an answer.

    Args:
        log_prob: the answer's log-probability, the sum over its tokens.
        blinded: the same where an encoder, by name, or both (`"both"`), see the mean picture instead of their own.
    """

    log_prob: float
    blinded: dict[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """What the answer loses without each encoder, in nats; below 0 where it is more likely without."""
        return {name: self.log_prob - log_prob for name, log_prob in self.blinded.items()}


@dataclass(frozen=True)
class AttentionReading:
    """What a model attended to.

    Args:
        pictures: `(height, width, 3)` each, uint8: the originals, on white.
        grids: for each picture, a [`PatchGrid`] for each encoder.
        layers: by name, as `"fusion.joint_layers.0"`, layers in which patches look at patches, in their order.
        question, answer: what was asked, and what the model said or was given; None if nothing was asked.
        words: those of the answer.
        word_attention (`dict[str, torch.FloatTensor]`):
            `"cross_attention"` of the blocks, `"prefix"` of the language model's own layers to pictures in its text:
            `(num_layers, num_heads, num_words, num_images, num_visual_tokens)`, from where each word is predicted,
            the mean of its tokens. A word's weights have, over all pictures, a sum of 1, of a prefix below 1.
        token_view, token_grid: the view over which visual tokens lie, and their rows and columns; None if on no grid.
        eyes: what the encoders contribute to the answer, if that was asked for.
    """

    pictures: tuple[np.ndarray, ...]
    grids: tuple[dict[str, PatchGrid], ...]
    layers: dict[str, NeighborAttention | PatchAttention]
    question: str | None
    answer: str | None
    words: tuple[str, ...]
    word_attention: dict[str, torch.Tensor]
    token_view: str
    token_grid: tuple[int, int] | None
    eyes: EyeReading | None

    def layer(self, layer: str | int) -> NeighborAttention | PatchAttention:
        """A layer by its name or number; ValueError if there is none."""
        return self.layers[self.layer_name(layer)]

    def layer_name(self, layer: str | int) -> str:
        """The name of a layer of this name or number; ValueError if there is none."""
        names = [*self.layers]
        if not names:
            raise ValueError(
                "Neither fusion nor composition of this model has layers in which patches look at patches: those of "
                "'spatial_range', 'cross_attention' and compositions with attention have."
            )
        if isinstance(layer, int) and -len(names) <= layer < len(names):
            return names[layer]
        if layer not in names:
            raise ValueError(
                f"There is no layer {layer!r}: give a number from 0 to {len(names) - 1}, or one of {names}."
            )
        return layer

    def of_patch(
        self,
        layer: str | int = -1,
        *,
        at: tuple[float, float] | None = None,
        patch: tuple[int, int] | None = None,
        image: int = 0,
        view: str | None = None,
    ) -> list[PatchReading]:
        """What a patch looks at in a layer, once for each view whose patches lie elsewhere in the picture.

        Args:
            layer: its name or number.
            at: a point (x, y) in pixels of the picture, whose patch it is, or
            patch: its row and column.
            image: number of the picture.
            view: `"vision"` or `"spatial_vision"`, to have that of this encoder alone.

        Raises:
            ValueError: no such layer, picture, view or patch, or neither `at` nor `patch`, or both.
        """
        if (at is None) == (patch is None):
            raise ValueError(f"Give `at`, a point (x, y), or `patch`, a row and a column; got at={at}, patch={patch}.")
        attention, grids = self.layer(layer), self.grids[self.image_number(image)]
        pairs = [pair for pair in attention.view_pairs if view is None or view in pair]
        if not pairs:
            raise ValueError(f"No patches of the view {view!r} are in this layer: {[*attention.view_pairs]}.")
        found, refusal = {}, None
        for pair in pairs:
            query_grid, key_grid = (grids[name] for name in pair)
            try:
                row, column = query_grid.patch_at(*at) if patch is None else patch
                query_grid.rectangle(row, column)
            except ValueError as error:  # another view may show it
                refusal = refusal or error
                continue
            maps = attention.of_patch(image, row, column), attention.uncorrected_of_patch(image, row, column)
            found.setdefault((query_grid, key_grid), PatchReading(pair, query_grid, key_grid, (row, column), *maps))
        if not found:
            raise refusal
        return [*found.values()]

    def image_number(self, image: int) -> int:
        """`image`, if it is the number of a picture; ValueError otherwise."""
        if not 0 <= image < len(self.pictures):
            raise ValueError(f"There is no picture {image}: give a number from 0 to {len(self.pictures) - 1}.")
        return image

    def word_maps(self, layer: int | None = None, attention: str | None = None) -> torch.Tensor:
        """Where each word looked, `(num_words, num_images, rows, columns)`, the mean of all heads.

        Args:
            layer: number of a block, or of a layer among those of the language model that attend; by default the mean
                of all.
            attention: `"cross_attention"` or `"prefix"`; by default that which there is, or the first of both.

        Raises:
            ValueError: nothing was asked; there is no such layer or attention; visual tokens lie on no grid.
        """
        if not self.word_attention:
            raise ValueError("There are no words: give a `question`, and for `answer` something to say.")
        attention = next(iter(self.word_attention)) if attention is None else attention
        if attention not in self.word_attention:
            raise ValueError(f"There is no attention {attention!r} of words in this model: {[*self.word_attention]}.")
        weights = self.word_attention[attention].mean(dim=1)
        if layer is not None and not -len(weights) <= layer < len(weights):
            raise ValueError(
                f"There is no layer {layer} in {attention!r}: give a number from 0 to {len(weights) - 1}."
            )
        if self.token_grid is None:
            raise ValueError(
                "The visual tokens of this model's fusion lie on no grid of patches (`AureaFusion.token_grid`): read "
                "`word_attention` token by token."
            )
        weights = weights.mean(dim=0) if layer is None else weights[layer]
        return _on_grid(weights, *self.token_grid)

    def word_grid(self, image: int) -> PatchGrid:
        """Where `word_maps` lie in a picture."""
        return self.grids[image][self.token_view].coarser(*self.token_grid)


def read_attention(
    pictures: ImageInput,
    question: str | None,
    model: PreTrainedModel,
    processor: AureaProcessor,
    answer: str | None = None,
    max_new_tokens: int = 48,
    eyes: bool = False,
    mean_picture: torch.Tensor | None = None,
) -> AttentionReading:
    """Lets a model look at pictures and, if there is a question, answer it, and reads what it attends to.

    Args:
        pictures: one or many, of one conversation: all that [`AureaImageProcessor`] reads.
        question: about them; None to read only how patches look at patches.
        model: an [`AureaForConditionalGeneration`] or, without a question, an [`AureaModel`].
        processor: the model's.
        answer: whose words to follow, by default what the model generates greedily.
        max_new_tokens: of what it generates.
        eyes: whether to blind each encoder too, which takes as many more passes.
        mean_picture (`torch.FloatTensor` of shape `(num_views, 3, height, width)`, *optional*):
            What a blinded encoder sees, the mean of `pixel_values` over many pictures; else its view's mean color.

    Raises:
        ValueError: a picture cannot be read; the answer has no tokens; the language model gives no weights.
    """
    aurea = aurea_model(model)
    with _undisturbed(model):
        shown = _Shown.make(pictures, question, model, processor)
        with _recorded_layers(aurea) as layers:
            visual_tokens = aurea.get_image_features(shown.inputs["pixel_values"]).pooler_output
        said, eye_reading = (None, (), {}), None
        if question is not None:
            answered = _Answered.make(shown, visual_tokens, model, processor, answer, max_new_tokens)
            said = _read_words(answered, model, processor)
            eye_reading = _read_eyes(shown, answered, model, mean_picture) if eyes else None
    answer, words, word_attention = said
    encoder = aurea.fusion.encoders(aurea.config)[0]
    return AttentionReading(
        pictures=shown.pictures,
        grids=tuple(
            patch_grids(processor.image_processor, aurea.config, *picture.shape[:2]) for picture in shown.pictures
        ),
        layers=layers,
        question=question,
        answer=answer,
        words=words,
        word_attention=word_attention,
        token_view=encoder.removesuffix("_config"),
        token_grid=aurea.fusion.token_grid(aurea.config),
        eyes=eye_reading,
    )


def _read_eyes(
    shown: "_Shown", answered: "_Answered", model: PreTrainedModel, mean_picture: torch.Tensor | None
) -> EyeReading:
    aurea = aurea_model(model)
    views = {name.removesuffix("_config"): [view] for name, view in aurea.config.views.items()}
    if len(views) > 1:
        views["both"] = [*aurea.config.views.values()]
    log_probs = {}
    for name, blind in views.items():
        pixel_values = shown.inputs["pixel_values"]
        for view in blind:
            pixel_values = blinded(pixel_values, view, mean_picture)
        visual_tokens = aurea.get_image_features(pixel_values).pooler_output
        log_probs[name] = answered._replace(visual_inputs=_visual_inputs(visual_tokens, aurea)).log_prob(model)
    return EyeReading(answered.log_prob(model), log_probs)


def blinded(pixel_values: torch.Tensor, view: AureaView, mean_picture: torch.Tensor | None = None) -> torch.Tensor:
    """A copy of `pixel_values` `(num_images, num_views, 3, height, width)` in which one encoder sees the mean picture
    `(num_views, 3, height, width)`, or its view's mean color, instead."""
    index = min(view.index, pixel_values.shape[1] - 1)  # a single encoder's view is the only one
    height, width = view.size
    if mean_picture is None:
        mean = pixel_values[:, index, :, :height, :width].mean(dim=(-2, -1), keepdim=True)
    else:
        mean = mean_picture[index].to(pixel_values)
    pixel_values = pixel_values.clone()
    pixel_values[:, index] = mean
    return pixel_values


class _Shown(NamedTuple):
    """Pictures, and inputs of the model: `pixel_values` and, if something is asked, those of the prompt."""

    pictures: tuple[np.ndarray, ...]
    inputs: dict[str, torch.Tensor]

    @classmethod
    def make(cls, pictures, question: str | None, model: PreTrainedModel, processor: AureaProcessor) -> "_Shown":
        reader = AureaImageProcessor()
        given = [*flatten_pictures(reader.fetch_images(pictures))]
        if not given:
            raise ValueError("There is no picture to look at.")
        if question is None:
            inputs = processor(images=given, return_tensors="pt")
        else:
            content = [*({"type": "image", "image": picture} for picture in given), {"type": "text", "text": question}]
            settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
            inputs = processor.apply_chat_template([{"role": "user", "content": content}], **settings)
        return cls(tuple(_to_array(reader, picture) for picture in given), dict(inputs.to(model.device)))


class _Answered(NamedTuple):
    """A prompt with its answer, the last `num_tokens` of its ids, and what is shown to the model beside the text."""

    inputs: dict[str, torch.Tensor]
    visual_inputs: dict[str, torch.Tensor]
    num_tokens: int

    @classmethod
    def make(
        cls,
        shown: _Shown,
        visual_tokens: torch.Tensor,
        model: PreTrainedModel,
        processor: AureaProcessor,
        answer: str | None,
        max_new_tokens: int,
    ) -> "_Answered":
        aurea = aurea_model(model)
        if model is aurea:
            raise ValueError(
                f"{type(model).__name__} has no head that could answer: give the model with it, or no question."
            )
        prompt = {name: value for name, value in shown.inputs.items() if name != "pixel_values"}
        visual_inputs = _visual_inputs(visual_tokens, aurea)
        input_ids = prompt["input_ids"]
        if answer is None:
            settings = {"do_sample": False, "max_new_tokens": max_new_tokens}
            answer_ids = model.generate(**prompt, **visual_inputs, **settings)[:, input_ids.shape[1] :]
        else:
            tokens = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
            answer_ids = input_ids.new_tensor([tokens], dtype=torch.long)
        num_tokens = answer_ids.shape[1]
        if num_tokens == 0:
            raise ValueError(f"The answer {answer!r} has no tokens.")
        inputs = prompt | {"input_ids": torch.cat([input_ids, answer_ids], dim=1)}
        if aurea.config.prefix_mask == "prompt":  # what is no prompt is told by its type
            inputs.setdefault("token_type_ids", torch.zeros_like(input_ids))
        of_answer = {"attention_mask": 1, "mm_token_type_ids": 0, "token_type_ids": 1}
        for name in of_answer.keys() & inputs.keys():
            inputs[name] = F.pad(inputs[name], (0, num_tokens), value=of_answer[name])
        return cls(inputs, visual_inputs, num_tokens)

    @property
    def answer_ids(self) -> torch.Tensor:
        """(tokens,)"""
        return self.inputs["input_ids"][0, -self.num_tokens :]

    @property
    def predicting(self) -> slice:
        """The places in the text from which the answer's tokens are predicted, each the one before it."""
        return slice(-self.num_tokens - 1, -1)

    def run(self, model: PreTrainedModel, **kwargs):
        return model(**self.inputs, **self.visual_inputs, use_cache=False, return_dict=True, **kwargs)

    def log_prob(self, model: PreTrainedModel) -> float:
        logits = self.run(model, logits_to_keep=self.num_tokens + 1).logits[0, :-1].float()
        return logits.log_softmax(dim=-1).gather(1, self.answer_ids[:, None]).sum().item()

    def text(self, processor: AureaProcessor) -> str:
        return processor.tokenizer.decode(self.answer_ids, skip_special_tokens=True).strip()


def _visual_inputs(visual_tokens: torch.Tensor, aurea: nn.Module) -> dict[str, torch.Tensor]:
    """Visual tokens (images, N, C) of one conversation as arguments of the model."""
    num_images = torch.tensor([visual_tokens.shape[0]], device=visual_tokens.device)
    inputs = aurea.connector.inputs(*group_by_row(visual_tokens, num_images))
    return {name: value for name, value in inputs.items() if value is not None}


def _read_words(
    answered: _Answered, model: PreTrainedModel, processor: AureaProcessor
) -> tuple[str, tuple[str, ...], dict[str, torch.Tensor]]:
    """The answer, its words, and what each of them attends to."""
    aurea, inputs = aurea_model(model), answered.inputs
    length = inputs["input_ids"].shape[1]
    with _eager_attention(aurea.language_model), _recorded_words(aurea.language_model, length) as (blocks, layers):
        answered.run(model, logits_to_keep=1)
    text, words = answered.text(processor), _words(answered.answer_ids.tolist(), processor.tokenizer)
    is_picture = aurea.get_placeholder_mask(inputs["input_ids"], None, inputs.get("mm_token_type_ids"))[0]
    found = {"cross_attention": blocks} if aurea.connector.weaves else {}
    if aurea.connector.fills:
        found["prefix"] = [weights[..., is_picture] for weights in layers.values()]
    word_attention = {}
    for name, recorded in found.items():
        if not recorded:
            raise ValueError(
                f"{type(aurea.language_model).__name__} gives no attention weights, so that nothing can be read of "
                f"{name!r}."
            )
        weights = torch.stack([one[0, :, answered.predicting].float().cpu() for one in recorded])
        weights = weights.unflatten(-1, (-1, aurea.fusion.num_tokens))  # (layers, heads, tokens, images, N)
        if words:
            word_attention[name] = torch.stack([weights[:, :, tokens].mean(dim=2) for _, tokens in words], dim=2)
    return text, tuple(word for word, _ in words), word_attention


def _words(ids: list[int], tokenizer) -> list[tuple[str, list[int]]]:
    """The words of a text, and for each the numbers of its tokens. Control tokens are part of none."""
    special = {*tokenizer.all_special_ids}
    words = tokenizer.decode(ids, skip_special_tokens=True).split()
    tokens = [[] for _ in words]
    for number, token in enumerate(ids):
        so_far = len(tokenizer.decode(ids[: number + 1], skip_special_tokens=True).split())
        if token not in special and words:
            tokens[min(max(so_far, 1), len(words)) - 1].append(number)
    return [pair for pair in zip(words, tokens) if pair[1]]


@torch.enable_grad()
def _laid_on_grid(weights: torch.Tensor, row: int, column: int, radius: int) -> torch.Tensor:
    """One window of weights (rows, columns, (2·radius + 1)²) as (rows, columns): the layer's own sum is linear, and
    its derivative is what each position counts."""
    source = torch.zeros(1, *weights.shape[:2], 1, requires_grad=True)
    total = neighborhood_aggregate(source, weights[None], radius)[0, row, column, 0]
    return torch.autograd.grad(total, source)[0][0, ..., 0]


def _on_grid(weights: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Weights (…, N) of tokens, of which the last are patches, as (…, rows, columns). A first patch whose token was
    dropped in the place of a class token has none."""
    missing = max(rows * columns - weights.shape[-1], 0)
    return F.pad(weights, (missing, 0))[..., -rows * columns :].unflatten(-1, (rows, columns))


def _to_array(reader: AureaImageProcessor, picture) -> np.ndarray:
    """(height, width, 3), uint8"""
    channels = reader.process_image(picture, do_convert_rgb=True)
    if channels.is_floating_point():
        channels = (channels * (255 if channels.max() <= 1 else 1)).round().to(torch.uint8)
    return channels.permute(1, 2, 0).numpy()


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients. Afterwards all modules, and random numbers, are as before."""
    training = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def _eager_attention(language_model: PreTrainedModel) -> Iterator[None]:
    """Meanwhile the language model, and the blocks in it, compute attention in the way that gives weights."""
    models = [module for module in language_model.modules() if isinstance(module, PreTrainedModel)]
    before = [(model.config, model.config._attn_implementation) for model in models]
    language_model.set_attn_implementation("eager")
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextmanager
def _recorded_words(
    language_model: PreTrainedModel, length: int
) -> Iterator[tuple[list[torch.Tensor], dict[int, torch.Tensor]]]:
    """What a text of this length attends to when the language model reads it with eager attention: in its blocks,
    visual tokens `(batch, heads, T, visual tokens)`; in its own layers, by number, the text `(batch, heads, T, T)`.

    Not by `output_attentions`, which leaves transformers' hooks in the model.
    """
    blocks, layers, handles = [], {}, []

    def record_block(module: nn.Module, inputs: tuple, output: tuple) -> None:
        if output[1] is not None:
            blocks.append(output[1])

    def record_layer(number: int, module: nn.Module, inputs: tuple, output) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if isinstance(weights, torch.Tensor) and weights.ndim == 4 and weights.shape[-2:] == (length, length):
            layers.setdefault(number, weights)  # modules around it may hand them on

    try:
        for number, layer in enumerate(decoder_layers(language_model)[1]):
            for name, module in layer.named_modules():
                if name.split(".")[0] not in BLOCK_NAMES:
                    handles.append(module.register_forward_hook(partial(record_layer, number)))
                elif name.endswith(".cross_attn"):
                    handles.append(module.register_forward_hook(record_block))
        yield blocks, layers
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _recorded_layers(aurea: nn.Module) -> Iterator[dict[str, NeighborAttention | PatchAttention]]:
    """What layers of fusion and composition attend to when pictures are encoded, once that is done, by their names."""
    calls: dict[str, list] = {}
    handles = []
    views = tuple(name.removesuffix("_config") for name in aurea.config.views)
    shapes = [view.grid for view in aurea.config.views.values()]
    spatial_range, attentions = _attending_layers(aurea)
    for name, layer in spatial_range.items():
        found = calls[name] = [layer.radius]
        handles.append(
            layer.spatial_range_weights.register_forward_hook(lambda *call, found=found: found.append(call[2]))
        )
        handles.append(
            layer.neighborhood_aggregate.register_forward_pre_hook(
                lambda _, inputs, found=found: found.append(inputs[1])
            )
        )
    for name, layer in attentions.items():
        found = calls[name] = []
        handles.append(
            layer.register_forward_pre_hook(lambda layer, inputs, found=found: found.append(layer.weights(*inputs)))
        )
    layers = {}
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()
    for name in spatial_range:
        radius, uncorrected, weights = calls[name]
        pairs = tuple((view, view) for view in views)
        layers[name] = NeighborAttention(weights.float().cpu(), uncorrected.float().cpu(), radius, pairs)
    for name in attentions:
        weights = _on_grid(calls[name][0].float().cpu(), *shapes[1])  # (images, heads, tokens, rows, columns)
        weights = _on_grid(weights.movedim(2, -1), *shapes[0])  # (images, heads, their rows, columns, rows, columns)
        layers[name] = PatchAttention(weights.permute(0, 1, 4, 5, 2, 3))


def _attending_layers(aurea: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Layers of spatial-range attention, and of attention of one encoder's patches to the other's, by their names.

    Known by the names of their classes, for a folder brings its own copies of these.
    """
    modules = [(f"fusion.{name}", module) for name, module in aurea.fusion.named_modules()]
    spatial_range = {name: module for name, module in modules if type(module).__name__ == "AureaSpatialRangeAttention"}
    attentions = {}
    if aurea.composition is not None:
        for number, layer in enumerate(aurea.composition.layers):
            found = [module for name, module in layer.named_modules() if name == "cross_attn"]
            attentions |= {f"composition.layers.{number}": module for module in found}
    if aurea.fusion.gives_attentions:
        attentions |= {name: module for name, module in modules if type(module).__name__ == "AureaFusionAttention"}
    return spatial_range, attentions


__all__ = [
    "AttentionReading",
    "EyeReading",
    "NeighborAttention",
    "PatchAttention",
    "blinded",
    "read_attention",
]
