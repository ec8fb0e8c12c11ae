# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""A tiny configuration of every causal language model of the installed transformers.

A configuration is the family's default one with its sizes taken from SMALL, its lists of layers cut so that each kind
of layer remains, its factors and caps moved away from values that do nothing, and at last what OWN says about it.
`python tests/causal_families.py [family ...]` prints which of them build and run, and how they generate.
"""

import dataclasses
import sys
import time

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


# Sizes, by any of the names they go by. A field that a family leaves at None keeps it: what it sizes is switched off.
SMALL = {
    **dict.fromkeys(["vocab_size", "decoder_vocab_size"], 99),
    **dict.fromkeys(["hidden_size", "embedding_size", "word_embed_proj_dim", "attention_hidden_size"], 32),
    **dict.fromkeys(["input_embedding_size", "output_embedding_size", "lru_width", "mamba_d_ssm"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"], 48),
    **dict.fromkeys(
        ["feed_forward_size", "ffn_hidden_size", "dim_ff", "dff", "d_inner", "dense_intermediate_size"], 48
    ),
    **dict.fromkeys(["intermediate_size_mlp", "prefix_dense_intermediate_size", "block_multiple_of"], 48),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["shared_intermediate_size", "shared_experts_intermediate_size"], 16),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "embedding_dim", "router_hidden_size"], 32),
    **dict.fromkeys(["num_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "num_decoder_attention_heads", "attention_heads"], 4),
    **dict.fromkeys(["num_heads", "n_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"], 4),
    **dict.fromkeys(["linear_num_heads", "linear_num_value_heads"], 4),
    "index_n_heads": 8,
    **dict.fromkeys(["num_key_value_heads", "swa_num_key_value_heads", "linear_num_key_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "swa_head_dim", "dim_head", "d_head", "attention_head_size", "kv_channels"], 8),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "mamba_headdim", "linear_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "attention_head_dim", "index_head_dim"], 8),
    **dict.fromkeys(["v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "q_lora_rank", "kv_lora_rank"], 8),
    **dict.fromkeys(["o_lora_rank", "gated_norm_rank", "adapter_rank", "laurel_rank", "loop_gate_rank", "d_rel"], 8),
    **dict.fromkeys(["state_size", "ssm_state_size", "mamba_d_state", "time_step_rank", "mamba_dt_rank"], 8),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size", "rel_extent"], 8),
    **dict.fromkeys(["n_groups", "mamba_n_groups", "mamba_ngroups", "n_group", "topk_group", "o_groups"], 2),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "zero_expert_num"], 2),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_window_size", "window_size"], 5),
    **dict.fromkeys(["attention_chunk_size", "index_topk"], 5),
    **dict.fromkeys(["max_position_embeddings", "max_target_positions", "max_seq_len", "context_length"], 512),
    **dict.fromkeys(["original_max_position_embeddings", "n_ctx"], 512),
    **dict.fromkeys(["index_block_size", "log_scaling_n_floor", "floor_scale", "local_attention_window_len"], 4),
    **dict.fromkeys(["index_topk_blocks", "n_layers_per_attn_res_block", "no_rope_layer_interval"], 2),
    "num_hidden_layers": 3,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "num_nextn_predict_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 99,
    # of pictures and sounds
    "image_size": 16,
    "patch_size": 8,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "num_blocks": 1,
    "mlp_dim": 48,
    "output_channels": 8,
    **dict.fromkeys(["ext_pw_out_channel", "depthwise_separable_out_channel", "nemo_conv_channels"], 32),
    "depth": 1,
}

# Factors and caps that would do nothing, or nothing to be seen, at their defaults.
NOT_NEUTRAL = {
    **dict.fromkeys(["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"], 2.0),
    **dict.fromkeys(["attn_logit_softcapping", "moe_router_logit_softcapping"], 2.0),
    **dict.fromkeys(["logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier"], 3.0),
    **dict.fromkeys(["embedding_multiplier", "embedding_scale", "scale_emb"], 2.0),
    **dict.fromkeys(["residual_multiplier", "key_multiplier", "attention_in_multiplier"], 0.7),
    **dict.fromkeys(["attention_out_multiplier", "ssm_in_multiplier", "ssm_out_multiplier"], 0.7),
    **dict.fromkeys(["full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor"], 2),
    **dict.fromkeys(["scale_embedding", "mup_enabled", "lm_head_bias"], True),
    "attention_multiplier": 0.5,
    "query_pre_attn_scalar": 16,
    "logit_scale": 0.3,
    "dim_model_base": 16,
    "interleave_moe_layer_step": 2,
    "mlp_only_layers": [0],
    "mlp_multipliers": [0.7, 1.3],
    "ssm_multipliers": [0.7, 0.8, 0.9, 1.1, 1.2],
}

LISTS_OF_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types")

# What the rules above do not get right.
WINDOWS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
CONVOLUTIONS = {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2}
PADDED_VOCABULARY = {"vocab_size": 112, "unpadded_vocab_size": 99}
OWN = {
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], "mamba_n_heads": 8},
    "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "blt": {
        "num_hidden_layers": 3,
        "encoder_hash_byte_group_vocab": 50,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
        "global_config": {"hidden_size": 64},
        "patcher_config": {"head_dim": 8},
    },
    "cohere_compass_text": {
        **WINDOWS,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
        "logit_scale": 0.3,
    },
    "cohere2_moe": {"prefix_dense_intermediate_size": 48},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 2.0}, "ffn_config": {"moe_top_k": 2}},
    "deepseek_v2": {
        "num_experts_per_tok": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {
        **WINDOWS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_text": {
        "swa_num_attention_heads": 2,
        "swa_num_key_value_heads": 2,
        "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "gemma3n_text": {"num_kv_shared_layers": 2},
    "gemma4_text": {"global_head_dim": 16, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]], "intermediate_size": 48},
    "granitemoehybrid": {
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mamba_n_heads": 8,
    },
    "hrm_text": {"num_hidden_layers": 1, "L_cycles": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "inkling2_loop_text": {
        **PADDED_VOCABULARY,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
    },
    "inkling2_text": PADDED_VOCABULARY,
    "inkling_text": PADDED_VOCABULARY,
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 4, "attn_layer_offset": 2},
    "laguna": {**WINDOWS, "sliding_window": 5},
    "lfm2": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS,
    "longcat_flash": {"num_layers": 2},
    "mamba2": {"num_heads": 8},
    "mellum": WINDOWS,
    "minimax_m3_vl_text": {"layer_types": ["minimax_m3_sparse", "full_attention"] * 2},
    "mllama_text_model": {"cross_attention_layers": [1]},
    "moshi": {"sliding_window": 512},  # its cache forgets, but its mask does not
    "mpt": {"use_cache": True},
    "prophetnet": {"num_encoder_layers": 3, "num_decoder_layers": 3},
    "qwen4_exp_text": {
        "ple_layer_ids": [1],
        "ple_embed_dim": 16,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "reformer": {  # texts of more than a chunk cannot be generated with buckets
        "attn_layers": ["local", "lsh"] * 2,
        "local_attn_chunk_length": 32,
        "lsh_attn_chunk_length": 32,
        "axial_pos_embds": False,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 16,
        "pronunciation_vocab_size": 99,
        "shape_embed_dim": 16,
        "shape_vocab_size": 99,
    },
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_blocks": 3, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
}

# Families without a tiny configuration, and why.
IMPOSSIBLE = {
    "gemma3n": "its model is built around a tower of the package timm",
    "gemma4_assistant": "it reads the keys and values of another model",
    "gemma4_unified_assistant": "it reads the keys and values of another model",
    "musicgen": "its causal model is built from the decoder's part of its configuration only",
    "musicgen_melody": "its causal model is built from the decoder's part of its configuration only",
}


def causal_families() -> list[str]:
    """The model types of all causal language models of the installed transformers."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING) - {"aurea"})


