# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Ask a model what a data set asks about its pictures, and score the answers.

    rows with columns image, question, answer(s) ─┐
    conversations, as training reads them ────────┴─ Questions ── answer_all ── score

An answer matches exactly if it is one of the references, letter by letter. Its accuracy is, by what is asked:

    with choices                 1 if it names the right one, by its letter or its words
    with 4 references or more    that of VQA: min(matches / 3, 1), the mean over all sets of references but one
    else                         1 if it matches one reference

where two texts match in the way of VQA: without case, articles and punctuation, numbers as digits. Accuracy of VQA is
defined in Antol et al., https://arxiv.org/abs/1505.00468, and its mean over sets of nine of ten references for VQA v2
of Goyal et al., https://arxiv.org/abs/1612.00837, at https://visualqa.org/evaluation.html.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from .answering import AnsweringModel, answer_all
from .data_aurea import LLAVA_ROLES, read_records, to_chat_row, without_decoding


if TYPE_CHECKING:
    import datasets

FEWEST_OF_VQA = 4  # references, of which three agree in each set of all but one
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHOOSE = "Answer with the option's letter from the given choices directly."
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {word: str(number) for number, word in enumerate(NUMBERS)} | {"none": "0"}
CONTRACTION = re.compile(
    r"(?:(ai|are|ca|could|did|does|do|had|has|have|is|might|must|should|was|were|wo|would)n'?t"
    r"|(he|here|how|it|let|she|that|there|what|where|who)'s|(i|they|we|you)'(ll|re|ve))"
)


@dataclass(frozen=True)
class Columns:
    """The columns of a data set in which pictures, questions and answers stand, and the choices if there are any."""

    image: str = "image"
    question: str = "question"
    answer: str = "answer"
    choices: str | None = None


@dataclass(frozen=True)
class Question:
    """What is asked in a row, in which of its turns, and what may be answered."""

    row: int
    turn: int
    identity: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()

    def score(self, answer: str) -> float:
        """The accuracy of an answer, from 0 to 1."""
        if self.choices:
            return float(chosen(answer, self.choices) == chosen(self.references[0], self.choices))
        matches = sum(normalized(answer) == normalized(reference) for reference in self.references)
        if self.rule == "match":
            return float(matches > 0)
        others = len(self.references) - 1  # in each of the sets without a match one less of them matches
        with_match, without = (min(number / 3, 1.0) for number in (matches, matches - 1))
        return ((others + 1 - matches) * with_match + matches * without) / (others + 1)

    @property
    def rule(self) -> str:
        if self.choices:
            return "choice"
        return "vqa" if len(self.references) >= FEWEST_OF_VQA else "match"


