# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Train an Aurea: fusion and cross-attention alone, the language model too, everything, or adapters.

    aurea train --model_name_or_path aurea --stage align --dataset captions.json --image_folder images \\
        --output_dir aligned --do_train --learning_rate 1e-4 --max_steps 2000

    aurea train --vision google/siglip2-base-patch16-224 --text Qwen/Qwen3-0.6B \\
        --spatial_vision facebook/dinov2-with-registers-base --dataset HuggingFaceH4/llava-instruct-mix-vsft \\
        --streaming --stage align --output_dir mine --do_train --max_steps 2000

On several processes: `accelerate launch -m transformers_aurea train ...`, or `examples/train.py` for `torchrun`.

A model is a folder or hub id, or three parts; with neither it is the embedded model. A dataset is `scenes` (a made-up
world, no download), a LLaVA JSON file with its folder of pictures, or anything that `datasets.load_dataset` loads and
that holds chat messages. All options of `transformers.TrainingArguments` hold; `--args_file FILE` reads options from a
file. A training that was cut off goes on from the newest complete checkpoint in `output_dir`.
"""

import json
import logging
import os
import zipfile
from argparse import ArgumentParser
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import (
    BitsAndBytesConfig,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from . import AureaConfig, AureaForConditionalGeneration, AureaProcessor, embedded_model_path
from .data_aurea import AureaDataCollator, load_llava_dataset, to_chat_rows, with_lengths
from .parts_aurea import check_overrides
from .scenes import MAX_OBJECTS, WORLDS, SceneDataset, scene_questions, test_seeds, train_seeds
from .training_aurea import (
    GROUP_MODULES,
    LORA_TARGETS,
    STAGES,
    AuxiliaryLossLogger,
    GroupGradientNorms,
    SpatialRangeEntropy,
    TrainableReport,
    lora_targets,
    modules_not_to_quantize,
    set_trainable,
)


logger = logging.getLogger("train")

BY_LENGTH = ("group_by_length", "batch_rebalance")
# What an adapter names as its base: where the embedded model's folder is differs from machine to machine.
EMBEDDED_MODEL = "transformers_aurea.embedded_model_path()"

# Options that may differ where a training goes on.
NOT_THE_RUN = ("use_kernels", "streaming", "on_error", "eval_dataset", "eval_scenes")

# What is in a folder of which something was saved: a run that failed before is no training to go on with.
TRAINED = ("checkpoint-*", "*.safetensors", "trainer_state.json")


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "An Aurea: folder or hub id (default: the embedded model)."}
    )
    vision: str | None = field(default=None, metadata={"help": "Semantic encoder of a new Aurea: folder or hub id."})
    spatial_vision: str | None = field(default=None, metadata={"help": "Spatial encoder: folder or hub id."})
    text: str | None = field(default=None, metadata={"help": "Language model: folder or hub id."})
    config_overrides: str = field(default="{}", metadata={"help": "JSON: AureaConfig's arguments that differ."})
    dtype: str = field(
        default="auto", metadata={"help": "Of the weights.", "choices": ["auto", "float32", "bfloat16", "float16"]}
    )
    use_kernels: bool = field(default=False, metadata={"help": "Compute the fusion with the compiled kernel."})
    stage: str = field(default="full", metadata={"help": "What trains, without LoRA.", "choices": list(STAGES)})
    train_groups: list[str] | None = field(
        default=None,
        metadata={
            "help": "Groups that train instead of a stage's, or, with LoRA, beside the adapters.",
            "choices": list(GROUP_MODULES),
        },
    )
    lora: list[str] | None = field(default=None, metadata={"help": "LoRA presets.", "choices": list(LORA_TARGETS)})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapters' inputs."})
    lora_words: list[str] | None = field(
        default=None, metadata={"help": "With LoRA, words whose tokens' embeddings train too: new ones to learn."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "QLoRA: 4-bit decoder (needs bitsandbytes)."})


@dataclass
class DataArguments:
    dataset: str = field(metadata={"help": "`scenes`, a LLaVA JSON file, or a dataset's folder or hub id."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset."})
    image_folder: str | None = field(default=None, metadata={"help": "Where the pictures of a JSON file are."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "A second dataset; of scenes, those of the test seeds are there anyway."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the dataset while training (needs max_steps)."})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of a row."})
    independent_turns: bool = field(
        default=False, metadata={"help": "The questions of a row are about its pictures, not about its other turns."}
    )
    on_error: str = field(
        default="raise", metadata={"help": "What to do with a broken sample.", "choices": ["raise", "skip"]}
    )
    scenes: int = field(default=10_000, metadata={"help": "Training pictures of the scene world."})
    eval_scenes: int = field(default=200, metadata={"help": "Test pictures of the scene world."})
    first_scene: int = field(default=0, metadata={"help": "Skip so many training scenes."})
    curriculum: str = field(
        default="[]",
        metadata={
            "help": 'Of the scene world, JSON: [[0.1, 1], [0.3, 2, {"color": 4}]], one object in the first tenth, '
            "then up to two, and only questions of these kinds, until 30 %%. A fourth entry mixes other rows among "
            'them, by shares: {"textured": 0.6, "open": 0.3, "follow_up": 0.1}; see `SceneDataset`.'
        },
    )
    questions_per_kind: str = field(default="1", metadata={"help": "A number, or JSON: {kind: number}."})
    recolor: str = field(
        default="{}", metadata={"help": 'Of the scene world: {"black": ["turquoise", [64, 224, 208]]}, a new color.'}
    )


def parse_json(name: str, text: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"--{name} {text} is no JSON: {error}") from error


def check_options(model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments):
    """Refuses options that are wrong or would do nothing, before anything is loaded."""
    if not (training_args.do_train or training_args.do_eval):
        raise ValueError("Nothing to do: give --do_train, --do_eval or both.")
    if training_args.do_eval and data_args.eval_dataset is None and data_args.dataset != "scenes":
        raise ValueError("--do_eval needs --eval_dataset.")
    numbers = asdict(model_args) | asdict(data_args)
    for name, least in {"scenes": 1, "eval_scenes": 1, "first_scene": 0, "max_length": 1, "lora_r": 1}.items():
        if numbers[name] is not None and numbers[name] < least:
            raise ValueError(f"--{name} must be at least {least}, got {numbers[name]}.")
    if not 0 <= model_args.lora_dropout < 1:
        raise ValueError(f"--lora_dropout must be from 0 to less than 1, got {model_args.lora_dropout}.")
    scene_options = ("curriculum", "questions_per_kind", "recolor")
    SceneDataset(train_seeds(1), **{name: parse_json(name, getattr(data_args, name)) for name in scene_options})
    for name in (data_args.dataset, data_args.eval_dataset or ""):
        if name.endswith((".json", ".jsonl")) and data_args.image_folder is None:
            raise ValueError(f"--dataset {name} needs --image_folder, the folder of its pictures.")
    if (
        data_args.streaming
        and data_args.dataset != "scenes"
        and training_args.do_train
        and training_args.max_steps < 1
    ):
        raise ValueError("--streaming needs --max_steps, for nobody knows how long the dataset is.")
    if training_args.train_sampling_strategy in BY_LENGTH and "scenes" in (data_args.dataset, data_args.eval_dataset):
        raise ValueError(
            f"--train_sampling_strategy {training_args.train_sampling_strategy} needs lengths known beforehand, and "
            "scenes are made while training: use random or sequential."
        )
    check_model_options(model_args)


def check_model_options(args: ModelArguments):
    overrides = parse_json("config_overrides", args.config_overrides)
    if not isinstance(overrides, dict):
        raise ValueError(
            f'--config_overrides must be like {{"feature_fusion_config": {{"radius": 2}}}}, got '
            f"{args.config_overrides}."
        )
    check_overrides(overrides)
    parts = {"vision": args.vision, "spatial_vision": args.spatial_vision, "text": args.text}
    missing = [f"--{name}" for name, part in parts.items() if part is None]
    if len(missing) < len(parts) and (missing or args.model_name_or_path is not None):
        problem = f"{', '.join(missing)} not given" if missing else "--model_name_or_path given too"
        raise ValueError(f"Give --model_name_or_path, or all three parts: {problem}.")
    if args.lora_words and not args.lora:
        raise ValueError("--lora_words needs --lora: without adapters --train_groups language_model trains all words.")
    if args.lora and args.text is not None:
        raise ValueError(
            "--lora saves adapters alone, and the new parts would be lost: train with --stage align first."
        )
    if args.text is not None and (args.load_in_4bit or tensor_parallel_size() > 1 or is_deepspeed_zero3_enabled()):
        raise ValueError(
            "--load_in_4bit, tensor parallelism and ZeRO-3 need a saved Aurea: make and save one of parts first."
        )


def tensor_parallel_size() -> int:
    return int(os.environ.get("PARALLELISM_CONFIG_TP_SIZE", "1"))  # of the launch configuration


def load_model(args: ModelArguments):
    """The model and its processor, from a folder or from parts."""
    parts = {"vision": args.vision, "spatial_vision": args.spatial_vision, "text": args.text}
    overrides = parse_json("config_overrides", args.config_overrides)
    tp_size = tensor_parallel_size()
    if args.text is not None:
        model = AureaForConditionalGeneration.from_pretrained_parts(**parts, dtype=args.dtype, **overrides)
        return model, AureaProcessor.from_pretrained_parts(**parts, config=model.config)
    quantization = None
    if args.load_in_4bit:
        precise = {"vision", "spatial_vision", "composition", "fusion", "projector", *(args.train_groups or ())}
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=modules_not_to_quantize(precise),
        )
    folder = args.model_name_or_path or embedded_model_path()
    model = AureaForConditionalGeneration.from_pretrained(
        folder,
        config=AureaConfig.from_pretrained(folder, **overrides),
        dtype=args.dtype,
        quantization_config=quantization,
        distributed_config=DistributedConfig(tp_size=tp_size) if tp_size > 1 else None,
    )
    return model, AureaProcessor.from_pretrained(folder)


def words_tokens(tokenizer, words: list[str]) -> list[int]:
    """The tokens of these words, at the beginning of a text and inside."""
    texts = [text for word in words for text in (word, f" {word}")]
    return sorted({token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]})


def choose_parameters(model, tokenizer, args: ModelArguments, gradient_checkpointing: bool):
    """The model with what trains: groups of its own parameters, or adapters and whole modules beside them."""
    if not args.lora:
        set_trainable(model, args.train_groups or args.stage)
        return model
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if args.model_name_or_path is None:  # by which adapters name their base
        model.name_or_path = model.config.name_or_path = EMBEDDED_MODEL
    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=lora_targets(model, *args.lora),
        modules_to_save=[module for group in args.train_groups or () for module in GROUP_MODULES[group]] or None,
        trainable_token_indices=words_tokens(tokenizer, args.lora_words or ()) or None,
    )
    return get_peft_model(model, config)


def load_rows(name: str, args: DataArguments):
    """A dataset of conversations, by what its name is."""
    if name == "scenes":
        counts = parse_json("questions_per_kind", args.questions_per_kind)
        curriculum = parse_json("curriculum", args.curriculum)
        seeds = train_seeds(args.first_scene + args.scenes)[args.first_scene :]
        recolor = parse_json("recolor", args.recolor)
        return SceneDataset(seeds, curriculum=curriculum, questions_per_kind=counts, recolor=recolor)
    if name.endswith((".json", ".jsonl")):
        return load_llava_dataset(name, args.image_folder, streaming=args.streaming)
    from datasets import load_dataset, load_from_disk

    if Path(name, "dataset_info.json").is_file():
        return to_chat_rows(load_from_disk(name))
    return to_chat_rows(load_dataset(name, args.dataset_config, split="train", streaming=args.streaming))


def load_eval_rows(args: DataArguments):
    if args.eval_dataset:
        return load_rows(args.eval_dataset, args)
    if args.dataset != "scenes":
        return None
    seeds, recolor = test_seeds(args.eval_scenes), parse_json("recolor", args.recolor)
    rows = scene_questions(seeds, recolor=recolor)
    mixed = {
        name for stage in parse_json("curriculum", args.curriculum) for name in (stage[3] if len(stage) == 4 else ())
    }
    for name in sorted(mixed - {"textured"}):
        if name in WORLDS:
            rows[name] = [
                row for questions in scene_questions(seeds, recolor=recolor, world=name).values() for row in questions
            ]
        else:
            rows[name] = SceneDataset(seeds, curriculum=[[1, MAX_OBJECTS, {}, {name: 1}]], recolor=recolor)
    return rows


def most_likely_tokens(logits, labels) -> torch.Tensor:
    """What evaluation keeps of the logits, lest it piles them up: (batch, tokens, vocabulary) → (batch, tokens)."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


