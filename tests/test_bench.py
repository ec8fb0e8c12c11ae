# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""`aurea bench`: times are those of what they say, and machine and model are told."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_answering import embedded, encoded  # noqa: F401

from transformers_aurea import AureaForConditionalGeneration
from transformers_aurea.cli import main, timing
from transformers_aurea.scenes import make_scene


@pytest.fixture
def wait(monkeypatch):
    """Lets so many seconds pass."""
    now = [0.0]
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def wait(seconds: float):
        now[0] += seconds

    return wait


def test_runs_before_those_that_count_do_not_count(wait):
    seconds = iter([4, 1, 2])
    assert timing.times(lambda: wait(next(seconds)), repeats=2, warmup=1) == [1, 2]


def test_spread_is_median_and_ends():
    assert timing.spread([3, 1, 2, 9, 4]) == {"median": 3, "least": 1, "most": 9}


def test_peak_memory_grows_with_what_is_held():
    before = timing.peak_memory()
    block = torch.ones(before // 4 + 2**26)
    assert timing.peak_memory() >= before + 2**27 and block[0] == 1


def test_tokens_are_timed_apart_from_what_comes_before(embedded, wait, monkeypatch):  # noqa: F811
    model, processor = embedded
    calls = []

    def generate(self, input_ids, pixel_values, min_new_tokens, max_new_tokens, **kwargs):
        assert min_new_tokens == max_new_tokens and len(pixel_values) == len(input_ids) == 3
        calls.append(max_new_tokens)
        wait(0.1 + 0.02 * max_new_tokens)

    monkeypatch.setattr(AureaForConditionalGeneration, "generate", generate)
    inputs = timing.question_about(processor, make_scene(0)[0], "What?", 3)
    found = timing.time_answers(model, inputs, new_tokens=10, repeats=2, warmup=1)
    assert calls == [1, 11] * 3
    assert found["batch_size"] == 3 and found["prompt_tokens"] == inputs["input_ids"].shape[1]
    assert found["ms_to_first_token"]["median"] == pytest.approx(120)
    assert found["ms_per_token"]["median"] == pytest.approx(20)
    assert found["tokens_per_second"] == pytest.approx(3 / 0.02)


def test_pictures_of_a_batch_are_encoded_together(embedded, encoded):  # noqa: F811
    model, processor = embedded
    inputs = timing.question_about(processor, make_scene(0)[0], "What?", 2)
    found = timing.time_answers(model, inputs, new_tokens=1, repeats=1, warmup=0)
    assert encoded == [2, 2, 2] and found["ms_per_picture"]["median"] > 0  # by itself, and before each answer


class TestCommand:
    OPTIONS = ("--new_tokens", "2", "--repeats", "2", "--warmup", "0")

    def test_it_tells_machine_and_times(self, tmp_path, capsys):
        output = tmp_path / "times.json"
        assert main(["bench", *self.OPTIONS, "--batch_sizes", "1", "2", "--json", "--output", str(output)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert json.loads(output.read_text()) == found and [*tmp_path.iterdir()] == [output]
        assert [row["batch_size"] for row in found["batches"]] == [1, 2]
        assert found["dtype"] == "float32" and found["torch"] == torch.__version__
        assert found["attention"]["text_config"] == "sdpa"
        assert found["fusion"]["implementation"] == "pytorch" and found["fusion"]["reason"]
        for row in found["batches"]:
            assert all(row[f"ms_{name}"]["median"] > 0 for name in ("per_picture", "to_first_token", "per_token"))
            assert row["peak_bytes"] > 2**26

    def test_as_a_table_of_a_picture_and_a_question_of_ones_own(self, tmp_path, capsys):
        Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
        options = ["--image", str(tmp_path / "a.png"), "--question", "Is there a star?", "--dtype", "bfloat16"]
        assert main(["bench", *self.OPTIONS, *options]) == 0
        said = capsys.readouterr().out
        assert "embedded: bfloat16 on " in said and "ms to first token" in said and "fusion pytorch" in said

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--batch_sizes"], "expected at least one argument"),
            (["--batch_sizes", "0"], "at least 1, got '0'"),
            (["--batch_sizes", "2", "2"], "--batch_sizes 2 2: give each size once"),
            (["--new_tokens", "-3"], "at least 1, got '-3'"),
            (["--repeats", "many"], "at least 1, got 'many'"),
            (["--warmup", "-1"], "at least 0, got '-1'"),
            (["--question", " "], "the question is empty"),
            (["--image", "no.png"], "no.png is no picture: give a file or a URL"),
            (["--device", "toaster"], "--device toaster: "),
            (["--output", "no/such.json"], "there is no folder no"),
            (["one", "--model_name_or_path", "other"], "the model is named twice: one and other"),
            (["--dtype", "int8"], "invalid choice: 'int8'"),
        ],
        ids=str,
    )
    def test_wrong_usage(self, options, words, capsys):
        with pytest.raises(SystemExit, match="2"):
            main(["bench", *options])
        assert words in capsys.readouterr().err.splitlines()[-1]

    def test_what_is_no_model_or_no_picture_is_named(self, tmp_path):
        (tmp_path / "text.png").write_text("no picture")
        for options, words in (
            (["nobody/nothing"], "nobody/nothing is no folder, and no hub's model"),
            (["--image", str(tmp_path / "text.png")], "cannot be read"),
            ([str(tmp_path)], "is no model: it is not a folder with a config.json"),
        ):
            with pytest.raises(ValueError, match=words):
                main(["bench", *options])
