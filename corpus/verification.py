"""verified.json remembers which files of a prepared folder have been verified, by size and time stamp.

Otherwise each start of a run would read all data, which takes ten seconds or more for 20 GB. A changed file has another
time stamp.
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
SETTLED_S = 2.0  # a younger file could be written again under the same time stamp


def is_verified(folder: Path, meta: Metadata) -> bool:
    """Whether these files have been verified and have not changed since."""
    try:
        return json.loads((folder / VERIFIED_FILE).read_text()) == _stamp(folder, meta)
    except (OSError, ValueError):
        return False


def note_verified(folder: Path, meta: Metadata) -> None:
    """Remember that the files are good. In a read-only folder they are verified at each start instead."""
    with suppress(OSError):
        stamp = _stamp(folder, meta)
        if all(time.time() - time_ns / 1e9 > SETTLED_S for _, time_ns in stamp["files"].values()):
            write_atomically(folder / VERIFIED_FILE, lambda path: path.write_text(json.dumps(stamp) + "\n"))


def _stamp(folder: Path, meta: Metadata) -> dict[str, Any]:
    names = [shard.file for shards in meta.splits.values() for shard in shards]
    found = {name: (folder / name).stat() for name in names}
    files = {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}
    return {"fingerprint": meta.fingerprint(), "files": files}
