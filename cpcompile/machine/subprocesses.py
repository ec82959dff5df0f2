"""Work in fresh processes, each of which has its memory and its threads to itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from cpcompile.core.errors import CpcompileError


def in_fresh_process(*arguments: str) -> Any:
    """Run `python arguments…` and return the JSON of the last line that it prints; CpcompileError if it fails.

    `-P` keeps the working folder off the child's import path: a file there may have the name of a library.
    """
    command = _command(arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit code {done.returncode}").rsplit("\n", maxsplit=1)[-1]
        raise CpcompileError(f"the measuring process failed ({' '.join(arguments[:2])}): {last}")
    return json.loads(done.stdout.strip().rsplit("\n", maxsplit=1)[-1])


@contextmanager
def fresh_processes(count: int, *arguments: str) -> Iterator[Callable[[str], Any]]:
    """So many processes `python arguments…`, which answer every line that they read with a line of JSON.

    Any thread may call the function that is yielded: it asks a process that is free, and waits for one if need be.
    CpcompileError: the process ended instead. None of them outlives the block.
    """
    processes = [
        subprocess.Popen(_command(arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    free: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
    for each in processes:
        free.put(each)

    def ask(line: str) -> Any:
        process = free.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            print(line, file=process.stdin, flush=True)
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            free.put(process)
        if not answer:
            raise CpcompileError(f"the process {' '.join(arguments[:2])} ended with the exit code {process.wait()}")
        return json.loads(answer)

    try:
        yield ask
    finally:
        for each in processes:
            each.kill()
            each.communicate()


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", *arguments]
