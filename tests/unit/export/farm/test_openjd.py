"""The template, as the libraries of Open Job Description read it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openjd.model import (
    DocumentType,
    IntRangeExpr,
    create_job,
    decode_job_template,
    document_string_to_object,
    preprocess_job_parameters,
)

from l2p_export.farm import MANAGERS, Argument, Needs
from l2p_export.farm.openjd import EXTENSIONS, job_template
from l2p_runtime.errors import UsageError
from l2p_runtime.frames.ranges import parse_frames
from unit.export.farm.jobs import ODD_PROMPT, make_job

FOLDER = Path("/jobs/sh 010")


def created(job: Any, **values: str) -> Any:
    """The job that a farm creates from the files."""
    files = MANAGERS["openjd"](job, FOLDER)
    document = document_string_to_object(document=files["template.json"], document_type=DocumentType.JSON)
    template = decode_job_template(template=document, supported_extensions=EXTENSIONS)
    parameters = preprocess_job_parameters(
        job_template=template,
        job_parameter_values={**json.loads(files["parameters.json"]), **values},
        job_template_dir=FOLDER,
        current_working_dir=Path("/"),
    )
    return create_job(job_template=template, job_parameter_values=parameters)


def test_the_libraries_take_the_job() -> None:
    job = created(make_job(ODD_PROMPT))
    values = {name: parameter.value for name, parameter in job.parameters.items()}
    assert values == {
        "Bundle": "/shows/a show/demo.bundle",
        "OutDir": "/jobs/sh 010/frames",
        "Pattern": "shot.####.exr",
        "Frames": "1-39:2",
        "ChunkSize": "4",
        "Prompt": ODD_PROMPT,
        "NegativeEmbeddings": "/shows/negative.npy",
    }
    (step,) = job.steps
    assert [(amount.name, int(amount.min)) for amount in step.hostRequirements.amounts] == [
        ("amount.worker.memory", 118),
        ("amount.worker.vcpu", 2),
    ]
    action = step.script.actions.onRun
    assert (action.cancelation.mode.value, action.cancelation.notifyPeriodInSeconds) == ("NOTIFY_THEN_TERMINATE", 60)


def test_the_template_is_as_it_was_looked_at() -> None:
    template, values, files = job_template(make_job("a red circle"), FOLDER)
    assert (values, files) == (
        {"Bundle": "/shows/a show/demo.bundle", "NegativeEmbeddings": "/shows/negative.npy"},
        {},
    )
    assert template["steps"][0]["script"]["actions"]["onRun"]["args"] == [
        "generate",
        "{{Param.Bundle}}",
        "--frames={{Task.Param.Frame}}",
        "--frame-dialect=openjd",
        "--out={{Param.OutDir}}/{{Param.Pattern}}",
        "--make-folder",
        "--worker={{Session.WorkingDirectory}}/l2p-worker/socket",
        "--progress-format=openjd",
        "--prompt={{Param.Prompt}}",
        "--steps=4",
        "--skip-existing",
        "--negative-embeddings={{Param.NegativeEmbeddings}}",
    ]
    assert template["extensions"] == ["TASK_CHUNKING"]


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=200))
def test_any_prompt_is_a_value_and_no_expression(text: str) -> None:
    prompt = f"{{{{Param.Frames}}}} {text} {{{{"
    try:
        argument = Argument("--prompt", prompt, "text")
    except UsageError:
        assert "\uffff" in text or "\ufffe" in text
        return
    template, values, _ = job_template(make_job(arguments=(argument,)), FOLDER)
    (parameter,) = (item for item in template["parameterDefinitions"] if item["name"] == "Prompt")
    assert parameter["default"] == prompt
    assert "Prompt" not in values
    assert "{{Param.Prompt}}" in template["steps"][0]["script"]["actions"]["onRun"]["args"][-1]


def test_paths_in_the_jobs_folder_are_relative_defaults() -> None:
    argument = Argument("--embeddings", str(FOLDER / "in" / "x.npy"), "file")
    template, values, _ = job_template(make_job(folder=Path("/elsewhere"), arguments=(argument,)), FOLDER)
    defaults = {item["name"]: item.get("default") for item in template["parameterDefinitions"]}
    assert (defaults["Embeddings"], defaults["OutDir"]) == ("in/x.npy", None)
    assert values["OutDir"] == "/elsewhere"


def test_a_gpu_is_asked_for() -> None:
    (step,) = created(make_job(needs=Needs(1 << 30, 5 << 30))).steps
    amounts = {amount.name: int(amount.min) for amount in step.hostRequirements.amounts}
    assert amounts == {"amount.worker.memory": 1024, "amount.worker.gpu": 1, "amount.worker.gpu.memory": 5120}


def test_the_worker_loads_what_the_job_draws_with() -> None:
    job = make_job()
    words = (Argument("--plan", "fp16", "word"), Argument("--store", "/stores/a b", "folder"))
    template, _, _ = job_template(replace(job, arguments=(*job.arguments, *words)), FOLDER)
    (environment,) = template["steps"][0]["stepEnvironments"]
    assert environment["script"]["actions"]["onEnter"]["args"][-2:] == ["--plan=fp16", "--store={{Param.Store}}"]
    assert environment["variables"] == {"OMP_NUM_THREADS": "2"}


@pytest.mark.parametrize("frames", ["1-10", "-5--1", "5", "1-9:3,20", "10-1:-3"])
def test_frames_are_those_of_the_range(frames: str) -> None:
    wanted = parse_frames(frames, "openjd")
    text = created(replace(make_job(), frames=wanted)).parameters["Frames"].value
    assert sorted(IntRangeExpr.from_str(text)) == sorted(wanted)


@pytest.mark.parametrize("changes", [{"name": "a {{b}}"}, {"program": "/opt/}}/l2p-export"}])
def test_a_format_string_where_none_is_meant_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="a job template takes"):
        job_template(make_job(**changes), FOLDER)


def test_a_long_text_of_another_option_is_refused() -> None:
    with pytest.raises(UsageError, match=r"Pattern has 1,\d+ characters, a job parameter holds 1,024"):
        job_template(make_job(pattern="x" * 1020 + ".####.exr"), FOLDER)


def test_a_deadline_cloud_bundle_has_values_and_files() -> None:
    files = {name: json.loads(text) for name, text in MANAGERS["deadline-cloud"](make_job(), FOLDER).items()}
    assert files["parameter_values.json"] == {
        "parameterValues": [
            {"name": "Bundle", "value": "/shows/a show/demo.bundle"},
            {"name": "NegativeEmbeddings", "value": "/shows/negative.npy"},
        ]
    }
    assert files["asset_references.json"] == {
        "assetReferences": {
            "inputs": {"filenames": ["/shows/negative.npy"], "directories": ["/shows/a show/demo.bundle"]},
            "outputs": {"directories": ["/jobs/sh 010/frames"]},
        }
    }
    assert files["template.json"] == job_template(make_job(), FOLDER)[0]
