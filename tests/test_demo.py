# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The page of `aurea demo`: what it does, its handlers, and the page itself in a browser."""

import base64
import importlib.util
import io
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
from conftest import FIXTURES
from PIL import Image
from test_cli import refusal

from transformers_aurea import AureaConfig, AureaForConditionalGeneration, AureaProcessor, embedded_model_path
from transformers_aurea.attention_reading import read_attention
from transformers_aurea.cli import main
from transformers_aurea.cli.errors import message
from transformers_aurea.scenes import make_scene, scene_digest
from transformers_aurea.scenes import test_seeds as seeds_of_tests


pytest.importorskip("matplotlib", reason="extra `visualization`")

from transformers_aurea.demo import (
    EXAMPLES,
    LARGE,
    SMALL,
    DemoModel,
    check,
    example_scenes,
    on_screen,
    patch_html,
    read_photo,
    to_screen,
    word_html,
)
from transformers_aurea.visualization import ORANGE, patch_panels


needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="extra `demo`: gradio")
SOURCES = "() => [...document.querySelectorAll('.aurea-seen')[0].querySelectorAll('img')].map(i => i.src).join('\"')"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def embedded() -> DemoModel:
    parts = (part.from_pretrained(embedded_model_path()) for part in (AureaForConditionalGeneration, AureaProcessor))
    return DemoModel("embedded model", *parts)


@pytest.fixture(scope="module")
def scene() -> tuple[Image.Image, str]:
    picture, [(_, question, _)] = make_scene(seeds_of_tests(1)[0], kinds=["describe"])
    return picture, question


@pytest.fixture(scope="module")
def reading(embedded, scene):
    return embedded.read(*scene)


@pytest.fixture(scope="module")
def wide(golden_model, golden_processor):
    """A wide picture, whose edges the spatial view does not show, as it was read and as it is on the screen."""
    reading = read_attention(read_photo(FIXTURES / "image_wide.png"), None, golden_model, golden_processor)
    return reading, to_screen(reading)


@pytest.fixture(scope="module")
def one_eyed() -> DemoModel:
    """A model whose fusion has no patches that look at patches."""
    settings = AureaConfig.from_pretrained(embedded_model_path()).to_dict()
    settings |= {"feature_fusion_config": {"fusion_type": "none"}, "spatial_vision_config": None}
    model = AureaForConditionalGeneration(AureaConfig(**settings)).eval()
    return DemoModel("one eye", model, AureaProcessor.from_pretrained(embedded_model_path()))


def pictures_in(html: str) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", html)]


