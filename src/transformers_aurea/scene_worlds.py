# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The two worlds that scenes are drawn in, from textures of 112×112 to what a stranger might draw.

    textured_scene, open_scene: seed, dice, most objects, other colors → objects from back to front, picture

textured: muted textures, one shade of each color, soft outlines, sizes in narrow bands, objects that overlap a little.
open: pictures of 80 to 640 pixels a side; plain, graded, textured and photographic grounds of any color, jagged and
    soft outlines, edges of another shade around a fill, several shades of each color and the pure ones among them,
    upright and turned shapes of several proportions that do not overlap; and, now and then, an empty picture.

In the open world an object is small, medium or large by the share of the picture that it covers, and is called by the
color of its fill, which is never close to one of the ground's. A ring's hole shows the ground; a circle with an edge
is filled.
"""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image

from .scene_drawing import (
    IMAGE_SIZE,
    TEXTURES,
    Patch,
    SceneObject,
    add_noise,
    between,
    blobs,
    grid,
    object_patch,
    paint_object,
    pick,
    slope,
    to_picture,
)
from .scene_language import COLORS, ORDER_GAP, SHAPES, SIZES


MAX_OBJECTS = 5
MIN_VISIBLE_SHARE = 0.8
# Between a fill and every shade of the ground, as the length of the difference of their RGB values.
MIN_CONTRAST = 75

_RADII = {"small": (6.5, 7.5), "medium": (10.5, 12.5), "large": (16.0, 19.0)}
_RGB = {
    "red": (215, 30, 35),
    "green": (30, 150, 55),
    "blue": (35, 75, 220),
    "yellow": (245, 225, 40),
    "orange": (250, 130, 20),
    "purple": (125, 40, 170),
    "pink": (255, 145, 200),
    "brown": (105, 60, 25),
    "white": (248, 248, 248),
    "black": (14, 14, 14),
}


class Scene(NamedTuple):
    objects: list[SceneObject]
    picture: Image.Image


def draw_words(dice: Random, count: int, colors: Sequence[str] = COLORS) -> list[tuple[str, str, str]]:
    """Words of `count` objects, from a few colors and shapes, so that there is something to count."""
    while True:
        some_colors = [pick(dice, colors) for _ in range(1 + int(dice.random() * MAX_OBJECTS))]
        some_shapes = [pick(dice, SHAPES) for _ in range(1 + int(dice.random() * MAX_OBJECTS))]
        words = [(pick(dice, SIZES), pick(dice, some_colors), pick(dice, some_shapes)) for _ in range(count)]
        if len(set(words)) == count:
            return words


# The textured world


def textured_scene(seed: int, dice: Random, max_objects: int, other_rgb: Mapping[str, tuple[int, int, int]]) -> Scene:
    words = draw_words(dice, 1 + int(dice.random() * max_objects))
    radii = [between(dice, *_RADII[size]) for size, _, _ in words]
    tint = [between(dice, 0.93, 1.07) for _ in range(3)]
    rgb = _RGB | dict(other_rgb)
    looks = [
        (between(dice, -0.13, 0.13), tuple((c + between(dice, -12, 12)) * t for c, t in zip(rgb[color], tint)))
        for _, color, _ in words
    ]
    while True:
        centers = _place(dice, radii)
        objects = [
            SceneObject(*word, *center, radius, *look)
            for word, center, radius, look in zip(words, centers, radii, looks)
        ]
        patches = [object_patch(scene_object) for scene_object in objects]
        if _smallest_visible_share(patches) >= MIN_VISIBLE_SHARE:
            return Scene(objects, _paint_on_texture(seed, dice, objects, patches))


def _place(dice: Random, radii: list[float]) -> list[tuple[float, float]]:
    """Centers inside the picture, far enough apart."""
    centers = []
    for _ in range(400):
        radius = radii[len(centers)]
        reach = 1.2 * radius  # of the tips of a turned triangle or star
        x, y = (between(dice, reach, IMAGE_SIZE - reach) for _ in range(2))
        if all(
            abs(x - other_x) >= ORDER_GAP
            and (x - other_x) ** 2 + (y - other_y) ** 2 >= (0.85 * (radius + other_radius)) ** 2
            for (other_x, other_y), other_radius in zip(centers, radii)
        ):
            centers.append((x, y))
            if len(centers) == len(radii):
                return centers
    return _place(dice, radii)  # an unlucky beginning left no room


def _smallest_visible_share(patches: list[Patch]) -> float:
    top = np.full((IMAGE_SIZE, IMAGE_SIZE), len(patches), dtype=np.uint8)
    for index, patch in enumerate(patches):
        top[patch.rows, patch.columns][patch.cover > 0.5] = index
    seen = np.bincount(top.ravel(), minlength=len(patches))
    return min(seen[index] / np.count_nonzero(patch.cover > 0.5) for index, patch in enumerate(patches))


def _paint_on_texture(seed: int, dice: Random, objects: list[SceneObject], patches: list[Patch]) -> Image.Image:
    bits = np.random.PCG64(seed)
    gray = between(dice, 95, 165)
    dark, light = (
        [gray + offset + between(dice, -13, 13) for _ in range(3)]
        for offset in (-between(dice, 4, 14), between(dice, 4, 14))
    )
    dark, light = (np.array(rgb)[:, None, None] for rgb in (dark, light))
    canvas = dark + pick(dice, TEXTURES)(dice, bits, *_GRID) * (light - dark)  # (3, H, W)
    for scene_object, patch in zip(objects, patches):
        paint_object(canvas, scene_object, patch)
    add_noise(canvas, bits, between(dice, 2, 10))
    return to_picture(canvas)


_GRID = grid((IMAGE_SIZE, IMAGE_SIZE))


# The open world

_OPEN_RADII = {"small": (5.5, 8.0), "medium": (9.5, 13.0), "large": (15.5, 22.0)}
_LARGEST = 31.0  # where there are one or two
_EMPTY_SHARE = 0.05
# The color words that Pillow and web pages know, and shades of them that nobody would call by another of the words.
_SHADES = {
    "red": ((215, 30, 35), (255, 0, 0), (220, 20, 60), (230, 57, 53)),
    "green": ((30, 150, 55), (0, 128, 0), (0, 255, 0), (0, 200, 0), (50, 205, 50), (34, 139, 34), (76, 175, 80)),
    "blue": ((35, 75, 220), (0, 0, 255), (65, 105, 225), (0, 0, 205), (30, 144, 255), (33, 118, 220)),
    "yellow": ((245, 225, 40), (255, 255, 0), (255, 235, 59), (250, 240, 70)),
    "orange": ((250, 130, 20), (255, 165, 0), (255, 140, 0), (255, 152, 0)),
    "purple": ((125, 40, 170), (128, 0, 128), (160, 32, 240), (148, 0, 211), (138, 43, 226)),
    "pink": ((255, 145, 200), (255, 192, 203), (255, 105, 180), (255, 182, 193)),
    "brown": ((105, 60, 25), (165, 42, 42), (139, 69, 19), (121, 85, 72)),
    "white": ((248, 248, 248), (255, 255, 255), (240, 240, 240)),
    "black": ((14, 14, 14), (0, 0, 0), (32, 32, 32)),
}
# How far the edge may reach into a shape, in radii: half of what is thinnest of it.
_DEPTHS = {"circle": 1.0, "square": 0.88, "triangle": 0.5, "star": 0.38, "cross": 0.3, "ring": 0.22}


def open_scene(seed: int, dice: Random, max_objects: int, other_rgb: Mapping[str, tuple[int, int, int]]) -> Scene:
    bits = np.random.PCG64(seed)
    size = _draw_size(dice)
    count = 0 if dice.random() < _EMPTY_SHARE else 1 + int(dice.random() * max_objects)
    is_photo = dice.random() < 0.2
    all_shades = _SHADES | {color: (rgb,) for color, rgb in other_rgb.items()}
    shades = {}
    while len(shades) < 4:
        canvas = _photo(dice, bits, size) if is_photo else pick(dice, _GROUNDS)(dice, bits, size)
        shades = _contrasting(all_shades, canvas)
    objects = None
    while objects is None:
        objects = _lay_out(dice, count, size, shades)
    objects = _finish(dice, objects, size, is_photo)
    for scene_object in objects:
        if is_photo:
            _drop_shadow(canvas, scene_object, size)
        paint_object(canvas, scene_object, object_patch(scene_object, size, np.float32))
    if is_photo:
        canvas *= _light(dice, bits, size)
    if is_photo or dice.random() < 0.2:
        add_noise(canvas, bits, between(dice, 1, 10))
    else:
        canvas += 0.5
    return Scene(objects, to_picture(canvas))


def _draw_size(dice: Random) -> tuple[int, int]:
    """Width and height: 80 to 640 pixels, up to twice as wide as high, or as high as wide."""
    if dice.random() < 0.2:
        return IMAGE_SIZE, IMAGE_SIZE
    side = 113.2 / between(dice, 0.25, 1)  # the root of its area; the larger, the rarer
    stretch = between(dice, 1, 1.4142) if dice.random() < 0.65 else 1
    longer, shorter = int(side * stretch), int(side / stretch)
    return (longer, shorter) if dice.random() < 0.5 else (shorter, longer)


def _contrasting(all_shades: Mapping[str, tuple], canvas: np.ndarray) -> dict[str, list[tuple[int, int, int]]]:
    """The shades of each color that are far from all colors of the ground; colors without one are left out."""
    _, height, width = canvas.shape
    ground = canvas[:, :: max(1, height // 12), :: max(1, width // 12)].reshape(3, -1)
    found = {}
    for color, shades in all_shades.items():
        differences = [ground - np.array(rgb, np.float32)[:, None] for rgb in shades]
        far = [(d * d).sum(axis=0).min() >= MIN_CONTRAST**2 for d in differences]
        if any(far):
            found[color] = [rgb for rgb, is_far in zip(shades, far) if is_far]
    return found


# Where things are


def _lay_out(
    dice: Random, count: int, size: tuple[int, int], shades: Mapping[str, list[tuple[int, int, int]]]
) -> list[SceneObject] | None:
    """Objects beside each other, anywhere or in a row or column; None if there was no room."""
    words = draw_words(dice, count, tuple(shades))
    radii = [between(dice, *_OPEN_RADII[size_word]) for size_word, _, _ in words]
    if count <= 2 and dice.random() < 0.4:
        radii = [
            between(dice, 15.5, _LARGEST) if size_word == "large" else radius
            for (size_word, _, _), radius in zip(words, radii)
        ]
    # On a sheet as large as that of 112×112, but of the picture's shape, distances are those that one sees.
    stretch = sqrt(size[0] / size[1])
    sheet = IMAGE_SIZE * stretch, IMAGE_SIZE / stretch
    arrangement = pick(dice, ("anywhere", "anywhere", "ordered", "ordered", "ordered", "row", "column"))
    line = {"row": (None, between(dice, 0.25, 0.75)), "column": (between(dice, 0.25, 0.75), None)}
    centers = []
    for radius in radii:
        for _ in range(40):
            place = [
                between(dice, 1.25 * radius, length - 1.25 * radius) if fixed is None else fixed * length
                for length, fixed in zip(sheet, line.get(arrangement, (None, None)))
            ]
            is_inside = all(1.2 * radius <= center <= length - 1.2 * radius for center, length in zip(place, sheet))
            gap = stretch * ORDER_GAP if arrangement == "ordered" else 0
            if is_inside and all(
                (place[0] - x) ** 2 + (place[1] - y) ** 2 >= (1.2 * (radius + other)) ** 2 and abs(place[0] - x) >= gap
                for (x, y), other in zip(centers, radii)
            ):
                centers.append(place)
                break
        else:
            return None
    return [
        SceneObject(*word, x / stretch, y * stretch, radius, 0.0, tuple(map(float, pick(dice, shades[word[1]]))))
        for word, (x, y), radius in zip(words, centers, radii)
    ]


def _finish(dice: Random, objects: list[SceneObject], size: tuple[int, int], is_photo: bool) -> list[SceneObject]:
    """How a picture's objects are drawn: with jagged or soft outlines and with or without edges, as all of it is."""
    pixel = sqrt(size[0] * size[1]) / IMAGE_SIZE  # of 112, in pixels of the picture
    chance = dice.random()
    fade = between(dice, 1, 2.5) * max(1, pixel) if is_photo else 0.0 if chance < 0.4 else 1.0
    width = 0.0 if dice.random() < 0.6 else pick(dice, (between(dice, 0.06, 0.15), between(dice, 0.15, 0.4)))
    edge_rgb = pick(dice, ((0, 0, 0), (0, 0, 0), (255, 255, 255), (90, 90, 90), None, None))
    is_upright, is_usual, is_exact = dice.random() < 0.55, dice.random() < 0.4, dice.random() < 0.45
    finished = []
    for scene_object in objects:
        rgb = scene_object.rgb
        if not is_exact:
            rgb = tuple(min(max(level + between(dice, -12, 12), 0.0), 255.0) for level in rgb)
        own_edge = tuple(0.45 * level for level in rgb) if edge_rgb is None else edge_rgb
        is_seen = sum((a - b) ** 2 for a, b in zip(rgb, own_edge)) >= 80**2
        own_width = min(width, 0.15) if scene_object.size == "small" else width
        edge = own_width * _DEPTHS[scene_object.shape] if is_seen else 0.0
        finished.append(
            scene_object._replace(
                rgb=rgb,
                turn=0.0 if is_upright else _draw_turn(dice, scene_object.shape),
                proportion=0.0 if is_usual else between(dice, -1, 1),
                edge=edge if edge * scene_object.radius * pixel >= 0.8 else 0.0,
                edge_rgb=own_edge,
                fade=fade,
            )
        )
    return finished


