"""`dlops export`: its options, and which of them go together."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dlops.cli_common import Place, Trust, command_line, find_checkpoint, given_options, points, print_result, usage

if TYPE_CHECKING:
    from dlops.checkpoint import ModuleSource


def export(
    context: typer.Context,
    checkpoint: Annotated[
        str | None,
        typer.Argument(
            help="A run folder; the newest if left out. Or torchvision:NAME, timm:NAME, python:module:function, a .pt2."
        ),
    ] = None,
    format_: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="torchscript, onnx, torchexport, aotinductor, openvino, executorch, tensorrt; repeatable."
        ),
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="fp32, fp16, bf16, int8, int8dyn, int8wo, fp8; repeatable.")
    ] = None,
    sparsity: Annotated[list[str] | None, typer.Option(help="dense, prunedNN, sparseNN, sparse24; repeatable.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="A whole slug, such as onnx-int8-pruned50.")] = None,
    max_drop: Annotated[str, typer.Option(help="Points of the task's metric that may be lost: 0.5%.")] = "1%",
    strict: Annotated[bool, typer.Option(help="Hold the interval's bound to --max-drop, not the estimate.")] = False,
    calibration: Annotated[
        Literal["minmax", "entropy", "percentile"], typer.Option(help="How int8 chooses the ranges of activations.")
    ] = "minmax",
    repair: Annotated[
        bool, typer.Option(help="Where int8 or fp8 loses too much: return the layers at fault to fp32, as few as pass.")
    ] = True,
    worth: Annotated[
        bool, typer.Option(help="Time each for a second: is it faster or smaller than what it was made of?")
    ] = True,
    embed_preprocess: Annotated[
        bool, typer.Option("--embed-preprocess", help="Into ONNX files: raw inputs to labels (variants -raw).")
    ] = False,
    image_size: Annotated[
        str | None,
        typer.Option(metavar="HxW", help="Of all raw images: --embed-preprocess then resizes and crops too."),
    ] = None,
    recovery_budget: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="For recovery after pruning; 600 if left out.")
    ] = None,
    prune_to_latency: Annotated[
        str | None,
        typer.Option(metavar="DURATION", help="Prune as little as makes one sample's p50 this or less: 5ms, 800us."),
    ] = None,
    explain_: Annotated[
        str | None,
        typer.Option(
            "--explain", metavar="VARIANT", help="Export nothing: show how much error int8 or fp8 adds in each layer."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where artifacts go, artifacts if left out; the page of --explain, reports.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="python:package.module:function that makes the module.")] = None,
    device: Annotated[Place, typer.Option(help="Where the variants are checked.")] = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Also what lies there already, unchanged.")] = False,
    reproduce: Annotated[
        Path | None,
        typer.Option(metavar="ARTIFACT", help="Make that artifact again, and compare the two byte by byte."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of a named model: random, a file, or published ones by name.")
    ] = None,
    samples: Annotated[
        str | None, typer.Option(help="Of a named model: a data set, folder or .safetensors to check it on.")
    ] = None,
    input_: Annotated[
        list[str] | None, typer.Option("--input", metavar="NAME:DTYPE[DIMS]", help="Of a named model; repeatable.")
    ] = None,
    dim: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=MIN:MAX[:STEP]", help="Sizes of a dim that --input names; repeatable."),
    ] = None,
    output: Annotated[list[str] | None, typer.Option(help="Names of a named model's outputs; repeatable.")] = None,
    preprocess: Annotated[
        str | None, typer.Option(help="Of a named model: imagenet, unit or a JSON file of steps.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Of a named model: classification, segmentation, detection, regression, if it is unclear."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Arguments of a named model's builder.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What a named model's artifacts are called.")] = None,
    max_batch: Annotated[
        int | None, typer.Option(min=1, max=4096, help="The most samples that a named model takes in a call; 64.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Export variants of a checkpoint, or of a model by name, each checked against it.

    One that lies in --out already, whole, working and of the same making, is kept as it is.
    """
    drop = points(max_drop)
    if reproduce is not None:
        _reproduce(reproduce, checkpoint, model=model, out=out, trust=trust, context=context)
        return
    if variant and (format_ or precision or sparsity):
        usage("--variant names whole variants; leave out --format, --precision and --sparsity", "or the other way")
    if explain_ and (variant or format_ or precision or sparsity):
        usage("--explain names the variant that it explains, and exports none", "leave out the other variants")
    if prune_to_latency and sparsity:
        usage("--prune-to-latency finds the sparsity", "leave out --sparsity")
    target_s = _seconds(prune_to_latency) if prune_to_latency else None
    if explain_:
        gates = {"--max-drop", "--strict", "--repair", "--force", "--worth", "--embed-preprocess", "--image-size"}
        gates |= {"--recovery-budget", "--prune-to-latency"}
        if given := [option for option in given_options(context, but=set()) if option in gates]:
            usage(f"{', '.join(given)}: for what is exported, and --explain exports nothing", "leave it out")
    slugs = variant or _slugs(format_ or ["onnx"], precision or ["fp32"], sparsity or ["dense"])
    if embed_preprocess:
        slugs = [slug if slug.endswith("-raw") else f"{slug}-raw" for slug in slugs]
    size = _image_size(image_size) if image_size is not None else None
    from dlops.workflows.programs import is_program, open_program
    from dlops.workflows.source_words import parse_arguments
    from dlops.workflows.sources import MAX_BATCH, adopt, is_source

    for_sources = {"weights", "samples", "input_", "dim", "output", "preprocess", "set_", "name", "task", "trust"}
    for_sources |= {"max_batch"}
    if checkpoint is not None and (is_program(checkpoint) or is_source(checkpoint)):
        if model is not None:
            usage("--model builds a checkpoint's module, and this is none", f"{checkpoint} says what builds it")
        if samples is None:
            usage(f"{checkpoint}: nothing to check it on", "--samples DATASET, FOLDER or FILE.safetensors")
        program = open_program(Path(checkpoint), trust=trust) if is_program(checkpoint) else None
        adopted = adopt(
            checkpoint if program is None else Path(checkpoint).name, samples=samples, weights=weights,
            inputs=input_ or (program.inputs if program else []),
            dims=dim or (program.dims if program and not input_ else []), preprocess=preprocess,
            arguments=parse_arguments(set_ or []), output_names=output or (program.outputs if program else []),
            name=name or (Path(checkpoint).stem if program else None), task=task,
            own=program.module if program else None,
            max_batch=min(max_batch or MAX_BATCH, program.max_batch if program else max_batch or MAX_BATCH),
        )  # fmt: skip
        found, source = adopted.checkpoint, adopted.model
    else:
        others = {one.name for one in context.command.params if one.name} - for_sources
        if given := given_options(context, but=others):
            usage(f"{given[0]} is for torchvision:, timm:, python: and .pt2 models", "leave it out")
        # Before PyTorch is imported, which takes seconds: a missing checkpoint is said at once.
        found = find_checkpoint(Path(checkpoint) if checkpoint else None)
        from dlops.checkpoint import import_model_source

        source = import_model_source(model) if model else None
    from dlops.export.formats import BUDGET_S
    from dlops.export.pipeline import export_variants, rank_variant

    if explain_:
        from dlops.console import say
        from dlops.export.explain import render_table, write_page

        ranking = rank_variant(found, variant=explain_, model=source, calibration_method=calibration, device=device)
        print_result(render_table(ranking))
        say(f"page: {write_page(ranking, out or Path('reports'))}")
        return
    if target_s is not None:
        from dlops.export.pipeline import prune_to_latency as fitted

        slugs = [
            fitted(
                found, variant=slug, target_s=target_s, model=source, calibration_method=calibration, device=device
            ).variant.slug
            for slug in slugs
        ]  # fmt: skip
    artifacts = export_variants(
        found,
        variants=slugs,
        out=out or "artifacts",
        model=source,
        max_drop=drop,
        strict=strict,
        calibration_method=calibration,
        repair=repair,
        worth=worth,
        image_size=size,
        device=device,
        force=force,
        recovery_budget_s=BUDGET_S if recovery_budget is None else recovery_budget,
        command=command_line(),
    )
    for artifact in artifacts:
        print_result(artifact.directory)


