# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""open a page on which to ask, and to see where a model looks

    aurea demo                                  the embedded model, on http://127.0.0.1:7860
    aurea demo --model my-model --port 9000     a folder or hub id
    aurea demo --compare my-other-model         two models side by side

A click on the picture shows what that patch looks at, layer by layer; a click on a word of the answer where it looked.
The page loads nothing from elsewhere, and sends nothing there. Needs gradio.
"""

import socket
from argparse import ArgumentParser, Namespace
from pathlib import Path

from .options import add_model_arguments, whole_number


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--compare", metavar="MODEL", help="folder or hub id of a second model, beside the first")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for other machines too (default: 127.0.0.1)")
    parser.add_argument("--port", type=whole_number(0), default=7860, help="0 takes a free one (default: 7860)")
    add_model_arguments(parser)


def run(args: Namespace) -> None:
    try:
        listening = socket.create_server((args.host, args.port))
    except (OSError, OverflowError) as error:
        args.parser.error(f"--host {args.host} --port {args.port} cannot be had: {error}")
    with listening:
        import gradio  # noqa: F401  an error names the extra

        from ..demo import DemoModel
        from ..demo_page import serve
        from .answering import load

        models = []
        for name in [args.model] if args.compare is None else [args.model, args.compare]:
            model = load(Namespace(**{**vars(args), "model": name}))
            models.append(DemoModel("embedded model" if name is None else Path(name).name, *model))
        serve(models, listening)