def _draw_turn(dice: Random, shape: str) -> float:
    """tan(rotation / 2): a little, or, of a triangle, upside down, and, of a cross, to an ×."""
    chance = dice.random()
    if shape == "triangle" and chance < 0.2:
        return 1e6
    if shape == "cross" and chance < 0.3:
        return 0.4142136
    return between(dice, -0.2, 0.2)


# Grounds: (3, height, width)


def _draw_ground_rgb(dice: Random) -> tuple[float, float, float]:
    """White, black, gray, pastel, dark, one of the world's own colors, or any."""
    chance = dice.random()
    if chance < 0.35:
        levels = [255.0] if chance < 0.14 else [between(dice, *pick(dice, ((235, 255), (0, 20), (0, 0), (40, 225))))]
        return tuple(3 * levels)
    if chance < 0.7:
        low, high = pick(dice, ((185, 255), (0, 85), (0, 255)))
        return tuple(between(dice, low, high) for _ in range(3))
    return tuple(map(float, pick(dice, pick(dice, tuple(_SHADES.values())))))


def _plain(dice: Random, bits: np.random.PCG64, size: tuple[int, int]) -> np.ndarray:
    canvas = np.empty((3, *size[::-1]), np.float32)
    canvas[:] = np.array(_draw_ground_rgb(dice), np.float32)[:, None, None]
    return canvas


