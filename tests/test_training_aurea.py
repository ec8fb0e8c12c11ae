# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Parameter groups, LoRA presets, what is not quantised, and the figures logged beside the loss."""

import math
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, TINY_VISION, random_pixels, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from test_integrations_aurea import LOGITS_SCRIPT, run_without_package
from torch import nn
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.pytorch_utils import Conv1D

from transformers_aurea import AureaConfig, AureaForConditionalGeneration, training_aurea
from transformers_aurea.modeling_outputs_aurea import AureaCausalLMOutputWithPast
from transformers_aurea.training_aurea import (
    GROUP_MODULES,
    LORA_TARGETS,
    PARAMETER_GROUPS,
    STAGES,
    AuxiliaryLossLogger,
    GroupGradientNorms,
    SpatialRangeEntropy,
    TrainableReport,
    lora_targets,
    modules_not_to_quantize,
    parameter_groups,
    set_trainable,
)


ENCODERS = ("vision_model", "spatial_vision_model")
UNTIED = {"tie_word_embeddings": False}
COMPOSITION = {"num_composition_layers": 2, "num_attention_heads": 4}


def row(index: int, num_images: int) -> dict:
    """Text of eight tokens with its placeholders in front, and the pictures."""
    input_ids = torch.arange(3, 11) + index
    input_ids[:num_images] = IMAGE_TOKEN_ID
    return {"input_ids": input_ids, "labels": input_ids, "pixels": random_pixels(num_images, tiny_config(), index)}


def collate(rows: list[dict]) -> dict:
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}
    pixels = torch.cat([row["pixels"] for row in rows])
    return batch | ({"pixel_values": pixels} if len(pixels) else {})


def mixed_batch() -> dict:
    return collate([row(0, 1), row(1, 0), row(2, 2)])


def one_encoder_model() -> AureaForConditionalGeneration:
    settings = tiny_config().to_dict() | {"feature_fusion_config": {"fusion_type": "none"}}
    return AureaForConditionalGeneration(AureaConfig(**settings))


def concat_model() -> AureaForConditionalGeneration:
    settings = tiny_config().to_dict() | {"feature_fusion_config": {"fusion_type": "concat"}}
    return AureaForConditionalGeneration(AureaConfig(**settings))


