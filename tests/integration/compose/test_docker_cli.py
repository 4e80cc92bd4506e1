"""The loader against the docker CLI: the same files, the same objects.

`docker stack deploy` talks to an engine that only keeps what it is sent, so no engine is needed;
the CLI is (28 or later: older ones read YAML 1.1 booleans and have no `stack config`).
"""

from __future__ import annotations

import base64
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from cli.compose import ComposeError, load
from swarm.v1 import NetworkSpec, StackSpec
from tests.integration.compose.fake_engine import deploy, docker, docker_is_missing
from tests.unit.compose.docker_json import docker_service, pruned

EXTERNAL = ("shared", "key", "settings")


_MISSING = docker_is_missing()
pytestmark = pytest.mark.skipif(bool(_MISSING), reason=_MISSING or "-")

# Files that Docker takes. Where the loader honours a key that Docker drops, the key is not here.
TAKEN = {
    "smallest": "services: {web: {image: busybox}}",
    "no services": "version: '3'\nservices: {}\n",
    "commands": """
        services:
          a: {image: x, command: echo 'a b' "c d" e\\ f, entrypoint: /bin/sh -c}
          b: {image: x, command: [echo, "a b"], entrypoint: []}
          c: {image: x, command: "", entrypoint: ""}
        """,
    "environment": """
        services:
          a:
            image: x:1
            environment: {B: , C: 1.0, E: 1e6, F: 0o17, G: 017, H: 1_000, A: yes, I: 1e22,
              J: 12:30, K: 0x1f, L: 1234567.0, M: 1e-7, N: 100000000000000000000000, O: "",
              P: 1.10, Q: -0, R: +5, S: .5, T: 08, U: 1., V: "1.0", W: 0b11, X: ~}
          b: {image: x, environment: [Z=1, Y=, X, "A=b c", SET, D=$SET, "E=$$SET"]}
          c: {image: x, labels: {a: 1, b: , c: 2.50}, deploy: {labels: [x=1, y]}}
        """,
    "service keys": """
        services:
          a:
            image: reg:5000/team/app
            hostname: "{{.Node.Hostname}}-{{.Task.Slot}}"
            user: "0:0"
            working_dir: /w
            init: true
            tty: true
            stdin_open: true
            read_only: true
            stop_signal: SIGINT
            stop_grace_period: 1m30s
            dns: [1.1.1.1, 8.8.8.8]
            dns_search: example.com
            extra_hosts: ["b:1.2.3.4", "a=::1", "c:[::2]"]
            sysctls: {net.core.somaxconn: 1024, net.ipv4.tcp_syncookies: 0}
            ulimits: {nproc: 65535, nofile: {soft: 20000, hard: 40000}}
            cap_add: [net_admin, CAP_SYS_ADMIN, NET_ADMIN]
            cap_drop: [ALL, chown]
            logging: {driver: json-file, options: {max-size: 10m, max-file: 3}}
            isolation: default
            credential_spec: {file: a.json}
            labels: [a=b]
          b: {image: "x@sha256:4bcff63911fcb4448bd4fdacec207030997caf25e9bea4045fa6c8c44de311d1",
              cap_add: [ALL, CHOWN], cap_drop: [CHOWN], extra_hosts: {z: 1.1.1.1, y: 2.2.2.2}}
        """,
    "healthcheck": """
        services:
          a: {image: x, healthcheck: {test: "curl -f x || exit 1", interval: 1.5s, timeout: 500ms,
              retries: 3, start_period: 1h2m3s, start_interval: 2s}}
          b: {image: x, healthcheck: {test: [CMD, a, b]}}
          c: {image: x, healthcheck: {disable: true}}
          d: {image: x, healthcheck: {test: [NONE]}}
          e: {image: x, healthcheck: {interval: 5s}}
        """,
    "ports": """
        services:
          a: {image: x, ports: ["80", "8080:81", 9000, "53:53/udp", "7000-7002:7000-7002", "90-91",
              {target: 99, published: 99, mode: host, protocol: udp}, {target: 100}]}
          b: {image: x, ports: ["6000:6000", "6000:6000/udp"]}
          c: {image: x, ports: [{target: 1, published: 6001, mode: host}], deploy: {endpoint_mode: dnsrr}}
        """,
    "volumes": """
        services:
          a:
            image: x
            volumes:
              - /anon
              - data:/data:ro
              - labelled:/l
              - real:/r
              - out:/o:nocopy
              - ./rel:/rel:rw
              - /abs:/abs:ro,rslave
              - ../up:/up
              - {type: bind, source: ./b, target: /b, read_only: true, consistency: cached}
              - {type: bind, source: /p, target: /p, bind: {propagation: rshared}}
              - {type: volume, source: data, target: /v, volume: {nocopy: true}}
              - {type: volume, target: /w}
              - {type: tmpfs, target: /t, tmpfs: {size: 1048576}}
              - {type: tmpfs, target: /u}
        volumes:
          data:
          labelled: {driver: nfs, driver_opts: {a: 1, b: "x"}, labels: [k=v]}
          real: {name: the-real-name}
          out: {external: true, name: outside}
        """,
    "networks": """
        services:
          a: {image: x, networks: [front, shared, back]}
          b: {image: x, networks: {front: {aliases: [y, z]}, back: , named: {aliases: []}}}
          c: {image: x}
        networks:
          front: {driver: overlay, driver_opts: {encrypted: "true"}, attachable: true}
          back: {internal: true, labels: {k: v}, ipam: {driver: default,
            config: [{subnet: 10.9.0.0/24}]}}
          named: {name: real-name}
          shared: {external: true}
          unused: {}
        """,
    "default network": """
        services: {a: {image: x}, b: {image: x, networks: [default]}}
        networks: {default: {driver: bridge, name: mine}}
        """,
    "secrets and configs": """
        services:
          a:
            image: x
            secrets: [s, {source: key, target: /k, uid: "1", gid: "2", mode: 0440}]
            configs: [{source: c, target: /etc/c, mode: 0400}, settings]
        secrets: {s: {file: ./content, labels: {a: b}}, key: {external: true},
          unused: {file: content, name: other-name}}
        configs: {c: {file: ./content}, settings: {external: true}}
        """,
    "deploy": """
        services:
          a:
            image: x
            deploy:
              mode: replicated
              replicas: 6
              labels: {a: b}
              endpoint_mode: vip
              resources:
                limits: {cpus: "0.001", memory: 50M, pids: 100}
                reservations: {cpus: "0.0010", memory: 20mb,
                  generic_resources: [{discrete_resource_spec: {kind: gpu, value: 2}}]}
              restart_policy: {condition: on-failure, delay: 5s, max_attempts: 3, window: 120s}
              placement:
                constraints: [node.role==manager, "node.labels.a != b"]
                preferences: [{spread: node.labels.zone}, {spread: node.labels.rack}]
                max_replicas_per_node: 5
              update_config: {parallelism: 3, delay: 10s, failure_action: rollback, monitor: 60s,
                max_failure_ratio: 0.3, order: start-first}
              rollback_config: {parallelism: 0, order: stop-first, failure_action: continue}
          b: {image: x, deploy: {mode: global, update_config: {}, restart_policy: {}}}
          c: {image: x, deploy: {mode: replicated-job, replicas: 4}}
          d: {image: x, deploy: {mode: global-job}}
          e: {image: x, deploy: {replicas: 0, resources: {}, placement: {}}}
          f: {image: x, deploy: }
        """,
    "anchors and merge keys": """
        x-base: &base {image: x, environment: &env {A: 1, B: 2}, x-more: 1}
        x-log: &log {driver: none}
        services:
          a: *base
          b:
            <<: *base
            logging: *log
            environment: {<<: *env, B: 3}
          c: {<<: [*base], image: y, x-own: [1]}
        """,
    "interpolation": """
        services:
          a:
            image: "${IMAGE}:${TAG:-latest}"
            command: [a, "$$x", "${UNSET-}", "${EMPTY:-d}", "${EMPTY-d}", "$SET.x", "${SET}y"]
            labels: {a: "${SET:?must be set}"}
            deploy: {replicas: "${N}"}
            ports: ["${P}:80"]
        """,
}
ENVIRONMENT = {"SET": "s", "EMPTY": "", "N": "3", "P": "8081", "IMAGE": "reg/img"}


