# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What the page of `aurea demo` does, without the page (`demo_page`), and without a browser.

    photo = read_photo("photo.jpg")
    model = DemoModel("my model", model, processor)
    for text in model.answer(photo, "What is left of the cup?"):
        ...
    reading = model.read(photo, "What is left of the cup?", text)
    patch_html(reading, at=(120, 80))  # in pixels of `on_screen(photo)`

The page shows a picture enlarged or reduced by `on_screen`, and a click comes in pixels of that; readings are made of
the original, and brought to the same scale.
"""

import base64
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html import escape
from pathlib import Path
from threading import Event

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, StoppingCriteria, TextIteratorStreamer

from .attention_reading import AttentionReading, read_attention
from .image_processing_aurea import AureaImageProcessor
from .pictures_aurea import read_picture
from .pretrained_model_aurea import aurea_model
from .processing_aurea import AureaProcessor
from .scenes import make_scene, test_seeds
from .visualization import Panel, patch_panels, word_panels


SMALL, LARGE = 448, 1024  # pixels, the longer side of what is on the screen
MAX_NEW_TOKENS = 256  # where the model does not say how many
# Kinds of questions, each about a scene of its own, and the scene's world.
EXAMPLES = (
    ("describe", "textured"),
    ("left_right", "open"),
    ("color", "textured"),
    ("count", "open"),
    ("shape", "textured"),
    ("existence", "open"),
)


def example_scenes() -> list[tuple[Image.Image, str]]:
    """Drawn scenes that the embedded model was not trained on, with a question about each."""
    examples = []
    for seed, (kind, world) in zip(test_seeds(len(EXAMPLES)), EXAMPLES):
        picture, questions = make_scene(seed, kinds=[kind], world=world)
        examples += [(picture, question) for _, question, _ in questions]
    return examples


def read_photo(path: str | os.PathLike) -> Image.Image:
    """A picture as the model sees it before it is resized: in RGB, on white, turned as its EXIF orientation says.

    Raises:
        ValueError: it cannot be read; the message names the file without its folder.
    """
    path = os.fspath(path)
    try:
        picture = AureaImageProcessor().process_image(read_picture(path), do_convert_rgb=True)
    except ValueError as error:
        raise ValueError(str(error).replace(path, Path(path).name)) from error
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def on_screen(photo: Image.Image) -> Image.Image:
    """The picture as it is shown: a small one enlarged pixel by pixel, so that a finger hits a patch; a large one
    reduced."""
    longer = max(photo.size)
    if longer < SMALL:
        scale = -(-SMALL // longer)
        return photo.resize([scale * side for side in photo.size], Image.Resampling.NEAREST)
    scale = min(LARGE / longer, 1)
    return photo.resize([max(round(scale * side), 1) for side in photo.size], Image.Resampling.LANCZOS)


def to_screen(reading: AttentionReading) -> AttentionReading:
    """The reading of one picture, in pixels of what is on the screen."""
    [picture], [grids] = reading.pictures, reading.grids
    height, width, _ = picture.shape
    shown = on_screen(Image.fromarray(picture))
    across, down = shown.width / width, shown.height / height
    scaled = {
        name: grid._replace(
            left=across * grid.left,
            top=down * grid.top,
            patch_width=across * grid.patch_width,
            patch_height=down * grid.patch_height,
        )
        for name, grid in grids.items()
    }
    return replace(reading, pictures=(np.asarray(shown),), grids=(scaled,))


def check(photo: Image.Image | None, question: str) -> None:
    """ValueError if there is nothing to ask, or nothing to ask about."""
    if photo is None:
        raise ValueError("There is no picture: upload one, or take one of the examples.")
    if not question.strip():
        raise ValueError("The question is empty: write what you want to know about the picture.")


class DemoModel:
    """A model that answers, and tells where it looked: to many at once, one after the other, in a thread of its own.

    Args:
        name: what it is called on the page.
        model, processor: an [`AureaForConditionalGeneration`] and what prepares its inputs.

    Raises:
        ValueError: the model is no Aurea.
    """

    def __init__(self, name: str, model: PreTrainedModel, processor: AureaProcessor):
        self.model, self.processor = model, processor
        config = aurea_model(model).config
        self.title = f"{name} · fusion {config.feature_fusion_config.fusion_type} · {config.connector_type}"
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._is_closed = Event()

    def answer(self, photo: Image.Image, question: str) -> Iterator[str]:
        """The answer so far, again and again while it grows: the most likely words. It ends early where nobody asks
        for more of it."""
        content = [{"type": "image", "image": photo}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device)
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        is_left = Event()
        generated = self._thread.submit(
            self.model.generate,
            **inputs,
            streamer=streamer,
            stopping_criteria=[_Stopping(is_left, self._is_closed)],
            do_sample=False,
            num_beams=1,
            max_new_tokens=self.model.generation_config.max_new_tokens or MAX_NEW_TOKENS,
        )
        generated.add_done_callback(lambda _: streamer.end())  # after an error too
        text = ""
        try:
            for piece in streamer:
                text += piece
                if piece:
                    yield text.strip()
        finally:
            is_left.set()
        generated.result()  # which raises what went wrong

    def read(self, photo: Image.Image, question: str | None = None, answer: str | None = None) -> AttentionReading:
        """What [`read_attention`] reads, in pixels of what is on the screen; errors are its own."""
        reading = self._thread.submit(read_attention, photo, question, self.model, self.processor, answer)
        return to_screen(reading.result())

    def close(self) -> None:
        """Ends what is being answered; nothing is answered any more."""
        self._is_closed.set()
        self._thread.shutdown(cancel_futures=True)


class _Stopping(StoppingCriteria):
    """Ends the answer once one of these events has come."""

    def __init__(self, *events: Event):
        self.events = events

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        return torch.full(input_ids.shape[:1], any(event.is_set() for event in self.events), device=input_ids.device)


def patch_html(reading: AttentionReading, at: tuple[float, float]) -> str:
    """What the patch at a point looks at, layer by layer; or why there is nothing to see."""
    try:
        panels = patch_panels(reading, at=at)
    except ValueError as error:
        return note_html(str(error))
    return _panels_html("What the patch in orange looks at, layer by layer", panels)


def word_html(reading: AttentionReading, word: int | None = None) -> str:
    """Where a word of the answer looked, or all of them; or why there is nothing to see."""
    try:
        panels = word_panels(reading, word)
    except ValueError as error:
        return note_html(str(error))
    said = "answered" if word is None else f"said “{reading.words[word]}”"
    return _panels_html(f"Where it looked as it {said}", panels)


def note_html(text: str) -> str:
    return f'<p class="aurea-note">{escape(text)}</p>'


def _panels_html(heading: str, panels: Iterable[Panel]) -> str:
    figures = []
    for title, highest, figure in panels:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=140)
        source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        caption = f"{escape(title)} <span>up to {100 * highest:.3g}%</span>"
        figures.append(
            f'<figure><img src="{source}" alt="{escape(title)}"><figcaption>{caption}</figcaption></figure>'
        )
    return f'<h4>{escape(heading)}</h4><div class="aurea-panels">{"".join(figures)}</div>'


__all__ = ["DemoModel", "check", "example_scenes", "on_screen", "patch_html", "read_photo", "to_screen", "word_html"]
