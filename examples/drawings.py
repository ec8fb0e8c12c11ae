# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What somebody else draws and asks: flat shapes on a plain sheet by PIL's own primitives and color names.

    draw(dice, "white", (300, 300)) -> (picture, [Drawn, ...], color of the sheet)
    ask(dice, objects) -> {kind: (question, answer), ...}
    foreign_picture(dice, "noise", (300, 300)) -> picture

This world shares no line with `transformers_aurea.scenes`: it is there to test on what that world did not teach. One
to four circles, squares, triangles, stars, crosses and rings lie clearly apart and clearly inside, in colors that a
person tells from the sheet's; some are tilted a little, have a thin dark outline or smooth edges. Nothing is asked
whose answer could be argued about: an object left of another ends well before that one begins, and the larger is
1.6 times as wide. Answers are drawn before questions. A `random.Random` fixes everything.
"""

import math
from collections import Counter
from itertools import permutations
from random import Random
from typing import NamedTuple

from PIL import Image, ImageColor, ImageDraw, ImageFilter


COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NUMBERS = ("zero", "one", "two", "three", "four")
PLURALS = {"cross": "crosses"}  # the others get an "s"
SIZES = ((112, 112), (300, 300), (400, 260))
GROUNDS = {
    "white": ("white",),
    "black": ("black",),
    "grey": ("gray", "darkgray", "lightgray", "dimgray"),
    "pastel": ("lavender", "mistyrose", "honeydew", "lightcyan", "lightyellow", "thistle", "powderblue", "peachpuff"),
    "dark": ("midnightblue", "darkslategray", "indigo", "#3a1f1f", "#1f3a24", "#2b2b3d"),
}
FOREIGN = ("noise", "gradient", "text", "chequerboard", "blobs")

MIN_DIFFERENCE = 25.0  # of an object's color from the sheet's, in CIELAB
CLEAR = 1.2  # how far an object is left of another or above it, in extents of the two
LARGER = 1.6  # how many times as wide as another the larger is
QUESTIONS = {
    "color": ("What color is the {}?", "What is the color of the {}?"),
    "shape": ("What shape is the {}?", "What is the shape of the {}?"),
    "count": ("How many {} are there?", "How many {} do you see?"),
    "existence": ("Is there {}?", "Do you see {}?"),
    "left": ("Is the {} left of the {}?", "Is the {} to the left of the {}?"),
    "right": ("Is the {} right of the {}?", "Is the {} to the right of the {}?"),
    "above": ("Is the {} above the {}?",),
    "below": ("Is the {} below the {}?",),
    "larger": ("Is the {} larger than the {}?",),
    "smaller": ("Is the {} smaller than the {}?",),
    "describe": ("Describe the image.", "Describe the picture.", "What is in the image?"),
}
NOUNS = ("{0} object", "{1}", "{0} {1}")  # of a color and a shape
KINDS = ("color", "shape", "count", "existence", "left_right", "above_below", "size", "describe")


class Drawn(NamedTuple):
    """An object: in its words, and by the middle and half the side of the square that it fills, in pixels."""

    color: str
    shape: str
    x: float
    y: float
    radius: float
    fill: tuple[int, int, int]


# Drawing


def lab(color: tuple[int, int, int]) -> tuple[float, float, float]:
    """A color of sRGB in CIELAB (D65), where distances are about those that a person sees."""
    r, g, b = (c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color)
    x = (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.9505
    y = 0.2126 * r + 0.7152 * g + 0.0722 * b
    z = (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.089
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z))
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def stands_out(color: tuple[int, int, int], ground: tuple[int, int, int]) -> bool:
    """Whether a person tells an object from the sheet; of two that are almost black nobody does, whatever the hue."""
    one, other = lab(color), lab(ground)
    return math.dist(one, other) >= MIN_DIFFERENCE and max(one[0], other[0]) >= 25


def outline_points(shape: str, x: float, y: float, radius: float, tilt: float) -> list[tuple[float, float]]:
    """The corners of a square, triangle, star or cross, turned by `tilt` radians and as much smaller as that takes."""
    if shape == "square":
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    elif shape == "triangle":
        corners = [(0, -1), (1, 1), (-1, 1)]
    elif shape == "star":
        turns = [(math.pi * i / 5, 0.42 if i % 2 else 1) for i in range(10)]
        corners = [(length * math.sin(turn), -length * math.cos(turn)) for turn, length in turns]
    else:
        arm = 0.36
        quarter = [(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm)]
        corners = quarter + [(-a, -b) for a, b in quarter]
    cos, sin = math.cos(tilt), math.sin(tilt)
    radius /= cos + abs(sin)
    return [(x + radius * (a * cos - b * sin), y + radius * (a * sin + b * cos)) for a, b in corners]


def paint(canvas: ImageDraw.ImageDraw, drawn: Drawn, scale: int, tilt: float, line: int) -> None:
    """Draws an object, `scale` times as large, with a dark outline of `line` pixels (0: none)."""
    x, y, radius, line = drawn.x * scale, drawn.y * scale, drawn.radius * scale, line * scale
    dark = (25, 25, 25)
    if drawn.shape == "circle":
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=drawn.fill, outline=dark, width=line)
    elif drawn.shape == "ring":
        band = round(0.4 * radius)
        if line:
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), outline=dark, width=band)
        inner = radius - line
        canvas.ellipse((x - inner, y - inner, x + inner, y + inner), outline=drawn.fill, width=band - 2 * line)
    else:
        points = outline_points(drawn.shape, x, y, radius, tilt)
        canvas.polygon(points, fill=drawn.fill)
        if line:
            canvas.line([*points, points[0], points[1]], fill=dark, width=line, joint="curve")


def words(dice: Random, count: int, colors: list[str]) -> list[tuple[str, str]]:
    """Colors and shapes of `count` objects, often of a few only; three times in four no two objects are alike."""
    distinct = dice.random() < 0.75
    while True:
        some_colors = dice.sample(colors, dice.randint(1, min(count, len(colors))))
        some_shapes = dice.sample(SHAPES, dice.randint(1, count))
        found = [(dice.choice(some_colors), dice.choice(some_shapes)) for _ in range(count)]
        if len(set(found)) == count or not distinct:
            return found


def places(dice: Random, count: int, size: tuple[int, int]) -> list[tuple[float, float, float]]:
    """Middles and half sides of squares that lie inside and apart, all with a margin."""
    width, height = size
    short = min(size)
    gap = 0.06 * short
    while True:
        found = []
        for _ in range(count):
            radius = short * (0.08 + 0.14 * dice.random())
            edge = radius + gap / 2
            x, y = (edge + dice.random() * (side - 2 * edge) for side in (width, height))
            if any(max(abs(x - a), abs(y - b)) < radius + other + gap for a, b, other in found):
                break
            found.append((x, y, radius))
        else:
            return found


def draw(dice: Random, ground: str, size: tuple[int, int]) -> tuple[Image.Image, list[Drawn], tuple[int, int, int]]:
    """A picture of `size` on a sheet of one of `GROUNDS`, what is drawn there, and the sheet's color."""
    sheet = ImageColor.getrgb(dice.choice(GROUNDS[ground]))
    jitter = dice.choice((0, 0, 12))
    line = dice.choice((0, 0, 1))
    tilted = dice.random() < 0.2
    scale = dice.choice((1, 4))
    colors = [color for color in COLORS if stands_out(ImageColor.getrgb(color), sheet)]

    picture = Image.new("RGB", (size[0] * scale, size[1] * scale), sheet)
    canvas = ImageDraw.Draw(picture)
    count = dice.choice((1, 2, 3, 3, 4, 4))
    objects = []
    for (color, shape), (x, y, radius) in zip(words(dice, count, colors), places(dice, count, size)):
        fill = tuple(min(255, max(0, c + dice.randint(-jitter, jitter))) for c in ImageColor.getrgb(color))
        fill = fill if stands_out(fill, sheet) else ImageColor.getrgb(color)
        objects.append(Drawn(color, shape, x, y, radius, fill))
        tilt = math.radians(dice.uniform(-12, 12)) if tilted else 0.0
        paint(canvas, objects[-1], scale, tilt, line * max(1, round(min(size) / 150)))
    return (picture if scale == 1 else picture.reduce(scale)), objects, sheet


