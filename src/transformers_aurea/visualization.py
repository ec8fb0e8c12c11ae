# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what an Aurea attends to, in the pixels of the original picture.

    seen = read_attention("photo.jpg", "What is left of the cup?", model, processor)
    draw_words(seen).savefig("words.png")
    draw_patch(seen, at=(120, 80)).savefig("patch.png")

`look` does all of it at once, into a file. Figures are matplotlib's, made without pyplot: nothing global is changed,
and any thread may draw. Needs matplotlib: `pip install "transformers-aurea[visualization]"`.
"""

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.image_utils import ImageInput

from .attention_reading import AttentionReading, PatchReading, read_attention
from .patch_grids import PatchGrid
from .processing_aurea import AureaProcessor


try:
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.axes import Axes
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage
    from matplotlib.patches import PathPatch, Rectangle
    from matplotlib.path import Path as Outline
except ModuleNotFoundError as error:
    raise ImportError(
        "Pictures of attention need matplotlib, which is not installed: "
        'pip install "transformers-aurea[visualization]"'
    ) from error

ORANGE, BLUE, GRAY = "#ff8c00", "#2f7fd6", "#8b949e"
# Of a weight of 0 the picture shows through, of the highest hardly.
TINT = LinearSegmentedColormap.from_list("tint", [(0.2, 0.55, 0.9, 0), (0.1, 0.4, 0.8, 0.65), (0.02, 0.15, 0.4, 0.95)])
EYES = {"vision": "semantic encoder", "spatial_vision": "spatial encoder", "both": "both encoders"}
PANEL = 2.3  # inches, the longer side of a picture
TITLE = 0.35
PANELS_IN_A_ROW = 5
ENDINGS = (".gif", ".jpg", ".pdf", ".png", ".svg")


class AttentionFigure(Figure):
    """A figure that a notebook shows though pyplot does not know it."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


class Panel(NamedTuple):
    """A picture tinted by weights, alone, for a page that lays panels out itself.

    Args:
        title: whose weights these are.
        highest: the weight that is darkest.
        figure: without title and scale, edge to edge.
    """

    title: str
    highest: float
    figure: AttentionFigure


def draw_patch(
    reading: AttentionReading,
    layer: str | int = -1,
    *,
    at: tuple[float, float] | None = None,
    patch: tuple[int, int] | None = None,
    image: int = 0,
    view: str | None = None,
) -> Figure:
    """The picture with a patch in orange, and what it looks at in one layer: of spatial-range attention before and
    after the correction. Arguments and errors are those of [`AttentionReading.of_patch`]; a row for each view."""
    looks = reading.of_patch(layer, at=at, patch=patch, image=image, view=view)
    picture = reading.pictures[image]
    columns = 1 + len(_maps(looks[0]))
    figure = _figure(picture, columns * len(looks), columns)
    for look, row in zip(looks, _panels(figure, columns * len(looks), columns)):
        _draw_picture(row[0], picture, look.query_grid, f"patch {look.patch}{_in_view(reading, look, image)}")
        _draw_query(row[0], look, is_filled=True)
        for axes, (title, weights) in zip(row[1:], _maps(look).items()):
            _draw_weights(axes, picture, look.key_grid, weights, title)
            _draw_query(axes, look)
    figure.suptitle(reading.layer_name(layer), fontsize=10)
    return figure


def draw_layers(
    reading: AttentionReading,
    *,
    at: tuple[float, float] | None = None,
    patch: tuple[int, int] | None = None,
    image: int = 0,
    view: str | None = None,
) -> Figure:
    """What a patch looks at in all layers, corrected, each on its own scale. Arguments and errors are those of
    [`AttentionReading.of_patch`]."""
    looks = _looks(reading, at=at, patch=patch, image=image, view=view)
    figure = _figure(reading.pictures[image], len(looks))
    _draw_layers(figure, reading.pictures[image], looks)
    return figure


