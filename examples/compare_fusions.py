# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Train the small model of the scene world with each fusion, from several seeds, and compare.

    python examples/compare_fusions.py --output_dir comparison --seeds 0 1 2

All runs get the same pictures and questions in the same order, scenes of one object and then of up to two, and as
many steps; a seed fixes the first weights. Prints, per fusion, how many parameters train, and the mean exact match on
test scenes of up to two objects with its standard deviation over the seeds; below, what the commonest answer reaches.
Every run's figures are in `comparison.json` as soon as it ends. What is there with as many pictures is not run again,
and what was cut off goes on where it was.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from transformers_aurea import AureaForConditionalGeneration, set_trainable
from transformers_aurea.command_line import errors_in_one_line
from transformers_aurea.fusion_aurea import FUSIONS
from transformers_aurea.scenes import KINDS


EXAMPLES = Path(__file__).parent
# Options of make_embedded_model.py for each; to compare with, either encoder alone.
FUSION_TYPES = {name: ("--fusion_type", name) for name in FUSIONS}
FUSION_TYPES["none-spatial_vision"] = ("--fusion_type", "none", "--encoder", "spatial_vision")
ONE_OBJECT = {"color": 1, "shape": 1, "size": 1, "count": 1, "existence": 1, "describe": 1, "locate": 1}
TWO_OBJECTS = ONE_OBJECT | {"left_right": 2, "above_below": 2, "locate": 2}
CURRICULUM = json.dumps([[0.2, 1, ONE_OBJECT], [1, 2, TWO_OBJECTS]])


def run(folder: Path, fusion_type: str, seed: int, args) -> dict:
    """The scores of one training. What of it is done already, whole, is not done again."""
    folder.mkdir(parents=True, exist_ok=True)
    start, half_written, trained, scores = (folder / name for name in ("start", "partial", "trained", "scores.json"))

    def call(script: str, *options):
        command = [str(part) for part in (sys.executable, EXAMPLES / script, *options)]
        with open(folder / "log.txt", "a") as log:
            done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
        if done.returncode:
            raise RuntimeError(f"{script} ended with {done.returncode}; {folder / 'log.txt'} says why")

    if not start.is_dir():
        shutil.rmtree(half_written, ignore_errors=True)
        call("make_embedded_model.py", "--output_dir", half_written, *FUSION_TYPES[fusion_type], "--seed", seed)
        half_written.rename(start)
    call(
        *("train.py", "--args_file", EXAMPLES / "embedded.args"),
        *("--model_name_or_path", start, "--output_dir", trained, "--stage", "full"),
        *("--scenes", args.scenes, "--eval_strategy", "no", "--do_eval", "False", "--curriculum", CURRICULUM),
    )
    call(
        *("evaluate_scenes.py", "--model_name_or_path", trained, "--output", scores),
        *("--scenes", args.eval_scenes, "--max_objects", 2, "--no_controls"),
    )
    return json.loads(scores.read_text())


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
    parser.add_argument("--fusion_types", nargs="+", default=list(FUSION_TYPES), choices=list(FUSION_TYPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=14_400, help="training pictures, 8 a step (default: 14400)")
    parser.add_argument("--eval_scenes", type=int, default=500, help="test pictures (default: 500)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each (default: 2)")
    args = parser.parse_args()
    for name in ("scenes", "eval_scenes", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "comparison.json"
    runs = json.loads(file.read_text()) if file.is_file() else []
    sizes = {"scenes": args.scenes, "eval_scenes": args.eval_scenes}
    jobs = [
        {"fusion_type": fusion_type, "seed": seed, **sizes}
        for seed in dict.fromkeys(args.seeds)
        for fusion_type in dict.fromkeys(args.fusion_types)
    ]
    with ThreadPoolExecutor(args.processes) as pool:
        started = {}
        for job in jobs:
            if not any(job.items() <= found.items() for found in runs):
                folder = args.output_dir / "-".join(str(value) for value in job.values())
                started[pool.submit(run, folder, job["fusion_type"], job["seed"], args)] = job, folder
        try:
            for ended in as_completed(started):
                job, folder = started[ended]
                scores = ended.result()
                model = AureaForConditionalGeneration.from_pretrained(folder / "start")
                report = set_trainable(model, "full")
                runs.append({**job, "trainable_parameters": report.trainable, "scores": scores})
                half_written = file.with_suffix(".partial")
                half_written.write_text(json.dumps(runs, indent=1) + "\n")
                half_written.replace(file)
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure no more are begun
    wanted = [found for found in runs if sizes.items() <= found.items()]
    print(table(sorted(wanted, key=lambda found: (list(FUSION_TYPES).index(found["fusion_type"]), found["seed"]))))


if __name__ == "__main__":
    errors_in_one_line()
    main()
