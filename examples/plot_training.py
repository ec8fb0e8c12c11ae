# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Draw the loss of trainings, and the exact match where it was evaluated.

    python examples/plot_training.py trained --output training.svg

Each folder holds the `trainer_state.json` that `train.py` writes. Needs matplotlib: `pip install -e ".[demo]"`.
"""

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt


METRIC = "exact_match"


def figures(log: list[dict], names: list[str]) -> tuple[list[int], list[float]]:
    """Steps, and there the mean of the figures of these names."""
    entries = {}
    for entry in log:
        for name in names:
            if name in entry:
                entries.setdefault(entry["step"], []).append(entry[name])
    return list(entries), [sum(values) / len(values) for values in entries.values()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="output_dir of trainings")
    parser.add_argument("--output", type=Path, default=Path("training.svg"), help="SVG or PNG")
    args = parser.parse_args()

    plt.rcParams["svg.hashsalt"] = "aurea"  # the same figures make the same file
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for folder in args.folders:
        log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        left.plot(*figures(log, ["loss"]), label=folder.name, linewidth=1)
        kinds = sorted({name for entry in log for name in entry if name.startswith("eval") and name.endswith(METRIC)})
        for name in kinds:
            label = name.removeprefix("eval_").removesuffix(METRIC).strip("_").replace("_", "/") or folder.name
            right.plot(*figures(log, [name]), label=label, marker=".", linewidth=1)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    right.set(xlabel="step", ylabel="exact match", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", nbins=6)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(args.output, metadata={"Date": None} if args.output.suffix == ".svg" else None)
    print(args.output)


if __name__ == "__main__":
    main()