class ExactMatch:
    """The share of rows of which each labelled token is the most likely one after the right ones before it.

    For a row with one answer that is whether greedy decoding would give exactly this answer. Rows without labels,
    which stand in the place of skipped ones, do not count.
    """

    def __init__(self):
        self.num_right = self.num_rows = 0

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        predicted, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
        counts = (labels != -100).any(axis=1)
        right = ((predicted == labels) | (labels == -100)).all(axis=1)
        self.num_right += int((right & counts).sum())
        self.num_rows += int(counts.sum())
        if not compute_result:
            return {}
        share = self.num_right / max(self.num_rows, 1)
        self.num_right = self.num_rows = 0
        return {"exact_match": share}


def check_run(file: Path, run: dict):
    """Refuses a folder that holds the training of another model or dataset, which would go on, or be overwritten.

    A run of which nothing was saved leaves the folder free.
    """
    is_trained = any(any(file.parent.glob(pattern)) for pattern in TRAINED)
    found = json.loads(file.read_text()) if is_trained and file.is_file() else {}
    for name, value in run.items():
        if found.get(name, value) != value:
            raise ValueError(
                f"--output_dir {file.parent} holds a training with --{name} {found[name]}, not {value}. Give another "
                "--output_dir, or delete this one to train anew."
            )


