# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import hashlib
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from transformers_aurea import scenes
from transformers_aurea.scenes import (
    IMAGE_SIZE,
    KINDS,
    SceneDataset,
    describe_f1,
    make_scene,
    object_mask,
    scene_digest,
    scene_objects,
    scene_questions,
)


# SHA-256 of the RGB bytes. Other values would mean that a seed no longer is the picture it was.
GOLDEN_PIXELS = {
    0: "5acf12b5ecbf3566af2d10c046d53e4de85855ad238014d1036bc988bb643836",
    1: "92b1b1d047d692f025b6d058ba6034e3c58c332b9c2396ea0ea6fb73121a2406",
    12: "04860782ae6fc80057fbda11e0eba7fd323a18b094a84d5ef8873f8514cf7482",
    777: "ba5660bda7338cb1512a808e58339c97903709475ad00f8c2c5ba8b03432ae5d",
    123456789: "93d99d5ce73b43e3cbf48193093944e8649bee2f2d2da061e51e7fd060ac7584",
}
# SHA-256 of all questions and answers of seeds 0 to 49.
GOLDEN_QUESTIONS = "093a93e47e298122ebc9fe7f4df32ed528677d69291bd01d98e03fb0f7704e44"

YES_NO_KINDS = ("existence", "left_right", "above_below")
NUMBERS = ["zero", "one", "two", "three", "four", "five"]
RANK = {"small": 0, "medium": 1, "large": 2}
WORDS = (
    ", . ? Describe Do How Is What a above an are below black blue brown circle circles color cross crosses do five "
    "four green image in is large larger left many medium no object objects of one orange picture pink purple red "
    "right ring rings see shape size small smaller square squares star stars than the there three to triangle "
    "triangles two white yellow yes you zero"
)


@pytest.fixture(scope="module")
def test_scenes() -> list:
    return [make_scene(seed) for seed in scenes.test_seeds(2000)]


def selected(objects: list, noun: str) -> list:
    """The objects that a noun such as "large red star", "red objects" or "crosses" fits."""
    singular = {"crosses": "cross", "objects": "object"}
    words = [singular.get(word, word.removesuffix("s") if word != "cross" else word) for word in noun.split()]
    return [o for o in objects if all(word in ("object", o.size, o.color, o.shape) for word in words)]


def oracle(objects: list, question: str) -> str:
    """The answer, worked out from the question's words and the objects; fails where a noun fits several objects."""

    def the(noun: str):
        (found,) = selected(objects, noun)
        return found

    if found := re.fullmatch(r"What (?:is the )?(color|shape|size) (?:is|of) the (.+)\?", question):
        return getattr(the(found[2]), found[1])
    if found := re.fullmatch(r"How many (.+) (?:are there|do you see)\?", question):
        return NUMBERS[len(selected(objects, found[1]))]
    if found := re.fullmatch(r"(?:Is there|Do you see) an? (.+)\?", question):
        return "yes" if selected(objects, found[1]) else "no"
    relations = "larger than|smaller than|(?:to the )?left of|(?:to the )?right of|above|below"
    if found := re.fullmatch(rf"Is the (.+?) ({relations}) the (.+)\?", question):
        first, second, word = the(found[1]), the(found[3]), found[2]
        if word.endswith("than"):
            margin = RANK[first.size] - RANK[second.size]
            assert margin, question
            return "yes" if (margin > 0) == word.startswith("larger") else "no"
        margin = second.y - first.y if word in ("above", "below") else second.x - first.x
        assert abs(margin) >= 14, question
        return "yes" if (margin > 0) == (word == "above" or "left" in word) else "no"
    assert question in ("Describe the image.", "Describe the picture.", "What is in the image?")
    phrases = [f"a {o.size} {o.color} {o.shape}" for o in sorted(objects, key=lambda o: o.x)]
    return ", ".join(phrases)


def test_pictures_of_known_seeds():
    for seed, golden in GOLDEN_PIXELS.items():
        image, _ = make_scene(seed)
        assert (image.size, image.mode) == ((112, 112), "RGB")
        assert hashlib.sha256(image.tobytes()).hexdigest() == golden, seed


def test_questions_of_known_seeds():
    text = "\n".join("|".join(row) for seed in range(50) for row in make_scene(seed)[1])
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN_QUESTIONS


