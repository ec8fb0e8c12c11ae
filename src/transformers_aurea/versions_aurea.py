# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What differs between the releases of transformers: the name of the cache, and a word on releases nobody tried."""

import functools
import warnings
from collections.abc import Callable
from inspect import signature

import torch
import transformers
from packaging.version import Version
from transformers import Cache, GenerationMixin


TESTED_VERSIONS = ("5.20", "5.24")
"""The oldest and the newest minor release of transformers with which this code was tested."""

# From 5.24 on it is `cache`. Both words are taken; this one is handed on and stands in the outputs.
_ARGUMENTS = signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE_NAME = "cache" if "cache" in _ARGUMENTS else "past_key_values"


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, given under either of its names; the former one is deprecated where transformers has deprecated it.

    Raises:
        ValueError: two different ones were given.
    """
    if past_key_values is not None and CACHE_NAME == "cache" and not torch.compiler.is_compiling():
        warnings.warn("`past_key_values` is deprecated: the argument is `cache` now.", FutureWarning, stacklevel=3)
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("`cache` and `past_key_values` are two names of one argument. Give one of them.")
    return past_key_values if cache is None else cache


class AureaUntestedVersionError(RuntimeError):
    """Something failed with a release of transformers that was not tested; the reason is its `__cause__`."""


def names_untested_version(method: Callable) -> Callable:
    """On an untested release of transformers, has what fails in `method` end in a line that says so."""
    oldest, newest = (Version(version).release for version in TESTED_VERSIONS)
    if oldest <= Version(transformers.__version__).release[:2] <= newest:
        return method

    @functools.wraps(method)
    def wrapped(*args, **kwargs):
        try:
            return method(*args, **kwargs)
        except (AureaUntestedVersionError, torch.OutOfMemoryError):
            raise
        except (AttributeError, ImportError, KeyError, RuntimeError, TypeError) as error:
            raise AureaUntestedVersionError(
                f"transformers {transformers.__version__} is installed; Aurea was tested with "
                f"{TESTED_VERSIONS[0]} to {TESTED_VERSIONS[1]}. If the error above is not of your making, install one "
                "of these."
            ) from error

    return wrapped


__all__ = ["CACHE_NAME", "TESTED_VERSIONS", "AureaUntestedVersionError", "names_untested_version", "one_cache"]