class Questions(Sequence[list[dict]]):
    """The conversations of a data set up to each answer, read from it when they are asked for.

    Args:
        rows: conversations, in any form that `to_chat_row` understands, or rows with the columns.
        columns: None for conversations.
        image_folder: what relative paths of pictures are relative to.
        instruction: stands after each question.

    Raises:
        ValueError: there are no rows; or what is wrong with one, with its identity and what helps.
    """

    def __init__(
        self,
        rows: "Sequence[dict] | datasets.Dataset",
        columns: Columns | None = None,
        image_folder: str | None = None,
        instruction: str | None = None,
    ):
        self.rows, self.columns = rows, columns
        self.image_folder, self.instruction = image_folder, instruction
        if len(rows) == 0:
            raise ValueError("The data set has no rows.")
        self.questions: list[Question] = []
        for index in tqdm(range(len(rows)), desc="reading rows", unit="row", disable=None):
            try:
                self.questions += self._questions(index)
            except ValueError as error:
                raise ValueError(f"Row {index}: {error}") from error

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> list[dict]:
        question = self.questions[index]
        return self._conversation(self.rows[question.row], question.row)[1][: question.turn]

    def _conversation(self, row: Mapping, index: int) -> tuple[str, list[dict]]:
        """Identity and messages of a row, with its pictures in their places."""
        if self.columns is not None:
            row = self._as_chat(row)
        row = to_chat_row(row, index, self.image_folder)
        if self.columns is not None and not row["images"]:
            raise ValueError(f"column {self.columns.image!r} holds no picture. --image_column names another.")
        pictures = iter(row["images"])
        placeholders = 0
        for message in row["messages"]:
            for part in message["content"]:
                if part["type"] == "image":
                    placeholders += 1
                    part["image"] = _named(next(pictures, None), f"picture of row {index}")
                elif part["type"] != "text":
                    raise ValueError(f"it holds {part['type']!r}; contents are text and image")
        if placeholders != len(row["images"]):
            raise ValueError(
                f"it has {len(row['images'])} pictures for {placeholders} placeholders: write one <image> for each "
                "into its texts, or none at all."
            )
        return row["id"], row["messages"]

    def _as_chat(self, row: Mapping) -> dict:
        columns = self.columns
        question = row[columns.question]
        if not isinstance(question, str) or not question.strip():
            raise ValueError(
                f"column {columns.question!r} holds {question!r:.60}, which is no question. --question_column names "
                "the one that holds texts."
            )
        if choices := self._choices(row):
            question = "\n".join([question, *(f"{letter}. {one}" for letter, one in zip(LETTERS, choices)), CHOOSE])
        if self.instruction:
            question = f"{question}\n{self.instruction}"
        turns = [("user", question), ("assistant", " / ".join(self._references(row)))]
        return {
            "messages": [{"role": role, "content": text} for role, text in turns],
            "images": row[columns.image],
        }

    def _choices(self, row: Mapping) -> tuple[str, ...]:
        name = self.columns.choices
        choices = () if name is None else row[name]
        if name is not None and (
            isinstance(choices, str)
            or not isinstance(choices, Sequence)
            or not 2 <= len(choices) <= len(LETTERS)
            or not all(isinstance(one, str) and one.strip() for one in choices)
        ):
            raise ValueError(
                f"column {name!r} holds {choices!r:.60}, which are no choices. --choices_column names one of lists of "
                f"2 to {len(LETTERS)} texts."
            )
        return tuple(choices)

    def _references(self, row: Mapping) -> tuple[str, ...]:
        """The answers of a row; of one with choices, the letter of the right one."""
        name = self.columns.answer
        references = tuple(_answers(row[name]))
        if not references or not all(reference.strip() for reference in references):
            raise ValueError(
                f"column {name!r} holds {row[name]!r:.60}, which is no answer. --answer_column names one of texts, or "
                "of lists of texts."
            )
        if not (choices := self._choices(row)):
            return references
        numbers = {
            row[name] if type(row[name]) is int and 0 <= row[name] < len(choices) else chosen(reference, choices)
            for reference in references
        }
        if None in numbers or len(numbers) > 1:
            raise ValueError(
                f"column {name!r} holds {row[name]!r:.60}, which is none of the {len(choices)} choices: give the "
                "letter, the number from 0 on, or the words of the right one."
            )
        return (LETTERS[numbers.pop()],)

    def _questions(self, index: int) -> Iterator[Question]:
        row = self.rows[index]
        identity, messages = self._conversation(row, index)
        if self.columns is not None:
            yield Question(index, 1, identity, self._references(row), self._choices(row))
            return
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns or turns[0] == 0:
            raise ValueError(
                "it has no answer of the assistant after a question: conversations have turns of the roles "
                f"{', '.join((*LLAVA_ROLES, *LLAVA_ROLES.values()))}."
            )
        for turn in turns:
            text = "".join(part.get("text", "") for part in messages[turn]["content"]).strip()
            if not text:
                raise ValueError(f"turn {turn} is an answer without text.")
            yield Question(index, turn, identity, (text,))


def _answers(value) -> Iterator[str]:
    """Texts, numbers as texts, and what is under `answer`, as VQA has it."""
    if isinstance(value, Mapping):
        value = value.get("answer")
    if isinstance(value, (str, int, float)):
        yield str(value)
    elif isinstance(value, Sequence):
        for one in value:
            yield from _answers(one)
    elif value is None:
        yield ""


def _named(picture, name: str):
    """The picture, of which an error can say whose it is.

    Raises:
        ValueError: it is None.
    """
    if picture is None:
        raise ValueError(f"a {name} is missing: it is None.")
    if isinstance(picture, Mapping) and picture.get("bytes") is not None:
        return {"path": f"{picture.get('path') or 'bytes'}, {name}", "bytes": picture["bytes"]}
    return picture


