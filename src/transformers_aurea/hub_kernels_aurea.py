# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The compiled kernel in the place of the PyTorch layers of spatial-range attention, if `use_kernels` asks for it and
it computes what they do. Where it cannot be used, one warning says why, and PyTorch computes."""

import inspect
import os
from functools import cache
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils import ENV_VARS_TRUE_VALUES, is_kernels_available, logging
from transformers.utils.hub import is_offline_mode

from .spatial_range_attention_aurea import AureaNeighborhoodAggregate, AureaSpatialRangeWeights


if is_kernels_available():
    import kernels

logger = logging.get_logger(__name__)

LAYERS = {"SpatialRangeWeights": AureaSpatialRangeWeights, "NeighborhoodAggregate": AureaNeighborhoodAggregate}
SETTINGS = {"PATH": "", "REPO": "", "REVISION": "v1", "TRUST_REMOTE_CODE": ""}  # AUREA_KERNEL_..., where not set
NAMES = {layer.__name__ for layer in LAYERS.values()}  # not the classes: code loaded with a model has its own
NOT_ASKED_FOR = "none was asked for (`use_kernels=True`), or not since it was unpickled or on the meta device"


def _mapping(device: torch.device, path: str, repo_id: str, revision: str, trusted: str) -> dict[str, dict]:
    """The layers' repositories, none where no source is named. Raises if a file is not the one that was built: loading
    a truncated library would end the process."""
    if path:
        folder = Path(path).expanduser().resolve()
    elif repo_id:
        trust = {"trust_remote_code": trusted.upper() in ENV_VARS_TRUE_VALUES}
        folder = kernels.install_kernel(repo_id, revision=revision, local_files_only=is_offline_mode(), **trust)
    else:
        return {name: {} for name in LAYERS}
    for pattern in ("metadata.json", "*/metadata.json", "build/*/metadata.json"):
        for metadata in folder.glob(pattern):
            if digest := kernels.Metadata.read_from_file(metadata).digest:
                digest.validate(type(digest).hash_variant(digest.algorithm, metadata.parent))
    return {name: {device.type: kernels.LocalLayerRepository(folder, layer_name=name)} for name in LAYERS}


@torch.inference_mode(False)  # enables gradients too
def _results(layers: nn.ModuleList, device: torch.device, dtype: torch.dtype, radius: int) -> list[torch.Tensor]:
    """Outputs and gradients of both layers on a small map of fixed values."""
    shape = torch.Size((2, 1, radius + 3, radius + 4, 8))
    waves = torch.arange(shape.numel(), device=device).float().sin().view(shape).to(dtype).requires_grad_()
    sigma = torch.tensor(0.7, device=device, requires_grad=True)
    weights = layers[0](waves[0], sigma, radius)
    sums = layers[1](waves[1], weights, radius)
    return [weights, sums, *torch.autograd.grad(sums.float().square().sum(), (waves, sigma))]


@cache
def _open(device: torch.device, radius: int, path: str, repo_id: str, revision: str, trusted: str) -> tuple[dict, str]:
    """The kernel's forwards by the names of our layers, and nothing; or none, and why."""
    if not is_kernels_available():
        return {}, "No `kernels` that this transformers accepts is installed: `pip install 'transformers[kernels]'`."
    ours, theirs = (nn.ModuleList(layer() for layer in LAYERS.values()) for _ in range(2))
    try:
        with kernels.use_kernel_mapping(_mapping(device, path, repo_id, revision, trusted)):
            kernels.kernelize(theirs, mode=kernels.Mode.TRAINING, device=device.type, use_fallback=False)
        if kernel_status(theirs).implementation == "pytorch":
            return {}, "USE_HUB_KERNELS or DISABLE_KERNEL_MAPPING in the environment switches kernels off."
        for dtype in (torch.float32, torch.bfloat16):
            actual, expected = (_results(layers, device, dtype, radius) for layers in (theirs, ours))
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)  # TF32 may be in use
    except Exception as error:  # of code that is not ours, some of it native
        name, remedy = "No source is named, and what is registered", "Set AUREA_KERNEL_PATH or AUREA_KERNEL_REPO"
        if path:
            name, remedy = path, "`python build_local.py cpu` or `cuda` builds one for this machine"
        elif repo_id:
            name = f"{repo_id}@{revision}"
            remedy = "Check name and network, or set AUREA_KERNEL_TRUST_REMOTE_CODE=1 if you trust its publisher"
        reason = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.:')}"
        return {}, f"{name} failed on {device} at radius {radius}: {reason}. {remedy}."
    return {type(layer).__name__: layer.forward.__func__ for layer in theirs}, ""


