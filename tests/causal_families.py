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
    **dict.fromkeys(["feed_forward_size", "ffn_hidden_size", "dim_ff", "dff", "d_inner", "dense_intermediate_size"], 48),
    **dict.fromkeys(["intermediate_size_mlp", "prefix_dense_intermediate_size", "block_multiple_of"], 48),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["shared_intermediate_size", "shared_experts_intermediate_size"], 16),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "embedding_dim", "router_hidden_size"], 32),
    **dict.fromkeys(["num_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"], 4),
    **dict.fromkeys(["num_heads", "n_heads", "mamba_n_heads", "mamba_num_heads", "n_mamba_heads"], 4),
    **dict.fromkeys(["linear_num_heads", "linear_num_value_heads", "index_n_heads"], 4),
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
    "num_hidden_layers": 3,
    "encoder_layers": 1,
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
    "mlp_multipliers": [0.7, 1.3],
    "ssm_multipliers": [0.7, 0.8, 0.9, 1.1, 1.2],
}

LISTS_OF_LAYERS = ("layer_types", "layers_block_type", "mlp_layer_types")

# What the rules above do not get right.
OWN = {
}

# Families without a tiny configuration, and why.
IMPOSSIBLE = {
}


def causal_families() -> list[str]:
    """The model types of all causal language models of the installed transformers."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING))


def tiny_text_config(model_type: str) -> PreTrainedConfig:
    if model_type in IMPOSSIBLE:
        raise ValueError(f"{model_type!r} has no tiny configuration: {IMPOSSIBLE[model_type]}")
    return tiny(CONFIG_MAPPING[model_type], model_type)


def tiny(config_class: type[PreTrainedConfig], model_type: str | None = None) -> PreTrainedConfig:
    own = OWN.get(model_type or config_class.model_type, {})
    default = config_class(**own.get("needed", {}))
    fields = {field.name for field in dataclasses.fields(config_class)}
    defaults = {name: getattr(default, name) for name in fields if name != "dtype"}
    kinds = {name: list(dict.fromkeys(defaults[name])) for name in LISTS_OF_LAYERS if defaults.get(name)}
    layers = own.get("num_hidden_layers", 4 if any(len(kind) > 1 for kind in kinds.values()) else 3)

    settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name, default in defaults.items():
        if isinstance(default, PreTrainedConfig):
            settings[name] = tiny(type(default))
        elif "drop" in name and isinstance(default, float) or name.endswith("jitter_noise"):
            settings[name] = 0.0
        elif name.endswith("_token_id") and name not in settings and isinstance(default, int):
            settings[name] = 3
    for name, value in SMALL.items():
        name = config_class.attribute_map.get(name, name)
        default = defaults.get(name)
        if isinstance(default, list):
            settings[name] = [value] * layers
        elif isinstance(default, int):
            settings[name] = min(default, value)  # where one head serves all, it stays one
    for name, value in NOT_NEUTRAL.items():
        if defaults.get(name) is not None or (name in fields and name == "final_logit_softcapping"):
            settings[name] = value
    if "qk_rope_head_dim" in fields:  # keys and values are made anew for every head
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings[config_class.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    for name, kind in kinds.items():
        if name == "mlp_layer_types":  # the dense ones come first
            settings[name] = (kind + kind[-1:] * layers)[:layers]
        else:  # layers that see all come last
            kind.sort(key=lambda one: one == "full_attention")
            settings[name] = [kind[(at - layers) % len(kind)] for at in range(layers)]
    own = {config_class.attribute_map.get(name, name): value for name, value in own.items() if name != "needed"}
    return config_class(**settings | own)


def randomise(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Add random numbers to all that is learned: biases and norms too, which would else be zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
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

    def equal(one: torch.Tensor, other: torch.Tensor) -> str:
        return "yes" if torch.equal(one, other) else "differs"

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

    one_row = {name: tensor[1:] for name, tensor in TEXT.items()}
    with torch.no_grad():
        columns.append(attempt(build))
        if model is not None:
            columns.append(attempt(forward))
            columns.append(attempt(spread))
            columns.append(attempt(lambda: equal(_greedy(model), _greedy(model, use_cache=False))))
            beams = {"num_beams": 3, "num_return_sequences": 2}
            columns.append(attempt(lambda: equal(_greedy(model, **beams), _greedy(model, use_cache=False, **beams))))
            columns.append(
                attempt(lambda: equal(_greedy(model), _greedy(model, cache_implementation="static")))
            )
            columns.append(
                attempt(lambda: equal(_greedy(model, one_row), _greedy(model, one_row, prompt_lookup_num_tokens=2)))
            )
    columns.append(f"{time.perf_counter() - start:.1f}")
    problems = "  ".join(f"[{number}] {problem}" for number, problem in enumerate(problems, 1))
    return " | ".join([f"{model_type:26}", *(f"{column:9}" for column in columns), problems])


LENGTH = 300  # of an error message in the table

if __name__ == "__main__":
    print("family | builds | forward | std over vocabulary/positions | cached | beams | static | lookup | seconds")
    for family in sys.argv[1:] or causal_families():
        print(_check(family), flush=True)
