# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The auxiliary losses in the model: what they are computed from, what they add to its loss, and when."""

from itertools import pairwise

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, random_pixels, tiny_config, tiny_model
from test_losses import LargestTensor
from transformers import Trainer, TrainingArguments

from transformers_aurea.losses_aurea import feature_consistency_loss, feature_diversity_loss, share_of_batch


COEFFICIENTS = {"feature_consistency_coef": 0.5, "feature_diversity_coef": 0.25}
KERNEL = {"radius": 1, "alpha": 0.5, "beta": 0.5, "gamma": 1.0, "w1": 1.0, "w2": 1.0, "shift": 0.1}


def rows(config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows with one, no, two and one pictures, and with 7, 5, 3 and 2 tokens to predict."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, 90, (4, 9), generator=generator)
    input_ids[0, 1] = input_ids[2, 0] = input_ids[2, 4] = input_ids[3, 6] = IMAGE_TOKEN_ID
    labels = input_ids.clone()
    for row, start in enumerate((2, 4, 6, 7)):
        labels[row, :start] = -100
    return {"input_ids": input_ids, "labels": labels, "pixel_values": random_pixels(4, config, seed)}


def part(batch: dict, first: int, last: int) -> dict[str, torch.Tensor]:
    """Some rows, with their pictures."""
    counts = (batch["input_ids"] == IMAGE_TOKEN_ID).sum(dim=1).tolist()
    pixels = batch["pixel_values"][sum(counts[:first]) : sum(counts[:last])]
    rows = {name: batch[name][first:last] for name in ("input_ids", "labels")}
    return {**rows, "pixel_values": pixels} if len(pixels) else rows


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


class TestLossesOfOthers:
    """Who makes the loss of something else than `labels` would leave them untrained without a word."""

    def test_from_logits_are_refused_in_training(self):
        model = tiny_model(feature_consistency_coef=0.5)
        inputs = rows(model.config)
        del inputs["labels"]
        with pytest.raises(ValueError, match="sets `feature_consistency_coef`, but these losses would not be trained"):
            model.train()(**inputs)
        with torch.no_grad():
            model(**inputs)
        model.eval()(**inputs)

    def test_from_the_base_model_are_refused_in_training(self):
        model = tiny_model(**COEFFICIENTS)
        inputs = rows(model.config)
        del inputs["labels"]
        names = "`feature_consistency_coef` and `feature_diversity_coef`"
        for pixels in (inputs.pop("pixel_values"), None):  # text alone, too, in which they are of no picture
            text = torch.full((1, 4), 7) if pixels is None else inputs["input_ids"]
            with pytest.raises(ValueError, match=f"{names} of the model's configuration to 0"):
                model.train().base_model(input_ids=text, pixel_values=pixels)

    def test_label_smoothing_is_refused(self, tmp_path):
        model = tiny_model(feature_diversity_coef=0.5)
        arguments = {"remove_unused_columns": False, "use_cpu": True, "report_to": "none", "max_steps": 1}
        args = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, **arguments)
        trainer = Trainer(model, args, train_dataset=[0], data_collator=lambda _: rows(model.config))
        with pytest.raises(ValueError, match=r"`feature_diversity_coef`.*label smoothing"):
            trainer.train()


class TestValues:
    @pytest.mark.parametrize("fusion_type", ["spatial_range", "concat"])
    def test_they_are_those_of_the_fused_map_and_tokens(self, fusion_type):
        model = tiny_model(**COEFFICIENTS)
        if fusion_type == "concat":
            config = tiny_config(**COEFFICIENTS).to_dict()
            config["feature_fusion_config"] |= {"fusion_type": "concat"}
            model = type(model)(type(model.config)(**config))
        inputs = rows(model.config)
        seen = {}

        def record(name):
            module = getattr(model.model.fusion, name)
            module.register_forward_hook(lambda _, args, output: seen.update({name: args[0], f"{name} gives": output}))

        for name in ("semantic_norm", "spatial_norm", "output_proj"):
            record(name)
        losses = model.train()(**inputs).auxiliary_losses
        fused_map = seen["output_proj"].unflatten(1, (4, 4))
        consistency = sum(
            feature_consistency_loss(seen[name], fused_map, **KERNEL) for name in ("semantic_norm", "spatial_norm")
        )
        torch.testing.assert_close(losses["feature_consistency"], consistency)
        torch.testing.assert_close(losses["feature_diversity"], feature_diversity_loss(seen["output_proj gives"]))

    def test_they_are_the_originals(self, golden_model, goldens):
        """On the features on which the original's values were recorded."""
        model = golden_model.model
        for name, value in COEFFICIENTS.items():
            setattr(model.config, name, value)
        maps = [goldens[f"enc/{name}_features"].unflatten(1, (8, 8)) for name in ("siglip", "dino")]
        try:
            tokens, losses, _ = model.train()._fuse(maps)
        finally:
            model.eval()
            for name in COEFFICIENTS:
                setattr(model.config, name, 0.0)
        torch.testing.assert_close(losses["feature_consistency"].mean(), goldens["fcl/in_sr_block_value"])
        torch.testing.assert_close(losses["feature_diversity"].mean(), goldens["fdl/of_sr_features"])
        assert torch.equal(model._fuse(maps)[0], tokens)

    def test_the_kernel_is_configured_in_part(self):
        config = tiny_config(feature_consistency_kernel={"beta": 3, "shift": 0.0})
        kernel = {**KERNEL, "beta": 3, "shift": 0.0}
        assert config.feature_consistency_kernel == {name: kernel[name] for name in kernel if name != "radius"}
        assert type(config)(**config.to_dict()).feature_consistency_kernel == config.feature_consistency_kernel


