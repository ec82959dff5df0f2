"""A headless Chromium over its own debugging pipe: what it logs, what it asks the network for, how a page looks.

With --remote-debugging-pipe a browser reads messages of the DevTools protocol, JSON that ends with a zero byte, from
file descriptor 3 and writes them to 4. So nothing but the browser is needed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpcompile.doctor.look import BROWSERS

SECONDS = 60
"""A browser that says nothing for so long has failed."""


def find_chromium() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Page:
    """One tab."""

    def __init__(self, reads: int, writes: int) -> None:
        self._reads, self._writes = reads, writes
        self._number, self._rest = 0, b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, path: Path, *, width: int, scheme: str) -> None:
        """Load the file in a window of that width, in the colour scheme `light` or `dark`."""
        phone = width < 600
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=phone)
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        if error := self._call("Page.navigate", url=path.resolve().as_uri()).get("errorText"):
            raise ValueError(f"{path}: {error}")
        self._until("Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise ValueError(result["exceptionDetails"])
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as a PNG."""
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def print(self) -> bytes:
        """The page as PDF."""
        return base64.b64decode(self._call("Page.printToPDF", printBackground=True)["data"])

    def complaints(self) -> list[str]:
        """Errors and warnings on the console since the page was opened."""
        kinds = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [json.dumps(event["params"]) for event in self.events if event["method"] in kinds]

    def requests(self) -> list[str]:
        """Addresses that the page asked for, but for itself and what it holds."""
        urls = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in urls[1:] if not url.startswith("data:")]

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._writes, data) :]
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        if "error" in answer:
            raise ValueError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def _until(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._read())

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._reads], [], [], SECONDS)[0]:
                raise TimeoutError(f"the browser said nothing for {SECONDS} s")
            piece = os.read(self._reads, 1 << 20)
            if not piece:
                raise EOFError("the browser has ended")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message


@contextmanager
def chromium(program: str) -> Iterator[Page]:
    """A browser with an empty profile; it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="cpcompile-", ignore_cleanup_errors=True) as profile:
        theirs_in, our_out = os.pipe()
        our_in, theirs_out = os.pipe()
        log = os.open(os.devnull, os.O_RDWR)
        command = [
            program,
            "--headless=new",
            "--remote-debugging-pipe",
            f"--user-data-dir={profile}",
            "--no-first-run",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ]
        # Through numbers that are neither 3 nor 4 in case a pipe has one of them already.
        moves = [(theirs_in, 103), (theirs_out, 104), (103, 3), (104, 4), (log, 0), (log, 1), (log, 2)]
        process = os.posix_spawn(
            program,
            command,
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, source, target) for source, target in moves],
            setpgroup=0,
        )
        for descriptor in (theirs_in, theirs_out, log):
            os.close(descriptor)
        try:
            yield Page(our_in, our_out)
        finally:
            for descriptor in (our_in, our_out):
                os.close(descriptor)
            _end(process)


def _end(process: int) -> None:
    """The browser goes when its pipe closes; after five seconds it is killed with its children."""
    for _ in range(50):
        if os.waitpid(process, os.WNOHANG)[0]:
            return
        time.sleep(0.1)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
