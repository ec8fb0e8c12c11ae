# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The model card of a saved folder, its README.md: what the model is made of, under which licence, and how to run it.

Base models are the hub's that the configuration names, by what the model was loaded from and by its parts. Their
licences are read from their own cards where these are on this machine; no network is asked.
"""

import os
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig, PreTrainedModel


MODEL_TAGS = ["aurea", "vision-language"]
FILE_NAME = "README.md"

_TEXT = """
# {title}

{about}

| part | type | from | licence |
| --- | --- | --- | --- |
{parts}

Features are fused by `{fusion}`; visual tokens reach the language model by `{connector}`.

## Use

```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name, revision = "{name}", "main"  # this folder; or an id on a hub, and there the commit whose code you have read
model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
picture = Image.new("RGB", (448, 448), "white")  # or `Image.open("picture.png")`
content = [{{"type": "image", "image": picture}}, {{"type": "text", "text": "What is in this picture?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
generated = model.generate(**inputs, max_new_tokens=50)
print(processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

With the package `transformers-aurea` imported, `trust_remote_code` is not needed.
{kernel}
## Licence

{licence}
"""

_ABOUT = "A vision-language model of the architecture Aurea, for Hugging Face Transformers."

_KERNEL = """
## Kernel

Spatial-range attention is computed by PyTorch. The kernel `spatial-range-attention` takes its place with
`pip install "transformers[kernels]"`, `use_kernels=True` in `from_pretrained`, and its source in the environment:
`AUREA_KERNEL_PATH`, a folder where it was built, or `AUREA_KERNEL_REPO`, a hub repository. `model.kernel_status()`
says which of the two is in use, and why.
"""


def is_hub_id(name: str) -> bool:
    """Whether a `name_or_path` names a model of a hub, not a folder, or nothing."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.isdir(name)


def model_card(model: PreTrainedModel, title: str, name: str = ".", about: str = _ABOUT) -> ModelCard:
    """The card of an Aurea with its head, as it would be saved.

    Args:
        model: it may be on the meta device; its configuration alone is read.
        title: heading of the card.
        name: folder or hub id that its example loads, by default the folder that the example runs in.
        about: what is said of the model first.
    """
    config = model.config
    origin, parts = _card_data(config.name_or_path), _parts(config)
    licences = {part.name_or_path: _card_data(part.name_or_path).license for part in parts.values()}
    common = {*licences.values()}
    licence = origin.license or (common.pop() if len(common) == 1 else None)
    sources = [config.name_or_path, *_as_list(origin.base_model), *licences]
    data = ModelCardData(
        base_model=[*dict.fromkeys(filter(is_hub_id, sources))] or None,
        library_name="transformers",
        license=licence,
        license_name=origin.get("license_name"),
        license_link=origin.get("license_link"),
        pipeline_tag="image-text-to-text",
        tags=[*dict.fromkeys((*(model.model_tags or ()), *MODEL_TAGS, "custom_code"))],
    )
    rows = (
        f"| {role} | {part.model_type} | {part.name_or_path or '—'} | {licences[part.name_or_path] or '—'} |"
        for role, part in parts.items()
    )
    fusion = config.feature_fusion_config.fusion_type
    text = _TEXT.format(
        title=title,
        about=about,
        parts="\n".join(rows),
        fusion=fusion,
        connector=config.connector_type,
        name=name,
        kernel=_KERNEL if fusion == "spatial_range" else "",
        licence=licence or "None was found. Those of the parts above, and of what the model was trained on, hold.",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def write_model_card(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Writes the card of a model that was saved there; one that is there stays, whoever wrote it."""
    file = Path(folder, FILE_NAME)
    if not file.exists():
        model_card(model, Path(folder).resolve().name).save(file)


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """Configurations of the parts, by what they are to a reader."""
    parts = {
        "semantic encoder": config.vision_config,
        "spatial encoder": config.spatial_vision_config,
        "language model": config.text_config,
    }
    return {role: part for role, part in parts.items() if part is not None}


def _card_data(name: str) -> ModelCardData:
    """What the card of a model says, if that is on this machine."""
    file = None
    if os.path.isdir(name):
        file = os.path.join(name, FILE_NAME)
    elif is_hub_id(name):
        file = try_to_load_from_cache(name, FILE_NAME)
    if not isinstance(file, str) or not os.path.isfile(file):
        return ModelCardData()
    try:
        return ModelCard.load(file, ignore_metadata_errors=True).data
    except (ValueError, yaml.YAMLError):  # somebody's, and no reason not to save
        return ModelCardData()


def _as_list(names: str | list[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


__all__ = ["FILE_NAME", "MODEL_TAGS", "is_hub_id", "model_card", "write_model_card"]
