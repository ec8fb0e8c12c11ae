# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Join small pretrained encoders by each fusion and connector, train on the scene world, and compare.

    python examples/compare_fusions.py --output_dir comparison --seeds 0 1 2
    python examples/compare_fusions.py --output_dir comparison --fusion_types concat none --connector_types prefix \\
        --encoders siglip+resnet resnet

As published models do, all begin with encoders that were pretrained apart, once (`pretrain_encoders.py`), and stay as
they are, and with the embedded model's language model, which trains along with what is new: fusion, projector, blocks,
composition. All runs get the same pictures and questions in the same order, scenes of one object and then of up to
two, and as many steps; a seed fixes the first weights of what is new. Two baselines are honest: plain concatenation,
and one encoder alone, so wide (`resnet:128`) that its model has as many parameters as those of the pair.

`comparison.json` has, run by run, the scores on test scenes of up to two objects, and what remains of them when one
encoder sees the mean picture; and, measured one by one at the end, on one core, what each candidate costs and how
alike the maps of its encoders and its fusion are (see `measure_costs.py`). `comparison.md` has the tables,
`comparison.svg` a chart (extra `visualization`). What is there with as many pictures is not run
again, and what was cut off goes on where it was.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple

from transformers_aurea.cli.errors import errors_in_one_line
from transformers_aurea.fusion_aurea import FUSIONS
from transformers_aurea.scenes import KINDS


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
CONNECTORS = ("cross_attention", "prefix", "both")
NO_COMPOSITION = "none"
COMPOSITIONS = (NO_COMPOSITION, "cross_attention", "gated_attention", "simple_add")

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
        composed = f"composed_{self.composition_type}" if self.composition_type != NO_COMPOSITION else None
        return "-".join(filter(None, (self.fusion_type, self.connector_type, self.encoders, composed)))

    @property
    def new_groups(self) -> list[str]:
        """What trains: all but the encoders."""
        composition = ["composition"] if self.composition_type != NO_COMPOSITION else []
        blocks = ["cross_attention"] if self.connector_type != "prefix" else []
        return [*composition, "fusion", "projector", *blocks, "language_model"]

    @property
    def options(self) -> tuple[str, ...]:
        composition = ("--composition_type", self.composition_type) if self.composition_type != NO_COMPOSITION else ()
        return (
            *("--fusion_type", self.fusion_type, "--connector_type", self.connector_type),
            *(ENCODERS[self.encoders]),
            *composition,
        )


def run_example(log: Path, script: str, *options):
    """Runs an example on one core.

    Raises:
        RuntimeError: it failed.
    """
    command = [str(part) for part in (sys.executable, EXAMPLES / script, *options)]
    with open(log, "a") as file:
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)
    if done.returncode:
        raise RuntimeError(f"{script} ended with {done.returncode}; {log} says why")


def encoder_names(candidates: list[Candidate]) -> list[str]:
    return sorted({name for candidate in candidates for name in candidate.encoders.split("+")})


def pretrain(folder: Path, name: str, pictures: int):
    """Makes an encoder's folder unless it is there, whole."""
    folder.mkdir(exist_ok=True)
    if not (folder / name).is_dir():
        half_written = folder / f"partial-{name}"
        options = ("--output_dir", half_written, "--encoders", name, "--pictures", pictures)
        run_example(folder / f"{name}.txt", "pretrain_encoders.py", *options)
        (half_written / name).rename(folder / name)
        half_written.rmdir()


