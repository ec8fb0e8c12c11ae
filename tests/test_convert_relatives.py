# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""PaliGemma, PaliGemma 2 and LLaVA of random weights, made by transformers, and the Aureas they become."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_without_package
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from transformers_aurea import AureaForConditionalGeneration, AureaProcessor
from transformers_aurea.convert_relatives import main


SMALL = {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
TOWER = {"hidden_size": 16, "intermediate_size": 24, **SMALL}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
IMAGE_TOKEN = "<image>"
CHAT_TEMPLATE = """{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}
{{- '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}
{% endfor %}ASSISTANT:"""


def make_tokenizer(writes_bos: bool) -> PreTrainedTokenizerFast:
    """Bytes, and what PaliGemma's processor adds."""
    special = ["<pad>", "<bos>", "<eos>", IMAGE_TOKEN]
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if writes_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B:1", special_tokens=[("<bos>", 1)]
        )
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=[IMAGE_TOKEN], padding_side="left", **names
    )


def randomised(model):
    """With weights so large that pictures and caps show, in all of them, biases too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.1)
            parameter.copy_(spread if parameter.ndim > 1 else parameter + spread)
    return model.eval()


def make_paligemma(folder: Path, text_type: str = "gemma", **text):
    image_processor = SiglipImageProcessor(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor, make_tokenizer(writes_bos=False))
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **TOWER},
        text_config={"model_type": text_type, "vocab_size": len(processor.tokenizer), **TEXT, **text},
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    model = randomised(PaliGemmaForConditionalGeneration(config))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def make_llava(folder: Path, tower: str = "clip_vision_model", text: dict | None = None, **settings):
    strategy = settings.get("vision_feature_select_strategy", "default")
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        make_tokenizer(writes_bos=True),
        patch_size=7,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(tower == "clip_vision_model"),
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaConfig(
        vision_config={"model_type": tower, **TOWER},
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), **TEXT, **(text or {})},
        image_token_index=processor.image_token_id,
        **settings,
    )
    model = randomised(LlavaForConditionalGeneration(config))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


ORIGINALS = {
    "paligemma": (make_paligemma, {}),
    "paligemma2": (
        make_paligemma,
        {"text_type": "gemma2", "final_logit_softcapping": 3.0, "sliding_window": 8, "query_pre_attn_scalar": 8},
    ),
    "llava": (make_llava, {}),
    "llava of two layers and gemma2": (
        make_llava,
        {
            "vision_feature_layer": [-2, 1],
            "vision_feature_select_strategy": "full",
            "text": {"model_type": "gemma2", "final_logit_softcapping": 3.0, "sliding_window": 8},
        },
    ),
    "llava of siglip": (
        make_llava,
        {
            "tower": "siglip_vision_model",
            "vision_feature_layer": -1,
            "multimodal_projector_bias": False,
            "projector_hidden_act": "relu",
            "tie_word_embeddings": True,
        },
    ),
    "llava of a capped head": (make_llava, {"text": {"model_type": "cohere", "logit_scale": 0.05}}),
    "llava of experts": (make_llava, {"text": {"model_type": "mixtral", "num_local_experts": 4}}),
}


@pytest.fixture(scope="module", params=ORIGINALS)
def converted(request, tmp_path_factory):
    """An original and its processor, and the Aurea and its."""
    make, settings = ORIGINALS[request.param]
    folder = tmp_path_factory.mktemp("relative")
    model, processor = make(folder / "original", **settings)
    assert main(["--input_dir", str(folder / "original"), "--output_dir", str(folder / "aurea")]) == 0
    aurea = AureaForConditionalGeneration.from_pretrained(folder / "aurea").eval()
    return model, processor, aurea, AureaProcessor.from_pretrained(folder / "aurea"), folder


def picture(seed: int, size: tuple[int, int] = (40, 33)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def edit_json(file: str, **changes):
    def edit(folder: Path):
        settings = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(settings | changes))

    return edit


def change_weight(folder: Path):
    weights = load_file(folder / "model.safetensors")
    weights["model.multi_modal_projector.linear_1.bias"][0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


PICTURES = [picture(0), picture(1, (28, 61)), picture(2, (31, 28))]
TEXTS = [f"{IMAGE_TOKEN}what is it?", f"{IMAGE_TOKEN}and {IMAGE_TOKEN} here"]


def both(converted, text=TEXTS, images=PICTURES, **kwargs):
    """The inputs that each processor makes."""
    _, processor, _, our_processor, _ = converted
    arguments = {"text": text, "images": images, "return_tensors": "pt", "padding": len(text) > 1, **kwargs}
    return processor(**arguments), our_processor(**arguments)


def same(left: torch.Tensor, right: torch.Tensor, mask: torch.Tensor | None = None):
    left, right = (tensor if mask is None else tensor[mask.bool()] for tensor in (left, right))
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_the_originals(converted, side):
    model, _, aurea, _, _ = converted
    theirs, ours = both(converted, text_kwargs={"padding_side": side})
    for name in ("input_ids", "attention_mask"):
        assert theirs[name].tolist() == ours[name].tolist()
    assert torch.equal(theirs["pixel_values"], ours["pixel_values"][:, 0])
    theirs.pop("labels", None)
    same(aurea(**ours).logits, model(**theirs).logits, theirs["attention_mask"])


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{}, {"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}],
    ids=["cached", "uncached", "static", "beams"],
)
def test_what_is_generated_is_the_originals(converted, settings):
    model, _, aurea, _, _ = converted
    theirs, ours = both(converted)
    theirs.pop("labels", None)
    common = {"max_new_tokens": 6, "do_sample": False, "num_beams": settings.get("num_beams", 1)}
    expected = model.generate(**theirs, **common)  # PaliGemma 2 fails with a static cache
    assert aurea.generate(**ours, **common | settings, disable_compile=True).tolist() == expected.tolist()
    assert len({*expected[:, -6:].flatten().tolist()}) > 1  # it is not one token for ever


@torch.no_grad()
def test_each_step_sees_what_the_originals_sees(converted):
    model, _, aurea, _, _ = converted
    theirs, ours = both(converted)
    theirs.pop("labels", None)
    settings = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    steps = zip(model.generate(**theirs, **settings).logits, aurea.generate(**ours, **settings).logits)
    for expected, logits in steps:
        same(logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("converted", ["paligemma", "llava"], indirect=True)
def test_positions_are_the_originals(converted):
    """Which rotary embeddings do not show: they know distances alone."""
    model, _, aurea, _, _ = converted
    seen = []
    for one, inputs in zip((model, aurea), both(converted)):
        inputs.pop("labels", None)
        positions = []
        hook = one.model.language_model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs, positions=positions: positions.append(kwargs["position_ids"].tolist()),
            with_kwargs=True,
        )
        one(**inputs)
        one.generate(**inputs, max_new_tokens=3, do_sample=False)
        hook.remove()
        seen.append(positions)
    assert seen[0] == seen[1] and len(seen[0]) == 4


def test_loss_and_gradients_are_the_originals(converted):
    model, processor, aurea, _, _ = converted
    if isinstance(processor, PaliGemmaProcessor):
        theirs, ours = both(converted, suffix=["a cat", "two dogs"])
        assert theirs["labels"].tolist() == ours["labels"].tolist()
        assert theirs["token_type_ids"].tolist() == ours["token_type_ids"].tolist()
    else:
        theirs, ours = both(converted)
        labels = theirs["input_ids"].masked_fill(theirs["attention_mask"] == 0, -100)
        theirs["labels"] = ours["labels"] = labels
    without_types = {name: value for name, value in ours.items() if name != "token_type_ids"}
    try:
        expected = model.train()(**theirs).loss
        for inputs in (ours, without_types):  # labels alone tell the prompt too
            same(aurea.train()(**inputs).loss, expected)
        expected.backward()
        aurea(**ours).loss.backward()
        same(*(one.get_input_embeddings().weight.grad for one in (aurea, model)))
        same(*(one.model.multi_modal_projector.get_submodule(name).weight.grad for one, name in zip(
            (aurea, model), ("linear_1", "linear" if isinstance(processor, PaliGemmaProcessor) else "linear_1")
        )))  # fmt: skip
    finally:
        for one in (model, aurea):
            one.zero_grad()
            one.eval()


@torch.no_grad()
@pytest.mark.parametrize("converted", ["paligemma", "paligemma2"], indirect=True)
def test_an_answer_is_told_by_its_token_types(converted):
    model, _, aurea, _, _ = converted
    theirs, ours = both(converted, suffix=["a cat", "two dogs"])
    for inputs in (theirs, ours):
        del inputs["labels"]
    same(aurea(**ours).logits, model(**theirs).logits, theirs["attention_mask"])


WITHOUT_PACKAGE = """
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor
folder, saved = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules.")
expected = torch.load(saved, weights_only=False)
inputs = processor(**expected["arguments"])
with torch.no_grad():
    logits = model(**inputs).logits
