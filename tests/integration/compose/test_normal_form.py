"""The normal form against the docker CLI: for what it takes, the same document.

The services of the table stand in one file together, so that the CLI runs once for all of them.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from cli.compose import dump, normal_form
from cli.compose.printing import plain
from cli.compose.problems import Report, Source
from cli.compose.tree import parse
from tests.integration.compose.fake_engine import docker, docker_is_missing
from tests.unit.compose.strategies import documents

_MISSING = docker_is_missing()
pytestmark = pytest.mark.skipif(bool(_MISSING), reason=_MISSING or "-")

ENVIRONMENT = {
    "HOME": "/home/ada",
    "SET": "from outside",
    "EMPTY": "",
    "N": "3",
    "YES": "yes",
    "OFF": "off",
    "PORT": "8081",
    "RATIO": "0.5",
    "SIZE": "64m",
}

# Lines of one service each; a service that names no image gets one.
SERVICES: dict[str, str] = {
    "image only": "image: nginx",
    "nothing but build": "build: .\nimage: ''",
    "build": """
        build:
          context: ./dir
          dockerfile: Dockerfile.x
          args: [A=1, B, C=]
          labels: {a: 1, b: }
          cache_from: [x, y]
          network: host
          target: t
          shm_size: 1g
          extra_hosts: ["a:1.1.1.1", "b=::1"]
          anything: {else: 1}
        """,
    "build args as a map": "build: {context: ., args: {A: 1, B: , C: 1.50}, extra_hosts: {a: 1.2.3.4}}",
    "all strings": """
        cgroup_parent: m
        cgroupns_mode: host
        container_name: n
        domainname: example.com
        hostname: "{{.Node.Hostname}}"
        ipc: host
        isolation: default
        mac_address: 02:42:ac:11:00:02
        network_mode: host
        pid: host
        restart: on-failure:3
        shm_size: 64M
        stop_signal: SIGINT
        user: "1000:1000"
        userns_mode: host
        working_dir: /w
        """,
    "empty strings": "hostname: ''\nuser: ''\nipc: ''\nrestart: ''\nlabels: {}\nenvironment: []",
    "null pid": "pid:",
    "strings that look like more": """
        hostname: "yes"
        user: "0"
        domainname: "1e3"
        working_dir: "12:30"
        stop_signal: "0o17"
        ipc: "~"
        """,
    "truths": "init: false\nprivileged: false\nread_only: true\nstdin_open: true\ntty: false",
    "other truths": "init: true\nprivileged: true\nread_only: false",
    "lists": """
        cap_add: [NET_ADMIN, CHOWN]
        cap_drop: []
        depends_on: [web, db]
        devices: ["/dev/a:/dev/b:rwm", /dev/c, odd]
        expose: [80, "81", 82-83]
        external_links: [q]
        links: ["b:c", d]
        security_opt: ["seccomp:./profile.json", "label=disable", "seccomp=unconfined"]
        """,
    "strings or lists": "dns: 1.1.1.1\ndns_search: [b, a]\ntmpfs: /a:size=1\nenv_file: vars.env",
    "empty name server": "dns: ''",
    "command as a line": r"""
        command: a 'b c' "d \n $$X" e\ f g"h i"j 'k' '' # not read
        entrypoint: sh -c
        """,
    "command with a comment in it": "command: 'a #b c'",
    "command over lines": "command: >\n  run\n  --x 'y\n  z'\n  -v\n",
    "command as a block": "command: |\n  run\n  # comment\n  --x\n",
    "command as a list": "command: [a, '1', '$$HOME', 'b c', '']\nentrypoint: []",
    "empty command": "command: ''\nentrypoint: ''",
    "credential spec": "credential_spec: {file: a.json}",
    "credential spec of a config": "credential_spec: {registry: r, config: c}",
    "deploy is null": "deploy:",
    "deploy is empty": "deploy: {resources: {}, placement: {}}",
    "deploy": """
        deploy:
          mode: replicated
          replicas: 0
          labels: [a=b, c, d=e=f]
          endpoint_mode: vip
          update_config: {parallelism: 0, delay: 90s, failure_action: rollback, monitor: 1h,
            max_failure_ratio: 0.1, order: start-first}
          rollback_config: {parallelism: 3, delay: 0s, max_failure_ratio: 0.123456789}
          restart_policy: {condition: on-failure, delay: 0s, max_attempts: 0, window: 1500ms}
          placement:
            constraints: [node.role == manager, "node.labels.x!=y"]
            preferences: [{spread: node.labels.zone}, {}]
            max_replicas_per_node: 3
          resources:
            limits: {cpus: "0.50", memory: 1.5g, pids: 100}
            reservations: {cpus: "0.25", memory: 20mb,
              generic_resources: [{discrete_resource_spec: {kind: gpu, value: 2}}, {}]}
        """,
    "deploy of zeros": """
        deploy:
          update_config: {}
          rollback_config: {max_failure_ratio: 1e-9}
          restart_policy: {}
          placement: {max_replicas_per_node: 0}
          resources: {limits: {cpus: "0", memory: 0b, pids: 0}, reservations: {}}
        """,
    "deploy of odd words": """
        deploy: {mode: swarmy, endpoint_mode: odd, restart_policy: {condition: sometimes},
          update_config: {failure_action: what}, resources: {limits: {cpus: abc}}}
        """,
    "a job": "deploy: {mode: replicated-job, replicas: 4}",
    "sizes": "deploy: {resources: {limits: {memory: '1 g'}, reservations: {memory: 0.5k}}}",
    "sizes with exponents": "deploy: {resources: {limits: {memory: 1kib}, reservations: {memory: '1024'}}}",
    "environment as a map": """
        environment: {A: 1, B: , C: 1.0, D: yes, E: "", F: 1e3, G: 0x10, H: 010, I: 1_000, J: .5,
          K: 1:30, L: 1e100, M: 12345678.9, N: ~, O: -0, P: +5, Q: 2001-01-01,
          R: 2001-01-01 10:00:00, S: 2001-01-01T10:00:00.5+02:00, T: 0b11, U: 1e21, V: "1.0",
          W: "a\\nb", X: " x ", SET: , Y: "{{.Task.Slot}}"}
        """,
    "environment as a list": "environment: [A=1, B, C=, 'D=x=y', ' E =1', SET, 'F=$SET', 'G=$$SET']",
    "files of variables": """
        env_file: [vars.env, ./more.env]
        environment: {A: own, NEW: , SET: }
        """,
    "labels": "labels: {A: 1, B: , C: 1.0, D: x}",
    "labels as a list": "labels: [A=1, B, C=, traefik.http.rule=Host(`a`) && Path(`/`)]",
    "hosts as a list": "extra_hosts: ['b:1.2.3.4', 'a=::1', 'c:[::2]', 'd:host-gateway']",
    "hosts as a map": "extra_hosts: {z: 1.1.1.1, y: ~, x: '::1'}",
    "sysctls": "sysctls: {net.core.somaxconn: 1024, b: , c: 1.0}",
    "sysctls as a list": "sysctls: [a=1, b, c=]",
    "logging": "logging: {driver: x, options: {a: 1, b: ~, c: 1.50, d: x}}",
    "numbers of exposed ports": "expose: [0x50, 81.0, 010, '0x10', 1e4]",
    "logging of nothing": "logging: {}",
    "healthcheck": """
        healthcheck: {test: "curl -f x || exit 1", interval: 1h0m0.5s, timeout: 0s, retries: 0,
          start_period: 1000ms, start_interval: 100us, disable: false}
        """,
    "healthcheck as a list": "healthcheck: {test: [CMD, a, ''], retries: 2.0}",
    "healthcheck of an empty line": "healthcheck: {test: ''}",
    "healthcheck of none": "healthcheck: {test: [NONE]}",
    "healthcheck off": "healthcheck: {disable: true}",
    "healthcheck of nothing": "healthcheck: {}",
    "stop at once": "stop_grace_period: 0s",
    "durations": "stop_grace_period: 1.5h",
    "short durations": "stop_grace_period: 0.0000015s",
    "fractions of durations": "stop_grace_period: .5s",
    "long durations": "stop_grace_period: 100000h1m0.001s",
    "ulimits": "ulimits: {nofile: 5, nproc: {soft: 1, hard: 2}, core: 0, as: {soft: 0, hard: 0}, cpu: -1}",
    "networks as a list": "networks: [b, a]",
    "networks as a map": """
        networks: {b: , a: {aliases: [x, y], ipv4_address: 10.0.0.4, ipv6_address: "::4",
          driver_opts: {a: 1, b: x}}, c: {}}
        """,
    "secrets": "secrets: [a, {source: b}, {source: c, target: d, uid: '1', gid: '2', mode: 0440}]",
    "configs": "configs: [a, {source: c, mode: 0}, {source: d, target: /e, mode: 288}]",
    "ports": """
        ports: ["80", "8080:80", "127.0.0.1:81:81", "90-92:90-92", 53:53/udp, 9000, "9-11",
          {target: 5}, {target: 5, published: 6, mode: host, protocol: udp}, "[::1]:8:8", ":7:7",
          "1000-1002:80", "12:12/TCP", "13:13/sctp", "98-102:98-102", 22:22, "0:14",
          "127.0.0.1::15", "0.0.0.0:16-17:16-17", "3000-3001/udp"]
        """,
    "ports twice": "ports: ['80:80', '080:80']",
    "no ports": "ports: []",
    "ranges of ports": 'ports: ["3001-3005", "9090-9091:8080-8081", "127.0.0.1:5000-5010:5000-5010"]',
    "of another container": 'network_mode: "container:0cfe"\nipc: "service:x"\npid: "container:y"',
    "volumes": r"""
        volumes:
          - /anonymous
          - data:/data
          - data:/ro:ro
          - data:/copy:nocopy,ro
          - .:/here
          - ./:/here/too
          - ./rel:/rel:rw
          - ./rel/:/slash
          - ../up:/up
          - .hidden:/hidden
          - /abs:/abs:ro,rslave
          - /abs/../up/:/unclean
          - //a//b:/double
          - ~:/home
          - ~/dir:/dir
          - ./labelled:/labelled:ro,z
          - ./shared:/shared:cached
          - ./more:/more:ro,delegated
          - named:/labelled/too:Z
          - 'C:\data:/windows'
          - 'C:\data:D:\data:ro'
          - 'C:\data:D:\data:ro'
          - ./a b:/a b
          - ${EMPTY:-./x}:/filled
        """,
    "long volumes": """
        volumes:
          - {type: bind, source: ./a, target: /b, read_only: false, bind: {}}
          - {type: bind, source: ~/q, target: /z, consistency: cached, bind: {propagation: shared}}
          - {type: bind, source: /r, target: /r, bind: {create_host_path: true}}
          - {type: volume, source: v, target: /c, volume: {nocopy: false}}
          - {type: volume, source: v, target: /n, read_only: true, volume: {nocopy: true}}
          - {type: volume, target: /nul}
          - {type: volume, source: v, target: /l, volume: {labels: [a=b, c]}}
          - {type: tmpfs, target: /d, tmpfs: {size: 0}}
          - {type: tmpfs, target: /e, tmpfs: {size: 100}}
          - {type: tmpfs, target: /f}
          - {type: npipe, source: a, target: b}
          - {type: cluster, source: x, target: /y}
        """,
    "interpolated": """
        image: "${IMAGE:-reg/img}:${TAG-1}"
        deploy: {replicas: "${N}", update_config: {parallelism: "$N", max_failure_ratio: "${RATIO}"},
          resources: {limits: {memory: "$SIZE", cpus: "${RATIO}"}}}
        tty: "$YES"
        read_only: "$OFF"
        ulimits: {nofile: "$N", nproc: {soft: "$N", hard: "${N}0"}}
        ports: ["${PORT}:80", {target: "$N", published: "$PORT"}]
        healthcheck: {retries: "$N", disable: "$OFF"}
        secrets: [{source: a, target: "$SET"}]
        environment: {A: "$N", B: "$YES", C: "${UNSET:-}", D: "${EMPTY-x}", E: "${EMPTY:-x}"}
        volumes: [{type: volume, source: v, target: /v, read_only: "$YES", volume: {nocopy: "$YES"}}]
        labels: {"$SET": "$SET"}
        """,
    "own keys": "x-foo: {b: 1, a: [1, 2.0, ~, yes, 1e3, 017, 2001-01-01]}\nx-a: 5\nx-n: ~",
    "what Docker forgets": "oom_score_adj: 5",
}
# Whole files. A list is several, merged.
FILES: dict[str, list[str]] = {
    "no services": ["services: {}"],
    "nothing at all": ["x-a: 1"],
    "version 3": ["version: '3'\nservices: {a: {image: x}}"],
    "version 3.0": ["version: '3.0'\nservices: {a: {image: x}}"],
    "version 3.8": ["version: '3.8'\nservices: {a: {image: x}}\nnetworks: {}\nvolumes: {}"],
    "an empty version": ["version: ''\nservices: {a: {image: x}}"],
    "networks": [
        """
        networks:
          a:
          b: {}
          c: {external: true}
          d: {external: true, name: q}
          e: {external: {name: z}}
          f: {external: false}
          g: {name: n, driver: overlay, driver_opts: {a: 1, b: x}, internal: true,
            attachable: false, labels: [a=b, c], x-foo: 1,
            ipam: {driver: d, config: [{subnet: 10.1.0.0/24}, {}]}}
          h: {ipam: {}}
          i: {external: true, x-y: 2}
          j: {external: "$YES", internal: "$OFF"}
          k: {external: true, driver: overlay, attachable: true}
        """
    ],
    "volumes": [
        """
        volumes:
          a:
          b: {}
          c: {external: true}
          d: {external: true, name: q}
          e: {external: {name: z}}
          g: {name: n, driver: local, driver_opts: {a: 1, b: x}, labels: [a=b, c], x-foo: 1}
          i: {external: true, x-y: 2}
          j: {x-cluster-spec: {group: g, access_mode: {scope: single, mount_volume: {}},
            accessibility_requirements: {requisite: [{segments: [region=R1, zone=Z1]}],
              preferred: [{segments: {region: R1, zone: 2}}]},
            secrets: [{key: k, secret: s}],
            capacity_range: {required_bytes: 1G, limit_bytes: 2G}, availability: active}}
          k: {x-cluster-spec: {}}
        """
    ],
    "secrets": [
        """
        secrets:
          a: {file: ./x}
          b: {file: /a/../x}
          c: {external: true}
          d: {external: {name: q}}
          e: {name: n, file: "${SET}", labels: {a: 1}}
          f: {driver: d, driver_opts: {a: 1}}
          g: {file: x, template_driver: golang, x-a: 1}
          h: {}
          i: {external: false}
          j: {file: "$UNSET", name: j}
          k: {driver: ""}
        """
    ],
    "configs": [
        """
        configs:
          a: {file: ./x}
          c: {external: true}
          d: {external: {name: q}}
          e: {name: n, file: ../x, labels: [a=1]}
          g: {file: x, template_driver: golang, x-a: 1}
          h: {}
        """
    ],
    "own keys": [
        """
        x-map: {b: 1, a: [1.0, 1e3, 0x1f, ~, true, "yes", yes, 1_000, 12345678901234567890]}
        x-time: [2001-01-01, 2001-01-01 10:00:00, 2001-01-01T10:00:00.5+02:00, "2001-01-01"]
        x-text: ["a\\nb", "  x", "- a", "#x", "a: b", "é\\t", "", "1:30", 1:30]
        x-filled: ["$SET", "$$", "${UNSET:-d}"]
        x-empty: [{}, [], null]
        """
    ],
    "anchors and merge keys": [
        """
        x-base: &base {image: x, environment: &env {A: 1, B: 2}, x-more: 1}
        services:
          a: *base
          b:
            <<: *base
            environment: {<<: *env, B: 3}
          c: {<<: [{user: u}, *base], image: y}
        """
    ],
    "two files": [
        """
        services:
          a: {image: x, environment: {A: 1, B: 2}, labels: [l=1], command: a b, hostname: one,
            ports: ["80:80", "81:81", "900:9"], dns: [1.1.1.1], deploy: {replicas: 2, labels: {x: 1},
              placement: {constraints: [node.role == worker]}},
            volumes: [/z:/z, /b:/y], secrets: [z, b], configs: [{source: b, target: /c}],
            cap_add: [A], healthcheck: {test: a, timeout: 1s}, ulimits: {nofile: 5},
            logging: {driver: l, options: {x: 1}}, networks: [n], sysctls: {a: 1},
            x-a: {b: 1, c: [1]}}
          b: {image: y}
        networks: {n: {driver: overlay}}
        secrets: {z: {file: ./a, labels: {a: b}}, b: {external: true}}
        x-a: 1
        """,
        """
        services:
          a: {image: z, environment: [B=3, C], labels: {l: 2, m: 3}, command: [c], user: u,
            ports: ["80:8080", "82:82"], dns: [1.1.1.1, 8.8.8.8], deploy: {replicas: 0, labels: {y: 2},
              placement: {constraints: [node.role == worker, a==b]}},
            volumes: [/c:/y:ro], secrets: [{source: b, target: q}], configs: [a],
            cap_add: [A, B], healthcheck: {interval: 5s}, ulimits: {nofile: {soft: 1, hard: 2}},
            logging: {options: {y: 2}}, networks: {n: {aliases: [q]}, m: }, sysctls: [b=2],
            x-a: {b: 2, c: [2], d: 1}}
          c: {image: y}
        networks: {m: {external: true}}
        secrets: {z: {external: true}}
        x-a: 2
        x-b: 1
        """,
    ],
    "the lists of a service that stands twice are sorted": [
        "services: {a: {image: x, ports: ['900:9', '80:8'], volumes: [/z:/z, /b:/b], secrets: [z, a]}}",
        "services: {a: {hostname: h}}",
    ],
    "the lists that only the later file has stay in its order": [
        "services: {a: {image: x}, b: {image: x, ports: [], secrets: []}}",
        """
        services:
          a: &a {ports: ['900:9', '80:8'], volumes: [/z:/z, /b:/b], secrets: [z, a], configs: [z, a]}
          b: *a
        """,
    ],
    "lists of three files": [
        "services: {a: {image: x}}",
        "services: {a: {ports: ['900:9', '80:8'], secrets: [z, a]}}",
        "services: {a: {ports: ['70:7']}}",
    ],
    "another log driver": [
        "services: {a: {image: x, logging: {driver: l, options: {x: 1}}}}",
        "services: {a: {logging: {driver: m}}}",
    ],
    "an external secret replaces a file": [
        "services: {}\nsecrets: {s: {file: ./x, labels: {a: b}}}",
        "services: {}\nsecrets: {s: {external: true, name: prod}}",
    ],
    "a file of variables over variables": [
        "services: {a: {image: x, environment: {A: 1, Z: 2}}}",
        "services: {a: {env_file: vars.env}}",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("up") / "stack"
    found.mkdir()
    (found / "content").write_text("hello\n")
    (found / "vars.env").write_text("# comment\nA=1\nB='q'\nC\nSET\nD=x=y # z\n\nE=\n")
    (found / "more.env").write_text("A=2\nNEW=1\n")
    (found / "dir").mkdir()
    return found


def write(folder: Path, name: str, texts: list[str]) -> list[Path]:
    paths = [folder / f"{name}.{index}.yml" for index in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(textwrap.dedent(text))
    return paths


def stack_config(paths: list[Path], *options: str) -> Any:
    """What `docker stack config` prints, parsed."""
    named = [word for path in paths for word in ("-c", str(path))]
    done = docker("stack", "config", *named, *options, environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    return read(done.stdout)


def read(text: str) -> Any:
    """YAML as gopkg.in/yaml.v3 types it: Docker prints what Python's reader refuses (`=`)."""
    report = Report()
    root = parse(Source("printed", text), report)
    report.check()
    assert root is not None
    return plain(root)


