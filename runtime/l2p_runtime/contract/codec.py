"""Strict JSON for the frozen specs: a file may hold exactly the fields that a dataclass declares.

Unknown keys, missing keys and wrong types are errors that name the place, as in `graphs[2].weights`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from l2p_runtime.errors import ArtifactError, L2PError

Spec = TypeVar("Spec")


def to_json(spec: object) -> Any:
    """Turn a spec into dictionaries, lists and scalars, in declaration order."""
    if dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        return {field.name: to_json(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
    if isinstance(spec, Mapping):
        return {key: to_json(value) for key, value in spec.items()}
    if isinstance(spec, (list, tuple)):
        return [to_json(value) for value in spec]
    return spec


def from_json(kind: type[Spec], data: object, where: str = "") -> Spec:
    """Build `kind` from parsed JSON.

    Raises:
        ArtifactError: a key is unknown or missing, or a value has the wrong type; the message names the place.
    """
    value = _decode(kind, data, where)
    return typing.cast("Spec", value)


def _decode(kind: Any, data: object, where: str) -> object:
    if dataclasses.is_dataclass(kind):
        return _decode_spec(typing.cast("type", kind), data, where)
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(kind, data, where)
    if origin is tuple:
        return _decode_tuple(typing.get_args(kind), data, where)
    if origin is typing.Literal:
        if data in typing.get_args(kind):
            return data
        raise _mismatch(f"one of {', '.join(map(repr, typing.get_args(kind)))}", data, where)
    if kind is float:
        return _decode_float(data, where)
    if isinstance(data, kind) and not (kind is int and isinstance(data, bool)):
        if isinstance(data, str) and not _is_unicode(data):
            raise _mismatch("text without lone surrogates", data, where)
        return data
    raise _mismatch(kind.__name__, data, where)


def _decode_float(data: object, where: str) -> float:
    if not isinstance(data, (int, float)) or isinstance(data, bool):
        raise _mismatch("float", data, where)
    try:
        value = float(data)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise _mismatch("a finite number", data, where)
    return value


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decode_spec(kind: type, data: object, where: str) -> object:
    if not isinstance(data, Mapping):
        raise _mismatch("an object", data, where)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(str(key) for key in data.keys() - fields.keys())
    if unknown:
        listed = ", ".join(unknown[:8])[:200]
        raise ArtifactError(f"{where or 'the top level'} has unknown keys {listed}", hint=_known(fields))
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - data.keys())
    if missing:
        raise ArtifactError(f"{where or 'the top level'} lacks {', '.join(missing)}", hint=_known(fields))
    hints = typing.get_type_hints(kind)
    dot = f"{where}." if where else ""
    values = {name: _decode(hints[name], value, dot + name) for name, value in data.items()}
    try:
        return kind(**values)
    except L2PError as error:
        raise type(error)(f"{where}: {error}" if where else str(error), hint=error.hint) from error


def _decode_union(kind: object, data: object, where: str) -> object:
    options = typing.get_args(kind)
    if data is None and types.NoneType in options:
        return None
    errors = []
    for option in options:
        if option is types.NoneType:
            continue
        try:
            return _decode(option, data, where)
        except ArtifactError as error:
            errors.append(error)
    raise errors[0]


def _decode_tuple(arguments: tuple[Any, ...], data: object, where: str) -> tuple[object, ...]:
    if not isinstance(data, Sequence) or isinstance(data, (str, bytes)):
        raise _mismatch("a list", data, where)
    if len(arguments) == 2 and arguments[1] is ...:
        return tuple(_decode(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(data))
    if len(data) != len(arguments):
        raise _mismatch(f"a list of {len(arguments)}", data, where)
    return tuple(
        _decode(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(arguments, data, strict=True))
    )


def _mismatch(wanted: str, data: object, where: str) -> ArtifactError:
    found = repr(data) if isinstance(data, (str, int, float, bool, type(None))) else type(data).__name__
    return ArtifactError(f"{where or 'the top level'} is {found[:80]}, expected {wanted}")


def _known(fields: Mapping[str, object]) -> str:
    return f"the keys are {', '.join(fields)}"
