# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The open world of scenes, and conversations about them: what is drawn, asked and trained on."""

import hashlib
import re
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from test_scenes import GOLDEN_PIXELS, NUMBERS, oracle, selected

from transformers_aurea import AureaDataCollator, AureaProcessor, embedded_model_path, scenes
from transformers_aurea.scene_foreign_words import _SENTENCES, _SHADES, _THINGS
from transformers_aurea.scenes import (
    KINDS,
    ROWS,
    SceneDataset,
    make_scene,
    object_mask,
    scene_objects,
    scene_questions,
)


# SHA-256 of the sizes and RGB bytes of seeds 0 to 39, and of all their questions and answers.
GOLDEN_OPEN_PIXELS = "d96b60dcfdea82a3f5b71f0a1ca7cd8aa1e7c0a20aa5bb7773ed45426337bc45"
GOLDEN_OPEN_QUESTIONS = "b9fb0553dfd67419e3dc71bad112fbe015daf69d164da6e9876dbd08de29f500"

ALL_KINDS = (*KINDS, "locate", "missing", "foreign")
NONE, NO_PICTURE, FOREIGN = "there is none", "Please show me a picture.", "I only know colored shapes."
# What others than the textured world's questions mean in its words.
SAME = (
    (r"^Describe.*|^What (is|does|do|can) .*(picture|image|you see|shown here|picture show)$", "Describe the image"),
    (r"^(?:What is the|Which|What) (colou?r|shape|size) (?:of|is|does) the (.+?)(?: have)?$", r"What \1 is the \2"),
    (r"^How (large|big) is", "What size is"),
    ("colour", "color"),
    (r"^How many (.+) (are in the picture|are in the image|can you see)$", r"How many \1 are there"),
    (r"^Can you see", "Do you see"),
    (r"^(Is there .+) in the (picture|image)$", r"\1"),
    ("bigger than", "larger than"),
    (r"on the (left|right) of", r"\1 of"),
    (" under ", " below "),
)  # fmt: skip


def in_textured_words(question: str) -> str:
    """The same question as the textured world has it, with its capital and its mark."""
    question = question[0].upper() + question[1:].rstrip("?.")
    if question.startswith("How many"):
        question = question.replace("shapes ", "objects ")
    for pattern, replacement in SAME:
        question = re.sub(pattern, replacement, question)
    return question + ("." if question.startswith("Describe") else "?")


def answer_of(objects: list, question: str) -> str:
    """Worked out from the question's words and the objects alone."""
    question = in_textured_words(question)
    relation = "larger than|smaller than|above|below|(?:to the )?left of|(?:to the )?right of"
    named = re.fullmatch(rf"(?:What|Is|Where).*? the (.+?)(?: (?:{relation}) the (.+))?\?", question)
    if named and not all(selected(objects, noun) for noun in named.groups() if noun):
        return NONE
    if question.startswith("Describe") and not objects:
        return "an empty picture"
    return oracle(objects, question)


@pytest.fixture(scope="module")
def open_scenes() -> list:
    return [
        (seed, scene_objects(seed, world="open"), *make_scene(seed, world="open", kinds=ALL_KINDS))
        for seed in range(1, 1600, 2)
    ]


@pytest.fixture(scope="module")
def processor() -> AureaProcessor:
    return AureaProcessor.from_pretrained(embedded_model_path())


def rows_of(kind: str, number: int, first: int = 0, **options) -> list[dict]:
    seeds = range(first, first + 2 * number, 2)
    return list(SceneDataset(seeds, curriculum=[[1, 5, {"color": 1, "foreign": 1}, {kind: 1.0}]], **options))


