"""Tensors in a file of the safetensors format, which many programs read: a JSON header, then the plain numbers.

Format: 8 bytes with the length of the header (little-endian), the header, then the tensors one behind the other:
https://huggingface.co/docs/safetensors. Written and read here, and not by the package of that name, so that a model can
be taken away from any installation; the tests compare both.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
ALIGNMENT = 8  # of the first tensor, by spaces at the end of the header


class MalformedFile(Exception):
    """The file is not a whole one of this format; one clause says why."""


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors, each whole even where they share memory. Raises OSError, ValueError for other dtypes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    stop = 0
    # Wide numbers first, so that every tensor begins at a multiple of its numbers' size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    for name, tensor in ordered:
        if tensor.dtype not in NAMES or name == "__metadata__":
            raise ValueError(f"{name} of {tensor.dtype} cannot be written; dtypes are {', '.join(map(str, NAMES))}")
        start, stop = stop, stop + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in ordered:
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors that a file holds, on the CPU. Raises MalformedFile, OSError."""
    with open(path, "rb") as file:
        header = _read_header(file, os.fstat(file.fileno()).st_size)
        return {name: _read_tensor(file, DTYPES[dtype], shape) for name, dtype, shape in header}


def _read_header(file: BinaryIO, size: int) -> list[tuple[str, str, list[int]]]:
    """Name, dtype and shape of each tensor, in the order of their places, which fill the rest of the file."""
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise MalformedFile("its header is cut off or is none")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:
        raise MalformedFile("its header is not JSON") from error
    if not isinstance(header, dict):
        raise MalformedFile("its header is not an object")
    header.pop("__metadata__", None)
    found = [(*_checked_entry(name, entry), name) for name, entry in header.items()]
    place = 0
    for start, stop, _, _, name in sorted(found, key=lambda entry: entry[:2]):
        if start != place:
            raise MalformedFile(f"{name} overlaps another tensor or leaves a gap")
        place = stop
    if place != size - 8 - length:
        raise MalformedFile("it is longer or shorter than its header says")
    return [(name, dtype, shape) for _, _, dtype, shape, name in sorted(found, key=lambda entry: entry[:2])]


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name twice")
    return dict(pairs)


def _checked_entry(name: str, entry: Any) -> tuple[int, int, str, list[int]]:
    """Start, stop, dtype and shape."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedFile(f"its header does not say what {name} is")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise MalformedFile(f"{name} has a dtype that is not one of {', '.join(DTYPES)}")
    if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
        raise MalformedFile(f"{name} has no shape or no place")
    start, stop = offsets
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise MalformedFile(f"{name} does not fill its place")
    return start, stop, dtype, shape


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _read_tensor(file: BinaryIO, dtype: torch.dtype, shape: list[int]) -> Tensor:
    numbers = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    if file.readinto(numbers.numpy().data) != numbers.numel():  # type: ignore[attr-defined]
        raise MalformedFile("it became shorter while it was read")
    return numbers.view(dtype).reshape(shape)
