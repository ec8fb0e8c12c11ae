# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Teach small vision encoders, each alone, what their patches show: what published weights are to real ones.

    python examples/pretrain_encoders.py --output_dir encoders --encoders siglip resnet

On scenes of up to two objects a linear layer reads, from an encoder's features of each patch, the color, the shape and
the size of the object that covers it, or that there is none. The encoders are kept and the linear layers are not. Each
learns from the same pictures in the same order. `make_embedded_model.py --encoders_dir encoders` begins with them.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from make_embedded_model import dinov2, let_patches_differ, resnet, siglip, view_of
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel

from transformers_aurea import AureaImageProcessor
from transformers_aurea.cli.errors import errors_in_one_line
from transformers_aurea.scenes import (
    COLORS,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    make_scene,
    object_mask,
    scene_objects,
    train_seeds,
)
from transformers_aurea.scenes import test_seeds as seeds_to_test


# As `make_embedded_model.py` has them.
ENCODERS = {"siglip": siglip(64), "resnet": resnet(64), "resnet:128": resnet(128), "dinov2": dinov2(64)}
WORDS = {"color": COLORS, "shape": SHAPES, "size": SIZES}
MAX_OBJECTS = 2
BATCH_SIZE = 32
SIDE = 14  # patches
# A patch is an object's where it covers at least so much of it.
LEAST_COVER = 0.3


def patch_labels(seed: int) -> np.ndarray:
    """Numbers of color, shape and size words at each patch, one beyond the last where there is no object: (3, 196)."""
    labels = np.array([len(words) for words in WORDS.values()])[:, None].repeat(SIDE * SIDE, axis=1)
    for scene_object in scene_objects(seed, max_objects=MAX_OBJECTS):  # from back to front
        patch = IMAGE_SIZE // SIDE
        cover = object_mask(scene_object).reshape(SIDE, patch, SIDE, patch).mean(axis=(1, 3)).ravel()
        names = [words.index(getattr(scene_object, kind)) for kind, words in WORDS.items()]
        labels[:, cover >= LEAST_COVER] = np.array(names)[:, None]
    return labels


class PatchReader(nn.Module):
    """An encoder and a linear layer: pictures (B, 3, 112, 112) → scores of each kind's words (B, 196, words + 1)."""

    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        self.encoder = encoder
        self.sizes = [len(words) + 1 for words in WORDS.values()]
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, sum(self.sizes))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = self.encoder(pixels).last_hidden_state
        if features.ndim == 4:  # a map (B, C, h, w)
            features = features.flatten(2).transpose(1, 2)
        features = features[:, -SIDE * SIDE :]  # a class token stands before the patches
        return self.head(self.norm(features)).split(self.sizes, dim=-1)


def batch(processor: AureaImageProcessor, seeds) -> tuple[torch.Tensor, torch.Tensor]:
    pictures = [make_scene(seed, kinds=(), max_objects=MAX_OBJECTS)[0] for seed in seeds]
    labels = np.stack([patch_labels(seed) for seed in seeds])  # (B, 3, 196)
    return processor(pictures, return_tensors="pt")["pixel_values"][:, 0], torch.from_numpy(labels)


def patch_loss(scores: tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """The mean over objects' patches and that over empty ones, which are far more, summed over kinds."""
    shown = labels[:, 0] < len(COLORS)
    losses = sum(F.cross_entropy(one.mT, labels[:, idx], reduction="none") for idx, one in enumerate(scores))
    return losses[shown].mean() + losses[~shown].mean()


@torch.no_grad()
def right(reader: PatchReader, processor: AureaImageProcessor, number: int) -> dict[str, float]:
    """The share of patches of objects, in test pictures, that are named rightly, by kind."""
    pixels, labels = batch(processor, seeds_to_test(number))
    scores = reader.eval()(pixels)
    shown = labels[:, 0] < len(COLORS)
    hits = [one.argmax(-1) == labels[:, idx] for idx, one in enumerate(scores)]
    return {kind: hit[shown].float().mean().item() for kind, hit in zip(WORDS, hits)}


def pretrain(name: str, seed: int, pictures: int, learning_rate: float) -> tuple[nn.Module, dict[str, float]]:
    torch.manual_seed(seed)
    settings = ENCODERS[name]
    encoder = AutoModel.from_config(AutoConfig.for_model(**settings))
    let_patches_differ(encoder)
    width = settings.get("hidden_size") or settings["hidden_sizes"][-1]
    reader, processor = (
        PatchReader(encoder, width),
        AureaImageProcessor(**view_of(name.split(":")[0]), do_spatial_view=False),
    )
    optimizer = torch.optim.AdamW(reader.parameters(), lr=learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    steps = pictures // BATCH_SIZE
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    seeds, start = train_seeds(steps * BATCH_SIZE), time.monotonic()
    for step in range(steps):
        pixels, labels = batch(processor, seeds[step * BATCH_SIZE : (step + 1) * BATCH_SIZE])
        scores = reader.train()(pixels)
        loss = patch_loss(scores, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"{name}: step {step + 1} of {steps}, loss {loss:.3f}, {time.monotonic() - start:.0f} s", flush=True)
    return encoder.eval(), right(reader, processor, 200)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--encoders", nargs="+", default=list(ENCODERS), choices=list(ENCODERS))
    parser.add_argument("--pictures", type=int, default=32_000, help="to learn from, 32 a step (default: 32000)")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.pictures < BATCH_SIZE:
        parser.error(f"--pictures must be at least {BATCH_SIZE}, a step's, not {args.pictures}")
    for name in args.encoders:
        encoder, shares = pretrain(name, args.seed, args.pictures, args.learning_rate)
        encoder.save_pretrained(args.output_dir / name)
        print(
            f"{name}: {', '.join(f'{kind} {share:.1%}' for kind, share in shares.items())} of objects' patches right"
        )


if __name__ == "__main__":
    errors_in_one_line()
    main()
