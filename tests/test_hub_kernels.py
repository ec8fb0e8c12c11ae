# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The kernel in the model: put in place, equal to PyTorch, found where the user says, and gone with one warning."""

import copy
import importlib
import io
import json
import logging
import os
import pickle
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import WITHOUT_PACKAGE, fusion_config, random_pixels, tiny_config, tiny_model
from safetensors.torch import save_file
from test_integrations_aurea import (
    CODE_FILES,
    LANGUAGE_MODEL_TARGETS,
    PROCESSING_CODE,
    Collator,
    example_rows,
    lora_model,
    train_steps,
    training_arguments,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import KernelConfig, PreTrainedModel
from transformers.utils import is_kernels_available

from transformers_aurea import (
    AureaForConditionalGeneration,
    configure_kernel,
    hub_kernels_aurea,
    kernel_status,
)
from transformers_aurea.fusion_aurea import AureaSpatialRangeFusion


if is_kernels_available():
    import kernels

needs_kernels = pytest.mark.skipif(
    not is_kernels_available(), reason="`kernels` is not installed in a version that this transformers accepts"
)

# The HTTP library is that of the installed `huggingface_hub`; its major releases differ in it.
httpx = sys.modules[type(huggingface_hub.utils.get_session()).__module__.partition(".")[0]]

REPOSITORY = Path(__file__).parents[1] / "hub_kernels" / "spatial-range-attention"
ENVIRONMENT = ["PATH", "REPO", "REVISION", "TRUST_REMOTE_CODE"]

# A kernel package without native code, on its own formulation: whole neighbourhoods, unfolded.
FAKE_LAYERS = """
import torch
from torch import nn
from torch.nn.functional import pad

CALLS = []


def neighbors(features, radius):
    extent = 2 * radius + 1
    padded = pad(features.permute(0, 3, 1, 2), [radius] * 4, mode="reflect")
    return padded.unfold(2, extent, 1).unfold(3, extent, 1).flatten(4).permute(0, 2, 3, 4, 1)


class SpatialRangeWeights(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, guidance: torch.Tensor, sigma: torch.Tensor, radius: int) -> torch.Tensor:
        CALLS.append(guidance.device.type)
        guidance = guidance.float()
        dots = (neighbors(guidance, radius) * guidance[:, :, :, None]).sum(-1) / guidance.shape[3] ** 0.5
        u = torch.linspace(-1, 1, 2 * radius + 1, device=guidance.device)
        return dots.softmax(-1) * torch.exp(-(u[:, None] ** 2 + u**2).flatten() / (2 * sigma**2))


class NeighborhoodAggregate(nn.Module):
    can_torch_compile = True
    has_backward = True

    def forward(self, source: torch.Tensor, weights: torch.Tensor, radius: int) -> torch.Tensor:
        CALLS.append(source.device.type)
        return (neighbors(source, radius).float() * weights.float()[..., None]).sum(3).to(source.dtype)
"""


def write_kernel(
    folder: Path, layers: str = FAKE_LAYERS, init: str = "from . import layers", variant: str = "torch-universal"
) -> Path:
    """A kernel repository of one variant, with an id of its own: `kernels` imports each id once in a process."""
    target = folder / "build" / variant
    target.mkdir(parents=True)
    (target / "__init__.py").write_text(init)
    (target / "layers.py").write_text(layers)
    identifier = "_fake_" + "".join(letter if letter.isalnum() else "_" for letter in str(folder))
    metadata = {"id": identifier, "name": "spatial-range-attention", "version": 1, "license": "Apache-2.0"}
    (target / "metadata.json").write_text(json.dumps({**metadata, "python-depends": [], "backend": {"type": "cpu"}}))
    return folder


def calls(folder: Path) -> list[str]:
    variant = folder / "build" / "torch-universal"
    (module,) = {k.module for k in kernels.get_loaded_kernels() if Path(k.module.__file__).parent == variant}
    return module.layers.CALLS


@pytest.fixture(autouse=True)
def no_source_named(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.setenv(f"AUREA_KERNEL_{name}", "")
    logging.Logger.warning_once.cache_clear()
    if is_kernels_available():
        configure_kernel()


@pytest.fixture
def warnings(caplog) -> list[str]:
    """Calls give the warnings so far of this package and of none else."""
    return lambda: [
        record.getMessage()
        for record in caplog.records
        if record.levelname in ("WARNING", "ERROR") and "aurea" in record.name
    ]


@pytest.fixture(scope="session")
def fake_kernel(tmp_path_factory) -> Path:
    return write_kernel(tmp_path_factory.mktemp("fake"))


@pytest.fixture(scope="session")
def compiled_kernel(request, tmp_path_factory) -> Path:
    script = REPOSITORY / "build_local.py"
    if not script.is_file():
        pytest.skip("the kernel's sources are not beside these tests")
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("compiled")
    cache = getattr(request.config, "cache", None)  # shared with the kernel's own tests: compiled once
    build = (cache.mkdir("spatial-range-attention") if cache else folder) / f"torch-{torch.__version__}"
    done = subprocess.run([sys.executable, script, "cpu", "--out", build], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    shutil.copytree(build, folder / "build")
    return folder


@pytest.fixture(scope="session")
def best_kernel(request) -> Path:
    """The kernel proper, or the fake one where there is no compiler."""
    try:
        return request.getfixturevalue("compiled_kernel")
    except pytest.skip.Exception:
        return request.getfixturevalue("fake_kernel")


@pytest.fixture
def kernel(best_kernel) -> Path:
    """A kernel's folder, named for the models of this test."""
    configure_kernel(path=best_kernel)
    return best_kernel


def registered(folder: Path) -> dict:
    """As a user maps the layers to a kernel with `kernels` itself."""
    return {name: {"cpu": kernels.LocalLayerRepository(folder, layer_name=name)} for name in hub_kernels_aurea.LAYERS}


@pytest.fixture
def cached_repository(tmp_path, monkeypatch):
    """Puts a kernel's folder in a cache of the Hub, as a download does, and gives the repository's name."""

    def put(folder: Path) -> str:
        cached = tmp_path / "cache" / "kernels--someone--cached"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "v1").write_text("0" * 40)
        shutil.copytree(folder / "build", cached / "snapshots" / ("0" * 40) / "build")
        monkeypatch.setattr("kernels.resolver.CACHE_DIR", tmp_path / "cache")
        return "someone/cached"

    return put


@pytest.fixture
def model() -> AureaForConditionalGeneration:
    return tiny_model()


def picture_inputs(model) -> dict:
    input_ids = torch.arange(3, 21).reshape(2, 9)
    input_ids[:, 1] = model.config.image_token_id
    return {"input_ids": input_ids, "pixel_values": random_pixels(2, model.config)}


def logits_and_gradients(model, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": output.logits.detach(), **gradients}


def assert_same(actual: dict, expected: dict, tolerance: float) -> None:
    """Differences relative to the largest value of each tensor, and to a floor for gradients that cancel to zero."""
    assert actual.keys() == expected.keys()
    floor = 1e-3 * max(tensor.abs().max() for name, tensor in expected.items() if name != "logits")
    for name, tensor in expected.items():
        error = (actual[name] - tensor).float().abs().max() / max(tensor.float().abs().max(), floor)
        assert error <= tolerance, f"{name}: {error:.1e}"


@needs_kernels
class TestInPlace:
    def test_from_pretrained_puts_it_in_place_and_it_stays(self, kernel, converted):
        model = AureaForConditionalGeneration.from_pretrained(converted, use_kernels=True)
        for mode in (model.eval, model.train, model.eval):
            mode()
            status = model.kernel_status()
            assert status.implementation == "kernel", status
            assert Path(status.source).parent.parent == kernel
        assert kernel_status(model.model.fusion) == status

    def test_whether_it_could_be_used_is_told_without_weights(self, fake_kernel, tmp_path):
        with torch.device("meta"):
            model = AureaForConditionalGeneration(tiny_config())
        configure_kernel(path=fake_kernel)
        status = hub_kernels_aurea.usable_kernel(model, torch.device("cpu"))
        assert (status.implementation, status.source) == ("kernel", str(fake_kernel / "build" / "torch-universal"))
        configure_kernel(path=tmp_path / "absent")
        status = hub_kernels_aurea.usable_kernel(model, torch.device("cpu"))
        assert status.implementation == "pytorch" and "absent failed on cpu at radius 1" in status.reason
        assert model.kernel_status().reason == hub_kernels_aurea.NOT_ASKED_FOR  # nothing was put in place

    def test_the_model_calls_it_once_a_layer(self, fake_kernel, model):
        configure_kernel(path=fake_kernel)
        model.set_use_kernels(True)
        calls(fake_kernel).clear()
        model(**picture_inputs(model))
        attentions = len(model.model.fusion.semantic_layers) + len(model.model.fusion.joint_layers)
        assert calls(fake_kernel) == ["cpu"] * 2 * attentions

    def test_logits_and_all_gradients_are_those_of_pytorch(self, kernel, converted, golden_processor):
        inputs = Collator(golden_processor)(example_rows(3))
        inputs.pop("labels")
        model = AureaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).train()
        expected = logits_and_gradients(model, inputs)
        model.set_use_kernels(True)
        actual = logits_and_gradients(model, inputs)
        assert sum("fusion" in name for name in expected) > 50
        assert_same(actual, expected, 1e-4)

    def test_greedy_tokens_are_the_recorded_ones(self, kernel, converted, golden_processor, pictures, facts, goldens):
        model = AureaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32, use_kernels=True).eval()
        inputs = golden_processor(images=pictures["rgb"], text=facts["message_image"], return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=12, eos_token_id=None)
        assert torch.equal(tokens[:, inputs["input_ids"].shape[1] :], goldens["gen/greedy_image/tokens"])
        assert model.kernel_status().implementation == "kernel"

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_gradient_checkpointing_changes_no_gradient(self, kernel, model, use_reentrant):
        inputs = picture_inputs(model)
        expected = logits_and_gradients(model.train(), inputs)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        model.set_use_kernels(True)
        assert_same(logits_and_gradients(model, inputs), expected, 1e-4)

    def test_autocast(self, kernel, model):
        inputs = picture_inputs(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = logits_and_gradients(model, inputs)
            model.set_use_kernels(True)
            actual = logits_and_gradients(model, inputs)
        assert_same(actual, expected, 0.1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, kernel, dtype, tmp_path, model):
        model.save_pretrained(tmp_path)
        model = AureaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
        inputs = picture_inputs(model)
        expected = logits_and_gradients(model, inputs)
        model.set_use_kernels(True)
        assert model.model.fusion.output_proj.weight.dtype is dtype
        assert_same(logits_and_gradients(model, inputs), expected, 0.1 if dtype is torch.bfloat16 else 0.02)

    def test_the_fusion_compiles_in_one_graph(self, kernel):
        torch.manual_seed(0)
        fusion = AureaSpatialRangeFusion(fusion_config(6, 4, (4, 5)))
        maps = [torch.randn(1, 4, 5, channels, requires_grad=True) for channels in (6, 4)]
        expected = fusion(*maps)
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        with kernels.use_kernel_mapping(registered(kernel)):
            kernels.kernelize(fusion, mode=mode, device="cpu", use_fallback=False)
        assert kernel_status(fusion).implementation == "kernel"
        torch.compiler.reset()
        actual = torch.compile(fusion, fullgraph=True, backend="aot_eager")(*maps)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
        gradients = [torch.autograd.grad(output.square().sum(), maps) for output in (actual, expected)]
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)

    def test_a_saved_folder_shows_no_trace_of_it(self, kernel, model, tmp_path):
        model.save_pretrained(tmp_path / "without" / "model")
        model.set_use_kernels(True)
        model.save_pretrained(tmp_path / "with" / "model")
        names = {path.name for path in (tmp_path / "with" / "model").iterdir()}
        assert names >= CODE_FILES - PROCESSING_CODE | {"hub_kernels_aurea.py"}
        assert names == {path.name for path in (tmp_path / "without" / "model").iterdir()}
        for name in names:
            assert (tmp_path / "with" / "model" / name).read_bytes() == (
                tmp_path / "without" / "model" / name
            ).read_bytes(), name

    def test_a_deep_copy_has_it_and_is_its_own(self, kernel, model):
        model.set_use_kernels(True)
        twin = copy.deepcopy(model)
        assert twin.kernel_status() == model.kernel_status()
        twin.set_use_kernels(False)
        assert twin.kernel_status().implementation == "pytorch"
        assert model.kernel_status().implementation == "kernel"

    @pytest.mark.parametrize("save", ["pickle", "torch"])
    def test_it_is_in_place_again_after_unpickling(self, kernel, model, warnings, save):
        model.set_use_kernels(True)
        file = io.BytesIO()
        pickle.dump(model, file) if save == "pickle" else torch.save(model, file)
        file.seek(0)
        loaded = pickle.load(file) if save == "pickle" else torch.load(file, weights_only=False)
        assert loaded.use_kernels and loaded.kernel_status() == model.kernel_status() and warnings() == []
        part = pickle.loads(pickle.dumps(model.model.fusion))
        assert kernel_status(part)[:2] == ("pytorch", None) and "unpickled" in kernel_status(part).reason
        model.set_use_kernels(False)
        assert pickle.loads(pickle.dumps(model)).kernel_status() == model.kernel_status()

    def test_under_a_hook_of_accelerate_it_is_told(self, kernel, model):
        hooks = pytest.importorskip("accelerate.hooks")
        layer = model.model.fusion.joint_layers[0].spatial_range_weights
        hooks.add_hook_to_module(layer, hooks.ModelHook())
        hooked = layer.forward
        model.set_use_kernels(False)  # as `from_pretrained` ends
        assert layer.forward is hooked
        assert model.kernel_status().implementation == "pytorch"
        hooks.remove_hook_from_module(layer)
        model.set_use_kernels(True)
        hooks.add_hook_to_module(layer, hooks.ModelHook())
        assert model.kernel_status().implementation == "kernel"
        hooks.remove_hook_from_module(layer)
        model.set_use_kernels(False)
        assert model.kernel_status()[:2] == ("pytorch", None)

    def test_switched_off_it_leaves_what_was_before(self, kernel, model):
        inputs = picture_inputs(model)
        before, expected = model.kernel_status(), model(**inputs).logits
        model.set_use_kernels(True)
        model.set_use_kernels(False)
        assert model.kernel_status() == before
        assert model.train().eval().kernel_status() == before
        assert torch.equal(model(**inputs).logits, expected)

    def test_it_follows_the_device(self, kernel, model, warnings):
        model.set_use_kernels(True)
        status = model.kernel_status()
        model.to("meta")
        assert model.kernel_status()[:2] == ("pytorch", None) and "on the meta device" in model.kernel_status().reason
        model.to_empty(device="cpu")
        assert model.kernel_status() == status
        assert warnings() == []

    def test_the_trainer_trains_with_it(self, kernel, converted, golden_processor, tmp_path):
        from transformers import Trainer

        model = AureaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32, use_kernels=True)
        before = model.model.fusion.joint_layers[0].sigma_spatial.item()
        arguments = training_arguments(tmp_path, max_steps=1, save_strategy="no", bf16=True)
        Trainer(model, arguments, Collator(golden_processor), train_dataset=example_rows(3)).train()
        assert model.training and model.kernel_status().implementation == "kernel"
        assert model.model.fusion.joint_layers[0].sigma_spatial.item() != before

    def test_an_adapter_trains_on_top_of_it(self, kernel, converted, golden_processor):
        pytest.importorskip("peft")
        base = AureaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32, use_kernels=True)
        model = lora_model(base, LANGUAGE_MODEL_TARGETS + "|.*fusion.*fc1")
        losses = train_steps(model, Collator(golden_processor)(example_rows(3)), steps=2)
        assert losses[1] < losses[0]
        assert kernel_status(model).implementation == "kernel"

    def test_it_stays_where_a_device_map_puts_the_fusion(self, kernel, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path / "model")
        inputs = picture_inputs(model)
        with torch.no_grad():
            expected = model(**inputs).logits
            parts = ("vision_model", "spatial_vision_model", "multi_modal_projector", "language_model")
            device_map = {f"model.{part}": "cpu" for part in parts} | {"model.fusion": "disk", "lm_head": "cpu"}
            for placement in ({"": "cpu"}, device_map):
                loaded = AureaForConditionalGeneration.from_pretrained(
                    tmp_path / "model", device_map=placement, offload_folder=tmp_path, use_kernels=True
                )
                assert loaded.eval().kernel_status().implementation == "kernel"
                torch.testing.assert_close(loaded(**inputs).logits, expected, atol=1e-4, rtol=1e-4)


