# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The small model that travels with the package, trained on `transformers_aurea.scenes`."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from huggingface_hub.constants import HF_HOME
from transformers.dynamic_module_utils import custom_object_save

from .image_processing_aurea import AureaImageProcessor
from .modeling_aurea import AureaForConditionalGeneration
from .processing_aurea import AureaProcessor


WEIGHTS = Path(__file__).parent / "embedded"


def embedded_model_path() -> str:
    """Folder of the embedded model, for `from_pretrained` and `pipeline`: two small encoders, spatial-range fusion and
    a small decoder, 2 million parameters in float32, which answers questions about scenes of 112×112 pixels.

    An ordinary model folder: it loads with `trust_remote_code=True` and may be copied anywhere. It is put together on
    the first call, of the package's weights and code, under `HF_HOME`; after that the same folder is returned.

    Raises:
        OSError: if the folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as scratch:
        draft = Path(scratch, "embedded")
        shutil.copytree(WEIGHTS, draft)
        for auto_class in (AureaForConditionalGeneration, AureaImageProcessor, AureaProcessor):
            custom_object_save(auto_class, draft)  # its file and those that this imports
        folder = Path(HF_HOME, "transformers_aurea", f"embedded-{_digest(draft)}")
        if not folder.is_dir():
            _put(draft, folder)
    return str(folder)


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


def _digest(folder: Path) -> str:
    """Of the names and contents of its files: a new version of the package gets a new folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]
