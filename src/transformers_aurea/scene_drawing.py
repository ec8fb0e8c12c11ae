# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""How the scene world draws: objects by their distance from an outline, and textures.

Objects are placed on a sheet of 112×112, to which a model's processor squeezes every picture. One that is drawn on a
picture of another size keeps its proportions there, and its share of the area: squeezed, a circle on a wide picture
is an ellipse as large as before.

All is elementwise arithmetic and square roots, which IEEE 754 rounds alike everywhere; no drawing of Pillow's.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from random import Random
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image


IMAGE_SIZE = 112

_Option = TypeVar("_Option")


def pick(dice: Random, options: Sequence[_Option]) -> _Option:
    return options[int(dice.random() * len(options))]


def between(dice: Random, low: float, high: float) -> float:
    return low + dice.random() * (high - low)


class SceneObject(NamedTuple):
    """One object: its three words, its center and radius in pixels of 112, tan(rotation / 2), its color as drawn, and
    what of it differs from the textured world: its proportions (0 are the usual ones), the width of its edge in radii
    and the edge's color, and over how many pixels the outline fades (0: it is jagged)."""

    size: str
    color: str
    shape: str
    x: float
    y: float
    radius: float
    turn: float
    rgb: tuple[float, float, float]
    proportion: float = 0.0
    edge: float = 0.0
    edge_rgb: tuple[float, float, float] = (0.0, 0.0, 0.0)
    fade: float = 1.0


# Signed distances to the outline of a shape of radius 1, negative inside; y points down.


def _star(x: np.ndarray, y: np.ndarray, proportion: float) -> np.ndarray:
    if proportion:
        return _blunt_star(x, y, 0.382 + 0.12 * proportion)
    # A pentagram: the points inside at least four of its five lines.
    largest = second = np.full(x.shape, -np.inf, x.dtype)
    for normal_x, normal_y in _STAR_NORMALS:
        distance = normal_x * x + normal_y * y
        second = np.maximum(second, np.minimum(largest, distance))
        largest = np.maximum(largest, distance)
    return second - 0.355


_STAR_NORMALS = (
    (0.0, -1.0),
    (0.9510565, -0.309017),
    (-0.9510565, -0.309017),
    (0.5877853, 0.809017),
    (-0.5877853, 0.809017),
)


def _blunt_star(x: np.ndarray, y: np.ndarray, inner: float) -> np.ndarray:
    """Five tips at 1 and five corners at `inner`: mirrored into one half of the upper tip, the outline is a line."""
    x = np.abs(x)
    for _ in range(2):  # at the line through the corner beside the tip, 36° from it
        behind = 2 * np.maximum(0.809017 * x + 0.5877853 * y, 0)
        x, y = np.abs(x - behind * 0.809017), y - behind * 0.5877853
    across, down = inner * 0.5877853, 1 - inner * 0.809017  # from the tip to the corner
    length = sqrt(across * across + down * down)
    return (down * x + across * (-y - 1)) / length


def _triangle(x: np.ndarray, y: np.ndarray, proportion: float) -> np.ndarray:
    if proportion:
        x = x / (1 + 0.2 * proportion)
    return np.maximum(y, 0.8660254 * np.abs(x) - 0.5 * y) - 0.575


def _cross(x: np.ndarray, y: np.ndarray, proportion: float) -> np.ndarray:
    arm = 0.34 + 0.1 * proportion
    x, y = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(x - 1, y - arm), np.maximum(x - arm, y - 1))


def _ring(x: np.ndarray, y: np.ndarray, proportion: float) -> np.ndarray:
    half = 0.25 + 0.1 * proportion
    return np.abs(np.sqrt(x * x + y * y) - (1 - half)) - half


# Each takes how far its proportions are from the usual ones, from -1 to 1.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "circle": lambda x, y, proportion: np.sqrt(x * x + y * y) - 1,
    "square": lambda x, y, proportion: np.maximum(np.abs(x), np.abs(y)) - 0.88,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
}


class Patch(NamedTuple):
    """The part of a picture around an object: where it is, how much of each pixel the object covers, and how much of
    it the object without its edge does."""

    rows: slice
    columns: slice
    cover: np.ndarray
    fill: np.ndarray


