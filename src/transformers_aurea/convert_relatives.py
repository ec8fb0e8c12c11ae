# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Convert a PaliGemma, a PaliGemma 2 or a LLaVA of transformers into an Aurea of the same logits.

    python -m transformers_aurea.convert_relatives --input_dir FOLDER --output_dir OUT --verify

FOLDER is what `save_pretrained` wrote of a `PaliGemmaForConditionalGeneration` or a `LlavaForConditionalGeneration`,
or a hub id. OUT has their encoder, projector and language model as they are, tensor by tensor in the precision that
they have there, under an Aurea's names: one encoder, no fusion, visual tokens in the place of placeholders. What of
them is a habit rather than a weight (masks, positions, layers of features, heads, prompts) are settings of Aurea's
configuration and processor. With `--verify` a new process shows both models the same pictures and words and compares
what they say; given an OUT converted before, it does only that.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from torch import nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from . import AureaConfig, AureaForConditionalGeneration, AureaProcessor
from .convert_aurea_weights_to_hf import (
    INDEX_FILE,
    ConversionError,
    exit_status,
    is_to_be_verified,
    open_safetensors,
    read_json,
    resolve_input,
    same_bits,
    shard_size,
    unfinished_folder,
    verify_in_new_process,
    write_companions,
    write_weights,
)
from .modeling_outputs_aurea import AureaModelOutputWithPast
from .parts_aurea import IMAGE_TOKEN
from .processing_aurea import CONTENT_TEMPLATE


RELATIVES = {
    PaliGemmaConfig: PaliGemmaForConditionalGeneration,
    LlavaConfig: LlavaForConditionalGeneration,
}
# Why those that are close to them are not among them.
REASONS = {
    "llava_next": "cuts a picture into tiles, and gives each another number of visual tokens",
    "llava_next_video": "cuts a picture into tiles, and takes videos",
    "llava_onevision": "cuts a picture into tiles, and takes videos",
    "video_llava": "takes videos, with a second encoder for them",
    "vipllava": "normalises the features of several layers before its projector",
    "mistral3": "takes pictures of any size, and merges patches before its projector",
    "pixtral": "takes pictures of any size, each with another number of visual tokens",
    "siglip2_vision_model": "takes pictures of any shape as flattened patches",
    "idefics2": "resamples its visual tokens",
    "idefics3": "cuts a picture into tiles",
    "gemma3": "pools its visual tokens",
    "colpali": "gives embeddings, and no text",
}

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")

# The key map, from the names in the loaded original to ours.
PREFIXES = {
    "model.vision_tower.": "model.vision_model.",
    "model.multi_modal_projector.linear.": "model.multi_modal_projector.linear_1.",
}

ABOUT = """A {kind} of transformers as an Aurea: one vision encoder, no fusion, visual tokens in the place of
placeholders. It has the original's weights, under the original's licence, and gives the original's logits. Converted
with `transformers-aurea`."""


def load_config(folder: Path) -> PreTrainedConfig:
    """That of a relative.

    Raises:
        ConversionError: it is none, or one that no Aurea can be.
    """
    settings = read_json(folder / "config.json")
    model_type = settings.get("model_type")
    if model_type in REASONS:
        raise ConversionError(f"{folder} is a '{model_type}', which {REASONS[model_type]}. {_what_is_taken()}")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (KeyError, OSError, TypeError, ValueError, StrictDataclassError) as error:
        raise ConversionError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if type(config) not in RELATIVES:
        raise ConversionError(f"{folder} is a '{model_type}'. {_what_is_taken()}")
    if "quantization_config" in settings:
        raise ConversionError(f"{folder} is quantized. Load it with `dequantize=True`, save it, and convert that.")
    for part in (config.vision_config, config.text_config):
        if part.model_type in REASONS:
            raise ConversionError(
                f"{folder} has a '{part.model_type}' inside, which {REASONS[part.model_type]}. {_what_is_taken()}"
            )
    return config


def _what_is_taken() -> str:
    return f"Only a {' or a '.join(model_class.__name__ for model_class in RELATIVES.values())} can be converted."


