# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Prismatic VLMs of random weights in the published layout, and the Aureas they become.

The original is written down here once more: vision transformers with the module names of timm, the projector, and a
language model of transformers that is fed with embeddings.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Tokenizer, LlamaConfig, LlamaTokenizer, PhiConfig

from transformers_aurea import AureaForConditionalGeneration, AureaProcessor, convert_prismatic
from transformers_aurea.convert_prismatic import build_model, main, prismatic_config


DINOV2, SIGLIP = "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"
SIZES = {
    DINOV2: {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
    SIGLIP: {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 40},
}
TEXT = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 97,
}
MEANS, STDS = [[0.484375, 0.455078125, 0.40625], [0.5] * 3], [[0.228515625, 0.2236328125, 0.224609375], [0.5] * 3]


@pytest.fixture(autouse=True, scope="module")
def small_towers():
    """The published encoders, but that they are small."""
    with pytest.MonkeyPatch.context() as patch:
        for name, sizes in SIZES.items():
            place, settings = convert_prismatic.TIMM_MODELS[name]
            patch.setitem(convert_prismatic.TIMM_MODELS, name, (place, settings | sizes))
        yield


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.empty(dim))

    def forward(self, x):
        return x * self.scale_factor


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, N, C)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, inner), nn.Linear(inner, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, inner, is_dino):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=1e-6), Mlp(dim, inner)
        self.ls1, self.ls2 = (LayerScale(dim) if is_dino else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Featurizer(nn.Module):
    """(B, 3, H, W) → (B, N, C) of the second-to-last block's patches, before the final norm."""

    def __init__(self, name, image_size):
        super().__init__()
        sizes, is_dino = SIZES[name], name == DINOV2
        dim, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, dim, 14, 14)
        self.pos_embed = nn.Parameter(torch.empty(1, (image_size // 14) ** 2, dim))
        if is_dino:
            self.cls_token, self.reg_token = (nn.Parameter(torch.empty(1, number, dim)) for number in (1, 4))
        inner = sizes.get("intermediate_size", 4 * dim)
        self.blocks = nn.ModuleList(Block(dim, heads, inner, is_dino) for _ in range(sizes["num_hidden_layers"]))
        self.norm = nn.LayerNorm(dim)
        if not is_dino:
            self.attn_pool = Attention(dim, 1)  # nothing reads it

    def forward(self, pixels):
        x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2) + self.pos_embed
        prefix = [self.cls_token, self.reg_token] if hasattr(self, "cls_token") else []
        x = torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        return x[:, 5 if prefix else 0 :]


class Prismatic(nn.Module):
    """`pixels` are of (B, 3 · encoders, H, W), in the order of `models`."""

    def __init__(self, models=(DINOV2, SIGLIP), image_size=56, text=TEXT):
        super().__init__()
        self.language_model = AutoModelForCausalLM.from_config(text_config(text))
        fused, text_size = sum(SIZES[name]["hidden_size"] for name in models), text["hidden_size"]
        self.vision_backbone, self.projector = nn.Module(), nn.Module()
        self.vision_backbone.featurizer = Featurizer(models[0], image_size)
        sizes = [fused, text_size, text_size]
        if len(models) == 2:
            self.vision_backbone.fused_featurizer = Featurizer(models[1], image_size)
            sizes.insert(1, 4 * fused)
        for idx in range(len(models) + 1):
            self.projector.add_module(f"fc{idx + 1}", nn.Linear(sizes[idx], sizes[idx + 1]))

    def embed(self, input_ids, pixels):
        features = zip(self.vision_backbone.children(), pixels.split(3, dim=1))
        x = torch.cat([featurizer(view) for featurizer, view in features], dim=-1)
        first, *others = self.projector.children()
        x = first(x)
        for layer in others:
            x = layer(F.gelu(x))
        words = self.language_model.get_input_embeddings()(input_ids)
        return torch.cat([words[:, :1], x, words[:, 1:]], dim=1)


def text_config(settings):
    return {"llama": LlamaConfig, "phi": PhiConfig}[settings["model_type"]](**settings)


def make_tokenizer() -> LlamaTokenizer:
    """Characters, as Llama's with what OpenVLA adds to it."""
    tokens = ["<unk>", "<s>", "</s>", *map(chr, range(33, 127)), "▁"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=[], add_bos_token=True)
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    return tokenizer


def make_phi_tokenizer() -> GPT2Tokenizer:
    """Characters, as Phi-2's: with a token of the beginning that it never writes."""
    tokens = ["<|endoftext|>", *map(chr, range(33, 127)), "Ġ", "Ċ"]
    return GPT2Tokenizer(vocab={token: index for index, token in enumerate(tokens)}, merges=[])


def make_original(folder: Path, models=(DINOV2, SIGLIP), image_size=56, tokenizer=None, text=TEXT, **settings):
    """With weights so large that each of them shows, and a first norm of so little that its epsilon does."""
    original = Prismatic(models, image_size, text).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in original.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name and name.endswith("weight")
            scale = 0.01 if "patch_embed" in name or name.endswith(("pos_embed", "_token")) else 0.2
            parameter.copy_(spread * scale + is_norm)
    folder.mkdir()
    save_file(original.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    common = {"image_sizes": [image_size] * len(models), "image_resize_strategy": "resize-naive"}
    config = {
        "model_type": "openvla",
        "auto_map": {"AutoConfig": "configuration_prismatic.OpenVLAConfig"},
        "timm_model_ids": list(models),
        "timm_override_act_layers": [None] * len(models),
        "use_fused_vision_backbone": len(models) == 2,
        "text_config": text,
        **common,
    }
    (folder / "config.json").write_text(json.dumps(config | settings))
    place = {DINOV2: 0, SIGLIP: 1}
    images = {
        "image_resize_strategy": common["image_resize_strategy"],
        "tvf_resize_params": [{"size": [image_size] * 2, "interpolation": 3, "antialias": True} for _ in models],
        "tvf_normalize_params": [{"mean": MEANS[place[name]], "std": STDS[place[name]]} for name in models],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return original


def run(folder: Path, *arguments) -> int:
    return main(["--input_dir", str(folder / "original"), "--output_dir", str(folder / "aurea"), *arguments])


def convert(folder: Path, *arguments) -> AureaForConditionalGeneration:
    assert run(folder, *arguments) == 0
    return AureaForConditionalGeneration.from_pretrained(folder / "aurea").eval()


ORIGINALS = {
    "pair": {"tokenizer": make_tokenizer()},
    "pair of 60 pixels": {"image_size": 60},
    "siglip": {"models": (SIGLIP,), "tokenizer": make_tokenizer()},
    "dinov2": {"models": (DINOV2,)},
    "pair and phi": {"text": TEXT | {"model_type": "phi"}, "model_type": "prismatic"},
}


@pytest.fixture(scope="module", params=ORIGINALS)
def converted(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prismatic")
    original = make_original(folder / "original", **ORIGINALS[request.param])
    return original, convert(folder), folder


def example(aurea, image_size=None):
    """Words, and pictures as both take them."""
    size, config = image_size or aurea.config.canvas[0], aurea.config
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(3, 90, (2, 6), generator=generator)
    words[:, 0] = 1
    views = torch.randn(2, len(config.encoder_configs), 3, size, size, generator=generator)
    placeholders = torch.full((2, config.placeholders_per_image), config.image_token_id)
    input_ids = torch.cat([words[:, :1], placeholders, words[:, 1:]], dim=1)
    cut = views[..., : config.canvas[0], : config.canvas[0]]
    return (words, views.flip(1).flatten(1, 2)), {"input_ids": input_ids, "pixel_values": cut}


def image_size_of(folder: Path) -> int:
    return json.loads((folder / "original" / "config.json").read_text())["image_sizes"][0]


def same(left: torch.Tensor, right: torch.Tensor):
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", SIZES)
def test_the_encoders_written_down_here_are_timms(name):
    timm = pytest.importorskip("timm")
    ours, sizes = Featurizer(name, 56), SIZES[name]
    dim, inner = sizes["hidden_size"], sizes.get("intermediate_size", 4 * sizes["hidden_size"])
    settings = {"embed_dim": dim, "depth": sizes["num_hidden_layers"], "num_heads": sizes["num_attention_heads"]}
    theirs = timm.create_model(name, num_classes=0, img_size=56, mlp_ratio=inner / dim, **settings).eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.3)
    weights = {name.replace("gamma", "scale_factor"): tensor for name, tensor in theirs.state_dict().items()}
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("attn_pool.")}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("attn_pool.") for name in missing)
    pixels = torch.randn(2, 3, 56, 56)
    [expected] = theirs.get_intermediate_layers(pixels, n={len(theirs.blocks) - 2})
    same(ours(pixels), expected)


@torch.no_grad()
def test_logits_are_the_originals(converted):
    original, aurea, folder = converted
    theirs, ours = example(aurea, image_size_of(folder))
    expected = original.language_model(inputs_embeds=original.embed(*theirs)).logits
    logits = aurea(**ours).logits
    same(logits, expected)
    ours["pixel_values"] = ours["pixel_values"].flip(0)
    assert (aurea(**ours).logits - expected).abs().max() > 1e-2  # it does see them


@torch.no_grad()
def test_what_is_generated_is_the_originals(converted):
    original, aurea, folder = converted
    theirs, ours = example(aurea, image_size_of(folder))
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 97}
    embeddings = original.embed(*theirs)
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long)
    expected = original.language_model.generate(inputs_embeds=embeddings, attention_mask=mask, **settings)
    generated = aurea.generate(**ours, **settings)
    assert generated[:, ours["input_ids"].shape[1] :].tolist() == expected.tolist()
    assert len({*expected.flatten().tolist()}) > 2


