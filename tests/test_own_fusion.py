# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A fusion of a user's own, from its file to a saved folder and out of it again."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_TOKEN_ID, random_pixels, run_without_package, tiny_config, tiny_model
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_relative_imports

import transformers_aurea
from transformers_aurea import AureaConfig, AureaForConditionalGeneration, fusion_aurea, register_fusion
from transformers_aurea.fusion_aurea import FUSIONS
from transformers_aurea.own_fusion_aurea import save_own_fusion


OWN_FUSION = '''\
"""Eight tokens of a picture: means of eight groups of its patches, through a linear layer."""
import torch  # é
from torch import nn
from transformers_aurea.fusion_aurea import (
    AureaFusion,
    register_fusion as register,  # é
)

if True:
    from transformers_aurea import AureaConfig, neighborhood_aggregate as gather  # of two files


class EightTokens(AureaFusion):
    def __init__(self, config: AureaConfig):
        super().__init__(config)
        self.num_tokens, self.output_dim = 8, 20
        self.proj = nn.Linear(sum(config.feature_sizes), self.output_dim)

    def forward(self, semantic_features, spatial_features):
        joint = torch.cat([semantic_features, spatial_features], dim=-1).flatten(1, 2)
        return self.proj(joint.unflatten(1, (8, -1)).mean(2).to(self.proj.weight.dtype))


register("eight", EightTokens)
'''

FLAT = (
    OWN_FUSION.replace(
        "from transformers_aurea.fusion_aurea import (\n    AureaFusion,\n    register_fusion as register,  # é\n)",
        "from .fusion_aurea import AureaFusion, register_fusion as register",
    )
    .replace(
        "    from transformers_aurea import AureaConfig, neighborhood_aggregate as gather",
        "    from .configuration_aurea import AureaConfig\n"
        "    from .spatial_range_attention_aurea import neighborhood_aggregate as gather",
    )
    .encode()
)


@pytest.fixture(autouse=True)
def fusions():
    """Each test registers for itself."""
    known = dict(FUSIONS)
    yield
    FUSIONS.clear()
    FUSIONS.update(known)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes a user's file, imports it, and gives its module."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text: str, name: str = "my_fusion"):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.setitem(sys.modules, name, None)  # gone after the test
        del sys.modules[name]
        importlib.invalidate_caches()
        return importlib.import_module(name)

    return write


@pytest.fixture
def own(write):
    return write(OWN_FUSION)


def eight_model(connector_type: str = "cross_attention", **settings) -> AureaForConditionalGeneration:
    return tiny_model(feature_fusion_config={"fusion_type": "eight"}, connector_type=connector_type, **settings)


def two_pictures(model: AureaForConditionalGeneration, seed: int = 0) -> dict[str, torch.Tensor]:
    """A row of words, a picture, words, a picture and words."""
    one = [IMAGE_TOKEN_ID] * model.model.connector.placeholders_per_image
    return {
        "input_ids": torch.tensor([[5, 6, *one, 7, 8, 9, *one, 10, 11]]),
        "pixel_values": random_pixels(2, model.config, seed),
    }


@torch.no_grad()
def logits_of(model: AureaForConditionalGeneration, inputs: dict) -> torch.Tensor:
    return model.eval()(**inputs).logits


@pytest.mark.parametrize("connector_type", ["cross_attention", "prefix", "both"])
class TestConnectors:
    def test_it_trains(self, own, connector_type):
        model = eight_model(connector_type).train()
        assert model.model.connector.placeholders_per_image == (1 if connector_type == "cross_attention" else 8)
        inputs = two_pictures(model)
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN_ID, -100)
        model(**inputs, labels=labels).loss.backward()
        for name, parameter in model.model.fusion.named_parameters():
            assert parameter.grad.abs().sum() > 0, name

    def test_generation_with_a_cache_is_that_without(self, own, connector_type):
        model = eight_model(connector_type)
        settings = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
        settings |= {"output_logits": True, "return_dict_in_generate": True}
        inputs = two_pictures(model)
        cached, uncached = (model.generate(**inputs, **settings, use_cache=use) for use in (True, False))
        assert torch.equal(cached.sequences, uncached.sequences)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-4, rtol=1e-4)

    def test_words_see_no_later_picture(self, own, connector_type):
        model = eight_model(connector_type)
        inputs = two_pictures(model)
        other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
        other["pixel_values"][1] = two_pictures(model, seed=1)["pixel_values"][1]
        difference = (logits_of(model, inputs) - logits_of(model, other)).abs().amax(-1)[0]
        second = 5 + model.model.connector.placeholders_per_image  # its first placeholder
        assert difference[:second].max() < 1e-6
        assert difference[-2:].min() > 1e-4


