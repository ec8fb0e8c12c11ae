# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Train the small model of the scene world with each fusion, connector and pair of encoders, and compare.

    python examples/compare_fusions.py --output_dir comparison --seeds 0 1 2
    python examples/compare_fusions.py --output_dir comparison --fusion_types concat none --connector_types prefix \\
        --encoders siglip+resnet resnet

All runs get the same pictures and questions in the same order, scenes of one object and then of up to two, and as
many steps; a seed fixes the first weights. Two baselines are honest: plain concatenation, and one encoder alone, so
wide (`resnet:128`) that its model has as many parameters as those of the pair.

`comparison.json` has, run by run, the scores on test scenes of up to two objects, and what remains of them when one
encoder sees the mean picture; `comparison.md` tables of these, of the costs (measured one by one at the end, on one
core), and of how alike the maps of encoders and fusion are; `comparison.svg` a chart. What is there with as many
pictures is not run again, and what was cut off goes on where it was.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


EXAMPLES = Path(__file__).parent
# Options of make_embedded_model.py.
PAIRS = {f"siglip+{spatial}": ("--spatial_vision", spatial) for spatial in ("resnet", "dinov2")}
SINGLE_ENCODERS = {
    "siglip": ("--encoder", "vision"),
    "resnet": ("--encoder", "spatial_vision"),
    "resnet:128": ("--encoder", "spatial_vision", "--spatial_width", "128"),
    "dinov2": ("--encoder", "spatial_vision", "--spatial_vision", "dinov2"),
}
ENCODERS = PAIRS | SINGLE_ENCODERS
NO_COMPOSITION = "none"

ONE_OBJECT = {"color": 1, "shape": 1, "size": 1, "count": 1, "existence": 1, "describe": 1, "locate": 1}
TWO_OBJECTS = ONE_OBJECT | {"left_right": 2, "above_below": 2, "locate": 2}
CURRICULUM = json.dumps([[0.2, 1, ONE_OBJECT], [1, 2, TWO_OBJECTS]])


class Candidate(NamedTuple):
    """What is compared."""

    fusion_type: str
    connector_type: str
    encoders: str
    composition_type: str

    @property
    def is_possible(self) -> bool:
        """A fusion and a composition need a pair, the fusion "none" alone needs one encoder."""
        is_composed = self.composition_type != NO_COMPOSITION
        return (self.encoders in PAIRS) == (is_composed or self.fusion_type != "none")

    @property
    def name(self) -> str:
        return "-".join(part for part in self if part != "none")

    @property
    def options(self) -> tuple[str, ...]:
        composition = ("--composition_type", self.composition_type) if self.composition_type != NO_COMPOSITION else ()
        return (
            *("--fusion_type", self.fusion_type, "--connector_type", self.connector_type),
            *(ENCODERS[self.encoders]),
            *composition,
        )


def run(folder: Path, candidate: Candidate, seed: int, scenes: int, eval_scenes: int) -> dict:
    """The scores of one training. What of it is done already, whole, is not done again."""
    folder.mkdir(parents=True, exist_ok=True)
    start, half_written, trained = (folder / name for name in ("start", "partial", "trained"))
    scores = folder / f"scores-{eval_scenes}.json"

    def call(script: str, *options):
        command = [str(part) for part in (sys.executable, EXAMPLES / script, *options)]
        with open(folder / "log.txt", "a") as log:
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        if done.returncode:
            raise RuntimeError(f"{script} ended with {done.returncode}; {folder / 'log.txt'} says why")

    if not start.is_dir():
        shutil.rmtree(half_written, ignore_errors=True)
        call("make_embedded_model.py", "--output_dir", half_written, *candidate.options, "--seed", seed)
        half_written.rename(start)
    call(
        *("train.py", "--args_file", EXAMPLES / "embedded.args"),
        *("--model_name_or_path", start, "--output_dir", trained, "--stage", "full"),
        *("--scenes", scenes, "--curriculum", CURRICULUM, "--warmup_steps", 100),
        *("--eval_strategy", "no", "--do_eval", "False"),
    )
    call(
        *("evaluate_scenes.py", "--model_name_or_path", trained, "--output", scores),
        *("--scenes", eval_scenes, "--max_objects", 2, "--no_controls", "--blind"),
    )
    return json.loads(scores.read_text())
