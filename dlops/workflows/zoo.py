"""Every network that torchvision builds, exported and checked: `python -m dlops.workflows.zoo` (make zoo).

One process a network, so that what one of them breaks or leaks is not another's. What was found is kept after each, and
a run that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from dlops.console import out, progress_bar, say
from dlops.errors import DlopsError, UsageError
from dlops.manifest import Record
from dlops.version import __version__

FORMATS = ("onnx-fp32", "torchscript-fp32")
MAX_PARAMETERS = 200_000_000
_LIMIT_S = 900.0  # of wall-clock time, one network
# Half of them are evaluation samples; parity runs each at several batch sizes.
_SAMPLES = 8
_MAX_BATCH = 4
_SIZE = 224
# The least that RAFT takes: eighths of it still have to be pooled three times.
_FLOW = (128, 160)
# Frames of a video.
_FRAMES = 16
# Detectors resize what they are given to the size of their training; by these arguments to that of the samples.
_DETECTED = 256


class Tried(Record):
    """What became of one network in one format. passed: None where it was not tried, and reason says why."""

    network: str
    slug: str
    passed: bool | None
    reason: str = ""
    parameters: int | None = None
    seconds: float = 0.0
    dlops_version: str = __version__
    torch: str = ""


def run_zoo(patterns: Sequence[str], *, kept: Path, again: bool = False, limit_s: float = _LIMIT_S) -> list[Tried]:
    """Try every network whose name fits one of the patterns, and return what is known of all of those.

    kept: the file of results, a JSON line each. What passed there, by this dlops and this torch, or is not to be tried,
    is not tried again unless `again`. limit_s: seconds that one network may take. Raises UsageError where no name fits.
    """
    import torch
    from torchvision.models import list_models

    names = [name for name in list_models() if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if not names:
        raise UsageError(f"{', '.join(patterns)}: torchvision builds no network of that name", hint="resnet*, say")
    known = {(one.network, one.slug): one for one in _read(kept)}
    made_with = (__version__, torch.__version__)

    def is_known(name: str) -> bool:
        rows = [known.get((name, slug)) for slug in FORMATS]
        return all(row and row.passed is not False and (row.dlops_version, row.torch) == made_with for row in rows)

    missing = [name for name in names if again or not is_known(name)]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with progress_bar("networks", total=len(missing)) as bar:
        for name in missing:
            found = _in_a_process(name, limit_s)
            known |= {(one.network, one.slug): one for one in found}
            with kept.open("a") as file:
                file.writelines(one.model_dump_json() + "\n" for one in found)
            say(f"{name}: {'; '.join(f'{one.slug} {_word(one)}' for one in found)}")
            bar.advance(note=name)
    return [known[name, slug] for name in names for slug in FORMATS if (name, slug) in known]


def table(tried: Sequence[Tried]) -> str:
    """Markdown: counts a format, then every network."""
    counts = {slug: Counter(_word(one).partition(":")[0] for one in tried if one.slug == slug) for slug in FORMATS}
    lines = [
        "| format | passed | failed | not tried |", "|---|---|---|---|",
        *(f"| {slug} | {one['passed']} | {one['FAILED']} | {one['not tried']} |" for slug, one in counts.items()),
        "", f"| network | parameters | {' | '.join(FORMATS)} |", f"|---|---|{'---|' * len(FORMATS)}",
    ]  # fmt: skip
    by_name: dict[str, dict[str, Tried]] = {}
    for one in tried:
        by_name.setdefault(one.network, {})[one.slug] = one
    for name, found in by_name.items():
        size = next((f"{one.parameters / 1e6:.1f} M" for one in found.values() if one.parameters), "–")
        words = [_word(found[slug]) if slug in found else "–" for slug in FORMATS]
        lines.append(f"| {name} | {size} | {' | '.join(words)} |")
    return "\n".join(lines) + "\n"


def try_network(name: str) -> list[Tried]:
    """Export one network in every format, here: untrained, on coloured noise. What goes wrong is a reason."""
    import torch

    from dlops.builders import find_builder
    from dlops.export.pipeline import export_each
    from dlops.workflows.sources import adopt

    def all_of_them(passed: bool | None, reason: str, parameters: int | None = None) -> list[Tried]:
        return [
            Tried(network=name, slug=slug, passed=passed, reason=reason, parameters=parameters, torch=torch.__version__)
            for slug in FORMATS
        ]

    source = f"torchvision:{name}"
    kwargs = _arguments(name)
    try:
        parameters = _count_parameters(find_builder(source, {}), kwargs)
    except DlopsError as error:
        return all_of_them(None, error.message)
    if parameters > MAX_PARAMETERS:
        return all_of_them(None, f"{parameters / 1e6:.0f} M parameters, over {MAX_PARAMETERS / 1e6:.0f} M", parameters)
    with tempfile.TemporaryDirectory(prefix="dlops-zoo-") as folder:
        samples = Path(folder, "samples.safetensors")
        inputs = _inputs(name)
        save_file(inputs, samples)
        try:
            adopted = adopt(
                source, samples=str(samples), weights="random", max_batch=_MAX_BATCH, root=Path(folder, "runs"),
                inputs=[f"{tensor}:float32[batch,{','.join(map(str, array.shape[1:]))}]"
                        for tensor, array in inputs.items()],
                arguments=kwargs,
            )  # fmt: skip
        except DlopsError as error:
            return all_of_them(False, error.message, parameters)
        found = []
        began = time.perf_counter()
        for variant, result in export_each(adopted.checkpoint, variants=FORMATS, out=Path(folder, "artifacts")):
            now = time.perf_counter()
            reason = result.message if isinstance(result, DlopsError) else ""
            found.append(
                Tried(
                    network=name, slug=variant.slug, passed=not reason, reason=reason, parameters=parameters,
                    seconds=round(now - began, 1), torch=torch.__version__,
                )
            )  # fmt: skip
            began = now
        return found


def _count_parameters(build: Callable[..., Any], kwargs: dict[str, Any]) -> int:
    import torch

    try:
        with torch.device("meta"):
            module = build(**kwargs)
    except NotImplementedError:
        # RegNet reads its widths out of tensors, which those without memory do not have.
        module = build(**kwargs)
    return sum(one.numel() for one in module.parameters())


def _arguments(name: str) -> dict[str, Any]:
    """What the builder is given: for detectors that resize their images a small size, so that all fit into hours."""
    from dlops.builders import builder_task

    # SSDs have one size by their anchors.
    if builder_task(f"torchvision:{name}") != "detection" or name.startswith("ssd"):
        return {}
    return {"min_size": _DETECTED, "max_size": _DETECTED}


def _inputs(name: str) -> dict[str, NDArray[np.float32]]:
    """As large as the published weights of that network want them: images, pairs of them, or videos that fade."""
    from torchvision import models

    transforms = models.get_model_weights(name).DEFAULT.transforms()
    match type(transforms).__name__:
        case "ObjectDetection":
            # In [0, 1], where these take their images.
            return {"input": np.clip(0.5 + 0.2 * coloured_noise(_SAMPLES, _DETECTED), 0, 1).astype(np.float32)}
        case "OpticalFlow":
            first = coloured_noise(_SAMPLES, _FLOW[1])[..., : _FLOW[0], :]
            # What moved to the right by three pixels and down by one.
            second = np.roll(first, (1, 3), axis=(2, 3))
            return {"first": np.ascontiguousarray(first), "second": np.ascontiguousarray(second)}
        case "SemanticSegmentation":
            return {"input": coloured_noise(_SAMPLES, _SIZE)}
        case _:
            pass
    size = getattr(transforms, "crop_size", [_SIZE])
    images = coloured_noise(_SAMPLES, max(size))[..., : size[0], : size[-1]]
    if type(transforms).__name__ != "VideoClassification":
        return {"input": np.ascontiguousarray(images)}
    fading = np.linspace(1.0, 0.5, _FRAMES, dtype=np.float32)[None, None, :, None, None]
    return {"input": np.ascontiguousarray(images[:, :, None] * fading)}


def coloured_noise(count: int, size: int) -> NDArray[np.float32]:
    """(count, 3, size, size), mean 0 and deviation 1: as in photographs, neighbouring pixels are much alike.

    Amplitudes fall with the frequency (Field 1987). White noise is averaged away by the first convolutions.
    """
    draw = np.random.default_rng(0)
    across = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    falling = 1 / np.maximum(across, 1 / size)
    spectrum = np.fft.rfft2(draw.normal(size=(count, 3, size, size))) * falling
    images = np.fft.irfft2(spectrum, s=(size, size))
    images -= images.mean(axis=(2, 3), keepdims=True)
    return np.asarray(images / images.std(axis=(2, 3), keepdims=True), np.float32)


def _in_a_process(name: str, limit_s: float) -> list[Tried]:
    command = [sys.executable, "-P", "-m", "dlops.workflows.zoo", "--one", name]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return _failed(name, f"not done after {limit_s:g} s")
    if child.returncode != 0:
        said = child.stderr.strip().splitlines()
        return _failed(name, f"its process ended with {child.returncode}{f': {said[-1][:200]}' if said else ''}")
    return [Tried.model_validate(one) for one in json.loads(child.stdout.splitlines()[-1])]


def _failed(name: str, reason: str) -> list[Tried]:
    return [Tried(network=name, slug=slug, passed=False, reason=reason) for slug in FORMATS]


def _read(kept: Path) -> list[Tried]:
    """What is kept; a last line that a kill cut short is left out."""
    found = []
    for line in kept.read_text().splitlines() if kept.exists() else ():
        try:
            found.append(Tried.model_validate_json(line))
        except ValueError:
            continue  # it is tried again
    return found


def _word(one: Tried) -> str:
    if one.passed:
        return "passed"
    return f"{'FAILED' if one.passed is False else 'not tried'}: {one.reason}".replace("|", "\\|")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="make zoo", description=__doc__)
    parser.add_argument("patterns", nargs="*", default=["*"], help="names of networks, with * and ?; all if left out")
    parser.add_argument("--kept", type=Path, default=Path("reports/zoo.jsonl"), help="the file of results")
    parser.add_argument("--again", action="store_true", help="try again what is in it")
    parser.add_argument("--limit", type=float, default=_LIMIT_S, help="seconds that one may take (%(default)g)")
    parser.add_argument("--one", help="one network, here; its results as JSON on stdout")
    options = parser.parse_args(arguments)
    if options.one:
        rows: list[dict[str, Any]] = [one.model_dump(mode="json") for one in try_network(options.one)]
        out.write(json.dumps(rows) + "\n")
        return 0
    try:
        tried = run_zoo(options.patterns, kept=options.kept, again=options.again, limit_s=options.limit)
    except DlopsError as error:
        say(f"zoo: {error}")
        return error.exit_status
    out.write(table(tried))
    return 1 if any(one.passed is False for one in tried) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
