# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Ask a model about scenes it was not trained on, and once more about black pictures and about the wrong ones.

For each kind of question: exact match of what `generate` answers greedily; the same with every picture black, and with
that of the scene before; and the share of the commonest answer, which a good guesser reaches. Descriptions are scored
by their objects too (F1). What is left when one encoder sees the mean of all pictures in the place of each says what
this encoder is worth to the model. Each picture is encoded once, and once more where an encoder is blinded.
"""

import argparse
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from .answering import AnsweringModel, answer_all, user_message
from .attention_reading import blinded
from .scenes import (
    IMAGE_SIZE,
    KINDS,
    SceneDataset,
    describe_f1,
    make_scene,
    scene_digest,
    train_seeds,
)


BLACK = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))


def evaluate(
    model, processor, seeds, batch_size: int = 64, *, controls: bool = True, blind: bool = False, **scene_options
) -> dict[str, dict[str, float]]:
    """Scores by kind and, under "all", over all questions; of a recolored world also over those with a new word.

    With `controls`, also what becomes of them with black and with wrong pictures, and with `blind` when one encoder
    sees the mean of all pictures. `scene_options` are those of `make_scene`: `max_objects`, `recolor`.
    """
    scenes = [make_scene(seed, **scene_options) for seed in seeds]
    questions = [(index, *question) for index, (_, asked) in enumerate(scenes) for question in asked]
    pictures = [picture for picture, _ in scenes]
    views = {"exact_match": pictures}
    if controls:
        views |= {"black_picture": [BLACK] * len(pictures), "wrong_picture": pictures[-1:] + pictures[:-1]}

    def ask(*views: list[Image.Image], desc: str, **settings) -> list[list[str]]:
        """The answers to all questions, for each of these views."""
        chats = [[user_message([shown[index]], asked)] for shown in views for index, _, asked, _ in questions]
        answering = AnsweringModel(model, processor, do_sample=False, max_new_tokens=48, **settings)
        found = [answer.text for answer in answer_all(answering, chats, batch_size, desc)]
        return [found[start : start + len(questions)] for start in range(0, len(found), len(questions))]

    said = ask(*views.values(), desc="scenes")
    if blind:
        mean = processor(images=pictures, return_tensors="pt")["pixel_values"].mean(dim=0)  # (views, 3, H, W)
        for name, view in model.config.views.items():
            views[f"blind_{name.removesuffix('_config')}"] = pictures
            unseen = partial(blinded, view=view, mean_picture=mean)
            said += ask(pictures, desc=f"without {name}", change_pixels=unseen)

    new_words = {word for word, _ in (scene_options.get("recolor") or {}).values()}
    by_kind = defaultdict(list)
    for (_, kind, question, expected), *found in zip(questions, *said):
        names = (kind, "all", "new words") if any(word in question + expected for word in new_words) else (kind, "all")
        for name in names:
            by_kind[name].append((expected, found))
    scores = {}
    for kind in filter(by_kind.get, (*KINDS, "all", "new words")):
        rows = by_kind[kind]
        scores[kind] = {"questions": len(rows)} | {
            view: sum(expected == found[index] for expected, found in rows) / len(rows)
            for index, view in enumerate(views)
        }
        if kind in KINDS:
            commonest = Counter(expected for expected, _ in rows).most_common(1)[0][1]
            scores[kind]["commonest_answer"] = commonest / len(rows)
        if kind == "describe":
            scores[kind] |= {
                f"{view}_f1": sum(describe_f1(found[index], expected) for expected, found in rows) / len(rows)
                for index, view in enumerate(views)
            }
    return scores


def weights_digest(model) -> str:
    """SHA-256 of a model's weights, whatever files they lie in: scores say by it what they are scores of."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def training_pictures(args_file: Path) -> Iterator[Image.Image]:
    """What `train.py --args_file` trains on."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--scenes", type=int, required=True)
    parser.add_argument("--first_scene", type=int, default=0)
    parser.add_argument("--curriculum", type=json.loads, default=[])
    args, _ = parser.parse_known_args(args_file.read_text().split())
    seeds = train_seeds(args.first_scene + args.scenes)[args.first_scene :]
    unasked = [(*stage[:2], {}, *stage[3:]) if len(stage) > 2 else stage for stage in args.curriculum]
    rows = SceneDataset(seeds, kinds=(), curriculum=unasked)
    for index in tqdm(range(len(rows)), desc=f"pictures of {args_file.name}", unit="row", disable=None):
        yield from rows[index]["images"]


COLUMNS = {
    "exact_match": "exact",
    "black_picture": "black",
    "wrong_picture": "wrong picture",
    "blind_vision": "blind vision",
    "blind_spatial_vision": "blind spatial_vision",
    "commonest_answer": "commonest answer",
}


def print_scores(scores: dict[str, dict[str, float]]) -> None:
    """As a table by kind of question."""
    columns = {column: title for column, title in COLUMNS.items() if column in scores[KINDS[0]]}
    print(f"{'kind':<12} {'questions':>9}  {'  '.join(columns.values())}")
    for kind, row in scores.items():
        cells = [f"{row[column]:{len(title)}.1%}" for column, title in columns.items() if column in row]
        print(f"{kind:<12} {row['questions']:>9}  {'  '.join(cells)}")
    f1 = [
        f"{title} {scores['describe'][f'{column}_f1']:.3f}"
        for column, title in columns.items()
        if f"{column}_f1" in scores["describe"]
    ]
    print(f"describe, F1 of the objects: {', '.join(f1)}")


def equal_to_training(seeds, args_files: list[Path], max_objects: int | None = None) -> dict[str, int]:
    """How many pictures of scenes equal one of those trained on with these files, and how many those are."""
    trained, found = 0, set()
    digests = [scene_digest(make_scene(seed, kinds=(), max_objects=max_objects)[0]) for seed in seeds]
    for picture in chain.from_iterable(map(training_pictures, args_files)):
        trained += 1
        found.add(scene_digest(picture))
    return {
        "equal_to_training_pictures": sum(digest in found for digest in digests),
        "training_pictures": trained,
    }


__all__ = ["equal_to_training", "evaluate", "print_scores", "training_pictures", "weights_digest"]