def write(folder: Path, *texts: str) -> list[Path]:
    (folder / "content").write_text("hello\n")
    files = []
    for index, text in enumerate(texts):
        path = folder / f"{index}.yml"
        path.write_text(textwrap.dedent(text))
        files.append(path)
    return files


def normal(body: dict[str, Any]) -> dict[str, Any]:
    """A captured body with the defaults that the engine fills in."""
    for port in body.get("EndpointSpec", {}).get("Ports", ()):
        port.setdefault("Protocol", "tcp")
        port.setdefault("PublishMode", "ingress")
    found: dict[str, Any] = pruned(body)
    return found


def ours(files: list[Path]) -> StackSpec:
    return load([str(f) for f in files], stack="st", environment=ENVIRONMENT).spec


def network(spec: NetworkSpec) -> dict[str, Any]:
    driver, ipam = spec.driver, spec.ipam
    assert driver is not None
    return {
        "Name": spec.name,
        "Labels": spec.labels,
        "Driver": driver.name,
        "Options": driver.options,
        "Internal": spec.internal,
        "Attachable": spec.attachable,
        "IPAM": {
            "Driver": ipam.driver.name if ipam.driver else "",
            "Config": [{"Subnet": c.subnet} for c in ipam.configs],
        }
        if ipam is not None
        else None,
    }


