# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
import base64
import hashlib
import io
import json
import math
import os
import random
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import load_file
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from transformers_aurea import image_processing_aurea, pictures_aurea, resizing_aurea
from transformers_aurea.image_processing_aurea import AureaImageProcessor


FIXTURES = Path(__file__).parent / "fixtures"
PICTURES = ("rgb", "rgba", "wide")
SQUARE = {"height": 112, "width": 112}
TINY = {"size": SQUARE, "spatial_size": {"shortest_edge": 128}, "spatial_crop_size": SQUARE}

# SHA-256 of the float32 pixels of the original at its real sizes, by picture: semantic view, spatial view.
PUBLISHED_PIXELS = {
    "rgb": (
        "168505e2fcf68ca247ed2fe418441bc4215c3e809beaabdbb4e109995bf5fb11",
        "c1df213944ccb02a0744871938771ac2d1843d3c0d7b25e024cf65422be78e5d",
    ),
    "rgba": (
        "5d79acbc25c3a0869223d4114bb942e4f7b87b9409cc8abb85c83443bce6d2cd",
        "89c92534f65b553757f7b4d65d652dad2781c8c9a525dbb75a9ac2c317b4551d",
    ),
    "wide": (
        "f30a88502966f16d16c17b541c38187c9b3c565e6f4278cb7d3cbb28157b5d0c",
        "32ad7a53fdf167a750e0cf02c3899b5e915756038af0be237beabb33209aa2c2",
    ),
}


@pytest.fixture(scope="module")
def goldens():
    return load_file(FIXTURES / "goldens.safetensors")


@pytest.fixture(scope="module")
def processor():
    return AureaImageProcessor(**TINY)


@pytest.fixture(scope="module")
def picture():
    return Image.open(FIXTURES / "image_rgb.png").convert("RGB")


def pixels(processor, images, **kwargs) -> torch.Tensor:
    return processor(images, return_tensors="pt", **kwargs)["pixel_values"]


def levels(processor, images, **kwargs) -> torch.Tensor:
    """Both views as 8-bit levels."""
    return pixels(processor, images, do_rescale=False, do_normalize=False, **kwargs)


# equal to the original


@pytest.mark.parametrize("name", PICTURES)
def test_published_pixels_at_real_size_bit_for_bit(name):
    views = pixels(AureaImageProcessor(), str(FIXTURES / f"image_{name}.png"))
    assert views.shape == (1, 2, 3, 224, 224) and views.dtype == torch.float32
    digests = tuple(hashlib.sha256(views[:, view].contiguous().numpy().tobytes()).hexdigest() for view in (0, 1))
    assert digests == PUBLISHED_PIXELS[name]


def test_normalised_pixels_equal_the_recorded_ones(processor, goldens):
    views = pixels(processor, FIXTURES / "image_rgb.png")
    assert torch.equal(views[:, 0], goldens["pre/rgb/siglip"])
    assert torch.equal(views[:, 1], goldens["pre/rgb/dino"])


@pytest.mark.parametrize("name", PICTURES)
def test_levels_equal_the_recorded_ones(processor, goldens, name):
    views = levels(processor, FIXTURES / f"image_{name}.png")[0]
    assert torch.equal(views[0], goldens[f"pre/{name}/siglip_resized_uint8"].float())
    if name == "wide":
        expected = goldens["pre/wide/dino_cropped_uint8"]
    else:
        top, left = json.loads((FIXTURES / "goldens.json").read_text())[f"pre/{name}"]["crop_top_left"]
        expected = goldens[f"pre/{name}/dino_resized_uint8"][:, top : top + 112, left : left + 112]
    assert torch.equal(views[1], expected.float())


