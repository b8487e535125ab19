"""verified.json: which files of a prepared folder were verified, by size and time stamp, so that it is done only once.

Reading 20 GB to compare hashes takes ten seconds or more at each start. A file that was changed has another time stamp.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from common.files import write_atomically
from corpus.metadata import Metadata

VERIFIED_FILE = "verified.json"
SETTLED_S = 2.0  # a file that was written within this time could be written again under the same time stamp


def is_verified(folder: Path, meta: Metadata) -> bool:
    """Whether these very files were verified before."""
    try:
        return json.loads((folder / VERIFIED_FILE).read_text()) == _stamp(folder, meta)
    except (OSError, ValueError):
        return False


def note_verified(folder: Path, meta: Metadata) -> None:
    """Keep that the files are good. In a folder that cannot be written, they are verified at each start."""
    with suppress(OSError):
        stamp = _stamp(folder, meta)
        if all(time.time() - time_ns / 1e9 > SETTLED_S for _, time_ns in stamp["files"].values()):
            write_atomically(folder / VERIFIED_FILE, lambda path: path.write_text(json.dumps(stamp) + "\n"))


def _stamp(folder: Path, meta: Metadata) -> dict[str, Any]:
    names = [shard.file for shards in meta.splits.values() for shard in shards]
    found = {name: (folder / name).stat() for name in names}
    files = {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}
    return {"fingerprint": meta.fingerprint(), "files": files}
