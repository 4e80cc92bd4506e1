"""What a stack becomes: names, labels, networks and values as Docker's stack converter makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.compose import load
from swarm.v1 import (
    BindOptions,
    DeviceMapping,
    DeviceRequest,
    Driver,
    IpamConfig,
    IpamOptions,
    Mount,
    NetworkAttachmentSpec,
    NetworkSpec,
    Placement,
    PlacementPreference,
    Platform,
    ResourceRequirements,
    Resources,
    RestartPolicy,
    TmpfsOption,
    TmpfsOptions,
    Ulimit,
    VolumeOptions,
)
from tests.unit.compose.docker_json import docker_service, pruned
from tests.unit.compose.helpers import container, document, loaded, problems, service, spec, task

# The file behind docker-api.md's body b, and what docker 28.2.2 sent for it.
CAPTURED_FILE = """
services:
  web:
    image: busybox:latest
    command: sleep 100000
    stop_grace_period: 1s
    healthcheck: {test: [CMD, "true"], interval: 5s}
    volumes: [data:/data]
    secrets: [s]
    configs: [{source: c, target: /etc/c.conf}]
    networks: [front]
    ports: ["18100:80"]
    deploy:
      replicas: 2
      labels: {a: b}
      resources:
        limits: {cpus: "0.1", memory: 50M}
        reservations: {memory: 10M}
      restart_policy: {condition: on-failure}
      placement: {constraints: [node.role==manager]}
      update_config: {order: start-first}