class Run(NamedTuple):
    """One training of a candidate."""

    folder: Path
    encoders_dir: Path
    candidate: Candidate
    seed: int
    scenes: int
    eval_scenes: int

    @property
    def settings(self) -> dict:
        return {**self.candidate._asdict(), "seed": self.seed, "scenes": self.scenes, "eval_scenes": self.eval_scenes}

    def call(self, script: str, *options):
        run_example(self.folder / "log.txt", script, *options)

    def train(self) -> dict:
        """The scores. What was done already, whole, is not done again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        start, half_written, trained = (self.folder / name for name in ("start", "partial", "trained"))
        scores = self.folder / f"scores-{self.eval_scenes}.json"
        if not start.is_dir():
            shutil.rmtree(half_written, ignore_errors=True)
            options = ("--output_dir", half_written, "--encoders_dir", self.encoders_dir, "--seed", self.seed)
            self.call("make_embedded_model.py", *self.candidate.options, *options)
            half_written.rename(start)
        self.call(
            *("train.py", "--args_file", EXAMPLES / "embedded.args"),
            *("--model_name_or_path", start, "--output_dir", trained, "--train_groups", *self.candidate.new_groups),
            *("--scenes", self.scenes, "--curriculum", CURRICULUM, "--warmup_steps", 100),
            *("--eval_strategy", "no", "--do_eval", "False"),
        )
        if not scores.is_file():
            self.call(
                *("evaluate_scenes.py", "--model_name_or_path", trained, "--output", scores),
                *("--scenes", self.eval_scenes, "--max_objects", 2, "--no_controls", "--blind"),
            )
        return json.loads(scores.read_text())

    def measure(self) -> dict:
        """The costs, of which the trained model's likeness is one."""
        costs = self.folder / "costs.json"
        if not costs.is_file():
            self.call("measure_costs.py", "--model_name_or_path", self.folder / "trained", "--output", costs)
        return json.loads(costs.read_text())


class Comparison:
    """What was found so far, and its file."""

    def __init__(self, file: Path):
        self.file = file
        found = json.loads(file.read_text()) if file.is_file() else {"runs": [], "costs": {}}
        self.runs, self.costs = found["runs"], found["costs"]

    def has(self, run: Run) -> bool:
        return any(run.settings.items() <= found.items() for found in self.runs)

    def save(self):
        half_written = self.file.with_suffix(".partial")
        half_written.write_text(json.dumps({"runs": self.runs, "costs": self.costs}, indent=1) + "\n")
        half_written.replace(self.file)

    def scores(self, candidate: Candidate, sizes: dict) -> list[dict]:
        wanted = (candidate._asdict() | sizes).items()
        return [found["scores"] for found in self.runs if wanted <= found.items()]


def percent(shares: list[float]) -> str:
    """The mean, and of several the standard deviation."""
    shares = [100 * share for share in shares]
    spread = f" ± {statistics.stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{statistics.mean(shares):.1f}{spread}" if shares else ""


def as_table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def score_table(found: Comparison, candidates: list[Candidate], sizes: dict) -> str:
    """Exact match in per cent, mean ± standard deviation over the seeds; last, guessing."""
    blind = {"blind_vision": "all, semantic blind", "blind_spatial_vision": "all, spatial blind"}
    rows = [["", "seeds", *KINDS, "all", *blind.values()]]
    for candidate in candidates:
        scores = found.scores(candidate, sizes)
        cells = [percent([one[kind]["exact_match"] for one in scores]) for kind in (*KINDS, "all")]
        cells += [percent([one["all"][column] for one in scores if column in one["all"]]) for column in blind]
        rows.append([candidate.name, str(len(scores)), *cells])
    commonest = [f"{100 * scores[0][kind]['commonest_answer']:.1f}" for kind in KINDS]
    rows.append(["commonest answer", "", *commonest, *[""] * (1 + len(blind))])
    return as_table(rows)


def cost_table(found: Comparison, candidates: list[Candidate]) -> str:
    titles = {
        "flops_per_picture": ("MFLOP a picture", 1e-6),
        "flops_per_token": ("MFLOP a token", 1e-6),
        "seconds_per_picture": ("ms a picture", 1e3),
        "seconds_per_token": ("ms a token", 1e3),
        "seconds_to_first_token": ("ms to the first token", 1e3),
        "training_mib": ("MiB of a training step", 1),
    }
    pairs = {
        "vision, spatial_vision": "CKA semantic, spatial",
        "vision, fused": "CKA semantic, fused",
        "spatial_vision, fused": "CKA spatial, fused",
    }
    rows = [["", "parameters", *(title for title, _ in titles.values()), *pairs.values()]]
    for candidate in candidates:
        costs = found.costs[candidate.name]
        cells = [f"{factor * costs[name]:.1f}" for name, (_, factor) in titles.items()]
        cells += [f"{costs['cka'][pair]:.2f}" if pair in costs["cka"] else "" for pair in pairs]
        rows.append([candidate.name, f"{costs['parameters']:,}", *cells])
    return as_table(rows)


