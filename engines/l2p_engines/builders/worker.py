"""The process that one engine is built in: `python -m l2p_engines.builders.worker GRAPH OUT PARENT_PID TIMINGS`.

An `EngineSpec` comes as JSON on stdin. Messages go out as JSON, one object per line:

    {"log": [SEVERITY, TEXT]}    {"progress": BuildProgress}
    at last {"built": EngineBuilt} or {"error": [TYPE, TEXT, HINT]}

The library may print to stdout, which is redirected to stderr here. The lines above have a descriptor of their own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from l2p_engines.builders.compiling import compile_engine
from l2p_engines.builders.explanations import build_error
from l2p_engines.builders.listeners import Journal, Phases
from l2p_engines.builders.request import EngineBuilt, EngineSpec
from l2p_engines.builders.trt import load_library
from l2p_engines.children import end_with
from l2p_runtime.contract.codec import from_json, to_json
from l2p_runtime.errors import L2PError


def main(arguments: list[str]) -> None:
    """Build one engine; leaves the process without returning."""
    graph, out, parent, timings = arguments
    end_with(int(parent))
    channel = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(kind: str, what: object) -> None:
        data = memoryview(json.dumps({kind: to_json(what)}).encode() + b"\n")
        while data:
            data = data[os.write(channel, data) :]

    spec = from_json(EngineSpec, json.loads(sys.stdin.buffer.read()))
    journal = Journal(lambda severity, text: send("log", [severity, text]))
    try:
        phases = Phases(lambda progress: send("progress", progress))
        send("built", _build(spec, graph, Path(out), journal, phases, Path(timings) if timings else None))
    except L2PError as error:
        send("error", [type(error).__name__, str(error), error.hint])
    except Exception as error:  # noqa: BLE001 - the library's own exceptions have no common type
        told = build_error(f"`{spec.label}`", [*journal.errors, repr(error)], repr(error))
        send("error", [type(told).__name__, str(told), told.hint])
    sys.stderr.flush()
    # Objects of a library that found no driver crash while the interpreter takes them down
    # (docs/design.md, "TensorRT facts").
    os._exit(0)


def _build(
    spec: EngineSpec, graph: str, out: Path, journal: Journal, phases: Phases, timings: Path | None
) -> EngineBuilt:
    library = load_library(spec.target.backend)
    compiled = compile_engine(library, spec, graph, out, journal, phases, timings)
    # Time and memory are told by the process that waits: a thread here that reads them would look like work going on.
    return EngineBuilt(
        sha256=compiled.sha256,
        size_bytes=compiled.size_bytes,
        seconds=0.0,
        peak_memory_bytes=0,
        library_version=library.version,
        profiles=compiled.profiles,
        warnings=compiled.warnings,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
