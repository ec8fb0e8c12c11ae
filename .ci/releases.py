# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Folders saved by the package, and what each release of transformers makes of them without it.

    python .ci/releases.py save FOLDER     with the package: two model folders, inputs, and what is expected of them
    python .ci/releases.py load FOLDER     without it: one row of the table; fails if anything differs

One folder is the tiny published checkpoint as converted, whose expected logits and tokens were recorded from the
original code; the other is the embedded model with what it answers.
"""

import json
import sys
from inspect import signature
from pathlib import Path

import torch
from safetensors.torch import load_file


ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
QUESTIONS = ("What is in the picture?", "How many shapes are there?", "Is there a circle?")
COLUMNS = ("logits off by", "greedy", "beams", "no cache", "second turn", "answers")


def save(folder: Path):
    sys.path.insert(0, str(ROOT / "src"))
    from transformers_aurea import AureaForConditionalGeneration, AureaProcessor, embedded_model_path
    from transformers_aurea.convert_aurea_weights_to_hf import main as convert
    from transformers_aurea.scenes import make_scene, test_seeds

    source = ["--input_dir", str(FIXTURES / "published"), "--config", str(FIXTURES / "tiny_config.json")]
    assert convert([*source, "--output_dir", str(folder / "golden"), "--dtype", "float32"]) == 0
    embedded_model_path(folder / "embedded")
    make_scene(test_seeds(1)[0])[0].save(folder / "scene.png")
    model = AureaForConditionalGeneration.from_pretrained(folder / "embedded").eval()
    answers = ask(model, AureaProcessor.from_pretrained(folder / "embedded"), folder / "scene.png")
    (folder / "answers.json").write_text(json.dumps(answers))


def ask(model, processor, picture: Path) -> list[str]:
    answers = []
    for question in QUESTIONS:
        content = [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **settings)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(tokens, skip_special_tokens=True).strip())
    return answers


def load(folder: Path) -> list[str]:
    """The row of this release."""
    sys.modules["transformers_aurea"] = None  # an import of it fails
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, GenerationMixin

    def pretrained(name: str):
        settings = {"trust_remote_code": True}
        model = AutoModelForImageTextToText.from_pretrained(folder / name, dtype=torch.float32, **settings)
        return model.eval(), AutoProcessor.from_pretrained(folder / name, **settings)

    cache_name = (
        "cache"
        if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters
        else ("past_key_values")
    )
    goldens, facts = load_file(FIXTURES / "goldens.safetensors"), json.loads((FIXTURES / "goldens.json").read_text())
    model, processor = pretrained("golden")
    picture = Image.open(FIXTURES / "image_rgb.png")
    inputs = processor(images=picture, text=facts["message_image"], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[:, -48:]
    difference = (logits - goldens["text/logits_image_prompt_last48"]).abs().max().item()

    def generate(prompt, **settings):
        return model.generate(**{**prompt, "do_sample": False, "max_new_tokens": 12, "eos_token_id": None, **settings})

    def beams(**settings):
        return generate(inputs, num_beams=3, num_return_sequences=2, **settings)

    greedy = generate(inputs)
    cache = DynamicCache(config=model.config.text_config)
    first = generate(inputs, **{cache_name: cache})
    text = torch.cat([first, inputs["input_ids"][:, -4:]], dim=1)
    conversation = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    whole = generate({**conversation, "pixel_values": inputs["pixel_values"]})
    checks = [
        torch.equal(greedy[:, inputs["input_ids"].shape[1] :], goldens["gen/greedy_image/tokens"]),
        torch.equal(beams(), beams(use_cache=False)),
        torch.equal(greedy, generate(inputs, use_cache=False)),
        torch.equal(whole, generate(conversation, **{cache_name: cache})),
        ask(*pretrained("embedded"), folder / "scene.png") == json.loads((folder / "answers.json").read_text()),
    ]
    assert difference <= 1e-4 and all(checks), (difference, dict(zip(COLUMNS[1:], checks)))
    return [f"{difference:.1e}", *("equal" for _ in checks)]


if __name__ == "__main__":
    job, folder = sys.argv[1], Path(sys.argv[2])
    if job == "save":
        save(folder)
    else:
        import transformers

        transformers.logging.set_verbosity_error()
        print(f"| {transformers.__version__:11} | " + " | ".join(f"{cell:13}" for cell in load(folder)) + " |")
