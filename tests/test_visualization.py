# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What is drawn, and where: weights and rectangles as they were read, in pixels of the original."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import FIXTURES
from PIL import Image

from transformers_aurea import AureaForConditionalGeneration, AureaProcessor, embedded_model_path
from transformers_aurea.scenes import make_scene
from transformers_aurea.scenes import test_seeds as seeds_of_tests


pytest.importorskip("matplotlib", reason="extra `visualization`")

from matplotlib.colors import to_rgb
from matplotlib.text import Text

from transformers_aurea import visualization
from transformers_aurea.visualization import (
    draw_eyes,
    draw_layers,
    draw_patch,
    draw_words,
    look,
    patch_panels,
    read_attention,
    sweep,
    word_panels,
)


QUESTION = "What is in the picture?"


@pytest.fixture(scope="module")
def wide(golden_model, golden_processor):
    """A wide picture, whose edges the spatial view does not show."""
    return read_attention(
        FIXTURES / "image_wide.png", QUESTION, golden_model, golden_processor, answer="a red cat", eyes=True
    )


def panels(figure) -> list:
    """Axes with pictures, not scales."""
    return [axes for axes in figure.get_axes() if axes.images]


def rectangle(axes) -> tuple[float, ...]:
    [query] = [patch for patch in axes.patches if isinstance(patch, visualization.Rectangle)]
    assert query.get_edgecolor()[:3] == to_rgb(visualization.ORANGE)
    return *query.get_xy(), query.get_x() + query.get_width(), query.get_y() + query.get_height()


def is_tinted(axes, weights, grid) -> bool:
    """Whether these weights lie on the panel, over the patches of this grid."""
    tint = axes.images[1]
    left, right, bottom, top = tint.get_extent()
    shape = (grid.left, grid.right, grid.bottom, grid.top)
    return np.array_equal(tint.get_array(), weights) and np.allclose((left, right, bottom, top), shape)


class TestOnePatch:
    def test_a_row_for_each_view_with_the_weights_before_and_after(self, wide):
        height, width, _ = wide.pictures[0].shape
        figure = draw_patch(wide, "fusion.joint_layers.2", at=(width / 2, height / 3))
        looks = wide.of_patch("fusion.joint_layers.2", at=(width / 2, height / 3))
        drawn = panels(figure)
        assert len(looks) == 2 and len(drawn) == 6
        for look_, row in zip(looks, (drawn[:3], drawn[3:])):
            expected = look_.query_grid.rectangle(*look_.patch)
            assert all(np.allclose(rectangle(axes), expected) for axes in row)
            assert expected[0] <= width / 2 <= expected[2] and expected[1] <= height / 3 <= expected[3]
            assert is_tinted(row[1], look_.uncorrected, look_.key_grid)
            assert is_tinted(row[2], look_.weights, look_.key_grid)
            assert row[0].get_title() == f"patch {look_.patch}, {look_.views[0]}"
        assert all(axes.get_xlim() == (0, width) and axes.get_ylim() == (height, 0) for axes in drawn)
        assert figure.get_suptitle() == "fusion.joint_layers.2"

    def test_scales_go_from_zero_to_the_highest_weight(self, wide):
        figure = draw_patch(wide, 0, patch=(2, 3), view="vision")
        [look_] = wide.of_patch(0, patch=(2, 3), view="vision")
        for axes, weights in zip(panels(figure)[1:], (look_.uncorrected, look_.weights)):
            tint = axes.images[1]
            assert tint.get_clim() == (0, pytest.approx(weights.max().item()))
            assert tint.colorbar.cmap is tint.cmap and tint.get_alpha() is None  # as it is drawn
        transparent, opaque = visualization.TINT(0.0)[3], visualization.TINT(1.0)[3]
        assert transparent == 0 and opaque > 0.9

    def test_what_a_view_does_not_show_is_covered(self, wide):
        width = wide.pictures[0].shape[1]
        figure = draw_patch(wide, 0, patch=(0, 0))
        grid = wide.grids[0]["spatial_vision"]
        assert grid.left > 1
        for axes, is_cropped in ((panels(figure)[0], False), (panels(figure)[3], True)):
            [cover] = [patch for patch in axes.patches if isinstance(patch, visualization.PathPatch)]
            path = cover.get_path()
            vertices = path.vertices[5:] if is_cropped else path.vertices
            assert vertices[:, 0].min() == pytest.approx(grid.left if is_cropped else 0)
            assert vertices[:, 0].max() == pytest.approx(grid.right if is_cropped else width)

    def test_pixels_of_the_file(self, wide, tmp_path):
        """The query's rectangle, looked for in the saved picture."""
        width = wide.pictures[0].shape[1]
        figure = draw_patch(wide, -1, patch=(5, 6), view="vision")
        figure.savefig(tmp_path / "patch.png", dpi=200)
        image = np.asarray(Image.open(tmp_path / "patch.png").convert("RGB")).astype(int)
        axes = panels(figure)[2]
        box = axes.get_window_extent().transformed(figure.dpi_scale_trans.inverted()).extents * 200
        top = image.shape[0] - box[3]
        panel = image[round(top) : round(image.shape[0] - box[1]), round(box[0]) : round(box[2])]
        is_orange = (abs(panel - [255, 140, 0]) < 12).all(axis=-1)
        rows, columns = is_orange.nonzero()
        scale = panel.shape[1] / width
        left, top, right, bottom = wide.grids[0]["vision"].rectangle(5, 6)
        for found, expected in zip((columns.min(), columns.max(), rows.min(), rows.max()), (left, right, top, bottom)):
            assert found / scale == pytest.approx(expected, abs=5 / scale)


