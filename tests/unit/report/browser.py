"""A headless Chromium spoken to through a pipe: what a page asked for, and what it complained of.

The devtools protocol over `--remote-debugging-pipe` needs no port and no websocket: JSON messages
that end in a NUL byte. Requests are counted per page, so what the browser does on its own account
is not mistaken for the page's doing.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

_BINARIES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip
# Chromium reads devtools messages from descriptor 3 and writes them to descriptor 4.
_LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)
_PATIENCE_SECONDS = 60


def find_chromium() -> str | None:
    """Return the path of a Chromium, None where there is none."""
    return next((path for name in _BINARIES if (path := shutil.which(name))), None)


@dataclass
class Visit:
    """What happened while one page was open."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    scroll_width: int = 0
    text: str = ""
    screenshot: bytes = b""


class Browser:
    """One browser process; `visit` opens each page in a tab of its own."""

    def __init__(self, binary: str, profile: Path) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # Far from 3 and 4, so that the first dup2 cannot overwrite the second's source.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 50) for fd in (theirs_in, theirs_out)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, *map(str, high), binary, *_ARGUMENTS,
             f"--user-data-dir={profile}"],
            pass_fds=high,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        for fd in (theirs_in, theirs_out, *high):
            os.close(fd)
        self._out, self._in = ours_out, ours_in
        self._buffer = b""
        self._n_calls = 0
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> "Browser":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._out)  # the browser ends when its pipe does
        os.close(self._in)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], _PATIENCE_SECONDS)
            chunk = os.read(self._in, 1 << 20) if ready else b""
            if not chunk:
                raise TimeoutError("Chromium does not answer")
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def _call(self, method: str, session: str | None = None, **params: object) -> dict[str, Any]:
        self._n_calls += 1
        number = self._n_calls
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self._events.append(answer)

    def _evaluate(self, session: str, expression: str) -> Any:  # noqa: ANN401 (whatever the page gives)
        answer = self._call(
            "Runtime.evaluate",
            session,
            expression=expression,
            awaitPromise=True,
            returnByValue=True,
        )
        return answer["result"].get("value")

    def visit(self, url: str, *, width: int, dark: bool = False, shoot: bool = False) -> Visit:
        """Open a page, wait until it is drawn, and return what happened."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self._call(f"{domain}.enable", session)
        self._call("Emulation.setDeviceMetricsOverride", session, width=width, height=900,
                   deviceScaleFactor=1, mobile=width < 600)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", session, features=[scheme])
        self._events.clear()
        self._call("Page.navigate", session, url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self._events):
            self._events.append(self._receive())
        opened = "document.querySelectorAll('details').forEach(d => { d.open = true; }); "
        self._evaluate(session, f"{opened} new Promise(r => setTimeout(r, 100))")
        result = Visit()
        result.scroll_width = self._evaluate(session, "document.documentElement.scrollWidth")
        result.text = self._evaluate(session, "document.body.innerText")
        if shoot:
            closed = "document.querySelectorAll('details').forEach(d => { d.open = false; }); "
            self._evaluate(session, f"{closed} new Promise(r => setTimeout(r, 200))")
            shot = self._call("Page.captureScreenshot", session, captureBeyondViewport=True)
            result.screenshot = base64.b64decode(shot["data"])
        for event in self._events:
            if event.get("sessionId") == session:
                _note(result, event["method"], event["params"])
        self._call("Target.closeTarget", targetId=target)
        return result


def _note(result: Visit, method: str, params: dict[str, Any]) -> None:
    match method:
        case "Network.requestWillBeSent":
            result.requests.append(params["request"]["url"])
        case "Log.entryAdded":
            result.complaints.append(params["entry"]["text"])
        case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
            result.complaints.append(json.dumps(params)[:500])
        case _:
            pass