def test_another_process_makes_the_same_scenes():
    """Also shows that these files need numpy and Pillow only."""
    program = (
        "import pathlib, sys, types; package = types.ModuleType('transformers_aurea');"
        "sys.modules['transformers_aurea'] = package;"
        "package.__path__ = [str(pathlib.Path(sys.argv[1]).parent)]; from transformers_aurea import scenes;"
        "image, questions = scenes.make_scene(4321);"
        "print(scenes.scene_digest(image), questions, 'torch' in sys.modules)"
    )
    image, questions = make_scene(4321)
    for hash_seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", program, scenes.__file__],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        assert result.stdout.strip() == f"{scene_digest(image)} {questions} False", result.stderr


def test_every_answer_is_right(test_scenes):
    for seed, (_, questions) in zip(scenes.test_seeds(2000), test_scenes):
        objects = scene_objects(seed)
        for kind, question, answer in questions:
            assert oracle(objects, question) == answer, (seed, kind, question)


def test_several_questions_per_kind_are_different_and_right():
    for seed in range(50):
        objects = scene_objects(seed)
        _, questions = make_scene(seed, questions_per_kind=4)
        assert len(set(questions)) == len(questions)
        assert all(count <= 4 for count in Counter(kind for kind, _, _ in questions).values())
        assert all(oracle(objects, question) == answer for _, question, answer in questions)


def test_no_answer_is_too_common(test_scenes):
    answers = defaultdict(Counter)
    for _, questions in test_scenes:
        for kind, _, answer in questions:
            answers[kind][answer] += 1
    assert set(answers) == set(KINDS)
    for kind, counts in answers.items():
        assert counts.total() >= 1400, kind  # of 2000 scenes, a fifth of them with one object
        assert max(counts.values()) / counts.total() <= (0.55 if kind in YES_NO_KINDS else 0.25), (kind, counts)
    assert set(answers["size"]) == {"small", "medium", "large", "yes", "no"}
    assert set(answers["count"]) == set(NUMBERS)


def test_vocabulary_is_closed(test_scenes):
    used = {
        token
        for _, questions in test_scenes
        for _, question, answer in questions
        for token in re.findall(r"\w+|[^\w\s]", f"{question} {answer}")
    }
    assert used == set(scenes.VOCABULARY) == set(WORDS.split())


def test_world_has_the_promised_variety():
    worlds = [scene_objects(seed) for seed in range(500)]
    words = [{o[index] for objects in worlds for o in objects} for index in range(3)]
    assert words == [set(scenes.SIZES), set(scenes.COLORS), set(scenes.SHAPES)]
    counts = Counter(map(len, worlds))
    assert set(counts) == {1, 2, 3, 4, 5} and min(counts.values()) > 60


def test_objects_are_seen_apart_and_inside():
    overlaps = 0
    for seed in (*range(400), 530, 9109, 9802):  # the last three are where the first try hid too much
        objects = scene_objects(seed)
        masks = [object_mask(o) > 0.5 for o in objects]
        for index, (o, mask) in enumerate(zip(objects, masks)):
            hidden = np.logical_or.reduce([np.zeros_like(mask), *masks[index + 1 :]])
            assert np.count_nonzero(mask & ~hidden) >= 0.8 * np.count_nonzero(mask), (seed, o)
            overlaps += bool((mask & hidden).any())
            rows, columns = np.nonzero(mask)
            assert 12 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 46, (seed, o)
            assert min(o.x, o.y, 112 - o.x, 112 - o.y) >= 1.2 * o.radius
            if o.shape != "ring":
                assert mask[int(o.y), int(o.x)]
        assert len({o[:3] for o in objects}) == len(objects)
        from_left = sorted(o.x for o in objects)
        assert all(right - left >= 8 for left, right in pairwise(from_left))
    assert overlaps > 40  # the bound above is not met by keeping everything apart


def test_objects_have_the_color_they_are_called_by():
    """Of all colors the nearest one is the named one, and the background is nearer to a gray than to any of them."""
    palette = {
        "red": (220, 30, 30), "green": (30, 150, 60), "blue": (30, 70, 220), "yellow": (250, 225, 40),
        "orange": (250, 130, 20), "purple": (130, 40, 170), "pink": (255, 145, 200), "brown": (105, 60, 25),
        "white": (250, 250, 250), "black": (10, 10, 10), "background": (130, 130, 130),
    }  # fmt: skip

    def nearest(rgb: np.ndarray) -> str:
        return min(palette, key=lambda name: np.square(rgb - np.array(palette[name])).sum())

    for seed in range(150):
        pixels = np.asarray(make_scene(seed, kinds=())[0], dtype=float)
        free = np.ones((112, 112), dtype=bool)
        for o in reversed(scene_objects(seed)):
            mask = object_mask(o)
            assert nearest(pixels[free & (mask == 1)].mean(0)) == o.color, (seed, o)
            free &= mask == 0
        assert nearest(pixels[free].mean(0)) == "background", seed


