#!/usr/bin/env bash
# openjd-sessions 0.13.0, openjd-cli 0.8.0, Python 3.11: an action with the cancelation NOTIFY_THEN_TERMINATE that runs
# into its timeout, as a canceled one does. Expected: the renderer gets SIGTERM and the notice period. Seen: only the
# action's own process gets it. A renderer that a shell script started hears nothing, and is killed with the process group
# when the period is over; with `exec` in the script it hears the signal.
# Seen: "sh renderer: killed without notice; exec renderer: SIGTERM"
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
${PYTHON:-python3.11} -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check openjd-cli==0.8.0 openjd-model==0.13.0 openjd-sessions==0.13.0

cat >renderer.py <<'PY'
import signal, sys, time

def stop(number, frame):
    print("heard=SIGTERM", flush=True)
    sys.exit(143)

signal.signal(signal.SIGTERM, stop)
print("heard=start", flush=True)
time.sleep(30)
PY
seen=""
for run in "" "exec "; do
    cat >job.yaml <<YAML
specificationVersion: jobtemplate-2023-09
name: stops
steps:
- name: Render
  script:
    embeddedFiles:
    - name: script
      type: TEXT
      data: |
        ${run}$work/venv/bin/python $work/renderer.py
        true
    actions:
      onRun:
        command: sh
        args: ["{{Task.File.script}}"]
        timeout: 2
        cancelation: {mode: NOTIFY_THEN_TERMINATE, notifyPeriodInSeconds: 2}
YAML
    venv/bin/openjd run job.yaml >log.txt && exit 1
    grep -q 'heard=start' log.txt
    heard="killed without notice"
    if grep -q 'heard=SIGTERM' log.txt; then heard=SIGTERM; fi
    name=${run% }
    seen="$seen${seen:+; }${name:-sh} renderer: $heard"
done
echo "$seen"
[ "$seen" = "sh renderer: killed without notice; exec renderer: SIGTERM" ]