def edited(*replacements: tuple[str, str]) -> str:
    layers = FAKE_LAYERS
    for old, new in replacements:
        assert old in layers
        layers = layers.replace(old, new)
    return layers


BROKEN_LAYERS = {
    "wrong values": (edited(("(2 * sigma**2)", "sigma**2")), "not close"),
    "not a number": (edited((".to(source.dtype)", ".to(source.dtype) * float('nan')")), "not close"),
    "wrong gradient": (edited(("guidance[:, :, :, None]", "guidance[:, :, :, None].detach()")), "not close"),
    "another dtype": (edited((".to(source.dtype)", ".double()")), "dtype"),
    "unsupported GPU": (
        edited(("CALLS.append(guidance", "raise RuntimeError('no kernel image is available')\n        (guidance")),
        "RuntimeError: no kernel image",
    ),
    "another signature": (edited((", radius: int) ->", ", radius: int, more=None) ->")), "different number of arg"),
    "no backward": (edited(("has_backward = True", "has_backward = False")), "does not support mode"),
    "no such layer": (edited(("class NeighborhoodAggregate", "class Other")), "NeighborhoodAggregate"),
    "a syntax error": ("class", "SyntaxError"),
}


def assert_falls_back(model, warnings, *patterns: str) -> None:
    """One warning, the PyTorch path, and neither another warning nor another attempt when it is asked for again."""
    inputs = picture_inputs(model)
    expected = model(**inputs).logits
    model.set_use_kernels(True)
    assert len(warnings()) == 1, warnings()
    (message,) = warnings()
    assert message.startswith("Aurea's kernel is not used, PyTorch computes instead.")
    for pattern in patterns:
        assert pattern in message
    model.train()
    model.eval()
    tiny_model().set_use_kernels(True)
    assert len(warnings()) == 1
    status = model.kernel_status()
    assert (status.implementation, status.source) == ("pytorch", None)
    assert status.reason in message
    assert torch.equal(model(**inputs).logits, expected)