class TestPromises:
    def test_tokens_that_are_not_as_many_as_promised_are_named(self, write):
        write(
            OWN_FUSION.replace("self.num_tokens, self.output_dim = 8, 20", "self.num_tokens, self.output_dim = 9, 20")
        )
        model = eight_model()
        with pytest.raises(RuntimeError, match=r"'eight' \(EightTokens\) promises .*\(2, 9, 20\).*gives \(2, 8, 20\)"):
            model(**two_pictures(model))

    @pytest.mark.parametrize("given", ["None", "(tokens, tokens)"])
    def test_what_is_no_tensor_is_named(self, write, given):
        text = OWN_FUSION.replace("return self.proj(", "tokens = self.proj(")
        write(text.replace("\n\n\nregister(", f"\n        return {given}\n\n\nregister("))
        model = eight_model()
        with pytest.raises(RuntimeError, match=r"'eight' \(EightTokens\) promises .*gives (NoneType|tuple)\. Correct"):
            model(**two_pictures(model))

    @pytest.mark.parametrize(
        ("line", "instead", "error", "match"),
        [
            (
                "self.num_tokens, self.output_dim = 8, 20",
                "self.num_tokens = 8",
                ValueError,
                "`output_dim`.*it is None",
            ),
            ("self.output_dim = 8, 20", "self.output_dim = 0, 20", ValueError, "`num_tokens`.* int from 1 on.* is 0"),
            ("self.output_dim = 8, 20", "self.output_dim = 8.0, 20", ValueError, r"`num_tokens`.*it is 8\.0"),
            (
                "super().__init__(config)",
                "pass",
                RuntimeError,
                r"cannot be built: .*`super\(\).__init__\(config\)` first",
            ),
            ("= 8, 20", "= torch.tensor(8).item(), 20", RuntimeError, "meta tensors.* belongs in `init_weights`"),
        ],
    )
    def test_what_init_leaves_out_is_named(self, write, line, instead, error, match):
        assert line in OWN_FUSION
        text = OWN_FUSION.replace(line, instead)
        write(
            text.replace(
                "self.proj = nn.Linear(sum(config.feature_sizes), self.output_dim)", "self.proj = nn.Linear(28, 20)"
            )
        )
        with pytest.raises(error, match=rf"'eight' \(EightTokens\) .*{match}"):
            eight_model()

    @pytest.mark.parametrize(
        "declared", ["num_tokens, output_dim = 8, 20", "output_dim, num_tokens = 20, property(lambda self: 8)"]
    )
    def test_what_the_class_declares_need_not_be_set(self, write, declared):
        text = OWN_FUSION.replace("        self.num_tokens, self.output_dim = 8, 20\n", "")
        write(text.replace("(AureaFusion):", f"(AureaFusion):\n    {declared}\n"))
        model = eight_model("prefix")
        assert model.model.connector.placeholders_per_image == 8
        assert logits_of(model, two_pictures(model)).isfinite().all()

    def test_without_layers_too_what_init_leaves_out_is_named(self, write):
        text = OWN_FUSION.replace("        super().__init__(config)\n", "")
        write("\n".join(line for line in text.split("\n") if "self.proj = " not in line))
        with pytest.raises(RuntimeError, match=r"'eight' \(EightTokens\) cannot be built: .*`super\(\)"):
            eight_model()

    def test_a_forward_of_other_arguments_is_named(self, write):
        write(OWN_FUSION.replace("semantic_features, spatial_features):", "semantic_features):"))
        with pytest.raises(TypeError, match=r"'eight' \(EightTokens\) has a `forward` that .*too many positional"):
            eight_model()

    def test_what_a_fusion_raises_itself_is_the_cause(self, write):
        write(OWN_FUSION.replace("self.num_tokens, self.output_dim = 8, 20", "raise RuntimeError('of its own.')"))
        with pytest.raises(
            RuntimeError, match=r"\(EightTokens\) cannot be built: of its own\. Its `__init__`"
        ) as caught:
            eight_model()
        assert caught.value.__cause__.args == ("of its own.",)

    def test_tokens_that_are_no_floats_are_named(self, write):
        text = OWN_FUSION.replace("return self.proj(", "tokens = self.proj(")
        write(text.replace("\n\n\nregister(", "\n        return tokens.long()\n\n\nregister("))
        model = eight_model()
        with pytest.raises(RuntimeError, match=r"'eight' \(EightTokens\) promises tokens in the dtype .*int64"):
            model(**two_pictures(model))

    @pytest.mark.parametrize(
        "given", ["tokens", "(tokens, tokens)", "(tokens, None)", "(tokens, semantic_features[:, 1:])"]
    )
    def test_a_map_that_is_declared_and_not_given_is_named(self, write, given):
        text = OWN_FUSION.replace("(AureaFusion):", "(AureaFusion):\n    gives_map = True")
        text = text.replace("spatial_features):", "spatial_features, return_map=False):")
        text = text.replace("return self.proj(", "tokens = self.proj(")
        write(text.replace("\n\n\nregister(", f"\n        return {given} if return_map else tokens\n\n\nregister("))
        model = eight_model(feature_consistency_coef=0.1)
        model.eval()(**two_pictures(model))
        with pytest.raises(RuntimeError, match=r"'eight' \(EightTokens\) declares `gives_map`.*\(2, 4, 4\)"):
            model.train()(**two_pictures(model))

    @pytest.mark.parametrize("given", ["tokens", "(tokens, tokens)", "(tokens, (tokens[:1],))"])
    def test_attentions_that_are_declared_and_not_given_are_named(self, write, given):
        text = OWN_FUSION.replace("(AureaFusion):", "(AureaFusion):\n    gives_attentions = True")
        text = text.replace("spatial_features):", "spatial_features, output_attentions=False):")
        text = text.replace("return self.proj(", "tokens = self.proj(")
        write(
            text.replace(
                "\n\n\nregister(", f"\n        return {given} if output_attentions else tokens\n\n\nregister("
            )
        )
        model = eight_model()
        model(**two_pictures(model))
        with pytest.raises(RuntimeError, match=r"'eight' \(EightTokens\) declares `gives_attentions`.* 2 pictures"):
            model(**two_pictures(model), output_attentions=True)

    @pytest.mark.parametrize("names", ["()", "None", "'vision_config'", "('vision_model',)"])
    def test_encoders_that_there_are_not_are_named(self, write, names):
        encoders = f"    @classmethod\n    def encoders(cls, config):\n        return {names}\n\n    def __init__"
        write(OWN_FUSION.replace("    def __init__", encoders))
        with pytest.raises(ValueError, match=r"'eight' \(EightTokens\) must name .*spatial_vision_config as its `enc"):
            eight_model()

    def test_declarations_that_nobody_could_read_are_refused(self):
        class Plain(fusion_aurea.AureaFusion):
            no_split = "Layer"

        with pytest.raises(TypeError, match=r"`Plain\.no_split` is a tuple of names, got 'Layer'"):
            register_fusion("plain", Plain)

        class Mapless(fusion_aurea.AureaFusion):
            gives_map = True

        with pytest.raises(TypeError, match="Mapless declares `gives_map`, but its `forward` takes no `return_map`"):
            register_fusion("mapless", Mapless)

        class Secretive(fusion_aurea.AureaFusion):
            gives_attentions = True

        with pytest.raises(TypeError, match=r"Secretive declares `gives_attentions`, .* no `output_attentions`"):
            register_fusion("secretive", Secretive)
        assert not {"plain", "mapless", "secretive"} & FUSIONS.keys()

    def test_a_class_that_is_no_fusion_is_not_registered(self):
        with pytest.raises(TypeError, match="subclass of `AureaFusion`"):
            register_fusion("linear", torch.nn.Linear)

    def test_an_unknown_name_lists_what_there_is(self, own):
        with pytest.raises(
            StrictDataclassError, match=r"'nine', but .*'spatial_range',.* 'eight'. Of your own, import"
        ):
            tiny_config(feature_fusion_config={"fusion_type": "nine"})