def _open_where_named(device: torch.device, radius: int) -> tuple[dict, str]:
    source = [os.environ.get(f"AUREA_KERNEL_{name}") or default for name, default in SETTINGS.items()]
    opened = _open if any(source[:2]) else _open.__wrapped__  # what is registered may change
    return opened(device, radius, *source)


def configure_kernel(
    path: str | os.PathLike | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
) -> None:
    """Sets the environment variables that say where a kernel comes from, unless None, and forgets what failed before.

    Args:
        path: AUREA_KERNEL_PATH, a local build, a kernel's folder or that of a variant; `""` for none.
        repo_id: AUREA_KERNEL_REPO, a hub repository; without it and a path, what is registered with `kernels` is used.
        revision: AUREA_KERNEL_REVISION, its branch, tag or commit, `"v1"` without one.
        trust_remote_code: AUREA_KERNEL_TRUST_REMOTE_CODE, for a publisher whom the Hub does not list as trusted.
    """
    given = zip(SETTINGS, (path, repo_id, revision, trust_remote_code))
    os.environ.update({f"AUREA_KERNEL_{name}": str(value) for name, value in given if value is not None})
    _open.cache_clear()


class AureaKernelStatus(NamedTuple):
    """`"kernel"` if all layers are the kernel's, else `"pytorch"`; the kernel's folder, None if PyTorch; and why."""

    implementation: str
    source: str | None
    reason: str


def kernel_status(model: nn.Module) -> AureaKernelStatus:
    """What computes the spatial-range attention of a model, or of any part of one, as it stands now, and why."""
    status = AureaKernelStatus("pytorch", None, "there is no spatial-range attention in it")
    for layer in (module for module in model.modules() if type(module).__name__ in NAMES):
        file = inspect.getfile(inspect.unwrap(layer.forward))  # accelerate's hooks wrap it
        if file == inspect.getfile(type(layer).forward):
            return AureaKernelStatus("pytorch", None, vars(layer).get("why_pytorch") or NOT_ASKED_FOR)
        status = AureaKernelStatus("kernel", str(Path(file).parent), "asked for, and computes what PyTorch does")
    return status


def usable_kernel(model: nn.Module, device: torch.device) -> AureaKernelStatus:
    """What would compute a model's spatial-range attention on a device with `use_kernels=True`, and why. The model
    itself may be elsewhere, also on the meta device."""
    if not any(type(module).__name__ in NAMES for module in model.modules()):
        return kernel_status(model)
    forwards, reason = _open_where_named(device, model.config.feature_fusion_config.radius)
    if not forwards:
        return AureaKernelStatus("pytorch", None, reason)
    [folder] = {str(Path(inspect.getfile(forward)).parent) for forward in forwards.values()}
    return AureaKernelStatus("kernel", folder, "asked for, it computes what PyTorch does")


class AureaHubKernelsMixin:
    """A `PreTrainedModel`'s switch for kernels, so that it follows the model's device and can be switched off."""

    configure_kernel = staticmethod(configure_kernel)
    kernel_status = kernel_status
    asks_for_kernels = False

    @property
    def use_kernels(self) -> bool:
        return self.asks_for_kernels

    @use_kernels.setter
    def use_kernels(self, value: bool) -> None:
        self.set_use_kernels(bool(value))

    def set_use_kernels(self, use_kernels: bool, kernel_config=None, mode=None) -> None:
        """The kernel in its place, or PyTorch back. Only a `kernel_config` asks for transformers' own kernels too."""
        layers = [module for module in self.modules() if type(module).__name__ in NAMES]
        for layer in layers:
            vars(layer).pop("why_pytorch", None)
            if isinstance(vars(layer).get("forward"), MethodType):
                del layer.forward
        self.asks_for_kernels = use_kernels
        if not use_kernels or kernel_config or self.kernel_config:
            return super().set_use_kernels(use_kernels, kernel_config, mode)
        if not layers or self.device.type == "meta" or type(torch.empty(0)) is not torch.Tensor:  # no data to compare
            return
        forwards, reason = _open_where_named(self.device, self.config.feature_fusion_config.radius)
        if reason:
            logger.warning_once(f"Aurea's kernel is not used, PyTorch computes instead. {reason}")
        for layer in layers:
            layer.why_pytorch = reason
            if forwards:
                layer.forward = MethodType(forwards[type(layer).__name__], layer)

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        if self.use_kernels:  # all of `to()`, `cuda()`, `cpu()` end here
            self.set_use_kernels(True)
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        if self.use_kernels:  # a pickle has the PyTorch layers
            self.set_use_kernels(True)
