# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What an untested release of transformers says when something fails, and the two names of the cache."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache

from transformers_aurea import versions_aurea
from transformers_aurea.versions_aurea import (
    TESTED_VERSIONS,
    AureaUntestedVersionError,
    names_untested_version,
    one_cache,
)


NOT_THERE = AttributeError("module has no attribute 'renamed'")


def failing(error: Exception):
    def method():
        raise error

    return method


@pytest.fixture
def untested(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.99.1")


@pytest.mark.parametrize("version", ["5.20.0", "5.22.2", "5.24.3"])
def test_a_tested_release_is_left_alone(monkeypatch, version):
    monkeypatch.setattr(transformers, "__version__", version)
    method = failing(NOT_THERE)
    assert names_untested_version(method) is method


@pytest.mark.parametrize("version", ["5.19.9", "5.25.0", "6.0.0.dev0"])
def test_an_untested_release_is_named_with_the_tested_ones(monkeypatch, version):
    monkeypatch.setattr(transformers, "__version__", version)
    oldest, newest = TESTED_VERSIONS
    with pytest.raises(
        AureaUntestedVersionError, match=f"{version} is installed.*tested with {oldest} to {newest}"
    ) as error:
        names_untested_version(failing(NOT_THERE))()
    assert error.value.__cause__ is NOT_THERE
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error", [ValueError("bad input"), OSError("no such file"), torch.OutOfMemoryError("full")])
def test_what_has_nothing_to_do_with_releases_stays_itself(untested, error):
    with pytest.raises(type(error)) as raised:
        names_untested_version(failing(error))()
    assert raised.value is error


def test_it_is_said_once(untested):
    with pytest.raises(AureaUntestedVersionError) as error:
        names_untested_version(names_untested_version(failing(NOT_THERE)))()
    assert error.value.__cause__ is NOT_THERE


def test_one_cache_may_be_given_under_both_names():
    cache = DynamicCache()
    for arguments in ((cache, None), (None, cache), (cache, cache)):
        assert one_cache(*arguments) is cache
    with pytest.raises(ValueError, match="two names of one argument"):
        one_cache(cache, DynamicCache())


@pytest.mark.parametrize("place", ["__init__", "forward"])
def test_construction_and_forward_say_it(place):
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from transformers import Phi3Model
sys.modules["transformers"].__version__ = "5.99.0"  # which that import has put in place
from conftest import tiny_model
import torch
if {place == "forward"}:
    model = tiny_model()
def broken(self, *args, **kwargs):
    raise TypeError("renamed upstream")
setattr(Phi3Model, {place!r}, broken)
model = model if {place == "forward"} else tiny_model()
model(torch.tensor([[3]]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.count("transformers 5.99.0 is installed; Aurea was tested with") == 1
    assert "TypeError: renamed upstream" in run.stderr


def test_the_installed_release_is_among_the_tested_ones():
    oldest, newest = (Version(version).release for version in TESTED_VERSIONS)
    assert oldest <= Version(transformers.__version__).release[:2] <= newest


@pytest.mark.parametrize("name, warned", [("cache", 1), ("past_key_values", 0)])
def test_the_former_name_of_the_cache_is_deprecated_where_transformers_has_another(monkeypatch, name, warned):
    monkeypatch.setattr(versions_aurea, "CACHE_NAME", name)
    cache = DynamicCache()
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        assert one_cache(cache, None) is cache
        assert not messages
        assert one_cache(None, cache) is cache
    assert [str(message.message).split(":")[0] for message in messages] == ["`past_key_values` is deprecated"] * warned
