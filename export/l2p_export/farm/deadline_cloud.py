"""AWS Deadline Cloud: a job bundle, which is an Open Job Description template with its values and files.

(Job bundles, https://docs.aws.amazon.com/deadline-cloud/latest/developerguide/build-job-bundle.html)
"""

from __future__ import annotations

from pathlib import Path

from l2p_export.farm.job import DrawJob
from l2p_export.farm.openjd import TEMPLATE, job_template, json_text

VALUES, ASSETS = "parameter_values.json", "asset_references.json"


def deadline_cloud_files(job: DrawJob, folder: Path) -> dict[str, str]:
    """The template, its values, and the files that a submitter uploads or collects.

    Args:
        job: the job.
        folder: where they will lie; `deadline bundle submit` takes it.

    Returns:
        Name to text.

    Raises:
        UsageError: the job has something that a template cannot express.
    """
    template, values, files = job_template(job, folder)
    listed = [{"name": name, "value": value} for name, value in values.items()]
    return {
        **files,
        VALUES: json_text({"parameterValues": listed}),
        ASSETS: json_text({"assetReferences": _assets(job, [str(folder / name) for name in files])}),
        TEMPLATE: json_text(template),
    }


def _assets(job: DrawJob, written: list[str]) -> dict[str, dict[str, list[str]]]:
    """What is read and written, for job attachments; a farm on shared storage maps the same paths."""
    files = [argument.value for argument in job.arguments if argument.kind == "file"]
    folders = [argument.value for argument in job.arguments if argument.kind == "folder"]
    return {
        "inputs": {"filenames": files + written, "directories": [str(job.bundle), *folders]},
        "outputs": {"directories": [str(job.folder)]},
    }
