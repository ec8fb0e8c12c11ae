# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What is asked in the scene world, and how it is answered.

An asker draws an answer among those that a scene allows, then a question that has it; None if there is none. What is
asked about is named so that it means one object and no other.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise, permutations, product
from operator import attrgetter
from random import Random
from typing import NamedTuple

from .scene_drawing import IMAGE_SIZE, SceneObject, pick
from .scene_foreign_words import foreign_question


# Pixels of 112 between two centers: "left to right" or "top to bottom" is an order if no gap is below ORDER_GAP; a
# relation is asked about from RELATION_GAP on.
ORDER_GAP = 8
RELATION_GAP = 14

KINDS = ("color", "shape", "size", "count", "existence", "left_right", "above_below", "describe")
# Asked only where named, to train: `locate` shows the way from a name to a place, which relations begin with, and
# `describe_down` which is above which, as `describe` does for left and right.
TRAINING_KINDS = ("locate", "missing", "foreign", "describe_down")
SIZES = ("small", "medium", "large")
COLORS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
NUMBERS = ("zero", "one", "two", "three", "four", "five")

_WORDS = {"size": SIZES, "color": COLORS, "shape": SHAPES}
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
    "describe_down": ("Describe the image from top to bottom.", "Describe the picture from top to bottom."),
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

# What the open world adds: other ways to ask the same.
_OTHER_QUESTIONS = {
    "color": ("What colour is the {}?", "Which color is the {}?", "Which color does the {} have?"),
    "shape": ("Which shape is the {}?", "Which shape does the {} have?"),
    "size": ("Which size is the {}?", "How large is the {}?", "How big is the {}?"),
    "larger": ("Is the {} bigger than the {}?",),
    "count": ("How many {} are in the picture?", "How many {} are in the image?", "How many {} can you see?"),
    "existence": ("Is there {} in the picture?", "Is there {} in the image?", "Can you see {}?"),
    "left": ("Is the {} on the left of the {}?",),
    "right": ("Is the {} on the right of the {}?",),
    "below": ("Is the {} under the {}?",),
    "describe": (
        *("Describe this picture.", "Describe this image.", "What is in the picture?", "What is in this picture?"),
        *("What do you see?", "What can you see?", "What does the picture show?", "What is shown here?"),
    ),
}

# Of two pictures.
_WHICH = ("In which picture is the {noun}?", "In which picture is {a_noun}?", "In which image is {a_noun}?")
_WHICH += ("Which picture has {a_noun}?", "Which picture shows {a_noun}?", "Which image has {a_noun}?")
_MORE = ("Which picture has more objects?", "Which image has more objects?", "Which picture shows more objects?")
_FEWER = ("Which picture has fewer objects?", "Which image has fewer objects?")
WHICH_ANSWERS = ("the first", "the second", "both", "neither")
_COUNTING_SHARE = 0.3  # of the questions about two pictures that do not show as many objects

EMPTY = "an empty picture"
NONE = "there is none"  # to a question about an object that is not there
NO_PICTURE = "Please show me a picture."
FOREIGN = "I only know colored shapes."


class Speech(NamedTuple):
    """How questions are put.

    Attributes:
        questions: the wordings of each kind.
        is_careless: whether some lack their capital letter or their last mark, and say "shapes" for "objects".
        held_out: whether words from outside the world are those kept for tests.
    """

    questions: Mapping[str, tuple[str, ...]]
    is_careless: bool
    held_out: bool


def speech_of(world: str, held_out: bool) -> Speech:
    if world == "textured":
        return Speech(_QUESTIONS, False, held_out)
    questions = {kind: texts + _OTHER_QUESTIONS.get(kind, ()) for kind, texts in _QUESTIONS.items()}
    return Speech(questions, True, held_out)


def ask(dice: Random, objects: list[SceneObject], kind: str, count: int, speech: Speech) -> list[tuple[str, str]]:
    """Up to so many different questions of a kind, with their answers."""
    asked = {}
    for _ in range(count if count == 1 else 3 * count):
        drawn = ASKERS[kind](dice, objects, speech)
        if drawn is None:
            break
        question, answer = drawn
        asked.setdefault(_typed(dice, question, speech), answer)
        if len(asked) == count:
            break
    return list(asked.items())


def _typed(dice: Random, question: str, speech: Speech) -> str:
    if not speech.is_careless:
        return question
    if dice.random() < 0.3:
        question = question.replace(" objects ", " shapes ")
    if dice.random() < 0.12:
        question = question[0].lower() + question[1:]
    return question.rstrip("?.") if dice.random() < 0.12 else question


