"""What is measured: the geometry of SD3.5's MMDiTs, and the ways to run them in torch. Imports nothing."""

# From the models' published transformer/config.json.
SHARED: dict[str, object] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
GEOMETRIES: dict[str, dict[str, object]] = {
    "medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
    },
    "large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "dual_attention_layers": [],
    },
}
# What a CPU runs in milliseconds: to try a measurement's code, not to measure.
TOY: dict[str, object] = {
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "caption_projection_dim": 64,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "pos_embed_max_size": 16,
    "dual_attention_layers": [0],
}
MODELS = tuple(GEOMETRIES)
VARIANTS = ("eager-fp16", "eager-bf16", "eager-fp8", "compile-fp16", "compile-bf16", "compile-fp8")


def config_of(model: str, *, toy: bool = False) -> dict[str, object]:
    """The arguments of diffusers' SD3Transformer2DModel for "medium" or "large"; `toy` keeps no width."""
    return SHARED | GEOMETRIES[model] | (TOY if toy else {})
