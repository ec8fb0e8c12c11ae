# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The example scripts, run as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(script, *options, cwd=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / script, *map(str, options)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def check(result):
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """The embedded model's folder before training, with the smallest encoders."""
    folder = tmp_path_factory.mktemp("untrained")
    check(run("make_embedded_model.py", "--output_dir", folder, "--width", 32))
    return folder


def training_options(model, output, steps):
    return {
        "model_name_or_path": model,
        "dataset": "scenes",
        "scenes": 8 * steps,
        "output_dir": output,
        "per_device_train_batch_size": 8,
        "max_steps": steps,
        "logging_steps": 1,
        "save_steps": steps,
        "learning_rate": 1e-3,
        "report_to": "none",
    }


def as_arguments(options):
    return [f"--{name}={value}" for name, value in options.items()]


def test_train_then_evaluate(untrained, tmp_path):
    options = training_options(untrained, tmp_path / "trained", steps=2) | {
        "eval_scenes": 2,
        "train_sampling_strategy": "sequential",
    }
    out = check(run("train.py", "--do_train", "--do_eval", *as_arguments(options)))
    assert "trainable" in out and "100.00%" in out
    log = json.loads((tmp_path / "trained" / "trainer_state.json").read_text())["log_history"]
    first = log[0]
    assert log[1]["loss"] < first["loss"]
    assert {"grad_norm/fusion", "grad_norm/vision", "spatial_range_entropy/joint_share"} <= first.keys()
    assert "eval_left_right_exact_match" in json.loads((tmp_path / "trained" / "eval_results.json").read_text())

    scores = tmp_path / "scores.json"
    out = check(
        run("evaluate_scenes.py", "--model_name_or_path", tmp_path / "trained", "--scenes", 2, "--output", scores)
    )
    assert json.loads(scores.read_text())["all"]["questions"] == sum(
        row["questions"] for kind, row in json.loads(scores.read_text()).items() if kind != "all"
    )
    assert "describe" in out


def test_train_an_adapter(untrained, tmp_path):
    options = training_options(untrained, tmp_path / "adapter", steps=1)
    lora = ["--lora", "language_model", "cross_attention", "--train_groups", "projector", "--lora_r", "4"]
    check(run("train.py", "--do_train", *lora, *as_arguments(options)))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--dataset", "scenes", "--output_dir", "x", "--vision", "a", "--model_name_or_path", "b"],
            "Give --model_name_or_path, or all three parts",
        ),
        (["--dataset", "scenes", "--output_dir", "x", "--vision", "a", "--text", "b"], "--spatial_vision not given"),
        (["--dataset", "c.json", "--output_dir", "x", "--do_train"], "--image_folder"),
    ],
)
def test_missing_options_are_named(untrained, tmp_path, options, message):
    options = [tmp_path / "x" if option == "x" else option for option in options]
    if "--image_folder" in message:
        options += ["--model_name_or_path", untrained]
    result = run("train.py", *options)
    assert result.returncode != 0 and message in result.stderr


def test_quickstart_asks_about_a_scene(tmp_path):
    out = check(run("quickstart.py", "--scene", 3, cwd=tmp_path))
    assert "Describe the" in out or "What is in" in out
    assert Image.open(tmp_path / "scene.png").size == (112, 112)
    Image.new("RGB", (50, 40)).save(tmp_path / "other.png")
    out = check(run("quickstart.py", "--image", "other.png", "--prompt", "Is there a star?", "What?", cwd=tmp_path))
    assert "Is there a star?" in out and "What?" in out


def test_quickstart_wants_a_question_about_your_own_picture(tmp_path):
    result = run("quickstart.py", "--image", "other.png", cwd=tmp_path)
    assert result.returncode == 2 and "--prompt must say what to ask" in result.stderr


def test_model_of_parts_trains(tmp_path):
    """The embedded model taken apart; fusion, projector and cross-attention learn anew what to make of the rest."""
    check(run("take_apart.py", "--output_dir", tmp_path / "parts"))
    parts = {name: tmp_path / "parts" / name for name in ("vision", "spatial_vision", "text")}
    options = training_options(None, tmp_path / "trained", steps=30) | {
        **parts,
        "stage": "align",
        "config_overrides": '{"fusion_config": {"radius": 3, "depth": 1}, "projector_hidden_size": 256}',
        "curriculum": "[[1, 1]]",
        "learning_rate": 3e-3,
    }
    del options["model_name_or_path"]
    check(run("train.py", "--do_train", *as_arguments(options)))
    log = json.loads((tmp_path / "trained" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
