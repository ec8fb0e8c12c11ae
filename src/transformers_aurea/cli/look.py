# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""draw where a model looks

    aurea look cat.png --question "What is on the sofa?"
    aurea look cat.png --question "What is on the sofa?" --at 120 80 --output cat.pdf
    aurea look cat.png --output sweep.gif

Draws where each word of the answer looked, what a patch looks at in each layer of the fusion, and what each encoder
contributes. A .gif is a sweep over the patches of the first picture. Needs matplotlib.
"""

from argparse import ArgumentParser, Namespace

from .options import add_model_arguments, check_picture


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", metavar="IMAGE", help="file, URL, or - for standard input")
    parser.add_argument("--question", help="about the pictures (default: only how patches look at patches is drawn)")
    parser.add_argument("--answer", help="whose words to follow (default: what the model says)")
    parser.add_argument("--at", type=float, nargs=2, metavar=("X", "Y"), help="the patch, by a point in pixels")
    parser.add_argument("--output", default="look.png", help=".png, .jpg, .svg, .pdf or .gif (default: look.png)")
    add_model_arguments(parser)


def run(args: Namespace) -> None:
    for name in args.pictures:
        if name != "-":
            check_picture(args, name)
    if args.answer is not None and args.question is None:
        args.parser.error("--answer without --question: say what it answers")
    if args.question is not None and not args.question.strip():
        args.parser.error("the question is empty")
    from ..visualization import look
    from .answering import load, open_picture

    pictures = [open_picture(name) for name in args.pictures]
    reading = look(pictures, args.question, *load(args), args.output, answer=args.answer, at=args.at)
    if reading.answer is not None:
        print(reading.answer)
    print(args.output)
