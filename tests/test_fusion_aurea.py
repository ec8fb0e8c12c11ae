# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import fusion_config, tiny_config, tiny_model
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from transformers_aurea import AureaForConditionalGeneration
from transformers_aurea.fusion_aurea import FUSIONS, AureaFusion, AureaSpatialRangeAttention, register_fusion


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
    fusion = make_fusion("spatial_range", depth=2, radius=3)
    fusion.load_state_dict(published_state)
    return fusion


def make_fusion(fusion_type, grid=(8, 8), **settings):
    """Of features of 32 and 48 channels, on grids of one size unless `spatial_grid` says otherwise."""
    config = fusion_config(32, 48, grid, fusion_type=fusion_type, **settings)
    torch.manual_seed(0)
    return config.fusion_class(config)


def needed(fusion_type, semantic, spatial):
    """The features that a fusion needs; None in the place of others."""
    return (semantic, None) if fusion_type == "none" else (semantic, spatial)


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
@pytest.mark.parametrize("height, width", [(6, 8), (4, 30)])
def test_rectangular_grids(fusion_type, height, width):
    settings = {"output_dim": 20} if fusion_type == "none" else {"radius": 3}
    fusion = make_fusion(fusion_type, (height, width), **settings)
    features = fusion(*needed(fusion_type, *random_maps(height, width)))
    assert features.shape == (2, fusion.num_tokens, fusion.output_dim)
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


# ---- what each makes, computed otherwise ----


def normed(features):
    return F.layer_norm(features, features.shape[-1:])


def heads_of(states, num_heads):
    return [part.double() for part in states.chunk(num_heads, dim=-1)]


def attend(layer, tokens, source, num_heads):
    """One picture's tokens (N, D) and source (M, C), head by head."""
    weights = {name: getattr(layer, f"{name}_proj").weight for name in "qkvo"}
    queries, keys = (heads_of(x @ weights[name].T, num_heads) for name, x in (("q", tokens), ("k", source)))
    values = heads_of(source @ weights["v"].T, num_heads)
    results = [
        (query @ key.T / math.sqrt(key.shape[1])).softmax(dim=-1) @ value
        for query, key, value in zip(queries, keys, values)
    ]
    return torch.cat(results, dim=-1).float() @ weights["o"].T


def test_concat_is_norms_and_one_linear_layer():
    fusion = make_fusion("concat", (2, 3))
    semantic, spatial = random_maps(2, 3)
    expected = (torch.cat([normed(spatial), normed(semantic)], dim=-1) @ fusion.output_proj.weight.T).flatten(1, 2)
    torch.testing.assert_close(fusion(semantic, spatial), expected)


def test_concat_without_norms_and_linear_layer_is_the_maps_side_by_side():
    fusion = make_fusion("concat", (2, 3), norm_features=False, project_output=False)
    semantic, spatial = random_maps(2, 3)
    assert not list(fusion.parameters()) and fusion.output_dim == 80
    assert torch.equal(fusion(semantic, spatial), torch.cat([spatial, semantic], dim=-1).flatten(1, 2))
    projected = make_fusion("concat", (2, 3), norm_features=False, output_dim=7)
    expected = fusion(semantic, spatial) @ projected.output_proj.weight.T
    torch.testing.assert_close(projected(semantic, spatial), expected)


@pytest.mark.parametrize("norm_features", [True, False])
@pytest.mark.parametrize("encoder", ["vision", "spatial_vision"])
def test_residual_adds_the_other_map_behind_a_gate(encoder, norm_features):
    fusion = make_fusion("residual", (2, 3), encoder=encoder, output_dim=20, norm_features=norm_features)
    first, second = random_maps(2, 3) if encoder == "vision" else reversed([*random_maps(2, 3)])
    maps = (first, second) if encoder == "vision" else (second, first)
    leading = ((normed(first) if norm_features else first) @ fusion.proj.weight.T).flatten(1, 2)
    torch.testing.assert_close(fusion(*maps), leading)  # the gate is closed
    torch.nn.init.normal_(fusion.gate)
    added = (normed(second) @ fusion.added_proj.weight.T).flatten(1, 2)
    torch.testing.assert_close(fusion(*maps), leading + torch.tanh(fusion.gate) * added)


