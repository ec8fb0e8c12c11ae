# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What an Aurea is, for the tools that look it up by name in transformers' tables of model types and classes.

    causal language models    `Trainer`, which shifts the labels for label smoothing for the classes in it alone, and
                              trains any other to predict the token that it reads
    images and text           the pipeline, where nothing is registered (remote code); TRL's online DPO
    multimodal models         `transformers serve`: it loads by the types, and tells by the classes what a model takes

The Auto classes read these tables for the types of transformers itself alone; to them an Aurea is what is registered.
"""

from transformers.models.auto import modeling_auto


def enter_name_tables() -> None:
    """Enters Aurea's model type and class name, unless its type has an entry already."""
    for table in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        table.setdefault("aurea", "AureaForConditionalGeneration")


__all__ = ["enter_name_tables"]
