import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.files.whole_files import (
    only_process,
    remove_leftovers,
    require_file_path,
    scratch_folder,
    whole_file,
)


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with whole_file(tmp_path / "ours"):
        pass
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with whole_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize("path", ["", ".", "folder", "loop", "/dev/null"])
def test_only_regular_files_are_replaced(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UsageError, match="is a folder|not a regular file"), whole_file(Path(path)):
        pass


def test_another_suffix_stays(tmp_path: Path) -> None:
    (tmp_path / "config.toml").touch()
    with pytest.raises(UsageError, match=r"config.toml: exists and is not named .onnx"):
        require_file_path(tmp_path / "config.toml", ".onnx")
    with pytest.raises(UsageError, match=r"new.toml: is not named .onnx, as what is written has to be"):
        require_file_path(tmp_path / "new.toml", ".onnx")


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CpcompileError, match="cannot be written"), whole_file(tmp_path / "file" / "below"):
        pass


HOLD = """
import sys, pathlib, cpcompile.files.whole_files as f
with f.unfinished(pathlib.Path(sys.argv[1]), folder=sys.argv[2] == "folder") as path:
    (path / "half" if path.is_dir() else path).write_text("half")
    print(path.name, flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path, kind: str) -> None:
    """Whatever is written next in that folder, whoever has the process ids now."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "a"), kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        name = holder.stdout.readline().strip()
        elsewhere = tmp_path / f".a.building-1-{'0' * 8}"  # as another container knows that process
        (tmp_path / name).rename(elsewhere)
        with whole_file(tmp_path / "b"):
            pass
        assert {path.name for path in tmp_path.iterdir()} == {"b", elsewhere.name}
        holder.kill()
    again = tmp_path / f".a.building-{os.getpid()}-{'0' * 8}"  # the killed process had the id of this one
    elsewhere.rename(again)
    with whole_file(tmp_path / "b"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"b"}


def test_only_unfinished_work_is_taken_for_a_leftover(tmp_path: Path) -> None:
    names = {".a.building-1", ".a.building-1-1", "a.building-1-00000000", ".building-1-00000000", ".a"}
    for name in names:
        (tmp_path / name).mkdir()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names
    remove_leftovers(tmp_path / "nowhere")


def test_temporary_files_are_private_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / ".cpcompile-old.building-1-00000000").mkdir()
    with scratch_folder("test") as folder:
        assert [*tmp_path.iterdir()] == [folder]
        assert folder.stat().st_mode & 0o777 == 0o700
    assert not [*tmp_path.iterdir()]


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib, cpcompile.files.whole_files as f\n"
        "with f.only_process(pathlib.Path(sys.argv[1]), 'busy'):\n    print('held', flush=True); sys.stdin.read()"
    )
    lock = tmp_path / "work" / "lock"
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="busy"), only_process(lock, "busy"):
            pass
        holder.kill()
    with only_process(lock, "busy"):
        pass