@pytest.mark.parametrize("spatial_grid", [(2, 3), (4, 3)])
def test_interleave_takes_tokens_in_turn(spatial_grid):
    fusion = make_fusion("interleave", (2, 3), spatial_grid=spatial_grid, output_dim=10)
    (semantic, _), (_, spatial) = random_maps(2, 3), random_maps(*spatial_grid)
    first = normed(semantic).flatten(1, 2) @ fusion.semantic_proj.weight.T
    second = normed(spatial).flatten(1, 2) @ fusion.spatial_proj.weight.T
    turns = "sd" * 6 if spatial_grid == (2, 3) else "dsd" * 6
    rows = {"s": iter(first.unbind(1)), "d": iter(second.unbind(1))}
    torch.testing.assert_close(fusion(semantic, spatial), torch.stack([next(rows[turn]) for turn in turns], dim=1))


@pytest.mark.parametrize("norm_features", [True, False])
def test_cross_attention_asks_with_the_semantic_map(norm_features):
    settings = {"output_dim": 12, "num_attention_heads": 3, "depth": 2, "norm_features": norm_features}
    fusion = make_fusion("cross_attention", (2, 3), spatial_grid=(3, 5), **settings)
    (semantic, _), (_, spatial) = random_maps(2, 3), random_maps(3, 5)
    for picture in range(2):
        asking = normed(semantic[picture]) if norm_features else semantic[picture]
        tokens = asking.flatten(0, 1) @ fusion.semantic_proj.weight.T
        source = normed(spatial[picture]).flatten(0, 1)
        for layer in fusion.layers:
            tokens = tokens + attend(layer, normed(tokens), source, num_heads=3)
        torch.testing.assert_close(fusion(semantic, spatial)[picture], tokens)


def test_sva_looks_at_windows():
    settings = {"query_grid": [2, 1], "output_dim": 12, "num_attention_heads": 2, "depth": 2}
    fusion = make_fusion("sva", (4, 3), spatial_grid=(6, 5), **settings)
    (semantic, _), (_, spatial) = random_maps(4, 3), random_maps(6, 5)
    tokens = fusion(semantic, spatial)
    assert tokens.shape == (2, 2, 12)
    for picture in range(2):
        for row in range(2):
            windows = semantic[picture, 2 * row : 2 * row + 2], spatial[picture, 3 * row : 3 * row + 3]
            sources = [
                normed(window.flatten(0, 1)) @ proj.weight.T for window, proj in zip(windows, fusion.source_projs)
            ]
            token = fusion.queries[row][None]
            for layer in fusion.layers:
                token = token + attend(layer, normed(token), torch.cat(sources), num_heads=2)
            torch.testing.assert_close(tokens[picture, row], token[0])


@pytest.mark.parametrize(("encoder", "used"), [("vision", 0), ("spatial_vision", 1)])
class TestNone:
    def test_it_is_its_encoders_features(self, encoder, used):
        fusion = make_fusion("none", (2, 3), encoder=encoder)
        maps = [features if idx == used else None for idx, features in enumerate(random_maps(2, 3))]
        assert torch.equal(fusion(*maps), maps[used].flatten(1, 2))
        assert not list(fusion.parameters()) and fusion.output_dim == (32, 48)[used]

    def test_with_a_width_it_is_a_norm_and_one_linear_layer(self, encoder, used):
        fusion = make_fusion("none", (2, 3), encoder=encoder, output_dim=20)
        maps = [features if idx == used else None for idx, features in enumerate(random_maps(2, 3))]
        tokens, joint = fusion(*maps, return_map=True)
        torch.testing.assert_close(tokens, (normed(maps[used]) @ fusion.output_proj.weight.T).flatten(1, 2))
        assert joint.shape == maps[used].shape


