# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The example scripts, run as a user runs them."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FORKS, become, run_script
from PIL import Image
from transformers import AutoModel, EvalPrediction

from transformers_aurea import AureaForConditionalGeneration, AureaProcessor, embedded_model_path
from transformers_aurea.scenes import COLORS, SHAPES, SIZES, object_mask, scene_objects


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
PARTS = ["--vision=v", "--spatial_vision=s", "--text=t"]


def run_anew(script, *options, cwd=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / script, *map(str, options)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def run(script, *options, cwd=None, seconds=300):
    """The same in a process that has its imports behind it, ten seconds sooner."""
    options = [str(option) for option in options]
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder, name) for name in ("stdout", "stderr")]
        arguments = (dict(os.environ), output, cwd or Path.cwd(), run_script, EXAMPLES / script, options)
        process = FORKS.Process(target=become, args=arguments)
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            pytest.fail(f"{script} did not end in {seconds} s\n{output[1].read_text()}")
        return subprocess.CompletedProcess(options, process.exitcode, *(file.read_text() for file in output))


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


def example(name: str) -> SimpleNamespace:
    """What an example script defines."""
    sys.path.insert(0, str(EXAMPLES))  # where scripts find each other
    try:
        return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))
    finally:
        sys.path.remove(str(EXAMPLES))


def as_arguments(options):
    return [f"--{name}={value}" for name, value in options.items()]


def test_train_then_evaluate(untrained, tmp_path):
    options = training_options(untrained, tmp_path / "trained", steps=2) | {
        "eval_scenes": 2,
        "train_sampling_strategy": "sequential",
    }
    out = check(run_anew("train.py", "--do_train", "--do_eval", *as_arguments(options)))
    assert "trainable" in out and "100.00%" in out
    log = json.loads((tmp_path / "trained" / "trainer_state.json").read_text())["log_history"]
    first = log[0]
    assert log[1]["loss"] < first["loss"]
    assert {"grad_norm/fusion", "grad_norm/vision", "spatial_range_entropy/joint_share"} <= first.keys()
    assert "eval_left_right_exact_match" in json.loads((tmp_path / "trained" / "eval_results.json").read_text())

    again = check(run("train.py", "--do_train", *as_arguments(options)))
    assert "Nothing was trained: all steps were done already in" in again
    for other in ({"scenes": 8}, {"model_name_or_path": "elsewhere"}, {"recolor": '{"black": ["teal", [0, 99, 99]]}'}):
        refused = run("train.py", "--do_train", *as_arguments(options | other))
        (name,) = other
        assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 2, refused.stderr  # with the usage
        assert (
            f"trained holds a training with --{name} " in refused.stderr and "another --output_dir" in refused.stderr
        )

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


