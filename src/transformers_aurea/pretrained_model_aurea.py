# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What both of Aurea's models are to transformers: how they load, are saved, quantised, sharded and initialised."""

import os

import torch
from huggingface_hub import HfApi, ModelCard
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import CONFIG_NAME

from .configuration_aurea import AureaConfig
from .cross_attention_aurea import AureaCrossAttentionBlock
from .hub_kernels_aurea import AureaHubKernelsMixin
from .model_card_aurea import FILE_NAME, MODEL_TAGS, model_card, write_model_card
from .vision_encoder_aurea import encoder_attention


if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    FSDP_CLASSES = (FSDPModule, FullyShardedDataParallel)
else:
    FSDP_CLASSES = ()


class AureaPreTrainedModel(AureaHubKernelsMixin, PreTrainedModel):
    config: AureaConfig
    config_class = AureaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache", "visual_cache", "cross_attentions"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: AureaConfig, *args, **kwargs):
        config.validate_architecture()  # fields may have changed since, and a radius of any size would be built
        super().__init__(config, *args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """That of the language model; the first parameters, by which it is told otherwise, are an encoder's."""
        return self.get_decoder().dtype

    @classmethod
    def is_custom_code(cls) -> bool:
        # Custom code that fills tensors in place is kept from modules whose parameters are loaded, and with them from
        # modules that have none of their own, SigLIP's attention among them. This code uses
        # `transformers.initialization`, which knows what is loaded.
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if module is self.base_model.fusion:
            module.init_weights()
        if module is self.base_model.image_position_embedding:
            init.normal_(module.weight)  # visual tokens are not normalised, and words' range would be lost among them

    def post_init(self):
        fusion = self.base_model.fusion
        self._no_split_modules = [*(self._no_split_modules or ()), *fusion.no_split, "AureaCompositionLayer"]
        # The strict list is for loading in any half precision; quantisers read the other one, from the start of a
        # module's full name.
        self._keep_in_fp32_modules_strict = [f"fusion.*{name}" for name in fusion.kept_in_fp32]  # a glob
        self._keep_in_fp32_modules = [rf"(?:model\.)?fusion\.(?:.*\.)?{name}" for name in fusion.not_quantized]
        if self.config.encoder_dtype == "float32":
            self._keep_in_fp32_modules_strict += ["vision_model", "spatial_vision_model"]
            self._keep_in_fp32_modules += [r"(?:model\.)?(?:spatial_)?vision_model"]
        super().post_init()
        self.add_model_tags(MODEL_TAGS)  # for the cards of others: those of adapters, and `Trainer`'s
        # accelerate's FSDP refuses names of layers that the model does not have, such as SigLIP's of its text half.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    @property
    def is_gathered_by_all(self) -> bool:
        """Whether FSDP or ZeRO-3 gathers weights for each forward pass, in which all processes take part."""
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return False
        return is_deepspeed_zero3_enabled() or any(isinstance(module, FSDP_CLASSES) for module in self.modules())

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs):
        if isinstance(attn_implementation, str):  # an encoder that lacks it would refuse
            encoders = {
                name: encoder_attention(config, attn_implementation)
                for name, config in self.config.encoder_configs.items()
            }
            everything = dict.fromkeys(["", *self.config.sub_configs], attn_implementation)
            attn_implementation = everything | encoders
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, *args, **kwargs):
        """As transformers has it, and a model with a head leaves a model card beside it, unless there is one."""
        # Under the model's own names, not those that an older transformers had: by these alone `Trainer` resumes, and
        # would leave all other weights as they were.
        kwargs.setdefault("save_original_format", False)
        # `fully_shard` puts a class of its own before the model's, and that would be saved as the code to load.
        full_class = type(self)
        if isinstance(self, FSDP_CLASSES):
            self.__class__ = full_class.__mro__[2]
        try:
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
        finally:
            self.__class__ = full_class
        has_config = os.path.isfile(os.path.join(save_directory, CONFIG_NAME))  # a folder of adapters alone has none
        if has_config and self.can_generate() and self.should_save_on_this_rank(is_main_process):
            write_model_card(self, save_directory)

    def _upload_modified_files(self, working_dir: str | os.PathLike, repo_id: str, *args, **kwargs):
        """A repository that has a model card keeps it; to one that has none goes ours, not transformers' blank one."""
        if self.can_generate() and not HfApi().file_exists(repo_id, FILE_NAME, token=kwargs.get("token")):
            file = os.path.join(working_dir, FILE_NAME)
            card = model_card(self, repo_id.rpartition("/")[2], repo_id)
            card.data.tags = [*dict.fromkeys([*card.data.tags, *(ModelCard.load(file).data.tags or ())])]
            card.save(file)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def initialize_weights(self):
        # The blocks first: they stand inside the language model, whose own rules would be applied to them (Gemma
        # starts norms at zero, which would silence queries and keys).
        for block in self.modules():
            if isinstance(block, AureaCrossAttentionBlock):
                with torch.no_grad(), init.guard_torch_init_functions():
                    block.apply(self._initialize_weights)
        super().initialize_weights()


def aurea_model(model: nn.Module) -> nn.Module:
    """The `AureaModel` inside; found by its parts, for remote code brings another class of that name."""
    for module in model.modules():
        if {"fusion", "language_model"} <= dict(module.named_children()).keys():
            return module
    raise ValueError(f"{type(model).__name__} holds no Aurea: it has no `fusion` beside a `language_model`.")


__all__ = ["AureaPreTrainedModel", "aurea_model"]
