"""Quantizes the float32 ONNX graphs of a work folder to FP8 with nvidia-modelopt; `calls.py` says how to run it.

    PYTHONPATH=export:runtime:calib:engines PYTHON benchmarks/peers/modelopt_peer.py FOLDER

It calibrates on the same calls as our statistics and writes FOLDER/modelopt/SETTING/NETWORK.onnx for `compare.py`. Only
inputs, method and paths are set; all other options are modelopt's defaults.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from calls import CALIBRATION, GRAPHS, MODELOPT, Call, read_calls
from modelopt.onnx.quantization import quantize
from onnxruntime.quantization import CalibrationDataReader

from l2p_export.proof.cases import network_inputs
from l2p_runtime.contract import NETWORKS

SETTINGS = {"entropy": "its default", "max": "the largest value"}
"""Calibration methods for scales of inputs."""


class Calls(CalibrationDataReader):
    """Reads calls one by one; modelopt's reader splits inputs along a batch axis, which rotary tables do not have."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.rewind()

    def get_next(self) -> Call | None:
        """The next call; None at the end."""
        return next(self.left, None)

    def get_first(self) -> Call:
        """The first call, without advancing."""
        return self.calls[0]

    def rewind(self) -> None:
        """Start again at the first call."""
        self.left = iter(self.calls)


def main() -> None:
    """Quantize every network in every setting."""
    folder = Path(sys.argv[1])
    calls = read_calls(folder / CALIBRATION).values()
    for setting in SETTINGS:
        out = folder / MODELOPT / setting
        out.mkdir(parents=True, exist_ok=True)
        for network in NETWORKS:
            quantize(
                str(folder / GRAPHS / f"{network}.onnx"),
                quantize_mode="fp8",
                calibration_data_reader=Calls([network_inputs(network, call, call) for call in calls]),
                calibration_method=setting,
                calibration_eps=["cpu"],
                output_path=str(out / f"{network}.onnx"),
                log_level="WARNING",
            )
    print(f"modelopt {version('nvidia-modelopt')}, onnxruntime {version('onnxruntime')}, onnx {version('onnx')}")


if __name__ == "__main__":
    main()