def test_alpha_is_laid_on_white_by_the_published_arithmetic(goldens):
    processor = AureaImageProcessor(do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
    composite = pixels(processor, FIXTURES / "image_rgba.png")[0]
    assert torch.equal(composite[0], goldens["pre/rgba/composited_uint8"].float())
    assert torch.equal(composite[0], composite[1])


@pytest.mark.parametrize(
    "view, mean, std", [(0, [0.5] * 3, [0.5] * 3), (1, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
)
def test_each_view_has_its_own_mean_and_standard_deviation(processor, view, mean, std):
    color = torch.tensor([10.0, 100.0, 250.0])
    view = pixels(processor, Image.new("RGB", (40, 50), (10, 100, 250)))[0, view]
    expected = (color / 255 - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(view, expected.view(3, 1, 1).expand_as(view))


def test_one_number_is_the_mean_and_deviation_of_every_channel(processor, picture):
    one, three = (
        {
            f"{prefix}image_{name}": value
            for prefix in ("", "spatial_")
            for name, value in (("mean", mean), ("std", std))
        }
        for mean, std in ((0.3, 0.6), ([0.3] * 3, [0.6] * 3))
    )
    assert torch.equal(pixels(processor, picture, **one), pixels(processor, picture, **three))


def test_cpu_without_wide_vector_units_resizes_to_the_same_levels(picture):
    """torch chooses its kernels at start-up; the slowest must not take another route to other numbers."""
    script = (
        "import sys, numpy, torch; from PIL import Image;"
        "picture = torch.from_numpy(numpy.array(Image.open(sys.argv[1]).convert('RGB'))).permute(2, 0, 1)[None];"
        "resize = lambda mode: torch.nn.functional.interpolate(picture, (112, 130), mode=mode, antialias=True);"
        "torch.save([resize('bilinear'), resize('bicubic')], sys.stdout.buffer)"
    )
    command = [sys.executable, "-c", script, str(FIXTURES / "image_rgb.png")]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    output = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    array = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    for mode, expected in zip(("bilinear", "bicubic"), torch.load(io.BytesIO(output))):
        resized = resizing_aurea.resize_and_crop(array, (112, 130), None, mode)
        assert torch.equal(resized, expected[0])


# resizing and cropping


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(130, 150), (90, 231), (33, 17), (256, 256), (1, 9)])
@pytest.mark.parametrize("limit", [2**26, 2000])
def test_two_passes_in_parts_equal_the_resize_in_one(monkeypatch, size, mode, limit):
    monkeypatch.setattr(resizing_aurea, "MAX_NUMBERS_PER_PASS", limit)
    picture = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for target, crop in (((128, 147), (112, 112)), ((64, 200), (64, 51)), (size, (1, 5)), ((70, 70), None)):
        whole = torch.nn.functional.interpolate(picture[None], target, mode=mode, antialias=True)[0]
        crop_size = crop or target
        top, left = (round((have - keep) / 2) for have, keep in zip(target, crop_size))
        expected = whole[:, top : top + crop_size[0], left : left + crop_size[1]]
        assert torch.equal(resizing_aurea.resize_and_crop(picture, target, crop, mode), expected)


@pytest.mark.parametrize("width, left", [(147, 18), (145, 16), (149, 18), (151, 20), (113, 0), (115, 2)])
def test_crop_starts_at_half_rounded_to_even(width, left):
    picture = torch.arange(width, dtype=torch.uint8).expand(3, 112, width)
    cropped = resizing_aurea.resize_and_crop(picture, (112, width), (112, 112), None)
    assert cropped[0, 0].tolist() == list(range(left, left + 112))


def test_picture_smaller_than_the_crop_is_centred_on_zeros():
    processor = AureaImageProcessor(do_resize=False, crop_size=SQUARE, spatial_crop_size=SQUARE)
    views = levels(processor, Image.new("RGB", (51, 130), (7, 7, 7)))[0]
    inside = torch.zeros(112, 112)
    inside[:, 30:81] = 7
    assert torch.equal(views, inside.expand(2, 3, 112, 112))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest-exact"])
def test_a_part_of_a_pass_equals_that_part_of_the_whole(monkeypatch, mode):
    """Of any sizes, up and down, at the borders and inside."""
    monkeypatch.setattr(resizing_aurea, "MAX_SURPLUS", 0)
    dice = random.Random(0)
    for _ in range(120):
        size, target = ([dice.choice((dice.randint(1, 60), dice.randint(1, 400))) for _ in range(2)] for _ in range(2))
        crop = [dice.randint(1, length) for length in target]
        picture = torch.from_numpy(np.frombuffer(dice.randbytes(3 * math.prod(size)), np.uint8).copy()).view(*size, 3)
        picture = picture.permute(2, 0, 1)
        whole = torch.nn.functional.interpolate(picture[None], target, mode=mode, antialias=mode != "nearest-exact")
        top, left = (round((have - keep) / 2) for have, keep in zip(target, crop))
        expected = whole[0, :, top : top + crop[0], left : left + crop[1]]
        assert torch.equal(resizing_aurea.resize_and_crop(picture, target, crop, mode), expected), (size, target, crop)


@pytest.mark.parametrize("size", [(20, 100_000), (100_000, 20)])
def test_a_long_picture_costs_what_is_kept_of_it(monkeypatch, size):
    """Not what it would be resized to, 1.3 million pixels on the long side, nor what lies between the two passes."""
    monkeypatch.setattr(resizing_aurea, "MAX_NUMBERS_PER_PASS", 2**20)
    numbers = []
    for owner, name in ((torch.nn.functional, "interpolate"), (torch, "zeros"), (torch, "cat")):
        original = getattr(owner, name)

        def count(*args, original=original, **kwargs):
            result = original(*args, **kwargs)
            numbers.append(result.numel())
            return result

        monkeypatch.setattr(owner, name, count)
    long = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    AureaImageProcessor()(long, return_tensors="pt")
    assert numbers and max(numbers) <= 2 * 2**20


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (20000, 10), (10, 20000), (1, 300)])
def test_extreme_shapes_keep_their_color(size):
    views = levels(AureaImageProcessor(), Image.new("RGB", size, (10, 200, 30)))
    assert torch.equal(views, torch.tensor([10.0, 200.0, 30.0]).view(3, 1, 1).expand(1, 2, 3, 224, 224))