class TestLoss:
    def test_alike_rows_add_the_weighted_means(self):
        inputs = {"input_ids": torch.tensor([[1, IMAGE_TOKEN_ID, 5, 6], [IMAGE_TOKEN_ID, 7, 8, 9]])}
        inputs["labels"] = inputs["input_ids"]
        model = tiny_model(**COEFFICIENTS).train()
        inputs["pixel_values"] = random_pixels(2, model.config)
        output = model(**inputs)
        plain = tiny_model().train()(**inputs)
        assert torch.equal(output.logits, plain.logits) and plain.auxiliary_losses is None
        losses = output.auxiliary_losses
        assert losses.keys() == {"feature_consistency", "feature_diversity"}
        assert not any(loss.requires_grad or loss.ndim for loss in losses.values())
        expected = plain.loss + 0.5 * losses["feature_consistency"] + 0.25 * losses["feature_diversity"]
        torch.testing.assert_close(output.loss, expected)

    @pytest.mark.parametrize("cuts", [(0, 2, 4), (0, 1, 2, 3, 4), (0, 3, 4)], ids=str)
    def test_parts_of_a_batch_add_up_to_the_whole(self, cuts):
        model = tiny_model(**COEFFICIENTS).train()
        batch = rows(model.config)
        whole = model(**batch)
        whole.loss.backward()
        expected = gradients(model)
        model.zero_grad()
        num_items = (batch["labels"] != -100).sum()
        total = 0
        for first, last in pairwise(cuts):
            loss = model(**part(batch, first, last), num_items_in_batch=num_items).loss
            loss.backward()
            total += loss.detach()
        torch.testing.assert_close(total, whole.loss.detach())
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(
                gradient, expected[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )

    @pytest.mark.parametrize("per_image", [1, 3])
    def test_each_row_weighs_what_its_tokens_do(self, per_image):
        image_tokens = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
        image_tokens = image_tokens.repeat_interleave(per_image, dim=1)
        labels = torch.tensor([[9, 9, 9, 9], [-100, 9, 9, 9], [-100, -100, -100, 9]])
        losses = torch.tensor([1.0, 2.0, 5.0])
        expected = torch.tensor((3 * (1 + 2) / 2 + 1 * 5) / 7)
        for total, value in ((None, expected), (14, expected / 2)):
            share = share_of_batch(losses, image_tokens, labels, total, placeholders_per_image=per_image)
            torch.testing.assert_close(share, value)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_changes_nothing(self, use_reentrant):
        model = tiny_model(**COEFFICIENTS).train()
        inputs = rows(model.config)
        model(**inputs).loss.backward()
        expected = gradients(model)
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        model(**inputs, use_cache=False).loss.backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(
                gradient, expected[name], atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )

    def test_the_guidance_teaches_the_encoders_nothing(self):
        """They learn through the fusion alone, from which one layer before the fused map cuts them off."""
        model = tiny_model(feature_consistency_coef=1.0).train()
        for layer in (model.model.fusion.semantic_norm, model.model.fusion.spatial_norm):
            layer.register_forward_hook(lambda module, args, output: output.detach())
        outputs = model.model.get_image_features(random_pixels(2, model.config))
        outputs.auxiliary_losses["feature_consistency"].sum().backward()
        assert model.model.fusion.semantic_proj.weight.grad.any()
        assert all(parameter.grad is None for parameter in model.model.vision_model.parameters())


class TestWhen:
    """Only where a fusion is trained on pictures."""

    def test_not_in_evaluation_and_not_without_gradients(self):
        model = tiny_model(**COEFFICIENTS)
        inputs, plain = rows(model.config), tiny_model()
        assert model(**inputs).auxiliary_losses is None
        with torch.no_grad():
            assert torch.equal(model(**inputs).loss, plain(**inputs).loss)
            assert model.train()(**inputs).auxiliary_losses is None

    def test_not_where_the_fusion_is_frozen(self):
        model = tiny_model(**COEFFICIENTS).train()
        model.requires_grad_(False)
        model.model.language_model.requires_grad_(True)
        inputs = rows(model.config)
        output = model(**inputs)
        assert output.auxiliary_losses is None
        assert torch.equal(output.loss, tiny_model().train()(**inputs).loss)

    def test_not_in_a_step_of_text_alone_in_which_all_parameters_take_part(self):
        model = tiny_model(**COEFFICIENTS).train()
        inputs = part(rows(model.config), 1, 2)
        output = model(**inputs)
        assert output.auxiliary_losses is None
        assert torch.equal(output.loss, tiny_model().train()(**inputs).loss)
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_each_alone(self):
        for name, other in (("consistency", "diversity"), ("diversity", "consistency")):
            model = tiny_model(**{f"feature_{name}_coef": 2}).train()
            losses = model(**rows(model.config)).auxiliary_losses
            assert losses.keys() == {f"feature_{name}"}, other

    def test_nothing_is_gathered(self):
        model = tiny_model(**COEFFICIENTS, vision_image_size=7 * 12).train()
        features = [torch.randn(2, 12, 12, size, requires_grad=True) for size in model.config.feature_sizes]
        with LargestTensor() as largest:
            _, losses, _ = model.model._fuse(features)
            sum(loss.sum() for loss in losses.values()).backward()
        with LargestTensor() as plain:
            model.model.fusion(*features).sum().backward()
        assert largest.numel <= plain.numel


class TestTrainer:
    def train(self, model, folder, batch_size: int) -> list[float]:
        """Losses of four steps of four rows each, in micro-batches of `batch_size`."""
        batch = rows(model.config)
        dataset = [part(batch, row, row + 1) for row in range(4)]

        def collate(examples):
            pixels = [example["pixel_values"] for example in examples if "pixel_values" in example]
            inputs = {name: torch.cat([example[name] for example in examples]) for name in ("input_ids", "labels")}
            return {**inputs, "pixel_values": torch.cat(pixels)} if pixels else inputs

        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=4,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=4 // batch_size,
            learning_rate=2e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(model, arguments, collate, train_dataset=dataset)
        trainer.train()
        assert trainer.predict(dataset).predictions.shape == (4, 9, 99)  # logits alone
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    def test_accumulation_changes_nothing(self, tmp_path):
        whole = self.train(tiny_model(**COEFFICIENTS), tmp_path, 4)
        assert self.train(tiny_model(**COEFFICIENTS), tmp_path, 1) == pytest.approx(whole, abs=1e-4)
        plain = self.train(tiny_model(), tmp_path, 4)
        assert whole[0] > plain[0] + 0.01


BAD_SETTINGS = {
    "negative": ({"feature_diversity_coef": -0.5}, "`feature_diversity_coef` must be a number from 0 on, got -0.5"),
    "nan": ({"feature_consistency_coef": float("nan")}, "`feature_consistency_coef` must be .* got nan"),
    "unknown": ({"feature_consistency_kernel": {"delta": 1}}, r"alpha, beta.*knows nothing of \['delta'\]"),
    "beta": ({"feature_consistency_kernel": {"beta": 0}}, "`feature_consistency_kernel.beta` must be positive, got 0"),
}


@pytest.mark.parametrize("settings, message", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(Exception, match=message):
        tiny_config(**settings)


def test_a_grid_within_the_radius_is_refused_for_any_fusion_that_is_to_be_consistent():
    config = tiny_config().to_dict() | {"feature_fusion_config": {"fusion_type": "concat", "radius": 4}}
    config_class = type(tiny_config())
    config_class(**config)
    with pytest.raises(Exception, match=r"must be larger than `feature_fusion_config.radius` \(4\)"):
        config_class(**config | {"feature_consistency_coef": 1.0})
