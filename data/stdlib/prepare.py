"""The sources of Python's standard library by character, about 12 million: a corpus that every machine has."""

import platform
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository root, so that the imports work

from common.errors import UserError, exit_on_user_error  # noqa: E402
from corpus import sources  # noqa: E402
from corpus.python_sources import hold_out_files, source_texts  # noqa: E402
from corpus.tokenizer import CharTokenizer  # noqa: E402


def prepare(local_file: Path | None, folder: Path = HERE) -> None:
    """Write the dataset into `folder`, from `local_file` or else from the running interpreter's library."""
    if local_file is None:
        source = f"the standard library of Python {platform.python_version()}"
        root = Path(sysconfig.get_paths()["stdlib"])
        texts = hold_out_files(list(source_texts(root)))
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
