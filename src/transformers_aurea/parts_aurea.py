# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The parts of an Aurea, taken from other models: two vision encoders, a language model and its tokenizer.

A part is a hub id, a local folder, or a model of transformers that is loaded already; that one is not changed. Of a
model with a vision tower among other things (SigLIP, CLIP, a classifier) the tower is taken.

    configurations     `parts_config`           AureaConfig, which refuses what does not fit before weights are read
    weights            `from_pretrained_parts`  the same under the names they have in an Aurea
    tokenizer          `load_tokenizer`         one that knows the image token
    image processors   `view_settings`          how each encoder wants its view
"""

import copy
import os

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import logging

from .composition_aurea import AureaCompositionLayer
from .configuration_aurea import AureaCompositionConfig, AureaConfig, AureaFusionConfig, check_names
from .cross_attention_aurea import BLOCK_NAMES, ZERO_LAYERS
from .fusion_promises_aurea import make_fusion
from .language_model_aurea import check_is_decoder, decoder_of, name_in_owner
from .model_card_aurea import is_hub_id
from .own_fusion_aurea import is_own_fusion
from .vision_encoder_aurea import pooling_settings


logger = logging.get_logger(__name__)

IMAGE_TOKEN = "<|image|>"

Part = str | os.PathLike | PreTrainedModel


def parts_config(vision: Part | None, spatial_vision: Part | None, text: Part, **config_overrides) -> AureaConfig:
    """The configuration of an Aurea of these parts, without a fusion if an encoder is None.

    Raises:
        OSError: a part's configuration cannot be read.
        TypeError: a part is none.
        ValueError: a part's place is given to something else, or a part to a fusion that has no use for it; an
            override is none of [`AureaConfig`] or [`AureaFusionConfig`]; whatever these refuse.
    """
    check_overrides(config_overrides)
    text_config = _config(text, "text")
    if "text_config" in text_config.sub_configs:
        raise ValueError(
            f"`text` is of type '{text_config.model_type}', a language model with more around it. Load its language "
            "model alone (a `...ForCausalLM`), and give that and a `tokenizer`."
        )
    check_is_decoder(text_config)
    encoders = {"vision": vision, "spatial_vision": spatial_vision}
    configs = {f"{name}_config": encoder_config(part, name) for name, part in encoders.items() if part is not None}
    if len(configs) == 1 and not {"feature_fusion_config", "fusion_config"} & config_overrides.keys():
        [name] = configs
        config_overrides["feature_fusion_config"] = {"fusion_type": "none", "encoder": name.removesuffix("_config")}
    config = AureaConfig(**configs, text_config=text_config, **config_overrides)
    if configs.keys() != config.encoder_configs.keys():
        raise ValueError(
            f"The fusion '{config.feature_fusion_config.fusion_type}' needs {' and '.join(config.encoder_configs)}, "
            f"but {' and '.join(configs) or 'none'} were given. Give each encoder that it needs, and None for the "
            "other."
        )
    return config


def check_overrides(config_overrides: dict) -> None:
    """Refuses what [`AureaConfig`] and its settings of fusion and composition would keep without using it, and
    configurations of parts.

    Raises:
        ValueError: an override is none of their arguments, or a part's configuration.
    """
    own = {"vision_config", "spatial_vision_config", "text_config"}
    if given := sorted(own & config_overrides.keys()):
        raise ValueError(f"{given} come from the parts. Change a part's configuration, and give the part loaded.")
    check_names((name for name in config_overrides if name != "fusion_config"), AureaConfig)
    for name in ("feature_fusion_config", "fusion_config"):  # the latter until version 0.1
        if isinstance(settings := config_overrides.get(name), dict):
            AureaFusionConfig(**settings)
    if isinstance(settings := config_overrides.get("composition_config"), dict):
        AureaCompositionConfig(**settings)


def _config(part: Part, name: str) -> PreTrainedConfig:
    """A copy, which names where the part comes from if that is a hub: a folder is nobody else's."""
    config = copy.deepcopy(part.config) if isinstance(part, PreTrainedModel) else _loaded_config(part, name)
    if not is_hub_id(config.name_or_path):
        config.name_or_path = ""
    return config


