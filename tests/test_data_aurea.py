# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES
from PIL import Image
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from transformers_aurea import AureaForConditionalGeneration
from transformers_aurea.data_aurea import (
    AureaDataCollator,
    check_dataset,
    load_llava_dataset,
    to_chat_row,
    to_chat_rows,
    with_lengths,
)
from transformers_aurea.image_processing_aurea import AureaImageProcessor
from transformers_aurea.processing_aurea import CHAT_TEMPLATE, AureaProcessor
from transformers_aurea.tokenization_aurea import build_tokenizer
from transformers_aurea.versions_aurea import CACHE_NAME


SIDE = {"height": 28, "width": 28}
UNMARKED_TEMPLATE = re.sub(r"{%- (end)?generation -%}", "", CHAT_TEMPLATE)
# As ChatML, with a line break after the end token that is never generated.
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for p in m['content'] %}"
    "{{ '<|image|>' if p['type'] == 'image' else p['text'] }}{% endfor %}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def picture(number: int = 0) -> Image.Image:
    pixels = np.random.default_rng(number).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(number: int = 0) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, "PNG")
    return file.getvalue()


def text(value: str) -> dict:
    return {"type": "text", "text": value}


def user(*parts) -> dict:
    return {"role": "user", "content": [text(part) if isinstance(part, str) else part for part in parts]}


def assistant(value: str) -> dict:
    return {"role": "assistant", "content": [text(value)]}


IMAGE = {"type": "image"}


def mixed_rows() -> list[dict]:
    """One picture and two turns, no picture, two pictures."""
    one = [user(IMAGE, "What?"), assistant("A cat."), user("Sure?"), assistant("Yes, I am.")]
    none = [user("Who are you?"), assistant("Aurea")]
    two = [user(IMAGE, "a", IMAGE, "b"), assistant("same")]
    return [
        {"id": "one", "messages": one, "images": [picture(1)]},
        {"id": "none", "messages": none, "images": []},
        {"id": "two", "messages": two, "images": [picture(2), picture(3)]},
    ]


def make_processor(chat_template: str | None = None) -> AureaProcessor:
    image_processor = AureaImageProcessor(size=SIDE, spatial_size={"shortest_edge": 32}, spatial_crop_size=SIDE)
    return AureaProcessor(image_processor, build_tokenizer(FIXTURES / "published"), chat_template)


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def trained_texts(processor, batch) -> list[str]:
    return [processor.decode(labels[labels != -100]) for labels in batch["labels"]]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


# LLaVA's format

LLAVA = [
    {
        "id": 7,
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"},
            {"from": "gpt", "value": "A cat."},
        ],
    },
    {
        "id": "two",
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Compare <image> with\n<image>"},
            {"from": "gpt", "value": "They\ndiffer."},
        ],
    },
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
]


@pytest.fixture
def llava(tmp_path) -> Path:
    (tmp_path / "data.json").write_text(json.dumps(LLAVA))
    (tmp_path / "data.jsonl").write_text("\n\n".join(map(json.dumps, LLAVA)) + "\n")
    for number, name in enumerate(("a.png", "b.png")):
        (tmp_path / name).write_bytes(png(number))
    return tmp_path


def part_texts(message: dict) -> list[str]:
    return [part["text"] if part["type"] == "text" else part["type"].upper() for part in message["content"]]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_records_become_rows_of_messages_and_paths(llava, name, streaming):
    rows = list(load_llava_dataset(llava / name, llava, streaming=streaming))
    assert [row["id"] for row in rows] == ["7", "two", f"{name}:2"]
    assert [[Path(path).name for path in row["images"]] for row in rows] == [["a.png"], ["a.png", "b.png"], []]
    assert all(Path(path).is_file() for row in rows for path in row["images"])
    assert [message["role"] for message in rows[1]["messages"]] == ["system", "user", "assistant"]
    texts = [[part_texts(message) for message in row["messages"]] for row in rows]
    assert texts == [
        [["IMAGE", "What is it?"], ["A cat."]],
        [["Be brief."], ["Compare ", "IMAGE", " with", "IMAGE"], ["They\ndiffer."]],
        [["Hello"], ["Hi"]],
    ]


def test_several_files_are_one_dataset_and_shards_of_a_stream(llava):
    files = [llava / "data.json", llava / "data.jsonl"]
    assert len(load_llava_dataset(files, llava)) == 6
    stream = load_llava_dataset(files, llava, streaming=True)
    assert stream.num_shards == 2 and len(list(stream)) == 6


def test_an_array_may_begin_with_a_byte_order_mark(llava):
    (llava / "data.json").write_bytes(b"\xef\xbb\xbf" + (llava / "data.json").read_bytes())
    assert len(load_llava_dataset(llava / "data.json", llava)) == 3


def test_zero_is_an_id():
    assert to_chat_row({"id": 0, "messages": []}, index=5)["id"] == "0"


