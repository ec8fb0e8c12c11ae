# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A second vision encoder for a model that has one, and that begins by not looking at it.

    features ─ projector ─ decoder      ─►      features, those of the new encoder ─ fusion ─ projector ─ decoder

What was there stays the same object. Encoder, fusion and composition are new, and added once they were seen to work.
"""

import copy
from dataclasses import fields

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .composition_aurea import AureaComposition, AureaCompositionLayer, look_through
from .configuration_aurea import AureaConfig, AureaFusionConfig
from .connectors_aurea import AureaConnector
from .fusion_aurea import FUSIONS, AureaFusion
from .fusion_promises_aurea import fuse, make_fusion
from .own_fusion_aurea import is_own_fusion
from .parts_aurea import Part, encoder_config, load_encoder
from .projector_aurea import AureaMultiModalProjector
from .vision_encoder_aurea import in_evaluation_mode, make_encoder


ENCODERS = ("vision", "spatial_vision")
# Of an encoder, after its name in the configuration.
SETTINGS = ("image_size", "feature_layer", "feature_select_strategy")


class AureaAddedEncoderMixin:
    """A model with a language modelling head that may be given a second encoder."""

    @torch.no_grad()
    def add_encoder(
        self,
        encoder: Part,
        *,
        feature_fusion_config: dict | None = None,
        composition_config: dict | None = None,
        keep_outputs: bool = True,
        **settings,
    ) -> None:
        r"""
        Gives a model of one encoder a second one, and a fusion or a composition of the two, in place.

        Until it is trained the model answers as before, bit for bit (but on a GPU with TF32 on), though its processor
        has to make two views, see [`AureaProcessor.add_encoder`]. What is new would train along with everything else;
        `set_trainable` chooses.

        Args:
            encoder (`str`, `os.PathLike` or `PreTrainedModel`):
                A hub id, a folder, or a model, which is copied; of a model with more than a vision encoder, that one.
                It becomes the spatial encoder, or the semantic one of a model that has a spatial one alone.
            feature_fusion_config (`dict`, *optional*):
                The fusion, by default `"concat"`, or none beside a composition. With `keep_outputs`, `output_dim`,
                `norm_features` and `encoder` are what goes with the first encoder unless they are given.
            composition_config (`dict`, *optional*):
                A composition of the two, for a model whose first encoder is the semantic one.
            keep_outputs (`bool`, *optional*, defaults to `True`):
                Whether the tokens of a picture must be those of before, which not every fusion can begin with.
                Otherwise the fusion begins anew, the projector too if its tokens are wider or narrower.
            settings:
                `image_size`, `feature_layer` and `feature_select_strategy` of the new encoder, as [`AureaConfig`] has
                them for each. By default its grid is that of the first.

        Raises:
            OSError: `encoder` cannot be found.
            TypeError: it is no model, or a setting is unknown.
            ValueError: the model has two encoders already, or is quantized or sharded; the new one does not fit; or
                the fusion cannot begin as the first encoder alone.
        """
        base, first = self.model, _only_encoder(self)
        [second] = {*ENCODERS} - {first}
        if unknown := sorted({*settings} - {*SETTINGS}):
            raise TypeError(f"`add_encoder` has no argument {unknown}. Of the new encoder there are {[*SETTINGS]}.")
        fusion_config = _fusion_config(base, first, feature_fusion_config, composition_config, keep_outputs)
        config = _grown(
            base.config,
            feature_fusion_config=fusion_config,
            composition_config=composition_config,
            **{f"{second}_config": encoder_config(encoder, "encoder")},
            **{f"{second}_{name}": value for name, value in settings.items()},
        )
        if f"{second}_config" not in config.encoder_configs:
            raise ValueError(
                f"The fusion '{config.feature_fusion_config.fusion_type}' reads {first} alone: the new encoder would "
                "not be there. Choose a fusion of two, or give a `composition_config`."
            )
        parts = _new_parts(base, config, first, second, encoder, keep_outputs)
        if keep_outputs:
            _check_same_tokens(base, config, parts)
        _take(self, config, parts, {"text_config", f"{first}_config"})


def _only_encoder(model: PreTrainedModel) -> str:
    if len(model.config.encoder_configs) == 2:
        raise ValueError("The model has two encoders already, and there is no place for a third.")
    if model.config.to_dict().get("quantization_config") or model.is_gathered_by_all:
        raise ValueError("The model is quantized or sharded. Add an encoder first, save it, and load it so.")
    [name] = model.config.encoder_configs
    return name.removesuffix("_config")


def _fusion_config(base, first: str, given: dict | None, composition: dict | None, keep_outputs: bool) -> dict:
    single = base.fusion
    settings = {"fusion_type": "concat" if composition is None else "none"} | (given or {})
    if settings["fusion_type"] == "none":
        return base.config.feature_fusion_config.to_dict() | settings
    if keep_outputs:
        fusion_class = AureaFusionConfig(**settings).fusion_class
        able = [name for name, known in FUSIONS.items() if known.begin_as is not AureaFusion.begin_as]
        if fusion_class not in map(FUSIONS.get, able):
            raise ValueError(
                f"The fusion '{settings['fusion_type']}' cannot begin as one encoder alone. Choose one that can "
                f"({', '.join(map(repr, able))}), or `keep_outputs=False`, and train what reads it."
            )
        stem = {"output_dim": single.output_dim, "norm_features": not single.is_identity, "encoder": first}
        return stem | settings
    return {"encoder": first} | settings


def _grown(config: AureaConfig, **changes) -> AureaConfig:
    """A new one of copies of the same parts with these changes, which it refuses where they do not fit."""
    settings = {field.name: vars(config)[field.name] for field in fields(config)}
    return type(config)(**copy.deepcopy(settings) | changes)


def _take(model: PreTrainedModel, config: AureaConfig, parts: dict[str, nn.Module | None], kept: set[str]) -> None:
    """Parts, and settings but those `kept`, become the model's, whose configuration stays the object it is."""
    base = model.model
    for name, part in parts.items():
        setattr(base, name, part)
    for name in {field.name for field in fields(config)} - kept:
        setattr(base.config, name, vars(config)[name])
    base.connector = AureaConnector(base.config)
    for one in (base, model):
        one._no_split_modules |= _layers_not_to_split(parts)