networks: {front: }
volumes: {data: }
secrets: {s: {content: x}}
configs: {c: {content: y}}
"""
STACK = {"com.docker.stack.namespace": "st"}
CAPTURED = {
    "Name": "st_web",
    "Labels": {"a": "b", "com.docker.stack.image": "busybox:latest", **STACK},
    "TaskTemplate": {
        "ContainerSpec": {
            "Image": "busybox:latest",
            "Labels": STACK,
            "Args": ["sleep", "100000"],
            "Privileges": {"CredentialSpec": None, "SELinuxContext": None},
            "Mounts": [
                {
                    "Type": "volume",
                    "Source": "st_data",
                    "Target": "/data",
                    "VolumeOptions": {"Labels": STACK},
                }
            ],
            "StopGracePeriod": 1000000000,
            "Healthcheck": {"Test": ["CMD", "true"], "Interval": 5000000000},
            "Secrets": [
                {
                    "File": {"Name": "s", "UID": "0", "GID": "0", "Mode": 292},
                    "SecretID": "vg32891yq7ylv9nz7xolaf5pm",
                    "SecretName": "st_s",
                }
            ],
            "Configs": [
                {
                    "File": {"Name": "/etc/c.conf", "UID": "0", "GID": "0", "Mode": 292},
                    "ConfigID": "pq27y0ikhjfnhmnmm85203ux1",
                    "ConfigName": "st_c",
                }
            ],
        },
        "Resources": {
            "Limits": {"NanoCPUs": 100000000, "MemoryBytes": 52428800},
            "Reservations": {"MemoryBytes": 10485760},
        },
        "RestartPolicy": {"Condition": "on-failure"},
        "Placement": {"Constraints": ["node.role==manager"]},
        "Networks": [{"Target": "st_front", "Aliases": ["web"]}],
        "ForceUpdate": 0,
    },
    "Mode": {"Replicated": {"Replicas": 2}},
    "UpdateConfig": {"Parallelism": 1, "MaxFailureRatio": 0, "Order": "start-first"},
    "EndpointSpec": {
        "Ports": [
            {
                "Protocol": "tcp",
                "TargetPort": 80,
                "PublishedPort": 18100,
                "PublishMode": "ingress",
            }
        ]
    },
}


def test_a_stack_becomes_the_body_that_docker_sends() -> None:
    found = spec(CAPTURED_FILE)
    assert pruned(docker_service(found.services[0])) == pruned(CAPTURED)
    assert found.networks == (
        NetworkSpec(name="st_front", labels=STACK, driver=Driver(name="overlay"), scope="swarm"),
    )
    assert [(s.name, s.data, s.labels) for s in found.secrets] == [("st_s", b"x", STACK)]
    assert [(c.name, c.data, c.labels) for c in found.configs] == [("st_c", b"y", STACK)]
    assert [(v.name, v.labels) for v in found.volumes] == [("st_data", STACK)]


def test_a_service_without_networks_joins_the_default_one() -> None:
    found = spec(document("") + "networks: {default: {internal: true}}")
    assert task(found.services[0]).networks == (
        NetworkAttachmentSpec(target="st_default", aliases=("web",)),
    )
    assert [(n.name, n.internal) for n in found.networks] == [("st_default", True)]


def test_the_default_network_is_not_made_when_nobody_joins_it() -> None:
    assert [n.name for n in spec(document("networks: [a]", "networks: {a: }")).networks] == ["st_a"]


def test_the_services_name_is_its_last_alias_and_networks_stand_in_order() -> None:
    found = service(
        """
        networks:
          z:
          a: {aliases: [x, y], ipv4_address: 10.0.0.9, priority: 5, driver_opts: {k: 1}}
        """,
        "networks: {z: , a: {name: real}}",
    )
    assert task(found).networks == (
        NetworkAttachmentSpec(
            target="real",
            aliases=("x", "y", "web"),
            ipv4_address="10.0.0.9",
            priority=5,
            driver_opts={"k": "1"},
        ),
        NetworkAttachmentSpec(target="st_z", aliases=("web",)),
    )


def test_an_alias_of_two_files_is_one(tmp_path: Path) -> None:
    for name, aliases in (("a.yml", "[p, q]"), ("b.yml", "[q, r]")):
        lines = f"image: x\nnetworks: {{default: {{aliases: {aliases}}}}}"
        (tmp_path / name).write_text(document(lines, image=False))
    files = [str(tmp_path / name) for name in ("a.yml", "b.yml")]
    found = load(files, stack="st", environment={}).spec.services[0]
    assert task(found).networks[0].aliases == ("p", "q", "r", "web")


def test_external_objects_keep_their_names_and_are_only_required() -> None:
    found = spec(
        document(
            "networks: [n]\nsecrets: [s]\nconfigs: [c]\nvolumes: ['v:/v']",
            """
            networks: {n: {external: true, name: shared}}
            secrets: {s: {external: {name: key}}}
            configs: {c: {external: true}}
            volumes: {v: {external: true}}
            """,
        )
    )
    assert found.external_networks == ("shared",)
    assert found.external_secrets == ("key",)
    assert found.external_configs == ("c",)
    assert (found.networks, found.secrets, found.configs, found.volumes) == ((), (), (), ())
    web = container(found.services[0])
    assert web.secrets[0].secret_name == "key"
    assert web.mounts == (Mount(type="volume", source="v", target="/v"),)


@pytest.mark.parametrize("mode", ["host", "none"])
def test_the_engines_own_networks_become_the_network_mode(mode: str) -> None:
    found = spec(document("networks: [n]", f"networks: {{n: {{external: true, name: {mode}}}}}"))
    assert container(found.services[0]).network_mode == mode
    assert task(found.services[0]).networks == ()
    assert found.external_networks == ()


def test_environment_is_sorted_and_takes_the_callers_values() -> None:
    found = service("environment: [B=2, A, C, 'D=x=y', E=]", environment={"A": "1"})
    assert container(found).env == ("A=1", "B=2", "C", "D=x=y", "E=")


def test_env_files_stand_below_environment(tmp_path: Path) -> None:
    (tmp_path / "raw.env").write_text("# c\nA=1\nB='q' # no comment\nINHERITED\nUNSET\n")
    (tmp_path / "dot.env").write_text("export C=\"a\\nb\" # comment\nD=$A-${X:-y}\nB2='$raw'\n")
    path = tmp_path / "compose.yml"
    path.write_text(
        document(
            """
            env_file:
              - raw.env
              - path: dot.env
              - {path: nope.env, required: false}
            environment: {A: 2}
            """
        )
    )
    found = load([str(path)], stack="st", environment={"INHERITED": "i"})
    assert container(found.spec.services[0]).env == (
        "A=2",
        "B2=$raw",
        "B='q' # no comment",
        "C=a\nb",
        "D=-y",
        "INHERITED=i",
    )


def test_dotenv_stands_below_the_environment(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("TAG=1\nNAME=dotenv\n")
    path = tmp_path / "compose.yml"
    path.write_text("services: {web: {image: 'a:$TAG', hostname: $NAME}}")
    found = load([str(path)], stack="st", environment={"NAME": "caller"}).spec.services[0]
    assert (container(found).image, container(found).hostname) == ("a:1", "caller")
    other = tmp_path / "other.env"
    other.write_text("TAG=2\n")
    found = load(
        [str(path)], stack="st", environment={"NAME": "x"}, env_files=[other]
    ).spec.services[0]
    assert container(found).image == "a:2"


@pytest.mark.parametrize(
    ("image", "becomes"),
    [
        ("nginx", "nginx:latest"),
        ("nginx:1.27", "nginx:1.27"),
        ("reg:5000/a/b", "reg:5000/a/b:latest"),
        ("reg:5000/a/b:1", "reg:5000/a/b:1"),
        (f"a@sha256:{'0' * 64}", f"a@sha256:{'0' * 64}"),
        ("A.example:5000/b", "A.example:5000/b:latest"),
        ("docker.io/library/nginx", "nginx:latest"),
        ("index.docker.io/team/app:2", "team/app:2"),
        ("library/nginx:1", "nginx:1"),
        ("library/a/b:1", "library/a/b:1"),
        ("localhost/x", "localhost/x:latest"),
        ("4bcff639" * 8, "4bcff639" * 8),
        ("[::1]:5000/b_c--d:x", "[::1]:5000/b_c--d:x"),
    ],
)
def test_an_image_is_named_as_docker_names_it(image: str, becomes: str) -> None:
    found = spec(f"services: {{web: {{image: '{image}'}}}}").services[0]
    assert container(found).image == becomes
    assert found.labels["com.docker.stack.image"] == image


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("/anon", Mount(type="volume", target="/anon")),
        ("/a:/b", Mount(type="bind", source="/a", target="/b")),
        ("./a:/b:ro", Mount(type="bind", source="/nonexistent/a", target="/b", read_only=True)),
        ("../a:/b", Mount(type="bind", source="/a", target="/b")),
        ("~/a:/b", Mount(type="bind", source="/home/u/a", target="/b")),
        (
            "/a:/b:Z,rshared",
            Mount(
                type="bind",
                source="/a",
                target="/b",
                bind_options=BindOptions(selinux="Z", propagation="rshared"),
            ),
        ),
        (
            "data:/b:nocopy",
            Mount(
                type="volume",
                source="st_data",
                target="/b",
                volume_options=VolumeOptions(
                    no_copy=True,
                    labels=STACK | {"k": "v"},
                    driver_config=Driver(name="nfs", options={"o": "1"}),
                ),
            ),
        ),
        (
            "{type: bind, source: ./a, target: /b, bind: {create_host_path: true}}",
            Mount(
                type="bind",
                source="/nonexistent/a",
                target="/b",
                bind_options=BindOptions(create_mountpoint=True),
            ),
        ),
        (
            "{type: volume, source: named, target: /b, volume: {subpath: s}}",
            Mount(
                type="volume",
                source="real",
                target="/b",
                volume_options=VolumeOptions(subpath="s", labels=STACK),
            ),
        ),
        (
            "{type: volume, source: named, target: /b, volume: {labels: [k=v, e]}}",
            Mount(
                type="volume",
                source="real",
                target="/b",
                volume_options=VolumeOptions(labels=STACK | {"k": "v", "e": ""}),
            ),
        ),
        (
            "{type: tmpfs, target: /b, read_only: true, tmpfs: {size: 1m, mode: 01777}}",
            Mount(
                type="tmpfs",
                target="/b",
                read_only=True,
                tmpfs_options=TmpfsOptions(size_bytes=1 << 20, mode=0o1777),
            ),
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_volumes(text: str, mount: Mount) -> None:
    quoted = text if text.startswith("{") else f"'{text}'"
    found = service(
        f"volumes: [{quoted}]",
        """
        volumes:
          data: {driver: nfs, driver_opts: {o: 1}, labels: {k: v}}
          named: {name: real}
        """,
        {"HOME": "/home/u"},
    )
    assert container(found).mounts == (mount,)


def test_consistency_in_a_short_form_does_nothing_and_says_so() -> None:
    found = loaded(document("volumes: ['/a:/b:ro,cached']"))
    assert container(found.spec.services[0]).mounts == (
        Mount(type="bind", source="/a", target="/b", read_only=True),
    )
    assert '"cached" has no effect' in found.warnings[0]


def test_tmpfs_becomes_a_mount() -> None:
    assert container(service("tmpfs: [/a, '/b:size=64m,mode=700,noexec,uid=5']")).mounts == (
        Mount(type="tmpfs", target="/a"),
        Mount(
            type="tmpfs",
            target="/b",
            tmpfs_options=TmpfsOptions(
                size_bytes=64 << 20,
                mode=0o700,
                options=(TmpfsOption(words=("noexec",)), TmpfsOption(words=("uid", "5"))),
            ),
        ),
    )


@pytest.mark.parametrize(
    ("keys", "add", "drop"),
    [
        ("cap_add: [net_admin, CAP_SYS_TIME]", ("CAP_NET_ADMIN", "CAP_SYS_TIME"), ()),
        ("cap_add: [ALL, chown]\ncap_drop: [chown]", ("ALL",), ("CAP_CHOWN",)),
        ("cap_add: [chown]\ncap_drop: [CHOWN, all]", ("CAP_CHOWN",), ("ALL",)),
        ("cap_add: [chown]\ncap_drop: [CHOWN, kill]", ("CAP_CHOWN",), ("CAP_KILL",)),
    ],
)
def test_capabilities_are_spelt_one_way(
    keys: str, add: tuple[str, ...], drop: tuple[str, ...]
) -> None:
    found = container(service(keys))
    assert (found.capability_add, found.capability_drop) == (add, drop)


@pytest.mark.parametrize(
    ("keys", "limits"),
    [
        ("mem_limit: 64M\ncpus: 0.5", Resources(cpu_nano=500_000_000, memory_bytes=64 << 20)),
        ("pids_limit: 5", Resources(pids=5)),
        ("cpu_quota: 50000", Resources(cpu_nano=500_000_000)),
        ("cpu_quota: 50000\ncpu_period: 25000", Resources(cpu_nano=2_000_000_000)),
        ("deploy: {resources: {limits: {cpus: 1.5}}}", Resources(cpu_nano=1_500_000_000)),
        ("deploy: {resources: {limits: {memory: 67108864}}}", Resources(memory_bytes=64 << 20)),
        ("deploy: {resources: {limits: {pids: -1}}}", Resources()),
    ],
)
def test_limits(keys: str, limits: Resources) -> None:
    assert task(service(keys)).resources == ResourceRequirements(limits=limits)


@pytest.mark.parametrize(
    ("keys", "request_"),
    [
        ("gpus: all", DeviceRequest(count=-1, capabilities=("gpu",))),
        ("gpus: 2", DeviceRequest(count=2, capabilities=("gpu",))),
        (
            "gpus: [{driver: nvidia, device_ids: ['0', '3']}]",
            DeviceRequest(driver="nvidia", device_ids=("0", "3"), capabilities=("gpu",)),
        ),
        (
            "deploy: {resources: {reservations: {devices: "
            "[{capabilities: [gpu, utility], count: all, options: {memory: 40GiB}}]}}}",
            DeviceRequest(count=-1, capabilities=("gpu", "utility"), options={"memory": "40GiB"}),
        ),
        ("gpus: [{driver: amd}]", DeviceRequest(driver="amd", count=-1, capabilities=("gpu",))),
        (
            "gpus: [{options: {fraction: 0.5, memory: 10GiB}}]",
            DeviceRequest(capabilities=("gpu",), options={"fraction": "0.5", "memory": "10GiB"}),
        ),
        (
            "gpus: [{count: 2, options: ['model=A100|H100', 'capability=>=8.0']}]",
            DeviceRequest(
                count=2,
                capabilities=("gpu",),
                options={"model": "A100|H100", "capability": ">=8.0"},
            ),
        ),
    ],
)
def test_device_claims(keys: str, request_: DeviceRequest) -> None:
    found = task(service(keys)).resources
    assert found is not None
    assert found.reservations == Resources(devices=(request_,))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ("gpus: [{count: 1, options: {mem: 1g}}]", "GPUs have no option 'mem'"),
        ("gpus: [{count: 2, options: {fraction: 0.5}}]", "only one GPU can be shared"),
        ("gpus: 65", "at most 64"),
        (
            "gpus: [{count: 1, options: {model: A100}}, {count: 1, options: {model: H100}}]",
            "say different things",
        ),
        (
            "gpus: [{options: {fraction: 0.5}}]\ndeploy: {resources: {reservations: "
            "{generic_resources: [{discrete_resource_spec: {kind: gpu, value: 1}}]}}}",
            "GPU option fraction",
        ),
    ],
)
def test_gpus_that_cannot_be_asked_for_are_refused_where_they_stand(keys: str, said: str) -> None:
    assert said in problems(document(keys)).message


@pytest.mark.parametrize(
    ("keys", "policy"),
    [
        ("restart: always", RestartPolicy(condition="any")),
        ("restart: unless-stopped", RestartPolicy(condition="any")),
        ("restart: no", RestartPolicy(condition="none")),
        ("restart: 'no'", RestartPolicy(condition="none")),
        ("restart: false", RestartPolicy(condition="none")),
        ("restart: on-failure:3", RestartPolicy(condition="on-failure", max_attempts=3)),
        ("deploy: {restart_policy: {}}", RestartPolicy()),
        ("", None),
    ],
)
def test_restart(keys: str, policy: RestartPolicy | None) -> None:
    assert task(service(keys)).restart == policy


def test_deploys_restart_policy_wins_with_a_warning() -> None:
    found = loaded(document("restart: always\ndeploy: {restart_policy: {condition: none}}"))
    assert task(found.spec.services[0]).restart == RestartPolicy(condition="none")
    assert "not used: deploy.restart_policy" in found.warnings[0]


def test_an_unquoted_no_of_another_yaml_is_a_policy() -> None:
    assert task(service("restart: false")).restart == RestartPolicy(condition="none")


def test_an_empty_healthcheck_is_a_line_for_the_shell_as_in_docker() -> None:
    check = container(service("healthcheck: {test: ''}")).healthcheck
    assert check is not None
    assert check.test == ("CMD-SHELL", "")


@pytest.mark.parametrize(
    ("text", "mapping"),
    [
        ("/dev/snd", DeviceMapping(source="/dev/snd", target="/dev/snd", permissions="rwm")),
        ("/dev/a:/dev/b", DeviceMapping(source="/dev/a", target="/dev/b", permissions="rwm")),
        ("/dev/a:/dev/b:r", DeviceMapping(source="/dev/a", target="/dev/b", permissions="r")),
        ("/dev/a:rw", DeviceMapping(source="/dev/a", target="/dev/a", permissions="rw")),
        ("nvidia.com/gpu=0", DeviceMapping(source="nvidia.com/gpu=0")),
    ],
)
def test_devices(text: str, mapping: DeviceMapping) -> None:
    assert container(service(f"devices: ['{text}']")).devices == (mapping,)


def test_ulimits() -> None:
    found = container(service("ulimits: {nproc: 5, nofile: {soft: 1, hard: -1}}"))
    assert found.ulimits == (
        Ulimit(name="nofile", soft=1, hard=-1),
        Ulimit(name="nproc", soft=5, hard=5),
    )


def test_the_platform_is_asked_of_the_image_and_of_the_node() -> None:
    found = service("platform: linux/arm64/v8")
    assert container(found).platform == "linux/arm64/v8"
    placement = task(found).placement
    assert placement is not None
    assert placement.platforms == (Platform(os="linux", architecture="arm64"),)


def test_conditions_affinities_and_the_strategy_of_placement() -> None:
    found = spec(
        """
        services:
          web:
            image: busybox
            deploy:
              placement:
                strategy: binpack
                constraints:
                  - node.labels.zone in (a, b)
                  - node.gpu.memory >= 40GiB
                  - service.name not in (db, other_db)
                  - service.name =~ db
                preferences:
                  - spread: node.gpu.model
                  - affinity: service.name == db
                  - affinity: node.labels.disk == ssd
                    weight: -20
          db: {image: postgres}
        """
    )
    assert task(found.services[0]).placement == Placement(
        constraints=(
            "node.labels.zone in (a, b)",
            "node.gpu.memory >= 40GiB",
            "service.name not in (st_db, other_db)",
            "service.name =~ db",
        ),
        preferences=(
            PlacementPreference(spread="node.gpu.model"),
            PlacementPreference(affinity="service.name == st_db", weight=1),
            PlacementPreference(affinity="node.labels.disk == ssd", weight=-20),
        ),
        strategy="binpack",
    )


def test_networks_keep_every_field() -> None:
    found = spec(
        document(
            "networks: [n]",
            """
            networks:
              n:
                driver: bridge
                driver_opts: {mtu: 1450}
                attachable: true
                enable_ipv6: true
                enable_ipv4: false
                labels: [a=b]
                ipam:
                  driver: default
                  config:
                    - subnet: 10.9.0.0/16
                      ip_range: 10.9.1.0/24
                      gateway: 10.9.0.1
                      aux_addresses: {x: 10.9.0.2}
                    - subnet: 2001:db8:9::/64
            """,
        )
    )
    assert found.networks == (
        NetworkSpec(
            name="st_n",
            labels=STACK | {"a": "b"},
            driver=Driver(name="bridge", options={"mtu": "1450"}),
            ipv6=True,
            ipv4=False,
            attachable=True,
            scope="swarm",
            ipam=IpamOptions(
                driver=Driver(name="default"),
                configs=(
                    IpamConfig(
                        subnet="10.9.0.0/16",
                        range="10.9.1.0/24",
                        gateway="10.9.0.1",
                        aux_addresses={"x": "10.9.0.2"},
                    ),
                    IpamConfig(subnet="2001:db8:9::/64"),
                ),
            ),
        ),
    )


def test_depends_on_names_full_services() -> None:
    found = spec(
        """
        services:
          a:
            image: x
            depends_on:
              b: {condition: service_healthy, restart: true}
              c: {condition: service_completed_successfully, required: false}
              gone: {condition: service_started, required: false}
          b: {image: x, depends_on: [c]}
          c: {image: x}
        """
    )
    gates = [(g.service, g.condition, g.required, g.restart) for g in found.services[0].depends_on]
    assert gates == [
        ("st_b", "service_healthy", True, True),
        ("st_c", "service_completed_successfully", False, False),
    ]
    assert found.services[1].depends_on[0].condition == "service_started"
    assert found.services[1].depends_on[0].required


def test_services_with_profiles_run_only_when_one_is_active() -> None:
    text = "services: {a: {image: x}, b: {image: x, profiles: [debug, test]}}"

    def names(profiles: tuple[str, ...], environment: dict[str, str]) -> list[str]:
        found = load(["-"], stack="st", environment=environment, stdin=text, profiles=profiles)
        return [each.name for each in found.spec.services]

    assert names((), {}) == ["st_a"]
    assert names(("debug",), {}) == ["st_a", "st_b"]
    assert names(("*",), {}) == ["st_a", "st_b"]
    assert names((), {"COMPOSE_PROFILES": "x,test"}) == ["st_a", "st_b"]


def test_a_process_needs_a_command_and_no_image() -> None:
    found = spec("services: {web: {runtime: process, command: [python3, -V]}}").services[0]
    assert task(found).runtime == "process"
    assert container(found).image == ""
    assert container(found).args == ("python3", "-V")
    assert "com.docker.stack.image" not in found.labels


@pytest.mark.parametrize(
    ("text", "env", "warns"),
    [
        ("1.10", "V=1.1", True),
        ("'1.10'", "V=1.10", False),
        ("0123", "V=83", True),
        ("5", "V=5", False),
        ("1.5", "V=1.5", False),
        ("yes", "V=yes", False),
        ("true", "V=true", False),
        ("12:30", "V=12:30", False),
    ],
)
def test_a_number_that_loses_its_spelling_gives_a_warning(text: str, env: str, warns: bool) -> None:
    found = loaded(document(f"environment: {{V: {text}}}"))
    assert container(found.spec.services[0]).env == (env,)
    assert bool(found.warnings) is warns


def test_a_network_that_nobody_joins_gives_a_warning() -> None:
    assert "is not made" in loaded(document("", "networks: {n: }")).warnings[0]


def test_how_an_external_network_was_made_is_not_used_and_says_so() -> None:
    top = "networks: {n: {external: true, driver: bridge, attachable: true, x-a: 1}}"
    found = loaded(document("networks: [n]", top))
    assert (found.spec.networks, found.spec.external_networks) == ((), ("n",))
    assert [warning.partition(": ")[2] for warning in found.warnings] == [
        f'networks.n.{key}: "{key}" has no effect on an external network, which is there already'
        for key in ("driver", "attachable")
    ]


def test_a_mode_of_the_engine_joins_the_stacks_network_and_says_so() -> None:
    found = loaded(document("network_mode: bridge"))
    assert [a.target for a in task(found.spec.services[0]).networks] == ["st_default"]
    assert "does not reach across hosts" in found.warnings[0]


def test_ports_of_the_hosts_network_are_the_hosts() -> None:
    found = loaded(document("network_mode: host\nports: ['80:80']"))
    endpoint = found.spec.services[0].endpoint
    assert endpoint is not None
    assert endpoint.ports == ()
    assert "not published" in found.warnings[0]


def aliases(text: str) -> dict[str, list[tuple[str, tuple[str, ...]]]]:
    return {
        each.name.removeprefix("st_"): [(a.target, a.aliases) for a in task(each).networks]
        for each in loaded(text).spec.services
    }


def test_container_name_is_an_alias_on_every_network_of_the_service() -> None:
    text = document(
        "container_name: shop\nnetworks: {a: {aliases: [x]}, b: }", "networks: {a: , b: }"
    )
    assert aliases(text)["web"] == [("st_a", ("x", "shop", "web")), ("st_b", ("shop", "web"))]
    (warning,) = loaded(text).warnings
    assert 'others reach the service as "shop"' in warning


def test_an_empty_container_name_is_none() -> None:
    found = loaded(document("container_name: $NO_SUCH")).spec.services[0]
    assert task(found).networks[0].aliases == ("web",)


def test_a_container_name_like_the_services_own_adds_nothing() -> None:
    assert aliases(document("container_name: web"))["web"] == [("st_default", ("web",))]


def test_a_link_waits_and_gives_the_other_service_its_alias() -> None:
    text = """
        services:
          web: {image: a, links: [db, "cache:redis"], networks: [front, back]}
          db: {image: b, networks: [back]}
          cache: {image: c, networks: [back, other]}
        networks: {front: , back: , other: }
        """
    found = aliases(text)
    assert found["db"] == [("st_back", ("db",))]
    assert found["cache"] == [("st_back", ("redis", "cache")), ("st_other", ("cache",))]
    gates = loaded(text).spec.services[0].depends_on
    assert [(g.service, g.condition) for g in gates] == [
        ("st_cache", "service_started"),
        ("st_db", "service_started"),
    ]


def test_depends_on_beside_a_link_says_what_to_wait_for() -> None:
    text = """
        services:
          web: {image: a, links: [db], depends_on: {db: {condition: service_healthy}}}
          db: {image: b}
        """
    (gate,) = loaded(text).spec.services[0].depends_on
    assert gate.condition == "service_healthy"


def test_links_that_form_a_circle_are_refused() -> None:
    text = "services: {a: {image: x, links: [b]}, b: {image: x, links: [a]}}"
    assert "a -> b -> a" in problems(text).message


@pytest.mark.parametrize(
    "ports",
    [
        ("{target: 80, published: 80, mode: host}", "{target: 80, published: 80, mode: host}"),
        ("'80:80'", "'80:80/udp'"),
        ("'80'", "'80'"),
    ],
    ids=["both of their host", "other protocols", "chosen by the cluster"],
)
def test_services_may_publish_ports_that_do_not_clash(ports: tuple[str, str]) -> None:
    one, other = ports
    assert loaded(
        f"services: {{a: {{image: x, ports: [{one}]}}, b: {{image: x, ports: [{other}]}}}}"
    )


def test_refused_keys_that_are_reset_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("services: {web: {build: ., image: a}, dev: {build: .}}")
    (tmp_path / "b.yml").write_text("services: {web: {build: !reset null}, dev: {profiles: [dev]}}")
    found = load([str(tmp_path / "a.yml"), str(tmp_path / "b.yml")], stack="st", environment={})
    assert [each.name for each in found.spec.services] == ["st_web"]
