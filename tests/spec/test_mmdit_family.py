"""Model families: read from config files alone, whatever the size of the checkpoint."""

import json
import re

import pytest

from mmdit.contract import components
from mmdit.errors import CheckpointError, ContractError
from mmdit.family import DEFAULTS, family_from_checkpoint
from mmdit.shapes import shape_set

# The sizes in the config files of the published checkpoints, by variant.
TRANSFORMERS = {
    "medium": {"num_layers": 24, "num_attention_heads": 24, "pos_embed_max_size": 384},
    "large": {"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192},
    "large-turbo": {"num_layers": 38, "num_attention_heads": 38, "pos_embed_max_size": 192},
}
NAMES = {variant: f"stable-diffusion-3.5-{variant}" for variant in TRANSFORMERS}
PARTS = {
    "text_encoder": {"hidden_size": 768, "projection_dim": 768, "max_position_embeddings": 77},
    "text_encoder_2": {"hidden_size": 1280, "projection_dim": 1280, "max_position_embeddings": 77},
    "text_encoder_3": {"d_model": 4096},
    "transformer": {
        "in_channels": 16,
        "joint_attention_dim": 4096,
        "patch_size": 2,
        "pooled_projection_dim": 2048,
        "sample_size": 128,
    },
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
    },
}


@pytest.fixture
def checkpoint(tmp_path):
    """Writes the config files of a variant, with changes to some; gives the folder."""

    def write(variant, name=None, **changes):
        folder = tmp_path / (name or NAMES[variant])
        configs = PARTS | {"transformer": PARTS["transformer"] | TRANSFORMERS[variant]}
        index = {"_class_name": "StableDiffusion3Pipeline"}
        for part, config in configs.items():
            (folder / part).mkdir(parents=True)
            config = config | changes.get(part, {})
            (folder / part / "config.json").write_text(json.dumps(config))
            index[part] = ["library", "Class"]
        for tokenizer in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            (folder / tokenizer).mkdir()
            index[tokenizer] = ["library", "Class"]
        scheduler = {
            "_class_name": "FlowMatchEulerDiscreteScheduler",
            "num_train_timesteps": 1000,
            "shift": 3.0,
        }
        (folder / "scheduler").mkdir()
        index["scheduler"] = ["library", "Class"]
        (folder / "scheduler/scheduler_config.json").write_text(
            json.dumps(scheduler | changes.get("scheduler", {}))
        )
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return write


@pytest.mark.parametrize("variant", TRANSFORMERS)
def test_a_published_checkpoint_is_known_by_its_configs(variant, checkpoint):
    """Variant and defaults from the layers and the name; everything else from the files."""
    family = family_from_checkpoint(checkpoint(variant))
    assert family.variant == variant
    assert family.name == NAMES[variant]
    assert (family.steps, family.guidance_scale) == DEFAULTS[variant]
    assert family.layers == TRANSFORMERS[variant]["num_layers"]
    assert family.max_latent == 2 * TRANSFORMERS[variant]["pos_embed_max_size"]
    assert family.default_size == 1024
    assert family.size_multiple == 16
    assert (family.vae_scaling_factor, family.vae_shift_factor, family.shift) == (1.5305, 0.0609, 3.0)


@pytest.mark.parametrize("variant", TRANSFORMERS)
def test_a_published_checkpoint_has_sd3s_tensors(variant, checkpoint):
    """The dims of SD3.5's tensors, with 77 + 256 tokens of context."""
    family = family_from_checkpoint(checkpoint(variant))
    table = components(family, shape_set(family))

    def dims(component):
        signature = table[component]
        return {tensor.name: tensor.dims for tensor in (*signature.inputs, *signature.outputs)}

    assert dims("clip_l") == {"input_ids": (77,), "hidden": (77, 768), "pooled": (768,)}
    assert dims("clip_g") == {"input_ids": (77,), "hidden": (77, 1280), "pooled": (1280,)}
    assert dims("t5") == {"input_ids": (256,), "hidden": (256, 4096)}
    assert dims("mmdit") == {
        "latent": (16, "h", "w"),
        "timestep": (1,),
        "context": (333, 4096),
        "pooled": (2048,),
        "velocity": (16, "h", "w"),
    }
    assert dims("vae_decoder") == {"latent": (16, "h", "w"), "image": (3, "H", "W")}


def test_turbo_is_known_by_its_name(checkpoint):
    """Its configs are Large's: only the name of the folder or of the hub id tells."""
    folder = checkpoint("large-turbo", name="snapshot")
    assert family_from_checkpoint(folder).variant == "large"
    assert family_from_checkpoint(folder, name=NAMES["large-turbo"]).variant == "large-turbo"


def test_turbo_is_known_by_the_name_in_its_config(checkpoint):
    """A copy in a folder of another name may still say where it came from."""
    origin = {"_name_or_path": "stabilityai/stable-diffusion-3.5-large-turbo"}
    assert family_from_checkpoint(checkpoint("large", "mine", transformer=origin)).variant == "large-turbo"


def test_a_given_variant_decides(checkpoint):
    """A fine-tune can be told what it is."""
    family = family_from_checkpoint(checkpoint("large"), variant="large-turbo")
    assert (family.variant, family.steps, family.guidance_scale) == ("large-turbo", 4, 1.0)


def test_an_unknown_variant_is_refused(checkpoint):
    """With the names that there are."""
    with pytest.raises(CheckpointError, match=r"'huge' is unknown.*medium, large"):
        family_from_checkpoint(checkpoint("large"), variant="huge")


def test_the_miniature_is_a_custom_family(miniature):
    """Its sizes are in no table."""
    family = family_from_checkpoint(miniature)
    assert (family.name, family.variant, family.layers) == ("miniature", "custom", 4)
    assert (family.context_dim, family.pooled_dim, family.default_size) == (192, 160, 128)
    assert family.context_tokens == 77 + 256


def test_t5s_length_is_the_callers(checkpoint):
    """It is one number of a repository, not of the checkpoint."""
    family = family_from_checkpoint(checkpoint("medium"), t5_tokens=512)
    assert (family.t5_tokens, family.context_tokens) == (512, 589)
    with pytest.raises(ContractError, match="513 T5 tokens .* 1 to 512"):
        family_from_checkpoint(checkpoint("large"), t5_tokens=513)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_encoder_3": {"d_model": 2048}}, "joint_attention_dim, but found 2048 and 4096"),
        ({"text_encoder": {"projection_dim": 512}}, "add up to pooled_projection_dim, but found 1792"),
        ({"text_encoder": {"hidden_size": 3072}}, "3072 + 1280 exceed the context's 4096"),
        ({"text_encoder_2": {"max_position_embeddings": 64}}, "CLIP-G must read 77 tokens, but found 64"),
        ({"vae": {"latent_channels": 4}}, "in_channels, but found 4 and 16"),
        ({"vae": {"block_out_channels": [128, 256, 512]}}, "must scale by 8, but found 4"),
        ({"scheduler": {"use_karras_sigmas": True}}, "['use_karras_sigmas'] is not served"),
        ({"scheduler": {"shift": None}}, "None where shift"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_parts_that_do_not_fit_together_are_refused(change, words, checkpoint):
    """Before gigabytes are traced; the message has both numbers."""
    with pytest.raises(CheckpointError, match=re.escape(words)):
        family_from_checkpoint(checkpoint("large", **change))


def test_a_family_does_not_change(miniature):
    """It travels through every stage and into every manifest."""
    family = family_from_checkpoint(miniature)
    with pytest.raises(ValueError, match="frozen"):
        family.steps = 1
    assert type(family).model_validate_json(family.model_dump_json()) == family