def assert_same(files: list[Path]) -> None:
    sent = deploy(files, environment=ENVIRONMENT, external=EXTERNAL)
    assert sent.code == 0, sent.error
    found = ours(files)
    services = {s.name: pruned(docker_service(s)) for s in found.services}
    assert services == {k: normal(v) for k, v in sent.named("services").items()}
    networks = {n.name: pruned(network(n)) for n in found.networks}
    assert networks == {k: pruned(v) for k, v in sent.named("networks").items()}
    for kind, specs in (("secrets", found.secrets), ("configs", found.configs)):
        data = {s.name: (s.data, s.labels) for s in specs}
        assert data == {
            name: (base64.b64decode(body["Data"]), body["Labels"])
            for name, body in sent.named(kind).items()
        }


@pytest.mark.parametrize("name", TAKEN)
def test_a_file_becomes_what_docker_sends(tmp_path: Path, name: str) -> None:
    assert_same(write(tmp_path, TAKEN[name]))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("hostname: a\nuser: u", "hostname: b"),
        ("environment: {A: 1, B: 2}", "environment: [B=3, C=4]"),
        ("labels: {a: 1}\ndeploy: {labels: {x: 1}}", "labels: [b=2]\ndeploy: {labels: {y: 2}}"),
        ("command: a b", "command: [c]"),
        ("entrypoint: [a, b]", "entrypoint: c"),
        ("ports: ['80:80', '81:81']", "ports: ['80:8080', '82:82']"),
        ("volumes: ['/a:/x', '/b:/y']", "volumes: ['/c:/x', '/d:/z']"),
        ("dns: [1.1.1.1]", "dns: [8.8.8.8]"),
        ("cap_add: [CHOWN]", "cap_add: [KILL]"),
        ("deploy: {replicas: 2, mode: replicated}", "deploy: {replicas: 3}"),
        (
            "deploy: {resources: {limits: {cpus: '1', memory: 64M}}}",
            "deploy: {resources: {limits: {memory: 128M}, reservations: {cpus: '0.5'}}}",
        ),
        (
            "deploy: {placement: {constraints: [node.role == worker]}}",
            "deploy: {placement: {constraints: [node.labels.a == b]}}",
        ),
        (
            "deploy: {restart_policy: {condition: any, delay: 1s}}",
            "deploy: {restart_policy: {condition: none}}",
        ),
        (
            "deploy: {update_config: {parallelism: 2, delay: 1s}}",
            "deploy: {update_config: {order: start-first}}",
        ),
        ("logging: {driver: a, options: {x: 1}}", "logging: {driver: a, options: {y: 2}}"),
        ("logging: {driver: a, options: {x: 1}}", "logging: {driver: b, options: {y: 2}}"),
        ("logging: {driver: a, options: {x: 1}}", "logging: {options: {y: 2}}"),
        ("ulimits: {nofile: 5, nproc: 6}", "ulimits: {nofile: {soft: 1, hard: 2}}"),
        ("sysctls: {a.b: 1, c.d: 1}", "sysctls: {a.b: 2}"),
        ("healthcheck: {test: a, timeout: 1s}", "healthcheck: {interval: 5s}"),
        ("networks: {n: {aliases: [a]}}", "networks: [m]"),
        ("secrets: [key]", "secrets: [{source: key, target: t}, s]"),
        ("stop_grace_period: 5s\ntty: true", "stop_grace_period: 6s"),
    ],
    ids=lambda v: v.replace("\n", "; ")[:40],
)
def test_two_files_merge_as_docker_merges_them(tmp_path: Path, first: str, second: str) -> None:
    top = """
networks: {n: {attachable: true}, m: }
secrets: {key: {external: true}, s: {file: ./content}}
"""
    texts = [
        "version: '3.9'\nservices:\n  a:\n    image: x\n" + textwrap.indent(text, "    ")
        for text in (first, second)
    ]
    assert_same(write(tmp_path, texts[0] + top, texts[1]))


