"""Prepared data, read: token shards in flat little-endian binary, described by `meta.json`."""

import dataclasses
import hashlib
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import expand_home
from common.folder_lock import FolderLock
from corpus.metadata import META_FILE, SPLITS, Metadata, Shard, read_metadata
from corpus.token_file import TokenFile
from corpus.tokenizer import Tokenizer, tokenizer_from_metadata
from corpus.verification import is_verified, note_verified

DATA_ROOT = Path(__file__).resolve().parents[1] / "data"
FIRST_USE_LOCK = ".first_use.lock"  # of the whole preparation; the writer has one of its own
PIECE_TOKENS = 1 << 22  # shards are hashed and checked in pieces of this size, to bound memory


class TokenStream:
    """The tokens of one split, in one or more shards.

    A window is `length` successive tokens of one shard; the windows of all shards are counted through, so
    that index i is the i-th possible start.
    """

    def __init__(self, split: str, shards: Sequence[np.ndarray | TokenFile]) -> None:
        """`shards`: 1-D arrays of unsigned integers. `split` is for error messages."""
        self.split = split
        self.shards = list(shards)

    def __len__(self) -> int:
        """Tokens in all shards."""
        return sum(len(shard) for shard in self.shards)

    def number_of_windows(self, length: int) -> int:
        """The number of windows of `length` tokens, overlapping ones too; 0 when all shards are shorter."""
        return int(self._ends(length)[-1])

    def window(self, index: int, length: int) -> np.ndarray:
        """Window `index`, shape (length,), int64; `IndexError` outside 0 … number_of_windows(length) - 1."""
        found: np.ndarray = self.windows(np.array([index]), length)[0]
        return found

    def windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """The windows of these indices, shape (len(starts), length), int64; `IndexError` as in `window`."""
        starts = np.asarray(starts, dtype=np.int64)
        ends = self._ends(length)
        if len(starts) and (starts.min() < 0 or starts.max() >= ends[-1]):
            raise IndexError(f"windows of {length} tokens in split {self.split} are 0 to {ends[-1] - 1}")
        shard_of = np.searchsorted(ends, starts, side="right")
        out = np.empty((len(starts), length), dtype=np.int64)
        for row, (start, i) in enumerate(zip(starts.tolist(), shard_of.tolist(), strict=True)):
            offset = start - (int(ends[i - 1]) if i else 0)
            out[row] = self.shards[i][offset : offset + length]
        return out

    def _ends(self, length: int) -> np.ndarray:
        """For each shard the number of windows in it and all before it."""
        if length < 1:
            raise ValueError(f"length must be at least 1, not {length}")
        return np.cumsum([max(0, len(shard) - length + 1) for shard in self.shards], dtype=np.int64)


class Dataset:
    """A prepared folder, opened for reading.

    meta: what `meta.json` says. tokenizer: made from it. fingerprint: 16 hexadecimal digits over the shards'
    hashes and the vocabulary; a checkpoint keeps it to tell whether it meets the data it was trained on.
    """

    def __init__(self, folder: Path, meta: Metadata, tokenizer: Tokenizer) -> None:
        self.folder = folder
        self.meta = meta
        self.tokenizer = tokenizer
        self.fingerprint = meta.fingerprint()

    @classmethod
    def open(cls, folder: Path, verify: bool = True) -> "Dataset":
        """Open a folder that a `DatasetWriter` wrote.

        Sizes are always checked. `verify` also reads every shard (1 to 2 GB/s), to compare its SHA-256 and to check
        that its tokens are in the vocabulary, unless it has done so before and no file has changed since.
        `UserError` for whatever is missing, malformed or changed.
        """
        meta = read_metadata(folder)
        try:
            tokenizer = tokenizer_from_metadata(meta.tokenizer)
        except UserError as error:
            raise UserError(f"{folder / META_FILE} is malformed: {error}") from error
        meta = dataclasses.replace(meta, tokenizer=tokenizer.to_metadata())
        shards = [shard for split in meta.splits.values() for shard in split]
        for shard in shards:
            _check_size(folder / shard.file, shard, meta.dtype)
        if verify and not is_verified(folder, meta):
            for shard in shards:
                _check_contents(folder / shard.file, shard, meta.dtype, tokenizer.vocab_size)
            note_verified(folder, meta)
        return cls(folder, meta, tokenizer)

    def tokens(self, split: str) -> TokenStream:
        """The tokens of "train" or "val"."""
        if split not in self.meta.splits:
            raise UserError(f"there is no split {split!r} in {self.folder}; choose one of {', '.join(SPLITS)}")
        dtype = _file_dtype(self.meta.dtype)
        files = [self.folder / shard.file for shard in self.meta.splits[split]]
        try:
            return TokenStream(split, [TokenFile(file, dtype) for file in files])
        except (OSError, ValueError) as error:  # ValueError: emptied since it was checked
            raise UserError(f"split {split} of {self.folder} cannot be read ({error}); prepare it again") from error


def find_dataset(name: str) -> Path:
    """The folder of a dataset: `data/NAME`, or `name` itself when it is the path of a prepared folder.

    `UserError`, with the names there are, when it is neither.
    """
    plain = name not in ("", ".", "..") and Path(name).name == name
    try:
        if plain and (DATA_ROOT / name).is_dir():
            return DATA_ROOT / name
        path = Path(expand_home(name))
        if name and (path / META_FILE).is_file():
            return path
    except (OSError, ValueError):  # too long for a path, a zero byte
        pass
    raise UserError(f"there is no dataset {name!r}; {_what_there_is()}")


def ensure_prepared(name: str) -> Path:
    """The folder of a dataset, which is prepared here and now when it is not yet and has a `prepare.py`."""
    folder = find_dataset(name)
    script = folder / "prepare.py"
    if not (folder / META_FILE).is_file():
        if not script.is_file():
            raise UserError(f"{folder} is not prepared and has no prepare.py; {_what_there_is()}")
        with FolderLock(folder, FIRST_USE_LOCK) as lock:
            lock.wait(lambda: print(f"dataset {name} is being prepared by {lock.holder()}: waiting for it", flush=True))
            if not (folder / META_FILE).is_file():  # nor by now
                print(f"dataset {name} is not prepared yet: running {script}", flush=True)
                runpy.run_path(str(script))["prepare"](None)
    return folder


def _what_there_is() -> str:
    names = sorted(script.parent.name for script in DATA_ROOT.glob("*/prepare.py"))
    return f"choose one of {', '.join(names)}, or prepare any text file with python data/text/prepare.py FILE"


def _file_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(name).newbyteorder("<")


def _check_size(path: Path, shard: Shard, dtype: str) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing, though {META_FILE} lists it; prepare the data again")
    size, expected = path.stat().st_size, shard.tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise UserError(f"{path} has {size:,} bytes instead of {expected:,}; prepare the data again")


def _check_contents(path: Path, shard: Shard, dtype: str, vocab_size: int) -> None:
    digest, largest = hashlib.sha256(), 0
    try:
        tokens = TokenFile(path, _file_dtype(dtype))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); prepare the data again") from error
    for start in range(0, len(tokens), PIECE_TOKENS):
        piece = tokens[start : start + PIECE_TOKENS]
        digest.update(piece.data)
        largest = max(largest, int(piece.max()))
    if digest.hexdigest() != shard.sha256:
        raise UserError(f"{path} has changed since it was prepared (its SHA-256 differs); prepare the data again")
    if largest >= vocab_size:
        raise UserError(f"{path} has token {largest}, beyond the vocabulary of {vocab_size}; prepare the data again")