def build_config(original: PreTrainedModel) -> AureaConfig:
    """An Aurea of the same parts and habits as a relative, whose weights are not needed.

    Raises:
        ConversionError: no Aurea can be made of its parts.
    """
    config = copy.deepcopy(original.config)
    settings = {
        "vision_config": config.vision_config,
        "text_config": config.text_config,
        "feature_fusion_config": {"fusion_type": "none"},
        "connector_type": "prefix",
        "encoder_dtype": "auto",
        "projector_bias": True,
        "lm_head_type": "linear" if has_linear_head(original) else "own",
        "image_token_id": config.image_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": config.dtype,
        "architectures": ["AureaForConditionalGeneration"],
    }
    wanted = "patches" if isinstance(config, PaliGemmaConfig) else config.vision_feature_select_strategy
    if isinstance(config, PaliGemmaConfig):
        settings |= {"prefix_mask": "prompt", "first_position_id": 1, "projector_num_layers": 1}
    else:
        settings |= {
            "vision_feature_layer": config.vision_feature_layer,
            "projector_hidden_size": config.text_config.hidden_size,
            "projector_hidden_act": config.projector_hidden_act,
            "projector_bias": config.multimodal_projector_bias,
        }
    try:
        aurea = AureaConfig(**settings, vision_feature_select_strategy="full")
        aurea.vision_feature_select_strategy = _select_strategy(wanted, *aurea.feature_shapes[0], aurea.grid_sizes[0])
        aurea.validate_architecture()
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(f"No Aurea can be made of the parts of this '{config.model_type}': {error}") from error
    return aurea


def _select_strategy(wanted: str, num_tokens: int, grid: tuple[int, int]) -> str:
    """Aurea's word for the tokens that a relative takes of an encoder's: `"patches"` and `"full"`, all; `"default"`,
    all but the first. Where these are the patches, they are a map."""
    strategy, num_taken = ("drop_first", num_tokens - 1) if wanted == "default" else ("full", num_tokens)
    return "default" if num_taken == grid[0] * grid[1] else strategy


@torch.no_grad()
def has_linear_head(original: PreTrainedModel) -> bool:
    """Whether the logits are a linear layer's, and nothing is done to them, as PaliGemma 2 began to do with 5.23.

    A copy with the head out of its way is shown a hidden state that any cap would change.
    """
    probe = copy.copy(original)
    probe._modules = {"lm_head": nn.Identity()}
    hidden_states = torch.full((1, 1, 1), 1e4)
    probe.__dict__["model"] = lambda **kwargs: AureaModelOutputWithPast(last_hidden_state=hidden_states)
    return torch.equal(probe(input_ids=torch.zeros(1, 1, dtype=torch.long)).logits, hidden_states)


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the original's files."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class SourceCheckpoint:
    """The files of a relative, read tensor by tensor under the names of an Aurea.

    Attributes:
        tensors: what there is for each of the Aurea's weights, of one shape and dtype.

    Raises:
        ConversionError: weights are missing, broken, of another shape, or of a type that is no float.
    """

    def __init__(self, folder: Path, original: PreTrainedModel, aurea: PreTrainedModel):
        places = aurea.state_dict()
        for name in aurea.all_tied_weights_keys:
            del places[name]
        sources = source_tensors(folder)
        names = _loaded_names(original, sources)
        if names is None:  # experts that lie one by one in the files, say: the loader puts them together
            sources = type(original).from_pretrained(folder, dtype="auto").state_dict()
            names = {name: name for name in sources}
        self.sources = {_our_name(name): sources[source] for source, name in names.items()}
        if missing := sorted(places.keys() - self.sources.keys()):
            raise ConversionError(f"{folder} lacks {len(missing)} of the model's weights: {missing[:5]}.")
        self.tensors = {}
        for name, place in places.items():
            source = self.sources[name]
            if tuple(source.shape) != tuple(place.shape):
                raise ConversionError(
                    f"The tensor {name} of {folder} has the shape {tuple(source.shape)}, but the configuration "
                    f"promises {tuple(place.shape)}."
                )
            self.tensors[name] = torch.empty(source.shape, dtype=source.dtype, device="meta")
        left_over = sorted(self.sources.keys() - places.keys() - aurea.all_tied_weights_keys.keys())
        if left_over:
            print(f"{folder}: left out {len(left_over)} tensors that give no logits: {left_over}")

    def read(self, name: str) -> torch.Tensor:
        source = self.sources[name]
        return source if isinstance(source, torch.Tensor) else open_safetensors(source.file).get_tensor(source.name)


