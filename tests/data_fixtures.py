"""Small datasets, Tiny Shakespeare and GPT-2's vocabulary, for the tests of data."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from corpus.tokenizer import CharTokenizer
from corpus.writer import DatasetWriter

ROOT = Path(__file__).resolve().parents[1]
TINY_SHAKESPEARE = ROOT.parent / "shared/data/tinyshakespeare/input.txt"
GPT2_FILES = ("6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")


@pytest.fixture(scope="session")
def gpt2_vocabulary() -> Iterator[Path]:
    """The folder of GPT-2's vocabulary files, to which TIKTOKEN_CACHE_DIR points. Skips the test if there is none."""
    pytest.importorskip("tiktoken")
    candidates = [Path(os.environ.get("TIKTOKEN_CACHE_DIR") or "."), ROOT.parent / "shared/data/tiktoken"]
    for folder in candidates:
        if all((folder / name).is_file() for name in GPT2_FILES):
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
                yield folder
            return
    pytest.skip("GPT-2's vocabulary files are not on this machine")


def write_dataset(
    folder: Path, train: np.ndarray, val: np.ndarray, shard_tokens: int = 100_000_000, characters: int = 100
) -> Path:
    """Write a dataset of these tokens. Its vocabulary is `characters` characters, beginning with U+0020."""
    tokenizer = CharTokenizer([chr(32 + i) for i in range(characters)])
    with DatasetWriter(folder, tokenizer, "a test", shard_tokens) as writer:
        writer.write("train", train)
        writer.write("val", val)
    return folder