def draw_words(
    reading: AttentionReading, layer: int | None = None, attention: str | None = None, image: int = 0
) -> Figure:
    """The picture, and where each word of the answer looked, all on one scale. `layer`, `attention` and errors are
    those of [`AttentionReading.word_maps`]."""
    maps = reading.word_maps(layer, attention)
    figure = _figure(reading.pictures[reading.image_number(image)], 1 + len(maps))
    _draw_words(figure, reading, maps, image)
    return figure


def patch_panels(
    reading: AttentionReading,
    *,
    at: tuple[float, float] | None = None,
    patch: tuple[int, int] | None = None,
    image: int = 0,
    view: str | None = None,
) -> list[Panel]:
    """What a patch looks at in all layers, of spatial-range attention before and after the correction, one [`Panel`]
    each on its own scale. Arguments and errors are those of [`AttentionReading.of_patch`]."""
    picture = reading.pictures[reading.image_number(image)]
    panels = []
    for layer, look in _looks(reading, at=at, patch=patch, image=image, view=view):
        for title, weights in _maps(look).items():
            title = layer if look.uncorrected is None else f"{layer}, {title}"
            panels.append(_panel(picture, look.key_grid, weights, title, weights.max().item()))
            _draw_query(panels[-1].figure.axes[0], look)
    return panels


def word_panels(reading: AttentionReading, word: int | None = None, image: int = 0) -> list[Panel]:
    """Where a word of the answer looked, or the mean of all words: one [`Panel`] for the mean of the layers, and one
    for each layer. Words of the same layer are on one scale. ValueError: there is no such word, and what
    [`AttentionReading.word_maps`] raises."""
    if word is not None and not 0 <= word < len(reading.words):
        raise ValueError(f"There is no word {word}: give a number from 0 to {len(reading.words) - 1}.")
    picture = reading.pictures[reading.image_number(image)]
    panels = []
    for attention, weights in reading.word_attention.items() or [(None, ())]:  # which raises
        for layer in (None, *range(len(weights))):
            maps = reading.word_maps(layer, attention)[:, image]
            shown = maps.mean(dim=0) if word is None else maps[word]
            highest = (shown if word is None else maps).max().item()
            title = f"{attention}, mean of {len(weights)} layers" if layer is None else f"{attention}, layer {layer}"
            panels.append(_panel(picture, reading.word_grid(image), shown, title, highest))
    return panels


def draw_eyes(reading: AttentionReading) -> Figure:
    """A bar for each encoder: how much log-probability the answer loses where it is blinded. ValueError if the reading
    was made without `eyes=True`."""
    if reading.eyes is None:
        raise ValueError(
            "Nothing was read of the encoders' shares: give `read_attention` a question, and `eyes=True`."
        )
    figure = AttentionFigure(figsize=(6, _eyes_height(reading)), layout="constrained")
    _draw_eyes(figure, reading)
    return figure


def sweep(
    reading: AttentionReading,
    output: str | os.PathLike | None = None,
    layer: str | int = -1,
    *,
    patches: Iterable[tuple[int, int]] | None = None,
    image: int = 0,
    view: str | None = None,
    frames_per_second: float = 10,
) -> FuncAnimation:
    """An animation of what patch after patch looks at in one layer, on one scale; a GIF of it if `output` is given.

    Args:
        reading, layer, image, view: see [`AttentionReading.of_patch`]; without `view`, of the first that there is.
        output: a file that ends in .gif.
        patches: rows and columns, by default all, row by row.

    Raises:
        ValueError: what `of_patch` raises; `output` has another ending, or there is no folder for it.
    """
    output = None if output is None else _checked(output, ENDINGS[:1])
    first = reading.of_patch(layer, patch=(0, 0), image=image, view=view)[0]
    rows, columns = first.query_grid.rows, first.query_grid.columns
    patches = [(row, column) for row in range(rows) for column in range(columns)] if patches is None else [*patches]
    looks = [reading.of_patch(layer, patch=patch, image=image, view=first.views[0])[0] for patch in patches]
    picture, titles = reading.pictures[image], [*_maps(first)]
    figure = _figure(picture, len(titles))
    panels = _panels(figure, len(titles)).flat
    maps = {title: [_maps(look)[title] for look in looks] for title in titles}
    tints = [
        _draw_weights(
            axes, picture, first.key_grid, maps[title][0], title, max(one.max().item() for one in maps[title])
        )
        for axes, title in zip(panels, titles)
    ]
    queries = [_draw_query(tint.axes, looks[0]) for tint in tints]
    figure.suptitle(reading.layer_name(layer), fontsize=10)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # nothing moves from here on

    def show(frame: int) -> list:
        left, top, _, _ = first.query_grid.rectangle(*patches[frame])
        for title, tint, query in zip(titles, tints, queries):
            tint.set_data(maps[title][frame])
            query.set_xy((left, top))
        return [*tints, *queries]

    animation = FuncAnimation(figure, show, frames=len(looks), interval=1000 / frames_per_second)
    if output is not None:
        with _written(output) as file:
            animation.save(file, writer=PillowWriter(fps=frames_per_second), dpi=80)
    return animation


