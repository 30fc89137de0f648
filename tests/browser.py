"""A real browser that tests give orders, and look at pages in."""

from __future__ import annotations

import base64
import json
import os
import select
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_ANSWERS_S = 60.0
# What the browser says of a page that is on its way to another address.
_LEAVING = {"Inspected target navigated or closed", "Cannot find default execution context"}


class RefusedError(AssertionError):
    """The browser did not carry an order out."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class Browser:
    """A headless browser that takes orders over its debugging pipe; `profile` is an empty folder for it."""

    def __init__(self, program: str, profile: Path) -> None:
        orders_in, self._orders = os.pipe()
        self._answers, answers_out = os.pipe()
        # The browser reads orders at descriptor 3 and answers at 4, each message ended by a zero byte.
        command = (
            f'exec "$0" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync '
            f"--disable-background-networking --remote-debugging-pipe '--user-data-dir={profile}' about:blank "
            f"3<&{orders_in} 4>&{answers_out}"
        )
        self._browser = subprocess.Popen(
            ["bash", "-c", command, program], pass_fds=(orders_in, answers_out), stderr=subprocess.DEVNULL
        )
        os.close(orders_in)
        os.close(answers_out)
        self._unread, self._asked = b"", 0

    def close(self) -> None:
        self._browser.kill()
        self._browser.wait(10)
        os.close(self._orders)
        os.close(self._answers)

    def ask(self, method: str, parameters: Mapping[str, Any], *, session: str | None = None) -> dict[str, Any]:
        """The answer to an order of the Chrome DevTools Protocol; session: of the tab that it is for."""
        self._asked += 1
        order = {"id": self._asked, "method": method, "params": parameters}
        os.write(self._orders, json.dumps(order | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            while b"\0" not in self._unread:
                assert select.select([self._answers], [], [], _ANSWERS_S)[0], f"no answer to {method}"
                read = os.read(self._answers, 1 << 16)
                assert read, f"the browser ended at {method}"
                self._unread += read
            message, _, self._unread = self._unread.partition(b"\0")
            answer = json.loads(message)
            if answer.get("id") == self._asked:
                if "error" in answer:
                    raise RefusedError(answer["error"]["message"])
                result: dict[str, Any] = answer["result"]
                return result


class Tab:
    """A page of its own in a browser."""

    def __init__(self, browser: Browser, page: str = "") -> None:
        """page: its HTML; `visit` takes it to an address instead."""
        self._browser = browser
        self._target = browser.ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        attached = browser.ask("Target.attachToTarget", {"targetId": self._target, "flatten": True})
        self._session = attached["sessionId"]
        frame = self.ask("Page.getFrameTree")["frameTree"]["frame"]["id"]
        self.ask("Page.setDocumentContent", frameId=frame, html=page)

    def visit(self, url: str) -> None:
        self.ask("Page.navigate", url=url)

    def wait_for(self, script: str, *, within_s: float = 20.0) -> Any:
        """What an expression is as soon as that is true."""
        deadline = time.monotonic() + within_s
        # On a page that is not there yet, nothing is true.
        tried = f"(() => {{ try {{ return {script} }} catch {{ return false }} }})()"
        while not (found := self._tell_unless_leaving(tried)):
            if time.monotonic() > deadline:
                raise AssertionError(f"never true: {script}; the page: {self.tell('document.body?.innerText')}")
            time.sleep(0.05)
        return found

    def _tell_unless_leaving(self, script: str) -> Any:
        """What an expression is there; None when the page went elsewhere while it was asked."""
        try:
            return self.tell(script)
        except RefusedError as refused:
            if refused.message not in _LEAVING:
                raise
            return None

    def choose_file(self, selector: str, path: Path) -> None:
        """Put a file in a field for files, as a person does."""
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.ask("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self) -> bytes:
        """PNG of all of the page."""
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def close(self) -> None:
        self._browser.ask("Target.closeTarget", {"targetId": self._target})

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to an order of the Chrome DevTools Protocol."""
        return self._browser.ask(method, parameters, session=self._session)

    def be(self, *, width: int, paper: bool = False, dark: bool = False) -> None:
        """So wide in pixels, with the style for paper or for a screen, for a reader who prefers dark or light."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media="print" if paper else "screen", features=[scheme])

    def tell(self, script: str) -> Any:
        """What an expression is there."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def pdf(self) -> bytes:
        """The page as it goes to an A4 printer that leaves backgrounds out, as browsers' dialogs have it at first."""
        printed = self.ask("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, preferCSSPageSize=True)
        return base64.b64decode(printed["data"])
