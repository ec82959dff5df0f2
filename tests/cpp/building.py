"""Build the C++ programs of the tests with the library of the installed onnxruntime wheel and Debian's headers."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "cpp"
"""Ignored by git, and kept between runs."""
STRICT = "-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror"
SANITIZERS = {"asan": "-fsanitize=address,undefined -fno-sanitize-recover=all", "tsan": "-fsanitize=thread"}


def not_run(reason: str) -> NoReturn:
    """Say that these tests did not run; where CI is set, that is a failure."""
    message = f"the tests of C++ were not run: {reason}"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@functools.cache
def headers() -> Path:
    """The folder of include/, fetched once."""
    for tool, package in (("cmake", "cmake"), ("c++", "g++"), ("apt-get", "apt"), ("dpkg", "dpkg")):
        if shutil.which(tool) is None:
            not_run(f"there is no {tool} (Debian: {package})")
    fetched = subprocess.run([ROOT / "tests/cpp/headers.sh", BUILD / "headers"], capture_output=True, text=True)
    if fetched.returncode:
        not_run(f"headers.sh cannot fetch the headers: {fetched.stderr[-500:]}")
    return BUILD / "headers" / "usr"


@functools.cache
def library() -> Path:
    """libonnxruntime.so.1 of the installed wheel, under the names that linkers and GenAI look for."""
    import onnxruntime

    (wheel,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*")
    folder = BUILD / "lib"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("libonnxruntime.so.1", "libonnxruntime.so"):
        link = folder / name
        if not link.is_symlink() or link.readlink() != wheel:
            link.unlink(missing_ok=True)
            link.symlink_to(wheel)
    return folder / "libonnxruntime.so.1"


def genai() -> Path | None:
    """libonnxruntime-genai.so, where its wheel is installed or CPCOMPILE_GENAI names it."""
    if named := os.environ.get("CPCOMPILE_GENAI"):
        return Path(named)
    spec = importlib.util.find_spec("onnxruntime_genai")
    return Path(spec.origin).parent / "libonnxruntime-genai.so" if spec and spec.origin else None


def settings() -> list[str]:
    """The options of cmake that name what the machine may not have installed."""
    named = genai()
    return [
        f"-DCMAKE_PREFIX_PATH={headers()}",
        f"-DONNXRUNTIME_LIBRARY={library()}",
        f"-DONNXRUNTIME_GENAI_LIBRARY={named if named else 'ONNXRUNTIME_GENAI_LIBRARY-NOTFOUND'}",
    ]


@functools.cache
def build(name: str, *targets: str) -> Path:
    """Build `targets` with the sanitizer `name`, or "plain"; returns the folder of the build."""
    folder = BUILD / name
    flags = f"-O0 -g1 {STRICT} {SANITIZERS.get(name, '')}"
    options = ["-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={flags}", f"-DCMAKE_C_FLAGS={flags}"]
    parts = ["-DCPCOMPILE_C=ON", "-DCPCOMPILE_EXAMPLES=ON", "-DCPCOMPILE_TESTS=ON"]
    run("cmake", "-S", ROOT, "-B", folder, *settings(), *options, *parts)
    run("cmake", "--build", folder, "--parallel", "2", "--target", *targets)
    return folder


def run(*command: object) -> str:
    """The output of a command that has to succeed."""
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout
