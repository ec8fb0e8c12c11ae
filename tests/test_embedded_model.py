# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The model that travels with the package: its folder, and whether it sees."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_integrations_aurea import ALL_FILES, AUTO_MAP, run_without_package
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, pipeline

from transformers_aurea import (
    AureaDataCollator,
    AureaForConditionalGeneration,
    AureaProcessor,
    embedded_model_path,
    set_trainable,
)
from transformers_aurea.scenes import IMAGE_SIZE, KINDS, SceneDataset, make_scene, test_seeds


EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# Not those that the README's figures come from.
UNSEEN = test_seeds(100_040)[100_000:]


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(embedded_model_path()).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(embedded_model_path())


def example(name: str):
    """An example script as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(model, processor, picture: Image.Image, question: str) -> str:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    generated = model.generate(**inputs, do_sample=False)
    return processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_folder_claims_no_code_that_it_does_not_hold():
    folder = Path(embedded_model_path())
    assert {file.suffix for file in folder.iterdir()} == {".json", ".jinja", ".md", ".safetensors"}
    assert not any("auto_map" in file.read_text() for file in folder.glob("*.json"))
    assert (folder / "model.safetensors").stat().st_size <= 10e6


def test_saved_folder_is_an_ordinary_model_folder(tmp_path):
    folder = tmp_path / "saved"
    assert embedded_model_path(folder) == str(folder)
    assert {file.name for file in folder.iterdir()} == ALL_FILES
    assert json.loads((folder / "config.json").read_text())["auto_map"] == AUTO_MAP
    for name in ("processor_config.json", "tokenizer_config.json"):
        assert json.loads((folder / name).read_text())["auto_map"] == {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    expected = load_file(Path(embedded_model_path(), "model.safetensors"))
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        embedded_model_path(tmp_path / "file")


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_folder_loads_wherever_the_package_is_imported(trust_remote_code):
    settings = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    assert type(AutoModelForImageTextToText.from_pretrained(embedded_model_path(), **settings)) is (
        AureaForConditionalGeneration
    )
    assert type(AutoProcessor.from_pretrained(embedded_model_path(), **settings)) is AureaProcessor


def test_size(model):
    assert 2e6 <= model.num_parameters() <= 3e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_unseen_scenes_are_answered_and_black_pictures_are_not(model, processor):
    scores = example("evaluate_scenes").evaluate(model, processor, UNSEEN)
    assert scores["all"]["exact_match"] >= 0.95
    assert scores["describe"]["exact_match_f1"] >= 0.95
    for kind in KINDS:
        assert scores[kind]["exact_match"] >= 0.85, (kind, scores[kind])
    for view in ("black_picture", "wrong_picture"):
        assert scores["all"][view] <= 0.5
        assert scores["describe"][view] <= 0.05


def test_drawings_and_second_questions_are_answered_and_what_cannot_be_is_said(model, processor, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    evaluation = example("evaluate_drawings")
    plain, rest, _, _ = evaluation.evaluate(model, processor, n=2, seed=100)

    def share(cells):
        return sum(cell["right"] for cell in cells) / sum(cell["asked"] for cell in cells)

    assert share([plain["all"][kind] for kind in evaluation.JUDGED]) >= 0.9
    assert share([rest[row]["all"] for row in ("second question", "second question, picture shown again")]) >= 0.8
    for row in ("blank picture", "no picture", "foreign question"):
        assert share([rest[row]["all"]]) >= 0.95, row


def test_pipeline_describes_a_scene(tmp_path):
    picture, ((_, question, answer),) = make_scene(UNSEEN[0], kinds=["describe"], max_objects=1)
    pipe = pipeline("image-text-to-text", model=embedded_model_path(), trust_remote_code=True)
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
    assert pipe(text=chat, return_full_text=False)[0]["generated_text"].strip() == answer


def test_pipeline_takes_encoded_pictures_and_names_the_remedy_of_a_text_without_placeholder(tmp_path):
    picture, _ = make_scene(UNSEEN[0])
    picture.save(tmp_path / "scene.png")
    pipe = pipeline("image-text-to-text", model=embedded_model_path(), trust_remote_code=False)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Describe the image."}]
    expected = pipe(text=[{"role": "user", "content": content}], return_full_text=False)
    for form in ((tmp_path / "scene.png").read_bytes(), {"bytes": None, "path": str(tmp_path / "scene.png")}):
        content[0] = {"type": "image", "image": form}
        answer = pipe(text=[{"role": "user", "content": content}], return_full_text=False)
        assert answer[0]["generated_text"] == expected[0]["generated_text"]
    with pytest.raises(ValueError, match=r"a text holds one placeholder per picture.* a chat for a pipeline"):
        pipe(str(tmp_path / "scene.png"), text="Describe the image.")
    assert pipe(str(tmp_path / "scene.png"), text="<|user|><|image|>Describe the image.<|end|><|assistant|>")


def test_each_row_of_a_batch_is_about_its_own_picture(model, processor):
    scenes = [make_scene(seed, kinds=["describe"], max_objects=2) for seed in UNSEEN[:4]]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": question}]}]
        for picture, ((_, question, _),) in scenes
    ]
    inputs = processor.apply_chat_template(
        chats,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    generated = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    together = [text.strip() for text in processor.batch_decode(generated, skip_special_tokens=True)]
    alone = [ask(model, processor, picture, question) for picture, ((_, question, _),) in scenes]
    assert together == alone
    assert len(set(alone)) == 4


FRESH = """
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, picture, question = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
template = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **template)
generated = model.generate(**inputs, do_sample=False)[0, inputs["input_ids"].shape[1] :]
open("answer.json", "w").write(json.dumps(processor.decode(generated, skip_special_tokens=True).strip()))
"""


def test_saved_folder_answers_where_the_package_is_not_installed(model, processor, tmp_path):
    picture, questions = make_scene(UNSEEN[0])
    _, question, _ = questions[-1]
    picture.save(tmp_path / "scene.png")
    run_without_package(FRESH, tmp_path, embedded_model_path(tmp_path / "saved"), tmp_path / "scene.png", question)
    assert json.loads((tmp_path / "answer.json").read_text()) == ask(model, processor, picture, question)


def test_template_writes_openai_messages(processor):
    chat = [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "x.png"}}, {"type": "text", "text": "a"}],
        },
        {"role": "assistant", "content": None},
    ]
    expected = "<|user|><|image|>a<|end|><|assistant|><|end|>"
    assert processor.apply_chat_template(chat) == expected
    # As it is rendered without the processor.
    assert (
        processor.tokenizer.apply_chat_template(chat, chat_template=processor.chat_template, tokenize=False)
        == expected
    )


def test_template_and_generation_config_are_those_of_the_script(processor):
    script = example("make_embedded_model")
    assert processor.chat_template == script.CHAT_TEMPLATE
    written = script.make_generation_config(script.make_tokenizer()).to_diff_dict()
    embedded = json.loads((Path(embedded_model_path()) / "generation_config.json").read_text())
    assert embedded == {**written, "transformers_version": embedded["transformers_version"]}


def test_no_picture_is_generated(processor):
    model = AutoModelForImageTextToText.from_pretrained(embedded_model_path()).eval()
    image_token = processor.image_token_id
    index = torch.tensor([image_token])
    model.lm_head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, index, 1e4))
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (model.generate(**inputs, suppress_tokens=[0])[0, inputs["input_ids"].shape[1] :] == image_token).all()
    for settings in ({}, {"generation_config": GenerationConfig(do_sample=True, max_new_tokens=20)}, {"num_beams": 2}):
        assert not (model.generate(**inputs, **settings) == image_token).any()


def test_template_refuses_unknown_roles_and_contents(processor):
    for turn in ({"role": "x", "content": "a"}, {"role": "user", "content": [{"type": "img"}]}):
        with pytest.raises(Exception, match=r"not (x|img)"):
            processor.apply_chat_template([turn])


def test_pictures_of_other_sizes_and_modes_are_taken(model, processor):
    for picture in (Image.new("L", (300, 20)), Image.new("RGBA", (IMAGE_SIZE, 5)), Image.new("RGB", (1, 1))):
        assert ask(model, processor, picture, "What is it?")


# what batch norms, as its spatial encoder has them, ask of training


def scene_batch(processor, seeds, **kwargs) -> dict[str, torch.Tensor]:
    rows = [SceneDataset([seed])[0] for seed in seeds]
    return AureaDataCollator(processor, **kwargs)(rows)


TEXT_ALONE = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "no"}]}


@pytest.mark.parametrize("groups", ["align", "full"])
def test_training_leaves_the_statistics_of_batch_norms_alone(processor, groups):
    model = AureaForConditionalGeneration.from_pretrained(embedded_model_path()).train()
    set_trainable(model, groups)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batch = scene_batch(processor, [1, 3])
    model(**batch).loss.backward()
    model(**AureaDataCollator(processor)([TEXT_ALONE])).loss.backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    together = model(**batch).logits
    for row, seed in enumerate((1, 3)):
        alone = scene_batch(processor, [seed])
        length = alone["input_ids"].shape[1]
        torch.testing.assert_close(model(**alone).logits[0], together[row, :length], rtol=1e-4, atol=1e-3)


def test_batch_norms_learn_where_the_configuration_lets_them(processor):
    model = AureaForConditionalGeneration.from_pretrained(embedded_model_path(), update_batch_norms=True).train()
    norm = next(m for m in model.model.spatial_vision_model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    before = norm.running_mean.clone()
    model(**AureaDataCollator(processor)([TEXT_ALONE])).loss.backward()
    assert torch.equal(norm.running_mean, before)  # the blank picture of a step of text
    set_trainable(model, "align")
    model.train()(**scene_batch(processor, [1]))
    assert torch.equal(norm.running_mean, before)
    set_trainable(model, "full")
    model.train()(**scene_batch(processor, [1]))
    assert not torch.equal(norm.running_mean, before)


def test_attention_implementations_that_the_convolutional_encoder_lacks(model, processor):
    """TRL loads a reference model with that of the model to train."""
    expected = model(**scene_batch(processor, [1])).logits
    for implementation in ("eager", "sdpa"):
        loaded = AureaForConditionalGeneration.from_pretrained(
            embedded_model_path(), attn_implementation=implementation
        )
        switched = AureaForConditionalGeneration.from_pretrained(embedded_model_path())
        switched.set_attn_implementation(implementation)
        for either in (loaded, switched):
            assert either.config.text_config._attn_implementation == implementation
            assert either.config.spatial_vision_config._attn_implementation == "eager"
            torch.testing.assert_close(either(**scene_batch(processor, [1])).logits, expected, rtol=1e-4, atol=1e-3)
    switched.set_attn_implementation("flex_attention")
    assert switched.config.vision_config._attn_implementation == "flex_attention"
    assert switched.config.spatial_vision_config._attn_implementation == "eager"
