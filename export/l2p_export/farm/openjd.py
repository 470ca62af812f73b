"""Open Job Description: a template that draws frames in chunks, with a worker that keeps the bundle loaded.

The template is JSON, which readers of the specification take beside YAML, so the standard library writes it. Text of
the user is the value of a job parameter, never part of a format string: `{{` in a prompt stays as it is.
(Template schemas, https://github.com/OpenJobDescription/openjd-specifications/wiki/2023-09-Template-Schemas)
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from l2p_export.farm.job import PROMPTS, Argument, DrawJob, with_prompts_file
from l2p_runtime.errors import UsageError, counted

SPECIFICATION = "jobtemplate-2023-09"
EXTENSIONS = ("TASK_CHUNKING",)
"""Of the specification; a farm's software must know each."""

TEMPLATE, VALUES = "template.json", "parameters.json"

_VALUE_CHARACTERS_MAX = 1024
"""Length of a value of a STRING parameter in the specification."""

_STOP_SECONDS = 60
_SOCKET = "{{Session.WorkingDirectory}}/l2p-worker/socket"

_Object = dict[str, Any]


def openjd_files(job: DrawJob, folder: Path) -> dict[str, str]:
    """`template.json`, and `parameters.json` with the values that have no default in it, for `openjd run`.

    Args:
        job: the job.
        folder: where they will lie.

    Returns:
        Name to text.

    Raises:
        UsageError: the job has something that a template cannot express.
    """
    template, values, files = job_template(job, folder)
    return {**files, VALUES: json_text(values), TEMPLATE: json_text(template)}


def job_template(job: DrawJob, folder: Path) -> tuple[_Object, dict[str, str], dict[str, str]]:
    """The template of a job, the values of its parameters that have no default, and the files that they name.

    A path within the job's folder is a relative default. Any other has no default: the specification refuses absolute
    ones.

    Raises:
        UsageError: text that a template cannot hold.
    """
    _require_literal("--program", job.program)
    _require_literal("--name", job.name)
    files = {}
    if any(argument.option in ("--prompt", "--negative") and _is_long(argument.value) for argument in job.arguments):
        job, files[PROMPTS] = with_prompts_file(job, folder)
    parameters = [
        _path("Bundle", job.bundle, folder, "DIRECTORY", "IN", "Bundle of networks"),
        _path("OutDir", job.folder, folder, "DIRECTORY", "OUT", "Folder of the frames"),
        _text("Pattern", job.pattern, "File name of a frame; the format is that of its ending"),
        _text("Frames", job.frames.text("openjd"), "Frames, as 1-100:2"),
        {
            "name": "ChunkSize",
            "type": "INT",
            "default": job.chunk,
            "minValue": 1,
            "description": "Frames that one task draws",
        },
        *(found for argument in job.arguments if (found := _parameter(argument, folder)) is not None),
    ]
    values = {parameter["name"]: parameter.pop("value") for parameter in parameters if "value" in parameter}
    template = {
        "specificationVersion": SPECIFICATION,
        "extensions": list(EXTENSIONS),
        "name": job.name,
        "parameterDefinitions": parameters,
        "steps": [_step(job)],
    }
    return template, values, files


def json_text(data: object) -> str:
    """JSON as people read it, in ASCII."""
    return json.dumps(data, indent=2) + "\n"


def _step(job: DrawJob) -> _Object:
    program = job.program
    start = ["worker", "start", "{{Param.Bundle}}", "--socket", _SOCKET, *_worker_words(job)]
    worker: _Object = {
        "name": "Worker",
        "description": "Keeps the bundle loaded while a session draws",
        "script": {
            "actions": {
                "onEnter": {"command": program, "args": start, "timeout": job.load_seconds},
                "onExit": {
                    "command": program,
                    "args": ["worker", "stop", "--socket", _SOCKET, "--log"],
                    "timeout": _STOP_SECONDS,
                },
            }
        },
    }
    if job.needs.cores is not None:
        worker["variables"] = {"OMP_NUM_THREADS": str(job.needs.cores)}
    return {
        "name": "Draw",
        "hostRequirements": {
            "amounts": _amounts(job),
            "attributes": [{"name": "attr.worker.os.family", "anyOf": ["linux"]}],
        },
        "parameterSpace": {
            "taskParameterDefinitions": [
                {
                    "name": "Frame",
                    "type": "CHUNK[INT]",
                    "range": "{{Param.Frames}}",
                    # CONTIGUOUS makes one chunk per frame of a range with a step.
                    "chunks": {"defaultTaskCount": "{{Param.ChunkSize}}", "rangeConstraint": "NONCONTIGUOUS"},
                }
            ]
        },
        "stepEnvironments": [worker],
        "script": {
            "actions": {
                "onRun": {
                    # Without a shell, which SIGTERM would end instead.
                    "command": program,
                    "args": _draw_words(job),
                    "timeout": job.timeout_seconds,
                    "cancelation": {
                        "mode": "NOTIFY_THEN_TERMINATE",
                        "notifyPeriodInSeconds": job.notice_seconds,
                    },
                }
            }
        },
    }


