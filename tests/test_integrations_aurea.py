# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The libraries around transformers, unmodified: Trainer, PEFT, TRL, accelerate's placement, the Hub, remote code."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, random_pixels, run_without_package, tiny_config, tiny_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from transformers_aurea import AureaForConditionalGeneration, AureaProcessor


CODE_FILES = {
    "added_encoder_aurea.py",
    "auxiliary_losses_aurea.py",
    "composition_aurea.py",
    "configuration_aurea.py",
    "connectors_aurea.py",
    "cross_attention_aurea.py",
    "decoding_aurea.py",
    "fusion_aurea.py",
    "fusion_promises_aurea.py",
    "hub_kernels_aurea.py",
    "image_processing_aurea.py",
    "language_model_aurea.py",
    "losses_aurea.py",
    "model_card_aurea.py",
    "modeling_aurea.py",
    "modeling_outputs_aurea.py",
    "name_tables_aurea.py",
    "own_fusion_aurea.py",
    "parts_aurea.py",
    "pictures_aurea.py",
    "prefix_trial_aurea.py",
    "pretrained_model_aurea.py",
    "processing_aurea.py",
    "projector_aurea.py",
    "resizing_aurea.py",
    "spatial_range_attention_aurea.py",
    "versions_aurea.py",
    "vision_encoder_aurea.py",
    "visual_cache_aurea.py",
    "visual_context_aurea.py",
    "weaving_aurea.py",
}
PROCESSING_CODE = {"processing_aurea.py", "image_processing_aurea.py", "pictures_aurea.py", "resizing_aurea.py"}
MODEL_FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
PROCESSOR_FILES = {"processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
ALL_FILES = MODEL_FILES | PROCESSOR_FILES | CODE_FILES
AUTO_MAP = {
    "AutoConfig": "configuration_aurea.AureaConfig",
    "AutoModel": "modeling_aurea.AureaModel",
    "AutoModelForImageTextToText": "modeling_aurea.AureaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_aurea.AureaForConditionalGeneration",
    "AutoProcessor": "processing_aurea.AureaProcessor",
    "AutoImageProcessor": "image_processing_aurea.AureaImageProcessor",
}
LANGUAGE_MODEL_TARGETS = r".*language_model.*self_attn\.(qkv_proj|o_proj)"
CROSS_ATTENTION_TARGETS = r".*cross_attention_block\..*(q_proj|k_proj|v_proj|o_proj)"


def load(folder: Path) -> AureaForConditionalGeneration:
    return AureaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def example_rows(count: int = 6) -> list[dict]:
    """Conversations with one, two and no pictures in turn."""
    generator = np.random.default_rng(0)
    rows = []
    for index in range(count):
        num_images = (1, 2, 0)[index % 3]
        pixels = generator.integers(0, 255, (num_images, 40, 50, 3), dtype=np.uint8)
        content = "<|image|>" * num_images + f"What is {index}?"
        text = f"<|user|>{content}<|end|><|assistant|>It is {index} again.<|end|>"
        rows.append({"text": text, "images": [Image.fromarray(picture) for picture in pixels]})
    return rows


class Collator:
    """All that the plain Trainer needs to be told."""

    def __init__(self, processor: AureaProcessor):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict:
        images = [row["images"] for row in rows]
        inputs = self.processor(
            images=images if any(images) else None,
            text=[row["text"] for row in rows],
            padding=True,
            return_tensors="pt",
        )
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return inputs


def training_arguments(folder: Path, **kwargs) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=3,
        per_device_eval_batch_size=3,
        learning_rate=2e-3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **kwargs,
    )