def _noun(size: str = "", color: str = "", shape: str = "") -> str:
    return " ".join(word for word in (size, color, shape or "object") if word)


def with_article(noun: str) -> str:
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


def _ask_attribute(dice: Random, objects: list[SceneObject], speech: Speech, attribute: str) -> tuple[str, str] | None:
    """What color, shape or size is the ...?"""
    others = [other for other in tuple(_WORDS) if other != attribute]
    names = {}
    for scene_object in objects:
        names.setdefault(getattr(scene_object, attribute), []).extend(_names(scene_object, objects, others))
    answers = [answer for answer, found in names.items() if found]
    if not answers:
        return None
    answer = pick(dice, answers)
    return pick(dice, speech.questions[attribute]).format(pick(dice, names[answer])), answer


def _ask_size(dice: Random, objects: list[SceneObject], speech: Speech) -> tuple[str, str] | None:
    """A size, or a comparison of two objects of different sizes; such a scene gets a comparison more often than not,
    for one in which all are alike can get none."""
    ranked = [
        (SIZES.index(scene_object.size), _names(scene_object, objects, ("color", "shape"))) for scene_object in objects
    ]
    pairs = [(rank, other, a, b) for (rank, a), (other, b) in permutations(ranked, 2) if rank != other and a and b]
    if not pairs or dice.random() > _COMPARISON_SHARE:
        return _ask_attribute(dice, objects, speech, "size")
    answer, word = pick(dice, ("yes", "no")), pick(dice, ("larger", "smaller"))
    is_larger = (answer == "yes") == (word == "larger")
    first, second = pick(dice, [(a, b) for rank, other, a, b in pairs if (rank > other) == is_larger])
    return pick(dice, speech.questions[word]).format(pick(dice, first), pick(dice, second)), answer


def _ask_count(dice: Random, objects: list[SceneObject], speech: Speech) -> tuple[str, str]:
    """How many objects, red objects or stars? Higher numbers, which fewer scenes allow, are preferred."""
    nouns = {len(objects): [_PLURALS["object"]]}
    for attribute, words in (("color", COLORS), ("shape", SHAPES)):
        counts = Counter(getattr(scene_object, attribute) for scene_object in objects)
        for word in words:
            noun = f"{word} {_PLURALS['object']}" if attribute == "color" else _PLURALS[word]
            nouns.setdefault(counts[word], []).append(noun)
    number = pick(dice, [n for n in sorted(nouns) for _ in range(_COUNT_WEIGHTS[n])])
    return pick(dice, speech.questions["count"]).format(pick(dice, nouns[number])), NUMBERS[number]


def _ask_existence(dice: Random, objects: list[SceneObject], speech: Speech) -> tuple[str, str]:
    """Is there a star, a red object, a red star? A missing red star is often put together from two objects."""
    attributes = pick(dice, (("color",), ("shape",), ("color", "shape")))
    present = _present(objects, attributes)
    answer = pick(dice, ("yes", "no")) if present else "no"
    options = present if answer == "yes" else _absent(dice, objects, attributes)
    words = pick(dice, options)
    noun = with_article(_noun(**dict(zip(attributes, words))))
    return pick(dice, speech.questions["existence"]).format(noun), answer


def _ask_relation(
    dice: Random, objects: list[SceneObject], speech: Speech, axis: str, words: tuple[str, str]
) -> tuple[str, str] | None:
    """Is the ... left of (above) the ...?"""
    pairs = [(a, b) for a, b in permutations(objects, 2) if getattr(b, axis) - getattr(a, axis) >= RELATION_GAP]
    if not pairs:
        return None
    answer, word = pick(dice, ("yes", "no")), pick(dice, words)
    pair = pick(dice, pairs)
    if (answer == "yes") != (word == words[0]):
        pair = pair[::-1]
    first, second = (pick(dice, _names(scene_object, objects, tuple(_WORDS))) for scene_object in pair)
    return pick(dice, speech.questions[word]).format(first, second), answer


def _ask_place(dice: Random, objects: list[SceneObject], speech: Speech) -> tuple[str, str] | None:
    """Where is the ...? Its column and its row among six, counted from zero."""
    if not objects:
        return None
    scene_object = pick(dice, objects)
    column, row = (NUMBERS[int(center * len(NUMBERS) / IMAGE_SIZE)] for center in (scene_object.x, scene_object.y))
    name = pick(dice, _names(scene_object, objects, tuple(_WORDS)))
    return pick(dice, speech.questions["locate"]).format(name), f"{column}, {row}"