SCALARS = [
    *("a", "yes", "No", "on", "true", "True", "TRUE", "tRUE", "null", "~", "Null", "0", "00", "07"),
    *(
        "08",
        "0o7",
        "0o8",
        "0x",
        "0xg",
        "0xFF",
        "0b1",
        "0b2",
        "1_0",
        "_1",
        "1__0",
        "1e3",
        "1e",
        "1E5",
    ),
    *("e5", ".5", "5.", ".", "..", "1.2.3", "-1", "--1", "+1", "- 1"[:1] + "x", "-0", "-.5", "1.0"),
    *("1.10", "100.0", "1e-3", "1e-5", "123456.0", "1234567.0", "0.1", ".in", "-.Nan"),
    *("12:30", "1:2:3", "190:20:30", "22:22", "2001-12-14x", "9223372036854775807"),
    *(
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775808",
    ),
    *("1e400"[:3], "0.30000000000000004", "3.141592653589793", "1e21", "1e20", "0777", "-0777"),
]


def test_every_scalar_reads_as_docker_reads_it(tmp_path: Path) -> None:
    lines = "".join(f"      V{i}: {text}\n" for i, text in enumerate(SCALARS))
    text = f"services:\n  a:\n    image: x\n    labels:\n{lines}"
    files = write(tmp_path, text.replace("TRUE", "'TRUE'"))
    # Docker takes no booleans as labels; what a boolean is, the refusal tells.
    refused = [i for i, s in enumerate(SCALARS) if _is_boolean(tmp_path, s)]
    assert [SCALARS[i] for i in refused] == ["true", "True", "TRUE"]
    kept = [line for i, line in enumerate(lines.splitlines()) if i not in refused]
    files = write(tmp_path, "services:\n  a:\n    image: x\n    labels:\n" + "\n".join(kept))
    assert_same(files)


def _is_boolean(folder: Path, scalar: str) -> bool:
    if scalar.lower() not in ("true", "yes", "no", "on"):
        return False
    path = folder / "boolean.yml"
    path.write_text(f"services: {{a: {{image: x, tty: {scalar}}}}}")
    return docker("stack", "config", "-c", str(path), environment={}).returncode == 0


