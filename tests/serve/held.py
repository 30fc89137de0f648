"""A session that tests can hold back and break, in place of a real runtime."""

from __future__ import annotations

import threading

import numpy as np

from dlops.runtimes import Placement
from dlops.signature import Feed, Signature


class HeldSession:
    """As logits, the first ten pixels of each image, once `gate` is set; fails where a pixel is 9 or it is `broken`."""

    placement = Placement(runtime="fake", device="cpu", provider="fake", precision="fp32", threads=1)

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.rows: list[int] = []
        self.broken = False

    def run(self, feed: Feed) -> Feed:
        self.entered.set()
        assert self.gate.wait(10)
        image = np.asarray(feed["image"])
        if self.broken or (image == 9).any():
            raise RuntimeError("the secret text of a runtime")
        self.rows.append(len(image))
        return {"logits": image.reshape(len(image), -1)[:, :10].copy()}

    def close(self) -> None:
        pass
