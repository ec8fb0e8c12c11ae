# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Questions about test scenes as a task of lm-eval."""

from datasets import Dataset

from transformers_aurea.scenes import make_scene, test_seeds


def questions(scenes: int, **metadata) -> dict[str, Dataset]:
    """All questions about the first test scenes."""
    rows = [
        {"image": picture, "kind": kind, "question": question, "answer": answer}
        for picture, asked in map(make_scene, test_seeds(scenes))
        for kind, question, answer in asked
    ]
    return {"test": Dataset.from_list(rows)}


def score(doc: dict, results: list[str]) -> dict[str, float]:
    return {"exact_match": float(results[0].strip() == doc["answer"])}
