# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What the example scripts share."""

import sys


# The extra of this package that installs what an example imports.
EXTRAS = {"matplotlib": "bench", "datasets": "train", "peft": "train", "trl": "train"}


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
        print(f"error: {message} (--debug shows where)", file=sys.stderr)

    sys.excepthook = print_error
