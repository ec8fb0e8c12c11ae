# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A small world of pictures with questions, to train and test a model that sees.

    make_scene(seed) -> (picture, [(kind, question, answer), ...])

There are two worlds. In the textured one a picture is 112×112 RGB: on a muted texture lie one to five flat objects,
each of a size, a color and a shape, no two alike in all three. They may overlap a little; at least 80 % of each can be
seen. The open one draws as strangers might, on grounds of any kind, in many sizes, shapes and manners, sometimes
nothing at all, and is asked in more words; `scene_worlds` tells how.

A seed fixes everything: scalars come from `random.Random.random` and textures from the raw output of PCG64, the two
streams that Python and numpy promise to keep, and drawing is elementwise arithmetic and square roots, which IEEE 754
rounds alike everywhere.

Answers are drawn before questions, so that no kind is guessed easily: in the textured world, of color, shape, size,
count and describe no answer is commoner than 25 %, of the yes/no kinds (existence, left_right, above_below) none than
55 %. The size kind asks both for a size and for a comparison; its five answers come about equally often.

    python -m transformers_aurea.scenes --out folder --n 8       # a contact sheet, and the questions in the terminal
"""

import argparse
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from random import Random
from typing import NamedTuple

from PIL import Image

from .scene_drawing import IMAGE_SIZE, SceneObject, object_mask, pick
from .scene_language import (
    ASKERS,
    COLORS,
    FOREIGN,
    KINDS,
    NO_PICTURE,
    NUMBERS,
    SHAPES,
    SIZES,
    TRAINING_KINDS,
    VOCABULARY,
    ask,
    ask_which,
    speech_of,
    with_article,
)
from .scene_worlds import MAX_OBJECTS, WORLDS, Scene


# Up to so many objects in each of two pictures in a conversation: to the words after both, their visual tokens look
# alike, and which is the first can be told only by what the words before the second have kept of it.
MAX_OBJECTS_OF_TWO = 2

# The dice of a seed: 0 makes the picture of the textured world, each kind has its own.
_STREAMS = {
    name: index
    for index, name in enumerate(
        ("textured", *KINDS, "order of turns", "locate", "missing", "foreign", "open", "row", "conversation")
    )
}
_STREAMS["describe_down"] = _STREAMS["describe"]
_NUM_STREAMS = 16


def make_scene(
    seed: int,
    *,
    kinds: Iterable[str] | None = None,
    max_objects: int | None = None,
    questions_per_kind: int | Mapping[str, int] = 1,
    recolor: Mapping[str, tuple[str, tuple[int, int, int]]] | None = None,
    world: str = "textured",
) -> tuple[Image.Image, list[tuple[str, str, str]]]:
    """The picture of a seed and its questions, `(kind, question, answer)`.

    A kind that the scene gives no unambiguous question of is left out (relations need two objects). "describe" lists
    the objects from left to right by the x of their centers, where these are at least 8 of 112 pixels apart. The
    picture depends on `seed`, `world`, `max_objects` and `recolor` only, the questions of a kind not on the other
    kinds.

    Args:
        kinds: which of `KINDS` and `TRAINING_KINDS` to ask; by default all of `KINDS`.
        max_objects: at most this many objects, 1 to 5.
        questions_per_kind: up to so many different questions of each kind, or of the kinds named, and one of the
            others.
        recolor: `{"black": ("turquoise", (64, 224, 208))}` draws every black object in another RGB color, 0 to 255,
            and calls it by another word: a color to learn.
        world: `"textured"` or `"open"`.

    Raises:
        ValueError: for a seed that is not an integer from 0 on, an unknown kind, color or world, or a number out of
            range.
    """
    kinds = KINDS if kinds is None else kinds
    kinds = tuple(kinds) if isinstance(kinds, Iterable) and not isinstance(kinds, str) else (kinds,)
    named = isinstance(questions_per_kind, Mapping)
    for kind in (*kinds, *(questions_per_kind if named else ())):
        if not isinstance(kind, str) or kind not in ASKERS:
            raise ValueError(f"Unknown kind {kind!r}: the kinds are {', '.join(ASKERS)}.")
    counts = questions_per_kind if named else dict.fromkeys(kinds, questions_per_kind)
    for count in counts.values():
        if not _is_integer(count) or count < 1:
            raise ValueError(f"questions_per_kind must be an integer from 1 on, not {count!r}.")
    recolor = recolor or {}
    _check_recolor(recolor)

    objects, picture = _draw(seed, world, max_objects, recolor)
    speech = speech_of(world, _is_test(seed))
    questions = [
        (kind, _rename(question, recolor), _rename(answer, recolor))
        for kind in kinds
        for question, answer in ask(_dice(seed, kind), objects, kind, counts.get(kind, 1), speech)
    ]
    return picture, questions


def _draw(seed: int, world: str, max_objects: int | None, recolor: Mapping[str, tuple]) -> Scene:
    if not _is_integer(seed) or seed < 0:
        raise ValueError(f"A seed must be an integer from 0 on, not {seed!r}.")
    max_objects = MAX_OBJECTS if max_objects is None else max_objects
    if not _is_integer(max_objects) or not 1 <= max_objects <= MAX_OBJECTS:
        raise ValueError(f"max_objects must be an integer from 1 to {MAX_OBJECTS}, not {max_objects!r}.")
    if world not in WORLDS:
        raise ValueError(f"Unknown world {world!r}: the worlds are {', '.join(WORLDS)}.")
    other_rgb = {color: rgb for color, (_, rgb) in recolor.items()}
    return WORLDS[world](int(seed), _dice(seed, world), max_objects, other_rgb)


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
    return re.sub(pattern, lambda found: (with_article if found[1] else str)(words[found[2]]), text)


def scene_objects(seed: int, *, max_objects: int | None = None, world: str = "textured") -> list[SceneObject]:
    """The objects in the picture of `make_scene(seed, max_objects=max_objects, world=world)`, from back to front."""
    return _draw(seed, world, max_objects, {}).objects


class SceneDataset(Sequence):
    """Scenes as conversations, made when they are asked for: `id`, `images` and `messages`, as TRL and the collator
    take them. The questions of a scene, in random order, are the turns of its conversation.

    A stage of the curriculum can mix other rows among them, by shares:

    - `"textured"`, `"open"`: questions about a picture of that world.
    - `"follow_up"`: a conversation about a picture, shown once.
    - `"again"`: the picture is shown a second time, with the second question.
    - `"newer"`: another picture is shown with the second question, which is about that one, as are those after it.
    - `"pair"`: two pictures are shown together, to tell in which of them something is.
    - `"no_picture"`: questions without any.

    The last five say `independent_turns: False`, for the collator, unless nothing hangs on what was said before.

    Args:
        seeds: one per scene.
        curriculum: `((share, max_objects), ...)`: scenes before this share of the dataset have at most so many
            objects. In a stage `(share, max_objects, {kind: number})` so many questions of these kinds are asked and
            no others (of a scene that allows none, one of existence); in `(share, max_objects, {kind: number}, {row:
            share})` of the rows of textured and open pictures, which come with others, by shares that add up to 1.
            Meant for sampling in order.
        kinds, questions_per_kind, recolor: see `make_scene`.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        curriculum: Iterable[tuple[float, int] | tuple[float, int, Mapping[str, int], Mapping[str, float]]] = (),
        kinds: Iterable[str] | None = None,
        questions_per_kind: int | Mapping[str, int] = 1,
        recolor: Mapping[str, tuple[str, tuple[int, int, int]]] | None = None,
    ):
        self.seeds = seeds
        self.curriculum = sorted(_checked_curriculum(curriculum), key=lambda stage: stage[0])
        self.kinds = kinds
        self.questions_per_kind = questions_per_kind
        self.recolor = recolor or {}
        for stage in ((1, None), *self.curriculum):  # now, not when a training has come to it
            self._make(train_seeds(1)[0], "textured", stage)

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self.seeds))[index]
        seed, share = self.seeds[index], index / len(self.seeds)
        stage = next((stage for stage in self.curriculum if share < stage[0]), (1, None))
        shares = stage[3] if len(stage) == 4 else {"textured": 1}
        kind = _draw_by_share(_dice(seed, "row"), shares)
        dice = _dice(seed, "conversation")
        if kind in WORLDS:
            picture, questions = self._make(seed, kind, stage)
            order = _dice(seed, "order of turns")
            turns = [Turn(*texts) for _, *texts in sorted(questions, key=lambda _: order.random())]
            shown_last = len(stage) == 4 and dice.random() < _SHOWN_LAST_SHARE
            turns[:1] = [turn._replace(images=1, shown_last=shown_last) for turn in turns[:1]]
            return _conversation(f"scene {seed}", [picture], turns)
        scenes = _Scenes(seed, pick(dice, _WORLDS_OF_CONVERSATIONS), stage[1] or MAX_OBJECTS, self.recolor)
        images, turns = _CONVERSATIONS[kind](scenes, dice)
        return _conversation(f"scene {seed}, {kind}", images, turns) | {"independent_turns": kind == "no_picture"}

    def _make(self, seed: int, world: str, stage: tuple) -> tuple[Image.Image, list[tuple[str, str, str]]]:
        _, max_objects, counts = (*stage, None)[:3]
        options = {"max_objects": max_objects, "recolor": self.recolor, "world": world}
        picture, questions = make_scene(
            seed,
            kinds=self.kinds if counts is None else counts,
            questions_per_kind=self.questions_per_kind if counts is None else counts,
            **options,
        )
        return picture, questions or (make_scene(seed, kinds=["existence"], **options)[1] if counts else [])


