# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The compiled kernel in the place of the PyTorch layers of spatial-range attention.

`from_pretrained(..., use_kernels=True)` and `model.set_use_kernels(True)` ask for it, on CPU and GPU, in training and
inference. It is looked for where the user says, and nowhere else:

    1. a local build, `configure_kernel(path=...)` or AUREA_KERNEL_PATH: a kernel's folder with `build/`, or a variant;
    2. a hub repository, `configure_kernel(repo_id=...)` or AUREA_KERNEL_REPO, with AUREA_KERNEL_REVISION ("v1" unless
       given) and, for a publisher whom the Hub does not list as trusted, AUREA_KERNEL_TRUST_REMOTE_CODE=1;
    3. PyTorch.

With neither named no network is touched. A kernel that is found must be undamaged, and must first compute what PyTorch
does on a small map, on the model's device and at its radius, forward and backward. Whatever fails ends in one warning
that says what to do, is not tried again, and leaves the PyTorch layers in place. `kernel_status(model)` tells what is
in use, and why.
"""

import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import struct
from functools import cache
from pathlib import Path
from types import MethodType, ModuleType
from typing import NamedTuple

import torch
from torch import nn
from transformers.utils import is_kernels_available, logging
from transformers.utils.hub import is_offline_mode

from .spatial_range_attention_aurea import NeighborhoodAggregate, SpatialRangeWeights


def _why_refused() -> str:
    reason = "it is not installed"
    if importlib.util.find_spec("kernels"):
        installed = importlib.metadata.version("kernels")
        reason = f"this transformers does not accept the version installed, {installed}"
    return f"{reason}. `pip install 'transformers[kernels]'` gets one that fits"


WHY_NO_KERNELS = ""
try:
    if not is_kernels_available():
        raise ImportError(_why_refused())
    # Run with 0.17.2. Release 0.18, which transformers wants from 5.23 on, is untested: it could be neither installed
    # nor read, and is known only by what transformers calls. Where it differs, PyTorch stays in place.
    from kernels import (
        KernelizeFallback,
        Mode,
        get_kernel,
        get_loaded_kernels,
        get_local_kernel,
        install_kernel,
        kernelize,
        register_kernel_mapping,
        use_kernel_mapping,
    )
    from kernels.layer.globals import _KERNEL_MAPPING  # there is no public way to ask what is registered
except ImportError as error:
    WHY_NO_KERNELS = f"`kernels` cannot be used: {error}"


logger = logging.get_logger(__name__)

LAYERS = {"SpatialRangeWeights": SpatialRangeWeights, "NeighborhoodAggregate": NeighborhoodAggregate}
DEVICE_TYPES = ("cpu", "cuda", "rocm")


def _is_truncated(library: Path) -> bool:
    """Whether a 64-bit ELF file ends before its table of sections, which linkers write last."""
    with library.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
        return False
    (start,), (size, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
    return library.stat().st_size < start + size * count


def _verify(variant: Path) -> None:
    """Raises if a file is not the one that was built: loading a truncated library would end the process."""
    digest = json.loads((variant / "metadata.json").read_text()).get("digest") or {}
    files = digest.get("files", {}) if digest.get("algorithm") == "sha256" else {}
    for name, expected in files.items():
        if base64.b64encode(hashlib.sha256((variant / name).read_bytes()).digest()).decode() != expected:
            raise ValueError(f"{variant / name} is damaged or was changed after the build")
    for library in variant.rglob("*.so"):  # a build need not have digests
        if _is_truncated(library):
            raise ValueError(f"{library} is damaged: it is shorter than its header says")


class LocalBuild(NamedTuple):
    path: str

    advice = "If it is missing, damaged or of another machine, build it (`python build_local.py cpu` or `cuda`)."

    def __str__(self) -> str:
        return f"The local build {self.path}"

    def open(self) -> ModuleType:
        path = Path(self.path).expanduser().resolve()
        if not path.is_dir():
            raise FileNotFoundError("there is no such folder")
        from kernels.resolver import resolve_local_kernel  # not public: if it is gone, this source fails

        variant = resolve_local_kernel(path, backend=None).variant_path
        _verify(variant)
        return get_local_kernel(variant)


class HubRepository(NamedTuple):
    repo_id: str
    revision: str
    trust_remote_code: bool

    advice = (
        "Check the repository's name, its revision and the network, and delete a damaged download. If you trust a "
        "publisher whom the Hub does not list as trusted, set AUREA_KERNEL_TRUST_REMOTE_CODE=1."
    )

    def __str__(self) -> str:
        return f"The hub repository {self.repo_id}@{self.revision}"

    def open(self) -> ModuleType:
        replaced = dict(entry.partition("=")[::2] for entry in os.environ.get("LOCAL_KERNELS", "").split(":"))
        if self.repo_id in replaced:  # by a folder, in `kernels` itself
            return LocalBuild(replaced[self.repo_id]).open()
        settings = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        _verify(install_kernel(self.repo_id, local_files_only=is_offline_mode(), **settings))
        return get_kernel(self.repo_id, **settings)


def _named_sources(path=None, repo_id=None, revision=None, trust_remote_code=None) -> tuple:
    """The sources to try, in order. What is not given is taken from the environment."""
    path = path or os.environ.get("AUREA_KERNEL_PATH")
    repo_id = repo_id or os.environ.get("AUREA_KERNEL_REPO")
    revision = revision or os.environ.get("AUREA_KERNEL_REVISION") or "v1"
    if trust_remote_code is None:
        trust_remote_code = os.environ.get("AUREA_KERNEL_TRUST_REMOTE_CODE", "").lower() in ("1", "true", "yes", "on")
    local = (LocalBuild(str(path)),) if path else ()
    return (*local, HubRepository(repo_id, revision, trust_remote_code)) if repo_id else local


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _results(
    layers: dict[str, nn.Module], device: torch.device, dtype: torch.dtype, radius: int
) -> list[torch.Tensor]:
    """Outputs and gradients of both layers on a small map of fixed values."""
    shape = (2, 1, radius + 3, radius + 4, 8)
    waves = torch.arange(math.prod(shape), dtype=torch.float32, device=device).sin().view(shape).to(dtype)
    guidance, source = (wave.clone().requires_grad_() for wave in waves)
    sigma = torch.tensor(0.7, device=device, requires_grad=True)
    weights = layers["SpatialRangeWeights"](guidance, sigma, radius)
    sums = layers["NeighborhoodAggregate"](source, weights, radius)
    return [weights, sums, *torch.autograd.grad(sums.float().square().sum(), (guidance, sigma, source))]


class _Loaded(NamedTuple):
    layer: type[nn.Module]

    def load(self) -> type[nn.Module]:
        return self.layer


@torch.inference_mode(False)
@torch.enable_grad()
def _check(layers: dict[str, type[nn.Module]], device: torch.device, radius: int) -> None:
    """Raises unless `kernels` accepts the layers in place of ours, for training too, and they compute the same."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily  # not public: if it is gone, the check fails

    device_type = _device_type(device)
    mapping = {name: {device_type: _Loaded(layer)} for name, layer in layers.items()}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        modules = {
            name: kernelize(layer(), mode=Mode.TRAINING, device=device_type, use_fallback=False)
            for name, layer in LAYERS.items()
        }
    with unset_fake_temporarily(), torch.autocast(device.type, enabled=False):
        for dtype in (torch.float32, torch.bfloat16):
            expected = _results({name: layer() for name, layer in LAYERS.items()}, device, dtype, radius)
            # A broken build is looked for, not rounding: TF32 may be in use.
            torch.testing.assert_close(_results(modules, device, dtype, radius), expected, rtol=2e-2, atol=2e-2)