class InOrder(IterableDataset):
    """Rows that are not shuffled, again and again."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __iter__(self):
        return cycle(self.rows)


def linear_modules(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def in_group(names: set[str], *groups: str) -> set[str]:
    """Those of the names that are in these groups, told by the modules on their way and not by the code under test."""
    chosen = set()
    for name in names:
        parts = set(name.split("."))
        is_block = bool(parts & set(GROUP_MODULES["cross_attention"]))
        for group in groups:
            if parts & set(GROUP_MODULES[group]) and is_block == (group == "cross_attention"):
                chosen.add(name)
    return chosen


class TestParameterGroups:
    def wrap(self, kind: str) -> nn.Module:
        model = tiny_model(UNTIED, composition_config=COMPOSITION)
        if kind == "peft":
            peft = pytest.importorskip("peft")
            saved = GROUP_MODULES["projector"] + GROUP_MODULES["cross_attention"]
            config = peft.LoraConfig(target_modules=lora_targets(model, "language_model"), modules_to_save=saved)
            return peft.get_peft_model(model, config)
        return {"bare": model, "base": model.model, "wrapped": nn.DataParallel(model)}[kind]

    @pytest.mark.parametrize("kind", ["bare", "base", "wrapped", "peft"])
    def test_they_are_a_partition_whatever_wraps_the_model(self, kind):
        model = self.wrap(kind)
        groups = parameter_groups(model)
        assert tuple(groups) == PARAMETER_GROUPS
        parameters = dict(model.named_parameters())
        assert sum(map(len, groups.values())) == len(parameters)
        assert all(parameter is parameters[name] for group in groups.values() for name, parameter in group.items())
        for group, members in groups.items():
            assert members.keys() == in_group(set(parameters), group)
            assert members

    def test_head_and_embeddings_are_the_language_models_tied_or_not(self):
        for settings, expected in ((UNTIED, 2), ({"tie_word_embeddings": True}, 1)):
            names = parameter_groups(tiny_model(settings))["language_model"]
            assert sum("lm_head" in name or "embed_tokens" in name for name in names) == expected

    def test_another_model_is_refused(self):
        bare = AutoModelForCausalLM.from_config(tiny_config().text_config)
        with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' is in none of the parts of an Aurea"):
            parameter_groups(bare)


class TestSetTrainable:
    @pytest.mark.parametrize("stage", STAGES)
    def test_a_stage_trains_its_groups_and_nothing_else(self, stage):
        model = tiny_model(composition_config=COMPOSITION)
        report = set_trainable(model, stage)
        for group, parameters in parameter_groups(model).items():
            size = sum(parameter.numel() for parameter in parameters.values())
            assert report[group] == (size if group in STAGES[stage] else 0, size)
        assert report.total == sum(parameter.numel() for parameter in model.parameters())

        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        model.train()(**mixed_batch()).loss.backward()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        optimizer.step()
        for group, parameters in parameter_groups(model).items():
            for name, parameter in parameters.items():
                assert (parameter.grad is not None) == (group in STAGES[stage]), name
            changed = [name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])]
            assert bool(changed) == (group in STAGES[stage]), group

    def test_the_stages_are_the_published_ones(self):
        recipe = {
            "align": {"fusion", "projector", "cross_attention"},
            "instruct": {"fusion", "projector", "cross_attention", "language_model"},
            "full": {*PARAMETER_GROUPS},
            "compose": {"composition"},
        }
        assert STAGES.keys() == recipe.keys()
        for stage, groups in recipe.items():
            report = set_trainable(tiny_model(composition_config=COMPOSITION), stage)
            assert {group for group, (trainable, _) in report.items() if trainable} == groups

    @pytest.mark.parametrize("stage", STAGES)
    def test_a_step_of_text_alone_gives_every_trainable_parameter_a_gradient(self, stage):
        model = tiny_model(composition_config=COMPOSITION).train()
        set_trainable(model, stage)
        model(**collate([row(0, 0), row(1, 0)])).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name

    def test_each_call_says_all_that_trains(self):
        model = tiny_model()
        assert set_trainable(model, "all").trainable == sum(p.numel() for p in model.parameters())
        for groups, expected in (("fusion", {"fusion"}), (["align", "vision"], {*STAGES["align"], "vision"})):
            report = set_trainable(model, groups)
            assert {group for group, (trainable, _) in report.items() if trainable} == expected
        assert set_trainable(model, ()).trainable == 0
        assert not any(parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.parametrize("stage", ["align", "full"])
    def test_only_encoders_that_train_keep_activations(self, stage):
        model = tiny_model().train()
        set_trainable(model, stage)
        kept = []
        saving = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t)
        for name in ENCODERS:
            encoder = getattr(model.model, name)
            encoder.register_forward_pre_hook(lambda module, inputs: saving.__enter__())
            encoder.register_forward_hook(lambda module, inputs, output: saving.__exit__())
        model(**mixed_batch())
        assert bool(kept) == (stage == "full")

    def test_the_report_prints_as_a_table(self):
        model = tiny_model()
        lines = str(set_trainable(model, "projector")).splitlines()
        assert [line.split()[0] for line in lines] == ["group", *PARAMETER_GROUPS, "all"]
        size = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
        assert lines[5].split()[1:] == [f"{size:,}", f"{size:,}", "100.00%"]
        assert lines[1].split()[1] == "0"

    def test_the_report_counts_weights_as_they_were_before_packing(self):
        model = tiny_model()
        expected = TrainableReport.of(model)["language_model"][1]
        projection = model.model.language_model.layers[0].mlp.down_proj
        packed = type("Params4bit", (nn.Parameter,), {})
        data = torch.zeros(projection.weight.numel() // 4, 1, dtype=torch.bfloat16)
        projection.weight = packed(data, requires_grad=False)
        assert TrainableReport.of(model)["language_model"][1] == expected

    @pytest.mark.parametrize("groups", ["encoders", ["fusion", "encoders"]])
    def test_an_unknown_name_is_refused_and_changes_nothing(self, groups):
        model = tiny_model()
        set_trainable(model, "vision")
        with pytest.raises(ValueError, match=r"\['encoders'\].*spatial_vision, composition, fusion, projector.*align"):
            set_trainable(model, groups)
        assert TrainableReport.of(model).trainable == TrainableReport.of(model)["vision"][1] > 0

    def test_a_group_without_parameters_is_refused(self):
        model = tiny_model()
        model.model.multi_modal_projector = nn.Identity()
        with pytest.raises(ValueError, match="'projector' has no parameters"):
            set_trainable(model, "align")

    def test_a_stage_takes_what_a_configuration_has(self):
        settings = {"feature_fusion_config": {"fusion_type": "none"}, "connector_type": "prefix"}
        model = AureaForConditionalGeneration(AureaConfig(**tiny_config().to_dict() | settings))
        stages = STAGES.keys() - {"compose"}
        trained = {stage: {name for name, (n, _) in set_trainable(model, stage).items() if n} for stage in stages}
        assert trained["align"] == {"projector"}
        assert trained["instruct"] == {"projector", "language_model"}
        assert trained["full"] == {"projector", "language_model", "vision"}
        with pytest.raises(ValueError, match="'fusion' has no parameters"):
            set_trainable(model, ["projector", "fusion"])
        with pytest.raises(ValueError, match="'composition' has no parameters"):
            set_trainable(model, "compose")

    def test_quantised_weights_are_refused(self):
        model = tiny_model()
        weight = model.model.language_model.layers[0].mlp.down_proj
        weight.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
        with pytest.raises(ValueError, match=r"down_proj\.weight' is quantised \(torch\.uint8\)"):
            set_trainable(model, "instruct")
        assert set_trainable(model, "align").trainable > 0

    def test_a_model_with_adapters_is_refused(self):
        peft = pytest.importorskip("peft")
        model = tiny_model()
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=lora_targets(model, "projector")))
        with pytest.raises(ValueError, match="modules_to_save"):
            set_trainable(model, "fusion")


# Names of the decoder's projections: fused, split, transposed (Conv1D), and what else there is.
FAMILIES = {
    "phi3": {},
    "llama": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "starcoder2": {},
    "minicpm3": {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
}


def adapted_model(model: AureaForConditionalGeneration, targets: str, **kwargs):
    peft = pytest.importorskip("peft")
    is_conv = model.config.text_config.model_type == "gpt2"
    return peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=is_conv, init_lora_weights=False, **kwargs)
    )


def adapted_modules(model: nn.Module) -> set[str]:
    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, module in model.named_modules() if hasattr(module, "lora_A")}


class TestLoraTargets:
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("preset", LORA_TARGETS)
    def test_a_preset_adapts_every_linear_layer_of_its_groups_and_no_encoder(self, family, preset):
        model = tiny_model({"model_type": family, **FAMILIES[family]}, composition_config=COMPOSITION)
        groups = PARAMETER_GROUPS[2:] if preset == "all" else (preset,)
        expected = in_group(linear_modules(model), *groups) - {"lm_head"}
        assert expected
        adapted = adapted_model(model, lora_targets(model, preset))
        assert adapted_modules(adapted) == expected

    def test_presets_join_and_fit_the_model_without_head_too(self):
        model = tiny_model().model
        expected = in_group(linear_modules(model), "fusion", "cross_attention")
        adapted = adapted_model(model, lora_targets(model, "fusion", "cross_attention"))
        assert adapted_modules(adapted) == expected

    @pytest.mark.parametrize(
        ("family", "settings"),
        [
            ("mixtral", {"num_local_experts": 4}),
            ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
            (
                "falcon_h1",
                {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
            ),
        ],
    )
    def test_experts_routers_and_state_spaces_are_left_alone_beside_the_attention(self, family, settings):
        model = tiny_model({"model_type": family, **settings})
        adapted = adapted_modules(adapted_model(model, lora_targets(model, "language_model")))
        assert sum("self_attn" in name for name in adapted) == 4 * 3
        assert not [name for name in adapted if "mamba" in name or name.endswith(".gate") or "cross" in name]

    def test_linear_attention_is_adapted(self):
        heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
        heads |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16}
        model = tiny_model({"model_type": "qwen3_next", "num_experts": 4, "moe_intermediate_size": 16, **heads})
        expected = {name for name in linear_modules(model) if "linear_attn" in name}
        adapted = adapted_modules(adapted_model(model, lora_targets(model, "language_model")))
        assert expected and expected <= adapted

    def test_a_group_beside_the_adapter_trains_in_full(self):
        model = tiny_model()
        saved = GROUP_MODULES["projector"] + GROUP_MODULES["cross_attention"]
        adapted = adapted_model(model, lora_targets(model, "language_model"), modules_to_save=saved)
        report = TrainableReport.of(adapted)
        assert report["vision"][0] == report["fusion"][0] == 0 < report["language_model"][0]
        for group in ("projector", "cross_attention"):
            assert report[group][0] * 2 == report[group][1]  # PEFT keeps the original beside what trains
        adapted.train()(**mixed_batch()).loss.backward()
        assert [name for name, p in adapted.named_parameters() if p.requires_grad and p.grad is None] == []

    def test_what_cannot_be_meant_is_refused(self):
        assert lora_targets(concat_model(), "fusion")
        model = tiny_model()
        with pytest.raises(ValueError, match=r"Unknown LoRA presets \['decoder'\].*language_model, cross_attention"):
            lora_targets(model, "fusion", "decoder")
        with pytest.raises(ValueError, match="No LoRA preset was given"):
            lora_targets(model)
        with pytest.raises(ValueError, match="'fusion' hits no module of this AureaForConditionalGeneration"):
            lora_targets(one_encoder_model(), "fusion")

    def test_a_merged_model_loads_where_neither_package_nor_peft_is(self, tmp_path):
        expected, folders = [], []
        for number, family in enumerate(("phi3", "llama")):
            model = tiny_model({"model_type": family})
            inputs = mixed_batch()
            with torch.no_grad():
                before = model(**inputs).logits
                merged = adapted_model(model, lora_targets(model, "all")).eval().merge_and_unload()
                expected.append(merged(**inputs).logits)
            assert not torch.allclose(before, expected[-1], atol=1e-2)
            folders.append(tmp_path / family)
            merged.save_pretrained(folders[-1])
            save_file(inputs, tmp_path / f"inputs_{number}.safetensors")
        run_without_package(LOGITS_SCRIPT, tmp_path, *folders)
        for number, logits in enumerate(expected):
            loaded = load_file(tmp_path / f"logits_{number}.safetensors")["logits"]
            torch.testing.assert_close(loaded, logits, atol=1e-5, rtol=0)


class Linear4bit(nn.Module):
    """Stands for bitsandbytes' layer: transformers decides which modules it replaces, and this only takes a place."""

    def __init__(self, in_features: int, out_features: int, bias: bool, *args, **kwargs):
        super().__init__()