def _new_parts(
    base: PreTrainedModel, config: AureaConfig, first: str, second: str, part: Part, keep_outputs: bool
) -> dict[str, nn.Module | None]:
    """Both encoders, fusion and composition, and a projector if the fusion is wider, by their names in the model."""
    name, device = f"{second}_config", base.get_submodule(f"{first}_model").device
    config.encoder_configs[name]._attn_implementation = base.config._attn_implementation
    encoder, weights = make_encoder(config, name), load_encoder(part)
    if missing := encoder.load_state_dict(weights, strict=False).missing_keys:
        raise ValueError(f"`encoder` lacks {len(missing)} of its weights: {missing[:5]}…")
    encoder.to(device, torch.float32 if config.encoder_dtype == "float32" else base.dtype)
    parts = {f"{first}_model": base.get_submodule(f"{first}_model"), f"{second}_model": encoder}
    parts |= {"fusion": base.fusion, "composition": None}
    if config.feature_fusion_config.fusion_type != "none":
        parts["fusion"] = _filled(base, make_fusion(config), device)
        if keep_outputs:
            parts["fusion"].begin_as(base.fusion)
        if parts["fusion"].output_dim != base.fusion.output_dim:
            projector = AureaMultiModalProjector(config, parts["fusion"].output_dim)
            parts["multi_modal_projector"] = _filled(base, projector, device)
    if config.composition_config is not None:
        composition = parts["composition"] = _filled(base, AureaComposition(config, parts["vision_model"]), device)
        for name, parameter in composition.named_parameters():
            if name.endswith(tuple(f"{layer}.weight" for layer in AureaCompositionLayer.zero_layers)):
                parameter.zero_()
    for module in parts.values():
        if module is not None:
            module.train(base.training)
    return parts


def _layers_not_to_split(parts: dict[str, nn.Module | None]) -> set[str]:
    """Names of classes, as a model declares them."""
    encoders = (parts[f"{name}_model"] for name in ENCODERS)
    declared = {name for encoder in encoders for name in encoder._no_split_modules or ()}
    declared |= {*parts["fusion"].no_split, AureaCompositionLayer.__name__}
    return declared & {type(module).__name__ for part in parts.values() if part for module in part.modules()}


def _filled(base: PreTrainedModel, module: nn.Module, device: torch.device) -> nn.Module:
    """As a new model's, in the dtype of this one."""
    if not is_own_fusion(type(module)) or not isinstance(module, AureaFusion):
        with init.guard_torch_init_functions():
            module.apply(base._initialize_weights)
            if isinstance(module, AureaFusion):
                module.init_weights()
    precise = module.kept_in_fp32 if isinstance(module, AureaFusion) else ()
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(device, torch.float32 if name.endswith(precise) else base.dtype)
    return module.to(device)


def _check_same_tokens(base: PreTrainedModel, config: AureaConfig, parts: dict[str, nn.Module | None]) -> None:
    """Shows a picture of noise to the model as it is, and to its new parts.

    Raises:
        ValueError: the tokens differ.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, len(config.views), 3, *config.canvas, generator=generator)
    pixels = pixels.to(base.get_encoder(modality="image").device)

    def tokens(config: AureaConfig, vision_model, spatial_vision_model, composition, fusion) -> torch.Tensor:
        encoders = look_through(vision_model, spatial_vision_model, composition, pixels)
        features = [one if one is None else one.to(base.dtype) for _, one in encoders]
        return fuse(config, fusion, features)[0]

    modules = [module for part in parts.values() if part is not None for module in part.modules()]
    with in_evaluation_mode(modules):
        before = tokens(base.config, **{name: getattr(base, name) for name in parts})
        after = tokens(config, **parts)
    if not torch.equal(before, after):
        difference = (before - after).abs().max() if before.shape == after.shape else "their number"
        raise ValueError(
            f"With the fusion '{config.feature_fusion_config.fusion_type}' the tokens of a picture are not those of "
            f"before: they differ by {difference}. Choose another fusion, or `keep_outputs=False`."
        )


__all__ = ["AureaAddedEncoderMixin"]
