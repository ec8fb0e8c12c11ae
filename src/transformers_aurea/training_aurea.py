# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What a training run says about Aurea's parts: which of them train, which get adapters, which stay unquantised, and
what each of them is doing meanwhile.

    set_trainable(model, "align")                                       the first stage of training
    LoraConfig(target_modules=lora_targets(model, "language_model"))    adapters; never on an encoder
    BitsAndBytesConfig(llm_int8_skip_modules=modules_not_to_quantize()) 4-bit loading
    GroupGradientNorms().attach(trainer)                                more figures beside the loss

All of it goes by seven groups of parameters, `PARAMETER_GROUPS`, which any Aurea has, whatever wraps it.
"""

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_outputs import ModelOutput
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from .cross_attention_aurea import BLOCK_NAMES
from .pretrained_model_aurea import aurea_model


logger = logging.get_logger(__name__)

# The modules that make up each group. The blocks stand inside the language model and are a group of their own. For
# PEFT's `modules_to_save`, chain those of the groups that train in full beside an adapter.
GROUP_MODULES = {
    "vision": ("vision_model",),
    "spatial_vision": ("spatial_vision_model",),
    "composition": ("composition",),
    "fusion": ("fusion",),
    "projector": ("multi_modal_projector", "image_position_embedding"),
    "cross_attention": BLOCK_NAMES,
    "language_model": ("language_model", "lm_head"),
}
PARAMETER_GROUPS = tuple(GROUP_MODULES)

# The published weights came of two stages, captions and then LLaVA-1.5's instructions, with both encoders frozen.
# https://github.com/Dcas89/Aurea
# A composition trains before them or between them, alone, and is then frozen: https://arxiv.org/abs/2401.02412
STAGES = {
    "compose": ("composition",),
    "align": ("fusion", "projector", "cross_attention"),
    "instruct": ("fusion", "projector", "cross_attention", "language_model"),
    "full": PARAMETER_GROUPS,
}

# Presets of adapters, by the groups whose linear layers they hit. Never an encoder's.
LORA_TARGETS = {
    group: (group,) for group in ("language_model", "cross_attention", "composition", "fusion", "projector")
}
LORA_TARGETS["all"] = tuple(LORA_TARGETS)

# Of the language model, whose layers have others beside: a Mamba layer's take no adapter.
_DECODER_PROJECTIONS = re.compile(
    r".*(?:\.(?:qkv_proj|[qkvo]_proj|query_key_value|c_attn|c_proj|dense"  # attention
    r"|(?:q|kv)_[ab]_proj(?:_with_mqa)?"  # with latent keys and values
    r"|gate_up_proj|(?:gate|up|down)_proj|c_fc|fc[12]|w[123]|dense_h_to_4h|dense_4h_to_h)"  # MLP
    r"|attn\.(?:in_proj_\w+|out_proj))"  # linear attention
)


def _find_group(name: str) -> str | None:
    """The group of a parameter or module, by its full name, inside whatever wrappers; None if it is in none."""
    parts = name.split(".")
    if any(part in GROUP_MODULES["cross_attention"] for part in parts):
        return "cross_attention"
    for part in parts:
        for group, modules in GROUP_MODULES.items():
            if part in modules:
                return group
    return None


def parameter_groups(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The model's parameters by group and name: a partition of `model.named_parameters()`, empty groups included.

    Tied embeddings and `lm_head` belong to the language model, an adapter to the module that it adapts.

    Args:
        model: an Aurea with or without head, also inside a `PeftModel`, DistributedDataParallel or FSDP.

    Raises:
        ValueError: if a parameter is in no group, that is, the model is not an Aurea.
    """
    groups = {group: {} for group in PARAMETER_GROUPS}
    for name, parameter in model.named_parameters():
        group = _find_group(name)
        if group is None:
            parts = ", ".join(PARAMETER_GROUPS)
            raise ValueError(f"The parameter '{name}' is in none of the parts of an Aurea ({parts}).")
        groups[group][name] = parameter
    return groups


