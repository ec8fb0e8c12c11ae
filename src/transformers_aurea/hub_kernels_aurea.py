# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The compiled kernel in the place of the PyTorch layers of spatial-range attention.

`from_pretrained(..., use_kernels=True)` and `model.set_use_kernels(True)` ask for it, on CPU and GPU, in training and
inference. It is looked for where the user says, and nowhere else:

    1. a local build, AUREA_KERNEL_PATH: a kernel's folder with `build/`, or a variant;
    2. a hub repository, AUREA_KERNEL_REPO, with AUREA_KERNEL_REVISION ("v1" unless given) and, for a publisher whom
       the Hub does not list as trusted, AUREA_KERNEL_TRUST_REMOTE_CODE=1;
    3. with neither named, what is registered with `kernels.register_kernel_mapping`; if nothing is, PyTorch.

With none of them no network is touched. A kernel must be undamaged, and must first compute what PyTorch does on a
small map, on the model's device and at its radius, forward and backward. Whatever fails ends in one warning that says
what to do, is not tried again, and leaves the PyTorch layers in place. `kernel_status(model)` tells what is in use.
"""

import importlib.metadata
import importlib.util
import inspect
import math
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


logger = logging.get_logger(__name__)

LAYERS = {"SpatialRangeWeights": AureaSpatialRangeWeights, "NeighborhoodAggregate": AureaNeighborhoodAggregate}

WHY_NO_KERNELS = ""
if not is_kernels_available():
    WHY_NO_KERNELS = "`kernels` cannot be used: it is not installed"
    if importlib.util.find_spec("kernels"):
        installed = importlib.metadata.version("kernels")
        WHY_NO_KERNELS = f"`kernels` cannot be used: this transformers does not accept version {installed}"
    WHY_NO_KERNELS += ". `pip install 'transformers[kernels]'` gets one that fits"
elif not hasattr(AureaSpatialRangeWeights, "kernel_layer_name"):
    WHY_NO_KERNELS = "the environment variable USE_HUB_KERNELS switches kernels off"
elif os.environ.get("DISABLE_KERNEL_MAPPING", "0") != "0":
    WHY_NO_KERNELS = "the environment variable DISABLE_KERNEL_MAPPING switches kernels off"
else:
    import kernels  # Run with 0.17.2. Where 0.18, which could not be had, differs, it fails as any source may.

NO_SOURCE = (
    "No source of it is named: set the environment variable AUREA_KERNEL_PATH to a local build or AUREA_KERNEL_REPO "
    "to a hub repository, or call `configure_kernel`."
)
ADVICE = (
    "A local build that is missing, damaged or of another machine is made by `python build_local.py cpu` or `cuda`. "
    "Of a hub repository, check the name, the revision and the network, delete a damaged download, and set "
    "AUREA_KERNEL_TRUST_REMOTE_CODE=1 if you trust a publisher whom the Hub does not list as trusted."
)
NOT_ASKED_FOR = (
    "no kernel was asked for, or not since the model was unpickled or on the meta device: "
    "`from_pretrained(..., use_kernels=True)` or `set_use_kernels(True)`"
)


class AureaKernelSource(NamedTuple):
    """A local build or, without a path, a hub repository."""

    path: Path | None = None
    repo_id: str = ""
    revision: str = ""
    trust_remote_code: bool = False

    def __str__(self) -> str:
        return f"The local build {self.path}" if self.path else f"The hub repository {self.repo_id}@{self.revision}"

    def folder(self) -> Path:
        """Raises if a file in it is not the one that was built: loading a truncated library would end the process."""
        settings = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        folder = self.path or kernels.install_kernel(self.repo_id, local_files_only=is_offline_mode(), **settings)
        for pattern in ("metadata.json", "*/metadata.json", "build/*/metadata.json"):
            for metadata in folder.glob(pattern):
                digest = kernels.Metadata.read_from_file(metadata).digest
                if digest is not None:
                    digest.validate(type(digest).hash_variant(digest.algorithm, metadata.parent))
        return folder


def _named_sources() -> list[AureaKernelSource]:
    names = ("PATH", "REPO", "REVISION", "TRUST_REMOTE_CODE")
    path, repo_id, revision, trusted = (os.environ.get(f"AUREA_KERNEL_{name}", "") for name in names)
    sources = [AureaKernelSource(Path(path).expanduser().resolve())] if path else []
    if repo_id:
        sources.append(AureaKernelSource(None, repo_id, revision or "v1", trusted.upper() in ENV_VARS_TRUE_VALUES))
    return sources


@torch.inference_mode(False)
@torch.enable_grad()
def _results(layers: list[nn.Module], device: torch.device, dtype: torch.dtype, radius: int) -> list[torch.Tensor]:
    """Outputs and gradients of both layers on a small map of fixed values."""
    shape = (2, 1, radius + 3, radius + 4, 8)
    waves = torch.arange(math.prod(shape), dtype=torch.float32, device=device).sin().view(shape).to(dtype)
    guidance, source = (wave.clone().requires_grad_() for wave in waves)
    sigma = torch.tensor(0.7, device=device, requires_grad=True)
    with torch.autocast(device.type, enabled=False):
        weights = layers[0](guidance, sigma, radius)
        sums = layers[1](source, weights, radius)
        return [weights, sums, *torch.autograd.grad(sums.float().square().sum(), (guidance, sigma, source))]


def _kernelize(layers: list[nn.Module], folder: Path | None, device: torch.device, mode) -> None:
    """Gives the layers the forward of the kernel in this folder or, without one, of what is registered, if any is."""
    mapping = {
        name: {device.type: kernels.LocalLayerRepository(folder, layer_name=name)} if folder else {} for name in LAYERS
    }
    with kernels.use_kernel_mapping(mapping):
        for layer in layers:
            kernels.kernelize(layer, mode=mode, device=device.type, use_fallback=folder is None)


def _open(source: AureaKernelSource | None, device: torch.device, radius: int) -> tuple[Path | None, str]:
    """Folder of a source, if any; and why it cannot be used, nothing if its layers compute what ours do."""
    ours, theirs = ([layer() for layer in LAYERS.values()] for _ in range(2))
    try:
        folder = source and source.folder()
        _kernelize(theirs, folder, device, kernels.Mode.TRAINING)
        if not all(map(_source_in_use, theirs)):
            return None, NO_SOURCE
        for dtype in (torch.float32, torch.bfloat16):
            expected = _results(ours, device, dtype, radius)
            # A broken build is looked for, not rounding: TF32 may be in use.
            torch.testing.assert_close(_results(theirs, device, dtype, radius), expected, rtol=2e-2, atol=2e-2)
    except Exception as error:  # of code that is not ours, some of it native
        reason = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.:')}"
        return None, f"{source or 'What is registered'} failed on {device} at radius {radius}: {reason}."
    return folder, ""


_remembered = cache(_open)


def configure_kernel(
    path: str | os.PathLike | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
) -> None:
    """Say where the kernel comes from, for all models that ask for it from now on, and forget what failed before.

    It sets the environment variable named: what is not given stays as it is, and `""` takes a source away. A model in
    use takes it up at its next `set_use_kernels(True)`.

    Args:
        path: a local build, the kernel's folder with `build/` in it or a folder of one variant (AUREA_KERNEL_PATH).
        repo_id: a hub repository, tried if there is no local build or it fails (AUREA_KERNEL_REPO).
        revision: branch, tag or commit of that repository (AUREA_KERNEL_REVISION, or "v1").
        trust_remote_code: load it though the Hub does not list its publisher as trusted; it is native code
            (AUREA_KERNEL_TRUST_REMOTE_CODE).

    Raises:
        ImportError: if `kernels` is not installed in a version that transformers accepts.
    """
    if not is_kernels_available():
        raise ImportError(f"No kernel can be loaded: {WHY_NO_KERNELS}.")
    given = {"PATH": path, "REPO": repo_id, "REVISION": revision, "TRUST_REMOTE_CODE": trust_remote_code}
    os.environ.update({f"AUREA_KERNEL_{name}": str(value) for name, value in given.items() if value is not None})
    _remembered.cache_clear()


class AureaKernelStatus(NamedTuple):
    """What computes a model's spatial-range attention: `"kernel"`, `"pytorch"` or, if layers differ, `"mixed"`; the
    folder of the kernel in use, None if there is none; and why."""

    implementation: str
    source: str | None
    reason: str


def _layers_of(model: nn.Module) -> list[nn.Module]:
    # By name: a model loaded with `trust_remote_code` has classes of its own.
    names = {layer.__name__ for layer in LAYERS.values()}
    return [module for module in model.modules() if type(module).__name__ in names]


def _source_in_use(layer: nn.Module) -> str | None:
    """Folder of the code of the layer's forward, None if it is the PyTorch one."""
    forward = inspect.unwrap(layer.forward)  # accelerate's hooks wrap it
    forward = getattr(forward, "__func__", forward)
    return None if forward is type(layer).forward else str(Path(inspect.getfile(forward)).parent)


