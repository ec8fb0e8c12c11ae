# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""How the command `aurea` and the example scripts end where something goes wrong: in one line."""

import os
import sys
from itertools import pairwise


# The extra of this package that installs what a command or an example imports.
EXTRAS = {
    "gradio": "demo",
    "matplotlib": "visualization",
    **dict.fromkeys(("datasets", "peft", "trl"), "train"),
    **dict.fromkeys(("fastapi", "openai", "pydantic", "requests", "uvicorn"), "serve"),
}
# Options that name a model's folder, or its id on a hub.
MODEL_OPTIONS = ("--model", "--compare", "--model_name_or_path", "--vision", "--spatial_vision", "--text")

INTERRUPTED, PIPE_CLOSED = 130, 141  # 128 and the signal's number, as shells have it


def errors_in_one_line():
    """From now on an error ends the process with one line and status 1, Ctrl-C with one and status 130. Where nobody
    reads on what is printed (`| head -1`), it ends without a word. `--debug` among the arguments, which takes it out
    of them, leaves the traceback."""
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
        return

    def print_error(kind: type[BaseException], error: BaseException, traceback):
        if is_interrupt(error):
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed on the way out
            sys.exit(PIPE_CLOSED)
        print(f"error: {message(error)} (--debug shows where)", file=sys.stderr)

    sys.excepthook = print_error


def message(error: Exception) -> str:
    """What an error says, in one line, and what helps where that is known."""
    from huggingface_hub.errors import HFValidationError

    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        text += f'. Install it by: pip install "transformers-aurea[{EXTRAS[error.name]}]"'
    if isinstance(error, HFValidationError) or (isinstance(error, OSError) and error.errno is None):
        text = "".join(f"{option} {name} is no folder. " for option, name in _absent_models()) + text
    return text


def is_interrupt(error: BaseException | None) -> bool:
    """Whether it is Ctrl-C, or what a library made of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _absent_models() -> list[tuple[str, str]]:
    """Options and names of models that were given and are no folders. What a hub answers often does not name them."""
    words = [word for argument in sys.argv[1:] for word in argument.split("=", 1 if argument.startswith("--") else 0)]
    return [(option, name) for option, name in pairwise(words) if option in MODEL_OPTIONS and not os.path.isdir(name)]