def _num_elements(parameter: nn.Parameter) -> int:
    if type(parameter).__name__ == "Params4bit":  # two to a byte, in a storage of any dtype
        return 2 * parameter.numel() * parameter.element_size()
    return getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves an empty tensor in its place


class TrainableReport(dict):
    """Trainable and total number of parameters, `{group: (trainable, total)}`; printed, a table."""

    @classmethod
    def of(cls, model: nn.Module) -> "TrainableReport":
        """The report of a model as it is. Arguments and errors are those of [`parameter_groups`]."""
        report = cls()
        for group, parameters in parameter_groups(model).items():
            sizes = [(_num_elements(p), p.requires_grad) for p in parameters.values()]
            report[group] = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
        return report

    @property
    def trainable(self) -> int:
        return sum(trainable for trainable, _ in self.values())

    @property
    def total(self) -> int:
        return sum(total for _, total in self.values())

    def __str__(self) -> str:
        rows = [f"{'group':<16}{'trainable':>16}{'total':>16}{'share':>9}"]
        for group, (trainable, total) in [*self.items(), ("all", (self.trainable, self.total))]:
            rows.append(f"{group:<16}{trainable:>16,}{total:>16,}{trainable / max(total, 1):>9.2%}")
        return "\n".join(rows)


def set_trainable(model: nn.Module, groups: str | Iterable[str]) -> TrainableReport:
    """Let exactly these groups train, and freeze the rest. Frozen encoders keep no activations.

    A frozen part still drops out in training mode, if its own config has any dropout.

    Args:
        model: an Aurea, before it is wrapped.
        groups: names of `PARAMETER_GROUPS` or `STAGES`, or `"all"`; one or several. None at all freezes everything.

    Returns:
        What trains now, and how many parameters that is.

    Raises:
        ValueError: if a name is unknown or its group has no parameters, the model has PEFT's adapters, or a weight
            that should train is quantised. Nothing is changed then.
    """
    names = [groups] if isinstance(groups, str) else list(groups)
    known = {"all": PARAMETER_GROUPS, **STAGES, **{group: (group,) for group in PARAMETER_GROUPS}}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"Unknown parameter groups {unknown}. There are the groups {', '.join(PARAMETER_GROUPS)} and the stages "
            f"{', '.join(STAGES)}."
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            "The model has adapters: weights beside them would train but not be saved with them. Name their modules "
            "in `LoraConfig(modules_to_save=...)` instead; `GROUP_MODULES` lists them by group."
        )
    parameters = parameter_groups(model)
    # Of a stage of several groups, what there is: a configuration may do without these.
    optional = ("vision", "spatial_vision", "composition", "fusion", "cross_attention")
    absent = {group for group in optional if not parameters[group]}
    chosen = {group for name in names for group in known[name] if group not in absent or len(known[name]) == 1}
    for group in chosen:
        if not parameters[group]:
            raise ValueError(f"The group '{group}' has no parameters in this {type(model).__name__}.")
        for name, parameter in parameters[group].items():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"'{name}' is quantised ({parameter.dtype}) and cannot train. Train an adapter on it, or keep "
                    f"the group as it is: `modules_not_to_quantize` with '{group}' among its groups."
                )
    for group in PARAMETER_GROUPS:
        for parameter in parameters[group].values():
            parameter.requires_grad_(group in chosen)
    return TrainableReport.of(model)