def ours(paths: list[Path], **options: bool) -> Any:
    """What swarmctl prints, parsed."""
    normal = normal_form([str(path) for path in paths], environment=ENVIRONMENT, **options)  # type: ignore[arg-type]  # bool options
    return read(dump(normal.document))


def different(docker: Any, mine: Any, path: str = "") -> list[str]:
    """Where two documents differ, types included."""
    if isinstance(docker, dict) and isinstance(mine, dict):
        found = [f"{path}.{key}: only in one" for key in docker.keys() ^ mine.keys()]
        for key in docker.keys() & mine.keys():
            found += different(docker[key], mine[key], f"{path}.{key}")
        return found
    if isinstance(docker, list) and isinstance(mine, list) and len(docker) == len(mine):
        pairs = enumerate(zip(docker, mine, strict=True))
        return [d for i, (a, b) in pairs for d in different(a, b, f"{path}.{i}")]
    if type(docker) is type(mine) and docker == mine:
        return []
    return [f"{path}: Docker has {docker!r}, we have {mine!r}"]


def _service_name(name: str) -> str:
    return name.replace(" ", "-").lower()


@pytest.fixture(scope="module")
def services(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The services of the table as Docker prints them, and as we do."""
    text = "services:\n"
    for name, lines in SERVICES.items():
        body = textwrap.dedent(lines).strip("\n")
        if not any(line.startswith("image:") for line in body.splitlines()):
            body = f"image: x\n{body}"
        text += f"  {_service_name(name)}:\n{textwrap.indent(body, '    ')}\n"
    paths = write(folder, "services", [text])
    printed = stack_config(paths)
    return printed["services"], ours(paths)["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_printed_as_docker_prints_it(
    name: str, services: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    docker, mine = (each[_service_name(name)] for each in services)
    assert not different(docker, mine)


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_printed_as_docker_prints_it(name: str, folder: Path) -> None:
    paths = write(folder, _service_name(name), FILES[name])
    printed = stack_config(paths)
    assert not different(printed, ours(paths))


def test_variables_stay_where_docker_leaves_them(folder: Path) -> None:
    text = """
        services:
          a:
            image: x$$y:${TAG:-1}
            hostname: $HOME
            command: "$$HOME ${X:-d}"
            environment: {A: "$SET", SET: }
            env_file: vars.env
            labels: {$A: $HOME}
            volumes: ["./$A:/b", "$A/x:/y"]
            deploy: {replicas: 3}
        networks: {n: {name: '$HOME'}}
        secrets: {s: {file: "./$X"}}
        x-a: $HOME
        """
    paths = write(folder, "literal", [text])
    printed = stack_config(paths, "--skip-interpolation")
    assert not different(printed, ours(paths, interpolate=False))


@given(document=documents)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_file_is_printed_as_docker_prints_it(document: dict[str, Any], folder: Path) -> None:
    path = folder / "any.yml"
    path.write_text(dump(document))
    printed = stack_config([path])
    assert not different(printed, ours([path]))


@given(first=documents, second=documents)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_files_of_different_services_are_merged_as_docker_merges_them(
    first: dict[str, Any], second: dict[str, Any], folder: Path
) -> None:
    second["services"] = {f"second-{name}": each for name, each in second["services"].items()}
    paths = [folder / "first.yml", folder / "second.yml"]
    paths[0].write_text(dump(first))
    paths[1].write_text(dump({"services": second["services"]}))
    printed = stack_config(paths)
    assert not different(printed, ours(paths))


# Where the specification says how files merge and Docker does otherwise, the specification counts.
# Each line: the first file's service, the second's, a key, what Docker prints and what we print.
APART = [
    ("tty: true", "tty: false", "tty", True, None),
    ("init: true", "init: false", "init", True, False),
    ("hostname: a", "hostname: ''", "hostname", "a", None),
    ("environment: {A: 1}", "environment: {A: ''}", "environment", {"A": "1"}, {"A": ""}),
    ("command: a", "command: []", "command", ["a"], None),
    (
        "healthcheck: {test: a}",
        "healthcheck: {test: [CMD, b]}",
        "healthcheck",
        {"test": ["CMD-SHELL", "a", "CMD", "b"]},
        {"test": ["CMD", "b"]},
    ),
    (
        "networks: {n: {aliases: [a]}}",
        "networks: {n: {aliases: [b]}}",
        "networks",
        {"n": {"aliases": ["b"]}},
        {"n": {"aliases": ["a", "b"]}},
    ),
    ("stop_grace_period: 1s", "stop_grace_period: 0s", "stop_grace_period", "1s", "0s"),
]


@pytest.mark.parametrize(("first", "second", "key", "docker", "mine"), APART)
def test_merging_follows_the_specification_where_docker_does_not(
    first: str, second: str, key: str, docker: object, mine: object, folder: Path
) -> None:
    texts = [f"services:\n  a:\n    image: x\n    {lines}\n" for lines in (first, second)]
    paths = write(folder, "apart", texts)
    printed = stack_config(paths)
    assert printed["services"]["a"].get(key) == docker
    assert ours(paths)["services"]["a"].get(key) == mine
