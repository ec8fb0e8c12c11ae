# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Convert the published Aurea into one folder that transformers loads.

    python -m transformers_aurea.convert_aurea_weights_to_hf --input_dir PUBLISHED --output_dir OUT --verify

PUBLISHED is a folder in the published layout or a hub id. The layout holds no sizes: `--config` gives them, without
it the published sizes hold. Every tensor of PUBLISHED must be there under its name and in the shape the sizes promise,
and every parameter of the model must get its value, or nothing is written. With `--verify` a new process reads the
written folder back and compares it with PUBLISHED bit by bit; given an OUT converted before, it does only that.
"""

import argparse
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_state_dict_into_shards_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, GPT2Tokenizer
from transformers.dynamic_module_utils import custom_object_save

from . import AureaConfig, AureaForConditionalGeneration, AureaImageProcessor, AureaProcessor
from .model_card_aurea import FILE_NAME, model_card
from .tokenization_aurea import build_tokenizer


AUREA_FILE, DINOV2_FILE, SIGLIP2_FILE = "aureamodel.safetensors", "dinov2.safetensors", "siglip2.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OTHER_FILES = (
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)

# The key maps, published name → ours. Where ours are several, the published rows are theirs one after the other. What
# was a 1×1 convolution is a linear layer here, and a scalar a vector of one: the same numbers in another shape.
DINOV2_KEYS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.projection.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.projection.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
DINOV2_LAYER_KEYS = {
    "norm1": "norm1",
    "attn.qkv": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "attn.proj": "attention.o_proj",
    "norm2": "norm2",
    "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.w3": "mlp.down_proj",
}
FUSION_KEYS = {
    "s_norm.weight": "semantic_norm.weight",
    "s_norm.bias": "semantic_norm.bias",
    "d_norm.weight": "spatial_norm.weight",
    "d_norm.bias": "spatial_norm.bias",
    "s_proj.weight": "semantic_proj.weight",
    "proj_out.weight": "output_proj.weight",
}
FUSION_LAYER_KEYS = {
    **{f"{name}.0": f"{name}.fc1" for name in ("range_proj", "fixup_proj", "output_proj")},
    **{f"{name}.1": f"{name}.norm" for name in ("range_proj", "fixup_proj", "output_proj")},
    **{f"{name}.4": f"{name}.fc2" for name in ("range_proj", "fixup_proj")},
    "output_proj.3": "output_proj.fc2",
}
CROSS_ATTENTION_BLOCK_KEYS = {
    "input_layernorm": "input_layernorm",
    "cross_attn.q_proj": "cross_attn.q_proj",
    "cross_attn.k_proj": "cross_attn.k_proj",
    "cross_attn.v_proj": "cross_attn.v_proj",
    "cross_attn.o_proj": "cross_attn.o_proj",
    "cross_attn.q_norm": "cross_attn.q_norm",
    "cross_attn.k_norm": "cross_attn.k_norm",
    "post_attention_layernorm": "post_attention_layernorm",
    "ffw.net.0": ("mlp.up_proj", "mlp.gate_proj"),
    "ffw.net.3": "mlp.down_proj",
}
# What the original's own state dict holds twice.
AUREA_ALIASES = {"aurea_phi.text_emb.weight", "aurea_phi.lm.lm_head.weight"}
PROJECTOR_KEYS = {"projection.0.weight": "linear_1.weight", "projection.2.weight": "linear_2.weight"}


class ConversionError(Exception):
    """Something is wrong with what was given; the message names it."""


@dataclass(frozen=True)
class PublishedTensor:
    """A tensor of the published files, and the parameters of ours its rows become."""

    file: str  # INDEX_FILE stands for the shard that the index names
    name: str
    shape: tuple[int, ...]
    targets: tuple[str, ...]


def published_tensors(config: AureaConfig) -> list[PublishedTensor]:
    """What PUBLISHED must hold for `config`, in the published names and shapes."""
    with torch.device("meta"):
        model = AureaForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    tensors = []
    for file, name, targets, is_convolution in _published_names(config, shapes):
        targets = (targets,) if isinstance(targets, str) else targets
        rows, *rest = shapes[targets[0]]
        shape = () if name.endswith(".sigma_spatial") else (rows * len(targets), *rest)
        tensors.append(PublishedTensor(file, name, (*shape, 1, 1) if is_convolution else shape, targets))
    return tensors


def _published_names(
    config: AureaConfig, shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, str, str | tuple[str, ...], bool]]:
    """(file, published name, our names, was a 1×1 convolution) of every tensor."""

    def module(file: str, source: str, target: str, keys: dict[str, str | tuple[str, ...]]):
        for key, ours in keys.items():
            ours = (ours,) if isinstance(ours, str) else ours
            for kind in ("weight", "bias"):
                targets = tuple(f"{target}.{name}.{kind}" for name in ours)
                if targets[0] in shapes:
                    yield file, f"{source}.{key}.{kind}", targets, False

    for target in shapes:
        if target.startswith("model.language_model.") and "cross_attention_block." not in target:
            yield INDEX_FILE, target.replace("language_model.", "", 1), target, False
        elif target.startswith("model.vision_model."):
            yield SIGLIP2_FILE, target.removeprefix("model."), target, False

    for key, ours in DINOV2_KEYS.items():
        yield DINOV2_FILE, f"model.{key}", f"model.spatial_vision_model.{ours}", False
    for i in range(config.spatial_vision_config.num_hidden_layers):
        source, target = f"model.blocks.{i}", f"model.spatial_vision_model.encoder.layer.{i}"
        yield from module(DINOV2_FILE, source, target, DINOV2_LAYER_KEYS)
        for j in (1, 2):
            yield DINOV2_FILE, f"{source}.ls{j}.gamma", f"{target}.layer_scale{j}.lambda1", False

    for key, ours in FUSION_KEYS.items():
        yield AUREA_FILE, f"aurea_phi.lm.sr_block.{key}", f"model.fusion.{ours}", False
    for stack, ours in (("sr_attn1_layers", "semantic_layers"), ("sr_attn2_layers", "joint_layers")):
        for i in range(2 * config.feature_fusion_config.depth):
            source, target = f"aurea_phi.lm.sr_block.{stack}.{i // 2}.{i % 2}", f"model.fusion.{ours}.{i}"
            for file, name, targets, _ in module(AUREA_FILE, source, target, FUSION_LAYER_KEYS):
                yield file, name, targets, len(shapes[targets[0]]) == 2
            yield AUREA_FILE, f"{source}.sigma_spatial", f"{target}.sigma_spatial", False

    for key, ours in PROJECTOR_KEYS.items():
        yield AUREA_FILE, f"aurea_phi.lm.v_proj.{key}", f"model.multi_modal_projector.{ours}", False
    num_layers = config.text_config.num_hidden_layers
    for idx, position in enumerate(config.cross_attention_positions):
        # The published list counts decoder layers and blocks together.
        source = f"aurea_phi.lm.model.layers.{position + idx}"
        target = f"model.language_model.layers.{position}.cross_attention_block"
        if position == num_layers:
            target = f"model.language_model.layers.{position - 1}.closing_cross_attention_block"
        yield from module(AUREA_FILE, source, target, CROSS_ATTENTION_BLOCK_KEYS)


class PublishedCheckpoint:
    """The published files of one folder, opened and compared with what `config` promises, read tensor by tensor."""

    def __init__(self, folder: Path, config: AureaConfig):
        self.folder = folder
        self.tensors = published_tensors(config)
        self.weight_map = self._read_index()
        self.files = {file: self._open(file) for file in self._file_names()}
        self.of_target = {target: tensor for tensor in self.tensors for target in tensor.targets}
        self._check()

    def _read_index(self) -> dict[str, str]:
        try:
            return dict(read_json(self.folder / INDEX_FILE)["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConversionError(
                f"{self.folder / INDEX_FILE} is no index of safetensors shards: {error!r}"
            ) from error

    def _file_names(self) -> list[str]:
        return [DINOV2_FILE, SIGLIP2_FILE, AUREA_FILE, *sorted(set(self.weight_map.values()))]

    def _open(self, file: str):
        if not (self.folder / file).is_file():
            raise ConversionError(f"{self.folder / file} is missing.")
        return open_safetensors(self.folder / file)

    def _file_of(self, tensor: PublishedTensor) -> str:
        if tensor.file != INDEX_FILE:
            return tensor.file
        if tensor.name not in self.weight_map:
            raise ConversionError(f"The tensor {tensor.name} is missing from {self.folder / INDEX_FILE}.")
        return self.weight_map[tensor.name]

    def _check(self):
        unexplained = {file: set(content.keys()) for file, content in self.files.items()}
        for tensor in self.tensors:
            file = self._file_of(tensor)
            path = self.folder / file
            if tensor.name not in unexplained[file]:
                raise ConversionError(f"The tensor {tensor.name} is missing from {path}.")
            unexplained[file].remove(tensor.name)
            found = self.files[file].get_slice(tensor.name)
            if tuple(found.get_shape()) != tensor.shape:
                raise ConversionError(
                    f"The tensor {tensor.name} of {path} has the shape {tuple(found.get_shape())}, but the sizes "
                    f"given promise {tensor.shape}. Give the checkpoint's own sizes with --config."
                )
            if found.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                raise ConversionError(f"The tensor {tensor.name} of {path} is of type {found.get_dtype()}, no float.")
        self._check_left_over(unexplained)

    def _check_left_over(self, unexplained: dict[str, set[str]]):
        present = {file: set(content.keys()) for file, content in self.files.items()}
        for name, file in self.weight_map.items():
            if name not in present[file]:
                raise ConversionError(f"The tensor {name}, of the index, is missing from {self.folder / file}.")
        for file, names in unexplained.items():
            if "lm_head.weight" in names and file in self.weight_map.values():
                names.remove("lm_head.weight")
                self._check_head(file)
            if file == AUREA_FILE:
                misnamed = {name for name in names if name.startswith("aurea_phi.")} - AUREA_ALIASES
                if misnamed:
                    raise ConversionError(
                        f"The tensor {min(misnamed)} of {self.folder / file} is no part of the model."
                    )
            if names and file == AUREA_FILE:
                print(f"{self.folder / file}: ignored {len(names)} tensors that are no part of Aurea: {sorted(names)}")
            elif names:
                raise ConversionError(f"The tensor {min(names)} of {self.folder / file} is no part of the model.")

    def _check_head(self, file: str):
        embeddings = self.weight_map["model.embed_tokens.weight"]
        head, tied = self.files[file].get_tensor("lm_head.weight"), self.files[embeddings]
        if not same_bits(head, tied.get_tensor("model.embed_tokens.weight")):
            raise ConversionError(
                f"lm_head.weight of {self.folder / file} differs from model.embed_tokens.weight, with which the head "
                "is tied."
            )

    def dtype(self) -> torch.dtype:
        """That of the language model."""
        file = self.files[self.weight_map["model.embed_tokens.weight"]]
        names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        return getattr(torch, names[file.get_slice("model.embed_tokens.weight").get_dtype()])

    def read(self, target: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The value of the parameter `target`, in the published dtype."""
        tensor = self.of_target[target]
        value = self.files[self._file_of(tensor)].get_tensor(tensor.name)
        if len(tensor.targets) > 1:
            value = value.chunk(len(tensor.targets))[tensor.targets.index(target)]
        return value.reshape(shape)


