# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Resize and crop in one, as exactly as one after the other, at the cost of what the crop keeps.

torch's 8-bit kernel, which has the published pixels, works in two passes, width first, with an 8-bit result between
them. The passes are done one by one here: the first over those rows alone that the second one reads, the second over
those that the crop keeps. Of pictures so long that the crop keeps a small part of a pass, torch's own arithmetic is
done on that part.
"""

import torch


# One pass handles at most about this many numbers at a time, so that a picture of 20000×10 stays cheap.
MAX_NUMBERS_PER_PASS = 2**26
# Beyond this length the table of interpolation weights alone takes hundreds of megabytes.
MAX_RESIZED_LENGTH = 2**22
# A pass whose result is longer than so many times what is kept is done on that part.
MAX_SURPLUS = 16

# Source pixels on either side that a new one reads, if none is skipped.
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}


def resize_and_crop(
    picture: torch.Tensor, size: tuple[int, int], crop_size: tuple[int, int] | None, mode: str | None
) -> torch.Tensor:
    """Resizes `(channels, height, width)`, uint8, to `size` and keeps the centre of `crop_size`, with zeros where it
    is short. Without a resize (`size` is the picture's own), pictures are of any type, and `mode` is None.

    The crop starts at `int(round((length - crop) / 2))`, Python's rounding half to even, as in torchvision.

    Raises:
        ValueError: a side would become longer than `MAX_RESIZED_LENGTH`.
    """
    crop_size = crop_size or size
    starts = [crop_start(length, crop) for length, crop in zip(size, crop_size)]
    (top, height), (left, width) = ((max(0, start), min(pair)) for start, *pair in zip(starts, size, crop_size))
    first, last = _read(picture.shape[-2], size[0], top, height, mode)
    num_parts = -(-picture.shape[0] * (last - first) * width // MAX_NUMBERS_PER_PASS)
    if num_parts <= 1 or mode not in _SUPPORT:
        is_whole = size[0] <= MAX_SURPLUS * height  # torch's own kernel is the faster one, if it may see all rows
        picture = _resize_rows(picture, size, (top, height), (left, width), mode, is_whole)
    else:
        rows = max(1, height // num_parts)
        parts = [(begin, min(rows, top + height - begin)) for begin in range(top, top + height, rows)]
        parts = [_resize_rows(picture, size, part, (left, width), mode, is_whole=False) for part in parts]
        picture = torch.cat(parts, dim=-2)
    before = [max(0, -start) for start in reversed(starts)]
    padding = [
        side
        for zeros, crop, kept in zip(before, reversed(crop_size), (width, height))
        for side in (zeros, crop - kept - zeros)
    ]
    return torch.nn.functional.pad(picture, padding) if any(padding) else picture


def _resize_rows(
    picture: torch.Tensor,
    size: tuple[int, int],
    rows: tuple[int, int],
    columns: tuple[int, int],
    mode: str | None,
    is_whole: bool,
) -> torch.Tensor:
    """Both passes for some rows and columns, first and number, of the resized picture."""
    height, width = picture.shape[-2:]
    first, last = (0, height) if is_whole and height != size[0] else _read(height, size[0], *rows, mode)
    picture = _resize_along(picture[:, first:last], -1, width, 0, size[1], *columns, mode)
    return _resize_along(picture, -2, height, first, size[0], *rows, mode)


def crop_start(length: int, crop: int) -> int:
    """The first entry that a centred crop keeps; below 0, so many zeros stand before the first."""
    return round((length - crop) / 2) if crop <= length else -((crop - length) // 2)


def _read(source: int, length: int, start: int, kept: int, mode: str | None) -> tuple[int, int]:
    """From where to where a pass from `source` to `length` pixels reads for those that are kept."""
    if source == length:
        return start, start + kept
    if mode not in _SUPPORT:
        return 0, source  # which of two pixels is the nearest differs from one of torch's kernels to the next
    scale = source / length
    reach = _SUPPORT[mode] * max(scale, 1.0) + 1
    return max(0, int(scale * start - reach)), min(source, int(scale * (start + kept) + reach) + 1)


def _resize_along(
    picture: torch.Tensor, dim: int, source: int, first: int, length: int, start: int, kept: int, mode: str | None
) -> torch.Tensor:
    """One pass: resizes along `dim` from `source` pixels, of which `picture` has those from `first` on, to `length`,
    and keeps `kept` from `start` on."""
    if source == length:
        return picture.narrow(dim, start - first, kept)
    if length > MAX_RESIZED_LENGTH:
        raise ValueError(
            f"resized, it would be {length} pixels long, more than {MAX_RESIZED_LENGTH}: its sides differ too much. "
            f"Crop it first, or give `size` or `spatial_size` as height and width"
        )
    if picture.shape[dim] < source or (length > MAX_SURPLUS * kept and mode in _SUPPORT):
        return _weigh(picture, dim, source, first, length, start, kept, mode)
    other = -3 - dim
    rows_per_part = max(1, MAX_NUMBERS_PER_PASS // (picture.shape[0] * max(length, source)))
    parts = [
        _interpolate(part, dim, length, mode).narrow(dim, start, kept).contiguous()  # or the whole would stay
        for part in picture.split(rows_per_part, dim=other)
    ]
    return torch.cat(parts, dim=other)


def _interpolate(picture: torch.Tensor, dim: int, length: int, mode: str) -> torch.Tensor:
    size = [length, picture.shape[-1]] if dim == -2 else [picture.shape[-2], length]
    if picture.stride() != (1, picture.shape[0] * picture.shape[2], picture.shape[0]) or 1 in picture.shape:
        # Of other strides, those of a side of length 1 included, torch's 8-bit kernel misreads some.
        picture = picture.clone(memory_format=torch.contiguous_format)
    return torch.nn.functional.interpolate(picture[None], size=size, mode=mode, antialias=mode in _SUPPORT)[0]


def _weigh(
    picture: torch.Tensor, dim: int, source: int, first: int, length: int, start: int, kept: int, mode: str
) -> torch.Tensor:
    """What `_interpolate` computes, of the kept entries alone: its integer weights, exactly summed as float64.

    As in ATen's `UpSampleKernel.cpp`, the weights of a pass are integers of as many bits as the largest of all of them
    leaves.
    """
    chunk = 2**16
    chunks = [(begin, min(chunk, length - begin)) for begin in range(0, length, chunk)]
    largest = max(float(_weights(source, length, *part, mode)[1].max()) for part in chunks)
    bits = next((bits for bits in range(22) if int(0.5 + largest * 2.0 ** (bits + 1)) >= 2**15), 22)
    picture, parts = picture.movedim(dim, 0), []
    block = max(1, 16 * length // max(length, source))  # more at a time would multiply more zeros
    for begin in range(start, start + kept, block):
        begins, weights = _weights(source, length, begin, min(block, start + kept - begin), mode)
        weights = (weights * 2.0**bits + weights.sign() * 0.5).trunc()
        low, high = int(begins[0]), min(source, int(begins[-1]) + weights.shape[1])
        table = torch.zeros(len(begins), high - low + weights.shape[1], dtype=torch.float64)
        table.scatter_(1, begins[:, None] - low + torch.arange(weights.shape[1]), weights)
        read = picture[low - first : high - first]
        sums = (table[:, : high - low] @ read.flatten(1).double()).long() + (1 << bits >> 1)
        parts.append((sums >> bits).clamp(0, 255).to(torch.uint8).unflatten(1, read.shape[1:]))
    return torch.cat(parts).movedim(0, dim)


def _weights(source: int, length: int, begin: int, number: int, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of so many new pixels from `begin` on: the first source pixel that each reads, and the weights `(number, taps)`
    of those from there on."""
    scale = source / length
    stretch = max(scale, 1.0)
    support = _SUPPORT[mode] * stretch
    centers = scale * (torch.arange(begin, begin + number, dtype=torch.float64) + 0.5)
    begins = (centers - support + 0.5).trunc().clamp(min=0)
    ends = (centers + support + 0.5).trunc().clamp(max=source)
    taps = torch.arange(int((ends - begins).max()), dtype=torch.float64)
    distances = ((taps + begins[:, None] - centers[:, None] + 0.5) / stretch).abs()
    if mode == "bilinear":
        weights = (1 - distances).clamp(min=0)
    else:  # Keys' cubic of a = -0.5
        near = (1.5 * distances - 2.5) * distances**2 + 1
        far = (((distances - 5) * distances + 8) * distances - 4) * -0.5
        weights = torch.where(distances < 1, near, torch.where(distances < 2, far, 0.0))
    weights = weights * (begins[:, None] + taps < ends[:, None])
    return begins.long(), weights / weights.sum(dim=1, keepdim=True)


__all__ = ["crop_start", "resize_and_crop"]