def test_splits_are_disjoint_and_equal_pictures_are_counted(test_scenes):
    train, test = scenes.train_seeds(5000), scenes.test_seeds(1000)
    assert (len(set(train)), len(set(test))) == (5000, 1000)
    assert not set(train) & set(test)
    digests = {scene_digest(make_scene(seed, kinds=())[0]) for seed in train}
    equal = sum(scene_digest(image) in digests for image, _ in test_scenes[:1000])
    assert (len(digests), equal) == (5000, 0)


def test_digest_tells_pictures_apart():
    image = make_scene(3)[0]
    assert scene_digest(image) == scene_digest(image.copy()) == scene_digest(image.convert("RGBA"))
    changed = image.copy()
    changed.putpixel((5, 6), tuple(255 - value for value in image.getpixel((5, 6))))
    assert scene_digest(changed) != scene_digest(image)
    assert scene_digest(Image.new("RGB", (4, 6))) != scene_digest(Image.new("RGB", (6, 4)))


def test_kinds_change_neither_the_picture_nor_each_other():
    for seed in range(30):
        image, questions = make_scene(seed)
        for kind in KINDS:
            other_image, other_questions = make_scene(seed, kinds=[kind])
            assert other_image.tobytes() == image.tobytes()
            assert other_questions == [row for row in questions if row[0] == kind]


def test_max_objects_bounds_the_scene():
    assert all(len(scene_objects(seed, max_objects=2)) <= 2 for seed in range(100))
    assert make_scene(7, max_objects=5)[1] == make_scene(7)[1]
    assert make_scene(np.int64(7))[1] == make_scene(7)[1]


def test_recolored_scene_differs_in_one_color_and_its_word():
    rgb, changed = (64, 224, 208), 0
    for seed in range(60):
        before, questions = make_scene(seed)
        after, renamed = make_scene(seed, recolor={"orange": ("turquoise", rgb)})
        expected = [
            tuple(text.replace("an orange", "a turquoise").replace("orange", "turquoise") for text in row)
            for row in questions
        ]
        assert renamed == expected
        # One step around an object is mixed with what lies behind it.
        mask = np.zeros((112, 112), dtype=bool)
        for found in scene_objects(seed):
            mask |= (object_mask(found) > 0) & (found.color == "orange")
        difference = np.abs(np.asarray(before, dtype=int) - np.asarray(after, dtype=int)).max(axis=-1) > 0
        assert not (difference & ~mask).any() and difference.any() == mask.any()
        changed += mask.any()
    assert changed > 5
    assert SceneDataset([8], recolor={"pink": ("teal", (0, 128, 128))})[0]["images"][0].size == (112, 112)


@pytest.mark.parametrize(
    "recolor", [{"teal": ("mauve", (1, 2, 3))}, {"red": ("blue", (1, 2, 3))}, {"red": ("Mauve", (1, 2, 3))}], ids=str
)
def test_recoloring_needs_a_known_color_and_a_new_word(recolor):
    with pytest.raises(ValueError, match="new word"):
        make_scene(0, recolor=recolor)


@pytest.mark.parametrize("recolor", [[1], {"red": "mauve"}, {"red": ("mauve",)}, {"red": 3}], ids=str)
def test_recoloring_of_another_shape_is_refused(recolor):
    with pytest.raises(ValueError, match=r'recolor must be like {"black"'):
        make_scene(0, recolor=recolor)


def test_two_colors_may_not_get_one_word():
    with pytest.raises(ValueError, match="new word"):
        make_scene(0, recolor={"red": ("mauve", (1, 2, 3)), "blue": ("mauve", (4, 5, 6))})


@pytest.mark.parametrize("stage", [(1, 9), (1, 2, {"colr": 1}), (1, 2, {"color": 0})], ids=str)
def test_a_curriculum_is_checked_before_its_last_stage_is_reached(stage):
    with pytest.raises(ValueError, match=r"max_objects|colr|questions_per_kind"):
        SceneDataset(range(100), curriculum=[(0.5, 1), stage])


