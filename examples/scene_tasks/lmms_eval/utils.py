# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Questions about test scenes as a task of lmms-eval."""

from datasets import Dataset
from PIL import Image

from transformers_aurea.scenes import make_scene


def questions(seeds: Dataset) -> Dataset:
    """All questions about the scenes of these seeds."""
    rows = [
        {"image": picture, "kind": kind, "question": question, "answer": answer}
        for picture, asked in map(make_scene, seeds["seed"])
        for kind, question, answer in asked
    ]
    return Dataset.from_list(rows)


def pictures(doc: dict) -> list[Image.Image]:
    return [doc["image"]]


def score(doc: dict, results: list[str]) -> dict[str, float]:
    return {"exact_match": float(results[0].strip() == doc["answer"])}
