"""The prepare scripts write the same as nanoGPT's, and fail in one sentence."""

import json
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.errors import UserError
from corpus import sources
from corpus.dataset import Dataset
from corpus.tokenizer import GPT2Tokenizer
from tests.data_fixtures import ROOT, TINY_SHAKESPEARE, gpt2_vocabulary  # noqa: F401

needs_gpt2 = pytest.mark.usefixtures("gpt2_vocabulary")
needs_tiny_shakespeare = pytest.mark.skipif(not TINY_SHAKESPEARE.is_file(), reason="the text is not here")


SCRIPTS = sorted(path.parent.name for path in (ROOT / "data").glob("*/prepare.py"))


def script(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "data" / name / "prepare.py"))


def decoded(data: Dataset, split: str) -> str:
    stream = data.tokens(split)
    return data.tokenizer.decode([int(token) for shard in stream.shards for token in shard])


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "some text.txt"
    path.write_text("".join(f"line {i} of caf\u00e9 \U0001f98a\n" for i in range(300)), encoding="utf-8")
    return path


def run_prepare(name: str, folder: Path, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run a prepare script in its own process, with `folder` in place of the script's folder."""
    path = ROOT / "data" / name / "prepare.py"
    code = (
        f"import runpy, sys; from pathlib import Path; from corpus import sources; {before}\n"
        f"module = runpy.run_path({str(path)!r}); prepare = module['prepare']\n"
        f"folder = Path({str(folder)!r})\n"
        "module['main'].__wrapped__.__globals__['prepare'] = lambda file, *rest: prepare(file, folder)\n"
        "module['main']()"
    )
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["shakespeare_char", "stdlib", "packages", "text"])
def test_a_local_file_is_split_as_nanogpt_splits(name: str, text_file: Path, tmp_path: Path) -> None:
    result = run_prepare(name, tmp_path / "out", str(text_file))
    assert result.returncode == 0, result.stderr
    text = text_file.read_text(encoding="utf-8")
    data = Dataset.open(tmp_path / "out")
    assert data.meta.source == text_file.name
    assert decoded(data, "train") == text[: int(len(text) * 0.9)]
    assert decoded(data, "val") == text[int(len(text) * 0.9) :]
    assert data.tokenizer.to_metadata()["vocabulary"] == "".join(sorted(set(text)))
    assert f"train {len(data.tokens('train')):,} tokens" in result.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_shares_a_local_file_out_and_loses_nothing(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if "GPT2Tokenizer" in (ROOT / "data" / name / "prepare.py").read_text(encoding="utf-8"):
        request.getfixturevalue("gpt2_vocabulary")
    text = "".join(f"document {i} of caf\u00e9 \U0001f98a\n\n" for i in range(2500))
    (tmp_path / "some text.txt").write_text(text, encoding="utf-8")
    script(name)["prepare"](tmp_path / "some text.txt", tmp_path / "out")
    splits = [
        decoded(Dataset.open(tmp_path / "out"), split).replace("<|endoftext|>", " ") for split in ("train", "val")
    ]
    assert len(splits[0]) > len(splits[1]) > 0
    assert Counter("".join(splits).split()) == Counter(text.split())


@needs_tiny_shakespeare
def test_tiny_shakespeare_gives_nanogpts_counts(tmp_path: Path) -> None:
    script("shakespeare_char")["prepare"](TINY_SHAKESPEARE, tmp_path)
    data = Dataset.open(tmp_path)
    assert (len(data.tokens("train")), len(data.tokens("val"))) == (1_003_854, 111_540)
    assert data.tokenizer.vocab_size == 65


@needs_gpt2
@needs_tiny_shakespeare
def test_tiny_shakespeare_in_gpt2_tokens_gives_nanogpts_counts(tmp_path: Path) -> None:
    script("shakespeare")["prepare"](TINY_SHAKESPEARE, tmp_path)
    data = Dataset.open(tmp_path)
    assert (len(data.tokens("train")), len(data.tokens("val"))) == (301_966, 36_059)


@needs_gpt2
@pytest.mark.parametrize(
    ("name", "options"), [("shakespeare", {}), ("text", {"tokenizer": "gpt2"}), ("packages", {"tokenizer": "gpt2"})]
)
def test_gpt2_tokens_decode_to_the_text(name: str, options: dict[str, str], text_file: Path, tmp_path: Path) -> None:
    script(name)["prepare"](text_file, tmp_path / "out", **options)
    data = Dataset.open(tmp_path / "out")
    assert data.tokenizer.name == "gpt2"
    assert decoded(data, "train") + decoded(data, "val") == text_file.read_text(encoding="utf-8")


def test_the_standard_library_holds_out_every_tenth_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library"
    for i in range(25):
        (library / f"package{i:02d}").mkdir(parents=True)
        (library / f"package{i:02d}" / "module.py").write_text(f"# {i} \u00e9\n", encoding="utf-8")
    for left_out in ("test/a.py", "email/tests/a.py", "site-packages/a.py", "x/__pycache__/a.py", "data.txt"):
        (library / left_out).parent.mkdir(parents=True, exist_ok=True)
        (library / left_out).write_text("left out\n")
    (library / "latin1.py").write_bytes(b"# \xe9\n")
    (library / "package03" / "__init__.py").write_bytes(b"")  # counts as a file
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
    script("stdlib")["prepare"](None, tmp_path / "out")
    data = Dataset.open(tmp_path / "out")
    assert decoded(data, "val") == "# 8 \u00e9\n# 18 \u00e9\n"
    assert decoded(data, "train") == "".join(f"# {i} \u00e9\n" for i in range(25) if i % 10 != 8)
    assert "Python 3." in data.meta.source


def test_installed_packages_are_read_in_order_without_what_is_not_ascii(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("second_package", "first_package"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}-1.5.dist-info").mkdir()
        (tmp_path / f"{name}-1.5.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.5\n")
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError\n")  # must not be imported
        (tmp_path / name / "caf\u00e9.py").write_text("# \u00e9\n", encoding="utf-8")
        for i in range(6):
            (tmp_path / name / f"module{i}.py").write_text(f"# {i} of {name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    prepare = script("packages")["prepare"]
    names = ("first_package", "absent_package", "second_package")
    monkeypatch.setitem(prepare.__globals__, "PACKAGES", names)
    prepare(None, tmp_path / "out")
    data = Dataset.open(tmp_path / "out")
    assert data.meta.source == "first_package 1.5, second_package 1.5"
    texts = [
        text
        for name in ("first_package", "second_package")
        for text in ("raise RuntimeError\n", *(f"# {i} of {name}\n" for i in range(6)))
    ]
    assert decoded(data, "val") == texts[9]
    assert decoded(data, "train") == "".join(texts[:9] + texts[10:])
    monkeypatch.setitem(prepare.__globals__, "PACKAGES", ("absent_package",))
    with pytest.raises(UserError, match="LOCAL_FILE"):
        prepare(None, tmp_path / "none")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@needs_gpt2
def test_openwebtext_separates_documents_and_holds_some_out(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [f"document {i} \U0001f98a" for i in range(2500)]
    lines = [json.dumps({"text": text, "more": 1}) if suffix == ".jsonl" else text for text in documents]
    path = tmp_path / f"documents{suffix}"
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    script("openwebtext")["prepare"](path, tmp_path / "out")
    data = Dataset.open(tmp_path / "out")
    assert decoded(data, "val").split("<|endoftext|>") == [documents[0], documents[2000], ""]
    assert decoded(data, "train").split("<|endoftext|>") == documents[1:2000] + documents[2001:] + [""]

    # Text that `datasets` streams must give the same.
    def load_dataset(name: str, revision: str, split: str, streaming: bool) -> list[dict[str, str]]:
        assert (name, split, streaming) == ("Skylion007/openwebtext", "train", True)
        return [{"text": text} for text in documents]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    script("openwebtext")["prepare"](None, tmp_path / "streamed")
    assert Dataset.open(tmp_path / "streamed").fingerprint == data.fingerprint


def test_openwebtext_without_datasets_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        script("openwebtext")["prepare"](None, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["{", "[1]", '{"text": 3}', "null", "[" * 100_000])
def test_openwebtext_names_the_line_that_is_no_document(line: str, tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match="line 2 "):
        script("openwebtext")["prepare"](path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "is not a file"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(b"abc\xff"), "is not UTF-8 .byte 3"),
        (lambda path: path.write_bytes(b"abc\0def"), "is binary"),
    ],
)
def test_what_is_no_text_is_one_sentence(write: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path)
    for name in ("text", "shakespeare_char", "stdlib", "packages", "shakespeare"):
        with pytest.raises(UserError, match=sentence):
            script(name)["prepare"](path, tmp_path / "out")


def test_a_byte_order_mark_and_windows_line_ends_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\xef\xbb\xbfa\r\nb\r\n")
    assert sources.read_text(tmp_path / "file") == "a\nb\n"


def test_without_a_network_the_script_ends_in_one_sentence(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/input.txt"
    result = run_prepare("shakespeare_char", tmp_path, before=f"sources.TINY_SHAKESPEARE_URL = {url!r}")
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {url} could not be downloaded") and result.stderr.count("\n") == 1
    assert "LOCAL_FILE" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_download_of_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "login page.html"
    page.write_text("<html>please log in</html>")
    monkeypatch.setattr(sources, "TINY_SHAKESPEARE_URL", page.as_uri())
    with pytest.raises(UserError, match="not the file expected"):
        script("shakespeare_char")["prepare"](None, tmp_path / "out")
    assert not (tmp_path / "out" / "input.txt").exists()


@needs_tiny_shakespeare
def test_a_download_is_kept_for_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "TINY_SHAKESPEARE_URL", TINY_SHAKESPEARE.as_uri())
    for _ in range(2):
        script("shakespeare_char")["prepare"](None, tmp_path)
        monkeypatch.setattr(sources, "TINY_SHAKESPEARE_URL", "http://127.0.0.1:9/")
    assert (tmp_path / "input.txt").read_bytes() == TINY_SHAKESPEARE.read_bytes()


def test_text_needs_a_file_and_a_name_of_its_own(tmp_path: Path) -> None:
    result = run_prepare("text", tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: no text file was given; write python data/text/prepare.py FILE\n"
    named_folder = script("text")["named_folder"]
    assert named_folder("my_book") == ROOT / "data" / "my_book"
    assert named_folder("text") == ROOT / "data" / "text"
    for bad in ("", "..", "../x", "a/b", "/etc", ".hidden", "stdlib", "shakespeare_char"):
        with pytest.raises(UserError):
            named_folder(bad)


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("raise UserError('one sentence')", 2, "error: one sentence\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("print('x' * 10)", 1, ""),  # a command whose output nobody reads
        ("print('x' * 1_000_000)", 1, ""),
    ],
)
def test_commands_end_without_a_traceback(body: str, status: int, message: str) -> None:
    code = (
        "import sys; from common.errors import UserError, exit_on_user_error\n"
        f"@exit_on_user_error\ndef main(): sys.stdin.read(); {body}\n"
        "main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.close()  # only now it may begin
        assert process.stderr.read() == message
        assert process.wait(60) == status


def test_every_script_explains_itself() -> None:
    for name in SCRIPTS:
        path = ROOT / "data" / name / "prepare.py"
        result = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0 and "LOCAL_FILE" in result.stdout


@needs_gpt2
def test_documents_are_encoded_like_texts() -> None:
    tokenizer = GPT2Tokenizer()
    tokens = tokenizer.encode_documents(["one two", "three"]).tolist()
    assert tokens == [*tokenizer.encode("one two"), 50256, *tokenizer.encode("three"), 50256]