def logged_losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class TestTrainer:
    @pytest.fixture(scope="class")
    def run(self, converted, golden_processor, tmp_path_factory):
        """A run of six steps with a checkpoint after the third."""
        folder = tmp_path_factory.mktemp("trainer")
        arguments = training_arguments(folder, max_steps=6, save_steps=3)
        settings = {"train_dataset": example_rows(), "eval_dataset": example_rows(4)}
        settings["processing_class"] = golden_processor  # saved beside the model
        trainer = Trainer(load(converted), arguments, Collator(golden_processor), **settings)
        trainer.train()
        return trainer

    def test_the_loss_falls(self, run):
        losses = logged_losses(run)
        assert len(losses) == 6
        assert losses[-1] < losses[0] - 0.1

    def test_a_resumed_run_ends_where_the_uninterrupted_one_does(self, run, converted, golden_processor, tmp_path):
        arguments = training_arguments(tmp_path, max_steps=6, save_strategy="no")
        trainer = Trainer(load(converted), arguments, Collator(golden_processor), train_dataset=example_rows())
        trainer.train(resume_from_checkpoint=str(Path(run.args.output_dir) / "checkpoint-3"))
        assert trainer.state.global_step == 6
        assert logged_losses(trainer)[-3:] == pytest.approx(logged_losses(run)[-3:], abs=1e-5)
        weights = run.model.state_dict()
        for name, tensor in trainer.model.state_dict().items():
            torch.testing.assert_close(tensor, weights[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")

    def test_a_checkpoint_is_a_complete_folder_without_pickled_weights(self, run):
        folder = Path(run.args.output_dir) / "checkpoint-3"
        assert {path.name for path in folder.iterdir()} >= ALL_FILES
        assert not list(folder.glob("pytorch_model*"))

    def test_evaluation(self, run):
        metrics = run.evaluate()
        assert 0 < metrics["eval_loss"] < logged_losses(run)[0]

    def test_prediction_gathers_the_logits_and_nothing_else(self, run):
        gathered = []
        prediction_step = run.prediction_step
        run.prediction_step = lambda *args, **kwargs: gathered.append(prediction_step(*args, **kwargs)) or gathered[-1]
        try:
            output = run.predict(example_rows(4))
        finally:
            del run.prediction_step
        assert len(gathered) == 2
        for loss, logits, labels in gathered:
            assert loss.ndim == 0
            assert logits.shape == (*labels.shape, run.model.config.text_config.vocab_size)
        assert isinstance(output.predictions, np.ndarray)
        assert output.predictions.shape[:2] == output.label_ids.shape
        assert len(output.predictions) == 4

    def test_the_saved_model_gives_the_same_logits(self, run, golden_processor, tmp_path):
        run.save_model(str(tmp_path))
        inputs = Collator(golden_processor)(example_rows(3))
        loaded = load(tmp_path).eval()
        run.model.eval()
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, run.model(**inputs).logits)
        assert not list(tmp_path.glob("pytorch_model*"))

    @pytest.mark.parametrize("kinds", [(2,), (0, 1)], ids=["text only", "pictures only"])
    def test_batches_of_one_kind_train_too(self, kinds, converted, golden_processor, tmp_path):
        rows = [row for index, row in enumerate(example_rows()) if index % 3 in kinds]
        arguments = training_arguments(tmp_path, max_steps=3, save_strategy="no", gradient_accumulation_steps=2)
        trainer = Trainer(load(converted), arguments, Collator(golden_processor), train_dataset=rows)
        trainer.train()
        losses = logged_losses(trainer)
        assert losses[-1] < losses[0]


def lora_model(model: AureaForConditionalGeneration, targets: str, **kwargs):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=targets, **kwargs))


