from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manager.ca import Sealer, load_or_make_key
from swarm import errors

SEALER = Sealer(b"k" * 32)


@given(st.binary(max_size=2000))
def test_what_was_sealed_opens_to_the_same(data):
    sealed = SEALER.seal(data)
    assert SEALER.open(sealed) == data
    assert len(data) < 4 or data not in sealed


@given(st.binary(min_size=1, max_size=100), st.data())
def test_any_changed_byte_is_noticed(data, draw):
    sealed = bytearray(SEALER.seal(data))
    position = draw.draw(st.integers(0, len(sealed) - 1))
    sealed[position] ^= draw.draw(st.integers(1, 255))
    with pytest.raises(errors.Internal):
        SEALER.open(bytes(sealed))


def test_another_key_does_not_open_it():
    with pytest.raises(errors.Internal, match=r"seal\.key"):
        Sealer(b"x" * 32).open(SEALER.seal(b"secret"))


@pytest.mark.parametrize("sealed", [b"", b"\x01", b"\x02abc", b"\x01" + b"0" * 11])
def test_truncated_data_is_refused(sealed):
    with pytest.raises(errors.Internal):
        SEALER.open(sealed)


def test_digests_tell_sameness_and_depend_on_the_key():
    assert SEALER.digest(b"a") == SEALER.digest(b"a") != SEALER.digest(b"b")
    assert Sealer(b"x" * 32).digest(b"a") != SEALER.digest(b"a")


def test_the_key_is_made_once_and_private(tmp_path: Path):
    path = tmp_path / "seal.key"
    key = load_or_make_key(path)
    assert load_or_make_key(path) == key
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_truncated_key_file_is_named(tmp_path: Path):
    path = tmp_path / "seal.key"
    path.write_bytes(b"short")
    with pytest.raises(errors.Invalid, match=r"seal\.key is damaged"):
        load_or_make_key(path)
