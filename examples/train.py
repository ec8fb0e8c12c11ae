# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Train an Aurea: what `aurea train` does, as a script for torchrun and accelerate. See `transformers_aurea.train`."""

from transformers_aurea.cli.errors import errors_in_one_line
from transformers_aurea.train import *


if __name__ == "__main__":
    errors_in_one_line()
    main()
