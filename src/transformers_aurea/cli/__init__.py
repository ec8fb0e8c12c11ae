# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The command `aurea`: one module per sub-command, found by the table below.

    aurea ask cat.png "What is on the sofa?"
    aurea COMMAND --help

A sub-command `name` is a module `name.py` here with

    a docstring                 its first line is the help, all of it the description
    add_arguments(parser)       its options, of type `argparse.ArgumentParser`
    run(args) -> int | None     what it does; `args.parser.error(...)` ends it as wrong usage; None is success

At import such a module needs nothing but Python: torch, transformers and the package around are imported in `run`, for
the help comes at once. One that hands all its arguments on, to a script with options of its own, has
`add_arguments = hand_on` and finds them in `args.arguments`.

Output goes to standard output, as text or, with `--json`, one JSON object a line; progress bars and warnings go to
standard error. Status 0 is success, 1 an error, 2 wrong usage, 130 Ctrl-C; `errors` says an error in one line.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module

from .errors import errors_in_one_line


COMMANDS = ("ask", "chat", "look", "info", "convert", "train", "evaluate", "bench", "serve", "demo")


def build_parser() -> ArgumentParser:
    """The parser of all sub-commands; what it makes of arguments has `run` and `parser` of the one that was named."""
    parser = ArgumentParser(
        prog="aurea",
        description="Aurea, a vision-language model with two eyes, from the command line.",
        epilog="An error is one line; --debug shows where it comes from.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f".{name}", __name__)
        command = commands.add_parser(
            name,
            help=module.__doc__.splitlines()[0],
            description=module.__doc__,
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=module.run, parser=command)
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a sub-command; without `argv`, the one of the process's own arguments.

    Raises:
        SystemExit: with status 2 where the arguments are wrong, with 0 for help.
    """
    args = build_parser().parse_args(argv)
    status = args.run(args)
    sys.stdout.flush()  # a reader that has gone is met here, not on the way out
    return status or 0


def run_command() -> int:
    """What the process does whose command is `aurea`."""
    errors_in_one_line()
    return main()
