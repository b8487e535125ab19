"""Sharded checkpoints: a folder in which each process writes its own pieces, with torch.distributed.checkpoint.

Beside the pieces lies `index.json`. It holds the rest of the run's state, the file and position of every piece, and the
SHA-256 of every file and of itself. It is written last, so a folder without it is not a checkpoint. It also replaces
torch's own `.metadata`, which is a pickle and is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from common.errors import UserError
from common.files import file_hash
from training.distributed import World
from training.sealed_file import FORMAT, NotSealed, replace, sync_folder
from training.sharded_tensors import local

FOLDER_FORMAT = "splinegpt-sharded-1"
INDEX_FILE = "index.json"
MODEL, OPTIMIZER = "model/", "optimizer/"
# Only plain names, so that an index cannot point to files outside its folder.
_PIECE_NAME = re.compile(r"__\d{1,6}_\d{1,6}\.distcp|\.metadata", re.ASCII)
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)}


@dataclass(frozen=True)
class ShardedState:
    """A run's state: a header that JSON can hold, and the tensors by name. Each process has its own pieces of them."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def write(self, path: Path, world: World) -> None:
        """Write the folder `path` atomically. Every process of `world` must call it. Raises OSError."""
        write_sharded(path, self, world)


def sharded_state(header: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer) -> ShardedState:
    """The state of a run with a sharded model, not copied. A tensor with two names (tied weights) is listed once."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first_name: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in model.state_dict().items():
        part = local(tensor)
        key = (part.data_ptr() or id(tensor), tensor.shape)
        if key in first_name:
            aliases[name] = first_name[key]
        else:
            first_name[key] = name
            tensors[MODEL + name] = tensor
    names = parameter_names(model, optimizer)
    for name, parameter in zip(names, parameters_of(optimizer), strict=True):
        for key, value in optimizer.state[parameter].items():
            tensors[f"{OPTIMIZER}{name}/{key}"] = value
    groups = optimizer.state_dict()["param_groups"]
    return ShardedState({**header, "aliases": aliases, "param_groups": groups, "param_names": names}, tensors)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of the optimizer, in the order of its state_dict."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in parameters_of(optimizer)]


def write_sharded(path: Path, state: ShardedState, world: World) -> None:
    """Write the folder `path` atomically. Every process must call it, with its own part of the tensors.

    Raises OSError if it cannot be written: on all processes, even if only one failed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with world.together():
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        writer = _Writer(temporary, single_file_per_rank=True, sync_files=True)
        metadata = dcp.save(dict(state.tensors), storage_writer=writer, process_group=world.group)
        with world.together():
            mine = {piece.name: file_hash(piece) for piece in temporary.glob(f"__{world.rank}_*.distcp")}
        files = {name: digest for part in world.gather(mine) for name, digest in part.items()}
        with world.together():
            if world.is_main:
                files[".metadata"] = file_hash(temporary / ".metadata")
                _write_index(temporary / INDEX_FILE, state.header, metadata, writer.places, files)
                remove_sharded(path)
                replace(temporary, path)
    except UserError as error:
        raise OSError(str(error)) from error
    except dcp.api.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise OSError(getattr(reason, "strerror", None) or str(reason).split("\n")[0]) from error
    finally:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)


class _Writer(dcp.FileSystemWriter):
    """Torch's writer, which also keeps where the pieces lie (on the main process): PyTorch 2.11 does not return it."""

    places: dict[MetadataIndex, Any]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        super().finish(metadata, results)
        self.places = {result.index: result.storage_data for part in results for result in part}


