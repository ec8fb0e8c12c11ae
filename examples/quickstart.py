# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Ask Aurea about a picture, with nothing but transformers' Auto classes.

    python examples/quickstart.py [--model FOLDER] [--image PICTURE] [--prompt "What is in this picture?"]

Without `--model` the tiny published checkpoint of the tests is converted first. Its weights are random numbers, so its
words are noise; they are the same noise as the original code's.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor


FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "fixtures"


def convert_tiny_checkpoint(output: Path) -> Path:
    if not output.exists():
        command = [sys.executable, "-m", "transformers_aurea.convert_aurea_weights_to_hf", "--verify"]
        command += ["--input_dir", FIXTURES / "published", "--config", FIXTURES / "tiny_config.json"]
        subprocess.run([*command, "--output_dir", output], check=True)
    return output


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a converted model")
    parser.add_argument("--image", default=str(FIXTURES / "image_rgb.png"), help="path or URL of a picture")
    parser.add_argument("--prompt", default="How many remote control devices are in this image?")
    parser.add_argument("--max_new_tokens", type=int, default=12)
    args = parser.parse_args()

    if args.model is not None and not args.model.is_dir():
        parser.error(f"--model {args.model} is no folder")
    folder = args.model if args.model is not None else convert_tiny_checkpoint(Path("aurea-tiny"))
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    content = [{"type": "image", "path": args.image}, {"type": "text", "text": args.prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    generated = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    tokens = generated[0, inputs["input_ids"].shape[1] :]
    print(f"picture: {args.image}, pixel_values {tuple(inputs['pixel_values'].shape)}")
    print(f"prompt:  {args.prompt}")
    print(f"answer:  {processor.decode(tokens)!r}, tokens {tokens.tolist()}")


if __name__ == "__main__":
    main()
