"""`l2p-export triton`: writes and lints model repositories, checks a server, and serves a page that draws on it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from l2p_export.cli.console import (
    Console,
    backend_option,
    dry_run_option,
    example,
    json_option,
    parse_size,
    print_json,
    quiet_option,
    store_option,
)
from l2p_export.cli.inputs import InputPath
from l2p_export.cli.outputs import clear_leftovers, open_bundle_apart, require_writable
from l2p_runtime import ArtifactError, HostError, UsageError
from l2p_runtime.errors import counted

_HELP = ("-h", "--help")


class _WritesByDefault(click.Group):
    """`triton BUNDLE --out REPO` is short for `triton write BUNDLE --out REPO`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in _HELP:
            args = ["write", *args]
        return super().parse_args(ctx, args)


@click.group("triton", cls=_WritesByDefault, epilog=example("triton demo-4k.bundle --out repository"))
def command() -> None:
    """Write or lint a Triton model repository, check whether a server can draw, or draw on it in a browser.

    `l2p-export triton BUNDLE --out REPO` is short for `triton write`. A bundle folder with the name of a subcommand
    must be given as a path, e.g. `./lint`.
    """


@command.command("write", epilog=example("triton write demo-4k.bundle --out repository"))
@click.argument("bundle", type=InputPath("bundle"))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Model repository to create or update.")
@click.option(
    "--model", "models", multiple=True, help="l2p, l2p_stream, l2p_embeddings or networks; repeatable. Default: all."
)
@click.option("--kind", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", show_default=True)
@click.option("--instances", type=int, default=1, show_default=True, help="Instances of each model, per GPU.")
@backend_option
@click.option("--plan", help="Precision plan; default: the first that the backend runs.")
@click.option("--memory-budget", default="", help="Memory budget of each instance, e.g. 6GiB.")
@click.option(
    "--dtype", type=click.Choice(["uint8", "float16"]), default="uint8", show_default=True, help="Dtype of images."
)
@click.option("--preview-px", type=int, default=512, show_default=True, help="Longest side of a preview.")
@click.option(
    "--max-pixels", type=int, help="Maximum pixels of an image; default: the maximum of the bundle's profiles."
)
@click.option("--max-steps", type=int, help="Maximum steps of an image; default: four times the bundle's default.")
@click.option("--max-prompt-bytes", type=int, default=16_384, show_default=True)
@click.option("--queue-size", type=int, default=64, show_default=True, help="Maximum requests that wait for a model.")
@click.option("--queue-seconds", type=float, default=600.0, show_default=True, help="Maximum time a request waits.")
@click.option("--warm-up", help="WIDTHxHEIGHT of the warm-up image; default: the profile's minimum.")
@click.option("--bundle-at", help="Absolute path of the bundle on the server, instead of a copy in the repository.")
@store_option
@json_option
@dry_run_option
@quiet_option
def write(
    bundle: Path, out: Path, store: Path | None, *, as_json: bool, dry_run: bool, quiet: bool, **options: Any
) -> None:
    """Write BUNDLE as a Triton model repository; a changed bundle becomes the next version of its models."""
    from l2p_export.serving.configs import Placement, WarmUp
    from l2p_export.serving.repository import RepositorySpec, write_repository

    if out.exists() and not out.is_dir():
        raise UsageError(f"--out `{out}` is a file, expected a folder")
    warm_up = WarmUp(*parse_size(options["warm_up"])) if options["warm_up"] else None
    spec = RepositorySpec(
        models=options["models"],
        backend=options["backend"],
        plan=options["plan"],
        memory_budget=options["memory_budget"],
        dtype=options["dtype"],
        preview_px=options["preview_px"],
        pixels=options["max_pixels"],
        steps=options["max_steps"],
        prompt_bytes=options["max_prompt_bytes"],
        placement=Placement(options["kind"], options["instances"], options["queue_size"], options["queue_seconds"]),
        warm_up=warm_up,
        bundle_at=options["bundle_at"],
    )
    opened = open_bundle_apart(bundle, store, {"--out": out})
    if dry_run:
        require_writable({"--out": out})
    else:
        clear_leftovers(out)
    written = write_repository(opened, out, spec, Console(quiet=quiet), dry_run=dry_run)
    if as_json:
        facts = {"out": str(out), "digest": written.digest, "models": dict(written.versions)}
        print_json(facts | {"new": list(written.new), "updated": list(written.updated)})
        return
    for name, version in written.versions.items():
        verb = "unchanged"
        if name in written.new:
            verb = "would write" if dry_run else "wrote"
        elif name in written.updated:
            verb = "would update the configuration of" if dry_run else "updated the configuration of"
        click.echo(f"{verb} {out / name}: version {version}")


@command.command("lint", epilog=example("triton lint repository"))
@click.argument("repository", type=InputPath("repository"))
@json_option
def lint(repository: Path, *, as_json: bool) -> None:
    """Find what a server would refuse or hang on in REPOSITORY. Exit code 4 when something is found."""
    from l2p_export.serving.lint import lint_repository

    found = lint_repository(repository)
    if as_json:
        facts = [{"model": finding.model, "place": finding.place, "text": finding.text} for finding in found]
        print_json({"repository": str(repository), "findings": facts})
    else:
        for finding in found:
            click.echo(f"{finding.model}: {finding.place}: {finding.text}")
    if found:
        raise ArtifactError(
            f"`{repository}` has {counted(len(found), 'fault')}", hint="correct what is listed, or write it again"
        )
    if not as_json:
        click.echo(f"{repository}: nothing found")


@command.command("health", epilog=example("triton health http://localhost:8000"))
@click.argument("server", metavar="URL")
@click.option("--model", "models", multiple=True, help="Check only this model; repeatable.")
@click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds to wait for each response.")
@json_option
def health(server: str, models: tuple[str, ...], timeout: float, *, as_json: bool) -> None:
    """Have every model of the server at URL (http://host:8000) draw its minimum size. Exit code 3 when one cannot."""
    from l2p_runtime.client.health import check_health

    found = check_health(server, timeout_s=timeout, models=models)
    if as_json:
        facts = [
            {"model": m.model, "healthy": m.healthy, "reason": m.reason, "bundle": m.bundle, "seconds": m.seconds}
            for m in found
        ]
        print_json({"server": server, "models": facts})
    else:
        for model in found:
            text = f"ready, drew in {model.seconds:.2f} s" if model.healthy else model.reason
            click.echo(f"{model.model}: {text}")
    ill = [model.model for model in found if not model.healthy]
    if ill:
        sys.stdout.flush()
        raise HostError(f"{', '.join(ill)} cannot draw", hint="unload and load it, or start the server again")


@command.command("page", epilog=example("triton page http://localhost:8000 --port 8080"))
@click.argument("server", metavar="URL")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for any.")
@click.option("--port", type=int, default=8080, show_default=True, help="Port to listen on; 0 for any free one.")
@click.option(
    "--timeout", type=float, default=600.0, show_default=True, help="Seconds to wait for the server to send something."
)
@click.option("--name", "names", multiple=True, help="Host name that a reverse proxy uses for the page; repeatable.")
def page(server: str, host: str, port: int, timeout: float, names: tuple[str, ...]) -> None:
    """Serve a web page that draws on the server at URL (http://host:8000), until interrupted.

    The browser reaches only the model `l2p_stream` of the server. Whoever reaches the page can draw.
    """
    from l2p_runtime.client.page import PageSpec, open_page

    with open_page(PageSpec(server, host, port, timeout, tuple(name.lower() for name in names))) as opened:
        click.echo(opened.url)
        click.echo("open this address in a browser; Ctrl-C ends it", err=True)
        opened.serve_forever()
