# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Ask a model about scenes: what `aurea evaluate` does. See `transformers_aurea.evaluate_scenes`."""

import sys

from transformers_aurea.cli import main
from transformers_aurea.cli.errors import errors_in_one_line
from transformers_aurea.evaluate_scenes import *


if __name__ == "__main__":
    errors_in_one_line()
    main(["evaluate", *sys.argv[1:]])
