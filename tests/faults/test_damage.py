"""A file that was changed or cut, or is not a checkpoint at all, is never read as a good checkpoint."""

from pathlib import Path

import pytest
import torch

from training.sealed_file import NotSealed, check_seal, read_sealed, write_sealed


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sealed") / "file.pt"
    write_sealed({"step": 3, "model": {"weight": torch.randn(5, 7)}, "text": "abc", "numbers": [1, 2.5]}, path)
    return path


def test_what_is_written_is_read_and_torch_reads_it_too(sealed: Path) -> None:
    found, by_torch = read_sealed(sealed), torch.load(sealed, weights_only=True)
    assert found.keys() == by_torch.keys() and found["numbers"] == [1, 2.5]
    assert torch.equal(found["model"]["weight"], by_torch["model"]["weight"])


def test_every_change_of_a_single_byte_is_noticed(sealed: Path, tmp_path: Path) -> None:
    whole, path = bytearray(sealed.read_bytes()), tmp_path / "changed.pt"
    path.write_bytes(whole)
    check_seal(path)
    with open(path, "r+b") as file:
        for place, byte in enumerate(whole):
            for change in (1 << place % 8, 0xFF, 0x20):  # one bit, all bits, or the case of a letter
                file.seek(place)
                file.write(bytes([byte ^ change]))
                file.flush()
                with pytest.raises(NotSealed):
                    check_seal(path)
            file.seek(place)
            file.write(bytes([byte]))
            file.flush()
    check_seal(path)


def test_every_truncation_and_every_extension_is_noticed(sealed: Path, tmp_path: Path) -> None:
    whole, path = sealed.read_bytes(), tmp_path / "cut.pt"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(NotSealed):
            check_seal(path)
    for more in (b"\0", b"\n", whole, b"x" * 1000):
        path.write_bytes(whole + more)
        with pytest.raises(NotSealed):
            check_seal(path)


def test_a_file_that_is_sealed_but_not_ours_is_refused(tmp_path: Path) -> None:
    import hashlib

    from training.sealed_file import SEAL

    for content in (b"", b"no archive", b"PK\3\4" * 50):
        path = tmp_path / "other.pt"
        path.write_bytes(content + SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n")
        with pytest.raises(NotSealed, match="something else"):
            read_sealed(path)
