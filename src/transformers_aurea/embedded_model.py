# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""The small model that travels with the package, trained on `transformers_aurea.scenes`."""

import os
from pathlib import Path

from .modeling_aurea import AureaForConditionalGeneration
from .processing_aurea import AureaProcessor


WEIGHTS = Path(__file__).parent / "embedded"


def embedded_model_path(save_directory: str | os.PathLike | None = None) -> str:
    """Folder of the embedded model, for `from_pretrained` and `pipeline`: two small encoders, spatial-range fusion and
    a small decoder, 2 million parameters in float32, which answers questions about scenes of 112×112 pixels.

    Args:
        save_directory: where to save it together with its code, as a folder that loads with `trust_remote_code=True`
            where this package is not installed, or not imported, as in `transformers serve`. Without it the folder is
            that of the installed package: it holds no code, loads wherever the package is imported, and is not to be
            written to.

    Raises:
        OSError: if `save_directory` cannot be written.
    """
    if save_directory is None:
        return str(WEIGHTS)
    for auto_class in (AureaForConditionalGeneration, AureaProcessor):
        auto_class.from_pretrained(WEIGHTS).save_pretrained(save_directory)
    return str(save_directory)