def texts_of(row: dict) -> list[tuple[str, str, int]]:
    """Question, answer and number of pictures of each turn."""
    turns = row["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    found = []
    for user, assistant in zip(turns[::2], turns[1::2]):
        (text,) = (part["text"] for part in user["content"] if part["type"] == "text")
        found.append((text, assistant["content"][0]["text"], len(user["content"]) - 1))
    assert sum(shown for _, _, shown in found) == len(row["images"])
    return found


def test_pictures_and_questions_of_known_seeds():
    made = [make_scene(seed, world="open", kinds=ALL_KINDS) for seed in range(40)]
    pixels = b"".join(f"{image.size}".encode() + image.tobytes() for image, _ in made)
    texts = "\n".join("|".join(row) for _, questions in made for row in questions)
    assert hashlib.sha256(pixels).hexdigest() == GOLDEN_OPEN_PIXELS
    assert hashlib.sha256(texts.encode()).hexdigest() == GOLDEN_OPEN_QUESTIONS
    image, _ = make_scene(12, world="textured")
    assert hashlib.sha256(image.tobytes()).hexdigest() == GOLDEN_PIXELS[12]


def test_every_answer_is_right(open_scenes):
    for seed, objects, _, questions in open_scenes:
        for kind, question, answer in questions:
            if kind == "foreign":
                assert answer == FOREIGN
            elif kind != "locate":
                assert answer_of(objects, question) == answer, (seed, kind, question)
                assert (kind == "missing") == (answer == NONE)


def test_no_answer_is_too_common(open_scenes):
    answers = defaultdict(Counter)
    for _, _, _, questions in open_scenes:
        for kind, _, answer in questions:
            answers[kind][answer] += 1
    for kind in KINDS:
        counts = answers[kind]
        assert counts.total() >= 380, kind
        limit = 0.6 if kind in ("existence", "left_right", "above_below") else 0.3
        assert max(counts.values()) / counts.total() <= limit, (kind, counts)
    assert set(answers["count"]) == set(NUMBERS)


def test_pictures_are_of_many_sizes_shapes_and_grounds(open_scenes):
    sizes = np.array([picture.size for _, _, picture, _ in open_scenes])
    assert sizes.min() >= 79 and 500 < sizes.max() <= 640
    aspects = sizes[:, 0] / sizes[:, 1]
    assert 0.49 <= aspects.min() < 0.6 and 1.7 < aspects.max() <= 2.03
    counts = Counter(len(objects) for _, objects, _, _ in open_scenes)
    assert set(counts) == set(range(6)) and 0.02 < counts[0] / counts.total() < 0.09
    corners = np.array([picture.getpixel((0, 0)) for _, _, picture, _ in open_scenes])
    white, black = (corners >= 235).all(axis=1), (corners <= 20).all(axis=1)
    assert white.mean() > 0.08 and black.mean() > 0.05
    plain = [len(np.unique(np.asarray(p).reshape(-1, 3), axis=0)) == 1 for _, o, p, _ in open_scenes if not o]
    assert any(plain) and not all(plain)
    edges = [o.edge > 0 for _, objects, _, _ in open_scenes for o in objects]
    assert 0.15 < np.mean(edges) < 0.5
    fades = Counter(min(o.fade, 2) // 1 for _, objects, _, _ in open_scenes for o in objects)
    assert set(fades) >= {0, 1, 2}


def test_no_object_vanishes_or_touches_another(open_scenes):
    """By the finished picture: what is inside of each fill is far from what is around all objects, and no two meet."""
    for seed, objects, picture, _ in open_scenes[:300]:
        pixels = np.asarray(picture, dtype=float)
        masks = [object_mask(o, picture.size) for o in objects]
        if not objects:
            continue
        together = sum(mask > 0.5 for mask in masks)
        assert together.max() == 1, seed
        free = sum(masks) < 0.02
        for o in objects:
            fill = object_mask(o._replace(radius=o.radius * 0.999, edge=0), picture.size) > 0.9
            ring = object_mask(o._replace(radius=o.radius * 1.3), picture.size) > 0
            middle = np.median(pixels[fill], axis=0) if not o.edge else np.array(o.rgb)
            around = pixels[ring & free]
            share_near = (np.linalg.norm(around - middle, axis=1) < 40).mean() if len(around) else 0
            assert share_near < 0.1, (seed, o, share_near)


def test_sizes_are_shares_of_the_picture_and_do_not_meet(open_scenes):
    radii = defaultdict(list)
    for _, objects, picture, _ in open_scenes:
        for o in objects:
            radii[o.size].append(o.radius)
            width, height = picture.size
            assert 0 < o.x < 112 and 0 < o.y < 112
            covered = (object_mask(o, picture.size) > 0.5).sum() / (width * height)
            assert abs(covered - (object_mask(o) > 0.5).sum() / 112**2) < 0.25 * covered + 0.004
    assert max(radii["small"]) < min(radii["medium"]) and max(radii["medium"]) < min(radii["large"])
    assert max(radii["large"]) > 28


def test_a_description_has_an_order(open_scenes):
    described = 0
    for _, objects, _, questions in open_scenes:
        from_left = sorted(o.x for o in objects)
        has_order = all(right - left >= 8 for left, right in pairwise(from_left))
        assert has_order == any(kind == "describe" for kind, _, _ in questions)
        described += has_order
    assert 0.6 < described / len(open_scenes) < 1


def test_a_blank_picture_is_empty(open_scenes):
    blank = [questions for _, objects, _, questions in open_scenes if not objects]
    assert len(blank) > 20
    for questions in blank:
        answers = {kind: answer for kind, _, answer in questions}
        assert answers == {
            "count": "zero", "existence": "no", "describe": "an empty picture", "missing": NONE, "foreign": FOREIGN,
        }  # fmt: skip


def test_words_outside_the_world_are_many_and_some_are_kept_for_tests():
    def spoken(seeds) -> list[str]:
        return [make_scene(seed, kinds=["foreign"])[1][0][1] for seed in seeds]

    train, test = spoken(range(0, 3000, 2)), spoken(range(1, 3001, 2))
    assert len(set(train)) > 1000 and len(set(test)) > 1000
    for halves in (_THINGS, _SHADES, _SENTENCES):
        assert not set(halves[False]) & set(halves[True]) and len(halves[False]) > 2 * len(halves[True]) > 10
    for things, own, other in ((train, False, True), (test, True, False)):
        assert sum(text in things for text in _SENTENCES[own]) > 20
        assert not any(text in things for text in _SENTENCES[other])
        nouns = {word.rstrip("?") for text in things for word in text.split()[3:]}
        assert len(nouns & set(_THINGS[own])) > 40


def test_each_row_is_the_conversation_it_says():
    for kind in ROWS:
        for row in rows_of(kind, 40):
            turns = texts_of(row)
            shown = [number for _, _, number in turns]
            assert row.get("independent_turns", True) == (kind in ("textured", "open", "no_picture"))
            expected = {"again": [1, 1], "newer": [1, 1], "pair": [2], "no_picture": []}.get(kind, [1])
            assert [number for number in shown if number] == expected and shown[: len(expected)] == expected
            assert len(turns) >= (2 if kind not in ("textured", "open", "pair") else 1), (kind, row)


def test_answers_of_conversations_are_right():
    """Of rows of the open world and of the textured one; which it is tells the size of the picture and its pixels."""

    def objects_of(picture, seed, max_objects) -> list:
        for world in scenes.WORLDS:
            if make_scene(seed, world=world, max_objects=max_objects, kinds=())[0].tobytes() == picture.tobytes():
                return scene_objects(seed, world=world, max_objects=max_objects)
        raise AssertionError(seed)

    for kind in ("follow_up", "again", "newer"):
        for index, row in enumerate(rows_of(kind, 60)):
            seed, most = 2 * index, 2 if kind == "newer" else 5
            objects = [objects_of(row["images"][0], seed, most)]
            if kind == "newer":
                objects.append(objects_of(row["images"][1], seed + 2**40, most))
            elif kind == "again":
                assert row["images"][0] == row["images"][1]
                objects *= 2
            seen = 0
            for question, answer, shown in texts_of(row):
                seen += shown
                if answer != FOREIGN:
                    assert answer_of(objects[seen - 1], question) == answer, (kind, seed, question)
    counts = Counter()
    for index, row in enumerate(rows_of("pair", 150)):
        two = [objects_of(p, 2 * index + number * 2**40, 2) for number, p in enumerate(row["images"])]
        for question, answer, _ in texts_of(row):
            counts[answer] += 1
            if found := re.search(r"(more|fewer) objects", question):
                is_first = (len(two[0]) > len(two[1])) == (found[1] == "more")
                assert len(two[0]) != len(two[1]) and answer == ("the first" if is_first else "the second")
            else:
                noun = re.search(r"(?:is|has|shows) (?:the|an?) (.+?)\??$", question)[1]
                has = tuple(bool(selected(objects, noun)) for objects in two)
                expected = {(1, 0): "the first", (0, 1): "the second", (1, 1): "both", (0, 0): "neither"}[has]
                assert answer == expected, question
    assert set(counts) == {"the first", "the second", "both", "neither"}
    assert max(counts.values()) < 0.4 * counts.total()


def test_without_a_picture_it_asks_for_one_and_strange_words_stay_strange():
    counts = Counter()
    for row in rows_of("no_picture", 60):
        assert row["images"] == []
        for question, answer, _ in texts_of(row):
            counts[answer] += 1
            if answer == NO_PICTURE:
                words = set(re.findall(r"\w+", in_textured_words(question)))
                assert words <= {
                    *scenes.VOCABULARY,
                    "Where",
                    "Which",
                    "In",
                    "which",
                    "has",
                    "shows",
                    "more",
                    "fewer",
                }, question
    assert set(counts) == {NO_PICTURE, FOREIGN} and min(counts.values()) > 0.2 * counts.total()


def test_what_is_trained_on_of_each_row(processor):
    """All answers and nothing else, each with its end; a conversation stays whole among independent questions."""
    collator = AureaDataCollator(processor, independent_turns=True)
    rows = [rows_of(kind, 3)[2] for kind in ROWS]
    batch = collator(rows)
    assert batch["pixel_values"].shape[0] == sum(len(row["images"]) for row in rows)
    assert "attention_mask" not in batch
    for row, labels, positions in zip(rows, batch["labels"], batch["position_ids"]):
        learned = processor.tokenizer.decode(labels[labels != -100]).split("<|end|>")
        assert [text.strip() for text in learned] == [answer for _, answer, _ in texts_of(row)] + [""]
        conversations = 1 if row.get("independent_turns") is False else len(texts_of(row))
        length = int(labels.ne(-100).nonzero().max()) + 1
        assert (positions[:length] == 0).sum() == conversations
    whole = AureaDataCollator(processor)(rows)
    assert "position_ids" not in whole and whole["labels"].ne(-100).sum() == batch["labels"].ne(-100).sum()


def test_rows_come_by_their_shares_and_depend_on_their_seed_alone():
    shares = {"textured": 0.5, "open": 0.2, "pair": 0.3}
    stages = [(0.5, 2, {"count": 1}, shares), (1, 5, {"color": 1, "count": 1})]
    rows = SceneDataset(range(0, 1600, 2), curriculum=stages)
    found = Counter(len(rows[index]["images"]) for index in range(400))
    assert 80 < found[2] < 160
    assert all(len(rows[index]["images"]) == 1 for index in range(400, 500))
    again = SceneDataset([14], curriculum=[(1, 2, {"count": 1}, shares)])[0]
    assert again["messages"] == rows[7]["messages"] and again["images"] == rows[7]["images"]


def test_a_scene_without_any_of_a_stages_questions_is_asked_of_existence():
    stage = [1, 1, {"left_right": 2}, {"open": 1}]
    for row in SceneDataset(range(10), curriculum=[stage]):
        ((_, answer, _),) = texts_of(row)
        assert answer in ("yes", "no")


def test_recolored_conversations_know_the_new_word():
    recolor = {"black": ("teal", (0, 128, 128))}
    texts = [text for kind in ROWS for row in rows_of(kind, 60, recolor=recolor) for text in texts_of(row)]
    words = Counter(word for question, answer, _ in texts for word in re.findall(r"\w+", f"{question} {answer}"))
    assert words["teal"] > 10 and words["black"] == 0


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"texture": 1}, "not 'texture': 1"),
        ({"open": 2}, "not 'open': 2"),
        ({"open": "1"}, "not 'open': '1'"),
        ({"open": 0.5, "pair": 0.4}, "must add up to 1, not 0.9"),
        ({}, "must add up to 1, not 0"),
    ],
)
def test_shares_of_rows_are_checked(shares, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SceneDataset(range(3), curriculum=[[1, 5, {"color": 1}, shares]])


def test_unknown_worlds_are_named():
    for function in (make_scene, scene_objects):
        with pytest.raises(ValueError, match="Unknown world 'flat': the worlds are textured, open"):
            function(0, world="flat")


def test_questions_of_the_open_world_by_kind():
    rows = scene_questions([1, 3], world="open")
    expected = [row for seed in (1, 3) for row in make_scene(seed, world="open")[1]]
    assert sorted((kind, *texts_of(row)[0][:2]) for kind in KINDS for row in rows[kind]) == sorted(expected)