def tiny_text_config(model_type: str) -> PreTrainedConfig:
    """A configuration of the family from which AutoModelForCausalLM builds a tiny model of two to four layers."""
    if model_type in IMPOSSIBLE:
        raise ValueError(f"{model_type!r} has no tiny configuration: {IMPOSSIBLE[model_type]}")
    return _tiny(CONFIG_MAPPING[model_type], OWN.get(model_type))


def _tiny(config_class: type[PreTrainedConfig], own: dict | None) -> PreTrainedConfig:
    def real(name: str) -> str:
        return config_class.attribute_map.get(name, name)

    if own is None:
        own = OWN.get(config_class.model_type, {})
    own = {real(name): value for name, value in own.items()}
    default = vars(config_class())
    defaults = {real(field.name): default.get(real(field.name)) for field in dataclasses.fields(config_class)}
    kinds = {name: list(dict.fromkeys(defaults[name])) for name in LISTS_OF_LAYERS if defaults.get(name)}
    if kinds.get("mlp_layer_types") == ["sparse"]:
        kinds["mlp_layer_types"] = ["dense", "sparse"]
    layers = 4 if any(len(kind) > 1 for kind in kinds.values()) else 3
    layers = own.get(real("num_hidden_layers"), layers)

    settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name, default in defaults.items():
        if isinstance(default, PreTrainedConfig):
            settings[name] = _tiny(type(default), own.pop(name, None))
        elif ("drop" in name and isinstance(default, float)) or name.endswith("jitter_noise"):
            settings[name] = 0.0
        elif name.endswith("_token_id") and name not in settings and isinstance(default, int):
            settings[name] = 3
    for name, value in SMALL.items():
        name, default = real(name), defaults.get(real(name))
        if isinstance(default, list):
            settings[name] = [value] * layers
        elif isinstance(default, int):
            settings[name] = min(default, value)  # where one head serves all, it stays one
        elif name in defaults and name in ("head_dim", "num_key_value_heads"):
            settings[name] = value
    for name, value in NOT_NEUTRAL.items():
        if defaults.get(name) is not None or (name in defaults and name == "final_logit_softcapping"):
            settings[name] = value
    if "is_decoder" in defaults:
        settings["is_decoder"] = True
    if "qk_rope_head_dim" in defaults:  # keys and values are made anew for every head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    if real("num_hidden_layers") in defaults:
        settings[real("num_hidden_layers")] = layers
    for name, kind in kinds.items():
        if name == "mlp_layer_types":  # the dense ones come first
            settings[name] = (kind + kind[-1:] * layers)[:layers]
        else:  # those that see all come last
            kind.sort(key=lambda one: one == "full_attention")
            settings[name] = [kind[(at - layers) % len(kind)] for at in range(layers)]
    return config_class(**settings | own)


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Add random numbers to all that is learned: biases and norms too, which would else be zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    learned = {id(tensor): (name, tensor) for name, tensor in sorted(model.state_dict(keep_vars=True).items())}
    for name, tensor in learned.values():  # a tied one once
        fixed = not isinstance(tensor, nn.Parameter) and ("inv_freq" in name or "rotary" in name)
        if tensor.is_floating_point() and not fixed:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            tensor.data.add_(noise.to(tensor.dtype), alpha=0.15)
    return model