def target_tensors(config: AureaConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every tensor of the folder, on the meta device, in the dtype it is stored in: encoders and Gaussians in fp32."""
    with torch.device("meta"):
        model = AureaForConditionalGeneration(config)
    keep_in_fp32 = ("model.vision_model.", "model.spatial_vision_model.", ".sigma_spatial")
    return {
        name: tensor.to(torch.float32 if any(part in name for part in keep_in_fp32) else dtype)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }


def open_safetensors(path: Path):
    """The file, of which tensors are read one by one.

    Raises:
        ConversionError: it is broken.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{path} is truncated or no safetensors file: {error}") from error


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.contiguous().flatten().view(torch.uint8), right.contiguous().flatten().view(torch.uint8))


def config_from_sizes(sizes: dict, image_token_id: int) -> AureaConfig:
    """The configuration of a checkpoint of other sizes, from the layout of `tiny_config.json`."""
    try:
        text, dino, siglip, fusion = sizes["text"], sizes["dino"], sizes["siglip"], sizes["sr"]
        rope = sizes["rope_scaling"]
        image_size, projector = sizes["px"], sizes["vproj"]
        original_length = text["original_max_position_embeddings"]
        agreements = {
            "sr.s_dim and siglip.hidden_size": (fusion["s_dim"], siglip["hidden_size"]),
            "sr.d_dim and dino.hidden_size": (fusion["d_dim"], dino["hidden_size"]),
            "vproj.input_dim and 2 · sr.d_dim": (projector["input_dim"], 2 * fusion["d_dim"]),
            "vproj.output_dim and text.hidden_size": (projector["output_dim"], text["hidden_size"]),
            "sr.patch_size and px / dino.patch_size": (fusion["patch_size"], image_size // dino["patch_size"]),
            "siglip.num_patches and (px / siglip.patch_size)²": (
                siglip["num_patches"],
                (image_size // siglip["patch_size"]) ** 2,
            ),
        }
        config = AureaConfig(
            text_config={
                "model_type": "phi3",
                "tie_word_embeddings": True,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": text["rope_theta"],
                    "partial_rotary_factor": text["partial_rotary_factor"],
                    "original_max_position_embeddings": original_length,
                    "factor": text["max_position_embeddings"] / original_length,
                    # The published model uses the long factors at every length.
                    "short_factor": rope["long_factor"],
                    "long_factor": rope["long_factor"],
                },
                **{key: value for key, value in text.items() if key not in ("rope_theta", "partial_rotary_factor")},
            },
            vision_config={
                "model_type": "siglip_vision_model",
                "image_size": image_size,
                **{key: value for key, value in siglip.items() if key != "num_patches"},
            },
            spatial_vision_config={"model_type": "dinov2_with_registers", "use_swiglu_ffn": True, **dino},
            feature_fusion_config={"radius": fusion["radius"], "depth": fusion["depth"]},
            vision_image_size=image_size,
            spatial_vision_image_size=image_size,
            cross_attention_norm_eps=text["rms_norm_eps"],
            image_token_id=image_token_id,
        )
    except KeyError as error:
        raise ConversionError(f"The sizes given with --config lack the key {error}.") from error
    for what, (left, right) in agreements.items():
        if left != right:
            raise ConversionError(
                f"The sizes given with --config contradict each other: {what} are {left} and {right}."
            )
    return config


# What the published parts began as: encoders and language model.
PUBLISHED = (
    "google/siglip2-so400m-patch14-224",
    "facebook/dinov2-with-registers-giant",
    "microsoft/Phi-4-mini-instruct",
)


def build_config(folder: Path, sizes: dict | None, image_token_id: int) -> AureaConfig:
    """The configuration of a published folder: of the sizes given, or of the published ones."""
    if sizes is None:
        config = AureaConfig(image_token_id=image_token_id)
        for part, name in zip((config.vision_config, config.spatial_vision_config, config.text_config), PUBLISHED):
            part.name_or_path = name
    else:
        try:
            config = config_from_sizes(sizes, image_token_id)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, StrictDataclassError) as error:
            raise ConversionError(f"The sizes given with --config make no model: {error}") from error
    if image_token_id >= config.text_config.vocab_size:
        raise ConversionError(
            f"The placeholder <|image|> of {folder} has the id {image_token_id}, outside the vocabulary of "
            f"{config.text_config.vocab_size}."
        )
    return config


