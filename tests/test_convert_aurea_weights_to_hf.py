# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import load_file, save_file
from test_integrations_aurea import CODE_FILES
from transformers import GenerationConfig

from transformers_aurea import AureaConfig, convert_aurea_weights_to_hf
from transformers_aurea.convert_aurea_weights_to_hf import INDEX_FILE, main, published_tensors, target_tensors


SIZES = FIXTURES / "tiny_config.json"


@pytest.fixture
def published(tmp_path):
    """A copy of the tiny published checkpoint, to be damaged."""
    return shutil.copytree(FIXTURES / "published", tmp_path / "published")


def run(published, output, *arguments, sizes=SIZES) -> int:
    config = ["--config", str(sizes)] if sizes is not None else []
    return main(["--input_dir", str(published), "--output_dir", str(output), *config, *arguments])


def test_every_published_tensor_maps_to_exactly_one_place_and_none_is_left_over():
    config = AureaConfig()
    manifest = json.loads((FIXTURES / "manifest_full.json").read_text())["files"]
    shards = {name: shape for file, tensors in manifest.items() if "-of-" in file for name, shape in tensors.items()}
    recorded = {INDEX_FILE: shards, **{file: tensors for file, tensors in manifest.items() if "-of-" not in file}}
    found = {file: {} for file in recorded}
    targets = []
    for tensor in published_tensors(config):
        assert tensor.name not in found[tensor.file]
        found[tensor.file][tensor.name] = list(tensor.shape)
        targets += tensor.targets
    assert found == recorded
    assert len(targets) == len(set(targets))
    parameters = target_tensors(config, torch.bfloat16)
    assert set(targets) == set(parameters)
    assert sum(tensor.numel() for tensor in parameters.values()) == 7_562_713_952