class TestPhotos:
    def test_it_is_what_the_model_sees(self, golden_model, golden_processor, pictures, tmp_path):
        photo = read_photo(FIXTURES / "image_rgba.png")
        [expected] = read_attention(pictures["rgba"], None, golden_model, golden_processor).pictures
        assert np.array_equal(np.asarray(photo), expected)
        exif = Image.Exif()
        exif[274] = 6  # a quarter turn
        pictures["wide"].save(tmp_path / "turned.jpg", exif=exif)
        assert read_photo(tmp_path / "turned.jpg").size == pictures["wide"].size[::-1]

    def test_what_cannot_be_read_is_named_without_its_folder(self, tmp_path):
        (tmp_path / "text.png").write_text("no picture")
        with pytest.raises(ValueError, match=r"^The picture 'text.png' cannot be read") as refused:
            read_photo(tmp_path / "text.png")
        assert str(tmp_path) not in str(refused.value)

    @pytest.mark.parametrize(
        ("size", "expected"),
        [
            ((112, 112), (448, 448)),
            ((1, 1), (448, 448)),
            ((231, 90), (462, 180)),
            ((600, 500), (600, 500)),
            ((4000, 3000), (1024, 768)),
            ((1, 5000), (1, 1024)),
        ],
        ids=str,
    )
    def test_what_is_shown_is_neither_too_small_for_a_finger_nor_too_large(self, size, expected):
        assert on_screen(Image.new("RGB", size)).size == expected
        assert SMALL <= max(expected) <= LARGE

    def test_small_pictures_keep_their_pixels(self, scene):
        shown = np.asarray(on_screen(scene[0]))
        assert np.array_equal(shown[::4, ::4], np.asarray(scene[0])) and np.array_equal(shown[3::4, 3::4], scene[0])

    def test_a_point_of_the_screen_is_in_the_patch_of_the_original(self, wide):
        original, shown = wide
        (height, width, _), (shown_height, shown_width, _) = original.pictures[0].shape, shown.pictures[0].shape
        assert (width, height) == (231, 90) and (shown_width, shown_height) == (462, 180)
        tried = set()
        for x in range(0, width, 11):
            for y in range(0, height, 9):
                expected = original.of_patch(0, at=(x, y))
                found = shown.of_patch(0, at=(2 * x, 2 * y))
                assert [one.patch for one in found] == [one.patch for one in expected]
                tried |= {(one.views, one.patch) for one in found}
        assert len(tried) > 50

    def test_the_query_is_drawn_where_it_is_in_the_picture(self, wide):
        original, shown = wide
        panels = patch_panels(shown, patch=(1, 2), view="vision")
        assert len(panels) == 2 * len(shown.layers)  # before and after the correction
        left, top, right, bottom = original.grids[0]["vision"].rectangle(1, 2)
        for panel in panels:
            buffer = io.BytesIO()
            panel.figure.savefig(buffer, format="png", dpi=200)
            image = np.asarray(Image.open(buffer).convert("RGB")).astype(int)
            orange = [int(ORANGE[place : place + 2], 16) for place in (1, 3, 5)]
            rows, columns = (abs(image - orange) < 12).all(axis=-1).nonzero()
            scale = image.shape[1] / 231
            assert image.shape[0] == pytest.approx(90 * scale, abs=1)
            edges = columns.min(), columns.max(), rows.min(), rows.max()
            assert edges == pytest.approx([scale * edge for edge in (left, right, top, bottom)], abs=5)


def _small():
    """The embedded model and its processor."""
    return tuple(
        part.from_pretrained(embedded_model_path()) for part in (AureaForConditionalGeneration, AureaProcessor)
    )


class TestAnswers:
    def test_it_grows_to_what_the_model_says(self, embedded, scene, reading):
        texts = [*embedded.answer(*scene)]
        assert len(texts) > 3 and texts[-1] == reading.answer
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))

    def test_an_error_is_raised_and_the_next_question_answered(self, embedded, scene, reading, monkeypatch):
        def generate(**kwargs):
            raise RuntimeError("out of memory")

        with monkeypatch.context() as broken:
            broken.setattr(embedded.model, "generate", generate)
            with pytest.raises(RuntimeError, match="out of memory"):
                list(embedded.answer(*scene))
        assert [*embedded.answer(*scene)][-1] == reading.answer

    @pytest.mark.parametrize("leave", ["the answer", "the page"])
    def test_it_ends_where_nobody_waits_for_it(self, leave, embedded, scene, monkeypatch):
        model = DemoModel("model", embedded.model, embedded.processor)
        ended = threading.Event()

        def generate(input_ids, streamer, stopping_criteria, **kwargs):
            streamer.put(input_ids)
            streamer.on_finalized_text("word ")
            [criterion] = stopping_criteria
            deadline = time.monotonic() + 60
            while not criterion(input_ids, None).all() and time.monotonic() < deadline:
                time.sleep(0.01)
            if time.monotonic() < deadline:
                ended.set()

        monkeypatch.setattr(model.model, "generate", generate)
        texts = model.answer(*scene)
        assert next(texts) == "word"
        time.sleep(0.1)
        assert not ended.is_set()
        texts.close() if leave == "the answer" else model.close()
        assert ended.wait(30)

    def test_a_model_that_is_no_aurea_is_refused(self, embedded):
        with pytest.raises(ValueError, match="holds no Aurea"):
            DemoModel("text", embedded.model.model.language_model, None)

    def test_the_title_tells_models_apart(self, embedded, one_eyed):
        assert embedded.title == "embedded model · fusion spatial_range · cross_attention"
        assert one_eyed.title == "one eye · fusion none · cross_attention"

    def test_nothing_and_nothing_to_ask_are_refused(self, scene):
        with pytest.raises(ValueError, match="There is no picture"):
            check(None, "what?")
        with pytest.raises(ValueError, match="The question is empty"):
            check(scene[0], " \n")
        assert check(*scene) is None

    def test_examples_are_scenes_to_ask_about(self):
        examples = example_scenes()
        assert len(examples) == len(EXAMPLES) and len({question for _, question in examples}) > 3
        assert len({scene_digest(picture) for picture, _ in examples}) == len(EXAMPLES)