def last_complete_checkpoint(output_dir: str) -> str | None:
    """The newest checkpoint whose saving was not cut off."""
    folders = ((path.name.removeprefix("checkpoint-"), path) for path in Path(output_dir).glob("checkpoint-*"))
    checkpoints = {int(step): path for step, path in folders if step.isdecimal()}
    for _, path in sorted(checkpoints.items(), reverse=True):
        if problem := why_incomplete(path):
            logger.warning(
                f"{path} is incomplete and is not used: {problem}. --resume_from_checkpoint would force it."
            )
        else:
            return str(path)
    return None


def why_incomplete(checkpoint: Path) -> str | None:
    """What a checkpoint lacks. The first process writes the trainer's state last, the others their random states
    meanwhile; all but that of the first of one process are numbered."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError) as error:
        return f"trainer_state.json cannot be read ({error})"
    random_states = list(checkpoint.glob("rng_state*.pth"))
    for path in random_states:
        if not zipfile.is_zipfile(path):
            return f"{path.name} was cut off"
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if not (checkpoint / "rng_state.pth").exists() and 0 < len(random_states) < max(num_processes, 2):
        return f"random states of {len(random_states)} processes, not {max(num_processes, 2)}"
    return None


class TrainingIsDone(Exception):
    pass


class StopIfDone(TrainerCallback):
    """Resumed from the checkpoint of its last step, Trainer would train one step more, or none without a word."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            raise TrainingIsDone


