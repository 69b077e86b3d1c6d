"""A small model of every family, with what tells its family from the others: windows, caps, factors, angles."""

from __future__ import annotations

from typing import Any

LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7}
GEMMA = {**LLAMA_LIKE, **WINDOWED, "head_dim": 32, "query_pre_attn_scalar": 20}
OTHERS = ("num_key_value_heads",)
ALIKE = {name: value for name, value in LLAMA_LIKE.items() if name not in OTHERS}
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64, "n_inner": 96},
    "llama": {**LLAMA_LIKE, "attention_bias": True},
    "mistral": {**LLAMA_LIKE, "head_dim": 8, "sliding_window": 7},
    "qwen2": {**LLAMA_LIKE, **WINDOWED, "use_sliding_window": True},
    "qwen3": {**LLAMA_LIKE, "head_dim": 32, "tie_word_embeddings": True},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    "gemma3_text": GEMMA,
    "olmo2": LLAMA_LIKE,
    "smollm3": {**LLAMA_LIKE, "no_rope_layers": [1, 0]},
    "granite": {
        **LLAMA_LIKE,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
    },
    "phi3": {**LLAMA_LIKE, "sliding_window": 7, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "gpt_neox": ALIKE,
    "opt": {
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}
BART_LIKE: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 64,
    "scale_embedding": True,
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "bart": BART_LIKE,
    "marian": {**BART_LIKE, "decoder_vocab_size": 300, "scale_embedding": False},
    "pegasus": BART_LIKE,
    "mbart": BART_LIKE,
    "m2m_100": BART_LIKE,
    "t5": {
        "d_model": 64,
        "d_kv": 8,
        "d_ff": 96,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "relative_attention_num_buckets": 10,
        "relative_attention_max_distance": 12,
    },
}
T5_1_1: dict[str, Any] = {
    **ENCODER_DECODERS["t5"],
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
# Rotary angles of each kind, of heads of 16.
ANGLES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {
        "short_factor": [1.0 + place / 10 for place in range(8)],
        "long_factor": [2.0 + place for place in range(8)],
        "factor": 2.0,
        "original_max_position_embeddings": 32,
    },
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
# What llama.cpp takes of each: the windows, scales and patterns that it computes with.
IN_LLAMA_CPP: dict[str, dict[str, Any]] = {
    **{name: DECODERS[name] for name in ("llama", "qwen3", "olmo2", "granite", "gpt_neox")},
    "gpt2": DECODERS["gpt2"],
    "mistral": {**DECODERS["mistral"], "sliding_window": None},
    "qwen2": LLAMA_LIKE,
    "gemma2": {**DECODERS["gemma2"], "query_pre_attn_scalar": 32},
    "gemma3_text": {
        **DECODERS["gemma3_text"],
        "query_pre_attn_scalar": 32,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
    "smollm3": {**DECODERS["smollm3"], "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "phi3": {**DECODERS["phi3"], "sliding_window": None},
}