class TestQuantization:
    def quantized(self, monkeypatch, model: nn.Module, skipped: list[str]) -> set[str]:
        """Names of the layers that transformers replaces when it loads the model in 4 bits."""
        from transformers.integrations import bitsandbytes
        from transformers.quantizers.base import HfQuantizer

        stand_in = SimpleNamespace(nn=SimpleNamespace(Linear4bit=Linear4bit))
        monkeypatch.setattr(bitsandbytes, "bnb", stand_in, raising=False)
        settings = dict.fromkeys(("bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "bnb_4bit_quant_type"))
        config = SimpleNamespace(quantization_method=lambda: "nf4", bnb_4bit_quant_storage=None, **settings)
        skipped = HfQuantizer.get_modules_to_not_convert(model, skipped, model._keep_in_fp32_modules)
        bitsandbytes.replace_with_bnb_linear(model, skipped, config)
        return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}

    @pytest.mark.parametrize("family", ["phi3", "gpt2"])
    def test_the_decoder_and_its_blocks_are_quantised_and_nothing_else(self, monkeypatch, family):
        model = tiny_model({"model_type": family})
        expected = in_group(linear_modules(model), "language_model", "cross_attention") - {"lm_head"}
        assert self.quantized(monkeypatch, model, modules_not_to_quantize()) == expected

    def test_groups_that_train_in_full_stay_as_they_are(self, monkeypatch):
        model = tiny_model(UNTIED)
        expected = in_group(linear_modules(model), "language_model", "fusion") - {"lm_head"}
        expected = {name for name in expected if ".fixup_proj." not in name}  # of odd widths: never
        groups = ("vision", "spatial_vision", "projector", "cross_attention")
        assert self.quantized(monkeypatch, model, modules_not_to_quantize(groups)) == expected

    def test_what_is_quantised_without_a_list_has_groups_of_32_and_tokens_for_inputs(self, monkeypatch):
        towers = {name: TINY_VISION[name] | {"hidden_size": 32} for name in ("vision_config", "spatial_vision_config")}
        model = tiny_model({"intermediate_size": 64}, **towers, cross_attention_intermediate_size=32)
        linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        shapes = {}
        for name, module in linear.items():
            module.register_forward_pre_hook(lambda _, args, name=name: shapes.update({name: args[0].shape}))
        model(input_ids=torch.tensor([[5, IMAGE_TOKEN_ID, 6]]), pixel_values=random_pixels(1, model.config))
        quantised = self.quantized(monkeypatch, model, None)
        assert any("fusion" in name for name in quantised)
        assert {len(shapes[name]) for name in quantised} <= {2, 3}
        odd = {name: linear[name].in_features for name in quantised if linear[name].in_features % 32 != 0}
        assert not odd

    def test_names_of_the_model_without_head_are_met_too(self, monkeypatch):
        model = tiny_model().model
        expected = in_group(linear_modules(model), "language_model")
        skipped = modules_not_to_quantize([group for group in PARAMETER_GROUPS if group != "language_model"])
        assert self.quantized(monkeypatch, model, skipped) == expected

    def test_adapters_learn_beside_a_decoder_in_4_bits(self, tmp_path):
        bitsandbytes, peft = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft")
        precise = tiny_model({"hidden_size": 192, "intermediate_size": 256} | UNTIED)  # as bitsandbytes packs them
        precise.save_pretrained(tmp_path / "model")

        def load():
            config = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype=torch.float32,
                llm_int8_skip_modules=modules_not_to_quantize(),
            )
            model = AureaForConditionalGeneration.from_pretrained(tmp_path / "model", quantization_config=config)
            return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

        model, batch = load().train(), mixed_batch()
        in_4_bits = bitsandbytes.nn.Linear4bit
        layers = {name: module for name, module in model.named_modules() if isinstance(module, in_4_bits)}
        assert layers.keys() == in_group(linear_modules(precise), "language_model", "cross_attention") - {"lm_head"}
        with torch.no_grad():
            for name, layer in layers.items():
                rounded = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
                precise.get_submodule(name).weight.copy_(rounded)
            torch.testing.assert_close(model(**batch).logits, precise(**batch).logits)

        before = [layer.weight.clone() for layer in layers.values()]
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=lora_targets(model, "all")))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
        losses = []
        for _ in range(10):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers.values(), before))

        model.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
        with torch.no_grad():
            torch.testing.assert_close(loaded.eval()(**batch).logits, model.eval()(**batch).logits)

    @pytest.mark.parametrize("fusion_type", ["spatial_range", "concat"])
    def test_gradients_pass_8_bits_in_half_precision_as_in_training(self, tmp_path, fusion_type):
        """On a CPU and out of training bitsandbytes writes to its input wherever that has large values, here each."""
        pytest.importorskip("bitsandbytes")
        fusion = {"radius": 1, "depth": 1, "fusion_type": fusion_type}
        tiny_model(feature_fusion_config=fusion).save_pretrained(tmp_path)
        model = AureaForConditionalGeneration.from_pretrained(
            tmp_path,
            dtype=torch.float16,
            quantization_config=BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=1e-9),
            attn_implementation="eager",  # SDPA needs its output again, which o_proj wrote to
        )
        batch = collate([row(0, 1), row(1, 1)])

        def gradients(model) -> dict[str, torch.Tensor]:
            model.zero_grad()
            model(**batch).loss.backward()
            return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "norm" in name}

        in_training, outside = gradients(model.train()), gradients(model.eval())
        assert any("fusion" in name for name in outside) and any("cross_attention" in name for name in outside)
        torch.testing.assert_close(outside, in_training, atol=1e-2, rtol=1e-2)

    def test_an_unknown_group_is_refused(self):
        with pytest.raises(ValueError, match=r"Unknown parameter groups \['towers'\]"):
            modules_not_to_quantize("towers")


