"""Checks whether a server can draw, by drawing an image of the minimum size over HTTP. Standard library only.

    python -m l2p_runtime.client.health http://127.0.0.1:8000

A server says that it is ready even if the process behind a model is dead, so its own answer is not enough. Every model
checks its bundle's files and then draws one step at the minimum size.
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from l2p_runtime.errors import HostError, L2PError, UsageError

PREFIX = "l2p"
NETWORKS_PREFIX = "l2p_network_"
TIMEOUT_S = 30.0
_BODY_BYTES_MAX = 16 << 20


@dataclass(frozen=True, slots=True)
class ModelHealth:
    """Whether one model can draw.

    Attributes:
        reason: why it cannot; empty when it can.
        bundle: digest of the bundle that it drew with; empty when it did not.
        seconds: time that the image took.
    """

    model: str
    healthy: bool
    reason: str = ""
    bundle: str = ""
    seconds: float = 0.0


def check_health(url: str, *, timeout_s: float = TIMEOUT_S, models: Sequence[str] = ()) -> list[ModelHealth]:
    """Ask every model of ours that a server knows.

    Args:
        url: `http://host:8000`.
        timeout_s: of each call; an image that is being drawn is waited for.
        models: only these; all when empty.

    Raises:
        UsageError: the URL is not `http://`.
        HostError: no server answers, or it has no model of ours.
    """
    if not url.startswith("http://"):
        raise UsageError(f"{url[:80]!r} is no HTTP address", hint="use http://host:8000")
    url = url.rstrip("/")
    entries = _index(url, timeout_s)
    names = list(dict.fromkeys(entry["name"] for entry in entries))
    wanted = [name for name in names if name == PREFIX or name.startswith(f"{PREFIX}_")]
    wanted = [name for name in wanted if not models or name in models] + [n for n in models if n not in names]
    if not wanted:
        raise HostError(f"the server at {url} has no model that l2p-export wrote", hint="look at its repository")
    return [_model_health(url, name, [e for e in entries if e["name"] == name], timeout_s) for name in wanted]


def main(arguments: Sequence[str]) -> int:
    """Print one line per model; return 0 if all can draw, 3 if one cannot."""
    try:
        found = check_health(arguments[0] if arguments else "http://127.0.0.1:8000", models=arguments[1:])
    except L2PError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    for model in found:
        sys.stdout.write(f"{model.model}: {f'ready in {model.seconds:.2f} s' if model.healthy else model.reason}\n")
    return 0 if all(model.healthy for model in found) else HostError.exit_code


def _model_health(url: str, name: str, entries: Sequence[Mapping[str, Any]], timeout_s: float) -> ModelHealth:
    ready = [entry for entry in entries if entry.get("state") == "READY"]
    if not ready:
        reasons = [str(entry["reason"]) for entry in entries if entry.get("reason")]
        states = [str(entry["state"]) for entry in entries if entry.get("state")]
        # The server adds the lines of Python that it came from.
        reason = (reasons or states or ["it is not loaded"])[-1].partition("\n\nAt:")[0]
        return ModelHealth(name, healthy=False, reason=reason)
    if name.startswith(NETWORKS_PREFIX):
        # One network draws no image, so only the server's own answer is left.
        return ModelHealth(name, healthy=True)
    return _drawn(url, name, timeout_s)


def _drawn(url: str, name: str, timeout_s: float) -> ModelHealth:
    """Have a model that draws images draw one."""
    status, config = _call(f"{url}/v2/models/{name}/config", None, timeout_s)
    if status != 200:
        return ModelHealth(name, healthy=False, reason=str(config.get("error", f"status {status}")))
    streams = bool(config.get("model_transaction_policy", {}).get("decoupled"))
    inputs = [tensor for tensor in config["input"] if not tensor.get("optional")] or config["input"][:1]
    try:
        status, answer = (_ask_stream if streams else _ask)(f"{url}/v2/models/{name}", inputs, timeout_s)
    except HostError as error:
        # One model that never answers does not hide the others.
        return ModelHealth(name, healthy=False, reason=str(error))
    if status != 200:
        return ModelHealth(name, healthy=False, reason=str(answer.get("error", f"status {status}")))
    try:
        report = json.loads(bytes(answer["report"] if streams else answer["outputs"][0]["data"]))
        return ModelHealth(name, healthy=True, bundle=report["bundle"], seconds=report["seconds"]["all"])
    except (LookupError, TypeError, ValueError):
        return ModelHealth(name, healthy=False, reason="it answers without a report: its code is not of l2p-export")


def _ask(model: str, inputs: Sequence[Mapping[str, Any]], timeout_s: float) -> tuple[int, dict[str, Any]]:
    sent = []
    for tensor in inputs:
        shape = [max(int(size), 1) for size in tensor["dims"]]
        kind = tensor["data_type"].removeprefix("TYPE_")
        count = 1
        for size in shape:
            count *= size
        data: list[Any] = [""] * count if kind == "STRING" else [0] * count
        sent.append(
            {"name": tensor["name"], "shape": shape, "datatype": {"STRING": "BYTES"}.get(kind, kind), "data": data}
        )
    body = {"parameters": {"health": True, "priority": 1}, "inputs": sent, "outputs": [{"name": "report"}]}
    return _call(f"{model}/infer", body, timeout_s)


def _ask_stream(model: str, inputs: Sequence[Mapping[str, Any]], timeout_s: float) -> tuple[int, dict[str, Any]]:
    del inputs
    return _call(f"{model}/generate", {"steps": 1, "health": True, "priority": 1}, timeout_s)


def _index(url: str, timeout_s: float) -> list[dict[str, Any]]:
    status, answer = _call(f"{url}/v2/repository/index", {}, timeout_s)
    if status != 200 or not isinstance(answer, list):
        raise HostError(f"the server at {url} does not list its models: status {status}")
    return answer


def _call(url: str, body: object, timeout_s: float) -> tuple[int, Any]:
    """Status and parsed body.

    Raises:
        HostError: no answer.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - http:// alone
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as reply:  # noqa: S310
            status, content = reply.status, reply.read(_BODY_BYTES_MAX)
    except urllib.error.HTTPError as error:
        with error:
            status, content = error.code, error.read(_BODY_BYTES_MAX)
    except OSError as error:
        raise HostError(f"no server answers at {url}: {getattr(error, 'reason', error)}") from error
    try:
        return status, json.loads(content)
    except ValueError:
        return status, {"error": content[:200].decode(errors="replace")}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