def _image_size(text: str) -> tuple[int, int]:
    """(height, width) of `480x640`."""
    height, separator, width = text.lower().partition("x")
    if not (separator and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        usage(f"--image-size {text!r}: not a height and a width in pixels", "--image-size 480x640, say")
    return int(height), int(width)


def _seconds(text: str) -> float:
    """`5ms`, `800us` or `0.1s` in seconds."""
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(us|ms|s)", text.strip())
    if match is None or not float(match[1]):
        usage(f"--prune-to-latency {text!r}: a time above 0 with its unit is wanted", "5ms, 800us or 0.1s, say")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]


def _reproduce(
    artifact: Path, checkpoint: str | None, *, model: str | None, out: Path | None, trust: bool, context: typer.Context
) -> None:
    also_given = given_options(context, but={"checkpoint", "reproduce", "model", "out", "trust"})
    if also_given:
        usage(f"--reproduce takes its settings from the artifact: leave out {', '.join(also_given)}", "--out may stay")
    from dlops.artifact import open_artifact

    # Before PyTorch is imported, which takes seconds: a missing folder is said at once.
    from dlops.workflows.programs import is_program, open_program
    from dlops.workflows.sources import is_source

    opened, found, builds = open_artifact(artifact), None, model
    if checkpoint is not None and (is_program(checkpoint) or is_source(checkpoint)):
        # The model of a checkpoint that lies under runs/, and holds weights and samples alone.
        builds = builds or checkpoint
    elif checkpoint is not None:
        found = find_checkpoint(Path(checkpoint))
    from dlops.checkpoint import import_model_source
    from dlops.export.reproduce import reproduce_artifact

    source: ModuleSource | None = None
    if builds is not None and is_program(builds):
        source = open_program(Path(builds), trust=trust).module
    elif builds is not None and builds.startswith("python:"):
        source = import_model_source(builds)

    reproduction = reproduce_artifact(
        opened,
        found,
        model=source,
        out=out,
        command=command_line(),
    )
    print_result(reproduction.summary())
    reproduction.check()


def _slugs(formats: list[str], precisions: list[str], sparsities: list[str]) -> list[str]:
    return [
        "-".join([form, precision, *([] if sparsity == "dense" else [sparsity])])
        for sparsity in sparsities
        for form in formats
        for precision in precisions
    ]
