# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A training that is killed (SIGKILL) and started again by the same command ends as if nothing had happened."""

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainerState, modeling_utils

import transformers_aurea.data_aurea
import transformers_aurea.training_aurea  # noqa: F401, so that forks have them


TRAIN = Path(__file__).resolve().parent.parent / "examples" / "train.py"
STEPS, SAVE_STEPS = 6, 2


def main(runs: list[dict]):
    """Trains once after the other, each time in a process forked from this one, which imports everything once."""
    for run in runs:
        pid = os.fork()
        if pid == 0:
            with open(run["output_file"], "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if run["place"]:
                die_at(run["place"])
            sys.argv = [str(TRAIN), *run["options"]]
            runpy.run_path(str(TRAIN), run_name="__main__")
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status))


def die_at(place: str):
    """Has this process killed when half of a file is written, given by the end of its path, or before a step."""

    def half_written(write):
        def write_half(content, path, *args, **kwargs):
            write(content, path, *args, **kwargs)
            if str(path).endswith(place):
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return write_half

    def step_before(train):
        def train_step(trainer, *args, **kwargs):
            if place == f"step {trainer.state.global_step}":
                os.kill(os.getpid(), signal.SIGKILL)
            return train(trainer, *args, **kwargs)

        return train_step

    torch.save = half_written(torch.save)
    modeling_utils.safe_save_file = half_written(modeling_utils.safe_save_file)
    TrainerState.save_to_json = half_written(TrainerState.save_to_json)
    Trainer.training_step = step_before(Trainer.training_step)


def run(model: Path, folder: Path, *places: str | None) -> list[tuple[int, str]]:
    """Exit code and output of the same training, again and again, killed at these places."""
    options = {
        "model_name_or_path": model,
        "dataset": "scenes",
        "scenes": 20,
        "output_dir": folder / "output",
        "per_device_train_batch_size": 2,
        "max_steps": STEPS,
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    options = ["--do_train", *(f"--{name}={value}" for name, value in options.items())]
    files = [str(folder / f"{number}.txt") for number in range(len(places))]
    runs = [{"options": options, "place": place, "output_file": file} for place, file in zip(places, files)]
    process = subprocess.run(
        [sys.executable, __file__, json.dumps(runs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return [(int(code), Path(file).read_text()) for code, file in zip(process.stdout.split(), files)]


def losses_of(folder: Path) -> list[dict]:
    """What was logged at each step."""
    log = json.loads((folder / "output" / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


@pytest.fixture(scope="module")
def uninterrupted(converted, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    [(code, output)] = run(converted, folder, None)
    assert code == 0, output
    assert len(losses_of(folder)) == STEPS
    return folder


@pytest.mark.parametrize(
    ("place", "resumed"),
    [
        pytest.param("step 5", 4, marks=pytest.mark.slow),
        pytest.param("checkpoint-4/model.safetensors", 2, marks=pytest.mark.slow),
        ("checkpoint-4/optimizer.pt", 2),
        pytest.param("checkpoint-4/scheduler.pt", 2, marks=pytest.mark.slow),
        pytest.param("checkpoint-4/trainer_state.json", 2, marks=pytest.mark.slow),
        pytest.param("output/model.safetensors", 6, marks=pytest.mark.slow),
    ],
)
def test_a_killed_training_goes_on_bit_for_bit(converted, uninterrupted, tmp_path, place, resumed):
    (code, output), (next_code, next_output) = run(converted, tmp_path, place, None)
    assert code == -signal.SIGKILL, output
    assert next_code == 0, next_output
    assert f"Training goes on from {tmp_path}/output/checkpoint-{resumed}\n" in next_output
    assert ("checkpoint-4 is incomplete" in next_output) == place.startswith("checkpoint-4")
    assert losses_of(tmp_path) == losses_of(uninterrupted)
    weights, expected = (load_file(folder / "output/model.safetensors") for folder in (tmp_path, uninterrupted))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