def normalized(text: str) -> str:
    """A text as VQA compares it: lower case, no articles and punctuation, numbers as digits."""
    text = text.lower().strip()
    text = re.sub(r"(?<=\d),(?=\d)|(?<!\d)\.|\.(?!\d)", "", text)  # thousands; periods but those of decimals
    words = re.sub(r"[^\w\s.':]", " ", text).split()
    words = (word.replace("'", "") if CONTRACTION.fullmatch(word) else word for word in words)
    return " ".join(DIGITS.get(word, word) for word in words if word not in ("a", "an", "the"))


def chosen(text: str, choices: Sequence[str]) -> int | None:
    """The number of the choice that an answer names: by its words, or by its letter alone or before `.`, `)`, `:` or
    `,`. None if it is none of these."""
    words = [normalized(choice) for choice in choices]
    if words.count(normalized(text)) == 1:
        return words.index(normalized(text))
    if found := re.match(r"\W*([A-Za-z])(?:\W*$|[.):,])", text):
        number = LETTERS.index(found[1].upper())
        return number if number < len(choices) else None
    return None


def load_rows(
    name: str, split: str | None = None, config: str | None = None, columns: Columns | None = None
) -> tuple["Sequence[dict] | datasets.Dataset", Columns | None]:
    """Rows of a JSON file, a saved data set, a folder or a data set of a hub, and their columns: None where they hold
    conversations, unless columns were given.

    Raises:
        ValueError: it cannot be loaded, has no such split, or lacks a column; the message says what there is.
    """
    if name.endswith((".json", ".jsonl")):
        rows = _json_rows(name, split)
        there = {key for row in rows for key in row}
    else:
        rows = _load_dataset(name, split, config)
        there = {*rows.column_names}
        for column, feature in rows.features.items():
            rows = rows.cast_column(column, without_decoding(feature))
    if columns is None and there & {"messages", "conversations"}:
        return rows, None
    columns = columns or Columns()
    for option, column in vars(columns).items():
        if column is not None and len(rows) > 0 and column not in there:
            raise ValueError(
                f"{name} has no column {column!r}, but {', '.join(sorted(there))}: name the right one by "
                f"--{option}_column."
            )
    return rows, columns


def _json_rows(name: str, split: str | None) -> list[dict]:
    if split is not None:
        raise ValueError(f"--split {split}: a file has no splits, and {name} is taken whole. Leave it out.")
    if not Path(name).is_file():
        raise ValueError(f"{name} does not exist.")
    rows = list(read_records(name))
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{name}: record {number} is no object, but {row!r:.60}")
    return rows


def _load_dataset(name: str, split: str | None, config: str | None) -> "datasets.Dataset":
    import datasets

    try:
        if any(Path(name, file).is_file() for file in ("dataset_info.json", "dataset_dict.json")):
            found = datasets.load_from_disk(name)
        else:
            found = datasets.load_dataset(name, config)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--dataset {name} cannot be loaded: {error}") from error
    if isinstance(found, datasets.Dataset):
        if split is not None:
            raise ValueError(f"--split {split}: {name} has no splits. Leave it out.")
        return found
    if split is None and len(found) == 1:
        [split] = found
    if split not in found:
        given = "--split is not given" if split is None else f"--split {split} is none of its splits"
        raise ValueError(f"{given}: {name} has {', '.join(map(str, found))}.")
    return found[split]


def evaluate(
    model: AnsweringModel, questions: Questions, batch_size: int = 16
) -> tuple[dict[str, float | int | dict], list[dict]]:
    """Scores of all questions together, and each answer with its references and scores."""
    said = answer_all(model, questions, batch_size)
    answers = [
        {
            "id": question.identity,
            "answer": answer.text,
            "references": list(question.references),
            "exact_match": float(answer.text in map(str.strip, question.references)),
            "accuracy": question.score(answer.text),
        }
        for question, answer in zip(questions.questions, said)
    ]
    scores = {"questions": len(answers)}
    scores |= {name: sum(one[name] for one in answers) / len(answers) for name in ("exact_match", "accuracy")}
    scores["rules"] = dict(Counter(question.rule for question in questions.questions))
    return scores, answers


__all__ = ["Columns", "Question", "Questions", "chosen", "evaluate", "load_rows", "normalized"]
