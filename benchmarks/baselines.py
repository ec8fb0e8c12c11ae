# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""What spatial-range attention is compared with: the published formulation, a reference, FlexAttention and NATTEN.

The published formulation pads by reflection, unfolds every neighbourhood into (B, C, K, H, W), once for the guidance
and once for the values, and sums with einsum. FlexAttention and NATTEN look at the same window, but cut or shift it at
the borders, and give no weights that a network could correct before the sum: their speed alone can be compared.
"""

import math

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


# ---- the published formulation, maps of (B, C, H, W) ----


def to_maps(tensor):
    return tensor.permute(0, 3, 1, 2).contiguous() if tensor.ndim == 4 else tensor


def to_tokens(tensor):
    return tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor


def published_unfold(maps, radius):
    batch, channels, height, width = maps.shape
    padded = F.pad(maps, [radius] * 4, mode="reflect")
    return F.unfold(padded, 2 * radius + 1).view(batch, channels, -1, height, width)


def published_weights(proj, sigma, radius):
    similarities = torch.einsum("bchw,bcnhw->bnhw", proj, published_unfold(proj, radius)) / math.sqrt(proj.shape[1])
    u = torch.linspace(-1, 1, 2 * radius + 1, dtype=proj.dtype, device=proj.device)
    gaussian = torch.exp(-(u[:, None] ** 2 + u[None, :] ** 2) / (2 * sigma**2))
    return similarities.softmax(1) * gaussian.view(1, -1, 1, 1)


def published_aggregate(values, weights, radius):
    return torch.einsum("bnhw,bcnhw->bchw", weights, published_unfold(values, radius))


def published_op(guidance, sigma, source, radius):
    """Both halves. The weights are computed in float32 at least and summed with in the dtype of the source."""
    guidance = guidance.to(torch.promote_types(guidance.dtype, torch.float32))
    return published_aggregate(source, published_weights(guidance, sigma, radius).to(source.dtype), radius)


def published_projection(projection, maps):
    """1×1 convolution, LayerNorm over channels in the dtype of the maps, activation, 1×1 convolution."""
    maps = F.conv2d(maps, projection.fc1.weight[:, :, None, None], projection.fc1.bias)
    mean = maps.mean(1, keepdim=True)
    variance = (maps - mean).pow(2).mean(1, keepdim=True)
    maps = (maps - mean) / torch.sqrt(variance + projection.norm.eps)
    maps = projection.norm.weight[:, None, None] * maps + projection.norm.bias[:, None, None]
    return F.conv2d(projection.activation(maps), projection.fc2.weight[:, :, None, None], projection.fc2.bias)


def published_layer(layer, values, semantic):
    proj = published_projection(layer.range_proj, semantic)
    proj = proj.to(torch.promote_types(proj.dtype, torch.float32))
    weights = published_weights(proj, layer.sigma_spatial.squeeze(0), layer.radius).to(semantic.dtype)
    fixup = published_projection(layer.fixup_proj, torch.cat([weights, semantic], 1))
    weights = weights + weights * fixup.sigmoid()
    weights = weights / (weights.sum(1, keepdim=True) + 1e-7)
    return published_projection(layer.output_proj, published_aggregate(values, weights, layer.radius))


def published_fusion(fusion, semantic_features, spatial_features):
    semantic = fusion.semantic_proj(fusion.semantic_norm(semantic_features)).permute(0, 3, 1, 2)
    spatial = fusion.spatial_norm(spatial_features).permute(0, 3, 1, 2)
    semantic, spatial = semantic.contiguous(), spatial.contiguous()
    joint_values = torch.cat([spatial, semantic], 1)
    for layer in fusion.semantic_layers:
        semantic = published_layer(layer, spatial, semantic) + semantic
    joint = torch.cat([spatial, semantic], 1)
    for layer in fusion.joint_layers:
        joint = published_layer(layer, joint_values, joint) + joint
    return fusion.output_proj(joint.flatten(2).transpose(1, 2))


# ---- the reference: float64, by a loop over the neighbours, which needs no more memory than a few maps ----


def _neighbors(maps, radius, region):
    """The maps as seen from each neighbour in turn, at the rows and columns of a region."""
    rows, columns = region
    padded = F.pad(maps.double().permute(0, 3, 1, 2), [radius] * 4, mode="reflect").permute(0, 2, 3, 1)
    for dy in range(2 * radius + 1):
        for dx in range(2 * radius + 1):
            yield padded[:, rows.start + dy : rows.stop + dy, columns.start + dx : columns.stop + dx]


def whole(maps):
    return slice(0, maps.shape[1]), slice(0, maps.shape[2])


def reference_weights(guidance, sigma, radius, region=None):
    rows, columns = region = region or whole(guidance)
    center = guidance[:, rows, columns].double()
    similarities = torch.stack([(center * neighbor).sum(-1) for neighbor in _neighbors(guidance, radius, region)], -1)
    u = torch.linspace(-1, 1, 2 * radius + 1, dtype=torch.float64, device=guidance.device)
    gaussian = torch.exp(-(u[:, None] ** 2 + u[None, :] ** 2) / (2 * sigma.double() ** 2)).flatten()
    return (similarities / math.sqrt(guidance.shape[-1])).softmax(-1) * gaussian


def reference_aggregate(source, weights, radius, region=None):
    neighbors = _neighbors(source, radius, region or whole(source))
    return sum(weights[..., n, None] * neighbor for n, neighbor in enumerate(neighbors))


def reference_op(guidance, sigma, source, radius, region=None):
    return reference_aggregate(source, reference_weights(guidance, sigma, radius, region), radius, region)


# ---- other libraries' attention in the same window ----


def flex_op(radius):
    """FlexAttention with the Gaussian as a bias, σ = 1. The window ends at the borders; keys are not reflected."""
    compiled = torch.compile(flex_attention, dynamic=False)
    masks = {}

    def op(guidance, sigma, source):
        _, height, width, _ = guidance.shape

        def offsets(query, key):
            return query // width - key // width, query % width - key % width

        def in_window(batch, head, query, key):
            dy, dx = offsets(query, key)
            return (dy.abs() <= radius) & (dx.abs() <= radius)

        def add_gaussian(score, batch, head, query, key):
            dy, dx = offsets(query, key)
            return score - (dy * dy + dx * dx) / (2 * radius**2)

        place = height, width, guidance.device
        if place not in masks:
            positions = height * width
            masks[place] = create_block_mask(in_window, None, None, positions, positions, device=guidance.device)
        query, value = (tensor.flatten(1, 2)[:, None] for tensor in (guidance, source))  # (B, 1, H·W, C)
        output = compiled(query, query, value, score_mod=add_gaussian, block_mask=masks[place])
        return output[:, 0].unflatten(1, (height, width))

    return op


def natten_op(radius, head_width=64):
    """NATTEN's neighbourhood attention, without the Gaussian. At the borders the window is shifted inside.

    It has no heads as wide as the maps: as many as fill them cost the same products, but as many softmaxes more.
    """
    from natten import na2d

    def op(guidance, sigma, source):
        # (B, H, W, C / width, width)
        guidance, source = (tensor.unflatten(-1, (-1, head_width)) for tensor in (guidance, source))
        return na2d(guidance, guidance, source, kernel_size=2 * radius + 1).flatten(-2)

    return op