def test_changed_file_is_not_taken_from_the_cache(llava):
    assert len(load_llava_dataset(llava / "data.json", llava)) == 3
    (llava / "data.json").write_text(json.dumps(LLAVA[:2]))
    assert len(load_llava_dataset(llava / "data.json", llava)) == 2


def test_addresses_and_absolute_paths_are_not_moved_into_the_folder():
    for source in ("https://host/a.png", "http://host/a.png", "data:image/png;base64,AAAA", "/elsewhere/a.png"):
        assert to_chat_row({"image": source, "messages": []}, image_folder="folder")["images"] == [source]
    assert to_chat_row({"image": "a.png", "messages": []}, image_folder="folder")["images"] == ["folder/a.png"]


BAD_FILES = {
    "broken array": ("data.json", '[{"id": 1}, {"id"', ValueError, r"data.json is no JSON: .*column"),
    "text that is not UTF-8": ("data.jsonl", b'{"id": "\xff"}', ValueError, "data.jsonl, line 1, is no JSON: .*utf-8"),
    "broken line": ("data.jsonl", '{"id": 1}\n{"id"\n', ValueError, "data.jsonl, line 2, is no JSON"),
    "no records": ("data.json", "[]", ValueError, "data.json holds no records"),
    "record that is a number": ("data.json", '[{"id": 1}, 5]', ValueError, "data.json: record 1 is no object, but 5"),
}


@pytest.mark.parametrize("name, content, error, message", BAD_FILES.values(), ids=BAD_FILES)
def test_file_that_is_no_llava_json_is_refused_by_name(tmp_path, name, content, error, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=message):
        load_llava_dataset(tmp_path / name, tmp_path)


def test_missing_file_and_folder_are_refused_by_name(llava):
    with pytest.raises(FileNotFoundError, match=r"no\.json does not exist"):
        load_llava_dataset(llava / "no.json", llava)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_llava_dataset(llava / "data.json", llava / "nowhere", streaming=True)


def test_bad_records_are_kept_for_the_collator_to_report(tmp_path, processor):
    records = [
        {"id": "robot", "conversations": [{"from": "robot", "value": "?"}]},
        {"id": "empty", "conversations": []},
        {"id": "absent"},
        {"id": "two roles", "conversations": [{"from": ["human"], "value": "q"}]},
        {"id": "half", "image": [None, "a.png"], "conversations": LLAVA[0]["conversations"]},
        {"id": "odd", "conversations": ["text", {"from": "gpt", "value": None}]},
        {"id": "no placeholder", "image": "a.png", "conversations": LLAVA[2]["conversations"]},
        {"id": "no picture", "conversations": LLAVA[0]["conversations"]},
    ]
    (tmp_path / "data.json").write_text(json.dumps(records))
    (tmp_path / "a.png").write_bytes(png())
    dataset = load_llava_dataset(tmp_path / "data.json", tmp_path)
    reasons = dict(check_dataset(dataset, processor))
    assert list(reasons) == [record["id"] for record in records]
    assert "turn 0 has the unknown role 'robot'" in reasons["robot"]
    assert "conversation is empty" in reasons["empty"] and "conversation is empty" in reasons["absent"]
    assert "turn 0 has the unknown role \"['human']\"" in reasons["two roles"]
    assert "2 images for 1 placeholders" in reasons["half"]
    assert "turn 0 has the unknown role 'None'" in reasons["odd"]
    assert "1 images for 0 placeholders" in reasons["no placeholder"]
    assert "0 images for 1 placeholders" in reasons["no picture"]


# other conversations


CONTENTS = {
    "column of one": {"messages": [user(IMAGE, "a")], "image": "x.png"},
    "column of a list": {"messages": [user(IMAGE, "a")], "images": ["x.png"]},
    "in the part": {"messages": [user({"type": "image", "image": "x.png"}, "a")]},
    "path in the part": {"messages": [user({"type": "image", "path": "x.png", "url": None}, "a")]},
    "OpenAI": {"messages": [user({"type": "image_url", "image_url": {"url": "x.png"}}, "a")]},
    "placeholder in the text": {"messages": [{"role": "user", "content": "<image>\na"}], "images": ["x.png"]},
    "text alone, as in TRL": {"messages": [{"role": "user", "content": "a"}], "images": ["x.png"]},
    "column of NumPy": {"messages": np.array([user(IMAGE, "a")]), "images": np.array(["x.png"], dtype=object)},
    "content of NumPy": {"messages": [{"role": "user", "content": np.array([IMAGE, text("a")])}], "image": "x.png"},
    "content of tuples": {"messages": ({"role": "user", "content": (IMAGE, "a")},), "images": ("x.png",)},
    "names of other turns": {
        "messages": [{"from": "human", "value": "<image>a", "role": None, "content": None}],
        "images": ["x.png"],
    },
    "columns of other rows": {"id": None, "messages": [user(IMAGE, "a")], "conversations": None, "images": ["x.png"]},
    "fields of other parts": {
        "messages": [user({**IMAGE, "text": None, "image": None}, {**text("a"), "image_url": {"url": None}})],
        "images": ["x.png"],
    },
    "fields of other turns": {"messages": [{**user(IMAGE, "a"), "images": [], "image": None}], "images": ["x.png"]},
}


