# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A patch's rectangle of the original picture is what the patch of the view shows."""

import numpy as np
import pytest
import torch
from conftest import tiny_config
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor

from transformers_aurea import AureaImageProcessor
from transformers_aurea.patch_grids import PatchGrid, patch_grids


SQUARE = {"height": 56, "width": 56}
PROCESSORS = {
    "squeezed, and cropped": AureaImageProcessor(
        size=SQUARE, spatial_size={"shortest_edge": 64}, spatial_crop_size=SQUARE
    ),
    "both cropped": AureaImageProcessor(
        size={"shortest_edge": 60}, crop_size=SQUARE, spatial_size={"shortest_edge": 56}, spatial_crop_size=SQUARE
    ),
    "with zeros around": AureaImageProcessor(
        size={"shortest_edge": 37},
        crop_size=SQUARE,
        spatial_size={"height": 50, "width": 41},
        spatial_crop_size=SQUARE,
    ),
    "as it is": AureaImageProcessor(do_resize=False, crop_size=SQUARE, spatial_crop_size=SQUARE),
}
SIZES = {"square": (56, 56), "wide": (100, 150), "tall": (233, 90), "small": (40, 45)}
CONFIG = tiny_config(vision_image_size=56, spatial_vision_image_size=56)  # patches of 7 pixels, 8×8 of them


def views(image_processor, picture: np.ndarray, **kwargs) -> torch.Tensor:
    """(views, 3, H, W)"""
    pixels = image_processor(Image.fromarray(picture), return_tensors="pt", **kwargs)["pixel_values"]
    return pixels[0] if pixels.ndim == 5 else pixels


def changed_patches(before: torch.Tensor, after: torch.Tensor) -> list[tuple[int, int]]:
    """Rows and columns of the 7×7 patches in which two views (3, 56, 56) differ."""
    is_changed = (before != after).any(dim=0).unfold(0, 7, 7).unfold(1, 7, 7).flatten(2).any(dim=2)
    return [tuple(place) for place in is_changed.nonzero().tolist()]


def painted(picture: np.ndarray, rectangle: tuple[float, ...]) -> np.ndarray:
    """White in the middle of a rectangle, so that nothing bleeds over its edges."""
    left, top, right, bottom = rectangle
    inset_x, inset_y = 0.4 * (right - left), 0.4 * (bottom - top)
    picture = picture.copy()
    rows = slice(max(round(top + inset_y), 0), max(round(bottom - inset_y), 0))
    picture[rows, max(round(left + inset_x), 0) : max(round(right - inset_x), 0)] = 255
    return picture


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_paint_on_a_patch_changes_that_patch_of_the_view_and_no_other(kind, size):
    image_processor, (height, width) = PROCESSORS[kind], SIZES[size]
    black = np.zeros((height, width, 3), dtype=np.uint8)
    before = views(image_processor, black)
    shown = 0
    for view, grid in enumerate(patch_grids(image_processor, CONFIG, height, width).values()):
        assert (grid.rows, grid.columns) == (8, 8)
        for place in [(0, 0), (0, 7), (2, 5), (4, 3), (7, 0), (7, 7)]:
            picture = painted(black, grid.rectangle(*place))
            if (picture != black).any():
                shown += 1
                assert changed_patches(before[view], views(image_processor, picture)[view]) == [place]
    assert shown >= 4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_what_is_beside_all_patches_changes_nothing(kind, size):
    image_processor, (height, width) = PROCESSORS[kind], SIZES[size]
    black = np.zeros((height, width, 3), dtype=np.uint8)
    before = views(image_processor, black)
    for view, grid in enumerate(patch_grids(image_processor, CONFIG, height, width).values()):
        beside = np.full_like(black, 255)
        margin = 4 * max(grid.patch_width, grid.patch_height) / 7  # as far as bicubic interpolation reaches
        rows = slice(max(round(grid.top - margin), 0), max(round(grid.bottom + margin), 0))
        beside[rows, max(round(grid.left - margin), 0) : round(grid.right + margin)] = 0
        assert torch.equal(views(image_processor, beside)[view], before[view])


@pytest.mark.parametrize(
    "image_processor",
    [
        CLIPImageProcessor(size={"shortest_edge": 60}, crop_size=SQUARE),
        SiglipImageProcessor(size=SQUARE),
    ],
    ids=["clip", "siglip"],
)
@pytest.mark.parametrize("size", SIZES)
def test_other_image_processors(image_processor, size):
    height, width = SIZES[size]
    config = tiny_config(
        vision_image_size=56, spatial_vision_config=None, feature_fusion_config={"fusion_type": "none"}
    )
    black = np.zeros((height, width, 3), dtype=np.uint8)
    [(name, grid)] = patch_grids(image_processor, config, height, width).items()
    assert name == "vision"
    before = views(image_processor, black)[0]
    for place in [(0, 0), (3, 4), (7, 7)]:
        assert changed_patches(before, views(image_processor, painted(black, grid.rectangle(*place)))[0]) == [place]


def test_an_image_processor_that_pads_is_refused():
    image_processor = SiglipImageProcessor(size=SQUARE)
    image_processor.do_pad = True
    with pytest.raises(ValueError, match="`do_pad`"):
        patch_grids(image_processor, tiny_config(), 50, 50)


GRID = PatchGrid(rows=3, columns=4, left=10, top=-5, patch_width=20, patch_height=5)


def test_points_and_patches():
    assert GRID.rectangle(2, 3) == (70, 5, 90, 10)
    for place in [(0, 0), (1, 3), (2, 2)]:
        left, top, right, bottom = GRID.rectangle(*place)
        assert GRID.patch_at(left, top) == GRID.patch_at(right - 0.1, bottom - 0.1) == place
    coarse = GRID.coarser(1, 2)
    assert (coarse.rows, coarse.columns) == (1, 2)
    assert coarse.rectangle(0, 1) == (50, -5, 90, 10)


@pytest.mark.parametrize("place", [(-1, 0), (3, 0), (0, 4)])
def test_a_patch_outside(place):
    with pytest.raises(
        ValueError, match=f"row {place[0]}, column {place[1]}: rows go from 0 to 2, columns from 0 to 3"
    ):
        GRID.rectangle(*place)


@pytest.mark.parametrize("point", [(9, 0), (90, 0), (50, -6), (50, 10)])
def test_a_point_outside(point):
    with pytest.raises(
        ValueError, match=rf"\({point[0]}, {point[1]}\): patches cover x from 10 to 90, y from -5 to 10"
    ):
        GRID.patch_at(*point)
