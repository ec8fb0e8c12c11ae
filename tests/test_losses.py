# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch
from torch.nn.functional import normalize, pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from transformers_aurea.losses_aurea import (
    feature_consistency_loss,
    feature_diversity,
    feature_diversity_loss,
    linear_cka,
)


KERNEL = {"radius": 2, "alpha": 0.8, "beta": 2.0, "gamma": 0.3, "w1": 0.7, "w2": 1.6, "shift": 0.25}


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


def value_and_gradients(loss, *inputs):
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = loss(*inputs)
    value.backward()
    return value.detach(), *(tensor.grad for tensor in inputs)


def gathered_consistency_loss(guidance, features, radius, alpha, beta, gamma, w1, w2, shift):
    """The formula with all neighbourhoods written out."""
    extent = 2 * radius + 1

    def neighbors(maps):  # (B, H, W, C) → (B, H, W, d, d, C)
        padded = pad(maps.permute(0, 3, 1, 2), [radius] * 4, mode="reflect")
        return padded.unfold(2, extent, 1).unfold(3, extent, 1).permute(0, 2, 3, 4, 5, 1)

    u = torch.linspace(-1, 1, extent, dtype=features.dtype)
    offsets = u[:, None] ** 2 + u**2
    distances = (neighbors(guidance) - guidance[:, :, :, None, None]).square().sum(-1)
    weights = w1 * torch.exp(-offsets / (2 * alpha) - distances / (2 * beta)) + w2 * torch.exp(-offsets / (2 * gamma))
    directions = normalize(features, dim=-1, eps=1e-8)
    cosines = (neighbors(directions) * directions[:, :, :, None, None]).sum(-1)
    return ((weights - shift) * (1 - cosines).clamp(min=0)).mean()


def gathered_cka(left, right):
    def centred_gram(features):
        directions = normalize(features, dim=-1)
        gram = directions @ directions.mT
        return gram - gram.mean(1, keepdim=True) - gram.mean(2, keepdim=True) + gram.mean((1, 2), keepdim=True)

    left, right = centred_gram(left), centred_gram(right)
    return ((left * right).sum((1, 2)) / (left.norm(dim=(1, 2)) * right.norm(dim=(1, 2)))).mean()


