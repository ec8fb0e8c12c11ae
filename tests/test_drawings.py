# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""examples/drawings.py and examples/evaluate_drawings.py: what is said of a drawing, found once more in its pixels."""

import hashlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

from transformers_aurea.answering import Answer, AnsweringModel, picture_key
from transformers_aurea.scenes import COLORS, SHAPES, SIZES, make_scene


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NUMBERS = ("zero", "one", "two", "three", "four")
YES_OR_NO = ("existence", "left_right", "above_below", "size")


def example(name: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


drawings, evaluation = example("drawings"), example("evaluate_drawings")


def drawn(count: int) -> list[SimpleNamespace]:
    """Drawings on all sheets in all sizes, with their questions."""
    found = []
    for index in range(count):
        dice = Random(f"test {index}")
        ground = list(drawings.GROUNDS)[index % 5]
        picture, objects, sheet = drawings.draw(dice, ground, drawings.SIZES[index % 3])
        asked = drawings.ask(dice, objects)
        found.append(SimpleNamespace(picture=picture, objects=objects, sheet=sheet, ground=ground, asked=asked))
    return found


class Piece(NamedTuple):
    """What hangs together and is not sheet: its box, the name of its commonest color, and what of its box it fills."""

    left: int
    top: int
    right: int
    bottom: int
    color: str
    share: float


def pieces(picture: Image.Image, sheet: tuple[int, int, int]) -> list[Piece]:
    step = 3 if picture.width > 112 else 1
    image = np.asarray(picture)[::step, ::step].astype(int)
    there = abs(image - sheet).max(axis=-1) > 12
    labels = np.where(there, np.arange(1, there.size + 1).reshape(there.shape), 0)
    before = None
    while before is None or (labels != before).any():
        before = labels
        for axis in (0, 1):
            labels = np.maximum.reduce([labels, np.roll(labels, 1, axis), np.roll(labels, -1, axis)])
        labels *= there
    found = []
    for label in np.unique(labels[there]):
        rows, columns = np.nonzero(labels == label)
        if len(rows) < 10:  # the end of an outline, in a smooth edge
            continue
        colors = Counter(map(tuple, image[rows, columns].tolist()))
        colors.pop((25, 25, 25), None)  # outlines
        name = min(drawings.COLORS, key=lambda word: math.dist(ImageColor.getrgb(word), colors.most_common(1)[0][0]))
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        share = len(rows) / ((box[2] - box[0]) * (box[3] - box[1]))
        found.append(Piece(*(int(side) * step for side in box), name, share))
    return found


@pytest.fixture(scope="module")
def some():
    found = drawn(240)
    for drawing in found:
        drawing.pieces = pieces(drawing.picture, drawing.sheet)
    return found


def test_what_is_drawn_is_what_is_said_to_be_drawn(some):
    for drawing in some:
        assert sorted(piece.color for piece in drawing.pieces) == sorted(o.color for o in drawing.objects)
        width, height = drawing.picture.size
        for piece in drawing.pieces:
            assert min(piece.left, piece.top, width - piece.right, height - piece.bottom) >= 0.01 * width
    assert {drawing.picture.size for drawing in some} == set(drawings.SIZES)
    assert {len(drawing.objects) for drawing in some} == {1, 2, 3, 4}


@pytest.mark.parametrize("line", [0, 2])
@pytest.mark.parametrize(
    ("shape", "share"),
    [("circle", 0.785), ("square", 1.0), ("triangle", 0.5), ("star", 0.36), ("cross", 0.59), ("ring", 0.5)],
)
def test_shapes_are_those_of_their_names(shape, share, line):
    for tilt in (0.0, math.radians(12)):
        picture = Image.new("RGB", (112, 112))
        drawings.paint(ImageDraw.Draw(picture), drawings.Drawn("red", shape, 56, 56, 40, (255, 0, 0)), 1, tilt, line)
        (piece,) = pieces(picture, (0, 0, 0))
        assert piece.color == "red" and (picture.getpixel((56, 60)) == (0, 0, 0)) == (shape == "ring")
        assert min(piece[:2]) >= 15 - line and max(piece[2:4]) <= 98 + line
        assert tilt or piece.share == pytest.approx(share, abs=0.05)


def the_pieces(question: str, drawing: SimpleNamespace) -> list[Piece]:
    """Those of the two nouns of a relation. Words lead to an object's color, and the color to a piece."""
    end = "left|right|above|below|larger|smaller"
    found = []
    for noun in re.findall(rf"the (\w+(?: \w+)?)(?= (?:{end})|\?)", question.replace("to the ", "")):
        words = set(noun.split()) - {"object"}
        ((color,),) = [{o.color} for o in drawing.objects if words <= {o.color, o.shape}]  # of one object alone
        found += [piece for piece in drawing.pieces if piece.color == color]
    return found


def holds(question: str, a: Piece, b: Piece) -> bool:
    """Whether a relation is true; that it is either clearly true or clearly false, is asserted."""
    if "left" in question or "right" in question:
        assert a.right < b.left or b.right < a.left
        return (a.right < b.left) == ("left" in question)
    if "above" in question or "below" in question:
        assert a.bottom < b.top or b.bottom < a.top
        return (a.bottom < b.top) == ("above" in question)
    factor = (a.right - a.left) / (b.right - b.left)
    assert max(factor, 1 / factor) > 1.3
    return (factor > 1) == ("larger" in question)


def test_answers_follow_from_the_pixels(some):
    checked = Counter()
    for drawing in some:
        colors = [piece.color for piece in drawing.pieces]
        for kind, (question, answer) in drawing.asked.items():
            if kind == "count" and (noun := re.search(r"How many (?:(\w+) )?objects ", question)):
                assert NUMBERS.index(answer) == (colors.count(noun[1]) if noun[1] else len(colors)), question
            elif kind == "existence" and (noun := re.search(r"an? (\w+) object\?", question)):
                assert answer == ("yes" if noun[1] in colors else "no"), question
            elif kind == "color" and len(colors) == 1:
                assert answer == colors[0], question
            elif kind in ("left_right", "above_below", "size") and len(set(colors)) == len(colors):
                assert answer == ("yes" if holds(question, *the_pieces(question, drawing)) else "no"), question
            elif kind == "describe":
                assert Counter(re.findall(r"an? (\w+) \w+", answer)) == Counter(colors)
            else:
                continue
            checked[kind] += 1
    assert len(checked) == 7 and min(checked.values()) >= 20, checked


def test_questions_are_worded_as_those_of_scenes(some):
    nouns = "|".join((*SIZES, *COLORS, "objects?", *(f"{shape}(?:e?s)?" for shape in SHAPES)))

    def without_nouns(questions) -> set[str]:
        return {re.sub(rf"\b(?:an?|{nouns})\b ?(?=.*\?)", "", question) for question in questions}

    known = without_nouns(question for seed in range(150) for _, question, _ in make_scene(seed)[1])
    assert without_nouns(question for drawing in some for question, _ in drawing.asked.values()) <= known


@pytest.fixture(scope="module")
def many():
    return drawn(900)


def test_nothing_has_the_color_of_its_sheet(many):
    met = {ground: set() for ground in drawings.GROUNDS}
    for drawing in many:
        for o in drawing.objects:
            met[drawing.ground].add(o.color)
            assert math.dist(o.fill, drawing.sheet) >= 50, (o, drawing.sheet)
            assert max(*o.fill, *drawing.sheet) >= 75, (o, drawing.sheet)
    assert set(drawings.COLORS) - met["white"] == {"white"} and set(drawings.COLORS) - met["black"] == {"black"}
    assert all(len(colors) >= 9 for colors in met.values())


def test_no_answer_is_common(many):
    answers = {kind: Counter() for kind in drawings.KINDS}
    for drawing in many:
        for kind, (_, answer) in drawing.asked.items():
            answers[kind][answer] += 1
    for kind, most, number in (("color", 0.15, 10), ("shape", 0.2, 6), ("count", 0.26, 5), ("describe", 0.02, 600)):
        assert len(answers[kind]) >= number and max(answers[kind].values()) <= most * answers[kind].total(), kind
    for kind in YES_OR_NO:
        assert answers[kind]["yes"] + answers[kind]["no"] == answers[kind].total() >= 300
        assert 0.44 <= answers[kind]["yes"] / answers[kind].total() <= 0.56, kind


def digests(seed: int) -> list[str]:
    found = []
    for name in ("plain_cases", "conversation_cases", "two_picture_cases", "sensible_cases"):
        digest = hashlib.sha256()
        for row, kind, turns, accepted in getattr(evaluation, name)(2, seed):
            asked = [([hashlib.sha256(p.tobytes()).hexdigest() for p in shown], question) for shown, question in turns]
            digest.update(repr((row, kind, asked, accepted)).encode())
        found.append(digest.hexdigest())
    return found


def test_a_seed_fixes_everything():
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    program += "from test_drawings import digests; print(digests(0))"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert result.stdout == f"{digests(0)}\n", result.stderr
    assert len({*digests(0), *digests(1)}) == 8


def test_two_pictures_hold_what_the_answer_says():
    cases = list(evaluation.two_picture_cases(80, 0))
    assert Counter(case.accepted for case in cases) == {(answer,): 20 for answer in evaluation.WHICH_ANSWERS.values()}
    checked = Counter()
    for case in cases:
        ((pictures, question),) = case.turns
        if noun := re.fullmatch(r"In which picture is the (\w+) object\?", question):
            found = [Counter(piece.color for piece in pieces(p, p.getpixel((0, 0))))[noun[1]] for p in pictures]
            (word,) = re.findall("first|second|both|neither", case.accepted[0])
            assert found == {"first": [1, 0], "second": [0, 1], "both": [1, 1], "neither": [0, 0]}[word], question
            checked[word] += 1
    assert len(checked) == 4 and min(checked.values()) >= 4, checked


def test_second_questions_show_what_their_row_says():
    rows = {}
    for case in evaluation.conversation_cases(30, 0):
        ((first,), asked_first), (again, asked) = case.turns
        assert asked_first != asked or case.row.endswith("another picture")
        rows.setdefault(case.row, set()).add((len(again), *(picture is first for picture in again)))
    assert list(rows.values()) == [{(0,)}, {(1, True)}, {(1, False)}]


def test_each_answer_goes_to_its_own_conversation():
    picture = Image.new("RGB", (9, 9))
    one, again, two = [picture], ([picture], "again?"), [picture, picture]
    turns = [
        [(one, "a?")],
        [(one, "b?"), ([], "c?")],
        [([], "d?")],
        [(two, "e?")],
        [(one, "f?"), again],
        [(one, "g?")],
    ]
    cases = [evaluation.Case("row", "kind", turn) for turn in turns]
    sizes = []

    class Echo(AnsweringModel):
        def __init__(self):
            self._asked_later = Counter()

        def __call__(self, chats):
            sizes.append(len(chats))
            return [
                Answer(" ".join(part.get("text", "I") for m in chat for part in m["content"]), True) for chat in chats
            ]

    model = Echo()
    assert [text for text, _ in evaluation.answers(model, cases, batch_size=3)] == [
        *("I a?", "I b? I b? c?", "d?", "I I e?", "I f? I f? I again?", "I g?"),
    ]
    assert sizes == [1, 3, 1, 1, 1, 1]
    assert model._asked_later == {picture_key(picture): 9}  # so often it was to be shown, in all turns


@pytest.mark.parametrize(
    ("kind", "accepted", "said", "ended", "right"),
    [
        ("color", ["red"], "red", True, True),
        ("color", ["red"], "red, red", True, False),
        ("describe", ["a red star, a pink ring"], "a small pink ring, a large red star", True, True),
        ("describe", ["a red star, a red star"], "a small red star", True, False),
        ("describe", ["a red star, a pink ring"], "a red ring, a pink star", True, False),
        ("describe", ["a red star"], "a red star", False, False),
        ("which", ["both"], "the first", True, False),
        ("Describe the image.", ["nothing", "the picture is empty"], "The picture is empty.", True, True),
        ("Describe the image.", ["nothing"], "a red star", True, False),
        ("Describe the image.", [], "a red star, a pink ring", True, True),
        ("Describe the image.", [], "black, black, black", True, False),
        ("Describe the image.", [], "one two " * 6 + "one", True, False),
        ("Describe the image.", [], "", True, False),
        ("Describe the image.", ["nothing"], "nothing", False, False),
    ],
)
def test_what_counts_as_right(kind, accepted, said, ended, right):
    assert evaluation.is_right(evaluation.Case("row", kind, [], tuple(accepted)), said, ended) is right


def test_foreign_pictures_differ_and_blank_ones_are_blank():
    for size in drawings.SIZES:
        for what in drawings.FOREIGN:
            picture, other = (drawings.foreign_picture(Random(seed), what, size) for seed in (1, 2))
            assert picture.size == size and picture.mode == "RGB" and picture.tobytes() != other.tobytes()
            assert (len(picture.getcolors(size[0] * size[1])) == 2) == (what == "chequerboard")
    cases = list(evaluation.sensible_cases(8, 0))
    blank = [case.turns[0][0][0] for case in cases if case.row == "blank picture"]
    assert len({(picture.size, picture.tobytes()) for picture in blank}) == 36
    assert all(len(picture.getcolors()) == 1 for picture in blank)
    assert all(not case.turns[0][0] for case in cases if case.row == "no picture")


def test_the_script(tmp_path):
    scores, sheet = tmp_path / "scores.json", tmp_path / "sheet.png"
    options = ["--n=1", f"--output={scores}", f"--sheet={sheet}", "--sheet_pictures=1"]
    command = [sys.executable, EXAMPLES / "evaluate_drawings.py", *options]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(scores.read_text())
    *rows, total = [row["all"] for row in found["plain"].values()]
    assert len(rows) == 15 and total == {name: sum(row[name] for row in rows) for name in total}
    every = [total, *(row["all"] for row in found["rest"].values())]
    assert sum(row["asked"] - row["right"] for row in every) == len(found["mistakes"])
    assert total["right"] >= 10
    assert all(name in result.stdout for name in (*found["plain"], *found["rest"]))
    assert Image.open(sheet).size == (4 * 420, 7 * 440)


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--n", "0"], "--n must be at least 1, not 0"), (["--output", "no/a.json"], "--output no/a.json: there is no")],
)
def test_wrong_options(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate_drawings.py", *options])
    with pytest.raises(SystemExit, match="2"):
        evaluation.read_args()
    assert message in capsys.readouterr().err
