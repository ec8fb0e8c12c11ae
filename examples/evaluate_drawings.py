# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Ask a model about what somebody else drew: on plain sheets, in a conversation, and where there is nothing to see.

    python examples/evaluate_drawings.py [--model_name_or_path FOLDER] [--output scores.json] [--sheet sheet.png]

`drawings.py` draws and asks. The first table has the drawings, by sheet and size: exact match of what `generate`
answers greedily; descriptions are compared by colors and shapes alone, in any order, for what is small on one sheet is
large on another. The second table has conversations, of which the last answer counts (those before are the model's
own), and what no drawing answers: blank, foreign and missing pictures, and questions of other things. Of these it also
says how many answers are short: at most twelve words, that end by themselves, and no word three times in a row.
"""

import argparse
import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from drawings import COLORS, FOREIGN, GROUNDS, KINDS, NOUNS, SHAPES, SIZES, ask, draw, foreign_picture
from PIL import Image, ImageDraw, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_aurea import embedded_model_path
from transformers_aurea.answering import Answer, AnsweringModel, answer_all, user_message
from transformers_aurea.cli.errors import errors_in_one_line
from transformers_aurea.evaluate_scenes import weights_digest


# What the embedded model says where there is nothing to say; case and a full stop at the end do not count.
EMPTY = "an empty picture"
NO_PICTURE = "Please show me a picture."
OUTSIDE = "I only know colored shapes."
# What is asked of two pictures, and what is answered if the first, the second, both or neither holds it.
WHICH_PICTURE = "In which picture is the {}?"
WHICH_ANSWERS = {(1, 0): "the first", (0, 1): "the second", (1, 1): "both", (0, 0): "neither"}
# What may be answered where there is nothing to see.
NOTHING_THERE = {
    "Describe the image.": (EMPTY,),
    "How many objects are there?": ("zero",),
    "Is there a star?": ("no",),
}
QUESTIONS_OUTSIDE = {
    **dict.fromkeys(("What is the weather?", "blargh 17 ???", "Who are you?", "What is two plus two?"), (OUTSIDE,)),
    "Is there a dog?": ("no", OUTSIDE),
    "How many cats do you see?": ("zero", OUTSIDE),
}
QUESTIONS_OF_FOREIGN = (
    "Describe the image.",
    "How many objects are there?",
    "Is there a star?",
    "What color is the object?",
)
BLANK_SHEETS = (
    *("white", "black", "gray", "lightgray", "dimgray", "lavender", "mistyrose", "lightyellow", "powderblue"),
    *("midnightblue", "darkslategray", "crimson"),
)
JUDGED = ("color", "shape", "count", "left_right")


class Case(NamedTuple):
    """A conversation: what is shown and asked in each turn, and what may be answered at its end (if nothing is given:
    whatever is short)."""

    row: str
    kind: str
    turns: list[tuple[Sequence[Image.Image], str]]
    accepted: tuple[str, ...] = ()


# What is asked


def plain_cases(n: int, seed: int) -> Iterator[Case]:
    """`n` drawings on each sheet in each size, all that can be asked of each."""
    for ground in GROUNDS:
        for size in SIZES:
            for index in range(n):
                dice = Random(f"{seed} {ground} {size} {index}")
                picture, objects, _ = draw(dice, ground, size)
                for kind, (question, answer) in ask(dice, objects).items():
                    yield Case(f"{ground} {size[0]}x{size[1]}", kind, [([picture], question)], (answer,))


def any_drawing(dice: Random):
    return draw(dice, dice.choice(tuple(GROUNDS)), dice.choice(SIZES))[:2]


def conversation_cases(n: int, seed: int) -> Iterator[Case]:
    """`n` second questions: of a picture shown once, of one shown again, and of another one than the first."""
    for row in ("second question", "second question, picture shown again", "second question, another picture"):
        for index in range(n):
            dice = Random(f"{seed} {row} {index}")
            picture, objects = any_drawing(dice)
            questions = ask(dice, objects)
            kind = dice.choice(list(questions))
            question, answer = questions.pop(kind)
            before = picture
            if row.endswith("another picture"):
                before, objects = any_drawing(dice)
                questions = ask(dice, objects)
            first, _ = dice.choice(list(questions.values()))
            again = [] if row == "second question" else [picture]
            yield Case(row, kind, [([before], first), (again, question)], (answer,))


def two_picture_cases(n: int, seed: int) -> Iterator[Case]:
    """`n` questions of which of two pictures holds something, the four answers equally often."""
    for index in range(n):
        dice = Random(f"{seed} two pictures {index}")
        where, answer = list(WHICH_ANSWERS.items())[index % len(WHICH_ANSWERS)]
        form = dice.choice(NOUNS)
        every = sorted({form.format(color, shape) for color in COLORS for shape in SHAPES})
        fitting = []
        while not fitting:
            pictures, objects = zip(any_drawing(dice), any_drawing(dice))
            first, second = (Counter(form.format(o.color, o.shape) for o in drawn) for drawn in objects)
            fitting = [noun for noun in every if (first[noun], second[noun]) == where]  # "the" star is one star
        yield Case("two pictures", "which", [(pictures, WHICH_PICTURE.format(dice.choice(fitting)))], (answer,))


def sensible_cases(n: int, seed: int) -> Iterator[Case]:
    """Blank, missing and foreign pictures, and questions that no drawing answers."""
    for size in SIZES:
        for color in BLANK_SHEETS:
            picture = Image.new("RGB", size, color)
            for question, accepted in NOTHING_THERE.items():
                yield Case("blank picture", question, [([picture], question)], accepted)
    for index in range(max(1, n // 8)):
        dice = Random(f"{seed} sensible {index}")
        picture, objects = any_drawing(dice)
        for question, _ in ask(dice, objects).values():
            yield Case("no picture", question, [([], question)], (NO_PICTURE,))
        for question, accepted in QUESTIONS_OUTSIDE.items():
            yield Case("foreign question", question, [([picture], question)], accepted)
        for what in FOREIGN:
            picture = foreign_picture(dice, what, dice.choice(SIZES))
            for question in QUESTIONS_OF_FOREIGN:
                yield Case(f"foreign picture: {what}", question, [([picture], question)])


# What is answered


def conversation(case: Case, said: list[str]) -> list[dict]:
    """The messages up to the turn after the answers already given."""
    messages = []
    for (pictures, question), answer in zip(case.turns, [*said, None]):
        messages.append(user_message(pictures, question))
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def answers(model: AnsweringModel, cases: list[Case], batch_size: int) -> list[Answer]:
    """The last answer of each case; alike in length and pictures they share a batch."""
    for case in cases:
        for turn in range(len(case.turns)):
            model.expect(picture for pictures, _ in case.turns[: turn + 1] for picture in pictures)
    found: list[list[Answer]] = [[] for _ in cases]
    for turn in range(max(len(case.turns) for case in cases)):
        going = [index for index, case in enumerate(cases) if turn < len(case.turns)]
        chats = [conversation(cases[index], [answer.text for answer in found[index]]) for index in going]
        said = answer_all(model, chats, batch_size, f"turn {turn + 1}", are_expected=True)
        for index, answer in zip(going, said):
            found[index].append(answer)
    return [turns[-1] for turns in found]


def is_short(text: str, ended: bool) -> bool:
    said = text.lower().replace(",", " ").rstrip(".").split()
    return ended and 0 < len(said) <= 12 and not any(a == b == c for a, b, c in zip(said, said[1:], said[2:]))


def described(text: str) -> Counter:
    """The colors and shapes of a description, without article and size."""
    phrases = (phrase.split() for phrase in text.lower().rstrip(".").split(","))
    return Counter(
        tuple(word for word in phrase if word not in ("a", "an", "small", "medium", "large")) for phrase in phrases
    )


def is_right(case: Case, text: str, ended: bool) -> bool:
    if case.kind == "describe":
        return ended and described(text) == described(case.accepted[0])
    if case.kind in KINDS or case.kind == "which":
        return text in case.accepted
    return is_short(text, ended) and (
        not case.accepted or text.lower().rstrip(".") in {accepted.lower().rstrip(".") for accepted in case.accepted}
    )


# What is printed


def scores_of(cases: list[Case], said: list[Answer]) -> dict[str, dict[str, dict[str, int]]]:
    """By row and kind: how many were asked, how many answers were right, and how many short."""
    scores = defaultdict(lambda: defaultdict(lambda: {"asked": 0, "right": 0, "short": 0}))
    for case, (text, ended) in zip(cases, said):
        for cell in (scores[case.row][case.kind], scores[case.row]["all"]):
            cell["asked"] += 1
            cell["right"] += is_right(case, text, ended)
            cell["short"] += is_short(text, ended)
    return {row: dict(cells) for row, cells in scores.items()}


def share(cell: dict[str, int] | None, of: str = "right") -> str:
    return f"{cell[of] / cell['asked']:.1%}" if cell else "-"


def print_scores(plain: dict, rest: dict) -> None:
    columns = (*KINDS, "all")
    print(f"{'sheet and size':<16}" + "".join(f"{column:>12}" for column in columns))
    for row, cells in plain.items():
        print(f"{row:<16}" + "".join(f"{share(cells.get(column)):>12}" for column in columns))
    judged = Counter()
    for kind in JUDGED:
        judged.update(plain["all"].get(kind))
    print(f"{', '.join(JUDGED)}: {judged['right']} of {judged['asked']} ({share(judged)})\n")
    print(f"{'':<36}{'asked':>8}{'right':>10}{'short':>10}")
    for row, cells in rest.items():
        short = "" if cells.keys() & {*KINDS, "which"} else share(cells["all"], "short")
        print(f"{row:<36}{cells['all']['asked']:>8}{share(cells['all']):>10}{short:>10}")


def write_sheet(file: Path, cases: list[Case], said: list[Answer], each: int) -> None:
    """The first `each` pictures of every row; below what was asked (ten of it), expected, and said instead."""
    tiles, rows = {}, defaultdict(set)
    for case, answer in zip(cases, said):
        pictures = [picture for shown, _ in case.turns for picture in shown]
        key = (case.row, *(id(picture) for picture in pictures))
        if key in tiles or len(rows[case.row]) < each:
            rows[case.row].add(key)
            tiles.setdefault(key, (pictures, []))[1].append((case, answer))
    width, height, columns = 420, 440, 4
    sheet = Image.new("RGB", (width * columns, height * -(-len(tiles) // columns)), "white")
    canvas = ImageDraw.Draw(sheet)
    for index, (pictures, asked) in enumerate(tiles.values()):
        left, top = width * (index % columns) + 4, height * (index // columns) + 4
        canvas.text((left, top), asked[0][0].row, fill="blue")
        for column, picture in enumerate(pictures):
            small = ImageOps.expand(ImageOps.contain(picture, (200, 180)), 1, "gray")
            sheet.paste(small, (left + 206 * column, top + 14))
        top += 200
        for case, (text, ended) in asked[:10]:
            right = is_right(case, text, ended)
            questions = " ... ".join(question for _, question in case.turns)
            said = "" if right and case.accepted else f" [{text[:50]}]"
            note = textwrap.wrap(f"{questions} {'/'.join(case.accepted[:1])}{said}", 78)
            canvas.multiline_text((left, top), "\n".join(note), fill="black" if right else "red", spacing=1)
            top += 12 * len(note)
    sheet.save(file)


def read_args() -> argparse.Namespace:
    """The options. Wrong ones end the process with status 2."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", help="folder or hub id (default: the embedded model)")
    parser.add_argument("--n", type=int, default=40, help="drawings on each sheet in each size (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output", type=Path, help="write scores and mistakes there, as JSON")
    parser.add_argument("--sheet", type=Path, help="write the first pictures of each row there, with their questions")
    parser.add_argument("--sheet_pictures", type=int, default=4, help="how many of each row (default: 4)")
    args = parser.parse_args()
    for name in ("n", "batch_size", "sheet_pictures"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    for name in ("output", "sheet"):
        path = getattr(args, name)
        if path and not path.parent.is_dir():
            parser.error(f"--{name} {path}: there is no folder {path.parent}")
    return args


def evaluate(model, processor, n: int, seed: int = 0, batch_size: int = 64):
    """Scores of the drawings by sheet, size and kind ("all": of all sheets), those of the rest, cases, and answers."""
    drawn = list(plain_cases(n, seed))
    rest = [*conversation_cases(3 * n, seed), *two_picture_cases(3 * n, seed), *sensible_cases(n, seed)]
    said = answers(AnsweringModel(model, processor, do_sample=False, max_new_tokens=48), drawn + rest, batch_size)
    plain = scores_of(drawn, said[: len(drawn)])
    plain |= scores_of([case._replace(row="all") for case in drawn], said[: len(drawn)])
    return plain, scores_of(rest, said[len(drawn) :]), drawn + rest, said


def main():
    args = read_args()
    folder = args.model_name_or_path or embedded_model_path()
    model = AutoModelForImageTextToText.from_pretrained(folder, device_map="auto").eval()
    processor = AutoProcessor.from_pretrained(folder)
    plain, rest, cases, said = evaluate(model, processor, args.n, args.seed, args.batch_size)
    print_scores(plain, rest)
    if args.output:
        mistakes = [
            {**case._asdict(), "turns": [question for _, question in case.turns], "said": text}
            for case, (text, ended) in zip(cases, said)
            if not is_right(case, text, ended)
        ]
        scores = {"weights": weights_digest(model), "plain": plain, "rest": rest, "mistakes": mistakes}
        args.output.write_text(json.dumps(scores, indent=1) + "\n")
    if args.sheet:
        write_sheet(args.sheet, cases, said, args.sheet_pictures)


if __name__ == "__main__":
    errors_in_one_line()
    main()
