# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The command `aurea`."""

import io
import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import FIXTURES
from PIL import Image
from test_examples import run

import transformers_aurea
import transformers_aurea_command
from transformers_aurea import (
    AureaConfig,
    AureaForConditionalGeneration,
    AureaProcessor,
    DynamicTopKLogitsWarper,
    convert_aurea_weights_to_hf,
)
from transformers_aurea.cli import COMMANDS, main
from transformers_aurea.cli.answering import user_message
from transformers_aurea.cli.chat import talk
from transformers_aurea.cli.convert import CONVERTERS, PUBLISHED
from transformers_aurea.cli.errors import message
from transformers_aurea.cli.serve import REQUIRED
from transformers_aurea.convert_aurea_weights_to_hf import ConversionError
from transformers_aurea.scenes import make_scene, test_seeds
from transformers_aurea.training_aurea import set_trainable


SEED = test_seeds(2)[-1]  # the scene of the README, which the embedded model answers rightly


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three scenes, and what is no picture."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        make_scene(SEED + 2 * number)[0].save(folder / f"{number}.png")
    (folder / "text.png").write_text("no picture")
    (folder / "notes.txt").write_text("nothing")
    return folder


@pytest.fixture(scope="module")
def picture(folder) -> str:
    return str(folder / "0.png")


@pytest.fixture
def generated(monkeypatch) -> list[dict]:
    """Arguments that `generate` gets."""
    calls = []
    generate = AureaForConditionalGeneration.generate

    def record(self, *args, **kwargs):
        calls.append(kwargs)
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(AureaForConditionalGeneration, "generate", record)
    return calls


def answer_to(seed: int, asked: str) -> str:
    [answer] = [answer for kind, _, answer in make_scene(seed)[1] if kind == asked]
    return answer


def refusal(arguments, capsys) -> str:
    """What is said of wrong usage."""
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


