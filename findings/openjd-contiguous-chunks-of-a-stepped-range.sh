#!/usr/bin/env bash
# openjd-cli 0.8.0, openjd-model 0.13.0, Python 3.11: a CHUNK[INT] parameter with the range 1-11:2 and chunks of three
# frames. Expected: two chunks, or an error, with either value of rangeConstraint. Seen: CONTIGUOUS makes one chunk of
# each frame, with no word about it, so that a renderer is started six times; NONCONTIGUOUS makes the two chunks.
# Seen: "CONTIGUOUS: 1-1 3-3 5-5 7-7 9-9 11-11; NONCONTIGUOUS: 1-5:2 7-11:2"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check openjd-cli==0.8.0 openjd-model==0.13.0 openjd-sessions==0.13.0

seen=""
for constraint in CONTIGUOUS NONCONTIGUOUS; do
    cat >job.yaml <<YAML
specificationVersion: jobtemplate-2023-09
extensions: [TASK_CHUNKING]
name: chunks
steps:
- name: Render
  parameterSpace:
    taskParameterDefinitions:
    - {name: Frame, type: "CHUNK[INT]", range: "1-11:2", chunks: {defaultTaskCount: 3, rangeConstraint: $constraint}}
  script:
    actions: {onRun: {command: echo, args: ["chunk={{Task.Param.Frame}}"]}}
YAML
    chunks=$(venv/bin/openjd run job.yaml | sed -n 's/.*\tchunk=//p' | paste -sd' ')
    seen="$seen${seen:+; }$constraint: $chunks"
done
echo "$seen"
[ "$seen" = "CONTIGUOUS: 1-1 3-3 5-5 7-7 9-9 11-11; NONCONTIGUOUS: 1-5:2 7-11:2" ]
