"""The node's key at rest: what opens it, and what a crash leaves of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import errors
from swarm.vault import Vault, new_unlock_key

PURPOSE = b"test"
A, B, C = (new_unlock_key() for _ in "abc")


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    vault = Vault(tmp_path / "node.key")
    vault.make()
    return vault


def read(vault: Vault) -> Vault:
    """As after a restart."""
    return Vault(vault.path)


def test_key_is_made_once_and_private(vault: Vault) -> None:
    sealed = vault.seal(b"data", purpose=PURPOSE)
    vault.make()
    again = read(vault)
    again.make()
    assert again.open(sealed, purpose=PURPOSE) == b"data"
    assert vault.path.stat().st_mode & 0o777 == 0o600


def test_no_file_is_neither_there_nor_locked(tmp_path: Path) -> None:
    vault = Vault(tmp_path / "node.key")
    assert (vault.exists, vault.locked) == (False, False)


def test_locked_vault_opens_with_each_of_its_keys_and_no_other(vault: Vault) -> None:
    sealed = vault.seal(b"data", purpose=PURPOSE)
    assert vault.lock_with((A, B))
    assert vault.open(sealed, purpose=PURPOSE) == b"data", "this process goes on"
    for key in (A, f" {B}\n"):
        again = read(vault)
        assert again.locked
        with pytest.raises(errors.Denied, match="invalid key provided"):
            again.unlock(C)
        assert again.locked
        again.unlock(key)
        assert not again.locked
        assert again.open(sealed, purpose=PURPOSE) == b"data"


@pytest.mark.parametrize(
    "text",
    ["", "SWMKEY-1-", A[:-1], A + "A", A.lower() + "!", "SWMKEY-1-" + "=" * 43],
    ids=["empty", "bare", "short", "long", "foreign", "padding"],  # A is drawn by lot
)
def test_what_is_no_unlock_key_is_refused(vault: Vault, text: str) -> None:
    vault.lock_with((A,))
    with pytest.raises(errors.Denied, match="invalid key provided"):
        read(vault).unlock(text)


def test_locking_as_it_is_already_writes_nothing(vault: Vault) -> None:
    assert not vault.lock_with(())
    assert vault.lock_with((A, B))
    before = vault.path.read_bytes()
    assert not vault.lock_with((B, A, A))
    again = read(vault)
    again.unlock(A)
    assert not again.lock_with((A, B))
    assert vault.path.read_bytes() == before


def test_dropped_key_opens_no_more_and_unlocked_vault_lies_open(vault: Vault) -> None:
    vault.lock_with((A, B))
    vault.lock_with((B,))
    with pytest.raises(errors.Denied):
        read(vault).unlock(A)
    vault.lock_with(())
    assert not read(vault).locked


def test_locked_file_holds_neither_the_key_nor_what_unlocks_it(vault: Vault) -> None:
    clear = vault.path.read_text()
    key = clear.split('"key": "')[1].split('"')[0]
    vault.lock_with((A,))
    text = vault.path.read_text()
    assert key not in text
    assert A.removeprefix("SWMKEY-1-") not in text


@given(st.binary(max_size=300), st.data())
def test_any_changed_byte_and_any_other_purpose_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, draw: st.DataObject
) -> None:
    vault = Vault(tmp_path_factory.getbasetemp() / "node.key")
    vault.make()
    sealed = bytearray(vault.seal(data, purpose=PURPOSE))
    assert vault.open(bytes(sealed), purpose=PURPOSE) == data
    with pytest.raises(errors.Invalid):
        vault.open(bytes(sealed), purpose=b"other")
    sealed[draw.draw(st.integers(0, len(sealed) - 1))] ^= draw.draw(st.integers(1, 255))
    with pytest.raises(errors.Invalid, match="damaged, or was sealed with another key"):
        vault.open(bytes(sealed), purpose=PURPOSE)


def test_crash_while_writing_leaves_the_file_as_it_was(vault: Vault, tmp_path: Path) -> None:
    vault.lock_with((A,))
    whole = vault.path.read_bytes()
    vault.lock_with((B,))
    newer = vault.path.read_bytes()
    vault.path.write_bytes(whole)
    for cut in range(0, len(newer), 17):  # what was written of the temporary file
        vault.path.with_name("node.key.new").write_bytes(newer[:cut])
        again = read(vault)
        again.unlock(A)
        assert again.lock_with((B,))
        read(vault).unlock(B)
        vault.path.write_bytes(whole)


def test_disk_that_refuses_leaves_all_as_it_was(vault: Vault) -> None:
    sealed = vault.seal(b"data", purpose=PURPOSE)
    folder = vault.path.parent
    kept = vault.path.read_bytes()
    shutil.rmtree(folder)
    with pytest.raises(OSError, match="node.key"):
        vault.lock_with((A,))
    folder.mkdir()
    vault.path.write_bytes(kept)
    assert vault.open(sealed, purpose=PURPOSE) == b"data"
    assert vault.lock_with((A,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ("{}", "is damaged"),
        ('{"format": 2}', "has format 2, this version reads 1"),
        ('{"format": 1}', "holds no whole key"),
        ('{"format": 1, "key": "c2hvcnQ="}', "holds no whole key"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "node.key"
    path.write_text(text)
    with pytest.raises(errors.Invalid, match=message):
        Vault(path)