def _text() -> dict[str, torch.Tensor]:
    input_ids = torch.randint(3, 91, (2, 9), generator=torch.Generator().manual_seed(1))
    attention_mask = torch.ones_like(input_ids)
    input_ids[0, :3] = attention_mask[0, :3] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


# Two rows of tokens, the first of them padded on the left.
TEXT = _text()


def _greedy(model: PreTrainedModel, inputs: dict = TEXT, **settings) -> torch.Tensor:
    settings = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, **settings}
    return model.generate(**inputs, **settings)


def _check(model_type: str) -> str:
    """One line of the table: what the bare model of the family builds, computes and generates."""

    def attempt(function) -> str:
        try:
            return function()
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            problems.append(f"{text[:LENGTH]!r}")
            return f"[{len(problems)}]"

    problems, columns, start = [], [], time.perf_counter()
    model = None

    def build() -> str:
        nonlocal model
        torch.manual_seed(0)
        began = time.perf_counter()
        model = AutoModelForCausalLM.from_config(tiny_text_config(model_type)).eval()
        size = sum(parameter.numel() for parameter in model.parameters())
        assert size < 1e6, f"{size} parameters"
        randomise(model)
        return f"{time.perf_counter() - began:.1f}s {size // 1000}k"

    def forward() -> str:
        logits = model(**TEXT).logits
        return f"{'finite' if logits[TEXT['attention_mask'].bool()].isfinite().all() else 'NOT FINITE'}"

    def spread() -> str:
        logits = model(**TEXT).logits
        return f"{logits[1].std(-1).mean():.2g}/{logits[1].std(0).mean():.2g}"

    def compare(settings: dict, others: dict) -> str:
        if torch.equal(_greedy(model, **settings), _greedy(model, **settings, **others)):
            return "yes"
        same = torch.equal(_greedy(model, row, **settings), _greedy(model, row, **settings, **others))
        return "unpadded" if same else "no"

    def lookup() -> str:
        return "yes" if torch.equal(_greedy(model, row), _greedy(model, row, prompt_lookup_num_tokens=2)) else "no"

    row = {name: tensor[1:] for name, tensor in TEXT.items()}
    beams = {"num_beams": 3, "num_return_sequences": 2}
    with torch.no_grad():
        columns.append(attempt(build))
        if model is not None:
            columns.append(attempt(forward))
            columns.append(attempt(spread))
            columns.append(attempt(lambda: compare({}, {"use_cache": False})))
            columns.append(attempt(lambda: compare(beams, {"use_cache": False})))
            columns.append(attempt(lambda: compare({}, {"cache_implementation": "static"})))
            columns.append(attempt(lookup))
    columns.append(f"{time.perf_counter() - start:.1f}")
    problems = "  ".join(f"[{number}] {problem}" for number, problem in enumerate(problems, 1))
    return " | ".join([f"{model_type:26}", *(f"{column:9}" for column in columns), problems])


LENGTH = 300  # of an error message in the table

if __name__ == "__main__":
    print("family | builds | forward | std over vocabulary/positions | cached | beams | static | lookup | seconds")
    for family in sys.argv[1:] or causal_families():
        print(_check(family), flush=True)
