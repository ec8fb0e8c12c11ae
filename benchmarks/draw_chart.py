# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Draw the figures of benchmark_spatial_range_attention.py: from its JSON, and from nothing else.

    python benchmarks/draw_chart.py [results.json] [--output chart.svg]

The same figures give the same file. Colours are legible on light and on dark pages; the background is transparent.
"""

import argparse
import json
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


RESULTS = Path(__file__).resolve().parent / "results" / "spatial_range_attention_cpu.json"
INK, GRID_LINES = "#7d8590", "#7d859040"
COLORS = {"published": "#8b949e", "pytorch": "#3b82d6", "kernel": "#d9730d"}
LABELS = {"published": "published formulation", "pytorch": "our PyTorch path", "kernel": "compiled kernel"}
PASSES = {"op forward": "forward", "op forward+backward": "forward +\nbackward"}
STYLE = {
    "svg.hashsalt": "transformers-aurea",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def rows_of(results, what, **shape):
    """The float32 rows of one kind, at given batch, grid or channels."""
    for row in results["rows"]:
        batch, grid, _, channels = row["shape"] if len(row["shape"]) == 4 else (None,) * 4
        place = {"batch": batch, "grid": grid, "channels": channels}
        if row["what"] == what and row["dtype"] == "float32" and shape.items() <= place.items():
            yield row


def draw_speedups(axes, results):
    """How many times faster than the published formulation, at the base size."""
    rows = [row for what in PASSES for row in rows_of(results, what, batch=1, grid=16)]
    speedups = {"pytorch": {}, "kernel": {}}
    for place, row in enumerate(rows):
        for name in speedups:
            if "speedup" in row["variants"].get(name, {}):
                speedups[name][place] = row["variants"][name]["speedup"]
    for name, shift in (("pytorch", -0.2), ("kernel", 0.2)):
        places, heights = [place + shift for place in speedups[name]], list(speedups[name].values())
        bars = axes.bar(places, heights, 0.36, color=COLORS[name], label=LABELS[name])
        axes.bar_label(bars, [f"{height:.0f}×" for height in heights], padding=2, color=INK, fontsize=9)
    axes.set_yscale("log")
    axes.set_ylim(1, 5 * max(speedup for places in speedups.values() for speedup in places.values()))
    axes.set_xticks(range(len(rows)), [f"{PASSES[row['what']]}\nC {row['shape'][-1]}" for row in rows])
    axes.set_title("times faster than the published formulation, grid 16 × 16", fontsize=10)
    axes.legend(frameon=False, loc="upper left", ncols=2, fontsize=9)


def draw_growth(axes, results):
    """Time per position against the side of the grid, forward, one image, at the smaller width."""
    channels = min(row["shape"][-1] for row in rows_of(results, "op forward"))
    rows = list(rows_of(results, "op forward", batch=1, channels=channels))
    for name, color in COLORS.items():
        points = [
            (row["shape"][1], row["variants"][name]["us_per_position"]) for row in rows if name in row["variants"]
        ]
        if points:
            axes.plot(*zip(*points), "o-", color=color, label=LABELS[name])
    sides = [row["shape"][1] for row in rows]
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sides, [f"{side} × {side}" for side in sides])
    axes.minorticks_off()
    axes.set_title(f"time per position, forward, C {channels}", fontsize=10)
    axes.set_ylabel("µs")
    axes.legend(frameon=False, fontsize=9)


def caption(results):
    hardware, kernel = results["hardware"], results["kernel"]
    where = [hardware.get("gpu") or f"{hardware['processor']}, {hardware['threads']} thread"]
    where += [f"driver {hardware['driver']}" if "gpu" in hardware else hardware["torch_cpu_capability"]]
    what = [f"torch {hardware['torch']}", f"radius {results['radius']}", "float32"]
    what += [f"kernel version {kernel['version']}, {kernel['id']}"] if kernel else []
    return "\n".join("   ·   ".join(words) for words in (where, what))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="default: beside the results, as SVG")
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())

    matplotlib.rcParams.update(STYLE)
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    for panel, draw in zip(figure.subplots(1, 2, width_ratios=(3, 2)), (draw_speedups, draw_growth)):
        panel.grid(axis="y", color=GRID_LINES)
        panel.set_axisbelow(True)
        draw(panel, results)
        panel.yaxis.set_major_formatter("{x:g}")
    figure.supxlabel(caption(results), fontsize=8)
    output = arguments.output or arguments.results.with_suffix(".svg")
    figure.savefig(output, transparent=True, metadata={"Date": None, "Creator": None})
    print(output)


if __name__ == "__main__":
    main()
