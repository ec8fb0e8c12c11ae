# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from transformers_aurea.fusion_aurea import (
    FUSIONS,
    AureaConcatFusion,
    AureaSpatialRangeAttention,
    AureaSpatialRangeFusion,
)


FIXTURES = Path(__file__).parent / "fixtures"
NAMES = {"s_norm": "semantic_norm", "d_norm": "spatial_norm", "s_proj": "semantic_proj", "proj_out": "output_proj"}
# Published index within a projection → ours; output_proj has no activation, so its last index is 3.
LINEARS = {"0": "fc1", "1": "norm", "3": "fc2", "4": "fc2"}
STACKS = {"sr_attn1_layers": "semantic_layers", "sr_attn2_layers": "joint_layers"}


def rename_in_layer(name):
    if name == "sigma_spatial":
        return name
    projection, index, kind = name.split(".")
    return f"{projection}.{LINEARS[index]}.{kind}"


def rename(name):
    head, _, rest = name.partition(".")
    if head in NAMES:
        return f"{NAMES[head]}.{rest}"
    stage, twin, rest = rest.split(".", 2)
    return f"{STACKS[head]}.{2 * int(stage) + int(twin)}.{rename_in_layer(rest)}"


def in_our_shape(weight):
    """A 1×1 convolution is a linear layer here, a scalar a vector of one."""
    return weight[:, :, 0, 0] if weight.ndim == 4 else torch.atleast_1d(weight)


def to_tokens(maps):
    return maps.permute(0, 2, 3, 1).contiguous()  # (B, C, H, W) → (B, H, W, C)


def to_grid(tokens, side=8):
    return tokens.unflatten(1, (side, side))  # (B, H·W, C) → (B, H, W, C)


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def published_state():
    prefix = "aurea_phi.lm.sr_block."
    state = load_file(FIXTURES / "published" / "aureamodel.safetensors")
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {rename(key): in_our_shape(value) for key, value in state.items()}


@pytest.fixture
def fusion(published_state):
    fusion = AureaSpatialRangeFusion(semantic_dim=32, spatial_dim=48, depth=2, radius=3)
    fusion.load_state_dict(published_state)
    return fusion


def record_outputs(modules):
    """Fill a dict with the output of each module as it is called."""
    outputs = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
    return outputs


def test_every_step_matches_the_original(goldens, fusion):
    layers = {
        **{f"attn1.{i // 2}.{i % 2}": layer for i, layer in enumerate(fusion.semantic_layers)},
        **{f"attn2.{i // 2}.{i % 2}": layer for i, layer in enumerate(fusion.joint_layers)},
    }
    outputs = record_outputs({**layers, "d_normed_map": fusion.spatial_norm, "s_projected_map": fusion.semantic_proj})
    features = fusion(to_grid(goldens["enc/siglip_features"]), to_grid(goldens["enc/dino_features"]))
    assert features.shape == (2, 64, fusion.output_dim)
    assert relative_error(features, goldens["sr/sr_features"]) < 2e-6
    for name, output in outputs.items():
        key = f"sr/layer_out/{name}" if name in layers else f"sr/{name}"
        expected = to_tokens(goldens[key])
        assert relative_error(output.reshape(-1, *expected.shape[1:])[:1], expected) < 3e-6, name


@pytest.mark.parametrize("case, layer_name", [("attn_d", "semantic_layers.0"), ("attn_sd", "joint_layers.3")])
def test_one_layer_matches_the_original_step_by_step(goldens, fusion, case, layer_name):
    golden = {key.removeprefix(f"{case}/"): value for key, value in goldens.items() if key.startswith(f"{case}/")}
    maps = {key: to_tokens(value) if value.ndim == 4 else value for key, value in golden.items()}
    layer = fusion.get_submodule(layer_name)
    source, guidance = (maps[key].requires_grad_() for key in ("spatial_feats", "semantic_feats"))

    steps = record_outputs(
        {
            "proj": layer.range_proj,
            "combined_before_fixup": layer.spatial_range_weights,
            "aggregated": layer.neighborhood_aggregate,
            "output": layer.output_proj,
        }
    )
    layer.neighborhood_aggregate.register_forward_pre_hook(
        lambda module, args: steps.update(combined_normalised=args[1])
    )
    output = layer(source, guidance)
    assert output is steps["output"]
    for name, value in steps.items():
        assert relative_error(value, maps[name]) < 3e-6, name
        value.retain_grad()
    output.backward(maps["grad_output"])

    for name in ("proj", "combined_before_fixup", "combined_normalised", "aggregated"):
        assert relative_error(steps[name].grad, maps[f"grad_{name}"]) < 1e-5, name
    assert relative_error(source.grad, maps["grad_spatial_feats"]) < 1e-5
    assert relative_error(guidance.grad, maps["grad_semantic_feats"]) < 1e-5
    gradients = {
        rename_in_layer(key.removeprefix("grad_param/")): in_our_shape(value)
        for key, value in golden.items()
        if key.startswith("grad_param/")
    }
    parameters = dict(layer.named_parameters())
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        assert relative_error(parameters[name].grad, gradient) < 1e-5, name


