"""OpenWebText in GPT-2's byte-pair encoding, streamed: about 9 billion tokens, 18 GB, with bounded memory."""

import importlib
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # the repository root, so that this runs as a plain script

from common.errors import UserError, exit_on_user_error  # noqa: E402
from common.output import output_may_fail  # noqa: E402
from corpus import sources  # noqa: E402
from corpus.tokenizer import GPT2Tokenizer  # noqa: E402
from corpus.writer import DatasetWriter  # noqa: E402

NAME = "Skylion007/openwebtext"
HOLD_OUT_EVERY = 2000  # nanoGPT holds out 0.05 %; the first document is, so that the smallest corpus has some too
DOCUMENTS_A_BATCH = 1000
REPORT_EVERY = 100_000


def downloaded_documents() -> Iterator[str]:
    """OpenWebText's documents, one after the other, by Hugging Face's `datasets`."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError("OpenWebText needs the package datasets; run `pip install datasets`") from error
    try:
        # The parquet branch: the repository's default one is a loading script, which datasets 4 and later refuse.
        for example in datasets.load_dataset(NAME, revision="refs/convert/parquet", split="train", streaming=True):
            yield example["text"]
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # what hub, network and parsers raise derives from these
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{NAME} could not be streamed ({reason}); check the network, or pass a LOCAL_FILE") from error


def local_documents(path: Path) -> Iterator[str]:
    """The documents of a file, one a line: an object with "text" in `.jsonl`, otherwise plain text."""
    if not path.is_file():
        raise UserError(f"{path} is not a file; give a .jsonl or .txt file with one document a line")
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield (_text_of(line, f"{path} line {number:,}") if path.suffix == ".jsonl" else line.rstrip("\n"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; give a .jsonl or .txt file with one document a line") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a file that is yours to read") from error


def _text_of(line: str, where: str) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{where} is not JSON; give one object with "text" a line') from error
    text = document.get("text") if isinstance(document, dict) else None
    if not isinstance(text, str):
        raise UserError(f'{where} has no "text"; give one object with "text" a line')
    return text


def prepare(local_file: Path | None, folder: Path = HERE) -> None:
    """Write the dataset into `folder` from `local_file`, or else from the network."""
    documents = downloaded_documents() if local_file is None else local_documents(local_file)
    source = NAME if local_file is None else local_file.name
    tokenizer = GPT2Tokenizer()
    done = 0
    with (
        output_may_fail(),
        DatasetWriter(folder, tokenizer, source) as writer,
    ):  # hours of work, and a line now and then
        while batch := list(islice(documents, DOCUMENTS_A_BATCH)):
            held_out = [(done + i) % HOLD_OUT_EVERY == 0 for i in range(len(batch))]
            for split, wanted in (("train", False), ("val", True)):
                chosen = [text for text, is_val in zip(batch, held_out, strict=True) if is_val == wanted]
                writer.write(split, tokenizer.encode_documents(chosen))
            done += len(batch)
            if done % REPORT_EVERY == 0:
                print(f"{done:,} documents", flush=True)
    sources.report(folder)


@exit_on_user_error
def main() -> None:
    prepare(sources.local_file_argument("Prepare OpenWebText, or a .jsonl or .txt file with one document a line."))


if __name__ == "__main__":
    main()
