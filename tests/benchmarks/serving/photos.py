"""A ResNet-18 for photos, and photos: what the experiments on the service send."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.models import resnet18

import dlops
from dlops.artifact import Artifact
from dlops.preprocess import CenterCrop, Decode, Normalize, Preprocess, Resize, Scale
from dlops.samples import Samples

PREPROCESS = Preprocess(
    input="image",
    shape=(3, 224, 224),
    steps=(
        Decode(mode="RGB"), Resize(size=256), CenterCrop(size=(224, 224)), Scale(),
        Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    ),
)  # fmt: skip
# Most photos of a data set are of about this size.
WIDTH, HEIGHT = 500, 375


def jpegs(count: int, *, seed: int = 0) -> tuple[bytes, ...]:
    """Parts of the two photos that come with scikit-learn, as a camera's files."""
    draw = np.random.default_rng(seed)
    photos = load_sample_images().images
    encoded = []
    for number in range(count):
        photo = photos[number % len(photos)]
        top, left = int(draw.integers(len(photo) - HEIGHT + 1)), int(draw.integers(photo.shape[1] - WIDTH + 1))
        buffer = io.BytesIO()
        Image.fromarray(photo[top : top + HEIGHT, left : left + WIDTH]).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return tuple(encoded)


def make_resnet18(folder: Path, *, precision: str = "fp32") -> Artifact:
    """With random weights, whose labels are its own decisions: speed depends on neither."""
    torch.manual_seed(0)
    model = resnet18().eval()
    raw = jpegs(16)
    with torch.no_grad():
        targets = model(torch.from_numpy(PREPROCESS.batch(raw))).argmax(dim=1).numpy()
    checkpoint = dlops.save_checkpoint(
        model, folder / "run", evaluation=Samples(raw=raw, targets=targets), preprocess=PREPROCESS,
        builder="torchvision:resnet18", name="resnet18", max_batch=32,
    )  # fmt: skip
    (artifact,) = dlops.export_variants(
        checkpoint, variants=[f"onnx-{precision}"], out=folder / "artifacts", max_drop=100.0
    )
    return artifact


def posts(bodies: tuple[bytes, ...], *, headers: str = "") -> list[bytes]:
    """Whole requests to /predict. headers: each with its line's end."""
    return [
        f"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/jpeg\r\n{headers}"
        f"Content-Length: {len(body)}\r\n\r\n".encode() + body
        for body in bodies
    ]  # fmt: skip
