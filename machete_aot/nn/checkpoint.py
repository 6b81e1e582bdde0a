# SPDX-License-Identifier: Apache-2.0
"""The tensors of a folder of safetensors files, by name: one file, or several that an index names."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError

PREPACKED_INDEX = "machete.json"  # of a folder that save_prepacked wrote
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


class Checkpoint:
    """Reads tensors on demand. A file is opened at its first tensor and closed by ``close`` or ``keep``.

    ``files``: the file's name of each tensor. Raises CheckpointError, which lists every file and tensor that is not
    there, and ImportError where safetensors is not installed.
    """

    def __init__(self, folder: Path, files: Mapping[str, str], device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.files = dict(files)
        self._open: dict[str, Any] = {}
        names = sorted(set(self.files.values()))
        bad = [f"{name!r} is no name of a file in {folder}" for name in names if Path(name).name != name]
        bad += [f"{name} is not there" for name in names if not (folder / name).is_file()]
        if bad:
            raise CheckpointError(f"the checkpoint in {folder} is incomplete", bad)
        held = {file: set(self._file(file).keys()) for file in names}
        absent = [name for name, file in self.files.items() if name not in held[file]]
        if absent:
            raise CheckpointError(f"the index in {folder} names tensors that its files lack", missing=absent)

    @classmethod
    def find(cls, folder: str | Path, device: torch.device) -> Checkpoint:
        """The checkpoint of a Hugging Face folder: by its index, or its only safetensors file."""
        folder = Path(folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; download the checkpoint and pass its folder")
        if (folder / INDEX).is_file():
            index = read_json(folder / INDEX)
            files = index.get("weight_map")
            if not isinstance(files, dict):
                raise CheckpointError(f"{folder / INDEX} has no weight_map")
            return cls(folder, files, device)
        found = [folder / SINGLE] if (folder / SINGLE).is_file() else sorted(folder.glob("*.safetensors"))
        if len(found) != 1:
            raise CheckpointError(
                f"{folder} has {len(found)} safetensors files and no {INDEX}; wanted one file, or an index of several"
            )
        with _safe_open(found[0], torch.device("cpu")) as opened:
            names = list(opened.keys())
        return cls(folder, dict.fromkeys(names, found[0].name), device)

    def metadata(self, file: str) -> dict[str, str]:
        """What the file's header says beside its tensors."""
        return self._file(file).metadata() or {}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(self.files[name]).get_slice(name).get_shape())

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in its file."""
        piece = self._file(self.files[name]).get_slice(name)
        return math.prod(piece.get_shape()) * _BYTES.get(piece.get_dtype(), 1)

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the checkpoint's device, in memory of its own."""
        tensor = self._file(self.files[name]).get_tensor(name)
        return tensor.clone() if tensor.device.type == "cpu" else tensor

    def keep(self, files: Iterable[str]) -> None:
        """Closes all files but these."""
        for name in self._open.keys() - set(files):
            self._open.pop(name).__exit__(None, None, None)

    def close(self) -> None:
        self.keep(())

    def _file(self, name: str) -> Any:
        if name not in self._open:
            self._open[name] = _safe_open(self.folder / name, self.device).__enter__()
        return self._open[name]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises CheckpointError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return found


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file of contiguous copies on the CPU."""
    save_file = _safetensors("torch").save_file
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, str(path), metadata=dict(metadata))


def _safe_open(path: Path, device: torch.device) -> Any:
    try:
        return _safetensors().safe_open(str(path), framework="pt", device=str(device))
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except Exception as error:  # safetensors has an exception of its own, of no public base
        if type(error).__name__ != "SafetensorError":
            raise
        raise CheckpointError(f"{path} is no intact safetensors file: {error}") from error


def _safetensors(part: str | None = None) -> Any:
    with contextlib.suppress(ModuleNotFoundError):
        import safetensors
        import safetensors.torch

        return safetensors if part is None else safetensors.torch
    raise ImportError("reading and writing safetensors needs safetensors; pip install 'machete-aot[models]'")
