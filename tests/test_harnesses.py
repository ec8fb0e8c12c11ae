# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The scores that evaluation harnesses give, on tasks of `examples/scene_tasks`, are `evaluate_scenes`' own."""

import ast
import importlib
import json
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from transformers_aurea import AureaForConditionalGeneration, AureaProcessor, embedded_model_path
from transformers_aurea.evaluate_scenes import evaluate
from transformers_aurea.scenes import make_scene, test_seeds


ROOT = Path(__file__).resolve().parent.parent
TASKS = ROOT / "examples" / "scene_tasks"
SCENES = 16


@pytest.fixture(scope="module")
def expected() -> float:
    folder = embedded_model_path()
    model = AureaForConditionalGeneration.from_pretrained(folder).eval()
    scores = evaluate(model, AureaProcessor.from_pretrained(folder), test_seeds(SCENES), controls=False)
    assert scores["all"]["exact_match"] > 0.9
    return scores["all"]["exact_match"]


def test_the_entry_point_names_what_is_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["lmms_eval.models"]["aurea"].partition(":")
    source = (ROOT / "src" / f"{module.replace('.', '/')}.py").read_text()
    assert function in {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    every = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    assert not [one for one in every if "eval" in one]


def test_seeds_of_the_task_are_those_of_the_first_test_scenes():
    lines = (TASKS / "lmms_eval" / "seeds.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [*test_seeds(SCENES)]


class TestLmmsEval:
    @pytest.fixture
    def plugin(self):
        pytest.importorskip("lmms_eval")
        return importlib.import_module("transformers_aurea.lmms_eval_model")

    def test_its_score_is_ours(self, plugin, expected, monkeypatch):
        pytest.importorskip("filelock._api")  # of its releases before 4, which lmms-eval 0.7.3 needs
        from lmms_eval import evaluator, models
        from lmms_eval.tasks import TaskManager

        models.MODEL_REGISTRY_V2.register_manifest(plugin.manifest(), overwrite=True)
        monkeypatch.chdir(ROOT)
        tasks = TaskManager(include_path=str(TASKS / "lmms_eval"), include_defaults=False)
        found = evaluator.simple_evaluate(
            model="aurea", model_args="device=cpu", tasks=["scenes"], task_manager=tasks, batch_size=16
        )
        assert found["results"]["scenes"]["exact_match,none"] == pytest.approx(expected)

    def test_requests_of_several_settings_are_answered_in_their_order(self, plugin):
        documents = [
            {"image": picture, "question": question, "answer": answer}
            for picture, asked in map(make_scene, test_seeds(2))
            for _, question, answer in asked
        ]

        def messages(document):
            content = [{"type": "image", "url": document["image"]}, {"type": "text", "text": document["question"]}]
            return [{"role": "user", "content": content}]

        settings = [{"max_new_tokens": 48, "until": ["\n\n"]}, {"until": "e", "temperature": 0, "top_p": None}]
        requests = [
            SimpleNamespace(args=("", messages, settings[index % 2], index, "task", "test"))
            for index in range(len(documents))
        ]
        model = plugin.AureaForLmmsEval(device="cpu", batch_size="4")
        model.task_dict["task"] = {"test": documents}
        said = model.generate_until(requests)
        assert len({*said}) > 4
        answers = [document["answer"] for document in documents]
        ends = [answer.partition("e")[0].strip() if index % 2 else answer for index, answer in enumerate(answers)]
        assert said == ends

    def test_arguments_of_generate(self, plugin):
        model = plugin.AureaForLmmsEval(device="cpu")
        assert model.generation_arguments({"temperature": 0, "top_p": 0.9, "image_aspect_ratio": "pad"}) == {
            "max_new_tokens": 48,
            "do_sample": False,
        }
        wanted = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5}
        assert model.generation_arguments(wanted) == {**wanted, "do_sample": True}

    def test_what_is_no_picture_is_refused(self, plugin):
        def messages(document):
            return [{"role": "user", "content": [{"type": "audio", "url": Image.new("RGB", (2, 2))}]}]

        requests = [SimpleNamespace(args=("", messages, {}, 3, "task", "test"))]
        with pytest.raises(ValueError, match="task: document 3 shows audio; this model sees pictures alone"):
            plugin.Chats(requests, {"task": {"test": [{}] * 4}})[0]


class TestLmEval:
    @pytest.mark.parametrize("trust_remote_code", [False, True])
    def test_its_score_is_ours(self, trust_remote_code, expected, tmp_path):
        pytest.importorskip("lm_eval")
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        folder = embedded_model_path(tmp_path) if trust_remote_code else embedded_model_path()
        found = simple_evaluate(
            model="hf-multimodal",
            model_args={"pretrained": str(folder), "trust_remote_code": trust_remote_code, "dtype": "float32"},
            tasks=["scenes"],
            task_manager=TaskManager(include_path=str(TASKS / "lm_eval"), include_defaults=False),
            device="cpu",
            batch_size=16,
            apply_chat_template=True,
        )
        assert found["results"]["scenes"]["exact_match,none"] == pytest.approx(expected)