def look(
    pictures: ImageInput,
    question: str | None,
    model: PreTrainedModel,
    processor: AureaProcessor,
    output: str | os.PathLike,
    *,
    answer: str | None = None,
    at: tuple[float, float] | None = None,
) -> AttentionReading:
    """Asks a model about pictures, and writes where it looked into a file.

    Args:
        pictures, question, model, processor, answer: see [`read_attention`].
        output: a `.gif` is a sweep over the patches of the first picture in the last layer. A `.png`, `.jpg`, `.svg`
            or `.pdf` has the words of the answer, what a patch looks at in all layers, and the encoders' shares.
        at: the patch's point (x, y) in pixels of the first picture; by default where the answer looked most, or the
            middle.

    Returns:
        [`AttentionReading`], which has the `answer`.

    Raises:
        ValueError: `output` has another ending, or there is no folder for it; what `read_attention` raises; nothing
            that the model attends to can be drawn.
    """
    output = _checked(output, ENDINGS)
    is_sweep = output.suffix.lower() == ENDINGS[0]
    reading = read_attention(pictures, question, model, processor, answer, eyes=question is not None and not is_sweep)
    if is_sweep:
        sweep(reading, output)
        return reading
    figure = _overview(reading, at)
    with _written(output) as file:
        figure.savefig(file, dpi=120)
    return reading


def _overview(reading: AttentionReading, at: tuple[float, float] | None) -> Figure:
    """Words, layers and encoders' shares below each other, as far as the model has them: words for each picture,
    layers for that at which the answer looked most, or the first."""
    image, sections = 0, []  # heights, and what is drawn
    height, width, _ = reading.pictures[0].shape
    point = (width / 2, height / 2) if at is None else at
    if reading.words and reading.token_grid is not None:
        maps = reading.word_maps()
        for number, picture in enumerate(reading.pictures):
            draw = partial(_draw_words, reading=reading, maps=maps, image=number)
            sections.append((_height(picture, 1 + len(maps)), draw))
        if at is None:
            looked = maps.sum(dim=0)  # (pictures, rows, columns)
            image, *place = (int(index) for index in np.unravel_index(int(looked.argmax()), looked.shape))
            left, top, right, bottom = reading.word_grid(image).rectangle(*place)
            point = ((left + right) / 2, (top + bottom) / 2)
    if reading.layers:
        looks = _looks(reading, image, at=point)
        draw = partial(_draw_layers, picture=reading.pictures[image], looks=looks)
        sections.append((_height(reading.pictures[image], len(looks)), draw))
    if reading.eyes is not None:
        sections.append((_eyes_height(reading), partial(_draw_eyes, reading=reading)))
    if not sections:
        raise ValueError("Nothing that this model attends to can be drawn without a question: give one.")
    heights = [height for height, _ in sections]
    width = PANELS_IN_A_ROW * max(_panel_size(picture)[0] for picture in reading.pictures)
    figure = AttentionFigure(figsize=(width, sum(heights) + TITLE), layout="constrained")
    if reading.question is not None:
        figure.suptitle(_shorten(reading.question, 100), fontsize=11)
    parts = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (_, draw) in zip(parts, sections):
        draw(part)
    return figure


