"""Envoy's JSON as typed messages.

Two texts of one configuration may differ: names of fields in snake case or camel case, durations as ``1s`` or
``1.000s``. As messages they are equal. A gateway has filters of which this project has no classes. They stay readable
by type and name, so that they do not make the listener around them unreadable.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from betterproto2 import Message
from envoy_data_plane.google.protobuf import Any as PackedMessage
from envoy_data_plane.google.protobuf import Struct
from envoy_data_plane.message_pool import default_message_pool

M = TypeVar("M", bound=Message)

_TYPE: Final = "@type"
_OPAQUE: Final = default_message_pool.type_to_url[Struct]
"""Type in place of one without a class. The value has the original type."""


class UnreadableError(Exception):
    """A document is no configuration of Envoy, or a part of it is malformed. The text has the reason."""


def read_message(kind: type[M], data: Any) -> M:
    """Read one message. Fields of later versions are ignored.

    Raises:
        UnreadableError: The data does not fit the class.
    """
    given = {key: value for key, value in _mapping(data).items() if key != _TYPE}
    for is_readable in (_has_class, _fits_its_class):  # The second one is slow, and seldom needed.
        fields = {key: _readable(value, is_readable) for key, value in given.items()}
        try:
            with _deprecated_fields_allowed():
                return kind.from_dict(fields, ignore_unknown_fields=True)
        except Exception as error:  # noqa: BLE001 - the library raises many kinds for malformed data
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise UnreadableError(f"is no {kind.__name__} of Envoy: {reason}")


def unpack(packed: PackedMessage | None) -> Message | None:
    """Return the message inside ``typed_config``; None if its type has no class here, or a number exceeds its field."""
    try:
        with _deprecated_fields_allowed():
            inner = None if packed is None else packed.unpack()
    except Exception:  # noqa: BLE001 - the library raises many kinds for malformed data
        return None
    return None if isinstance(inner, Struct) else inner


def type_name(packed: PackedMessage | None) -> str:
    """Return the name of the type inside ``typed_config`` without its package, such as ``Router``."""
    if packed is None:
        return ""
    url = packed.type_url
    if url == _OPAQUE and isinstance(inner := packed.unpack(), Struct):
        url = str(inner.to_dict().get(_TYPE, ""))
    return url.rpartition(".")[2]


@contextmanager
def _deprecated_fields_allowed() -> Iterator[None]:
    """Let another team use fields that Envoy calls deprecated. The library warns of each."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def mentions(data: Any, texts: Iterable[str]) -> bool:
    """Return whether one of *texts* is a value anywhere in *data*. This is much faster than reading it as a message."""
    wanted = frozenset(texts)
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, str) and value in wanted:
            return True
    return False


def _mapping(data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise UnreadableError(f"is no mapping of fields, but {type(data).__name__}")
    return data


def _readable(data: Any, is_readable: Callable[[dict[str, Any]], bool]) -> Any:
    """Replace every typed value that cannot be read by one of a type that can."""
    if isinstance(data, list):
        return [_readable(item, is_readable) for item in data]
    if not isinstance(data, Mapping):
        return data
    fields = {key: _readable(value, is_readable) for key, value in data.items()}
    return fields if _TYPE not in fields or is_readable(fields) else {_TYPE: _OPAQUE, "value": dict(data)}


def _has_class(fields: dict[str, Any]) -> bool:
    return isinstance(url := fields[_TYPE], str) and url in default_message_pool.url_to_type


def _fits_its_class(fields: dict[str, Any]) -> bool:
    try:
        with _deprecated_fields_allowed():
            PackedMessage.from_dict(fields, ignore_unknown_fields=True)
    except Exception:  # noqa: BLE001 - the library raises many kinds for malformed data
        return False
    return True
