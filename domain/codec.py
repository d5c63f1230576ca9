"""Plain JSON for the frozen types of this folder, and back.

One pair of functions serves every dataclass here, so that the database, the HTTP answers, the snapshot files and
`--json` all show the same document for the same object. A type that wants its own form implements
`to_json()` and `from_json(data)`.
"""

import dataclasses
import enum
import functools
import hashlib
import itertools
import json
import types
import typing
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

T = TypeVar("T")
Json = Any  # what json.loads returns


def to_json(value: object) -> Json:
    """Return `value` as what `json.dumps` takes: dict, list, str, int, float, bool, None."""
    own = getattr(value, "to_json", None)
    if own is not None:
        return own()
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            name.rstrip("_"): to_json(_as_floats(getattr(value, name)) if holds_floats else getattr(value, name))
            for name, _, holds_floats in _field_types(type(value))
        }
    if isinstance(value, tuple | list):
        return [to_json(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"cannot write a {type(value).__name__} as JSON: {value!r}")


def from_json(kind: type[T], data: Json) -> T:
    """Build a `kind` from what `to_json` made of one.

    Fields that the document lacks take their default; fields that the type does not know are ignored, so that an
    older reader survives a newer writer. Raises ValueError naming the field where a value does not fit.
    """
    try:
        return typing.cast(T, _reader(typing.cast(Any, kind))(data))
    except _MisfitError as misfit:
        raise ValueError(f"{kind.__name__}{''.join(reversed(misfit.where))}: {misfit}") from misfit


def canonical(value: object) -> bytes:
    """Return the canonical JSON of `value`: sorted keys, no white space, UTF-8. Equal values give equal bytes."""
    # default= and not to_json(value): a document that is JSON already (a snapshot to verify) is written 6 times faster
    return json.dumps(
        value, default=to_json, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def digest(value: object) -> str:
    """Return the SHA-256 of the canonical JSON of `value` as 64 hexadecimal digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


@functools.cache
def _field_types(kind: type) -> tuple[tuple[str, Any, bool], ...]:
    """Return name, type, and whether it is a float or a tuple of floats, of each field of a dataclass."""
    hints = typing.get_type_hints(kind)
    floats = (float, float | None, tuple[float, float], tuple[float, float] | None)
    return tuple((field.name, hints[field.name], hints[field.name] in floats) for field in dataclasses.fields(kind))


def _as_floats(value: Any) -> Any:
    """Write 10 in a float field as 10.0, as it will be read back: equal values give equal bytes."""
    if isinstance(value, tuple):
        return tuple(float(item) for item in value)
    return None if value is None else float(value)


class _MisfitError(Exception):
    """A value that does not fit; `where` grows from the value to the document while it is on its way up."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.where: list[str] = []


Reader = Callable[[Json], Any]


@functools.cache
def _reader(kind: Any) -> Reader:
    """Return what reads a `kind`; made once a type, because looking at hints takes ten times as long as reading."""
    if kind is Any:
        return lambda data: data
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _union_reader(typing.get_args(kind))
    if origin is tuple:
        return _tuple_reader(typing.get_args(kind))
    if isinstance(kind, type):
        if hasattr(kind, "from_json"):
            return _named(kind.from_json)
        if dataclasses.is_dataclass(kind):
            return _dataclass_reader(kind)
        if issubclass(kind, enum.Enum):
            return _named(kind)
        return _scalar_reader(kind)
    raise TypeError(f"the codec does not know the type {kind!r}")


def _named(read: Reader) -> Reader:
    def reading(data: Json) -> Any:
        try:
            return read(data)
        except ValueError as error:
            raise _MisfitError(str(error)) from error

    return reading


def _scalar_reader(kind: type) -> Reader:
    moment = _named(datetime.fromisoformat)

    def reading(data: Json) -> Any:
        if type(data) is kind:
            return data
        if kind is datetime and isinstance(data, str):
            return moment(data)
        if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
            return float(data)
        if isinstance(data, kind) and not (kind is int and isinstance(data, bool)):
            return data
        raise _MisfitError(f"expected {kind.__name__}, got {data!r}")

    return reading


def _union_reader(members: tuple[Any, ...]) -> Reader:
    options = [member for member in members if member is not types.NoneType]
    optional = len(options) < len(members)
    # bool before int, int before float: the order in which JSON values are narrow
    narrow = (bool, int, float)
    options.sort(key=lambda kind: narrow.index(kind) if kind in narrow else len(narrow))
    readers = [(option if option in (*narrow, str) else None, _reader(option)) for option in options]

    def reading(data: Json) -> Any:
        if data is None and optional:
            return None
        for scalar, read in readers:
            if scalar is None or type(data) is scalar or len(readers) == 1:
                return read(data)
        raise _MisfitError(f"{data!r} fits none of {', '.join(str(option) for option in options)}")

    return reading


def _tuple_reader(members: tuple[Any, ...]) -> Reader:
    endless = len(members) == 2 and members[1] is Ellipsis
    readers = [_reader(member) for member in members[: 1 if endless else None]]

    def reading(data: Json) -> Any:
        if not isinstance(data, list | tuple):
            raise _MisfitError(f"expected a list, got {data!r}")
        if not endless and len(readers) != len(data):
            raise _MisfitError(f"expected {len(readers)} items, got {len(data)}")
        found = []
        for index, (read, item) in enumerate(zip(itertools.cycle(readers), data)):
            try:
                found.append(read(item))
            except _MisfitError as misfit:
                misfit.where.append(f"[{index}]")
                raise
        return tuple(found)

    return reading


def _dataclass_reader(kind: type) -> Reader:
    fields = [(name, name.rstrip("_"), _reader(hint)) for name, hint, _ in _field_types(kind)]

    def reading(data: Json) -> Any:
        if not isinstance(data, Mapping):
            raise _MisfitError(f"expected an object, got {data!r}")
        values = {}
        for name, key, read in fields:
            if key in data:
                try:
                    values[name] = read(data[key])
                except _MisfitError as misfit:
                    misfit.where.append(f".{key}")
                    raise
        try:
            return kind(**values)
        except TypeError as error:
            raise _MisfitError(str(error)) from error

    return reading
