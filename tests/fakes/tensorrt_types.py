"""What both halves of the fake TensorRT share: severities and the logger that hears them, and dtypes."""

from __future__ import annotations

import enum
from typing import Any


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    INT64 = 8


class Listener:
    """To be subclassed; a subclass that does not call `__init__` makes the real libraries crash."""

    def __init__(self) -> None:
        self.ready = True


class ILogger(Listener):
    Severity: Any = Severity

    def log(self, severity: Any, msg: str) -> None:
        raise NotImplementedError