def test_extreme_shape_equals_the_crop_of_the_whole():
    picture = torch.randint(0, 256, (3, 10, 2000), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = torch.nn.functional.interpolate(picture[None], (256, 51200), mode="bicubic", antialias=True)[0]
    left = round((51200 - 224) / 2)
    assert torch.equal(levels(AureaImageProcessor(), picture)[0, 1], whole[:, 16:240, left : left + 224].float())


def test_longest_side_allowed_is_allowed(monkeypatch):
    monkeypatch.setattr(resizing_aurea, "MAX_RESIZED_LENGTH", 64)
    picture = torch.zeros(3, 9, 9, dtype=torch.uint8)
    assert resizing_aurea.resize_and_crop(picture, (64, 5), None, "bilinear").shape == (3, 64, 5)
    with pytest.raises(ValueError, match="65 pixels long, more than 64"):
        resizing_aurea.resize_and_crop(picture, (65, 5), None, "bilinear")


def test_no_pictures_have_the_size_of_the_canvas():
    sizes = {"size": {"height": 16, "width": 40}, "spatial_size": {"height": 30, "width": 20}}
    assert pixels(AureaImageProcessor(**sizes, spatial_crop_size=sizes["spatial_size"]), []).shape[3:] == (30, 40)


def test_longer_side_is_truncated():
    view = levels(AureaImageProcessor(spatial_crop_size=None), torch.zeros(3, 90, 231, dtype=torch.uint8))
    assert view.shape == (1, 2, 3, 256, int(256 * 231 / 90)) == (1, 2, 3, 256, 657)


@pytest.mark.parametrize(
    "size, spatial, canvas",
    [((28, 28), (20, 24), (28, 28)), ((20, 24), (28, 28), (28, 28)), ((16, 40), (30, 20), (30, 40))],
)
def test_smaller_view_is_padded_at_the_bottom_and_on_the_right(picture, size, spatial, canvas):
    sizes = [dict(zip(("height", "width"), shape)) for shape in (size, spatial)]
    padded = AureaImageProcessor(size=sizes[0], spatial_size=sizes[1], spatial_crop_size=sizes[1])
    views = pixels(padded, picture)[0]
    assert views.shape == (2, 3, *canvas)
    for view, (height, width) in zip(views, (size, spatial)):
        assert view[:, height:].count_nonzero() == view[:, :, width:].count_nonzero() == 0
        assert view[:, height - 1].count_nonzero() > 0 and view[:, :height, width - 1].count_nonzero() > 0
    spatial_only = AureaImageProcessor(size=sizes[1], spatial_size=sizes[1], spatial_crop_size=sizes[1])
    assert torch.equal(views[1, :, : spatial[0], : spatial[1]], pixels(spatial_only, picture)[0, 1])


@pytest.mark.parametrize("resample", [0, 2, 3])
def test_resample_of_each_view_can_be_chosen(processor, picture, resample):
    chosen = pixels(processor, picture, resample=resample, spatial_resample=resample)
    default = pixels(processor, picture)
    assert torch.equal(chosen[0, 0], default[0, 0]) == (resample == 2)
    assert torch.equal(chosen[0, 1], default[0, 1]) == (resample == 3)


# what counts as a picture


def as_mode(picture: Image.Image, mode: str) -> Image.Image:
    grey = np.array(picture.convert("L")).astype(np.uint16) * 257
    if mode == "LAB":
        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        return ImageCms.profileToProfile(picture, *profiles, outputMode="LAB")
    if mode.startswith("I;16"):
        return Image.frombytes(mode, picture.size, grey.astype(">u2" if mode == "I;16B" else "<u2").tobytes())
    by_way_of = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode)
    return (picture.convert(by_way_of) if by_way_of else picture).convert(mode)


@pytest.mark.parametrize(
    "mode, reference, tolerance",
    [
        ("1", "1", 0), ("L", "L", 0), ("LA", "L", 0), ("La", "L", 0), ("I", "L", 0), ("F", "L", 1), ("I;16", "L", 0),
        ("I;16L", "L", 0), ("I;16B", "L", 0), ("P", "P", 0), ("PA", "P", 0), ("RGB", "RGB", 0), ("RGBX", "RGB", 0),
        ("RGBA", "RGB", 0), ("RGBa", "RGB", 0), ("CMYK", "RGB", 0), ("YCbCr", "RGB", 4), ("HSV", "RGB", 6),
        ("LAB", "RGB", 24),
    ],
)  # fmt: skip
def test_every_mode_becomes_the_same_rgb_picture(processor, picture, mode, reference, tolerance):
    converted = as_mode(picture, mode)
    assert converted.mode == mode
    expected = levels(processor, picture.convert(reference).convert("RGB"))
    difference = (levels(processor, converted) - expected).abs()
    assert difference.max() <= tolerance and difference.mean() <= tolerance / 3


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_fully_transparent_pictures_are_white(processor, mode):
    picture = Image.new("LA" if mode in ("LA", "La") else "RGBA", (30, 20))
    if mode == "PA":
        picture = Image.new("P", (30, 20)).convert("PA")
        picture.putalpha(0)
    picture = picture if picture.mode == mode else picture.convert(mode)
    assert picture.mode == mode
    assert torch.equal(levels(processor, picture), torch.full((1, 2, 3, 112, 112), 255.0))