@pytest.mark.parametrize("row", CONTENTS.values(), ids=CONTENTS)
def test_every_way_to_write_a_picture_gives_the_same_row(row):
    expected = {"id": None, "messages": [user(IMAGE, "a")], "images": ["x.png"]}
    assert to_chat_row(row) == expected


def test_one_part_alone_is_a_content():
    part = {"type": "image", "image": "x.png"}
    row = {"messages": [{"role": "user", "content": part}, {"role": "assistant", "content": text("a")}]}
    assert to_chat_row(row) == {"id": None, "messages": [user(IMAGE), assistant("a")], "images": ["x.png"]}


def test_picture_in_bytes_is_turned_as_one_in_a_file(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    picture().save(tmp_path / "x.png", exif=exif)
    turns = [user(IMAGE, "a"), assistant("b")]
    sources = [
        str(tmp_path / "x.png"),
        (tmp_path / "x.png").read_bytes(),
        picture().rotate(-90, expand=True),
        picture(),
    ]
    batches = [AureaDataCollator(processor)([{"messages": turns, "images": [source]}]) for source in sources]
    file, data, turned, unturned = (batch["pixel_values"] for batch in batches)
    assert torch.equal(file, data) and torch.equal(file, turned) and not torch.equal(file, unturned)


def test_pictures_in_parts_and_in_the_column_keep_the_order_of_their_placeholders():
    row = {"messages": [user(IMAGE, {"type": "image", "path": "b"}, IMAGE)], "images": ["a", "c"]}
    assert to_chat_row(row)["images"] == ["a", "b", "c"]


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("kind", ["decoded", "bytes", "path", "in the parts"])
def test_chat_dataset_of_any_kind_reaches_the_batch(processor, tmp_path, kind, streaming):
    import datasets

    (tmp_path / "x.png").write_bytes(png(5))
    value = {"decoded": picture(5), "bytes": {"bytes": png(5), "path": None}, "path": "x.png"}.get(kind)
    answer = assistant("b")
    if kind == "in the parts":
        part = {"type": "image", "text": None, "image": picture(5)}
        question = {"role": "user", "content": [part, {"type": "text", "text": "a", "image": None}]}
        dataset = datasets.Dataset.from_list([{"messages": [question, answer]}])
    else:
        dataset = datasets.Dataset.from_list([{"messages": [user(IMAGE, "a"), answer], "images": [value]}])
    dataset = dataset.to_iterable_dataset() if streaming else dataset
    rows = list(to_chat_rows(dataset, image_folder=tmp_path))
    assert [row["id"] for row in rows] == ["0"] and list(rows[0]) == ["id", "messages", "images"]
    batch = AureaDataCollator(processor)(rows)
    expected = processor(images=picture(5), return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)


def test_stream_without_known_columns_can_be_read():
    import datasets

    stream = datasets.IterableDataset.from_generator(mixed_rows)
    assert stream.column_names is None
    assert [row["id"] for row in to_chat_rows(stream)] == ["one", "none", "two"]


def test_corrupt_picture_of_a_dataset_is_named_instead_of_ending_the_iteration(processor):
    import datasets

    rows = mixed_rows()
    for row in rows:
        row["images"] = [{"bytes": png(), "path": "x.png"} for _ in row["images"]]
    rows[2]["images"][1] = {"bytes": png()[:200], "path": "broken.png"}
    dataset = datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))
    ((identity, reason),) = check_dataset(to_chat_rows(dataset), processor)
    assert identity == "two" and reason.startswith("picture 1, broken.png, cannot be read: ")


# labels


@pytest.mark.parametrize("template", [None, UNMARKED_TEMPLATE, CHATML], ids=["published", "unmarked", "ChatML"])
def test_answers_and_their_ends_are_trained_on_and_nothing_else(template):
    processor = make_processor(template)
    batch = AureaDataCollator(processor)(mixed_rows())
    texts = ["A cat.<|end|>Yes, I am.<|end|>", "Aurea<|end|>", "same<|end|>"]
    texts = [answer.replace("<|end|>", "<|endoftext|>") for answer in texts] if template == CHATML else texts
    assert trained_texts(processor, batch) == texts
    trained = batch["labels"] != -100
    assert torch.equal(batch["labels"][trained], batch["input_ids"][trained])


