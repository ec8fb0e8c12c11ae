# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Scores of a data set's questions, and the layouts in which it may ask them."""

import json
from itertools import combinations
from pathlib import Path

import pytest
from test_answering import embedded, encoded  # noqa: F401

from transformers_aurea.answering import AnsweringModel
from transformers_aurea.cli import main
from transformers_aurea.evaluate_dataset import Columns, Question, Questions, chosen, evaluate, load_rows, normalized
from transformers_aurea.scenes import make_scene, test_seeds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Scenes, and their questions as columns and as conversations."""
    folder = tmp_path_factory.mktemp("data")
    columns, chats, llava = [], [], []
    for number, (picture, asked) in enumerate(map(make_scene, test_seeds(3))):
        picture.save(folder / f"{number}.png")
        columns += [
            {"image": f"{number}.png", "question": question, "answer": answer} for _, question, answer in asked[:2]
        ]
        turns = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for _, question, answer in asked[:2]
        ]
        chats.append({"images": [f"{number}.png"], "messages": [message for turn in turns for message in turn]})
        _, question, answer = asked[2]
        llava.append(
            {
                "id": f"scene {number}",
                "image": f"{number}.png",
                "conversations": [
                    {"from": "human", "value": f"<image>\n{question}"},
                    {"from": "gpt", "value": answer},
                ],
            }
        )
    columns.append(columns.pop(0))  # whose picture is not next to its others
    (folder / "columns.json").write_text(json.dumps(columns))
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "llava.json").write_text(json.dumps(llava))
    return folder


@pytest.fixture
def model(embedded):  # noqa: F811
    return AnsweringModel(*embedded, do_sample=False, max_new_tokens=48)


class TestScores:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("A Red star.", "red star"),
            ("two, red", "2 red"),
            ("1,000", "1000"),
            ("3.5 m.", "3.5 m"),
            ("dont", "don't"),
            ("the dogs", "dogs"),
            ("8:30", "8:30"),
            ("left-right", "left right"),
            ("None", "0"),
        ],
    )
    def test_texts_are_compared_as_vqa_does(self, text, expected):
        assert normalized(text) == normalized(expected)

    @pytest.mark.parametrize(("one", "other"), [("dogs", "dog's"), ("3.5", "35"), ("one", "one two"), ("8:30", "830")])
    def test_and_others_differ(self, one, other):
        assert normalized(one) != normalized(other)

    @pytest.mark.parametrize("matches", range(11))
    def test_accuracy_of_vqa_is_the_mean_over_all_references_but_one(self, matches):
        references = ["yes"] * matches + ["no"] * (10 - matches)
        expected = [min(sum(one == "yes" for one in nine) / 3, 1) for nine in combinations(references, 9)]
        question = Question(0, 1, "0", tuple(references))
        assert question.rule == "vqa" and question.score("Yes.") == pytest.approx(sum(expected) / 10)

    def test_one_of_few_references_is_enough(self):
        question = Question(0, 1, "0", ("a red star", "star", "red"))
        assert question.rule == "match" and [question.score(said) for said in ("Star", "ring")] == [1, 0]

    @pytest.mark.parametrize(
        ("said", "number"),
        [
            *(("B", 1), ("b", 1), ("(B)", 1), ("B. ring", 1), ("B) the star", 1), ("A ring", 1), ("star.", 0)),
            *(("A red star", None), ("", None), ("D", None), ("both", None), ("Because", None), ("c:", 2)),
        ],
    )
    def test_a_choice_is_named_by_its_letter_or_its_words(self, said, number):
        assert chosen(said, ("a star", "a ring", "a cross")) == number

    def test_choices_are_scored_by_what_was_chosen(self):
        question = Question(0, 1, "0", ("B",), ("star", "ring"))
        assert question.rule == "choice"
        assert [question.score(said) for said in ("ring", "B.", "A", "star", "?")] == [1, 1, 0, 0, 0]


class TestLayouts:
    def test_columns(self, folder, model, encoded):  # noqa: F811
        rows, columns = load_rows(str(folder / "columns.json"))
        questions = Questions(rows, columns, str(folder))
        scores, answers = evaluate(model, questions, batch_size=1)
        assert scores == {"questions": 6, "exact_match": 1.0, "accuracy": 1.0, "rules": {"match": 6}}
        assert [one["answer"] for one in answers] == [row["answer"] for row in rows]
        assert sum(encoded) == 3

    def test_conversations_are_asked_up_to_each_answer(self, folder, model):
        rows, columns = load_rows(str(folder / "chats.jsonl"))
        questions = Questions(rows, columns, str(folder))
        assert columns is None and len(questions) == 6
        first, second = questions[0], questions[1]
        assert [turn["role"] for turn in second] == ["user", "assistant", "user"] and second[:1] == first
        assert [part["type"] for part in first[0]["content"]] == ["image", "text"]
        assert questions.questions[1].references == (rows[0]["messages"][3]["content"],)
        scores, _ = evaluate(model, questions, batch_size=4)
        assert scores["exact_match"] > 0.5

    def test_llava(self, folder, model):
        scores, answers = evaluate(model, Questions(*load_rows(str(folder / "llava.json")), str(folder)))
        assert scores["accuracy"] == 1 and [one["id"] for one in answers] == [f"scene {number}" for number in range(3)]

    def test_a_saved_data_set_with_splits_pictures_and_many_answers(self, folder, model, tmp_path, encoded):  # noqa: F811
        datasets = pytest.importorskip("datasets")
        picture, [(_, question, answer), *_] = make_scene(1)
        wrong = "nobody says this"
        rows = {
            "picture": [picture, picture],
            "ask": [question] * 2,
            "said": [
                [{"answer": one, "answer_id": n} for n, one in enumerate(each)]
                for each in ([answer] * 10, [answer, *[wrong] * 9])
            ],
        }
        features = datasets.Features(
            {
                "picture": datasets.Image(),
                "ask": datasets.Value("string"),
                "said": [{"answer": datasets.Value("string"), "answer_id": datasets.Value("int64")}],
            }
        )
        data = datasets.Dataset.from_dict(rows, features=features)
        datasets.DatasetDict({"test": data, "train": data.select([0])}).save_to_disk(tmp_path / "saved")
        names = Columns("picture", "ask", "said")
        scores, answers = evaluate(model, Questions(*load_rows(str(tmp_path / "saved"), "test", columns=names)))
        assert scores["rules"] == {"vqa": 2} and [one["accuracy"] for one in answers] == [1, pytest.approx(0.3)]
        assert scores["exact_match"] == 1 and encoded == [1]
        with pytest.raises(ValueError, match=r"--split is not given: .* has test, train"):
            load_rows(str(tmp_path / "saved"))
        with pytest.raises(ValueError, match=r"--split dev is none of its splits: .* has test, train"):
            load_rows(str(tmp_path / "saved"), "dev")

    @pytest.mark.parametrize("answer", ["B", 1, "a ring", "b."])
    def test_choices(self, answer, folder):
        rows = [{"image": "0.png", "question": "Which?", "answer": answer, "options": ["a star", "a ring"]}]
        questions = Questions(rows, Columns(choices="options"), str(folder), instruction="Think.")
        assert questions.questions[0].references == ("B",) and questions.questions[0].rule == "choice"
        text = questions[0][0]["content"][-1]["text"]
        assert text.startswith("Which?\nA. a star\nB. a ring\nAnswer with") and text.endswith("\nThink.")

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ({"question": " "}, "Row 1: column 'question' holds ' ', which is no question. --question_column names"),
            ({"question": ["a"]}, "holds ['a'], which is no question"),
            ({"answer": None}, "column 'answer' holds None, which is no answer. --answer_column names"),
            ({"answer": []}, "holds [], which is no answer"),
            ({"answer": ["red", ""]}, "which is no answer"),
            ({"image": None}, "Row 1: column 'image' holds no picture. --image_column names another"),
            ({"image": ["0.png", None]}, "Row 1: a picture of row 1 is missing: it is None"),
            ({"image": ["0.png", "1.png"], "question": "<image> What?"}, "2 pictures for 1 placeholders"),
            ({"question": "<video> What?"}, "holds 'video'; contents are text and image"),
        ],
        ids=str,
    )
    def test_a_bad_row_is_named_with_its_column(self, row, words, folder):
        good = {"image": "0.png", "question": "What?", "answer": "red"}
        with pytest.raises(ValueError) as refused:
            Questions([good, {**good, **row}], Columns(), str(folder))
        assert words in str(refused.value)

    @pytest.mark.parametrize(
        ("row", "words"),
        [
            ({"options": "star"}, "column 'options' holds 'star', which are no choices"),
            ({"options": ["star"]}, "which are no choices"),
            ({"answer": "C"}, "column 'answer' holds 'C', which is none of the 2 choices"),
            ({"answer": 2}, "holds 2, which is none of the 2 choices"),
            ({"answer": -1}, "holds -1, which is none of the 2 choices"),
            ({"answer": ["A", "B"]}, "which is none of the 2 choices"),
        ],
        ids=str,
    )
    def test_bad_choices_are_named(self, row, words, folder):
        good = {"image": "0.png", "question": "What?", "answer": "A", "options": ["star", "ring"]}
        with pytest.raises(ValueError) as refused:
            Questions([{**good, **row}], Columns(choices="options"), str(folder))
        assert words in str(refused.value)

    @pytest.mark.parametrize(
        ("turns", "words"),
        [
            ([], "no answer of the assistant after a question"),
            ([("assistant", "red")], "no answer of the assistant after a question"),
            ([("user", "What?"), ("bot", "red")], "no answer of the assistant after a question"),
            ([("user", "What?"), ("assistant", " ")], "turn 1 is an answer without text"),
        ],
        ids=str,
    )
    def test_a_bad_conversation_is_named(self, turns, words):
        with pytest.raises(ValueError) as refused:
            Questions([{"messages": [{"role": role, "content": text} for role, text in turns]}])
        assert "Row 0: " in str(refused.value) and words in str(refused.value)


class TestCommand:
    def test_it_prints_and_writes_scores_and_answers(self, folder, tmp_path, capsys):
        output = tmp_path / "scores.json"
        assert main(["evaluate", "--dataset", str(folder / "columns.json"), "--output", str(output)]) == 0
        assert "exact match 100.0%" in capsys.readouterr().out
        found = json.loads(output.read_text())
        assert found["accuracy"] == 1 and len(found["answers"]) == 6 and [*tmp_path.iterdir()] == [output]
        options = ["--json", "--limit", "2", "--batch_size", "1", "--max_new_tokens", "1"]
        assert main(["evaluate", "--dataset", str(folder / "columns.json"), *options]) == 0
        assert json.loads(capsys.readouterr().out)["questions"] == 2

    def test_nothing_is_written_where_a_picture_cannot_be_read(self, folder, tmp_path):
        (tmp_path / "bad.png").write_text("no picture")
        rows = [{"image": name, "question": "What?", "answer": "red"} for name in (str(folder / "0.png"), "bad.png")]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        before = {*tmp_path.iterdir()}
        with pytest.raises(ValueError, match=r"bad\.png' cannot be read"):
            main(["evaluate", "--dataset", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "scores.json")])
        assert {*tmp_path.iterdir()} == before

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--split", "test"], "--split needs --dataset"),
            (["--image_column", "picture"], "--image_column needs --dataset"),
            (["--dataset", "DATA", "--scenes", "3"], "--scenes is about scenes, and --dataset was given"),
            (["--dataset", "DATA", "--blind"], "--blind is about scenes"),
            (["--dataset", "DATA", "--limit", "0"], "at least 1, got '0'"),
            (["--dataset", "DATA", "--output", "no/such/file.json"], "there is no folder no/such"),
            (["--dataset", "DATA", "--output", "."], "--output . is a folder: name a file"),
            (["one", "--model", "other"], "the model is named twice: one and other"),
            (["--dataset", "CHATS", "--instruction", "Be short."], "this data set holds conversations"),
            (["--dataset"], "expected one argument"),
        ],
        ids=str,
    )
    def test_wrong_usage(self, options, words, folder, capsys):
        names = {"DATA": folder / "columns.json", "CHATS": folder / "chats.jsonl"}
        with pytest.raises(SystemExit, match="2"):
            main(["evaluate", *[str(names.get(option, option)) for option in options]])
        assert words in capsys.readouterr().err.splitlines()[-1]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--dataset", "no.json"], "no.json does not exist"),
            (["--dataset", "no/where"], "--dataset no/where cannot be loaded"),
            (["--dataset", "DATA", "--split", "test"], "--split test: a file has no splits"),
            (["--dataset", "DATA", "--image_column", "img"], "has no column 'img', but answer, image, question: name"),
            (["--dataset", "DATA", "--choices_column", "options"], "has no column 'options'"),
            (["--dataset", "TEXT"], "is no JSON"),
            (["--dataset", "LIST"], "record 0 is no object, but 7"),
            (["--dataset", "EMPTY"], "The data set has no rows"),
            (["--dataset", "DATA", "--model", "nobody/nothing"], "nobody/nothing is no folder"),
        ],
        ids=str,
    )
    def test_errors_are_named_before_anything_is_asked(self, options, words, folder, tmp_path):
        texts = {"TEXT": "no json", "LIST": "[7]", "EMPTY": "[]"}
        for name, text in texts.items():
            (tmp_path / f"{name}.json").write_text(text)
        names = {"DATA": folder / "columns.json"} | {name: tmp_path / f"{name}.json" for name in texts}
        with pytest.raises(ValueError) as refused:
            main(["evaluate", *[str(names.get(option, option)) for option in options]])
        assert words in str(refused.value)

    def test_a_device_is_written_to_and_not_replaced(self, folder):
        assert (
            main(["evaluate", "--dataset", str(folder / "columns.json"), "--limit", "1", "--output", "/dev/null"]) == 0
        )
        assert not Path("/dev/null").is_file()
