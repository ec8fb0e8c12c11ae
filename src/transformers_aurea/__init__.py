# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Aurea for Hugging Face Transformers. Importing the package registers its classes with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_aurea import AureaConfig, AureaFusionConfig
from .generation_aurea import NEUTRAL_SAMPLING, DynamicTopKLogitsWarper, published_sampling
from .hub_kernels_aurea import KernelStatus, configure_kernel, kernel_status
from .image_processing_aurea import AureaImageProcessor
from .modeling_aurea import AureaForConditionalGeneration, AureaModel, AureaPreTrainedModel
from .processing_aurea import AureaProcessor
from .spatial_range_attention_aurea import neighborhood_aggregate, spatial_range_weights


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

__version__ = "0.1.0"

__all__ = [
    "NEUTRAL_SAMPLING",
    "AureaConfig",
    "AureaForConditionalGeneration",
    "AureaFusionConfig",
    "AureaImageProcessor",
    "AureaModel",
    "AureaPreTrainedModel",
    "AureaProcessor",
    "DynamicTopKLogitsWarper",
    "KernelStatus",
    "configure_kernel",
    "kernel_status",
    "neighborhood_aggregate",
    "published_sampling",
    "spatial_range_weights",
]
