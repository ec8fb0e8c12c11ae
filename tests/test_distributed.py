# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Two processes on the CPU (gloo): DistributedDataParallel, torch's FSDP2, tensor parallelism, streaming; and the
launch configurations in examples/accelerate.

Each training here is compared with one process that gets the same four rows a step. The sums are the same numbers
added in another order, so float32 results differ by some 1e-7 of their size; ten to a hundred times that is allowed.
A function that runs in two processes is `worker_...`.
"""

import json
import os
import socket
import sys
import tempfile
import time
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import ParallelismConfig
from conftest import (
    FIXTURES,
    FORKS,
    IMAGE_TOKEN_ID,
    become,
    random_pixels,
    run_script,
    tiny_config,
    tiny_model,
)
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoModelForImageTextToText, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from transformers_aurea import AureaConfig, AureaForConditionalGeneration
from transformers_aurea.cross_attention_aurea import AureaWovenDecoderLayerMixin
from transformers_aurea.fusion_aurea import FUSIONS
from transformers_aurea.training_aurea import AuxiliaryLossLogger, GroupGradientNorms, set_trainable
from transformers_aurea.weaving_aurea import woven_class


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NUM_PROCESSES = 2
ROWS_PER_STEP = 4
# Pictures of each row: text beside pictures, text alone in both processes, pictures beside text, pictures everywhere.
PICTURES = ((0, 0, 1, 2), (0, 0, 0, 0), (2, 1, 0, 0), (1, 0, 0, 2))
AUXILIARY_LOSSES = {"feature_consistency_coef": 0.5, "feature_diversity_coef": 0.2}
LEARNING_RATE = 0.05


def launch(target: str | Path, *arguments, timeout: float = 100) -> None:
    """Runs a worker of this file or a script in processes that find each other.

    A failure in one is a failure here with the output of all, and so is a hang.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(NUM_PROCESSES),
        "LOCAL_WORLD_SIZE": str(NUM_PROCESSES),
    }
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        output.touch()
        processes = []
        for rank in map(str, range(NUM_PROCESSES)):
            own = environment | {"RANK": rank, "LOCAL_RANK": rank}
            call = (run_process, str(target), [str(argument) for argument in arguments])
            processes.append(FORKS.Process(target=become, args=(own, [output, output], Path.cwd(), *call)))
        for process in processes:
            process.start()
        left, end = {process.sentinel for process in processes}, time.monotonic() + timeout
        while left and not has_failed(processes) and time.monotonic() < end:
            left -= {*wait(left, end - time.monotonic())}
        failed = has_failed(processes)
        for process in processes:
            process.kill()  # those that wait for one that failed
            process.join()
        assert not failed, output.read_text()
        assert not left, f"{target} did not end in {timeout} s\n{output.read_text()}"


def has_failed(processes: list) -> bool:
    return any(process.exitcode for process in processes)


def launch_worker(name: str, folder: Path) -> dict:
    """Runs a function of this file with a folder in both processes, and gives back the results that it left there."""
    launch(name, folder)
    return torch.load(folder / f"{name}.pt", weights_only=False)


def run_process(target: str, arguments: list[str]):
    if target in globals():
        globals()[target](*map(Path, arguments))
    else:
        run_script(target, arguments)


def row(index: int, num_images: int, placeholders_per_image: int = 1) -> dict:
    """Text of some length with its placeholders in front, its first half a prompt, and its pictures."""
    words = torch.arange(3, 11 + index % 3) + index
    placeholders = torch.full((num_images * placeholders_per_image,), IMAGE_TOKEN_ID)
    input_ids = torch.cat([placeholders, words[num_images:]])
    labels = input_ids.clone()
    labels[: len(placeholders) + 3 + index % 2 - num_images] = -100
    return {"input_ids": input_ids, "labels": labels, "pixels": random_pixels(num_images, tiny_config(), index)}


def training_rows(placeholders_per_image: int = 1) -> list[dict]:
    numbers = [number for step in PICTURES for number in step]
    return [row(index, number, placeholders_per_image) for index, number in enumerate(numbers)]


