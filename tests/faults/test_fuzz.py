"""Whatever is in a config, a command line or a data folder's metadata: it means what it says, or is refused in words.

SPLINEGPT_FUZZ_CASES=2000 tries that many of each.
"""

import copy
import dataclasses
import json
import os
import tempfile
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import UserError
from corpus.dataset import Dataset
from corpus.metadata import META_FILE, read_metadata
from tests.runs import make_dataset
from training.config import Config, parse

CASES = settings(
    max_examples=int(os.environ.get("SPLINEGPT_FUZZ_CASES", "60")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
FIELDS = [field.name for field in dataclasses.fields(Config)]
TYPES = typing.get_type_hints(Config)
TEXTS = st.one_of(
    st.text(max_size=6),
    st.integers(-5, 3000).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["True", "False", "true", "auto", "nan", "inf", "-inf", "1e3", "1_0", " 4", "4 ", "0x4", "None", ""]
    ),
    st.sampled_from([value for name in FIELDS for value in typing.get_args(TYPES[name]) if isinstance(value, str)]),
)


def is_what_it_says(name: str, text: str, value: object) -> bool:
    """Whether `value` is what Python's own rules make of `text` for the type of option `name`."""
    kind = TYPES[name]
    if kind is str:
        return value == text
    if kind is bool or text.lower() in ("true", "false"):
        return str(value).lower() == text.lower()
    if kind is int:
        return type(value) is int and value == int(text)
    if kind is float:
        return type(value) is float and value == float(text)
    return value == text and text in typing.get_args(kind) + tuple(
        choice for part in typing.get_args(kind) for choice in typing.get_args(part)
    )


@CASES
@given(st.lists(st.tuples(st.sampled_from(FIELDS), TEXTS), max_size=4))
def test_a_command_line_means_what_it_says_or_is_refused(given_options: list[tuple[str, str]]) -> None:
    try:
        config, _ = parse([f"--{name}={text}" for name, text in given_options])
    except UserError as error:
        assert str(error) and "\n" not in str(error).replace(repr("\n"), "")
        return
    last = dict(given_options)
    for name in FIELDS:
        value = getattr(config, name)
        assert is_what_it_says(name, last[name], value) if name in last else value == getattr(Config(), name)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), st.sampled_from(FIELDS)
)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))


def toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + "}"
    return "''" if value is None else str(value)


@CASES
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4), st.text(max_size=4))
def test_a_toml_file_means_what_it_says_or_is_refused(entries: dict[str, Any], rest: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fuzz.toml"
        text = "".join(f"{name} = {toml(value)}\n" for name, value in entries.items()) + rest
        path.write_bytes(text.encode(errors="replace"))
        try:
            config, _ = parse([str(path)])
        except UserError as error:
            assert str(error)
            return
    for name, value in entries.items():
        found = getattr(config, name)
        if TYPES[name] is not str:
            assert found == value or str(found).lower() == str(value).lower(), (name, value, found)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "words")


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all entries of a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [place for key, item in inner for place in places(item, (*path, key))]


NASTY = st.one_of(
    JSON,
    st.sampled_from(["../val.bin", "/etc/passwd", "train.bin/../../x.bin", ".bin", "a" * 300, "..\\x.bin", "x.bin\0"]),
    st.sampled_from([0, -1, 1 << 48, 1 << 64, 1e300, "uint8", "uint64", "<u2", "object", "gpt2", {"name": "gpt2"}]),
)


@CASES
@given(st.data())
def test_metadata_mean_what_they_say_or_are_refused(prepared: Path, data: st.DataObject) -> None:
    document = json.loads((prepared / META_FILE).read_text())
    changed = copy.deepcopy(document)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from([place for place in places(changed) if place]))
        parent = changed
        for key in place[:-1]:
            parent = parent[key]
        if data.draw(st.booleans()) and isinstance(parent, dict):
            del parent[place[-1]]
        else:
            parent[place[-1]] = copy.deepcopy(data.draw(NASTY))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in prepared.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / META_FILE).write_text(json.dumps(changed))
        try:
            meta = read_metadata(folder)
            opened = Dataset.open(folder)
        except UserError as error:
            assert str(error) and "\n" not in str(error)
            return
        assert json.loads(meta.to_json()) == changed, "something was read as something else"
        stream = opened.tokens("train")
        assert len(stream) == changed["splits"]["train"]["tokens"]


@CASES
@given(st.binary(max_size=60))
def test_metadata_of_any_bytes_are_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / META_FILE).write_bytes(content)
        with pytest.raises(UserError):
            read_metadata(Path(folder))
