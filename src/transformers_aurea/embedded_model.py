# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The small model that travels with the package, trained on `transformers_aurea.scenes`."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .image_processing_aurea import AureaImageProcessor
from .modeling_aurea import AureaForConditionalGeneration
from .processing_aurea import AureaProcessor


logger = logging.get_logger(__name__)

WEIGHTS = Path(__file__).parent / "embedded"


def embedded_model_path() -> str:
    """Folder of the embedded model, for `from_pretrained` and `pipeline`: two small encoders, spatial-range fusion and
    a small decoder, 2 million parameters in float32, which answers questions about scenes of 112×112 pixels.

    An ordinary model folder: it loads with `trust_remote_code=True` and may be copied anywhere. It is put together on
    the first call, of the package's weights and code, under `HF_HOME`; after that the same folder is returned. If its
    files have been changed since, it is moved aside, with a warning, and put together anew.

    Raises:
        OSError: if the folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch, "embedded")
        shutil.copytree(WEIGHTS, draft)
        for auto_class in (AureaForConditionalGeneration, AureaImageProcessor, AureaProcessor):
            custom_object_save(auto_class, draft)  # its file and those that this imports
        names = sorted(file.name for file in draft.iterdir())
        digest = _digest(draft, names)
        folder = Path(HF_HOME, "transformers_aurea", f"embedded-{digest}")
        if folder.is_dir() and _digest(folder, names) != digest:
            _move_aside(folder)
        if not folder.is_dir():
            _put(draft, folder)
    return str(folder)


def _move_aside(folder: Path):
    changed = Path(tempfile.mkdtemp(prefix=f"{folder.name}-changed-", dir=folder.parent), folder.name)
    os.rename(folder, changed)
    logger.warning(f"The embedded model's folder was changed: it is now {changed}, and {folder} is made anew.")


def _put(draft: Path, folder: Path):
    """A complete copy of `draft` appears as `folder`, or none; another process may do the same."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        copy = tempfile.mkdtemp(prefix=".embedded-", dir=folder.parent)
    except OSError as error:
        raise OSError(
            f"The embedded model's folder {folder} cannot be written ({error}): set HF_HOME to a folder that can."
        ) from error
    try:
        shutil.copytree(draft, copy, dirs_exist_ok=True)
        os.chmod(copy, 0o755)
        os.rename(copy, folder)
    except OSError as error:
        shutil.rmtree(copy, ignore_errors=True)
        if not folder.is_dir():
            raise OSError(f"The embedded model's folder {folder} cannot be written: {error}.") from error


def _digest(folder: Path, names: list[str]) -> str:
    """Of the names and contents of these files: a new version of the package gets a new folder."""
    digest = hashlib.sha256()
    for name in names:
        file = folder / name
        digest.update(name.encode() + hashlib.sha256(file.read_bytes() if file.is_file() else b"").digest())
    return digest.hexdigest()[:12]
