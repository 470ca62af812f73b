#!/usr/bin/env bash
# openjd-cli 0.8.0, Python 3.11: a job of four chunks, of which the third fails. Expected: the report at the end counts
# the chunks that ran, two or three. Seen: it says that none ran.
# Seen: "started: 3; reported: Chunks run: 0"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check openjd-cli==0.8.0 openjd-model==0.13.0 openjd-sessions==0.13.0

cat >job.yaml <<'YAML'
specificationVersion: jobtemplate-2023-09
extensions: [TASK_CHUNKING]
name: chunks
steps:
- name: Render
  parameterSpace:
    taskParameterDefinitions:
    - {name: Frame, type: "CHUNK[INT]", range: "1-4", chunks: {defaultTaskCount: 1, rangeConstraint: NONCONTIGUOUS}}
  script:
    actions: {onRun: {command: sh, args: ["-c", "echo started={{Task.Param.Frame}}; [ {{Task.Param.Frame}} != 3 ]"]}}
YAML
venv/bin/openjd run job.yaml >log.txt && exit 1
seen="started: $(grep -c '	started=' log.txt); reported: $(grep -o 'Chunks run: [0-9]*' log.txt)"
echo "$seen"
[ "$seen" = "started: 3; reported: Chunks run: 0" ]
