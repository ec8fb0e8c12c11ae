# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Options that several sub-commands have, and what they are checked for before anything is loaded."""

import json
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path


DTYPES = ("auto", "float32", "bfloat16", "float16")


def hand_on(parser: ArgumentParser) -> None:
    """All arguments as they are, `--help` among them, in `args.arguments`."""
    parser.prefix_chars = "\0"  # nothing begins with it: none is an option here
    parser.add_argument("arguments", nargs="*")


def whole_number(least: int):
    """A type of arguments: an integer that is not less."""

    def parse(text: str) -> int:
        if not text.removeprefix("-").isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"must be an integer of at least {least}, got {text!r}")
        return int(text)

    return parse


def number(least: float, most: float):
    """A type of arguments: a number in between."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not least <= value <= most:
            raise ArgumentTypeError(f"must be a number from {least} to {most}, got {text!r}")
        return value

    return parse


def add_model_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument("--model", help="folder or hub id (default: the embedded model)")
    group.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps, ...")
    group.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they were saved)")
    group.add_argument("--use_kernels", action="store_true", help="compute the fusion with the compiled kernel")
    group.add_argument("--trust_remote_code", action="store_true", help="run the code that is in the model's folder")


def add_named_model_arguments(parser: ArgumentParser) -> None:
    """As `add_model_arguments`, where no other argument stands alone: the model may, and `name_model` knows it."""
    parser.add_argument("named_model", nargs="?", metavar="MODEL", help="the same as --model MODEL")
    add_model_arguments(parser)
    parser.add_argument("--model_name_or_path", help="the same, as `aurea train` says it")


def name_model(args: Namespace) -> None:
    """Ends as wrong usage if the model was named twice."""
    given = [name for name in (args.named_model, args.model, args.model_name_or_path) if name is not None]
    if len(given) > 1:
        args.parser.error(f"the model is named twice: {' and '.join(given)}")
    args.model = given[0] if given else None


def check_output(args: Namespace) -> None:
    """Ends as wrong usage if `--output` cannot be written."""
    if args.output is None:
        return
    if args.output.is_dir():
        args.parser.error(f"--output {args.output} is a folder: name a file")
    if not args.output.parent.is_dir():
        args.parser.error(f"--output {args.output}: there is no folder {args.output.parent}")


def write_json(file: Path, found: dict) -> None:
    """Writes a file whole or, where that fails, not at all."""
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if file.exists() and not file.is_file():  # a device, as /dev/stdout
        file.write_text(text)
        return
    unfinished = file.with_name(f"{file.name}.unfinished-{os.getpid()}")
    try:
        unfinished.write_text(text)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def add_generation_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("how it answers (default: as the model's generation config has it)")
    group.add_argument("--max_new_tokens", type=whole_number(1), help="longest answer")
    group.add_argument("--temperature", type=number(0, 100), help="0 takes the most likely token always")
    group.add_argument("--top_p", type=number(0, 1), help="sample from the likeliest tokens of this probability")
    group.add_argument("--top_k", type=whole_number(1), help="sample from so many tokens")
    group.add_argument(
        "--dynamic_top_k",
        type=whole_number(1),
        nargs=2,
        metavar=("MIN", "MAX"),
        help="the published sampling with a k that falls from MAX to MIN while it answers (published: 50 90)",
    )
    group.add_argument("--num_beams", type=whole_number(1), help="search with so many beams; nothing is streamed")
    group.add_argument("--seed", type=whole_number(0), help="of the sampling")


def check_generation_arguments(args: Namespace) -> None:
    """Ends as wrong usage where options exclude each other."""
    if args.temperature == 0 and (args.top_p is not None or args.top_k is not None or args.dynamic_top_k):
        args.parser.error("--temperature 0 does not sample: leave out --top_p, --top_k and --dynamic_top_k")
    if args.top_p == 0:
        args.parser.error("--top_p 0 leaves no token: give more than 0, or --temperature 0")
    if args.dynamic_top_k is None:
        return
    if args.dynamic_top_k[0] > args.dynamic_top_k[1]:
        args.parser.error(f"--dynamic_top_k needs MIN MAX, got {args.dynamic_top_k[0]} {args.dynamic_top_k[1]}")
    if args.top_p is not None or args.top_k is not None or args.num_beams is not None:
        args.parser.error("--dynamic_top_k takes the place of --top_p, --top_k and --num_beams: leave them out")


def check_picture(args: Namespace, name: str) -> None:
    """Ends as wrong usage if what is named cannot be a picture."""
    if not name.startswith(("http://", "https://")) and not Path(name).is_file():
        args.parser.error(f"{name or 'nothing'} is no picture: give a file or a URL")
