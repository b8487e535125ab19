"""Reads the file in which W&B keeps an offline run, for the tests."""

import struct
from collections.abc import Iterator
from pathlib import Path

HEADER = b":W&B"
HEADER_BYTES = 7
BLOCK_BYTES = 32768
RECORD_HEADER = struct.Struct("<IHB")  # checksum, length, kind
WHOLE, LAST = 1, 4  # kinds of pieces that end a record


def read_history(path: Path) -> dict[int, dict[str, str]]:
    """The logged values of each step, as JSON by their names."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data.startswith(HEADER)
    logged: dict[int, dict[str, str]] = {}
    for serialized in leveldb_records(data, HEADER_BYTES):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(serialized)
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            logged.setdefault(int(items["_step"]), {}).update(items)
    return logged


def leveldb_records(data: bytes, start: int) -> Iterator[bytes]:
    """The records of a log in LevelDB's format that begins at `start`.

    github.com/google/leveldb/blob/main/doc/log_format.md: a record is cut into pieces at the ends of blocks.
    """
    position, pieces = start, b""
    while position + RECORD_HEADER.size <= len(data):
        room = BLOCK_BYTES - position % BLOCK_BYTES
        if room < RECORD_HEADER.size:
            position += room
            continue
        _, length, kind = RECORD_HEADER.unpack_from(data, position)
        position += RECORD_HEADER.size
        pieces += data[position : position + length]
        position += length
        if kind in (WHOLE, LAST):
            yield pieces
            pieces = b""