def test_an_adapter_of_the_embedded_model_names_no_folder_of_this_machine(tmp_path):
    options = training_options("", tmp_path / "adapter", steps=1) | {"lora": "projector"}
    del options["model_name_or_path"]
    check(run("train.py", "--do_train", *as_arguments(options)))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "transformers_aurea.embedded_model_path()"
    written = [path.read_text() for kind in ("*.json", "*.md") for path in (tmp_path / "adapter").glob(kind)]
    assert embedded_model_path() not in "".join(written)
    model = AureaForConditionalGeneration.from_pretrained(embedded_model_path())
    peft = pytest.importorskip("peft")
    assert peft.PeftModel.from_pretrained(model, tmp_path / "adapter").peft_config


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_rows_are_grouped_by_length(untrained, tmp_path, strategy):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    (tmp_path / "data.json").write_text(json.dumps([{"image": "a.png", "conversations": turns}] * 4))
    options = training_options(untrained, tmp_path / "trained", steps=1) | {
        "dataset": tmp_path / "data.json",
        "image_folder": tmp_path,
        "train_sampling_strategy": strategy,
    }
    check(run("train.py", "--do_train", *as_arguments(options)))


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        (
            "train.py",
            ["--dataset", "no.json", "--image_folder", ".", "--output_dir", "x", "--do_train"],
            "no.json does",
        ),
        ("evaluate_scenes.py", ["--model_name_or_path", "nowhere/at/all", "--scenes", "2"], "nowhere/at/all"),
        (
            "take_apart.py",
            ["--model_name_or_path=nowhere", "--output_dir", "x"],
            "--model_name_or_path nowhere is no fo",
        ),
        ("quickstart.py", ["--model", "no/where"], "error: --model no/where is no folder. "),
        ("quickstart.py", ["--image", "no.png", "--prompt", "a"], "no.png' cannot be read"),
        ("plot_training.py", ["nowhere"], "nowhere/trainer_state.json"),
        ("compare_fusions.py", ["--output_dir", "/dev/null/x"], "/dev/null/x"),
    ],
)
def test_errors_are_one_line(script, options, message, tmp_path):
    result = run(script, *options, cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("make_embedded_model.py", ["--output_dir", "x", "--width", "33"], "--width must be a multiple of 32"),
        ("make_embedded_model.py", ["--output_dir", "x", "--width", "-32"], "not -32"),
        ("plot_training.py", ["x", "--output", "training.txt"], "must end in .svg or .png, unlike training.txt"),
        ("plot_training.py", ["x", "--output", "no/training.svg"], "there is no folder no"),
        ("quickstart.py", ["--max_new_tokens", "0"], "--max_new_tokens must be at least 1, not 0"),
        ("evaluate_scenes.py", ["--max_objects", "6"], "max_objects must be an integer from 1 to 5, not 6"),
        ("evaluate_scenes.py", ["--recolor", '{"teal": ["black", [0, 0, 0]]}'], "not 'teal' 'black'"),
        ("evaluate_scenes.py", ["--train_args", "no.args"], "--train_args no.args does not exist"),
        ("compare_fusions.py", ["--output_dir", "x", "--processes", "0"], "--processes must be at least 1, not 0"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_done(script, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert refusal.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_an_error_without_words_is_told_by_its_kind(tmp_path):
    code = "from transformers_aurea.cli.errors import errors_in_one_line as begin; begin(); raise MemoryError"
    (tmp_path / "script.py").write_text(code)
    result = run(tmp_path / "script.py")
    assert (result.returncode, result.stderr) == (1, "error: MemoryError (--debug shows where)\n")


@pytest.mark.parametrize("package", ["matplotlib", "datasets", "peft", "trl"])
def test_a_missing_package_is_told_with_the_extra_that_installs_it(package, tmp_path):
    code = f"""if True:
        import sys
        from transformers_aurea.cli.errors import errors_in_one_line
        sys.modules["{package}"] = None  # as if it were not installed
        errors_in_one_line()
        import {package}"""
    (tmp_path / "script.py").write_text(code)
    result = run(tmp_path / "script.py")
    project = tomllib.loads((EXAMPLES.parent / "pyproject.toml").read_text())["project"]
    (extra,) = [
        extra
        for extra, requirements in project["optional-dependencies"].items()
        if any(re.match(rf"{package}\b", requirement) for requirement in requirements)
    ]
    assert result.returncode == 1
    assert f'pip install "transformers-aurea[{extra}]"' in result.stderr and len(result.stderr.splitlines()) == 1


def test_debug_shows_where_an_error_comes_from(tmp_path):
    result = run("plot_training.py", "nowhere", "--debug", cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" in result.stderr and "nowhere" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--dataset", "scenes", "--output_dir", "x", "--do_train", "--vision", "a", "--model_name_or_path", "b"],
            "Give --model_name_or_path, or all three parts",
        ),
        (
            ["--dataset", "scenes", "--output_dir", "x", "--do_train", "--vision", "a", "--text", "b"],
            "--spatial_vision not given",
        ),
        (["--dataset", "c.json", "--output_dir", "x", "--do_train"], "--image_folder"),
        (
            ["--args_file", "nowhere.args", "--output_dir", "x", "--do_train"],
            "--args_file nowhere.args does not exist",
        ),
        (["--dataset", "scenes", "--output_dir", "x"], "Nothing to do: give --do_train, --do_eval or both"),
        (["--dataset", "scenes", "--output_dir", "x", "--do_eval", "--eval_scenes", "0"], "--eval_scenes must be at"),
        (["--dataset", "scenes", "--output_dir", "x", "--do_train", "--first_scene", "-4"], "at least 0, got -4"),
        (
            ["--dataset", "scenes", "--output_dir", "x", "--do_train", "--config_overrides", "[1]"],
            '--config_overrides must be like {"feature_fusion_config": {"radius": 2}}, got [1]',
        ),
        (["--dataset", "c.json", "--output_dir", "x", "--do_eval"], "--do_eval needs --eval_dataset"),
        (
            ["--dataset", "scenes", "--output_dir", "x", "--do_train", "--lora_words", "cyan"],
            "--lora_words needs --lora",
        ),
        (
            ["--dataset=scenes", "--output_dir", "x", "--do_train", "--train_sampling_strategy", "group_by_length"],
            "scenes are made while training: use random or sequential",
        ),
        (
            ["--dataset", "scenes", "--output_dir", "x", "--do_train", "--curriculum", "[[1"],
            "--curriculum [[1 is no JSON",
        ),
        (
            [
                "--dataset=scenes",
                "--output_dir",
                "x",
                "--do_train",
                '--config_overrides={"feature_fusion_config": {"raduis": 2}}',
            ],
            "did you mean 'radius'",
        ),
        (["--dataset=scenes", "--output_dir", "x", "--do_train", "--unknown", "1"], "--unknown"),
        (["--dataset=scenes", "--output_dir", "x", "--do_train", "--lora", "decoder"], "invalid choice: 'decoder'"),
        (["--dataset=scenes", "--output_dir", "x", "--do_train", "--train_groups", "towers"], "choice: 'towers'"),
        (["--dataset=scenes", "--output_dir", "x", "--do_train", "--dtype", "int8"], "invalid choice: 'int8'"),
        (
            ["--dataset=scenes", "--output_dir", "x", "--do_train", "--load_best_model_at_end"],
            "requires the save and eval",
        ),
        (["--dataset=scenes", "--output_dir", "x", "--do_train", "--lora_r", "0"], "--lora_r must be at least 1"),
        (["--dataset=scenes", "--output_dir", "x", "--do_train", "--max_length", "0"], "--max_length must be at"),
        (["--dataset=scenes", "--output_dir", "x", "--do_train", "--lora_dropout", "1.5"], "less than 1, got 1.5"),
        (["--dataset=scenes", "--output_dir", "x", "--do_train", "--curriculum", "[[2, 1]]"], "has [2, 1]"),
        (["--dataset=scenes", "--output_dir", "x", "--do_train", "--recolor", "7"], "must be like"),
        (["--dataset", "c", "--output_dir", "x", "--do_train", "--streaming"], "--streaming needs --max_steps"),
        (
            ["--output_dir", "x", "--do_train", "--dataset=c", "--load_in_4bit", *PARTS],
            "--load_in_4bit, tensor parallelism and ZeRO-3 need a saved Aurea",
        ),
    ],
)
def test_bad_options_are_named_and_wrong_usage(untrained, tmp_path, options, message, monkeypatch, capsys):
    options = [str(tmp_path / "x") if option == "x" else option for option in options]
    if not any(option.startswith("--vision") for option in options):
        options += ["--model_name_or_path", str(untrained)]
    monkeypatch.setattr(sys, "argv", ["train.py", *options])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as refusal:
        runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert refusal.value.code == 2 and message in said.splitlines()[-1]
    assert len(said) < 1000  # not the usage of all options


