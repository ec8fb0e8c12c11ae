# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A picture → the views of `pixel_values`, one per vision encoder: two, or one of a model with one encoder.

    picture ─ RGB on white ─┬─ resize to `size` ──────────────────────────── normalise ─ view 0, semantic (SigLIP2)
                            └─ resize to `spatial_size` ─ centre crop ────── normalise ─ view 1, spatial (DINOv2)

All lie in one tensor `(num_images, num_views, 3, height, width)`. Where two differ in size, each is padded with zeros
at the bottom and on the right to the larger; the model knows from its configuration what to cut out. Settings of view
0 bear the usual names, those of view 1 the same with `spatial_` in front; the `do_*` switches and `rescale_factor`
hold for both. Pixels are resized as 8-bit numbers by torch's own antialiased kernel, which meets the published pixels
exactly and needs no torchvision.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
import torch
import transformers
from transformers import BaseImageProcessor, BatchFeature, PilBackend
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    is_pil_image,
    is_valid_image,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import logging

from .pictures_aurea import ENCODED, PICTURE_ERRORS, read_picture, shorten
from .resizing_aurea import crop_start, resize_and_crop


logger = logging.get_logger(__name__)

INTERPOLATION_MODES = {
    PILImageResampling.NEAREST: "nearest-exact",
    PILImageResampling.BILINEAR: "bilinear",
    PILImageResampling.BICUBIC: "bicubic",
}
# Transparent pictures are laid on white so many pixels at a time.
PIXELS_PER_STRIP = 2**18

SizeSetting = int | list[int] | tuple[int, ...] | dict[str, int] | SizeDict | None


class AureaImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    do_spatial_view (`bool`, *optional*, defaults to `True`):
        Whether there is a view 1. A model of one encoder needs view 0 alone.
    spatial_size (`dict[str, int]`, *optional*, defaults to `{"shortest_edge": 256}`):
        Size of view 1 after resizing: `height` and `width`, or `shortest_edge`, which keeps the aspect ratio.
    spatial_crop_size (`dict[str, int]`, *optional*, defaults to `{"height": 224, "width": 224}`):
        Size of the centre of view 1 that is kept. `None` keeps all of it.
    spatial_resample (`PILImageResampling`, *optional*, defaults to `Resampling.BICUBIC`):
        Interpolation of view 1.
    spatial_image_mean (`float` or `list[float]`, *optional*, defaults to `IMAGENET_DEFAULT_MEAN`):
        Mean of view 1, per channel.
    spatial_image_std (`float` or `list[float]`, *optional*, defaults to `IMAGENET_DEFAULT_STD`):
        Standard deviation of view 1, per channel.
    """

    do_spatial_view: bool
    spatial_size: SizeSetting
    spatial_crop_size: SizeSetting
    spatial_resample: PILImageResampling | int | None
    spatial_image_mean: float | list[float] | tuple[float, ...] | None
    spatial_image_std: float | list[float] | tuple[float, ...] | None


class AureaViewFrame(NamedTuple):
    """The part of a picture that a view shows.

    Args:
        left, top, right, bottom: its edges in pixels of the picture, beyond its own where the view has zeros.
        height, width: of the view in pixels, each of which shows an equal share of that part.
    """

    left: float
    top: float
    right: float
    bottom: float
    height: int
    width: int


class AureaImageProcessor(PilBackend):
    r"""Turns pictures into `pixel_values` of shape `(num_images, num_views, 3, height, width)`, float32.

    Pictures are PIL images, NumPy arrays or tensors (channels first or last; 8-bit, 16-bit, or floats in 0…1 or
    0…255), paths, URLs, base64 strings, bytes, binary files, or what `datasets.Image(decode=False)` yields, one or
    many, in flat or nested lists. Transparent pictures are laid on white. The EXIF orientation is applied to pictures
    that are read here; a PIL image is taken as it is. An array whose first and last dimension could both be channels
    has them last, as PIL's pictures have them.

    As everywhere in transformers, `do_rescale` multiplies whatever was given by `rescale_factor`: pass
    `do_rescale=False` with floats in 0…1.

    Settings of view 0: `size` (resized to exactly this, or by its `shortest_edge`), `crop_size` (`None`: no crop),
    `resample`, `image_mean`, `image_std`; of view 1: the same names after `spatial_`, see `AureaImageProcessorKwargs`.
    `first_view`, the dictionary of another image processor of transformers, lets that one make view 0, pixel by pixel
    as it does; the settings then only say how large the view is.

    Raises:
        ValueError: a picture cannot be read or has no pixels, a wrong number of dimensions or channels, or values that
            are not finite or out of range; a setting does not fit. The message names the picture and the value.
        TypeError: something is no picture at all.
    """

    valid_kwargs = AureaImageProcessorKwargs
    model_input_names = ["pixel_values"]

    do_convert_rgb = True
    do_resize = True
    size = {"height": 224, "width": 224}
    resample = PILImageResampling.BILINEAR
    do_center_crop = True
    crop_size = None
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_STANDARD_MEAN
    image_std = IMAGENET_STANDARD_STD

    first_view: dict | None = None

    do_spatial_view = True
    spatial_size = {"shortest_edge": 256}
    spatial_resample = PILImageResampling.BICUBIC
    spatial_crop_size = {"height": 224, "width": 224}
    spatial_image_mean = IMAGENET_DEFAULT_MEAN
    spatial_image_std = IMAGENET_DEFAULT_STD

    def preprocess(self, images: ImageInput, **kwargs: Unpack[AureaImageProcessorKwargs]) -> BatchFeature:
        """See the class. `return_tensors` is `"pt"`, `"np"` or `None` (a list with one array per picture)."""
        if self.first_view is None:
            return super().preprocess(images, **kwargs)
        pictures, return_tensors = (
            list(flatten_pictures(self.fetch_images(images))),
            kwargs.pop("return_tensors", None),
        )
        canvases = super().preprocess(pictures, **kwargs, return_tensors="pt")["pixel_values"]
        if pictures:
            own = {name: value for name, value in kwargs.items() if not name.startswith("spatial_")}
            first = self._first_image_processor(pictures, **own, return_tensors="pt")["pixel_values"]
            canvases[:, 0] = torch.nn.functional.pad(
                first, (0, canvases.shape[-1] - first.shape[-1], 0, canvases.shape[-2] - first.shape[-2])
            )
        pixel_values = list(canvases.numpy()) if return_tensors is None else canvases
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=return_tensors)

    @property
    def _first_image_processor(self) -> BaseImageProcessor:
        return getattr(transformers, self.first_view["image_processor_type"])(**self.first_view)

    def view_frames(self, height: int, width: int) -> list[AureaViewFrame]:
        """Which part of a picture of this height and width each view shows; view 0 of a `first_view`, to within one of
        its pixels."""
        names = self.valid_kwargs.__annotations__
        settings = self._standardize_kwargs(**{name: getattr(self, name, None) for name in names})
        self._validate_preprocess_kwargs(**settings)
        return [_view_frame(height, width, prefix, **settings) for prefix in _prefixes(**settings)]

    def fetch_images(self, images: ImageInput):
        """Reads what is encoded. The nesting stays; `None` in a list becomes an empty one."""
        if isinstance(images, (list, tuple)):
            return [[] if image is None else self.fetch_images(image) for image in images]
        if isinstance(images, ENCODED):
            return read_picture(images)
        if is_valid_image(images):
            return images
        raise TypeError(
            f"A picture must be a PIL image, a NumPy array, a tensor, a path, a URL, a base64 string, bytes, a binary "
            f"file or a dictionary of `bytes` and `path`, got {type(images).__name__}: {shorten(images)}"
        )

    def _preprocess_image_like_inputs(self, images: ImageInput, *args, **kwargs) -> BatchFeature:
        pictures = []
        for index, image in enumerate(flatten_pictures(self.fetch_images(images))):
            try:
                pictures.append(self.process_image(image, **kwargs))
            except PICTURE_ERRORS as error:  # a PIL image may be decoded only now
                raise ValueError(f"Picture {index}: {error}") from error
        return self._preprocess(pictures, *args, **kwargs)

    def process_image(
        self,
        image: ImageInput,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """One picture as `(channels, height, width)`, uint8 or, if floats were given, float32."""
        if is_pil_image(image):
            if 0 in image.size:
                raise ValueError(f"it has no pixels: width {image.size[0]}, height {image.size[1]}")
            array = _pil_to_rgb(image) if do_convert_rgb else np.array(image)
            input_data_format = ChannelDimension.LAST
        else:
            array = image.detach().cpu() if isinstance(image, torch.Tensor) else image
            if isinstance(array, torch.Tensor):
                array = (array.float() if array.is_floating_point() else array).numpy()
            if input_data_format is None and array.ndim == 3:
                input_data_format = _infer_data_format(image)
        array = _to_channels_first(array, input_data_format)
        if not array.flags.writeable or min(array.strides) < 0:  # neither of which torch takes as it is
            array = array.copy(order="K")
        picture = torch.from_numpy(array)
        return _to_three_channels(picture) if do_convert_rgb else picture

    def _standardize_kwargs(self, **kwargs) -> dict:
        names = ("size", "crop_size", "image_mean", "image_std")
        spatial = {name: kwargs.pop(f"spatial_{name}", None) for name in names}
        spatial = super()._standardize_kwargs(**spatial, default_to_square=False)
        return super()._standardize_kwargs(**kwargs) | {f"spatial_{name}": spatial[name] for name in names}

    def _validate_preprocess_kwargs(self, **kwargs):
        for prefix in _prefixes(**kwargs):
            size, crop_size = kwargs[f"{prefix}size"], kwargs[f"{prefix}crop_size"]
            if kwargs["do_resize"]:
                _check_size(f"{prefix}size", size, (("height", "width"), ("shortest_edge",)))
                if kwargs[f"{prefix}resample"] not in INTERPOLATION_MODES:
                    supported = ", ".join(f"{int(mode)} ({mode.name})" for mode in INTERPOLATION_MODES)
                    raise ValueError(
                        f"`{prefix}resample` must be one of {supported}, got {kwargs[f'{prefix}resample']}"
                    )
            if kwargs["do_center_crop"] and crop_size is not None:
                _check_size(f"{prefix}crop_size", crop_size, (("height", "width"),))
            if kwargs["do_normalize"]:
                for name in (f"{prefix}image_mean", f"{prefix}image_std"):
                    _check_numbers(name, kwargs[name], "do_normalize")
                if not np.all(np.asarray(kwargs[f"{prefix}image_std"])):
                    raise ValueError(f"`{prefix}image_std` must not contain 0, got {kwargs[f'{prefix}image_std']}")
        if kwargs["do_rescale"]:
            _check_numbers("rescale_factor", kwargs["rescale_factor"], "do_rescale")
        if kwargs["do_pad"] or kwargs["pad_size"] is not None:
            raise ValueError("`do_pad` and `pad_size` have no meaning here: views are padded to the larger of the two")

    def _preprocess(self, images: list[torch.Tensor], return_tensors=None, device=None, **kwargs) -> BatchFeature:
        pictures, prefixes = [], _prefixes(**kwargs)
        for index, image in enumerate(images):
            try:
                picture, unit = _to_levels(image) if kwargs["do_resize"] else (image, 1.0)
                pictures.append([self._make_view(picture, unit, prefix, **kwargs) for prefix in prefixes])
            except ValueError as error:
                raise ValueError(f"Picture {index}: {error}") from error
        for view, prefix in enumerate(prefixes):
            sizes = {tuple(views[view].shape) for views in pictures}
            if len(sizes) > 1:
                raise ValueError(
                    f"The pictures of one call must become equally large, but view {view} has the shapes "
                    f"{sorted(sizes)}: set `{prefix}crop_size`, or `{prefix}size` with height and width"
                )
        pixel_values = [_pad_and_stack(views) for views in pictures]
        if return_tensors is None:
            return BatchFeature(data={"pixel_values": [picture.numpy() for picture in pixel_values]})
        no_pictures = (0, len(prefixes), 3, *_canvas_size(**kwargs))
        pixel_values = torch.stack(pixel_values) if pixel_values else torch.zeros(no_pictures)
        pixel_values = pixel_values.to(device) if return_tensors == "pt" else pixel_values.numpy()
        return BatchFeature(data={"pixel_values": pixel_values}, tensor_type=return_tensors)

    def _make_view(self, picture: torch.Tensor, unit: float, prefix: str, **kwargs) -> torch.Tensor:
        """Resized, cropped, rescaled and normalised: `(channels, height, width)`, float32."""
        mode = INTERPOLATION_MODES[kwargs[f"{prefix}resample"]] if kwargs["do_resize"] else None
        view = resize_and_crop(picture, *_resized_and_cropped(*picture.shape[-2:], prefix, **kwargs), mode)
        view = view.contiguous().to(torch.float32) * unit  # from here on channel by channel
        if kwargs["do_rescale"]:
            if unit != 1:
                logger.warning_once(
                    "Floats in 0…1 are about to be multiplied by `rescale_factor`, as if they were in 0…255. "
                    "Pass `do_rescale=False` for pictures that are already rescaled."
                )
            view = view * kwargs["rescale_factor"]
        if kwargs["do_normalize"]:
            view = _normalize(view, prefix, kwargs[f"{prefix}image_mean"], kwargs[f"{prefix}image_std"])
        return view


def flatten_pictures(images) -> Iterator:
    """The single pictures of an arbitrarily nested list; an array with four dimensions is a list of pictures."""
    if isinstance(images, (list, tuple)) or (not is_pil_image(images) and images.ndim == 4):
        for image in images:
            yield from flatten_pictures(image)
    else:
        yield images


def _resized_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    if size.shortest_edge is None:
        return size.height, size.width
    longest_edge = int(size.shortest_edge * max(height, width) / min(height, width))  # truncated, as published
    return (size.shortest_edge, longest_edge) if height <= width else (longest_edge, size.shortest_edge)


def _resized_and_cropped(height: int, width: int, prefix: str, **kwargs) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of a view after the resize, and after the crop."""
    size = _resized_size(height, width, kwargs[f"{prefix}size"]) if kwargs["do_resize"] else (height, width)
    crop = kwargs[f"{prefix}crop_size"] if kwargs["do_center_crop"] else None
    return size, (crop.height, crop.width) if crop else size