def collate(rows: list[dict]) -> dict:
    padding = {"input_ids": 0, "labels": -100}
    batch = {
        name: nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=value)
        for name, value in padding.items()
    }
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    pixels = torch.cat([row["pixels"] for row in rows])
    return batch | ({"pixel_values": pixels} if len(pixels) else {})


def training_model(groups: str = "all", **kwargs) -> AureaForConditionalGeneration:
    model = tiny_model(**AUXILIARY_LOSSES, **kwargs).train()
    set_trainable(model, groups)
    return model


def full(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model: nn.Module, engine=None, placeholders_per_image: int = 1) -> dict[str, list]:
    """Plain SGD on this process's rows; the loss of all processes and the gradients of each step.

    A DeepSpeed engine goes back and steps by itself, and keeps its gradients to itself.
    """
    num_processes = distributed.get_world_size() if distributed.is_initialized() else 1
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    rows, per_process = training_rows(placeholders_per_image), ROWS_PER_STEP // num_processes
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses, gradients = [], []
    for step in range(len(PICTURES)):
        batch = rows[step * ROWS_PER_STEP :][:ROWS_PER_STEP]
        num_items = sum((row["labels"][1:] != -100).sum() for row in batch)
        inputs = collate(batch[rank * per_process :][:per_process])
        loss = model(**inputs, num_items_in_batch=num_items).loss
        backward = torch.Tensor.backward if engine is None else engine.backward
        backward(loss * num_processes)  # gradients are averaged
        loss = loss.detach().float()
        if num_processes > 1:
            distributed.all_reduce(loss)
        losses.append(loss.item())
        gradients.append({name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None})
        (optimizer if engine is None else engine).step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients}


def assert_equal_training(result: dict, expected: dict):
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for step, (gradients, expected_gradients) in enumerate(zip(result["gradients"], expected["gradients"])):
        assert gradients.keys() == expected_gradients.keys()
        largest = max(gradient.abs().max() for gradient in expected_gradients.values())
        for name, gradient in expected_gradients.items():
            error = (gradients[name] - gradient).abs().max()
            assert error <= 1e-5 * largest, (step, name, error)


def assert_equal_weights(weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def evaluation_logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**collate(training_rows()[:ROWS_PER_STEP])).logits


# ---- DistributedDataParallel, by Trainer ----


def make_trainer(folder: Path, num_processes: int, **kwargs) -> Trainer:
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=ROWS_PER_STEP // num_processes,
        max_steps=len(PICTURES),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_steps=2,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # every parameter gets a gradient in every process, or this fails
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        **kwargs,
    )
    trainer = Trainer(training_model(), arguments, collate, training_rows())
    for callback in (AuxiliaryLossLogger(), GroupGradientNorms()):
        callback.attach(trainer)
    return trainer


def worker_ddp(folder: Path):
    trainer = make_trainer(folder / "ddp", NUM_PROCESSES)
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    assert trainer.args.world_size == NUM_PROCESSES
    if trainer.is_world_process_zero():
        torch.save(trainer.state.log_history, folder / "worker_ddp.pt")