def test_batch_is_what_the_processor_makes_of_it(processor):
    rows = mixed_rows()
    batch = AureaDataCollator(processor)(rows)
    images = [row["images"] for row in rows]
    texts = [processor.apply_chat_template(row["messages"]) for row in rows]
    expected = processor(images=images, text=texts, padding=True, padding_side="right", return_tensors="pt")
    placeholders = expected.pop("mm_token_type_ids")  # which in a batch are all tokens of their id
    assert torch.equal(placeholders == 1, expected["input_ids"] == processor.image_token_id)
    assert batch.keys() == {*expected, "labels"}
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert batch["pixel_values"].shape == (3, 2, 3, 28, 28)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_template_without_marks_gives_the_same_batch(processor):
    batch, unmarked = (
        AureaDataCollator(part)(mixed_rows()) for part in (processor, make_processor(UNMARKED_TEMPLATE))
    )
    assert all(torch.equal(batch[name], unmarked[name]) for name in batch)


def test_template_with_marks_is_rendered_once_however_many_turns(processor, monkeypatch):
    calls = []
    render = AureaProcessor.apply_chat_template
    monkeypatch.setattr(AureaProcessor, "apply_chat_template", lambda *a, **k: calls.append(1) or render(*a, **k))
    AureaDataCollator(processor)([{"messages": [user("a"), assistant("b")] * 20}])
    assert len(calls) == 1


def test_rows_without_pictures_have_no_pixels(processor):
    assert "pixel_values" not in AureaDataCollator(processor)(mixed_rows()[1:2])


def test_train_on_all_leaves_out_padding_and_placeholders_only(processor):
    batch = AureaDataCollator(processor, train_on="all")(mixed_rows())
    left_out = (batch["attention_mask"] == 0) | (batch["input_ids"] == processor.image_token_id)
    assert torch.equal(batch["labels"] == -100, left_out)
    question_alone = AureaDataCollator(processor, train_on="all")([{"messages": [user("a")]}])
    assert processor.decode(question_alone["labels"][0]) == "<|user|>a<|end|>"


