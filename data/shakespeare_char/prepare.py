"""Tiny Shakespeare by character, split as in nanoGPT: 1,003,854 and 111,540 tokens of 65 characters."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository root, so that the imports work

from common.errors import exit_on_user_error  # noqa: E402
from corpus import sources  # noqa: E402
from corpus.tokenizer import CharTokenizer  # noqa: E402


def prepare(local_file: Path | None, folder: Path = HERE) -> None:
    """Write the dataset into `folder`, from `local_file` or else from the network."""
    text = sources.tiny_shakespeare(local_file, folder)
    source = "tinyshakespeare" if local_file is None else local_file.name
    sources.write_texts(folder, CharTokenizer.from_text(text), source, sources.split_90_10(text))


@exit_on_user_error
def main() -> None:
    prepare(sources.local_file_argument("Prepare Tiny Shakespeare by character."))


if __name__ == "__main__":
    main()
