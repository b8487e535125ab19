"""The sources of the packages that PyTorch and this program bring along, by character or in GPT-2's byte pairs.

About 58 million characters: a corpus for models that the standard library is too small for, without a network.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository root, so that the imports work

from common.errors import UserError, exit_on_user_error  # noqa: E402
from corpus import sources  # noqa: E402
from corpus.python_sources import hold_out_files, source_texts  # noqa: E402

PACKAGES = ("torch", "sympy", "numpy", "matplotlib", "networkx")


def is_ascii(text: str) -> bool:
    """Whether a file is taken. A thousand rare characters would be most of a small model's vocabulary."""
    return bool(text) and text.isascii()


def installed() -> dict[str, Path]:
    """The folder of each package of PACKAGES that is installed here, by name and version. Imports none of them."""
    found = {}
    for name in PACKAGES:
        try:
            release = version(name)
        except PackageNotFoundError:
            continue
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            found[f"{name} {release}"] = Path(next(iter(spec.submodule_search_locations)))
    return found


def prepare(local_file: Path | None, folder: Path = HERE, tokenizer: str = "char") -> None:
    """Write the dataset into `folder`, from `local_file` or else from the installed packages."""
    if local_file is None:
        packages = installed()
        source = ", ".join(packages)
        texts = hold_out_files([text for root in packages.values() for text in source_texts(root, is_ascii)])
        if not texts["val"]:
            raise UserError(f"no sources of {', '.join(PACKAGES)} are installed; pass a text file as LOCAL_FILE")
    else:
        source = local_file.name
        texts = sources.split_90_10(sources.read_text(local_file))
    sources.write_texts(folder, sources.make_tokenizer(tokenizer, texts["train"] + texts["val"]), source, texts)


@exit_on_user_error
def main() -> None:
    parser = sources.argument_parser("Prepare the sources of installed Python packages.")
    parser.add_argument("--tokenizer", choices=sources.TOKENIZERS, default="char", help="default: char")
    arguments = parser.parse_args()
    prepare(arguments.local_file, HERE, arguments.tokenizer)


if __name__ == "__main__":
    main()