def test_pad_to_multiple_of(processor):
    plain, padded = (AureaDataCollator(processor, pad_to_multiple_of=size)(mixed_rows()) for size in (None, 64))
    length = plain["input_ids"].shape[1]
    assert length % 64 and padded["input_ids"].shape[1] == -(-length // 64) * 64
    for name, value in (("input_ids", processor.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", -100)):
        assert torch.equal(padded[name][:, :length], plain[name]) and (padded[name][:, length:] == value).all()


def test_tokenizer_without_a_padding_token_pads_with_its_end_token():
    processor = make_processor()
    processor.tokenizer.pad_token = None
    batch = AureaDataCollator(processor)(mixed_rows())
    assert (batch["input_ids"][batch["attention_mask"] == 0] == processor.tokenizer.eos_token_id).all()


THINKS_LAST = CHATML.replace(
    "<|{{ m['role'] }}|>", "<|{{ m['role'] }}|>{{ '<think></think>' if loop.last and m['role'] == 'assistant' }}"
)
THINKS_FIRST = CHATML.replace("{% if add_generation_prompt %}<|assistant|>", "{% if add_generation_prompt %}<think>")


@pytest.mark.parametrize(
    "template, thought",
    [(THINKS_LAST, "<think></think>"), (THINKS_FIRST, "")],
    ids=["last answer alone thinks", "prompt thinks"],
)
def test_answers_are_found_where_the_template_rewrites_what_precedes_them(template, thought):
    processor = make_processor(template)
    row = {"messages": [user("b"), assistant("b"), user("[answer 1] d"), assistant("d ")]}
    labels = AureaDataCollator(processor)([row])["labels"][0]
    assert processor.decode(labels[labels != -100]).replace(" ", "") == f"b<|endoftext|>{thought}d<|endoftext|>"


@pytest.mark.parametrize("template", [CHATML, THINKS_LAST, THINKS_FIRST], ids=["ChatML", "last", "prompt"])
def test_an_answer_that_begins_a_conversation_is_trained_on_without_its_header(template):
    processor = make_processor(template)
    row = {"messages": [assistant("a"), user("b"), assistant("c")]}
    labels = AureaDataCollator(processor)([row])["labels"][0]
    assert processor.decode(labels[labels != -100]).replace(" ", "").startswith("a<|endoftext|>")


def test_without_an_end_token_the_next_turn_is_not_trained_on():
    processor = make_processor(THINKS_LAST.replace("<|endoftext|>\n", "\n"))
    row = {"messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    labels = AureaDataCollator(processor)([row])["labels"][0]
    assert processor.decode(labels[labels != -100]).replace("\n", "") == "b<think></think>d"


def test_template_that_rewrites_an_answer_is_refused():
    template = THINKS_LAST.replace("else p['text']", "else p['text'] | upper")
    assert template != THINKS_LAST
    row = {"id": "x", "messages": [user("a"), assistant("b"), user("c"), assistant("d")]}
    with pytest.raises(ValueError, match=r"x: the chat template writes the answer of turn 1 .*{% generation %}"):
        AureaDataCollator(make_processor(template))([row])


def test_longer_rows_are_cut_off(processor):
    whole = AureaDataCollator(processor)(mixed_rows())
    length = whole["input_ids"].shape[1] - 3
    cut = AureaDataCollator(processor, max_length=length)(mixed_rows())
    assert all(torch.equal(cut[name], whole[name][:, :length]) for name in ("input_ids", "attention_mask", "labels"))


def test_independent_turns_are_cut_off_with_their_positions(processor):
    rows = mixed_rows()[1:2]
    whole = AureaDataCollator(processor, independent_turns=True)(rows)
    length = whole["input_ids"].shape[1] - 2
    cut = AureaDataCollator(processor, independent_turns=True, max_length=length)(rows)
    assert all(torch.equal(cut[name], whole[name][:, :length]) for name in ("input_ids", "labels", "position_ids"))


def test_a_length_that_is_a_multiple_already_stays(processor):
    length = AureaDataCollator(processor)(mixed_rows())["input_ids"].shape[1]
    for multiple in (1, length):
        batch = AureaDataCollator(processor, pad_to_multiple_of=multiple)(mixed_rows())
        assert batch["input_ids"].shape[1] == length


@pytest.mark.parametrize("turns", [[user("a"), assistant("b"), user("c")], [user("a")]], ids=len)
def test_a_turn_without_an_answer_stays_in_its_conversation(processor, turns):
    separate, together = (
        AureaDataCollator(processor, train_on="all", independent_turns=independent)([{"id": "x", "messages": turns}])
        for independent in (True, False)
    )
    assert torch.equal(separate["input_ids"], together["input_ids"])


def test_a_placeholder_may_be_the_last_token_kept(processor):
    row = {"id": "x", "messages": [user("a", IMAGE, "b"), assistant("c")], "images": [picture()]}
    whole = AureaDataCollator(processor, train_on="all")([row])["input_ids"]
    place = whole[0].tolist().index(processor.image_token_id)
    cut = AureaDataCollator(processor, train_on="all", max_length=place + 1)([row])
    assert torch.equal(cut["input_ids"], whole[:, : place + 1]) and cut["pixel_values"].shape[0] == 1
    with pytest.raises(ValueError, match="would cut off the placeholders of 1 of its 1 pictures"):
        AureaDataCollator(processor, train_on="all", max_length=place)([row])


def test_the_first_token_is_no_target(processor):
    row = mixed_rows()[1]
    labels = AureaDataCollator(processor, train_on="all", max_length=2)([row])["labels"]
    assert (labels != -100).sum() == 2
    with pytest.raises(ValueError, match=r"none of its \d+ tokens within `max_length=1` is trained on"):
        AureaDataCollator(processor, train_on="all", max_length=1)([row])


# bad rows


def bad(**changes) -> dict:
    return {**mixed_rows()[0], "id": "bad", **changes}


BAD_ROWS = {
    "no row": ("bad", "AttributeError"),
    "conversation that is a text": (bad(messages="[]"), "turn 0 has the unknown role 'None'"),
    "no columns": ({"id": "bad"}, r"only \['id'\]: use `to_chat_rows`, and `remove_unused_columns=False`"),
    "empty conversation": (bad(messages=[]), "conversation is empty"),
    "no answer": (bad(messages=[user(IMAGE, "a")]), "no turn of the assistant"),
    "empty answer": (bad(messages=[user(IMAGE, "a"), assistant(" ")]), "turn 1 is an answer without text"),
    "unknown role": (bad(messages=[{"role": "tool", "content": "a"}]), "turn 0 has the unknown role 'tool'"),
    "video": (bad(messages=[user({"type": "video"}, "a")]), "turn 0 contains 'video'"),
    "picture without placeholder": (bad(messages=[user("a"), assistant("b")]), "1 images for 0 placeholders"),
    "placeholder without picture": (bad(images=[]), "0 images for 1 placeholders"),
    "missing picture": (bad(images=["no/such.png"]), "picture 0, no/such.png, cannot be read: it is neither an exist"),
    "corrupt picture": (bad(images=[png()[:200]]), "picture 0, cannot be read: "),
    "no picture at all": (bad(images=[b"text"]), "picture 0, cannot be read: cannot identify"),
    "nothing as a picture": (bad(images=[{"bytes": None, "path": None}]), "picture 0 is missing"),
    "nothing beside a picture": (bad(images=[None, picture()]), "2 images for 1 placeholders"),
    "two columns": (bad(image=picture()), "2 images for 1 placeholders"),
    "reasoning beside an answer": (
        bad(messages=[user("a"), {**assistant("b"), "reasoning_content": "c"}], images=[]),
        "turn 1 contains '`reasoning_content` beside the content'",
    ),
    "call of a tool": (
        bad(messages=[user("a"), {**assistant("b"), "tool_calls": [{"name": "c"}]}], images=[]),
        "turn 1 contains '`tool_calls` beside the content'",
    ),
    "picture of a turn": (
        bad(messages=[{"role": "user", "content": "a", "images": ["x"]}, assistant("b")], images=[]),
        "turn 0 contains \"pictures under 'images'\"; .* parts of type image or under `images` of the row",
    ),
    "picture of a text": (bad(messages=[user({**text("a"), "path": "x"})]), "turn 0 contains 'text with a picture'"),
    "text of a picture": (bad(messages=[user({**IMAGE, "text": "a"})]), "turn 0 contains 'image with a text'"),
    "answer that is no text": (
        bad(messages=[user(IMAGE), {"role": "assistant", "content": [{"type": "text", "text": ["b"]}]}]),
        "turn 1 contains 'text of list'",
    ),
    "part of no kind": (bad(messages=[user(IMAGE, b"a"), assistant("b")]), "turn 0 contains 'bytes'"),
    "columns of turns": (
        bad(messages={"role": ["user"], "content": ["a"]}),
        r"turn 0 has the unknown role \"\['user'",
    ),
    "number as a picture": (bad(images=[3]), "TypeError: A picture must be .* int: 3"),
}


@pytest.mark.parametrize("row, reason", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row_stops_the_training_or_is_left_out_by_name(processor, row, reason):
    rows = [mixed_rows()[1], row]
    with pytest.raises(ValueError, match=f"^(bad|row 1 of its batch): .*{reason}"):
        AureaDataCollator(processor)(rows)
    collator = AureaDataCollator(processor, on_error="skip")
    batch = collator(rows)
    assert trained_texts(processor, batch) == ["Aurea<|end|>", ""]
    ((identity, explanation),) = collator.skipped
    assert identity == ("row 1 of its batch" if row == "bad" else "bad") and re.search(reason, explanation)


@pytest.mark.parametrize("absent", ["", " ", None, []])
def test_llava_record_without_a_picture_is_text_alone(processor, absent, tmp_path):
    turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "two"}]
    record = {"id": 1, "image": absent, "conversations": turns}
    assert to_chat_row(record, image_folder="x")["images"] == []
    (tmp_path / "data.json").write_text(json.dumps([record, record | {"image": [absent]} if absent != [] else record]))
    for row in (record, *load_llava_dataset(tmp_path / "data.json", tmp_path)):
        assert "pixel_values" not in AureaDataCollator(processor)([row])
    asks = {**record, "conversations": [{"from": "human", "value": "<image>\nHow many?"}, turns[1]]}
    with pytest.raises(ValueError, match="0 images for 1 placeholders"):
        AureaDataCollator(processor)([asks])


def test_encoded_pictures_are_read(processor):
    rows = [{"messages": [user(IMAGE, "a"), assistant("b")], "images": [picture()]}]
    expected = AureaDataCollator(processor)(rows)["pixel_values"]
    for form in (png(), io.BytesIO(png()), {"bytes": png(), "path": None}):
        inside = {"messages": [user({"type": "image", "image": form}, "a"), assistant("b")]}
        for row in ({**rows[0], "images": [form]}, {**rows[0], "image": form, "images": None}, inside):
            assert torch.equal(AureaDataCollator(processor)([row])["pixel_values"], expected)


CONTROL_WORDS = "<|image|> and <|end|><|assistant|>"


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, UNMARKED_TEMPLATE, "{{ messages | length }}" + UNMARKED_TEMPLATE])
@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_control_tokens_in_words_are_text(processor, template, train_on):
    other = AureaProcessor(processor.image_processor, processor.tokenizer, chat_template=template)
    row = {"messages": [user(IMAGE, CONTROL_WORDS), assistant(CONTROL_WORDS)], "images": [picture()]}
    batch = AureaDataCollator(other, train_on=train_on)([row])
    known = processor.tokenizer.added_tokens_decoder
    names = [known[idx].content for idx in batch["input_ids"][0].tolist() if idx in known]
    structure = ["<|system|>", "<|end|>", "<|user|>", "<|image|>", "<|end|>", "<|assistant|>", "<|end|>"]
    assert names == structure and len(batch["pixel_values"]) == 1
    if train_on == "assistant":
        assert trained_texts(processor, batch) == [f"{CONTROL_WORDS}<|end|>"]


def test_skipping_warns_once_per_row(processor, monkeypatch):
    warnings = []
    monkeypatch.setattr("transformers_aurea.data_aurea.logger.warning", warnings.append)
    rows = [bad(messages=[]), mixed_rows()[1], bad(id="worse", images=[])]
    AureaDataCollator(processor, on_error="skip")(rows)
    assert [warning.partition(" is left out")[0] for warning in warnings] == ["bad", "worse"]


def test_skipped_rows_leave_a_row_that_trains_nothing(processor, converted):
    collator = AureaDataCollator(processor, on_error="skip")
    good = mixed_rows()[1]
    batch, alone = collator([bad(messages=[]), good]), collator([good])
    assert len(batch["input_ids"]) == 2
    assert (batch["labels"][0] == -100).all() and torch.equal(batch["labels"][1:], alone["labels"])
    assert batch["attention_mask"][0].sum() == 1

    model = AureaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32).train()
    torch.testing.assert_close(model(**batch).loss, model(**alone).loss)
    nothing = collator([bad(messages=[]), bad(images=[])])
    for kwargs in ({}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(0)}):
        loss = model(**nothing, **kwargs).loss
        loss.backward()
        assert loss == 0
    assert all(parameter.grad.eq(0).all() for parameter in model.parameters() if parameter.grad is not None)


