# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A small world of pictures with questions, to train and test a model that sees.

    make_scene(seed) -> (picture, [(kind, question, answer), ...])

A picture is 112×112 RGB: on a muted texture lie one to five flat objects, each of a size, a color and a shape, no two
alike in all three. They may overlap a little; at least 80 % of each can be seen. A seed fixes everything: scalars come
from `random.Random.random` and textures from the raw output of PCG64, the two streams that Python and numpy promise to
keep, and drawing is elementwise arithmetic and square roots, which IEEE 754 rounds alike everywhere.

Answers are drawn before questions, so that no kind is guessed easily: of color, shape, size, count and describe no
answer is commoner than 25 %, of the yes/no kinds (existence, left_right, above_below) none than 55 %. The size kind
asks both for a size and for a comparison; its five answers come about equally often.

    python -m transformers_aurea.scenes --out folder --n 8       # a contact sheet, and the questions in the terminal
"""

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations, permutations, product
from numbers import Integral, Real
from pathlib import Path
from random import Random
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image


IMAGE_SIZE = 112
MAX_OBJECTS = 5
MIN_VISIBLE_SHARE = 0.8
# Pixels between two centers: at least ORDER_GAP sideways, so that "left to right" is an order; a relation is asked
# about from RELATION_GAP on.
ORDER_GAP = 8
RELATION_GAP = 14

KINDS = ("color", "shape", "size", "count", "existence", "left_right", "above_below", "describe")
# Asked only where named, to train: it shows the way from a name to a place, which relations begin with.
TRAINING_KINDS = ("locate",)
SIZES = ("small", "medium", "large")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NUMBERS = ("zero", "one", "two", "three", "four", "five")

_WORDS = {"size": SIZES, "color": COLORS, "shape": SHAPES}
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
_PLURALS = {"object": "objects", "cross": "crosses"} | {shape: f"{shape}s" for shape in SHAPES if shape != "cross"}

# Found by trial: with these the answers of a kind come about equally often.
_COMPARISON_SHARE = 0.75  # of the size questions, where a comparison can be made
_COUNT_WEIGHTS = (2, 2, 5, 10, 20, 40)  # of the answers from zero to five, where a scene allows them

_QUESTIONS = {
    "color": ("What color is the {}?", "What is the color of the {}?"),
    "shape": ("What shape is the {}?", "What is the shape of the {}?"),
    "size": ("What size is the {}?", "What is the size of the {}?"),
    "larger": ("Is the {} larger than the {}?",),
    "smaller": ("Is the {} smaller than the {}?",),
    "count": ("How many {} are there?", "How many {} do you see?"),
    "existence": ("Is there {}?", "Do you see {}?"),
    "left": ("Is the {} left of the {}?", "Is the {} to the left of the {}?"),
    "right": ("Is the {} right of the {}?", "Is the {} to the right of the {}?"),
    "above": ("Is the {} above the {}?",),
    "below": ("Is the {} below the {}?",),
    "locate": ("Where is the {}?",),
    "describe": ("Describe the image.", "Describe the picture.", "What is in the image?"),
}

# Every word and punctuation mark of the questions and answers of `KINDS`, as `\w+|[^\w\s]` splits them.
VOCABULARY = tuple(
    sorted(
        {
            token
            for kind, texts in _QUESTIONS.items()
            if kind not in TRAINING_KINDS
            for text in texts
            for token in re.findall(r"\w+|[.?]", text)
        }
        | {*SIZES, *COLORS, *SHAPES, *NUMBERS, *_PLURALS, *_PLURALS.values(), "yes", "no", "a", "an", ","}
    )
)

# The dice of a seed: 0 makes the picture, each kind has its own.
_STREAMS = {name: 1 + index for index, name in enumerate((*KINDS, "order of turns", *TRAINING_KINDS))}

_Option = TypeVar("_Option")


class SceneObject(NamedTuple):
    """One object: its three words, its center and radius in pixels, tan(rotation / 2), and its color as drawn."""

    size: str
    color: str
    shape: str
    x: float
    y: float
    radius: float
    turn: float
    rgb: tuple[float, float, float]


def make_scene(
    seed: int,
    *,
    kinds: Iterable[str] | None = None,
    max_objects: int | None = None,
    questions_per_kind: int | Mapping[str, int] = 1,
    recolor: Mapping[str, tuple[str, tuple[int, int, int]]] | None = None,
) -> tuple[Image.Image, list[tuple[str, str, str]]]:
    """The picture of a seed and its questions, `(kind, question, answer)`.

    A kind that the scene gives no unambiguous question of is left out (relations need two objects). "describe" lists
    the objects from left to right by the x of their centers, which are at least 8 pixels apart. The picture depends
    on `seed`, `max_objects` and `recolor` only, the questions of a kind not on the other kinds.

    Args:
        kinds: which of `KINDS` and `TRAINING_KINDS` to ask; by default all of `KINDS`.
        max_objects: at most this many objects, 1 to 5.
        questions_per_kind: up to so many different questions of each kind, or of the kinds named, and one of the
            others.
        recolor: `{"black": ("turquoise", (64, 224, 208))}` draws every black object in another RGB color, 0 to 255,
            and calls it by another word: a color to learn.

    Raises:
        ValueError: for a seed that is not an integer from 0 on, an unknown kind or color, or a number out of range.
    """
    kinds = KINDS if kinds is None else kinds
    kinds = tuple(kinds) if isinstance(kinds, Iterable) and not isinstance(kinds, str) else (kinds,)
    named = isinstance(questions_per_kind, Mapping)
    for kind in (*kinds, *(questions_per_kind if named else ())):
        if not isinstance(kind, str) or kind not in _ASKERS:
            raise ValueError(f"Unknown kind {kind!r}: the kinds are {', '.join(_ASKERS)}.")
    counts = questions_per_kind if named else dict.fromkeys(kinds, questions_per_kind)
    for count in counts.values():
        if not _is_integer(count) or count < 1:
            raise ValueError(f"questions_per_kind must be an integer from 1 on, not {count!r}.")
    recolor = recolor or {}
    _check_recolor(recolor)

    dice, objects, covers = _arrange(seed, max_objects, {color: rgb for color, (_, rgb) in recolor.items()})
    picture = _paint(int(seed), dice, objects, covers)
    questions = [
        (kind, _rename(question, recolor), _rename(answer, recolor))
        for kind in kinds
        for question, answer in _ask(_dice(seed, _STREAMS[kind]), objects, kind, counts.get(kind, 1))
    ]
    return picture, questions


def _check_recolor(recolor) -> None:
    shape = '{"black": ("turquoise", (64, 224, 208))}'
    if not isinstance(recolor, Mapping):
        raise ValueError(f"recolor must be like {shape}, not {recolor!r}.")
    words = []
    for color, replacement in recolor.items():
        if isinstance(replacement, str) or not isinstance(replacement, Sequence) or len(replacement) != 2:
            raise ValueError(f"recolor must be like {shape}, not {{{color!r}: {replacement!r}}}.")
        word, rgb = replacement
        is_new = isinstance(word, str) and re.fullmatch("[a-z]+", word) and word not in (*VOCABULARY, *words)
        if color not in COLORS or not is_new:
            raise ValueError(
                f"recolor must give one of {', '.join(COLORS)} a new word of small letters, not {color!r} {word!r}."
            )
        is_color = isinstance(rgb, Sequence) and len(rgb) == 3 and all(isinstance(value, Real) for value in rgb)
        if not is_color or not all(0 <= value <= 255 for value in rgb):
            raise ValueError(f"recolor must give {color!r} three values from 0 to 255, not {rgb!r}.")
        words.append(word)


def _rename(text: str, recolor: Mapping[str, tuple[str, tuple[int, int, int]]]) -> str:
    if not recolor:
        return text
    words = {color: word for color, (word, _) in recolor.items()}
    pattern = rf"(?:\b(an?) )?\b({'|'.join(words)})\b"
    return re.sub(pattern, lambda found: (_with_article if found[1] else str)(words[found[2]]), text)


def scene_objects(seed: int, *, max_objects: int | None = None) -> list[SceneObject]:
    """The objects in the picture of `make_scene(seed, max_objects=max_objects)`, from back to front."""
    return _arrange(seed, max_objects)[1]


def object_mask(scene_object: SceneObject) -> np.ndarray:
    """How much of each pixel the object covers, were it alone: (112, 112), from 0 to 1."""
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE))
    box, cover = _cover(scene_object)
    mask[box] = cover
    return mask


class SceneDataset(Sequence):
    """Scenes as conversations, made when they are asked for: `id`, `images` and `messages`, as TRL and the collator
    take them. The questions of a scene, in random order, are the turns of its conversation.

    Args:
        seeds: one per scene.
        curriculum: `((share, max_objects), ...)`: scenes before this share of the dataset have at most so many
            objects. In a stage `(share, max_objects, {kind: number})` so many questions of these kinds are asked and
            no others. Meant for sampling in order.
        kinds, questions_per_kind, recolor: see `make_scene`.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        curriculum: Iterable[tuple[float, int] | tuple[float, int, Mapping[str, int]]] = (),
        kinds: Iterable[str] | None = None,
        questions_per_kind: int | Mapping[str, int] = 1,
        recolor: Mapping[str, tuple[str, tuple[int, int, int]]] | None = None,
    ):
        self.seeds = seeds
        self.curriculum = sorted(_checked_curriculum(curriculum), key=lambda stage: stage[0])
        self.kinds = kinds
        self.questions_per_kind = questions_per_kind
        self.recolor = recolor
        for stage in ((1, None), *self.curriculum):  # now, not when a training has come to it
            self._make(train_seeds(1)[0], stage)

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self.seeds))[index]
        seed, share = self.seeds[index], index / len(self.seeds)
        stage = next((stage for stage in self.curriculum if share < stage[0]), (1, None))
        picture, questions = self._make(seed, stage)
        dice = _dice(seed, _STREAMS["order of turns"])
        questions = sorted(questions, key=lambda _: dice.random())
        return _conversation(f"scene {seed}", picture, [(question, answer) for _, question, answer in questions])

    def _make(self, seed: int, stage: tuple) -> tuple[Image.Image, list[tuple[str, str, str]]]:
        _, max_objects, counts = (*stage, None)[:3]
        return make_scene(
            seed,
            kinds=self.kinds if counts is None else counts,
            max_objects=max_objects,
            questions_per_kind=self.questions_per_kind if counts is None else counts,
            recolor=self.recolor,
        )


