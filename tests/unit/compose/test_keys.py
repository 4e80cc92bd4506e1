"""Every service key of the specification: in one class, and treated as its class says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from agent.runtime.process.fields import CONTAINER, How
from cli.compose import keys
from cli.compose.keys import SERVICE, Key, Support
from swarm.v1 import ServiceSpec
from tests.unit.compose.helpers import document, loaded, problems, service

# One use of each honoured key; it must change what becomes of the service.
SAMPLES = {
    "annotations": "annotations: {a: b}",
    "cap_add": "cap_add: [NET_ADMIN]",
    "cap_drop": "cap_drop: [ALL]",
    "cgroup": "cgroup: host",
    "cgroup_parent": "cgroup_parent: /x",
    "cgroupns_mode": "cgroupns_mode: private",
    "command": "command: sleep 1",
    "configs": "configs: [c]",
    "container_name": "container_name: other-name",
    "cpu_period": "cpu_period: 1000\ncpu_quota: 500",
    "cpu_quota": "cpu_quota: 50000",
    "cpu_shares": "cpu_shares: 512",
    "cpus": "cpus: 0.5",
    "cpuset": "cpuset: 0-1",
    "credential_spec": "credential_spec: {file: a.json}",
    "depends_on": "depends_on: [other]",
    "deploy": "deploy: {replicas: 3}",
    "device_cgroup_rules": "device_cgroup_rules: ['c 1:3 mr']",
    "devices": "devices: [/dev/snd]",
    "dns": "dns: 1.1.1.1",
    "dns_opt": "dns_opt: [ndots:1]",
    "dns_search": "dns_search: example.com",
    "domainname": "domainname: example.com",
    "entrypoint": "entrypoint: /bin/x",
    "environment": "environment: {A: b}",
    "expose": "expose: ['80']",
    "extends": "extends: other",
    "extra_hosts": "extra_hosts: ['a:1.2.3.4']",
    "gpus": "gpus: all",
    "group_add": "group_add: [audio, 5]",
    "healthcheck": "healthcheck: {test: x}",
    "hostname": "hostname: h",
    "image": "",
    "init": "init: true",
    "ipc": "ipc: host",
    "isolation": "isolation: default",
    "labels": "labels: [a=b]",
    "links": "links: [other:friend]",
    "logging": "logging: {driver: none}",
    "mac_address": "mac_address: 02:42:ac:11:00:02",
    "mem_limit": "mem_limit: 64M",
    "mem_reservation": "mem_reservation: 64M",
    "mem_swappiness": "mem_swappiness: 10",
    "memswap_limit": "memswap_limit: -1",
    "network_mode": "network_mode: host",
    "networks": "networks: [n]",
    "oom_kill_disable": "oom_kill_disable: true",
    "oom_score_adj": "oom_score_adj: 500",
    "pid": "pid: host",
    "pids_limit": "pids_limit: 10",
    "platform": "platform: linux/amd64",
    "ports": "ports: ['80']",
    "privileged": "privileged: true",
    "pull_policy": "pull_policy: never",
    "read_only": "read_only: true",
    "restart": "restart: always",
    "runtime": "runtime: runsc",
    "scale": "scale: 4",
    "secrets": "secrets: [s]",
    "security_opt": "security_opt: ['label:disable']",
    "shm_size": "shm_size: 64M",
    "stdin_open": "stdin_open: true",
    "stop_grace_period": "stop_grace_period: 1s",
    "stop_signal": "stop_signal: SIGINT",
    "storage_opt": "storage_opt: {size: 1G}",
    "sysctls": "sysctls: {net.core.somaxconn: 1}",
    "tmpfs": "tmpfs: /x",
    "tty": "tty: true",
    "ulimits": "ulimits: {nproc: 5}",
    "user": "user: 1000",
    "userns_mode": "userns_mode: host",
    "uts": "uts: host",
    "volumes": "volumes: [/x]",
    "working_dir": "working_dir: /x",
}
# Honoured in a way that one service's spec does not show.
ELSEWHERE = {"attach", "env_file", "label_file", "profiles"}
TOP = """
  other: {image: other, stop_signal: SIGHUP}
