# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What the entries in transformers' tables of names bring, and that they change nothing else."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, random_pixels, tiny_config, tiny_model
from test_integrations_aurea import run_without_package
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
)
from transformers.models.auto import modeling_auto

from transformers_aurea.name_tables_aurea import enter_name_tables


TABLES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
)
ENTRY = {"aurea": "AureaForConditionalGeneration"}


IMPORT_SCRIPT = """
import copy, importlib, json

kinds = ("configuration", "feature_extraction", "image_processing", "modeling", "processing", "tokenization")
modules = {kind: importlib.import_module(f"transformers.models.auto.{kind}_auto") for kind in kinds}
tables = {name: table for module in modules.values() for name, table in vars(module).items()
          if name.endswith("MAPPING_NAMES")}
mappings = [getattr(modules["modeling"], f"MODEL_FOR_{task}_MAPPING") for task in
            ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")]
before, sizes = copy.deepcopy(tables), [len(mapping) for mapping in mappings]
assert len(tables) > 30

import transformers_aurea

added = {name: {key: table[key] for key in table if key not in before[name]} for name, table in tables.items()}
changed = [name for name, table in before.items() if any(tables[name].get(key, 0) != table[key] for key in table)]
grown = [len(mapping) - size for mapping, size in zip(mappings, sizes)]
print(json.dumps([{name: entries for name, entries in added.items() if entries}, changed, grown]))
"""


@pytest.fixture
def without_entries(monkeypatch):
    for name in TABLES:
        monkeypatch.delitem(getattr(modeling_auto, name), "aurea")


class TestTables:
    def test_importing_the_package_adds_these_entries_and_no_others(self):
        added, changed, sizes = json.loads(
            subprocess.run([sys.executable, "-c", IMPORT_SCRIPT], capture_output=True, text=True, check=True).stdout
        )
        assert added == dict.fromkeys(TABLES, ENTRY)
        assert changed == []
        # What `__init__.py` registers; none of it stems from the tables.
        assert sizes == [0, 1, 1]

    def test_entering_twice_is_entering_once(self, without_entries):
        tables = [getattr(modeling_auto, name) for name in TABLES]
        sizes = [len(table) for table in tables]
        enter_name_tables()
        enter_name_tables()
        assert [len(table) for table in tables] == [size + 1 for size in sizes]
        assert all(table.items() >= ENTRY.items() for table in tables)

    def test_an_entry_that_is_there_stays(self, monkeypatch):
        monkeypatch.setitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "aurea", "Other")
        enter_name_tables()
        assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["aurea"] == "Other"


def training_batch(config) -> dict[str, torch.Tensor]:
    input_ids = torch.tensor([[1, IMAGE_TOKEN_ID, 5, 6, 7, 8, 9, 10], [1, 11, 12, IMAGE_TOKEN_ID, 13, 14, 15, 16]])
    labels = input_ids.clone()
    labels[:, :4] = -100
    return {"input_ids": input_ids, "labels": labels, "pixel_values": random_pixels(2, config)}


def smoothed(model, batch: dict[str, torch.Tensor], shift: int) -> torch.Tensor:
    """By hand: the loss of tokens to predict from the position `shift` before theirs."""
    with torch.no_grad():
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
    length = logits.shape[1] - shift
    return cross_entropy(logits[:, :length].flatten(0, 1), batch["labels"][:, shift:].flatten(), label_smoothing=0.1)


class TestLabelSmoothing:
    @pytest.fixture
    def trainer(self, tmp_path):
        arguments = {"label_smoothing_factor": 0.1, "remove_unused_columns": False, "use_cpu": True}
        arguments |= {"report_to": "none", "disable_tqdm": True, "per_device_eval_batch_size": 1}
        return lambda model: Trainer(model, TrainingArguments(str(tmp_path), **arguments))

    @pytest.mark.parametrize("adapters", [False, True], ids=["whole", "peft"])
    def test_the_loss_is_that_of_the_next_tokens(self, trainer, adapters):
        model = tiny_model()
        batch = training_batch(model.config)
        by_hand, unshifted = smoothed(model, batch, 1), smoothed(model, batch, 0)
        assert abs(by_hand - unshifted) > 0.05
        if adapters:
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"])).eval()
        with torch.no_grad():
            loss = trainer(model).compute_loss(model, dict(batch))
        torch.testing.assert_close(loss, by_hand)

    def test_evaluation_gives_it_too(self, trainer):
        model = tiny_model()
        batch = training_batch(model.config)
        rows = [{name: batch[name][row] for name in ("input_ids", "labels", "pixel_values")} for row in range(2)]
        found = trainer(model).evaluate(rows)["eval_loss"]
        assert found == pytest.approx(smoothed(model, batch, 1).item(), abs=1e-5)


