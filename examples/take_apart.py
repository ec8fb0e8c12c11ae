# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Save a model's encoders and its language model as ordinary folders, to build another Aurea from.

    python examples/take_apart.py --output_dir parts [--model_name_or_path FOLDER]

Writes `vision` and `spatial_vision`, each with its image processor's settings, and `text` with the tokenizer.
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM
from transformers.image_processing_base import ImageProcessingMixin

from transformers_aurea import AureaForConditionalGeneration, AureaProcessor, embedded_model_path
from transformers_aurea.cli.errors import errors_in_one_line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--model_name_or_path", help="folder or hub id (default: the embedded model)")
    args = parser.parse_args()

    folder = args.model_name_or_path or embedded_model_path()
    model = AureaForConditionalGeneration.from_pretrained(folder)
    processor = AureaProcessor.from_pretrained(folder)

    encoders = {
        "vision": (model.model.vision_model, ""),
        "spatial_vision": (model.model.spatial_vision_model, "spatial_"),
    }
    for name, (encoder, prefix) in encoders.items():
        encoder.save_pretrained(args.output_dir / name)
        settings = {
            setting: getattr(processor.image_processor, prefix + setting)
            for setting in ("image_mean", "image_std", "resample")
        }
        ImageProcessingMixin(**settings).save_pretrained(args.output_dir / name)

    text = AutoModelForCausalLM.from_config(model.config.text_config)
    weights = {
        name: tensor
        for name, tensor in model.model.language_model.state_dict().items()
        if "cross_attention_block." not in name
    }
    text.base_model.load_state_dict(weights)
    text.set_output_embeddings(model.get_output_embeddings())
    text.generation_config = model.generation_config
    text.save_pretrained(args.output_dir / "text")
    processor.tokenizer.save_pretrained(args.output_dir / "text")
    print(*sorted(args.output_dir.iterdir()), sep="\n")


if __name__ == "__main__":
    errors_in_one_line()
    main()
