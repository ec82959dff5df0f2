"""The commands and programs of docs/how-to/embed-in-cpp.md work, in an empty folder, in their order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.cpp.building import ROOT, genai, headers, not_run, run

PAGE = (ROOT / "docs/how-to/embed-in-cpp.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r'^```(\w+)(?: title="([^"]*)")?\n(.*?)^```$', PAGE, re.MULTILINE | re.DOTALL)
NEEDS_ROOT, PACKAGES = "Needs root", "pip install onnxruntime onnxruntime-genai\n"


def test_from_a_bundle_to_text(bundle: Path, tmp_path: Path) -> None:
    """All but what installs packages, which have to be there."""
    include, library = headers(), genai()
    if library is None:
        not_run("onnxruntime-genai is not installed, and CPCOMPILE_GENAI does not name its library")
    (tmp_path / "model.cpc").symlink_to(bundle)
    (tmp_path / "cpcompile").symlink_to(ROOT)
    scripts = {title: text for language, title, text in BLOCKS if language == "sh"}
    for language, title, text in BLOCKS:
        if title and language != "sh":
            (tmp_path / title).write_text(text, encoding="utf-8")
    lines = [line for text in scripts.values() for line in text.splitlines()]
    assert len(lines) < 10
    assert all(f" {name}" in scripts[NEEDS_ROOT] for name in ("libonnxruntime-dev", "nlohmann-json3-dev"))
    script = "".join(text for title, text in scripts.items() if title != NEEDS_ROOT)
    assert PACKAGES in script
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CMAKE_PREFIX_PATH": str(include),
        "PYTHONPATH": str(library.parents[1]),
        "CMAKE_BUILD_PARALLEL_LEVEL": "2",
    }
    command = ["bash", "-euo", "pipefail", "-c", script.replace(PACKAGES, "")]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(done.stdout.splitlines()[-1]) > 1
    assert (tmp_path / "installed/include/cpcompile/cpcompile.hpp").is_file()


def test_the_calls_that_the_page_shows_exist(tmp_path: Path) -> None:
    (calls,) = (text for language, title, text in BLOCKS if language == "cpp" and not title)
    head = "#include <cpcompile/cpcompile.hpp>\n"
    use = "void use(const cpcompile::Engine& engine, const cpcompile::Sampling& sampling) {\n"
    (tmp_path / "calls.cpp").write_text(head + use + calls + "}\n", encoding="utf-8")
    folders = (ROOT / "include", headers() / "include", headers() / "include/onnxruntime")
    run("c++", "-std=c++17", "-fsyntax-only", *(f"-I{folder}" for folder in folders), tmp_path / "calls.cpp")
