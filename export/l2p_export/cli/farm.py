"""`l2p-export farm`."""

from __future__ import annotations

import getpass
import os
import pwd
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from l2p_export.cli import generate
from l2p_export.cli.console import dry_run_option, example, json_option, print_json
from l2p_export.cli.drawing import read_call
from l2p_export.cli.generate_frames import read_shot, room_bytes
from l2p_export.cli.given_options import absolute, given_options
from l2p_export.cli.inputs import InputPath
from l2p_export.cli.outputs import open_bundle_apart, require_writable
from l2p_runtime import UsageError
from l2p_runtime.errors import counted

if TYPE_CHECKING:
    from l2p_export.farm import Argument, CueOptions, DrawJob, Needs
    from l2p_runtime.bundle import Bundle
    from l2p_runtime.frames.shot import ShotNeeds

MANAGERS = ("openjd", "deadline-cloud", "opencue")

_OWN = frozenset(
    (
        "bundle",
        "make_folder",
        "server",
        "out",
        "frames",
        "frame_dialect",
        "worker",
        "progress_format",
        "as_json",
        "dry_run",
        "quiet",
        "help",
    )
)
"""Parameters of `generate` that a job sets by itself, or that make no sense in one."""

_COARSE_PIXEL_BYTES = 3 * 4
"""The coarse image is held, in float32, until it is enlarged."""

_UNUSUAL = re.compile(r"[^A-Za-z0-9_.-]+")
_CUE = ("show", "shot", "user", "service", "tags")


