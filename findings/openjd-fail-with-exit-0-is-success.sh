#!/usr/bin/env bash
# openjd-cli 0.8.0, openjd-sessions 0.13.0, Python 3.11: a task that prints the failure message of the specification,
# "openjd_fail: REASON", and ends with exit code 0. Expected: a task that says it has failed has failed, or the message is
# refused. Seen: the message is shown and the run succeeds; only the exit code counts.
# Seen: "exit 0 with openjd_fail: 0; exit 3 with openjd_fail: 1"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check openjd-cli==0.8.0 openjd-model==0.13.0 openjd-sessions==0.13.0

seen=""
for code in 0 3; do
    cat >job.yaml <<YAML
specificationVersion: jobtemplate-2023-09
name: fails
steps:
- name: Render
  script:
    actions: {onRun: {command: sh, args: ["-c", "echo 'openjd_fail: out of memory'; exit $code"]}}
YAML
    status=0
    venv/bin/openjd run job.yaml >log.txt || status=$?
    grep -q 'openjd_fail: out of memory' log.txt
    seen="$seen${seen:+; }exit $code with openjd_fail: $status"
done
echo "$seen"
[ "$seen" = "exit 0 with openjd_fail: 0; exit 3 with openjd_fail: 1" ]
