"""The C++ kernel is built once and atomically; if that fails, a sentence says why and another backend computes."""

import ctypes
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from backends import native, native_build
from kan_layer import KANLayer
from tests import machine, spline_reference
from tests.runs import ROOT

COMPILER = machine.compiler()
pytestmark = pytest.mark.needs("linux")  # XDG folders, /bin/sh, /proc
needs_compiler = pytest.mark.needs("compiler")


def forget() -> None:
    """Forget what this process knows about the kernel."""
    build = native_build
    for cached in (build.load, build.why_not, build._try_to_load, build._temporary_directory):
        cached.cache_clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The empty cache of a user who also has an own folder for temporary files."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache" / "splinegpt"
    forget()


@pytest.fixture
def compiler(tmp_path: Path) -> Callable[..., str]:
    """Makes a compiler out of a shell script; `exec "$CC" "$@"` in it calls the real one."""
    machine.require("compiler")

    def write(body: str, version: str = 'exec "$CC" --version') -> str:
        path = tmp_path / "compiler"
        path.write_text(f'#!/bin/sh\nCC={COMPILER}\n[ "$1" = --version ] && {{ {version}; exit; }}\n{body}\n')
        path.chmod(0o755)
        return str(path)

    return write


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library from the real compiler. Tests must not change it, because this process may have loaded it."""
    machine.require("compiler")
    folder = tmp_path_factory.mktemp("built")
    native_build.load_from(folder, str(COMPILER))
    return next(folder.iterdir())


def assert_works(library: ctypes.CDLL) -> None:
    x, weight, dy = torch.randn(40, 3), torch.randn(3, 6, 20).requires_grad_(), torch.randn(40, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_build, "load", lambda: library)
        y = native.spline_sum(x, weight, 4.0, torch.float32)
        (dw,) = torch.autograd.grad(y, weight, dy)
    x64, w64, dy64 = (tensor.detach().double().numpy() for tensor in (x, weight, dy))
    truths = spline_reference.spline_sum(x64, w64, 4.0), spline_reference.gradients(x64, w64, 4.0, dy64)[1]
    for value, truth in zip((y, dw), truths, strict=True):
        torch.testing.assert_close(value, torch.from_numpy(truth).float(), rtol=1e-4, atol=1e-4)


def assert_falls_back(*parts: str) -> None:
    """Check that layers work without the kernel, and that their reason contains these parts."""
    layer = KANLayer(5, 4, num_control_points=6)
    assert layer.resolved_impl != "native" and layer(torch.randn(2, 5)).shape == (2, 4)
    _, found, reason = layer.why_this_impl.partition("native cannot be used: ")
    assert found and all(part in reason for part in parts), layer.why_this_impl
    assert "\n" not in reason and len(reason) < 500
    with pytest.raises(ValueError, match="impl 'native' cannot be used here") as refused:
        KANLayer(5, 4, impl="native")
    assert reason in str(refused.value)


def compiler_seconds() -> float:
    """CPU time of the programs that this process has called. Unlike wall time, other processes hardly change it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_it_is_built_once_in_seconds(tmp_path: Path, compiler: Callable[..., str]) -> None:
    log = tmp_path / "log"
    counting = compiler(f'echo "$@" >> {log}; exec "$CC" "$@"')
    folder = tmp_path / "kernels"
    folder.mkdir()
    before = compiler_seconds()
    assert_works(native_build.load_from(folder, counting))
    assert compiler_seconds() - before < 10
    assert_works(native_build.load_from(folder, counting))
    assert len(log.read_text().splitlines()) == 1 and len(list(folder.iterdir())) == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def replace_by_another_file(path: Path) -> None:
    path.with_name(path.stem[:-16] + "0123456789abcdef.so").write_text("#!/bin/sh\n")
    path.unlink()


def replace_by_what_cannot_be_loaded(path: Path) -> None:
    rubbish = b"rubbish"
    path.with_name(f"{path.stem[:-16]}{native_build._digest(rubbish)}.so").write_bytes(rubbish)
    path.unlink()


