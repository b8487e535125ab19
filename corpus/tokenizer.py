"""Tokenizers: text to integers and back, by character or by GPT-2's byte-pair encoding."""

import codecs
import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from common.cores import usable_cores
from common.errors import UserError

if TYPE_CHECKING:
    import tiktoken

SLICE_CHARACTERS = 1 << 22  # large texts are looked up in slices: 4 bytes a character, twice, for one slice only
LOAD_TIMEOUT_S = 120.0


class TextStream:
    """Turns tokens, one at a time, into pieces of text that can be printed at once.

    A character whose bytes are spread over several tokens is held back until its last byte has come. The
    pieces and the `finish()` joined are what `decode` returns for all the tokens together.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, otherwise empty."""
        return self._decoder.decode(b"", final=True)


class Tokenizer(Protocol):
    """What the trainer and the sampler ask of a tokenizer."""

    @property
    def name(self) -> str:
        """ "char" or "gpt2"."""

    @property
    def vocab_size(self) -> int:
        """Tokens are 0 … vocab_size - 1."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a short text, such as a prompt."""

    def encode_array(self, text: str) -> np.ndarray:
        """The tokens of a text of any size, shape (tokens,), dtype `token_dtype(vocab_size)`."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; `UserError` for one outside the vocabulary."""

    def stream(self) -> TextStream:
        """A fresh `TextStream`: the same text as `decode`, piece by piece."""

    def to_metadata(self) -> dict[str, Any]:
        """A JSON-able description from which `tokenizer_from_metadata` makes the tokenizer again."""


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian unsigned dtype that holds the tokens of a vocabulary, two or four bytes."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class CharTokenizer:
    """One token a character; token i is the i-th character of the vocabulary."""

    name = "char"

    def __init__(self, vocabulary: str | Iterable[str]) -> None:
        """`vocabulary`: distinct single characters. `UserError` for anything else."""
        self.vocabulary = list(vocabulary)
        _check_vocabulary(self.vocabulary)
        self.vocab_size = len(self.vocabulary)
        codes = np.array([ord(character) for character in self.vocabulary], dtype=np.int64)
        # Code point -> token, -1 for none; the last entry stands for all code points beyond.
        self._token_of_code = np.full(int(codes.max()) + 2, -1, dtype=np.int32)
        self._token_of_code[codes] = np.arange(self.vocab_size, dtype=np.int32)

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """The tokenizer whose vocabulary is the characters of `text`, sorted."""
        return cls(sorted(set(text)))

    def encode(self, text: str) -> list[int]:
        """One token a character; `UserError` lists the characters that the vocabulary lacks."""
        tokens: list[int] = self.encode_array(text).tolist()
        return tokens

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, shape (len(text),), dtype `token_dtype(vocab_size)`; about 10 ns a character."""
        tokens = np.empty(len(text), dtype=token_dtype(self.vocab_size))
        for start in range(0, len(text), SLICE_CHARACTERS):
            piece = text[start : start + SLICE_CHARACTERS]
            codes = np.frombuffer(piece.encode("utf-32-le", "surrogatepass"), dtype="<u4")
            found = self._token_of_code.take(codes, mode="clip")
            if found.min() < 0:
                raise UserError(self._unknown(text))
            tokens[start : start + len(piece)] = found
        return tokens

    def _unknown(self, text: str) -> str:
        unknown = sorted(set(text) - set(self.vocabulary))
        shown = ", ".join(repr(character) for character in unknown[:20])
        more = f" and {len(unknown) - 20} more" if len(unknown) > 20 else ""
        return (
            f"the text has characters that are not in the vocabulary of {self.vocab_size}: {shown}{more}; "
            "use only characters that occur in the training data"
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """The characters of `tokens`, joined; `UserError` for a token outside the vocabulary."""
        return "".join(self.vocabulary[_checked(token, self.vocab_size)] for token in tokens)

    def stream(self) -> TextStream:
        """A fresh stream; here every token is a whole character."""
        return TextStream(lambda token: self.decode([token]).encode("utf-8"))

    def to_metadata(self) -> dict[str, Any]:
        """`{"name": "char", "vocabulary": "…"}`, the vocabulary in token order."""
        return {"name": self.name, "vocabulary": "".join(self.vocabulary)}


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, by tiktoken, which is loaded at the first text, not before.

    So training on tokens that are already prepared needs neither tiktoken nor its vocabulary files.
    """

    name = "gpt2"
    vocab_size = 50257
    end_of_text = 50256

    @functools.cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        return _load_gpt2()

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, in which `<|endoftext|>` is text like any other."""
        return self._encoding.encode_ordinary(text)

    def encode_array(self, text: str) -> np.ndarray:
        """As `encode`, shape (tokens,), dtype uint16."""
        return np.array(self.encode(text), dtype=token_dtype(self.vocab_size))

    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        """All documents in a row, `end_of_text` after each, encoded on all cores; shape (tokens,), uint16."""
        encoded = self._encoding.encode_ordinary_batch(list(documents), num_threads=usable_cores())
        parts = [np.array([*tokens, self.end_of_text], dtype=token_dtype(self.vocab_size)) for tokens in encoded]
        return np.concatenate(parts) if parts else np.empty(0, dtype=token_dtype(self.vocab_size))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, U+FFFD for bytes that are not UTF-8; `UserError` outside the vocabulary."""
        return self._encoding.decode([_checked(token, self.vocab_size) for token in tokens])

    def stream(self) -> TextStream:
        """A fresh stream; the bytes of a character may come with several tokens."""
        encoding = self._encoding
        return TextStream(lambda token: encoding.decode_single_token_bytes(_checked(token, self.vocab_size)))

    def to_metadata(self) -> dict[str, Any]:
        """`{"name": "gpt2"}`: the vocabulary is tiktoken's."""
        return {"name": self.name}


