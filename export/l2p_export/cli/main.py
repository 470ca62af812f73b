"""`l2p-export`: runs a command, and turns every failure into a message and an exit code.

stdout carries data, stderr carries progress and messages. Exit codes: docs/design.md, "Exit codes".
"""

from __future__ import annotations

import errno
import importlib
import json
import keyword
import os
import signal
import sys
import traceback
from contextlib import suppress

import click

from l2p_export.cli.console import Session, example
from l2p_export.cli.stopping import TerminatedError
from l2p_export.cli.streams import READER_GONE, drop_rest, is_stdout_read, open_streams
from l2p_runtime import CancelledError, HostError, InternalError, L2PError, __version__
from l2p_runtime.onnx_library import disable_telemetry

COMMANDS = {
    "bench": "Time a bundle's networks and a denoising step on this machine.",
    "build": "Build a verified bundle from a checkpoint.",
    "calibrate": "Measure the value ranges of a bundle's layers.",
    "doctor": "Report what this machine can and cannot do.",
    "eval": "Score a bundle or a source, or draw images for public benchmarks.",
    "import": "Convert a checkpoint of any known tool into one canonical file.",
    "farm": "Write a render-farm job that draws frames with a bundle.",
    "generate": "Draw an image with a bundle.",
    "inspect": "Describe a checkpoint or a bundle.",
    "judge": "Judge whether a picture shows what a caption of the small world says.",
    "plan": "Forecast memory, disk and FLOPs before anything is built.",
    "pack": "Copy a bundle with only the files that a target needs.",
    "store": "List, prune or check a store that bundles share.",
    "train": "Train a small source, draw a corpus, transfer a source to pixel space.",
    "triton": "Write or lint a Triton model repository, check its server, draw in a browser.",
    "verify": "Check a bundle's files and run its reference cases.",
    "worker": "Keep a bundle loaded for the tasks of one session.",
}
"""Command to the line that `--help` shows. Each command is in the module of its name."""

_EXTRAS = {
    "export": (
        "diffusers",
        "ml_dtypes",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "safetensors",
        "torch",
        "transformers",
    ),
    "cpu": ("onnxruntime",),
    "text": ("tokenizers",),
    "train": ("matplotlib", "PIL", "skimage"),
    "triton": ("tritonclient",),
}
"""Extra of the package to the modules that it installs, for hints when an import fails."""

INTERRUPTED, TERMINATED = 130, 143


class _Commands(click.Group):
    """Lists commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in COMMANDS:
            return None
        suffix = "_" if keyword.iskeyword(cmd_name) else ""
        module = importlib.import_module(f"l2p_export.cli.{cmd_name}{suffix}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=example("build --profile 4k --out demo-4k.bundle"),
)
@click.version_option(__version__, prog_name="l2p-export")
def main() -> None:
    """Export pixel-space (L2P) text-to-image checkpoints as ONNX bundles, and draw with them."""


def run() -> None:
    """Entry point: run a command and exit with its code."""
    open_streams()
    session = Session()
    session.stops.install()
    # Libraries that a command imports may load ONNX Runtime by themselves.
    disable_telemetry()
    try:
        code = main.main(standalone_mode=False, obj=session)
        sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - the one place where every failure ends
        code = _report(error, session)
    session.stops.uninstall()
    drop_rest()
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: BaseException, session: Session) -> int:
    """Write what happened to stderr, and to stdout if the command was to print JSON; returns the exit code."""
    arrived = session.stops.arrived[:1]
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, (KeyboardInterrupt, click.Abort, CancelledError)) or signal.SIGINT in arrived:
        return _tell(INTERRUPTED, "interrupted", session)
    if isinstance(error, TerminatedError) or arrived:
        return _tell(TERMINATED, "terminated", session)
    # Click ends so when a pipe breaks, whichever it is.
    if isinstance(error, BrokenPipeError) or (isinstance(error, SystemExit) and error.code == 1):
        if not is_stdout_read():
            return READER_GONE
        error = BrokenPipeError()
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    return _report_error(error, session)


def _report_error(error: BaseException, session: Session) -> int:
    if isinstance(error, click.ClickException):
        error.show()
        _tell_json(error.exit_code, error.format_message(), _help_hint(error), session)
        return error.exit_code
    known = as_l2p_error(error)
    code = _tell(known.exit_code, str(known), session, hint=known.hint)
    if isinstance(known, InternalError) and os.environ.get("L2P_TRACEBACK"):
        traceback.print_exception(error)
    return code


def _tell(code: int, text: str, session: Session, *, hint: str = "") -> int:
    is_error = code not in (INTERRUPTED, TERMINATED)
    click.echo(f"error: {text}" if is_error else text, err=True)
    if hint:
        click.echo(f"\nhint: {hint}", err=True)
    _tell_json(code, text, hint, session)
    return code


def _tell_json(code: int, text: str, hint: str, session: Session) -> None:
    """Print an error as JSON, for a command that was to print JSON and has not."""
    if session.has_result or "--json" not in sys.argv[1:]:
        return
    found, _, wanted = text.partition(", expected ")
    facts = {"code": code, "found": found, "wanted": wanted, "hint": hint}
    # The error has been told; that stdout cannot be written would be another one.
    with suppress(OSError):
        click.echo(json.dumps({"error": facts}, indent=1, ensure_ascii=False))


def _help_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if isinstance(context, click.Context) else ""


def as_l2p_error(error: BaseException) -> L2PError:
    """An error of a library or of the system, with what a user can do about it."""
    if isinstance(error, L2PError):
        return error
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error)):
        return HostError(f"out of memory: {error}", hint="draw a smaller image, or give the process more memory")
    if isinstance(error, BrokenPipeError):
        return HostError("a process that was to read what this one writes has ended")
    if isinstance(error, OSError):
        hint = "free some space, or choose another folder" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        where = f" `{error.filename}`" if error.filename else ""
        return HostError(f"{error.strerror or error}{where}", hint=hint)
    if isinstance(error, ModuleNotFoundError) and (extra := _extra_of(error.name or "")):
        return HostError(f"`{error.name}` is not installed", hint=f"pip install 'l2p-export[{extra}]'")
    return InternalError(
        f"{type(error).__name__}: {error}",
        hint="this is a bug in l2p-export; run again with L2P_TRACEBACK=1 and report what it prints",
    )


def _extra_of(module: str) -> str:
    """The extra that installs a module; empty for modules that every install has."""
    return next((extra for extra, modules in _EXTRAS.items() if module.partition(".")[0] in modules), "")