@pytest.mark.parametrize("mode, transparent", [("P", 3), ("L", 0), ("RGB", (0, 0, 0)), ("1", 0), ("I;16", 0)])
def test_color_declared_transparent_becomes_white(processor, tmp_path, mode, transparent):
    picture = Image.new(mode, (30, 20), transparent)
    if mode == "P":
        picture.putpalette(range(192))
    picture.save(tmp_path / "picture.png", transparency=transparent)
    reread = Image.open(tmp_path / "picture.png")
    assert "transparency" in reread.info
    assert levels(processor, reread).min() == 255
    assert levels(processor, tmp_path / "picture.png").min() == 255


@pytest.mark.parametrize(
    "array, level",
    [
        (np.full((9, 8, 3), 77, np.uint8), 77),
        (np.full((9, 8, 3), 77, np.int64), 77),
        (np.full((9, 8, 3), 77, np.uint16), 77),
        (np.full((9, 8, 3), 77 * 257, np.uint16), 77),
        (np.full((9, 8, 3), 77 * 257, ">u2"), 77),
        (np.full((9, 8, 3), 65535, np.uint16), 255),
        (np.full((9, 8, 3), 77.0, np.float32), 77),
        (np.full((9, 8, 3), True), 255),
        (np.full((9, 8), 77, np.uint8), 77),
        (np.full((9, 8, 1), 77, np.uint8), 77),
        (np.full((1, 9, 8), 77, np.uint8), 77),
        (np.full((3, 9, 8), 77, np.uint8), 77),
        (np.dstack([np.full((9, 8, 3), 77, np.uint8), np.full((9, 8), 255, np.uint8)]), 77),
        (np.zeros((9, 8, 4), np.uint8), 255),
        (torch.full((3, 9, 8), 77, dtype=torch.uint8), 77),
        (torch.full((9, 8, 3), 77.0, dtype=torch.bfloat16), 77),
        (torch.full((3, 9, 8), 77.0, requires_grad=True), 77),
        (Image.fromarray(np.full((9, 8), 77 * 257, np.uint16)), 77),
        (Image.fromarray(np.full((9, 8), 77, np.int32)), 77),
        (Image.fromarray(np.full((9, 8), 77 * 257, np.int32)), 77),
        (Image.fromarray(np.full((9, 8), 77 / 255, np.float32)), 77),
    ],
)
def test_arrays_of_every_type_and_layout(processor, array, level):
    assert torch.equal(levels(processor, array), torch.full((1, 2, 3, 112, 112), float(level)))


@pytest.mark.parametrize("kind", [np.array, Image.fromarray, lambda array: Image.fromarray(array.astype(np.int32))])
def test_every_16_bit_level_becomes_the_nearest_8_bit_level(kind):
    array = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    views = levels(AureaImageProcessor(do_resize=False, do_center_crop=False), kind(array))
    assert torch.equal(views, torch.from_numpy(np.rint(array / 257)).float().expand(1, 2, 3, 256, 256))


@pytest.mark.parametrize("kind", [np.array, lambda image: torch.from_numpy(np.array(image))])
def test_arrays_equal_the_picture_in_both_layouts(processor, picture, kind):
    array = kind(picture)
    expected = pixels(processor, picture)
    assert torch.equal(pixels(processor, array), expected)
    channels_first = array.transpose(2, 0, 1) if isinstance(array, np.ndarray) else array.permute(2, 0, 1)
    assert torch.equal(pixels(processor, channels_first), expected)
    assert torch.equal(pixels(processor, array, input_data_format="channels_last"), expected)
    assert torch.equal(pixels(processor, channels_first, input_data_format="channels_first"), expected)


