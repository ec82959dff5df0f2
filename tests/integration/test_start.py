"""`import cpcompile` and `cpcompile --help` start without torch."""

import subprocess
import sys

import pytest

SNIPPETS = {
    "import": "import cpcompile",
    "help": "from cpcompile.cli import main; main(['--help'], standalone_mode=False)",
    "train help": "from cpcompile.cli import main; main(['train', '--help'], standalone_mode=False)",
    "runtime": "import cpcompile.runtime, cpcompile.bundle",
}


@pytest.mark.parametrize("snippet", SNIPPETS.values(), ids=SNIPPETS)
def test_starts_without_torch(snippet: str) -> None:
    code = f"{snippet}\nimport sys; assert 'torch' not in sys.modules, 'torch was imported'"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_our_own_checkpoints_need_nothing_of_foreign_models() -> None:
    """The eager baseline's memory is measured in a process that loads one: what it does not need must not weigh in."""
    code = (
        "import cpcompile.frontend.checkpoint, sys; "
        "print([m for m in sys.modules if 'partitioning' in m or m == 'onnx_ir'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