def test_the_folder_is_complete(converted):
    names = {path.name for path in converted.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md"),
        *CODE_FILES,
        *("processor_config.json", "chat_template.jinja"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert converted.stat().st_mode & 0o777 == 0o755  # others can read it
    assert {path.stat().st_mode & 0o777 for path in converted.iterdir()} == {0o644}
    config = json.loads((converted / "config.json").read_text())
    assert config["auto_map"].keys() == {
        *("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
        *("AutoProcessor", "AutoImageProcessor"),
    }
    assert config["architectures"] == ["AureaForConditionalGeneration"]


def test_generation_config_carries_the_published_sampling_and_both_stop_tokens(converted):
    config = GenerationConfig.from_pretrained(converted)
    assert (config.temperature, config.top_k, config.top_p, config.do_sample) == (0.1, 50, 0.9, True)
    assert config.eos_token_id == [302, 300]
    assert config.repetition_penalty in (None, 1.0)
    assert config.suppress_tokens == [305]  # <|image|>


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_verify_confirms_what_was_written(tmp_path, dtype, capsys):
    output = tmp_path / "aurea"
    arguments = ["--dtype", dtype] if dtype else []
    assert run(FIXTURES / "published", output, "--verify", *arguments) == 0
    assert "verified: 341 tensors equal their source" in capsys.readouterr().out
    stored = load_file(output / "model.safetensors")
    half = getattr(torch, dtype) if dtype else torch.float32
    for name, tensor in stored.items():
        in_fp32 = "vision_model." in name or name.endswith("sigma_spatial")
        assert tensor.dtype == (torch.float32 if in_fp32 else half), name


def test_shards_hold_the_same_tensors_as_one_file(tmp_path, converted):
    output = tmp_path / "aurea"
    assert run(FIXTURES / "published", output, "--dtype", "float32", "--max_shard_size", "500KB", "--verify") == 0
    files = sorted(output.glob("model-*.safetensors"))
    assert len(files) > 5
    assert all(file.stat().st_size < 600_000 for file in files)
    whole, parts = load_file(converted / "model.safetensors"), {}
    for file in files:
        parts.update(load_file(file))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    index = json.loads((output / INDEX_FILE).read_text())
    assert set(index["weight_map"]) == set(whole)


def test_verify_alone_finds_one_changed_bit(tmp_path, converted, capsys):
    output = shutil.copytree(converted, tmp_path / "aurea")
    arguments = ["--input_dir", str(FIXTURES / "published"), "--output_dir", str(output), "--verify"]
    assert main(arguments) == 0
    file = output / "model.safetensors"
    changes = {
        "differs from": lambda tensors: (
            tensors["model.fusion.semantic_norm.weight"].view(torch.int32)[3].bitwise_xor_(1)
        ),
        "missing": lambda tensors: tensors.pop("model.fusion.semantic_norm.weight"),
        "no part of the model": lambda tensors: tensors.update(stranger=torch.zeros(1)),
    }
    for message, change in changes.items():
        tensors = load_file(converted / "model.safetensors")
        change(tensors)
        save_file(tensors, file)
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error and ("semantic_norm.weight" in error or "stranger" in error)


def edit_tensors(file, change):
    def damage(folder):
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)

    return damage


def edit_json(file, change):
    def damage(folder):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return damage


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def reshape(name, shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


def cut(file, size):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


FIRST_SHARD = "model-00001-of-00002.safetensors"
FUSION = "aurea_phi.lm.sr_block"
DAMAGES = {
    "missing file": (lambda f: (f / "dinov2.safetensors").unlink(), ["dinov2.safetensors", "missing"]),
    "missing shard": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), ["model-00002", "missing"]),
    "missing vocabulary": (lambda f: (f / "vocab.json").unlink(), ["vocab.json", "missing"]),
    "missing merges": (lambda f: (f / "merges.txt").unlink(), ["merges.txt", "missing"]),
    "missing index": (lambda f: (f / INDEX_FILE).unlink(), [INDEX_FILE]),
    "index is no JSON": (lambda f: (f / INDEX_FILE).write_text("{"), [INDEX_FILE]),
    "index without weight map": (lambda f: (f / INDEX_FILE).write_text("{}"), [INDEX_FILE, "weight_map"]),
    "index lacks a tensor": (
        edit_json(INDEX_FILE, lambda i: i["weight_map"].pop("model.norm.weight")),
        ["model.norm.weight", INDEX_FILE],
    ),
    "index names another shard": (
        edit_json(
            INDEX_FILE, lambda i: i["weight_map"].update({"model.norm.weight": "model-00001-of-00002.safetensors"})
        ),
        ["model.norm.weight", "model-00001"],
    ),
    "truncated in the data": (cut("siglip2.safetensors", 100_000), ["siglip2.safetensors", "truncated"]),
    "truncated in the header": (cut("aureamodel.safetensors", 40), ["aureamodel.safetensors", "truncated"]),
    "empty file": (cut("dinov2.safetensors", 0), ["dinov2.safetensors", "truncated"]),
    "missing encoder tensor": (
        edit_tensors("dinov2.safetensors", lambda t: t.pop("model.blocks.1.attn.qkv.weight")),
        ["model.blocks.1.attn.qkv.weight", "dinov2.safetensors"],
    ),
    "missing fusion tensor": (
        edit_tensors("aureamodel.safetensors", lambda t: t.pop(f"{FUSION}.sr_attn1_layers.0.1.sigma_spatial")),
        ["sr_attn1_layers.0.1.sigma_spatial"],
    ),
    "missing block tensor": (
        edit_tensors("aureamodel.safetensors", lambda t: t.pop("aurea_phi.lm.model.layers.8.ffw.net.3.weight")),
        ["layers.8.ffw.net.3.weight"],
    ),
    "misnamed tensor": (
        edit_tensors("siglip2.safetensors", rename("vision_model.post_layernorm.bias", "vision_model.post_norm.bias")),
        ["vision_model.post_layernorm.bias"],
    ),
    "unknown tensor in an encoder": (
        edit_tensors("siglip2.safetensors", reshape("vision_model.head.probe", (1, 1, 32))),
        ["vision_model.head.probe", "no part"],
    ),
    "misshapen matrix": (
        edit_tensors("aureamodel.safetensors", reshape("aurea_phi.lm.v_proj.projection.2.weight", (64, 383))),
        ["projection.2.weight", "(64, 383)", "(64, 384)"],
    ),
    "misshapen scalar": (
        edit_tensors("aureamodel.safetensors", reshape(f"{FUSION}.sr_attn2_layers.0.0.sigma_spatial", (1,))),
        ["sigma_spatial", "(1,)", "()"],
    ),
    "transposed text matrix": (
        edit_tensors("model-00001-of-00002.safetensors", reshape("model.layers.0.mlp.down_proj.weight", (128, 64))),
        ["model.layers.0.mlp.down_proj.weight", "(128, 64)"],
    ),
    "integers": (
        edit_tensors(
            "dinov2.safetensors", lambda t: t.update({"model.norm.bias": torch.zeros(48, dtype=torch.int32)})
        ),
        ["model.norm.bias", "I32"],
    ),
    "untied head": (
        edit_tensors("model-00002-of-00002.safetensors", reshape("lm_head.weight", (320, 64))),
        ["lm_head.weight", "embed_tokens"],
    ),
    "index is a list": (lambda f: (f / INDEX_FILE).write_text("[]"), [INDEX_FILE]),
    "weight map is a list": (lambda f: (f / INDEX_FILE).write_text('{"weight_map": [1]}'), [INDEX_FILE]),
    "index names a tensor that is nowhere": (
        edit_json(INDEX_FILE, lambda i: i["weight_map"].update({"model.ghost": FIRST_SHARD})),
        ["model.ghost", FIRST_SHARD],
    ),
    "misnamed tensor beside the right one": (
        edit_tensors("aureamodel.safetensors", reshape("aurea_phi.lm.sr_blok.s_norm.weight", (32,))),
        ["sr_blok.s_norm.weight", "no part"],
    ),
    "generation config lacks a token": (
        edit_json("generation_config.json", lambda g: g.pop("pad_token_id")),
        ["generation_config", "pad_token_id"],
    ),
    "generation config is a list": (
        lambda f: (f / "generation_config.json").write_text("[]"),
        ["generation_config"],
    ),
    "vocabulary is no JSON": (lambda f: (f / "vocab.json").write_text("nonsense"), ["tokenizer"]),
    "generation config is no JSON": (lambda f: (f / "generation_config.json").write_text("["), ["generation_config"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused_by_name_and_nothing_is_left(published, tmp_path, capsys, damage):
    function, words = DAMAGES[damage]
    function(published)
    (tmp_path / "out").mkdir()
    assert run(published, tmp_path / "out" / "aurea") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for word in words:
        assert word in error
    assert list((tmp_path / "out").iterdir()) == []


SIZE_ERRORS = {
    "no JSON": (None, ["no JSON"]),
    "lacks a section": (lambda s: s.pop("dino"), ["lack", "dino"]),
    "lacks a number": (
        lambda s: s["text"].pop("original_max_position_embeddings"),
        ["original_max_position_embeddings"],
    ),
    "contradicts a tensor": (lambda s: s["text"].update(intermediate_size=120), ["gate_up_proj.weight", "(256, 64)"]),
    "contradicts the vocabulary": (lambda s: s["text"].update(vocab_size=330), ["embed_tokens.weight", "(320, 64)"]),
    "contradicts a depth": (lambda s: s["sr"].update(depth=3), ["sr_attn1_layers.2.0", "missing"]),
    "contradicts itself": (lambda s: s["sr"].update(s_dim=33), ["sr.s_dim", "33", "32"]),
    "contradicts the grid": (lambda s: s["sr"].update(patch_size=9), ["9", "8"]),
    "heads do not divide": (lambda s: s["dino"].update(num_attention_heads=5), ["48", "5"]),
    "radius too large": (lambda s: s["sr"].update(radius=8), ["radius", "8"]),
    "of another type": (lambda s: s["text"].update(hidden_size="wide"), ["hidden_size"]),
}


@pytest.mark.parametrize("case", SIZE_ERRORS)
def test_wrong_sizes_are_refused_by_name(tmp_path, capsys, case):
    change, words = SIZE_ERRORS[case]
    sizes = json.loads(SIZES.read_text())
    if change is not None:
        change(sizes)
    file = tmp_path / "sizes.json"
    file.write_text(json.dumps(sizes) if change is not None else "[")
    assert run(FIXTURES / "published", tmp_path / "aurea", sizes=file) == 1
    error = capsys.readouterr().err
    for word in words:
        assert word in error
    assert not (tmp_path / "aurea").exists()


def test_without_sizes_the_published_ones_hold(tmp_path, capsys):
    assert run(FIXTURES / "published", tmp_path / "aurea", sizes=None) == 1
    error = capsys.readouterr().err
    assert "shape" in error or "missing" in error
    assert not (tmp_path / "aurea").exists()


def test_tied_head_in_the_file_is_accepted_and_strangers_beside_aurea_are_named(published, tmp_path, capsys):
    embeddings = load_file(published / "model-00001-of-00002.safetensors")["model.embed_tokens.weight"]
    edit_tensors("model-00002-of-00002.safetensors", lambda t: t.update({"lm_head.weight": embeddings}))(published)
    edit_tensors("aureamodel.safetensors", lambda t: t.update({"aurea_phi.text_emb.weight": embeddings}))(published)
    assert run(published, tmp_path / "aurea", "--verify") == 0
    assert "aurea_phi.text_emb.weight" in capsys.readouterr().out


def test_a_folder_with_content_is_not_touched(tmp_path, capsys):
    (tmp_path / "aurea").mkdir()
    (tmp_path / "aurea" / "mine.txt").write_text("precious")
    assert run(FIXTURES / "published", tmp_path / "aurea") == 1
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "aurea").iterdir()] == ["mine.txt"]


def test_values_beyond_float16_are_refused_by_name(published, tmp_path, capsys):
    edit_tensors("aureamodel.safetensors", lambda t: t[f"{FUSION}.s_proj.weight"].fill_(1e30))(published)
    assert run(published, tmp_path / "aurea", "--dtype", "float16") == 1
    assert "s_proj.weight has values beyond the range of float16" in capsys.readouterr().err
    assert run(published, tmp_path / "aurea", "--dtype", "bfloat16") == 0


def test_verify_alone_refuses_another_dtype(converted, capsys):
    assert run(FIXTURES / "published", converted, "--verify", "--dtype", "bfloat16") == 1
    assert "not in torch.bfloat16" in capsys.readouterr().err


def test_a_size_that_is_none_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(FIXTURES / "published", tmp_path / "aurea", "--max_shard_size", "large")
    assert "'large'" in capsys.readouterr().err


def test_output_may_be_the_current_folder_or_a_link(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    assert run(FIXTURES / "published", ".") == 0
    assert run(FIXTURES / "published", tmp_path / "link") == 0
    assert (tmp_path / "here" / "config.json").is_file() and (tmp_path / "there" / "config.json").is_file()


def test_an_input_that_does_not_exist_is_named(tmp_path, capsys):
    assert run(tmp_path / "nowhere", tmp_path / "aurea") == 1
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("function", ["save_file", "write_companions", "verify_in_new_process"])
def test_a_full_disk_or_an_interrupt_leaves_nothing(tmp_path, monkeypatch, capsys, function, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(convert_aurea_weights_to_hf, function, fail)
    assert run(FIXTURES / "published", tmp_path / "aurea", "--verify") != 0
    message = capsys.readouterr().err
    assert "No space left" in message or "interrupted" in message
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_noticed_before_writing(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(convert_aurea_weights_to_hf.shutil, "disk_usage", lambda _: usage)
    assert run(FIXTURES / "published", tmp_path / "aurea") == 1
    assert "1,000 bytes free" in capsys.readouterr().err


def test_a_terminated_process_leaves_nothing(tmp_path):
    code = (
        "import sys, time; from transformers_aurea import convert_aurea_weights_to_hf as c;"
        "write = c.write_companions;"
        "c.write_companions = lambda *a: (print('written', flush=True), time.sleep(60));"
        "sys.exit(c.main(sys.argv[1:]))"
    )
    arguments = ["--input_dir", str(FIXTURES / "published"), "--config", str(SIZES), "--output_dir"]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, str(tmp_path / "aurea")], stdout=subprocess.PIPE, text=True
    )
    while (line := process.stdout.readline()) and line != "written\n":
        pass
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) != 0
    deadline = time.monotonic() + 10
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the memory's high-water mark from /proc")
def test_memory_stays_near_one_shard_and_the_largest_file(tmp_path):
    """64 MB of embeddings in a file of its own, shards of 4 MB: what is read at a time is freed before the next."""
    sizes = json.loads(SIZES.read_text())
    published = shutil.copytree(FIXTURES / "published", tmp_path / "published")
    sizes["text"]["vocab_size"] = rows = 120_000
    shard = load_file(published / "model-00001-of-00002.safetensors")
    save_file({"model.embed_tokens.weight": torch.zeros(rows, 64)}, published / "embeddings.safetensors")
    del shard["model.embed_tokens.weight"]
    save_file(shard, published / "model-00001-of-00002.safetensors")
    edit_json(INDEX_FILE, lambda i: i["weight_map"].update({"model.embed_tokens.weight": "embeddings.safetensors"}))(
        published
    )
    (tmp_path / "sizes.json").write_text(json.dumps(sizes))
    code = (
        "import sys; from transformers_aurea import convert_aurea_weights_to_hf as c;"
        "peak = lambda: int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]);"
        "before = peak(); assert c.main(sys.argv[1:]) == 0; print('grew', peak() - before)"
    )
    arguments = ["--input_dir", str(published), "--config", str(tmp_path / "sizes.json")]
    arguments += ["--output_dir", str(tmp_path / "aurea"), "--max_shard_size", "4MB", "--dtype", "bfloat16"]
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    grown_kb = int(result.stdout.rpartition("grew ")[2])
    file_kb = (published / "embeddings.safetensors").stat().st_size / 1024
    # The file as it is mapped, its copy in bf16, and what building configuration and processor takes.
    assert grown_kb < 2.5 * file_kb + 60_000