def lora_targets(model: nn.Module, *presets: str) -> str:
    """A pattern for `LoraConfig(target_modules=...)` that hits the linear layers of these presets and no encoder.

    Warns where the model comes from a folder, for adapters name their base by it.

    Args:
        model: an Aurea, before it is wrapped.
        presets: names of `LORA_TARGETS`: `"language_model"` (attention and MLP, fused or split projections),
            `"cross_attention"`, `"composition"`, `"fusion"`, `"projector"` or `"all"`.

    Raises:
        ValueError: if a preset is unknown, hits nothing in this model, or none is given.
    """
    if not presets or (unknown := [preset for preset in presets if preset not in LORA_TARGETS]):
        problem = f"Unknown LoRA presets {unknown}" if presets else "No LoRA preset was given"
        raise ValueError(f"{problem}. There are: {', '.join(LORA_TARGETS)}.")
    targets = []
    for preset in presets:
        found = [name for name, module in model.named_modules() if _takes_adapter(name, module, LORA_TARGETS[preset])]
        if not found:
            raise ValueError(
                f"The LoRA preset '{preset}' hits no module of this {type(model).__name__}. If the model is wrapped, "
                "give the one inside; if its layers have names of their own, write `target_modules` yourself."
            )
        targets += found
    if isinstance(model, PreTrainedModel) and os.path.isdir(model.name_or_path):
        logger.warning_once(
            f"Adapters will name their base by {model.name_or_path}, a folder of this machine, which nobody finds "
            "elsewhere. Publish it, and set `model.name_or_path` to its hub id before it gets adapters; or merge them."
        )
    # Layers of one kind are one pattern.
    return "|".join(sorted({re.sub(r"\d+", r"\\d+", re.escape(name)) for name in targets}))


def _takes_adapter(name: str, module: nn.Module, groups: tuple[str, ...]) -> bool:
    if not name or (group := _find_group(name)) not in groups:
        return False
    return bool(_DECODER_PROJECTIONS.fullmatch(name)) if group == "language_model" else isinstance(module, nn.Linear)


def modules_not_to_quantize(
    groups: str | Iterable[str] = ("vision", "spatial_vision", "composition", "fusion", "projector"),
) -> list[str]:
    """Patterns for `BitsAndBytesConfig(llm_int8_skip_modules=...)`: what must stay precise in 4-bit or 8-bit loading.

    By default the decoder and its cross-attention blocks are quantised, four fifths of what is not an encoder. Both
    encoders keep float32, as published; the fusion, whose small networks make attention weights, the composition and
    the projector keep the model's dtype, and so does the head always. Norms, embeddings and σ are no linear layers,
    and never quantised.

    Args:
        groups: names of `PARAMETER_GROUPS` that stay as they are. Add those that train in full beside an adapter.

    Raises:
        ValueError: if a name is unknown.
    """
    names = [groups] if isinstance(groups, str) else list(groups)
    if unknown := [name for name in names if name not in GROUP_MODULES]:
        raise ValueError(f"Unknown parameter groups {unknown}. There are: {', '.join(PARAMETER_GROUPS)}.")
    prefixes = {"cross_attention": r"(?:model\.)?language_model\..*\."}
    patterns = [prefixes.get(name, r"(?:model\.)?") + module for name in names for module in GROUP_MODULES[name]]
    return [*patterns, "lm_head"]


def _ends_in_log(args: TrainingArguments, state: TrainerState) -> bool:
    """Whether the step under way will be logged. Where epochs are, any step may be the last of one."""
    step = state.global_step + 1
    if args.logging_first_step and step == 1:
        return True
    if args.logging_strategy == IntervalStrategy.STEPS:
        return step % state.logging_steps == 0
    return args.logging_strategy == IntervalStrategy.EPOCH


def _mean_over_processes(sums: dict[str, tuple[float, int]]) -> dict[str, float]:
    """Means of sums and counts, of which each process may have others, over all processes."""
    totals = defaultdict(lambda: (0.0, 0))
    for process_sums in gather_object([sums]):
        for name, (value, count) in process_sums.items():
            total, total_count = totals[name]
            totals[name] = total + value, total_count + count
    return {name: total / count for name, (total, count) in totals.items()}


