"""Where a manager's state lies."""

from pathlib import Path

import pytest
from msgspec import structs

from manager import place as places
from manager.place import Place
from swarm import errors
from swarm.v1 import EtcdAccess
from swarm.vault import Vault

ACCESS = EtcdAccess(
    endpoints=("a:2379", "b:2379"),
    prefix="/x",
    ca_pem="root",
    certificate_pem="certificate",
    key_pem="very secret",
)


@pytest.fixture
def vault(tmp_path: Path) -> Vault:
    made = Vault(tmp_path / "node.key")
    made.make()
    return made


def test_a_folder_without_the_file_says_nothing(tmp_path: Path) -> None:
    assert places.load(tmp_path) is None


def test_what_is_saved_is_loaded(tmp_path: Path, vault: Vault) -> None:
    place = Place(format=1, engine="etcd", voter=True).reached_by(ACCESS, vault)
    places.save(tmp_path, place)
    assert places.load(tmp_path) == place
    assert place.access(vault) == ACCESS
    assert place.external and not place.own_member


def test_the_client_key_lies_sealed(tmp_path: Path, vault: Vault) -> None:
    places.save(tmp_path, Place(format=1).reached_by(ACCESS, vault))
    assert "very secret" not in (tmp_path / places.FILE).read_text()


def test_an_etcd_without_tls_needs_no_key(vault: Vault) -> None:
    access = structs.replace(ACCESS, key_pem="", certificate_pem="", ca_pem="")
    assert Place(format=1).reached_by(access, vault).access(vault) == access


@pytest.mark.parametrize(
    ("place", "own"),
    [
        (Place(format=1), False),
        (Place(format=1, to="etcd"), True),
        (Place(format=1, engine="etcd"), True),
        (Place(format=1, engine="etcd", endpoints=("a:1",)), False),
    ],
)
def test_a_member_runs_here_unless_the_etcd_is_anothers(place: Place, own: bool) -> None:
    assert place.own_member is own


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1, "engine": "oracle"}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / places.FILE).write_text(text)
    with pytest.raises(errors.Invalid, match=r"place\.json is damaged.*leave --force"):
        places.load(tmp_path)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / places.FILE).write_text('{"format": 2}')
    with pytest.raises(errors.Invalid, match="format 2.*newer"):
        places.load(tmp_path)