def _looks(reading: AttentionReading, image: int = 0, **point) -> list[tuple[str, PatchReading]]:
    """Titles, and what a patch looks at in each view and layer."""
    names = [*reading.layers] or [-1]  # which raises
    looks = [(f"{name}".removeprefix("fusion."), reading.of_patch(name, image=image, **point)) for name in names]
    looks = [(f"{name}{_in_view(reading, look, image)}", look) for name, of_layer in looks for look in of_layer]
    return sorted(looks, key=lambda titled: [*reading.grids[image]].index(titled[1].views[0]))


def _draw_layers(part: Figure | SubFigure, picture: np.ndarray, looks: list[tuple[str, PatchReading]]) -> None:
    for axes, (title, look) in zip(_panels(part, len(looks)).flat, looks):
        _draw_weights(axes, picture, look.key_grid, look.weights, title)
        _draw_query(axes, look)
    part.suptitle("what the patch in orange looks at, layer by layer", fontsize=9)


def _draw_words(part: Figure | SubFigure, reading: AttentionReading, maps: torch.Tensor, image: int) -> None:
    """`maps`: (words, pictures, rows, columns); of all, the scale."""
    picture, grid, highest = reading.pictures[image], reading.word_grid(image), maps.max().item()
    panels = _panels(part, 1 + len(maps))
    title = f"“{reading.answer}”" if len(reading.pictures) == 1 else f"picture {image}"
    _draw_picture(panels.flat[0], picture, grid, title)
    for axes, word, weights in zip(panels.flat[1:], reading.words, maps[:, image]):
        tint = _draw_weights(axes, picture, grid, weights, word, highest, has_scale=False)
    _draw_scale(tint, [*panels.flat])
    part.suptitle("where the model looked as it said each word", fontsize=9)


def _eyes_height(reading: AttentionReading) -> float:
    return 1.1 + 0.35 * len(reading.eyes.blinded)