networks: {n: }
secrets: {s: {content: x}}
configs: {c: {content: x}}
"""
# What the Compose Specification (of September 2025) knows, with the keys of version 1 files.
SPECIFICATION = [
    "annotations",
    "attach",
    "build",
    "blkio_config",
    "cpu_count",
    "cpu_percent",
    "cpu_shares",
    "cpu_period",
    "cpu_quota",
    "cpu_rt_runtime",
    "cpu_rt_period",
    "cpus",
    "cpuset",
    "cap_add",
    "cap_drop",
    "cgroup",
    "cgroup_parent",
    "command",
    "configs",
    "container_name",
    "credential_spec",
    "depends_on",
    "deploy",
    "develop",
    "device_cgroup_rules",
    "devices",
    "dns",
    "dns_opt",
    "dns_search",
    "domainname",
    "entrypoint",
    "env_file",
    "environment",
    "expose",
    "extends",
    "external_links",
    "extra_hosts",
    "gpus",
    "group_add",
    "healthcheck",
    "hostname",
    "image",
    "init",
    "ipc",
    "isolation",
    "label_file",
    "labels",
    "links",
    "logging",
    "mac_address",
    "mem_limit",
    "mem_reservation",
    "mem_swappiness",
    "memswap_limit",
    "models",
    "network_mode",
    "networks",
    "oom_kill_disable",
    "oom_score_adj",
    "pid",
    "pids_limit",
    "platform",
    "ports",
    "post_start",
    "pre_stop",
    "privileged",
    "profiles",
    "provider",
    "pull_policy",
    "pull_refresh_after",
    "read_only",
    "restart",
    "runtime",
    "scale",
    "secrets",
    "security_opt",
    "shm_size",
    "stdin_open",
    "stop_grace_period",
    "stop_signal",
    "storage_opt",
    "sysctls",
    "tmpfs",
    "tty",
    "ulimits",
    "use_api_socket",
    "user",
    "userns_mode",
    "uts",
    "volumes",
    "volumes_from",
    "working_dir",
]
# The other tables, by the specification's schema (definitions of the same names).
SECTIONS: dict[str, tuple[Mapping[str, Key], str]] = {
    "root": (keys.ROOT, "version name include services models networks volumes secrets configs"),
    "deployment": (
        keys.DEPLOY,
        "mode endpoint_mode replicas labels rollback_config update_config resources "
        "restart_policy placement",
    ),
    "update_config": (
        keys.UPDATE,
        "parallelism delay failure_action monitor max_failure_ratio order",
    ),
    "resources": (keys.RESOURCES, "limits reservations"),
    "limits": (keys.LIMITS, "cpus memory pids"),
    "reservations": (keys.RESERVATIONS, "cpus memory generic_resources devices"),
    "generic_resources": (keys.GENERIC, "discrete_resource_spec"),
    "discrete_resource_spec": (keys.DISCRETE, "kind value"),
    "devices, gpus": (keys.DEVICE, "capabilities count device_ids driver options"),
    "restart_policy": (keys.RESTART, "condition delay max_attempts window"),
    "placement": (keys.PLACEMENT, "constraints preferences max_replicas_per_node"),
    "preferences": (keys.PREFERENCE, "spread"),
    "healthcheck": (
        keys.HEALTHCHECK,
        "disable interval retries test timeout start_period start_interval",
    ),
    "logging": (keys.LOGGING, "driver options"),
    "ports": (keys.PORT, "name mode host_ip target published protocol app_protocol"),
    "volumes of a service": (
        keys.VOLUME_MOUNT,
        "type source target read_only consistency bind volume tmpfs image",
    ),
    "bind": (keys.BIND, "propagation create_host_path recursive selinux"),
    "volume of a mount": (keys.VOLUME_OPTIONS, "labels nocopy subpath"),
    "tmpfs": (keys.TMPFS, "size mode"),
    "image of a mount": (keys.IMAGE_OPTIONS, "subpath"),
    "service_config_or_secret": (keys.FILE_REFERENCE, "source target uid gid mode"),
    "networks of a service": (
        keys.SERVICE_NETWORK,
        "aliases interface_name ipv4_address ipv6_address link_local_ips mac_address driver_opts "
        "priority gw_priority",
    ),
    "ulimits": (keys.ULIMIT, "hard soft"),
    "depends_on": (keys.DEPENDENCY, "restart required condition"),
    "env_file": (keys.ENV_FILE, "path format required"),
    "extends": (keys.EXTENDS, "service file"),
    "include": (keys.INCLUDE, "path env_file project_directory"),
    "credential_spec": (keys.CREDENTIAL_SPEC, "config file registry"),
    "devices of a service": (keys.DEVICE_MAPPING, "source target permissions"),
    "network": (
        keys.NETWORK,
        "name driver driver_opts ipam external internal enable_ipv4 enable_ipv6 attachable labels",
    ),
    "ipam": (keys.IPAM, "driver config options"),
    "ipam.config": (keys.IPAM_CONFIG, "subnet ip_range gateway aux_addresses"),
    "volume": (keys.VOLUME, "name driver driver_opts external labels"),
    "secret": (
        keys.SECRET,
        "name environment file external labels driver driver_opts template_driver",
    ),
    "config": (keys.CONFIG, "name content environment file external labels template_driver"),
    "external": (keys.EXTERNAL, "name"),
}
# Known beyond the schema: refused with a better place to write it, or the same as elsewhere.
BEYOND = {
    "deployment": {"priority", "job"},
    "update_config": {"deadline"},
    "restart_policy": {"max_delay"},
    "limits": {"devices", "generic_resources"},
    "reservations": {"pids"},
    "secret": {"content"},
    "placement": {"strategy"},
    "preferences": {"affinity", "weight"},
}
OLDER = {"cgroupns_mode", "net", "log_driver", "log_opt", "volume_driver", "dockerfile"}
# The field of ContainerSpec behind a key that the docker runtime alone honours.
FIELDS = {
    "annotations": "annotations",
    "cgroup_parent": "cgroup_parent",
    "device_cgroup_rules": "device_cgroup_rules",
    "isolation": "isolation",
    "mac_address": "mac_address",
    "pull_policy": "pull_policy",
    "storage_opt": "storage_opt",
}


def of_class(support: Support) -> list[str]:
    return sorted(name for name, key in SERVICE.items() if key.support is support)


def test_the_table_has_every_key_of_the_specification() -> None:
    assert set(SERVICE) == set(SPECIFICATION) | OLDER


@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_every_table_has_every_key_of_the_specification(name: str) -> None:
    table, known = SECTIONS[name]
    assert set(table) == set(known.split()) | BEYOND.get(name, set())


def test_every_refused_key_of_any_table_says_why_and_what_to_write() -> None:
    for name, (table, _) in SECTIONS.items():
        for key, what in table.items():
            if what.support is Support.REFUSED:
                assert what.reason, (name, key)
                assert what.instead, (name, key)


def test_every_honoured_key_has_a_sample() -> None:
    usable = set(of_class(Support.HONOURED)) | set(of_class(Support.DOCKER_ONLY))
    assert usable == set(SAMPLES) | ELSEWHERE


def test_every_key_says_what_becomes_of_it() -> None:
    for name, key in SERVICE.items():
        if key.support is Support.REFUSED:
            assert key.reason, name
            assert key.instead, name
        else:
            assert key.how, name


def plain() -> ServiceSpec:
    return service("", TOP)


@pytest.mark.parametrize("name", sorted(set(SAMPLES) - {"image"}))
def test_an_honoured_key_changes_the_spec(name: str) -> None:
    found = service(SAMPLES[name], TOP)
    assert found != plain()


@pytest.mark.parametrize("name", of_class(Support.REFUSED))
def test_a_refused_key_says_why_and_what_to_write(name: str) -> None:
    (problem,) = problems(document(f"{name}: x")).problems
    assert (problem.line, problem.column) == (4, 5)
    assert SERVICE[name].reason in problem.message
    assert problem.hint == SERVICE[name].instead


@pytest.mark.parametrize("name", of_class(Support.DOCKER_ONLY))
def test_a_key_of_the_docker_runtime_is_refused_for_processes(name: str) -> None:
    text = document(f"command: x\nruntime: process\n{SAMPLES[name]}", image=False)
    (problem,) = problems(text).problems
    assert problem.line == 5
    assert "honoured by the docker runtime only" in problem.message


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_the_process_runtime_agrees_about_what_it_lacks(name: str) -> None:
    assert SERVICE[name].support is Support.DOCKER_ONLY
    assert CONTAINER[FIELDS[name]] in (How.REFUSED, How.NO_EFFECT)


def test_no_key_is_honoured_that_the_process_runtime_always_refuses() -> None:
    refused = {field for field, how in CONTAINER.items() if how is How.REFUSED}
    assert refused <= set(FIELDS.values()) | {"image"}


def test_label_files_stand_below_labels(tmp_path: Path) -> None:
    (tmp_path / "l").write_text("a=1\nb=1\n")
    text = document("label_file: l\nlabels: {b: 2}")
    found = loaded(text, folder=tmp_path).spec.services[0].task
    assert found is not None
    assert found.container is not None
    labels = {k: v for k, v in found.container.labels.items() if len(k) == 1}
    assert labels == {"a": "1", "b": "2"}


def test_a_seccomp_profile_is_read(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('{ "defaultAction": "SCMP_ACT_ALLOW" }')
    text = document("security_opt: [seccomp=p.json, 'no-new-privileges:true', label:disable]")
    found = loaded(text, folder=tmp_path).spec.services[0].task
    assert found is not None
    assert found.container is not None
    assert found.container.security_opt == (
        'seccomp={"defaultAction":"SCMP_ACT_ALLOW"}',
        "no-new-privileges",
        "label=disable",
    )
    assert "no such file" in problems(document("security_opt: ['seccomp:no.json']")).message


@pytest.mark.parametrize(
    "text",
    [
        "x-a: 1\nservices: {web: {image: a, x-b: {c: d}, deploy: {x-c: 1, resources: {x-d: 2}}}}",
        "services: {web: {image: a, healthcheck: {x-a: 1, test: b}, logging: {x-b: 1}}}",
        "services: {web: {image: a, ports: [{target: 80, x-a: 1}]}}\nnetworks: {n: {x-a: 1}}",
    ],
)
def test_keys_that_begin_with_x_are_the_users_own(text: str) -> None:
    assert loaded(text).spec.services


def test_every_context_refuses_unknown_keys() -> None:
    """Each table is used: an unknown key in each place is a problem of that place."""
    text = """
        wibble: 1
        include: [{wibble: 1, path: /no}]
        services:
          web:
            image: a
            wibble: 1
            ports: [{target: 80, wibble: 1}]
            volumes:
              - {type: bind, source: /a, target: /a, wibble: 1, bind: {wibble: 1}}
              - {type: volume, target: /b, volume: {wibble: 1}}
              - {type: tmpfs, target: /c, tmpfs: {wibble: 1}}
              - {type: image, source: a, target: /d, image: {wibble: 1}}
            networks: {n: {wibble: 1}}
            configs: [{source: c, wibble: 1}]
            ulimits: {nofile: {soft: 1, hard: 1, wibble: 1}}
            healthcheck: {test: a, wibble: 1}
            logging: {wibble: 1}
            depends_on: {b: {condition: service_started, wibble: 1}}
            env_file: [{path: a, required: false, wibble: 1}]
            devices: [{source: /dev/a, wibble: 1}]
            gpus: [{wibble: 1}]
            deploy:
              wibble: 1
              placement: {wibble: 1, preferences: [{spread: node.labels.a, wibble: 1}]}
              resources:
                wibble: 1
                limits: {wibble: 1}
                reservations:
                  wibble: 1
                  devices: [{capabilities: [gpu], wibble: 1}]
                  generic_resources: [{discrete_resource_spec: {kind: a, value: 1, wibble: 1}}]
              restart_policy: {wibble: 1}
              update_config: {wibble: 1}
              rollback_config: {wibble: 1}
          b: {image: b, extends: {service: web2, wibble: 1}}
          web2: {image: c}
        networks: {n: {wibble: 1, ipam: {wibble: 1, config: [{subnet: 10.0.0.0/8, wibble: 1}]}}}
        volumes: {v: {wibble: 1}}
        secrets: {s: {content: a, wibble: 1}}
        configs: {c: {content: a, wibble: 1}}
        """
    error = problems(text)
    wibbles = [p for p in error.problems if 'unknown key "wibble"' in p.message]
    assert len(wibbles) == text.count("wibble")
    others = [p.message for p in error.problems if "wibble" not in p.message]
    assert others == ["include.0.path.0: no such file: /no"]


def test_the_documentation_is_made_from_the_table() -> None:
    page = Path(keys.__file__).with_name("KEYS.md")
    assert page.read_text() == keys.markdown()
