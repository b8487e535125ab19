"""Any UTF-8 text file, by character or in GPT-2's byte-pair encoding; the last tenth is held out."""

import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository root, so that the imports work

from common.errors import UserError, exit_on_user_error  # noqa: E402
from corpus import sources  # noqa: E402


def prepare(local_file: Path | None, folder: Path = HERE, tokenizer: str = "char") -> None:
    """Write the dataset into `folder` from `local_file`, which must be given."""
    if local_file is None:
        raise UserError("no text file was given; write python data/text/prepare.py FILE")
    text = sources.read_text(local_file)
    sources.write_texts(folder, sources.make_tokenizer(tokenizer, text), local_file.name, sources.split_90_10(text))


def named_folder(name: str) -> Path:
    """The folder data/NAME. `UserError` if the name is not a plain one or another prepare script writes there."""
    folder = HERE.parent / name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UserError(f"{name!r} is no name for a folder of data; use letters, digits, '_', '-' and '.'")
    if folder != HERE and (folder / "prepare.py").exists():
        raise UserError(f"data/{name} is prepared by its own prepare.py; choose another --name")
    return folder


@exit_on_user_error
def main() -> None:
    parser = sources.argument_parser("Prepare any UTF-8 text file.", "the text file, UTF-8")
    parser.add_argument("--tokenizer", choices=sources.TOKENIZERS, default="char", help="default: char")
    parser.add_argument("--name", default=HERE.name, help="write to data/NAME, for --dataset NAME (default: text)")
    arguments = parser.parse_args()
    prepare(arguments.local_file, named_folder(arguments.name), arguments.tokenizer)


if __name__ == "__main__":
    main()
