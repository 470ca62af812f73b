"""Text of training forecasts, for `l2p-export train transfer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from l2p_export.cli.console import format_bytes

if TYPE_CHECKING:
    from l2p_export.training.transfer.forecast import TrainingForecast


def forecast_lines(forecast: TrainingForecast) -> list[str]:
    """Text of a training forecast, line by line."""
    trained, frozen = forecast.trained_parameters, forecast.frozen_parameters
    host = {what: size for what, size in forecast.host_bytes.items() if size}
    share = "" if forecast.processes == 1 else f" of each of {forecast.processes} processes"

    def listed(parts: Mapping[str, int]) -> str:
        return ", ".join(f"{what} {format_bytes(size)}" for what, size in parts.items())

    return [
        f"trained parameters {trained:,}, frozen {frozen:,}",
        f"{forecast.device}{share}: {format_bytes(forecast.device_total)}: {listed(forecast.device_bytes)}",
        f"host memory, total: {format_bytes(forecast.host_total)}" + (f": {listed(host)}" if host else ""),
        f"activations: {forecast.basis}",
    ]