class TrainingLogger(TrainerCallback):
    """A callback that adds figures to the entry in which `Trainer` logs the loss.

    `logger.attach(trainer)` puts it before the trainer's own callbacks, so that whatever `report_to` names receives
    the figures too. Among `Trainer(callbacks=[...])` it comes after those, and only `state.log_history` and the
    console do.
    """

    def __init__(self):
        self._is_attached = False
        self._hooks = []

    def attach(self, trainer: Trainer) -> None:
        """Join the trainer's callbacks, as the first of them."""
        trainer.callback_handler.callbacks.insert(0, self)
        self._is_attached = True

    def take_sums(self, logs: dict[str, float]) -> dict[str, tuple[float, int]]:
        """What was measured since the last log, as a sum and a count by name; `logs` is the entry so far."""
        raise NotImplementedError

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._remove_hooks()
        if args.report_to and not self._is_attached:
            logger.warning(
                f"{', '.join(args.report_to)} will not receive the figures of {type(self).__name__}: they log before "
                f"it. Use `{type(self).__name__}().attach(trainer)` in place of `callbacks=[...]`."
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self._remove_hooks()

    def on_log(self, args, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs):
        if logs is not None and "loss" in logs:
            means = _mean_over_processes(self.take_sums(logs))
            logs.update(means)
            state.log_history[-1].update(means)  # a copy, which was made before

    def _remove_hooks(self):
        while self._hooks:
            self._hooks.pop().remove()


class AuxiliaryLossLogger(TrainingLogger):
    """Logs the model's auxiliary losses, unscaled, under their own names: the mean of all pictures' forward passes
    since the last log. Adds nothing where the model has none."""

    def __init__(self):
        super().__init__()
        self._sums = {}

    def on_train_begin(self, args, state, control, model: nn.Module | None = None, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._sums = {}
        self._hooks.append(model.register_forward_hook(self._record))

    def _record(self, module: nn.Module, inputs: tuple, output) -> None:
        losses = output.get("auxiliary_losses") if isinstance(output, ModelOutput) else None
        if module.training and losses:
            for name, loss in losses.items():
                total, count = self._sums.get(name, (0.0, 0))
                self._sums[name] = total + loss.detach().mean(), count + 1

    def take_sums(self, logs: dict[str, float]) -> dict[str, tuple[float, int]]:
        sums, self._sums = self._sums, {}
        return {name: (float(total), count) for name, (total, count) in sums.items()}


def _total_norm(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The norm of all these tensors together, those that are sharded over devices included."""
    by_mesh = defaultdict(list)
    for tensor in tensors:
        by_mesh[tensor.device_mesh if isinstance(tensor, DTensor) else None].append(tensor)
    norms = [nn.utils.get_total_norm(group) for group in by_mesh.values()]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(norms))


class GroupGradientNorms(TrainingLogger):
    """Logs `grad_norm/<group>`, the norm of the gradients of each group that has any, at each logging step.

    The squares add up to that of the trainer's own `grad_norm`, which is the one before clipping. DeepSpeed keeps its
    gradients to itself: nothing is logged there.
    """

    def __init__(self):
        super().__init__()
        self._norms = {}

    @torch.no_grad()
    def on_pre_optimizer_step(self, args, state, control, model: nn.Module | None = None, **kwargs):
        self._norms = {}
        if _ends_in_log(args, state):
            for group, parameters in parameter_groups(model).items():
                gradients = [p.grad for p in parameters.values() if p.grad is not None]
                if gradients:
                    self._norms[f"grad_norm/{group}"] = _total_norm(gradients)

    def take_sums(self, logs: dict[str, float]) -> dict[str, tuple[float, int]]:
        norms = {name: float(norm) for name, norm in self._norms.items()}
        self._norms = {}
        # Measured after the trainer clipped, which shrinks all of them alike.
        total, total_before = math.hypot(*norms.values()), logs.get("grad_norm", math.nan)
        is_known = total > 0 and math.isfinite(total) and math.isfinite(total_before)
        scale = total_before / total if is_known else 1.0
        return {name: (norm * scale, 1) for name, norm in norms.items()}


class AttentionEntropyLogger(TrainingLogger):
    """Logs how far attention looks around, at each logging step: of each stack of layers

        <prefix>/<stack>        H = -Σ_n w_n log w_n in nats, w the weights scaled to a sum of 1
        <prefix>/<stack>_share  H / log K: 0 looks at one of the K that it may look at, 1 at all of them alike

    the mean over layers, positions and the pictures of the step's last batch that has any. A subclass says where the
    weights are.
    """

    prefix: str

    def __init__(self):
        super().__init__()
        self._sees_pictures = False
        self._entropies = defaultdict(list)

    def watched(self, aurea: nn.Module) -> dict[str, list[tuple[nn.Module, Callable]]]:
        """By stack, modules and what makes of such a one, its inputs and its output the weights (…, K)."""
        raise NotImplementedError

    def on_step_begin(self, args, state, control, model: nn.Module | None = None, **kwargs):
        self._entropies.clear()
        if not _ends_in_log(args, state):
            return
        aurea = aurea_model(model)
        self._hooks.append(aurea.register_forward_pre_hook(self._note_pictures, with_kwargs=True))
        for stack, modules in self.watched(aurea).items():
            for module, weights_of in modules:
                self._hooks.append(module.register_forward_hook(partial(self._record, stack, weights_of)))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self._remove_hooks()

    def _note_pictures(self, module: nn.Module, inputs: tuple, kwargs: dict) -> None:
        # A batch of text alone sends a blank picture through, which is no news.
        pixel_values = kwargs.get("pixel_values")
        self._sees_pictures = pixel_values is not None and len(pixel_values) > 0
        if self._sees_pictures:
            self._entropies.clear()

    @torch.no_grad()
    def _record(self, stack: str, weights_of: Callable, module: nn.Module, inputs: tuple, output) -> None:
        if self._sees_pictures:
            weights = weights_of(module, inputs, output).float()
            weights = weights / weights.sum(dim=-1, keepdim=True)
            entropy = torch.special.entr(weights).sum(dim=-1).mean()
            self._entropies[stack].append((entropy, math.log(weights.shape[-1])))

    def take_sums(self, logs: dict[str, float]) -> dict[str, tuple[float, int]]:
        sums = {}
        for stack, entropies in self._entropies.items():
            sums[f"{self.prefix}/{stack}"] = sum(float(entropy) for entropy, _ in entropies), len(entropies)
            shares = [float(entropy) / maximum for entropy, maximum in entropies]
            sums[f"{self.prefix}/{stack}_share"] = sum(shares), len(shares)
        self._entropies.clear()
        return sums


class SpatialRangeEntropy(AttentionEntropyLogger):
    """Logs `spatial_range_entropy/semantic` and `/joint`, and their shares, see [`AttentionEntropyLogger`]: of the
    spatial-range weights before the small network corrects them. Adds nothing where the fusion has none."""

    prefix = "spatial_range_entropy"

    def watched(self, aurea: nn.Module) -> dict[str, list[tuple[nn.Module, Callable]]]:
        stacks = defaultdict(list)
        for name, module in aurea.fusion.named_modules():
            if name.endswith(".spatial_range_weights"):  # semantic_layers.0.spatial_range_weights
                stack = name.split(".")[-3].removesuffix("_layers")
                stacks[stack].append((module, lambda module, inputs, weights: weights))  # (B, H, W, K)
        return stacks


class CompositionEntropy(AttentionEntropyLogger):
    """Logs `composition_entropy/0`, `/1`, … and their shares, see [`AttentionEntropyLogger`]: of the composition after
    each of its layers. Adds nothing where there is none that attends."""

    prefix = "composition_entropy"

    def watched(self, aurea: nn.Module) -> dict[str, list[tuple[nn.Module, Callable]]]:
        if aurea.composition is None:
            return {}
        stacks = {}
        for idx, layer in enumerate(aurea.composition.layers):
            attentions = [module for name, module in layer.named_modules() if name == "cross_attn"]
            stacks[f"{idx}"] = [(module, lambda module, inputs, _: module.weights(*inputs)) for module in attentions]
        return {stack: modules for stack, modules in stacks.items() if modules}


__all__ = [
    "GROUP_MODULES",
    "LORA_TARGETS",
    "PARAMETER_GROUPS",
    "STAGES",
    "AttentionEntropyLogger",
    "AuxiliaryLossLogger",
    "CompositionEntropy",
    "GroupGradientNorms",
    "SpatialRangeEntropy",
    "TrainableReport",
    "TrainingLogger",
    "lora_targets",
    "modules_not_to_quantize",
    "parameter_groups",
    "set_trainable",
]
