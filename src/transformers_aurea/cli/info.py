# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""say what a model is made of, and the memory that it needs

    aurea info
    aurea info my-model --json

Its parts, their sizes and types; how they meet; what trains in each stage; an estimate of memory; and whether the
compiled kernel can be used here. No weights are read: of a hub's model its configuration is enough.
"""

import json
from argparse import ArgumentParser, Namespace

from .options import DTYPES


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="folder or hub id (default: the embedded model)")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as they were saved)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the code that is in the model's folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object, nothing else")


def run(args: Namespace) -> None:
    from .describing import describe, write

    found = describe(args.model, args.dtype, args.trust_remote_code)
    if args.json:
        print(json.dumps(found))
    else:
        write(found)