@click.command(
    "farm", epilog=example("farm demo-4k.bundle --manager openjd --frames 1-40x2 --prompt 'a red circle' --out job")
)
@click.argument("bundle", type=InputPath("bundle"))
@click.option("--manager", type=click.Choice(MANAGERS), required=True, help="What runs the job.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the job's files.")
@click.option("--frames", help="Frames, as 1-100 or 1-100x2; default: those of --prompts.")
@click.option("--frame-dialect", type=click.Choice(("openjd", "fileseq")), help="Whose ranges --frames is written in.")
@click.option(
    "--pattern",
    default="frames/shot.####.png",
    show_default=True,
    help="File of a frame, with its number as ####; a relative one lies in the folder of the job.",
)
@click.option("--chunk", type=int, default=10, show_default=True, help="Frames that one task draws.")
@click.option("--name", help="Name of the job; default: that of the folder --out.")
@click.option("--program", default="l2p-export", show_default=True, help="This program, or its path, on the farm.")
@click.option("--cores", type=click.IntRange(1), help="Processor cores of a task; default: the manager's.")
@click.option("--timeout", type=int, default=86_400, show_default=True, help="Seconds after which a task is ended.")
@click.option(
    "--notice", type=int, default=60, show_default=True, help="Seconds from the request to stop until the kill."
)
@click.option("--show", help="opencue: show of the job; default: the variable SHOW.")
@click.option("--shot", help="opencue: shot of the job; default: the variable SHOT.")
@click.option("--user", help="opencue: user whom the job belongs to; default: you.")
@click.option("--service", help="opencue: service of the layer; default: default.")
@click.option("--tag", "tags", multiple=True, help="opencue: tag of the hosts; repeatable.")
@json_option
@dry_run_option
@click.pass_context
def command(ctx: click.Context, /, bundle: Path, out: Path, *, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Write a render-farm job that draws frames with BUNDLE.

    All options of `generate` that describe an image are passed on. What the job asks of a machine is forecast from the
    bundle.
    """
    from l2p_export.farm import write_job

    folder = absolute(out)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out `{out}` is a file, expected a folder")
    manager: str = options["manager"]
    arguments = given_options(ctx, IMAGE_OPTIONS)
    read = {argument.option: Path(argument.value) for argument in arguments if argument.kind in ("file", "folder")}
    opened = open_bundle_apart(bundle, options["store"], {"--out": folder}, read)
    job = _draw_job(opened, absolute(bundle), folder, arguments, options)
    if dry_run:
        require_writable({"--out": folder})
    files = write_job(manager, job, folder, dry_run=dry_run)
    _tell(job, manager, files, as_json=as_json, dry_run=dry_run)


def _draw_job(
    bundle: Bundle, path: Path, folder: Path, arguments: tuple[Argument, ...], options: dict[str, Any]
) -> DrawJob:
    """The job, after all that `generate --dry-run` checks but the machine."""
    from l2p_export.farm import DrawJob
    from l2p_runtime.frames.shot import check_shot
    from l2p_runtime.images import image_format

    target = folder / options["pattern"]
    image = image_format(target, **{name: options[name] for name in ("bits", "compression", "color", "tiled")})
    call = read_call(options, bundle, image)
    shot = read_shot(target, options, call)
    room = room_bytes(bundle.manifest.model, shot_needs := check_shot(shot, bundle), image)
    if (coarse := call["coarse"]) is not None:
        room += coarse.height * coarse.width * _COARSE_PIXEL_BYTES
    needs, further = _needs(bundle, shot_needs, room, options)
    return DrawJob(
        name=options["name"] or _UNUSUAL.sub("_", folder.name),
        program=options["program"],
        bundle=path,
        frames=shot.frames,
        chunk=options["chunk"],
        folder=target.parent,
        pattern=target.name,
        arguments=(*arguments, *further),
        needs=needs,
        timeout_seconds=options["timeout"],
        notice_seconds=options["notice"],
        cue=_cue(options),
    )


def _needs(bundle: Bundle, shot: ShotNeeds, room: int, options: dict[str, Any]) -> tuple[Needs, tuple[Argument, ...]]:
    """What drawing needs, and the memory budget that keeps a job on the CPU within it."""
    from l2p_export.farm import Argument
    from l2p_export.farm.resources import Draw, cpu_budget_bytes, forecast_needs, runs_on_gpu
    from l2p_runtime.memory import budget_bytes

    patch_px, given = bundle.manifest.model.patch_px, budget_bytes(options["memory_budget"])
    draws = [
        Draw(rows * patch_px, columns * patch_px, tokens, prompts, options["backend"], options["plan"], given, room)
        for ((rows, columns), prompts), tokens in shot.calls.items()
    ]
    needs = max(
        (forecast_needs(bundle, draw, options["cores"]) for draw in draws), key=lambda needs: needs.memory_bytes
    )
    if runs_on_gpu(bundle.manifest, options["backend"]) or given is not None:
        return needs, ()
    mebibytes = -(-max(cpu_budget_bytes(bundle, draw) for draw in draws) >> 20)
    return needs, (Argument("--memory-budget", f"{mebibytes}MiB", "word"),)


def _cue(options: dict[str, Any]) -> CueOptions | None:
    from l2p_export.farm import CueOptions

    if options["manager"] != "opencue":
        if given := [name for name in _CUE if options[name]]:
            raise UsageError(f"--{given[0].removesuffix('s')} belongs to --manager opencue")
        return None
    show, shot = (options[name] or os.environ.get(name.upper()) for name in ("show", "shot"))
    if not show or not shot:
        raise UsageError("OpenCue wants a show and a shot", hint="--show NAME --shot NAME")
    user = options["user"] or getpass.getuser()
    return CueOptions(show, shot, user, _user_id(user), options["service"] or "default", options["tags"])


def _user_id(user: str) -> int | None:
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        return None


def _tell(job: DrawJob, manager: str, files: tuple[Path, ...], *, as_json: bool, dry_run: bool) -> None:
    tasks = -(-len(job.frames) // job.chunk)
    needs = job.needs
    if as_json:
        facts = {"manager": manager, "files": list(map(str, files)), "frames": len(job.frames), "tasks": tasks}
        told = {"memory_mib": needs.memory_mib, "gpu_memory_mib": needs.gpu_memory_mib, "cores": needs.cores}
        print_json(facts | {"needs": told, "out": str(job.folder / job.pattern)})
        return
    texts = [f"{needs.memory_mib:,} MiB of memory"]
    texts += [f"a GPU with {needs.gpu_memory_mib:,} MiB"] if needs.gpu_memory_bytes else []
    texts += [f"{counted(needs.cores, 'core')}"] if needs.cores is not None else []
    for file in files:
        click.echo(f"would write {file}" if dry_run else file)
    click.echo(
        f"{counted(len(job.frames), 'frame')} in {counted(tasks, 'task')}; each needs {', '.join(texts)}\n"
        f"submit: {_submission(manager, files)}"
    )


def _submission(manager: str, files: tuple[Path, ...]) -> str:
    """The command that hands a job to its manager."""
    main = files[-1]
    if manager == "openjd":
        return shlex.join(["openjd", "run", str(main), "-p", f"file://{main.with_name('parameters.json')}"])
    if manager == "deadline-cloud":
        return shlex.join(["deadline", "bundle", "submit", str(main.parent)])
    return shlex.join(["python", "-c", f"import opencue; opencue.api.launchSpec(open({str(main)!r}).read())"])


IMAGE_OPTIONS = tuple(
    parameter
    for parameter in generate.command.params
    if isinstance(parameter, click.Option) and parameter.name not in _OWN
)
"""Options of `generate` that a job passes on."""

command.params[-2:-2] = IMAGE_OPTIONS
