"""The sources of Python's standard library by character, about 12 million: a corpus that every machine has."""

import platform
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository root, so that the imports work

from common.errors import UserError, exit_on_user_error  # noqa: E402
from corpus import sources  # noqa: E402
from corpus.tokenizer import CharTokenizer  # noqa: E402

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
HOLD_OUT_EVERY = 10


def source_texts(root: Path) -> list[str]:
    """Read the UTF-8 `.py` files below `root` in order of path, without tests and installed packages."""
    relative = [path.relative_to(root) for path in root.rglob("*.py")]
    texts = []
    for path in sorted(relative, key=lambda path: path.as_posix()):
        if not LEFT_OUT.intersection(path.parts):
            try:
                texts.append((root / path).read_text(encoding="utf-8"))
            except (UnicodeDecodeError, OSError):
                continue  # a few sources are in other encodings
    return texts


def hold_out_files(texts: list[str]) -> dict[str, str]:
    """Split off every tenth file for validation. The last files together would be only a few packages."""
    val = [i % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 for i in range(len(texts))]
    return {
        "train": "".join(text for text, held_out in zip(texts, val, strict=True) if not held_out),
        "val": "".join(text for text, held_out in zip(texts, val, strict=True) if held_out),
    }


def prepare(local_file: Path | None, folder: Path = HERE) -> None:
    """Write the dataset into `folder`, from `local_file` or else from the running interpreter's library."""
    if local_file is None:
        source = f"the standard library of Python {platform.python_version()}"
        root = Path(sysconfig.get_paths()["stdlib"])
        texts = hold_out_files(source_texts(root))
        if not texts["val"]:
            raise UserError(f"there are no library sources in {root}; pass a text file as LOCAL_FILE")
    else:
        source = local_file.name
        texts = sources.split_90_10(sources.read_text(local_file))
    tokenizer = CharTokenizer.from_text(texts["train"] + texts["val"])
    sources.write_texts(folder, tokenizer, source, texts)


@exit_on_user_error
def main() -> None:
    prepare(sources.local_file_argument("Prepare the Python standard library's sources by character."))


if __name__ == "__main__":
    main()
