"""The tensors of a checkpoint's safetensors, read from their headers.

The format: eight bytes of header length, a JSON header, then the tensors' bytes
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colqwen3_retrievers.errors import CheckpointError
from colqwen3_retrievers.models.hub import HubFiles

_HEADER_LIMIT = 100 * 2**20  # the format's own bound


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """Location of one tensor.

    Attributes:
        name: its name in the file.
        file: the safetensors file.
        dtype: as the header spells it ("F16", "BF16", "F32", ...).
        shape: its shape.
        start: first byte, from the beginning of the file.
        end: one past its last byte.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class LocalFiles:
    """Files of a folder, read as :class:`~colqwen3_retrievers.models.hub.HubFiles` reads those of a hub model.

    Args:
        folder: of the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def size(self, file: str) -> int:
        """Return a file's size in bytes."""
        return (self._folder / file).stat().st_size

    def read(self, file: str, start: int, length: int) -> bytes:
        """Read a part of a file; fewer bytes where it ends before."""
        with (self._folder / file).open("rb") as stream:
            stream.seek(start)
            return stream.read(length)


def read_json(path: Path, model: str) -> dict[str, Any]:
    """Read a JSON object from a checkpoint's folder.

    Raises:
        CheckpointError: missing, unreadable, or not a JSON object; it names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise CheckpointError(f"{model}: no {path.name} in {path.parent}") from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{model}: {path.name} cannot be read: {exc}") from exc
    if not isinstance(value, dict):
        raise CheckpointError(f"{model}: {path.name} holds no JSON object")
    return value


def read_tensor_table(folder: Path, name: str, *, remote: HubFiles | None = None) -> dict[str, TensorRecord]:
    """Return the tensors of a checkpoint's safetensors, one file or shards.

    Args:
        folder: of the files, or of the index of the shards when the files are ``remote``.
        name: what to call the checkpoint in an error.
        remote: source of the files, if they are not in the folder.

    Returns:
        Each tensor's record by its name in the files.

    Raises:
        CheckpointError: no file, one truncated or missing, or the index and the shards disagree.
    """
    index = folder / "model.safetensors.index.json"
    promised: dict[str, str] = {}
    if index.exists():
        promised = read_json(index, name).get("weight_map", {})
        shards = sorted({str(shard) for shard in promised.values()}) if isinstance(promised, dict) else []
        if not shards or any(Path(shard).name != shard for shard in shards):
            raise CheckpointError(f"{name}: {index.name} names no shards, or shards outside the folder")
        files = [folder / shard for shard in shards]
    else:
        single = folder / "model.safetensors"
        files = [single] if single.exists() or remote is not None else sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" ({pickled[0]} is a pickle, which is never read: convert it)" if pickled else ""
        raise CheckpointError(f"{name}: no safetensors in {folder}{hint}")
    table: dict[str, TensorRecord] = {}
    for file in files:
        for record in _read_header(file, name, remote or LocalFiles(folder)):
            if record.name in table:
                raise CheckpointError(f"{name}: tensor {record.name} lies in two shards", unexpected=[record.name])
            table[record.name] = record
    missing = sorted(set(promised) - set(table))
    if missing:
        raise CheckpointError(f"{name}: {some_names(missing)} named in {index.name} but in no shard", missing=missing)
    return table


def _read_header(file: Path, name: str, files: LocalFiles | HubFiles) -> list[TensorRecord]:
    """Read a safetensors header: eight bytes of length, then JSON, then the tensors' bytes."""
    try:
        size = files.size(file.name)
        length = int.from_bytes(files.read(file.name, 0, 8), "little")
        if not 0 < length <= min(_HEADER_LIMIT, size - 8):
            raise CheckpointError(f"{name}: {file.name} is torn or not safetensors ({size:,} bytes)")
        header = json.loads(files.read(file.name, 8, length))
        records = [
            TensorRecord(
                tensor, file, item["dtype"], tuple(item["shape"]),
                8 + length + item["data_offsets"][0], 8 + length + item["data_offsets"][1],
            )
            for tensor, item in header.items() if tensor != "__metadata__"
        ]  # fmt: skip
    except FileNotFoundError as exc:
        raise CheckpointError(f"{name}: {file.name} is missing", missing=[file.name]) from exc
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as exc:
        raise CheckpointError(f"{name}: {file.name} has no readable safetensors header: {exc}") from exc
    for record in records:
        if (
            not all(isinstance(place, int) for place in (record.start, record.end))
            or not 8 < record.start <= record.end
        ):
            raise CheckpointError(f"{name}: {file.name} has impossible offsets for {record.name}")
        if record.end > size:
            raise CheckpointError(
                f"{name}: {file.name} is cut short: {record.name} ends at byte {record.end:,} of {size:,}"
            )
    return records


def some_names(names: Sequence[str], most: int = 5) -> str:
    """Return a list of names as text, shortened when it is long.

    >>> some_names(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
