# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What the example scripts share."""

import os
import sys
from itertools import pairwise

from huggingface_hub.errors import HFValidationError


# The extra of this package that installs what an example imports.
EXTRAS = {"matplotlib": "bench", "datasets": "train", "peft": "train", "trl": "train"}
# Options that name a model's folder, or its id on a hub.
MODEL_OPTIONS = ("--model", "--model_name_or_path", "--vision", "--spatial_vision", "--text")


def errors_in_one_line():
    """From now on an error ends the process with one line and status 1. `--debug` among the arguments, which takes it
    out of them, leaves the traceback."""
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        return

    def print_error(kind: type[BaseException], error: BaseException, traceback):
        if not issubclass(kind, Exception):  # Ctrl-C
            return sys.__excepthook__(kind, error, traceback)
        message = " ".join(str(error).split()) or kind.__name__
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            message += f'. Install it by: pip install "transformers-aurea[{EXTRAS[error.name]}]"'
        if isinstance(error, HFValidationError) or (isinstance(error, OSError) and error.errno is None):
            message = "".join(f"{option} {name} is no folder. " for option, name in _absent_models()) + message
        print(f"error: {message} (--debug shows where)", file=sys.stderr)

    sys.excepthook = print_error


def _absent_models() -> list[tuple[str, str]]:
    """Options and names of models that were given and are no folders. What a hub answers often does not name them."""
    words = [word for argument in sys.argv[1:] for word in argument.split("=", 1 if argument.startswith("--") else 0)]
    return [(option, name) for option, name in pairwise(words) if option in MODEL_OPTIONS and not os.path.isdir(name)]
