"""`l2p-export triton`: a model repository of a bundle, what looks after it, and a page that draws on its server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from l2p_export.cli.console import (
    Console,
    dry_run_option,
    json_option,
    parse_size,
    print_json,
    quiet_option,
    store_option,
)
from l2p_runtime import ArtifactError, HostError, UsageError
from l2p_runtime.errors import counted

_HELP = ("-h", "--help")


class _WritesByDefault(click.Group):
    """`triton BUNDLE --out REPO` is short for `triton write BUNDLE --out REPO`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in _HELP:
            args = ["write", *args]
        return super().parse_args(ctx, args)


@click.group("triton", cls=_WritesByDefault)
def command() -> None:
    """Write a Triton model repository from a bundle, check one, ask a server whether it can draw, or draw in a browser.

    `l2p-export triton BUNDLE --out REPO` is short for `triton write`; a bundle whose folder is called as one of the
    commands is given as `./lint`.
    """


@command.command("write")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="Model repository; made, or brought up to date."
)
@click.option(
    "--model", "models", multiple=True, help="l2p, l2p_stream, l2p_embeddings or networks; repeatable. All otherwise."
)
@click.option("--kind", type=click.Choice(["auto", "cpu", "gpu"]), default="auto", show_default=True)
@click.option("--instances", type=int, default=1, show_default=True, help="Processes of a model, on each GPU.")
@click.option("--backend", default="auto", show_default=True, help="Of the runtime inside the models.")
@click.option("--plan", help="Precision plan; the first that the backend runs otherwise.")
@click.option("--memory-budget", default="", help="As 6GiB, of each instance.")
@click.option("--dtype", type=click.Choice(["uint8", "float16"]), default="uint8", show_default=True, help="Of images.")
@click.option("--preview-px", type=int, default=512, show_default=True, help="Longest side of a preview.")
@click.option("--max-pixels", type=int, help="Of one image; the largest of the bundle's profiles otherwise.")
@click.option("--max-steps", type=int, help="Of one image; four times the bundle's default otherwise.")
@click.option("--max-prompt-bytes", type=int, default=16_384, show_default=True)
@click.option("--queue-size", type=int, default=64, show_default=True, help="Requests that may wait for a model.")
@click.option("--queue-seconds", type=float, default=600.0, show_default=True, help="How long one may wait.")
@click.option("--warm-up", help="WIDTHxHEIGHT that an instance draws first; the profile's least otherwise.")
@click.option("--bundle-at", help="Where the server finds the bundle, instead of a copy in the repository.")
@store_option
@json_option
@dry_run_option
@quiet_option
def write(
    bundle: Path, out: Path, store: Path | None, *, as_json: bool, dry_run: bool, quiet: bool, **options: Any
) -> None:
    """Write BUNDLE as models that Triton serves; a changed bundle becomes the next version."""
    from l2p_export.serving.configs import Placement, WarmUp
    from l2p_export.serving.repository import RepositorySpec, write_repository
    from l2p_runtime.bundle import open_bundle

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
    written = write_repository(open_bundle(bundle, store), out, spec, Console(quiet=quiet), dry_run=dry_run)
    if as_json:
        facts = {"out": str(out), "digest": written.digest, "models": dict(written.versions), "new": list(written.new)}
        print_json(facts)
        return
    for name, version in written.versions.items():
        verb = ("would write" if dry_run else "wrote") if name in written.new else "unchanged"
        click.echo(f"{verb} {out / name}: version {version}")


@command.command("lint")
@click.argument("repository", type=click.Path(path_type=Path))
@json_option
def lint(repository: Path, *, as_json: bool) -> None:
    """Find what a server would refuse or hang on in REPOSITORY. Exit code 4 when there is something."""
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


@command.command("health")
@click.argument("server", metavar="URL")
@click.option("--model", "models", multiple=True, help="Only this one; repeatable.")
@click.option("--timeout", type=float, default=30.0, show_default=True, help="Seconds for each answer.")
@json_option
def health(server: str, models: tuple[str, ...], timeout: float, *, as_json: bool) -> None:
    """Have every model of the server at URL (http://host:8000) draw its least image. Exit code 3 when one cannot."""
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


@command.command("page")
@click.argument("server", metavar="URL")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 for any.")
@click.option("--port", type=int, default=8080, show_default=True, help="0 for any that is free.")
@click.option("--timeout", type=float, default=600.0, show_default=True, help="Seconds that the server may be silent.")
@click.option("--name", "names", multiple=True, help="Host name that a web server in front gives it; repeatable.")
def page(server: str, host: str, port: int, timeout: float, names: tuple[str, ...]) -> None:
    """Show a page in the browser that draws on the server at URL (http://host:8000), until interrupted.

    The browser reaches the model `l2p_stream` and nothing else of the server. Whoever reaches the page can draw.
    """
    from l2p_runtime.client.page import PageSpec, open_page

    with open_page(PageSpec(server, host, port, timeout, tuple(name.lower() for name in names))) as opened:
        click.echo(opened.url)
        click.echo("open this address in a browser; Ctrl-C ends it", err=True)
        opened.serve_forever()
