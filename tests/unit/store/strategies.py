"""Any object of the contract, for property tests."""

from __future__ import annotations

import enum
import functools
from typing import Any

import msgspec
from hypothesis import strategies as st
from msgspec import inspect

from swarm.v1 import Message, Meta

INT64_MAX = 2**63 - 1


@functools.cache
def objects(cls: type[Message]) -> st.SearchStrategy[Any]:
    """Instances with any values in any subset of their fields."""
    info = inspect.type_info(cls)
    assert isinstance(info, inspect.StructType)
    # The empty value keeps objects small: most fields of a real one are left out.
    fields = {f.name: st.just(_default(f)) | _values(f.type) for f in info.fields}
    return st.builds(cls, **fields)


def stored(cls: type[Message]) -> st.SearchStrategy[Any]:
    """As a table holds it: with an id and a version."""
    return st.builds(
        lambda o, id_, version: msgspec.structs.replace(o, id=id_, meta=Meta(version=version)),
        objects(cls),
        st.text(min_size=1, max_size=25),
        st.integers(1, INT64_MAX),
    )


def _default(field: inspect.Field) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default


def _values(type_: inspect.Type) -> st.SearchStrategy[Any]:
    match type_:
        case inspect.StrType():
            return st.text(max_size=8)
        case inspect.BytesType():
            return st.binary(max_size=8)
        case inspect.BoolType():
            return st.booleans()
        case inspect.IntType():
            return st.integers(-(2**63), INT64_MAX)
        case inspect.FloatType():
            return st.floats(allow_nan=False)
        case inspect.NoneType():
            return st.none()
        case inspect.EnumType(cls=cls) if issubclass(cls, enum.IntEnum):
            return st.sampled_from(cls)
        case inspect.VarTupleType(item_type=item):
            return st.lists(_values(item), max_size=2).map(tuple)
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(_values(key), _values(value), max_size=2)
        case inspect.UnionType(types=types):
            return st.one_of(*(_values(t) for t in types))
        case inspect.StructType(cls=cls):
            return st.deferred(lambda: objects(cls))
        case _:
            raise AssertionError(f"the contract has a type that the store's tests do not: {type_}")
