"""The miniature's config files, as the real repositories have them, with smaller sizes.

Layout and key names follow stabilityai/stable-diffusion-3.5-medium and -large. Whatever is not a
size (activations, norms, token ids, scaling factors, the scheduler) has the real value; README.md
says which of these could be checked. The weights and the tokenizers are made from these tables.
"""

from typing import Any

Config = dict[str, Any]

CLIP_VOCABULARY = 1536  # 512 byte symbols, 1022 merges, the two marks; really 49408
T5_PIECES = 580  # in spiece.model; really 32000
T5_EXTRA_IDS = 100
# More rows than the tokenizer has tokens: really 32128 for 32100, the next multiple of 128.
T5_ROWS = -(-(T5_PIECES + T5_EXTRA_IDS) // 128) * 128

MODEL_INDEX: Config = {
    "_class_name": "StableDiffusion3Pipeline",
    "_diffusers_version": "0.31.0",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}

SCHEDULER: Config = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "_diffusers_version": "0.29.0.dev0",
    "num_train_timesteps": 1000,
    "shift": 3.0,
}


def _clip(hidden: int, layers: int, heads: int, activation: str) -> Config:
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "attention_dropout": 0.0,
        # The ids of a different vocabulary, as in the real files. With eos_token_id 2 transformers
        # pools at the largest id of the prompt; hence the end mark must have the largest id of all.
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": activation,
        "hidden_size": hidden,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * hidden,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": hidden,
        "torch_dtype": "float16",
        "transformers_version": "4.41.2",
        "vocab_size": CLIP_VOCABULARY,
    }


TEXT_ENCODER = _clip(hidden=64, layers=3, heads=2, activation="quick_gelu")
TEXT_ENCODER_2 = _clip(hidden=96, layers=3, heads=3, activation="gelu")

TEXT_ENCODER_3: Config = {
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 512,
    "d_kv": 64,
    "d_model": 192,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 2,
    "num_heads": 3,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.41.2",
    "use_cache": True,
    "vocab_size": T5_ROWS,
}

TRANSFORMER: Config = {
    "_class_name": "SD3Transformer2DModel",
    "_diffusers_version": "0.31.0",
    "attention_head_dim": 64,
    "caption_projection_dim": 192,
    "dual_attention_layers": [0, 1],  # Medium's first 13 of 24 blocks
    "in_channels": 16,
    "joint_attention_dim": 192,
    "num_attention_heads": 3,
    "num_layers": 4,
    "out_channels": 16,
    "patch_size": 2,
    "pooled_projection_dim": TEXT_ENCODER["projection_dim"] + TEXT_ENCODER_2["projection_dim"],
    "pos_embed_max_size": 32,
    "qk_norm": "rms_norm",
    "sample_size": 16,
}

VAE: Config = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.31.0",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": 128,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}

MODELS: dict[str, Config] = {
    "text_encoder": TEXT_ENCODER,
    "text_encoder_2": TEXT_ENCODER_2,
    "text_encoder_3": TEXT_ENCODER_3,
    "transformer": TRANSFORMER,
    "vae": VAE,
}