def train_steps(model, inputs: dict, steps: int = 3, lr: float = 1e-2) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.fixture(scope="module")
def merged(converted, golden_processor, tmp_path_factory) -> dict:
    """An adapter trained and saved, then merged and saved with its processor; and the logits of both."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("lora")
    inputs = Collator(golden_processor)(example_rows(3))
    model = lora_model(load(converted), LANGUAGE_MODEL_TARGETS + "|" + CROSS_ATTENTION_TARGETS)
    train_steps(model, inputs)
    model.save_pretrained(folder / "adapter")
    with torch.no_grad():
        adapted_logits = model(**inputs).logits
        model = model.merge_and_unload()
        logits = model(**inputs).logits
    model.save_pretrained(folder / "merged")
    golden_processor.save_pretrained(folder / "merged")
    return {
        "inputs": inputs,
        "adapter": folder / "adapter",
        "adapted logits": adapted_logits,
        "folder": folder / "merged",
        "logits": logits,
    }


class TestPeft:
    @pytest.fixture
    def inputs(self, golden_processor):
        return Collator(golden_processor)(example_rows(3))

    @pytest.mark.parametrize(
        ("targets", "names"),
        [
            (LANGUAGE_MODEL_TARGETS, {"language_model": 10}),
            (CROSS_ATTENTION_TARGETS, {"cross_attention_block": 16}),
            ("all-linear", {"language_model": 48, "vision_model": 33, "cross_attention_block": 28}),
        ],
        ids=["language model", "cross-attention", "all-linear"],
    )
    def test_lora_trains_its_targets_and_nothing_else(self, converted, inputs, targets, names):
        pytest.importorskip("peft")
        base = load(converted)
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        model = lora_model(base, targets)
        adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
        for part, count in names.items():
            assert sum(part in name for name in adapted) == count, part
        losses = train_steps(model, inputs)
        assert losses[0] > losses[1] > losses[2]
        silent = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert silent == []
        with model.disable_adapter():
            for name, tensor in model.base_model.model.state_dict().items():
                if "lora_" not in name:
                    assert torch.equal(tensor, before[name.replace(".base_layer", "")]), name

    @pytest.mark.parametrize("settings", ["trainable_tokens", "lora", "prompt"])
    def test_embeddings_that_an_adapter_wraps_show_where_pictures_are(self, converted, golden_processor, settings):
        peft = pytest.importorskip("peft")
        row = example_rows(1)[0]
        inputs = golden_processor(images=row["images"], text=row["text"], return_tensors="pt")
        config = {
            "trainable_tokens": peft.LoraConfig(target_modules=["o_proj"], trainable_token_indices=[64]),
            "lora": peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False),
            "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        }[settings]
        model = peft.get_peft_model(load(converted), config).eval()
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        with torch.no_grad():
            told = model(inputs_embeds=embeddings, **inputs).logits
            del inputs["mm_token_type_ids"]
            found = model(inputs_embeds=embeddings, **inputs).logits
            other = model(inputs_embeds=embeddings, **inputs | {"pixel_values": inputs.pixel_values + 1}).logits
        assert torch.equal(found, told)
        assert not torch.equal(found, other)

    def test_an_adapter_on_the_text_leaves_the_encoders_without_activations(self, converted, inputs):
        pytest.importorskip("peft")
        model = lora_model(load(converted), LANGUAGE_MODEL_TARGETS)
        outputs = []
        aurea = model.base_model.model.model
        for encoder in (aurea.vision_model, aurea.spatial_vision_model):
            encoder.register_forward_hook(lambda _, args, output: outputs.append(output.last_hidden_state))
        model.train()(**inputs).loss.backward()
        assert len(outputs) == 2 and not any(output.requires_grad for output in outputs)

    def test_a_saved_adapter_gives_the_same_logits_on_a_fresh_model(self, merged, converted):
        peft = pytest.importorskip("peft")
        adapter = merged["adapter"]
        assert (adapter / "adapter_model.safetensors").is_file()
        assert not list(adapter.glob("*.bin"))
        fresh = peft.PeftModel.from_pretrained(load(converted), adapter).eval()
        with torch.no_grad():
            assert torch.equal(fresh(**merged["inputs"]).logits, merged["adapted logits"])

    def test_a_merged_model_is_a_complete_folder(self, merged):
        torch.testing.assert_close(merged["logits"], merged["adapted logits"], atol=1e-4, rtol=0)
        folder = merged["folder"]
        assert {path.name for path in folder.iterdir()} >= ALL_FILES
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        assert not any("lora" in name for name in load_file(folder / "model.safetensors"))

    def test_a_module_trained_in_full_beside_the_adapter_is_saved_with_it(self, converted, inputs, tmp_path):
        peft = pytest.importorskip("peft")
        model = lora_model(load(converted), LANGUAGE_MODEL_TARGETS, modules_to_save=["multi_modal_projector"])
        losses = train_steps(model, inputs)
        assert losses[-1] < losses[0]
        model.save_pretrained(tmp_path)
        fresh = peft.PeftModel.from_pretrained(load(converted), tmp_path).eval()
        with torch.no_grad():
            assert torch.equal(fresh(**inputs).logits, model(**inputs).logits)

    def test_an_adapter_on_the_blocks_takes_a_text_only_step_as_one_of_no_gradient(self, converted, golden_processor):
        pytest.importorskip("peft")
        model = lora_model(load(converted), CROSS_ATTENTION_TARGETS).train()
        model(**Collator(golden_processor)(example_rows(3)[2:])).loss.backward()
        assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)

    @pytest.mark.parametrize("targets", [LANGUAGE_MODEL_TARGETS, CROSS_ATTENTION_TARGETS], ids=["text", "blocks"])
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_changes_no_gradient(self, converted, inputs, use_reentrant, targets):
        pytest.importorskip("peft")
        model = lora_model(load(converted), targets, init_lora_weights=False).train()

        def gradients():
            model.zero_grad()
            model(**inputs).loss.backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

        expected = gradients()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        for name, gradient in gradients().items():
            torch.testing.assert_close(
                gradient, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert all(gradient.any() for gradient in expected.values())

    def test_an_adapted_model_generates(self, converted, golden_processor):
        pytest.importorskip("peft")
        model = lora_model(load(converted), LANGUAGE_MODEL_TARGETS, init_lora_weights=False).eval()
        rows = example_rows(3)
        prompts = [row["text"].partition("It is")[0] for row in rows]
        images = [row["images"] for row in rows]
        inputs = golden_processor(images=images, text=prompts, padding=True, return_tensors="pt")
        settings = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "suppress_tokens": [305]}
        tokens = model.generate(**inputs, **settings)
        assert torch.equal(tokens, model.generate(**inputs, **settings, use_cache=False))
        assert torch.equal(tokens, model.merge_and_unload().generate(**inputs, **settings))


def conversations(kind: str):
    """A dataset as TRL wants it: messages, and a column of images that is empty where there are none."""
    from datasets import Dataset

    rows = []
    for index, row in enumerate(example_rows()):
        question = [{"role": "user", "content": f"What is {index}?"}]
        answer = [{"role": "assistant", "content": f"It is {index} again."}]
        if kind == "messages":
            rows.append({"messages": question + answer, "images": row["images"]})
        elif kind == "text":
            rows.append(row)
        else:
            rows.append({"prompt": question, "completion": answer, "images": row["images"]})
    return Dataset.from_list(rows)


class TestTrl:
    @pytest.fixture(scope="class", params=["cross_attention", "prefix"])
    def folder(self, request, converted, tmp_path_factory) -> Path:
        """The converted model, with this connector."""
        folder = tmp_path_factory.mktemp(request.param)
        model = AureaForConditionalGeneration.from_pretrained(converted, connector_type=request.param)
        processor = AureaProcessor.from_pretrained(converted)
        processor.image_seq_length = model.config.placeholders_per_image
        for part in (model, processor):
            part.save_pretrained(folder)
        return folder

    def sft(self, model, processor, output: Path, kind: str, peft_config=None, **kwargs):
        trl = pytest.importorskip("trl")
        pytest.importorskip("datasets")
        settings = {"max_length": None, "max_steps": 3, "save_strategy": "no", "learning_rate": 5e-3, **kwargs}
        arguments = trl.SFTConfig(
            output_dir=str(output),
            per_device_train_batch_size=3,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            **settings,
        )
        return trl.SFTTrainer(
            model, arguments, train_dataset=conversations(kind), processing_class=processor, peft_config=peft_config
        )

    @pytest.mark.parametrize(
        ("kind", "settings"),
        [
            ("messages", {}),
            ("messages", {"assistant_only_loss": True}),
            ("prompt", {}),
            ("text", {"remove_unused_columns": False}),
        ],
        ids=["conversations", "assistant-only loss", "prompt and completion", "text"],
    )
    def test_supervised_fine_tuning(self, folder, tmp_path, kind, settings):
        processor = AureaProcessor.from_pretrained(folder)
        trainer = self.sft(load(folder), processor, tmp_path, kind, **settings)
        trainer.train()
        losses = logged_losses(trainer)
        assert len(losses) == 3 and np.isfinite(losses).all()
        assert losses[-1] < losses[0]

    def test_rows_keep_their_pictures_in_the_collator(self, folder, tmp_path):
        processor = AureaProcessor.from_pretrained(folder)
        trainer = self.sft(load(folder), processor, tmp_path, "messages", assistant_only_loss=True)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
        assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [
            number * processor.image_seq_length for number in (1, 2, 0)
        ]
        assert batch["pixel_values"].shape[0] == 3
        trained = [processor.decode(row[row != -100]) for row in batch["labels"]]
        assert trained == [f"It is {index} again.<|end|>" for index in range(3)]

    def test_supervised_fine_tuning_of_an_adapter(self, folder, tmp_path):
        peft = pytest.importorskip("peft")
        adapter = peft.LoraConfig(r=4, target_modules=LANGUAGE_MODEL_TARGETS)
        processor = AureaProcessor.from_pretrained(folder)
        trainer = self.sft(load(folder), processor, tmp_path, "messages", adapter, learning_rate=2e-2)
        trainer.train()
        losses = logged_losses(trainer)
        assert losses[-1] < losses[0]
        trainer.save_model(str(tmp_path / "adapter"))
        assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()

    def preferences(self, *columns: str):
        from datasets import Dataset

        rows = []
        for index, row in enumerate(example_rows()):
            content = [{"type": "image"}] * len(row["images"]) + [{"type": "text", "text": f"What is {index}?"}]
            answers = {"chosen": f"It is {index} again.", "rejected": "No idea."}
            rows.append({"prompt": [{"role": "user", "content": content}], "images": row["images"]})
            for column in columns:
                answer = [{"type": "text", "text": answers[column]}]
                rows[-1][column] = [{"role": "assistant", "content": answer}]
        return Dataset.from_list(rows)

    def common(self, output: Path) -> dict:
        return {
            "output_dir": str(output),
            "max_steps": 3,
            "save_strategy": "no",
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
        }

    @pytest.mark.slow
    def test_direct_preference_optimisation_of_mixed_rows(self, folder, tmp_path):
        trl = pytest.importorskip("trl")
        processor = AureaProcessor.from_pretrained(folder)
        arguments = trl.DPOConfig(**self.common(tmp_path), per_device_train_batch_size=3, max_length=None)
        dataset = self.preferences("chosen", "rejected")
        trainer = trl.DPOTrainer(load(folder), args=arguments, train_dataset=dataset, processing_class=processor)
        trainer.train()
        losses = logged_losses(trainer)
        assert losses[0] == pytest.approx(np.log(2), abs=1e-3) and losses[-1] < 0.3

    @pytest.mark.slow
    def test_group_relative_policy_optimisation_of_mixed_rows(self, folder, tmp_path):
        trl = pytest.importorskip("trl")
        processor = AureaProcessor.from_pretrained(folder)
        sizes = {"per_device_train_batch_size": 6, "num_generations": 2, "max_completion_length": 6}
        model = load(folder)
        trainer = trl.GRPOTrainer(
            model,
            args=trl.GRPOConfig(**self.common(tmp_path), **sizes),
            train_dataset=self.preferences(),
            processing_class=processor,
            reward_funcs=lambda completions, **_: [float(len(str(completion)) % 7) for completion in completions],
        )
        trainer.train()
        norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        assert len(norms) == 3 and np.isfinite(norms).all() and max(norms) > 0


class TestPushToHub:
    def test_model_and_processor_make_a_complete_repository(self, golden_model, golden_processor, uploads, tmp_path):
        golden_model.push_to_hub("someone/aurea")
        assert uploads.keys() >= MODEL_FILES | CODE_FILES - PROCESSING_CODE
        golden_processor.push_to_hub("someone/aurea")
        assert uploads.keys() == ALL_FILES
        config = json.loads(uploads["config.json"])
        assert config["auto_map"] == AUTO_MAP
        assert config["architectures"] == ["AureaForConditionalGeneration"]
        assert uploads["chat_template.jinja"].decode() == golden_processor.chat_template

        for name, content in uploads.items():
            (tmp_path / name).write_bytes(content)
        loaded = load(tmp_path)
        for (name, left), (_, right) in zip(loaded.state_dict().items(), golden_model.state_dict().items()):
            assert torch.equal(left, right), name

    def test_the_processor_alone_brings_its_code(self, golden_processor, uploads):
        golden_processor.push_to_hub("someone/processor")
        assert uploads.keys() >= PROCESSOR_FILES | PROCESSING_CODE
        auto_map = json.loads(uploads["processor_config.json"])["auto_map"]
        assert auto_map["AutoProcessor"] == AUTO_MAP["AutoProcessor"]


LOGITS_SCRIPT = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

for number, folder in enumerate(sys.argv[1:]):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(**load_file(f"inputs_{number}.safetensors")).logits
    save_file({"logits": logits}, f"logits_{number}.safetensors")
"""