class TestHtml:
    def test_layer_by_layer_before_and_after(self, reading):
        html = patch_html(reading, at=(200, 100))
        captions = re.findall(r"<figcaption>(.+?) <span>up to (.+?)%</span>", html)
        names = [name.removeprefix("fusion.") for name in reading.layers]
        expected = [f"{name}, {when} the correction" for name in names for when in ("before", "after")]
        assert [caption for caption, _ in captions] == expected
        for (_, highest), name in zip(captions[1::2], reading.layers):
            [look] = reading.of_patch(name, at=(200, 100))
            assert float(highest) == pytest.approx(100 * look.weights.max().item(), rel=1e-2)
        shown = pictures_in(html)
        assert len(shown) == len(expected) and all(picture.width > 300 for picture in shown)

    def test_a_click_elsewhere_shows_another_patch(self, reading):
        assert patch_html(reading, at=(200, 100)) == patch_html(reading, at=(201, 101))
        assert patch_html(reading, at=(200, 100)) != patch_html(reading, at=(240, 100))

    def test_words_in_the_mean_and_in_each_layer(self, reading):
        html = word_html(reading, 1)
        assert f"as it said “{reading.words[1]}”" in html
        captions = re.findall(r"<figcaption>(.+?) <span>up to (.+?)%</span>", html)
        num_layers = reading.word_attention["cross_attention"].shape[0]
        names = [f"mean of {num_layers} layers", *(f"layer {number}" for number in range(num_layers))]
        assert [caption for caption, _ in captions] == [f"cross_attention, {name}" for name in names]
        assert float(captions[0][1]) == pytest.approx(100 * reading.word_maps().max().item(), rel=1e-2)
        assert "Where it looked as it answered" in word_html(reading)
        shown = [[np.asarray(picture) for picture in pictures_in(word_html(reading, word))] for word in (None, 1, 2)]
        assert not np.array_equal(shown[0][0], shown[1][0]) and not np.array_equal(shown[1][0], shown[2][0])
        assert not np.array_equal(shown[1][1], shown[1][2])

    def test_what_a_model_says_is_text(self, reading):
        html = word_html(replace(reading, words=("<script>", *reading.words[1:])), 0)
        assert "<script>" not in html and "&lt;script&gt;" in html

    def test_what_has_nothing_to_show_says_so(self, one_eyed, scene, reading, wide):
        html = patch_html(one_eyed.read(scene[0]), at=(200, 100))
        assert "<img" not in html and "Neither fusion nor composition of this model has layers" in html
        html = word_html(replace(reading, token_grid=None), 0)
        assert "<img" not in html and "lie on no grid of patches" in html
        assert "There is no word 99" in word_html(reading, 99)
        html = patch_html(wide[1], at=(1000, 20))
        assert "<img" not in html and "No patch shows the point (1000, 20)" in html