@pytest.mark.parametrize(
    "curriculum",
    [5, "[]", [[0.1]], [["a", 1]], [[0.1, 1, 5]], [[0.1, 1, {"color": 1}, 7]], [[-1, 1]], [[2, 1]], [3]],
    ids=str,
)
def test_a_curriculum_of_another_shape_is_refused(curriculum):
    with pytest.raises(ValueError, match=r"curriculum must be like \[\[share, max_objects\]"):
        SceneDataset(range(3), curriculum=curriculum)


@pytest.mark.parametrize("rgb", [(0, 256, 3), 5, None, ("a", "b", "c"), {1, 2, 3}, "123"], ids=str)
def test_recoloring_needs_a_color(rgb):
    with pytest.raises(ValueError, match=re.escape(f"three values from 0 to 255, not {rgb!r}")):
        make_scene(0, recolor={"red": ("mauve", rgb)})


@pytest.mark.parametrize("kinds", [5, [["color"]], "colour"], ids=str)
def test_what_is_no_kind_is_named(kinds):
    with pytest.raises(ValueError, match=r"Unknown kind .*: the kinds are color, shape"):
        make_scene(0, kinds=kinds)


@pytest.mark.parametrize("number", [-1, 1.5, "3", None, True], ids=str)
@pytest.mark.parametrize("seeds", [scenes.train_seeds, scenes.test_seeds], ids=["train", "test"])
def test_the_number_of_seeds_is_checked(seeds, number):
    with pytest.raises(ValueError, match=f"number of seeds must be an integer of at least 0, not {number!r}"):
        seeds(number)


@pytest.mark.parametrize("seed", [-1, 1.0, True, "3", None])
def test_bad_seeds_are_refused(seed):
    for function in (make_scene, scene_objects):
        with pytest.raises(ValueError, match=re.escape(repr(seed))):
            function(seed)


@pytest.mark.parametrize(
    "options",
    [{"kinds": ["colour"]}, {"max_objects": 0}, {"max_objects": 6}, {"max_objects": True}, {"questions_per_kind": 0}],
    ids=str,
)
def test_bad_options_are_refused(options):
    value = options.get("kinds", [*options.values()])[0]
    with pytest.raises(ValueError, match=re.escape(repr(value))):
        make_scene(0, **options)


@pytest.mark.parametrize(
    ("predicted", "expected", "f1"),
    [
        ("a large red star, a small blue ring", "a small blue ring, a large red star", 1),
        ("A large red star.", "a large red star", 1),
        ("a large red star", "a large red star, a small blue ring", 2 / 3),
        ("a large red star, a large red star", "a large red star", 2 / 3),
        ("a large red ring, a small blue star", "a large red star, a small blue ring", 0),
        ("red star, a small blue ring", "a large red star, a small blue ring", 1 / 2),
        ("", "a large red star", 0),
        (", a ,", "a large red star", 0),
    ],
)
def test_describe_f1(predicted, expected, f1):
    assert describe_f1(predicted, expected) == pytest.approx(f1)