def _loaded_config(part: str | os.PathLike, name: str) -> PreTrainedConfig:
    if not isinstance(part, (str, os.PathLike)):
        raise TypeError(
            f"`{name}` must be a hub id, a folder or a model of transformers, got {type(part).__name__}. If it is "
            "wrapped (PEFT, compile, DDP), give the model inside."
        )
    try:
        return AutoConfig.from_pretrained(part)
    except (OSError, ValueError) as error:
        raise type(error)(f"`{name}={str(part)!r}` is no model that can be loaded: {error}") from error


def encoder_config(part: Part, name: str) -> PreTrainedConfig:
    """The configuration of a vision encoder, or of the vision tower of what is given as the argument `name`.

    Raises:
        OSError, TypeError, ValueError: it is none.
    """
    whole = _config(part, name)
    config = _tower_config(whole)
    config.name_or_path = whole.name_or_path
    encoder_class = MODEL_MAPPING.get(type(config), None)
    if getattr(encoder_class, "main_input_name", None) != "pixel_values":
        raise ValueError(f"`{name}` is of type '{config.model_type}', which is not a vision encoder of transformers.")
    return config


def _tower_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """That of the vision tower, where the model has more."""
    return config.vision_config if "vision_config" in config.sub_configs else config


def _model_inside(part: PreTrainedModel, config: PreTrainedConfig) -> nn.Module | None:
    """The module that is transformers' model of this configuration, without heads: `part` itself or one inside."""
    model_class = MODEL_MAPPING.get(type(config), None)
    return next((module for module in part.modules() if model_class and isinstance(module, model_class)), None)


def load_encoder(part: Part) -> dict[str, torch.Tensor]:
    """The weights of a vision encoder, or of the vision tower of what was given, as far as they come from there."""
    if isinstance(part, PreTrainedModel):
        encoder = _model_inside(part, _tower_config(part.config)) or part.base_model.get_encoder(modality="image")
        return {name: tensor.to("cpu", copy=True) for name, tensor in encoder.state_dict().items()}
    settings = pooling_settings(AutoConfig.from_pretrained(part))
    model, report = AutoModel.from_pretrained(part, dtype="auto", output_loading_info=True, **settings)
    encoder = model.get_encoder(modality="image")
    path = next(name for name, module in model.named_modules() if module is encoder)
    prefix = f"{path}." if path else ""
    made_up = report["missing_keys"]  # by the loader, at random
    return {name: tensor for name, tensor in encoder.state_dict().items() if prefix + name not in made_up}


def load_language_model(part: Part) -> PreTrainedModel:
    """A decoder with its head, or without if it was given so; a copy if it was loaded already.

    Raises:
        ValueError: a file lacks weights, which the loader would make up.
    """
    if isinstance(part, PreTrainedModel):
        return copy.deepcopy(part).cpu()
    model, report = AutoModelForCausalLM.from_pretrained(part, dtype="auto", output_loading_info=True)
    if report["missing_keys"]:
        raise ValueError(
            f"`text={str(part)!r}` lacks weights of a {type(model).__name__}: {sorted(report['missing_keys'])[:5]}. "
            "If it is a decoder without head, load it with `AutoModel` and give `tie_word_embeddings=True`."
        )
    return model