def remove_as_another_process_might(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")  # it is listed, but cannot be read


DAMAGES = [truncate, flip_a_bit, empty, replace_by_another_file, replace_by_what_cannot_be_loaded]


@needs_compiler
@pytest.mark.parametrize("damage", [*DAMAGES, remove_as_another_process_might])
def test_a_damaged_library_is_replaced(tmp_path: Path, built: Path, damage: Callable[[Path], None]) -> None:
    damage(Path(shutil.copy(built, tmp_path)))
    assert_works(native_build.load_from(tmp_path, str(COMPILER)))
    assert [path.name for path in tmp_path.iterdir()] == [built.name]  # its name has the digest of its contents
    assert (tmp_path / built.name).read_bytes() == built.read_bytes()


@needs_compiler
def test_files_of_another_key_are_left_alone(tmp_path: Path, built: Path) -> None:
    others = {tmp_path / f"native-0123456789abcdef-{'0' * 16}.so": "another machine's", tmp_path / "notes": "mine"}
    for path, text in others.items():
        path.write_text(text)
    assert_works(native_build.load_from(tmp_path, str(COMPILER)))
    assert {path: path.read_text() for path in others} == others and len(list(tmp_path.iterdir())) == 3


def test_what_the_library_depends_on_is_in_its_name(
    tmp_path: Path, compiler: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version, source, folder = tmp_path / "version", tmp_path / "small.cpp", tmp_path / "kernels"
    folder.mkdir()
    version.write_text("1")
    source.write_text("int kernel;")
    monkeypatch.setattr(native_build, "SOURCE", source)
    versioned = compiler('exec "$CC" "$@"', version=f"cat {version}")

    def libraries(*extra_flags: str) -> int:
        native_build.load_from(folder, versioned, extra_flags=extra_flags)
        return len(list(folder.iterdir()))

    assert libraries() == libraries() == 1
    version.write_text("2")
    assert libraries() == 2
    assert libraries("-O1") == 3
    monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, "-DCHANGED"))
    assert libraries() == 4
    source.write_text("int kernel;  // changed")
    assert libraries() == 5
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "part.h").write_text("// a header of it")
    assert libraries() == 6


AT_ONCE = """
import os, torch
from backends import native
def right():
    return native.spline_sum(torch.ones(2, 3), torch.ones(3, 4, 5), 4.0, torch.float32).sum().item() == 30
children = []
for _ in range(6):
    children.append(os.fork())
    if children[-1] == 0:
        os._exit(0 if right() else 1)
print([os.waitpid(child, 0)[1] for child in children])
"""


