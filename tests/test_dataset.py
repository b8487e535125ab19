"""A dataset gives back exactly what was written, and says so in one sentence when it cannot."""

import json
import os
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus import dataset as dataset_module
from corpus.dataset import Dataset, TokenStream, ensure_prepared, find_dataset
from corpus.tokenizer import CharTokenizer
from corpus.writer import DatasetWriter
from tests.data_fixtures import write_dataset

TRAIN = np.arange(1000) % 97
VAL = np.arange(50) % 13


def contents(stream: TokenStream) -> list[int]:
    return [int(token) for shard in stream.shards for token in shard]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("valid"), TRAIN, VAL)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 99), max_size=40), max_size=6),
    st.integers(1, 30),
)
def test_what_is_written_is_read(pieces: list[list[int]], shard_tokens: int) -> None:
    train = [token for piece in pieces for token in piece]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = CharTokenizer([chr(32 + i) for i in range(100)])
        try:
            with DatasetWriter(Path(folder), tokenizer, "a test", shard_tokens) as writer:
                for piece in pieces:
                    writer.write("train", np.array(piece, dtype=np.int64))
                writer.write("val", np.array([1]))
        except UserError:
            assert not train and list(Path(folder).iterdir()) == []
            return
        data = Dataset.open(Path(folder))
        stream = data.tokens("train")
        assert contents(stream) == train
        assert len(stream) == data.meta.total_tokens("train") == len(train)
        assert all(len(shard) == shard_tokens for shard in stream.shards[:-1])


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 14))
def test_windows_are_slices_that_never_cross_shards(lengths: list[int], length: int) -> None:
    everything = np.arange(sum(lengths), dtype=np.uint16)
    bounds = np.cumsum([0, *lengths])
    stream = TokenStream("train", [everything[a:b] for a, b in pairwise(bounds)])
    expected = [
        everything[start : start + length].tolist() for a, b in pairwise(bounds) for start in range(a, b - length + 1)
    ]
    count = stream.number_of_windows(length)
    assert count == len(expected)
    assert [stream.window(i, length).tolist() for i in range(count)] == expected
    shuffled = np.random.default_rng(0).permutation(count)
    found = stream.windows(shuffled, length)
    assert found.dtype == np.int64 and found.shape == (count, length)
    assert found.tolist() == [expected[i] for i in shuffled]
    for outside in (-1, count):
        with pytest.raises(IndexError):
            stream.window(outside, length)


def test_large_writes_roll_over_and_keep_little_endian_bytes(tmp_path: Path) -> None:
    write_dataset(tmp_path, np.array([1, 2, 3, 4, 5]), np.array([6]), shard_tokens=2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["meta.json", "train_000.bin", "train_001.bin", "train_002.bin", "val.bin"]
    assert (tmp_path / "train_001.bin").read_bytes() == b"\3\0\4\0"


def test_the_fingerprint_depends_on_tokens_and_vocabulary_only(tmp_path: Path) -> None:
    first = Dataset.open(write_dataset(tmp_path / "a", TRAIN, VAL)).fingerprint
    assert Dataset.open(write_dataset(tmp_path / "b", TRAIN, VAL), verify=False).fingerprint == first
    assert Dataset.open(write_dataset(tmp_path / "c", TRAIN[1:], VAL)).fingerprint != first
    assert Dataset.open(write_dataset(tmp_path / "d", TRAIN, VAL, characters=101)).fingerprint != first


@pytest.mark.parametrize("bad", [np.zeros((2, 2), int), np.array([0.5]), np.array([-1]), np.array([100])])
def test_the_writer_refuses_what_are_no_tokens(tmp_path: Path, bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="tokens must"):
        write_dataset(tmp_path, bad, VAL)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_leaves_the_former_dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path, TRAIN, VAL)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tokenizer = CharTokenizer("abc")
    with (
        pytest.raises(RuntimeError, match="half-way"),
        DatasetWriter(tmp_path, tokenizer, "new", 2) as writer,
    ):
        writer.write("train", np.array([0, 1, 2]))
        raise RuntimeError("half-way")
    with (
        pytest.raises(UserError, match="no tokens for val"),
        DatasetWriter(tmp_path, tokenizer, "new") as writer,
    ):
        writer.write("train", np.array([0, 1, 2]))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert contents(Dataset.open(tmp_path).tokens("train")) == TRAIN.tolist()