def test_malformed_row_without_id_is_named_and_skipped(processor):
    rows = [mixed_rows()[1], {"messages": [{"role": ["user"], "content": [3]}]}]
    with pytest.raises(ValueError, match=r"row 1 of its batch, '3': turn 0 has the unknown role"):
        AureaDataCollator(processor)(rows)
    collator = AureaDataCollator(processor, on_error="skip")
    collator(rows)
    assert len(collator.skipped) == 1


def test_row_without_id_is_named_by_its_place_and_words(processor):
    row = {"messages": [user("What is this?")]}
    with pytest.raises(ValueError, match=r"row 1 of its batch, 'What is this\?': it has no turn of the assistant"):
        AureaDataCollator(processor)([mixed_rows()[1], row])


def test_max_length_cuts_off_neither_a_placeholder_nor_all_answers(processor):
    late = {"id": "late", "messages": [user("a" * 40, IMAGE), assistant("b")], "images": [picture()]}
    with pytest.raises(ValueError, match=r"late: .*`max_length=200` would cut off the placeholders of 1 of its 1"):
        AureaDataCollator(processor, max_length=200)([late | {"messages": [user("a" * 300, IMAGE), assistant("b")]}])
    with pytest.raises(ValueError, match=r"none: none of its \d+ tokens within `max_length=5` is trained on"):
        AureaDataCollator(processor, max_length=5)(mixed_rows()[1:2])


