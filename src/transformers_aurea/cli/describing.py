# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What a model is made of, told by its configuration. Imports torch: for `run` alone."""

from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from ..hub_kernels_aurea import usable_kernel
from ..training_aurea import GROUP_MODULES, STAGES, parameter_groups, set_trainable
from .answering import load_config


ESTIMATE = "an estimate: weights, gradients and AdamW's two states in the weights' types, without activations"
UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def describe(model: str | None, dtype: str = "auto", trust_remote_code: bool = False) -> dict:
    """All that `aurea info` says, as numbers of parameters and bytes. Nothing is allocated.

    Raises:
        ValueError: there is no such model, or it is no Aurea.
    """
    folder, config = load_config(model, trust_remote_code)
    dtype = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        built = AutoModelForImageTextToText.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    groups = {name: list(parameters.values()) for name, parameters in parameter_groups(built).items()}
    everything = list(built.parameters())
    inference = num_bytes(everything) + num_bytes(built.buffers())
    return {
        "model": folder,
        "class": type(built).__name__,
        "parameters": sum(p.numel() for p in everything),
        "parts": {name: describe_part(built, name, group) for name, group in groups.items() if group},
        "views": {name.removesuffix("_config"): list(view.size) for name, view in config.views.items()},
        "fusion": describe_fusion(config),
        "connector": config.connector_type,
        "visual_tokens_per_image": config.tokens_per_image,
        "placeholders_per_image": config.placeholders_per_image,
        "memory": {"note": ESTIMATE, "inference_bytes": inference},
        "stages": {
            stage: describe_stage(built, stage, inference)
            for stage, trained in STAGES.items()
            if any(groups[group] for group in trained)
        },
        "kernel": describe_kernel(built),
    }


def describe_part(model: PreTrainedModel, group: str, parameters: list[nn.Parameter]) -> dict:
    """Classes, parameters by type, and bytes of one group."""
    modules = {}
    for name, module in model.named_modules():
        modules.setdefault(name.rpartition(".")[2], type(module).__name__)  # the outermost of a name
    counts = Counter()
    for parameter in parameters:
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return {
        "classes": sorted({modules[name] for name in GROUP_MODULES[group] if name in modules}),
        "parameters": sum(counts.values()),
        "dtypes": dict(counts),
        "bytes": num_bytes(parameters),
    }


def describe_fusion(config) -> dict:
    fusion = config.feature_fusion_config.to_dict()
    return {name: fusion[name] for name in ("fusion_type", "radius", "depth") if name in fusion}


def describe_stage(model: PreTrainedModel, stage: str, inference: int) -> dict:
    report = set_trainable(model, stage)
    trained = num_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    return {
        "trainable": report.trainable,
        "share": report.trainable / report.total,
        "gradient_bytes": trained,
        "adamw_bytes": 2 * trained,
        "bytes": inference + 3 * trained,
    }


def describe_kernel(model: PreTrainedModel) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"device": device} | usable_kernel(model, torch.device(device))._asdict()


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def readable(size: int) -> str:
    for unit, name in UNITS:
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


def write(found: dict) -> None:
    """Prints what `describe` found."""
    print(f"{found['model']}: {found['class']}, {found['parameters']:,} parameters\n")
    print(f"{'part':<16} {'parameters':>14} {'memory':>10}  type, class")
    for name, part in found["parts"].items():
        kinds = f"{'+'.join(part['dtypes'])}, {', '.join(part['classes'])}"
        print(f"{name:<16} {part['parameters']:>14,} {readable(part['bytes']):>10}  {kinds}")
    fusion = ", ".join(f"{name.removeprefix('fusion_')} {value}" for name, value in found["fusion"].items())
    views = ", ".join(f"{name} {height}×{width}" for name, (height, width) in found["views"].items())
    print(f"\nviews of a picture: {views}")
    print(f"fusion: {fusion}")
    print(f"connector: {found['connector']}, {found['visual_tokens_per_image']} visual tokens a picture")
    print(f"\nmemory ({found['memory']['note']})")
    print(f"{'inference':<16} {readable(found['memory']['inference_bytes']):>10}")
    for name, stage in found["stages"].items():
        trained = f"{stage['trainable']:,} parameters train, {stage['share']:.1%}"
        print(f"{'train ' + name:<16} {readable(stage['bytes']):>10}  {trained}")
    kernel = found["kernel"]
    print(f"\nfusion with --use_kernels, on {kernel['device']}: {kernel['implementation']}, {kernel['reason']}")
