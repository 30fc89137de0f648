"""The command line: one thin command per verb. It parses, calls and prints; nothing heavy is imported up here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from dlops import signals
from dlops.cli_bench import bench, compare
from dlops.cli_common import (
    Device,
    Json,
    Place,
    Threads,
    Trust,
    command_line,
    find_artifact,
    print_result,
    usage,
)
from dlops.cli_export import export
from dlops.cli_optimize import optimize
from dlops.cli_prune import prune
from dlops.explain import complain, explain

# typer carries its own copy of click since 0.20 and names the base of its usage errors nowhere public.
_USAGE_ERROR: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")

app = typer.Typer(
    name="dlops",
    help="Train, export, verify, serve and measure PyTorch models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="cnn or mlp.")],
    data: Annotated[str | None, typer.Option(help="Data set, folder or .tar.gz; short for --set data=…")] = None,
    init: Annotated[str | None, typer.Option(help="A checkpoint to fine-tune; short for --set init=…")] = None,
    preset: Annotated[str | None, typer.Option(help="A named configuration of the recipe.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML over the preset.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Over preset and file.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with a run that was cut off.")] = False,
    run_dir: Annotated[Path | None, typer.Option(help="Default: runs/<recipe>/<time>.")] = None,
    help_config: Annotated[bool, typer.Option("--help-config", help="List the recipe's settings and stop.")] = False,
) -> None:
    """Train a recipe; the run folder then holds a checkpoint."""
    from dlops import catalog

    # Before PyTorch is imported, which takes seconds: a misspelt name is answered at once.
    catalog.check(catalog.RECIPES, "recipe", recipe)
    from dlops.train import launch

    if help_config:
        print_result(launch.describe(recipe))
        return
    overrides = [*(set_ or []), *([f"data={data}"] if data else []), *([f"init={init}"] if init else [])]
    settings = launch.configure(recipe, preset=preset, config_file=config, overrides=overrides)
    checkpoint = launch.train_recipe(recipe, settings, run_dir=run_dir, resume=resume)
    print_result(checkpoint.directory)


app.command()(export)
app.command()(optimize)
app.command()(prune)


@app.command()
def verify(
    artifact: Annotated[Path | None, typer.Argument(help="An artifact's folder; the newest if left out.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Measure accuracy again on its evaluation samples.")] = None,
    model: Annotated[str | None, typer.Option(help="python:package.module:function, with --checkpoint.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Check an artifact again on this machine.

    Its digests, raw input to tensor and tensor to output; with --checkpoint what it loses in accuracy, too.
    """
    from dlops.checkpoint import import_model_source, load_checkpoint
    from dlops.console import say
    from dlops.export.verify import verify_artifact
    from dlops.runtimes import SessionOptions

    if model and not checkpoint:
        usage("--model is for the eager module of a checkpoint", "name it with --checkpoint")
    opened = find_artifact(artifact)
    say(f"{opened.title}: verifying")
    verification = verify_artifact(
        opened,
        options=SessionOptions(device=device, threads=threads, trust=trust),
        checkpoint=load_checkpoint(checkpoint) if checkpoint else None,
        model=import_model_source(model) if model else None,
    )
    print_result(verification.model_dump_json(indent=2) if json else verification.summary())


@app.command()
def serve(
    artifacts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ARTIFACT]...", help="Artifacts, or folders of them; the newest if left out."),
    ] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 opens it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 3000,
    grpc_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Speak the protocol over gRPC too; 0 takes a free one.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Processes. Default 1.")] = None,
    versions: Annotated[
        int | None,
        typer.Option(min=0, help="How many of a model's newest numbered ones in a folder; 0 for all. Default 1."),
    ] = None,
    model_control: Annotated[
        Literal["none", "explicit"] | None,
        typer.Option(help="explicit: clients may load and unload models. Default none."),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="PEM file: encrypt both ports, with --tls-key.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="PEM file: clients must have a certificate that is signed by one in it.")
    ] = None,
    device: Annotated[Place | None, typer.Option(help="auto, which takes CUDA where it works, is the default.")] = None,
    threads: Threads = None,
    trust: Trust = False,
) -> None:
    """Serve artifacts with BentoML.

    /predict takes images and numbers, /v2 is for Triton's clients, the page at / describes both.
    """
    from dlops.serve.launch import begin_log, serve_artifacts

    begin_log()
    status = serve_artifacts(
        artifacts or [find_artifact(None).directory], host=host, port=port, device=device, threads=threads,
        workers=workers, trust=trust, grpc_port=grpc_port, model_control=model_control, versions=versions,
        tls_cert=tls_cert, tls_key=tls_key, tls_client_ca=tls_client_ca,
    )  # fmt: skip
    raise typer.Exit(status)