DECLARING = """
import torch
from torch import nn
from transformers_aurea import AureaFusion, register_fusion


class Declaring(AureaFusion):
    kept_in_fp32 = ("norm",)
    not_quantized = ("gate",)

    def __init__(self, config):
        super().__init__(config)
        self.num_tokens, self.output_dim = config.feature_fusion_config.num_latents, 32
        self.latents = nn.Parameter(torch.full((self.num_tokens, 32), 0.25))
        self.norm = nn.LayerNorm(config.feature_sizes[0])
        self.gate = nn.Linear(config.feature_sizes[0], 32)

    def forward(self, semantic_features, spatial_features):
        mean = self.norm(semantic_features.float()).mean(dim=(1, 2), keepdim=True).flatten(1, 2)
        return self.gate(mean.to(self.gate.weight.dtype)) + self.latents


register_fusion("declaring", Declaring)
"""


class TestDeclarations:
    @pytest.fixture
    def settings(self, write):
        write(DECLARING)
        return {"feature_fusion_config": {"fusion_type": "declaring", "num_latents": 3}}

    def test_precision_is_that_of_its_own_parameters_alone(self, settings, tmp_path):
        tiny_model(**settings).save_pretrained(tmp_path / "saved")
        model = AureaForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
        kept = {name for name, parameter in model.named_parameters() if parameter.dtype is torch.float32}
        kept = {name for name in kept if "vision_model" not in name}
        assert kept == {"model.fusion.norm.weight", "model.fusion.norm.bias"}
        pixels = random_pixels(1, model.config)
        assert model(torch.tensor([[5, IMAGE_TOKEN_ID]]), pixel_values=pixels).logits.isfinite().all()

    def test_quantisers_leave_what_it_names(self, settings):
        patterns = tiny_model(**settings)._keep_in_fp32_modules
        assert any(re.match(pattern, "model.fusion.gate") for pattern in patterns)
        assert not any(re.match(pattern, "model.language_model.layers.0.gate") for pattern in patterns)

    def test_made_of_parts_it_begins_as_it_says(self, settings):
        donor = tiny_model()
        parts = {"vision": donor.model.vision_model, "spatial_vision": donor.model.spatial_vision_model}
        text = AutoModelForCausalLM.from_config(donor.config.text_config)
        model = AureaForConditionalGeneration.from_pretrained_parts(
            **parts, text=text, image_token_id=IMAGE_TOKEN_ID, **settings
        )
        assert (model.model.fusion.latents == 0.25).all() and model.model.fusion.num_tokens == 3

    def test_its_settings_go_when_another_takes_its_place(self, settings, tmp_path, caplog):
        tiny_config(**settings).save_pretrained(tmp_path / "saved")
        assert AureaConfig.from_pretrained(tmp_path / "saved").feature_fusion_config.num_latents == 3
        config = AureaConfig.from_pretrained(tmp_path / "saved", feature_fusion_config={"fusion_type": "concat"})
        assert "num_latents" not in vars(config.feature_fusion_config)
        assert "Nothing reads ['num_latents']" in caplog.text
        with pytest.raises(ValueError, match="'num_latents' is no argument of AureaFusionConfig"):
            AureaConfig.from_pretrained(
                tmp_path / "saved", feature_fusion_config={"fusion_type": "concat", "num_latents": 2}
            )