def test_norm_epsilons(goldens, fusion):
    """Inputs of tiny variance, which show a wrong epsilon of either kind of norm."""
    layer = fusion.semantic_layers[0]
    output = layer(to_tokens(goldens["lowvar/attn_values"]), to_tokens(goldens["lowvar/attn_semantic"]))
    assert relative_error(output, to_tokens(goldens["lowvar/attn1_0_0_out"])) < 3e-6
    features = fusion(to_grid(goldens["enc/siglip_features"]) * 2e-3, to_grid(goldens["enc/dino_features"]) * 2e-3)
    assert relative_error(features, goldens["lowvar/sr_features_from_encoder_features_times_2e-3"]) < 3e-6


def test_positions_whose_weights_vanish_stay_finite(fusion):
    """A narrow spatial kernel leaves only the position itself, and a larger neighbour takes all of its softmax."""
    layer = fusion.semantic_layers[0]
    with torch.no_grad():
        layer.sigma_spatial.fill_(1e-3)
        layer.range_proj.fc2.bias.fill_(1e3)
    kernels = record_outputs({"kernel": layer.spatial_range_weights})
    _, spatial = random_maps(6, 6)
    output = layer(spatial, spatial)
    assert (kernels["kernel"].sum(-1) == 0).any()
    assert output.isfinite().all()


def test_bfloat16_is_at_least_as_exact_as_the_original(goldens, fusion):
    expected = goldens["sr/sr_features"]
    original = load_file(FIXTURES / "goldens_bf16.safetensors")["sr/sr_features"]
    fusion.to(torch.bfloat16)
    for layer in [*fusion.semantic_layers, *fusion.joint_layers]:
        layer.sigma_spatial.data = layer.sigma_spatial.data.float()  # as the model keeps it
    features = fusion(to_grid(goldens["enc/siglip_features"]), to_grid(goldens["enc/dino_features"]))
    assert features.dtype == torch.bfloat16
    # The largest of the errors depends on the order in which a processor sums.
    for norm, margin in ((2, 1.0), (float("inf"), 1.25)):
        error, original_error = ((value.float() - expected).norm(norm) for value in (features, original))
        assert error <= margin * original_error


def random_maps(height, width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, height, width, channels, generator=generator).to(dtype) for channels in (32, 48))


@pytest.mark.parametrize("fusion_type", FUSIONS)
@pytest.mark.parametrize("height, width", [(5, 7), (4, 30)])
def test_rectangular_grids(fusion_type, height, width):
    fusion = FUSIONS[fusion_type](32, 48, 1, 3, 1e-5)
    features = fusion(*random_maps(height, width))
    assert features.shape == (2, height * width, fusion.output_dim)
    features.sum().backward()
    assert all(parameter.grad is not None for parameter in fusion.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(fusion, use_reentrant):
    def gradients():
        fusion.zero_grad()
        semantic, spatial = random_maps(5, 6)
        fusion(semantic.requires_grad_(), spatial.requires_grad_()).square().sum().backward()
        return [semantic.grad, spatial.grad, *(parameter.grad.clone() for parameter in fusion.parameters())]

    calls = []
    expected = gradients()
    for layer in [*fusion.semantic_layers, *fusion.joint_layers]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=use_reentrant)
        layer.range_proj.register_forward_hook(lambda *_: calls.append(1))
    for value, reference in zip(gradients(), expected):
        assert relative_error(value, reference) < 1e-5
    assert len(calls) == 2 * 8


