"""Findings from files and metadata, without importing anything: packages, torch's CUDA, programs, headers, cards."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from cpcompile.core.errors import first_line
from cpcompile.doctor.finding import Finding

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ONNXRUNTIME_WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino")
"""The wheels that contain the module onnxruntime."""
HEADER = "onnxruntime_cxx_api.h"
INCLUDES = ("onnxruntime", "onnxruntime/core/session", "")
PCI = Path("/sys/bus/pci/devices")
NVIDIA_DRIVER = Path("/proc/driver/nvidia")
NVIDIA, DISPLAY = "0x10de", "0x03"
"""Vendor and class of a PCI device. Source: pci.ids."""
CUDA_VERSION = re.compile(r"^cuda\b[^=\n]*=\s*(['\"])(.+)\1", re.MULTILINE)
SECONDS = 5
"""How long a program may take to print its version."""


def python() -> Finding:
    """The running interpreter."""
    return Finding(name="python", state="ok", version=platform.python_version(), detail=platform.platform())


def package(distribution: str, module: str, *, extra: str | None = None) -> Finding:
    """A package by its metadata and its module; `extra` is the extra of cpcompile that installs it."""
    install = f"pip install 'cpcompile[{extra}]'" if extra else "pip install cpcompile"
    again = f"pip install --force-reinstall --no-deps {distribution}"
    there = importlib.util.find_spec(module) is not None
    try:
        version: str | None = importlib.metadata.version(distribution)  # None if METADATA has no version
    except importlib.metadata.PackageNotFoundError:
        if not there:
            return Finding(name=distribution, state="absent", detail="not installed", fix=(install,))
        wrong = f"the module {module} is present without its metadata"
        return Finding(name=distribution, state="broken", detail=wrong, fix=(again,))
    if not version or not there:
        wrong = "its metadata has no version" if there else f"half installed: there is no module {module}"
        return Finding(name=distribution, state="broken", version=version or None, detail=wrong, fix=(again,))
    return Finding(name=distribution, state="ok", version=version)


def onnxruntime() -> Finding:
    """The wheel that contains the module; two of them overwrite each other's files."""
    installed = [wheel for wheel in ONNXRUNTIME_WHEELS if _has(wheel)]
    if len(installed) > 1:
        return Finding(
            name="onnxruntime",
            state="broken",
            detail=f"{' and '.join(installed)} are installed; they hold the same module and conflict",
            fix=(f"pip uninstall -y {' '.join(installed)}", "pip install 'cpcompile[cpu]'  # or 'cpcompile[gpu]'"),
        )
    found = package(installed[0] if installed else "onnxruntime", "onnxruntime", extra="cpu")
    wheel = f"wheel {found.name}" if found.state == "ok" else found.detail
    return Finding(name="onnxruntime", state=found.state, version=found.version, detail=wheel, fix=found.fix)


def torch() -> Finding:
    """The torch package; version.py says whether it was built for CUDA, and importing it would take seconds."""
    found = package("torch", "torch", extra="build")
    if found.state != "ok":
        return found
    cuda = _torch_cuda()
    return Finding(name="torch", state="ok", version=found.version, detail=f"CUDA {cuda}" if cuda else "without CUDA")


def torch_cuda() -> Finding:
    """A torch that was built for CUDA, which holds the buffers of TensorRT's engines."""
    cuda = _torch_cuda() if package("torch", "torch").state == "ok" else None
    if cuda:
        return Finding(name="torch-cuda", state="ok", version=cuda)
    install = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu130"
    return Finding(name="torch-cuda", state="absent", detail="torch was built without CUDA", fix=(install,))


def program(name: str, *names: str, package: str) -> Finding:
    """The first of `names` that is on PATH, with the version that it prints; `package` is its Debian package."""
    path = next(filter(None, map(shutil.which, names or (name,))), None)
    install = f"sudo apt-get install {package}"
    if path is None:
        return Finding(name=name, state="absent", detail=f"no {' or '.join(names or (name,))} on PATH", fix=(install,))
    try:
        done = subprocess.run(
            (path, "--version"), capture_output=True, text=True, check=True, timeout=SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Finding(name=name, state="broken", detail=f"{path}: {first_line(error)}", fix=(install,))
    version = re.search(r"\d+(\.\d+)+", done.stdout)
    return Finding(name=name, state="ok", version=version[0] if version else None, detail=path)


def onnxruntime_headers() -> Finding:
    """The C++ headers of ONNX Runtime, which its wheels do not contain."""
    roots = [*os.environ.get("CPATH", "").split(os.pathsep), "/usr/include", "/usr/local/include"]
    for folder in (Path(root, inner) for root in roots if root for inner in INCLUDES):
        if (folder / HEADER).is_file():
            text = (folder / "onnxruntime_c_api.h").read_text(encoding="utf-8", errors="replace")
            version = re.search(r"#define ORT_API_VERSION (\d+)", text)
            api = f"1.{version[1]}" if version else None
            return Finding(name="onnxruntime-headers", state="ok", version=api, detail=str(folder))
    install = "sudo apt-get install libonnxruntime-dev"
    return Finding(name="onnxruntime-headers", state="absent", detail=f"no {HEADER}; set CPATH", fix=(install,))


def nvidia_cards() -> list[str]:
    """PCI addresses of NVIDIA's display controllers, with or without a driver."""
    return [
        device.name
        for device in sorted(PCI.glob("*"))
        if _read(device / "vendor") == NVIDIA and _read(device / "class").startswith(DISPLAY)
    ]


def nvidia_here() -> bool:
    """Whether there is an NVIDIA card, or its driver (containers and embedded boards may not show a PCI bus)."""
    return bool(nvidia_cards()) or NVIDIA_DRIVER.exists()


def _has(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _torch_cuda() -> str | None:
    """The text that torch/version.py assigns to `cuda`."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    folders: Iterable[str] = spec.submodule_search_locations or ()
    for folder in folders:
        # Not ast.parse: in Python 3.11, threads that parse at the same time fail (python/cpython#106905).
        if found := CUDA_VERSION.search((Path(folder) / "version.py").read_text(encoding="utf-8")):
            return found[2]
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
