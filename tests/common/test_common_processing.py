# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Processor and image processor."""

import unittest
from pathlib import Path

from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin
from tests.test_processing_common import ProcessorTesterMixin
from transformers import LlavaProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from transformers_aurea import AureaImageProcessor, AureaProcessor
from transformers_aurea.tokenization_aurea import build_tokenizer


PUBLISHED = Path(__file__).resolve().parent.parent / "fixtures" / "published"
SIZE = {"height": 28, "width": 28}
LLAVA_TEMPLATE = """{%- for message in messages -%}
    {{- message['role'] -}}
    {%- for part in message['content'] -%}
        {{- '<|image|>' if part['type'] == 'image' else part['text'] -}}
    {%- endfor -%}
{%- endfor -%}
"""


class ProcessorCommonTests(ProcessorTesterMixin):
    @classmethod
    def _setup_tokenizer(cls):
        return build_tokenizer(PUBLISHED)


class AureaProcessorCommonTest(ProcessorCommonTests, unittest.TestCase):
    processor_class = AureaProcessor

    @classmethod
    def _setup_image_processor(cls):
        return AureaImageProcessor(size=SIZE, spatial_size=SIZE, spatial_crop_size=SIZE)


class LlavaProcessorCommonTest(ProcessorCommonTests, unittest.TestCase):
    processor_class = LlavaProcessor

    @classmethod
    def _setup_image_processor(cls):
        return LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=SIZE)

    @staticmethod
    def prepare_processor_dict():
        return {"patch_size": 14, "vision_feature_select_strategy": "full", "chat_template": LLAVA_TEMPLATE}


class AureaImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        # 5.20 wants four channels kept without asking for it, where transparency is laid on white by default
        kwargs = {"do_convert_rgb": False, "spatial_size": SIZE, "spatial_crop_size": SIZE, **kwargs}
        super().__init__(parent, size=SIZE, **kwargs)

    def _get_image_processing_classes(self):
        return {"torchvision": AureaImageProcessor}  # it has one back end, torch, in that one's place

    def expected_output_image_shape(self, images):
        return 2, self.num_channels, *SIZE.values()


class LlavaImageProcessingTester(ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        super().__init__(parent, size={"shortest_edge": 28}, crop_size=SIZE, **kwargs)

    def _get_image_processing_classes(self):
        return {"pil": LlavaImageProcessorPil}


class AureaImageProcessorCommonTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = AureaImageProcessingTester


class LlavaImageProcessorCommonTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = LlavaImageProcessingTester
    # These tell the model by the folder of the test file.
    test_new_models_require_torchvision_backend = None
    test_pil_can_load_without_torchvision = None