def kernel_status(model: nn.Module) -> AureaKernelStatus:
    """What computes the spatial-range attention of a model, or of any part of one, as it stands now, and why."""
    layers = _layers_of(model)
    if not layers:
        return AureaKernelStatus("pytorch", None, "there is no spatial-range attention in it")
    sources = [_source_in_use(layer) for layer in layers]
    in_use = ", ".join(sorted(set(filter(None, sources)))) or None
    if all(sources):
        return AureaKernelStatus("kernel", in_use, "it was asked for, and computes what PyTorch does")
    reason = WHY_NO_KERNELS or vars(layers[sources.index(None)]).get("why_pytorch", NOT_ASKED_FOR)
    if in_use is None:
        return AureaKernelStatus("pytorch", None, reason)
    return AureaKernelStatus("mixed", in_use, f"{sources.count(None)} of {len(layers)} layers are PyTorch's: {reason}")


class AureaHubKernelsMixin:
    """A `PreTrainedModel`'s switch for kernels, so that it follows the model's device and can be switched off."""

    configure_kernel = staticmethod(configure_kernel)
    kernel_status = kernel_status

    def set_use_kernels(self, use_kernels: bool, kernel_config=None, mode=None) -> None:
        """Puts the kernel in the place of the PyTorch layers of spatial-range attention, or, with False, these back.

        transformers also maps other layers, on a GPU the decoder's norms, to repositories that the user did not name.
        They are asked only for a model that was given a `kernel_config`, which goes the way of transformers.
        """
        layers = _layers_of(self)
        for layer in layers:
            vars(layer).pop("why_pytorch", None)
            if isinstance(vars(layer).get("forward"), MethodType):
                del layer.forward
        if not use_kernels or kernel_config or self.kernel_config:
            return super().set_use_kernels(use_kernels, kernel_config, mode)
        self._use_kernels = True
        if not layers or self.device.type == "meta" or type(torch.empty(0)) is not torch.Tensor:  # no data to compare
            return
        if reason := WHY_NO_KERNELS or self._put_in_place(layers, mode):
            logger.warning_once(f"Aurea's kernel is not used, PyTorch computes instead. {reason}")
            for layer in layers:
                layer.why_pytorch = reason

    def _put_in_place(self, layers: list[nn.Module], mode) -> str:
        """Gives the layers the kernel of the first source that serves. If none does, says why."""
        failures, sources = [], _named_sources()
        for source in sources or [None]:
            asked = (source, self.device, self.config.feature_fusion_config.radius)
            folder, failure = _remembered(*asked) if source else _open(*asked)
            if not failure:
                _kernelize(layers, folder, self.device, mode or kernels.Mode.TRAINING)
                if failures:
                    logger.warning_once(f"Aurea's kernel comes from the second source named. {failures[0]} {ADVICE}")
                return ""
            failures.append(failure)
        return " ".join([*failures, ADVICE] if sources else failures)

    def _apply(self, *args, **kwargs):
        # All of `to()`, `cuda()`, `cpu()` end here. Each type of device has its own kernel, or none.
        device_type = self.device.type
        super()._apply(*args, **kwargs)
        if self.use_kernels and self.device.type != device_type:
            self.set_use_kernels(True)
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        # A pickle has the PyTorch layers, a copy has what the model had.
        if self.use_kernels and self.kernel_status().implementation == "pytorch":
            self.set_use_kernels(True)