class Turn(NamedTuple):
    """A question with its answer, and how many of the conversation's pictures are shown before or after it."""

    question: str
    answer: str
    images: int = 0
    shown_last: bool = False


_SHOWN_LAST_SHARE = 0.15
_WORLDS_OF_CONVERSATIONS = ("open", "open", "textured")
# From a seed to that of a second picture: more than there are training seeds, and even, so that it is as the first one
# to train or to test.
_OTHER_PICTURE = 2**40


class _Scenes:
    """What a conversation is made of: the pictures of a seed, and questions about them."""

    def __init__(self, seed: int, world: str, max_objects: int, recolor: Mapping[str, tuple]):
        self.seed, self.world, self.max_objects, self.recolor = seed, world, max_objects, recolor
        self.few = min(max_objects, MAX_OBJECTS_OF_TWO)
        self.speech = speech_of(world, _is_test(seed))

    def two(self) -> tuple[Scene, Scene]:
        seeds = self.seed, self.seed + _OTHER_PICTURE
        return tuple(_draw(seed, self.world, self.few, self.recolor) for seed in seeds)

    def one(self) -> Scene:
        return _draw(self.seed, self.world, self.max_objects, self.recolor)

    def ask(self, dice: Random, scene: Scene, number: int) -> list[Turn]:
        """So many questions of different kinds."""
        kinds = sorted(
            (kind for kind in ASKERS if kind not in ("locate", "describe_down")), key=lambda _: dice.random()
        )
        asked = (ask(dice, scene.objects, kind, 1, self.speech) for kind in kinds)
        texts = [texts for found in asked for texts in found][:number]
        return [Turn(*(_rename(text, self.recolor) for text in pair)) for pair in texts]