class Recorder(TrainerCallback):
    """A stand-in for what `report_to` names: Trainer calls those before any callback given to it."""

    def __init__(self):
        self.entries = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.entries.append(dict(logs))


def train(model, folder, *loggers, rows=None, callbacks=(), **settings) -> Recorder:
    settings = {
        "max_steps": 4,
        "logging_steps": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        **settings,
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **settings,
    )
    rows = [row(index, (1, 0, 2)[index % 3]) for index in range(8)] if rows is None else rows
    recorder = Recorder()
    trainer = Trainer(model, arguments, collate, train_dataset=rows, callbacks=[recorder, *callbacks])
    for logger in loggers:
        logger.attach(trainer)
    trainer.train()
    history = [{k: v for k, v in entry.items() if k != "step"} for entry in trainer.state.log_history]
    assert [entry for entry in recorder.entries if "loss" in entry] == [entry for entry in history if "loss" in entry]
    return recorder


def figures(recorder: Recorder, prefix: str) -> list[dict[str, float]]:
    """What the entries beside a loss hold under a prefix."""
    found = [{k: v for k, v in entry.items() if k.startswith(prefix)} for entry in recorder.entries]
    assert not any(entry for entry, whole in zip(found, recorder.entries) if "loss" not in whole)
    return [entry for entry, whole in zip(found, recorder.entries) if "loss" in whole]