def scene_questions(
    seeds: Iterable[int], *, recolor: Mapping[str, tuple[str, tuple[int, int, int]]] | None = None
) -> dict[str, list[dict]]:
    """The questions of some scenes by kind, one in a conversation: to evaluate a model on."""
    rows = {kind: [] for kind in KINDS}
    for seed in seeds:
        picture, questions = make_scene(seed, recolor=recolor)
        for kind, question, answer in questions:
            rows[kind].append(_conversation(f"scene {seed}, {kind}", picture, [(question, answer)]))
    return rows


def _checked_curriculum(curriculum) -> list[tuple]:
    shape = "[[share, max_objects], ...] or [[share, max_objects, {kind: number}], ...], shares from 0 to 1"
    if isinstance(curriculum, str) or not isinstance(curriculum, Iterable):
        raise ValueError(f"curriculum must be like {shape}, not {curriculum!r}.")
    stages = list(curriculum)
    for stage in stages:
        is_stage = isinstance(stage, (list, tuple)) and len(stage) in (2, 3) and isinstance(stage[0], Real)
        if not is_stage or not 0 <= stage[0] <= 1 or not isinstance((*stage, {})[2], Mapping):
            raise ValueError(f"curriculum must be like {shape}, and has {stage!r}.")
    return stages


