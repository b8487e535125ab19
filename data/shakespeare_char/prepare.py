"""Tiny Shakespeare by character, split as in nanoGPT: 1,003,854 and 111,540 tokens of 65 characters."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository root, so that this runs as a plain script

from training import corpus  # noqa: E402
from training.errors import exit_on_user_error  # noqa: E402
from training.tokenizer import CharTokenizer  # noqa: E402


def prepare(local_file: Path | None, folder: Path = HERE) -> None:
    """Write the dataset into `folder` from `local_file`, or else from the network."""
    text = corpus.tiny_shakespeare(local_file, folder)
    source = "tinyshakespeare" if local_file is None else local_file.name
    corpus.write_texts(folder, CharTokenizer.from_text(text), source, corpus.split_90_10(text))


@exit_on_user_error
def main() -> None:
    prepare(corpus.local_file_argument("Prepare Tiny Shakespeare by character."))


if __name__ == "__main__":
    main()
