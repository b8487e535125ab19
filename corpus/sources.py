"""Functions that prepare scripts share: read or download text, split it, and write it as a dataset."""

import argparse
import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from common.errors import UserError
from common.files import expand_home
from corpus.metadata import SPLITS, read_metadata
from corpus.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, tokenizer_from_metadata
from corpus.writer import DatasetWriter

DOWNLOAD_TIMEOUT_S = 30.0  # for each read from the network, not for the whole download

TOKENIZERS = ("char", "gpt2")  # the names that make_tokenizer takes

TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def argument_parser(
    description: str, local_file_help: str = "a text file that stands in for the usual source"
) -> argparse.ArgumentParser:
    """A parser with the argument that all prepare scripts have: `local_file`, a path or None."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "local_file",
        metavar="LOCAL_FILE",
        type=lambda text: Path(expand_home(text)),
        nargs="?",
        help=local_file_help,
    )
    return parser


def local_file_argument(description: str) -> Path | None:
    """The LOCAL_FILE of the command line, or None."""
    local_file: Path | None = argument_parser(description).parse_args().local_file
    return local_file


def read_text(path: Path) -> str:
    """Read a UTF-8 file, without byte-order mark, lines ended by "\\n". `UserError` if it is no text."""
    advice = "give a UTF-8 text file"
    if not path.is_file():
        raise UserError(f"{path} {'is not a file' if path.exists() else 'does not exist'}; {advice}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,}); {advice}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {advice} that is yours to read") from error
    if not text:
        raise UserError(f"{path} is empty; {advice} with some text in it")
    if "\0" in text:
        raise UserError(f"{path} is binary (it has a zero byte); {advice}")
    return text


def download(url: str, path: Path, sha256: str) -> None:
    """Fetch `url` into `path` atomically. `UserError` if that fails or the content is not the expected one."""
    advice = "check the network, or fetch it elsewhere and pass it as LOCAL_FILE"
    print(f"downloading {url}", flush=True)
    try:
        with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_S) as response:
            content: bytes = response.read()
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url} could not be downloaded ({reason}); {advice}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"what came from {url} is not the file expected (its SHA-256 differs); {advice}")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); make room there") from error
    finally:
        temporary.unlink(missing_ok=True)


def tiny_shakespeare(local_file: Path | None, folder: Path) -> str:
    """Karpathy's tinyshakespeare, 1,115,394 characters, from a local file, `folder/input.txt` or the network."""
    if local_file is None:
        local_file = folder / "input.txt"
        if not local_file.exists():
            download(TINY_SHAKESPEARE_URL, local_file, TINY_SHAKESPEARE_SHA256)
    return read_text(local_file)


def split_90_10(text: str) -> dict[str, str]:
    """Split off the last 10 % of the characters for validation, exactly as nanoGPT does."""
    boundary = int(len(text) * 0.9)
    return {"train": text[:boundary], "val": text[boundary:]}


def make_tokenizer(name: str, text: str) -> Tokenizer:
    """Make the tokenizer `name`: "char", with the characters of `text`, or "gpt2"."""
    return GPT2Tokenizer() if name == "gpt2" else CharTokenizer.from_text(text)


def write_texts(folder: Path, tokenizer: Tokenizer, source: str, texts: dict[str, str]) -> None:
    """Encode the texts of both splits, write them as a dataset, and print its sizes."""
    with DatasetWriter(folder, tokenizer, source) as writer:
        for split in SPLITS:
            writer.write(split, tokenizer.encode_array(texts[split]))
    print_sizes(folder)


def print_sizes(folder: Path) -> None:
    """Print the number of tokens per split of a prepared folder, and its vocabulary size."""
    meta = read_metadata(folder)
    counts = ", ".join(f"{split} {meta.total_tokens(split):,} tokens" for split in meta.splits)
    vocab_size = tokenizer_from_metadata(meta.tokenizer).vocab_size
    print(f"{folder}: {counts}, vocabulary {vocab_size:,} ({meta.tokenizer['name']})", flush=True)
