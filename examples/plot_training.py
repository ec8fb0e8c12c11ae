# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Draw the loss of trainings, and the exact match where it was evaluated.

    python examples/plot_training.py trained --output training.svg

Each folder holds the `trainer_state.json` that `train.py` writes. Needs matplotlib (extra `visualization`).
"""

import argparse
import json
from pathlib import Path

from transformers_aurea.cli.errors import errors_in_one_line


METRIC = "exact_match"


def figures(log: list[dict], names: list[str]) -> tuple[list[int], list[float]]:
    """Steps, and there the mean of the figures of these names."""
    entries = {}
    for entry in log:
        for name in names:
            if name in entry:
                entries.setdefault(entry["step"], []).append(entry[name])
    return list(entries), [sum(values) / len(values) for values in entries.values()]


def is_metric(name: str) -> bool:
    return name.startswith("eval") and name.endswith(METRIC)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="output_dir of trainings")
    parser.add_argument("--output", type=Path, default=Path("training.svg"), help="SVG or PNG")
    args = parser.parse_args()
    if args.output.suffix not in (".svg", ".png"):
        parser.error(f"--output must end in .svg or .png, unlike {args.output}")
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.parent}")
    logs = {folder: json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in args.folders}
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "aurea"  # the same figures make the same file
    was_evaluated = any(is_metric(name) for log in logs.values() for entry in log for name in entry)
    panels = 2 if was_evaluated else 1
    figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 3.2), layout="constrained", squeeze=False)
    losses, scores = axes[0, 0], axes[0, -1]
    for folder, log in logs.items():
        losses.plot(*figures(log, ["loss"]), label=folder.name, linewidth=1)
        for name in sorted({name for entry in log for name in entry if is_metric(name)}):
            label = name.removeprefix("eval_").removesuffix(METRIC).strip("_").replace("_", "/") or folder.name
            scores.plot(*figures(log, [name]), label=label, marker=".", linewidth=1)
    if was_evaluated:
        scores.set(xlabel="step", ylabel="exact match", ylim=(0, 1))
    losses.set(xlabel="step", ylabel="loss", yscale="log")
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        panel.locator_params(axis="x", nbins=6)
        panel.legend(fontsize="small")
    figure.savefig(args.output, metadata={"Date": None} if args.output.suffix == ".svg" else None)
    print(args.output)


if __name__ == "__main__":
    errors_in_one_line()
    main()