def draw(found: Comparison, candidates: list[Candidate], sizes: dict, file: Path):
    """Each run's score, the mean of each candidate, and what is left with an encoder blinded."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "aurea"  # the same figures make the same file
    figure, axes = plt.subplots(figsize=(7.5, 1 + 0.35 * len(candidates)), layout="constrained")
    marks = {
        "exact_match": "both eyes open",
        "blind_vision": "semantic blind",
        "blind_spatial_vision": "spatial blind",
    }
    for color, (column, label) in enumerate(marks.items()):
        for place, candidate in enumerate(candidates):
            values = [100 * one["all"][column] for one in found.scores(candidate, sizes) if column in one["all"]]
            if values:
                axes.plot(values, [place] * len(values), linestyle="", marker="o", markersize=3, color=f"C{color}")
                axes.plot([statistics.mean(values)], [place], marker="|", markersize=14, color=f"C{color}")
        axes.plot([], [], linestyle="", marker="o", markersize=3, color=f"C{color}", label=label)
    axes.set_yticks(range(len(candidates)), [candidate.name for candidate in candidates])
    axes.set(xlabel="exact match over all kinds, %")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, metadata={"Date": None})


def read_args() -> tuple[argparse.Namespace, list[Candidate]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--fusion_types", nargs="+", default=list(FUSIONS), choices=list(FUSIONS))
    parser.add_argument("--connector_types", nargs="+", default=["cross_attention"], choices=CONNECTORS)
    parser.add_argument(
        "--encoders",
        nargs="+",
        default=["siglip+resnet", "siglip", "resnet", "resnet:128"],
        choices=list(ENCODERS),
        help='pairs, and single ones for the fusion "none" (default: siglip+resnet siglip resnet resnet:128)',
    )
    parser.add_argument("--composition_types", nargs="+", default=[NO_COMPOSITION], choices=COMPOSITIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=4_800, help="training pictures, 8 a step (default: 4800)")
    parser.add_argument(
        "--pretraining_scenes", type=int, default=32_000, help="pictures for each encoder that is not there already"
    )
    parser.add_argument("--eval_scenes", type=int, default=400, help="test pictures (default: 400)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one core each (default: 2)")
    args = parser.parse_args()
    for name in ("scenes", "eval_scenes", "processes"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    asked = product(args.fusion_types, args.connector_types, args.encoders, args.composition_types)
    candidates = [candidate for candidate in dict.fromkeys(map(Candidate._make, asked)) if candidate.is_possible]
    if not candidates:
        parser.error(
            "nothing to compare: fusions and compositions need a pair of --encoders, and the fusion none without a "
            "composition a single one"
        )
    return args, candidates


def main():
    args, candidates = read_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    found = Comparison(args.output_dir / "comparison.json")
    sizes = {"scenes": args.scenes, "eval_scenes": args.eval_scenes}
    encoders_dir = args.output_dir / "encoders"
    runs = [
        Run(args.output_dir / f"{candidate.name}-{seed}-{args.scenes}", encoders_dir, candidate, seed, **sizes)
        for seed in dict.fromkeys(args.seeds)
        for candidate in candidates
    ]
    with ThreadPoolExecutor(args.processes) as pool:
        names = encoder_names(candidates)
        list(pool.map(lambda name: pretrain(encoders_dir, name, args.pretraining_scenes), names))
    with ThreadPoolExecutor(args.processes) as pool:
        started = {pool.submit(run.train): run for run in runs if not found.has(run)}
        try:
            for ended in as_completed(started):
                found.runs.append(started[ended].settings | {"scores": ended.result()})
                found.save()
        finally:
            pool.shutdown(cancel_futures=True)  # after a failure no more are begun
    for run in runs[: len(candidates)]:
        if run.candidate.name not in found.costs:
            found.costs[run.candidate.name] = run.measure()
            found.save()
    tables = f"{score_table(found, candidates, sizes)}\n\n{cost_table(found, candidates)}\n"
    print(tables)
    args.output_dir.joinpath("comparison.md").write_text(tables)
    if find_spec("matplotlib") is None:
        print('no chart, for matplotlib is missing: pip install "transformers-aurea[visualization]"')
    else:
        draw(found, candidates, sizes, args.output_dir / "comparison.svg")


if __name__ == "__main__":
    errors_in_one_line()
    main()
