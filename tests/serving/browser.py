"""A headless Chromium, driven over its DevTools protocol: no driver program is needed.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking"
    " --disable-component-update --disable-sync --no-first-run --disable-extensions"
    " --hide-scrollbars --remote-debugging-port=0 --window-size=1280,900"
).split()


def program() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. ``console`` holds what it logged, exceptions and failed requests included."""

    def __init__(self, url: str):
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        command = [program(), *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        port = Path(self._profile.name, "DevToolsActivePort")
        while not port.exists() or len(port.read_text().split()) < 2:
            assert self._process.poll() is None, "the browser ended at its start"
            time.sleep(0.02)
        self._port = port.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/json/list") as answer:
            target = next(t for t in json.load(answer) if t["type"] == "page")
        self._socket = websocket.create_connection(
            target["webSocketDebuggerUrl"], suppress_origin=True, timeout=60
        )
        self._ids, self.console = itertools.count(1), []
        for domain in ("Runtime", "Log", "Page", "DOM"):
            self(f"{domain}.enable")
        self.open(url)

    def __call__(self, method: str, **arguments):
        """The result of one command of the protocol."""
        number = next(self._ids)
        self._socket.send(json.dumps({"id": number, "method": method, "params": arguments}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                return message["result"]
            event, told = message.get("method"), message.get("params", {})
            if event == "Runtime.consoleAPICalled":
                self.console.append([one.get("value") for one in told["args"]])
            elif event == "Runtime.exceptionThrown":
                self.console.append(told["exceptionDetails"])
            elif event == "Log.entryAdded":
                self.console.append((told["entry"]["text"], told["entry"].get("url")))
            elif event == "Page.javascriptDialogOpening":
                self._socket.send(
                    json.dumps(
                        {
                            "id": next(self._ids),
                            "method": "Page.handleJavaScriptDialog",
                            "params": {"accept": True},
                        }
                    )
                )

    def open(self, url: str) -> None:
        self("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str):
        """The value of an expression, awaited."""
        done = self(
            "Runtime.evaluate",
            expression=script,
            awaitPromise=True,
            returnByValue=True,
            userGesture=True,
        )
        assert "exceptionDetails" not in done, (script, done["exceptionDetails"])
        return done["result"].get("value")

    def wait(self, condition: str, seconds: float = 60.0):
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        script = f"(async (v) => (await v) instanceof Node || v)({condition})"
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"still false after {seconds:g} s: {condition}"
            time.sleep(0.02)
        return value

    def click(self, selector: str) -> None:
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView("
            "{block: 'nearest'}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        self.mouse((x, y))

    def mouse(self, *points: tuple[float, float]) -> None:
        """Press at the first point, move over the others, release at the last."""
        for kind, (x, y) in [
            ("mouseMoved", points[0]),
            ("mousePressed", points[0]),
            *(("mouseMoved", point) for point in points[1:]),
            ("mouseReleased", points[-1]),
        ]:
            self(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1,
                clickCount=0 if kind == "mouseMoved" else 1,
            )  # fmt: skip

    def type(self, text: str) -> None:
        self("Input.insertText", text=text)

    def key(self, name: str, modifiers: int = 0) -> None:
        """Press and release a key by its name in KeyboardEvent.key. modifiers: 2 Ctrl, 8 Shift."""
        codes = {"Enter": 13, "Tab": 9, "Escape": 27, " ": 32, "ArrowLeft": 37, "ArrowUp": 38}
        codes |= {"ArrowRight": 39, "ArrowDown": 40}
        text = {"Enter": "\r", " ": " "}.get(name, "") if not modifiers else ""
        about = {"key": name, "windowsVirtualKeyCode": codes.get(name, ord(name[0].upper()))}
        about["modifiers"] = modifiers
        self("Input.dispatchKeyEvent", type="keyDown", **about, text=text)
        self("Input.dispatchKeyEvent", type="keyUp", **about)

    def choose(self, selector: str, file: Path) -> None:
        """Give a file to an <input type=file>."""
        root = self("DOM.getDocument")["root"]["nodeId"]
        node = self("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def look(self, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Set the viewport and the colour scheme."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        self(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait()
        self._profile.cleanup()