def _follow_up(scenes: _Scenes, dice: Random) -> tuple[list[Image.Image], list[Turn]]:
    scene = scenes.one()
    first, *others = scenes.ask(dice, scene, 2 + int(dice.random() * 3))
    return [scene.picture], [first._replace(images=1, shown_last=dice.random() < _SHOWN_LAST_SHARE), *others]


def _again(scenes: _Scenes, dice: Random) -> tuple[list[Image.Image], list[Turn]]:
    scene = scenes.one()
    first, second, *others = scenes.ask(dice, scene, 2 + int(dice.random() * 2))
    return [scene.picture] * 2, [first._replace(images=1), second._replace(images=1), *others]


def _newer(scenes: _Scenes, dice: Random) -> tuple[list[Image.Image], list[Turn]]:
    older, newer = scenes.two()
    (first,), (second, *others) = scenes.ask(dice, older, 1), scenes.ask(dice, newer, 1 + int(dice.random() * 2))
    turns = [first._replace(images=1), second._replace(images=1), *others]
    return [older.picture, newer.picture], turns


def _pair(scenes: _Scenes, dice: Random) -> tuple[list[Image.Image], list[Turn]]:
    two = scenes.two()
    asked = [ask_which(dice, *(scene.objects for scene in two), scenes.speech) for _ in range(6)]
    turns = [Turn(*(_rename(text, scenes.recolor) for text in pair)) for pair in dict(asked).items()]
    # A question before the pictures is easier: its words, and those of the first picture, see that one alone.
    turns[0] = turns[0]._replace(images=2, shown_last=dice.random() < 0.5)
    return [scene.picture for scene in two], turns


def _no_picture(scenes: _Scenes, dice: Random) -> tuple[list[Image.Image], list[Turn]]:
    """Those about a scene are answered by the wish to see one, the others as ever."""
    scene, other = scenes.two()
    turns = [*scenes.ask(dice, scene, 10), Turn(ask_which(dice, scene.objects, other.objects, scenes.speech)[0], "")]
    turns += [Turn(*texts) for texts in ask(dice, [], "foreign", 4, scenes.speech)]
    turns = [turn._replace(answer=turn.answer if turn.answer == FOREIGN else NO_PICTURE) for turn in turns]
    return [], sorted(turns, key=lambda _: dice.random())[:8]