@pytest.mark.parametrize("fusion_type", FUSIONS)
class TestAnyFusion:
    def test_its_dtype_is_that_of_its_weights(self, fusion_type):
        settings = {"output_dim": 20} if fusion_type == "none" else {}
        fusion = make_fusion(fusion_type, (4, 6), **settings).to(torch.bfloat16)
        assert fusion(*needed(fusion_type, *random_maps(4, 6))).dtype == torch.bfloat16

    def test_all_its_norms_of_features_have_the_given_epsilon(self, fusion_type):
        settings = {"output_dim": 20} if fusion_type == "none" else {}
        fusion = make_fusion(fusion_type, (4, 6), layer_norm_eps=1e-2, **settings)
        norms = {name: module.eps for name, module in fusion.named_modules() if isinstance(module, torch.nn.LayerNorm)}
        own = {name: eps for name, eps in norms.items() if not name.endswith("_proj.norm")}
        assert own and set(own.values()) == {1e-2}

    def test_its_map_is_what_its_last_linear_layer_reads(self, fusion_type):
        if not FUSIONS[fusion_type].gives_map:
            pytest.skip("it has no map")
        settings = {"output_dim": 20} if fusion_type == "none" else {}
        fusion = make_fusion(fusion_type, (4, 6), **settings)
        tokens, fused_map = fusion(*needed(fusion_type, *random_maps(4, 6)), return_map=True)
        assert fused_map.shape[:3] == (2, 4, 6)
        read = fused_map.flatten(1, 2)
        assert torch.equal(read if fusion_type == "residual" else fusion.output_proj(read), tokens)


