# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Train the small model of the scene world with each fusion, from several seeds, and compare.

    python examples/compare_fusions.py --output_dir comparison --seeds 0 1 2

All runs get the same pictures in the same order, scenes of one object and then of up to two, and as many steps; a seed
fixes the first weights. Prints, per fusion, the mean exact match on test scenes of up to two objects and its standard
deviation over the seeds, and writes every run's figures to `comparison.json`. What was cut off goes on where it was.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers_aurea.fusion_aurea import FUSIONS
from transformers_aurea.scenes import KINDS


EXAMPLES = Path(__file__).parent
# Both encoders train, but the one that a fusion does not use.
GROUPS = ("vision", "spatial_vision", "fusion", "projector", "cross_attention", "language_model")
UNUSED = {"semantic": "spatial_vision", "spatial": "vision"}
CURRICULUM = "[[0.3, 1], [1, 2]]"


def run(folder: Path, fusion_type: str, seed: int, args) -> dict:
    """One training and its evaluation; what is already there is not done again."""
    scores = folder / "scores.json"
    if not scores.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        start, trained = folder / "start", folder / "trained"
        groups = [group for group in GROUPS if group != UNUSED.get(fusion_type)]
        commands = [
            ["make_embedded_model.py", "--output_dir", start, "--fusion_type", fusion_type, "--seed", seed],
            [
                *("train.py", "--args_file", EXAMPLES / "embedded.args"),
                *("--model_name_or_path", start, "--output_dir", trained, "--train_groups", *groups),
                *("--scenes", args.scenes, "--eval_strategy", "no", "--do_eval", "False"),
                *("--curriculum", CURRICULUM, "--per_device_train_batch_size", 16),
            ],
            [
                *("evaluate_scenes.py", "--model_name_or_path", trained, "--output", scores),
                *("--scenes", args.eval_scenes, "--max_objects", 2),
            ],
        ]
        with open(folder / "log.txt", "a") as log:
            for script, *options in commands:
                if script == "make_embedded_model.py" and (start / "config.json").is_file():
                    continue
                command = [sys.executable, EXAMPLES / script, *options]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                subprocess.run([str(part) for part in command], env=environment, stdout=log, stderr=log, check=True)
    return {"fusion_type": fusion_type, "seed": seed, "scores": json.loads(scores.read_text())}


def table(runs: list[dict]) -> str:
    """Per fusion the mean over the seeds ± the standard deviation, in per cent, by kind."""
    columns = [*KINDS, "all"]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for fusion_type in dict.fromkeys(found["fusion_type"] for found in runs):
        cells = []
        for kind in columns:
            shares = [
                100 * found["scores"][kind]["exact_match"] for found in runs if found["fusion_type"] == fusion_type
            ]
            spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
            cells.append(f"{statistics.mean(shares):.1f}{spread}")
        lines.append(f"| {fusion_type} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--fusion_types", nargs="+", default=list(FUSIONS), choices=list(FUSIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=16_000, help="training pictures of each run (default: 16000)")
    parser.add_argument("--eval_scenes", type=int, default=500, help="test pictures (default: 500)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each (default: 2)")
    args = parser.parse_args()

    jobs = [(fusion_type, seed) for seed in args.seeds for fusion_type in args.fusion_types]
    with ThreadPoolExecutor(args.processes) as pool:
        runs = list(pool.map(lambda job: run(args.output_dir / f"{job[0]}-{job[1]}", *job, args), jobs))
    (args.output_dir / "comparison.json").write_text(json.dumps(runs, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
