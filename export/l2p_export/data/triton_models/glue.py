"""Shared code of both models: tensors to values and back, errors, counters. Copied beside each `model.py`."""

import functools
import json
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

from l2p_runtime import HostError, L2PError
from l2p_runtime.serving import INPUTS, Service, ServiceSpec, png_base64

ARRAYS = ("prompt_embeds", "negative_embeds", "positions", "base_grid")
PROBE = "health"
PNG = "png"


class Host:
    """One service, its counters, and how a request is answered."""

    def __init__(self, args: dict) -> None:
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        folder = Path(args["model_repository"]) / args["model_version"]
        device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0
        if reads_wrong() and any(tensor["name"] == "prompt" for tensor in config["input"]):
            raise pb_utils.TritonModelException(
                f"this server's Python backend cannot read texts with NumPy {np.__version__}: give it one with "
                "numpy<2, use a newer server, or serve only l2p_embeddings"
            )
        try:
            self.service = Service.open(ServiceSpec.from_parameters(parameters), folder, device)
        except L2PError as error:
            raise pb_utils.TritonModelException(f"{error}. {error.hint}") from error
        self.counters = Counters(config["name"])

    def answer(self, request, shown=None):
        """The response to a request; it never raises."""
        started = time.perf_counter()
        try:
            check_answerable(request)
            if asks_for(request, PROBE):
                drawn, stage = self.service.probe(), "probe"
            else:
                drawn, stage = self.service.draw(values(request), cancelled=request.is_cancelled, shown=shown), "draw"
        except Exception as error:  # noqa: BLE001 - an exception here fails the whole batch and tells of our paths
            code, text = self.service.describe(error)
            if code in ("INTERNAL", "UNAVAILABLE"):
                pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
            self.counters.request({"INVALID_ARG": "refused", "CANCELLED": "cancelled"}.get(code, "failed"))
            return pb_utils.InferenceResponse([], pb_utils.TritonError(text, getattr(pb_utils.TritonError, code)))
        image = as_png("image", drawn.pixels, drawn.text) if asks_for(request, PNG) else {"image": drawn.pixels}
        report = json.dumps(
            {**drawn.report, "seconds": {**drawn.report["seconds"], "all": time.perf_counter() - started}}
        )
        self.counters.request("probed" if stage == "probe" else "drawn")
        if stage == "draw":
            self.counters.image(drawn)
        outputs = {**image, "report": np.frombuffer(report.encode(), np.uint8).copy()}
        wanted = {"report"} if stage == "probe" else set(request.requested_output_names())
        return response({name: value for name, value in outputs.items() if name in wanted})


class Counters:
    """What `/metrics` shows beside the server's own."""

    def __init__(self, model: str) -> None:
        self._model, self._known = model, {}
        counter = pb_utils.MetricFamily.COUNTER
        self._families = {
            name: pb_utils.MetricFamily(name=name, description=text, kind=counter)
            for name, text in (
                ("l2p_requests_total", "Requests by result: drawn, probed, refused, cancelled, failed"),
                ("l2p_megapixels_total", "Megapixels drawn"),
                ("l2p_stage_seconds_total", "Seconds spent by stage: text, draw"),
            )
        }

    def request(self, result: str) -> None:
        """Count a request by its result."""
        self._add("l2p_requests_total", 1.0, result=result)

    def image(self, drawn) -> None:
        """Count what an image took."""
        self._add("l2p_megapixels_total", drawn.report["width"] * drawn.report["height"] / 1e6)
        for stage, seconds in drawn.report["seconds"].items():
            self._add("l2p_stage_seconds_total", seconds, stage=stage)

    def _add(self, family: str, amount: float, **labels: str) -> None:
        key = (family, *labels.values())
        if key not in self._known:
            self._known[key] = self._families[family].Metric(labels={"model": self._model, **labels})
        self._known[key].increment(amount)


def values(request) -> dict:
    """The inputs that a request has; those of one element as that element."""
    found = {}
    for name in INPUTS:
        tensor = pb_utils.get_input_tensor_by_name(request, name)
        if tensor is not None:
            array = np.from_dlpack(tensor).copy() if reads_wrong() else tensor.as_numpy()
            found[name] = array if name in ARRAYS else array.reshape(-1)[0]
    return found


def asks_for(request, parameter: str) -> bool:
    """Whether a request has a parameter that is true."""
    return bool(json.loads(request.parameters() or "{}").get(parameter))


def check_answerable(request) -> None:
    """Refuse what this server's Python backend cannot send."""
    if asks_for(request, PNG) and reads_wrong():
        raise HostError(f"this server's Python backend cannot send texts with NumPy {np.__version__}")


def as_png(name: str, pixels: np.ndarray, text: dict) -> dict:
    """An output that carries pixels [H,W,3] as a PNG file in base64."""
    return {f"{name}_png": np.array([png_base64(pixels, text)], np.object_)}


def response(outputs: dict):
    """A response of named arrays."""
    make = pb_utils.Tensor.from_dlpack if reads_wrong() else pb_utils.Tensor
    return pb_utils.InferenceResponse([make(name, value) for name, value in outputs.items()])


@functools.cache
def reads_wrong() -> bool:
    """Whether this server's stub takes arrays of NumPy 2 for something else, as those up to 24.10 do.

    They read garbage, write nothing and die of texts. Numbers pass through DLPack, which NumPy 1 makes them crash with.
    """
    if np.__version__.startswith("1."):
        return False
    known = np.arange(6, dtype=np.int32).reshape(2, 3)
    return not np.array_equal(pb_utils.Tensor.from_dlpack("known", known).as_numpy(), known)