def _conversation(name: str, picture: Image.Image, turns: list[tuple[str, str]]) -> dict:
    messages = []
    for question, answer in turns:
        picture_part = [] if messages else [{"type": "image"}]
        messages.append({"role": "user", "content": [*picture_part, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": name, "images": [picture], "messages": messages}


def train_seeds(n: int) -> range:
    """The first `n` training seeds: the even numbers."""
    return range(0, 2 * _checked_number(n), 2)


def test_seeds(n: int) -> range:
    """The first `n` test seeds: the odd numbers, so that no number of training seeds ever reaches one."""
    return range(1, 2 * _checked_number(n), 2)


test_seeds.__test__ = False  # pytest would collect it wherever it is imported


def _checked_number(n: int) -> int:
    if not _is_integer(n) or n < 0:
        raise ValueError(f"The number of seeds must be an integer of at least 0, not {n!r}.")
    return n


def scene_digest(image: Image.Image) -> str:
    """SHA-256 of the picture's size and RGB bytes, to find equal pictures."""
    return hashlib.sha256(f"{image.size}".encode() + image.convert("RGB").tobytes()).hexdigest()


def describe_f1(predicted: str, expected: str) -> float:
    """F1 between two descriptions as multisets of (size, color, shape), from 0 to 1; their order does not count.

    Whatever stands between two commas is one object; one that is not of the form "a large red star" matches none.
    """
    found, wanted = _described(predicted), _described(expected)
    total = found.total() + wanted.total()
    return 2 * (found & wanted).total() / total if total else 1.0


def _described(text: str) -> Counter:
    phrases = [tuple(phrase.split()) for phrase in text.strip().rstrip(".").lower().split(",") if phrase.strip()]
    return Counter(phrase[1:] if phrase[0] in ("a", "an") else phrase for phrase in phrases)


# Chance


def _is_integer(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _dice(seed: int, stream: int) -> Random:
    """Stream 0 arranges and paints the scene, stream 1 + k asks the questions of kind k."""
    return Random(int(seed) * 16 + stream)


def _pick(dice: Random, options: Sequence[_Option]) -> _Option:
    return options[int(dice.random() * len(options))]


def _between(dice: Random, low: float, high: float) -> float:
    return low + dice.random() * (high - low)


# The arrangement


def _arrange(
    seed: int, max_objects: int | None, other_rgb: Mapping[str, tuple[int, int, int]] | None = None
) -> tuple[Random, list[SceneObject], list]:
    """The objects from back to front, their covers, and the dice, which have the background still to throw."""
    if not _is_integer(seed) or seed < 0:
        raise ValueError(f"A seed must be an integer from 0 on, not {seed!r}.")
    max_objects = MAX_OBJECTS if max_objects is None else max_objects
    if not _is_integer(max_objects) or not 1 <= max_objects <= MAX_OBJECTS:
        raise ValueError(f"max_objects must be an integer from 1 to {MAX_OBJECTS}, not {max_objects!r}.")

    dice = _dice(seed, 0)
    words = _draw_words(dice, 1 + int(dice.random() * max_objects))
    radii = [_between(dice, *_RADII[size]) for size, _, _ in words]
    tint = [_between(dice, 0.93, 1.07) for _ in range(3)]
    rgb = _RGB | dict(other_rgb or {})
    looks = [
        (_between(dice, -0.13, 0.13), tuple((c + _between(dice, -12, 12)) * t for c, t in zip(rgb[color], tint)))
        for _, color, _ in words
    ]
    while True:
        centers = _place(dice, radii)
        objects = [
            SceneObject(*word, *center, radius, *look)
            for word, center, radius, look in zip(words, centers, radii, looks)
        ]
        covers = [_cover(scene_object) for scene_object in objects]
        if _smallest_visible_share(covers) >= MIN_VISIBLE_SHARE:
            return dice, objects, covers


def _draw_words(dice: Random, count: int) -> list[tuple[str, str, str]]:
    """Words of `count` objects, from a few colors and shapes, so that there is something to count."""
    while True:
        colors = [_pick(dice, COLORS) for _ in range(1 + int(dice.random() * MAX_OBJECTS))]
        shapes = [_pick(dice, SHAPES) for _ in range(1 + int(dice.random() * MAX_OBJECTS))]
        words = [(_pick(dice, SIZES), _pick(dice, colors), _pick(dice, shapes)) for _ in range(count)]
        if len(set(words)) == count:
            return words


def _place(dice: Random, radii: list[float]) -> list[tuple[float, float]]:
    """Centers inside the picture, far enough apart."""
    centers = []
    for _ in range(400):
        radius = radii[len(centers)]
        reach = 1.2 * radius  # of the tips of a turned triangle or star
        x, y = (_between(dice, reach, IMAGE_SIZE - reach) for _ in range(2))
        if all(
            abs(x - other_x) >= ORDER_GAP
            and (x - other_x) ** 2 + (y - other_y) ** 2 >= (0.85 * (radius + other_radius)) ** 2
            for (other_x, other_y), other_radius in zip(centers, radii)
        ):
            centers.append((x, y))
            if len(centers) == len(radii):
                return centers
    return _place(dice, radii)  # an unlucky beginning left no room


def _smallest_visible_share(covers: list) -> float:
    top = np.full((IMAGE_SIZE, IMAGE_SIZE), len(covers), dtype=np.uint8)
    for index, (box, cover) in enumerate(covers):
        top[box][cover > 0.5] = index
    seen = np.bincount(top.ravel(), minlength=len(covers))
    return min(seen[index] / np.count_nonzero(cover > 0.5) for index, (_, cover) in enumerate(covers))


# The drawing


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A pentagram: the points inside at least four of its five lines."""
    largest = second = np.full(x.shape, -np.inf)
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

# Signed distance to the outline of the shape of radius 1, negative inside; y points down.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.sqrt(x * x + y * y) - 1,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.88,
    "triangle": lambda x, y: np.maximum(y, 0.8660254 * np.abs(x) - 0.5 * y) - 0.575,
    "star": _star,
    "cross": lambda x, y: np.minimum(
        np.maximum(np.abs(x) - 1, np.abs(y) - 0.34), np.maximum(np.abs(x) - 0.34, np.abs(y) - 1)
    ),
    "ring": lambda x, y: np.abs(np.sqrt(x * x + y * y) - 0.75) - 0.25,
}


def _cover(scene_object: SceneObject) -> tuple[tuple[slice, slice], np.ndarray]:
    """The box around an object and the share of each of its pixels that the object covers."""
    _, _, shape, x, y, radius, turn, _ = scene_object
    reach = 1.2 * radius + 1
    columns, rows = (slice(max(0, int(c - reach)), min(IMAGE_SIZE, int(c + reach) + 1)) for c in (x, y))
    cosine, sine = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
    across = (np.arange(columns.start, columns.stop) + 0.5 - x) / radius
    down = ((np.arange(rows.start, rows.stop) + 0.5 - y) / radius)[:, None]
    distance = _OUTLINES[shape](cosine * across + sine * down, cosine * down - sine * across)
    return (rows, columns), np.clip(0.5 - radius * distance, 0, 1)


def _paint(seed: int, dice: Random, objects: list[SceneObject], covers: list) -> Image.Image:
    bits = np.random.PCG64(seed)
    gray = _between(dice, 95, 165)
    dark, light = (
        [gray + offset + _between(dice, -13, 13) for _ in range(3)]
        for offset in (-_between(dice, 4, 14), _between(dice, 4, 14))
    )
    dark, light = (np.array(rgb)[:, None, None] for rgb in (dark, light))
    canvas = dark + _pick(dice, _TEXTURES)(dice, bits) * (light - dark)  # (3, H, W)
    for scene_object, ((rows, columns), cover) in zip(objects, covers):
        patch = canvas[:, rows, columns]
        patch += cover * (np.array(scene_object.rgb)[:, None, None] - patch)

    noise = bits.random_raw(canvas.size // 8).astype("<u8").view(np.uint8).reshape(canvas.shape)
    strength = _between(dice, 2, 10)
    canvas += noise * (2 * strength / 255)
    canvas += 0.5 - strength  # the half rounds
    np.clip(canvas, 0, 255, out=canvas)
    return Image.fromarray(np.dstack(list(canvas.astype(np.uint8))))


# Textures: (112, 112), from 0 (the darker color) to 1 (the lighter one).

_GRID = np.arange(IMAGE_SIZE) / IMAGE_SIZE


def _slope(dice: Random) -> np.ndarray:
    """Rises in a random direction, from 0 to 1."""
    across, down = _between(dice, -1, 1), _between(dice, -1, 1)
    slope = across * _GRID + (down * _GRID)[:, None]
    return (slope - slope.min()) / (slope.max() - slope.min())


def _gradient(dice: Random, bits: np.random.PCG64) -> np.ndarray:
    return _slope(dice)


def _stripes(dice: Random, bits: np.random.PCG64) -> np.ndarray:
    return np.floor(_slope(dice) * _between(dice, 6, 20) + dice.random()) % 2


def _checker(dice: Random, bits: np.random.PCG64) -> np.ndarray:
    cells = _between(dice, 5, 14)
    across, down = (np.floor(_GRID * cells + dice.random()) for _ in range(2))
    return (across + down[:, None]) % 2


def _blobs(dice: Random, bits: np.random.PCG64) -> np.ndarray:
    """Random values at the corners of a coarse grid, and a smooth surface through them."""
    cells = 3 + int(dice.random() * 6)
    heights = (bits.random_raw((cells + 1) ** 2) >> 11).reshape(cells + 1, cells + 1) * 2.0**-53
    corner = (_GRID * cells).astype(int)
    step = _GRID * cells - corner
    step = step * step * (3 - 2 * step)
    rows = heights[corner] + step[:, None] * (heights[corner + 1] - heights[corner])
    return rows[:, corner] + step * (rows[:, corner + 1] - rows[:, corner])


_TEXTURES = (_gradient, _stripes, _checker, _blobs)


# The questions. Each function draws an answer among those the scene allows, then a question that has it; None if there
# is none.


def _ask(dice: Random, objects: list[SceneObject], kind: str, count: int) -> list[tuple[str, str]]:
    asked = {}
    for _ in range(count if count == 1 else 3 * count):
        drawn = _ASKERS[kind](dice, objects)
        if drawn is None:
            break
        asked.setdefault(*drawn)
        if len(asked) == count:
            break
    return list(asked.items())


def _noun(size: str = "", color: str = "", shape: str = "") -> str:
    return " ".join(word for word in (size, color, shape or "object") if word)


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun.startswith(tuple("aeiou")) else f"a {noun}"


def _names(scene_object: SceneObject, objects: list[SceneObject], attributes: Sequence[str]) -> list[str]:
    """The shortest nouns by some of `attributes` that mean this object and no other."""
    differences = [
        {attribute for attribute in attributes if getattr(other, attribute) != getattr(scene_object, attribute)}
        for other in objects
        if other is not scene_object
    ]
    for length in range(len(attributes) + 1):
        names = [
            _noun(**{attribute: getattr(scene_object, attribute) for attribute in chosen})
            for chosen in combinations(attributes, length)
            if not any(difference.isdisjoint(chosen) for difference in differences)
        ]
        if names:
            return names
    return []


def _ask_attribute(dice: Random, objects: list[SceneObject], attribute: str) -> tuple[str, str] | None:
    """What color, shape or size is the ...?"""
    others = [other for other in tuple(_WORDS) if other != attribute]
    names = {}
    for scene_object in objects:
        names.setdefault(getattr(scene_object, attribute), []).extend(_names(scene_object, objects, others))
    answers = [answer for answer, found in names.items() if found]
    if not answers:
        return None
    answer = _pick(dice, answers)
    return _pick(dice, _QUESTIONS[attribute]).format(_pick(dice, names[answer])), answer


def _ask_size(dice: Random, objects: list[SceneObject]) -> tuple[str, str] | None:
    """A size, or a comparison of two objects of different sizes; such a scene gets a comparison more often than not,
    for one in which all are alike can get none."""
    ranked = [
        (SIZES.index(scene_object.size), _names(scene_object, objects, ("color", "shape"))) for scene_object in objects
    ]
    pairs = [(rank, other, a, b) for (rank, a), (other, b) in permutations(ranked, 2) if rank != other and a and b]
    if not pairs or dice.random() > _COMPARISON_SHARE:
        return _ask_attribute(dice, objects, "size")
    answer, word = _pick(dice, ("yes", "no")), _pick(dice, ("larger", "smaller"))
    is_larger = (answer == "yes") == (word == "larger")
    first, second = _pick(dice, [(a, b) for rank, other, a, b in pairs if (rank > other) == is_larger])
    return _pick(dice, _QUESTIONS[word]).format(_pick(dice, first), _pick(dice, second)), answer


def _ask_count(dice: Random, objects: list[SceneObject]) -> tuple[str, str]:
    """How many objects, red objects or stars? Higher numbers, which fewer scenes allow, are preferred."""
    nouns = {len(objects): [_PLURALS["object"]]}
    for attribute, words in (("color", COLORS), ("shape", SHAPES)):
        counts = Counter(getattr(scene_object, attribute) for scene_object in objects)
        for word in words:
            noun = f"{word} {_PLURALS['object']}" if attribute == "color" else _PLURALS[word]
            nouns.setdefault(counts[word], []).append(noun)
    number = _pick(dice, [n for n in sorted(nouns) for _ in range(_COUNT_WEIGHTS[n])])
    return _pick(dice, _QUESTIONS["count"]).format(_pick(dice, nouns[number])), NUMBERS[number]


def _ask_existence(dice: Random, objects: list[SceneObject]) -> tuple[str, str]:
    """Is there a star, a red object, a red star? A missing red star is often put together from two objects."""
    attributes = _pick(dice, (("color",), ("shape",), ("color", "shape")))
    present = sorted({tuple(getattr(scene_object, a) for a in attributes) for scene_object in objects})
    answer = _pick(dice, ("yes", "no"))
    if answer == "yes":
        options = present
    else:
        near, every = zip(*present), (_WORDS[a] for a in attributes)
        drafts = (near, every) if dice.random() < 0.5 else (every,)
        options = next(filter(None, ([w for w in product(*draft) if w not in present] for draft in drafts)))
    words = _pick(dice, options)
    noun = _with_article(_noun(**dict(zip(attributes, words))))
    return _pick(dice, _QUESTIONS["existence"]).format(noun), answer


def _ask_relation(
    dice: Random, objects: list[SceneObject], axis: str, words: tuple[str, str]
) -> tuple[str, str] | None:
    """Is the ... left of (above) the ...?"""
    pairs = [(a, b) for a, b in permutations(objects, 2) if getattr(b, axis) - getattr(a, axis) >= RELATION_GAP]
    if not pairs:
        return None
    answer, word = _pick(dice, ("yes", "no")), _pick(dice, words)
    pair = _pick(dice, pairs)
    if (answer == "yes") != (word == words[0]):
        pair = pair[::-1]
    first, second = (_pick(dice, _names(scene_object, objects, tuple(_WORDS))) for scene_object in pair)
    return _pick(dice, _QUESTIONS[word]).format(first, second), answer


def _ask_place(dice: Random, objects: list[SceneObject]) -> tuple[str, str]:
    """Where is the ...? Its column and its row among six, counted from zero."""
    scene_object = _pick(dice, objects)
    column, row = (NUMBERS[int(center * len(NUMBERS) / IMAGE_SIZE)] for center in (scene_object.x, scene_object.y))
    name = _pick(dice, _names(scene_object, objects, tuple(_WORDS)))
    return _pick(dice, _QUESTIONS["locate"]).format(name), f"{column}, {row}"


def _ask_description(dice: Random, objects: list[SceneObject]) -> tuple[str, str]:
    from_left = sorted(objects, key=lambda scene_object: scene_object.x)
    answer = ", ".join(_with_article(_noun(o.size, o.color, o.shape)) for o in from_left)
    return _pick(dice, _QUESTIONS["describe"]), answer


_ASKERS: dict[str, Callable[[Random, list[SceneObject]], tuple[str, str] | None]] = {
    "color": lambda dice, objects: _ask_attribute(dice, objects, "color"),
    "shape": lambda dice, objects: _ask_attribute(dice, objects, "shape"),
    "size": _ask_size,
    "count": _ask_count,
    "existence": _ask_existence,
    "left_right": lambda dice, objects: _ask_relation(dice, objects, "x", ("left", "right")),
    "above_below": lambda dice, objects: _ask_relation(dice, objects, "y", ("above", "below")),
    "describe": _ask_description,
    "locate": _ask_place,
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a contact sheet of scenes and print their questions.")
    parser.add_argument("--out", type=Path, required=True, help="folder for scenes.png")
    parser.add_argument("--n", type=int, default=8, help="how many scenes (default: 8)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default: 0)")
    args = parser.parse_args(argv)
    if args.n < 1:
        parser.error(f"--n must be at least 1, not {args.n}")
    if args.first < 0:
        parser.error(f"--first must be 0 or greater, not {args.first}")

    zoom, columns = 4, min(args.n, 4)
    side = zoom * IMAGE_SIZE
    sheet = Image.new("RGB", (columns * side, -(-args.n // columns) * side))
    for index in range(args.n):
        picture, questions = make_scene(args.first + index)
        picture = picture.resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (index % columns * side, index // columns * side))
        print(f"seed {args.first + index}")
        for kind, question, answer in questions:
            print(f"  {kind:12} {question} {answer}")
    args.out.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out / "scenes.png")


if __name__ == "__main__":
    main()