@cache
def _open(source: LocalBuild | HubRepository) -> tuple[ModuleType | None, str]:
    """The kernel, or why it cannot be loaded."""
    try:
        return source.open(), ""
    except Exception as error:
        return None, _describe(error)


@cache
def _warn(message: str) -> None:
    logger.warning(message)


def _warn_of_pytorch(explanation: str) -> None:
    _warn(f"Aurea's kernel is not used, PyTorch computes instead. {explanation}")


@cache
def _find_layers(sources: tuple, device: torch.device, radius: int) -> tuple[dict[str, type[nn.Module]], str]:
    """The layers of the first source that has some which work on this device and at this radius, and what failed."""
    failures = []
    for source in sources:
        kernel, reason = _open(source)
        if kernel is not None:
            try:
                layers = {name: getattr(kernel.layers, name) for name in LAYERS}
                _check(layers, device, radius)
                if failures:
                    _warn(f"Aurea's kernel comes from the second source named. {source} works. {' '.join(failures)}")
                return layers, " ".join(failures)
            except Exception as error:
                reason = f"it does not work on {device} at radius {radius}: {_describe(error)}"
        failures.append(f"{source} failed: {reason.rstrip('.')}. {source.advice}")
    if not sources:
        failures.append(
            "No source of it is named: set the environment variable AUREA_KERNEL_PATH to a local build or "
            "AUREA_KERNEL_REPO to a hub repository, or call `configure_kernel`."
        )
    _warn_of_pytorch(" ".join(failures))
    return {}, " ".join(failures)


