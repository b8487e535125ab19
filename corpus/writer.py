"""Prepared data, written: shards and `meta.json`, with bounded memory, all at once or not at all."""

import contextlib
import hashlib
import re
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from common.errors import UserError
from common.folder_lock import FolderLock
from common.termination import unwinding
from corpus.metadata import META_FILE, SPLITS, Metadata, Shard
from corpus.tokenizer import Tokenizer, token_dtype

UNFINISHED = ".preparing-"  # begins the name of a folder that is not published yet
PIECE_TOKENS = 1 << 22  # tokens are converted and hashed in pieces of this size, to bound memory

_SHARD_FILE = re.compile(rf"({'|'.join(SPLITS)})(_\d{{3,}})?\.bin")


class DatasetWriter:
    """Writes a prepared folder, with bounded memory, and publishes all of it at once or not at all.

        with DatasetWriter(folder, tokenizer, "where the text is from") as writer:
            writer.write("train", tokens)
            writer.write("val", other_tokens)

    Everything is written beside its destination and renamed into place when the block ends well, `meta.json`
    last. When the block fails, or a split is left empty (`UserError`), the folder keeps what it held before.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, source: str, shard_tokens: int = 100_000_000) -> None:
        """`source`: a short text for people. A new shard is begun after `shard_tokens` tokens."""
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens must be at least 1, not {shard_tokens}")
        self.folder = folder
        self.tokenizer = tokenizer
        self.source = source
        self.shard_tokens = shard_tokens
        self._dtype = token_dtype(tokenizer.vocab_size)

    def __enter__(self) -> "DatasetWriter":
        with contextlib.ExitStack() as opened:
            opened.enter_context(unwinding())
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._lock(opened)
                self._temporary = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self.folder))
            except OSError as error:
                raise UserError(
                    f"cannot write to {self.folder} ({error.strerror}); choose a folder that is yours"
                ) from error
            self._opened = opened.pop_all()
        self._shards: dict[str, list[_OpenShard]] = {split: [] for split in SPLITS}
        return self

    def _lock(self, opened: contextlib.ExitStack) -> None:
        """Keep other writers out, and clear away what they left if they were killed. UserError if one is at work."""
        lock = opened.enter_context(FolderLock(self.folder))
        if not lock.take():
            raise UserError(f"{self.folder} is being prepared by {lock.holder()}; let that end, then use what it made")
        if lock.is_sure:
            for leftover in self.folder.glob(f"{UNFINISHED}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            for download in self.folder.glob(".*.tmp"):
                download.unlink(missing_ok=True)

    def write(self, split: str, tokens: np.ndarray) -> None:
        """Append `tokens`, shape (any,), integers in 0 … vocab_size - 1, to "train" or "val".

        `ValueError` for other arrays; `UserError` when the disk is full or the like.
        """
        shards = self._shards[split]
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(f"tokens must be a 1-D array of integers, not {tokens.ndim}-D of {tokens.dtype}")
        if len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= self.tokenizer.vocab_size):
            raise ValueError(f"tokens must lie in 0 … {self.tokenizer.vocab_size - 1}")
        try:
            while len(tokens):
                if not shards or shards[-1].tokens == self.shard_tokens:
                    if shards:
                        shards[-1].file.close()
                    shards.append(_OpenShard(self._temporary / f"{split}_{len(shards)}"))
                count = min(len(tokens), self.shard_tokens - shards[-1].tokens, PIECE_TOKENS)
                shards[-1].append(tokens[:count].astype(self._dtype))
                tokens = tokens[count:]
        except OSError as error:
            raise UserError(f"cannot write to {self.folder} ({error.strerror}); make room there") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for shards in self._shards.values():
                for shard in shards:
                    shard.file.close()
            if kind is None:
                self._publish()
        except OSError as failure:
            raise UserError(f"cannot write to {self.folder} ({failure.strerror}); make room there") from failure
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._opened.close()

    def _publish(self) -> None:
        for split, shards in self._shards.items():
            if not shards:
                raise UserError(f"the text from {self.source} leaves no tokens for {split}; prepare a longer text")
        names = {split: _shard_names(split, len(shards)) for split, shards in self._shards.items()}
        described = {
            split: tuple(
                Shard(name, shard.tokens, shard.hash.hexdigest())
                for name, shard in zip(names[split], shards, strict=True)
            )
            for split, shards in self._shards.items()
        }
        meta = Metadata(self.source, self.tokenizer.to_metadata(), self._dtype.name, described)
        (self._temporary / META_FILE).write_text(meta.to_json(), encoding="ascii")
        # From here to the last rename the folder counts as not prepared, so a crash leaves no mixture.
        (self.folder / META_FILE).unlink(missing_ok=True)
        for split, shards in self._shards.items():
            for name, shard in zip(names[split], shards, strict=True):
                shard.path.replace(self.folder / name)
        (self._temporary / META_FILE).replace(self.folder / META_FILE)
        current = {name for split_names in names.values() for name in split_names}
        for path in self.folder.iterdir():
            if _SHARD_FILE.fullmatch(path.name) and path.name not in current:
                path.unlink()  # shards of the former data, when those were more


class _OpenShard:
    """A shard while it is written: its file, its hash and its length so far."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: IO[bytes] = path.open("wb")
        self.hash = hashlib.sha256()
        self.tokens = 0

    def append(self, tokens: np.ndarray) -> None:
        data = tokens.tobytes()
        self.file.write(data)
        self.hash.update(data)
        self.tokens += len(tokens)


def _shard_names(split: str, count: int) -> list[str]:
    return [f"{split}.bin"] if count == 1 else [f"{split}_{i:03d}.bin" for i in range(count)]
