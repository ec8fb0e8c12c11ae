# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""ask a model about pictures

    aurea ask cat.png "What is on the sofa?"
    aurea ask left.png right.png "In which picture is the dog?"
    aurea ask photos "Describe the image." --json > answers.jsonl
    curl https://example.org/cat.png | aurea ask - "Is there a cat?" --model my-model

A picture is a file, a URL, or - for standard input. Several are shown in one question. A folder is a question about
each of its pictures, of which one that cannot be read is reported and passed over; the status is then 1.
"""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from .options import (
    add_generation_arguments,
    add_model_arguments,
    check_generation_arguments,
    check_picture,
    whole_number,
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "%(prog)s IMAGE... QUESTION [options]"
    parser.add_argument("pictures", nargs="+", metavar="IMAGE", help="file, URL, folder, or - for standard input")
    parser.add_argument("question", metavar="QUESTION", help="what to ask, the last of these arguments")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each answer, nothing else")
    parser.add_argument("--batch_size", type=whole_number(1), default=8, help="pictures of a folder at a time")
    add_model_arguments(parser)
    add_generation_arguments(parser)


def run(args: Namespace) -> int:
    check(args)
    if Path(args.pictures[0]).is_dir():
        return ask_about_each(args, list(pictures_in(Path(args.pictures[0]))))
    from .answering import Answerer, load, open_picture, user_message

    pictures = [open_picture(name) for name in args.pictures]
    answer = Answerer(*load(args), args)
    [text] = answer([[user_message(pictures, args.question)]], stream=not args.json)
    if args.json:
        print_json(args, args.pictures, text)
    return 0


def check(args: Namespace) -> None:
    """Ends as wrong usage before anything is loaded."""
    if not args.question.strip():
        args.parser.error("the question is empty")
    if Path(args.question).is_file():
        args.parser.error(f"the last argument is the question, but {args.question} is a file")
    if args.pictures.count("-") > 1:
        args.parser.error("standard input, -, is one picture: give it once")
    for name in args.pictures:
        if Path(name).is_dir() and len(args.pictures) > 1:
            args.parser.error(f"{name} is a folder, about each of whose pictures is asked: give it alone")
        if name != "-" and not Path(name).is_dir():
            check_picture(args, name)
    check_generation_arguments(args)


def pictures_in(folder: Path) -> Iterator[Path]:
    """The files of a folder that are pictures by their names, in order.

    Raises:
        ValueError: there are none.
    """
    from PIL import Image

    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    pictures = [path for path in files if path.suffix.lower() in suffixes]
    if not pictures:
        raise ValueError(f"The folder {folder} holds no pictures.")
    if len(pictures) < len(files):
        names = ", ".join(path.name for path in files if path not in pictures)
        print(f"no pictures by their names: {names}", file=sys.stderr)
    yield from pictures


def ask_about_each(args: Namespace, files: list[Path]) -> int:
    """The same question about each picture; 1 if some could not be read."""
    from tqdm.auto import tqdm

    from .answering import Answerer, load, open_picture, user_message

    answer = Answerer(*load(args), args)
    status = 0
    with tqdm(total=len(files), unit="picture", disable=None) as bar:
        for start in range(0, len(files), args.batch_size):
            batch = {}
            for file in files[start : start + args.batch_size]:
                try:
                    batch[file] = open_picture(str(file))
                except ValueError as error:
                    bar.write(f"error: {error}", file=sys.stderr)
                    status = 1
            chats = [[user_message([picture], args.question)] for picture in batch.values()]
            for file, text in zip(batch, answer(chats) if chats else ()):
                bar.clear()
                if args.json:
                    print_json(args, [str(file)], text)
                else:
                    print(f"{file.name}: {text}", flush=True)
            bar.update(min(args.batch_size, len(files) - start))
    return status


def print_json(args: Namespace, pictures: list[str], answer: str) -> None:
    found = {"images": pictures, "question": args.question, "answer": answer}
    print(json.dumps(found, ensure_ascii=False), flush=True)