def build_processor(tokenizer: GPT2Tokenizer, config: AureaConfig, sizes: dict | None) -> AureaProcessor:
    """The published preprocessing at the configured sizes."""
    (height, width), (spatial_height, spatial_width) = config.view_sizes
    # The published 256 for a crop of 224.
    shortest_edge = (sizes or {}).get("resize_short", round(min(spatial_height, spatial_width) * 256 / 224))
    image_processor = AureaImageProcessor(
        size={"height": height, "width": width},
        spatial_size={"shortest_edge": shortest_edge},
        spatial_crop_size={"height": spatial_height, "width": spatial_width},
    )
    return AureaProcessor(image_processor, tokenizer)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing.") from error
    except ValueError as error:
        raise ConversionError(f"{path} is no JSON: {error}") from error
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error


def _build_tokenizer(folder: Path) -> GPT2Tokenizer:
    try:
        return build_tokenizer(folder)
    except Exception as error:  # what the tokenizers library raises has no other type
        raise ConversionError(f"{folder} holds no usable tokenizer: {error}") from error


def build_generation_config(folder: Path, image_token_id: int) -> GenerationConfig:
    """The published sampling defaults and stop tokens; no placeholder is generated, which no picture would fill. The
    published repetition penalty spares the prompt, which the setting of that name does not: `published_sampling` has
    it."""
    published = read_json(folder / "generation_config.json")
    if not isinstance(published, dict) or not {"bos_token_id", "eos_token_id", "pad_token_id"} <= published.keys():
        raise ConversionError(
            f"{folder / 'generation_config.json'} must hold bos_token_id, eos_token_id and pad_token_id."
        )
    return GenerationConfig(
        do_sample=True,
        temperature=0.1,
        top_k=50,
        top_p=0.9,
        bos_token_id=published["bos_token_id"],
        eos_token_id=published["eos_token_id"],
        pad_token_id=published["pad_token_id"],
        suppress_tokens=[image_token_id],
    )


