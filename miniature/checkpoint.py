"""Writes the whole checkpoint: config files, tokenizers, weights, decoys, and a record of them all.

The record, `miniature.json`, lists every file with its hash. By it the command knows a miniature
that it made and that nobody changed since, and it replaces nothing else.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from miniature.captions import captions
from miniature.clip_vocabulary import write_clip_tokenizers
from miniature.configs import MODEL_INDEX, MODELS, SCHEDULER
from miniature.decoys import write_decoys
from miniature.t5_vocabulary import write_t5_tokenizer
from miniature.weights import state_dict
from mmdit.errors import CheckpointError

RECORD = "miniature.json"
SHARDED = ("text_encoder_3", "transformer")


def write_checkpoint(folder: Path, *, seed: int = 0) -> int:
    """Write the miniature into `folder` and return its size in bytes.

    It is made beside the folder and renamed when it is whole. Raises CheckpointError, and changes
    nothing, when anything but an empty folder or an unchanged miniature lies there.
    """
    folder = folder.resolve()
    _check_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}): choose another --output"
        ) from None
    try:
        made, replaced = workplace / "made", workplace / "replaced"
        made.mkdir()
        _write_parts(made, seed)
        record = {"made_by": "python -m miniature", "seed": seed, "files": _hashes(made)}
        _write_json(made / RECORD, record)
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        if folder.exists():
            _check_replaceable(folder)  # again: making the new one took seconds
            os.rename(folder, replaced)
        try:
            os.rename(made, folder)
        except OSError as error:
            if replaced.exists() and not folder.exists():
                os.rename(replaced, folder)
            raise CheckpointError(
                f"{folder} could not be put in place ({error.strerror}): run the command again, alone"
            ) from None
    finally:
        shutil.rmtree(workplace, ignore_errors=True)
    return size


def _check_replaceable(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        recorded = dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(
            f"{folder} is not a miniature made by this command: move it away or choose another --output"
        ) from None
    found = _hashes(folder)
    changed = sorted(name for name in {*recorded, *found} if recorded.get(name) != found.get(name))
    if changed:
        more = f" and {len(changed) - 1} more files" if len(changed) > 1 else ""
        raise CheckpointError(
            f"{folder} was changed after it was made ({changed[0]}{more}): "
            "move it away or choose another --output"
        )


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / RECORD
    }


def _write_parts(folder: Path, seed: int) -> None:
    _write_json(folder / "model_index.json", MODEL_INDEX)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
    sentences = captions()
    write_clip_tokenizers(folder, sentences)
    write_t5_tokenizer(folder, sentences)
    for part, config in MODELS.items():
        (folder / part).mkdir()
        _write_json(folder / part / "config.json", config)
        _write_weights(folder / part, state_dict(part, seed))
    write_decoys(folder)


def _write_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    part = folder.name
    stem = "diffusion_pytorch_model" if part in ("transformer", "vae") else "model"
    metadata = {"format": "pt"}
    if part not in SHARDED:
        save_file(tensors, folder / f"{stem}.safetensors", metadata=metadata)
        return
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: tuple[dict[str, Tensor], ...] = ({}, {})
    written = 0
    for name, tensor in tensors.items():
        shards[2 * written >= total][name] = tensor
        written += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        path = folder / f"{stem}-0000{number}-of-00002.safetensors"
        save_file(shard, path, metadata=metadata)
        weight_map.update(dict.fromkeys(shard, path.name))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
