# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What an Aurea is, for those tools that look it up in transformers' tables of model types and class names.

    table                 who reads it
    causal language       `Trainer`: with label smoothing it shifts the labels for the classes in it alone, and trains
    models                every other one to predict the token that it reads
    images and text       `transformers serve`: a model whose type is in neither of these it does not load, and one
    multimodal            whose class is in neither it does not talk to; the pipeline of remote code; TRL's online DPO

The Auto classes read these tables too, but only for types that transformers itself has: theirs is what was registered.
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
