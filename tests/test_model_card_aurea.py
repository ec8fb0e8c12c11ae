# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The model card that saving, merging, converting and publishing leave beside a model, and whose card wins."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, run_without_package, tiny_model
from huggingface_hub import ModelCard
from test_added_encoder_aurea import make_encoder
from test_parts_aurea import byte_tokenizer, dinov2, language_model, siglip
from transformers import Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import logging

from transformers_aurea import AureaForConditionalGeneration, AureaModel, embedded_model_path
from transformers_aurea.convert_aurea_weights_to_hf import build_config, main
from transformers_aurea.model_card_aurea import is_hub_id, model_card
from transformers_aurea.training_aurea import lora_targets


PARTS = {"vision": ("google/siglip2", siglip), "spatial_vision": ("facebook/dinov2", dinov2)}
PARTS["text"] = ("Qwen/Qwen3", language_model)
OTHERS = "---\nlicense: mit\nbase_model: someone/base\n---\n# By hand\n"


def card(folder) -> ModelCard:
    return ModelCard.load(Path(folder, "README.md"))


def model_of_parts(**names: str) -> AureaForConditionalGeneration:
    """Of parts that say of themselves that they were loaded from these hub ids or folders."""
    parts = {}
    for role, (name, make) in PARTS.items():
        parts[role] = make()
        parts[role].config.name_or_path = names.get(role, name)
    fusion = {"feature_fusion_config": {"radius": 1, "depth": 1}}
    return AureaForConditionalGeneration.from_pretrained_parts(**parts, tokenizer=byte_tokenizer(), **fusion)


@pytest.fixture
def without_network(monkeypatch):
    def connect(*args):
        raise AssertionError("a network was asked for")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


