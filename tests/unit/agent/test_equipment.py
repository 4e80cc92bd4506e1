"""Secrets and configs as files: targets, owners, modes, and what is refused."""

from __future__ import annotations

import pytest

from agent.equipment import files
from agent.runtime.base import Rejected, TaskFile
from swarm.v1 import (
    ConfigData,
    ConfigReference,
    ContainerSpec,
    Driver,
    FileTarget,
    SecretData,
    SecretReference,
)

SECRETS = {"s": SecretData(id="s", name="key", data=b"1")}
CONFIGS = {"c": ConfigData(id="c", name="conf", data=b"2")}


def secret(target: FileTarget | None) -> ContainerSpec:
    return ContainerSpec(secrets=(SecretReference(secret_id="s", secret_name="key", file=target),))


def config(target: FileTarget | None) -> ContainerSpec:
    return ContainerSpec(configs=(ConfigReference(config_id="c", config_name="conf", file=target),))


@pytest.mark.parametrize(
    ("container", "path"),
    [
        (secret(None), "/run/secrets/key"),
        (secret(FileTarget(name="other")), "/run/secrets/other"),
        (secret(FileTarget(name="sub/other")), "/run/secrets/sub/other"),
        (secret(FileTarget(name="/etc/key")), "/etc/key"),
        (config(None), "/conf"),
        (config(FileTarget(name="etc/app.conf")), "/etc/app.conf"),
        (config(FileTarget(name="/etc/app.conf")), "/etc/app.conf"),
    ],
)
def test_target_is_where_docker_puts_it(container: ContainerSpec, path: str) -> None:
    (file,) = files(container, SECRETS, CONFIGS)
    assert file.target == path
    assert file.secret == bool(container.secrets)


def test_owner_and_mode_are_taken_over_and_have_dockers_defaults() -> None:
    (plain,) = files(secret(FileTarget(name="key")), SECRETS, CONFIGS)
    assert plain == TaskFile("/run/secrets/key", b"1", 0, 0, 0o444, secret=True)
    (owned,) = files(
        secret(FileTarget(name="key", uid="10", gid="20", mode=0o100400)), SECRETS, CONFIGS
    )
    assert (owned.uid, owned.gid, owned.mode) == (10, 20, 0o400)


def test_config_for_the_runtime_is_no_file() -> None:
    container = ContainerSpec(
        configs=(ConfigReference(config_id="c", config_name="conf", runtime=True),)
    )
    assert files(container, SECRETS, CONFIGS) == ()


@pytest.mark.parametrize(
    ("container", "reason"),
    [
        (secret(FileTarget(name="../passwd")), "outside of /run/secrets"),
        (secret(FileTarget(name="/")), "names no file"),
        (secret(FileTarget(name="key", uid="root")), "uid 'root' of secret 'key' is not a number"),
        (config(FileTarget(name="conf", gid="-1")), "gid '-1' of config 'conf' is not a number"),
        (
            ContainerSpec(secrets=(SecretReference(secret_id="x", secret_name="gone"),)),
            "secret 'gone' is not in the cluster",
        ),
        (
            ContainerSpec(
                secrets=(
                    SecretReference(secret_id="s", secret_name="key"),
                    SecretReference(secret_id="s", secret_name="key"),
                )
            ),
            "have the target /run/secrets/key",
        ),
    ],
)
def test_what_cannot_be_a_file_is_rejected(container: ContainerSpec, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        files(container, SECRETS, CONFIGS)


def test_template_drivers_are_refused_and_not_ignored() -> None:
    secrets = {"s": SecretData(id="s", name="key", data=b"1", templating=Driver(name="golang"))}
    with pytest.raises(Rejected, match="template driver 'golang'"):
        files(secret(None), secrets, CONFIGS)
