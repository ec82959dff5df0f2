import subprocess
import sys
from pathlib import Path

import pytest

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.files.whole_files import only_process, require_file_path, temporary_path, whole_file


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


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    target = tmp_path / "a"
    living = temporary_path(target)
    living.touch()
    for name in (f".a.building-{dead.pid}-1", f".a.building-{dead.pid}-2"):
        (tmp_path / name).mkdir()
    with whole_file(target):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"a", living.name}


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