class TestNothingElseChanges:
    @pytest.fixture(params=[True, False], ids=["entered", "not entered"], autouse=True)
    def entered(self, request) -> bool:
        if not request.param:
            request.getfixturevalue("without_entries")
        return request.param

    def test_auto_classes_of_models(self):
        for auto_class, name in {
            AutoModel: "AureaModel",
            AutoModelForImageTextToText: "AureaForConditionalGeneration",
            AutoModelForMultimodalLM: "AureaForConditionalGeneration",
        }.items():
            assert type(auto_class.from_config(tiny_config())).__name__ == name

    def test_an_aurea_is_no_causal_language_model_to_the_auto_classes(self, converted):
        for refused in (
            lambda: AutoModelForCausalLM.from_config(tiny_config()),
            lambda: AutoModelForCausalLM.from_pretrained(converted),
            lambda: AutoModelForCausalLM.from_pretrained(converted, trust_remote_code=True),
            lambda: pipeline("text-generation", model=str(converted)),
        ):
            with pytest.raises(ValueError, match=r"AureaConfig|Unrecognized configuration|[Cc]ould not load model"):
                refused()

    def test_auto_classes_of_the_rest(self, converted):
        names = [
            type(auto_class.from_pretrained(converted)).__name__
            for auto_class in (AutoConfig, AutoProcessor, AutoImageProcessor)
        ]
        assert names == ["AureaConfig", "AureaProcessor", "AureaImageProcessor"]
        assert len(AutoTokenizer.from_pretrained(converted)) > 90

    def test_what_is_saved(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["architectures"] == ["AureaForConditionalGeneration"]
        assert sorted(config["auto_map"]) == [
            *("AutoConfig", "AutoImageProcessor", "AutoModel", "AutoModelForImageTextToText"),
            *("AutoModelForMultimodalLM", "AutoProcessor"),
        ]

    def test_pipelines(self, golden_model, golden_processor, entered, monkeypatch):
        """But for a complaint of the one of text, which took the model in spite of it."""
        complaints = []
        monkeypatch.setattr("transformers.pipelines.base.logger.error", complaints.append)
        by_picture = pipeline("image-text-to-text", model=golden_model, processor=golden_processor)
        assert complaints == []
        by_text = pipeline("text-generation", model=golden_model, tokenizer=golden_processor.tokenizer)
        assert len(complaints) == (not entered)
        assert all("is not supported for text-generation" in complaint for complaint in complaints)
        assert by_picture.model is by_text.model is golden_model
        assert by_text("a", max_new_tokens=2)[0]["generated_text"].startswith("a")


REMOTE_SCRIPT = """
import torch
from torch.nn.functional import cross_entropy
from transformers.cli.serving.model_manager import ModelManager
from transformers.models.auto import modeling_auto

folder, out = sys.argv[1:]
assert "aurea" not in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
manager = ModelManager(device="cpu", dtype="float32", trust_remote_code=True)
model, processor = manager.load_model_and_processor(f"{folder}@main")
modality = manager.get_model_modality(model, processor)
manager.shutdown()

from transformers import Trainer, TrainingArguments
arguments = TrainingArguments(out, label_smoothing_factor=0.1, use_cpu=True, report_to="none")
ids = torch.arange(3, 23).view(2, 10)
with torch.no_grad():
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    logits = model(input_ids=ids).logits[:, :-1]
by_hand = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1)
report = {"class": type(model).__name__, "module": type(model).__module__, "modality": str(modality)}
open("report.json", "w").write(json.dumps(report | {"losses": [loss.item(), by_hand.item()]}))
"""


def test_transformers_serve_and_trainer_know_remote_code(converted, tmp_path):
    run_without_package(REMOTE_SCRIPT, tmp_path, converted, tmp_path / "out")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["class"] == "AureaForConditionalGeneration"
    assert report["module"].startswith("transformers_modules.")
    assert report["modality"].endswith("MULTIMODAL")
    assert report["losses"][0] == pytest.approx(report["losses"][1], rel=1e-5)