def tokenizer_from_metadata(metadata: object) -> Tokenizer:
    """The tokenizer that `to_metadata` described; `UserError` for any other JSON value."""
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if isinstance(metadata, dict) and name == "gpt2":
        return GPT2Tokenizer()
    if isinstance(metadata, dict) and name == "char":
        vocabulary = metadata.get("vocabulary")
        if not isinstance(vocabulary, str):
            raise UserError('a "char" tokenizer needs its "vocabulary" as one string; prepare the data again')
        return CharTokenizer(vocabulary)
    raise UserError('the tokenizer must be an object whose "name" is "char" or "gpt2"; prepare the data again')


def _checked(token: int, vocab_size: int) -> int:
    if not 0 <= token < vocab_size:
        raise UserError(
            f"token {token} is outside the vocabulary, 0 to {vocab_size - 1}; "
            "decode with the tokenizer the model was trained with"
        )
    return int(token)


def _check_vocabulary(vocabulary: list[str]) -> None:
    if not vocabulary:
        raise UserError("the vocabulary is empty; it needs at least one character, so prepare a text that has some")
    seen: set[str] = set()
    for character in vocabulary:
        if not isinstance(character, str) or len(character) != 1 or 0xD800 <= ord(character) <= 0xDFFF:
            raise UserError(f"a vocabulary holds single characters, not {character!a}; prepare the data again")
        if character in seen:
            raise UserError(f"the vocabulary has {character!r} twice; each character may be in it once")
        seen.add(character)


def _load_gpt2() -> "tiktoken.Encoding":
    """tiktoken's "gpt2", loaded in a thread because tiktoken's download has no timeout and could hang."""
    try:
        import tiktoken
    except ImportError as error:
        raise UserError("GPT-2 tokens need the package tiktoken; run `pip install tiktoken`") from error
    loaded: list[tiktoken.Encoding] = []
    failures: list[Exception] = []

    def load() -> None:
        try:
            loaded.append(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # requests' errors, OSError, ValueError: whatever the reason, the mend is the same
            failures.append(error)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(LOAD_TIMEOUT_S)
    if loaded:
        return loaded[0]
    reason = type(failures[0]).__name__ if failures else f"no answer in {LOAD_TIMEOUT_S:.0f} s"
    raise UserError(
        f"GPT-2's vocabulary files could not be loaded ({reason}); connect to the network once, so that "
        "tiktoken can fetch and keep them, or set TIKTOKEN_CACHE_DIR to a folder that holds them"
    )