def object_patch(
    scene_object: SceneObject, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE), dtype: type = np.float64
) -> Patch:
    """What an object covers of a picture of this size, (width, height)."""
    width, height = size
    x, y = scene_object.x * (width / IMAGE_SIZE), scene_object.y * (height / IMAGE_SIZE)
    radius = scene_object.radius * (sqrt(width * height) / IMAGE_SIZE)
    turn, fade = scene_object.turn, scene_object.fade
    reach = 1.3 * radius + fade if scene_object.proportion else 1.2 * radius + fade
    columns, rows = (
        slice(max(0, int(center - reach)), min(length, int(center + reach) + 1))
        for center, length in ((x, width), (y, height))
    )
    cosine, sine = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
    across = ((np.arange(columns.start, columns.stop) + 0.5 - x) / radius).astype(dtype)
    down = ((np.arange(rows.start, rows.stop) + 0.5 - y) / radius).astype(dtype)[:, None]
    outline = _OUTLINES[scene_object.shape]
    distance = outline(cosine * across + sine * down, cosine * down - sine * across, scene_object.proportion)

    def cover(distance: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - radius * distance / fade, 0, 1) if fade else (distance < 0).astype(dtype)

    whole = cover(distance)
    return Patch(rows, columns, whole, cover(distance + scene_object.edge) if scene_object.edge else whole)


def object_mask(scene_object: SceneObject, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> np.ndarray:
    """How much of each pixel of a picture of this size, (width, height), the object with its edge covers, were it
    alone: (height, width), from 0 to 1."""
    mask = np.zeros(size[::-1])
    patch = object_patch(scene_object, size)
    mask[patch.rows, patch.columns] = patch.cover
    return mask


def paint_object(canvas: np.ndarray, scene_object: SceneObject, patch: Patch) -> None:
    """Lays an object on a picture (3, height, width)."""
    region = canvas[:, patch.rows, patch.columns]
    rgb, edge_rgb = (
        np.array(color, canvas.dtype)[:, None, None] for color in (scene_object.rgb, scene_object.edge_rgb)
    )
    if scene_object.edge:
        region += patch.cover * (edge_rgb - region)
    region += patch.fill * (rgb - region)


def add_noise(canvas: np.ndarray, bits: np.random.PCG64, strength: float) -> None:
    """Up to `strength` levels more or less in each number."""
    noise = bits.random_raw(-(-canvas.size // 8)).astype("<u8").view(np.uint8)[: canvas.size].reshape(canvas.shape)
    canvas += noise * (2 * strength / 255)
    canvas += 0.5 - strength  # the half rounds


def to_picture(canvas: np.ndarray) -> Image.Image:
    """(3, height, width), to be rounded off → RGB."""
    np.clip(canvas, 0, 255, out=canvas)
    return Image.fromarray(np.dstack(list(canvas.astype(np.uint8))))


# Textures: (height, width), from 0 (the darker color) to 1 (the lighter one), of a picture whose columns and rows lie
# at `across` and `down`, from 0 to 1.


def slope(dice: Random, bits: np.random.PCG64, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Rises in a random direction."""
    to_right, to_bottom = between(dice, -1, 1), between(dice, -1, 1)
    rise = to_right * across + (to_bottom * down)[:, None]
    return (rise - rise.min()) / (rise.max() - rise.min())


def _stripes(dice: Random, bits: np.random.PCG64, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    return np.floor(slope(dice, bits, across, down) * between(dice, 6, 20) + dice.random()) % 2


def _checker(dice: Random, bits: np.random.PCG64, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    cells = between(dice, 5, 14)
    columns, rows = (np.floor(line * cells + dice.random()) for line in (across, down))
    return (columns + rows[:, None]) % 2


def blobs(dice: Random, bits: np.random.PCG64, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Random values at the corners of a coarse grid, and a smooth surface through them."""
    cells = 3 + int(dice.random() * 6)
    heights = (bits.random_raw((cells + 1) ** 2) >> 11).reshape(cells + 1, cells + 1) * 2.0**-53
    heights = heights.astype(across.dtype)

    def corner_and_step(line: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        corner = (line * cells).astype(int)
        step = line * cells - corner.astype(line.dtype)
        return corner, step * step * (3 - 2 * step)

    (column, to_right), (row, to_bottom) = corner_and_step(across), corner_and_step(down)
    rows = heights[row] + to_bottom[:, None] * (heights[row + 1] - heights[row])
    return rows[:, column] + to_right * (rows[:, column + 1] - rows[:, column])


TEXTURES = (slope, _stripes, _checker, blobs)


def grid(size: tuple[int, int], dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """Where the columns and the rows of a picture of this size, (width, height), lie, from 0 to 1."""
    width, height = (np.arange(length) / length for length in size)
    return width.astype(dtype), height.astype(dtype)