def test_check_finds_every_bad_row_and_names_it(processor):
    rows = [*mixed_rows(), bad(images=[]), {**bad(messages=[]), "id": None}]
    found = check_dataset(rows, processor)
    assert [identity for identity, _ in found] == ["bad", "row 4"]
    assert [identity for identity, _ in check_dataset(rows[:3], processor, max_length=50)] == ["one", "two"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"on_error": "ignore"}, "`on_error` .* got 'ignore'"),
        ({"train_on": "user"}, "`train_on` .* got 'user'"),
        ({"max_length": 0}, "`max_length` must be positive, got 0"),
        ({"pad_to_multiple_of": -1}, "`pad_to_multiple_of` must be positive, got -1"),
    ],
)
def test_bad_settings_are_refused_by_name(processor, settings, message):
    with pytest.raises(ValueError, match=message):
        AureaDataCollator(processor, **settings)


# training


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("workers", [0, 2])
def test_plain_trainer_learns_from_llava_files(llava, converted, golden_processor, tmp_path, streaming, workers):
    settings = {"max_steps": 6, "dataloader_num_workers": workers, "learning_rate": 5e-3, "logging_steps": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}
    arguments = TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=3, remove_unused_columns=False, **settings, **quiet
    )
    model = AureaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32)
    dataset = load_llava_dataset(llava / "data.json", llava, streaming=streaming)
    trainer = Trainer(model, arguments, AureaDataCollator(golden_processor), train_dataset=dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.5


def test_rows_are_grouped_by_length(processor, converted, tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = ["ab" * length for length in (1, 9, 2, 8, 3, 7)]
    turns = [[user(IMAGE, text), assistant("b")] for text in texts]
    rows = datasets.Dataset.from_list([{"messages": messages, "images": [png()]} for messages in turns])
    rows = with_lengths(to_chat_rows(rows), processor)
    assert rows["length"] == [1 + len(processor.tokenizer(text)["input_ids"]) + 1 for text in texts]
    arguments = TrainingArguments(
        str(tmp_path), remove_unused_columns=False, train_sampling_strategy="group_by_length", use_cpu=True
    )
    model = AureaForConditionalGeneration.from_pretrained(converted)
    trainer = Trainer(model, arguments, AureaDataCollator(processor), train_dataset=rows)
    assert sorted(trainer.get_train_dataloader().sampler) == list(range(6))
    next(iter(trainer.get_train_dataloader()))
    bare = Trainer(model, arguments, AureaDataCollator(processor), train_dataset=rows.remove_columns("length"))
    with pytest.raises(ValueError, match="infer lengths"):
        bare.get_train_dataloader()


def test_seq2seq_trainer_pads_what_it_generates(golden_processor, converted, tmp_path):
    model = AureaForConditionalGeneration.from_pretrained(converted)
    model.generation_config.max_length = 400
    settings = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "remove_unused_columns": False}
    arguments = Seq2SeqTrainingArguments(str(tmp_path), predict_with_generate=True, **settings)
    rows = [{"messages": [user(IMAGE, "a"), assistant("b")], "images": [picture()]}]
    trainer = Seq2SeqTrainer(
        model, arguments, AureaDataCollator(golden_processor), eval_dataset=rows, processing_class=golden_processor
    )
    found = trainer.predict(rows, max_new_tokens=2).predictions
    assert found.shape == (1, 400) and found[0, -1] == golden_processor.tokenizer.pad_token_id


# independent turns

QUIZ = {
    "messages": [
        {"role": "system", "content": "Look closely."},
        user(IMAGE, "What?"),
        assistant("A cat."),
        user("Sure?"),
        assistant("Yes, I am."),
    ],
    "images": [picture(1)],
}


@pytest.mark.parametrize("template", [None, UNMARKED_TEMPLATE], ids=["marked", "unmarked"])
def test_independent_turns_are_conversations_of_their_own(golden_processor, template):
    processor = AureaProcessor(
        golden_processor.image_processor, golden_processor.tokenizer, template or golden_processor.chat_template
    )
    batch = AureaDataCollator(processor, independent_turns=True)([QUIZ, mixed_rows()[1]])
    system, question, answer, second, last = QUIZ["messages"]
    alone = [
        AureaDataCollator(processor)([{"messages": [system, question, answer], "images": QUIZ["images"]}]),
        AureaDataCollator(processor)([{"messages": [system, second, last]}]),
    ]
    for name in ("input_ids", "labels"):
        assert batch[name][0].equal(torch.cat([one[name][0] for one in alone]))
    lengths = [one["input_ids"].shape[1] for one in alone]
    assert batch["position_ids"][0].tolist() == [*range(lengths[0]), *range(lengths[1])]
    assert "attention_mask" not in batch and batch["pixel_values"].equal(alone[0]["pixel_values"])
    assert (batch["labels"][1] != -100).sum() > 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_independent_turns_see_the_pictures_and_not_each_other(golden_model, golden_processor, implementation):
    golden_model.set_attn_implementation(implementation)
    batch = AureaDataCollator(golden_processor, independent_turns=True)([QUIZ, mixed_rows()[1]])
    start = batch["position_ids"][0].tolist().index(0, 1)
    with torch.no_grad():
        packed = golden_model(**batch, use_cache=False).logits
        states = golden_model.get_image_features(batch["pixel_values"]).pooler_output.flatten(0, 1)[None]
        second = golden_model(input_ids=batch["input_ids"][:1, start:], cross_attention_states=states).logits
        blind = golden_model(input_ids=batch["input_ids"][:1, start:]).logits
    torch.testing.assert_close(packed[:1, start:], second, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(second, blind, atol=1e-3)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_row_that_is_one_conversation_stays_one_among_independent_turns(
    golden_model, golden_processor, implementation
):
    """It may show a picture later on, too, and its answers see what was said before."""
    golden_model.set_attn_implementation(implementation)
    later = [user("Hello"), assistant("Hi"), user(IMAGE, "What?"), assistant("A cat.")]
    talk = {"messages": later, "images": [picture(2)], "independent_turns": False}
    batch = AureaDataCollator(golden_processor, independent_turns=True)([QUIZ, talk])
    alone = AureaDataCollator(golden_processor)([talk])
    length = alone["input_ids"].shape[1]
    for name in ("input_ids", "labels"):
        assert batch[name][1, :length].equal(alone[name][0])
    assert batch["position_ids"][1, :length].tolist() == [*range(length)]
    assert (batch["position_ids"][0] == 0).sum() > 1
    with torch.no_grad():
        packed = golden_model(**batch, use_cache=False).logits[1, :length]
        expected = golden_model(**alone).logits[0]
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-4)


def test_independent_turns_show_their_pictures_first(processor):
    late = [user("Hello"), assistant("Hi"), user(IMAGE, "What?"), assistant("A cat.")]
    with pytest.raises(ValueError, match=r"late: turn 2 shows a picture: .* before the first answer"):
        AureaDataCollator(processor, independent_turns=True)([{"id": "late", "messages": late, "images": [picture()]}])


def test_independent_turns_all_answer_something(processor):
    row = {
        "id": "x",
        "messages": [user(IMAGE, "What?"), assistant("A cat."), assistant("Yes.")],
        "images": [picture()],
    }
    assert "Yes." in trained_texts(processor, AureaDataCollator(processor)([row]))[0]
    with pytest.raises(ValueError, match="x: turn 2 answers no question"):
        AureaDataCollator(processor, independent_turns=True)([row])


def test_trainer_uses_no_cache_which_would_let_independent_turns_see_each_other(golden_processor, converted, tmp_path):
    model = AureaForConditionalGeneration.from_pretrained(converted, dtype=torch.float32)
    collator = AureaDataCollator(golden_processor, independent_turns=True)
    Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), collator)
    assert model(**collator([QUIZ])).get(CACHE_NAME) is None
