"""Count false alarms of `cpcompile check` for an unchanged bundle on a machine that is busy with other work.

    python benchmarks/check_noise.py model.cpc --model model.pt

A baseline is measured first, while the machine is quiet. Then the same bundle is checked repeatedly with a busy loop on
one core. A fail is a false alarm; inconclusive is an honest answer. Each check runs in a fresh process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from common import save
from rich.console import Console

BUSY = "while True: pass"


def check(bundle: Path, model: Path, baseline: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cpcompile", "check", str(bundle), "--model", str(model)]
    return subprocess.run([*command, "--baseline", str(baseline), *arguments], capture_output=True, text=True)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--model", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--repetitions", default=50)
@click.option("--rounds", default=60)
@click.option("--busy", default=1, help="Number of busy loops during the checks.")
def main(bundle: Path, model: Path, repetitions: int, rounds: int, busy: int) -> None:
    console, verdicts, alarms = Console(), Counter[str](), []
    inconclusive: Counter[str] = Counter()
    with TemporaryDirectory() as temporary:
        baseline = Path(temporary) / "base.json"
        done = check(bundle, model, baseline, "--update-baseline", "--rounds", str(rounds))
        if done.returncode:
            raise click.ClickException(done.stderr)
        loops = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
        started = time.perf_counter()
        try:
            for number in range(1, repetitions + 1):
                done = check(bundle, model, baseline, "--format", "json", "--rounds", str(rounds))
                if done.returncode not in (0, 1, 3):
                    raise click.ClickException(done.stderr)
                found: dict[str, Any] = json.loads(done.stdout)
                verdicts[found["verdict"]] += 1
                alarms += [each["sentence"] for each in found["outcomes"] if each["verdict"] == "fail"]
                inconclusive.update(each["name"] for each in found["outcomes"] if each["verdict"] == "inconclusive")
                seconds = (time.perf_counter() - started) / number
                left = seconds * (repetitions - number) / 60
                console.print(f"{number}/{repetitions} {found['verdict']} ({left:.0f} minutes left)", highlight=False)
        finally:
            for loop in loops:
                loop.kill()
    console.print(f"{dict(verdicts)}; false alarms: {alarms or 'none'}; undecided: {dict(inconclusive)}")
    save(
        "check_noise",
        {
            "busy_loops": busy,
            "rounds": rounds,
            "verdicts": dict(verdicts),
            "false_alarms": alarms,
            "inconclusive": dict(inconclusive),
            "seconds_per_check": seconds,
        },
    )


if __name__ == "__main__":
    main()
