# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""`python -m transformers_aurea` is the command `aurea`."""

import sys

from .cli import run_command


if __name__ == "__main__":
    sys.exit(run_command())
