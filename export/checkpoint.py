"""A checkpoint's folder: found locally or on the hub, with only the files that are needed, all whole."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open

from mmdit.artifact import fingerprint
from mmdit.errors import CheckpointError, first_line
from mmdit.family import PARTS, TOKENIZERS

MINIATURE = Path(__file__).resolve().parent.parent / "miniature" / "checkpoint"

# A real repository also holds single-file checkpoints, FP16 variants and the original encoders: twice
# the bytes, none of them read here.
_WANTED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"{part}/{name}" for part in PARTS.values() for name in ("config.json", "*.safetensors*")),
    *(f"{tokenizer}/*" for tokenizer in TOKENIZERS.values()),
]
_UNWANTED = ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*non_ema*"]


def checkpoint_folder(model: str) -> Path:
    """The local folder of "miniature", of a folder, or of a hub id (downloaded, with progress).

    Raises CheckpointError when the model is missing, gated, or out of reach, with the way out.
    """
    if model == "miniature":
        if not MINIATURE.is_dir():
            raise CheckpointError(
                "miniature/checkpoint is not there: restore it with `git checkout miniature/checkpoint`"
            )
        return MINIATURE
    if Path(model).is_dir():
        return Path(model)
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(
            f"MODEL={model} is neither a folder here nor a hub id such as "
            "stabilityai/stable-diffusion-3.5-large"
        )
    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError:
        raise CheckpointError(
            f"{model} is gated: accept its licence on its hub page, then run `hf auth login` (or set "
            "HF_TOKEN) and try again"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise CheckpointError(
            f"the hub has no {model} that you may read: check the name, or log in with `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{model} cannot be downloaded ({first_line(error)}): check the network, or give a local folder"
        ) from None


def checkpoint_files(folder: Path) -> dict[str, list[Path]]:
    """Component → the files that it is made from (config and weights), each present and whole.

    The key "pipeline" holds the index, the scheduler and the tokenizers. Raises CheckpointError naming
    a file that is missing or damaged.
    """
    files = {
        component: [folder / part / "config.json", *_weights(folder / part)]
        for component, part in PARTS.items()
    }
    files["pipeline"] = [
        folder / "model_index.json",
        folder / "scheduler/scheduler_config.json",
        *(
            path
            for tokenizer in TOKENIZERS.values()
            for path in sorted((folder / tokenizer).iterdir())
            if path.is_file() and not path.name.startswith(".")
        ),
    ]
    return files


def checkpoint_hashes(folder: Path) -> dict[str, dict[str, str]]:
    """Part → its files' SHA-256 by their path below `folder`. Raises CheckpointError."""
    return {part: fingerprint(paths, folder) for part, paths in checkpoint_files(folder).items()}


def _weights(part: Path) -> list[Path]:
    """The safetensors files of one part: a single file, or an index and its shards."""
    stem = "model" if part.name.startswith("text_encoder") else "diffusion_pytorch_model"
    single, index = part / f"{stem}.safetensors", part / f"{stem}.safetensors.index.json"
    if single.is_file():
        shards, files = [single], [single]
    elif index.is_file():
        try:
            names = set(json.loads(index.read_text())["weight_map"].values())
            shards = sorted(part / name for name in names)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} is damaged ({error}): download it again") from None
        files = [index, *shards]
    else:
        raise CheckpointError(
            f"{part} has no {single.name} (nor {index.name}): download it again, or convert the "
            "checkpoint with save_pretrained(safe_serialization=True)"
        )
    for shard in shards:
        try:
            with safe_open(shard, framework="numpy") as tensors:
                tensors.keys()
        except FileNotFoundError:
            raise CheckpointError(f"{shard} is missing, but {index.name} lists it") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is damaged or cut off ({error}): download it again") from None
    return files


def linears(checkpoint: Path) -> dict[str, tuple[int, int]]:
    """The transformer's linear layers by name, with (output, input) features, from the files' headers."""
    found = {}
    for shard in _weights(checkpoint / PARTS["mmdit"]):
        if shard.suffix == ".safetensors":
            with safe_open(shard, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  no mapping
                    shape = tensors.get_slice(name).get_shape()
                    if name.endswith(".weight") and len(shape) == 2:
                        found[name.removesuffix(".weight")] = (shape[0], shape[1])
    return dict(sorted(found.items()))