class TestDistributedDataParallel:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        return tmp_path_factory.mktemp("ddp")

    @pytest.fixture(scope="class")
    def log(self, folder) -> list[dict]:
        return launch_worker("worker_ddp", folder)

    @pytest.fixture(scope="class")
    def single(self, folder) -> Trainer:
        trainer = make_trainer(folder / "single", 1)
        trainer.train()
        return trainer

    def test_logs_equal_those_of_one_process(self, log, single):
        expected = single.state.log_history
        assert len(log) == len(expected) == len(PICTURES) + 1
        for step, (entry, other) in enumerate(zip(log[:-1], expected)):
            assert entry.keys() == other.keys()
            names = {name for name in other if name in ("loss", "grad_norm") or name.startswith("grad_norm/")}
            assert {"loss", "grad_norm", "grad_norm/fusion", "grad_norm/cross_attention"} <= names
            for name in names:
                assert entry[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (step, name)
            assert ("feature_diversity" in entry) == any(PICTURES[step])
        text_alone = log[1]
        assert text_alone["grad_norm/fusion"] == text_alone["grad_norm/vision"] == 0

    @pytest.mark.parametrize("checkpoint", [2, 4])
    def test_its_checkpoint_loads_in_one_process(self, log, single, folder, checkpoint):
        load = AureaForConditionalGeneration.from_pretrained
        models = [load(folder / kind / f"checkpoint-{checkpoint}") for kind in ("ddp", "single")]
        assert_equal_weights(*(model.state_dict() for model in models))

    def test_one_process_goes_on_where_two_stopped(self, log, single, folder):
        trainer = make_trainer(folder / "resumed", 1)
        trainer.train(resume_from_checkpoint=str(folder / "ddp" / "checkpoint-2"))
        assert trainer.state.log_history[-2]["step"] == len(PICTURES)
        assert_equal_weights(trainer.model.state_dict(), single.model.state_dict())


# ---- DistributedDataParallel, each fusion with each connector ----

CONNECTORS = [("cross_attention", "causal"), ("prefix", "causal"), ("prefix", "prompt")]
PAIRS = [*((fusion_type, "both", "pictures") for fusion_type in FUSIONS), *(("sva", *one) for one in CONNECTORS)]


def train_pair(fusion_type: str, connector_type: str, prefix_mask: str) -> dict[str, list]:
    fusion = {"fusion_type": fusion_type, "radius": 1, "depth": 1}
    settings = {"feature_fusion_config": fusion, "connector_type": connector_type, "prefix_mask": prefix_mask}
    coefs = {**AUXILIARY_LOSSES, "feature_consistency_coef": 0.5 * FUSIONS[fusion_type].gives_map}
    model = tiny_model(**settings, **coefs).train()
    engine = DistributedDataParallel(model) if distributed.is_initialized() else model
    result = train(engine, placeholders_per_image=model.config.placeholders_per_image)
    result["gradients"] = [
        {name.removeprefix("module."): gradient for name, gradient in gradients.items()}
        for gradients in result["gradients"]
    ]
    assert all(gradients.keys() == dict(model.named_parameters()).keys() for gradients in result["gradients"])
    return result


def worker_pairs(folder: Path):
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {pair: train_pair(*pair) for pair in PAIRS}
    if distributed.get_rank() == 0:
        torch.save(results, folder / "worker_pairs.pt")
    distributed.destroy_process_group()


class TestEveryPair:
    """Auxiliary losses where the fusion gives a map included; no parameter may go without a gradient in a process."""

    @pytest.fixture(scope="class")
    def results(self, tmp_path_factory) -> dict:
        return launch_worker("worker_pairs", tmp_path_factory.mktemp("pairs"))

    @pytest.mark.parametrize("pair", PAIRS, ids="-".join)
    def test_losses_and_gradients_equal_those_of_one_process(self, results, pair):
        assert_equal_training(results[pair], train_pair(*pair))


# ---- FSDP2 ----


def shard(model: nn.Module, **kwargs) -> nn.Module:
    """Decoder layers, fusion layers and the encoders' layers, each by itself, and the rest."""
    aurea = model.model
    stacks = (
        aurea.language_model.layers,
        aurea.fusion.semantic_layers,
        aurea.fusion.joint_layers,
        aurea.vision_model.encoder.layers,
        aurea.spatial_vision_model.encoder.layer,
    )
    for layer in [layer for stack in stacks for layer in stack]:
        fully_shard(layer, **kwargs)
    return fully_shard(model, **kwargs)


def assert_sharded(model: nn.Module):
    """Accelerate on a CPU, asked for FSDP, silently gives DistributedDataParallel."""
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


def answers(model: nn.Module, rows: list[dict], **kwargs) -> torch.Tensor:
    text = collate([row | {"input_ids": row["input_ids"][:8], "labels": row["labels"][:8]} for row in rows])
    settings = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, **kwargs}
    return model.generate(**{name: text[name] for name in text.keys() - {"labels"}}, **settings)


