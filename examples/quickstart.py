# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Ask Aurea about pictures, with nothing but transformers' Auto classes.

    python examples/quickstart.py [--model FOLDER] [--image PICTURE] [--prompt "How many stars are there?" ...]

Without `--model` the embedded model answers, which was trained on made-up scenes; without `--image` it sees a scene
that it was not trained on, which is written to `scene.png`, and is asked the scene's own questions.
"""

import argparse

from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_aurea import embedded_model_path
from transformers_aurea.cli.errors import errors_in_one_line
from transformers_aurea.scenes import make_scene, test_seeds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder or hub id (default: the embedded model)")
    parser.add_argument("--image", help="path or URL of a picture (default: a scene)")
    parser.add_argument("--scene", type=int, default=1, help="which of the scenes that were not trained on")
    parser.add_argument("--prompt", nargs="+", help="what to ask (default: the scene's questions)")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    args = parser.parse_args()
    if args.image is not None and args.prompt is None:
        parser.error("with --image, --prompt must say what to ask")
    if args.scene < 0:
        parser.error(f"--scene must be 0 or greater, not {args.scene}")
    if args.max_new_tokens < 1:
        parser.error(f"--max_new_tokens must be at least 1, not {args.max_new_tokens}")

    image, asked = args.image, [(prompt, None) for prompt in args.prompt or ()]
    if image is None:
        picture, questions = make_scene(test_seeds(args.scene + 1)[-1])
        picture.save("scene.png")
        image, asked = "scene.png", asked or [(question, answer) for _, question, answer in questions]

    folder = args.model or embedded_model_path()
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    print(f"{args.model or 'The embedded model'}: {model.num_parameters():,} parameters, looking at {image}")
    for prompt, expected in asked:
        content = [{"type": "image", "path": image}, {"type": "text", "text": prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        generated = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        answer = processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        verdict = "" if expected is None or answer == expected else f"    (it is: {expected})"
        print(f"  {prompt:<64} {answer}{verdict}")


if __name__ == "__main__":
    errors_in_one_line()
    main()