def _view_frame(height: int, width: int, prefix: str, **kwargs) -> AureaViewFrame:
    size, crop_size = _resized_and_cropped(height, width, prefix, **kwargs)
    edges = []
    for length, resized, crop in zip((height, width), size, crop_size):
        start = crop_start(resized, crop)
        edges.append((start * length / resized, (start + crop) * length / resized))
    (top, bottom), (left, right) = edges
    return AureaViewFrame(left, top, right, bottom, *crop_size)


def _prefixes(do_spatial_view: bool, **kwargs) -> tuple[str, ...]:
    """What the names of each view's settings begin with."""
    return ("", "spatial_") if do_spatial_view else ("",)


def _canvas_size(**kwargs) -> tuple[int, int]:
    """Height and width of `pixel_values` as far as the settings alone determine them."""
    sizes = []
    for prefix in _prefixes(**kwargs):
        crop = kwargs[f"{prefix}crop_size"] if kwargs["do_center_crop"] else None
        size = crop or (kwargs[f"{prefix}size"] if kwargs["do_resize"] else None)
        sizes.append((size.height or 0, size.width or 0) if size else (0, 0))
    return max(height for height, _ in sizes), max(width for _, width in sizes)


def _check_size(name: str, size: SizeDict | None, allowed_keys: tuple[tuple[str, ...], ...]):
    given = dict(size) if size is not None else {}
    lengths = given.values()
    if tuple(given) not in allowed_keys or not all(isinstance(length, int) and length >= 1 for length in lengths):
        allowed = " or ".join(str(list(keys)) for keys in allowed_keys)
        raise ValueError(f"`{name}` must have the keys {allowed} with positive integers, got {size and given}")


