# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""TRL's trainers, untouched, on the rows of this package: no, one and two pictures in one batch, given as paths.

How the processor itself gets on with TRL's own formats is tested in test_integrations_aurea.py.
"""

import json

import numpy as np
import pytest
import torch
from conftest import FIXTURES

from transformers_aurea import AureaForConditionalGeneration, AureaProcessor, embedded_model_path
from transformers_aurea.data_aurea import AureaDataCollator, load_llava_dataset
from transformers_aurea.versions_aurea import CACHE_NAME


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

PICTURES = [str(FIXTURES / f"image_{name}.png") for name in ("rgb", "wide")]
ADAPTER = peft.LoraConfig(r=4, target_modules=r".*language_model.*(self_attn|cross_attn)\.(qkv|[qkvo])_proj")


@pytest.fixture
def processor(converted) -> AureaProcessor:
    return AureaProcessor.from_pretrained(converted)


@pytest.fixture
def model(converted) -> AureaForConditionalGeneration:
    return AureaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32)


@pytest.fixture
def llava_file(tmp_path, monkeypatch):
    """Six conversations of two turns, with one, two and no pictures in turn."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    records = []
    for index in range(6):
        names = ([PICTURES[0]], PICTURES, [])[index % 3]
        values = [
            "<image>\n" * len(names) + f"What is {index}?",
            f"It is {index} again.",
            "And now?",
            f"Still {index}.",
        ]
        turns = [{"from": ("human", "gpt")[turn % 2], "value": value} for turn, value in enumerate(values)]
        records.append({"id": index, "conversations": turns} | ({"image": names} if names else {}))
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def prompts(**answers: str) -> datasets.Dataset:
    """Questions with one, two and no pictures in turn, and to each the same answers under the given names."""
    rows = []
    for index in range(6):
        images = ([PICTURES[0]], PICTURES, [])[index % 3]
        content = [{"type": "image", "text": None} for _ in images] + [{"type": "text", "text": f"What is {index}?"}]
        row = {"prompt": [{"role": "user", "content": content}], "images": images}
        for name, answer in answers.items():
            row[name] = [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def settings(folder, **kwargs) -> dict:
    return {
        "output_dir": str(folder / "run"),
        "max_steps": 4,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        **kwargs,
    }


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class ForwardCalls(list):
    """`(placeholders by row, rows of pixel_values)` of every call that is no step of a generation."""

    def __init__(self, model: AureaForConditionalGeneration):
        model.model.register_forward_pre_hook(self.record, with_kwargs=True)
        self.image_token_id = model.config.image_token_id

    def record(self, module, args, kwargs):
        if kwargs.get(CACHE_NAME) is None:
            placeholders = (kwargs["input_ids"] == self.image_token_id).sum(1).tolist()
            pixels = kwargs.get("pixel_values")
            self.append((placeholders, 0 if pixels is None else len(pixels)))

    def assert_each_row_came_with_its_pictures(self):
        assert self and all(sum(placeholders) == pixels for placeholders, pixels in self)


# supervised fine-tuning


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
def test_sft_learns_from_llava_files_as_they_are(model, processor, llava_file, tmp_path, streaming):
    rows = load_llava_dataset(llava_file, streaming=streaming)
    arguments = settings(tmp_path, per_device_train_batch_size=6, learning_rate=5e-3, assistant_only_loss=True)
    calls = ForwardCalls(model)
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**arguments, max_length=None), train_dataset=rows, processing_class=processor
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1
    calls.assert_each_row_came_with_its_pictures()
    assert all(sorted(placeholders) == [0, 0, 1, 1, 2, 2] for placeholders, _ in calls)


def test_its_collator_and_ours_make_the_same_batch(processor, llava_file):
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    rows = list(load_llava_dataset(llava_file))
    for kwargs in ({}, {"pad_to_multiple_of": 64}):
        theirs = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True, **kwargs)(rows)
        ours = AureaDataCollator(processor, **kwargs)(rows)
        placeholders = theirs.pop("mm_token_type_ids")  # which in ours are all tokens of their id
        assert torch.equal(placeholders == 1, ours["input_ids"] == processor.image_token_id)
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name


def test_sft_takes_our_collator(model, processor, llava_file, tmp_path):
    arguments = settings(tmp_path, per_device_train_batch_size=6, learning_rate=5e-3, remove_unused_columns=False)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**arguments, max_length=None),
        data_collator=AureaDataCollator(processor),
        train_dataset=load_llava_dataset(llava_file),
        processing_class=processor,
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.1


# preferences


@pytest.mark.parametrize("kind", ["full model", pytest.param("adapter", marks=pytest.mark.slow)])
def test_dpo_prefers_the_chosen_answers_of_mixed_rows(model, processor, tmp_path, kind):
    arguments = settings(tmp_path, per_device_train_batch_size=6, learning_rate=5e-3, max_length=None)
    calls = ForwardCalls(model)
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**arguments),
        train_dataset=prompts(chosen="It is good.", rejected="No idea."),
        processing_class=processor,
        peft_config=ADAPTER if kind == "adapter" else None,
    )
    trainer.train()
    losses, margins = logged(trainer, "loss"), logged(trainer, "rewards/margins")
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3) and losses[-1] < losses[0]
    assert margins[-1] > margins[0] and np.isfinite(margins).all()
    calls.assert_each_row_came_with_its_pictures()
    assert all(set(placeholders) == {0, 1, 2} for placeholders, _ in calls)


def test_dpo_begins_at_its_reference_with_the_embedded_model(tmp_path):
    """Its convolutional encoder has no sdpa attention, which TRL asks of the reference model, and batch norms."""
    model = AureaForConditionalGeneration.from_pretrained(embedded_model_path())
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**settings(tmp_path, per_device_train_batch_size=6, max_length=None, max_steps=2)),
        train_dataset=prompts(chosen="yes", rejected="no"),
        processing_class=AureaProcessor.from_pretrained(embedded_model_path()),
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(np.log(2), abs=1e-3) and losses[1] < losses[0]


# reinforcement


def grpo(model, processor, folder, reward, **kwargs) -> "trl.GRPOTrainer":
    sizes = {"num_generations": 2, "max_completion_length": 6, "shuffle_dataset": False, **kwargs}
    peft_config = sizes.pop("peft_config", None)
    return trl.GRPOTrainer(
        model,
        args=trl.GRPOConfig(**settings(folder, learning_rate=1e-3), **sizes),
        train_dataset=prompts(),
        processing_class=processor,
        reward_funcs=reward,
        peft_config=peft_config,
    )


def length_of_the_text(completions, **_) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


@pytest.mark.parametrize(
    "kwargs",
    [
        pytest.param({"per_device_train_batch_size": 6}, id="one batch"),
        pytest.param(
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_iterations": 2},
            id="micro-batches used twice",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"per_device_train_batch_size": 6, "beta": 0.1, "peft_config": ADAPTER},
            id="adapter with a penalty",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_grpo_gives_every_row_its_pictures(model, processor, tmp_path, kwargs):
    calls = ForwardCalls(model)
    trainer = grpo(model, processor, tmp_path, length_of_the_text, **kwargs)
    trainer.train()
    norms = logged(trainer, "grad_norm")
    assert len(norms) == 4 and np.isfinite(norms).all() and max(norms) > 0
    calls.assert_each_row_came_with_its_pictures()
    seen = {count for placeholders, _ in calls for count in placeholders}
    assert seen == {0, 1, 2}
    if kwargs["per_device_train_batch_size"] == 6:
        assert all(sorted(placeholders) == [0, 0, 1, 1, 2, 2] for placeholders, _ in calls)