@needs_gradio
class TestColumn:
    @pytest.fixture
    def column(self, embedded):
        import gradio

        from transformers_aurea.demo_page import ModelColumn

        with gradio.Blocks():
            return ModelColumn(embedded)

    def test_the_answer_is_streamed_then_its_words_are_shown(self, column, scene, reading):
        *before, (text, words, seen, kept) = [*column.ask(*scene)]
        assert [part[0] for part in before] == ["", *column.model.answer(*scene)]
        assert text == kept.answer == reading.answer and seen == word_html(kept)
        assert words.value == -1 and [value for _, value in words.choices] == [-1, *range(len(kept.words))]
        assert [word for word, _ in words.choices[1:]] == [*kept.words]
        assert column.show_word(1, kept) == word_html(kept, 1) and column.show_word(-1, kept) == seen

    def test_a_click_shows_the_patch_with_and_without_an_answer(self, column, scene, reading):
        import gradio

        click = gradio.SelectData(None, {"index": [200, 100], "value": None})
        for before in (None, reading):
            words, seen, kept = column.look(scene[0], before, click)
            assert words.value is None and seen == patch_html(reading, at=(200, 100))
            assert before is None or kept is before
        assert all("value" not in part for part in column.look(None, None, click))

    def test_an_answer_of_nothing_says_so(self, column, scene, monkeypatch):
        monkeypatch.setattr(column.model, "answer", lambda *_: iter([""]))
        [*_, (text, _, seen, _)] = column.ask(*scene)
        assert text == "" and "The answer &#x27;&#x27; has no tokens." in seen


class TestCommand:
    def test_a_port_in_use_is_refused_before_anything_is_loaded(self, capsys):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = str(listening.getsockname()[1])
            assert f"--host 127.0.0.1 --port {port} cannot be had" in refusal(["demo", "--port", port], capsys)
        assert "--port 70000 cannot be had" in refusal(["demo", "--port", "70000"], capsys)
        assert "at least 0, got 'x'" in refusal(["demo", "--port", "x"], capsys)
        assert "--host nowhere.invalid" in refusal(["demo", "--port", "0", "--host", "nowhere.invalid"], capsys)

    def test_without_gradio_the_extra_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "gradio", None)
        with pytest.raises(ModuleNotFoundError) as refused:
            main(["demo", "--port", "0"])
        assert message(refused.value).endswith('Install it by: pip install "transformers-aurea[demo]"')

    @pytest.fixture
    def served(self, monkeypatch) -> list:
        """The titles of models that are shown; no page is built."""
        titles = []
        page = ModuleType("transformers_aurea.demo_page")
        page.serve = lambda models, listening: titles.append([model.title for model in models])
        monkeypatch.setitem(sys.modules, "transformers_aurea.demo_page", page)
        monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
        return titles

    def test_one_model_or_two(self, served, tmp_path):
        folder = tmp_path / "mine"
        shutil.copytree(embedded_model_path(), folder)
        assert main(["demo", "--port", "0"]) == main(["demo", "--port", "0", "--compare", str(folder)]) == 0
        names = [[title.split(" · ")[0] for title in titles] for titles in served]
        assert names == [["embedded model"], ["embedded model", "mine"]]

    @pytest.mark.parametrize("option", ["--model", "--compare"])
    def test_what_is_no_model_is_named(self, option, served, tmp_path):
        with pytest.raises(ValueError, match="is no model: it is not a folder"):
            main(["demo", "--port", "0", option, str(tmp_path)])
        assert not served

    @needs_gradio
    @pytest.mark.slow
    def test_ctrl_c_is_one_line(self):
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers_aurea", "demo", "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        assert re.fullmatch(r"http://127.0.0.1:\d+ \(Ctrl-C ends it\)\n", process.stdout.readline())
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=300)[1].splitlines()[-1] == "interrupted" and process.returncode == 130