class AureaKernelRepository:
    """Where `kernels` gets one layer for one type of device, `RepositoryProtocol`.

    Its sources are those given or, if None, those that the environment names when it is asked.
    """

    def __init__(self, layer_name: str, device_type: str, sources: tuple | None = None):
        self.layer_name = layer_name
        self.device_type = device_type
        self.sources = sources
        self.failure = ""

    def load(self) -> type[nn.Module]:
        return self.load_for(torch.device("cuda" if self.device_type == "rocm" else self.device_type), radius=1)

    def load_for(self, device: torch.device, radius: int) -> type[nn.Module]:
        """Raises FileNotFoundError, the one error for which transformers keeps the PyTorch layer."""
        sources = _named_sources() if self.sources is None else self.sources
        layers, self.failure = _find_layers(sources, device, radius)
        if not layers:
            raise FileNotFoundError(self.failure)
        return layers[self.layer_name]

    def __deepcopy__(self, memo) -> "AureaKernelRepository":
        return self

    def __str__(self) -> str:
        return f"Aurea's kernel (layer `{self.layer_name}`, {self.device_type})"


class _Asked(NamedTuple):
    """An `AureaKernelRepository` for one device and radius. `kernels` asks it once, and knows it by its hash."""

    repository: AureaKernelRepository
    device: torch.device
    radius: int

    def load(self) -> type[nn.Module]:
        return self.repository.load_for(self.device, self.radius)


def _register(sources: tuple | None = None, replace: bool = True) -> None:
    for name in LAYERS:
        for device_type in DEVICE_TYPES:
            if replace or device_type not in _KERNEL_MAPPING.get().get(name, {}):
                register_kernel_mapping({name: {device_type: AureaKernelRepository(name, device_type, sources)}})


def configure_kernel(
    path: str | os.PathLike | None = None,
    repo_id: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool | None = None,
) -> None:
    """Say where the kernel comes from, for all models that ask for it from now on, and forget what failed before.

    What is not given is taken from the environment as it is now. A model in use takes it up at its next
    `set_use_kernels(True)`.

    Args:
        path: a local build, the kernel's folder with `build/` in it or a folder of one variant (AUREA_KERNEL_PATH).
        repo_id: a hub repository, tried if there is no local build or it fails (AUREA_KERNEL_REPO).
        revision: branch, tag or commit of that repository (AUREA_KERNEL_REVISION, or "v1").
        trust_remote_code: load it though the Hub does not list its publisher as trusted; it is native code
            (AUREA_KERNEL_TRUST_REMOTE_CODE).

    Raises:
        ImportError: if `kernels` is not installed in a version that transformers accepts.
    """
    if WHY_NO_KERNELS:
        raise ImportError(f"No kernel can be loaded: {WHY_NO_KERNELS}.")
    for memory in (_open, _find_layers, _warn):
        memory.cache_clear()
    _register(_named_sources(path, repo_id, revision, trust_remote_code))


class KernelStatus(NamedTuple):
    """What computes a model's spatial-range attention."""

    implementation: str
    """`"kernel"`, `"pytorch"` or, if layers differ, `"mixed"`."""
    source: str | None
    """Where the kernel in use comes from."""
    reason: str
    """Why this implementation is in use."""


def _device_type(device: torch.device) -> str:
    return "rocm" if device.type == "cuda" and torch.version.hip else device.type


def _layers_of(model: nn.Module) -> list[nn.Module]:
    # By name: a model loaded with `trust_remote_code` has classes of its own.
    return [module for module in model.modules() if type(module).__name__ in LAYERS]


def _registered(layer: nn.Module, device: torch.device) -> dict:
    """The repositories of the kernel for a layer, by mode."""
    registered = _KERNEL_MAPPING.get().get(type(layer).__name__, {}).get(_device_type(device))
    return (registered and registered.repos) or {}


def _put_back(layer: nn.Module) -> None:
    """Gives a layer its own forward again."""
    vars(layer).pop("why_pytorch", None)
    if isinstance(vars(layer).get("forward"), MethodType):
        del layer.forward
    if "_old_forward" in vars(layer):  # what a hook of accelerate calls
        layer._old_forward = MethodType(type(layer).forward, layer)


def _put_in_place(layer: nn.Module, device: torch.device, radius: int, mode) -> None:
    """Gives a layer the forward of the kernel registered for it, or its own, and in `why_pytorch` the reason."""
    repositories = _registered(layer, device)
    device_type = _device_type(device)
    if not repositories:
        _put_back(layer)
        layer.why_pytorch = f"no kernel is registered for {device_type}"
        if device_type != "meta":
            _warn_of_pytorch(f"The reason: {layer.why_pytorch}.")
        return
    asked = {
        key: _Asked(repository, device, radius) if hasattr(repository, "load_for") else repository
        for key, repository in repositories.items()
    }
    with use_kernel_mapping({type(layer).__name__: {device_type: asked}}):
        kernelize(layer, mode=mode, device=device_type, use_fallback=KernelizeFallback.ALL)
    layer.why_pytorch = "".join(getattr(repository, "failure", "") for repository in repositories.values())