def worker_fsdp(folder: Path):
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    model = shard(training_model())
    assert_sharded(model)
    layer = model.model.language_model.layers[0]
    assert isinstance(layer, FSDPModule) and isinstance(layer, AureaWovenDecoderLayerMixin)
    results["all"] = train(model)
    assert_sharded(model)

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state_dict = get_model_state_dict(model, options=options)
    if distributed.get_rank() == 0:
        model.save_pretrained(folder / "saved", state_dict=state_dict)
    distributed.barrier()
    assert isinstance(model, FSDPModule)
    results["logits"] = evaluation_logits(model)

    # Also in evaluation, where this process has text alone and the other one pictures.
    rows = training_rows()[2 * distributed.get_rank() :][:2]
    with torch.no_grad():
        results["text_logits"] = model(**collate(rows)).logits
    for use_cache in (True, False):
        gathered = [torch.empty(2, 12, dtype=torch.long) for _ in range(NUM_PROCESSES)]
        distributed.all_gather(gathered, answers(model, rows, use_cache=use_cache))
        results[f"answers, {use_cache}"] = torch.cat(gathered)

    frozen = shard(training_model("language_model"))
    results["language_model"] = train(frozen)

    checkpointed = training_model()
    checkpointed.gradient_checkpointing_enable()
    results["checkpointing"] = train(shard(checkpointed))

    results["woven_later"] = weave_what_is_sharded()
    if distributed.get_rank() == 0:
        torch.save(results, folder / "worker_fsdp.pt")
    distributed.destroy_process_group()


def weave_what_is_sharded() -> float:
    """Largest change of a sharded decoder's output when its layers get the class that Aurea gives them."""
    torch.manual_seed(0)
    decoder = AutoModel.from_config(tiny_config().text_config).eval()
    for layer in decoder.layers:
        fully_shard(layer)
    fully_shard(decoder)
    input_ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        expected = decoder(input_ids=input_ids).last_hidden_state.clone()
        for layer in decoder.layers:
            layer.__class__ = woven_class(AureaWovenDecoderLayerMixin, type(layer))
            layer.cross_attention_block = layer.closing_cross_attention_block = None
        assert isinstance(decoder.layers[0], FSDPModule)
        return (decoder(input_ids=input_ids).last_hidden_state - expected).abs().max().item()


class TestFullyShard:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory) -> Path:
        return tmp_path_factory.mktemp("fsdp")

    @pytest.fixture(scope="class")
    def results(self, folder) -> dict:
        return launch_worker("worker_fsdp", folder)

    @pytest.fixture(scope="class")
    def single(self) -> tuple[nn.Module, dict]:
        model = training_model()
        return model, train(model)

    @pytest.mark.parametrize("name", ["all", "checkpointing"])
    def test_losses_and_gradients_equal_those_of_one_process(self, results, single, name):
        assert_equal_training(results[name], single[1])
        assert not results[name]["gradients"][1]["model.fusion.output_proj.weight"].any()  # text alone

    def test_a_frozen_image_branch_is_gathered_by_processes_without_pictures_too(self, results):
        assert_equal_training(results["language_model"], train(training_model("language_model")))

    def test_gathered_weights_load_in_one_process(self, results, single, folder):
        model = AureaForConditionalGeneration.from_pretrained(folder / "saved").eval()
        assert_equal_weights(model.state_dict(), single[0].state_dict())
        torch.testing.assert_close(evaluation_logits(model), results["logits"], rtol=1e-5, atol=1e-5)

    def test_text_alone_can_be_evaluated_beside_pictures(self, results, single):
        with torch.no_grad():
            expected = single[0].eval()(**collate(training_rows()[:2])).logits
        torch.testing.assert_close(results["text_logits"], expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("use_cache", [True, False])
    def test_text_alone_is_generated_from_beside_pictures(self, results, single, use_cache):
        expected = answers(single[0].eval(), training_rows()[:ROWS_PER_STEP])
        assert torch.equal(results[f"answers, {use_cache}"], expected)

    def test_the_folder_is_that_of_an_unsharded_model(self, results, single, folder):
        single[0].save_pretrained(folder / "unsharded")
        names, expected = ({path.name for path in (folder / kind).iterdir()} for kind in ("saved", "unsharded"))
        assert names == expected
        configs = [json.loads((folder / kind / "config.json").read_text()) for kind in ("saved", "unsharded")]
        assert configs[0] == configs[1]
        assert configs[0]["architectures"] == ["AureaForConditionalGeneration"]
        AutoModelForImageTextToText.from_pretrained(folder / "saved", trust_remote_code=True)

    def test_layers_can_be_woven_when_they_are_sharded_already(self, results):
        assert results["woven_later"] == 0


# ---- FSDP2 as accelerate applies it ----


def launch_arguments(name: str) -> tuple[dict, dict[str, str]]:
    """What `accelerate launch` makes of a configuration: its arguments, and the environment of the training."""
    from accelerate.commands import launch as command
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = command.launch_command_parser().parse_args(
        ["--config_file", str(EXAMPLES / "accelerate" / f"{name}.yaml"), "train.py"]
    )
    arguments, _, _ = command._validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        return vars(arguments), prepare_deepspeed_cmd_env(arguments)[1]
    return vars(arguments), prepare_multi_gpu_env(arguments)


def worker_accelerate(folder: Path):
    """Accelerate's own preparation of FSDP2, which it never gets to on a CPU, by the settings of the example."""
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    environment = launch_arguments("fsdp2")[1]
    os.environ |= {name: value for name, value in environment.items() if name.startswith("FSDP_")}
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for mixed_precision in ("no", "bf16"):
        plugin = FullyShardedDataParallelPlugin()
        if mixed_precision != "no":
            plugin.set_mixed_precision(mixed_precision)
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin),
            mixed_precision=mixed_precision,
            is_main_process=distributed.get_rank() == 0,
            device=torch.device("cpu"),
            parallelism_config=None,
        )
        # With its efficient loading, other processes than the first read no weights.
        model = AureaForConditionalGeneration.from_pretrained(folder / "start")
        model = fsdp2_prepare_model(accelerator, model.train())
        assert_sharded(model)
        results[mixed_precision] = train(model)
        results["sharded"] = {
            type(module).__name__.removeprefix("FSDP") for module in model.modules() if isinstance(module, FSDPModule)
        }
    if distributed.get_rank() == 0:
        torch.save(results, folder / "worker_accelerate.pt")
    distributed.destroy_process_group()