def test_autocast_stays_near_full_precision(fusion):
    semantic, spatial = random_maps(6, 6)
    expected = fusion(semantic, spatial)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = fusion(semantic, spatial)
    features.float().square().sum().backward()
    assert relative_error(features, expected) < 0.03
    assert all(parameter.grad.isfinite().all() for parameter in fusion.parameters())


def test_float64(fusion):
    semantic, spatial = random_maps(6, 5, torch.float64)
    expected = fusion(semantic, spatial)
    features = fusion.double()(semantic, spatial)
    assert features.dtype == torch.float64
    assert relative_error(expected, features) < 3e-6


def test_concat_fusion_is_norms_and_one_linear_layer():
    fusion = AureaConcatFusion(32, 48, depth=1, radius=3)
    semantic, spatial = random_maps(2, 3)  # no neighbourhood, so any grid
    joint = torch.cat([fusion.spatial_norm(spatial), fusion.semantic_norm(semantic)], dim=-1)
    expected = (joint @ fusion.output_proj.weight.T).flatten(1, 2)
    torch.testing.assert_close(fusion(semantic, spatial), expected)


@pytest.mark.parametrize(("fusion_type", "used"), [("semantic", 0), ("spatial", 1)])
def test_single_encoder_is_a_norm_and_one_linear_layer(fusion_type, used):
    fusion = FUSIONS[fusion_type](32, 48, 1, 3, 1e-5)
    maps = [features.requires_grad_() for features in random_maps(2, 3)]
    tokens, joint = fusion(*maps, return_map=True)
    norm = getattr(fusion, f"{fusion_type}_norm")
    torch.testing.assert_close(tokens, (norm(maps[used]) @ fusion.output_proj.weight.T).flatten(1, 2))
    assert tokens.shape[-1] == fusion.output_dim == 96 and joint.shape == maps[used].shape
    tokens.sum().backward()
    assert maps[1 - used].grad is None and maps[used].grad is not None


@pytest.mark.parametrize("fusion_type", FUSIONS)
class TestAnyFusion:
    def test_its_dtype_is_that_of_its_weights(self, fusion_type):
        fusion = FUSIONS[fusion_type](32, 48, 1, 3, 1e-5).to(torch.bfloat16)
        assert fusion(*random_maps(5, 4)).dtype == torch.bfloat16

    def test_all_its_norms_of_features_have_the_given_epsilon(self, fusion_type):
        norms = [m for m in FUSIONS[fusion_type](32, 48, 1, 3, 1e-2).children() if isinstance(m, torch.nn.LayerNorm)]
        assert norms and all(norm.eps == 1e-2 for norm in norms)

    def test_the_map_is_what_its_last_linear_layer_reads(self, fusion_type):
        fusion = FUSIONS[fusion_type](32, 48, 1, 3, 1e-5)
        tokens, fused_map = fusion(*random_maps(5, 4), return_map=True)
        assert fused_map.shape[:3] == (2, 5, 4)
        assert torch.equal(fusion.output_proj(fused_map.flatten(1, 2)), tokens)


def test_forward_leaves_no_trace(fusion):
    before = {name: value.clone() for name, value in fusion.state_dict().items()}
    semantic, spatial = random_maps(5, 4)
    inputs = (semantic.clone(), spatial.clone())
    with torch.no_grad():
        first, second = fusion(semantic, spatial), fusion(semantic, spatial)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close((semantic, spatial), inputs, rtol=0, atol=0)
    torch.testing.assert_close(fusion.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("fusion_type", FUSIONS)
@pytest.mark.parametrize(
    "shapes",
    [((2, 4, 5, 32), (2, 5, 4, 48)), ((2, 4, 5, 32), (2, 4, 6, 48)), ((2, 20, 32), (2, 20, 48))],
    ids=str,
)
def test_maps_of_different_grids_are_refused(fusion_type, shapes):
    fusion = FUSIONS[fusion_type](32, 48, 1, 3, 1e-5)
    with pytest.raises(ValueError, match="one grid"):
        fusion(*(torch.zeros(shape) for shape in shapes))


def test_a_grid_as_small_as_the_radius_is_refused():
    with pytest.raises(ValueError, match=r"3 x 8.*radius 3"):
        AureaSpatialRangeAttention(4, 3)(torch.zeros(1, 3, 8, 4), torch.zeros(1, 3, 8, 4))
