"""Work in fresh processes, each of which has its memory and its threads to itself."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from queue import SimpleQueue
from typing import IO, Any

from cpcompile.core.errors import CpcompileError, UsageError
from cpcompile.machine.answering import ANSWER, ERROR, EXIT_CODE


class ProcessFailedError(CpcompileError):
    """A process ended instead of answering, or said something else."""


def in_fresh_process(*arguments: str) -> Any:
    """Run `python arguments…` and return the JSON of the last line that it prints; CpcompileError if it fails.

    `-P` keeps the working folder off the child's import path: a file there may have the name of a library.
    """
    command = _command(arguments)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = _reason(done.stderr, done.returncode)
        raise CpcompileError(f"the measuring process failed ({' '.join(arguments[:2])}): {why}")
    return json.loads(done.stdout.strip().rsplit("\n", maxsplit=1)[-1])


@contextmanager
def fresh_processes(count: int, module: str, *arguments: str) -> Iterator[Callable[[Any], Any]]:
    """Start `count` processes that answer questions with `module`.answer(question, *arguments), see `answering`.

    The function that is yielded asks one that is free, and waits for one if need be; any thread may call it. Questions
    and answers are what JSON has. UsageError, CpcompileError: as the process raises them. ProcessFailedError: there
    is no answer. No process outlives the block.
    """
    with ExitStack() as started:
        processes: list[subprocess.Popen[str]] = []
        free: SimpleQueue[tuple[subprocess.Popen[str], IO[str]]] = SimpleQueue()
        started.callback(_end, processes)
        for _ in range(count):
            errors = started.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            # In a session of its own, because Ctrl-C in a terminal is for the process that asks.
            process = subprocess.Popen(
                _command(("-m", "cpcompile.machine.answering", module, *arguments)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
            )
            processes.append(process)
            free.put((process, errors))

        def ask(question: Any) -> Any:
            process, errors = free.get()
            try:
                said = _answer(process, json.dumps(question))
            except (OSError, ValueError) as error:
                process.kill()  # it may be there still
                exit_code = process.wait()
                errors.seek(0)
                raise ProcessFailedError(f"a process failed: {_reason(errors.read(), exit_code)}") from error
            finally:
                free.put((process, errors))
            if ERROR in said:
                raise (UsageError if said[EXIT_CODE] == UsageError.exit_code else CpcompileError)(said[ERROR])
            return said[ANSWER]

        yield ask


def _answer(process: subprocess.Popen[str], line: str) -> Any:
    """What `process` says to `line`; OSError or ValueError if it is gone, or says something else than JSON."""
    assert process.stdin is not None and process.stdout is not None
    print(line, file=process.stdin, flush=True)
    return json.loads(process.stdout.readline())


def _end(processes: Sequence[subprocess.Popen[str]]) -> None:
    for each in processes:
        each.kill()
    for each in processes:
        with suppress(OSError):  # what was still to be written, nobody reads
            each.communicate()


def _reason(errors: str, exit_code: int) -> str:
    """The last line that a failed process wrote, or else how it ended."""
    ended = f"it was killed by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
    return (errors.strip() or ended).rsplit("\n", maxsplit=1)[-1]


def _command(arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-P", *arguments]