@pytest.mark.parametrize("encoder", ["vision", "spatial_vision"])
def test_the_embedded_model_may_have_one_encoder(encoder, tmp_path):
    options = ("--output_dir", tmp_path, "--width", 32, "--fusion_type", "none", "--encoder", encoder)
    check(run("make_embedded_model.py", *options))
    model = AureaForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.encoder_configs.keys() == {f"{encoder}_config"}
    assert model.config.tokens_per_image == 14 * 14 and model.model.fusion.output_dim == 64
    processor = AureaProcessor.from_pretrained(tmp_path)
    inputs = processor(images=Image.new("RGB", (50, 40)), text="<|image|>", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 1, 3, 112, 112)
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_was_cut_off(tmp_path):
    name = "none-cross_attention-resnet"
    start = tmp_path / f"{name}-0-16" / "start"
    half_written = start.with_name("partial")
    half_written.mkdir(parents=True)
    (half_written / "config.json").write_text("{")

    def compare(*options):
        encoders = ("--encoders", "resnet", "siglip+resnet", "--pretraining_scenes", 32)
        found = run("compare_fusions.py", "--output_dir", tmp_path, "--fusion_types", "none", *encoders, *options)
        return found.stdout if found.returncode == 0 else pytest.fail(found.stderr)

    table = compare("--scenes", 16, "--eval_scenes", 4, "--seeds", 0, 0)
    assert re.search(rf"\| {name} \| 1 \| \d+\.\d \|", table) and f"| {name} | 1,630,432 |" in table
    assert start.is_dir() and not half_written.exists()
    shutil.rmtree(start.parent)  # nothing is done again
    assert compare("--scenes", 16, "--eval_scenes", 4, "--seeds", 0) == table
    assert not start.parent.exists()
    compare("--scenes", 16, "--eval_scenes", 5, "--seeds", 0)
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert [one["eval_scenes"] for one in found["runs"]] == [4, 5] and [*found["costs"]] == [name]
    assert "blind_spatial_vision" in found["runs"][0]["scores"]["all"]
    assert {path.name for path in (tmp_path / "encoders").iterdir()} == {"resnet", "resnet.txt"}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (("concat", "prefix", "siglip+resnet", "none"), True),
        (("concat", "prefix", "resnet", "none"), False),
        (("none", "both", "resnet:128", "none"), True),
        (("none", "both", "siglip+resnet", "none"), False),
        (("none", "both", "siglip+dinov2", "simple_add"), True),
        (("sva", "both", "siglip+dinov2", "gated_attention"), True),
        (("none", "both", "siglip", "cross_attention"), False),
    ],
    ids=str,
)
def test_candidates_of_a_comparison(asked, expected, tmp_path):
    candidate = example("compare_fusions").Candidate(*asked)
    assert candidate.is_possible is expected
    if expected:
        check(run("make_embedded_model.py", "--output_dir", tmp_path / "model", "--width", 32, *candidate.options))
        config = AureaForConditionalGeneration.from_pretrained(tmp_path / "model").config
        assert (config.feature_fusion_config.fusion_type, config.connector_type) == asked[:2]
        assert len(config.encoder_configs) == 1 + ("+" in asked[2])
        composition = config.composition_config and config.composition_config.composition_type
        assert (composition or "none") == asked[3]


