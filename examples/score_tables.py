# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Scores that `evaluate_scenes.py` and `evaluate_drawings.py` wrote, as a Markdown table.

python examples/score_tables.py scenes scores.json
python examples/score_tables.py drawings drawings.json
python examples/score_tables.py conversations drawings.json
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

from transformers_aurea.cli.errors import errors_in_one_line
from transformers_aurea.scenes import KINDS


NAMES = {"left_right": "left / right", "above_below": "above / below"}


def percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def scenes_table(scores: dict) -> list[list[str]]:
    """By kind of question, what is right of unseen scenes, and what without or with another picture."""
    columns = ("exact_match", "black_picture", "wrong_picture", "commonest_answer")
    head = [f"{scores['all']['pictures']:,} unseen scenes", "questions"]
    head += ["exact match", "black picture", "picture of another scene", "commonest answer"]
    rows = [
        [NAMES.get(kind, kind), f"{row['questions']:,}"]
        + [percent(row[column]) if column in row else "" for column in columns]
        for kind, row in scores.items()
        if kind in (*KINDS, "all")
    ]
    rows[-1][2] = f"**{rows[-1][2]}**"
    return [head, *rows]


def drawings_table(scores: dict) -> list[list[str]]:
    """By sheet and by size, and by kind of question, what is right of drawings."""
    sums = defaultdict(lambda: defaultdict(Counter))
    for place in (0, 1):  # a sheet, then a size; all, which is neither, last
        for row, cells in scores["plain"].items():
            for kind, cell in cells.items() if row != "all" else ():
                sums[row.split()[place]][kind].update(cell)
    sums["all"] = scores["plain"]["all"]
    columns = [kind for kind in (*KINDS, "all") if kind in sums["all"]]
    head = [f"{sums['all']['all']['asked']:,} questions", *(NAMES.get(kind, kind) for kind in columns)]
    rows = [
        [name, *(percent(cells[kind]["right"] / cells[kind]["asked"]) for kind in columns)]
        for name, cells in sums.items()
    ]
    rows[-1][-1] = f"**{rows[-1][-1]}**"
    return [head, *rows]


def conversations_table(scores: dict) -> list[list[str]]:
    """What is right of conversations, and of what no drawing answers."""
    rows = [
        [row, f"{cells['all']['asked']:,}", percent(cells["all"]["right"] / cells["all"]["asked"])]
        for row, cells in scores["rest"].items()
    ]
    return [["", "questions", "right"], *rows]


TABLES = {"scenes": scenes_table, "drawings": drawings_table, "conversations": conversations_table}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("scores", type=Path, help="JSON, of `--output`")
    args = parser.parse_args()
    head, *rows = TABLES[args.table](json.loads(args.scores.read_text()))
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    errors_in_one_line()
    main()