torch.testing.assert_close(logits, expected["logits"], rtol=0, atol=1e-5)
pixels = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)(expected["arguments"]["images"][0])
"""


@pytest.mark.parametrize("converted", ["paligemma2", pytest.param("llava", marks=pytest.mark.slow)], indirect=True)
def test_it_loads_without_the_package(converted, tmp_path):
    model, _, _, _, folder = converted
    theirs, _ = both(converted, [TEXTS[0]], [PICTURES[0]])
    theirs.pop("labels", None)
    arguments = {"text": [TEXTS[0]], "images": [PICTURES[0]], "return_tensors": "pt"}
    with torch.no_grad():
        torch.save({"logits": model(**theirs).logits, "arguments": arguments}, tmp_path / "expected.pt")
    run_without_package(WITHOUT_PACKAGE, tmp_path, folder / "aurea", tmp_path / "expected.pt")


@torch.no_grad()
def test_text_alone_is_read_as_by_the_original(converted):
    model, processor, aurea, _, _ = converted
    ids = processor.tokenizer(["what is it", "no"], padding=True, return_tensors="pt")
    types = {"token_type_ids": torch.zeros_like(ids["input_ids"])} if isinstance(processor, PaliGemmaProcessor) else {}
    inputs = {"input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"], **types}
    same(aurea(**inputs).logits, model(**inputs).logits, ids["attention_mask"])


@pytest.mark.parametrize("converted", ["paligemma"], indirect=True)
def test_texts_without_placeholders_get_one_for_each_picture(converted):
    for text, images in (
        (["what", "is"], PICTURES[:2]),
        (["what"], PICTURES[0]),
        (["a", "b"], [PICTURES[:2], PICTURES[2:]]),
    ):
        theirs, ours = both(converted, text, images)
        assert theirs["input_ids"].tolist() == ours["input_ids"].tolist()
        assert torch.equal(theirs["pixel_values"], ours["pixel_values"][:, 0])


@pytest.mark.parametrize("converted", ["paligemma", "llava"], indirect=True)
def test_lists_are_the_originals_too(converted):
    theirs, ours = both(converted, [TEXTS[0]], [PICTURES[0]], return_tensors=None)
    assert [list(row) for row in theirs["input_ids"]] == ours["input_ids"]
    assert np.array_equal(np.array(theirs["pixel_values"]), np.array(ours["pixel_values"])[:, 0])


@pytest.mark.parametrize("converted", ["llava"], indirect=True)
def test_a_conversation_is_the_originals(converted):
    _, processor, _, our_processor, _ = converted
    content = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "what?"}]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    theirs, ours = (
        one.apply_chat_template([{"role": "user", "content": content}], **settings)
        for one in (processor, our_processor)
    )
    assert theirs["input_ids"].tolist() == ours["input_ids"].tolist()
    assert torch.equal(theirs["pixel_values"], ours["pixel_values"][:, 0])


@pytest.mark.parametrize("converted", ["paligemma"], indirect=True)
def test_a_conversation_without_a_template_of_its_own_is_its_content(converted):
    _, _, _, processor, _ = converted
    content = [{"type": "image", "image": PICTURES[0]}, {"type": "text", "text": "what?"}]
    settings = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    chat = processor.apply_chat_template([{"role": "user", "content": content}], **settings)
    _, ours = both(converted, [f"{IMAGE_TOKEN}what?"], [PICTURES[0]])
    assert chat["input_ids"].tolist() == ours["input_ids"].tolist()


def test_generation_settings_are_the_originals(converted):
    model, _, aurea, _, _ = converted
    different = {
        name: (value, model.generation_config.to_dict().get(name))
        for name, value in aurea.generation_config.to_dict().items()
        if value != model.generation_config.to_dict().get(name)
    }
    assert different.keys() <= {"transformers_version", "_from_model_config"}


def convert(folder: Path, *arguments) -> AureaForConditionalGeneration:
    command = ["--input_dir", str(folder / "original"), "--output_dir", str(folder / "aurea"), *arguments]
    assert main(command) == 0
    return AureaForConditionalGeneration.from_pretrained(folder / "aurea").eval()


@torch.no_grad()
def test_a_placeholder_may_be_beyond_the_vocabulary(tmp_path):
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **TOWER},
        text_config={"model_type": "gemma", "vocab_size": 99, **TEXT},
        image_token_index=120,
        projection_dim=32,
    )
    model = randomised(PaliGemmaForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "original")
    aurea = convert(tmp_path)
    assert not (tmp_path / "aurea" / "processor_config.json").exists()  # nor has the original one
    ids = torch.tensor([[120] * 16 + [1, 7, 8, 9]])
    pixels, types = torch.randn(1, 3, 28, 28), torch.zeros_like(ids)
    expected = model(input_ids=ids, pixel_values=pixels, token_type_ids=types).logits
    same(aurea(input_ids=ids, pixel_values=pixels[:, None]).logits, expected)


def test_each_tensor_keeps_its_precision_in_shards_too(tmp_path):
    make_llava(tmp_path / "original")
    file = tmp_path / "original" / "model.safetensors"
    weights = load_file(file)
    halves = {name: tensor.bfloat16() if "language_model" in name else tensor for name, tensor in weights.items()}
    save_file(halves, file, metadata={"format": "pt"})
    convert(tmp_path, "--max_shard_size", "100KB")
    files = sorted((tmp_path / "aurea").glob("*.safetensors"))
    assert len(files) > 1
    found = {name: tensor for path in files for name, tensor in load_file(path).items()}
    for name, tensor in found.items():
        is_half = "language_model" in name or name == "lm_head.weight"
        assert tensor.dtype == (torch.bfloat16 if is_half else torch.float32), name
    assert len(found) == len(weights)


@torch.no_grad()
def test_in_half_precision_the_encoder_is_the_originals_too(tmp_path):
    model, processor = make_llava(tmp_path / "original")
    model.bfloat16().save_pretrained(tmp_path / "original")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "original").eval()
    aurea = convert(tmp_path)
    assert {parameter.dtype for parameter in aurea.parameters()} == {torch.bfloat16}
    inputs = processor(text=TEXTS[:1], images=PICTURES[:1], return_tensors="pt")
    torch.testing.assert_close(aurea(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-3)


@torch.no_grad()
def test_an_answer_that_is_begun_is_no_prompt(tmp_path):
    model, processor = make_paligemma(tmp_path / "original")
    aurea = convert(tmp_path)
    arguments = {"text": TEXTS[:1], "images": PICTURES[:1], "suffix": ["a cat"], "return_tensors": "pt"}
    theirs, ours = processor(**arguments), AureaProcessor.from_pretrained(tmp_path / "aurea")(**arguments)
    for inputs in (theirs, ours):
        del inputs["labels"]
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**theirs, **settings).tolist()
    for how in ({}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}):
        assert aurea.generate(**ours, **settings, **how).tolist() == expected
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    same(aurea.generate(**ours, **settings).logits[0], model.generate(**theirs, **settings).logits[0])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory's high-water mark from /proc")
def test_memory_stays_near_one_shard_and_the_largest_tensor(tmp_path):
    text = {"model_type": "llama", **TEXT, "vocab_size": 500_000}  # 64 MB of embeddings, as many of a head
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **TOWER}, text_config=text, image_token_index=9
    )
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "original")
    code = (
        "import sys; from transformers_aurea import convert_relatives as c;"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]);"
        "before = peak(); assert c.main(sys.argv[1:]) == 0; print('grew', peak() - before)"
    )
    arguments = ["--input_dir", str(tmp_path / "original"), "--output_dir", str(tmp_path / "aurea")]
    arguments += ["--max_shard_size", "4MB"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    grown_kb, tensor_kb = int(result.stdout.rpartition("grew ")[2]), 64_000
    assert grown_kb < 1.5 * tensor_kb + 60_000, grown_kb


def test_names_of_older_checkpoints_are_known(tmp_path):
    make_llava(tmp_path / "original")
    file = tmp_path / "original" / "model.safetensors"
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in load_file(file).items()
    }
    weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17.0)
    save_file(weights, file, metadata={"format": "pt"})
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "original")
    aurea = convert(tmp_path)
    for (name, ours), theirs in zip(
        aurea.model.vision_model.named_parameters(), model.model.vision_tower.parameters()
    ):
        assert torch.equal(ours, theirs), name


class TestVerify:
    @pytest.mark.parametrize("make", [make_paligemma, pytest.param(make_llava, marks=pytest.mark.slow)])
    def test_it_compares_weights_logits_and_processors(self, tmp_path, make, capfd):
        make(tmp_path / "original")
        convert(tmp_path, "--verify")
        told = capfd.readouterr().out
        assert (
            all(f"verified: {what}" in told for what in ("logits", "the processors")) and "equal their source" in told
        )

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            (edit_json("config.json", prefix_mask="causal"), "logits"),
            (edit_json("processor_config.json", prompt_format="{images}{text}"), "processor"),
            (change_weight, "differs"),
        ],
        ids=["mask", "prompt", "weight"],
    )
    def test_what_differs_is_named(self, tmp_path, edit, message, capsys):
        make_paligemma(tmp_path / "original")
        convert(tmp_path)
        edit(tmp_path / "aurea")
        arguments = ["--input_dir", str(tmp_path / "original"), "--output_dir", str(tmp_path / "aurea"), "--verify"]
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"model_type": "llava_next"}, "'llava_next', which cuts a picture into tiles"),
            (
                {"model_type": "llava_onevision"},
                "'llava_onevision', which cuts a picture into tiles, and takes videos",
            ),
            ({"model_type": "llama"}, "'llama'. Only a PaliGemmaForConditionalGeneration or a Llava"),
            ({"vision_config": {"model_type": "pixtral"}}, "'pixtral' inside, which takes pictures of any size"),
            ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantized"),
            ({"vision_config": {"model_type": "swin"}}, "'swin', whose stages differ in resolution"),
            ({"vision_config": {"model_type": "resnet"}}, "transformers makes no model of"),
        ],
        ids=lambda value: str(value)[:60],
    )
    def test_by_name_with_the_reason(self, tmp_path, settings, message, capsys):
        make_llava(tmp_path / "original")
        edit_json("config.json", **settings)(tmp_path / "original")
        assert main(["--input_dir", str(tmp_path / "original"), "--output_dir", str(tmp_path / "aurea")]) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "aurea").exists()

    def test_weights_that_are_missing_or_of_another_shape(self, tmp_path, capsys):
        make_llava(tmp_path / "original")
        file = tmp_path / "original" / "model.safetensors"
        weights = load_file(file)
        norm = weights.pop("language_model.model.norm.weight")
        for changed, message in (({}, "lacks 1"), ({"language_model.model.norm.weight": norm[1:]}, "the shape (31,)")):
            save_file(weights | changed, file, metadata={"format": "pt"})
            assert main(["--input_dir", str(tmp_path / "original"), "--output_dir", str(tmp_path / "aurea")]) == 1
            assert message in capsys.readouterr().err
        assert not (tmp_path / "aurea").exists()

    def test_a_placeholder_of_another_id_in_the_tokenizer(self, tmp_path, capsys):
        make_llava(tmp_path / "original")
        edit_json("config.json", image_token_index=7)(tmp_path / "original")
        assert main(["--input_dir", str(tmp_path / "original"), "--output_dir", str(tmp_path / "aurea")]) == 1
        assert "has the id 3 in the tokenizer, and 7 in the model's configuration" in capsys.readouterr().err
