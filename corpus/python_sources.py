"""Python source files as a corpus: text that every machine with this program has, without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HOLD_OUT_EVERY = 10


def source_texts(root: Path, wanted: Callable[[str], bool] = lambda text: True) -> Iterator[str]:
    """Read the `wanted` UTF-8 `.py` files below `root` in order of path, without tests and installed packages."""
    relative = [path.relative_to(root) for path in root.rglob("*.py")]
    for path in sorted(relative, key=lambda path: path.as_posix()):
        if not LEFT_OUT.intersection(path.parts):
            try:
                text = (root / path).read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue  # a few sources are in other encodings
            if wanted(text):
                yield text


def hold_out_files(texts: list[str]) -> dict[str, str]:
    """Split off every tenth file for validation. The last files together would be only a few packages."""
    val = [i % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 for i in range(len(texts))]
    return {
        "train": "".join(text for text, held_out in zip(texts, val, strict=True) if not held_out),
        "val": "".join(text for text, held_out in zip(texts, val, strict=True) if held_out),
    }