class TestCosts:
    def test_likeness_is_one_of_equal_maps_and_none_of_unrelated_ones(self):
        cka = example("measure_costs").cka
        generator = torch.Generator().manual_seed(0)
        features, others = (torch.randn(200, size, generator=generator) for size in (30, 500))
        assert cka(features, features) == pytest.approx(1)
        rotation = torch.linalg.qr(torch.randn(30, 30, generator=generator))[0]
        assert cka(features, 3 * features @ rotation + 7) == pytest.approx(1, abs=1e-3)
        assert abs(cka(features, others)) < 0.05  # the biased estimator would say 0.7
        half = torch.cat([features, torch.randn(200, 30, generator=generator)], dim=1)
        assert 0.5 < cka(features, half) < 0.9

    def test_flops_are_those_of_its_matrices(self, untrained):
        script = example("measure_costs")
        model = AureaForConditionalGeneration.from_pretrained(untrained).eval().requires_grad_(False)
        assert script.flops(model.lm_head, torch.zeros(1, 3, 128)) == 2 * 3 * 128 * model.config.text_config.vocab_size
        attention = torch.nn.functional.scaled_dot_product_attention
        states = torch.zeros(1, 2, 5, 8)
        assert script.flops(attention, states, states, states) == 2 * 2 * 2 * 5 * 5 * 8


