# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""ask a model about scenes that it was not trained on, and score its answers

    aurea evaluate --scenes 200
    aurea evaluate --model_name_or_path trained --output scores.json --blind

See `transformers_aurea.evaluate_scenes`, whose options these are.
"""

from argparse import Namespace

from .options import hand_on


add_arguments = hand_on


def run(args: Namespace) -> None:
    from ..evaluate_scenes import main

    main(args.arguments, prog=args.parser.prog)