class AureaFromPartsMixin:
    """A model with a language modelling head, made of pretrained parts."""

    @classmethod
    def from_pretrained_parts(
        cls,
        vision: Part | None,
        spatial_vision: Part | None,
        text: Part,
        *,
        tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | str | None = None,
        **config_overrides,
    ) -> PreTrainedModel:
        r"""
        Two pretrained vision encoders and a pretrained language model as one Aurea, on the CPU, in evaluation mode.

        The parts' weights are kept bit for bit, but for pooling layers and heads, which have no place; fusion,
        projector, composition and cross-attention blocks are new. What the latter two add starts at zero: until blocks
        are trained, the logits are those of the language model alone, with or without pictures.
        [`AureaProcessor.from_pretrained_parts`] makes the processor that goes with it. The model has no name before it
        is saved and loaded, and TRL's DPO and GRPO look for their reference model by that.

        Args:
            vision (`str`, `os.PathLike` or `PreTrainedModel`):
                The semantic encoder: a hub id, a folder, or a model, which is copied. Of a model with more than a
                vision encoder (SigLIP, CLIP, a classifier) the encoder is taken.
            spatial_vision (`str`, `os.PathLike` or `PreTrainedModel`):
                The spatial encoder, likewise. One of the two may be None: the model then has a single encoder, and
                the fusion `"none"`.
            text (`str`, `os.PathLike` or `PreTrainedModel`):
                A decoder language model, likewise. Its generation settings are kept.
            tokenizer (`str`, `os.PathLike` or `PreTrainedTokenizerBase`, *optional*):
                By default the one where `text` comes from. It tells the id of the image token, its `image_token` or
                else `<|image|>`; if it has none, that of the next free token. The embeddings grow only if that id
                is beyond them, by rows that are the mean of the others.
            dtype (`torch.dtype` or `str`, *optional*):
                Of everything but the encoders, which are in float32 unless `encoder_dtype="auto"` is given. By default
                that of the language model.
            config_overrides:
                Arguments of [`AureaConfig`], such as `feature_fusion_config` and `cross_attention_layers`; others are
                refused. With `image_token_id` no tokenizer is needed; that token may then be generated, as by the
                language model alone, and is a word.

        Raises:
            OSError: a part cannot be found.
            TypeError: a part is none.
            ValueError: a part does not fit its place or another part, lacks weights, or gives no features of patches;
                an override is unknown; or there is no tokenizer.
        """
        parts = {"vision": vision, "spatial_vision": spatial_vision, "text": text}
        return _model_from_parts(cls, **parts, tokenizer=tokenizer, dtype=dtype, **config_overrides)


def _model_from_parts(
    model_class: type[PreTrainedModel],
    vision: Part | None,
    spatial_vision: Part | None,
    text: Part,
    *,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None,
    dtype: torch.dtype | str | None,
    **config_overrides,
) -> PreTrainedModel:
    config = parts_config(vision, spatial_vision, text, **config_overrides)
    if "image_token_id" not in config_overrides:
        tokenizer = load_tokenizer(text, tokenizer)
        config.image_token_id = tokenizer.convert_tokens_to_ids(image_token(tokenizer))
    with torch.device("meta"):
        skeleton = model_class(config)
    language_model = load_language_model(text)
    has_head = isinstance(language_model, MODEL_FOR_CAUSAL_LM_MAPPING[type(language_model.config)])
    if not has_head and not config.tie_word_embeddings:
        raise ValueError(
            f"`text` ({type(language_model).__name__}) has no language modelling head. Give the model with it "
            "(`...ForCausalLM`), or `tie_word_embeddings=True` to use its input embeddings."
        )
    encoders = {"model.vision_model.": vision, "model.spatial_vision_model.": spatial_vision}
    parts = {
        **{prefix: load_encoder(part) for prefix, part in encoders.items() if part is not None},
        "": _language_model_weights(language_model, has_head),
    }
    state_dict = _state_dict(skeleton, parts)
    dtype = language_model.dtype if dtype in (None, "auto") else dtype
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # that everything else is new is no news
    try:
        model = model_class.from_pretrained(None, config=config, state_dict=state_dict, dtype=dtype)
    finally:
        logging.set_verbosity(verbosity)
    for (
        name,
        parameter,
    ) in model.model.fusion.named_parameters():  # the loader keeps what is given, not what it makes
        if name.endswith(model.model.fusion.kept_in_fp32):
            parameter.data = parameter.data.float()
    model.name_or_path = model.config.name_or_path = ""  # it is saved nowhere; the loader says 'None'
    _copy_buffers(decoder_of(language_model)[1] if has_head else language_model, model.model.language_model)
    _check_language_model(model, language_model, has_head)
    _check_encoders(model)
    _make_room_for_image_token(model)
    if language_model.can_generate():
        model.generation_config = language_model.generation_config
    if "image_token_id" not in config_overrides:  # else it may be a word of the language model's own
        suppressed = {*(model.generation_config.suppress_tokens or ()), model.config.image_token_id}
        model.generation_config.suppress_tokens = sorted(suppressed)  # no picture would fill a generated placeholder
    return model