def test_quickstart_asks_about_a_scene(tmp_path):
    out = check(run_anew("quickstart.py", "--scene", 3, cwd=tmp_path))
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
        "config_overrides": '{"feature_fusion_config": {"radius": 3, "depth": 1}, "projector_hidden_size": 256}',
        "curriculum": "[[1, 1]]",
        "learning_rate": 3e-3,
    }
    del options["model_name_or_path"]
    check(run("train.py", "--do_train", *as_arguments(options)))
    log = json.loads((tmp_path / "trained" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("saved", ["checkpoint-5", "adapter_model.safetensors", "trainer_state.json"])
def test_a_folder_belongs_to_a_run_once_something_was_saved(tmp_path, saved):
    check_run = runpy.run_path(str(EXAMPLES / "train.py"))["check_run"]
    file = tmp_path / "run.json"
    file.write_text('{"dataset": "first"}')
    check_run(file, {"dataset": "second"})
    (tmp_path / saved).touch()
    with pytest.raises(ValueError, match="holds a training with --dataset first, not second"):
        check_run(file, {"dataset": "second"})
    check_run(file, {"dataset": "first"})


def test_checkpoint_whose_saving_was_cut_off_is_not_used(tmp_path, monkeypatch):
    train = runpy.run_path(str(EXAMPLES / "train.py"))
    last = train["last_complete_checkpoint"]

    def checkpoint(step, *random_states, state="{}"):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(state)
        for name in random_states:
            torch.save({}, folder / name)
        return folder

    assert last(tmp_path) is None
    one = checkpoint(1, "rng_state.pth")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert last(tmp_path) == str(one)  # of one process, goes on in two
    two = checkpoint(2, "rng_state_0.pth", "rng_state_1.pth")
    assert last(tmp_path) == str(two)
    checkpoint(3, "rng_state_0.pth")  # the other process was too late
    cut = checkpoint(4, "rng_state_0.pth", "rng_state_1.pth")
    os.truncate(cut / "rng_state_1.pth", 100)
    checkpoint(5, "rng_state_0.pth", "rng_state_1.pth", state="{")
    assert last(tmp_path) == str(two)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert last(tmp_path) == str(two)


def test_exact_match_does_not_count_rows_without_labels():
    exact_match = runpy.run_path(str(EXAMPLES / "train.py"))["ExactMatch"]()
    labels = np.array([[-100, 5, 6], [-100, -100, -100], [-100, 7, -100]])
    predictions = np.array([[5, 6, 0], [1, 2, 3], [8, 0, 0]])
    assert exact_match(EvalPrediction(predictions, labels), compute_result=True) == {"exact_match": 0.5}
    assert exact_match(EvalPrediction(predictions[1:2], labels[1:2]), compute_result=True) == {"exact_match": 0.0}


def test_each_kind_of_row_that_a_curriculum_mixes_is_evaluated():
    train = runpy.run_path(str(EXAMPLES / "train.py"))
    curriculum = '[[0.5, 1], [1, 5, {"color": 1}, {"textured": 0.4, "open": 0.3, "pair": 0.3}]]'
    rows = train["load_eval_rows"](train["DataArguments"](dataset="scenes", eval_scenes=3, curriculum=curriculum))
    assert {"color", "describe", "open", "pair"} <= rows.keys() and "textured" not in rows
    assert [len(row["images"]) for row in rows["pair"]] == [2, 2, 2]
    assert {len(row["messages"]) for row in rows["open"]} == {2} and len(rows["open"]) > 3


def test_skipped_scenes_are_the_first_ones():
    train = runpy.run_path(str(EXAMPLES / "train.py"))
    rows = train["load_rows"]("scenes", train["DataArguments"](dataset="scenes", scenes=3, first_scene=2))
    assert list(rows.seeds) == [4, 6, 8]


def test_tokens_of_a_word_are_those_at_the_beginning_and_inside():
    words_tokens = runpy.run_path(str(EXAMPLES / "train.py"))["words_tokens"]

    def tokenizer(text, add_special_tokens):
        assert not add_special_tokens
        return {"input_ids": {"teal": [7, 3], " teal": [5]}[text]}

    assert words_tokens(tokenizer, ["teal"]) == [3, 5, 7]


def test_adapters_on_a_model_of_parts_are_refused():
    train = runpy.run_path(str(EXAMPLES / "train.py"))
    model_args = train["ModelArguments"](lora=["fusion"], text="t", vision="v", spatial_vision="s")
    training_args = SimpleNamespace(do_train=True, do_eval=False, train_sampling_strategy="random")
    with pytest.raises(ValueError, match="the new parts would be lost"):
        train["check_options"](model_args, train["DataArguments"](dataset="scenes"), training_args)


class TestPretraining:
    def test_patches_are_labelled_with_what_covers_them(self):
        script = example("pretrain_encoders")
        for seed in (3, 8, 21):
            objects = scene_objects(seed, max_objects=2)
            labels = script.patch_labels(seed).reshape(3, 14, 14)
            for scene_object in objects[-1:]:  # in front
                row, column = (int(place // 8) for place in (scene_object.y, scene_object.x))
                if scene_object.shape not in ("ring", "triangle"):  # whose centers may be another's
                    named = [words[number] for words, number in zip((COLORS, SHAPES, SIZES), labels[:, row, column])]
                    assert named == [scene_object.color, scene_object.shape, scene_object.size]
            empty = labels[0] == len(COLORS)
            covers = sum(object_mask(one) for one in objects).reshape(14, 8, 14, 8).mean(axis=(1, 3))
            assert (covers[empty] < 0.6).all() and (covers[~empty] >= 0.3).all()
            assert ((labels[1] == len(SHAPES)) == empty).all() and ((labels[2] == len(SIZES)) == empty).all()

    @pytest.mark.parametrize("name", ["siglip", "dinov2", "resnet"])
    def test_an_encoder_is_kept_and_begun_with(self, name, tmp_path):
        said = check(run("pretrain_encoders.py", "--output_dir", tmp_path, "--encoders", name, "--pictures", 64))
        assert f"{name}: step 2 of 2" in said and "of objects' patches right" in said
        encoder = "vision" if name == "siglip" else "spatial_vision"
        options = ["--fusion_type", "none", "--encoder", encoder, "--encoders_dir", tmp_path]
        options += [] if name == "siglip" else ["--spatial_vision", name]
        check(run("make_embedded_model.py", "--output_dir", tmp_path / "model", *options))
        model = AureaForConditionalGeneration.from_pretrained(tmp_path / "model")
        kept, found = (
            AutoModel.from_pretrained(tmp_path / name).state_dict(),
            model.get_submodule(f"model.{encoder}_model"),
        )
        assert all(torch.equal(kept[key], tensor) for key, tensor in found.state_dict().items())
        embedded = AureaForConditionalGeneration.from_pretrained(embedded_model_path())
        assert torch.equal(model.get_input_embeddings().weight, embedded.get_input_embeddings().weight)
