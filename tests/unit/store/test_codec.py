from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from manager.store import Corrupt, Row, codec
from manager.store.tables import BY_CLASS, SCHEMAS
from swarm.v1 import Keyring, Kind, Message, Meta, Service, ServiceSpec, Task, TaskState
from tests.unit.store.strategies import stored

IDS = [s.kind.name for s in SCHEMAS]


@pytest.mark.parametrize("cls", [s.cls for s in SCHEMAS], ids=IDS)
@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_an_object_reads_back_as_it_was_written(cls: type[Message], data: st.DataObject) -> None:
    o: Any = data.draw(stored(cls))
    kind = BY_CLASS[cls].kind
    row = Row(kind, o.id, o.meta.version, codec.encode(o))
    assert codec.decode_row(row, where="here") == (kind, o)
    assert type(codec.decode(kind, row.value)) is cls


def test_the_version_is_the_rows_not_the_bytes() -> None:
    o = Task(id="t", meta=Meta(version=3, created_at_ns=1, updated_at_ns=2))
    read: Any = codec.decode_row(Row(Kind.TASK, "t", 9, codec.encode(o)), where="here")[1]
    assert read.meta == Meta(version=9, created_at_ns=1, updated_at_ns=2)


def test_enums_read_back_as_enums() -> None:
    o = codec.decode(Kind.TASK, codec.encode(Task(id="t", desired_state=TaskState.RUNNING)))
    assert isinstance(o, Task)
    assert o.desired_state is TaskState.RUNNING


def test_a_field_of_a_later_version_is_skipped() -> None:
    value = codec._PREFIX + msgspec.msgpack.encode({"id": "t", "slot": 2, "mood": "bright"})
    assert codec.decode(Kind.TASK, value) == Task(id="t", slot=2)


def _row(value: Any, *, table: int = Kind.TASK) -> Row:
    if not isinstance(value, bytes):
        value = codec._PREFIX + msgspec.msgpack.encode(value)
    return Row(table, "t1", 7, value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        pytest.param(_row(b""), "it is empty", id="empty"),
        pytest.param(_row(b"\x02\x80"), "it has format 2", id="later format"),
        pytest.param(_row(b"\x01"), "truncated", id="no object"),
        pytest.param(_row(codec.encode(Task(id="t1", slot=5))[:-1]), "truncated", id="cut off"),
        pytest.param(_row(b"\x01\xc1"), "malformed", id="no msgpack"),
        pytest.param(_row({"id": "t1", "desired_state": 99}), "99", id="later enum value"),
        pytest.param(_row({"id": "t1", "slot": "two"}), "$.slot", id="wrong type"),
        pytest.param(_row({"id": "t2"}), "'t2'", id="another object's"),
        pytest.param(_row({"id": "t1"}, table=77), "77", id="unknown table"),
    ],
)
def test_a_bad_row_is_named_with_its_place(row: Row, says: str) -> None:
    with pytest.raises(Corrupt) as caught:
        codec.decode_row(row, where="/state/store.db")
    message = caught.value.message
    assert says in message
    assert "'t1'" in message
    assert message.startswith("/state/store.db: row ")
    assert "restore" in message


@given(st.text())
def test_an_owner_reads_back(owner: str) -> None:
    assert codec.decode_owner(codec.encode_owner(owner)) == owner


def test_an_owner_in_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format 3"):
        codec.decode_owner(b"\x03x")


def test_equal_rows_of_one_table_are_equal_objects() -> None:
    one = Service(id="s", spec=ServiceSpec(name="web", labels={"a": "b"}))
    assert codec.encode(one) == codec.encode(replace(one))
    assert codec.encode(one) != codec.encode(replace(one, id="s2"))


class Reversed:
    """Seals by turning round."""

    def seal(self, data: bytes) -> bytes:
        return data[::-1]

    def open(self, sealed: bytes) -> bytes:
        return sealed[::-1]


def test_keyring_lies_sealed_where_there_is_a_seal_and_reads_back():
    keyring = Keyring(id="c", meta=Meta(version=3), unlock_key="SWMKEY-1-secret")
    value = codec.encode(keyring, Reversed())
    assert b"SWMKEY" not in value
    assert codec.decode(Kind.KEYRING, value, Reversed()) == keyring
    row = Row(Kind.KEYRING, "c", 3, value)
    with pytest.raises(Corrupt, match="opened without the key"):
        codec.decode_row(row, where="here")
    clear = codec.encode(keyring)
    assert codec.decode(Kind.KEYRING, clear, Reversed()) == keyring, (
        "as an earlier version wrote it"
    )


def test_other_objects_lie_as_they_are_also_with_a_seal():
    task = Task(id="t", slot=1)
    assert codec.encode(task, Reversed()) == codec.encode(task)