def _state_dict(skeleton: PreTrainedModel, parts: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The parts' weights, given by prefix, as they are called in `skeleton`, an Aurea without weights, and what starts
    otherwise than new.

    Weights for which there is no place, such as heads of encoders, are left out.

    Raises:
        ValueError: the parts lack weights that their places need.
    """
    places = skeleton.state_dict()
    for name in skeleton.all_tied_weights_keys:
        del places[name]
    added = {*BLOCK_NAMES, "composition"}
    blocks = {name: places.pop(name) for name in list(places) if {*name.split(".")} & added}
    state_dict = {
        prefix + name: tensor
        for prefix, weights in parts.items()
        for name, tensor in weights.items()
        if prefix + name in places
    }
    new = ("model.fusion.", "model.multi_modal_projector.", "model.image_position_embedding.")
    missing = sorted(name for name in places.keys() - state_dict.keys() if not name.startswith(new))
    if missing:
        raise ValueError(f"The parts lack {len(missing)} of the weights that their places need: {missing[:5]}…")
    if is_own_fusion(skeleton.config.fusion_class):  # which may begin its parameters otherwise than the loader would
        fusion = make_fusion(skeleton.config)
        state_dict |= {f"model.fusion.{name}": tensor for name, tensor in fusion.state_dict().items()}
    zero_layers = tuple(f"{layer}.weight" for layer in (*ZERO_LAYERS, *AureaCompositionLayer.zero_layers))
    zeros = {name: torch.zeros(place.shape) for name, place in blocks.items() if name.endswith(zero_layers)}
    return state_dict | zeros


def _language_model_weights(language_model: PreTrainedModel, has_head: bool) -> dict[str, torch.Tensor]:
    """By the names that they have in an Aurea."""
    weights = language_model.state_dict()
    if not has_head:
        return {f"model.language_model.{name}": tensor for name, tensor in weights.items()}
    prefix, known = decoder_of(language_model)[0], set()
    for name, tensor in weights.items():
        if tensor.data_ptr() in known:  # tied there, and perhaps not here
            weights[name] = tensor.clone()
        known.add(tensor.data_ptr())
    return {name_in_owner(name, prefix, "model.language_model"): tensor for name, tensor in weights.items()}


@torch.no_grad()
def _check_language_model(model: PreTrainedModel, language_model: PreTrainedModel, has_head: bool):
    """Shows a few tokens to an Aurea and to the language model that it is made of.

    Raises:
        ValueError: they differ.
    """
    ids = [idx for idx in range(5) if idx != model.config.image_token_id][:4]
    input_ids = torch.tensor([ids])
    if has_head:
        ours, theirs = (part(input_ids).logits for part in (model, language_model.eval()))
    else:
        ours, theirs = (part(input_ids).last_hidden_state for part in (model.model, language_model.eval()))
    difference, largest = (ours.float() - theirs.float()).abs().max(), theirs.float().abs().max()
    # Rounding is not looked for: attention may be computed by another implementation, or in another precision.
    is_half = torch.finfo(ours.dtype).bits < 32 or torch.finfo(theirs.dtype).bits < 32
    if not difference <= largest * (0.05 if is_half else 1e-3):
        raise ValueError(
            f"`text` is of type '{language_model.config.model_type}', which is not itself inside an Aurea: for the "
            f"tokens {ids} its outputs differ by {difference:.3g}, the largest being {largest:.3g}. Choose another "
            "language model, and please report this one."
        )


def _copy_buffers(source: nn.Module, target: nn.Module):
    """What a decoder holds beside its weights: rotary frequencies, which `.to(dtype)` has rounded along with it."""
    for name, buffer in source.named_buffers():
        path, _, leaf = name.rpartition(".")
        setattr(target.get_submodule(path), leaf, buffer.clone())


@torch.no_grad()
def _check_encoders(model: PreTrainedModel):
    """Shows the encoders two blank pictures.

    Raises:
        ValueError: an encoder does not give the features of each patch that its configuration promises.
    """
    pictures = torch.zeros(2, len(model.config.views), 3, *model.config.canvas)
    for name, size in zip(model.config.encoder_configs, model.config.feature_sizes):
        name = name.removesuffix("_config")
        encoder = model.model.get_submodule(f"{name}_model")
        expected = (2, *encoder.view.feature_shape, size)
        try:
            _, features = encoder.encode(pictures)
            if features.shape != expected:
                raise ValueError(f"its features have the shape {tuple(features.shape)}, not {expected}")
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # it wants something else
            raise ValueError(f"`{name}` ({type(encoder).__name__}) cannot serve as an encoder: {error}") from error


@torch.no_grad()
def _make_room_for_image_token(model: PreTrainedModel):
    """Embeddings up to the image token's id, the new ones being the mean of the others."""
    old_size = model.get_input_embeddings().num_embeddings
    if model.config.image_token_id < old_size:
        return
    model.resize_token_embeddings(model.config.image_token_id + 1, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight[old_size:] = module.weight[:old_size].float().mean(dim=0)


def view_settings(part: Part, size: tuple[int, int], prefix: str) -> dict:
    """An encoder's view as an image processor's settings, their names behind `prefix`: all of the picture, at `size`.

    Mean, standard deviation and interpolation are those of the image processor where the part comes from, if any.
    """
    settings = {"size": dict(zip(("height", "width"), size)), "crop_size": None}
    source = part.config.name_or_path if isinstance(part, PreTrainedModel) else part
    try:
        own = BaseImageProcessor.get_image_processor_dict(source)[0] if source else {}
    except OSError:
        own = {}
    if not own:
        logger.warning(
            f"No image processor was found for the encoder {source or type(part).__name__}. Its view is normalised as "
            f"AureaImageProcessor does by default; see `{prefix}image_mean`, `{prefix}image_std`, `{prefix}resample`."
        )
    settings |= {name: own[name] for name in ("image_mean", "image_std", "resample") if own.get(name) is not None}
    if not own.get("do_normalize", True):
        settings |= {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    return {f"{prefix}{name}": value for name, value in settings.items()}


def load_tokenizer(text: Part, tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None):
    """The tokenizer given, else that of the language model, with the image token as one of its special tokens.

    The image token is the tokenizer's own `image_token` or else `<|image|>`, which is added unless it exists. A
    tokenizer that is given as an object stays as it is; a copy of it is extended.

    Raises:
        ValueError: there is no tokenizer.
    """
    if tokenizer is None:
        tokenizer = text.config.name_or_path if isinstance(text, PreTrainedModel) else text
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer = copy.deepcopy(tokenizer)
    else:
        try:
            if not tokenizer:
                raise ValueError("`text` is a model that was not loaded from anywhere.")
            source, tokenizer = tokenizer, AutoTokenizer.from_pretrained(tokenizer)
            if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
                raise ValueError(f"{source} has no vocabulary.")  # loaders are content with a configuration alone
        except Exception as error:  # what the tokenizers library raises has no other type
            raise ValueError(
                f"No tokenizer could be loaded. Give one as `tokenizer`, or, for the model alone, `image_token_id`. "
                f"The reason: {error}"
            ) from error
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [image_token(tokenizer)]}, replace_extra_special_tokens=False
    )
    return tokenizer


def image_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The placeholder of a picture: the tokenizer's `image_token` where it has one, else `<|image|>`."""
    return getattr(tokenizer, "image_token", None) or IMAGE_TOKEN


__all__ = [
    "IMAGE_TOKEN",
    "AureaFromPartsMixin",
    "Part",
    "check_overrides",
    "encoder_config",
    "image_token",
    "load_encoder",
    "load_language_model",
    "load_tokenizer",
    "parts_config",
    "view_settings",
]
