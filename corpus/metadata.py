"""`meta.json`, the description of a prepared data folder: written, read and checked."""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError

FORMAT_VERSION = 1
DTYPES = ("uint16", "uint32")
SPLITS = ("train", "val")
META_FILE = "meta.json"

# A bare file name: no separator and no leading dot, so that no path can lead out of the folder.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\.bin", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class Shard:
    """A file of `tokens` tokens, flat and little-endian. `sha256` is the hash of its bytes, in hexadecimal."""

    file: str
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Metadata:
    """The content of `meta.json`. `splits` has "train" and "val", each with at least one shard."""

    source: str
    tokenizer: dict[str, Any]
    dtype: str
    splits: dict[str, tuple[Shard, ...]]

    def total_tokens(self, split: str) -> int:
        """Tokens in all shards of `split`."""
        return sum(shard.tokens for shard in self.splits[split])

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change if any token, the order of the shards or the vocabulary changes."""
        hashes = {split: [shard.sha256 for shard in shards] for split, shards in self.splits.items()}
        identity = json.dumps([self.dtype, self.tokenizer, hashes], sort_keys=True)
        return hashlib.sha256(identity.encode("ascii")).hexdigest()[:16]

    def to_json(self) -> str:
        """The text of `meta.json`, ASCII."""
        splits = {
            split: {"tokens": self.total_tokens(split), "shards": [vars(shard) for shard in shards]}
            for split, shards in self.splits.items()
        }
        document = {
            "format_version": FORMAT_VERSION,
            "source": self.source,
            "tokenizer": self.tokenizer,
            "dtype": self.dtype,
            "splits": splits,
        }
        return json.dumps(document, indent=2) + "\n"


def read_metadata(folder: Path) -> Metadata:
    """Read the metadata of a prepared folder. `UserError` if folder or file is missing, or the file malformed."""
    path = folder / META_FILE
    if not folder.is_dir():
        raise UserError(f"there is no data folder {folder}; prepare it first, with python data/NAME/prepare.py")
    if not path.is_file():
        raise UserError(f"{folder} has no {META_FILE}, so it is not prepared; run its prepare.py first")
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, a number too long
        raise UserError(f"{path} cannot be read as JSON ({type(error).__name__}); prepare the data again") from error
    try:
        return _parse(document)
    except _Malformed as error:
        raise UserError(f"{path} is malformed: {error}; prepare the data again") from error


class _Malformed(Exception):
    """The metadata are malformed. The message is a clause that says what is wrong and what is allowed."""


def _parse(document: object) -> Metadata:
    if not isinstance(document, dict):
        raise _Malformed("it must be an object")
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise _Malformed(f"format_version must be {FORMAT_VERSION}, not {_short(version)}")
    source, tokenizer, dtype, splits = (document.get(key) for key in ("source", "tokenizer", "dtype", "splits"))
    if not isinstance(source, str):
        raise _Malformed(f"source must be a text, not {_short(source)}")
    if not isinstance(tokenizer, dict):
        raise _Malformed(f"tokenizer must be an object, not {_short(tokenizer)}")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise _Malformed(f"dtype must be one of {', '.join(DTYPES)}, not {_short(dtype)}")
    if not isinstance(splits, dict) or sorted(splits) != sorted(SPLITS):
        raise _Malformed(f"splits must be an object with {' and '.join(SPLITS)}")
    return Metadata(source, tokenizer, dtype, {split: _parse_split(split, splits[split]) for split in SPLITS})


def _parse_split(split: str, value: object) -> tuple[Shard, ...]:
    if not isinstance(value, dict) or not isinstance(value.get("shards"), list) or not value["shards"]:
        raise _Malformed(f"split {split} must be an object with a list of shards, at least one")
    shards = tuple(_parse_shard(split, shard) for shard in value["shards"])
    if type(value.get("tokens")) is not int or value["tokens"] != sum(shard.tokens for shard in shards):
        raise _Malformed(f"the tokens of split {split} must be the sum over its shards")
    return shards


def _parse_shard(split: str, value: object) -> Shard:
    if not isinstance(value, dict):
        raise _Malformed(f"each shard of split {split} must be an object, not {_short(value)}")
    file, tokens, sha256 = (value.get(key) for key in ("file", "tokens", "sha256"))
    if not isinstance(file, str) or not _SHARD_NAME.fullmatch(file):
        raise _Malformed(f"a shard's file must be a bare name that ends in .bin, not {_short(file)}")
    if type(tokens) is not int or not 1 <= tokens < 1 << 48:
        raise _Malformed(f"the tokens of {file} must be a whole number from 1 to 2^48, not {_short(tokens)}")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise _Malformed(f"the sha256 of {file} must be 64 hexadecimal digits")
    return Shard(file, tokens, sha256)


def _short(value: object) -> str:
    """A JSON value for an error message, in ASCII and at most 60 characters."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