def _our_name(name: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return PREFIXES.get(prefix, "") + name.removeprefix(prefix)


def source_tensors(folder: Path) -> dict[str, SourceTensor]:
    """All tensors of the folder's files, by the names that they have there."""
    if (folder / INDEX_FILE).is_file():
        files = {folder / file for file in read_json(folder / INDEX_FILE)["weight_map"].values()}
    else:
        files = {folder / "model.safetensors"}
    tensors = {}
    for file in sorted(files):
        if not file.is_file():
            raise ConversionError(f"{file} is missing. Save the model with `save_pretrained`, and convert that.")
        content = open_safetensors(file)
        for name, found in {name: content.get_slice(name) for name in list(content.keys())}.items():
            if found.get_dtype() not in DTYPES:
                raise ConversionError(f"The tensor {name} of {file} is of type {found.get_dtype()}, no float.")
            tensors[name] = SourceTensor(file, name, tuple(found.get_shape()), DTYPES[found.get_dtype()])
    return tensors


def _loaded_names(original: PreTrainedModel, names: Iterable[str]) -> dict[str, str] | None:
    """The names that these of files have in the loaded original; None if its loader does more than to rename them."""
    transforms = get_model_conversion_mapping(original)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    places = original.state_dict()
    loaded = {}
    for name in names:
        loaded[name], pattern = rename_source_key(name, renamings, converters, original.base_model_prefix, places)
        if pattern is not None:
            return None
    return loaded


def build_generation_config(folder: Path, original: PreTrainedModel) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return original.generation_config  # of its configuration


def build_processor(folder: Path, config: AureaConfig) -> AureaProcessor | None:
    """The original's prompts, tokens and pictures; None where the folder holds no processor.

    Raises:
        ConversionError: its placeholder is no token, or not the model's.
    """
    original = load_processor(folder)
    if original is None:
        print(f"{folder} holds no processor, hence {AureaProcessor.__name__} is written neither.")
        return None
    tokenizer = original.tokenizer
    has_prompt = isinstance(original, PaliGemmaProcessor)
    try:
        processor = AureaProcessor(
            original.image_processor,
            tokenizer,
            chat_template=original.chat_template
            or tokenizer.chat_template
            or CONTENT_TEMPLATE.replace(IMAGE_TOKEN, original.image_token),
            image_seq_length=config.placeholders_per_image,
            image_token=original.image_token,
            adds_special_tokens=True,
            prompt_format=f"{{images}}{tokenizer.bos_token}{{text}}\n" if has_prompt else None,
        )
    except ValueError as error:
        raise ConversionError(f"The processor of {folder} cannot be an Aurea's: {error}") from error
    if processor.image_token_id != config.image_token_id:
        raise ConversionError(
            f"The placeholder {processor.image_token} of {folder} has the id {processor.image_token_id} in the "
            f"tokenizer, and {config.image_token_id} in the model's configuration. Correct one of them."
        )
    return processor


def load_processor(folder: Path) -> ProcessorMixin | None:
    """That of a relative, as far as there is one."""
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError):
        return None
    return processor if isinstance(processor, (PaliGemmaProcessor, LlavaProcessor)) else None


def convert(folder: Path, output: Path, max_shard_size: str, verify: bool, origin: str):
    """Write OUT whole or not at all; `origin` is the folder or its hub id."""
    output = output.resolve()
    original = build_original(folder)
    config = build_config(original)
    with torch.device("meta"):
        aurea = AureaForConditionalGeneration(config)
    companions = [build_generation_config(folder, original), build_processor(folder, config)]
    source = SourceCheckpoint(folder, original, aurea)
    config.name_or_path = origin
    about = ABOUT.format(
        kind=type(original).__name__,
    )
    with unfinished_folder(output, source.tensors) as unfinished:
        write_weights(source.read, source.tensors, unfinished, max_shard_size)
        write_companions(config, [one for one in companions if one is not None], unfinished, output.name, about)
        if verify:
            verify_in_new_process(folder, unfinished, __spec__.name)


def build_original(folder: Path) -> PreTrainedModel:
    """The original without weights.

    Raises:
        ConversionError: it is no relative, or its parts make no model.
    """
    config = load_config(folder)
    try:
        with torch.device("meta"):
            return RELATIVES[type(config)](config)
    except (AttributeError, LookupError, TypeError, ValueError) as error:  # a part's class wants other fields
        raise ConversionError(f"transformers makes no model of {folder / 'config.json'}: {error}") from error