REMOTE_SCRIPT = """
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
    AutoTokenizer, pipeline,
)

folder, picture, message = sys.argv[1:]
settings = {"trust_remote_code": True}
config = AutoConfig.from_pretrained(folder, **settings)
processor = AutoProcessor.from_pretrained(folder, **settings)
image_processor = AutoImageProcessor.from_pretrained(folder, **settings)
tokenizer = AutoTokenizer.from_pretrained(folder, **settings)
base = AutoModel.from_pretrained(folder, dtype=torch.float32, **settings).eval()
model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **settings).eval()
multimodal = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()

image = Image.open(picture)
inputs = processor(images=image, text=message, return_tensors="pt")
greedy = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
with torch.no_grad():
    logits = model(**inputs).logits
    same = {
        "base": torch.equal(model.lm_head(base(**inputs).last_hidden_state), logits),
        "multimodal": torch.equal(multimodal(**inputs).logits, logits),
        "pixels": torch.equal(image_processor(image, return_tensors="pt")["pixel_values"], inputs["pixel_values"]),
        "ids": tokenizer(message, add_special_tokens=False)["input_ids"] == inputs["input_ids"][0].tolist(),
    }
save_file(dict(inputs), "inputs.safetensors")
save_file({"logits": logits, "tokens": model.generate(**inputs, **greedy)}, "results.safetensors")
model.save_pretrained("again")
processor.save_pretrained("again")

chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]}]
answer = pipeline("image-text-to-text", model=folder, trust_remote_code=True, dtype=torch.float32)
answers = answer(text=chat, max_new_tokens=8, generate_kwargs={"do_sample": False}, return_full_text=False)
template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
asked = processor.apply_chat_template(chat, **template)
tokens = model.generate(**asked, max_new_tokens=8, do_sample=False)[:, asked["input_ids"].shape[1] :]
report = {
    "same": same,
    "classes": [type(thing).__name__ for thing in (config, base, model, multimodal, processor, image_processor)],
    "module": type(model).__module__,
    "answer": answers[0]["generated_text"],
    "expected answer": processor.decode(tokens[0], skip_special_tokens=True),
}
open("report.json", "w").write(json.dumps(report))
"""