@pytest.fixture(scope="module")
def address(embedded, one_eyed) -> str:
    """Of a page on which the embedded model stands beside one of one encoder."""
    pytest.importorskip("gradio", reason="extra `demo`")
    from transformers_aurea.demo_page import serve

    listening = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve, args=([embedded, one_eyed], listening), daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="a browser is driven with playwright")
    if CHROMIUM is None:
        pytest.skip("there is no chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=["desktop", "phone"])
def page(request, browser, address):
    """The page, which may ask nobody else for anything, and fits the width."""
    is_phone = request.param == "phone"
    size = {"width": 390, "height": 844} if is_phone else {"width": 1280, "height": 900}
    context = browser.new_context(viewport=size, is_mobile=is_phone, has_touch=is_phone)
    requests, errors = [], []
    context.on("request", lambda sent: requests.append(sent.url))
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.set_default_timeout(120_000)
    page.goto(address)
    page.wait_for_selector("#ask")
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert len(requests) > 10 and not errors
    assert [url for url in requests if not url.startswith((address, "data:", "blob:"))] == []
    context.close()


@pytest.mark.slow
class TestBrowser:
    def seen(self, page) -> str:
        """The sources of the pictures in the first column."""
        return page.evaluate(f"({SOURCES})()")

    def changed(self, page, before: str) -> str:
        """Those that are there once they are others."""
        page.wait_for_function(f"before => ({SOURCES})() && ({SOURCES})() != before", arg=before)
        return self.seen(page)

    def upload(self, page, path) -> None:
        with page.expect_file_chooser() as chooser:
            page.locator("#picture button").first.click()
        chooser.value.set_files(path)

    def click(self, page, x: float, y: float) -> None:
        """On a point of the picture, given in parts of its width and height."""
        image = page.locator("#picture img")
        image.scroll_into_view_if_needed()
        box = image.bounding_box()
        width, height = image.evaluate("image => [image.naturalWidth, image.naturalHeight]")
        scale = min(box["width"] / width, box["height"] / height, 1)  # `object-fit: scale-down`
        left, top = (box["width"] - scale * width) / 2, (box["height"] - scale * height) / 2
        image.click(position={"x": left + x * scale * width, "y": top + y * scale * height})

    def test_upload_ask_and_click(self, page, embedded):
        self.upload(page, FIXTURES / "image_wide.png")
        page.wait_for_selector("#picture img")
        before = self.seen(page)
        page.locator("#question textarea, #question input").fill("What is in the image?")
        page.locator("#ask").click()
        answered = self.changed(page, before)
        photo = read_photo(FIXTURES / "image_wide.png")
        reading = embedded.read(photo, "What is in the image?")
        assert page.locator(".aurea-answer textarea").first.input_value() == reading.answer
        assert pictures_in(answered) == pictures_in(word_html(reading))
        words = page.locator(".aurea-words").first.locator("label")
        assert words.all_inner_texts() == ["the whole answer", *reading.words]
        words.nth(1).click()
        of_word = self.changed(page, answered)
        assert pictures_in(of_word) == pictures_in(word_html(reading, 0))
        for x, y in ((0.03, 0.9), (0.6, 0.3)):
            before = self.seen(page)
            self.click(page, x, y)
            found = pictures_in(self.changed(page, before))
            assert found == pictures_in(patch_html(reading, at=(462 * x, 180 * y)))

    def test_an_example_needs_no_upload_and_a_new_one_clears_what_was_said(self, page):
        examples = page.locator("#examples .grid-container button")
        asked = page.locator("#question textarea, #question input")
        for number, (_, question) in enumerate(example_scenes()[:2]):
            examples.nth(number).click()
            page.wait_for_function(
                "text => document.querySelector('#question textarea, #question input').value == text", arg=question
            )
            assert asked.input_value() == question
            page.wait_for_selector("#picture img")
            assert page.locator(".aurea-answer textarea").first.input_value() == ""
            before = self.seen(page)
            self.click(page, 0.5, 0.5)
            assert len(pictures_in(self.changed(page, before))) == 8
            page.locator(".aurea-seen").nth(1).get_by_text("Neither fusion nor composition").wait_for()

    def test_what_cannot_be_is_said(self, page, tmp_path):
        page.locator("#ask").click()
        page.get_by_text("There is no picture").wait_for()
        (tmp_path / "text.png").write_text("no picture")
        self.upload(page, tmp_path / "text.png")
        page.get_by_text("The picture 'text.png' cannot be read").wait_for()
        assert page.locator("#picture img").count() == 0
        page.locator("#examples .grid-container button").first.click()
        page.wait_for_selector("#picture img")
        page.locator("#question textarea, #question input").fill(" ")
        page.locator("#ask").click()
        page.get_by_text("The question is empty").wait_for()