class TestAccelerate:
    @pytest.fixture(scope="class")
    def results(self, tmp_path_factory) -> dict:
        folder = tmp_path_factory.mktemp("accelerate")
        training_model().save_pretrained(folder / "start")
        return launch_worker("worker_accelerate", folder)

    @pytest.fixture(scope="class")
    def expected(self) -> dict:
        return train(training_model())

    def test_fsdp2_shards_each_layer_by_itself(self, results):
        assert results["sharded"] >= {
            "AureaForConditionalGeneration",
            "Phi3DecoderLayer",
            "AureaSpatialRangeAttention",
            "SiglipEncoderLayer",
            "Dinov2WithRegistersLayer",
        }

    def test_fsdp2_trains_as_one_process_does(self, results, expected):
        assert_equal_training(results["no"], expected)

    def test_fsdp2_trains_in_mixed_precision(self, results, expected):
        assert results["bf16"]["losses"] == pytest.approx(expected["losses"], rel=0.03)


# ---- ZeRO-3 ----


def worker_zero3(folder: Path):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    deepspeed.init_distributed("gloo")
    settings = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": ROWS_PER_STEP // NUM_PROCESSES,
        "gradient_clipping": 0.0,
    }
    results = {}
    for groups in ("all", "language_model"):
        config = HfDeepSpeedConfig(settings)  # while it lives, from_pretrained gives each process its part
        model = AureaForConditionalGeneration.from_pretrained(folder / "start")
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        set_trainable(model, groups)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config.config)
        engine.train()
        results[groups] = train(engine, engine=engine)["losses"]
        state_dict = engine._zero3_consolidated_16bit_state_dict()  # as Trainer does
        if distributed.get_rank() == 0:
            model.save_pretrained(folder / groups, state_dict=state_dict)
    if distributed.get_rank() == 0:
        torch.save(results, folder / "worker_zero3.pt")