class LargestTensor(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation gives back."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


class TestGoldens:
    """Values and gradients that the original computed. Its maps are (B, C, H, W)."""

    @pytest.mark.parametrize("name", ["fcl/set0", "fcl/set1"])
    def test_feature_consistency(self, goldens, facts, name):
        value, grad_guidance, grad_features = value_and_gradients(
            lambda *maps: feature_consistency_loss(*(each.permute(0, 2, 3, 1) for each in maps), **facts[name]),
            goldens["fcl/guidance"],
            goldens["fcl/features"],
        )
        assert relative_error(value, goldens[f"{name}/value"]) < 1e-6
        assert relative_error(grad_guidance, goldens[f"{name}/grad_guidance"]) < 1e-6
        assert relative_error(grad_features, goldens[f"{name}/grad_features"]) < 1e-6

    @pytest.mark.parametrize("alpha", [0.7, 2.0])
    def test_feature_diversity_loss(self, goldens, alpha):
        value, grad = value_and_gradients(lambda x: feature_diversity_loss(x, alpha), goldens["fdl/features"])
        assert abs(value - goldens[f"fdl/alpha{alpha}/value"]) < 3e-7  # a mean of cosines between -1 and 1
        assert relative_error(grad, goldens[f"fdl/alpha{alpha}/grad"]) < 1e-6

    def test_metrics(self, goldens):
        features, other_features = goldens["fdl/features"], goldens["fdl/features2"]
        assert relative_error(feature_diversity(features), goldens["fdl/feature_diversity"]) < 1e-6
        assert relative_error(linear_cka(features, other_features), goldens["fdl/feature_similarity_cka"]) < 1e-6

    def test_in_the_fusion(self, golden_model, goldens, facts):
        fusion, maps = golden_model.model.fusion, []
        semantic, spatial = (goldens[f"enc/{name}_features"].unflatten(1, (8, 8)) for name in ("siglip", "dino"))
        handle = fusion.output_proj.register_forward_pre_hook(lambda module, args: maps.append(args[0]))
        tokens = fusion(semantic, spatial)
        handle.remove()
        fused_map = maps[0].unflatten(1, (8, 8))
        consistency = sum(
            feature_consistency_loss(guidance, fused_map, **facts["fcl/set0"]) for guidance in (spatial, semantic)
        )
        diversity = feature_diversity_loss(tokens)
        assert relative_error(consistency, goldens["fcl/in_sr_block_value"]) < 1e-6
        assert relative_error(diversity, goldens["fdl/of_sr_features"]) < 1e-6
        names = {
            "s_proj.weight": fusion.semantic_proj.weight,
            "sr_attn1_layers.0.0.sigma_spatial": fusion.semantic_layers[0].sigma_spatial,
            "sr_attn2_layers.0.1.output_proj.3.weight": fusion.joint_layers[1].output_proj.fc2.weight,
        }
        gradients = torch.autograd.grad(consistency + diversity, list(names.values()))
        for name, gradient in zip(names, gradients):
            expected = goldens[f"fcl/in_sr_block_grad_of_fcl_plus_fdl/{name}"]
            assert relative_error(gradient.view_as(expected), expected) < 2e-6


class TestFormulas:
    @pytest.mark.parametrize("shape", [(1, 3, 3), (2, 5, 7), (1, 9, 4)])
    def test_consistency_equals_the_gathered_formula(self, shape):
        inputs = random(*shape, 6, dtype=torch.float64), random(*shape, 5, seed=1, dtype=torch.float64)
        actual = value_and_gradients(lambda *maps: feature_consistency_loss(*maps, **KERNEL), *inputs)
        expected = value_and_gradients(lambda *maps: gathered_consistency_loss(*maps, **KERNEL), *inputs)
        torch.testing.assert_close(actual, expected, atol=1e-13, rtol=1e-10)

    def test_second_derivatives(self):
        inputs = [random(1, 3, 4, 2, seed=seed, dtype=torch.float64).requires_grad_() for seed in range(2)]
        assert torch.autograd.gradgradcheck(lambda *maps: feature_consistency_loss(*maps, **KERNEL), inputs)

    def test_a_common_offset_of_the_guidance_does_not_drown_the_differences(self):
        guidance, features = random(1, 6, 6, 16), random(1, 6, 6, 8, seed=1)
        expected = value_and_gradients(
            lambda *maps: feature_consistency_loss(*maps, **KERNEL), *((guidance + 512).double(), features.double())
        )
        actual = value_and_gradients(lambda *maps: feature_consistency_loss(*maps, **KERNEL), guidance + 512, features)
        for ours, exact in zip(actual, expected):
            assert relative_error(ours, exact) < 5e-6

    @pytest.mark.parametrize("num_tokens", [2, 9])
    def test_diversity_equals_the_mean_over_pairs(self, num_tokens):
        features = random(3, num_tokens, 4, dtype=torch.float64)
        cosines = normalize(features, dim=-1) @ normalize(features, dim=-1).mT
        pairs = cosines[:, ~torch.eye(num_tokens, dtype=torch.bool)]
        torch.testing.assert_close(feature_diversity_loss(features, 3.0, reduction="none"), 3 * pairs.mean(1))
        torch.testing.assert_close(feature_diversity(features), 1 - pairs.mean())

    @pytest.mark.parametrize("num_tokens", [4, 9, 40], ids=lambda tokens: f"{tokens} tokens")
    def test_cka_equals_the_centred_grams(self, num_tokens):
        left = random(2, num_tokens, 8, dtype=torch.float64)
        right = random(2, num_tokens, 5, seed=1, dtype=torch.float64)
        torch.testing.assert_close(linear_cka(left, right), gathered_cka(left, right))
        longer = torch.cat([left, left], dim=1)
        torch.testing.assert_close(linear_cka(longer, right), gathered_cka(left, right))
        rotation = torch.linalg.qr(random(8, 8, dtype=torch.float64)).Q
        torch.testing.assert_close(linear_cka(left, 3 * left @ rotation), torch.ones((), dtype=torch.float64))

    def test_maps_and_tokens_are_the_same(self):
        maps, others = random(2, 3, 4, 5), random(2, 3, 4, 6, seed=1)
        assert torch.equal(feature_diversity_loss(maps), feature_diversity_loss(maps.flatten(1, 2)))
        assert torch.equal(linear_cka(maps, others), linear_cka(maps.flatten(1, 2), others.flatten(1, 2)))

    def test_one_loss_per_picture(self):
        guidance, features = random(3, 4, 5, 6), random(3, 4, 5, 7, seed=1)
        consistency = feature_consistency_loss(guidance, features, **KERNEL, reduction="none")
        assert consistency.shape == (3,)
        alone = [feature_consistency_loss(guidance[i : i + 1], features[i : i + 1], **KERNEL) for i in range(3)]
        torch.testing.assert_close(consistency, torch.stack(alone))
        torch.testing.assert_close(consistency.mean(), feature_consistency_loss(guidance, features, **KERNEL))
        assert feature_consistency_loss(guidance[:0], features[:0], **KERNEL, reduction="none").shape == (0,)
        assert feature_diversity_loss(features[:0], reduction="none").shape == (0,)


LOSSES = {
    "consistency": lambda maps: feature_consistency_loss(maps[..., :5], maps, **KERNEL),
    "diversity loss": feature_diversity_loss,
    "diversity": feature_diversity,
    "cka": lambda maps: linear_cka(maps[..., :5], maps),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
class TestNumerics:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_inputs_are_computed_in_float32(self, loss, dtype):
        maps = random(2, 5, 6, 9).to(dtype)
        value, grad = value_and_gradients(loss, maps)
        expected_value, expected_grad = value_and_gradients(loss, maps.float())
        assert value.dtype == torch.float32 and torch.equal(value, expected_value)
        assert grad.dtype == dtype and relative_error(grad, expected_grad) < torch.finfo(dtype).eps

    def test_autocast_changes_nothing(self, loss):
        maps = random(2, 5, 6, 9)
        expected = value_and_gradients(loss, maps)
        actual = value_and_gradients(torch.autocast("cpu", torch.bfloat16)(loss), maps)
        assert all(torch.equal(ours, exact) for ours, exact in zip(actual, expected))

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing_changes_nothing(self, loss, use_reentrant):
        maps = random(2, 5, 6, 9)
        expected = value_and_gradients(loss, maps)
        actual = value_and_gradients(lambda x: checkpoint(loss, x, use_reentrant=use_reentrant), maps)
        assert all(torch.equal(ours, exact) for ours, exact in zip(actual, expected))

    @pytest.mark.parametrize("case", ["zero", "one zero position", "one value", "tiny"])
    def test_features_without_length_or_difference_give_finite_gradients(self, loss, case):
        maps = {
            "zero": torch.zeros(2, 4, 5, 6),
            "one zero position": random(2, 4, 5, 6).index_fill(1, torch.tensor([1]), 0),
            "one value": torch.full((2, 4, 5, 6), 3.0),
            "tiny": random(2, 4, 5, 6) * 1e-30,
        }[case]
        value, grad = value_and_gradients(loss, maps)
        assert value.isfinite() and grad.isfinite().all()
        if case == "one zero position":
            assert grad[:, 1].abs().max() <= grad[:, 2:].abs().max()


def test_rounding_makes_no_distance_negative():
    """Two looks, each at many positions: with so small a β one negative distance would have an infinite weight."""
    looks = random(2, 64)[random(1, 9, 9).gt(0).long()]
    features = random(1, 9, 9, 8, seed=1)
    assert feature_consistency_loss(looks, features, **{**KERNEL, "beta": 1e-9}).abs() < 10


@pytest.mark.parametrize("wide", ["guidance", "features"])
def test_the_wider_of_two_dtypes_is_computed_in(wide):
    maps = {"guidance": random(2, 5, 6, 9), "features": random(2, 5, 6, 7, seed=1)}
    exact = feature_consistency_loss(*(each.double() for each in maps.values()), **KERNEL)
    maps[wide] = maps[wide].double()
    loss = feature_consistency_loss(**maps, **KERNEL)
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)


class TestMemory:
    """Neither neighbourhoods (B, H, W, K, C) nor pairs of tokens are written out, forward or backward."""

    @staticmethod
    def largest_tensor(loss, *inputs):
        inputs = [tensor.requires_grad_() for tensor in inputs]
        with LargestTensor() as largest:
            loss(*inputs).backward()
        return largest.numel

    def test_consistency(self):
        maps = random(2, 16, 16, 96), random(2, 16, 16, 128, seed=1)
        kernel = {**KERNEL, "radius": 3}
        largest = self.largest_tensor(lambda *maps: feature_consistency_loss(*maps, **kernel), *maps)
        assert largest <= maps[1].numel()  # K times that, if gathered

    def test_diversity(self):
        features = random(2, 400, 8)
        assert self.largest_tensor(feature_diversity_loss, features) <= features.numel()

    @pytest.mark.parametrize("num_tokens, channels", [(400, 8), (8, 400)])
    def test_cka(self, num_tokens, channels):
        features, others = random(2, num_tokens, channels), random(2, num_tokens, channels, seed=1)
        assert self.largest_tensor(linear_cka, features, others) <= features.numel()


class TestRefusals:
    @pytest.mark.parametrize(
        "guidance, features, changes, message",
        [
            ((2, 4, 4, 3), (2, 4, 5, 3), {}, r"\(2, 4, 4, 3\) and \(2, 4, 5, 3\)"),
            ((2, 4, 4, 3), (1, 4, 4, 3), {}, "same batch and grid"),
            ((2, 16, 3), (2, 16, 3), {}, r"`guidance` must have shape .* \(2, 16, 3\)"),
            ((2, 1, 1, 3), (2, 1, 1, 3), {"radius": 1}, "grid of 1 x 1 positions is too small for radius 1"),
            ((2, 4, 4, 3), (2, 4, 4, 3), {"radius": 0}, "`radius` must be .* got 0"),
            ((0, 4, 4, 3), (0, 4, 4, 3), {}, "batch of 0"),
            ((2, 4, 4, 3), (2, 4, 4, 3), {"alpha": 0.0}, "`alpha` must be positive, got 0.0"),
            ((2, 4, 4, 3), (2, 4, 4, 3), {"beta": -1.0}, "`beta` must be positive, got -1.0"),
            ((2, 4, 4, 3), (2, 4, 4, 3), {"gamma": float("nan")}, "`gamma` must be positive, got nan"),
            ((2, 4, 4, 3), (2, 4, 4, 3), {"reduction": "sum"}, "got 'sum'"),
        ],
    )
    def test_consistency(self, guidance, features, changes, message):
        with pytest.raises(ValueError, match=message):
            feature_consistency_loss(torch.ones(guidance), torch.ones(features), **{**KERNEL, **changes})

    @pytest.mark.parametrize("function", [feature_diversity_loss, feature_diversity, lambda x: linear_cka(x, x)])
    @pytest.mark.parametrize(
        "features, message",
        [
            (torch.ones(2, 1, 3), "at least 2 tokens to compare, got 1"),
            (torch.ones(2, 1, 1, 3), "at least 2 tokens to compare, got 1"),
            (torch.ones(0, 4, 3), "batch of 0"),
            (torch.ones(4, 3), r"got \(4, 3\)"),
            (torch.ones(2, 4, 3, dtype=torch.long), "got torch.int64"),
        ],
    )
    def test_tokens(self, function, features, message):
        with pytest.raises(ValueError, match=message):
            function(features)

    def test_cka_of_two_batches(self):
        with pytest.raises(ValueError, match="same batch size, got 2 and 3"):
            linear_cka(torch.ones(2, 4, 3), torch.ones(3, 4, 3))