class TestRemoteCode:
    @pytest.fixture(scope="class")
    def remote(self, converted, facts, tmp_path_factory) -> Path:
        """The folder in which a process without the package has loaded, run and saved the converted model."""
        folder = tmp_path_factory.mktemp("remote")
        run_without_package(REMOTE_SCRIPT, folder, converted, FIXTURES / "image_rgb.png", facts["message_image"])
        return folder

    def test_every_auto_class_loads_the_folder_and_agrees(self, remote):
        report = json.loads((remote / "report.json").read_text())
        generative = "AureaForConditionalGeneration"
        names = ["AureaConfig", "AureaModel", generative, generative, "AureaProcessor", "AureaImageProcessor"]
        assert report["classes"] == names
        assert report["module"].startswith("transformers_modules.")
        assert report["same"] == dict.fromkeys(("base", "multimodal", "pixels", "ids"), True)

    def test_greedy_tokens_are_the_recorded_ones(self, remote, goldens):
        results, inputs = load_file(remote / "results.safetensors"), load_file(remote / "inputs.safetensors")
        prompt_length = inputs["input_ids"].shape[1]
        assert torch.equal(results["tokens"][:, prompt_length:], goldens["gen/greedy_image/tokens"])
        recorded = goldens["text/logits_image_prompt_last48"]
        torch.testing.assert_close(results["logits"][:, -48:], recorded, atol=1e-4, rtol=0)

    def test_pipeline_answers_a_chat_with_a_picture(self, remote):
        report = json.loads((remote / "report.json").read_text())
        assert report["answer"] == report["expected answer"] != ""

    def test_what_it_saves_is_complete(self, remote):
        folder = remote / "again"
        names = {path.name for path in folder.iterdir()}
        assert names >= ALL_FILES
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
        for name in CODE_FILES:
            source = Path(sys.modules["transformers_aurea"].__file__).with_name(name)
            assert (folder / name).read_text() == source.read_text()

    @pytest.fixture(scope="class")
    def reloaded(self, remote, merged, tmp_path_factory) -> list[torch.Tensor]:
        """Logits of yet another process: of what the first one saved, and of the merged adapter."""
        folder = tmp_path_factory.mktemp("reloaded")
        save_file(load_file(remote / "inputs.safetensors"), folder / "inputs_0.safetensors")
        save_file(dict(merged["inputs"]), folder / "inputs_1.safetensors")
        run_without_package(LOGITS_SCRIPT, folder, remote / "again", merged["folder"])
        return [load_file(folder / f"logits_{number}.safetensors")["logits"] for number in range(2)]

    def test_what_it_saves_loads_in_yet_another_process(self, reloaded, remote):
        assert torch.equal(reloaded[0], load_file(remote / "results.safetensors")["logits"])

    def test_a_merged_adapter_loads_without_package_and_without_peft(self, reloaded, merged):
        torch.testing.assert_close(reloaded[1], merged["logits"], atol=1e-5, rtol=0)