def verify_tensors(source, folder: Path, output: Path):
    """Compares every tensor of a converted folder with the checkpoint that it was converted from, bit by bit.

    Args:
        source: the checkpoint, with its `tensors` and `read` of one of them.

    Raises:
        ConversionError: they differ.
    """
    found = {}
    for path in sorted(output.glob("*.safetensors")):
        content = open_safetensors(path)
        found.update(dict.fromkeys(content.keys(), content))
    for name in source.tensors:
        if name not in found:
            raise ConversionError(f"The tensor {name} is missing from {output}.")
        if not same_bits(found[name].get_tensor(name), source.read(name)):
            raise ConversionError(f"The tensor {name} of {output} differs from that of {folder}.")
    if unknown := found.keys() - source.tensors.keys():
        raise ConversionError(f"The tensor {min(unknown)} of {output} is no part of the model.")
    print(f"verified: {len(source.tensors)} tensors equal their source")


@torch.no_grad()
def verify_folder(folder: Path, output: Path):
    """Compares a converted folder with the original: every tensor bit by bit, and in float32 what both make of the
    same pictures and words.

    Raises:
        ConversionError: they differ.
    """
    original = build_original(folder)
    config = AureaConfig.from_pretrained(output)
    with torch.device("meta"):
        aurea = AureaForConditionalGeneration(config)
    source = SourceCheckpoint(folder, original, aurea)
    verify_tensors(source, folder, output)
    inputs = _example(config, original)
    theirs = _logits(type(original), folder, inputs | {"pixel_values": inputs["pixel_values"][:, 0]})
    ours = _logits(AureaForConditionalGeneration, output, inputs)
    difference, largest = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    if not difference <= 1e-4 * largest:
        raise ConversionError(
            f"The logits of {output} differ from those of {folder} by {difference:.3g}, the largest being "
            f"{largest:.3g}."
        )
    print(f"verified: logits of two pictures with words differ by {difference:.3g} at most, of {largest:.3g}")
    _verify_processor(folder, output)


def _example(config: AureaConfig, original: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Two rows of a picture and words, the second padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = [idx for idx in range(config.text_config.vocab_size) if idx != config.image_token_id][:64]
    words = torch.tensor(ids)[torch.randint(len(ids), (2, 6), generator=generator)]
    placeholders = torch.full((2, config.placeholders_per_image), config.image_token_id)
    input_ids = torch.cat([words[:, :2], placeholders, words[:, 2:]], dim=1)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, :1] = 0
    pixel_values = torch.randn(2, 1, 3, *config.canvas, generator=generator)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": pixel_values}
    is_prompt = isinstance(original.config, PaliGemmaConfig)
    return inputs | ({"token_type_ids": torch.zeros_like(input_ids)} if is_prompt else {})


def _logits(model_class: type[PreTrainedModel], folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """(rows, tokens, vocabulary) at tokens that are not padding, in float32."""
    model = model_class.from_pretrained(folder, dtype=torch.float32).eval()
    return model(**inputs).logits[inputs["attention_mask"] == 1]


def _verify_processor(folder: Path, output: Path):
    original = load_processor(folder)
    if original is None:
        return
    ours = AureaProcessor.from_pretrained(output)
    picture = Image.effect_mandelbrot((61, 47), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    inputs = {"images": picture, "text": f"{original.image_token}what is this?", "return_tensors": "pt"}
    theirs, ours = original(**inputs), ours(**inputs)
    for name in ("input_ids", "pixel_values"):
        if not torch.equal(theirs[name].flatten(), ours[name].flatten()):
            raise ConversionError(f"The processor of {output} gives other `{name}` than that of {folder}.")
    print("verified: the processors give the same tokens and pixels")


def run_converter(
    argv: list[str] | None,
    description: str,
    kind: str,
    convert: Callable[[Path, Path, str, bool, str], None],
    verify_folder: Callable[[Path, Path], None],
) -> int:
    """Converts a folder of some kind, or verifies one that was converted, as the arguments say; the status of the
    process."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input_dir", required=True, help=f"folder of {kind}, or hub id")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument(
        "--max_shard_size", type=shard_size, default="5GB", help="largest file to write (default: 5GB)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read the folder back in a new process and compare it with the original"
    )
    args = parser.parse_args(argv)

    def run():
        folder = resolve_input(args.input_dir, ("*.safetensors", *OTHER_FILES))
        if is_to_be_verified(args):
            verify_folder(folder, args.output_dir)
        else:
            convert(folder, args.output_dir, args.max_shard_size, args.verify, args.input_dir)

    return exit_status(run)


def main(argv: list[str] | None = None) -> int:
    return run_converter(argv, __doc__, "a PaliGemma or LLaVA", convert, verify_folder)


if __name__ == "__main__":
    sys.exit(main())
