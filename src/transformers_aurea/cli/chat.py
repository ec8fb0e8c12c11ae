# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""talk with a model about pictures, in the terminal

    aurea chat cat.png

A line is what you say. What was said before, and every picture shown, stays part of the conversation.

    /image PATH   show a picture (a file or URL) with what you say next
    /reset        begin anew, without pictures
    /quit         end, as Ctrl-D does
"""

import sys
from argparse import ArgumentParser, Namespace

from .options import add_generation_arguments, add_model_arguments, check_generation_arguments, check_picture


def add_arguments(parser: ArgumentParser) -> None:
    parser.usage = "%(prog)s [IMAGE...] [options]"
    parser.add_argument("pictures", nargs="*", metavar="IMAGE", help="file or URL, shown with what you say first")
    add_model_arguments(parser)
    add_generation_arguments(parser)


def run(args: Namespace) -> None:
    for name in args.pictures:
        if name == "-":
            args.parser.error("standard input, -, is what you say: give pictures as files or URLs")
        check_picture(args, name)
    check_generation_arguments(args)
    from .answering import Answerer, load, open_picture

    pictures = [open_picture(name) for name in args.pictures]
    talk(Answerer(*load(args), args), pictures)


def talk(answer, pictures: list) -> None:
    """Reads what is said, to the end; `answer` is an `Answerer`, `pictures` are shown with what is said first."""
    from .answering import open_picture, user_message

    if sys.stdin.isatty():
        import readline  # noqa: F401  what was said before comes back with the arrow keys

        print("/image PATH shows a picture, /reset begins anew, /quit ends.")
    conversation = []
    while (line := read_line()) is not None:
        command, _, argument = line.partition(" ")
        if command == "/quit":
            return
        if command == "/reset":
            conversation, pictures = [], []
        elif command == "/image":
            try:
                pictures = [*pictures, open_picture(argument.strip())]
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
        elif command.startswith("/"):
            print(f"error: there is no {command}, but /image PATH, /reset and /quit", file=sys.stderr)
        elif line:
            conversation.append(user_message(pictures, line))
            pictures = []
            [text] = answer([conversation], stream=True)
            conversation.append({"role": "assistant", "content": [{"type": "text", "text": text}]})


def read_line() -> str | None:
    """What is said next, None at the end."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