ABOUT = """A vision-language model with two vision encoders (SigLIP2 and DINOv2) whose feature maps are fused by
spatial-range attention and read by Phi-4-mini through cross-attention. Converted from the published checkpoint with
`transformers-aurea`: weights in {dtype}, encoders and Gaussian widths in float32. They are derived from Phi-4-mini
(MIT), DINOv2 (Apache-2.0) and SigLIP2 (Apache-2.0)."""


def convert(
    folder: Path,
    output: Path,
    config_file: Path | None,
    dtype: torch.dtype | None,
    max_shard_size: str,
    verify: bool,
    origin: str,
):
    """Write OUT whole or not at all: everything goes to a folder beside it that takes its name at the end.

    `origin` is the folder, or the hub id that it was had by, which the model card names.
    """
    output = output.resolve()
    for name in OTHER_FILES:
        if not (folder / name).is_file():
            raise ConversionError(f"{folder / name} is missing.")
    sizes = read_json(config_file) if config_file is not None else None
    if sizes is not None and not isinstance(sizes, dict):
        raise ConversionError(
            f"--config {config_file} must hold a JSON object of sizes, not a {type(sizes).__name__}."
        )
    tokenizer = _build_tokenizer(folder)
    config = build_config(folder, sizes, tokenizer.convert_tokens_to_ids("<|image|>"))
    companions = [build_generation_config(folder, config.image_token_id), build_processor(tokenizer, config, sizes)]
    published = PublishedCheckpoint(folder, config)
    dtype = dtype if dtype is not None else published.dtype()
    config.dtype, config.name_or_path = dtype, origin
    config.architectures = ["AureaForConditionalGeneration"]
    tensors = target_tensors(config, dtype)
    with unfinished_folder(output, tensors) as unfinished:
        write_weights(lambda name: _cast(published, name, tensors[name]), tensors, unfinished, max_shard_size)
        about = ABOUT.format(dtype=str(config.dtype).removeprefix("torch."))
        write_companions(config, companions, unfinished, output.name, about)
        if verify:
            verify_in_new_process(folder, unfinished, __spec__.name)