class TestPipeline:
    def test_a_chat_with_two_pictures_and_one_without(self, golden_model, golden_processor, pictures):
        from transformers import pipeline

        ask = pipeline("image-text-to-text", model=golden_model, processor=golden_processor)
        image = {"type": "image", "image": pictures["rgb"]}
        text = {"type": "text", "text": "What is it?"}
        for content in ([image, image, text], [text]):
            settings = {"generate_kwargs": {"do_sample": False, "max_new_tokens": 4}, "return_full_text": False}
            answer = ask(text=[{"role": "user", "content": content}], **settings)
            assert isinstance(answer[0]["generated_text"], str)


class TestPlacement:
    @pytest.fixture(scope="class")
    def saved(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("saved")
        model = tiny_model()
        model.save_pretrained(folder)
        inputs = {"input_ids": torch.arange(3, 12)[None], "pixel_values": random_pixels(2, model.config)}
        inputs["input_ids"][0, [1, 4]] = model.config.image_token_id
        with torch.no_grad():
            logits = model(**inputs).logits
        return folder, inputs, logits

    def test_one_device(self, saved):
        folder, inputs, expected = saved
        model = AureaForConditionalGeneration.from_pretrained(folder, device_map={"": "cpu"}).eval()
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)

    def test_offloaded_to_disk(self, saved, tmp_path):
        folder, inputs, expected = saved
        device_map = {
            "model.vision_model": "cpu",
            "model.spatial_vision_model": "disk",
            "model.fusion": "disk",
            "model.multi_modal_projector": "cpu",
            "model.language_model": "disk",
            "lm_head": "cpu",
        }
        model = AureaForConditionalGeneration.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
        model.eval()
        assert {p.device.type for p in model.model.language_model.parameters()} == {"meta"}
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)
            model.set_attn_implementation("eager")
            assert len(model(**inputs, output_attentions=True).cross_attentions) == 3
            model.set_attn_implementation("sdpa")
        settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
        whole = AureaForConditionalGeneration.from_pretrained(folder).eval()
        assert torch.equal(model.generate(**inputs, **settings), whole.generate(**inputs, **settings))

    def test_automatic_map_offloads_what_does_not_fit(self, saved, tmp_path):
        folder, inputs, expected = saved
        model = AureaForConditionalGeneration.from_pretrained(
            folder, device_map="auto", max_memory={"cpu": 150_000}, offload_folder=tmp_path
        ).eval()
        assert {"cpu", "disk"} == set(map(str, model.hf_device_map.values()))
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)

    def test_automatic_map_splits_no_layer_and_no_attention_of_the_fusion(self):
        from accelerate import infer_auto_device_map, init_empty_weights

        with init_empty_weights():
            model = AureaForConditionalGeneration(tiny_config())
        whole = {name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules}
        assert {f"model.language_model.layers.{index}" for index in range(3)} <= whole
        assert any(name.startswith("model.fusion.") for name in whole)
        size = sum(p.numel() * 4 for p in model.parameters())
        for part in range(1, 20):
            device_map = infer_auto_device_map(
                model,
                max_memory={"cpu": size * part // 20, "disk": 10 * size},
                no_split_module_classes=list(model._no_split_modules),
            )
            assert not [name for name in device_map if any(name.startswith(f"{module}.") for module in whole)]


class TestFiles:
    def test_weights_are_safetensors_only(self, golden_model, tmp_path):
        golden_model.save_pretrained(tmp_path, max_shard_size="500KB")
        names = {path.name for path in tmp_path.iterdir()}
        assert "model.safetensors.index.json" in names
        assert {Path(name).suffix for name in names} == {".json", ".md", ".py", ".safetensors"}
        loaded = load(tmp_path)
        for (name, left), (_, right) in zip(loaded.state_dict().items(), golden_model.state_dict().items()):
            assert torch.equal(left, right), name
