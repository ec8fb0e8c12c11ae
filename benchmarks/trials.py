# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The rows of the tables, and how their figures are measured."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from measuring import fastest, time_limit


RADIUS = 3
SEED = 0
BASE = (1, 16)  # batch and side of the grid that everything is compared with
COMPILATION = 120  # seconds that a variant's first call may take


class Trial(NamedTuple):
    """One variant in one row: what makes its call, how its result is checked, and what stands against running it."""

    row: dict
    variant: str
    prepare: Callable
    check: Callable = lambda result: {}
    obstacle: Callable = lambda: None
    compiles: bool = False
    least: int = 5  # samples

    @property
    def figures(self):
        return self.row["variants"][self.variant]


class Bench:
    """A device, the variants to measure on it, and the rows that came out."""

    def __init__(self, device, kernel, missing, compiled, quick):
        self.device, self.kernel, self.missing, self.quick = device, kernel, missing, quick
        self.compiled = compiled
        self.budget = 0.1 if quick else 4.0
        self.rows = []

    def measure(self, trials):
        """Run the trials, those that can, and write their figures into their rows."""
        trials, ready = self.first_calls(trials)
        least = {number: 1 if self.quick else trials[number].least for number in ready}
        for number, (seconds, samples) in fastest(ready, self.device, self.budget, least).items():
            trials[number].figures.update(ms=seconds * 1e3, samples=samples)
        self.add_resident_memory(trials, ready)
        self.add_graphs(trials, ready)
        self.finish(trials)

    def first_calls(self, trials):
        """Memory and errors. Returns the trials, and the calls of those that can be run, by number."""
        trials, ready = list(trials), {}
        for number, trial in enumerate(trials):
            row = trial.row
            if not any(row is other for other in self.rows):
                self.rows.append(row)
            try:
                if reason := trial.obstacle():
                    row["not_run"][trial.variant] = reason
                    continue
                call = trial.prepare()
                with time_limit(COMPILATION):
                    if trial.compiles:
                        call()
                    start = time.process_time()
                    result, figures = self.device.observe(call)
                    figures["first_call_s"] = time.process_time() - start
                figures |= trial.check(result)
                del result
            except Exception as error:
                row["not_run"][trial.variant] = describe(error)
                continue
            row["variants"][trial.variant] = figures
            ready[number] = call
        return trials, ready

    def add_resident_memory(self, trials, ready):
        for number, call in ready.items():
            figures = trials[number].figures
            if figures["ms"] < 3000 and (resident := self.device.resident(call)) is not None:
                figures["resident_mb"] = resident

    def add_graphs(self, trials, ready):
        """Replay times of those variants that can be captured. They take turns too."""
        graphs = {}
        for number, call in ready.items():
            if trials[number].variant in ("pytorch", "compiled", "kernel", "linear_layers"):
                try:
                    graphs[number] = self.device.graph_of(call)
                except Exception as error:
                    trials[number].figures["graph_error"] = describe(error)
        graphs = {number: graph for number, graph in graphs.items() if graph is not None}
        for number, (seconds, _) in fastest(graphs, self.device, self.budget).items():
            trials[number].figures["graph_ms"] = seconds * 1e3

    def finish(self, trials):
        """Ratios within each row, and of the time per position to that at the base size."""
        bases = {}
        for row in {id(trial.row): trial.row for trial in trials}.values():
            for name, figures in row["variants"].items():
                del figures["first_call_s"]
                figures |= ratios(row["variants"], name)
                figures["us_per_position"] = figures["ms"] * 1e3 / math.prod(row["shape"][:-1])
                if tuple(row["shape"][:2]) == BASE:
                    bases[name] = figures["us_per_position"]
                elif name in bases:
                    figures["growth_per_position"] = figures["us_per_position"] / bases[name]
            self.show(row)

    def show(self, row):
        head = f"{row['what']:22} {'×'.join(map(str, row['shape'])):>15} {row['dtype']:9}"
        for name, figures in row["variants"].items():
            shown = (f"{key} {value:.3g}" for key, value in figures.items() if isinstance(value, float))
            print(f"{head} {name:14} " + "  ".join(shown), flush=True)
        for name, reason in row["not_run"].items():
            if name not in self.missing:
                print(f"{head} {name:14} not run: {reason}", flush=True)


def ratios(variants, name):
    """How much faster than others, and how much less memory than the published formulation."""
    figures, found = variants[name], {}
    for other, key in (("published", "speedup"), ("pytorch", "speedup_over_pytorch")):
        if other in variants and name not in (other, "published"):
            found[key] = variants[other]["ms"] / figures["ms"]
    for key, ratio in (("mb", "memory_ratio"), ("resident_mb", "resident_memory_ratio")):
        published = variants.get("published", {}).get(key)
        if published and figures.get(key) and name != "published":
            found[ratio] = published / figures[key]
    if "linear_layers" in variants and name != "linear_layers":
        found["fraction_of_linear_layers_speed"] = variants["linear_layers"]["ms"] / figures["ms"]
    return found


def describe(error):
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def new_row(what, shape, dtype, not_run):
    return {"what": what, "shape": list(shape), "dtype": dtype, "variants": {}, "not_run": dict(not_run)}