class TestGroupGradientNorms:
    class Gradients(TrainerCallback):
        """The norms of each step, the plain way; right where nothing is clipped."""

        def __init__(self):
            self.norms = []

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms = {}
            for group in PARAMETER_GROUPS:
                names = in_group(dict(model.named_parameters()).keys(), group)
                gradients = [model.get_parameter(name).grad for name in names]
                if gradients and gradients[0] is not None:
                    norms[f"grad_norm/{group}"] = torch.cat([g.flatten() for g in gradients]).norm().item()
            self.norms.append(norms)

    def test_they_are_logged_at_logging_steps_and_are_those_before_clipping(self, tmp_path):
        logged = {}
        for max_grad_norm in (1e9, 1e-3):
            plain, model = self.Gradients(), tiny_model()
            set_trainable(model, "align")
            settings = {"max_grad_norm": max_grad_norm, "optim": "sgd", "learning_rate": 0.0}
            recorder = train(model, tmp_path, GroupGradientNorms(), callbacks=[plain], **settings)
            logged[max_grad_norm] = figures(recorder, "grad_norm/")
            for entry, whole in zip(logged[max_grad_norm], recorder.entries):
                assert entry.keys() == {f"grad_norm/{group}" for group in STAGES["align"]}
                assert math.hypot(*entry.values()) == pytest.approx(whole["grad_norm"], rel=1e-5)
            if max_grad_norm > 1:
                expected = [pytest.approx(norms, rel=1e-5) for norms in (plain.norms[1], plain.norms[3])]
                assert logged[max_grad_norm] == expected
                assert plain.norms[0] != plain.norms[1]
        for clipped, free in zip(*logged.values()):
            assert clipped == pytest.approx(free, rel=1e-4)

    @pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
    def test_an_adapters_gradients_are_those_of_what_it_adapts(self, tmp_path, max_grad_norm):
        model = tiny_model()
        model = adapted_model(model, lora_targets(model, "cross_attention", "language_model"))
        recorder = train(model, tmp_path, GroupGradientNorms(), max_grad_norm=max_grad_norm, logging_first_step=True)
        for entry in figures(recorder, "grad_norm/"):
            assert entry.keys() == {"grad_norm/cross_attention", "grad_norm/language_model"}
        assert len(figures(recorder, "grad_norm/")) == 3  # the first step, the second and the fourth

    def test_an_epochs_log_has_those_of_its_last_step(self, tmp_path):
        plain = self.Gradients()
        settings = {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2, "max_grad_norm": 1e9}
        recorder = train(tiny_model(), tmp_path, GroupGradientNorms(), callbacks=[plain], **settings)
        assert figures(recorder, "grad_norm/") == [pytest.approx(plain.norms[step], rel=1e-5) for step in (1, 3)]

    def test_gradients_of_zero_are_logged_as_such(self, tmp_path):
        model = tiny_model()
        set_trainable(model, "projector")
        rows = [row(index, 0) for index in range(4)]  # text alone
        logged = figures(train(model, tmp_path, GroupGradientNorms(), rows=rows), "grad_norm/")
        assert logged == [{"grad_norm/projector": 0.0}] * 2