def asked(row: dict) -> list[tuple[str, str]]:
    """The questions and answers of a row, whose first turn shows the picture."""
    turns = row["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert [part["type"] for turn in turns for part in turn["content"]].index("image") == 0
    texts = [turn["content"][-1]["text"] for turn in turns]
    return list(zip(texts[::2], texts[1::2]))


def test_dataset_is_the_scenes_as_conversations():
    seeds = [7, 1, 20]
    rows = SceneDataset(seeds, questions_per_kind={"left_right": 3})
    assert len(rows) == 3 and [row["id"] for row in rows] == ["scene 7", "scene 1", "scene 20"]
    orders = []
    for seed, row in zip(seeds, rows):
        picture, questions = make_scene(seed, questions_per_kind={"left_right": 3})
        assert scene_digest(*row["images"]) == scene_digest(picture)
        assert sorted(asked(row)) == sorted((question, answer) for _, question, answer in questions)
        orders.append(asked(row) != [(question, answer) for _, question, answer in questions])
    assert any(orders), "the turns are shuffled"
    assert asked(rows[-1]) == asked(rows[2]) and asked(SceneDataset([7], questions_per_kind=1)[0])
    with pytest.raises(IndexError):
        rows[3]


def test_curriculum_begins_with_few_objects():
    rows = SceneDataset(range(40), curriculum=[(0.5, 2), (0.25, 1)], kinds=["describe"])
    numbers = [len(asked(row)[0][1].split(",")) for row in rows]
    assert set(numbers[:10]) == {1} and set(numbers[10:20]) == {1, 2} and max(numbers[20:]) > 2


def test_stage_of_a_curriculum_names_its_kinds():
    stages = [(0.5, 2, {"locate": 2, "count": 1}), (0.75, 3)]
    rows = SceneDataset(range(40), curriculum=stages, questions_per_kind={"color": 2})
    for index in range(20):
        expected = make_scene(index, max_objects=2, kinds=("locate", "count"), questions_per_kind={"locate": 2})[1]
        assert sorted(asked(rows[index])) == sorted((question, answer) for _, question, answer in expected)
    later = make_scene(25, max_objects=3, questions_per_kind={"color": 2})[1]
    assert sorted(asked(rows[25])) == sorted((question, answer) for _, question, answer in later)
    assert not [question for index in range(20, 40) for question, _ in asked(rows[index]) if "Where" in question]


def test_place_is_the_cell_of_the_named_object():
    for seed in range(200):
        (thing,) = scene_objects(seed, max_objects=1)
        ((kind, question, answer),) = make_scene(seed, max_objects=1, kinds=["locate"])[1]
        column, row = (NUMBERS.index(word) for word in answer.split(", "))
        assert kind == "locate" and question == "Where is the object?"
        assert column * IMAGE_SIZE / 6 <= thing.x < (column + 1) * IMAGE_SIZE / 6
        assert row * IMAGE_SIZE / 6 <= thing.y < (row + 1) * IMAGE_SIZE / 6
    # Among several the answer is that of the one named.
    for seed in range(100):
        things = scene_objects(seed)
        for _, question, answer in make_scene(seed, kinds=["locate"], questions_per_kind=5)[1]:
            words = question.removeprefix("Where is the ").removesuffix("?").split()
            named = [t for t in things if {*words} - {"object"} <= {t.size, t.color, t.shape}]
            places = {f"{NUMBERS[int(t.x * 6 / IMAGE_SIZE)]}, {NUMBERS[int(t.y * 6 / IMAGE_SIZE)]}" for t in named}
            assert len(named) == 1 and places == {answer}


def test_description_downwards_names_the_objects_by_their_height():
    asked_about = 0
    for seed in range(60):
        things = sorted(scene_objects(seed), key=lambda thing: thing.y)
        gaps = [below.y - above.y for above, below in pairwise(things)]
        questions = make_scene(seed, kinds=["describe_down"])[1]
        assert bool(questions) == (min(gaps, default=8) >= 8)
        for kind, question, answer in questions:
            asked_about += len(things) > 1
            assert kind == "describe_down" and question.endswith(" from top to bottom.")
            names = ", ".join(f"a {thing.size} {thing.color} {thing.shape}" for thing in things)
            assert answer.replace("an ", "a ") == names
    assert asked_about >= 15


def test_questions_by_kind_are_one_to_a_conversation():
    rows = scene_questions([3, 5])
    assert tuple(rows) == KINDS
    expected = [question for seed in (3, 5) for question in make_scene(seed)[1]]
    found = [(kind, *pair) for kind, conversations in rows.items() for row in conversations for pair in asked(row)]
    assert sorted(found) == sorted(expected)
    assert all(len(asked(row)) == 1 for conversations in rows.values() for row in conversations)


def test_command_line_writes_a_contact_sheet(tmp_path, capsys):
    scenes.main(["--out", str(tmp_path / "new"), "--n", "5"])
    assert Image.open(tmp_path / "new" / "scenes.png").size == (4 * 448, 2 * 448)
    assert capsys.readouterr().out.count("describe") == 5


@pytest.mark.parametrize("options, message", [(["--n", "0"], "--n must be"), (["--first", "-1"], "--first must be")])
def test_command_line_refuses_numbers_that_no_sheet_has(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as refusal:
        scenes.main(["--out", str(tmp_path / "new"), *options])
    assert refusal.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_numbers_and_colors_at_the_ends_of_their_ranges():
    assert len(scenes.train_seeds(0)) == len(scenes.test_seeds(0)) == 0
    make_scene(0, recolor={"black": ("teal", (0, 255, 255))})
    assert describe_f1("", "") == 1.0 and describe_f1("", "a large red star") == 0.0
    with pytest.raises(ValueError, match="'teal'"):
        make_scene(0, recolor={"black": ("teal", (0, 1, 2)), "white": ("teal", (3, 4, 5))})


def test_kinds_that_are_not_named_are_asked_once():
    counts = Counter(kind for kind, _, _ in make_scene(2, questions_per_kind={"existence": 3})[1])
    assert counts.pop("existence") == 3
    assert set(counts.values()) == {1}
