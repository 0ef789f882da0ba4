"""Writes the whole checkpoint: config files, tokenizers, weights, decoys, and a record of them all.

The record, `miniature.json`, lists every file with its hash, and how the weights came about. By it
the command knows a miniature that it made and that nobody changed since, and it replaces nothing else;
by it a training finds the damaged part of a checkpoint that it would start from.
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

from miniature.configs import MODEL_INDEX, MODELS, SCHEDULER
from miniature.decoys import write_decoys
from mmdit.errors import CheckpointError

RECORD = "miniature.json"
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
SHARDED = ("text_encoder_3", "transformer")


def write_checkpoint(
    folder: Path, states: dict[str, dict[str, Tensor]], tokenizers: Path, training: dict[str, Any]
) -> int:
    """Write a miniature with these weights into `folder` and return its size in bytes.

    `states` has the tensors of each of MODELS, which become FP16; `tokenizers` holds the folders of
    TOKENIZERS; `training` goes into the record. The checkpoint is made beside the folder and renamed
    when it is whole. Raises CheckpointError, and changes nothing, when anything but an empty folder or
    an unchanged miniature lies there.
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
        _write_parts(made, states, tokenizers)
        write_record(made, training=training)
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        if folder.exists():
            _check_replaceable(folder)  # again: making the new one took seconds
            os.rename(folder, replaced)
        try:
            os.rename(made, folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder} could not be put in place ({error.strerror}): run the command again, alone"
            ) from None
    finally:
        if replaced.exists() and not folder.exists():
            os.rename(replaced, folder)
        shutil.rmtree(workplace, ignore_errors=True)
    return size


def check_whole(folder: Path) -> dict[str, Any]:
    """What the record in `folder` says besides its files' hashes.

    Raises CheckpointError when there is no record, or names a file that is not as it was made.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        recorded = dict(record.pop("files"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder} is not a miniature made by this command") from None
    found = _hashes(folder)
    changed = sorted(name for name in {*recorded, *found} if recorded.get(name) != found.get(name))
    if changed:
        more = f" and {len(changed) - 1} more files" if len(changed) > 1 else ""
        raise CheckpointError(f"{folder} was changed after it was made ({changed[0]}{more})")
    return record


def write_record(folder: Path, **facts: Any) -> None:
    """Write the record of everything that lies in `folder` now, and of `facts`."""
    _write_json(folder / RECORD, {"made_by": "python -m miniature", **facts, "files": _hashes(folder)})


def _check_replaceable(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    try:
        check_whole(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{error}: move it away or choose another --output") from None


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / RECORD
    }


def _write_parts(folder: Path, states: dict[str, dict[str, Tensor]], tokenizers: Path) -> None:
    _write_json(folder / "model_index.json", MODEL_INDEX)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler/scheduler_config.json", SCHEDULER)
    for name in TOKENIZERS:
        shutil.copytree(tokenizers / name, folder / name)
    for part, config in MODELS.items():
        (folder / part).mkdir()
        _write_json(folder / part / "config.json", config)
        # T5's second name for shared.weight is not in the files.
        kept = {k: v for k, v in states[part].items() if k != "encoder.embed_tokens.weight"}
        _write_weights(folder / part, {k: v.detach().half().contiguous() for k, v in kept.items()})
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
