#!/usr/bin/env bash
# openjd-sessions 0.13.0, openjd-cli 0.8.0, Python 3.11: an environment whose onEnter starts a process in the background
# and ends at once. Expected: the action ends with its process. Seen: while the background process holds the action's
# stdout, the session waits seconds for the end of the stream, at each start; with its output redirected it does not.
# Seen: "inherited: more than 3 s; redirected: less than 3 s"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check openjd-cli==0.8.0 openjd-model==0.13.0 openjd-sessions==0.13.0

seen=""
for name in inherited redirected; do
    output=""
    [ "$name" = inherited ] || output='>/dev/null 2>&1 </dev/null'
    cat >job.yaml <<YAML
specificationVersion: jobtemplate-2023-09
name: daemon
jobEnvironments:
- name: Daemon
  script:
    actions: {onEnter: {command: sh, args: ["-c", "sleep 20 $output & exit 0"]}}
steps:
- name: Render
  script:
    actions: {onRun: {command: "true"}}
YAML
    started=$(date +%s%N)
    venv/bin/openjd run job.yaml >log.txt
    took=$((($(date +%s%N) - started) / 1000000))
    compared="less than 3 s"
    if [ "$took" -gt 3000 ]; then compared="more than 3 s"; fi
    seen="$seen${seen:+; }$name: $compared"
    echo "$name: $took ms"
done
echo "$seen"
[ "$seen" = "inherited: more than 3 s; redirected: less than 3 s" ]