def _check_numbers(name: str, values, switch: str):
    if values is None:
        raise ValueError(f"`{name}` must be given, or `{switch}` be False")
    array = np.asarray(values)
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise ValueError(f"`{name}` must be finite numbers, got {values}")


def _infer_data_format(picture: np.ndarray | torch.Tensor) -> ChannelDimension:
    """Whether the channels of `(channels, height, width)` or `(height, width, channels)` come first or last."""
    first, last = (picture.shape[dim] in (1, 3, 4) for dim in (0, -1))
    if not (first or last):
        raise ValueError(f"it must have 1, 3 or 4 channels, first or last, got the shape {tuple(picture.shape)}")
    if first and last and (isinstance(picture, torch.Tensor) or picture.shape[-1] == 1):
        raise ValueError(
            f"the first and the last dimension of its shape {tuple(picture.shape)} could both be its channels: give "
            f'`input_data_format="channels_first"` or `"channels_last"`'
        )
    return ChannelDimension.LAST if last else ChannelDimension.FIRST


def _to_channels_first(array: np.ndarray, input_data_format: str | ChannelDimension | None) -> np.ndarray:
    """`(channels, height, width)`, uint8 or float32, of a checked array of any supported layout and type."""
    if array.ndim not in (2, 3):
        raise ValueError(f"it must have 2 dimensions (grey) or 3 (with channels), got the shape {array.shape}")
    if 0 in array.shape:
        raise ValueError(f"it has no pixels: shape {array.shape}")
    is_grey = array.ndim == 2
    if is_grey:
        array = array[None]
    if input_data_format == ChannelDimension.LAST and not is_grey:
        array = np.moveaxis(array, -1, 0)
    if array.shape[0] not in (1, 3, 4):
        raise ValueError(
            f"it must have 1, 3 or 4 channels, got {array.shape[0]} (`input_data_format={input_data_format}`)"
        )
    return _to_known_type(array)