def test_floats_between_0_and_1_equal_the_levels_without_rescaling(processor, picture):
    array = np.array(picture).astype(np.float32) / 255
    torch.testing.assert_close(
        pixels(processor, array, do_rescale=False), pixels(processor, picture), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(("highest", "warns"), [(1.0, True), (2.0, False)])
def test_rescaling_floats_in_0_to_1_warns(processor, caplog, highest, warns):
    image_processing_aurea.logger.warning_once.cache_clear()
    image_processing_aurea.logger.addHandler(caplog.handler)
    pixels(processor, np.full((9, 8, 3), highest))
    image_processing_aurea.logger.removeHandler(caplog.handler)
    assert ("Pass `do_rescale=False`" in caplog.text) == warns


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_255_is_an_8_bit_level_in_any_type(processor, dtype):
    assert levels(processor, np.full((9, 8, 3), 255, dtype)).min() == 255


@pytest.mark.parametrize("channels", [3, 4])
def test_floats_up_to_exactly_1_are_no_levels(processor, picture, channels):
    array = np.array(picture.convert("RGBA"))[..., :channels]
    array[0, 0] = 255
    views = pixels(processor, array.astype(np.float32) / 255, do_rescale=False)
    torch.testing.assert_close(views, pixels(processor, array), rtol=0, atol=1e-6)


def test_floats_of_any_range_pass_where_nothing_is_resized():
    processor = AureaImageProcessor(do_resize=False, do_rescale=False, do_normalize=False, do_center_crop=False)
    array = torch.linspace(-3, 300, 3 * 5 * 7).reshape(3, 5, 7)
    assert torch.equal(pixels(processor, array), array.expand(1, 2, 3, 5, 7))


def test_read_only_array_is_not_written_to(processor, picture, recwarn):
    array = np.array(picture)
    array.setflags(write=False)
    pixels(processor, array)
    assert not [warning for warning in recwarn if "writable" in str(warning.message)]


@pytest.mark.parametrize("shape", [(3, 50, 3), (4, 50, 3), (1, 50, 3), (3, 50, 4), (1, 1, 3), (3, 3, 3)])
def test_an_array_of_few_rows_is_what_it_is_as_a_pil_image(processor, shape):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert torch.equal(pixels(processor, array), pixels(processor, Image.fromarray(array)))
    for data_format, given in (("channels_last", array), ("channels_first", array.transpose(2, 0, 1))):
        for picture in (np.ascontiguousarray(given), torch.from_numpy(np.ascontiguousarray(given))):
            assert torch.equal(pixels(processor, picture, input_data_format=data_format), pixels(processor, array))


@pytest.mark.parametrize(
    "picture", [np.zeros((3, 50, 1)), np.zeros((1, 50, 1)), torch.zeros(3, 50, 3), torch.zeros(4, 9, 1)]
)
def test_a_picture_whose_channels_may_be_first_or_last_is_refused(processor, picture):
    with pytest.raises(ValueError, match=r"Picture 1: .* could both be its channels: give `input_data_format="):
        processor([np.zeros((9, 9, 3)), picture])


def encodings(folder) -> dict:
    """One picture, turned by its EXIF orientation, in every encoded form."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = folder / "turned.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(file, exif=exif)
    data = file.read_bytes()
    read_before = io.BytesIO(data)
    read_before.read()
    return {
        "bytes": data,
        "bytearray": bytearray(data),
        "memoryview": memoryview(data),
        "BytesIO": io.BytesIO(data),
        "file": open(file, "rb"),
        "read before": read_before,
        "dataset": {"bytes": data, "path": None},
        "dataset of paths": {"bytes": None, "path": str(file)},
        "path": file,
    }


@pytest.mark.parametrize(
    "kind", ["bytes", "bytearray", "memoryview", "BytesIO", "file", "read before", "dataset", "dataset of paths"]
)
def test_encoded_pictures_are_read_wherever_a_picture_may_stand(processor, kind, tmp_path):
    given = encodings(tmp_path)
    expected = pixels(processor, given["path"])
    assert torch.equal(pixels(processor, given[kind]), expected)
    assert torch.equal(pixels(processor, [[given["path"]], [given[kind], None]]), torch.cat([expected, expected]))


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels_pass_without_conversion_to_rgb(processor, channels):
    array = np.random.default_rng(0).integers(0, 256, (30, 20, channels), dtype=np.uint8)
    settings = {"image_mean": [0.0] * channels, "image_std": [1.0] * channels, "do_convert_rgb": False}
    if channels == 1:
        settings.update(spatial_image_mean=0.0, spatial_image_std=1.0)
    assert pixels(processor, array, **settings).shape == (1, 2, channels, 112, 112)


# reading


def rotated_file(picture: Image.Image, folder: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    picture.save(folder / "rotated.png", exif=exif)
    return folder / "rotated.png"


def test_orientation_is_applied_to_files_but_not_to_pictures_in_memory(processor, picture, tmp_path):
    path = rotated_file(picture, tmp_path)
    upright, stored = pixels(processor, picture.rotate(-90, expand=True)), pixels(processor, picture)
    encoded = base64.b64encode(path.read_bytes()).decode()
    in_lines = base64.encodebytes(path.read_bytes()).decode()
    for source in (path, str(path), encoded, in_lines, f"data:image/png;base64,{encoded}"):
        assert torch.equal(pixels(processor, source), upright)
    assert torch.equal(pixels(processor, Image.open(path)), stored)
    assert not torch.equal(upright, stored)


class PictureRequests(SimpleHTTPRequestHandler):
    """Files of a folder, redirects, and answers that do not end."""

    def do_GET(self):
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path in ("/endless", "/slow"):
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):  # the other side hangs up
                while True:
                    self.wfile.write(bytes(1 if self.path == "/slow" else 2**16))
                    time.sleep(0.02 if self.path == "/slow" else 0)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def address(tmp_path, monkeypatch):
    """Of a server on this machine, from which pictures may be fetched."""
    monkeypatch.setenv("AUREA_PRIVATE_URLS", "1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(PictureRequests, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_picture_from_a_url_is_turned_upright_and_laid_on_white(processor, picture, tmp_path, address):
    rotated_file(picture, tmp_path)
    Image.new("LA", (9, 9)).save(tmp_path / "transparent.png")
    turned, white = pixels(processor, f"{address}/rotated.png"), levels(processor, f"{address}/transparent.png")
    with pytest.raises(ValueError, match=r"missing\.png.*404"):
        pixels(processor, f"{address}/missing.png")
    assert torch.equal(turned, pixels(processor, f"{address}/to/{address}/rotated.png"))
    assert torch.equal(turned, pixels(processor, picture.rotate(-90, expand=True)))
    assert white.min() == 255


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "224.0.0.1", "[::ffff:10.1.1.1]"]
)
def test_private_addresses_are_asked_only_where_that_is_allowed(processor, host, monkeypatch):
    """Those of the machine, its link and its network, whatever name they have."""
    for value in (None, "0"):
        monkeypatch.delenv("AUREA_PRIVATE_URLS", raising=False)
        if value:
            monkeypatch.setenv("AUREA_PRIVATE_URLS", value)
        with pytest.raises(ValueError, match=r"no public address: set AUREA_PRIVATE_URLS=1"):
            pixels(processor, f"http://{host}:1/a.png")
        with pytest.raises(ValueError, match=r"no public address: set AUREA_PRIVATE_URLS=1"):
            pixels(processor, f"https://{host}:1/a.png")


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/a.png", "file:///etc/hostname"])
def test_redirects_lead_to_no_other_scheme(processor, address, target):
    with pytest.raises(ValueError, match=f"(it redirects from http to ftp|Redirection to url) ?.*'{target}'"):
        pixels(processor, f"{address}/to/{target}")


def test_downloads_end(processor, address, monkeypatch):
    monkeypatch.setattr(pictures_aurea, "MAX_DOWNLOAD_BYTES", 2**20)
    with pytest.raises(ValueError, match="it has more than the 1048576 bytes that are downloaded at most"):
        pixels(processor, f"{address}/endless")
    monkeypatch.setattr(pictures_aurea, "DOWNLOAD_SECONDS", 0.5)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"it did not come in 0\.5 seconds"):
        pixels(processor, f"{address}/slow")
    assert time.monotonic() - start < 5


def test_headers_that_trickle_in_end_too(processor, monkeypatch):
    monkeypatch.setenv("AUREA_PRIVATE_URLS", "1")
    monkeypatch.setattr(pictures_aurea, "DOWNLOAD_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def trickle():
            connection, _ = server.accept()
            with connection, suppress(OSError):
                while True:
                    connection.sendall(b"H")
                    time.sleep(0.02)

        threading.Thread(target=trickle, daemon=True).start()
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"it did not come in 0\.5 seconds"):
            pixels(processor, f"http://127.0.0.1:{server.getsockname()[1]}/a.png")
        assert time.monotonic() - start < 5


def test_too_many_pixels_name_the_limit(processor, tmp_path, monkeypatch):
    Image.new("RGB", (30, 30)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 449)
    with pytest.raises(ValueError, match=r"large\.png.*limit of 898 pixels.*Raise `PIL.Image.MAX_IMAGE_PIXELS`"):
        pixels(processor, tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 450)
    with pytest.warns(Image.DecompressionBombWarning):
        pixels(processor, tmp_path / "large.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_are_laid_on_white_in_strips(processor, monkeypatch, mode):
    colors = np.random.default_rng(0).integers(0, 256, (33, 20, 4), np.uint8)
    transparent = Image.fromarray(colors).convert(mode)
    whole = pixels(processor, transparent)
    for number in (1, 20, 45):
        monkeypatch.setattr(image_processing_aurea, "PIXELS_PER_STRIP", number)
        assert torch.equal(pixels(processor, transparent), whole)
    rgba = np.array(transparent.convert("RGBA"))
    assert torch.equal(pixels(processor, rgba), whole)
    color, alpha = rgba[..., :3].astype(np.float32), rgba[..., 3:].astype(np.float32) / 255
    on_white = (alpha * color + (1 - alpha) * 255).astype(np.uint8)
    assert torch.equal(pixels(processor, on_white), whole)


def test_arrays_of_any_layout_in_memory(processor, picture):
    array = np.array(picture)
    expected = pixels(processor, picture)
    read_only = array.copy()
    read_only.flags.writeable = False
    for same in (np.asfortranarray(array), array[::-1].copy()[::-1], np.flip(np.flip(array, 1).copy(), 1), read_only):
        assert torch.equal(pixels(processor, same), expected)
    assert np.array_equal(read_only, np.array(picture))


@pytest.mark.parametrize("prefix", ["", "spatial_"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("image_mean", [0.5, 0.5], "`{}image_mean` must be one number or one per channel: 3, got 2"),
        ("image_std", [0.5, 0.5], "`{}image_std` must be one number or one per channel: 3, got 2"),
        ("image_mean", [0.5] * 4, "`{}image_mean` must be one number or one per channel: 3, got 4"),
        ("image_mean", float("nan"), "`{}image_mean` must be finite numbers, got nan"),
        ("image_std", [0.5, float("inf"), 0.5], r"`{}image_std` must be finite numbers, got \(0.5, inf, 0.5\)"),
        ("image_std", ["a", 0.5, 0.5], "`{}image_std` must be finite numbers"),
        ("size", {"height": 20.5, "width": 20}, "`{}size` must have the keys .* with positive integers"),
    ],
)
def test_numbers_that_are_none_are_refused(picture, prefix, name, value, message):
    with pytest.raises(ValueError, match=message.format(prefix)):
        AureaImageProcessor(**{f"{prefix}{name}": value})(picture)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "255"])
def test_a_rescale_factor_is_a_number(picture, value):
    with pytest.raises(ValueError, match="`rescale_factor` must be finite numbers"):
        AureaImageProcessor(rescale_factor=value)(picture)


def test_lists_of_every_shape_give_one_row_per_picture(processor, picture):
    one = pixels(processor, picture)
    array = np.array(picture)
    for images in (
        [picture] * 3,
        (picture, picture, picture),
        [[picture], [picture, picture]],
        [[], [picture, picture], [picture]],
        [picture, [picture, picture]],
        [None, picture, [picture, picture]],
        np.stack([array] * 3),
        torch.from_numpy(np.stack([array] * 3)),
        [np.stack([array] * 2), array],
        [FIXTURES / "image_rgb.png", picture, array],
    ):
        assert torch.equal(pixels(processor, images), one.expand(3, -1, -1, -1, -1))


@pytest.mark.parametrize("empty", [[], (), [[]], [[], []], [None]])
def test_no_pictures_give_zero_rows(processor, empty):
    assert pixels(processor, empty).shape == (0, 2, 3, 112, 112)
    assert processor(empty)["pixel_values"] == []


def test_return_types(processor, picture):
    tensor = pixels(processor, [picture, picture])
    array = processor([picture, picture], return_tensors="np")["pixel_values"]
    rows = processor([picture, picture])["pixel_values"]
    assert isinstance(array, np.ndarray) and array.dtype == np.float32 and np.array_equal(array, tensor.numpy())
    assert isinstance(rows, list) and all(np.array_equal(row, tensor[0].numpy()) for row in rows)
    assert pixels(processor, picture, device="cpu").device.type == "cpu"


# settings


def test_settings_survive_saving_and_loading(tmp_path, picture):
    first = AureaImageProcessor(
        **TINY, resample=3, spatial_resample=2, image_mean=[0.1, 0.2, 0.3], spatial_image_std=[0.4, 0.5, 0.6]
    )
    first.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["spatial_size"] == {"shortest_edge": 128} and saved["spatial_crop_size"] == SQUARE
    assert saved["spatial_image_mean"] == list(IMAGENET_DEFAULT_MEAN) and saved["spatial_resample"] == 2
    second = AureaImageProcessor.from_pretrained(tmp_path)
    assert second.to_dict() == first.to_dict()
    assert torch.equal(pixels(first, picture), pixels(second, picture))
    third = AureaImageProcessor.from_pretrained(tmp_path, spatial_size=140)
    assert dict(third.spatial_size) == {"shortest_edge": 140}


def test_crop_switched_off_stays_off_after_loading(tmp_path):
    AureaImageProcessor(spatial_crop_size=None).save_pretrained(tmp_path)
    assert AureaImageProcessor.from_pretrained(tmp_path).spatial_crop_size is None


def test_settings_in_short_form():
    processor = AureaImageProcessor(size=56, spatial_size=64, spatial_crop_size=56)
    assert dict(processor.size) == dict(processor.spatial_crop_size) == {"height": 56, "width": 56}
    assert dict(processor.spatial_size) == {"shortest_edge": 64}


def test_settings_of_one_call_override_those_of_the_processor(processor, picture):
    other = AureaImageProcessor(**{**TINY, "spatial_size": {"shortest_edge": 150}}, do_normalize=False)
    called = pixels(processor, picture, spatial_size={"shortest_edge": 150}, do_normalize=False)
    assert torch.equal(called, pixels(other, picture))


# refusals


def truncated(name: str) -> str:
    data = (FIXTURES / f"image_{name}.png").read_bytes()
    return base64.b64encode(data[: len(data) // 2]).decode()


def lazily_opened_truncated_picture() -> Image.Image:
    data = (FIXTURES / "image_rgb.png").read_bytes()
    return Image.open(io.BytesIO(data[: len(data) // 2]))


BAD_PICTURES = {
    "none": (None, TypeError, "NoneType"),
    "number": (7, TypeError, "int: 7"),
    "bytes": (b"abc", ValueError, "b'abc' cannot be read: cannot identify"),
    "text file": (io.StringIO("abc"), ValueError, "cannot be read: it is neither"),
    "list of numbers": ([[1, 2, 3]], TypeError, "int: 1"),
    "dictionary": ({"path": "x.png"}, ValueError, "'x.png'} cannot be read: it is neither an existing file"),
    "dictionary of nothing": ({"bytes": None, "path": None}, ValueError, "neither `bytes` nor a `path`"),
    "no such file": (
        "no/such/picture.png",
        ValueError,
        "'no/such/picture.png' cannot be read: it is neither an existing file",
    ),
    "no such path": (Path("no/such/picture.png"), ValueError, "neither an existing file"),
    "empty string": ("", ValueError, "neither an existing file"),
    "no such file that could be base64": ("photos/cat12345", ValueError, "neither an existing file"),
    "no such file with other letters": ("фото.png", ValueError, "'фото.png'.*neither an existing file"),
    "folder": (str(FIXTURES), ValueError, "neither an existing file"),
    "file that is no picture": (FIXTURES / "goldens.json", ValueError, r"goldens\.json.*cannot be read"),
    "base64 of no picture": (base64.b64encode(b"some text" * 5).decode(), ValueError, "nor a picture in base64"),
    "truncated file": (truncated("rgb"), ValueError, "cannot be read.*truncated"),
    "truncated file in memory": (lazily_opened_truncated_picture(), ValueError, "Picture 0: .*truncated"),
    "PIL image without pixels": (Image.new("RGB", (0, 5)), ValueError, "Picture 0: .*width 0, height 5"),
    "array without pixels": (np.zeros((0, 5, 3), np.uint8), ValueError, r"no pixels: shape \(0, 5, 3\)"),
    "one dimension": ([np.zeros(5, np.uint8)], ValueError, r"got the shape \(5,\)"),
    "five dimensions": (np.zeros((1, 1, 3, 4, 4), np.uint8), ValueError, r"got the shape \(1, 1, 3, 4, 4\)"),
    "five channels": (np.zeros((9, 8, 5), np.uint8), ValueError, r"1, 3 or 4 channels.*\(9, 8, 5\)"),
    "two channels": (np.zeros((2, 9, 8), np.uint8), ValueError, r"1, 3 or 4 channels.*\(2, 9, 8\)"),
    "NaN": (np.full((9, 8, 3), np.nan, np.float32), ValueError, "216 values that are NaN"),
    "infinite": (torch.full((3, 9, 8), torch.inf), ValueError, "NaN or infinite"),
    "negative floats": (np.full((9, 8, 3), -1.0), ValueError, "got -1…-1"),
    "floats above 255": (np.full((9, 8, 3), 300.0), ValueError, "got 300…300"),
    "negative integers": (np.full((9, 8, 3), -1), ValueError, "-1…-1"),
    "integers above 255": (np.full((9, 8, 3), 300), ValueError, "int64 in 300…300"),
    "complex numbers": (np.zeros((9, 8, 3), complex), ValueError, "complex128"),
    "objects": (np.full((9, 8, 3), None), ValueError, "object"),
    "32-bit picture out of range": (Image.new("I", (9, 8), 70000), ValueError, "70000"),
    "32-bit picture of negative numbers": (Image.new("I", (9, 8), -1), ValueError, "int32 in -1…-1"),
    "float picture out of range": (Image.new("F", (9, 8), -2.0), ValueError, "-2"),
    "sides that differ too much": (
        Image.new("RGB", (60000, 1)),
        ValueError,
        "15360000 pixels long.*Crop it first",
    ),
    "second of two": ([np.zeros((9, 8, 3)), np.zeros((9, 8, 7))], ValueError, "Picture 1"),
}


@pytest.mark.parametrize("images, error, message", BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_bad_pictures_are_refused_by_name(images, error, message):
    with pytest.raises(error, match=message):
        AureaImageProcessor()(images, return_tensors="pt")


BAD_SETTINGS = {
    "size without width": ({"size": {"height": 5}}, "size"),
    "size of zero": ({"size": {"height": 0, "width": 5}}, "`size` .*positive"),
    "longest edge": ({"spatial_size": {"longest_edge": 5}}, "`spatial_size` must have the keys"),
    "no size": ({"size": None}, "`size`"),
    "crop by edge": ({"spatial_crop_size": {"shortest_edge": 5}}, "`spatial_crop_size`"),
    "lanczos": ({"spatial_resample": 1}, r"`spatial_resample` must be one of .*3 \(BICUBIC\), got 1"),
    "no mean": ({"spatial_image_mean": None}, "`spatial_image_mean` must be given"),
    "mean of two": ({"image_mean": [0.1, 0.2]}, "`image_mean` must be one number or one per channel: 3, got 2"),
    "deviation of zero": ({"spatial_image_std": [1.0, 0.0, 1.0]}, "`spatial_image_std` must not contain 0"),
    "no factor": ({"rescale_factor": None}, "`rescale_factor`"),
    "padding": ({"pad_size": {"height": 5, "width": 5}}, "`pad_size`"),
}


@pytest.mark.parametrize("settings, message", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_bad_settings_are_refused_by_name(processor, picture, settings, message):
    with pytest.raises(ValueError, match=message):
        processor(picture, **settings)


def test_pictures_that_become_unequally_large_are_refused(picture):
    processor = AureaImageProcessor(spatial_crop_size=None)
    with pytest.raises(ValueError, match=r"view 1 has the shapes .*`spatial_crop_size`"):
        processor([picture, picture.resize((40, 90))])