def test_a_crash_while_publishing_never_leaves_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(tmp_path, TRAIN, VAL)
    replace, calls = Path.replace, []

    def failing(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(UserError, match="No space left"):
        write_dataset(tmp_path, TRAIN + 1, VAL + 1)
    with pytest.raises(UserError, match="not prepared"):
        Dataset.open(tmp_path)
    monkeypatch.undo()
    write_dataset(tmp_path, TRAIN + 1, VAL + 1)
    assert contents(Dataset.open(tmp_path).tokens("val")) == (VAL + 1).tolist()


def test_shards_of_the_former_dataset_are_removed(tmp_path: Path) -> None:
    write_dataset(tmp_path, TRAIN, VAL, shard_tokens=300)
    (tmp_path / "input.txt").write_text("the user's own")
    write_dataset(tmp_path, TRAIN, VAL)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "input.txt",
        "meta.json",
        "train.bin",
        "val.bin",
    ]


@settings(deadline=None)
@given(st.integers(0, 1999), st.integers(1, 255))
def test_one_changed_byte_is_noticed(valid: Path, position: int, change: int) -> None:
    shard = valid / "train.bin"
    original = shard.read_bytes()
    data = bytearray(original)
    data[position] ^= change
    try:
        shard.write_bytes(data)
        with pytest.raises(UserError, match=r"train\.bin has changed since it was prepared"):
            Dataset.open(valid)
        assert Dataset.open(valid, verify=False).tokens("val")
    finally:
        shard.write_bytes(original)


def truncate(folder: Path) -> None:
    (folder / "train.bin").write_bytes(b"\0\0\0")