class TestSavedFiles:
    def test_imports_become_flat_and_nothing_else_changes(self, own, tmp_path):
        eight_model().save_pretrained(tmp_path / "saved")
        assert (tmp_path / "saved/my_fusion.py").read_bytes() == FLAT
        assert json.loads((tmp_path / "saved/config.json").read_text())["auto_map"]["AureaFusion"] == (
            "my_fusion.EightTokens"
        )
        ours = get_relative_imports(tmp_path / "saved/my_fusion.py")
        assert sorted(ours) == ["configuration_aurea", "fusion_aurea", "spatial_range_attention_aurea"]

    def test_windows_line_ends_and_a_mark_at_the_start_are_no_trouble(self, own, tmp_path):
        text = (
            b"\xef\xbb\xbffrom transformers_aurea import AureaFusion\r\nimport torch\r\n\r\nclass EightTokens: ...\r\n"
        )
        (tmp_path / "my_fusion.py").write_bytes(text)
        (tmp_path / "saved").mkdir()
        assert save_own_fusion(own.EightTokens, tmp_path / "saved") == "my_fusion.EightTokens"
        expected = text.replace(b"\xef\xbb\xbffrom transformers_aurea", b"from .fusion_aurea")
        assert (tmp_path / "saved/my_fusion.py").read_bytes() == expected

    def test_files_beside_it_that_it_imports_come_too(self, write, tmp_path):
        (tmp_path / "package").mkdir()
        relative = "\nfrom .layers import (\n    SIZE,  # stays\n)\n"
        (tmp_path / "package/layers.py").write_text(
            "from .sizes import SIZE\nfrom transformers_aurea import AureaFusion\n"
        )
        (tmp_path / "package/sizes.py").write_text("SIZE = 20\n")
        (tmp_path / "package/mine.py").write_text(OWN_FUSION + relative)
        own = importlib.import_module("package.mine")
        (tmp_path / "saved").mkdir()
        assert save_own_fusion(own.EightTokens, tmp_path / "saved") == "mine.EightTokens"
        assert (tmp_path / "saved/layers.py").read_text() == (
            "from .sizes import SIZE\nfrom .fusion_aurea import AureaFusion\n"
        )
        assert (tmp_path / "saved/sizes.py").read_text() == "SIZE = 20\n"
        assert (tmp_path / "saved/mine.py").read_bytes() == FLAT + relative.encode()
        for name in ("package", "package.mine", "package.layers", "package.sizes"):
            del sys.modules[name]

    def test_a_file_in_the_same_folder_comes_too_though_its_name_is_absolute(self, write, tmp_path):
        write("SIZE = 20\n", "my_sizes")
        own = write("from my_sizes import SIZE\n" + OWN_FUSION)
        (tmp_path / "saved").mkdir()
        save_own_fusion(own.EightTokens, tmp_path / "saved")
        assert (tmp_path / "saved/my_fusion.py").read_bytes() == b"from .my_sizes import SIZE\n" + FLAT
        assert (tmp_path / "saved/my_sizes.py").read_text() == "SIZE = 20\n"

    @pytest.mark.parametrize(
        "line",
        [
            "import transformers_aurea",
            "import transformers_aurea.fusion_aurea as fusions",
            "from transformers_aurea import AureaForConditionalGeneration",
            "from transformers_aurea import STAGES",
            "from transformers_aurea import fusion_aurea",
            "from transformers_aurea import *",
            "from transformers_aurea.modeling_aurea import AureaModel",
            "from transformers_aurea.scenes import draw",
            "import os; from transformers_aurea import AureaFusion",
            "from transformers_aurea import AureaFusion; import os",
            "from . import layers",
            "from ..layers import Layer",
            "from .layers.norms import Norm",
            "from .nothing import Norm",
            "import scenes",
        ],
    )
    def test_an_import_that_cannot_travel_is_refused_with_its_line(self, own, tmp_path, line):
        (tmp_path / "my_fusion.py").write_text(f"{OWN_FUSION}\n\n{line}\n", encoding="utf-8")
        for name in ("scenes", "layers"):  # beside it: not the package's, and not those of the folder above
            (tmp_path / f"{name}.py").touch()
        (tmp_path / "saved").mkdir()
        number = OWN_FUSION.count("\n") + 3
        statement = line.removeprefix("import os; ").removesuffix("; import os")
        with pytest.raises(ValueError) as error:
            save_own_fusion(own.EightTokens, tmp_path / "saved")
        assert f"my_fusion.py, line {number}: `{statement}` cannot be saved with the model" in str(error.value)
        assert "write `from transformers_aurea.fusion_aurea import …`" in str(error.value)
        assert not list((tmp_path / "saved").iterdir())

    @pytest.mark.parametrize("case", ["__main__", "notebook", "local", "initial", "ours"])
    def test_a_class_without_a_file_of_its_own_is_refused(self, own, write, tmp_path, monkeypatch, case):
        fusion_class = own.EightTokens
        if case in ("__main__", "notebook"):
            monkeypatch.setattr(fusion_class, "__module__", case)
        elif case == "local":
            fusion_class.__qualname__ = "test.<locals>.EightTokens"
        else:
            name = {"initial": "__init__", "ours": "mine_aurea"}[case]
            monkeypatch.setattr(own, "__file__", str(tmp_path / f"{name}.py"))
            (tmp_path / f"{name}.py").write_text(OWN_FUSION, encoding="utf-8")
        register_fusion("refused", fusion_class)
        model = tiny_model(feature_fusion_config={"fusion_type": "refused"})
        with pytest.raises(ValueError, match=r"EightTokens cannot be saved .*: put the class into a file of its own"):
            model.save_pretrained(tmp_path / "saved")

    def test_one_of_main_is_warned_about_when_it_is_registered(self, own, monkeypatch, caplog):
        monkeypatch.setattr(own.EightTokens, "__module__", "__main__")
        fusion_aurea.logger.addHandler(caplog.handler)
        register_fusion("warned", own.EightTokens)
        fusion_aurea.logger.removeHandler(caplog.handler)
        assert "'warned' cannot be saved from `__main__`: put it into a file of its own" in caplog.text

    def test_the_file_itself_is_not_overwritten(self, own, tmp_path):
        with pytest.raises(
            ValueError, match=r"my_fusion.py would be overwritten by its copy: save the model to another"
        ):
            eight_model().config.save_pretrained(tmp_path)
        assert (tmp_path / "my_fusion.py").read_text(encoding="utf-8") == OWN_FUSION

    def test_it_is_uploaded(self, own, uploads, tmp_path):
        model = eight_model()
        for push in (
            lambda: model.push_to_hub("someone/model"),
            lambda: model.config.push_to_hub("someone/configuration"),
            lambda: model.config.save_pretrained(str(tmp_path / "saved"), push_to_hub=True, repo_id="someone/saved"),
        ):
            uploads.clear()
            push()
            assert uploads["my_fusion.py"] == FLAT
            assert json.loads(uploads["config.json"])["auto_map"]["AureaFusion"] == "my_fusion.EightTokens"

    def test_none_is_named_once_the_fusion_is_ours(self, own, tmp_path):
        config = eight_model().config
        config.save_pretrained(tmp_path / "saved")
        loaded = AureaConfig.from_pretrained(tmp_path / "saved")
        assert loaded.auto_map["AureaFusion"] == "my_fusion.EightTokens"
        loaded.feature_fusion_config.fusion_type = "concat"
        loaded.save_pretrained(tmp_path / "other")
        assert "AureaFusion" not in json.loads((tmp_path / "other/config.json").read_text())["auto_map"]
        assert not (tmp_path / "other/my_fusion.py").exists()