def _blend(start: Sequence[float], end: Sequence[float], share: np.ndarray) -> np.ndarray:
    start, end = (np.array(rgb, np.float32)[:, None, None] for rgb in (start, end))
    return start + share * (end - start)


def _graded(dice: Random, bits: np.random.PCG64, size: tuple[int, int]) -> np.ndarray:
    """From one color to another, from side to side or from a point outwards."""
    start, end = _draw_ground_rgb(dice), _draw_ground_rgb(dice)
    lines = grid(size, np.float32)
    return _blend(start, end, slope(dice, bits, *lines) if dice.random() < 0.6 else _outwards(dice, *lines))


def _outwards(dice: Random, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Distance from a point near the middle, 0 to 1."""
    across, down = across - between(dice, 0.3, 0.7), down - between(dice, 0.3, 0.7)
    distance = np.sqrt(across * across + (down * down)[:, None])
    return distance / distance.max()


def _around(dice: Random, rgb: Sequence[float], reach: float) -> tuple[float, ...]:
    return tuple(min(max(level + between(dice, -reach, reach), 0.0), 255.0) for level in rgb)


def _textured(dice: Random, bits: np.random.PCG64, size: tuple[int, int]) -> np.ndarray:
    rgb = _draw_ground_rgb(dice)
    start, end = (_around(dice, rgb, 25) for _ in range(2))
    return _blend(start, end, pick(dice, TEXTURES)(dice, bits, *grid(size, np.float32)))


def _photo(dice: Random, bits: np.random.PCG64, size: tuple[int, int]) -> np.ndarray:
    """Something out of focus: two smooth unevennesses upon each other."""
    rgb, lines = _draw_ground_rgb(dice), grid(size, np.float32)
    canvas = _blend(_around(dice, rgb, 35), _around(dice, rgb, 35), blobs(dice, bits, *lines))
    tint = np.array([between(dice, -25, 25) for _ in range(3)], np.float32)[:, None, None]
    canvas += tint * blobs(dice, bits, *lines)
    return np.clip(canvas, 0, 255, out=canvas)


_GROUNDS = (_plain, _plain, _plain, _graded, _textured)


def _drop_shadow(canvas: np.ndarray, scene_object: SceneObject, size: tuple[int, int]) -> None:
    shift = 0.16 * scene_object.radius
    blur = 0.3 * scene_object.radius * sqrt(size[0] * size[1]) / IMAGE_SIZE
    shadow = scene_object._replace(x=scene_object.x + shift, y=scene_object.y + shift, fade=blur)
    patch = object_patch(shadow, size, np.float32)
    canvas[:, patch.rows, patch.columns] *= 1 - 0.35 * patch.cover


def _light(dice: Random, bits: np.random.PCG64, size: tuple[int, int]) -> np.ndarray:
    """What light falls on each place, (height, width): less to one side or to the corners."""
    lines = grid(size, np.float32)
    dark = slope(dice, bits, *lines) if dice.random() < 0.5 else _outwards(dice, *lines)
    return 1 - between(dice, 0.05, 0.25) * (dark * dark)


WORLDS: dict[str, Callable[[int, Random, int, Mapping[str, tuple[int, int, int]]], Scene]] = {
    "textured": textured_scene,
    "open": open_scene,
}