app.command()(bench)
app.command()(compare)


@app.command()
def deploy(
    kind: Annotated[Literal["bento", "docker"], typer.Argument(help="bento: BentoML's store. docker: a build folder.")],
    artifact: Annotated[Path | None, typer.Argument(help="An artifact's folder; the newest if left out.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="docker: the folder to write. bento: also export a .bento file.")
    ] = None,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Which builds of the runtimes go in.")] = "cpu",
) -> None:
    """Package an artifact to run elsewhere."""
    chosen = find_artifact(artifact)
    if kind == "bento":
        from dlops.deploy.bento import build_bento

        bento = build_bento(chosen, out=out, device=device)
        print_result(f"{bento.tag}\n{bento.path}")
        return
    from dlops.deploy.docker import write_docker_context

    if out is None:
        usage("deploy docker writes a folder", "name it with --out DIR")
    print_result(write_docker_context(chosen, out=out, device=device))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A checkpoint, artifact or report; or a model file alone.")],
    json: Json = False,
) -> None:
    """Say what a folder holds, its digests checked, or what a model file says of itself."""
    from dlops.inspect import describe
    from dlops.inspect_file import describe_file, is_model_file

    if is_model_file(path):
        file = describe_file(path)
        print_result(file.to_json() if json else file.render())
        return
    description = describe(path)
    print_result(description.to_json() if json else description.render())
    description.check()


@app.command(name="list")
def list_(root: Annotated[Path, typer.Argument(help="The working folder.")] = Path(), json: Json = False) -> None:
    """List checkpoints, artifacts and reports, newest first."""
    from dlops.inspect import list_all

    listing = list_all(root)
    print_result(listing.to_json() if json else listing.render())


@app.command()
def doctor(
    json: Json = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Also run a model with AOTInductor, which compiles for half a minute.")
    ] = False,
) -> None:
    """Find which devices and providers really work here.

    A tiny model is run on each.
    """
    from dlops.doctor import examine, render

    findings = examine(compiling=compile_)
    print_result(findings.model_dump_json(indent=2) if json else render(findings))


@app.command()
def quickstart(
    data: Annotated[str, typer.Option(help="Data set, folder or .tar.gz.")] = "digits",
    recipe: Annotated[str, typer.Option(help="cnn or mlp.")] = "cnn",
    preset: Annotated[str | None, typer.Option(help="A named configuration of the recipe.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Recipe settings.")] = None,
    max_drop: Annotated[float, typer.Option(min=0, help="Points of accuracy that may be lost.")] = 1.0,
    duration: Annotated[float, typer.Option(min=0.1, help="Seconds a timed row.")] = 2.0,
    device: Device = "auto",
) -> None:
    """Train, export, verify, bench and serve, then report.

    A table and report.html at the end say what each variant costs and loses.
    """
    from dlops.workflows.quickstart import quickstart as run

    run(
        data=data,
        recipe=recipe,
        preset=preset,
        overrides=set_ or [],
        max_drop=max_drop,
        duration_s=duration,
        device=device,
        command=command_line(),
    )


def _version(value: bool) -> None:
    if value:
        from dlops.version import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status, as the design has them; no traceback for a user's mistake.

    `dlops.__main__` has the signals turned into exceptions; one that came decides the status, whatever was raised.
    """
    try:
        result = app(arguments or ["--help"], standalone_mode=False)
        return result if isinstance(result, int) else 0
    except _USAGE_ERROR as error:
        return complain(error.format_message(), hint="dlops --help lists commands and options", status=2)
    except Exception as error:  # noqa: BLE001 - the last resort: what is not ours to explain is our bug
        return signals.received_status() or explain(error)