class TestLayersAndWords:
    def test_all_layers(self, wide):
        figure = draw_layers(wide, patch=(3, 3))
        drawn, names = panels(figure), [*wide.layers]
        assert len(drawn) == 2 * len(names)
        for number, axes in enumerate(drawn):
            view, name = ("vision", "spatial_vision")[number // len(names)], names[number % len(names)]
            [look_] = wide.of_patch(name, patch=(3, 3), view=view)
            assert is_tinted(axes, look_.weights, wide.grids[0][view])
            assert axes.get_title() == f"{name.removeprefix('fusion.')}, {view}"

    def test_panels_of_a_patch_have_all_layers_before_and_after(self, wide):
        height, width, _ = wide.pictures[0].shape
        drawn, expected = iter(patch_panels(wide, patch=(3, 3))), 0
        for view in ("vision", "spatial_vision"):
            for name in wide.layers:
                [look_] = wide.of_patch(name, patch=(3, 3), view=view)
                for when, weights in (("before", look_.uncorrected), ("after", look_.weights)):
                    title, highest, figure = next(drawn)
                    assert title == f"{name.removeprefix('fusion.')}, {view}, {when} the correction"
                    [axes] = figure.get_axes()
                    assert is_tinted(axes, weights, look_.key_grid) and highest == weights.max().item()
                    assert np.allclose(rectangle(axes), look_.query_grid.rectangle(3, 3))
                    assert axes.get_xlim() == (0, width) and axes.get_ylim() == (height, 0)
                    assert np.allclose(axes.get_position().extents, [0, 0, 1, 1]) and not axes.get_title()
                    assert np.divide(*figure.get_size_inches()) == pytest.approx(width / height)
                    expected += 1
        assert next(drawn, None) is None and expected == 4 * len(wide.layers)

    def test_panels_of_a_word_have_the_mean_and_each_layer_on_the_scale_of_all_words(self, wide):
        num_layers = wide.word_attention["cross_attention"].shape[0]
        for word in (None, 0, 2):
            drawn = word_panels(wide, word)
            assert len(drawn) == 1 + num_layers
            for (title, highest, figure), layer in zip(drawn, (None, *range(num_layers))):
                maps = wide.word_maps(layer)[:, 0]
                shown = maps.mean(dim=0) if word is None else maps[word]
                [axes] = figure.get_axes()
                assert is_tinted(axes, shown, wide.word_grid(0))
                assert highest == (shown if word is None else maps).max().item()
                assert axes.images[1].get_clim() == (0, pytest.approx(highest))
                name = f"mean of {num_layers} layers" if layer is None else f"layer {layer}"
                assert title == f"cross_attention, {name}"
        with pytest.raises(ValueError, match="There is no word 3: give a number from 0 to 2"):
            word_panels(wide, 3)

    def test_words_in_a_row_on_one_scale(self, wide):
        figure = draw_words(wide, layer=1)
        picture, *drawn = panels(figure)
        assert picture.get_title() == "“a red cat”" and [axes.get_title() for axes in drawn] == ["a", "red", "cat"]
        maps = wide.word_maps(1)[:, 0]
        for axes, weights in zip(drawn, maps, strict=True):
            assert is_tinted(axes, weights, wide.grids[0]["vision"])
            assert axes.images[1].get_clim() == (0, pytest.approx(maps.max().item()))
        assert len(figure.get_axes()) == 5  # one scale

    def test_the_second_picture(self, golden_model, golden_processor):
        names = ("rgb", "wide")
        reading = read_attention(
            [FIXTURES / f"image_{name}.png" for name in names], QUESTION, golden_model, golden_processor, "a cat"
        )
        axes = panels(draw_words(reading, image=1))[2]
        assert is_tinted(axes, reading.word_maps()[1, 1], reading.grids[1]["vision"])
        assert panels(draw_patch(reading, patch=(0, 0), image=1))[0].get_xlim()[1] == reading.pictures[1].shape[1]
        with pytest.raises(ValueError, match="no picture 2"):
            draw_words(reading, image=2)

    def test_eyes(self, wide, golden_model, golden_processor):
        [axes] = draw_eyes(wide).get_axes()
        widths = {label.get_text(): bar.get_width() for label, bar in zip(axes.get_yticklabels(), axes.patches)}
        assert widths == {
            "semantic encoder": wide.eyes.shares["vision"],
            "spatial encoder": wide.eyes.shares["spatial_vision"],
            "both encoders": wide.eyes.shares["both"],
        }
        with pytest.raises(ValueError, match="eyes=True"):
            draw_eyes(read_attention(FIXTURES / "image_rgb.png", None, golden_model, golden_processor))

    def test_a_notebook_shows_a_figure(self, wide):
        assert draw_eyes(wide)._repr_png_().startswith(b"\x89PNG")


class TestSweep:
    def test_a_gif_of_patch_after_patch(self, wide, tmp_path):
        patches = [(0, 0), (3, 4), (7, 7)]
        animation = sweep(wide, tmp_path / "sweep.gif", 2, patches=patches, frames_per_second=5)
        assert [file.name for file in tmp_path.iterdir()] == ["sweep.gif"]
        with Image.open(tmp_path / "sweep.gif") as gif:
            assert gif.n_frames == 3 and gif.info["duration"] == 200
        drawn = panels(animation._fig)
        for frame, patch in enumerate(patches):
            animation._func(frame)
            [look_] = wide.of_patch(2, patch=patch, view="vision")
            assert is_tinted(drawn[0], look_.uncorrected, look_.key_grid)
            assert is_tinted(drawn[1], look_.weights, look_.key_grid)
            assert np.allclose(rectangle(drawn[1]), look_.query_grid.rectangle(*patch))
        highest = max(wide.of_patch(2, patch=patch, view="vision")[0].weights.max().item() for patch in patches)
        assert drawn[1].images[1].get_clim() == (0, pytest.approx(highest))

    @pytest.mark.filterwarnings("ignore:Animation was deleted")
    def test_all_patches_by_default(self, wide):
        assert sweep(wide, view="spatial_vision")._save_count == 64

    def test_outputs_that_cannot_be(self, wide, tmp_path):
        with pytest.raises(ValueError, match=r"'sweep\.png' must end in \.gif"):
            sweep(wide, "sweep.png")
        with pytest.raises(ValueError, match="there is no folder"):
            sweep(wide, tmp_path / "nowhere" / "sweep.gif")


class TestLook:
    @pytest.fixture(scope="class")
    def embedded(self):
        return [
            part.from_pretrained(embedded_model_path()) for part in (AureaForConditionalGeneration, AureaProcessor)
        ]

    @pytest.mark.parametrize("ending", [".png", ".svg", ".JPG"])
    def test_a_file(self, embedded, tmp_path, ending):
        picture, [(_, question, expected)] = make_scene(seeds_of_tests(1)[0], kinds=["describe"])
        reading = look(picture, question, *embedded, tmp_path / f"look{ending}")
        assert reading.answer == expected and reading.eyes is not None
        [file] = tmp_path.iterdir()
        assert file.name == f"look{ending}" and file.stat().st_size > 5000

    def test_the_patch_is_that_where_the_answer_looked_most(self, embedded):
        picture, [(_, question, _)] = make_scene(seeds_of_tests(2)[1], kinds=["describe"])
        reading = read_attention(picture, question, *embedded, eyes=True)
        figure = visualization._overview(reading, None)
        maps = reading.word_maps().sum(dim=(0, 1))
        place = divmod(int(maps.argmax()), maps.shape[1])
        drawn = panels(figure)
        assert len(drawn) == 1 + len(reading.words) + len(reading.layers)
        assert rectangle(drawn[-1]) == pytest.approx(reading.grids[0]["vision"].rectangle(*place))
        chosen = visualization._overview(reading, (3, 100))
        assert rectangle(panels(chosen)[-1]) == pytest.approx((0, 96, 8, 104))
        assert figure.get_suptitle() == question

    def test_words_are_drawn_on_every_picture_and_layers_on_that_where_the_answer_looked_most(self, embedded):
        pictures = [make_scene(seed, kinds=[])[0] for seed in seeds_of_tests(2)]
        reading = read_attention(pictures, "What is in the picture?", *embedded, answer="a ring")
        maps, drawn = reading.word_maps(), panels(visualization._overview(reading, None))
        assert len(drawn) == 2 * 3 + len(reading.layers)
        grid = reading.grids[0]["vision"]
        for image in range(2):
            assert drawn[3 * image].get_title() == f"picture {image}"
            for word in range(2):
                assert is_tinted(drawn[3 * image + 1 + word], maps[word, image], grid)
        image, row, column = np.unravel_index(int(maps.sum(dim=0).argmax()), maps.shape[1:])
        for axes, name in zip(drawn[6:], reading.layers, strict=True):
            [look_] = reading.of_patch(name, patch=(int(row), int(column)), image=int(image))
            assert is_tinted(axes, look_.weights, grid)

    def test_without_a_question(self, embedded, tmp_path):
        picture, _ = make_scene(seeds_of_tests(1)[0], kinds=[])
        reading = look(picture, None, *embedded, tmp_path / "look.png")
        assert reading.answer is None and (tmp_path / "look.png").stat().st_size > 5000
        left, top, right, bottom = rectangle(panels(visualization._overview(reading, None))[0])
        assert left <= 56 <= right and top <= 56 <= bottom

    def test_outputs_that_cannot_be_are_told_before_anything_runs(self, tmp_path):
        with pytest.raises(ValueError, match=r"'look\.txt' must end in \.gif or \.jpg or \.pdf or \.png or \.svg"):
            look(None, None, None, None, "look.txt")
        with pytest.raises(ValueError, match="there is no folder"):
            look(None, None, None, None, tmp_path / "nowhere" / "look.png")

    @pytest.mark.parametrize("ending", [".png", ".gif"])
    def test_nothing_half_written_is_left(self, embedded, tmp_path, monkeypatch, ending):
        picture, _ = make_scene(seeds_of_tests(1)[0], kinds=[])
        (tmp_path / f"look{ending}").write_text("what was there")

        def stop(self, file, **kwargs):
            Path(file).write_text("half")
            raise KeyboardInterrupt

        monkeypatch.setattr(visualization.Figure, "savefig", stop)
        monkeypatch.setattr(visualization.FuncAnimation, "save", stop)
        monkeypatch.setattr(visualization, "sweep", lambda reading, output: sweep(reading, output, patches=[(0, 0)]))
        with pytest.raises(KeyboardInterrupt):
            look(picture, None, *embedded, tmp_path / f"look{ending}")
        [file] = tmp_path.iterdir()
        assert file.read_text() == "what was there"


def test_no_text_lies_on_other_text_or_beside_the_figure(wide, monkeypatch):
    drawn, draw = [], Text.draw
    monkeypatch.setattr(Text, "draw", lambda self, renderer: (drawn.append(self), draw(self, renderer)))
    for figure in (
        draw_patch(wide, 0, patch=(0, 0)),
        draw_layers(wide, patch=(1, 1)),
        draw_words(wide),
        draw_eyes(wide),
        visualization._overview(wide, None),
    ):
        drawn.clear()
        figure.draw_without_rendering()
        boxes = [(text.get_text(), text.get_window_extent()) for text in drawn if text.get_text().strip()]
        assert len(boxes) > 5
        width, height = figure.bbox.size
        for number, (text, box) in enumerate(boxes):
            assert min(box.x0, box.y0) >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
            for other, other_box in boxes[:number]:
                shared_width = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
                shared_height = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
                assert shared_width <= 1 or shared_height <= 1, (text, other)


def test_without_matplotlib_the_extra_is_named():
    script = """
import sys
sys.modules["matplotlib"] = None
import transformers_aurea.attention_reading
try:
    import transformers_aurea.visualization
except ImportError as error:
    assert 'pip install "transformers-aurea[visualization]"' in str(error), error
else:
    raise AssertionError("it was imported")
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_pyplot_stays_out_of_it():
    script = """
import sys
import transformers_aurea.visualization
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