class TestSaving:
    def test_the_card_tells_hub_and_reader_what_the_model_is_made_of(self, tmp_path, without_network):
        model_of_parts().save_pretrained(tmp_path / "mine")
        data, text = card(tmp_path / "mine").data, card(tmp_path / "mine").text
        assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-text-to-text", None)
        assert data.base_model == [name for name, _ in PARTS.values()]
        assert data.tags == ["aurea", "vision-language", "custom_code"]
        assert text.lstrip().startswith("# mine\n") and "None was found" in text
        assert "| spatial encoder | dinov2_with_registers | facebook/dinov2 | — |" in text

    def test_folders_of_this_machine_are_named_nowhere(self, tmp_path):
        shutil.copytree(FIXTURES, tmp_path / "parts" / "phi4")
        folder = str(tmp_path / "parts" / "phi4")
        model_of_parts(text=folder, vision=folder).save_pretrained(tmp_path / "mine")
        assert card(tmp_path / "mine").data.base_model == ["facebook/dinov2"]
        assert folder not in "".join((tmp_path / "mine" / name).read_text() for name in ("README.md", "config.json"))

    def test_base_models_and_licence_survive_loading_and_saving(self, tmp_path, without_network):
        model_of_parts().save_pretrained(tmp_path / "first")
        (tmp_path / "first" / "README.md").write_text(OTHERS)
        AureaForConditionalGeneration.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
        second = card(tmp_path / "second")
        assert second.data.base_model == ["someone/base", *(name for name, _ in PARTS.values())]
        assert second.data.license == "mit" and second.text.endswith("## Licence\n\nmit\n")

    def test_a_base_of_a_hub_is_named_and_its_licence_taken_from_the_cache(self, tmp_path, monkeypatch):
        (tmp_path / "README.md").write_text(OTHERS)
        cached = {"someone/aurea": str(tmp_path / "README.md")}
        monkeypatch.setattr(
            "transformers_aurea.model_card_aurea.try_to_load_from_cache", lambda name, file: cached.get(name)
        )
        model = tiny_model()
        model.config.name_or_path = "someone/aurea"
        assert model_card(model, "mine").data.license == "mit"
        assert model_card(model, "mine").data.base_model == ["someone/aurea", "someone/base"]

    @pytest.mark.parametrize("content", ["---\n[\n---\n", "---\n- a\n---\n", "no metadata", "\xff"], ids=ascii)
    def test_a_broken_card_of_the_source_keeps_nobody_from_saving(self, tmp_path, content):
        model = tiny_model()
        (tmp_path / "README.md").write_bytes(content.encode("latin-1"))
        model.config.name_or_path = str(tmp_path)
        assert model_card(model, "mine").data.license is None

    def test_the_example_runs_in_that_very_folder_and_without_the_package(self, converted, tmp_path):
        folder = embedded_model_path(tmp_path / "saved")
        script = "exec(open('example.py').read(), {})"
        for path in (Path(folder), shutil.copytree(converted, tmp_path / "converted")):
            [block] = re.findall(r"```python\n(.*?)```", card(path).text, re.DOTALL)
            (path / "example.py").write_text(block)
            run_without_package(script, path)

    def test_only_a_spatial_range_fusion_has_a_kernel(self):
        assert "AUREA_KERNEL_REPO" in model_card(tiny_model(), "mine").text
        other = tiny_model(feature_fusion_config={"fusion_type": "concat"})
        assert "kernel" not in model_card(other, "mine").text

    @pytest.mark.parametrize("is_first", [True, False])
    def test_processes_beside_the_main_one_write_none(self, tmp_path, monkeypatch, is_first):
        model = tiny_model()
        model.save_pretrained(tmp_path / "flag", is_main_process=False)
        monkeypatch.setattr(type(model), "should_save_on_this_rank", lambda self, is_main_process: is_first)
        model.config.save_pretrained(tmp_path / "rank")
        model.save_pretrained(tmp_path / "rank")
        assert not (tmp_path / "flag" / "README.md").exists()
        assert (tmp_path / "rank" / "README.md").exists() is is_first

    def test_a_model_without_head_has_none(self, tmp_path):
        AureaModel(tiny_model().config).save_pretrained(tmp_path)
        assert not (tmp_path / "README.md").exists()

    def test_adapters_alone_have_none_of_ours(self, tmp_path):
        peft = pytest.importorskip("peft", minversion=MIN_PEFT_VERSION)
        model = tiny_model()
        model.add_adapter(peft.LoraConfig(target_modules=lora_targets(model, "projector")))
        model.save_pretrained(tmp_path)
        assert (tmp_path / "adapter_config.json").exists() and not (tmp_path / "README.md").exists()

    def test_a_second_encoder_is_named(self):
        model = tiny_model(feature_fusion_config={"fusion_type": "none"})
        encoder = make_encoder()
        encoder.config.name_or_path = "facebook/dinov2-small"
        model.add_encoder(encoder)
        assert model_card(model, "mine").data.base_model == ["facebook/dinov2-small"]

    def test_a_merged_model_names_its_base(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = AureaForConditionalGeneration.from_pretrained(embedded_model_path())
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=lora_targets(model, "projector")))
        adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
        assert card(tmp_path / "merged").data.license == "apache-2.0"


class TestConverting:
    def test_the_licence_is_that_of_what_was_converted(self, converted, tmp_path):
        assert card(converted).data.license is None
        shutil.copytree(FIXTURES / "published", tmp_path / "published")
        (tmp_path / "published" / "README.md").write_text(OTHERS)
        arguments = ["--input_dir", tmp_path / "published", "--config", FIXTURES / "tiny_config.json"]
        assert main([*map(str, arguments), "--output_dir", str(tmp_path / "aurea")]) == 0
        assert card(tmp_path / "aurea").data.license == "mit"
        assert card(tmp_path / "aurea").text.lstrip().startswith("# aurea\n\nA vision-language model with two")

    def test_the_published_sizes_name_the_published_parts(self, tmp_path):
        config = build_config(tmp_path, None, 200010)
        config.name_or_path = "Dcas89/Aurea"
        with torch.device("meta"):
            model = AureaForConditionalGeneration(config)
        assert model_card(model, "aurea").data.base_model == [
            *("Dcas89/Aurea", "google/siglip2-so400m-patch14-224", "facebook/dinov2-with-registers-giant"),
            "microsoft/Phi-4-mini-instruct",
        ]