@contextmanager
def unfinished_folder(output: Path, tensors: dict[str, torch.Tensor]) -> Iterator[Path]:
    """A folder beside OUT, which becomes OUT at the end and is gone after an error.

    Raises:
        ConversionError: there is no room for the tensors.
    """
    size = sum(tensor.nbytes for tensor in tensors.values())
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if free < size:
        raise ConversionError(f"{output.parent} has {free:,} bytes free, the model needs {size:,}.")
    unfinished = Path(tempfile.mkdtemp(prefix=f".{output.name}.unfinished-", dir=output.parent))
    try:
        yield unfinished
        for path in (unfinished, *unfinished.iterdir()):  # temporary folders and safetensors files are private
            path.chmod(0o755 if path.is_dir() else 0o644)
        if output.exists():
            output.rmdir()
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # there only if it was not finished
    print(f"{output}: {len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} parameters")


def write_weights(
    read: Callable[[str], torch.Tensor], tensors: dict[str, torch.Tensor], output: Path, max_shard_size: str
):
    """Shards, and their index if there are several, of tensors that are read when their shard is written.

    Args:
        read: gives the tensor of a name.
        tensors: all of them, in shape and dtype, on the meta device.
    """
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        shard = {name: read(name).contiguous() for name in names}
        save_file(shard, output / file, metadata={"format": "pt"})
        print(f"wrote {file}: {len(names)} tensors")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (output / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _cast(published: PublishedCheckpoint, name: str, target: torch.Tensor) -> torch.Tensor:
    """The published value in the dtype and shape of `target`."""
    value = published.read(name, tuple(target.shape))
    cast = value.to(target.dtype)
    if target.dtype == torch.float16 and not torch.equal(cast.isfinite(), value.isfinite()):
        source = published.of_target[name].name
        raise ConversionError(f"The tensor {source} has values beyond the range of float16. Use --dtype bfloat16.")
    return cast


def write_companions(config: AureaConfig, companions: list, folder: Path, title: str, about: str):
    """Configuration, code and model card, and what saves itself: generation settings and processor."""
    with torch.device("meta"):
        model = AureaForConditionalGeneration(config)
    custom_object_save(model, folder, config=config)
    config.save_pretrained(folder)
    for companion in companions:
        companion.save_pretrained(folder)
    model_card(model, title, about=about).save(folder / FILE_NAME)


def verify_in_new_process(folder: Path, output: Path, converter: str):
    """Runs `converter`, the name of a module, with `--verify` on a folder that it wrote.

    Raises:
        ConversionError: it found a difference.
    """
    command = [sys.executable, "-m", converter, "--input_dir", str(folder), "--output_dir", str(output), "--verify"]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, end="")
    if result.returncode:
        raise ConversionError(f"The folder read back is not what was published: {result.stdout.strip()}")


