"""A headless Chromium, spoken to through its debugging pipe, and what a page did."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

#: What is asked of a page: every image, and what the layout came to.
QUESTION = """
(async () => {
  const images = [...document.images];
  const decode = image => image.decode().then(() => true, () => false);
  const decoded = await Promise.all(images.map(decode));
  const styles = getComputedStyle(document.body);
  return JSON.stringify({
    images: images.map((image, i) => {
      const r = image.getBoundingClientRect();
      return {name: image.alt, decoded: decoded[i], natural: image.naturalWidth,
              box: [r.left + scrollX, r.top + scrollY, r.width, r.height]};
    }),
    overflow: document.documentElement.scrollWidth - innerWidth,
    height: document.documentElement.scrollHeight,
    colors: [styles.color, styles.backgroundColor],
    text: document.body.innerText,
  });
})()
"""


def find():
    """Return the path of a browser, or ``None``."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@dataclass
class Visit:
    """What a page did while it was shown.

    Attributes
    ----------
    answers : dict
        To :data:`QUESTION`.
    fetched : list of str
        Addresses asked for, but for the page itself and data in it.
    complaints : list of str
        Messages of the console, exceptions, and what was refused.
    screenshot, pdf : bytes
        PNG of all of the page; how it is printed.
    """

    answers: dict
    fetched: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    screenshot: bytes = b""
    pdf: bytes = b""


class Browser:
    """One tab; commands are sent, events are kept."""

    def __init__(self, reader, writer):
        self._reader, self._writer = reader, writer
        self._buffer, self._count, self.events = b"", 0, []
        self._session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, timeout=180.0, **params):
        """Send a command and return its result."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writer, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + timeout
        while True:
            answer = self._receive(until)
            if answer.get("id") == self._count:
                assert "error" not in answer, (method, answer)
                return answer["result"]
            self.events.append(answer)

    def wait(self, method, timeout=180.0):
        """Wait for an event."""
        until = time.monotonic() + timeout
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._receive(until))

    def _receive(self, until):
        while b"\0" not in self._buffer:
            left = until - time.monotonic()
            if not select.select([self._reader], [], [], max(left, 0))[0]:
                raise TimeoutError("The browser does not answer.")
            part = os.read(self._reader, 1 << 20)
            assert part, "The browser has ended."
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def visit(self, path: Path, width: int, pdf: bool = False) -> Visit:
        """Show a file in a window of a width."""
        self.events.clear()
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=path.as_uri())
        self.wait("Page.loadEventFired")
        found = self.call("Runtime.evaluate", expression=QUESTION, awaitPromise=True)[
            "result"
        ]
        visit = Visit(json.loads(found["value"]))
        whole = {"x": 0, "y": 0, "width": width, "height": visit.answers["height"]}
        shot = self.call(
            "Page.captureScreenshot",
            captureBeyondViewport=True,
            clip=whole | {"scale": 1},
        )
        visit.screenshot = base64.b64decode(shot["data"])
        if pdf:
            printed = self.call("Page.printToPDF", preferCSSPageSize=True)
            visit.pdf = base64.b64decode(printed["data"])
        for event in self.events:
            self._note(event.get("method"), event.get("params", {}), path, visit)
        return visit

    @staticmethod
    def _note(method, params, path, visit):
        if method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith("data:") and url != path.as_uri():
                visit.fetched.append(url)
        elif method == "Log.entryAdded":
            visit.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            visit.complaints.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            visit.complaints.append(params["exceptionDetails"]["text"])


@contextmanager
def browser(folder: Path):
    """Start a browser that reaches no network, and end it."""
    commands, answers = os.pipe(), os.pipe()
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--remote-debugging-pipe",
        f"--user-data-dir={folder}",
    ]
    # The pipes' ends are numbers 3 and 4, whatever they are here.
    script = f'exec "$@" 3<&{commands[0]} 4>&{answers[1]}'
    process = subprocess.Popen(
        ["bash", "-c", script, "browser", find(), *options],
        pass_fds=(commands[0], answers[1]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands[0])
    os.close(answers[1])
    try:
        yield Browser(answers[0], commands[1])
    finally:
        process.terminate()
        process.wait(20)
        os.close(commands[1])
        os.close(answers[0])
