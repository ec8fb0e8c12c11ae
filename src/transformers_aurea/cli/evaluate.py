# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""ask a model what a data set, or scenes that it was not trained on, ask, and score its answers

    aurea evaluate --scenes 200
    aurea evaluate trained --output scores.json --blind
    aurea evaluate trained --dataset questions.json --image_folder images
    aurea evaluate trained --dataset org/name --split test --answer_column answers --limit 100

A data set is a JSON file, a folder or a hub id: conversations, as `aurea train` reads them, or rows with a picture (or
several), a question and an answer, or a list of them. See `transformers_aurea.evaluate_dataset` for how answers are
scored, and `transformers_aurea.evaluate_scenes` for scenes. Each picture is encoded once.
"""

import json
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

from .options import add_named_model_arguments, check_output, name_model, whole_number, write_json


def add_arguments(parser: ArgumentParser) -> None:
    add_named_model_arguments(parser)
    parser.add_argument("--batch_size", type=whole_number(1), help="questions at a time (default: 64; data sets: 16)")
    parser.add_argument("--output", type=Path, help="write the scores there, as JSON; a data set's answers too")
    parser.add_argument("--json", action="store_true", help="print the scores as one JSON object, nothing else")
    parser.set_defaults(scene_options=scene_options(parser), dataset_options=dataset_options(parser))


def scene_options(parser: ArgumentParser) -> list[str]:
    """The names of the options that are added, all of which are None or False where they are not given."""
    group = parser.add_argument_group("scenes")
    options = [
        group.add_argument("--scenes", type=whole_number(1), help="test pictures (default: 1000)"),
        group.add_argument("--first_scene", type=whole_number(0), help="skip so many test pictures"),
        group.add_argument(
            "--max_objects", type=whole_number(1), help="scenes of at most so many objects (default: 5)"
        ),
        group.add_argument("--recolor", type=as_json, help='{"black": ["turquoise", [64, 224, 208]]}: a new color'),
        group.add_argument("--no_controls", action="store_true", help="without black and wrong pictures"),
        group.add_argument("--blind", action="store_true", help="also with each encoder blinded by the mean picture"),
        group.add_argument(
            "--train_args",
            type=Path,
            nargs="+",
            help="look for test pictures among those trained on with these files",
        ),
    ]
    return [option.dest for option in options]


def dataset_options(parser: ArgumentParser) -> list[str]:
    """As `scene_options`."""
    group = parser.add_argument_group("a data set")
    group.add_argument("--dataset", help="JSON file, folder or hub id (default: scenes)")
    options = [
        group.add_argument("--split", help="of the data set (default: the only one)"),
        group.add_argument("--dataset_config", help="of a data set on a hub"),
        group.add_argument("--image_folder", help="what pictures' paths are relative to (default: the file's folder)"),
        group.add_argument("--image_column", help="of pictures (default: image)"),
        group.add_argument("--question_column", help="of questions (default: question)"),
        group.add_argument("--answer_column", help="of answers: texts, or lists of texts (default: answer)"),
        group.add_argument("--choices_column", help="of lists of choices, of which the answer is a letter"),
        group.add_argument("--instruction", help="what stands after each question of a column"),
        group.add_argument("--limit", type=whole_number(1), help="only the first so many rows"),
        group.add_argument("--max_new_tokens", type=whole_number(1), help="longest answer (default: 128)"),
    ]
    return [option.dest for option in options]


def as_json(text: str):
    try:
        return json.loads(text)
    except ValueError as error:
        raise ArgumentTypeError(f"{text} is no JSON: {error}") from error


def run(args: Namespace) -> None:
    name_model(args)
    others = args.scene_options if args.dataset is not None else args.dataset_options
    if given := [f"--{name}" for name in others if vars(args)[name] not in (None, False)]:
        why = "is about scenes, and --dataset was given" if args.dataset is not None else "needs --dataset"
        args.parser.error(f"{given[0]} {why}")
    check_output(args)
    scores, answers = run_scenes(args) if args.dataset is None else run_dataset(args)
    if args.json:
        print(json.dumps(scores, ensure_ascii=False))
    if args.output:
        write_json(args.output, scores | answers)


def run_scenes(args: Namespace) -> tuple[dict, dict]:
    scenes, first = args.scenes or 1000, args.first_scene or 0
    if scenes == 1 and not args.no_controls:
        args.parser.error("--scenes 1 leaves no wrong picture to show: give at least 2, or --no_controls")
    if missing := [str(file) for file in args.train_args or () if not file.is_file()]:
        args.parser.error(f"--train_args {missing[0]} does not exist")
    from ..evaluate_scenes import equal_to_training, evaluate, print_scores, weights_digest
    from ..scenes import make_scene, test_seeds
    from .answering import load

    world = {"recolor": args.recolor, "max_objects": args.max_objects}
    try:
        make_scene(0, **world)
    except ValueError as error:
        args.parser.error(str(error))
    model, processor = load(args)
    seeds = test_seeds(first + scenes)[first:]
    controls = not args.no_controls
    scores = evaluate(model, processor, seeds, args.batch_size or 64, controls=controls, blind=args.blind, **world)
    if not args.json:
        print_scores(scores)
    if args.train_args:
        found = equal_to_training(seeds, args.train_args, args.max_objects)
        scores["all"] |= found
        if not args.json:
            equal, trained = found.values()
            print(f"{equal} of {len(seeds)} test pictures equal one of {trained} training pictures")
    scores["all"] |= {"pictures": len(seeds), "weights": weights_digest(model)}
    return scores, {}


def run_dataset(args: Namespace) -> tuple[dict, dict]:
    from ..answering import AnsweringModel
    from ..evaluate_dataset import Columns, Questions, evaluate, load_rows
    from .answering import load

    named = {name: vars(args)[f"{name}_column"] for name in ("image", "question", "answer", "choices")}
    named = {name: column for name, column in named.items() if column is not None}
    rows, columns = load_rows(args.dataset, args.split, args.dataset_config, Columns(**named) if named else None)
    if columns is None and args.instruction is not None:
        args.parser.error("--instruction is for columns of questions, and this data set holds conversations")
    if args.limit is not None:
        rows = rows[: args.limit] if isinstance(rows, list) else rows.select(range(min(args.limit, len(rows))))
    is_file = Path(args.dataset).is_file()
    folder = str(Path(args.dataset).parent) if is_file and args.image_folder is None else args.image_folder
    questions = Questions(rows, columns, folder, args.instruction)
    model = AnsweringModel(*load(args), do_sample=False, max_new_tokens=args.max_new_tokens or 128)
    scores, answers = evaluate(model, questions, args.batch_size or 16)
    scores = {"model": args.model or "embedded", "dataset": args.dataset, "split": args.split} | scores
    if not args.json:
        rules = ", ".join(f"{number:,} by {rule}" for rule, number in scores["rules"].items())
        print(f"{scores['questions']:,} questions, {rules}")
        print(f"exact match {scores['exact_match']:.1%}\naccuracy    {scores['accuracy']:.1%}")
    return scores, {"answers": answers}