def _amounts(job: DrawJob) -> list[_Object]:
    needs = job.needs
    amounts: list[_Object] = [{"name": "amount.worker.memory", "min": needs.memory_mib}]
    if needs.cores is not None:
        amounts.append({"name": "amount.worker.vcpu", "min": needs.cores})
    if needs.gpu_memory_bytes:
        amounts.append({"name": "amount.worker.gpu", "min": 1})
        amounts.append({"name": "amount.worker.gpu.memory", "min": needs.gpu_memory_mib})
    return amounts


def _draw_words(job: DrawJob) -> list[str]:
    return [
        "generate",
        "{{Param.Bundle}}",
        "--frames={{Task.Param.Frame}}",
        "--frame-dialect=openjd",
        "--out={{Param.OutDir}}/{{Param.Pattern}}",
        "--make-folder",
        f"--worker={_SOCKET}",
        "--progress-format=openjd",
        *(_word(argument) for argument in job.arguments),
    ]


def _worker_words(job: DrawJob) -> list[str]:
    """Options of `generate` that `worker start` takes too: they decide what is loaded."""
    return [_word(argument) for argument in job.arguments if argument.option in WORKER_OPTIONS]


WORKER_OPTIONS = ("--backend", "--plan", "--memory-budget", "--store")


def _word(argument: Argument) -> str:
    if argument.kind in ("flag", "word"):
        return argument.text
    return f"{argument.option}={{{{Param.{_parameter_name(argument)}}}}}"


def _parameter(argument: Argument, folder: Path) -> _Object | None:
    """The job parameter that holds an argument's value; None for one that is in the command itself."""
    if argument.kind in ("flag", "word"):
        return None
    name, told = _parameter_name(argument), f"Option {argument.option} of l2p-export generate"
    if argument.kind == "text":
        return _text(name, argument.value, told, lines=True, option=argument.option)
    kind = "FILE" if argument.kind == "file" else "DIRECTORY"
    return _path(name, Path(argument.value), folder, kind, "IN", told)


def _parameter_name(argument: Argument) -> str:
    """`NegativeEmbeddings` for `--negative-embeddings`."""
    return argument.option.lstrip("-").title().replace("-", "")


def _text(name: str, value: str, told: str, *, lines: bool = False, option: str = "") -> _Object:
    if _is_long(value):
        raise UsageError(
            f"{option or name} has {counted(len(value), 'character')}, a job parameter holds {_VALUE_CHARACTERS_MAX:,}"
        )
    control = "MULTILINE_EDIT" if lines else "LINE_EDIT"
    interface = {"control": control, "label": name}
    return {"name": name, "type": "STRING", "default": value, "description": told, "userInterface": interface}


def _path(name: str, value: Path, folder: Path, kind: str, flow: str, told: str) -> _Object:
    place = (
        {"default": str(value.relative_to(folder))}
        if value.is_relative_to(folder) and value != folder
        else {"value": str(value)}
    )
    return {"name": name, "type": "PATH", "objectType": kind, "dataFlow": flow, "description": told, **place}


def _is_long(value: str) -> bool:
    return len(value) > _VALUE_CHARACTERS_MAX


def _require_literal(option: str, text: str) -> None:
    """Refuse what would be read as a format string."""
    if "{{" in text or "}}" in text:
        raise UsageError(
            f"{option} is {text!r}, and a job template takes `{{{{` and `}}}}` as the ends of an expression"
        )