@needs_kernels
class TestFailures:
    def test_no_source_named_touches_no_network(self, model, warnings, monkeypatch, caplog):
        def refuse(*args, **kwargs):
            raise AssertionError("the network was touched")

        for name in ("socket", "getaddrinfo", "create_connection"):
            monkeypatch.setattr(socket, name, refuse)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        assert_falls_back(model, warnings, "No source is named", "AUREA_KERNEL_PATH", "AUREA_KERNEL_REPO")
        assert [record for record in caplog.records if record.name.startswith("kernels.")] == []

    def test_no_such_folder(self, model, warnings, monkeypatch, tmp_path):
        monkeypatch.setenv("AUREA_KERNEL_PATH", str(tmp_path / "nowhere"))
        assert_falls_back(model, warnings, str(tmp_path / "nowhere"), "FileNotFoundError", "build_local.py")

    def test_no_build_for_this_platform(self, model, warnings, tmp_path):
        configure_kernel(path=write_kernel(tmp_path, variant="torch-stable-abi211-cu130-s390x-linux"))
        assert_falls_back(model, warnings, "Cannot find a build variant for this system", "s390x", "build_local.py")

    def test_sources_that_were_not_built(self, model, warnings, tmp_path):
        (tmp_path / "build.toml").touch()
        configure_kernel(path=tmp_path)
        assert_falls_back(model, warnings, "Cannot find a build variant", "build_local.py")

    def test_a_corrupt_library(self, model, warnings, tmp_path):
        write_kernel(tmp_path, init="from . import _library")
        (tmp_path / "build" / "torch-universal" / "_library.abi3.so").write_bytes(b"\x7fELF" + bytes(100))
        configure_kernel(path=tmp_path)
        assert_falls_back(model, warnings, "ImportError", "_library.abi3.so")

    @pytest.mark.parametrize("source", ["local", "hub"])
    def test_a_truncated_build(
        self, source, compiled_kernel, cached_repository, model, warnings, tmp_path, monkeypatch
    ):
        """Its import would end the process."""
        monkeypatch.setattr(kernels.load, "get_kernel_with_resolver", None)
        folder = shutil.copytree(compiled_kernel, tmp_path / "kernel")
        (library,) = folder.glob("build/*/*.so")
        library.write_bytes(library.read_bytes()[: library.stat().st_size // 2])
        if source == "local":
            configure_kernel(path=folder)
        else:
            configure_kernel(repo_id=cached_repository(folder), trust_remote_code=True)
        assert_falls_back(
            model, warnings, f"does not match the expected digest: File hash mismatch for {library.name}"
        )

    @pytest.mark.parametrize("named", ["", "build", "build/torch-stable-abi211-cu130-s390x-linux"])
    def test_a_damaged_variant_is_refused_whatever_its_platform(self, named, model, warnings, tmp_path):
        folder = write_kernel(tmp_path)
        other = folder / "build" / "torch-stable-abi211-cu130-s390x-linux"
        shutil.copytree(folder / "build" / "torch-universal", other)
        metadata = json.loads((other / "metadata.json").read_text())
        metadata["digest"] = {"algorithm": "sha256", "files": {"layers.py": "damaged"}}
        (other / "metadata.json").write_text(json.dumps(metadata))
        configure_kernel(path=folder / named)
        assert_falls_back(model, warnings, "File hash mismatch for layers.py")
        shutil.rmtree(other)
        if not (folder / named).exists():
            return
        configure_kernel(path=folder / named)
        model.set_use_kernels(True)
        assert model.kernel_status().implementation == "kernel"

    def test_a_radius_that_the_kernel_does_not_serve(self, warnings, tmp_path):
        signature = "radius: int) -> torch.Tensor:\n"
        limit = "        assert radius <= 6, f'at most 6, got {radius}'\n"
        configure_kernel(path=write_kernel(tmp_path, edited((signature, signature + limit))))
        config = tiny_config()
        config.vision_config.image_size = config.spatial_vision_config.image_size = 70
        config.feature_fusion_config.radius = 7
        served, other = tiny_model(), AureaForConditionalGeneration(config).eval()
        for model in (served, other, other, served):
            model.set_use_kernels(True)
        assert served.kernel_status().implementation == "kernel" and len(warnings()) == 1
        status = other.kernel_status()
        assert status.implementation == "pytorch" and status.reason in warnings()[0]
        assert "at radius 7: AssertionError: at most 6, got 7" in status.reason
        input_ids = torch.tensor([[5, config.image_token_id, 5]] * 2)
        assert other(input_ids=input_ids, pixel_values=random_pixels(2, config)).logits.isfinite().all()

    @pytest.mark.parametrize("device_type", ["mps", "xpu"])
    def test_a_type_of_device_without_a_kernel(self, device_type, fake_kernel, model, warnings, monkeypatch):
        configure_kernel(path=fake_kernel)
        monkeypatch.setattr(type(model), "device", property(lambda self: torch.device(device_type)))
        assert_falls_back(model, warnings, f"failed on {device_type} at radius 1")

    def test_metadata_that_cannot_be_read(self, model, warnings, tmp_path):
        (write_kernel(tmp_path) / "build" / "torch-universal" / "metadata.json").write_text("{")
        configure_kernel(path=tmp_path)
        assert_falls_back(model, warnings, "Cannot parse metadata", "metadata.json")

    def test_another_package(self, model, warnings, tmp_path):
        configure_kernel(path=write_kernel(tmp_path, init="from torch import relu"))
        assert_falls_back(model, warnings, "layers")

    @pytest.mark.parametrize("case", BROKEN_LAYERS)
    def test_a_build_that_does_not_work_is_found_when_loaded(self, case, model, warnings, tmp_path):
        layers, pattern = BROKEN_LAYERS[case]
        configure_kernel(path=write_kernel(tmp_path, layers))
        assert_falls_back(model, warnings, pattern, str(tmp_path))

    def test_fake_tensors_fail_no_check(self, fake_kernel, model, warnings):
        configure_kernel(path=fake_kernel)
        with FakeTensorMode():
            model.set_use_kernels(True)
        assert model.kernel_status().implementation == "pytorch" and warnings() == []
        model.set_use_kernels(True)
        assert model.kernel_status().implementation == "kernel" and warnings() == []

    def test_each_device_is_checked_once(self, fake_kernel, model, monkeypatch):
        checked = []
        monkeypatch.setattr(
            hub_kernels_aurea,
            "_results",
            lambda layers, device, dtype, radius: checked.append((device, radius)) or torch.empty(0),
        )
        monkeypatch.setattr("kernels.layer.repos._find_capability", lambda: 90)
        configure_kernel(path=fake_kernel)
        for index in (0, 1, 1):
            device = torch.device("cuda", index)
            monkeypatch.setattr(type(model), "device", property(lambda self, device=device: device))
            model.set_use_kernels(True)
            assert model.kernel_status().implementation == "kernel"
        both_layers_and_dtypes = 4
        assert checked == [(torch.device("cuda", i), 1) for i in (0, 1) for _ in range(both_layers_and_dtypes)]

    def test_offline(self, model, warnings, monkeypatch):
        monkeypatch.setenv("AUREA_KERNEL_REPO", "someone/spatial-range-attention")
        assert_falls_back(model, warnings, "someone/spatial-range-attention@v1", "offline mode")


@pytest.fixture
def hub(monkeypatch):
    """A Hub in this process: give it a handler of requests; it keeps those that came."""
    requests = []

    def answer_with(handler):
        def handle(request: httpx.Request) -> httpx.Response:
            if "/api/agent-harnesses" not in str(request.url):  # asked once, by huggingface_hub for itself
                requests.append(str(request.url))
            return handler(request)

        huggingface_hub.set_client_factory(lambda: httpx.Client(transport=httpx.MockTransport(handle)))
        return requests

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between retries
    yield answer_with
    huggingface_hub.set_client_factory(httpx.Client)
    huggingface_hub.close_session()


@needs_kernels
class TestHub:
    REPO = "someone/spatial-range-attention"

    def test_no_network(self, hub, model, warnings):
        def fail(request):
            raise httpx.ConnectError("name resolution failed")

        requests = hub(fail)
        configure_kernel(repo_id=self.REPO, trust_remote_code=True)
        assert_falls_back(model, warnings, self.REPO, "name resolution failed", "network")
        assert requests and all(self.REPO in url for url in requests)
        count = len(requests)
        model.train()
        tiny_model().set_use_kernels(True)
        assert len(requests) == count

    @pytest.mark.parametrize("trusted", ["", "0", "false"])
    def test_a_publisher_who_is_not_trusted(self, hub, model, warnings, monkeypatch, trusted):
        requests = hub(lambda request: httpx.Response(200, json={"name": "someone", "fullname": "Someone"}))
        monkeypatch.setenv("AUREA_KERNEL_TRUST_REMOTE_CODE", trusted)
        configure_kernel(repo_id=self.REPO)
        assert_falls_back(model, warnings, "not from a trusted publisher", "AUREA_KERNEL_TRUST_REMOTE_CODE=1")
        assert requests == ["https://huggingface.co/api/organizations/someone/overview"]

    def test_no_such_revision(self, hub, model, warnings, monkeypatch):
        requests = hub(lambda request: httpx.Response(404, headers={"X-Error-Code": "RevisionNotFound"}))
        monkeypatch.setenv("AUREA_KERNEL_REPO", self.REPO)
        monkeypatch.setenv("AUREA_KERNEL_REVISION", "v7")
        monkeypatch.setenv("AUREA_KERNEL_TRUST_REMOTE_CODE", "1")
        assert_falls_back(model, warnings, f"{self.REPO}@v7", "404")
        assert any("/v7" in url for url in requests)

    def test_a_local_build_that_fails_is_not_replaced(self, hub, model, warnings, tmp_path):
        requests = hub(lambda request: httpx.Response(500))
        configure_kernel(path=tmp_path / "nowhere", repo_id=self.REPO, trust_remote_code=True)
        assert_falls_back(model, warnings, f"{tmp_path / 'nowhere'} failed", "FileNotFoundError", "build_local.py")
        assert requests == []

    def test_a_local_build_comes_first(self, hub, model, warnings, fake_kernel):
        requests = hub(lambda request: httpx.Response(500))
        configure_kernel(path=fake_kernel, repo_id=self.REPO)
        model.set_use_kernels(True)
        assert Path(model.kernel_status().source).is_relative_to(fake_kernel)
        assert requests == [] and warnings() == []

    def test_a_downloaded_repository_is_loaded(self, cached_repository, model, warnings, tmp_path):
        configure_kernel(repo_id=cached_repository(write_kernel(tmp_path / "built")), trust_remote_code=True)
        model.set_use_kernels(True)
        assert model.kernel_status().implementation == "kernel" and warnings() == []


@needs_kernels
class TestSources:
    def test_the_environment_names_a_repository_a_build_or_a_variant(self, fake_kernel, model, monkeypatch):
        for folder in (fake_kernel, fake_kernel / "build", fake_kernel / "build" / "torch-universal"):
            monkeypatch.setenv("AUREA_KERNEL_PATH", str(folder))
            model.set_use_kernels(True)
            assert model.kernel_status().implementation == "kernel"
            model.set_use_kernels(False)

    def test_what_failed_is_tried_again_once_it_is_named_anew(
        self, fake_kernel, model, warnings, monkeypatch, tmp_path
    ):
        configure_kernel(path=tmp_path / "kernel")
        model.set_use_kernels(True)
        assert model.kernel_status().implementation == "pytorch" and len(warnings()) == 1
        write_kernel(tmp_path / "kernel")
        configure_kernel(path=tmp_path / "kernel")
        model.set_use_kernels(True)
        assert model.kernel_status().implementation == "kernel" and len(warnings()) == 1

    def test_relative_paths_and_the_home_folder(self, fake_kernel, model, monkeypatch, warnings):
        monkeypatch.chdir(fake_kernel.parent)
        configure_kernel(path=fake_kernel.name)
        model.set_use_kernels(True)
        assert model.kernel_status().source == str(fake_kernel / "build" / "torch-universal")
        monkeypatch.setenv("HOME", str(fake_kernel.parent))
        configure_kernel(path=f"~/{fake_kernel.name}")
        model.set_use_kernels(True)
        assert model.kernel_status().implementation == "kernel" and warnings() == []
        variants = [Path(loaded.module.__file__).parent for loaded in kernels.get_loaded_kernels()]
        assert variants.count(fake_kernel / "build" / "torch-universal") == 1  # operators can be registered only once

    def test_what_is_not_given_stays_as_it_is(self, fake_kernel, monkeypatch, model, warnings):
        configure_kernel(path=fake_kernel)
        configure_kernel(repo_id="someone/other")
        model.set_use_kernels(True)
        assert model.kernel_status().implementation == "kernel" and warnings() == []
        configure_kernel(path="")
        model.set_use_kernels(True)
        assert "someone/other@v1 failed" in model.kernel_status().reason and len(warnings()) == 1

    def test_another_copy_of_the_code(self, model, fake_kernel, tmp_path, monkeypatch):
        """As when the package is imported and a folder is loaded with `trust_remote_code` in one process."""
        source = Path(hub_kernels_aurea.__file__)
        package = tmp_path / "copied"
        package.mkdir()
        (package / "__init__.py").touch()
        for name in ("hub_kernels_aurea.py", "spatial_range_attention_aurea.py"):
            shutil.copy(source.with_name(name), package)
        monkeypatch.syspath_prepend(tmp_path)
        twin = importlib.import_module("copied.hub_kernels_aurea")
        # Each copy tells of the other's models, and each can say where the kernel comes from.
        twin.configure_kernel(path=fake_kernel)
        model.set_use_kernels(True)
        assert twin.kernel_status(model) == model.kernel_status()
        assert model.kernel_status().implementation == "kernel"
        twin.configure_kernel(path=tmp_path / "nowhere")
        model.set_use_kernels(True)
        assert "nowhere" in model.kernel_status().reason

    def test_what_the_user_registers_is_used_where_no_source_is_named(self, model, fake_kernel, warnings, tmp_path):
        model.set_use_kernels(True)
        assert model.kernel_status().implementation == "pytorch" and len(warnings()) == 1
        with kernels.use_kernel_mapping(registered(fake_kernel)):
            model.set_use_kernels(True)
            assert model.kernel_status().implementation == "kernel" and len(warnings()) == 1
            configure_kernel(path=tmp_path / "nowhere")
            model.set_use_kernels(True)
        assert "nowhere" in model.kernel_status().reason

    def test_what_the_user_registers_fails_with_one_warning(self, model, warnings, fake_kernel):
        class Unreachable:
            def load(self):
                raise ConnectionError("name resolution failed")

        mapping = {name: {"cpu": Unreachable()} for name in hub_kernels_aurea.LAYERS}
        with kernels.use_kernel_mapping(mapping):
            assert_falls_back(model, warnings, "registered failed", "ConnectionError: name resolution failed")
            configure_kernel(path=fake_kernel)
            model.set_use_kernels(True)
            assert model.kernel_status().implementation == "kernel"

    def test_what_the_user_registers_is_compared(self, model, warnings, tmp_path):
        with kernels.use_kernel_mapping(registered(write_kernel(tmp_path, BROKEN_LAYERS["wrong values"][0]))):
            assert_falls_back(model, warnings, "registered failed", "not close")

    def test_no_repository_is_asked_for_other_layers(self, model, fake_kernel, warnings):
        """As on a GPU, where transformers maps the decoder's norms to a repository that the user did not name."""
        configure_kernel(path=fake_kernel)
        unreachable = kernels.LayerRepository("someone/norms", layer_name="RMSNorm", version=1)
        with kernels.use_kernel_mapping({"RMSNorm": {"cpu": unreachable}}):
            model.set_use_kernels(True)
            model.train()
            model.eval()
            assert model.use_kernels and model.kernel_status().implementation == "kernel"
            assert warnings() == []
            inputs = picture_inputs(model)
            torch.testing.assert_close(model(**inputs).logits, tiny_model()(**inputs).logits, atol=1e-4, rtol=1e-4)
            model.set_use_kernels(False)
            assert model.kernel_status().implementation == "pytorch"

    def test_a_kernel_config_goes_the_way_of_transformers(self, model, fake_kernel, monkeypatch):
        configure_kernel(path=fake_kernel)
        asked = []
        monkeypatch.setattr(PreTrainedModel, "set_use_kernels", lambda self, *arguments: asked.append(arguments))
        config = KernelConfig({})
        model.set_use_kernels(True, config)
        assert asked == [(True, config, None)]


@needs_kernels
class TestStatus:
    def test_not_asked_for(self, model):
        status = kernel_status(model)
        assert (status.implementation, status.source) == ("pytorch", None)
        assert "use_kernels=True" in status.reason

    def test_no_longer_asked_for(self, model, tmp_path):
        configure_kernel(path=tmp_path / "nowhere")
        model.set_use_kernels(True)
        assert "nowhere failed" in model.kernel_status().reason
        model.set_use_kernels(False)
        assert model.kernel_status() == tiny_model().kernel_status()

    def test_layers_that_differ(self, model, fake_kernel):
        configure_kernel(path=fake_kernel)
        model.set_use_kernels(True)
        del model.model.fusion.joint_layers[1].spatial_range_weights.forward
        assert model.kernel_status() == tiny_model().kernel_status()

    def test_a_layer_that_another_hand_replaced(self, model):
        layer = model.model.fusion.semantic_layers[0].neighborhood_aggregate
        layer.forward = lambda *args: None
        assert kernel_status(layer)[:2] == ("kernel", str(Path(__file__).parent))
        assert model.kernel_status() == tiny_model().kernel_status()

    def test_a_model_without_the_attention(self, warnings):
        config = tiny_config()
        config.feature_fusion_config.fusion_type = "concat"
        model = AureaForConditionalGeneration(config)
        model.set_use_kernels(True)
        assert model.kernel_status() == ("pytorch", None, "there is no spatial-range attention in it")
        assert warnings() == []


SCRIPT = """
import json, logging, sys
logging.basicConfig(level=logging.WARNING)
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

folder, inputs, expected = sys.argv[1:]
settings = {"trust_remote_code": True, "dtype": torch.float32}
inputs, expected = load_file(inputs), load_file(expected)["logits"]
report = []

def check(model):
    with torch.no_grad():
        difference = (model(**inputs).logits - expected).abs().max().item()
    report.append([*model.kernel_status(), difference])
    return model
"""

REMOTE = """
model = check(AutoModelForImageTextToText.from_pretrained(folder, use_kernels=True, **settings))
check(model.train().eval())
model.set_use_kernels(False)
check(model)
model.configure_kernel(path="nowhere")
model.set_use_kernels(True)
check(model)
"""

WITHOUT_KERNELS = """
import importlib.abc, importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: None if name == "kernels" else find_spec(name, *args)

class NoKernels(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "kernels":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NoKernels())
"""

REFUSED_KERNELS = [
    pytest.param("as it is", marks=pytest.mark.skipif(is_kernels_available(), reason="`kernels` fits")),
    "none",
    "99.0",
]


def refused_kernels(installed: str, folder: Path) -> tuple[str, dict[str, str]]:
    """What makes `kernels` one that cannot be used: code to run first, and the environment."""
    if installed == "as it is":
        return "", {}
    if installed == "none":
        return WITHOUT_KERNELS, {}
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("raise AssertionError('imported, though it does not fit')")
    metadata = folder / f"kernels-{installed}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {installed}\n")
    return "", {"PYTHONPATH": str(folder)}


REFUSED = """
import copy

model = check(AutoModelForImageTextToText.from_pretrained(folder, **settings).train().eval())
print("Now it is asked for", file=sys.stderr)
asked = check(AutoModelForImageTextToText.from_pretrained(folder, use_kernels=True, **settings))
check(asked.train().eval())
model.set_use_kernels(True)
check(model)
check(copy.deepcopy(model))
assert asked.use_kernels and model.use_kernels
assert not any("forward" in vars(module) for module in (*model.modules(), *asked.modules()))
model.set_use_kernels(False)
assert not model.use_kernels
check(model)
"""

WELL = """
check(AutoModelForImageTextToText.from_pretrained(folder, **settings).train().eval())
model = check(AutoModelForImageTextToText.from_pretrained(folder, use_kernels=True, **settings))
check(model.train().eval())
"""

SWITCHED_OFF = """
AutoModelForImageTextToText.from_pretrained(folder, **settings).configure_kernel()
check(AutoModelForImageTextToText.from_pretrained(folder, use_kernels=True, **settings))
"""


class TestRemoteCode:
    """A folder loaded with `trust_remote_code`, in a process in which this package cannot be imported."""

    @pytest.fixture(scope="class")
    def saved(self, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("saved")
        model = tiny_model()
        model.save_pretrained(folder / "model")
        inputs = picture_inputs(model)
        save_file(inputs, folder / "inputs.safetensors")
        with torch.no_grad():
            save_file({"logits": model(**inputs).logits}, folder / "logits.safetensors")
        return folder

    def run(self, saved: Path, script: str, prelude: str = "", **environment) -> tuple[list, str]:
        inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        inherited |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(saved / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        files = [saved / name for name in ("model", "inputs.safetensors", "logits.safetensors")]
        code = WITHOUT_PACKAGE + prelude + SCRIPT + script + "\nprint(json.dumps(report))"
        command = [sys.executable, "-c", code, *map(str, files)]
        done = subprocess.run(command, cwd=saved, env=inherited | environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    @needs_kernels
    def test_where_all_goes_well_there_is_no_warning(self, kernel, saved):
        report, errors = self.run(saved, WELL, AUREA_KERNEL_PATH=str(kernel))
        assert [status[0] for status in report] == ["pytorch", "kernel", "kernel"] and errors == ""

    @needs_kernels
    def test_the_kernel_is_in_place(self, kernel, saved):
        report, errors = self.run(saved, REMOTE, AUREA_KERNEL_PATH=str(kernel))
        loaded, again, off, failed = report
        assert loaded == again
        assert loaded[0] == "kernel" and Path(loaded[1]).is_relative_to(kernel) and loaded[3] < 1e-4
        assert off[0] == "pytorch" and "none was asked for" in off[2] and off[3] < 1e-5
        assert failed[0] == "pytorch" and "FileNotFoundError" in failed[2]
        assert errors.count("Aurea's kernel is not used") == 1

    @pytest.mark.parametrize("installed", REFUSED_KERNELS)
    def test_without_kernels_that_fit_it_is_pytorch_with_one_warning(self, installed, saved, tmp_path):
        prelude, settings = refused_kernels(installed, tmp_path)
        reports, errors = self.run(saved, REFUSED, prelude, **settings)
        assert [implementation for implementation, *_ in reports] == ["pytorch"] * 6
        for _, source, _, difference in reports:
            assert source is None and difference == reports[0][3] < 1e-5
        not_asked, *refused, off = [reason for _, _, reason, _ in reports]
        assert "none was asked for" in not_asked and off == not_asked
        assert "pip install 'transformers[kernels]'" in refused[0] and len(set(refused)) == 1
        before, warning = errors.splitlines()
        assert before == "Now it is asked for"
        assert warning.endswith(f"Aurea's kernel is not used, PyTorch computes instead. {refused[0]}")

    @needs_kernels
    @pytest.mark.parametrize(
        "lacking", ["LocalLayerRepository", "kernelize", "use_kernel_mapping", "Mode", "Metadata"]
    )
    def test_a_release_of_kernels_that_differs(self, lacking, saved, fake_kernel):
        """What a later one lacks is noticed when the kernel is asked for, with one warning."""
        prelude = f"import kernels, transformers.integrations.hub_kernels\ndel kernels.{lacking}\n"
        report, errors = self.run(saved, WELL, prelude, AUREA_KERNEL_PATH=str(fake_kernel))
        assert [status[:2] for status in report] == [["pytorch", None]] * 3
        assert f"AttributeError: module 'kernels' has no attribute '{lacking}'" in report[1][2]
        assert len(errors.splitlines()) == 1 and errors.strip().endswith(report[1][2])

    @needs_kernels
    @pytest.mark.parametrize("variable, value", [("USE_HUB_KERNELS", "NO"), ("DISABLE_KERNEL_MAPPING", "1")])
    def test_switched_off_by_the_environment(self, variable, value, saved, fake_kernel):
        ((implementation, source, reason, difference),), errors = self.run(
            saved, SWITCHED_OFF, AUREA_KERNEL_PATH=str(fake_kernel), **{variable: value}
        )
        assert (implementation, source) == ("pytorch", None) and variable in reason and difference < 1e-5
        assert errors.count("Aurea's kernel is not used") == 1
