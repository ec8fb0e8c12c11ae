# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Prismatic VLMs and OpenVLA: their pair of encoders as a configuration, and their checkpoints as Aureas.

    python -m transformers_aurea.convert_prismatic --input_dir FOLDER --output_dir OUT --verify

DINOv2 and SigLIP, the channels of their second-to-last layers side by side, an MLP, visual tokens after the first
token of the text (https://arxiv.org/abs/2402.07865, https://arxiv.org/abs/2406.09246): `prismatic_config` makes an
Aurea of it. FOLDER holds safetensors and a `config.json` of type `prismatic` or `openvla`, or is a hub id. Its
encoders are timm's, whose tensors have other names and shapes than transformers': `DINOV2_KEYS`, `SIGLIP_KEYS` and
`published_name` are the map. Every tensor must be there in the shape that the published sizes promise, and goes to OUT
in the precision that it has. With `--verify` a new process reads OUT back and compares it with FOLDER bit by bit;
given an OUT converted before, it does only that.
"""

import re
import sys
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import PILImageResampling

from . import AureaConfig, AureaForConditionalGeneration, AureaImageProcessor, AureaProcessor
from .convert_aurea_weights_to_hf import (
    ConversionError,
    open_safetensors,
    read_json,
    unfinished_folder,
    verify_in_new_process,
    write_companions,
    write_weights,
)
from .convert_relatives import SourceTensor, run_converter, source_tensors, verify_tensors
from .parts_aurea import IMAGE_TOKEN, image_token, load_tokenizer
from .processing_aurea import CONTENT_TEMPLATE


PATCH_SIZE = 14
DINOV2_LARGE = {
    "model_type": "dinov2_with_registers",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": PATCH_SIZE,
}
SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": PATCH_SIZE,
    "hidden_act": "gelu",  # exact in timm, where big_vision and transformers have the approximation by tanh
}
# What an encoder is by its name in timm: the name and the settings that it has in an Aurea.
TIMM_MODELS = {
    "vit_large_patch14_reg4_dinov2.lvd142m": ("spatial_vision_config", DINOV2_LARGE),
    "vit_so400m_patch14_siglip_224": ("vision_config", SIGLIP_SO400M),
    "vit_so400m_patch14_siglip_384": ("vision_config", SIGLIP_SO400M),
}
# The first's channels come first, as those of the spatial encoder do in an Aurea.
TOWERS = (("spatial_vision_config", "vision_config"), ("vision_config",), ("spatial_vision_config",))

# The key maps, published name → ours; {} is the number of a layer. Where ours are several, the published rows are
# theirs one after the other.
DINOV2_KEYS = {
    "cls_token": "embeddings.cls_token",
    "reg_token": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",  # of patches; that of the class token is part of it already
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks.{}.norm1": "encoder.layer.{}.norm1",
    "blocks.{}.attn.qkv": tuple(f"encoder.layer.{{}}.attention.{name}_proj" for name in "qkv"),
    "blocks.{}.attn.proj": "encoder.layer.{}.attention.o_proj",
    "blocks.{}.ls1.scale_factor": "encoder.layer.{}.layer_scale1.lambda1",
    "blocks.{}.norm2": "encoder.layer.{}.norm2",
    "blocks.{}.mlp.fc1": "encoder.layer.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "encoder.layer.{}.mlp.fc2",
    "blocks.{}.ls2.scale_factor": "encoder.layer.{}.layer_scale2.lambda1",
    "norm": "layernorm",
}
SIGLIP_KEYS = {
    "pos_embed": "embeddings.position_embedding.weight",
    "patch_embed.proj": "embeddings.patch_embedding",
    "blocks.{}.norm1": "encoder.layers.{}.layer_norm1",
    "blocks.{}.attn.qkv": tuple(f"encoder.layers.{{}}.self_attn.{name}_proj" for name in "qkv"),
    "blocks.{}.attn.proj": "encoder.layers.{}.self_attn.out_proj",
    "blocks.{}.norm2": "encoder.layers.{}.layer_norm2",
    "blocks.{}.mlp.fc1": "encoder.layers.{}.mlp.fc1",
    "blocks.{}.mlp.fc2": "encoder.layers.{}.mlp.fc2",
    "norm": "post_layernorm",
}
PREFIXES = {
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector.linear_": "projector.fc",
}
SPATIAL, SEMANTIC = "model.spatial_vision_model.", "model.vision_model."
CLS_TOKEN, MASK_TOKEN = SPATIAL + "embeddings.cls_token", SPATIAL + "embeddings.mask_token"
# SigLIP's attention pooling, which gives no visual tokens.
POOLING = re.compile(r"vision_backbone\.(fused_)?featurizer\.attn_pool\.")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

ABOUT = """A Prismatic VLM, of type `{kind}`, as an Aurea: {encoders}, an MLP, visual tokens after the first token of
the text. It has the original's weights, under the original's licence. Converted with `transformers-aurea`."""


def prismatic_config(
    text_config: dict | PreTrainedConfig,
    *,
    image_size: int = 224,
    vision_config: dict | PreTrainedConfig | None = SIGLIP_SO400M,
    spatial_vision_config: dict | PreTrainedConfig | None = DINOV2_LARGE,
    image_token_id: int | None = None,
    **settings,
) -> AureaConfig:
    r"""The pair of encoders of Prismatic VLMs and OpenVLA in front of any language model.

    Args:
        text_config (`dict` or `PreTrainedConfig`): The language model.
        image_size (`int`, *optional*, defaults to 224):
            Side of a picture in pixels, for encoders given as dictionaries without one. Of 384 the encoders see the
            first 378, as timm's do: whole patches.
        vision_config, spatial_vision_config (`dict` or `PreTrainedConfig`, *optional*):
            By default SigLIP so400m/14 and DINOv2 large with registers. One of them may be None; the other then is the
            only encoder, and the projector has one layer less.
        image_token_id (`int`, *optional*, defaults to `text_config.vocab_size`):
            Placeholder of a visual token. The original has none: the default is beyond its words.
        settings: others of [`AureaConfig`], which override these.

    Raises:
        ValueError: the parts do not fit, see [`AureaConfig`].
    """
    encoders = {"vision_config": vision_config, "spatial_vision_config": spatial_vision_config}
    given = [name for name, config in encoders.items() if config is not None]
    for name, config in encoders.items():
        if isinstance(config, dict):
            encoders[name] = {"image_size": image_size - image_size % config.get("patch_size", 1)} | config
    fusion = {"fusion_type": "concat", "norm_features": False, "project_output": False}
    if len(given) < 2:
        fusion = {"fusion_type": "none", "encoder": "".join(given).removesuffix("_config")}
    defaults = {
        "feature_fusion_config": fusion,
        "connector_type": "prefix",
        **{name.replace("config", "feature_layer"): -2 for name in given},
        "projector_num_layers": 1 + len(given),
        "projector_hidden_act": "gelu",
        "projector_bias": True,
        "encoder_dtype": "auto",
    }
    config = AureaConfig(text_config=text_config, **encoders, **defaults | settings)
    if "projector_hidden_size" not in settings:
        text_size = config.text_config.hidden_size
        config.projector_hidden_size = 4 * sum(config.feature_sizes) if len(given) == 2 else text_size
    config.image_token_id = config.text_config.vocab_size if image_token_id is None else image_token_id
    return config


def load_settings(folder: Path) -> dict:
    """`config.json` of a Prismatic VLM.

    Raises:
        ConversionError: it is of another type, or has parts that are not known here.
    """
    settings = read_json(folder / "config.json")
    if settings.get("model_type") not in ("prismatic", "openvla"):
        raise ConversionError(
            f"{folder} is a '{settings.get('model_type')}'. Only a 'prismatic' or an 'openvla' can be converted."
        )
    if "quantization_config" in settings:
        raise ConversionError(f"{folder} is quantized. Convert the checkpoint that it was made of.")
    models = settings.get("timm_model_ids") or []
    if tuple(TIMM_MODELS[name][0] if name in TIMM_MODELS else None for name in models) not in TOWERS:
        raise ConversionError(
            f"The `timm_model_ids` of {folder} are {models}. Known are {', '.join(TIMM_MODELS)}: one of them, or the "
            "first and another."
        )
    if any(settings.get("timm_override_act_layers") or []):
        raise ConversionError(
            f"The `timm_override_act_layers` of {folder} are {settings['timm_override_act_layers']}, but of these "
            "encoders only timm's own activations are known here."
        )
    sizes = settings.get("image_sizes") or []
    if len(sizes) != len(models) or len({*sizes}) != 1 or not isinstance(sizes[0], int):
        raise ConversionError(f"The `image_sizes` of {folder} are {sizes}, not one side in pixels for all encoders.")
    return settings


def build_config(folder: Path, settings: dict, tokenizer: PreTrainedTokenizerBase | None) -> AureaConfig:
    """The configuration of a published folder; the placeholder is the tokenizer's, where there is one.

    Raises:
        ConversionError: no Aurea can be made of its parts.
    """
    encoders = {"vision_config": None, "spatial_vision_config": None}
    encoders |= dict(TIMM_MODELS[name] for name in settings["timm_model_ids"])
    try:
        config = prismatic_config(
            build_text_config(folder, settings),
            image_size=settings["image_sizes"][0],
            image_token_id=tokenizer and tokenizer.convert_tokens_to_ids(image_token(tokenizer)),
            architectures=["AureaForConditionalGeneration"],
            **encoders,
        )
        config.validate_architecture()
    except (ValueError, StrictDataclassError) as error:
        raise ConversionError(f"No Aurea can be made of the parts of {folder}: {error}") from error
    return config


def build_text_config(folder: Path, settings: dict) -> PreTrainedConfig:
    """That of the language model, of which `config.json` has what differs from its type's defaults.

    Raises:
        ConversionError: it has none.
    """
    text = settings.get("text_config")
    if not isinstance(text, dict) or "model_type" not in text:
        raise ConversionError(f"{folder / 'config.json'} has no `text_config` with a `model_type`, but {text}.")
    try:
        return AutoConfig.for_model(**text)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ConversionError(f"The `text_config` of {folder / 'config.json'} cannot be read: {error}") from error


def published_name(name: str, num_encoders: int) -> tuple[str, int, int]:
    """The published name of one of our tensors, which of its parts ours is, and how many there are."""
    for prefix, published in PREFIXES.items():
        if name.startswith(prefix):
            return published + name.removeprefix(prefix), 0, 1
    prefix, keys = (SPATIAL, DINOV2_KEYS) if name.startswith(SPATIAL) else (SEMANTIC, SIGLIP_KEYS)
    tower = "fused_featurizer" if prefix == SEMANTIC and num_encoders == 2 else "featurizer"
    layer = re.search(r"\.(\d+)\.", name)
    stem = re.sub(r"\.\d+\.", ".{}.", name.removeprefix(prefix), count=1)
    for published, ours in keys.items():
        ours = (ours,) if isinstance(ours, str) else ours
        for part, one in enumerate(ours):
            if stem in (one, f"{one}.weight", f"{one}.bias"):
                published += stem.removeprefix(one)
                return f"vision_backbone.{tower}.{published.format(layer and layer[1])}", part, len(ours)
    raise ConversionError(f"The tensor {name} of an Aurea is not known: this release of transformers has new names.")


def published_shape(name: str, shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """The published shape of one of our tensors, of so many parts."""
    if name == SPATIAL + "embeddings.position_embeddings":
        return 1, shape[1] - 1, shape[2]
    if name == SEMANTIC + "embeddings.position_embedding.weight":
        return 1, *shape
    return shape[0] * parts, *shape[1:]


class PrismaticCheckpoint:
    """The files of a Prismatic VLM, read tensor by tensor under the names of an Aurea.

    Attributes:
        tensors: what there is for each of the Aurea's weights, of one shape and dtype.

    Raises:
        ConversionError: tensors are missing, too many, of another shape, or of a type that is no float.
    """

    def __init__(self, folder: Path, aurea: PreTrainedModel):
        published = source_tensors(folder)
        pooling = sorted(name for name in published if POOLING.match(name))
        left_over = published.keys() - pooling
        num_encoders = len(aurea.config.encoder_configs)
        places = {name: tuple(tensor.shape) for name, tensor in aurea.state_dict().items()}
        for name in aurea.all_tied_weights_keys:
            del places[name]
        self.sources: dict[str, tuple[SourceTensor, int, int]] = {}
        for name in places:
            # timm has no mask token, and nothing reads it here: zeros, in the type of the class token.
            origin = CLS_TOKEN if name == MASK_TOKEN else name
            source, part, parts = published_name(origin, num_encoders)
            if source not in published:
                raise ConversionError(f"The tensor {source} is missing from {folder}.")
            expected = published_shape(origin, places[origin], parts)
            if published[source].shape != expected:
                raise ConversionError(
                    f"The tensor {source} of {folder} has the shape {published[source].shape}, but the configuration "
                    f"promises {expected}."
                )
            left_over.discard(source)
            self.sources[name] = published[source], part, parts
        if left_over:
            raise ConversionError(
                f"{folder} has {len(left_over)} tensors that are no part of a Prismatic VLM: {sorted(left_over)[:5]}."
            )
        if pooling:
            print(f"{folder}: left out {len(pooling)} tensors that give no visual tokens: {pooling}")
        self.tensors = {
            name: torch.empty(shape, dtype=self.sources[name][0].dtype, device="meta")
            for name, shape in places.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """The value of one of our tensors."""
        place, (source, part, parts) = self.tensors[name], self.sources[name]
        if name == MASK_TOKEN:
            return torch.zeros(place.shape, dtype=place.dtype)
        rows = source.shape[0] // parts
        value = open_safetensors(source.file).get_slice(source.name)[part * rows : (part + 1) * rows]
        if name == SPATIAL + "embeddings.position_embeddings":
            value = torch.cat([torch.zeros_like(value[:, :1]), value], dim=1)
        return value.reshape(place.shape)


def build_tokenizer(folder: Path, settings: dict) -> PreTrainedTokenizerBase | None:
    """The original's, and a placeholder; None where the folder holds none.

    Raises:
        ConversionError: it cannot be read.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    config = build_text_config(folder, settings)  # that of the folder is remote code
    try:
        return load_tokenizer(folder, AutoTokenizer.from_pretrained(folder, config=config))
    except (OSError, ValueError) as error:
        raise ConversionError(f"{folder} holds no usable tokenizer: {error}") from error


def build_processor(
    folder: Path, settings: dict, config: AureaConfig, tokenizer: PreTrainedTokenizerBase | None
) -> AureaProcessor | None:
    """The original's tokens and pictures; None, and the reason on standard output, where an Aurea's has no such.

    Raises:
        ConversionError: its files contradict each other.
    """
    strategy, size = settings.get("image_resize_strategy", "letterbox"), settings["image_sizes"][0]
    prompt_format = None if tokenizer is None else find_prompt_format(tokenizer)
    reason = None
    if tokenizer is None:
        reason = "it holds no tokenizer"
    elif not (folder / "preprocessor_config.json").is_file():
        reason = "it holds no preprocessor_config.json"
    elif strategy != "resize-naive":
        reason = f"it makes pictures square by '{strategy}', and an {AureaImageProcessor.__name__} by 'resize-naive'"
    elif size % PATCH_SIZE:
        reason = f"of {size} pixels its encoders leave out those of the last row and column that fill no patch"
    elif prompt_format is None:
        reason = f"its tokenizer reads words after {image_token(tokenizer)} otherwise than those of a new text"
    if reason is not None:
        print(f"{folder}: {reason}. Hence {AureaProcessor.__name__} is not written.")
        return None
    return AureaProcessor(
        build_image_processor(folder, settings),
        tokenizer,
        chat_template=CONTENT_TEMPLATE.replace(IMAGE_TOKEN, image_token(tokenizer)),
        image_seq_length=config.placeholders_per_image,
        prompt_format=prompt_format,
    )


def find_prompt_format(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Pictures after the token of the beginning, and words that are tokenized as if they followed it; None if the
    tokenizer has no such token, or nothing makes it read them so."""
    words = "In: What action? Out: two\nwords"
    if tokenizer.bos_token is None:
        return None
    expected = tokenizer(words, add_special_tokens=True)["input_ids"]
    if expected[0] != tokenizer.bos_token_id:  # Phi's: the text itself begins with it
        expected = tokenizer(tokenizer.bos_token + words, add_special_tokens=False)["input_ids"]
    placeholder = image_token(tokenizer)
    image_token_id = tokenizer.convert_tokens_to_ids(placeholder)
    for space in (" ", ""):  # the first is read by all that put one before a text, and by no other
        form = f"{tokenizer.bos_token}{{images}}{space}{{text}}"
        ids = tokenizer(form.format(images=2 * placeholder, text=words), add_special_tokens=False)["input_ids"]
        if ids == [expected[0], image_token_id, image_token_id, *expected[1:]]:
            return form
    return None


def build_image_processor(folder: Path, settings: dict) -> AureaImageProcessor:
    """One view for each encoder, the whole picture at the size and in the normalisation that the original has.

    Raises:
        ConversionError: the original's settings are none that make such views.
    """
    file = folder / "preprocessor_config.json"
    original = read_json(file)
    views = {}
    try:
        for index, model in enumerate(settings["timm_model_ids"]):
            resize, normalize = original["tvf_resize_params"][index], original["tvf_normalize_params"][index]
            height, width = resize["size"]
            name = TIMM_MODELS[model][0]
            views[name] = {
                "size": {"height": height, "width": width},
                "crop_size": None,
                "resample": PILImageResampling(resize["interpolation"]),
                "image_mean": normalize["mean"],
                "image_std": normalize["std"],
            }
    except (LookupError, TypeError, ValueError) as error:
        raise ConversionError(f"{file} does not say how pictures are resized and normalised: {error!r}") from error
    side = settings["image_sizes"][0]
    if any(view["size"] != {"height": side, "width": side} for view in views.values()):
        raise ConversionError(f"{file} resizes pictures to {original['tvf_resize_params']}, and not to {side} pixels.")
    first = views.pop("vision_config", None) or views.pop("spatial_vision_config")
    spatial = {f"spatial_{key}": value for view in views.values() for key, value in view.items()}
    return AureaImageProcessor(do_spatial_view=bool(spatial), **first, **spatial)


def build_generation_config(folder: Path, config: AureaConfig) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config.text_config)


def convert(folder: Path, output: Path, max_shard_size: str, verify: bool, origin: str):
    """Write OUT whole or not at all; `origin` is the folder or its hub id."""
    output = output.resolve()
    settings = load_settings(folder)
    tokenizer = build_tokenizer(folder, settings)
    config = build_config(folder, settings, tokenizer)
    source = PrismaticCheckpoint(folder, build_model(config))
    config.dtype = source.tensors["model.language_model.embed_tokens.weight"].dtype
    processor = build_processor(folder, settings, config, tokenizer)
    if "norm_stats" in settings:
        print(f"{folder}: its `norm_stats`, by which tokens become actions, are left out: no model reads them.")
    companions = [build_generation_config(folder, config), processor or tokenizer]
    config.name_or_path = origin
    about = ABOUT.format(
        kind=settings["model_type"],
        encoders=" and ".join(settings["timm_model_ids"]),
    )
    with unfinished_folder(output, source.tensors) as unfinished:
        write_weights(source.read, source.tensors, unfinished, max_shard_size)
        write_companions(config, [one for one in companions if one is not None], unfinished, output.name, about)
        if verify:
            verify_in_new_process(folder, unfinished, __spec__.name)


def build_model(config: AureaConfig) -> AureaForConditionalGeneration:
    """The Aurea without weights."""
    with torch.device("meta"):
        return AureaForConditionalGeneration(config)


def verify_folder(folder: Path, output: Path):
    """Compares every tensor of a converted folder with the original, bit by bit.

    Raises:
        ConversionError: they differ.
    """
    settings = load_settings(folder)
    config = build_config(folder, settings, build_tokenizer(folder, settings))
    verify_tensors(PrismaticCheckpoint(folder, build_model(config)), folder, output)


def main(argv: list[str] | None = None) -> int:
    return run_converter(argv, __doc__, "a Prismatic VLM or an OpenVLA", convert, verify_folder)


if __name__ == "__main__":
    sys.exit(main())