def foreign_picture(dice: Random, what: str, size: tuple[int, int]) -> Image.Image:
    """A picture that holds no drawing: one of `FOREIGN`."""
    width, height = size
    some = [tuple(dice.randbytes(3)) for _ in range(4)]
    if what == "noise":
        return Image.frombytes("RGB", size, dice.randbytes(3 * width * height))
    if what == "gradient":
        mask = Image.linear_gradient("L").rotate(dice.choice((0, 90))).resize(size)
        return Image.composite(Image.new("RGB", size, some[0]), Image.new("RGB", size, some[1]), mask)
    picture = Image.new("RGB", size, some[0])
    canvas = ImageDraw.Draw(picture)
    if what == "text":
        canvas.rectangle((0, 0, *size), fill=dice.choice(("white", "ivory", "black")))
        for y in range(6, height - 12, 14):
            letters = "".join(dice.choice("abcdefghijklmnopqrstuvwxyz     ") for _ in range(width // 6))
            canvas.text((6, y), letters.strip(), fill="gray")
    elif what == "chequerboard":
        side = max(size) // dice.choice((4, 8, 12))
        for x in range(0, width, side):
            for y in range(side * (x // side % 2), height, 2 * side):
                canvas.rectangle((x, y, x + side - 1, y + side - 1), fill=some[1])
    else:  # like a photograph out of focus
        for _ in range(60):
            x, y, radius = dice.uniform(0, width), dice.uniform(0, height), dice.uniform(0.03, 0.3) * min(size)
            fill = tuple((c + 2 * light) // 3 for c, light in zip(dice.choice(some), dice.randbytes(3)))
            canvas.ellipse((x - radius, y - radius, x + radius, y + 0.7 * radius), fill=fill)
        picture = picture.filter(ImageFilter.GaussianBlur(min(size) / 40))
    return picture


# Asking


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    return PLURALS.get(noun, f"{noun}s")


def names(drawn: Drawn, objects: list[Drawn], *, without: str = "") -> list[str]:
    """What can be said to mean this object and no other, without its color or its shape: "red circle", "circle", "red
    object", or "object" if it is the only one."""
    nouns = {
        f"{drawn.color} {drawn.shape}": ("color", "shape"),
        drawn.shape: ("shape",),
        f"{drawn.color} object": ("color",),
        "object": (),
    }
    return [
        noun
        for noun, said in nouns.items()
        if without not in said and sum(all(getattr(o, a) == getattr(drawn, a) for a in said) for o in objects) == 1
    ]


def ask(dice: Random, objects: list[Drawn]) -> dict[str, tuple[str, str]]:
    """A question and its answer for each of `KINDS` of which these objects leave no doubt."""
    found = {"count": ask_count(dice, objects), "existence": ask_existence(dice, objects)}
    for kind in ("color", "shape"):
        answers = {}
        for drawn in objects:
            answers.setdefault(getattr(drawn, kind), []).extend(names(drawn, objects, without=kind))
        answers = {answer: nouns for answer, nouns in answers.items() if nouns}
        if answers:
            answer = dice.choice(list(answers))
            found[kind] = dice.choice(QUESTIONS[kind]).format(dice.choice(answers[answer])), answer
    pairs = [(a, b) for a, b in permutations(objects, 2) if names(a, objects) and names(b, objects)]
    relations = {
        "left_right": ("left", "right", lambda a, b: b.x - a.x >= CLEAR * (a.radius + b.radius)),
        "above_below": ("above", "below", lambda a, b: b.y - a.y >= CLEAR * (a.radius + b.radius)),
        "size": ("larger", "smaller", lambda a, b: a.radius >= LARGER * b.radius),
    }
    for kind, (word, opposite, holds) in relations.items():
        clear = [pair for pair in pairs if holds(*pair)]
        if clear:
            is_so, pair, answer = dice.random() < 0.5, dice.choice(clear), dice.choice(("yes", "no"))
            first, second = (
                dice.choice(names(o, objects)) for o in (pair if is_so == (answer == "yes") else pair[::-1])
            )
            found[kind] = dice.choice(QUESTIONS[word if is_so else opposite]).format(first, second), answer
    described = ", ".join(with_article(f"{o.color} {o.shape}") for o in sorted(objects, key=lambda o: o.x))
    found["describe"] = dice.choice(QUESTIONS["describe"]), described
    return found


def ask_count(dice: Random, objects: list[Drawn]) -> tuple[str, str]:
    """How many objects, red objects or circles are there? Numbers that fewer drawings allow are preferred."""
    nouns = {len(objects): ["objects"]}
    for attribute, choices in (("color", COLORS), ("shape", SHAPES)):
        counts = Counter(getattr(drawn, attribute) for drawn in objects)
        for word in choices:
            nouns.setdefault(counts[word], []).append(f"{word} objects" if attribute == "color" else plural(word))
    (number,) = dice.choices(sorted(nouns), [(2, 2, 4, 7, 10)[number] for number in sorted(nouns)])
    return dice.choice(QUESTIONS["count"]).format(dice.choice(nouns[number])), NUMBERS[number]


def ask_existence(dice: Random, objects: list[Drawn]) -> tuple[str, str]:
    """Is there a circle, a red object, a red circle? Half of the missing ones have a color or shape that is there."""
    answer, form = dice.choice(("yes", "no")), dice.choice(NOUNS)
    there = sorted({form.format(drawn.color, drawn.shape) for drawn in objects})
    near = {form.format(a.color, b.shape) for a in objects for b in objects}
    every = sorted({form.format(color, shape) for color in COLORS for shape in SHAPES} - set(there))
    missing = (sorted(near - set(there)) if dice.random() < 0.5 else []) or every
    return dice.choice(QUESTIONS["existence"]).format(
        with_article(dice.choice(there if answer == "yes" else missing))
    ), answer
