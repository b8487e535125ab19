"""Builds native.cpp once with this machine's C++ compiler, and loads it from the user's cache.

$CXX names another compiler. $SPLINEGPT_CPU names the instructions to build with (instruction_set.py).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from backends import instruction_set

SOURCE = Path(__file__).with_name("native.cpp")
HEADERS = "cpu/*.h"  # relative to the source
COMPILERS = ("c++", "g++", "clang++")
SECONDS_TO_BUILD = 60  # a build takes some two seconds; after sixty something is stuck

FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
OPENMP = ("-fopenmp",)  # without it (Apple's clang) the kernel runs on one thread


class NativeUnavailable(Exception):
    """The kernel cannot be built or loaded here; the message says why, in a phrase."""


@functools.cache
def load() -> ctypes.CDLL:
    """The kernel's library, built if no good copy is in the cache. Raises NativeUnavailable."""
    outcome = _try_to_load()
    if isinstance(outcome, str):
        raise NativeUnavailable(outcome)
    return outcome


@functools.cache
def why_not() -> str | None:
    """Why the kernel cannot be used on this machine, or None. Builds the kernel if necessary."""
    try:
        load()
    except NativeUnavailable as reason:
        return str(reason)
    return None


@functools.cache
def _try_to_load() -> ctypes.CDLL | str:
    try:
        return load_from(cache_directory(), find_compiler(), find_instructions())
    except NativeUnavailable as reason:
        return str(reason)
    except OSError as error:
        return f"the compiled kernel could not be stored or loaded ({error})"


def load_from(
    directory: Path, compiler: str, instructions: str = instruction_set.NATIVE, extra_flags: tuple[str, ...] = ()
) -> ctypes.CDLL:
    """The library for this source, compiler, instruction set and `extra_flags` from `directory`, built if necessary.

    A library's name holds the digest of its contents, so that a damaged or foreign file is recognised without loading
    it. It is put in place by renaming, so that processes that build at the same time do not disturb each other.
    Raises NativeUnavailable.
    """
    sources = [path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob(HEADERS)))]
    flags = [" ".join((*FLAGS, *optional, *extra_flags)) for optional in optional_flags(instructions)]
    key = _digest(*sources, *flags, *_identity(compiler, instructions))
    for path in sorted(directory.glob(f"native-{key}-*.so")):
        try:
            if path.stem.endswith("-" + _digest(path.read_bytes())):
                return ctypes.CDLL(str(path))
        except OSError:  # another process has just removed it, or it cannot be loaded
            pass
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix="build-") as build:
        built = Path(build) / "native.so"
        _compile(compiler, instructions, extra_flags, built)
        try:
            name = f"native-{key}-{_digest(built.read_bytes())}.so"
            library = ctypes.CDLL(str(built))  # before it is kept
        except OSError as error:
            raise NativeUnavailable(f"the library that {compiler} built could not be loaded ({error})") from None
        os.replace(built, directory / name)
    return library


def find_compiler() -> str:
    """The path of a C++ compiler: $CXX, or the first of the usual names that exists. Raises NativeUnavailable."""
    if os.name != "posix":
        raise NativeUnavailable("it is for Linux and macOS")
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    if wanted:
        raise NativeUnavailable(f"CXX is {wanted!r}, which is no program on this machine")
    raise NativeUnavailable(f"no C++ compiler was found (looked for {', '.join(COMPILERS)}; CXX can name another)")


def find_instructions() -> str:
    """The name of the instruction set that $SPLINEGPT_CPU asks for. Raises NativeUnavailable."""
    name = instruction_set.chosen()
    reason = instruction_set.why_not(name)
    if reason is not None:
        raise NativeUnavailable(reason)
    return name


def optional_flags(instructions: str) -> list[tuple[str, ...]]:
    """Sets of flags that not every compiler takes, the best first."""
    return [(*machine, *openmp) for openmp in (OPENMP, ()) for machine in instruction_set.FLAGS[instructions]]


def cache_directory() -> Path:
    """The folder that keeps this user's built kernels, created if necessary; a temporary one where that fails."""
    try:
        if sys.platform == "darwin":
            home = Path.home() / "Library" / "Caches"
        else:
            home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        directory = home / "splinegpt"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(directory, os.W_OK) and directory.stat().st_uid == os.getuid():
            return directory
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        pass
    return Path(_temporary_directory().name)


@functools.cache
def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="splinegpt-")  # deleted when the process ends


def _compile(compiler: str, instructions: str, extra_flags: tuple[str, ...], output: Path) -> None:
    """Build with the first set of optional flags that the compiler takes. Raises NativeUnavailable."""
    complaint = ""
    for optional in optional_flags(instructions):
        status, text = _run(compiler, *FLAGS, *optional, *extra_flags, str(SOURCE), "-o", str(output))
        if status == 0:
            return
        complaint = next((line.strip() for line in text.splitlines() if "error" in line), "no message")
    raise NativeUnavailable(f"{compiler} failed to build it ({complaint[:300]})")


def _identity(compiler: str, instructions: str) -> tuple[str, ...]:
    """Everything besides source and flags that a build depends on: compiler, architecture, and for `native` the CPU."""
    _, version = _run(compiler, "--version")
    cpu = _cpu() if instructions == instruction_set.NATIVE else ()
    return (compiler + version, platform.machine(), *cpu)


def _cpu() -> list[str]:
    """The kind and instructions of this CPU, because machines with different CPUs may share a home directory."""
    kind = [platform.processor()]
    try:
        lines = dict.fromkeys(Path("/proc/cpuinfo").read_text().splitlines())
        kind += [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    except OSError:
        pass
    return kind


def _run(*command: str) -> tuple[int, str]:
    """Exit status and output of a program. If it takes too long, it and all programs it started are killed."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={**os.environ, "LC_ALL": "C"},  # complaints are looked for in English
    ) as process:
        try:
            text, _ = process.communicate(timeout=SECONDS_TO_BUILD)
        except BaseException as error:  # also Ctrl-C, which does not reach the program in its own session
            os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise NativeUnavailable(f"{command[0]} did not finish in {SECONDS_TO_BUILD} s") from None
            raise
    return process.returncode, text


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]
