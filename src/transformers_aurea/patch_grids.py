# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Patches ↔ pixels of the original picture: resize, crop and padding of each view, undone."""

from typing import NamedTuple

from transformers import BaseImageProcessor

from .configuration_aurea import AureaConfig
from .image_processing_aurea import AureaImageProcessor


class PatchGrid(NamedTuple):
    """Where the patches of a view lie in the original picture.

    Args:
        rows, columns: of patches.
        left, top: edges of the first patch in pixels of the picture, outside it where the view has zeros.
        patch_width, patch_height: in pixels of the picture.
    """

    rows: int
    columns: int
    left: float
    top: float
    patch_width: float
    patch_height: float

    @property
    def right(self) -> float:
        return self.left + self.columns * self.patch_width

    @property
    def bottom(self) -> float:
        return self.top + self.rows * self.patch_height

    def rectangle(self, row: int, column: int) -> tuple[float, float, float, float]:
        """Left, top, right and bottom edge of a patch, in pixels of the picture; ValueError if there is none."""
        if not (0 <= row < self.rows and 0 <= column < self.columns):
            raise ValueError(
                f"There is no patch in row {row}, column {column}: rows go from 0 to {self.rows - 1}, columns from 0 "
                f"to {self.columns - 1}."
            )
        left, top = self.left + column * self.patch_width, self.top + row * self.patch_height
        return left, top, left + self.patch_width, top + self.patch_height

    def patch_at(self, x: float, y: float) -> tuple[int, int]:
        """Row and column of the patch that shows the point (x, y) of the picture; ValueError if none does."""
        row, column = (y - self.top) // self.patch_height, (x - self.left) // self.patch_width
        if not (0 <= row < self.rows and 0 <= column < self.columns):
            raise ValueError(
                f"No patch shows the point ({x:g}, {y:g}): patches cover x from {self.left:g} to {self.right:g}, y "
                f"from {self.top:g} to {self.bottom:g}."
            )
        return int(row), int(column)

    def coarser(self, rows: int, columns: int) -> "PatchGrid":
        """Another number of patches over the same part of the picture."""
        width, height = self.columns * self.patch_width / columns, self.rows * self.patch_height / rows
        return self._replace(rows=rows, columns=columns, patch_width=width, patch_height=height)


def patch_grids(
    image_processor: BaseImageProcessor, config: AureaConfig, height: int, width: int
) -> dict[str, PatchGrid]:
    """A [`PatchGrid`] for each encoder of the model, `"vision"` and `"spatial_vision"`, over a picture of this height
    and width; of an image processor that is not [`AureaImageProcessor`], to within one of its pixels.

    Raises:
        ValueError: the image processor pads, or resizes in another way than `AureaImageProcessor` can.
    """
    # By name: a folder brings its own copy of the class.
    if type(image_processor).__name__ != AureaImageProcessor.__name__:
        settings = image_processor.to_dict()
        settings["crop_size"] = settings.get("crop_size") if settings.get("do_center_crop") else None
        known = {name: settings.get(name) for name in ("do_resize", "size", "crop_size", "do_pad")}
        image_processor = AureaImageProcessor(do_spatial_view=False, **known)
    frames = image_processor.view_frames(height, width)
    grids = {}
    for name, view in config.views.items():
        frame = frames[min(view.index, len(frames) - 1)]  # of a single encoder's pictures there is one view
        pixel_width, pixel_height = (frame.right - frame.left) / frame.width, (frame.bottom - frame.top) / frame.height
        (height, width), (rows, columns) = view.size, view.grid
        patch_size = pixel_width * width / columns, pixel_height * height / rows
        grids[name.removesuffix("_config")] = PatchGrid(rows, columns, frame.left, frame.top, *patch_size)
    return grids


__all__ = ["PatchGrid", "patch_grids"]
