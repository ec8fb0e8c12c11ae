# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""train a model: all of it, parts of it, or adapters

    aurea train --dataset captions.json --image_folder images --stage align --output_dir aligned --do_train
    accelerate launch -m transformers_aurea train --dataset scenes --output_dir trained --do_train

See `transformers_aurea.train`, whose options and those of `transformers.TrainingArguments` these are.
"""

from argparse import Namespace

from .options import hand_on


add_arguments = hand_on


def run(args: Namespace) -> None:
    from ..train import main

    main(args.arguments, prog=args.parser.prog)