# Files that Docker refuses as well.
REFUSED = {
    "empty": "",
    "list": "- a",
    "indentation": "services:\n  a:\n  image: x\n   b: y",
    "tab": "services:\n\ta: {image: x}",
    "twice": "services:\n  a: {image: x}\n  a: {image: y}",
    "merge twice": "x: &x {a: b}\nservices: {a: {<<: *x, <<: *x, image: y}}",
    "no anchor": "services: {a: *x}",
    "number as key": "services: {a: {image: x, labels: {1: b}}}",
    "unknown key": "services: {a: {image: x, foo: 1}}",
    "unknown top-level key": "servces: {a: {image: x}}",
    "version 4": "version: '4'\nservices: {a: {image: x}}",
    "replicas of words": "services: {a: {image: x, deploy: {replicas: many}}}",
    "negative replicas": "services: {a: {image: x, deploy: {replicas: -1}}}",
    "half a replica": "services: {a: {image: x, deploy: {replicas: 1.5}}}",
    "cpus": "services: {a: {image: x, deploy: {resources: {limits: {cpus: abc}}}}}",
    "memory": "services: {a: {image: x, deploy: {resources: {limits: {memory: 5Q}}}}}",
    "duration": "services: {a: {image: x, stop_grace_period: tens}}",
    "port": "services: {a: {image: x, ports: ['99999']}}",
    "port word": "services: {a: {image: x, ports: [http]}}",
    "port range": "services: {a: {image: x, ports: ['1-3:80-81']}}",
    "service": "services: {a: nginx}",
    "null service": "services: {a: }",
    "image list": "services: {a: {image: [x]}}",
    "network list": "services: {a: {image: x}}\nnetworks: [n]",
    "ports string": "services: {a: {image: x, ports: '80'}}",
    "update order": "services: {a: {image: x, deploy: {update_config: {order: first}}}}",
    "bare dollar": "services: {a: {image: 'x$'}}",
    "open brace": "services: {a: {image: '${X'}}",
    "required": "services: {a: {image: '${UNSET:?say why}'}}",
    "required, empty": "services: {a: {image: '${EMPTY:?say why}'}}",
    "undefined volume": "services: {a: {image: x, volumes: ['data:/d']}}",
    "unknown in network": "services: {a: {image: x}}\nnetworks: {n: {foo: 1}}",
    "links_to": "services: {a: {image: x, links_to: 1}}",
    "healthcheck key": "services: {a: {image: x, healthcheck: {intervall: 1s}}}",
    "env file": "services: {a: {image: x, env_file: nope.env}}",
    "command map": "services: {a: {image: x, command: {a: b}}}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_docker_refuses_is_refused(tmp_path: Path, name: str) -> None:
    files = write(tmp_path, REFUSED[name])
    sent = deploy(files, environment=ENVIRONMENT, external=EXTERNAL)
    assert sent.code != 0
    with pytest.raises(ComposeError) as caught:
        ours(files)
    for problem in caught.value.problems:
        assert problem.line >= 1
        assert problem.hint or problem.message


@pytest.mark.parametrize("name", TAKEN)
def test_what_config_prints_loads_to_the_same(tmp_path: Path, name: str) -> None:
    """Docker's own normal form of a file is a file that means the same."""
    files = write(tmp_path, TAKEN[name])
    done = docker("stack", "config", "-c", str(files[0]), environment=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    printed = tmp_path / "printed.yml"
    printed.write_text(done.stdout.replace("$", "$$"))  # which Docker forgets
    first, second = ours(files), ours([printed])

    def comparable(spec: StackSpec) -> dict[str, Any]:
        return {s.name: json.loads(json.dumps(pruned(docker_service(s)))) for s in spec.services}

    assert comparable(first) == comparable(second)