def _draw_eyes(part: Figure | SubFigure, reading: AttentionReading) -> None:
    axes = part.subplots()
    shares = reading.eyes.shares
    names = [EYES[name] for name in shares]
    bars = axes.barh(names, [*shares.values()], 0.6, color=BLUE)
    axes.bar_label(bars, [f"{share:.2f}" for share in shares.values()], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.axvline(0, color=GRAY, linewidth=0.8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel("log-probability that the answer loses where they are blinded, in nats", fontsize=8)
    part.suptitle(f"what the encoders contribute to “{_shorten(reading.answer)}”", fontsize=9)


def _maps(look: PatchReading) -> dict[str, torch.Tensor]:
    """What is drawn of a patch's weights, by titles."""
    if look.uncorrected is None:
        return {"what it looks at": look.weights}
    return {"before the correction": look.uncorrected, "after the correction": look.weights}


def _in_view(reading: AttentionReading, look: PatchReading, image: int) -> str:
    """In which view a patch lies, where views show different parts of the picture."""
    return f", {look.views[0]}" if len({*reading.grids[image].values()}) > 1 else ""


def _panel_size(picture: np.ndarray) -> tuple[float, float]:
    """Width and height in inches, with a title and a scale."""
    height, width, _ = picture.shape
    longer = max(height, width)
    return max(PANEL * width / longer, PANEL / 2) + 0.6, max(PANEL * height / longer, PANEL / 4) + TITLE


def _height(picture: np.ndarray, num_panels: int, columns: int = PANELS_IN_A_ROW) -> float:
    return -(-num_panels // columns) * _panel_size(picture)[1] + 0.75 * TITLE


def _figure(picture: np.ndarray, num_panels: int, columns: int = PANELS_IN_A_ROW) -> AttentionFigure:
    size = (min(num_panels, columns) * _panel_size(picture)[0], _height(picture, num_panels, columns))
    return AttentionFigure(figsize=size, layout="constrained")


def _panel(picture: np.ndarray, grid: PatchGrid, weights: torch.Tensor, title: str, highest: float) -> Panel:
    height, width, _ = picture.shape
    longer = max(height, width)
    figure = AttentionFigure(figsize=[max(PANEL * side / longer, PANEL / 100) for side in (width, height)])
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    _draw_weights(axes, picture, grid, weights, "", highest, has_scale=False)
    return Panel(title, highest, figure)


def _panels(part: Figure | SubFigure, num_panels: int, columns: int = PANELS_IN_A_ROW) -> np.ndarray:
    """Empty axes, (rows, columns)."""
    rows = -(-num_panels // columns)
    panels = part.subplots(rows, min(num_panels, columns), squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    return panels


def _draw_picture(axes: Axes, picture: np.ndarray, grid: PatchGrid, title: str) -> None:
    """The picture; what the view of these patches does not show is covered."""
    height, width, _ = picture.shape
    axes.imshow(picture, extent=(0, width, height, 0), interpolation="antialiased")
    whole = _outline(0, 0, width, height)
    shown = _outline(max(grid.left, 0), max(grid.top, 0), min(grid.right, width), min(grid.bottom, height))
    hole = Outline.make_compound_path(Outline(whole), Outline(shown[::-1]))
    axes.add_patch(PathPatch(hole, facecolor=GRAY, alpha=0.75, edgecolor="none"))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_title(_shorten(title, 36), fontsize=8)


def _outline(left: float, top: float, right: float, bottom: float) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


def _draw_weights(
    axes: Axes,
    picture: np.ndarray,
    grid: PatchGrid,
    weights: torch.Tensor,
    title: str,
    highest: float | None = None,
    has_scale: bool = True,
) -> AxesImage:
    """A pale picture, on which each patch is tinted by its weight (rows, columns), from 0 to the highest."""
    gray = picture.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    pale = (255 - (255 - gray) * 0.5).astype(np.uint8)
    _draw_picture(axes, np.repeat(pale[..., None], 3, axis=-1), grid, title)
    tint = axes.imshow(
        weights,
        cmap=TINT,
        vmin=0,
        vmax=weights.max().item() if highest is None else highest,
        extent=(grid.left, grid.right, grid.bottom, grid.top),
        interpolation="nearest",
    )
    height, width, _ = picture.shape
    axes.set(xlim=(0, width), ylim=(height, 0))
    if has_scale:
        _draw_scale(tint, [axes])
    return tint


def _draw_scale(tint: AxesImage, panels: list[Axes]) -> None:
    """The scale of a tint, as it looks on white."""
    bar = tint.figure.colorbar(tint, ax=panels, format=lambda weight, _: f"{100 * weight:.3g}%", pad=0.02, aspect=25)
    bar.ax.tick_params(labelsize=7)
    bar.ax.locator_params(nbins=4)
    bar.solids.set_edgecolor("none")


def _draw_query(axes: Axes, look: PatchReading, is_filled: bool = False) -> Rectangle:
    """The patch that looks, in orange."""
    left, top, right, bottom = look.query_grid.rectangle(*look.patch)
    fill = {"facecolor": (1, 0.55, 0, 0.5)} if is_filled else {"fill": False}
    return axes.add_patch(Rectangle((left, top), right - left, bottom - top, edgecolor=ORANGE, linewidth=1.8, **fill))


def _shorten(text: str, length: int = 50) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _checked(output: str | os.PathLike, endings: tuple[str, ...]) -> Path:
    """The path of a file that can be written; ValueError otherwise."""
    output = Path(output)
    if output.suffix.lower() not in endings:
        raise ValueError(f"The output {str(output)!r} must end in {' or '.join(endings)}.")
    if not output.parent.is_dir():
        raise ValueError(f"The output {str(output)!r} cannot be written: there is no folder {str(output.parent)!r}.")
    return output


@contextmanager
def _written(output: Path) -> Iterator[Path]:
    """A file beside the output that takes its place once it is whole."""
    partial = output.with_name(f".{output.stem}.partial{output.suffix}")
    try:
        yield partial
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


__all__ = [
    "AttentionReading",
    "Panel",
    "draw_eyes",
    "draw_layers",
    "draw_patch",
    "draw_words",
    "look",
    "patch_panels",
    "read_attention",
    "sweep",
    "word_panels",
]
