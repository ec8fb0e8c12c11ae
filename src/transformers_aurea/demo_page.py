# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The page of `aurea demo`, with gradio: what it does is in `demo`.

    picture, examples, question ─► each model's column: answer, its words, and where it looked

Nothing is fetched from elsewhere, counted or recorded, and no address is shared.
"""

from collections.abc import Iterator, Sequence
from html import escape
from socket import socket

import gradio as gr
import uvicorn
from fastapi import FastAPI
from PIL import Image

from .attention_reading import AttentionReading
from .demo import DemoModel, check, example_scenes, note_html, on_screen, patch_html, read_photo, word_html


HINT = note_html("Ask something, or click on the picture to see what a patch of it looks at.")
WHOLE_ANSWER = -1
AT_ONCE = {"trigger_mode": "always_last", "show_progress": "minimal"}  # for clicks, of which the last counts
HOUR = 3600  # seconds after which what was uploaded is deleted
CSS = """
#picture img {cursor: crosshair}
#examples .grid-container {grid-template: none / repeat(6, 1fr); grid-auto-rows: auto; gap: var(--spacing-md)}
#examples .grid-wrap {padding-top: var(--size-8); overflow: hidden}
#examples button {aspect-ratio: 1}
.aurea-seen h4 {margin: 0 0 8px; font-weight: 600}
.aurea-panels {display: grid; grid-template-columns: repeat(auto-fill, minmax(max(130px, 25% - 12px), 1fr)); gap: 12px}
.aurea-panels figure {margin: 0}
.aurea-panels img {width: 100%; border-radius: 4px}
.aurea-panels figcaption {font-size: 12px; line-height: 1.3; color: var(--body-text-color)}
.aurea-panels figcaption span {color: var(--body-text-color-subdued); white-space: nowrap}
.aurea-note {color: var(--body-text-color-subdued)}
@media (max-width: 767px) {.aurea-seen {min-height: 80vh}}
"""
# On a phone what changes is below what was touched, and CSS leaves room to scroll there.
SCROLL_TO = """() => {{
    if (matchMedia("(max-width: 767px)").matches)
        document.querySelector("{}").scrollIntoView({{behavior: "smooth"}});
}}"""


class ModelColumn:
    """What is on the page of one model."""

    def __init__(self, model: DemoModel):
        self.model = model
        self.reading = gr.State()
        with gr.Column(min_width=320):
            self.answer = gr.Textbox(label=model.title, interactive=False, lines=2, elem_classes="aurea-answer")
            self.words = gr.Radio([], label="Where it looked as it said…", visible=False, elem_classes="aurea-words")
            self.seen = gr.HTML(HINT, elem_classes="aurea-seen")
        self.parts = [self.answer, self.words, self.seen, self.reading]
        self.words.input(self.show_word, [self.words, self.reading], self.seen, **AT_ONCE)

    def cleared(self) -> tuple:
        return "", gr.Radio([], visible=False), HINT, None

    def ask(self, photo: Image.Image, question: str) -> Iterator[tuple]:
        yield self.cleared()
        text = ""
        for text in self.model.answer(photo, question):
            yield text, gr.skip(), gr.skip(), gr.skip()
        try:
            reading = self.model.read(photo, question, text)
        except ValueError as error:  # of an answer without words, or a language model that gives no attention
            yield text, gr.skip(), note_html(str(error)), gr.skip()
            return
        choices = [("the whole answer", WHOLE_ANSWER), *((word, number) for number, word in enumerate(reading.words))]
        yield text, gr.Radio(choices, value=WHOLE_ANSWER, visible=True), word_html(reading), reading

    def show_word(self, word: int, reading: AttentionReading) -> str:
        return word_html(reading, None if word == WHOLE_ANSWER else word)

    def look(self, photo: Image.Image | None, reading: AttentionReading | None, click: gr.SelectData) -> tuple:
        if photo is None:
            return gr.skip(), gr.skip(), gr.skip()
        reading = self.model.read(photo) if reading is None else reading
        return gr.Radio(value=None), patch_html(reading, at=tuple(click.index)), reading


def build_page(models: Sequence[DemoModel]) -> gr.Blocks:
    """The page of one model, or of several beside each other."""
    examples = example_scenes()
    with gr.Blocks(title="Aurea", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as page:
        gr.Markdown("# Aurea\nA vision-language model with two eyes. Ask about a picture, and see where it looks.")
        photo = gr.State()
        with gr.Row():
            with gr.Column(min_width=320):
                picture = gr.Image(
                    label="Click a patch to see what it looks at",
                    sources=["upload", "clipboard"],
                    format="png",
                    buttons=[],
                    elem_id="picture",
                )
                gallery = gr.Gallery(
                    [shown for shown, _ in examples],
                    label="Examples",
                    height="fit-content",
                    allow_preview=False,
                    interactive=False,
                    buttons=[],
                    format="png",
                    elem_id="examples",
                )
                question = gr.Textbox(label="Question", placeholder="What is in the picture?", elem_id="question")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
            columns = [ModelColumn(model) for model in models]
        asked = gr.on([button.click, question.submit], _checked, [photo, question])
        answers = [asked.success(column.ask, [photo, question], column.parts) for column in columns]
        for column in columns:
            looks = [column.words, column.seen, column.reading]
            picture.select(column.look, [photo, column.reading], looks, **AT_ONCE)

        def show(chosen: Image.Image | None) -> list:
            shown = None if chosen is None else on_screen(chosen)
            return [chosen, shown, *(part for column in columns for part in column.cleared())]

        def upload(file: dict | None) -> list:
            try:
                return show(None if file is None else read_photo(file["path"]))
            except ValueError as error:
                gr.Warning(escape(str(error)), title="No picture")
                return show(None)

        def take(chosen: gr.SelectData) -> list:
            scene, asked_of_it = examples[chosen.index]
            return [asked_of_it, gr.Gallery(selected_index=None), *show(scene)]

        changed = [photo, picture, *(part for column in columns for part in column.parts)]
        picture.input(upload, picture, changed, cancels=answers, preprocess=False)  # what it cannot read too
        gallery.select(take, None, [question, gallery, *changed], cancels=answers)
        asked.success(None, js=SCROLL_TO.format(".aurea-answer"))
        picture.select(None, js=SCROLL_TO.format(".aurea-seen"))
    return page


def _checked(photo: Image.Image | None, question: str) -> None:
    try:
        check(photo, question)
    except ValueError as error:
        raise gr.Error(str(error), title="Not asked", print_exception=False) from error


def serve(models: Sequence[DemoModel], listening: socket) -> None:
    """Shows the page on a socket that listens, until Ctrl-C, which is raised."""
    app = gr.mount_gradio_app(
        FastAPI(),
        build_page(models),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        css=CSS,
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    host, port, *_ = listening.getsockname()
    print(f"http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C ends it)", flush=True)
    try:
        server.run(sockets=[listening])
    finally:
        for model in models:
            model.close()
