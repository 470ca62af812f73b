"""OpenCue: the job XML that Cuebot takes, with one layer that draws chunks of frames.

The elements, their order and their values are those that PyOutline 1.37 writes for the same layer (`cjsl-1.15.dtd` of
Cuebot). A command is one line of shell, in which Cuebot replaces tokens such as `#FRAMESPEC#`.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from xml.etree import ElementTree as ET

from l2p_export.farm.job import PROMPTS, Argument, CueOptions, DrawJob, with_prompts_file
from l2p_runtime.errors import InternalError, UsageError, counted
from l2p_runtime.frames.ranges import frames_of

JOB = "job.xml"

_HEAD = (
    '<?xml version="1.0"?>\n'
    '<!DOCTYPE spec PUBLIC "SPI Cue  Specification Language" "http://localhost:8080/spcue/dtd/cjsl-1.15.dtd">\n'
)
_FRAMES = "#FRAMESPEC#"
_TOKEN = re.compile(r"#(?:[ZI]?FRAME|FRAME_START|FRAME_END|FRAME_CHUNK|FRAMESPEC|LAYER|JOB)#")
_NAME = re.compile(r"[A-Za-z0-9_.-]{3,}")
_TAG = re.compile(r"[A-Za-z0-9]{3,}")
_COMMAND_MAX = _RANGE_MAX = 4000
"""Characters of the columns `str_cmd` and `str_range` in Cuebot's database."""

_PROMPT_MAX = 1000
"""Characters of a prompt in a command; a quote takes five there."""

_TASKS_MAX = 100_000
"""Chunks of a job that Cuebot takes."""

_MIN_MEMORY_MIB = 256
"""Cuebot raises less to its own minimum."""


def opencue_files(job: DrawJob, folder: Path) -> dict[str, str]:
    """`job.xml`, for `opencue.api.launchSpec`.

    Args:
        job: the job.
        folder: where it will lie.

    Returns:
        Name to text.

    Raises:
        UsageError: the job has something that Cuebot would refuse or change.
    """
    files = {}
    if any(argument.option in ("--prompt", "--negative") and _is_changed(argument.value) for argument in job.arguments):
        job, files[PROMPTS] = with_prompts_file(job, folder)
    return {**files, JOB: _HEAD + ET.tostring(job_spec(job), encoding="unicode") + "\n"}


def job_spec(job: DrawJob) -> ET.Element:
    """The `spec` element of a job.

    Raises:
        UsageError: a name, command or range that Cuebot does not take.
    """
    if job.cue is None:
        raise InternalError("a job of OpenCue has no show and shot")
    _check_names(job, job.cue)
    spec = ET.Element("spec")
    for tag, text in (("facility", "local"), ("show", job.cue.show), ("shot", job.cue.shot), ("user", job.cue.user)):
        _add(spec, tag, text)
    if job.cue.user_id is not None:
        _add(spec, "uid", str(job.cue.user_id))
    element = ET.SubElement(spec, "job", {"name": job.name})
    for tag, text in (("paused", "False"), ("priority", "1"), ("maxretries", "2"), ("autoeat", "False")):
        _add(element, tag, text)
    ET.SubElement(element, "env")
    layers = ET.SubElement(element, "layers")
    _add_layer(layers, job, job.cue)
    ET.SubElement(spec, "depends")
    return spec


def draw_command(job: DrawJob) -> str:
    """The line of shell that draws a chunk.

    Raises:
        UsageError: Cuebot would replace a token in it, or cut it.
    """
    words = [job.program, "generate", str(job.bundle)]
    after = [
        "--frame-dialect=fileseq",
        f"--out={job.folder / job.pattern}",
        "--make-folder",
        "--progress-format=none",
        *(_word(argument) for argument in job.arguments),
    ]
    for word in (*words, *after):
        if token := _TOKEN.search(word):
            raise UsageError(
                f"`{token[0]}` is in the command, and Cuebot would replace it: {word[:80]}",
                hint="choose another name",
            )
    command = shlex.join([*words, f"--frames={_FRAMES}", *after])
    if len(command) > _COMMAND_MAX:
        raise UsageError(
            f"the command has {counted(len(command), 'character')}, Cuebot holds {_COMMAND_MAX:,}",
            hint="use shorter paths",
        )
    return command


def _add_layer(layers: ET.Element, job: DrawJob, cue: CueOptions) -> None:
    needs = job.needs
    layer = ET.SubElement(layers, "layer", {"name": "draw", "type": "Render"})
    _add(layer, "cmd", draw_command(job))
    _add(layer, "range", _frame_range(job))
    _add(layer, "chunk", str(job.chunk))
    if needs.cores is not None:
        _add(layer, "cores", f"{needs.cores}.0")
    # Whole megabytes: Cuebot reads `1.5g` as its default.
    _add(layer, "memory", f"{max(needs.memory_mib, _MIN_MEMORY_MIB)}m")
    if needs.gpu_memory_bytes:
        _add(layer, "gpus", "1")
        _add(layer, "gpu_memory", f"{needs.gpu_memory_mib}m")
    # Cuebot counts minutes.
    _add(layer, "timeout", str(-(-job.timeout_seconds // 60)))
    if cue.tags:
        _add(layer, "tags", " | ".join(cue.tags))
    environment = ET.SubElement(layer, "env")
    if needs.cores is not None:
        ET.SubElement(environment, "key", {"name": "OMP_NUM_THREADS"}).text = str(needs.cores)
    services = ET.SubElement(layer, "services")
    _add(services, "service", cue.service)
    ET.SubElement(layer, "outputs")


def _check_names(job: DrawJob, cue: CueOptions) -> None:
    names = {"--name": job.name, "--show": cue.show, "--shot": cue.shot, "--service": cue.service}
    for option, name in names.items():
        if _NAME.fullmatch(name) is None:
            raise UsageError(
                f"{option} is {name!r}, expected three or more letters, digits, `_`, `.` and `-` for OpenCue"
            )
    if cue.user == "root" or cue.user_id == 0:
        raise UsageError(f"--user is {cue.user!r}, and Cuebot runs no jobs as root", hint="--user NAME")
    for tag in cue.tags:
        if _TAG.fullmatch(tag) is None:
            raise UsageError(f"--tag is {tag!r}, expected three or more letters and digits for OpenCue")


def _frame_range(job: DrawJob) -> str:
    """The frames in ascending order, each once: Cuebot would draw those of overlapping parts twice."""
    tasks = -(-len(job.frames) // job.chunk)
    if tasks > _TASKS_MAX:
        raise UsageError(
            f"the job has {counted(tasks, 'chunk')}, Cuebot takes {_TASKS_MAX:,}",
            hint="raise --chunk, or submit several",
        )
    text = frames_of(sorted(job.frames)).text("fileseq")
    if len(text) > _RANGE_MAX:
        raise UsageError(
            f"the frame range has {counted(len(text), 'character')}, Cuebot holds {_RANGE_MAX:,}",
            hint="submit several jobs",
        )
    return text


def _is_changed(text: str) -> bool:
    """Whether a prompt would not arrive as it is: too long, with a token, or with a line end that XML does not keep."""
    return len(text) > _PROMPT_MAX or "\r" in text or _TOKEN.search(text) is not None


def _word(argument: Argument) -> str:
    if "\r" in argument.value:
        raise UsageError(f"{argument.option} has a carriage return, which XML does not keep")
    return argument.text


def _add(parent: ET.Element, tag: str, text: str) -> None:
    ET.SubElement(parent, tag).text = text
