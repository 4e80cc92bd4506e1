"""Secrets and configs as files: targets, owners, modes, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from agent import equipment
from agent.runtime.base import Rejected, TaskFile
from swarm.placeholders import CONFIG_BYTES_MAX, task_values
from swarm.v1 import (
    ConfigData,
    ConfigReference,
    ContainerSpec,
    Driver,
    FileTarget,
    Platform,
    SecretData,
    SecretReference,
    Task,
)

SECRETS = {"s": SecretData(id="s", name="key", data=b"1")}
CONFIGS = {"c": ConfigData(id="c", name="conf", data=b"2")}
GOLANG = Driver(name="golang")


def files(
    container: ContainerSpec,
    secrets: Mapping[str, SecretData],
    configs: Mapping[str, ConfigData],
    *,
    slot: int = 3,
) -> tuple[TaskFile, ...]:
    values = task_values(
        Task(id="t1", service_id="s1", node_id="n1", slot=slot),
        service_name="web",
        service_labels={"tier": "front"},
        task_name=f"web.{slot}.t1",
        hostname="h1",
        platform=Platform(os="linux", architecture="x86_64"),
    )
    return equipment.files(container, secrets, configs, values)


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


def test_a_doubled_slash_in_a_target_is_one() -> None:
    (file,) = files(secret(FileTarget(name="//etc//key")), SECRETS, CONFIGS)
    assert file.target == "/etc/key"


def test_an_unknown_template_driver_is_refused_with_those_that_are_known() -> None:
    secrets = {"s": SecretData(id="s", name="key", data=b"1", templating=Driver(name="jinja"))}
    with pytest.raises(Rejected, match=r"template driver 'jinja'.*it has: golang"):
        files(secret(None), secrets, CONFIGS)


# ------------------------------------------------------------------ templates

CONTAINER = ContainerSpec(
    env=("MODE=a=b", "EMPTY=", "UNSET"),
    secrets=(
        SecretReference(secret_id="s", secret_name="app_key", file=FileTarget(name="key")),
        SecretReference(secret_id="s2", secret_name="plain"),
    ),
    configs=(
        ConfigReference(config_id="c", config_name="app_conf", file=FileTarget(name="/etc/c")),
        ConfigReference(config_id="c2", config_name="other"),
    ),
)


def templated(text: str | bytes, *, kind: str = "config", slot: int = 3) -> TaskFile:
    """What becomes of a text as the templated item of CONTAINER."""
    data = text.encode() if isinstance(text, str) else text
    driver_s, driver_c = (GOLANG, None) if kind == "secret" else (None, GOLANG)
    secrets = {
        "s": SecretData(id="s", data=data if kind == "secret" else b"hush", templating=driver_s),
        "s2": SecretData(id="s2", data=b"{{.Task.Slot}}\xff"),
    }
    configs = {
        "c": ConfigData(id="c", data=data if kind == "config" else b"conf", templating=driver_c),
        "c2": ConfigData(id="c2", data=b"two"),
    }
    found = files(CONTAINER, secrets, configs, slot=slot)
    return found[0] if kind == "secret" else found[2]


@pytest.mark.parametrize("kind", ["secret", "config"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{.Service.Name}}-{{.Task.Slot}}@{{.Node.Hostname}}", b"web-3@h1"),
        ("{{.Service.ID}} {{.Node.ID}} {{.Task.ID}} {{.Task.Name}}", b"s1 n1 t1 web.3.t1"),
        ("{{.Node.Platform.OS}}/{{.Node.Platform.Architecture}}", b"linux/x86_64"),
        ("{{range $k, $v := .Service.Labels}}{{$k}}={{$v}}{{end}}", b"tier=front"),
        ('{{env "MODE"}}|{{env "EMPTY"}}|{{env "UNSET"}}|{{env "NONE"}}', b"a=b|||"),
        ('{{config "other"}}', b"two"),
        ('{{join "-" "a" .Task.Slot}}', b"a-3"),
        ('{{if eq .Task.Slot "1"}}first{{else}}later{{end}}', b"later"),
        ('{{define "x"}}[{{.}}]{{end}}{{template "x" .Task.Slot}}', b"[3]"),
        # What they give is not expanded in turn, and may be any bytes.
        ('{{secret "plain"}}', b"{{.Task.Slot}}\xff"),
        (b"\xfe{{.Task.Slot}}\x00", b"\xfe3\x00"),
        ("no template", b"no template"),
    ],
)
def test_templated_files_are_expanded_for_the_task(
    kind: str, text: str | bytes, expected: bytes
) -> None:
    assert templated(text, kind=kind).data == expected


def test_secrets_and_configs_are_found_by_target_and_by_name() -> None:
    assert templated('{{secret "key"}}{{secret "app_key"}}').data == b"hushhush"
    assert templated('{{config "/etc/c"}}', kind="secret").data == b"conf"
    assert templated('{{config "app_conf"}}', kind="secret").data == b"conf"


def test_a_template_that_shows_itself_shows_its_text() -> None:
    assert templated('{{config "/etc/c"}}').data == b'{{config "/etc/c"}}'


def test_each_task_has_its_own_text() -> None:
    assert [templated("{{.Task.Slot}}", slot=n).data for n in (1, 2)] == [b"1", b"2"]
    assert templated("{{.Task.Slot}}", slot=0).data == b"n1"


def test_a_config_that_shows_a_secret_is_a_secret() -> None:
    assert templated('{{secret "key"}}').secret
    assert not templated('{{config "other"}}').secret


@pytest.mark.parametrize("kind", ["secret", "config"])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\n  {{.Task.Nope}}", r"line 2, column 5: there is no field 'Nope'"),
        ("{{if}}", r"line 1, column 5: a value is missing"),
        ("{{exec 1}}", r"line 1, column 3: there is no function 'exec'"),
        ("{{.Service.Labels.none}}", r"no label 'none' \(set: tier\)"),
        (
            '{{secret "none"}}',
            r"secret: the service has no secret .*'none' \(targets: key, plain\)",
        ),
        (
            '{{config "none"}}',
            r"config: the service has no config .*'none' \(targets: /etc/c, other",
        ),
        ("{{range 9999999}}{{end}}", "more than 100000 steps"),
        ("{{range 40000}}xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx{{end}}", "longer than"),
    ],
)
def test_a_template_that_fails_rejects_the_task_with_name_line_and_column(
    kind: str, text: str, reason: str
) -> None:
    name = "secret 'app_key'" if kind == "secret" else "config 'app_conf'"
    with pytest.raises(Rejected, match=f"^{name}: .*{reason}"):
        templated(text, kind=kind)


def test_an_error_does_not_tell_a_secret() -> None:
    for text in ('{{index (secret "key") 99}}', '{{(secret "key").x}}', '{{lt 1 (secret "key")}}'):
        with pytest.raises(Rejected) as caught:
            templated(text)
        assert "hush" not in str(caught.value)


def test_the_expanded_text_obeys_the_size_limit_in_bytes() -> None:
    # Characters within the limit, bytes beyond.
    text = "ä" * (CONFIG_BYTES_MAX // 2) + "{{.Task.Slot}}"
    with pytest.raises(Rejected, match=f"{CONFIG_BYTES_MAX + 1} bytes, {CONFIG_BYTES_MAX} are"):
        templated(text)