def _source_in_use(layer: nn.Module) -> str | None:
    """Where the layer's forward comes from, None if it is the PyTorch one."""
    forward = vars(layer).get("_old_forward", layer.forward)  # accelerate's hooks wrap it
    forward = getattr(forward, "__func__", forward)
    if forward is type(layer).forward:
        return None
    for kernel in () if WHY_NO_KERNELS else get_loaded_kernels():
        if f"{forward.__module__}.".startswith(f"{kernel.metadata.id}."):
            if kernel.repo_info is None:
                return str(Path(kernel.module.__file__).parent)
            return f"{kernel.repo_info.repo_id}@{kernel.repo_info.revision}"
    return forward.__module__


def _why_pytorch(layer: nn.Module, device: torch.device) -> str:
    if WHY_NO_KERNELS:
        return WHY_NO_KERNELS
    if not hasattr(type(layer), "kernel_layer_name"):
        return "the environment variable USE_HUB_KERNELS switches kernels off"
    if vars(layer).get("why_pytorch"):
        return layer.why_pytorch
    if "forward" not in vars(layer):
        return "no kernel was asked for: `from_pretrained(..., use_kernels=True)` or `set_use_kernels(True)`"
    if os.environ.get("DISABLE_KERNEL_MAPPING", "0") != "0":
        return "the environment variable DISABLE_KERNEL_MAPPING switches kernels off"
    repositories = _registered(layer, device)
    if not repositories:
        return f"no kernel is registered for {_device_type(device)}"
    failures = [getattr(repository, "failure", "") for repository in repositories.values()]
    return "".join(failures) or "PyTorch's layer was put back, as in a pickle: call `set_use_kernels(True)` again"


def kernel_status(model: nn.Module) -> KernelStatus:
    """What computes the spatial-range attention of a model, or of any part of one, as it stands now, and why."""
    layers = _layers_of(model)
    if not layers:
        return KernelStatus("pytorch", None, "there is no spatial-range attention in it")
    sources = [_source_in_use(layer) for layer in layers]
    in_use = ", ".join(sorted(set(filter(None, sources)))) or None
    if all(sources):
        return KernelStatus("kernel", in_use, "it was asked for, and computes what PyTorch does")
    device = next(model.parameters(), torch.empty(0)).device
    reason = _why_pytorch(layers[sources.index(None)], device)
    if in_use is None:
        return KernelStatus("pytorch", None, reason)
    return KernelStatus("mixed", in_use, f"{sources.count(None)} of {len(layers)} layers are PyTorch's: {reason}")


class HubKernelsMixin:
    """A `PreTrainedModel`'s switch for kernels, so that it follows the model's device and can be switched off."""

    configure_kernel = staticmethod(configure_kernel)

    def kernel_status(self) -> KernelStatus:
        """What computes this model's spatial-range attention, and why."""
        return kernel_status(self)

    def set_use_kernels(self, use_kernels: bool, kernel_config=None, mode=None) -> None:
        """Puts the kernel in the place of the PyTorch layers of spatial-range attention, or, with False, these back.

        transformers also maps other layers, on a GPU the decoder's norms, to repositories that the user did not name.
        They are asked only for a model that was given a `kernel_config`, which goes the way of transformers.
        """
        for layer in _layers_of(self):
            vars(layer).pop("why_pytorch", None)
            if not use_kernels:
                _put_back(layer)
        if not use_kernels or kernel_config or self.kernel_config:
            return super().set_use_kernels(use_kernels, kernel_config, mode)
        self._use_kernels = True
        if WHY_NO_KERNELS:
            _warn_of_pytorch(f"The reason: {WHY_NO_KERNELS}.")
            return
        mode = mode or (Mode.TRAINING if self.training else Mode.INFERENCE)
        for layer in _layers_of(self):
            try:
                _put_in_place(layer, self.device, self.config.feature_fusion_config.radius, mode)
            except Exception as error:  # of a repository that the user registered, or of a `kernels` that differs
                _put_back(layer)
                layer.why_pytorch = _describe(error)
                _warn_of_pytorch(f"The reason: {layer.why_pytorch}.")

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


if not WHY_NO_KERNELS:
    try:  # Neither what the user has registered already nor another copy of this file is replaced.
        _register(replace=False)
    except (AttributeError, TypeError) as error:  # of a `kernels` that differs
        WHY_NO_KERNELS = f"`kernels` cannot be used: {_describe(error)}"