def _to_known_type(array: np.ndarray) -> np.ndarray:
    """8-bit levels as uint8, floats as float32. 16-bit levels are scaled to 8-bit, not clipped."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise ValueError(f"it has {np.count_nonzero(~np.isfinite(array))} values that are NaN or infinite")
        return array.astype(np.float32)
    if array.dtype.kind not in "iu":
        raise ValueError(f"its numbers must be integers or floats, got {array.dtype}")
    lowest, highest = array.min(), array.max()
    if lowest >= 0 and highest <= 255:
        return array.astype(np.uint8)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return _scale_16_bit(array)
    raise ValueError(
        f"its integers must lie in 0…255, or in 0…65535 with the type uint16, got {array.dtype} in {lowest}…{highest}"
    )


def _scale_16_bit(array: np.ndarray) -> np.ndarray:
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 = 255 · 257, rounded to nearest


def _pil_to_rgb(image: PIL.Image.Image) -> np.ndarray:
    """`(height, width)` or `(height, width, 3)` of a PIL image in any mode, on white where it is transparent."""
    transparency = image.info.get("transparency")
    if image.mode.startswith("I") or image.mode == "F":
        array = np.array(image)
        if image.mode == "F":
            levels = _to_levels(torch.from_numpy(_to_known_type(array)))[0].numpy()
        elif image.mode == "I":
            levels = _to_known_type(array if array.min() < 0 or array.max() > 65535 else array.astype(np.uint16))
        else:
            levels = _scale_16_bit(array)
        return levels if transparency is None else np.where(array == transparency, np.uint8(255), levels)
    if image.has_transparency_data:
        return _pil_on_white(image)
    if image.mode == "LAB":
        lab, srgb = PIL.ImageCms.createProfile("LAB"), PIL.ImageCms.createProfile("sRGB")
        return np.array(PIL.ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB"))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _pil_on_white(image: PIL.Image.Image) -> np.ndarray:
    """`(height, width, 3)` of a transparent picture, in strips, so that it takes no more room than an opaque one."""
    width, height = image.size
    array = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, PIXELS_PER_STRIP // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        if strip.mode == "La":  # Pillow knows only this way out of it
            strip = strip.convert("LA")
        strip = torch.from_numpy(np.array(strip.convert("RGBA"))).permute(2, 0, 1)
        array[top : top + rows] = _to_three_channels(strip).permute(1, 2, 0).numpy()
    return array


def _to_three_channels(picture: torch.Tensor) -> torch.Tensor:
    """Grey is repeated; four channels are RGB and alpha, laid on white with the published arithmetic."""
    if picture.shape[0] == 1:
        return picture.expand(3, -1, -1)
    if picture.shape[0] == 3:
        return picture
    white = 1.0 if picture.is_floating_point() and picture.max() <= 1 else 255.0
    composite = torch.empty_like(picture[:3])
    rows = max(1, PIXELS_PER_STRIP // picture.shape[2])
    for part, strip in zip(picture.split(rows, dim=1), composite.split(rows, dim=1)):
        color, alpha = part[:3].to(torch.float32), part[3:].to(torch.float32) / white
        strip.copy_((alpha * color + (1 - alpha) * white).clamp(0, white))  # integers: truncated, not rounded
    return composite


def _to_levels(picture: torch.Tensor) -> tuple[torch.Tensor, float]:
    """A picture as 8-bit levels, and the value of one level in the numbers that were given."""
    if not picture.is_floating_point():
        return picture, 1.0
    lowest, highest = picture.min().item(), picture.max().item()
    if lowest < 0 or highest > 255:
        raise ValueError(
            f"floats must lie in 0…1 or 0…255 to be resized, got {lowest:g}…{highest:g}: rescale it, or "
            f"resize it yourself and pass `do_resize=False`"
        )
    if highest <= 1:
        return (picture * 255).round().to(torch.uint8), 1 / 255
    return picture.round().to(torch.uint8), 1.0


def _normalize(view: torch.Tensor, prefix: str, mean, std) -> torch.Tensor:
    statistics = []
    for name, values, neutral in ((f"{prefix}image_mean", mean, 0.0), (f"{prefix}image_std", std, 1.0)):
        values = torch.as_tensor(values, dtype=torch.float32).reshape(-1)
        num_channels = view.shape[0]
        if prefix and (len(values), num_channels) == (3, 4):
            # a fourth channel exists only under `do_convert_rgb=False`; without a value of its own it stays as it is
            values = torch.nn.functional.pad(values, (0, 1), value=neutral)
        if len(values) not in (1, num_channels):
            raise ValueError(f"`{name}` must be one number or one per channel: {num_channels}, got {len(values)}")
        statistics.append(values.view(-1, 1, 1))
    return (view - statistics[0]) / statistics[1]


def _pad_and_stack(views: list[torch.Tensor]) -> torch.Tensor:
    """The views on one canvas, `(num_views, channels, height, width)`, zeros at the bottom and on the right."""
    height, width = max(view.shape[-2] for view in views), max(view.shape[-1] for view in views)
    return torch.stack(
        [torch.nn.functional.pad(view, (0, width - view.shape[-1], 0, height - view.shape[-2])) for view in views]
    )


__all__ = ["AureaImageProcessor", "AureaImageProcessorKwargs", "AureaViewFrame"]
