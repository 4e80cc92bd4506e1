"""The file of a backup: whole or refused, whatever happened to it on the way."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm import backup, backup_seal, errors
from swarm.backup import Corrupt, Header, Keys, Reader, Row, Writer

HEADER = Header(cluster_id="c1", node_id="n1", revision=9, time_ns=5, rows=3, counts={"task": 3})
KEYS = Keys(seal_key=b"k" * 32)
ROWS = [Row(5, f"t{i}", i + 1, bytes([i]) * 40) for i in range(3)]
SECRET = b"correct horse"


def file(header: Header = HEADER, rows: list[Row] = ROWS) -> bytes:
    writer = Writer()
    return b"".join([writer.begin(header, KEYS), *writer.rows(rows), writer.end()])


def load(data: bytes, step: int = 1 << 20) -> tuple[Reader, list[Row]]:
    reader = Reader(name="b.swarm")
    rows: list[Row] = []
    for at in range(0, len(data), step):
        rows += reader.feed(data[at : at + step])
    reader.finish()
    return reader, rows


def sealed(data: bytes, step: int = 1 << 16, secret: bytes = SECRET) -> bytes:
    sealing = backup_seal.Sealing(secret)
    out = [sealing.update(data[at : at + step]) for at in range(0, len(data), step)]
    return b"".join([*out, sealing.finish()])


def opened(data: bytes, step: int = 1 << 16, secret: bytes = SECRET) -> bytes:
    opener = backup_seal.Opener(secret, name="b.swarm")
    out = [opener.update(data[at : at + step]) for at in range(0, len(data), step)]
    return b"".join([*out, opener.finish()])


@pytest.mark.parametrize("step", [1, 7, 64, 1 << 20])
def test_what_was_written_is_read_in_pieces_of_any_size(step: int) -> None:
    reader, rows = load(file(), step)
    assert rows == ROWS
    assert (reader.header, reader.keys, reader.counts) == (HEADER, KEYS, {5: 3})
    assert reader.taken == len(file())


def test_rows_larger_than_a_piece_go_alone() -> None:
    rows = [Row(6, f"s{i}", 1, b"x" * (backup.PIECE_BYTES + 1)) for i in range(3)]
    assert load(file(rows=rows))[1] == rows


@given(st.data())
@settings(max_examples=200)
def test_any_changed_byte_is_noticed(data: st.DataObject) -> None:
    whole = bytearray(file())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    # Bytes 10 and 11 are for later versions, and part of what the SHA-256 covers.
    with pytest.raises(Corrupt):
        load(bytes(whole))


@given(st.integers(0, len(file()) - 1))
def test_any_cut_is_noticed_and_its_place_named(length: int) -> None:
    with pytest.raises(Corrupt) as caught:
        load(file()[:length])
    assert "b.swarm is damaged at byte" in caught.value.message
    assert f"byte {length}" in caught.value.message


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04 a zip file", "is no backup of a cluster: it begins with b'PK"),
        (backup.MAGIC + b"\x00\x02\x00\x00", "has format 2 .* this version reads format 1"),
        (file() + b"H", "more follows after its end"),
        (file(rows=ROWS[:2]), "it holds 2 objects, its header says 3"),
    ],
    ids=["empty", "foreign", "newer", "longer", "fewer"],
)
def test_what_is_no_backup_is_refused_with_the_reason(data: bytes, says: str) -> None:
    with pytest.raises(Corrupt, match=says):
        load(data)


def test_parts_out_of_order_are_refused() -> None:
    one, two = Writer(), Writer()
    twice = one.begin(HEADER, KEYS) + two.begin(HEADER, KEYS)[12:]
    with pytest.raises(Corrupt, match="part 'H' is out of its place"):
        load(twice)


def test_length_beyond_any_part_is_not_waited_for() -> None:
    start = Writer().begin(HEADER, KEYS)
    with pytest.raises(Corrupt, match="larger than any may be"):
        load(start + b"R" + (1 << 31).to_bytes(4, "big"))


def test_unknown_facts_of_the_header_are_skipped() -> None:
    later = b'{"cluster_id":"c","node_id":"n","revision":1,"time_ns":1,"colour":"red"}'
    assert msgspec.json.decode(later, type=Header).cluster_id == "c"


def test_keys_do_not_show_in_a_representation() -> None:
    assert "kkk" not in repr(KEYS)


# ------------------------------------------------------------------ sealed


@pytest.mark.parametrize(
    "size", [0, 1, backup_seal.PIECE_BYTES, backup_seal.PIECE_BYTES + 1, 200_000]
)
@pytest.mark.parametrize("step", [1_000, 1 << 20])
def test_sealed_opens_to_what_it_was(size: int, step: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    closed = sealed(data, step)
    assert opened(closed, step) == data
    assert backup_seal.is_sealed(closed) and not backup_seal.is_sealed(file())
    if size > 100:
        assert data[:100] not in closed


def test_wrong_passphrase_is_told_from_damage() -> None:
    with pytest.raises(errors.Denied, match="cannot be opened with this passphrase"):
        opened(sealed(file()), secret=b"another horse")


CLOSED = sealed(bytes(150_000))


@given(st.integers(48, len(CLOSED) - 1), st.integers(1, 255))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_changed_byte_of_a_sealed_one_is_noticed(at: int, flip: int) -> None:
    changed = bytearray(CLOSED)
    changed[at] ^= flip
    piece = backup_seal.PIECE_BYTES + 16
    with pytest.raises(Corrupt, match=f"damaged at byte {48 + (at - 48) // piece * piece}:"):
        opened(bytes(changed))


@pytest.mark.parametrize("length", [0, 20, 48, 60, 48 + 65_552, len(CLOSED) - 1])
def test_cut_of_a_sealed_one_is_noticed(length: int) -> None:
    with pytest.raises(Corrupt, match="cut off"):
        opened(CLOSED[:length])


def test_pieces_of_a_sealed_one_cannot_change_places() -> None:
    piece = backup_seal.PIECE_BYTES + 16
    head, one, two, rest = (
        CLOSED[:48],
        CLOSED[48 : 48 + piece],
        CLOSED[48 + piece : 48 + 2 * piece],
        CLOSED[48 + 2 * piece :],
    )
    with pytest.raises(Corrupt):
        opened(head + two + one + rest)


def test_sealed_ones_of_the_same_differ() -> None:
    assert sealed(b"same") != sealed(b"same")


def test_short_passphrase_and_costly_file_are_refused() -> None:
    with pytest.raises(errors.Invalid, match="7 bytes"):
        backup_seal.Sealing(b"seven..")
    changed = bytearray(CLOSED)
    changed[10] = 40  # 1 TiB
    with pytest.raises(Corrupt, match="its cost"):
        opened(bytes(changed))