@pytest.mark.slow
def test_zero3_trains_as_one_process_does(tmp_path):
    """DeepSpeed's engine itself: accelerate does not get to it on a CPU."""
    pytest.importorskip("deepspeed")
    training_model().save_pretrained(tmp_path / "start")
    results = launch_worker("worker_zero3", tmp_path)
    for groups, losses in results.items():
        model = training_model(groups)
        assert losses == pytest.approx(train(model)["losses"], rel=1e-5)
        saved = AureaForConditionalGeneration.from_pretrained(tmp_path / groups)
        assert_equal_weights(saved.state_dict(), model.state_dict())


# ---- tensor parallelism ----


def worker_tensor_parallel(folder: Path):
    config = DistributedConfig(tp_size=NUM_PROCESSES)
    model = AureaForConditionalGeneration.from_pretrained(folder / "start", distributed_config=config)
    is_sharded = {name: isinstance(parameter, DTensor) for name, parameter in model.named_parameters()}
    results = {"logits": evaluation_logits(model), "is_sharded": is_sharded}

    set_trainable(model.train(), "all")
    batch = collate(training_rows()[:ROWS_PER_STEP])
    loss = model(**batch).loss
    loss.backward()
    results["loss"] = loss.item()
    results["gradients"] = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    if distributed.get_rank() == 0:
        torch.save(results, folder / "worker_tensor_parallel.pt")
    model.save_pretrained(folder / "saved")
    distributed.destroy_process_group()


class TestTensorParallel:
    def test_logits_and_gradients_equal_those_of_one_process(self, tmp_path):
        folder = tmp_path
        training_model(text_config={"model_type": "llama"}).save_pretrained(folder / "start")
        results = launch_worker("worker_tensor_parallel", folder)
        model = AureaForConditionalGeneration.from_pretrained(folder / "start")
        torch.testing.assert_close(results["logits"], evaluation_logits(model), rtol=1e-5, atol=1e-5)
        block = "model.language_model.layers.0.cross_attention_block."
        assert all(results["is_sharded"][f"{block}{name}.weight"] for name in ("cross_attn.q_proj", "mlp.down_proj"))

        loss = model.train()(**collate(training_rows()[:ROWS_PER_STEP])).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        expected = {"losses": [loss.item()], "gradients": [gradients]}
        assert_equal_training({"losses": [results["loss"]], "gradients": [results["gradients"]]}, expected)
        saved, start = (load_file(folder / name / "model.safetensors") for name in ("saved", "start"))
        assert_equal_weights(saved, start)


# ---- examples/train.py ----


