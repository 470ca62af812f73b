"""`l2p-export worker`: keeps a bundle loaded for the tasks of one session."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli.console import backend_option, example, json_option, print_json, session, store_option
from l2p_export.cli.inputs import InputPath
from l2p_export.cli.worker_draw import LOADING
from l2p_runtime import HostError, UsageError

if TYPE_CHECKING:
    from l2p_runtime.worker.messages import Message

_POLL_SECONDS = 0.05
_LOG_CHARACTERS = 4_000

socket_option = click.option(
    "--socket",
    type=click.Path(path_type=Path),
    required=True,
    help="Unix socket of the worker, in a folder that only you can enter; the folder is made if it is not there.",
)


@click.group("worker", epilog=example("worker start demo-4k.bundle --socket /run/user/1000/l2p/socket"))
def command() -> None:
    """Keep a bundle loaded in one process, which draws for `generate --worker SOCKET`."""


@command.command("start", epilog=example("worker start demo-4k.bundle --socket /run/user/1000/l2p/socket"))
@click.argument("bundle", type=InputPath("bundle"))
@socket_option
@click.option("--plan", help="Precision plan; default: the bundle's first.")
@backend_option
@click.option("--memory-budget", help="Limit for weights, buffers and activations together, e.g. 6GiB.")
@click.option(
    "--idle-seconds", type=float, default=600.0, show_default=True, help="End after so long without a request."
)
@click.option("--foreground", is_flag=True, help="Serve in this process, until it is stopped.")
@store_option
@json_option
def start(bundle: Path, socket: Path, *, foreground: bool, as_json: bool, **options: Any) -> None:
    """Load BUNDLE in a process in the background, and return when it is ready.

    It ends with `worker stop`, when its socket is removed, and after --idle-seconds without a request. Its messages are
    in the log beside the socket.
    """
    if not options["idle_seconds"] > 0:
        raise UsageError(f"--idle-seconds is {options['idle_seconds']:g}, expected more than 0")
    place, bundle = socket.absolute(), bundle.resolve()
    if foreground:
        _serve(bundle, place, options)
        return
    from l2p_runtime.worker import worker_status

    try:
        facts = worker_status(place)
    except HostError:
        facts = _start_in_background(bundle, place, options)
    # Another process may have started one meanwhile.
    _require_same(facts, bundle, place, options)
    if as_json:
        print_json({"socket": str(place), **facts})
    else:
        click.echo(f"worker {facts['process']} at {place} serves {facts['bundle']}")


@command.command("status", epilog=example("worker status --socket /run/user/1000/l2p/socket"))
@socket_option
@json_option
def status(socket: Path, *, as_json: bool) -> None:
    """Tell what a worker serves."""
    from l2p_runtime.worker import worker_status

    facts = worker_status(socket.absolute())
    if as_json:
        print_json({"socket": str(socket.absolute()), **facts})
    else:
        for name, value in facts.items():
            click.echo(f"{name}: {value}")


@command.command("stop", epilog=example("worker stop --socket /run/user/1000/l2p/socket"))
@socket_option
@click.option("--log", is_flag=True, help="Print the worker's log on stderr.")
def stop(socket: Path, *, log: bool) -> None:
    """Stop a worker and wait until it has ended; after 30 s it is killed. That there is none is no error."""
    from l2p_runtime.worker import log_path, stop_worker, worker_status

    place = socket.absolute()
    try:
        worker_status(place)
    except HostError as error:
        click.echo(f"{error}", err=True)
    else:
        stop_worker(place)
    if log:
        click.echo(_end_of(log_path(place)), err=True, nl=False)


def _serve(bundle: Path, socket: Path, options: dict[str, Any]) -> None:
    """Load the bundle and serve it."""
    from l2p_export.cli.worker_draw import draw_for_clients
    from l2p_runtime import Pipeline
    from l2p_runtime.worker import bind, serve

    # Before loading: whoever comes second is told so at once.
    listener = bind(socket)
    places = {name: options[name] for name in LOADING}
    try:
        started = time.monotonic()
        pipe = Pipeline.open(bundle, **places)
    except BaseException:
        listener.close()
        raise
    with pipe:
        click.echo(f"loaded {bundle} in {time.monotonic() - started:.1f} s", err=True)
        facts = {"bundle": str(bundle), "digest": pipe.bundle.digest, "plan": pipe.plan, "options": _asked(options)}
        reason = serve(listener, draw_for_clients(pipe, bundle, _asked(options)), facts, options["idle_seconds"])
    click.echo(f"ended: {reason}", err=True)


def _start_in_background(bundle: Path, socket: Path, options: dict[str, Any]) -> Message:
    from l2p_runtime.worker import log_path, make_private_folder, worker_status

    make_private_folder(socket.parent)
    words = [sys.executable, "-P", "-m", "l2p_export", "worker", "start", str(bundle), "--foreground"]
    words += ["--socket", str(socket), "--idle-seconds", str(options["idle_seconds"])]
    words += [part for name, value in _asked(options).items() for part in (f"--{name.replace('_', '-')}", str(value))]
    log = log_path(socket)
    start = log.stat().st_size if log.exists() else 0
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    # Nothing of this process stays with it: who reads our output would wait for its end.
    streams = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, log, append, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    process = os.posix_spawn(sys.executable, words, os.environ, file_actions=streams, setsid=True)
    ended, status = 0, 0
    try:
        while not ended:
            try:
                return worker_status(socket)
            except HostError:
                session().stops.again()
                time.sleep(_POLL_SECONDS)
            ended, status = os.waitpid(process, os.WNOHANG)
    except BaseException:
        os.kill(process, signal.SIGTERM)
        raise
    click.echo(_end_of(log, start), err=True, nl=False)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise HostError(f"the worker was ended by signal {-code} while it loaded `{bundle}`")
    raise click.exceptions.Exit(code)


def _asked(options: dict[str, Any]) -> dict[str, str]:
    """Options that decide what is loaded, as they were given."""
    return {name: str(options[name]) for name in LOADING if options[name] is not None}


def _require_same(facts: Message, bundle: Path, socket: Path, options: dict[str, Any]) -> None:
    if facts["bundle"] != str(bundle) or facts["options"] != _asked(options):
        raise UsageError(
            f"the worker at `{socket}` serves `{facts['bundle']}` with {facts['options']}, expected `{bundle}` with "
            f"{_asked(options)}",
            hint="stop it, or start another at another --socket",
        )


def _end_of(log: Path, start: int = 0) -> str:
    """The end of a log, from a place in it on; empty where there is none."""
    try:
        return log.read_bytes()[start:].decode(errors="replace")[-_LOG_CHARACTERS:]
    except OSError:
        return ""