class TestSpatialRangeEntropy:
    def model(self, **kwargs) -> AureaForConditionalGeneration:
        """The semantic stack looks at all neighbours alike, the joint one at the centre alone."""
        model = tiny_model(**kwargs)
        with torch.no_grad():
            for layer in model.model.fusion.semantic_layers:
                layer.range_proj.fc2.weight.zero_()
                layer.range_proj.fc2.bias.zero_()
                layer.sigma_spatial.fill_(1e6)
            for layer in model.model.fusion.joint_layers:
                layer.sigma_spatial.fill_(1e-3)
        set_trainable(model, "language_model")
        return model

    @pytest.mark.parametrize("kind", ["bare", "peft", "checkpointed"])
    def test_it_tells_a_wide_look_from_a_narrow_one(self, tmp_path, kind):
        model = self.model()
        settings = {"gradient_checkpointing": True} if kind == "checkpointed" else {}
        if kind == "peft":
            model = adapted_model(model, lora_targets(model, "language_model"))
        logged = figures(train(model, tmp_path, SpatialRangeEntropy(), **settings), "spatial_range_entropy")
        expected = {"semantic": math.log(9), "semantic_share": 1, "joint": 0, "joint_share": 0}
        expected = {f"spatial_range_entropy/{name}": value for name, value in expected.items()}
        assert logged == [pytest.approx(expected, abs=1e-5)] * 2

    def test_it_is_the_mean_entropy_of_the_last_batch_with_pictures(self, tmp_path):
        rows = [row(0, 1), row(1, 2), row(2, 0), row(3, 0)]
        model = tiny_model()
        set_trainable(model, "projector")  # so that text alone sends a blank picture through the fusion
        entropies, batch = [], collate(rows[:2])
        for layer in model.model.fusion.joint_layers:

            def record(module, inputs, weights):
                weights = weights / weights.sum(-1, keepdim=True)
                entropies.append(-(weights * weights.log()).sum(-1).mean().item())

            hook = layer.spatial_range_weights.register_forward_hook(record)
            model.model.get_image_features(batch["pixel_values"])
            hook.remove()
        # Accelerate would cut every tensor of a stream's batch to the number of rows, the pictures too.
        settings = {"max_steps": 2, "accelerator_config": {"dispatch_batches": False}}
        recorder = train(model, tmp_path, SpatialRangeEntropy(), rows=InOrder(rows), **settings)
        logged = figures(recorder, "spatial_range")
        expected = sum(entropies) / len(entropies)
        assert logged[0]["spatial_range_entropy/joint"] == pytest.approx(expected, rel=1e-5)
        assert 0.1 < logged[0]["spatial_range_entropy/joint_share"] == pytest.approx(expected / math.log(9), rel=1e-5)

    def test_an_epoch_that_ends_with_text_alone_has_none(self, tmp_path):
        rows = [row(0, 1), row(1, 2), row(2, 0), row(3, 0)]
        settings = {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}
        settings |= {"gradient_accumulation_steps": 1, "train_sampling_strategy": "sequential"}
        recorder = train(self.model(), tmp_path, SpatialRangeEntropy(), rows=rows, **settings)
        assert figures(recorder, "spatial_range") == [{}]

    def test_nothing_is_measured_at_other_steps_or_left_behind(self, tmp_path):
        model, hooked = self.model(), []

        class Watch(TrainerCallback):
            def on_step_begin(self, args, state, control, model=None, **kwargs):
                hooked.append(sum(bool(module._forward_hooks) for module in model.modules()))

        train(model, tmp_path, SpatialRangeEntropy(), callbacks=[Watch()])
        assert hooked == [0, 4, 0, 4]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_there_is_none_of_text_alone_and_none_of_a_fusion_without_neighbours(self, tmp_path):
        rows = [row(index, 0) for index in range(4)]
        assert figures(train(tiny_model(), tmp_path, SpatialRangeEntropy(), rows=rows), "spatial_range") == [{}, {}]
        assert figures(train(concat_model(), tmp_path, SpatialRangeEntropy()), "spatial_range") == [{}, {}]


