# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Train the small model of the scene world with each fusion, from several seeds, and compare.

    python examples/compare_fusions.py --output_dir comparison --seeds 0 1 2

All runs get the same pictures and questions in the same order, scenes of one object and then of up to two, and as
many steps; a seed fixes the first weights. Prints, per fusion, how many parameters train, and the mean exact match on
test scenes of up to two objects with its standard deviation over the seeds; below, what the commonest answer reaches.
Every run's figures are in `comparison.json` as soon as it ends. What is there is not run again, and what was cut off
goes on where it was.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from transformers_aurea import AureaForConditionalGeneration, set_trainable
from transformers_aurea.fusion_aurea import FUSIONS
from transformers_aurea.scenes import KINDS


EXAMPLES = Path(__file__).parent
# Both encoders train, but the one that a fusion does not use.
GROUPS = ("vision", "spatial_vision", "fusion", "projector", "cross_attention", "language_model")
UNUSED = {"semantic": "spatial_vision", "spatial": "vision"}
ONE_OBJECT = {"color": 1, "shape": 1, "size": 1, "count": 1, "existence": 1, "describe": 1, "locate": 1}
TWO_OBJECTS = ONE_OBJECT | {"left_right": 2, "above_below": 2, "locate": 2}
CURRICULUM = json.dumps([[0.2, 1, ONE_OBJECT], [1, 2, TWO_OBJECTS]])


def run(folder: Path, fusion_type: str, seed: int, args) -> dict:
    """One training and its evaluation."""
    folder.mkdir(parents=True, exist_ok=True)
    start, trained, scores = folder / "start", folder / "trained", folder / "scores.json"
    groups = [group for group in GROUPS if group != UNUSED.get(fusion_type)]
    commands = [
        ["make_embedded_model.py", "--output_dir", start, "--fusion_type", fusion_type, "--seed", seed],
        [
            *("train.py", "--args_file", EXAMPLES / "embedded.args"),
            *("--model_name_or_path", start, "--output_dir", trained, "--train_groups", *groups),
            *("--scenes", args.scenes, "--eval_strategy", "no", "--do_eval", "False"),
            *("--curriculum", CURRICULUM),
        ],
        [
            *("evaluate_scenes.py", "--model_name_or_path", trained, "--output", scores),
            *("--scenes", args.eval_scenes, "--max_objects", 2, "--no_controls"),
        ],
    ]
    with open(folder / "log.txt", "a") as log:
        for script, *options in commands:
            if script == "make_embedded_model.py" and (start / "config.json").is_file():
                continue
            command = [sys.executable, EXAMPLES / script, *options]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([str(part) for part in command], env=environment, stdout=log, stderr=log, check=True)
    report = set_trainable(AureaForConditionalGeneration.from_pretrained(start), groups)
    return {
        "fusion_type": fusion_type,
        "seed": seed,
        "scenes": args.scenes,
        "trainable_parameters": report.trainable,
        "scores": json.loads(scores.read_text()),
    }


def table(runs: list[dict]) -> str:
    """Per fusion the mean over the seeds ± the standard deviation, in per cent, by kind; last, guessing."""
    columns = [*KINDS, "all"]
    lines = [f"| | trainable | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for fusion_type in dict.fromkeys(found["fusion_type"] for found in runs):
        own = [found for found in runs if found["fusion_type"] == fusion_type]
        cells = []
        for kind in columns:
            shares = [100 * found["scores"][kind]["exact_match"] for found in own]
            spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
            cells.append(f"{statistics.mean(shares):.1f}{spread}")
        lines.append(f"| {fusion_type} | {own[0]['trainable_parameters']:,} | {' | '.join(cells)} |")
    commonest = [f"{100 * runs[0]['scores'][kind]['commonest_answer']:.1f}" for kind in KINDS]
    lines.append(f"| commonest answer | | {' | '.join(commonest)} | |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--fusion_types", nargs="+", default=list(FUSIONS), choices=list(FUSIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=14_400, help="training pictures, 8 a step (default: 14400)")
    parser.add_argument("--eval_scenes", type=int, default=500, help="test pictures (default: 500)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each (default: 2)")
    args = parser.parse_args()

    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "comparison.json"
    runs = json.loads(file.read_text()) if file.is_file() else []
    if other := {found["scenes"] for found in runs} - {args.scenes}:
        parser.error(f"{file} is of trainings on {other} scenes, not {args.scenes}: give another --output_dir")
    done = {(found["fusion_type"], found["seed"]) for found in runs}
    jobs = [(fusion_type, seed) for seed in args.seeds for fusion_type in args.fusion_types]
    with ThreadPoolExecutor(args.processes) as pool:
        started = [
            pool.submit(run, args.output_dir / f"{fusion_type}-{seed}", fusion_type, seed, args)
            for fusion_type, seed in jobs
            if (fusion_type, seed) not in done
        ]
        for ended in as_completed(started):
            runs.append(ended.result())
            file.write_text(json.dumps(runs, indent=1) + "\n")
    print(table(sorted(runs, key=lambda found: (list(FUSIONS).index(found["fusion_type"]), found["seed"]))))


if __name__ == "__main__":
    main()
