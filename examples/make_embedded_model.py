# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""Write the embedded model's folder as it is before training: small encoders, a small decoder, random weights.

    python examples/make_embedded_model.py --output_dir embedded-start

Its tokenizer is a byte-level BPE that has the words of the scene world and spells all others.
"""

import argparse
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import AutoModel, Dinov2Model, GenerationConfig, PreTrainedTokenizerFast, SiglipVisionModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from transformers_aurea import (
    AureaConfig,
    AureaForConditionalGeneration,
    AureaImageProcessor,
    AureaProcessor,
    embedded_model_path,
)
from transformers_aurea.cli.errors import errors_in_one_line
from transformers_aurea.fusion_aurea import FUSIONS
from transformers_aurea.scenes import IMAGE_SIZE, VOCABULARY


SPECIAL_TOKENS = ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|image|>")

# The published prompt without its system message.
CHAT_TEMPLATE = """
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- elif content is not none -%}
        {%- for part in content -%}
            {%- if part['type'] not in ('image', 'image_url', 'text') -%}
                {{- raise_exception("Contents are text and image, not " ~ part['type']) -}}
            {%- endif -%}
            {{- part['text'] or '' if part['type'] == 'text' else '<|image|>' -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message['role'] not in ('system', 'user', 'assistant') -%}
        {{- raise_exception("Roles are system, user and assistant, not " ~ message['role']) -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- render(message['content']) + '<|end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- render(message['content']) + '<|end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # a word is one token wherever it stands
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # more than its words need
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(VOCABULARY, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<|image|>"},
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def siglip(width: int) -> dict:
    return {
        "model_type": "siglip_vision_model",
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": 3,
        "num_attention_heads": width // 32,
        "vision_use_head": False,
    }


def resnet(width: int) -> dict:
    """Learns shapes sooner than a small transformer: classifying single objects from the largest of its features, it
    was right in 92 % after 300 steps of 32 pictures, a DINOv2 of this width in 30 % after 400."""
    return {
        "model_type": "resnet",
        "layer_type": "basic",
        "embedding_size": width // 2,
        "hidden_sizes": [width // 2, width],
        "depths": [1, 2],
    }


def dinov2(width: int) -> dict:
    return {
        "model_type": "dinov2",
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "hidden_size": width,
        "num_hidden_layers": 3,
        "num_attention_heads": width // 32,
        "layerscale_value": 0.3,
    }


SPATIAL_ENCODERS = {"resnet": resnet, "dinov2": dinov2}


def view_of(encoder: str) -> dict:
    """How an image processor makes what an encoder sees, of its only view."""
    view = {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    if encoder in SPATIAL_ENCODERS:
        view |= {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    return view


def make_config(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> AureaConfig:
    # About 1/√width. The usual 0.02 suits a width of 2500: here every projection would shrink what it is given.
    initializer_range = 0.08
    composition = {"composition_type": args.composition_type, "num_composition_layers": 3, "num_attention_heads": 4}
    return AureaConfig(
        vision_config=siglip(args.width),
        spatial_vision_config=SPATIAL_ENCODERS[args.spatial_vision](args.spatial_width or args.width),
        spatial_vision_image_size=IMAGE_SIZE,
        # Tokens are as wide as of two encoders even if there is one.
        feature_fusion_config={
            "fusion_type": args.fusion_type,
            "encoder": args.encoder,
            "radius": 3,
            "depth": 1,
            "output_dim": 2 * args.width,
        },
        composition_config=composition if args.composition_type else None,
        connector_type=args.connector_type,
        text_config={
            "model_type": "phi3",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 1024,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": True,
            "initializer_range": initializer_range,
        },
        initializer_range=initializer_range,
        projector_hidden_size=256,
        update_batch_norms=True,  # the spatial encoder's, which begin with no statistics
        image_token_id=tokenizer.convert_tokens_to_ids("<|image|>"),
    )


def make_processor(config: AureaConfig, tokenizer: PreTrainedTokenizerFast) -> AureaProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    views = {"size": size, "spatial_size": size, "spatial_crop_size": None}
    if len(config.encoder_configs) == 1:
        views = view_of("resnet" if config.vision_config is None else "siglip") | {"do_spatial_view": False}
    return AureaProcessor(
        AureaImageProcessor(**views),
        tokenizer,
        chat_template=CHAT_TEMPLATE,
        image_seq_length=config.placeholders_per_image,
    )


def make_generation_config(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=48,
        suppress_tokens=[tokenizer.convert_tokens_to_ids("<|image|>")],  # a picture is shown, not said
    )


def grid_waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of the column, then of the row, of each of side × side patches: (side², width)."""
    place = (torch.arange(side) + 0.5) / side
    turns = 0.25 * 16 ** torch.linspace(0, 1, width // 4)  # from a quarter of a period per picture to four
    angles = 2 * math.pi * place[:, None] * turns
    waves = torch.cat((angles.sin(), angles.cos()), dim=1)
    return torch.cat((waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)), dim=1)


@torch.no_grad()
def let_patches_differ(encoder: nn.Module | None):
    """Transformers start with what a patch shows and where it lies, and little of what all have in common.

    As they start otherwise, attention hands each patch mostly the mean of all, and such an encoder was seen to end
    up with nearly the same features for every patch of every picture. From random position embeddings what is above
    what was learned late and badly: places start as waves over the picture, as in MAE
    (https://arxiv.org/abs/2111.06377).
    """
    if isinstance(encoder, SiglipVisionModel):
        positions = encoder.embeddings.position_embedding.weight
        for layer in encoder.encoder.layers:
            layer.self_attn.out_proj.weight.mul_(0.3)
            layer.mlp.fc2.weight.mul_(0.3)
    elif isinstance(encoder, Dinov2Model):
        positions = encoder.embeddings.position_embeddings[0, 1:]  # the first is the class token's
    else:
        return
    positions.copy_(0.5 * grid_waves(math.isqrt(len(positions)), positions.shape[1]))


@torch.no_grad()
def begin_with_parts(model: AureaForConditionalGeneration, folders: dict[str, Path]):
    """Encoders from these folders, by their names in the model, and the language model of the embedded model."""
    parts = {name: AutoModel.from_pretrained(folder).state_dict() for name, folder in folders.items()}
    embedded = AureaForConditionalGeneration.from_pretrained(embedded_model_path()).model.language_model.state_dict()
    parts["language_model"] = {name: tensor for name, tensor in embedded.items() if "cross_attention" not in name}
    for name, weights in parts.items():
        part = model.model.get_submodule(name)
        known = part.state_dict()
        if missing := [key for key in known if key not in weights and "cross_attention" not in key]:
            raise ValueError(f"The pretrained {name} lacks {missing[:5]}.")
        part.load_state_dict({key: tensor for key, tensor in weights.items() if key in known}, strict=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--width", type=int, default=64, help="of the encoders, a multiple of 32 (default: 64)")
    parser.add_argument("--spatial_vision", default="resnet", choices=tuple(SPATIAL_ENCODERS))
    parser.add_argument("--spatial_width", type=int, help="of the spatial encoder, if it differs")
    parser.add_argument("--fusion_type", default="spatial_range", choices=tuple(FUSIONS))
    parser.add_argument(
        "--encoder", default="vision", choices=("vision", "spatial_vision"), help='that of the fusion "none"'
    )
    parser.add_argument("--composition_type", choices=("cross_attention", "gated_attention", "simple_add"))
    parser.add_argument("--connector_type", default="cross_attention", choices=("cross_attention", "prefix", "both"))
    parser.add_argument(
        "--encoders_dir",
        type=Path,
        help="encoders of pretrain_encoders.py to begin with, and with the embedded model's language model",
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in ("width", "spatial_width"):
        width = getattr(args, name)
        if width is not None and (width < 32 or width % 32):
            parser.error(f"--{name} must be a multiple of 32, the channels of an attention head, not {width}")

    tokenizer = make_tokenizer()
    config = make_config(args, tokenizer)
    torch.manual_seed(args.seed)
    model = AureaForConditionalGeneration(config)
    if args.encoders_dir is None:
        for encoder in (model.model.vision_model, model.model.spatial_vision_model):
            let_patches_differ(encoder)
    else:
        spatial = args.spatial_vision + (f":{args.spatial_width}" if args.spatial_width else "")
        names = {"vision_model": "siglip", "spatial_vision_model": spatial}
        folders = {name: args.encoders_dir / encoder for name, encoder in names.items() if getattr(model.model, name)}
        begin_with_parts(model, folders)
    model.generation_config = make_generation_config(tokenizer)
    model.save_pretrained(args.output_dir)
    make_processor(config, tokenizer).save_pretrained(args.output_dir)
    print(f"{args.output_dir}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    errors_in_one_line()
    main()
