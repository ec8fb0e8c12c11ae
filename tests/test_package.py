# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The names that the package shows."""

import subprocess
import sys

import transformers_aurea


IMPORTABLE = [
    "GROUP_MODULES",
    "LORA_TARGETS",
    "NEUTRAL_SAMPLING",
    "PARAMETER_GROUPS",
    "STAGES",
    "AureaConfig",
    "AureaDataCollator",
    "AureaForConditionalGeneration",
    "AureaFusionConfig",
    "AureaImageProcessor",
    "AureaModel",
    "AureaPreTrainedModel",
    "AureaProcessor",
    "AuxiliaryLossLogger",
    "DynamicTopKLogitsWarper",
    "GroupGradientNorms",
    "AureaKernelStatus",
    "SpatialRangeEntropy",
    "TrainableReport",
    "check_dataset",
    "configure_kernel",
    "embedded_model_path",
    "feature_consistency_loss",
    "feature_diversity",
    "feature_diversity_loss",
    "kernel_status",
    "linear_cka",
    "load_llava_dataset",
    "lora_targets",
    "modules_not_to_quantize",
    "neighborhood_aggregate",
    "parameter_groups",
    "published_sampling",
    "set_trainable",
    "spatial_range_weights",
    "to_chat_rows",
]
"""Every name of `__all__` in version 0.1."""

MAIN = [
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


def test_every_name_is_importable_and_shown():
    for name in IMPORTABLE:
        assert getattr(transformers_aurea, name) is not None
    assert set(dir(transformers_aurea)) >= {*IMPORTABLE, "__version__", "__all__"}


def test_the_main_names_are_few():
    assert sorted(transformers_aurea.__all__) == MAIN
    namespace = {}
    exec("from transformers_aurea import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(MAIN)


def test_names_are_shown_before_their_modules_are_imported():
    script = """
import sys
import transformers_aurea

names = dir(transformers_aurea)
assert "set_trainable" in names and names == sorted(set(names)), names
assert "transformers_aurea.training_aurea" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
