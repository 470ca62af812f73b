from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from l2p_runtime import native
from l2p_runtime.noise import normal_noise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def look_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Let the loader search other folders, and forget what it found before and after."""
    monkeypatch.delenv(native.SWITCH, raising=False)

    def use(*folders: Path) -> None:
        monkeypatch.setattr(native, "_folders", lambda: folders)
        native._probe.cache_clear()
        native._warn.cache_clear()

    yield use
    native._probe.cache_clear()
    native._warn.cache_clear()


def build(folder: Path, source: str) -> Path:
    """Compile a C source into `folder` under the library's name; skip where no compiler is."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    folder.mkdir(exist_ok=True)
    path = folder / "libl2p_native.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", path], input=source.encode(), check=True)
    return path


GOOD = f"""
int l2p_abi_version(void) {{ return {native.ABI_VERSION}; }}
int l2p_normal_noise(void) {{ return 0; }}
int l2p_euler(void) {{ return 0; }}
int l2p_pixels(void) {{ return 0; }}
int l2p_mix_enlarged(void) {{ return 0; }}
int l2p_onnx_allocator_is_registered(void) {{ return 0; }}
void l2p_onnx_allocator_release(void) {{}}
"""


def test_nothing_there(tmp_path: Path, look_in: Callable[..., None]) -> None:
    look_in(tmp_path / "a", tmp_path / "b")
    assert native.load_native() is None
    status = native.native_status()
    assert (status.available, status.path) == (False, "")
    assert str(tmp_path / "a") in status.reason
    assert str(tmp_path / "b") in status.reason


def test_the_first_use_without_it_says_so_in_one_line(
    tmp_path: Path, look_in: Callable[..., None], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    look_in(tmp_path)
    assert not native.native_status().available
    assert capfd.readouterr().err == ""
    for seed in (1, 2):
        normal_noise(seed, rows=(0, 2), cols=(0, 2))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"l2p_runtime: no native kernels (no libl2p_native.so in {tmp_path})")
    assert line.endswith(native.SLOWER)
    look_in(tmp_path)
    monkeypatch.setenv(native.SWITCH, "0")
    normal_noise(1, rows=(0, 2), cols=(0, 2))
    assert capfd.readouterr().err == ""


def test_found_in_the_second_folder(tmp_path: Path, look_in: Callable[..., None]) -> None:
    path = build(tmp_path / "b", GOOD)
    look_in(tmp_path / "a", tmp_path / "b")
    library = native.load_native()
    assert library is not None
    assert library.path == str(path)
    assert native.load_native() is library
    assert native.native_status() == native.NativeStatus(True, str(path), "")


def test_the_switch_turns_it_off_and_on_again(
    tmp_path: Path, look_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, GOOD)
    look_in(tmp_path)
    monkeypatch.setenv(native.SWITCH, "0")
    assert native.load_native() is None
    assert native.native_status() == native.NativeStatus(False, "", "L2P_NATIVE=0 is set")
    monkeypatch.setenv(native.SWITCH, "1")
    assert native.load_native() is not None


def test_another_abi_is_passed_over(tmp_path: Path, look_in: Callable[..., None]) -> None:
    old = build(tmp_path / "old", "int l2p_abi_version(void) { return 999; }")
    look_in(tmp_path / "old")
    assert native.load_native() is None
    status = native.native_status()
    assert status.path == str(old)
    assert f"ABI version 999, wanted {native.ABI_VERSION}" in status.reason
    good = build(tmp_path / "good", GOOD)
    look_in(tmp_path / "old", tmp_path / "good")
    assert native.native_status() == native.NativeStatus(True, str(good), "")


def test_a_missing_function_is_a_reason(tmp_path: Path, look_in: Callable[..., None]) -> None:
    build(tmp_path, f"int l2p_abi_version(void) {{ return {native.ABI_VERSION}; }}")
    look_in(tmp_path)
    assert native.load_native() is None
    assert "l2p_normal_noise" in native.native_status().reason


def test_a_file_that_is_no_library_is_a_reason(tmp_path: Path, look_in: Callable[..., None]) -> None:
    (tmp_path / "libl2p_native.so").write_text("not a library")
    look_in(tmp_path)
    assert native.load_native() is None
    status = native.native_status()
    assert not status.available
    assert status.path == str(tmp_path / "libl2p_native.so")
    assert "libl2p_native.so" in status.reason


def test_the_folders_searched() -> None:
    own, *installed = native._folders()
    assert own.parts[-2:] == ("l2p_runtime", "lib")
    assert all(folder.parts[-2:] == ("l2p_runtime", "lib") for folder in installed)