@needs_compiler
def test_processes_that_build_at_once_do_not_disturb_each_other(cache: Path) -> None:
    result = subprocess.run([sys.executable, "-c", AT_ONCE], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[0, 0, 0, 0, 0, 0]\n", "")
    (library,) = cache.iterdir()
    assert library.suffix == ".so" and cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.machine
def test_without_a_compiler_layers_work_and_say_why(cache: Path) -> None:
    script = "from tests.test_native_build import assert_falls_back; assert_falls_back('no C++ compiler was found')"
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": ""}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


ERROR = "echo native.cpp:1:1: error: no vectors >&2; exit 1"
OTHER_ERROR_FIRST = f'case "$*" in *-fopenmp*) echo error: no OpenMP >&2; exit 1; esac; {ERROR}'
HANGS = ["did not finish in 1 s"]
BROKEN = {  # what a compiler does when it builds and when it tells its version, and a part of our sentence
    "error": (ERROR, "echo 1", ["failed to build it", "native.cpp:1:1: error: no vectors"]),
    "silent error": ("exit 1", "echo 1", ["failed to build it", "no message"]),
    "the plainest build's error": (OTHER_ERROR_FIRST, "echo 1", ["error: no vectors"]),
    "error in Latin-1": (r"printf 'error: \344\n' >&2; exit 1", "echo 1", ["failed to build it (error: "]),
    "version in Latin-1": (ERROR, r"printf '\344\n'", ["error: no vectors"]),
    "rubbish": ("for output; do :; done; echo rubbish > $output", "echo 1", ["could not be loaded"]),
    "nothing": ("exit 0", "echo 1", ["could not be"]),
    "hangs": ("sleep 3600", "echo 1", HANGS),
    "hangs when asked for its version": ("exit 0", "sleep 3600", HANGS),
}


@pytest.mark.parametrize(("body", "version", "parts"), BROKEN.values(), ids=BROKEN.keys())
def test_a_compiler_that_does_not_work_is_done_without(
    cache: Path,
    compiler: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    body: str,
    version: str,
    parts: list[str],
) -> None:
    monkeypatch.setenv("CXX", compiler(body, version))
    if parts == HANGS:
        monkeypatch.setattr(native_build, "SECONDS_TO_BUILD", 1)
    assert_falls_back(*parts)
    assert not list(cache.glob("build-*"))


@pytest.mark.parametrize("wanted", ["no-such-compiler", "/no/such/compiler", "/", __file__])
def test_a_cxx_that_is_no_program_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("CXX", wanted)
    assert_falls_back(f"CXX is {wanted!r}")


@pytest.mark.parametrize("stop", ["by its time limit", "by Ctrl-C"])
def test_a_stuck_compiler_is_not_left_running(
    tmp_path: Path, compiler: Callable[..., str], monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    pids, limit = tmp_path / "pids", 1  # pids of two processes, because c++ calls cc1plus; limit in seconds
    stuck = compiler(f"sleep 3600 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait")

    def press_ctrl_c() -> None:
        wait_until(pids.exists)
        os.kill(os.getpid(), signal.SIGINT)

    if stop == "by Ctrl-C":
        threading.Thread(target=press_ctrl_c, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            native_build.load_from(tmp_path, stuck)
    while not pids.exists():  # on a busy machine it may take more than a second to start
        monkeypatch.setattr(native_build, "SECONDS_TO_BUILD", limit)
        with pytest.raises(native_build.NativeUnavailable, match=f"did not finish in {limit} s"):
            native_build.load_from(tmp_path, stuck)
        limit *= 2
    started = [int(pid) for pid in pids.read_text().split()]
    stopped = wait_until(lambda: not any(map(is_running, started)))
    for pid in filter(is_running, started):
        os.kill(pid, signal.SIGKILL)
    assert stopped


def wait_until(happened: Callable[[], bool], seconds: float = 60) -> bool:
    """Wait until it has `happened`; False if it has not in a time that is far longer than needed."""
    end = time.monotonic() + seconds
    while not happened() and time.monotonic() < end:
        time.sleep(0.02)
    return happened()


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_a_compiler_without_the_optional_flags_will_do(cache: Path, compiler: Callable[..., str]) -> None:
    cache.mkdir(parents=True)
    plain = compiler('case "$*" in *-fopenmp*|*=native*) echo error: what? >&2; exit 1; esac; exec "$CC" "$@"')
    assert_works(native_build.load_from(cache, plain))


@needs_compiler
def test_where_the_cache_cannot_be_made_a_temporary_folder_serves_and_goes(cache: Path, tmp_path: Path) -> None:
    cache.parent.write_text("a file where a folder is needed")
    script = "from tests.test_native_build import *; assert_works(native_build.load()); "
    command = [sys.executable, "-c", script + "print(native_build.cache_directory())"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent == tmp_path / "tmp" and not list((tmp_path / "tmp").iterdir())


def test_a_folder_of_somebody_else_is_not_used(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_build.cache_directory() == cache
    monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    directory = native_build.cache_directory()
    assert directory.parent == tmp_path / "tmp" and directory.stat().st_mode & 0o777 == 0o700


def test_a_user_without_a_home_gets_a_temporary_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # raises KeyError, like a uid without an account
    assert native_build.cache_directory().parent == tmp_path / "tmp"