def _ask_description(
    dice: Random, objects: list[SceneObject], speech: Speech, kind: str, axis: str
) -> tuple[str, str] | None:
    """All objects from left to right, or from top to bottom; None if that is no order."""
    ordered = sorted(objects, key=attrgetter(axis))
    if any(getattr(after, axis) - getattr(before, axis) < ORDER_GAP for before, after in pairwise(ordered)):
        return None
    answer = ", ".join(with_article(_noun(o.size, o.color, o.shape)) for o in ordered) or EMPTY
    return pick(dice, speech.questions[kind]), answer


def _ask_of_missing(dice: Random, objects: list[SceneObject], speech: Speech) -> tuple[str, str]:
    """Where, of which color, shape or size is, or how does to others lie, what is not there?"""
    kind = pick(dice, ("color", "shape", "size", "locate", "left", "right", "above", "below", "larger", "smaller"))
    attributes = {"color": ("shape",), "shape": ("color",)}.get(kind)
    attributes = attributes or pick(dice, (("color",), ("shape",), ("color", "shape"), ("color", "shape")))
    nouns = [_noun(**dict(zip(attributes, pick(dice, _absent(dice, objects, attributes)))))]
    question = pick(dice, speech.questions[kind])
    if question.count("{}") == 2:
        names = [name for scene_object in objects for name in _names(scene_object, objects, tuple(_WORDS))]
        other = [pick(dice, names)] if names else [pick(dice, SHAPES)]
        nouns = nouns + other if dice.random() < 0.5 else other + nouns
    return question.format(*nouns), NONE


def _present(objects: list[SceneObject], attributes: Sequence[str]) -> list[tuple[str, ...]]:
    return sorted({tuple(getattr(scene_object, a) for a in attributes) for scene_object in objects})


def _absent(dice: Random, objects: list[SceneObject], attributes: Sequence[str]) -> list[tuple[str, ...]]:
    """Words that fit no object; half the time, if there are such, put together from those of several."""
    present = _present(objects, attributes)
    near, every = zip(*present) if present else (), [_WORDS[a] for a in attributes]
    drafts = (near, every) if present and dice.random() < 0.5 else (every,)
    return next(filter(None, ([w for w in product(*draft) if w not in present] for draft in drafts)), [])


def _ask_foreign(dice: Random, objects: list[SceneObject], speech: Speech) -> tuple[str, str]:
    """Something outside the world."""
    return foreign_question(dice, speech.questions, SHAPES, speech.held_out), FOREIGN


def ask_which(dice: Random, first: list[SceneObject], second: list[SceneObject], speech: Speech) -> tuple[str, str]:
    """Which of two pictures shows something, or more?"""
    if len(first) != len(second) and dice.random() < _COUNTING_SHARE:
        texts = pick(dice, (_MORE, _FEWER))
        is_first = (len(first) > len(second)) == (texts is _MORE)
        return _typed(dice, pick(dice, texts), speech), WHICH_ANSWERS[0 if is_first else 1]
    attributes = pick(dice, (("color",), ("shape",), ("color", "shape")))
    shown = [set(_present(objects, attributes)) for objects in (first, second)]
    options = {
        WHICH_ANSWERS[0]: sorted(shown[0] - shown[1]),
        WHICH_ANSWERS[1]: sorted(shown[1] - shown[0]),
        WHICH_ANSWERS[2]: sorted(shown[0] & shown[1]),
        WHICH_ANSWERS[3]: _absent(dice, first + second, attributes),
    }
    answer = pick(dice, [answer for answer, words in options.items() if words])
    noun = _noun(**dict(zip(attributes, pick(dice, options[answer]))))
    question = pick(dice, _WHICH).format(noun=noun, a_noun=with_article(noun))
    return _typed(dice, question, speech), answer


ASKERS: dict[str, Callable[[Random, list[SceneObject], Speech], tuple[str, str] | None]] = {
    "color": lambda *scene: _ask_attribute(*scene, "color"),
    "shape": lambda *scene: _ask_attribute(*scene, "shape"),
    "size": _ask_size,
    "count": _ask_count,
    "existence": _ask_existence,
    "left_right": lambda *scene: _ask_relation(*scene, "x", ("left", "right")),
    "above_below": lambda *scene: _ask_relation(*scene, "y", ("above", "below")),
    "describe": lambda *scene: _ask_description(*scene, "describe", "x"),
    "locate": _ask_place,
    "missing": _ask_of_missing,
    "foreign": _ask_foreign,
    "describe_down": lambda *scene: _ask_description(*scene, "describe_down", "y"),
}