class TestAuxiliaryLossLogger:
    class Losses:
        """What the model gave out, step by step."""

        def __init__(self, model: nn.Module):
            self.values = []
            model.register_forward_hook(lambda module, inputs, output: self.values.append(output.auxiliary_losses))

        def mean(self, name: str, calls: slice) -> float:
            values = [losses[name].item() for losses in self.values[calls] if losses is not None]
            return sum(values) / len(values)

    @pytest.mark.parametrize("is_adapted", [False, True], ids=["bare", "peft"])
    def test_they_are_means_since_the_last_log(self, tmp_path, is_adapted):
        model = tiny_model(feature_consistency_coef=0.1, feature_diversity_coef=0.1)
        if is_adapted:
            model = adapted_model(model, lora_targets(model, "fusion"))
        losses = self.Losses(model)
        recorder = train(model, tmp_path, AuxiliaryLossLogger())
        names = ("feature_consistency", "feature_diversity")
        assert len(losses.values) == 8  # four steps of two batches; a log covers two steps
        assert losses.values[0] != losses.values[1]
        for entry, calls in zip(figures(recorder, "feature"), (slice(0, 4), slice(4, 8))):
            assert entry == {name: pytest.approx(losses.mean(name, calls), rel=1e-5) for name in names}

    def test_a_second_run_counts_nothing_of_the_first(self, tmp_path):
        logger, logged = AuxiliaryLossLogger(), []
        for loggers in ([AuxiliaryLossLogger()], [logger], [logger]):
            model = tiny_model(feature_diversity_coef=0.1)
            if len(logged) == 1:  # ends before it logs anything
                train(model, tmp_path, *loggers, max_steps=1, rows=[row(9, 1)] * 4)
                logged.append(None)
            else:
                logged.append(figures(train(model, tmp_path, *loggers, max_steps=2), "feature"))
        assert logged[2] == logged[0] != [{}]

    @pytest.mark.parametrize("drop", [False, True], ids=["none", "absent"])
    def test_a_model_without_them_logs_none(self, tmp_path, drop):
        model = tiny_model()
        if drop:
            model.register_forward_hook(lambda module, inputs, output: (output.loss, output.logits))
        recorder = train(model, tmp_path, AuxiliaryLossLogger())
        assert figures(recorder, "feature") == [{}, {}]

    def test_evaluation_does_not_count(self, tmp_path):
        model = tiny_model()
        logger = AuxiliaryLossLogger()
        output = AureaCausalLMOutputWithPast(auxiliary_losses={"feature_diversity": torch.tensor(3.0)})
        logger._record(model.eval(), (), output)
        assert logger.take_sums({}) == {}
        logger._record(model.train(), (), output)
        assert logger.take_sums({}) == {"feature_diversity": (3.0, 1)}
        assert logger.take_sums({}) == {}