class TestCommand:
    def test_help_and_wrong_usage_import_neither_torch_nor_the_package(self):
        script = """
import sys
from transformers_aurea_command import main
for arguments in (["--help"], ["ask", "--help"], ["ask", "no.png", "what?"]):
    sys.argv = ["aurea", *arguments]
    try:
        main()
    except SystemExit as ended:
        print(ended.code)
assert not {"torch", "transformers", "transformers_aurea"} & sys.modules.keys()
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("usage: aurea") and done.stdout.endswith("0\n2\n")

    @pytest.mark.parametrize("name", COMMANDS)
    def test_its_commands_are_listed_with_a_line_of_help(self, name, capsys):
        with pytest.raises(SystemExit):
            main(["--help"])
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == [name]]
        assert len(line.split()) > 3

    def test_a_command_that_runs_has_the_whole_package(self, tmp_path):
        script = tmp_path / "aurea.py"
        script.write_text(
            "import transformers_aurea_command as command, sys\n"
            "for name in [*sys.modules]:\n"
            "    if name.partition('.')[0] == 'transformers_aurea':\n"
            "        del sys.modules[name]\n"
            "assert command.main() == 0\n"
            "from transformers_aurea.cli import COMMANDS\n"
        )
        done = run(script, "info", "--json")
        assert done.returncode == 0 and json.loads(done.stdout)["parameters"] == 2_023_804, done.stderr

    def test_ctrl_c_while_it_imports_is_one_line(self, tmp_path):
        (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
        source = Path(transformers_aurea_command.__file__).parent
        script = f"import sys; sys.path[:0] = {[str(tmp_path), str(source)]}; "
        script += "import transformers_aurea_command; transformers_aurea_command.main()"
        command = [sys.executable, "-c", script, "info"]
        listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # tests in the background inherit deafness
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listens
        )
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "interrupted\n" and process.returncode == 130

    def test_a_reader_that_has_gone_is_met_in_silence(self, tmp_path):
        (tmp_path / "script.py").write_text(
            "import os, sys\n"
            "from transformers_aurea.cli.errors import errors_in_one_line\n"
            "errors_in_one_line()\n"
            "reader, writer = os.pipe()\n"
            "os.close(reader)\n"
            "os.dup2(writer, 1)\n"
            "print('nobody reads this', flush=True)\n"
        )
        done = run(tmp_path / "script.py")
        assert (done.returncode, done.stderr) == (141, "")

    def test_what_is_left_to_print_is_printed_before_it_ends(self, monkeypatch):
        class Closed(io.StringIO):
            def flush(self):
                raise BrokenPipeError

        monkeypatch.setattr(sys, "stdout", Closed())
        with pytest.raises(BrokenPipeError):
            main(["info", "--json"])

    def test_an_interrupt_that_a_library_renamed_is_one(self, tmp_path):
        (tmp_path / "script.py").write_text(
            "from transformers_aurea.cli.errors import errors_in_one_line\n"
            "errors_in_one_line()\n"
            "try:\n    raise KeyboardInterrupt\n"
            "except KeyboardInterrupt as error:\n    raise RuntimeError('something else') from error\n"
        )
        done = run(tmp_path / "script.py")
        assert (done.returncode, done.stderr) == (130, "interrupted\n")


class TestAsk:
    def test_it_answers_what_the_model_answers(self, picture, capsys):
        for _, question, answer in make_scene(SEED)[1]:
            assert main(["ask", picture, question]) == 0
            assert capsys.readouterr().out == f"{answer}\n"

    def test_json(self, picture, capsys):
        _, question, answer = make_scene(SEED)[1][0]
        assert main(["ask", picture, question, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"images": [picture], "question": question, "answer": answer}

    def test_all_pictures_of_a_question_are_shown(self, folder, generated, capsys):
        main(["ask", f"{folder}/0.png", f"{folder}/1.png", "In which picture is the star?"])
        [call] = generated
        embedded = transformers_aurea.embedded_model_path()
        pixels = AureaProcessor.from_pretrained(embedded)(
            images=[f"{folder}/0.png", f"{folder}/1.png"], return_tensors="pt"
        )["pixel_values"]
        features = AureaForConditionalGeneration.from_pretrained(embedded).get_image_features(pixels).pooler_output
        torch.testing.assert_close(call["cross_attention_states"].cpu(), features.flatten(0, 1)[None])
        assert call["num_images"].tolist() == [2]

    def test_a_folder_is_a_question_about_each(self, folder, generated, capsys):
        assert main(["ask", str(folder), "How many objects are there?", "--json", "--batch_size", "2"]) == 1
        said = capsys.readouterr()
        found = [json.loads(line) for line in said.out.splitlines()]
        assert [one["images"] for one in found] == [[f"{folder}/{number}.png"] for number in range(3)]
        expected = [answer_to(SEED + 2 * number, "count") for number in range(3)]
        assert [one["answer"] for one in found] == expected
        assert [len(call["input_ids"]) for call in generated] == [2, 1]
        assert "no pictures by their names: notes.txt" in said.err
        assert f"'{folder}/text.png' cannot be read" in said.err

    def test_a_picture_from_standard_input(self, picture, monkeypatch, capsys):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(picture).read_bytes())))
        _, question, answer = make_scene(SEED)[1][0]
        main(["ask", "-", question])
        assert capsys.readouterr().out == f"{answer}\n"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
        with pytest.raises(ValueError, match="Standard input is empty"):
            main(["ask", "-", question])

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ([], {"max_new_tokens": 48, "num_beams": 1}),
            (["--max_new_tokens", 3], {"max_new_tokens": 3}),
            (["--temperature", 0], {"do_sample": False}),
            (
                ["--temperature", 0.5, "--top_p", 0.8, "--top_k", 7],
                {"do_sample": True, "temperature": 0.5, "top_p": 0.8, "top_k": 7},
            ),
            (["--num_beams", 3], {"num_beams": 3, "streamer": None}),
            (["--dtype", "bfloat16"], {}),
        ],
        ids=str,
    )
    def test_options_reach_generate(self, options, expected, picture, generated, capsys):
        main(["ask", picture, "How many objects are there?", *map(str, options)])
        [call] = generated
        assert {name: call[name] for name in expected} == expected
        assert capsys.readouterr().out.strip()

    def test_dynamic_top_k(self, picture, generated):
        options = ["--dynamic_top_k", "3", "9", "--max_new_tokens", "12", "--temperature", "0.7"]
        main(["ask", picture, "How many objects are there?", *options])
        [call] = generated
        [warper] = [one for one in call["logits_processor"] if isinstance(one, DynamicTopKLogitsWarper)]
        assert (warper.min_top_k, warper.max_top_k, warper.max_new_tokens) == (3, 9, 12)
        assert warper.prompt_length == call["input_ids"].shape[1]
        assert call["logits_processor"][-1].temperature == 0.7 and call["do_sample"] and call["top_k"] == 0

    def test_a_seed_makes_samples_repeat(self, picture, capsys):
        said = []
        for seed in ("1", "1", "2"):
            main(["ask", picture, "Describe the image.", "--temperature", "50", "--seed", seed])
            said.append(capsys.readouterr().out)
        assert said[0] == said[1] != said[2]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["{picture}"], "required: QUESTION"),
            (["{picture}", ""], "the question is empty"),
            (["no.png", "what?"], "no.png is no picture: give a file or a URL"),
            (["what?", "{picture}"], "the last argument is the question, but "),
            (["-", "-", "what?"], "give it once"),
            (["{folder}", "{picture}", "what?"], "give it alone"),
            (["{picture}", "{folder}", "what?"], "give it alone"),
            (["{picture}", "what?", "--colour"], "unrecognized arguments: --colour"),
            (["{picture}", "what?", "--temperature", "warm"], "from 0 to 100, got 'warm'"),
            (["{picture}", "what?", "--temperature", "nan"], "from 0 to 100, got 'nan'"),
            (["{picture}", "what?", "--max_new_tokens", "0"], "at least 1, got '0'"),
            (["{picture}", "what?", "--temperature", "0", "--top_k", "5"], "leave out --top_p, --top_k"),
            (["{picture}", "what?", "--top_p", "0"], "--top_p 0 leaves no token"),
            (["{picture}", "what?", "--dynamic_top_k", "9", "3"], "needs MIN MAX, got 9 3"),
            (["{picture}", "what?", "--dynamic_top_k", "3", "9", "--num_beams", "2"], "leave them out"),
            (["{picture}", "what?", "--dtype", "int8"], "invalid choice: 'int8'"),
            (["{picture}", "what?", "--device", "toaster"], "--device toaster: "),
        ],
        ids=str,
    )
    def test_wrong_usage(self, arguments, words, picture, folder, capsys):
        arguments = [argument.format(picture=picture, folder=folder) for argument in arguments]
        assert words in refusal(["ask", *arguments], capsys)

    def test_what_is_no_model_is_named(self, picture, tmp_path, tmp_path_factory):
        def error(model):
            with pytest.raises(ValueError) as refused:
                main(["ask", picture, "what?", "--model", str(model)])
            return message(refused.value)

        assert error(tmp_path) == f"{tmp_path} is no model: it is not a folder with a config.json."
        assert error(picture).startswith(f"{picture} is no model")
        assert error("nobody/nothing").startswith("nobody/nothing is no folder, and no hub's model that could be had")
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        assert "is a 'bert', which answers no questions about pictures" in error(tmp_path)
        (tmp_path / "config.json").write_text("{")
        assert error(tmp_path).startswith(f"{tmp_path} cannot be read: ")

    def test_what_is_no_picture_is_named_before_the_model_is_loaded(self, folder, tmp_path):
        (tmp_path / "cut.png").write_bytes((folder / "0.png").read_bytes()[:999])
        for name in (folder / "text.png", tmp_path / "cut.png"):
            with pytest.raises(ValueError, match="cannot be read"):
                main(["ask", str(name), "what?", "--model", "nobody/nothing"])
        (tmp_path / "cut.png").unlink()
        with pytest.raises(ValueError, match="holds no pictures"):
            main(["ask", str(tmp_path), "what?", "--model", "nobody/nothing"])

    @pytest.mark.parametrize("size", [(1, 1), (8000, 5000)])
    def test_pictures_of_any_size(self, size, tmp_path, capsys):
        Image.new("RGB", size).save(tmp_path / "picture.jpg")
        assert main(["ask", str(tmp_path / "picture.jpg"), "How many objects are there?"]) == 0
        assert capsys.readouterr().out.strip()


class TestChat:
    def test_the_conversation_is_kept_until_reset(self, picture, monkeypatch, capsys):
        asked = []

        def answer(conversations, stream):
            assert stream
            [conversation] = conversations
            asked.append([_said(turn) for turn in conversation])
            return [f"answer {len(asked)}"]

        lines = [
            "first",
            f"/image {picture}",
            "",
            "second",
            "/image no.png",
            "/what",
            "/reset",
            "third",
            "/quit",
            "fourth",
        ]
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        talk(answer, [Image.new("RGB", (5, 5))])
        before = [("user", 1, "first"), ("assistant", 0, "answer 1")]
        assert asked == [before[:1], [*before, ("user", 1, "second")], [("user", 0, "third")]]
        said = capsys.readouterr().err.splitlines()
        assert "'no.png' cannot be read" in said[0] and "there is no /what" in said[1] and len(said) == 2

    def test_it_answers_to_the_end_of_what_is_said(self, picture, monkeypatch, capsys):
        _, question, answer = make_scene(SEED)[1][0]
        monkeypatch.setattr(sys, "stdin", io.StringIO(question))
        assert main(["chat", picture]) == 0
        assert capsys.readouterr().out == f"{answer}\n"

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [(["-"], "standard input, -, is what you say"), (["no.png"], "no.png is no picture")],
    )
    def test_wrong_usage(self, arguments, words, capsys):
        assert words in refusal(["chat", *arguments], capsys)


class TestInfo:
    def info(self, capsys, *arguments):
        assert main(["info", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def test_it_says_what_the_model_has(self, capsys):
        found = self.info(capsys)
        model = AureaForConditionalGeneration.from_pretrained(found["model"])
        tensors = [*model.parameters(), *model.buffers()]
        assert (
            found["parameters"] == model.num_parameters() == sum(one["parameters"] for one in found["parts"].values())
        )
        assert found["memory"]["inference_bytes"] == sum(tensor.nbytes for tensor in tensors)
        assert found["parts"]["fusion"]["classes"] == ["AureaSpatialRangeFusion"]
        assert found["parts"]["language_model"]["classes"] == ["Linear", "Phi3Model"]
        assert found["fusion"] == {"fusion_type": "spatial_range", "radius": 3, "depth": 1}
        assert found["connector"] == "cross_attention" and found["visual_tokens_per_image"] == 196
        assert list(found["stages"]) == ["align", "instruct", "full"]  # no composition in it
        for stage, numbers in found["stages"].items():
            assert numbers["trainable"] == set_trainable(model, stage).trainable
            trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
            assert numbers["bytes"] == found["memory"]["inference_bytes"] + 3 * trained

    def test_types_count(self, capsys):
        found = self.info(capsys, "--dtype", "bfloat16")
        model = AureaForConditionalGeneration.from_pretrained(found["model"], dtype=torch.bfloat16)
        assert sum(part["bytes"] for part in found["parts"].values()) == sum(p.nbytes for p in model.parameters())
        assert found["parts"]["vision"]["dtypes"].keys() == {"float32"}
        assert "bfloat16" in found["parts"]["projector"]["dtypes"]

    def test_a_model_without_weights_is_told_too(self, tmp_path, capsys):
        source = Path(transformers_aurea.embedded_model_path())
        (tmp_path / "config.json").write_text((source / "config.json").read_text())
        assert self.info(capsys, str(tmp_path))["parameters"] == 2_023_804

    def test_the_published_model_is_told_by_its_configuration(self, tmp_path, capsys):
        AureaConfig().save_pretrained(tmp_path)
        found = self.info(capsys, str(tmp_path), "--dtype", "bfloat16")
        encoders = sum(found["parts"][name]["parameters"] for name in ("vision", "spatial_vision"))
        assert (found["parameters"], encoders) == (7_562_713_952, 1_548_929_264)
        in_float32 = encoders + 16  # the widths σ of as many layers
        assert sum(part["bytes"] for part in found["parts"].values()) == 2 * found["parameters"] + 2 * in_float32

    def test_as_a_table(self, capsys):
        assert main(["info"]) == 0
        said = capsys.readouterr().out
        assert "2,023,804 parameters" in said and "an estimate" in said and "without activations" in said
        assert "fusion with --use_kernels, on " in said and "connector: cross_attention, 196 visual tokens" in said


class TestConvert:
    @pytest.fixture
    def chosen(self, monkeypatch) -> list:
        """Converters that were called, with their arguments; they do nothing."""
        calls = []
        for name in {*CONVERTERS.values(), PUBLISHED}:
            module = ModuleType(name)
            module.main = lambda argv, name=name: calls.append((name, argv)) or 7
            if name == PUBLISHED:
                monkeypatch.setattr(convert_aurea_weights_to_hf, "main", module.main)
            else:
                monkeypatch.setitem(sys.modules, f"transformers_aurea.{name}", module)
        return calls

    @pytest.mark.parametrize(
        ("model_type", "name"),
        [
            ("paligemma", "convert_relatives"),
            ("llava", "convert_relatives"),
            ("prismatic", "convert_prismatic"),
            ("openvla", "convert_prismatic"),
            (None, "convert_aurea_weights_to_hf"),
        ],
    )
    def test_what_the_input_is_decides(self, model_type, name, chosen, tmp_path, capsys):
        (tmp_path / "aureamodel.safetensors").touch()
        if model_type:
            (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        given = ["--input_dir", str(tmp_path), "--output_dir", "out"]
        assert main(["convert", *given, "--dtype", "bfloat16", "--verify"]) == 7
        assert chosen == [(name, [f"--input_dir={tmp_path}", "--output_dir=out", "--dtype=bfloat16", "--verify"])]
        [line] = capsys.readouterr().out.splitlines()
        assert f"transformers_aurea.{name} converts it" in line and (model_type or "published") in line

    def test_the_published_layout_becomes_a_model(self, tmp_path, capsys):
        options = ["--config", str(FIXTURES / "tiny_config.json"), "--output_dir", str(tmp_path / "aurea")]
        assert main(["convert", "--input_dir", str(FIXTURES / "published"), *options]) == 0
        assert main(["info", str(tmp_path / "aurea")]) == 0
        assert main(["convert", "--input_dir", str(FIXTURES / "published"), *options]) == 1  # it is there already
        said = capsys.readouterr()
        assert "AureaForConditionalGeneration" in said.out and said.err.endswith("exists and is not empty.\n")

    def test_what_is_nothing_is_named(self, tmp_path):
        with pytest.raises(ConversionError, match="nobody/nothing is neither a folder nor a hub id to be had"):
            main(["convert", "--input_dir", "nobody/nothing", "--output_dir", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()
        with pytest.raises(ConversionError, match=r"neither aureamodel.safetensors nor a config.json of one of: pali"):
            main(["convert", "--input_dir", str(tmp_path), "--output_dir", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()

    def test_wrong_usage(self, tmp_path, capsys):
        assert "--output_dir" in refusal(["convert", "--input_dir", tmp_path], capsys)
        (tmp_path / "config.json").write_text('{"model_type": "llava"}')
        options = ["--input_dir", tmp_path, "--output_dir", tmp_path / "out", "--dtype", "float32"]
        assert "unrecognized arguments: --dtype=float32" in refusal(["convert", *options], capsys)


class TestTrain:
    def test_it_trains_as_the_script_does(self, tmp_path):
        options = ["--dataset", "scenes", "--scenes", "8", "--stage", "align", "--max_steps", "1", "--do_train"]
        (tmp_path / "run.args").write_text(" ".join(options))
        options = ["--args_file", str(tmp_path / "run.args"), "--output_dir", str(tmp_path / "trained")]
        assert main(["train", *options, "--report_to", "none"]) == 0
        assert (tmp_path / "trained" / "model.safetensors").is_file()
        assert json.loads((tmp_path / "trained" / "run.json").read_text())["stage"] == "align"
        state = json.loads((tmp_path / "trained" / "trainer_state.json").read_text())
        assert state["global_step"] == 1

    def test_all_options_are_its_own(self, capsys):
        with pytest.raises(SystemExit) as ended:
            main(["train", "--help"])
        said = capsys.readouterr().out
        assert ended.value.code == 0 and said.startswith("usage: aurea train ")
        assert "--stage {compose,align,instruct,full}" in said and "--learning_rate" in said

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ([], "required: --dataset"),
            (["--dataset", "scenes", "--output_dir", "{out}"], "Nothing to do: give --do_train"),
            (["--args_file", "no.args"], "--args_file no.args does not exist"),
            (["--dataset", "scenes", "--output_dir", "{out}", "--do_train", "--stages", "align"], "--stages"),
        ],
        ids=str,
    )
    def test_wrong_usage(self, options, words, tmp_path, capsys):
        options = [option.format(out=tmp_path / "out") for option in options]
        assert words in refusal(["train", *options], capsys)
        assert not (tmp_path / "out").exists()


class TestEvaluate:
    def test_it_scores_the_embedded_model(self, tmp_path, capsys):
        output = tmp_path / "scores.json"
        assert main(["evaluate", "--scenes", "3", "--no_controls", "--output", str(output)]) == 0
        scores = json.loads(output.read_text())
        assert scores["all"]["questions"] == sum(len(make_scene(seed)[1]) for seed in test_seeds(3))
        assert scores["all"]["exact_match"] > 0.9 and "exact" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--scenes", "0"], "aurea evaluate: error: argument --scenes: must be an integer of at least 1, got '0'"),
            (["--scenes", "1"], "--scenes 1 leaves no wrong picture to show: give at least 2, or --no_controls"),
            (["--first_scene", "-1"], "must be an integer of at least 0, got '-1'"),
            (["--max_objects", "6"], "max_objects must be an integer from 1 to 5, not 6"),
            (["--recolor", "{"], "--recolor: { is no JSON"),
            (["--train_args", "no.args"], "--train_args no.args does not exist"),
            (["--scenes", "2", "--nonsense"], "unrecognized arguments: --nonsense"),
            (["--output", "no/such/folder.json"], "there is no folder no/such"),
        ],
        ids=str,
    )
    def test_wrong_usage(self, options, words, capsys):
        assert words in refusal(["evaluate", *options], capsys)


class TestServe:
    @pytest.fixture
    def served(self, monkeypatch) -> list:
        """What `transformers serve` was asked for, which does nothing but install its hook."""
        # some releases import `requests` there, which is none of their requirements
        command = pytest.importorskip("transformers.cli.transformers", exc_type=ImportError)
        calls = []

        def app(arguments, prog_name):
            monkeypatch.setattr(sys, "excepthook", print)
            calls.append(arguments)

        monkeypatch.setattr(command, "app", app)
        for name in REQUIRED:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        return calls

    def test_it_is_transformers_serve_of_any_model(self, served, tmp_path):
        hook = sys.excepthook
        assert main(["serve"]) == main(["serve", "--port", "9"]) == main(["serve", "some/model", "--help"]) == 0
        embedded = transformers_aurea.embedded_model_path()
        assert served == [["serve", embedded], ["serve", embedded, "--port", "9"], ["serve", "some/model", "--help"]]
        assert sys.excepthook is hook
        with pytest.raises(ValueError, match="is no model: it is not a folder"):
            main(["serve", str(tmp_path)])

    def test_ctrl_c_ends_it_with_its_status(self, served, monkeypatch):
        def app(arguments, prog_name):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as error:
                raise SystemExit(1) from error

        monkeypatch.setattr(sys.modules["transformers.cli.transformers"], "app", app)
        assert main(["serve"]) == 130

    def test_what_it_cannot_load_is_named(self, served, monkeypatch):
        def app(arguments, prog_name):
            raise OSError("no connection")

        monkeypatch.setattr(sys.modules["transformers.cli.transformers"], "app", app)
        with pytest.raises(ValueError, match=r"nobody/nothing is no folder, and no hub's model .* no connection"):
            main(["serve", "nobody/nothing"])

    @pytest.mark.parametrize("name", REQUIRED)
    def test_what_is_missing_is_told_with_its_extra(self, name, served, monkeypatch):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ModuleNotFoundError) as refused:
            main(["serve"])
        assert message(refused.value).endswith('pip install "transformers-aurea[serve]"') and not served

    def test_what_the_oldest_release_wants_beside_is_of_the_extra_too(self):
        missing = ModuleNotFoundError("No module named 'requests'", name="requests")
        assert message(missing).endswith('pip install "transformers-aurea[serve]"')

    def test_a_processor_may_stand_for_its_tokenizer_where_answers_are_to_stop(self, picture):
        model = AureaForConditionalGeneration.from_pretrained(transformers_aurea.embedded_model_path())
        processor = AureaProcessor.from_pretrained(transformers_aurea.embedded_model_path())
        inputs = processor.apply_chat_template(
            [user_message([Image.open(picture)], "Describe the image.")],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        answer = answer_to(SEED, "describe")
        word = answer.split()[2]
        tokens = model.generate(**inputs, do_sample=False, stop_strings=[word], tokenizer=processor)
        said = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        assert said == answer[: answer.index(word) + len(word)] and said != answer


def _said(message: dict) -> tuple[str, int, str]:
    """Role, number of pictures and text."""
    kinds = [part["type"] for part in message["content"]]
    return message["role"], kinds.count("image"), message["content"][-1]["text"]


class TestLook:
    def test_it_draws_where_the_answer_looked(self, picture, tmp_path, capsys):
        pytest.importorskip("matplotlib")
        output = tmp_path / "look.png"
        assert main(["look", picture, "--question", "How many objects are there?", "--output", str(output)]) == 0
        assert capsys.readouterr().out.splitlines() == [answer_to(SEED, "count"), str(output)]
        assert Image.open(output).width > 500

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["no.png"], "no.png is no picture"),
            (["PICTURE", "--question", " "], "the question is empty"),
            (["PICTURE", "--answer", "two"], "--answer without --question"),
            (["PICTURE", "--at", "1"], "expected 2 arguments"),
        ],
        ids=lambda value: str(value)[:30],
    )
    def test_wrong_usage(self, picture, arguments, message, capsys):
        assert message in refusal(["look", *[picture if one == "PICTURE" else one for one in arguments]], capsys)
