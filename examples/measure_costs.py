# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What a model of the scene world costs, and how alike the maps of its encoders and its fusion are.

    python examples/measure_costs.py [--model_name_or_path FOLDER] --output costs.json

Times are medians, on the threads that torch has (`OMP_NUM_THREADS=1` for one core), of pictures encoded eight at a
time, and of words generated one by one after a picture. FLOPs are those that `torch.utils.flop_counter` knows of:
products of matrices and convolutions, at two for each multiplication with its addition; what spatial-range attention
does besides its linear layers is not among them. Memory is the most that the process held in the gradient of eight
pictures, beyond what it held before.

Maps are alike by linear CKA, from 0 to 1 (Kornblith et al., https://arxiv.org/abs/1905.00414), with the unbiased
estimator of HSIC, over test pictures: each picture is one point, all that a map has of it its coordinates.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, AutoProcessor

from transformers_aurea import embedded_model_path
from transformers_aurea.cli.errors import errors_in_one_line
from transformers_aurea.cli.timing import peak_memory, question_about, times
from transformers_aurea.data_aurea import AureaDataCollator
from transformers_aurea.scenes import SceneDataset, make_scene, test_seeds, train_seeds


BATCH_SIZE = 8
REPEATS = 9
NEW_TOKENS = 32
QUESTION = "Describe the image."


def seconds(function, *args) -> float:
    """Median of several runs after one that does not count."""
    return statistics.median(times(function, *args, repeats=REPEATS))


def flops(function, *args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # others are not counted on a CPU
        function(*args, **kwargs)
    return counter.get_total_flops()


def training_memory(model, processor) -> float:
    """What forward and backward of eight pictures hold beyond the model, in MiB: measured before anything else, for a
    process never forgets its peak."""
    rows = SceneDataset(train_seeds(BATCH_SIZE))
    batch = AureaDataCollator(processor, independent_turns=True)([rows[idx] for idx in range(BATCH_SIZE)])
    before = peak_memory()
    model.train()(**batch).loss.backward()
    model.zero_grad()
    model.eval().requires_grad_(False)  # the counter of FLOPs stumbles over parameters that are given to modules
    return (peak_memory() - before) / 2**20


@torch.no_grad()
def costs(model, processor) -> dict[str, float]:
    pictures = [make_scene(seed, kinds=())[0] for seed in test_seeds(BATCH_SIZE)]
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    inputs = question_about(processor, pictures[0], QUESTION, 1)

    def generate(number: int):
        return model.generate(**inputs, do_sample=False, max_new_tokens=number, min_new_tokens=number)

    encode = model.get_image_features
    first, last = seconds(generate, 1), seconds(generate, 1 + NEW_TOKENS)
    return {
        "flops_per_picture": flops(encode, pixels[:1]),
        "flops_per_token": (flops(generate, 1 + NEW_TOKENS) - flops(generate, 1)) / NEW_TOKENS,
        "seconds_per_picture": seconds(encode, pixels) / BATCH_SIZE,
        "seconds_per_token": (last - first) / NEW_TOKENS,
        "seconds_to_first_token": first,
    }


def centered_gram(features: torch.Tensor) -> torch.Tensor:
    """Of features (n, d) the products (n, n) that the unbiased estimator of HSIC takes: zero on the diagonal, and
    summing to zero in each row."""
    size = len(features)
    gram = features.double() @ features.double().T
    gram.fill_diagonal_(0)
    means = gram.sum(dim=1) / (size - 2)
    gram = gram - means[:, None] - means[None, :] + means.sum() / (size - 1)
    return gram.fill_diagonal_(0)


def cka(left: torch.Tensor, right: torch.Tensor) -> float:
    """Linear CKA of two sets of features of the same n points, (n, d) and (n, e)."""
    left, right = centered_gram(left), centered_gram(right)
    return ((left * right).sum() / ((left * left).sum() * (right * right).sum()).sqrt()).item()


@torch.no_grad()
def likeness(model, processor, num_pictures: int) -> dict[str, float]:
    """CKA of each two of the maps of the encoders and the fused tokens, by their names."""
    maps = {"vision": [], "spatial_vision": [], "fused": []}

    def keep(module, features, tokens):
        for kept, value in zip(maps.values(), (*features, tokens)):
            if value is not None:
                kept.append(value.flatten(1).float())

    handle = model.model.fusion.register_forward_hook(keep)
    seeds = test_seeds(num_pictures)
    for start in range(0, num_pictures, BATCH_SIZE):
        pictures = [make_scene(seed, kinds=())[0] for seed in seeds[start : start + BATCH_SIZE]]
        model.get_image_features(processor(images=pictures, return_tensors="pt")["pixel_values"])
    handle.remove()
    known = {name: torch.cat(kept) for name, kept in maps.items() if kept}
    return {f"{a}, {b}": cka(known[a], known[b]) for a, b in itertools.combinations(known, 2)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", help="folder or hub id (default: the embedded model)")
    parser.add_argument("--pictures", type=int, default=200, help="test pictures of the likeness (default: 200)")
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    args = parser.parse_args()
    if args.pictures < 4:
        parser.error(f"--pictures must be at least 4, not {args.pictures}")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.parent}")

    folder = args.model_name_or_path or embedded_model_path()
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    found = {"parameters": model.num_parameters(), "threads": torch.get_num_threads()}
    found["training_mib"] = training_memory(model, processor)
    found |= costs(model, processor) | {"cka": likeness(model, processor, args.pictures)}
    print(json.dumps(found, indent=1))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    errors_in_one_line()
    main()