def train(trainer: Trainer):
    """Trains from the newest complete checkpoint on, or from the beginning, and saves."""
    stop_if_done = StopIfDone()
    trainer.add_callback(stop_if_done)
    checkpoint = trainer.args.resume_from_checkpoint or last_complete_checkpoint(trainer.args.output_dir)
    if checkpoint is not None:
        logger.info(f"Training goes on from {checkpoint}")
    try:
        output = trainer.train(resume_from_checkpoint=checkpoint)
        is_new = output.global_step > stop_if_done.first_step
    except TrainingIsDone:
        is_new = False
    if is_new:
        trainer.save_metrics("train", output.metrics)
    else:
        logger.warning(
            f"Nothing was trained: all steps were done already in {checkpoint}. To train anew, give another "
            "--output_dir."
        )
    trainer.save_model()
    trainer.save_state()


def read_options(argv: list[str] | None, prog: str | None):
    """The options `(ModelArguments, DataArguments, TrainingArguments)`, and those of them that a run has to keep, a
    dictionary. Wrong ones end the process with status 2."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, TrainingArguments),
        prog=prog,
        usage="%(prog)s --dataset DATASET --output_dir OUTPUT_DIR [--do_train] [--do_eval] [options, see --help]",
    )
    files = ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--args_file", type=Path, action="append", default=[])
    found, given = files.parse_known_args(argv)
    for file in found.args_file:
        if not file.is_file():
            parser.error(f"--args_file {file} does not exist")
    given = [word for file in found.args_file for word in file.read_text().split()] + given
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses(given, look_for_args_file=False)
        check_options(model_args, data_args, training_args)
        options = asdict(model_args) | asdict(data_args)
        run = {name: value for name, value in options.items() if name not in NOT_THE_RUN}
        if training_args.do_train and not training_args.resume_from_checkpoint:
            check_run(Path(training_args.output_dir, "run.json"), run)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    return model_args, data_args, training_args, run


def main(argv: list[str] | None = None, prog: str | None = None):
    """Trains, and evaluates, as these arguments say, or those of the process; `prog` is what usage calls it."""
    model_args, data_args, training_args, run = read_options(argv, prog)
    transformers.set_seed(training_args.seed)
    training_args.remove_unused_columns = False
    training_args.batch_eval_metrics = True
    training_args.accelerator_config.dispatch_batches = False  # it would cut a stream's pictures by the rows

    model, processor = load_model(model_args)
    model = choose_parameters(model, processor.tokenizer, model_args, training_args.gradient_checkpointing)
    if model_args.use_kernels:
        model.set_use_kernels(True)
    logger.info(TrainableReport.of(model))

    train_dataset = load_rows(data_args.dataset, data_args) if training_args.do_train else None
    eval_dataset = load_eval_rows(data_args)
    if training_args.train_sampling_strategy in BY_LENGTH and not data_args.streaming:
        train_dataset, eval_dataset = (
            rows and with_lengths(rows, processor) for rows in (train_dataset, eval_dataset)
        )
    trainer = Trainer(
        model=model,
        args=training_args,
        data_collator=AureaDataCollator(
            processor,
            max_length=data_args.max_length,
            on_error=data_args.on_error,
            independent_turns=data_args.independent_turns,
        ),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        compute_metrics=ExactMatch(),
        preprocess_logits_for_metrics=most_likely_tokens,
    )
    for callback in (AuxiliaryLossLogger(), GroupGradientNorms(), SpatialRangeEntropy()):
        callback.attach(trainer)
    if training_args.do_train:
        if training_args.should_save:
            run_file = Path(training_args.output_dir, "run.json")
            run_file.parent.mkdir(parents=True, exist_ok=True)
            run_file.write_text(json.dumps(run, indent=1) + "\n")
        train(trainer)
    if training_args.do_eval:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)


__all__ = [
    "DataArguments",
    "ExactMatch",
    "ModelArguments",
    "check_options",
    "check_run",
    "last_complete_checkpoint",
    "load_eval_rows",
    "load_rows",
    "main",
    "words_tokens",
]