def _write_index(
    path: Path,
    header: Mapping[str, Any],
    metadata: Metadata,
    places: Mapping[MetadataIndex, Any],
    files: dict[str, str],
) -> None:
    tensors: dict[str, Any] = {}
    for name, entry in metadata.state_dict_metadata.items():
        assert isinstance(entry, TensorStorageMetadata), name
        tensors[name] = {"dtype": str(entry.properties.dtype), "shape": list(entry.size), "pieces": []}
        for chunk in entry.chunks:
            info = places[MetadataIndex(name, chunk.offsets)]
            piece = {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes)}
            where = {"file": info.relative_path, "start": info.offset, "length": info.length}
            tensors[name]["pieces"].append({**piece, **where})
    document = {"format": FOLDER_FORMAT, "state": dict(header), "tensors": tensors, "files": files}
    text = json.dumps(document).encode()
    with open(path, "wb") as file:
        file.write(text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def remove_sharded(path: Path) -> None:
    """Delete a checkpoint's folder. It is renamed first, so that half a deleted one does not count as a checkpoint."""
    if path.is_dir():
        hidden = path.with_name(f".{path.name}.removed.tmp")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


@dataclass(frozen=True)
class Shards:
    """A checkpoint in the form of a folder of shards; see `checkpoint_files.CheckpointFile`."""

    path: Path

    def read(self) -> dict[str, Any]:
        return {"format": FORMAT, **ShardedCheckpoint.open(self.path).read_state()}

    def read_to_resume(self) -> dict[str, Any]:
        header = ShardedCheckpoint.open(self.path).header
        return {"format": FORMAT, "model": None, "optimizer": None, **header}

    def verify(self) -> None:
        ShardedCheckpoint.open(self.path)

    def is_best(self) -> bool:
        try:
            return bool(ShardedCheckpoint.open(self.path, verify=False).header["is_best"])
        except (NotSealed, OSError, KeyError):
            return False

    def remove(self) -> None:
        remove_sharded(self.path)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fill a sharded model and its optimizer in place, without verifying the pieces again."""
        ShardedCheckpoint.open(self.path, verify=False).restore(model, optimizer)


@dataclass(frozen=True)
class ShardedCheckpoint:
    """The index of a sharded checkpoint, read and checked. The pieces are loaded on demand."""

    path: Path
    header: dict[str, Any]
    metadata: Metadata

    @classmethod
    def open(cls, path: Path, verify: bool = True) -> ShardedCheckpoint:
        """Read the index and, with `verify`, compare every file with its hash. Raises NotSealed or OSError."""
        text, _, seal = (path / INDEX_FILE).read_bytes().rstrip(b"\n").rpartition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != seal or not (path / INDEX_FILE).read_bytes().endswith(b"\n"):
            raise NotSealed(f"the checksum of {INDEX_FILE} does not fit")
        try:
            document = json.loads(text)
            if document["format"] != FOLDER_FORMAT:
                raise NotSealed("it has another format")
            files, header = document["files"], document["state"]
            metadata = _metadata(document["tensors"], set(files))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise NotSealed(f"{INDEX_FILE} is malformed") from error
        for name, digest in files.items():
            if not _PIECE_NAME.fullmatch(name):
                raise NotSealed(f"{INDEX_FILE} names a file that cannot be part of it")
            if verify and (not (path / name).is_file() or file_hash(path / name) != digest):
                raise NotSealed(f"{name} is missing or changed")
        return cls(path, header, metadata)

    def load(self, tensors: dict[str, Tensor], alone: bool) -> None:
        """Fill these tensors in place. `alone`: only this process calls it, not all of the default group."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # `alone` asks for that
            dcp.load(tensors, storage_reader=_Reader(self), no_dist=alone)

    def read_all(self, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
        """Read the tensors whose names are `wanted`, whole, on the CPU."""
        entries = self.metadata.state_dict_metadata
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in entries.items()
            if wanted(name) and isinstance(entry, TensorStorageMetadata)
        }
        self.load(tensors, alone=True)
        return tensors

    def read_state(self) -> dict[str, Any]:
        """Read everything, in the form that a checkpoint in one file has."""
        tensors = self.read_all()
        header = dict(self.header)
        aliases, groups, names = (header.pop(key) for key in ("aliases", "param_groups", "param_names"))
        model = {name[len(MODEL) :]: tensor for name, tensor in tensors.items() if name.startswith(MODEL)}
        model |= {name: model[first] for name, first in aliases.items()}
        moments: dict[int, dict[str, Tensor]] = {}
        for index, name in enumerate(names):
            prefix = f"{OPTIMIZER}{name}/"
            own = {key[len(prefix) :]: tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            if own:
                moments[index] = own
        for group in groups:
            group["betas"] = tuple(group["betas"])
        return {**header, "model": model, "optimizer": {"state": moments, "param_groups": groups}}

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Fill a sharded model and its optimizer in place. Each process reads its pieces, however many wrote them."""
        state = sharded_state({}, model, optimizer).tensors
        by_name = dict(zip(parameter_names(model, optimizer), parameters_of(optimizer), strict=True))
        entries = self.metadata.state_dict_metadata
        for name, entry in entries.items():
            if name.startswith(OPTIMIZER) and isinstance(entry, TensorStorageMetadata):
                parameter, _, key = name[len(OPTIMIZER) :].rpartition("/")
                like = by_name[parameter].detach()
                alike = entry.size == like.shape
                moment = torch.zeros_like(like) if alike else torch.zeros(entry.size, dtype=entry.properties.dtype)
                optimizer.state[by_name[parameter]][key] = state[name] = moment
        if set(state) != set(entries):
            raise KeyError("the checkpoint holds other tensors than the run")
        self.load(state, alone=False)


@dataclass(frozen=True)
class Place:
    """Where a piece of a tensor lies. Torch's reader takes it in place of its own class, which is private."""

    relative_path: str
    offset: int  # bytes
    length: int  # bytes
    transform_descriptors: None = None  # the reader looks for compressions here; pieces have none


class _Reader(dcp.FileSystemReader):
    """Torch's reader, which takes the positions of the pieces from our index."""

    def __init__(self, checkpoint: ShardedCheckpoint) -> None:
        super().__init__(checkpoint.path)
        self.checkpoint = checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.checkpoint.metadata


def _metadata(tensors: Mapping[str, Any], files: set[str]) -> Metadata:
    """Torch's description of the tensors in an index. ValueError, KeyError or TypeError if the index is malformed."""
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, Any] = {}
    for name, entry in tensors.items():
        chunks = []
        for piece in entry["pieces"]:
            offsets, sizes = torch.Size(piece["offsets"]), torch.Size(piece["sizes"])
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            if piece["file"] not in files or piece["file"] == ".metadata":
                raise ValueError(piece["file"])
            where = Place(piece["file"], int(piece["start"]), int(piece["length"]))
            storage[MetadataIndex(name, offsets, len(chunks) - 1)] = where
        properties = TensorProperties(dtype=_DTYPES[entry["dtype"]])
        entries[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
    return Metadata(state_dict_metadata=entries, storage_data=storage)
