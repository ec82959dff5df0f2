"""Fuzzers run their cases in batches, each in a process of its own, so that a crash of the runtime is seen.

A child prints `case SEED` before a case begins, `FINDING …` for what is wrong, and in the end `tally NAME COUNT …`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable


def run_batch(module: str, first: int, count: int, seconds: float) -> tuple[list[str], Counter[str]]:
    """The findings and the tally of the cases `first`, `first + 1`, …, which `python -m module` runs."""
    command = [sys.executable, "-m", module, "--child", "--seed", str(first), "--cases", str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        lines, ended = done.stdout.splitlines(), f"exit {done.returncode}, {done.stderr[-500:]}"
    except subprocess.TimeoutExpired as error:
        lines, ended = (error.stdout or b"").decode().splitlines(), "it did not end"
    text = "\n".join(line for line in lines if not line.startswith(("case ", "tally ")))
    findings = [f"FINDING {part}" for part in text.split("FINDING ")[1:]]
    if lines and lines[-1].startswith("tally "):
        words = lines[-1].split()[1:]
        return findings, Counter(dict(zip(words[::2], map(int, words[1::2]), strict=True)))
    last = next((line for line in reversed(lines) if line.startswith("case ")), "before the first case")
    return [*findings, f"FINDING {last}: the process ended there: {ended}"], Counter()


def print_tally(tally: Counter[str]) -> None:
    """The last line of a child."""
    print("tally", *(word for name, number in tally.items() for word in (name, number)), flush=True)


def main(doc: str | None, module: str, run_cases: Callable[[int, int], None], batch: int, seconds: float) -> int:
    """The command line of a fuzzer: `batch` cases per process, which take at most `seconds`."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.0, help="go on until so many have passed")
    parser.add_argument("--cases", type=int, default=batch)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        run_cases(given.seed, given.cases)
        return 0
    end = time.monotonic() + 60 * given.minutes
    done, found, tally = 0, 0, Counter[str]()
    while done < given.cases or time.monotonic() < end:
        count = min(batch, given.cases - done) if done < given.cases else batch
        findings, counts = run_batch(module, given.seed + done, count, seconds)
        done, found = done + count, found + len(findings)
        tally += counts
        for finding in findings:
            print(finding, flush=True)
    print(f"cases {done}: {', '.join(f'{name} {number}' for name, number in tally.items())}, findings {found}")
    return int(found > 0)