def write_stream(folder: Path) -> Path:
    """Twelve conversations in LLaVA's format, with no, one and two pictures."""
    lines = []
    for index in range(12):
        images = [str(FIXTURES / f"image_{name}.png") for name in ("rgb", "wide")[: (0, 1, 2)[index % 3]]]
        prompt = "<image>\n" * len(images) + "What is " + "very " * (index % 4) + f"{index}?"
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": f"It is {index}."}]
        lines.append({"id": str(index), "image": images, "conversations": turns})
    path = folder / "stream.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def training_options(model: Path, output: Path, data: Path, batch_size: int) -> list[str]:
    options = {
        "model_name_or_path": model,
        "dataset": data,
        "image_folder": FIXTURES,
        "output_dir": output,
        "per_device_train_batch_size": batch_size,
        "max_steps": 3,
        "learning_rate": LEARNING_RATE,
        "optim": "sgd",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return ["--do_train", *(f"--{name}={value}" for name, value in options.items())]


def logged_losses(output: Path) -> list[float]:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


def worker_tensor_parallel_script(folder: Path):
    """Runs examples/train.py where accelerate does not refuse a parallelism configuration for running on CPUs."""
    ParallelismConfig._validate_accelerator = lambda self, accelerator: None
    run_script(EXAMPLES / "train.py", json.loads((folder / "options.json").read_text()))


class TestTrainScript:
    @pytest.fixture(autouse=True)
    def clean_surroundings(self, tmp_path, monkeypatch):
        pytest.importorskip("datasets")
        monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(sys, "argv", sys.argv)

    def test_a_stream_is_shared_out_with_its_pictures(self, converted, tmp_path):
        data = write_stream(tmp_path)
        launch(EXAMPLES / "train.py", "--streaming", *training_options(converted, tmp_path / "two", data, 2))
        run_script(EXAMPLES / "train.py", ["--streaming", *training_options(converted, tmp_path / "one", data, 4)])
        losses = logged_losses(tmp_path / "two")
        assert len(losses) == 3 and losses == pytest.approx(logged_losses(tmp_path / "one"), rel=1e-4)

    def test_tensor_parallel_training_as_the_launch_configuration_says(self, converted, tmp_path, monkeypatch):
        data = write_stream(tmp_path)
        run_script(EXAMPLES / "train.py", training_options(converted, tmp_path / "one", data, 2))
        for name, value in launch_arguments("tensor_parallel")[1].items():
            if "PARALLELISM_CONFIG" in name:
                monkeypatch.setenv(name, value)
        # Checkpoints of a model in slices cannot be resumed from, says Trainer.
        options = [*training_options(converted, tmp_path / "two", data, 2), "--save_only_model"]
        (tmp_path / "options.json").write_text(json.dumps(options))
        launch("worker_tensor_parallel_script", tmp_path)
        losses = logged_losses(tmp_path / "two")
        assert len(losses) == 3 and losses == pytest.approx(logged_losses(tmp_path / "one"), rel=1e-4)
        load = AureaForConditionalGeneration.from_pretrained
        assert_equal_weights(*(load(tmp_path / name).state_dict() for name in ("two", "one")))


# ---- launch configurations ----


class TestLaunchConfigurations:
    @pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
    def test_accelerate_knows_every_name_in_it(self, path):
        from accelerate.commands.config.config_args import load_config_from_file
        from accelerate.commands.launch import launch_command_parser

        config = load_config_from_file(str(path)).to_dict()
        options = vars(launch_command_parser().parse_args(["train.py"]))
        for settings in (value for value in config.values() if isinstance(value, dict)):
            assert settings.keys() <= options.keys()
        assert config["mixed_precision"] == "bf16" and not config["use_cpu"]
        assert path.read_text().startswith("# ")

    @pytest.mark.parametrize(
        ("name", "distributed_type", "environment"),
        [
            ("ddp", "MULTI_GPU", {}),
            (
                "fsdp2",
                "FSDP",
                {
                    "ACCELERATE_USE_FSDP": "true",
                    "FSDP_VERSION": "2",
                    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
                    "FSDP_RESHARD_AFTER_FORWARD": "true",
                    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
                    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
                },
            ),
            (
                "deepspeed_zero3",
                "DEEPSPEED",
                {
                    "ACCELERATE_USE_DEEPSPEED": "true",
                    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
                    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
                    "ACCELERATE_GRADIENT_CLIPPING": "auto",
                },
            ),
            (
                "tensor_parallel",
                "MULTI_GPU",
                {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            ),
        ],
    )
    def test_accelerate_launch_reads_them_as_meant(self, name, distributed_type, environment):
        from accelerate.commands.config.config_args import load_config_from_file

        config = load_config_from_file(str(EXAMPLES / "accelerate" / f"{name}.yaml"))
        assert config.distributed_type == distributed_type
        found = launch_arguments(name)[1]
        assert {key: found.get(key) for key in environment} == environment
        assert found["ACCELERATE_MIXED_PRECISION"] == "bf16"

    @pytest.mark.parametrize("fusion_type", ["spatial_range", "concat"])
    @pytest.mark.parametrize("decoder", ["phi3", "llama", "gpt2"])
    def test_the_model_names_the_layers_to_shard(self, decoder, fusion_type):
        """accelerate looks for each name in the model, and refuses one that it does not find."""
        fusion = {"feature_fusion_config": {"fusion_type": fusion_type}}
        settings = tiny_config({"model_type": decoder}).to_dict() | fusion
        model = AureaForConditionalGeneration(AureaConfig(**settings))
        names = {type(module).__name__ for module in model.modules()}
        assert model._no_split_modules <= names
        layers = model.model.language_model.get_submodule({"gpt2": "h"}.get(decoder, "layers"))
        expected = {type(layers[0]).__name__, "SiglipEncoderLayer", "Dinov2WithRegistersLayer"}
        assert expected | ({"AureaSpatialRangeAttention"} & names) <= model._no_split_modules