def make_folder_of_shard(folder: Path) -> None:
    (folder / "val.bin").unlink()
    (folder / "val.bin").mkdir()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda folder: (folder / "val.bin").unlink(), "val.bin is missing"),
        (make_folder_of_shard, "val.bin is missing"),
        (truncate, "train.bin has 3 bytes instead of 2,000"),
        (lambda folder: (folder / "meta.json").unlink(), "has no meta.json"),
        (lambda folder: (folder / "meta.json").write_bytes(b"\xff\xfe{"), "cannot be read as JSON"),
        (lambda folder: (folder / "meta.json").write_text("[" * 100_000), "cannot be read as JSON"),
        (lambda folder: (folder / "meta.json").write_text("9" * 5000), "cannot be read as JSON"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_damage_is_one_sentence(tmp_path: Path, damage: Callable[[Path], None], sentence: str, verify: bool) -> None:
    damage(write_dataset(tmp_path, TRAIN, VAL))
    with pytest.raises(UserError, match=sentence) as error:
        Dataset.open(tmp_path, verify)
    assert "\n" not in str(error.value)


def test_a_missing_folder_and_an_unknown_split_are_user_errors(valid: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data folder"):
        Dataset.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="choose one of train, val"):
        Dataset.open(valid).tokens("test")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def opens_or_is_refused(folder: Path, document: object) -> Dataset | None:
    """Open `folder` with `document` as its meta.json. None if that is refused in one line."""
    path = folder / "meta.json"
    original = path.read_bytes()
    try:
        path.write_text(json.dumps(document))
        return Dataset.open(folder)
    except UserError as error:
        assert "\n" not in str(error)
        return None
    finally:
        path.write_bytes(original)


@settings(deadline=None)
@given(json_values)
def test_any_json_for_metadata_is_a_user_error(valid: Path, document: object) -> None:
    assert opens_or_is_refused(valid, document) is None


def paths_in(value: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path for key, inner in items for path in [(*prefix, key), *paths_in(inner, (*prefix, key))]]


@settings(deadline=None)
@given(st.data())
def test_any_mutation_of_metadata_is_refused_or_harmless(valid: Path, data: st.DataObject) -> None:
    document = json.loads((valid / "meta.json").read_text())
    path = data.draw(st.sampled_from(paths_in(document)))
    *parents, key = path
    holder = document
    for parent in parents:
        holder = holder[parent]
    if data.draw(st.booleans()):
        holder[key] = data.draw(json_values | st.sampled_from([10**30, "uint32", "char", "gpt2", "../train.bin"]))
    else:
        del holder[key]
    opened = opens_or_is_refused(valid, document)
    if opened is not None:  # source and vocabulary may have changed, but the tokens are still those written
        assert contents(opened.tokens("train")) == TRAIN.tolist()
        assert max(contents(opened.tokens("train"))) < opened.tokenizer.vocab_size


@pytest.mark.parametrize(
    "file",
    [
        "../b/train.bin",
        "/dev/null",
        "a/train.bin",
        "a\\train.bin",
        "..",
        ".bin",
        "",
        "train.bin\n",
        "C:x.bin",
    ],
)
def test_paths_that_could_leave_the_folder_are_refused(tmp_path: Path, file: str) -> None:
    for name in ("a", "b"):
        write_dataset(tmp_path / name, TRAIN, VAL)
    for name in (file, str(tmp_path / "b" / "train.bin")):
        document = json.loads((tmp_path / "b" / "meta.json").read_text())
        document["splits"]["train"]["shards"][0]["file"] = name
        (tmp_path / "a" / "meta.json").write_text(json.dumps(document))
        with pytest.raises(UserError, match="must be a bare name"):
            Dataset.open(tmp_path / "a")


def test_tokens_beyond_the_vocabulary_are_refused(valid: Path) -> None:
    document = json.loads((valid / "meta.json").read_text())
    document["tokenizer"]["vocabulary"] = document["tokenizer"]["vocabulary"][:50]
    assert opens_or_is_refused(valid, document) is None


def test_datasets_are_found_by_name_or_path_and_prepared_when_needed(
    valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dataset_module, "DATA_ROOT", tmp_path)
    for name in ("made", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "made" / "prepare.py").write_text(
        "from pathlib import Path\nHERE = Path(__file__).parent\n"
        "def prepare(local_file, folder=HERE):\n"
        "    assert local_file is None\n    (folder / 'meta.json').write_text('{}')\n"
    )
    assert ensure_prepared(str(valid)) == valid
    assert find_dataset("made") == tmp_path / "made"
    for _ in range(2):
        assert ensure_prepared("made") == tmp_path / "made"
    assert capsys.readouterr().out.count("\n") == 1
    for bad in ("empty", "nothing", "", "..", "../made", "x" * 999, "~nobody-of-that-name", "a\0b"):
        with pytest.raises(UserError, match=r"choose one of made, .* python data/text/prepare.py FILE"):
            ensure_prepared(bad)


def test_contents_are_verified_once_and_again_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = write_dataset(tmp_path / "a", TRAIN, VAL), []
    check = dataset_module._check_contents
    monkeypatch.setattr(
        dataset_module, "_check_contents", lambda path, *more: (read.append(path.name), check(path, *more))
    )
    Dataset.open(folder)
    Dataset.open(folder)
    assert read == ["train.bin", "val.bin"] * 2, "just written: a change could still have the same time stamp"
    for path in folder.glob("*.bin"):
        os.utime(path, ns=(10**18, 10**18))
    read.clear()
    for _ in range(3):
        Dataset.open(folder)
    assert read == ["train.bin", "val.bin"]
    data = bytearray((folder / "val.bin").read_bytes())
    data[0] ^= 1
    (folder / "val.bin").write_bytes(data)
    with pytest.raises(UserError, match="SHA-256"):
        Dataset.open(folder)


def test_a_folder_that_cannot_be_written_is_verified_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_dataset(tmp_path / "a", TRAIN, VAL)
    for path in folder.glob("*.bin"):
        os.utime(path, ns=(10**18, 10**18))

    def refuse(*arguments: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("corpus.verification.write_atomically", refuse)
    assert Dataset.open(folder).fingerprint and not (folder / "verified.json").exists()