_CONVERSATIONS: dict[str, Callable[[_Scenes, Random], tuple[list[Image.Image], list[Turn]]]] = {
    "follow_up": _follow_up,
    "again": _again,
    "newer": _newer,
    "pair": _pair,
    "no_picture": _no_picture,
}
# What a stage of a curriculum can mix.
ROWS = (*WORLDS, *_CONVERSATIONS)


def _draw_by_share(dice: Random, shares: Mapping[str, float]) -> str:
    rest = dice.random() * sum(shares.values())
    for name, share in shares.items():
        rest -= share
        if rest < 0:
            return name
    return name


def scene_questions(
    seeds: Iterable[int],
    *,
    recolor: Mapping[str, tuple[str, tuple[int, int, int]]] | None = None,
    world: str = "textured",
) -> dict[str, list[dict]]:
    """The questions of some scenes by kind, one in a conversation: to evaluate a model on."""
    rows = {kind: [] for kind in KINDS}
    for seed in seeds:
        picture, questions = make_scene(seed, recolor=recolor, world=world)
        for kind, question, answer in questions:
            rows[kind].append(_conversation(f"scene {seed}, {kind}", [picture], [Turn(question, answer, images=1)]))
    return rows


def _checked_curriculum(curriculum) -> list[tuple]:
    shape = (
        "[[share, max_objects], ...], [[share, max_objects, {kind: number}], ...] or [[share, max_objects, {kind: "
        "number}, {row: share}], ...], shares from 0 to 1"
    )
    if isinstance(curriculum, str) or not isinstance(curriculum, Iterable):
        raise ValueError(f"curriculum must be like {shape}, not {curriculum!r}.")
    stages = list(curriculum)
    for stage in stages:
        is_stage = isinstance(stage, (list, tuple)) and len(stage) in (2, 3, 4) and isinstance(stage[0], Real)
        if not is_stage or not 0 <= stage[0] <= 1 or not all(isinstance(part, Mapping) for part in stage[2:]):
            raise ValueError(f"curriculum must be like {shape}, and has {stage!r}.")
        for row, share in stage[3].items() if len(stage) == 4 else ():
            if row not in ROWS or not isinstance(share, Real) or not 0 <= share <= 1:
                raise ValueError(f"Of the rows {', '.join(ROWS)} a curriculum has shares, not {row!r}: {share!r}.")
        if len(stage) == 4 and abs(sum(stage[3].values()) - 1) > 1e-6:
            raise ValueError(
                f"The shares of a stage's rows must add up to 1, not {sum(stage[3].values())}: {stage!r}."
            )
    return stages


def _conversation(name: str, images: list[Image.Image], turns: list[Turn]) -> dict:
    messages = []
    for question, answer, number, shown_last in turns:
        shown, text = [{"type": "image"}] * number, [{"type": "text", "text": question}]
        messages.append({"role": "user", "content": text + shown if shown_last else shown + text})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return {"id": name, "images": images, "messages": messages}


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


def _is_integer(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_test(seed: int) -> bool:
    return seed % 2 == 1


def _dice(seed: int, stream: str) -> Random:
    return Random(int(seed) * _NUM_STREAMS + _STREAMS[stream])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a contact sheet of scenes and print their questions.")
    parser.add_argument("--out", type=Path, required=True, help="folder for scenes.png")
    parser.add_argument("--n", type=int, default=8, help="how many scenes (default: 8)")
    parser.add_argument("--world", choices=tuple(WORLDS), default="textured")
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
        picture, questions = make_scene(args.first + index, world=args.world)
        picture = picture.resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(picture, (index % columns * side, index // columns * side))
        print(f"seed {args.first + index}")
        for kind, question, answer in questions:
            print(f"  {kind:12} {question} {answer}")
    args.out.mkdir(parents=True, exist_ok=True)
    sheet.save(args.out / "scenes.png")


__all__ = [
    "COLORS",
    "IMAGE_SIZE",
    "KINDS",
    "MAX_OBJECTS",
    "NUMBERS",
    "ROWS",
    "SHAPES",
    "SIZES",
    "TRAINING_KINDS",
    "VOCABULARY",
    "WORLDS",
    "SceneDataset",
    "SceneObject",
    "describe_f1",
    "make_scene",
    "object_mask",
    "scene_digest",
    "scene_objects",
    "scene_questions",
    "test_seeds",
    "train_seeds",
]


if __name__ == "__main__":
    main()