LOGITS = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

def save_logits(model, name):
    with torch.no_grad():
        save_file({"logits": model.eval()(**load_file("inputs.safetensors")).logits}, f"{name}.safetensors")

def refusal(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except ValueError as error:
        return str(error)

trusted = {"trust_remote_code": True}
"""

ELSEWHERE = (
    LOGITS
    + """
[saved, merged, other, same_name] = sys.argv[1:]
config = AutoConfig.from_pretrained(saved, **trusted)
model = AutoModelForImageTextToText.from_pretrained(saved, **trusted)
save_logits(model, "saved")
save_logits(AutoModelForImageTextToText.from_pretrained(merged, **trusted), "merged")
model.save_pretrained("again")
AutoProcessor.from_pretrained(saved, **trusted).save_pretrained("again")
report = {
    "module": type(model.model.fusion).__module__,
    "untrusted": refusal(AutoModelForImageTextToText.from_pretrained, saved, trust_remote_code=False),
    "trusted for another": refusal(type(config).from_pretrained, other),
    "another of the name": refusal(AutoModelForImageTextToText.from_pretrained, same_name, **trusted),
}
Path("report.json").write_text(json.dumps(report))
"""
)

AGAIN = LOGITS + 'save_logits(AutoModelForImageTextToText.from_pretrained("again", **trusted), "again")'

WITH_PACKAGE = (
    LOGITS
    + """
from transformers_aurea import AureaConfig, AureaForConditionalGeneration

[saved, merged, other, same_name] = sys.argv[1:]
report = {
    "class": refusal(AureaForConditionalGeneration.from_pretrained, other),
    "auto": refusal(AutoModelForImageTextToText.from_pretrained, other, **trusted),
    "has run": Path(other, "has_run").exists(),
}
AutoProcessor.from_pretrained(other)  # asks for no fusion
AureaConfig.from_pretrained(saved, **trusted)
save_logits(AureaForConditionalGeneration.from_pretrained(saved), "class")
save_logits(AutoModelForImageTextToText.from_pretrained(saved), "auto")
AureaConfig.from_pretrained(merged, **trusted)  # the same code in another folder
report["another of the name"] = refusal(AureaConfig.from_pretrained, same_name, **trusted)
Path("report.json").write_text(json.dumps(report))
"""
)


class TestLoading:
    @pytest.fixture(scope="class")
    def folders(self, golden_processor, tmp_path_factory) -> dict:
        """What a user saves: a model with its processor, one with an adapter merged; and two that others made."""
        root = tmp_path_factory.mktemp("own")
        (root / "my_fusion.py").write_text(OWN_FUSION, encoding="utf-8")
        known = dict(FUSIONS)
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(root)
            importlib.import_module("my_fusion")
            model = eight_model("both")
            inputs = two_pictures(model)
            model.save_pretrained(root / "saved")
            golden_processor.save_pretrained(root / "saved")
            logits = {"saved": logits_of(model, inputs)}
            logits["merged"] = self.merge_an_adapter(model, root / "merged", inputs)
            del sys.modules["my_fusion"]
        FUSIONS.clear()
        FUSIONS.update(known)
        other, same_name = root / "other", root / "elsewhere" / "saved"
        for copy in (other, same_name):
            shutil.copytree(root / "saved", copy)
        code = FLAT.decode()
        has_run = f"open({str(other / 'has_run')!r}, 'w').close()\n"
        (other / "my_fusion.py").write_text(code.replace('"eight"', '"other"') + has_run, encoding="utf-8")
        config = (other / "config.json").read_text()
        (other / "config.json").write_text(config.replace('"fusion_type": "eight"', '"fusion_type": "other"'))
        (same_name / "my_fusion.py").write_text(code.replace("mean(2)", "amax(2)"), encoding="utf-8")
        save_file(inputs, root / "inputs.safetensors")
        paths = (root / "saved", root / "merged", other, same_name)
        return {"root": root, "logits": logits, "paths": paths}

    def merge_an_adapter(self, model, folder: Path, inputs: dict) -> torch.Tensor:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            model, peft.LoraConfig(r=2, target_modules=r".*fusion\.proj", init_lora_weights=False)
        )
        model = model.merge_and_unload()
        model.save_pretrained(folder)
        return logits_of(model, inputs)

    @pytest.fixture(scope="class")
    def elsewhere(self, folders, tmp_path_factory) -> Path:
        """Where processes without the package and without the user's file have loaded, saved and loaded again."""
        work = tmp_path_factory.mktemp("elsewhere")
        shutil.copy(folders["root"] / "inputs.safetensors", work)
        run_without_package(ELSEWHERE, work, *folders["paths"])
        run_without_package(AGAIN, work)
        return work

    @pytest.mark.parametrize(("name", "expected"), [("saved", "saved"), ("merged", "merged"), ("again", "saved")])
    def test_without_package_and_file_the_logits_are_equal(self, elsewhere, folders, name, expected):
        logits = load_file(elsewhere / f"{name}.safetensors")["logits"]
        torch.testing.assert_close(logits, folders["logits"][expected], atol=1e-5, rtol=0)

    def test_what_was_saved_there_has_the_file_as_it_was(self, elsewhere):
        assert (elsewhere / "again/my_fusion.py").read_bytes() == FLAT
        auto_map = json.loads((elsewhere / "again/config.json").read_text())["auto_map"]
        assert auto_map["AureaFusion"] == "my_fusion.EightTokens"

    def test_no_code_runs_without_trust_in_its_own_folder(self, elsewhere, folders):
        report = json.loads((elsewhere / "report.json").read_text())
        assert report["module"].startswith("transformers_modules.saved.")
        assert "trust_remote_code=True" in report["untrusted"]
        assert "'other' is code beside this configuration, in my_fusion.py" in report["trusted for another"]
        assert not (folders["paths"][2] / "has_run").exists()

    def test_other_code_of_the_same_name_is_not_taken_for_it(self, elsewhere):
        report = json.loads((elsewhere / "report.json").read_text())
        assert "'eight' is transformers_modules.saved." in report["another of the name"]
        assert "load it in a process of its own" in report["another of the name"]

    @pytest.fixture(scope="class")
    def with_package(self, folders, tmp_path_factory) -> Path:
        """Where a process with the package, but without the user's file, has loaded."""
        work = tmp_path_factory.mktemp("package")
        shutil.copy(folders["root"] / "inputs.safetensors", work)
        environment = os.environ | {"HF_MODULES_CACHE": str(work / "modules")}
        environment["PYTHONPATH"] = str(Path(transformers_aurea.__file__).parents[1])
        command = [sys.executable, "-c", WITH_PACKAGE, *map(str, folders["paths"])]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return work

    def test_beside_the_package_the_code_runs_once_the_configuration_is_trusted(self, with_package, folders):
        for name in ("class", "auto"):
            logits = load_file(with_package / f"{name}.safetensors")["logits"]
            torch.testing.assert_close(logits, folders["logits"]["saved"], atol=1e-5, rtol=0)

    def test_beside_the_package_it_is_refused_until_then(self, with_package):
        report = json.loads((with_package / "report.json").read_text())
        for name in ("class", "auto"):
            assert "'other' is code beside this configuration, in my_fusion.py" in report[name]
            assert "`AureaConfig.from_pretrained(folder, trust_remote_code=True)`" in report[name]
        assert not report["has run"]
        assert "load it in a process of its own" in report["another of the name"]

    def test_a_registered_class_loads_and_goes_before_the_folders(self, folders, own):
        saved = folders["paths"][0]
        for config in (None, AureaConfig.from_pretrained(saved, trust_remote_code=True)):
            model = AureaForConditionalGeneration.from_pretrained(saved, config=config)
            assert type(model.model.fusion) is own.EightTokens
            logits = logits_of(model, load_file(folders["root"] / "inputs.safetensors"))
            torch.testing.assert_close(logits, folders["logits"]["saved"], atol=1e-5, rtol=0)