def test_forward_leaves_no_trace(fusion):
    before = {name: value.clone() for name, value in fusion.state_dict().items()}
    semantic, spatial = random_maps(5, 4)
    inputs = (semantic.clone(), spatial.clone())
    with torch.no_grad():
        first, second = fusion(semantic, spatial), fusion(semantic, spatial)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close((semantic, spatial), inputs, rtol=0, atol=0)
    torch.testing.assert_close(fusion.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("fusion_type", ["spatial_range", "concat", "residual"])
@pytest.mark.parametrize(
    "shapes",
    [((2, 4, 5, 32), (2, 5, 4, 48)), ((2, 4, 5, 32), (2, 4, 6, 48)), ((2, 20, 32), (2, 20, 48))],
    ids=str,
)
def test_maps_of_different_grids_are_refused(fusion_type, shapes):
    fusion = make_fusion(fusion_type)
    with pytest.raises(ValueError, match="one grid"):
        fusion(*(torch.zeros(shape) for shape in shapes))


class TestRegister:
    def test_a_name_that_is_taken_is_refused(self):
        with pytest.raises(ValueError, match=r"'concat' is .*AureaConcatFusion already"):
            register_fusion("concat", FUSIONS["none"])
        assert register_fusion("concat", FUSIONS["concat"]) is FUSIONS["concat"]

    def test_what_is_no_module_is_refused(self):
        with pytest.raises(TypeError, match="got 3"):
            register_fusion("three", 3)
        assert "three" not in FUSIONS

    def test_a_class_that_is_defined_anew_takes_its_former_place(self, monkeypatch):
        monkeypatch.setattr("transformers_aurea.fusion_aurea.FUSIONS", {})
        classes = [type("Mine", (AureaFusion,), {"__module__": "notebook"}) for _ in range(2)]
        register_fusion("mine", classes[0])
        assert register_fusion("mine", classes[1]) is classes[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion_type": "concat", "spatial_grid": (4, 8)}, r"'concat' needs one grid.*\(8, 8\).*\(4, 8\)"),
        ({"fusion_type": "spatial_range", "spatial_grid": (4, 8)}, "needs one grid"),
        ({"fusion_type": "spatial_range", "radius": 8}, r"\(8, 8\) patches.*radius` \(8\)"),
        ({"fusion_type": "spatial_range", "output_dim": 95}, "output_dim` is 95.*96"),
        ({"fusion_type": "sva", "query_grid": 3}, r"query_grid` \(3, 3\) must divide.*\(8, 8\)"),
        ({"fusion_type": "sva", "spatial_grid": (6, 8)}, r"\(4, 4\) must divide.*\(6, 8\)"),
        ({"fusion_type": "sva", "query_grid": [2, 1, 1]}, r"query_grid` is one side, or height and.*\[2, 1, 1\]"),
        ({"fusion_type": "sva", "query_grid": 0}, r"\(0, 0\)"),
        ({"fusion_type": "cross_attention", "num_attention_heads": 7}, r"num_attention_heads` \(7\).*96"),
        ({"fusion_type": "sva", "output_dim": 10, "num_attention_heads": 3}, r"\(3\).*10"),
        ({"fusion_type": "concat", "project_output": False, "output_dim": 9}, "output_dim` is 9.*80"),
        ({"fusion_type": "residual", "spatial_grid": (4, 8)}, "needs one grid"),
        ({"fusion_type": "sum"}, "'sum', but there are 'spatial_range', 'concat'"),
        ({"output_dim": 0}, "output_dim` must be at least 1, got 0"),
        ({"num_attention_heads": -1}, "num_attention_heads` must be at least 1, got -1"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_with_its_values(settings, message):
    with pytest.raises(Exception, match=message):
        fusion_config(32, 48, **settings)


def test_a_grid_as_small_as_the_radius_is_refused():
    with pytest.raises(ValueError, match=r"3 x 8.*radius 3"):
        AureaSpatialRangeAttention(4, 3)(torch.zeros(1, 3, 8, 4), torch.zeros(1, 3, 8, 4))


class TestEncodersOfNone:
    """A configuration that is changed after it was made, or as it is loaded."""

    @pytest.fixture
    def folder(self, tmp_path):
        tiny_model().save_pretrained(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        ("encoder", "left"), [("vision", "vision_config"), ("spatial_vision", "spatial_vision_config")]
    )
    def test_the_one_that_is_asked_for_when_a_folder_is_loaded_is_read_and_the_other_is_gone(
        self, folder, encoder, left
    ):
        fusion = {"fusion_type": "none", "encoder": encoder}
        model = AureaForConditionalGeneration.from_pretrained(
            folder, feature_fusion_config=fusion, ignore_mismatched_sizes=True
        )
        assert [*model.config.encoder_configs] == [left]
        encoders = {
            "vision_config": model.model.vision_model,
            "spatial_vision_config": model.model.spatial_vision_model,
        }
        assert [name for name, module in encoders.items() if module is not None] == [left]
        assert model.get_encoder(modality="image") is encoders[left]

    def test_a_change_afterwards_is_refused(self):
        config = tiny_config()
        config.feature_fusion_config.fusion_type = "none"
        with pytest.raises(
            ValueError, match=r"'none' takes \['vision_config'\], but the configuration has .*Make a new"
        ):
            AureaForConditionalGeneration(config)

    def test_an_encoder_that_a_folder_is_without_is_not_made_up(self, tmp_path):
        tiny_model(feature_fusion_config={"fusion_type": "none"}).save_pretrained(tmp_path)
        with pytest.raises(
            ValueError, match="'concat' needs `spatial_vision_config`, which this configuration is with"
        ):
            AureaForConditionalGeneration.from_pretrained(tmp_path, feature_fusion_config={"fusion_type": "concat"})

    @pytest.mark.parametrize("name", ["semantic", "", None])
    def test_what_is_no_name_is_refused(self, name):
        with pytest.raises(ValueError, match="is no name for a fusion"):
            register_fusion(name, FUSIONS["none"])