class TestWhoseCardWins:
    def test_a_card_that_is_there_stays(self, tmp_path):
        (tmp_path / "README.md").write_text(OTHERS)
        tiny_model().save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == OTHERS

    def test_trainer_writes_its_own_over_ours_and_keeps_it(self, tmp_path):
        arguments = TrainingArguments(tmp_path / "run", report_to="none", use_cpu=True)
        trainer = Trainer(tiny_model(), arguments)
        trainer.save_model()
        assert card(tmp_path / "run").data.pipeline_tag == "image-text-to-text"
        trainer.create_model_card(tags=["mine"])
        written = (tmp_path / "run" / "README.md").read_text()
        assert "automatically according to the information the Trainer had access to" in written
        assert {"mine", "aurea", "vision-language", "generated_from_trainer"} <= {*card(tmp_path / "run").data.tags}
        trainer.save_model()
        assert (tmp_path / "run" / "README.md").read_text() == written

    def test_pefts_card_has_our_tags(self, tmp_path):
        peft = pytest.importorskip("peft")
        model = tiny_model()
        config = peft.LoraConfig(target_modules=lora_targets(model, "projector"))
        peft.get_peft_model(model, config).save_pretrained(tmp_path)
        assert card(tmp_path).data.library_name == "peft"
        assert {"aurea", "vision-language", "lora"} <= {*card(tmp_path).data.tags}

    def test_a_repository_without_a_card_gets_ours(self, uploads):
        tiny_model().push_to_hub("someone/mine", tags=["given"])
        data = ModelCard(uploads["README.md"].decode()).data
        assert data.pipeline_tag == "image-text-to-text"
        assert sorted(data.tags) == ["aurea", "custom_code", "given", "vision-language"]
        assert b'name, revision = "someone/mine", "main"' in uploads["README.md"]
        assert b"# mine\n" in uploads["README.md"]

    def test_a_repository_with_a_card_keeps_it(self, uploads, tmp_path):
        uploads["README.md"] = OTHERS.encode()
        tiny_model().push_to_hub("someone/mine")
        assert b"# By hand" in uploads["README.md"]
        tiny_model().save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="someone/mine")
        assert b"# By hand" in uploads["README.md"]


class TestBasesOfAdapters:
    @pytest.mark.parametrize(
        ("name", "expected"),
        [("someone/aurea", True), ("gpt2", True), ("", False), ("/a/b", False), ("./a", False), ("a()", False)],
    )
    def test_what_names_a_model_of_a_hub(self, name, expected):
        assert is_hub_id(name) is expected

    def test_a_folder_is_none(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "someone" / "aurea").mkdir(parents=True)
        assert not is_hub_id("someone/aurea")

    def test_a_base_that_only_this_machine_has_is_told_of(self, tmp_path, monkeypatch):
        peft = pytest.importorskip("peft")
        warnings = []
        monkeypatch.setattr(logging.get_logger("transformers_aurea.training_aurea"), "warning_once", warnings.append)
        tiny_model().save_pretrained(tmp_path / "base")
        model = AureaForConditionalGeneration.from_pretrained(tmp_path / "base")
        targets = lora_targets(model, "projector")
        assert len(warnings) == 1 and str(tmp_path / "base") in warnings[0] and "`model.name_or_path`" in warnings[0]
        model.name_or_path = "someone/aurea"  # as it says
        assert lora_targets(model, "projector") == targets and len(warnings) == 1
        peft.get_peft_model(model, peft.LoraConfig(target_modules=targets)).save_pretrained(tmp_path / "adapter")
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "someone/aurea"
