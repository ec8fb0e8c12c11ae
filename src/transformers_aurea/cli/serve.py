# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""serve a model over HTTP, to clients of OpenAI's API

    aurea serve                          the embedded model, on http://localhost:8000/v1
    aurea serve my-model --port 9000     a folder or hub id, and options of `transformers serve`
    aurea serve --help                   all of these

This is `transformers serve` after importing the package: an Aurea needs no --trust-remote-code.
"""

import os
import sys
from argparse import Namespace
from importlib import import_module

from .errors import INTERRUPTED, is_interrupt
from .options import hand_on


REQUIRED = ("fastapi", "openai", "pydantic", "uvicorn")

add_arguments = hand_on


def run(args: Namespace) -> int | None:
    for name in REQUIRED:  # an error names the extra
        import_module(name)
    from transformers.cli.transformers import app

    from .. import embedded_model_path

    model, options = embedded_model_path(), args.arguments
    if options and not options[0].startswith("-"):
        model, *options = options
    if os.path.exists(model) and not os.path.isfile(os.path.join(model, "config.json")):
        raise ValueError(f"{model} is no model: it is not a folder with a config.json.")
    hook = sys.excepthook
    try:
        app(["serve", model, *options], prog_name="aurea")
    except OSError as error:
        if os.path.exists(model):
            raise
        raise ValueError(f"{model} is no folder, and no hub's model that could be had: {error}") from error
    except SystemExit as ended:  # the server's end, an error among them
        if is_interrupt(ended):
            return INTERRUPTED
        raise
    finally:
        sys.excepthook = hook  # typer has one of its own