def verify_folder(folder: Path, output: Path, dtype: torch.dtype | None):
    """Compare a converted folder with the published one, every tensor bit by bit after the cast."""
    config = AureaConfig.from_pretrained(output)
    if dtype is not None and dtype != config.dtype:
        raise ConversionError(f"{output} is in {config.dtype}, not in {dtype} as --dtype has it.")
    published = PublishedCheckpoint(folder, config)
    tensors = target_tensors(config, config.dtype)
    found = {}
    for path in sorted(output.glob("*.safetensors")):
        content = open_safetensors(path)
        found.update(dict.fromkeys(content.keys(), content))
    for name, tensor in tensors.items():
        if name not in found:
            raise ConversionError(f"The tensor {name} is missing from {output}.")
        expected = _cast(published, name, tensor)
        if not same_bits(found[name].get_tensor(name), expected):
            raise ConversionError(
                f"The tensor {name} of {output} differs from {published.of_target[name].name} of {folder}."
            )
    if unknown := set(found) - set(tensors):
        raise ConversionError(f"The tensor {min(unknown)} of {output} is no part of the model.")
    print(f"verified: {len(tensors)} tensors equal their source after the cast to {config.dtype}")


def resolve_input(input_dir: str, patterns: Iterable[str] = ("*.safetensors", INDEX_FILE, *OTHER_FILES)) -> Path:
    """A local folder as it is, of a hub id what these patterns name, and the model card."""
    if Path(input_dir).is_dir():
        return Path(input_dir)
    if Path(input_dir).exists():
        raise ConversionError(f"--input_dir {input_dir} is a file. Give the folder that holds the published files.")
    try:
        return Path(snapshot_download(input_dir, allow_patterns=[*patterns, FILE_NAME]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConversionError(
            f"--input_dir {input_dir} is neither a folder nor a hub id to be had: {error}"
        ) from error


def shard_size(text: str) -> str:
    if not re.fullmatch(r"\d+\s*([KMGT]B)?", text, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"a size is a number and KB, MB, GB or TB, got {text!r}")
    return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", required=True, help="folder in the published layout, or hub id")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--config", type=Path, help="JSON file of the sizes; without it the published ones hold")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="dtype of the weights, encoders excepted; without it that of the published language model",
    )
    parser.add_argument(
        "--max_shard_size", type=shard_size, default="5GB", help="largest file to write (default: 5GB)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read the folder back in a new process and compare every bit"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    dtype = getattr(torch, args.dtype) if args.dtype else None

    def run():
        folder = resolve_input(args.input_dir)
        if not is_to_be_verified(args):
            convert(folder, args.output_dir, args.config, dtype, args.max_shard_size, args.verify, args.input_dir)
        else:
            verify_folder(folder, args.output_dir, dtype)

    return exit_status(run)


def is_to_be_verified(args: argparse.Namespace) -> bool:
    """Whether OUT is there already, and is only to be compared.

    Raises:
        ConversionError: it is there, and is not to be compared.
    """
    if args.verify and (args.output_dir / "config.json").is_file():
        return True
    if args.output_dir.exists() and (not args.output_dir.is_dir() or any(args.output_dir.iterdir())):
        raise ConversionError(f"--output_dir {args.output_dir} exists and is not empty.")
    return False


def exit_status(run: Callable[[], None]) -> int:
    """Runs a conversion; that of the process. Errors and interrupts end in a line on standard error."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up as after Ctrl-C
    try:
        run()
    except KeyboardInterrupt:
        print("error: interrupted, nothing was written", file=sys.stderr)
        return 130
    except (ConversionError, SafetensorError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        print("error: interrupted, nothing was written", file=sys.stderr)  # inside a library that renamed it
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
