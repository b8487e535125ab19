"""Tokenizers give back the same text, whether they get it whole or in pieces."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, tokenizer_from_metadata
from tests.data_fixtures import ROOT, gpt2_vocabulary  # noqa: F401

unicode_text = st.text(st.characters(exclude_categories=["Cs"]))
needs_gpt2 = pytest.mark.usefixtures("gpt2_vocabulary")


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> str:
    stream = tokenizer.stream()
    return "".join([stream.push(token) for token in tokens] + [stream.finish()])


@settings(deadline=None)
@given(unicode_text.filter(bool))
def test_characters_round_trip(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    tokens = tokenizer.encode(text)
    assert tokenizer.vocab_size == len(set(text))
    assert tokens == [sorted(set(text)).index(character) for character in text]
    assert tokenizer.encode_array(text).tolist() == tokens
    assert tokenizer.decode(tokens) == streamed(tokenizer, tokens) == text


@settings(deadline=None)
@given(unicode_text.filter(bool))
def test_metadata_gives_the_same_tokenizer(text: str) -> None:
    tokenizer = CharTokenizer.from_text(text)
    again = tokenizer_from_metadata(tokenizer.to_metadata())
    assert again.encode(text) == tokenizer.encode(text)
    assert tokenizer_from_metadata(GPT2Tokenizer().to_metadata()).name == "gpt2"


@settings(deadline=None)
@given(st.text(), st.text())
def test_unknown_characters_are_all_named(known: str, text: str) -> None:
    tokenizer = CharTokenizer.from_text("x" + "".join(c for c in known if not 0xD800 <= ord(c) < 0xE000))
    unknown = set(text) - set(tokenizer.vocabulary)
    if not unknown:
        tokenizer.encode(text)
        return
    with pytest.raises(UserError) as error:
        tokenizer.encode(text)
    named = [character for character in unknown if repr(character) in str(error.value)]
    assert len(named) >= min(20, len(unknown))


def test_at_most_twenty_unknown_characters_are_listed() -> None:
    with pytest.raises(UserError, match="and 30 more"):
        CharTokenizer("abc").encode("".join(chr(0x4E00 + i) for i in range(50)))


def test_large_text_is_encoded_fast_and_right() -> None:
    text = "the quick brown fox\n\u00e9\U0001f98a" * 600_000
    tokenizer = CharTokenizer.from_text(text)
    started = time.process_time()
    tokens = tokenizer.encode_array(text)
    assert time.process_time() - started < 2.0
    assert tokens.dtype == np.uint16
    assert tokenizer.decode(tokens[-2200:].tolist()) == text[-2200:]


def test_vocabulary_beyond_two_bytes() -> None:
    characters = [chr(i) for i in range(70_000) if not 0xD800 <= i < 0xE000] + [chr(0x10FFFF - i) for i in range(5000)]
    tokenizer = CharTokenizer(characters)
    tokens = tokenizer.encode_array(characters[-1] + "a")
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [len(characters) - 1, ord("a")]


@pytest.mark.parametrize("vocabulary", ["", "aa", ["ab"], ["\ud800"], [3]])
def test_bad_vocabularies_are_refused(vocabulary: list[str]) -> None:
    with pytest.raises(UserError, match="vocabulary"):
        CharTokenizer(vocabulary)


@pytest.mark.parametrize("token", [-1, 3, 10**9])
def test_tokens_outside_the_vocabulary_are_refused(token: int) -> None:
    tokenizer = CharTokenizer("abc")
    with pytest.raises(UserError, match=f"token {token} "):
        tokenizer.decode([0, token])
    with pytest.raises(UserError, match=f"token {token} "):
        tokenizer.stream().push(token)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(
    json_values
    | st.fixed_dictionaries({"name": st.sampled_from(["char", "gpt2"]) | json_values, "vocabulary": json_values})
)
def test_any_json_makes_a_tokenizer_or_a_user_error(metadata: object) -> None:
    try:
        tokenizer = tokenizer_from_metadata(metadata)
    except UserError:
        return
    assert tokenizer.name in ("char", "gpt2")


@needs_gpt2
@settings(deadline=None)
@given(unicode_text)
def test_gpt2_round_trip(text: str) -> None:
    tokenizer = GPT2_TOKENIZER
    tokens = tokenizer.encode(text)
    assert tokenizer.encode_array(text).tolist() == tokens
    assert tokenizer.decode(tokens) == streamed(tokenizer, tokens) == text


@needs_gpt2
@settings(deadline=None)
@given(st.lists(st.integers(0, 50256), max_size=30))
def test_gpt2_stream_equals_decode_for_any_tokens(tokens: list[int]) -> None:
    assert streamed(GPT2_TOKENIZER, tokens) == GPT2_TOKENIZER.decode(tokens)


@needs_gpt2
def test_gpt2_stream_holds_back_unfinished_characters() -> None:
    tokens = GPT2_TOKENIZER.encode("\U0001f98a")
    stream = GPT2_TOKENIZER.stream()
    assert len(tokens) > 1
    assert [stream.push(token) for token in tokens] == [""] * (len(tokens) - 1) + ["\U0001f98a"]


@needs_gpt2
def test_gpt2_knows_the_published_tokens() -> None:
    assert GPT2_TOKENIZER.encode("Hello world") == [15496, 995]
    assert GPT2_TOKENIZER.decode([50256]) == "<|endoftext|>"
    assert 50256 not in GPT2_TOKENIZER.encode_array("a<|endoftext|>b")
    assert GPT2_TOKENIZER.encode_documents(["Hello world", ""]).tolist() == [15496, 995, 50256, 50256]
    with pytest.raises(UserError, match="token 50257 "):
        GPT2_TOKENIZER.decode([50257])


def test_gpt2_without_vocabulary_or_network_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    environment = dict(os.environ, TIKTOKEN_CACHE_DIR=str(tmp_path), HTTPS_PROXY="http://127.0.0.1:9")
    environment["https_proxy"] = environment["HTTPS_PROXY"]
    code = (
        "from common.errors import exit_on_user_error; from corpus.tokenizer import GPT2Tokenizer\n"
        "exit_on_user_error(lambda: GPT2Tokenizer().encode('a'))()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert "TIKTOKEN_CACHE_DIR" in result.stderr


def test_gpt2_without_tiktoken_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match="pip install tiktoken"):
        GPT2Tokenizer().encode("a")


GPT2_TOKENIZER = GPT2Tokenizer()  # loads its vocabulary at first use, so once for all tests
