"""$SPLINEGPT_CPU: the kernel is built with the instructions that it names, or one sentence says why it cannot be."""

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import backends
from backends import amx, instruction_set, native_build
from kan_layer import KANLayer
from tests import machine
from tests.test_native_build import assert_falls_back, assert_works, forget

pytestmark = pytest.mark.needs("compiler")
Ask = Callable[[str], None]
NAMED = [name for name in instruction_set.FLAGS if name != instruction_set.NATIVE]
REGISTERS = {
    "generic": r"[yz]mm",
    "avx2": "zmm",
    "avx512": "tmm",
}  # x86-64 registers that code for the set must not use


@pytest.fixture(params=NAMED)
def named(request: pytest.FixtureRequest) -> str:
    """An instruction set that this CPU has."""
    if request.param in machine.NEEDS:
        machine.require(request.param)
    return str(request.param)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ask]:
    """A function that sets $SPLINEGPT_CPU and forgets what this process knows about the kernel."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def ask(value: str) -> None:
        monkeypatch.setenv(instruction_set.VARIABLE, value)
        forget()

    yield ask
    forget()


def built(folder: Path, name: str) -> Path:
    """Build the kernel for a set in an empty folder, and return its file."""
    folder.mkdir()
    assert_works(native_build.load_from(folder, str(machine.compiler()), name))
    (library,) = folder.iterdir()
    return library


def test_the_kernel_is_right_with_each_set(tmp_path: Path, named: str) -> None:
    built(tmp_path / named, named)


@pytest.mark.needs("objdump", "x86")
def test_the_kernel_has_no_wider_registers_than_were_asked_for(tmp_path: Path, named: str) -> None:
    library = built(tmp_path / named, named)
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    own = {"generic": "xmm", "avx2": "ymm", "avx512": "zmm"}[named]
    assert re.search(rf"%{own}\d", code) and not re.search(rf"%{REGISTERS[named]}\d", code)


def test_a_library_is_another_s_only_if_the_cpu_is_or_the_set_was_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes may share a home directory, and each must find a kernel that it can run."""
    here = {name: built(tmp_path / f"here-{name}", name).name for name in ("native", "generic")}
    monkeypatch.setattr(native_build, "_cpu", lambda: ["another CPU"])
    there = {name: built(tmp_path / f"there-{name}", name).name for name in ("native", "generic")}
    assert there["generic"] == here["generic"] and len({*here.values(), *there.values()}) == 3


@pytest.mark.parametrize("value", ["generic", " Generic "])
def test_the_variable_chooses_the_set(asked: Ask, value: str) -> None:
    asked(value)
    assert native_build.why_not() is None
    folder = native_build.cache_directory()
    (library,) = folder.iterdir()
    folder.rename(folder.with_name("other"))
    assert library.name == built(folder, "generic").name


@pytest.mark.parametrize("value", ["", "  ", "NATIVE"])
def test_by_default_it_is_this_cpu_s(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(instruction_set.VARIABLE, value)
    assert instruction_set.chosen() == instruction_set.NATIVE


def test_a_set_that_does_not_exist_is_refused_in_one_sentence(asked: Ask) -> None:
    asked("avx9")
    assert_falls_back("SPLINEGPT_CPU is 'avx9'", "one of native, avx512, avx2, generic")


@pytest.mark.needs("x86")
def test_a_set_that_this_cpu_lacks_is_refused_rather_than_run(asked: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False, raising=False)
    asked("avx512")
    assert_falls_back("SPLINEGPT_CPU is 'avx512', which this CPU does not have", "use native or a smaller set")


def test_x86_s_sets_are_refused_elsewhere(asked: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    for name in ("avx2", "avx512"):
        asked(name)
        assert_falls_back(f"SPLINEGPT_CPU is {name!r}", "this CPU is aarch64; use native or generic")


def test_amx_is_ruled_out_by_every_set_that_is_named(asked: Ask, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    asked("native")
    small = backends.Problem(8, 3, 8, torch.device("cpu"))
    assert amx.is_supported() and backends.choose("auto", small)[0].name == "amx"
    asked(named)
    assert not amx.is_supported() and backends.choose("auto", small)[0].name == "native"
    with pytest.raises(
        ValueError, match=f"'amx' cannot be used here: SPLINEGPT_CPU is '{named}', which is without AMX"
    ):
        KANLayer(5, 4, impl="amx")


@pytest.mark.parametrize("amd", [False, True])
@pytest.mark.parametrize("products", [False, True])
def test_bfloat16_is_fast_with_amx_or_on_amd(amd: bool, products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPLINEGPT_CPU", raising=False)
    monkeypatch.setattr(instruction_set, "is_amd", lambda: amd)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: products, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert instruction_set.has_fast_bfloat16() == (amd and products)
    monkeypatch.setenv("SPLINEGPT_CPU", "avx512")
    assert not instruction_set.has_fast_bfloat16(), "the set that was asked for is without"
    monkeypatch.delenv("SPLINEGPT_CPU")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    assert instruction_set.has_fast_bfloat16()
