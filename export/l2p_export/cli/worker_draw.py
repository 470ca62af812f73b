"""`generate --worker SOCKET`: what the client asks of a worker, and what the worker does about it.

The request holds the options of `generate` as arguments, which the worker reads and checks as its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli.console import Console, Session
from l2p_export.cli.drawing import Place, farm_progress
from l2p_export.cli.given_options import absolute, given_options
from l2p_export.cli.outputs import require_apart
from l2p_runtime import ArtifactError, HostError, UsageError, __version__

if TYPE_CHECKING:
    from l2p_runtime import Pipeline
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.frames.shot import ShotNeeds
    from l2p_runtime.networks import OpenedPlan
    from l2p_runtime.progress import Reporter
    from l2p_runtime.worker import Emit, Handle, Message

LOADING = ("backend", "plan", "memory_budget", "store")
"""Options that decide what a worker loads."""

_CLIENTS_OWN = ("worker", "server", "as_json", "quiet", "progress_format", "help")


def draw_by_worker(ctx: click.Context, bundle: Path, console: Console) -> dict[str, Any]:
    """Let a worker draw what `generate` was asked for.

    Returns:
        What `--json` prints of it.

    Raises:
        L2PError: what went wrong in the worker.
        HostError: there is no worker, or it ended.
    """
    from l2p_runtime.worker import request_drawing

    options = ctx.params
    passed = [parameter for parameter in ctx.command.params if parameter.name not in _CLIENTS_OWN]
    words = [argument.text for argument in given_options(ctx, passed)]
    request = {"version": __version__, "bundle": str(bundle.resolve()), "arguments": words}
    tell_farm = farm_progress(options["progress_format"])
    with console.phases("drawing in the worker") as advance:

        def event(facts: Message) -> None:
            if "note" in facts:
                console.note(facts["note"])
            else:
                advance(facts["share"], facts["text"])
                tell_farm(facts["share"])

        return request_drawing(absolute(options["worker"]), request, event)


def draw_for_clients(pipe: Pipeline, bundle: Path, asked: Mapping[str, str]) -> Handle:
    """What serves a worker's requests.

    Args:
        pipe: the pipeline that the worker keeps.
        bundle: path of its bundle, with links resolved.
        asked: the options of `LOADING` that the worker was started with.
    """
    from l2p_export.cli.generate import command, draw
    from l2p_export.cli.main import as_l2p_error

    def handle(request: Message, emit: Emit, cancelled: Callable[[], bool]) -> Message:
        words = _checked(request, bundle)
        try:
            context = command.make_context("generate", [str(bundle), *words], obj=Session())
        except click.ClickException as error:
            raise UsageError(error.format_message()) from error
        except click.exceptions.Exit as error:
            raise UsageError("a request asks for help") from error
        options = dict(context.params)
        for name in LOADING:
            if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
                _require_loaded(name, str(options[name]), asked)
        out, dry_run = options.pop("out"), options.pop("dry_run")
        with context:
            try:
                return draw(bundle, out, options, _in_worker(pipe, emit, cancelled), dry_run=dry_run)
            except (OSError, ModuleNotFoundError, MemoryError) as error:
                raise as_l2p_error(error) from error

    return handle


def _checked(request: Message, bundle: Path) -> list[str]:
    """The arguments of a request that this worker can serve."""
    version, words = request.get("version"), request.get("arguments")
    if version != __version__:
        raise HostError(
            f"the worker is version {__version__}, its client version {str(version)[:40]!r}",
            hint="stop the worker, and start it again",
        )
    if request.get("bundle") != str(bundle):
        raise UsageError(
            f"the worker serves `{bundle}`, expected `{str(request.get('bundle'))[:400]}`",
            hint="start another worker at another --socket for this bundle",
        )
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ArtifactError("a request has no list of arguments")
    return words


def _require_loaded(name: str, value: str, asked: Mapping[str, str]) -> None:
    if asked.get(name) != value:
        option = f"--{name.replace('_', '-')}"
        had = f"with {option} {asked[name]}" if name in asked else f"without {option}"
        raise UsageError(
            f"the worker was started {had}, expected {option} {value}",
            hint=f"leave {option} out, or start another worker",
        )


def _in_worker(pipe: Pipeline, emit: Emit, cancelled: Callable[[], bool]) -> Place:
    """The worker's pipeline, for one request."""

    def opened_bundle(
        path: Path, store: Path | None, outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None]
    ) -> Bundle:
        found = pipe.bundle
        require_apart(outputs, {"BUNDLE": path, "--store": store, "the bundle's store": found.store} | dict(inputs))
        _require_unchanged(found)
        return found

    @contextmanager
    def plan(bundle: Bundle, options: Mapping[str, Any]) -> Iterator[OpenedPlan]:
        del bundle, options
        yield pipe.opened_plan

    @contextmanager
    def pipeline(opened: OpenedPlan, options: Mapping[str, Any], console: Reporter) -> Iterator[Pipeline]:
        del options, console
        with pipe.reserving(opened.backend.library_bytes - pipe.opened_plan.backend.library_bytes):
            yield pipe

    def check(opened: OpenedPlan, needs: ShotNeeds, options: Mapping[str, Any]) -> None:
        for (grid, prompts), tokens in needs.calls.items():
            with pipeline(opened, options, remote) as whole:
                whole.require_room(grid, whole.bundle.manifest.model.padded(tokens), prompts)

    remote = _RemoteConsole(emit)
    return Place(opened_bundle, plan, pipeline, check, remote, lambda share: None, cancelled)


def _require_unchanged(bundle: Bundle) -> None:
    """Refuse to draw with networks of a bundle that was built anew since they were loaded."""
    from l2p_runtime.contract import MANIFEST_NAME, bundle_digest

    try:
        digest = bundle_digest((bundle.root / MANIFEST_NAME).read_bytes())
    except OSError as error:
        raise ArtifactError(f"`{bundle.root}` cannot be read any more: {error.strerror or error}") from error
    if digest != bundle.digest:
        raise ArtifactError(
            f"`{bundle.root}` was built anew since the worker loaded it", hint="stop the worker, and start it again"
        )


class _RemoteConsole:
    """Implements `progress.Reporter` by events for the client."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit

    @contextmanager
    def task(self, title: str, total: int = 0, unit: str = "bytes") -> Iterator[Callable[[int], None]]:
        """Send which share of a task is done."""
        del unit
        done = 0

        def advance(amount: int) -> None:
            nonlocal done
            done += amount
            self._emit({"share": done / total if total else 0.0, "text": title})

        yield advance

    @contextmanager
    def phases(self, title: str) -> Iterator[Callable[[float, str], None]]:
        """Send which share is done, and of what."""
        del title
        yield lambda share, what: self._emit({"share": share, "text": what})

    def note(self, text: str) -> None:
        """Send a line that the user should read."""
        self._emit({"note": text})