class TestTrainingLogger:
    def test_all_of_them_share_the_one_entry_of_a_logging_step(self, tmp_path):
        model = tiny_model(feature_diversity_coef=0.1)
        recorder = train(model, tmp_path, AuxiliaryLossLogger(), GroupGradientNorms(), SpatialRangeEntropy())
        entries = [entry for entry in recorder.entries if "loss" in entry]
        assert len(entries) == 2 and len(recorder.entries) == 3  # and the summary at the end
        for entry in entries:
            assert {"feature_diversity", "grad_norm/fusion", "spatial_range_entropy/joint"} <= entry.keys()
            assert all(type(value) in (float, int) for value in entry.values())

    def test_the_figures_of_processes_are_averaged_whichever_they_have(self, monkeypatch):
        others = [{"a": (6.0, 3), "b": (1.0, 1)}, {}]
        monkeypatch.setattr(training_aurea, "gather_object", lambda mine: mine + others)
        assert training_aurea._mean_over_processes({"a": (2.0, 1)}) == {"a": 2.0, "b": 1.0}

    def test_a_logger_that_would_come_after_the_reports_says_so(self, tmp_path, monkeypatch):
        warnings = []
        monkeypatch.setattr(training_aurea.logger, "warning", warnings.append)
        state, control = SimpleNamespace(), SimpleNamespace()
        for report_to, is_attached, count in ((["wandb"], False, 1), (["wandb"], True, 0), ([], False, 0)):
            logger = GroupGradientNorms()
            if is_attached:
                logger.attach(SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[])))
            warnings.clear()
            logger.on_train_begin(SimpleNamespace(report_to=report_to), state, control)
            assert len(warnings) == count
            assert all("wandb will not receive" in warning and ".attach(trainer)" in warning for warning in warnings)
