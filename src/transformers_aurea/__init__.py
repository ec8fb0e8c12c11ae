# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Aurea for Hugging Face Transformers. Importing the package registers its classes with the Auto classes."""

from importlib import import_module
from typing import TYPE_CHECKING

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_aurea import AureaCompositionConfig, AureaConfig, AureaFusionConfig
from .embedded_model import embedded_model_path
from .fusion_aurea import AureaFusion, register_fusion
from .generation_aurea import NEUTRAL_SAMPLING, DynamicTopKLogitsWarper, published_sampling
from .hub_kernels_aurea import AureaKernelStatus, configure_kernel, kernel_status
from .image_processing_aurea import AureaImageProcessor
from .losses_aurea import feature_consistency_loss, feature_diversity, feature_diversity_loss, linear_cka
from .modeling_aurea import AureaForConditionalGeneration, AureaModel, AureaPreTrainedModel
from .processing_aurea import AureaProcessor
from .spatial_range_attention_aurea import neighborhood_aggregate, spatial_range_weights


if TYPE_CHECKING:
    from .data_aurea import (
        AureaDataCollator,
        check_dataset,
        load_llava_dataset,
        to_chat_row,
        to_chat_rows,
        with_lengths,
    )
    from .training_aurea import (
        GROUP_MODULES,
        LORA_TARGETS,
        PARAMETER_GROUPS,
        STAGES,
        AuxiliaryLossLogger,
        CompositionEntropy,
        GroupGradientNorms,
        SpatialRangeEntropy,
        TrainableReport,
        lora_targets,
        modules_not_to_quantize,
        parameter_groups,
        set_trainable,
    )

# Imported when they are asked for: `Trainer` and what it brings take seconds.
_TRAINING = {
    "data_aurea": (
        "AureaDataCollator",
        "check_dataset",
        "load_llava_dataset",
        "to_chat_row",
        "to_chat_rows",
        "with_lengths",
    ),
    "training_aurea": (
        "GROUP_MODULES",
        "LORA_TARGETS",
        "PARAMETER_GROUPS",
        "STAGES",
        "AuxiliaryLossLogger",
        "CompositionEntropy",
        "GroupGradientNorms",
        "SpatialRangeEntropy",
        "TrainableReport",
        "lora_targets",
        "modules_not_to_quantize",
        "parameter_groups",
        "set_trainable",
    ),
}


def __getattr__(name: str):
    for module, names in _TRAINING.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for names in _TRAINING.values() for name in names)})


AutoConfig.register("aurea", AureaConfig)
AutoModel.register(AureaConfig, AureaModel)
AutoModelForImageTextToText.register(AureaConfig, AureaForConditionalGeneration)
AutoModelForMultimodalLM.register(AureaConfig, AureaForConditionalGeneration)
AutoImageProcessor.register(AureaConfig, AureaImageProcessor)
AutoProcessor.register(AureaConfig, AureaProcessor)

# With these, `save_pretrained` writes the code beside the weights, and the folder loads without this package.
AureaConfig.register_for_auto_class()
AureaModel.register_for_auto_class("AutoModel")
AureaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
AureaImageProcessor.register_for_auto_class()
AureaProcessor.register_for_auto_class()

KernelStatus = AureaKernelStatus  # its former name

__version__ = "0.1.0"

# What most need. The other names stay importable from here.
__all__ = [
    "AureaConfig",
    "AureaForConditionalGeneration",
    "AureaImageProcessor",
    "AureaModel",
    "AureaProcessor",
    "configure_kernel",
    "embedded_model_path",
    "kernel_status",
    "published_sampling",
    "set_trainable",
]
