"""`dlops bench` and `dlops compare`: their options, and which of them go together."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dlops.cli_common import (
    MAX_THREADS,
    Place,
    Trust,
    command_line,
    find_artifact,
    find_checkpoint,
    given_options,
    usage,
)

if TYPE_CHECKING:
    from dlops.artifact import Artifact


class _Device(StrEnum):
    """typer takes a Literal for one value, and for several only an Enum."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"


class _Scenario(StrEnum):
    SINGLE_STREAM = "single_stream"
    MULTI_STREAM = "multi_stream"
    SERVER = "server"
    OFFLINE = "offline"


class _Boundary(StrEnum):
    DEVICE = "device"
    HOST = "host"
    PREPROCESSING = "preprocessing"


def bench(
    context: typer.Context,
    target: Annotated[
        list[str] | None, typer.Argument(help="Artifact folders and URLs; the newest if left out.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Adds eager PyTorch, the base of the speed-ups.")] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="With --checkpoint: its module through torch.compile, too.")
    ] = False,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Items a call; repeatable. Default 1.")] = None,
    boundary: Annotated[
        list[_Boundary] | None,
        typer.Option(help="Where a call in process begins: on the device, arrays or raw input; repeatable."),
    ] = None,
    device: Annotated[list[_Device] | None, typer.Option(help="Repeatable; auto takes CUDA where it works.")] = None,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="On a GPU: replay each inference as one graph.")
    ] = False,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, max=MAX_THREADS, help="For one operator; repeatable; else all cores.")
    ] = None,
    trust: Trust = False,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="Calls in flight; in process, of as many threads.")
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="In process: fresh ones a row; intervals then see how they differ.")
    ] = 1,
    rate: Annotated[list[float] | None, typer.Option(help="Requests a second offered to URLs; repeatable.")] = None,
    arrivals: Annotated[Literal["poisson", "constant"], typer.Option(help="How requests at a rate come.")] = "poisson",
    pauses: Annotated[
        str | None, typer.Option(metavar="BUSY:IDLE", help="Seconds of idling after busy ones, with --rate.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="A recorded schedule: one time in seconds a line.")] = None,
    slo: Annotated[
        str | None, typer.Option(metavar="QUANTILE=TIME", help="Find the highest rate that keeps it, as in p99=20ms.")
    ] = None,
    senders: Annotated[int | None, typer.Option(min=1, max=64, help="Processes that send at a rate.")] = None,
    scenario: Annotated[list[_Scenario] | None, typer.Option(help="One of MLPerf's; repeatable.")] = None,
    samples_per_query: Annotated[int | None, typer.Option(min=1, help="With multi_stream; default 8.")] = None,
    engine: Annotated[
        Literal["dlops", "loadgen"], typer.Option(help="What runs scenarios: our generator, or MLCommons' LoadGen.")
    ] = "dlops",
    duration: Annotated[
        float | None, typer.Option(min=0.1, help="Seconds a row. Default: until p50 is known to 1%, p99 to 5%.")
    ] = None,
    max_duration: Annotated[
        float | None, typer.Option(min=0.1, help="At most so many, without --duration. Default 30.")
    ] = None,
    payload: Annotated[Path | None, typer.Option(help="The artifact whose samples are sent to URLs.")] = None,
    model: Annotated[str | None, typer.Option(help="python:package.module:function, with --checkpoint.")] = None,
    profile: Annotated[bool, typer.Option("--profile", help="Then say which operators take the time.")] = False,
    out: Annotated[Path | None, typer.Option(help="Report folder. Default: reports/<time>.")] = None,
    json: Annotated[
        str | None, typer.Option("--json", metavar="FILE", help="Copy of report.json; - for stdout.")
    ] = None,
    markdown: Annotated[str | None, typer.Option(metavar="FILE", help="Table as Markdown; - for stdout.")] = None,
    csv: Annotated[str | None, typer.Option(metavar="FILE", help="Every number as CSV; - for stdout.")] = None,
    html: Annotated[Path | None, typer.Option(help="Copy of report.html.")] = None,
    from_: Annotated[
        Path | None, typer.Option("--from", metavar="REPORT", help="Measure nothing: work a kept report out again.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the harness itself and keep it; alone, or after the targets.")
    ] = False,
) -> None:
    """Measure artifacts in process and services over HTTP or gRPC."""
    from dlops.workflows.benchmark import benchmark, offer
    from dlops.workflows.publish import Outputs

    outputs = Outputs(directory=out, json=json, markdown=markdown, csv=csv, html=html)
    if from_ is not None:
        from dlops.workflows.reanalyse import reanalyse_report

        also_given = given_options(context, but={"from_", "out", "json", "markdown", "csv", "html"})
        raise typer.Exit(reanalyse_report(from_, outputs, also_given=also_given))
    if calibrate and not target and checkpoint is None:
        from dlops.workflows.calibration import calibrate_alone

        raise typer.Exit(calibrate_alone(json=json, also_given=given_options(context, but={"calibrate", "json"})))
    if duration is not None and max_duration is not None:
        usage("--duration sets the seconds, and --max-duration limits what a pilot sets", "leave one of them out")
    if trace is not None and not rate and slo is None and (duration or max_duration):
        usage("a trace lasts as long as it is: --duration and --max-duration are not for it", "leave them out")
    if payload is not None and not any("://" in name for name in target or []):
        usage("--payload is what URLs are sent, and there is none", "leave it out, or name http://HOST:PORT")
    if model is not None and checkpoint is None:
        usage("--model builds a checkpoint's module, and there is none", "name its run with --checkpoint")
    if not rate and slo is None and "--arrivals" in given_options(context, but=set()):
        usage("--arrivals is for requests at a rate", "add --rate or --slo")
    offered = offer(rate or [], arrivals=arrivals, pauses=pauses, trace=trace, slo=slo, senders=senders)
    targets: list[Artifact | str] = [name if "://" in name else find_artifact(Path(name)) for name in target or []] or [
        find_artifact(None)
    ]
    status = benchmark(
        targets,
        checkpoint=find_checkpoint(checkpoint) if checkpoint else None,
        compiled=compile_,
        batch=batch or None,
        boundary=[one.value for one in boundary or [_Boundary.HOST]],
        device=[one.value for one in device or [_Device.AUTO]],
        cuda_graph=cuda_graph,
        trust=trust,
        threads=threads or None,
        concurrency=concurrency,
        processes=processes,
        offered=offered,
        scenarios=[one.value for one in scenario or []],
        samples_per_query=samples_per_query,
        engine=engine,
        duration_s=duration,
        max_duration_s=max_duration,
        payload=find_artifact(payload) if payload else None,
        model=model,
        profile=profile,
        outputs=outputs,
        command=command_line(),
        calibrate=calibrate,
    )
    raise typer.Exit(status)


def compare(
    base: Annotated[str, typer.Argument(help="An artifact's folder, a service's URL or a report.")],
    new: Annotated[str, typer.Argument(help="What is compared with it; of the same kind.")],
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Artifacts and URLs: items a call; repeatable.")
    ] = None,
    duration: Annotated[
        float | None, typer.Option(min=0.1, help="Artifacts and URLs: seconds a row. Default 5, for URLs 20.")
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, help="URLs: calls kept in flight; repeatable. Default 1.")
    ] = None,
    payload: Annotated[
        Path | None, typer.Option(metavar="ARTIFACT", help="URLs: whose samples are sent; else random numbers.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Artifacts: fresh processes of each; their differences count. Default 8.")
    ] = None,
    device: Annotated[
        Place | None,
        typer.Option(help="Artifacts: auto takes CUDA where it works."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="Artifacts: for one operator; else all cores.")
    ] = None,
    trust: Trust = False,
    margin: Annotated[str | None, typer.Option(metavar="N%", help="A change that matters. Default 5%.")] = None,
    gate: Annotated[
        str | None, typer.Option(metavar="LIMITS", help="Judge only these: p99=+5%,throughput=-3%.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Artifacts and URLs: report folder. Default: reports/<time>.")
    ] = None,
    markdown: Annotated[
        str | None, typer.Option("--markdown", metavar="FILE", help="A table for a pull request; - for stdout.")
    ] = None,
    json: Annotated[str | None, typer.Option("--json", metavar="FILE", help="All numbers; - for stdout.")] = None,
) -> None:
    """Say whether NEW is slower or faster than BASE.

    Two artifacts, or two services, are measured in turns in one run; of two reports the rows that match are compared.
    Exits with 1 where anything regressed, else with 3 where anything is inconclusive.
    """
    from dlops.workflows.compare import compare as run

    status = run(
        base,
        new,
        batch=batch,
        concurrency=concurrency,
        payload=find_artifact(payload) if payload else None,
        duration_s=duration,
        processes=processes,
        threads=threads,
        device=device,
        trust=trust,
        margin=margin,
        gate=gate,
        out_dir=out,
        markdown=markdown,
        json=json,
        command=command_line(),
    )
    raise typer.Exit(status)
