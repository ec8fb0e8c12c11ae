# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Ask a model about scenes it was not trained on, and once more about black pictures.

    python examples/evaluate_scenes.py --model_name_or_path FOLDER --scenes 1000

Prints, for each kind of question: exact match of what `generate` answers greedily; the same with every picture black;
and the share of the commonest answer, which a good guesser reaches. Descriptions are scored by their objects too (F1).
"""

import argparse
import json
from collections import Counter, defaultdict
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import transformers_aurea  # noqa: F401, the Auto classes know Aurea from here on
from transformers_aurea.scenes import IMAGE_SIZE, KINDS, describe_f1, make_scene, scene_digest, test_seeds, train_seeds


BLACK = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))


@torch.inference_mode()
def answers(model, processor, asked: list[tuple[Image.Image, str]], batch_size: int) -> list[str]:
    """What the model says, in the order of the questions; questions of like length share a batch."""
    order = sorted(range(len(asked)), key=lambda index: len(asked[index][1]))
    found = [""] * len(asked)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        conversations = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
            for picture, question in (asked[index] for index in batch)
        ]
        inputs = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device)
        generated = model.generate(**inputs, do_sample=False, max_new_tokens=48)
        texts = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for index, text in zip(batch, texts):
            found[index] = text.strip()
    return found


def evaluate(model, processor, seeds, batch_size: int = 64, recolor=None) -> dict[str, dict[str, float]]:
    """Scores by kind and, under "all", over all questions; of a recolored world also over those with a new word."""
    questions = []
    for seed in seeds:
        picture, asked = make_scene(seed, recolor=recolor)
        questions += [(picture, *question) for question in asked]
    new_words = {word for word, _ in (recolor or {}).values()}
    seen = answers(model, processor, [(picture, question) for picture, _, question, _ in questions], batch_size)
    blind = answers(model, processor, [(BLACK, question) for _, _, question, _ in questions], batch_size)

    by_kind = defaultdict(list)
    for (_, kind, question, expected), with_picture, with_black in zip(questions, seen, blind):
        kinds = (kind, "all", "new words") if any(word in question + expected for word in new_words) else (kind, "all")
        for name in kinds:
            by_kind[name].append((expected, with_picture, with_black))
    scores = {}
    for kind in (*KINDS, "all", "new words"):
        rows = by_kind[kind]
        if not rows:
            continue
        scores[kind] = {
            "questions": len(rows),
            "exact_match": sum(expected == seen for expected, seen, _ in rows) / len(rows),
            "black_picture": sum(expected == blind for expected, _, blind in rows) / len(rows),
        }
        if kind in KINDS:
            commonest = Counter(expected for expected, _, _ in rows).most_common(1)[0][1]
            scores[kind]["commonest_answer"] = commonest / len(rows)
        if kind == "describe":
            scores[kind]["f1"] = sum(describe_f1(seen, expected) for expected, seen, _ in rows) / len(rows)
            scores[kind]["black_picture_f1"] = sum(describe_f1(b, expected) for expected, _, b in rows) / len(rows)
    return scores


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--scenes", type=int, default=1000, help="test pictures (default: 1000)")
    parser.add_argument("--first_scene", type=int, default=0, help="skip so many test pictures")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--train_scenes", type=int, default=0, help="look for test pictures among so many of training")
    parser.add_argument("--recolor", type=json.loads, help='{"black": ["turquoise", [64, 224, 208]]}: a new color')
    parser.add_argument("--output", type=Path, help="write the scores there, as JSON")
    args = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path, device_map="auto").eval()
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    seeds = test_seeds(args.first_scene + args.scenes)[args.first_scene :]
    scores = evaluate(model, processor, seeds, args.batch_size, args.recolor)
    print(f"{'kind':<12} {'questions':>9} {'exact':>7} {'black':>7} {'commonest':>9}")
    for kind, row in scores.items():
        commonest = f"{row['commonest_answer']:9.1%}" if "commonest_answer" in row else ""
        f1 = f"  F1 {row['f1']:.3f}, black {row['black_picture_f1']:.3f}" if "f1" in row else ""
        print(
            f"{kind:<12} {row['questions']:>9} {row['exact_match']:>7.1%} {row['black_picture']:>7.1%} {commonest}{f1}"
        )
    if args.train_scenes:
        trained = {scene_digest(make_scene(seed, kinds=())[0]) for seed in train_seeds(args.train_scenes)}
        equal = sum(scene_digest(make_scene(seed, kinds=())[0]) in trained for seed in seeds)
        print(f"{equal} of {len(seeds)} test pictures equal one of {args.train_scenes} training pictures")
        scores["all"]["equal_to_training_pictures"] = equal
    if args.output:
        args.output.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
