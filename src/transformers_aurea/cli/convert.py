# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""make a model folder of a published checkpoint or of a relative

    aurea convert --input_dir PUBLISHED --output_dir aurea --dtype bfloat16 --verify
    aurea convert --input_dir google/paligemma2-3b-mix-224 --output_dir paligemma2

What the input is decides what converts it: a PaliGemma or LLaVA of transformers, a Prismatic VLM or OpenVLA, else the
published layout of Aurea itself.
"""

from argparse import ArgumentParser, Namespace
from importlib import import_module
from pathlib import Path


# By the model type that a config.json says; the published layout needs none.
CONVERTERS = {
    "paligemma": "convert_relatives",
    "llava": "convert_relatives",
    "prismatic": "convert_prismatic",
    "openvla": "convert_prismatic",
}
PUBLISHED = "convert_aurea_weights_to_hf"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--input_dir", required=True, help="folder to convert, or hub id")
    parser.add_argument("--output_dir", required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--config", help="of the published layout: JSON file of its sizes")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the published layout: dtype of the weights, encoders excepted",
    )
    parser.add_argument("--max_shard_size", help="largest file to write (default: 5GB)")
    parser.add_argument(
        "--verify", action="store_true", help="read the folder back in a new process and compare it with its source"
    )


def run(args: Namespace) -> int:
    from ..convert_aurea_weights_to_hf import AUREA_FILE, ConversionError, resolve_input

    name, kind = converter_of(resolve_input(args.input_dir, ("config.json",)))
    if name == PUBLISHED and Path(args.input_dir).is_dir() and not Path(args.input_dir, AUREA_FILE).is_file():
        types = ", ".join(CONVERTERS)
        raise ConversionError(f"{args.input_dir} has neither {AUREA_FILE} nor a config.json of one of: {types}.")
    print(f"{args.input_dir} is {kind}: transformers_aurea.{name} converts it", flush=True)
    options = ("input_dir", "output_dir", "config", "dtype", "max_shard_size")
    arguments = [f"--{option}={vars(args)[option]}" for option in options if vars(args)[option] is not None]
    return import_module(f"...{name}", __name__).main(arguments + ["--verify"] * args.verify)


def converter_of(folder: Path) -> tuple[str, str]:
    """The module that converts a folder, and what that is taken for."""
    from ..convert_aurea_weights_to_hf import read_json

    file = folder / "config.json"
    model_type = read_json(file).get("model_type") if file.is_file() else None
    if model_type in CONVERTERS:
        return CONVERTERS[model_type], f"a '{model_type}'"
    return PUBLISHED, "in the published layout"