@pytest.mark.parametrize("converted", ["pair"], indirect=True)
def test_precision_and_shards(converted, tmp_path):
    make_original(tmp_path / "original")
    file = tmp_path / "original" / "model.safetensors"
    halves = {name: tensor if "projector" in name else tensor.bfloat16() for name, tensor in load_file(file).items()}
    save_file(halves, file, metadata={"format": "pt"})
    aurea = convert(tmp_path, "--max_shard_size", "100KB")
    assert json.loads((tmp_path / "aurea" / "config.json").read_text())["dtype"] == "bfloat16"
    files = sorted((tmp_path / "aurea").glob("*.safetensors"))
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert len(files) > 1 and found.keys() == aurea.state_dict().keys()
    for name, tensor in found.items():
        assert tensor.dtype == (torch.float32 if "projector" in name else torch.bfloat16), name
    for name, tensor in converted[1].state_dict().items():
        assert torch.equal(found[name], tensor.to(found[name].dtype)), name


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory's high-water mark from /proc")
def test_memory_stays_near_one_shard_and_the_largest_tensor(tmp_path):
    make_original(tmp_path / "original", text=TEXT | {"vocab_size": 300_000})  # 58 MB of embeddings, as many of a head
    code = (
        "import sys; from transformers_aurea import convert_prismatic as c;"
        f"[c.TIMM_MODELS.update({{n: (c.TIMM_MODELS[n][0], c.TIMM_MODELS[n][1] | s)}}) for n, s in {SIZES}.items()];"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]);"
        "before = peak(); assert c.main(sys.argv[1:]) == 0; print('grew', peak() - before)"
    )
    arguments = ["--input_dir", tmp_path / "original", "--output_dir", tmp_path / "aurea", "--max_shard_size", "4MB"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    grown_kb, tensor_kb = int(result.stdout.rpartition("grew ")[2]), 58_000
    assert grown_kb < 1.5 * tensor_kb + 60_000, grown_kb


class TestReadyConfiguration:
    def test_it_is_the_published_one(self):
        """Of OpenVLA 7B, as its papers and timm have the sizes, with two of its 32 layers."""
        config = prismatic_config(LlamaConfig(vocab_size=32064, num_hidden_layers=2))
        assert config.feature_sizes == (1152, 1024) and config.grid_sizes == ((16, 16), (16, 16))
        assert config.placeholders_per_image == 256 and config.image_token_id == 32064
        shapes = {name: tuple(tensor.shape) for name, tensor in build_model(config).state_dict().items()}
        projector = [shapes[f"model.multi_modal_projector.linear_{number}.weight"] for number in (1, 2, 3)]
        assert projector == [(8704, 2176), (4096, 8704), (4096, 4096)]
        published = {
            convert_prismatic.published_name(name, 2)[0]: convert_prismatic.published_shape(
                name, shape, convert_prismatic.published_name(name, 2)[2]
            )
            for name, shape in shapes.items()
            if name != convert_prismatic.MASK_TOKEN
        }
        expected = {
            "vision_backbone.featurizer.pos_embed": (1, 256, 1024),
            "vision_backbone.featurizer.reg_token": (1, 4, 1024),
            "vision_backbone.featurizer.blocks.23.attn.qkv.weight": (3072, 1024),
            "vision_backbone.featurizer.blocks.23.ls2.scale_factor": (1024,),
            "vision_backbone.fused_featurizer.pos_embed": (1, 256, 1152),
            "vision_backbone.fused_featurizer.blocks.26.attn.qkv.bias": (3456,),
            "vision_backbone.fused_featurizer.blocks.26.mlp.fc1.weight": (4304, 1152),
            "projector.fc2.bias": (4096,),
            "language_model.model.layers.1.mlp.down_proj.weight": (4096, 11008),
            "language_model.lm_head.weight": (32064, 4096),
        }
        assert {name: published[name] for name in expected} == expected
        # timm's blocks have 12 tensors, and 2 more of LayerScale; Llama's 9
        assert len(published) == 24 * 14 + 27 * 12 + 2 * 9 + (7 + 5) + 6 + 3

    def test_of_384_pixels_whole_patches_are_seen(self):
        config = prismatic_config(TEXT, image_size=384)
        assert config.grid_sizes == ((27, 27), (27, 27)) and config.canvas == (378, 378)

    def test_the_size_of_an_encoder_is_whole_patches_of_its_own(self):
        clip = {"model_type": "clip_vision_model", "patch_size": 16}
        config = prismatic_config(TEXT, image_size=384, vision_config=clip, spatial_vision_config=None)
        assert config.canvas == (384, 384) and config.projector_num_layers == 2

    def test_settings_are_the_callers(self):
        config = prismatic_config(TEXT, vision_feature_layer=-1, projector_hidden_size=64, image_token_id=9)
        layers = (config.vision_feature_layer, config.spatial_vision_feature_layer)
        assert (*layers, config.projector_hidden_size, config.image_token_id) == (-1, -2, 64, 9)


class TestProcessor:
    @pytest.mark.parametrize("legacy", [True, False])
    def test_tokens_are_the_originals_with_pictures_after_the_first(self, tmp_path, legacy):
        make_original(tmp_path / "original", tokenizer=make_tokenizer())
        file = tmp_path / "original" / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"legacy": legacy}))
        tokenizer = LlamaTokenizer.from_pretrained(tmp_path / "original")
        aurea = convert(tmp_path)
        processor = AureaProcessor.from_pretrained(tmp_path / "aurea")
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 33, 3), dtype=np.uint8))
        words = "In: What action?\nOut:"
        inputs = processor(images=picture, text=words, return_tensors="pt")
        expected = tokenizer(words)["input_ids"]
        assert expected[0] == 1 and 99 == aurea.config.image_token_id < TEXT["vocab_size"]
        assert inputs["input_ids"][0].tolist() == [1, *[99] * 16, *expected[1:]]
        placed = processor(images=picture, text="<|image|>" + words, return_tensors="pt")
        assert placed["input_ids"].tolist() == inputs["input_ids"].tolist()
        assert processor(text=words)["input_ids"] == [expected]
        chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": words}]}]
        told = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
        assert told["input_ids"].tolist() == inputs["input_ids"].tolist()
        generated = aurea.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert generated.shape == (1, inputs["input_ids"].shape[1] + 2)

    def test_the_first_token_is_written_where_the_originals_prompt_begins_with_it(self, tmp_path):
        tokenizer = make_phi_tokenizer()
        make_original(tmp_path / "original", tokenizer=tokenizer, text=TEXT | {"model_type": "phi"})
        convert(tmp_path)
        processor = AureaProcessor.from_pretrained(tmp_path / "aurea")
        inputs = processor(images=Image.new("RGB", (9, 9)), text="Instruct: a\nOutput:", return_tensors="pt")
        expected = tokenizer("<|endoftext|>Instruct: a\nOutput:")["input_ids"]
        assert inputs["input_ids"][0].tolist() == [0, *[97] * 16, *expected[1:]] and expected[0] == 0

    @pytest.mark.parametrize("converted", ["pair", "siglip"], indirect=True)
    def test_pixels_are_the_originals(self, converted):
        _, aurea, folder = converted
        processor = AureaProcessor.from_pretrained(folder / "aurea")
        picture = Image.effect_mandelbrot((61, 47), (-2, -1.5, 1, 1.5), 100).convert("RGB")
        pixels = processor(images=picture, text="a", return_tensors="pt")["pixel_values"][0]
        levels = np.asarray(picture.resize((56, 56), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        assert len(pixels) == len(aurea.config.encoder_configs)
        for view, place in zip(pixels, (1, 0)):  # SigLIP's comes first
            expected = (levels - np.array(MEANS[place])) / np.array(STDS[place])
            level = 1 / 255 / min(STDS[place])
            assert np.abs(view.numpy() - expected.transpose(2, 0, 1)).max() < 1.01 * level
            assert np.abs(view.numpy() - expected.transpose(2, 0, 1)).mean() < 0.1 * level

    @pytest.mark.parametrize(
        ("settings", "reason"),
        [
            ({"image_resize_strategy": "letterbox", "tokenizer": make_tokenizer()}, "square by 'letterbox'"),
            ({"image_size": 60, "tokenizer": make_tokenizer()}, "of 60 pixels"),
            ({}, "no tokenizer"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_another_is_not_written_and_the_reason_told(self, tmp_path, settings, reason, capsys):
        make_original(tmp_path / "original", **settings)
        aurea = convert(tmp_path)
        assert reason in capsys.readouterr().out
        assert not (tmp_path / "aurea" / "processor_config.json").exists()
        has_tokenizer = "tokenizer" in settings
        assert (tmp_path / "aurea" / "tokenizer.json").exists() == has_tokenizer
        assert aurea.config.image_token_id == (99 if has_tokenizer else TEXT["vocab_size"])


def test_what_is_left_out_is_said(tmp_path, capsys):
    make_original(tmp_path / "original", norm_stats={})
    convert(tmp_path)
    output = capsys.readouterr().out
    assert "left out 4 tensors that give no visual tokens: ['vision_backbone.fused_featurizer.attn_pool" in output
    assert "its `norm_stats`, by which tokens become actions, are left out" in output


class TestVerify:
    def test_it_compares_every_tensor(self, tmp_path, capsys):
        make_original(tmp_path / "original", tokenizer=make_tokenizer())
        convert(tmp_path)
        assert run(tmp_path, "--verify") == 0
        assert "tensors equal their source" in capsys.readouterr().out
        file = tmp_path / "aurea" / "model.safetensors"
        weights = load_file(file)
        weights["model.spatial_vision_model.encoder.layer.0.attention.k_proj.bias"][0] += 1
        save_file(weights, file, metadata={"format": "pt"})
        assert run(tmp_path, "--verify") == 1
        assert "layer.0.attention.k_proj.bias" in capsys.readouterr().err

    def test_a_new_process_has_the_last_word(self, tmp_path, capsys):
        """Which here knows only the published sizes."""
        make_original(tmp_path / "original")
        assert run(tmp_path, "--verify") == 1
        assert "has the shape" in capsys.readouterr().err
        assert not (tmp_path / "aurea").exists()


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"model_type": "llava"}, "is a 'llava'. Only a 'prismatic' or an 'openvla'"),
            ({"quantization_config": {}}, "is quantized"),
            (
                {"timm_model_ids": ["vit_large_patch14_clip_336.openai"]},
                "['vit_large_patch14_clip_336.openai']. Known",
            ),
            ({"timm_model_ids": [SIGLIP, DINOV2]}, "one of them, or the first and another"),
            ({"timm_model_ids": []}, "are []"),
            ({"timm_override_act_layers": [None, "quick_gelu"]}, "[None, 'quick_gelu']"),
            ({"image_sizes": [56, 70]}, "are [56, 70], not one side"),
            ({"text_config": {"hidden_size": 4}}, "has no `text_config` with a `model_type`"),
            ({"text_config": {"model_type": "nothing"}}, "cannot be read"),
            ({"text_config": {"model_type": "t5"}}, "No Aurea can be made"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_by_name_with_the_reason(self, tmp_path, settings, message, capsys):
        make_original(tmp_path / "original", **settings)
        assert run(tmp_path) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "aurea").exists()

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"projector.fc3.bias": None}, "projector.fc3.bias is missing"),
            ({"vision_backbone.featurizer.blocks.2.ls1.scale_factor": None}, "blocks.2.ls1.scale_factor is missing"),
            ({"action_head.weight": torch.ones(2)}, "has 1 tensors that are no part of a Prismatic VLM: ['action_h"),
            ({"projector.fc2.bias": torch.ones(47)}, "the shape (47,), but the configuration promises (48,)"),
            ({"vision_backbone.featurizer.pos_embed": torch.ones(1, 17, 24)}, "promises (1, 16, 24)"),
            ({"vision_backbone.featurizer.blocks.0.attn.qkv.bias": torch.ones(24)}, "promises (72,)"),
            ({"projector.fc2.bias": torch.ones(48, dtype=torch.int8)}, "of type I8, no float"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_tensors_that_are_missing_too_many_or_of_another_shape(self, tmp_path, changes, message, capsys):
        make_original(tmp_path / "original")
        file = tmp_path / "original" / "model.safetensors"
        weights = load_file(file) | changes
        save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, file)
        assert run(tmp_path) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "aurea").exists()

    def test_pickles(self, tmp_path, capsys):
        original = make_original(tmp_path / "original")
        (tmp_path / "original" / "model.safetensors").unlink()
        torch.save(original.state_dict(), tmp_path / "original" / "pytorch_model.bin")
        assert run(tmp_path) == 1
        assert "model.safetensors is missing. Save the model with `save_pretrained`" in capsys.readouterr().err

    def test_a_preprocessor_of_another_size(self, tmp_path, capsys):
        make_original(tmp_path / "original", tokenizer=make_tokenizer())
        file = tmp_path / "original" / "preprocessor_config.json"
        settings = json.loads(file.read_text())
        for changes, message in (
            ({"tvf_resize_params": [{"size": [70, 70], "interpolation": 3}] * 2}, "and not to 56 pixels"),
            ({"tvf_resize_params": [{"size": 56, "interpolation": 3}] * 2}, "does not say how pictures are resized"),
            ({"tvf_normalize_params": []}, "does not say how pictures are resized"),
        ):
            file.write_text(json.dumps(settings | changes))
            assert run(tmp_path) == 1
            assert message in capsys.readouterr().err
