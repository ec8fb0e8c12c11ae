# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""time a model on this machine: pictures, first tokens, further tokens

    aurea bench
    aurea bench my-model --batch_sizes 1 8 32 --device cuda --dtype bfloat16 --json

For each batch size the median of several runs after some that do not count, and the fastest and slowest: milliseconds
to encode a picture, to the first token of an answer with its picture, and for each further token; tokens per second;
and the most memory held. What a run may hold on a CPU is the process's, of all batch sizes so far.
"""

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from .options import (
    add_named_model_arguments,
    check_output,
    check_picture,
    name_model,
    whole_number,
    write_json,
)


def add_arguments(parser: ArgumentParser) -> None:
    add_named_model_arguments(parser)
    parser.add_argument(
        "--batch_sizes", type=whole_number(1), nargs="+", default=[1], help="questions at a time (default: 1)"
    )
    parser.add_argument("--new_tokens", type=whole_number(1), default=32, help="after the first (default: 32)")
    parser.add_argument("--repeats", type=whole_number(1), default=5, help="runs that count (default: 5)")
    parser.add_argument("--warmup", type=whole_number(0), default=1, help="runs before them (default: 1)")
    parser.add_argument("--image", help="file or URL that is asked about (default: a made-up picture)")
    parser.add_argument("--question", default="Describe the image.", help="(default: Describe the image.)")
    parser.add_argument("--output", type=Path, help="write the times there, as JSON")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(args: Namespace) -> None:
    name_model(args)
    check_output(args)
    if not args.question.strip():
        args.parser.error("the question is empty")
    if args.image is not None:
        check_picture(args, args.image)
    if len({*args.batch_sizes}) < len(args.batch_sizes):
        args.parser.error(f"--batch_sizes {' '.join(map(str, args.batch_sizes))}: give each size once")
    from tqdm.auto import tqdm

    from ..scenes import make_scene
    from .answering import load, open_picture
    from .timing import describe_machine, question_about, time_answers

    picture = make_scene(0, kinds=())[0] if args.image is None else open_picture(args.image)
    model, processor = load(args)
    rows = []
    for size in tqdm(args.batch_sizes, unit="batch size", disable=None):
        inputs = question_about(processor, picture, args.question, size).to(model.device)
        rows.append(time_answers(model, inputs, args.new_tokens, args.repeats, args.warmup))
    found = {"model": args.model or "embedded", **describe_machine(model), "batches": rows}
    found |= {"new_tokens": args.new_tokens, "repeats": args.repeats, "warmup": args.warmup}
    if args.output:
        write_json(args.output, found)
    if args.json:
        print(json.dumps(found))
    else:
        write(found)


def write(found: dict) -> None:
    """Prints the times as a table."""
    from .describing import readable

    kernel = found["fusion"]
    attention = ", ".join(sorted({str(name) for name in found["attention"].values()}))
    print(f"{found['model']}: {found['dtype']} on {found['device']}, {found['threads']} threads of the processor")
    print(f"attention {attention}; fusion {kernel['implementation']}, {kernel['reason']}")
    print(
        f"torch {found['torch']}, transformers {found['transformers']}; median of {found['repeats']} (least, most)\n"
    )
    columns = {
        "ms_per_picture": "ms per picture",
        "ms_to_first_token": "ms to first token",
        "ms_per_token": "ms per token",
    }
    print(f"{'batch':>5} {''.join(f'{title:>26}' for title in columns.values())} {'tokens/s':>10} {'memory':>10}")
    for row in found["batches"]:
        cells = [
            "-" if (one := row[name]) is None else f"{one['median']:.1f} ({one['least']:.1f}, {one['most']:.1f})"
            for name in columns
        ]
        speed = "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.1f}"
        text = "".join(f"{cell:>26}" for cell in cells)
        print(f"{row['batch_size']:>5} {text} {speed:>10} {readable(row['peak_bytes']):>10}")
