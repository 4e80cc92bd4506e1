"""What is wrong is found in its place, explained, and told all at once."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from cli.compose import ComposeError, Problem, load
from swarm import errors
from tests.unit.compose.helpers import document, loaded, marked, problems

WEB = "services:\n  web:\n    image: busybox\n"

# A text with § where the problem is, what the message says, and what the hint says.
BAD = [
    # the file
    ("§", "the file is empty", "add services:"),
    ("# only a comment§\n", None, None),
    ("§- a\n", "the file is not a mapping", "begins with services:"),
    ("§just text\n", "the file is not a mapping", ""),
    ("§web:\n  image: busybox\n", "looks like a version 1 file", "services: at the top"),
    (f"{WEB}§servces: {{}}\n", 'unknown key "servces"', 'did you mean "services"?'),
    (f"{WEB}§image: x\n", 'unknown key "image" at the top level', "belongs under a service"),
    (f"version: §'4'\n{WEB}", '"4" is not a version', "remove the line"),
    (f"version: §'3.x'\n{WEB}", '"3.x" is not a version', ""),
    ("§version: '3'\n", "there are no services", "add services:"),
    ("services:\n  web:\n    image: a\n  §web:\n    image: b\n", "a second time", "join"),
    ("services:\n  web:\n  §  image\n", None, None),
    (f"{WEB}networks: §[front]\n", "networks: must be a mapping", "NAME:"),
    (f"§{WEB}".replace("services", "x-services"), "there are no services", ""),
    ("services:\n  §my web: {image: a}\n", "cannot be the name of a service", "a-z"),
    (f"services:\n  §{'a' * 61}: {{image: a}}\n", "has 64 characters", "shorten"),
    # a service as a whole
    ("services:\n  web: §nginx\n", "must be a mapping", "key: value"),
    ("services:\n  web:§\n", None, None),
    ("services:\n  web: §{ports: ['80']}\n", "image is missing", "add image: NAME:TAG"),
    (f"{WEB}    §imge: x\n", 'unknown key "imge"', 'did you mean "image"?'),
    ("services: {web: {§imge: x}}", 'unknown key "imge"', 'did you mean "image"?'),
    ("services: {web: {extends: §wbe2}, web2: {image: x}}", 'no service "wbe2"', '"web2"?'),
    ("services: {web: {extends: {service: a, file: §no.yml}}}", "no such file", "the path"),
    (f"{WEB}    §replicas: 3\n", 'unknown key "replicas"', '"replicas" belongs under deploy'),
    (f"{WEB}    §limits: {{}}\n", 'unknown key "limits"', "deploy.resources"),
    (f"{WEB}    §Environment: {{}}\n", 'unknown key "Environment"', '"environment"?'),
    (f"{WEB}    §wibble: 1\n", 'unknown key "wibble"', "begin the key with x-"),
    (f"{WEB}    §build: .\n", '"build" is not supported', "build and push the image first"),
    ("services: {web: {§build: .}}", '"build" is not supported', "build and push the image first"),
    (f"{WEB}    container_name: §'a b'\n", '"a b" cannot be a name', "use a-z"),
    (f"{WEB}    container_name: §b\n  b: {{image: b}}\n", 'means the service "b"', "another name"),
    (f"{WEB}    links: [§a]\n", 'there is no service "a"', "name a service"),
    (f"{WEB}    links: [§web]\n", "cannot be linked to itself", "remove"),
    (f"{WEB}    links: [§'b:']\n  b: {{image: b}}\n", "no alias follows", "b:ALIAS"),
    (
        f"{WEB}    links: [§b]\n  b: {{image: b, networks: [n]}}\nnetworks: {{n: }}\n",
        "on no network together",
        "one network",
    ),
    (
        f"{WEB}    links: [§'b:c']\n  b: {{image: b}}\n  c: {{image: c}}\n",
        'the name "c" means the service "c"',
        "another alias",
    ),
    (
        f"{WEB}    ports: ['80:80']\n  b: {{image: b, ports: [§'80:8080']}}\n",
        'published by the service "web" too',
        "elsewhere",
    ),
    # scalars
    ("services: {web: {image: §''}}", "must not be empty", ""),
    ("services: {web: {image: §[a]}}", "must be a string, not a list", ""),
    ("services: {web: {image: §Nginx}}", "lower case", "nginx"),
    ("services: {web: {image: §'a b'}}", "not an image name", "nginx:1.27"),
    ("services: {web: {image: §'a:'}}", "not an image name", ""),
    (f"{WEB}    tty: §maybe\n", "must be true or false", ""),
    (f'{WEB}    tty: §"may\\nbe\\e"\n', 'not "may\\nbe\\x1b"', ""),
    (f"{WEB}    hostname: §true\n", "must be a string", 'write "true" in quotes'),
    (f"{WEB}    stop_grace_period: §tens\n", "is not a duration", ""),
    (f"{WEB}    stop_grace_period: §10\n", "10 has no unit", "write 10s"),
    (f"{WEB}    stop_signal: §SIGTREM\n", "is not a signal", "SIGTERM"),
    (f"{WEB}    shm_size: §5Q\n", "is not a size", ""),
    (f"{WEB}    oom_score_adj: §2000\n", "from -1000 to 1000", ""),
    (f"{WEB}    mac_address: §12:34\n", "is not a MAC address", ""),
    (f"{WEB}    restart: §sometimes\n", "must be no, always", "deploy.restart_policy"),
    (f"{WEB}    pull_policy: §sometime\n", "must be always, missing", ""),
    (f"{WEB}    pull_policy: §build\n", "does not build", "push"),
    (f"{WEB}    ipc: §service:db\n", "tasks share no namespaces", "one image"),
    (f"{WEB}    network_mode: §bride\n", "must be host or none", ""),
    (f"{WEB}    security_opt: [§secomp=x]\n", "is not a security option", "seccomp="),
    (f"{WEB}    platform: §linux/\n", "is not a platform", "linux/amd64"),
    # lists and maps
    (f"{WEB}    command: §{{a: b}}\n", "must be a string or a list", ""),
    (f"{WEB}    command: §echo 'a\n", "cannot be split", "close the quote"),
    (f"{WEB}    ports: §'80:80'\n", "must be a list", '- "8080:80"'),
    (f"{WEB}    ports:§\n", None, None),
    (f"{WEB}    ports: [§99999]\n", "99999 is not from 1 to 65535", "8080:80"),
    (f"{WEB}    ports: [§'80:http']\n", "'http' is not a number", "8080:80"),
    (f"{WEB}    ports: [§{{published: 80}}]\n", "target is missing", "target: 80"),
    (f"{WEB}    ports: [{{target: 80, mode: §hots}}]\n", "must be ingress or host", '"host"?'),
    (f"{WEB}    ports: [{{target: 80, §publish: 80}}]\n", '"publish"', '"published"?'),
    (f"{WEB}    ports: [{{target: §-1}}]\n", "from 1 to 65535", ""),
    (f"{WEB}    ports: ['80:80', §'80:81']\n", "published twice", "elsewhere"),
    (f"{WEB}    environment: §A=b\n", "a list of NAME=value", ""),
    (f"{WEB}    environment: [§A: b]\n", "must be a string, not a mapping", "A=value"),
    (f"{WEB}    environment: [§=b]\n", "a name is missing", "NAME=value"),
    (f"{WEB}    environment: {{A: §[b]}}\n", "must be a string or a number", ""),
    (f"{WEB}    extra_hosts: [§nohost]\n", "is not a host and its address", "10.0.0.1"),
    (f"{WEB}    ulimits: {{nofile: §many}}\n", "must be a whole number", ""),
    (f"{WEB}    ulimits: {{nofile: §{{soft: 9, hard: 3}}}}\n", "above the hard limit", ""),
    (f"{WEB}    healthcheck: {{test: §[curl, x]}}\n", "must begin with NONE, CMD", "[CMD,"),
    (f"{WEB}    healthcheck: {{§intervall: 5s}}\n", '"intervall"', '"interval"?'),
    (f"{WEB}    healthcheck: {{interval: §5}}\n", "5 has no unit", "write 5s"),
    (f"{WEB}    healthcheck: {{test: x, §disable: true}}\n", "exclude each other", ""),
    (f"{WEB}    devices: [§snd]\n", "is not a device", "/dev/NAME"),
    (f"{WEB}    env_file: §./no-such.env\n", "no such file: /nonexistent/no-such.env", "required"),
    # volumes
    (f"{WEB}    volumes: [§data:/data]\n", 'the volume "data" is not declared', "volumes:"),
    (f"{WEB}    volumes: ['/a:/b:§rx']\n".replace("'/a:/b:§rx'", "§'/a:/b:rx'"), '"rx" is not', ""),
    (f"{WEB}    volumes: [§a:b:c:d:e]\n", "is not a volume", "SOURCE:TARGET"),
    (f"{WEB}    volumes: [/a:/t, §/b:/t]\n", "mounted at /t already", ""),
    (f"{WEB}    volumes: [{{type: §bnid, source: /a, target: /b}}]\n", "volume, bind", '"bind"?'),
    (f"{WEB}    volumes: [§{{type: bind, target: /b}}]\n", "needs a source", ""),
    (f"{WEB}    volumes: [{{type: tmpfs, §source: /a, target: /b}}]\n", "no source", ""),
    (f"{WEB}    volumes: [§{{source: /a, target: /b}}]\n", "type is missing", "bind"),
    (f"{WEB}    volumes: [/a:rel§]\n".replace("/a:rel§", "§/a:rel"), "not an absolute path", ""),
    (f"{WEB}    tmpfs: §/x:sise=3\n", '"sise=3" is not known', "size="),
    (f"{WEB}    volumes: [§'C:\\a:/b']\n", "a path of Windows", ""),
    (f"{WEB}    volumes: [§'c:/a:/b:ro']\n", "a path of Windows", ""),
    (f"{WEB}    volumes: [§'~other/x:/b']\n", "only ~ itself", "whole path"),
    (f"{WEB}    volumes: [§'~/x:/b']\n", "HOME is not set", "whole path"),
    (f"{WEB}    volumes: [§'/a:/b:roz']\n", '"roz" is not known', "did you mean ro,z?"),
    (f"{WEB}    volumes: [/a:/t, §/b:/t/]\n", "mounted at /t already", ""),
    (f"{WEB}    volumes: [§'/a:/']\n", "root itself", ""),
    (f"{WEB}    volumes: [{{type: §npipe, source: a, target: /b}}]\n", "named pipes", ""),
    (f"{WEB}    volumes: [{{type: volume, source: §/a, target: /b}}]\n", "is a path", "bind"),
    (f"{WEB}    volumes: [§./b]\n", "not an absolute path", "write /b"),
    (f"{WEB}    volumes: [§.]\n", "not an absolute path", "write /PATH"),
    (f"{WEB}    volumes: [§'C:\\a:/b']\n", "a path of Windows", "write /PATH"),
    # networks, secrets, configs
    (f"{WEB}    networks: [§frnt]\nnetworks: {{front: }}\n", "not declared", '"front"?'),
    (f"{WEB}    secrets: [§key]\n", 'the secret "key" is not declared', "secrets:"),
    (f"{WEB}    configs: [{{source: §c}}]\n", 'the config "c" is not declared', "configs:"),
    (f"{WEB}secrets: {{key: {{file: §./nope}}}}\n", "no such file: /nonexistent/nope", ""),
    (f"{WEB}secrets: {{key: §{{}}}}\n", "it has no content", "file: PATH"),
    (f"{WEB}secrets: {{key: {{file: §''}}}}\n", "must not be empty", ""),
    (f"{WEB}secrets: {{key: {{environment: §NOPE}}}}\n", "NOPE is not set", "NOPE=..."),
    (f"{WEB}secrets: {{key: {{content: §''}}}}\n", "the secret is empty", "one byte"),
    (f"{WEB}configs: {{c: §{{file: a, content: b}}}}\n", "file and content exclude", ""),
    (f"{WEB}configs: {{c: {{external: true, §file: a}}}}\n", "no effect on an external", ""),
    (f"{WEB}configs: {{§-c: 1}}\n".replace("§-c: 1", "-c: §{content: a}"), None, None),
    (f"{WEB}networks: {{a: {{§drivr: x}}}}\n", '"drivr"', '"driver"?'),
    (f"{WEB}networks: {{b: §{{external: true, name: bridge}}}}\n", "cannot join", "overlay"),
    (f"{WEB}networks: {{a: {{ipam: {{config: [{{subnet: §10.1}}]}}}}}}\n", "not a subnet", "/24"),
    (
        f"{WEB}networks: {{a: {{ipam: {{config: [{{subnet: 10.0.0.0/24, gateway: §10.1.0.1}}]}}}}}}\n",
        "not inside the subnet",
        "",
    ),
    (f"{WEB}    secrets: [a, §a]\nsecrets: {{a: {{content: x}}}}\n", "stands at", "another"),
    (
        f"{WEB}    secrets: [{{source: a, uid: §root}}]\nsecrets: {{a: {{content: x}}}}\n",
        '"root" is not a number',
        "",
    ),
    (
        f"{WEB}    configs: [{{source: a, target: §../x}}]\nconfigs: {{a: {{content: x}}}}\n",
        "holds no ..",
        "",
    ),
    (f"{WEB}secrets: {{a: {{driver: §vault}}}}\n", "not offered", "external"),
    (f"{WEB}networks: {{a: {{driver: §macvlan}}}}\n", "not offered", "overlay"),
    (f"{WEB}networks: {{a: {{name: §host}}}}\n", "every engine has", "external"),
    (f"{WEB}networks: {{a: {{enable_ipv6: §true}}}}\n", "needs an IPv6 subnet", "subnet"),
    (f"{WEB}networks: {{a: {{enable_ipv4: §false}}}}\n", "needs IPv6", ""),
    (f"{WEB}networks: {{a: {{ipam: {{driver: §x}}}}}}\n", "not offered", "default"),
    (f"{WEB}networks: {{a: {{ipam: {{config: [§{{gateway: 10.0.0.1}}]}}}}}}\n", "subnet is", ""),
    (
        f"{WEB}networks: {{a: {{ipam: {{config: [{{subnet: 10.0.0.0/8}}, "
        "{§subnet: 10.1.0.0/16}]}}}\n",
        "overlaps",
        "another",
    ),
    (f"{WEB}    networks: {{default: {{ipv4_address: §10.0.0}}}}\n", "not an IPv4 address", ""),
    (f"{WEB}    networks: {{default: {{ipv6_address: §10.0.0.1}}}}\n", "not an IPv6 address", ""),
    # the container
    (f"{WEB}    dns: §localhost\n", "not an IP address", "1.1.1.1"),
    (f"{WEB}    extra_hosts: [§'a:b']\n", '"b" is not an IP address', "10.0.0.1"),
    (f"{WEB}    extra_hosts: [§'a b:1']\n", "not a host and its address", "10.0.0.1"),
    (f"{WEB}    working_dir: §app\n", "not an absolute path", "/app"),
    (f"{WEB}    stop_signal: §SIGTREM\n", "not a signal", "SIGTERM"),
    (f"{WEB}    stop_signal: §²\n", "not a signal", ""),
    (f"{WEB}    ulimits: {{§nofiles: 5}}\n", 'no limit "nofiles"', '"nofile"'),
    (f"{WEB}    healthcheck: {{interval: §10us}}\n", "too short", "1ms"),
    (f"{WEB}    restart: §on-failure:²\n", "must be no, always", ""),
    ("services: {web: {image: §https://a.example/b}}", "is a URL", "a.example/b"),
    ("services: {web: {image: §a//b}}", "not an image name", ""),
    ("services: {web: {image: §-a}}", "not an image name", ""),
    ("services: {web: {image: §'a:b:c'}}", "not an image name", ""),
    (f"{WEB}    ports: [§'80:80/sctp']\n", "not balanced", "mode: host"),
    (
        f"{WEB}    ports: [§'80:80']\n    deploy: {{endpoint_mode: dnsrr}}\n",
        "dnsrr has no ports",
        "mode: host",
    ),
    (f"{WEB}    ports: [§'80:80']\n    deploy: {{mode: global-job}}\n", "a job publishes", ""),
    (f"{WEB}    restart: §always\n    deploy: {{mode: replicated-job}}\n", "a job ends", ""),
    (
        f"{WEB}    deploy: {{mode: replicated-job, restart_policy: {{condition: §any}}}}\n",
        "a job ends",
        "on-failure",
    ),
    (f"{WEB}    deploy: {{mode: global-job, update_config: §{{order: stop-first}}}}\n", "job", ""),
    (
        f"{WEB}    deploy: {{mode: global, placement: {{max_replicas_per_node: §1}}}}\n",
        "once on each node",
        "remove",
    ),
    (
        f"{WEB}    deploy: {{placement: {{preferences: [{{spread: §zone}}]}}}}\n",
        "unknown key 'zone'",
        "node.labels",
    ),
    (f"{WEB}    platform: §linux/\n", "not a platform", "linux/amd64"),
    (f"{WEB}    pull_policy: §every_12h\n", "not pulled by the clock", "deploy again"),
    (f"{WEB}    pull_policy: §build\n", "does not build", "push"),
    # aliases
    (
        f"x-a: &a [b]\n{WEB}    hostname: §*a\n",
        "must be a string, not a list (the value of &a in line 1)",
        "",
    ),
    (f"x-a: &a ${{NO_SUCH:?}}\n{WEB}    hostname: *a\n".replace("$", "§$"), "NO_SUCH", ""),
    (
        f"x-a: &a {{hostname: §[b]}}\n{WEB}    <<: *a\n  two: {{<<: *a, image: b}}\n",
        "services.web.hostname: must be a string, not a list (the same for services.two.hostname)",
        "",
    ),
    # variables
    (f"{WEB}    command: >\n      a\n      §${{B!}}\n      c\n", "'${B!}': '!' cannot follow", ""),
    (f"{WEB}    command: |\n      a\n      §${{B!}}\n      c\n", "'${B!}': '!' cannot follow", ""),
    ("services: {web: {image: §'$NO_SUCH'}}", "empty (the variable NO_SUCH is not set)", ""),
    (
        f"{WEB}    ports: [§'${{NO_SUCH}}:${{NOR_THIS}}']\n",
        "(the variables NO_SUCH and NOR_THIS are not set)",
        "",
    ),
    (
        f"x-a: &a ${{NO_SUCH}}s\n{WEB}    stop_grace_period: §*a\n",
        "(the variable NO_SUCH is not set)",
        "",
    ),
    # other places
    (f"include: [§'https://a.example/b.yml']\n{WEB}", "not fetched", "local file"),
    (f"{WEB}    extends: {{service: a, file: §'git@a:b'}}\n", "not fetched", ""),
    # deploy
    (f"{WEB}    deploy: {{replicas: §many}}\n", "must be a whole number", "replicas: 3"),
    (f"{WEB}    deploy: {{replicas: §-1}}\n", "from 0 to", ""),
    (f"{WEB}    deploy: {{replicas: §2.5}}\n", "must be a whole number", ""),
    (f"{WEB}    deploy: {{mode: §swarmy}}\n", "replicated-job or global-job", ""),
    (f"{WEB}    deploy: {{mode: global, replicas: §2}}\n", "no number of replicas", "remove"),
    (f"{WEB}    deploy: {{§replica: 2}}\n", '"replica"', '"replicas"?'),
    (f"{WEB}    deploy: {{§image: 2}}\n", '"image"', "belongs under a service"),
    (f"{WEB}    deploy: {{endpoint_mode: §dns}}\n", "must be vip or dnsrr", ""),
    (f"{WEB}    deploy: {{resources: {{limits: {{cpus: §abc}}}}}}\n", "not a number of CPUs", ""),
    (f"{WEB}    deploy: {{resources: {{limits: {{cpus: §-1}}}}}}\n", "not a number of CPUs", ""),
    (f"{WEB}    deploy: {{resources: {{limits: {{cpus: §0.0001}}}}}}\n", "less than 0.001", ""),
    (f"{WEB}    deploy: {{resources: {{limits: {{memory: §1M}}}}}}\n", "less than 4 MiB", "64M"),
    (f"{WEB}    deploy: {{resources: {{limits: {{memory: §5Q}}}}}}\n", "is not a size", ""),
    (
        f"{WEB}    deploy: {{resources: {{limits: {{cpus: 1}}, reservations: {{cpus: §2}}}}}}\n",
        "above the limit",
        "raise the limit",
    ),
    (
        f"{WEB}    deploy: {{resources: {{reservations: {{generic_resources: [§{{gpu: 1}}]}}}}}}\n".replace(
            "§{gpu", "{§gpu"
        ),
        'unknown key "gpu"',
        "discrete_resource_spec",
    ),
    (
        f"{WEB}    deploy: {{resources: {{reservations: {{devices: [§{{count: 1}}]}}}}}}\n",
        "capabilities is missing",
        "[gpu]",
    ),
    (
        f"{WEB}    deploy: {{resources: {{reservations: {{devices: [{{§count: 1, device_ids: ['0'],"
        " capabilities: [gpu]}]}}}\n",
        "exclude each other",
        "",
    ),
    (f"{WEB}    deploy: {{restart_policy: {{condition: §always}}}}\n", "of `restart`", "any"),
    (f"{WEB}    deploy: {{restart_policy: {{condition: §on-fail}}}}\n", "must be", "on-failure"),
    (f"{WEB}    deploy: {{restart_policy: {{delay: §5}}}}\n", "5 has no unit", "5s"),
    (f"{WEB}    deploy: {{update_config: {{order: §first}}}}\n", "stop-first or start-first", ""),
    (f"{WEB}    deploy: {{update_config: {{delay: §10}}}}\n", "10 has no unit", "10s"),
    (f"{WEB}    deploy: {{update_config: {{max_failure_ratio: §2}}}}\n", "from 0 to 1", ""),
    (f"{WEB}    deploy: {{rollback_config: {{failure_action: §rollback}}}}\n", "pause or", ""),
    (
        f"{WEB}    deploy: {{placement: {{constraints: [§node.role=manager]}}}}\n",
        "expected one operator of ==, !=, in (A, B)",
        "did you mean node.role == manager?",
    ),
    (f"{WEB}    deploy: {{placement: {{constraints: [§a == b]}}}}\n", "unknown key 'a'", ""),
    (
        f"{WEB}    deploy: {{placement: {{constraints: [§node.role == x]}}}}\n",
        "manager or worker",
        "",
    ),
    (f"{WEB}    deploy: {{placement: {{constraints: §node.role == x}}}}\n", "a list", "- "),
    (
        f"{WEB}    deploy: {{placement: {{constraints: [§node.gpu.memory > big]}}}}\n",
        "constraint 'node.gpu.memory > big': 'big' is not a size",
        "such as 512M",
    ),
    (
        f"{WEB}    deploy: {{placement: {{constraints: [§'node.id =~ (a']}}}}\n",
        "not a regular expression: a ( is not closed",
        "",
    ),
    (
        f"{WEB}    deploy: {{placement: {{constraints: [§node.id in (a, node.id == b]}}}}\n",
        "a list stands in parentheses",
        "put quotes around it",
    ),
    (
        f"{WEB}    deploy: {{placement: {{preferences: [{{affinity: §node.zone == a}}]}}}}\n",
        "affinity 'node.zone == a': unknown key 'node.zone'",
        "accepted are",
    ),
    (
        f"{WEB}    deploy: {{placement: {{preferences: [{{spread: node.id, §affinity: x}}]}}}}\n",
        "exclude each other",
        "two preferences",
    ),
    (
        f"{WEB}    deploy: {{placement: {{preferences: [{{spread: node.id, weight: §3}}]}}}}\n",
        "only an affinity has a weight",
        "order",
    ),
    (
        f"{WEB}    deploy:\n      placement:\n        preferences:\n"
        "          - {affinity: node.id == a, weight: §101}\n",
        "must be a whole number from -100 to 100",
        "",
    ),
    (
        f"{WEB}    deploy:\n      placement:\n        preferences:\n"
        "          - {affinity: node.id == a, weight: §0}\n",
        "says nothing",
        "1 to 100",
    ),
    (f"{WEB}    deploy: {{placement: {{strategy: §binpak}}}}\n", "binpak", "binpack"),
    (f"{WEB}    deploy: {{placement: {{preferences: [{{§sprad: a}}]}}}}\n", "", '"spread"?'),
    # together
    (f"{WEB}    mem_limit: §64M\n    deploy: {{resources: {{limits: {{memory: 32M}}}}}}\n", "", ""),
    (f"{WEB}    scale: §2\n    deploy: {{replicas: 3}}\n", "scale is 2", "remove scale"),
    (f"{WEB}    network_mode: none\n    ports: §['80']\n", "cannot be published", "remove"),
    (f"{WEB}    network_mode: host\n    §networks: [a]\nnetworks: {{a: }}\n", "cannot be", ""),
    (f"{WEB}    depends_on: [§wbe2]\n  web2: {{image: a}}\n", "no service", '"web2"?'),
    (f"{WEB}    depends_on: [§web]\n", "cannot wait for itself", ""),
    (f"{WEB}    depends_on: {{b: {{condition: §healthy}}}}\n  b: {{image: a}}\n", "must be", ""),
    (
        "services:\n  a: {image: x, depends_on: [b]}\n  b: {image: x, depends_on: [c]}\n"
        "  c: {image: x, depends_on: [§a]}\n",
        "a -> b -> c -> a",
        "remove one",
    ),
    (f"{WEB}    extends: §other\n", 'no service "other"', ""),
    (f"{WEB}    extends: §{{service: web}}\n", "in a circle: web -> web", ""),
    (f"{WEB}    extends: {{service: a, file: §no.yml}}\n", "no such file", ""),
    (f"include: [§nope.yml]\n{WEB}", "no such file: /nonexistent/nope.yml", ""),
    ("services: {web: §{runtime: process}}", "needs a command", "command: [program"),
    ("services: {web: {runtime: process, command: a, §pull_policy: never}}", "docker runtime", ""),
]
_CHECKED = [case for case in BAD if case[1] is not None]


def test_there_are_enough_cases() -> None:
    assert len(_CHECKED) >= 60


@pytest.mark.parametrize(("text", "message", "hint"), _CHECKED, ids=lambda v: str(v)[:40])
def test_a_mistake_is_found_in_its_place(text: str, message: str, hint: str) -> None:
    clean, line, column = marked(text)
    error = problems(clean)
    found = [(p.line, p.column, p.message, p.hint) for p in error.problems]
    assert len(found) == 1, error.message
    assert found[0][:2] == (line, column), error.message
    assert message in found[0][2]
    assert hint in found[0][3]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    error = problems(
        """
        services:
          web:
            imge: nginx
            ports: ["99999"]
            deploy:
              replicas: -1
              mode: swarmy
          db:
            image: postgres
            networks: [nope]
            secrets: [key]
        """
    )
    lines = [problem.line for problem in error.problems]
    assert lines == [4, 5, 7, 8, 11, 12]
    assert lines == sorted(lines)


def test_the_message_shows_the_line_with_a_caret_and_what_to_do() -> None:
    error = problems(document("imge: nginx"))
    assert error.message == (
        'stdin:4:5: services.web: unknown key "imge"\n'
        "    4 |     imge: nginx\n"
        "      |     ^\n"
        '      did you mean "image"?'
    )
    assert isinstance(error, errors.Invalid)
    assert str(error) == error.message


def test_a_long_line_is_cut_around_its_problem() -> None:
    keys = ", ".join(f"x-k{i}: aaaaaaaa" for i in range(100))
    error = problems(f"services: {{web: {{image: a, {keys}, imge: b}}}}")
    shown, caret = error.message.splitlines()[1:3]
    assert len(shown) < 120
    assert shown[caret.index("^") :].startswith("imge")


def test_more_problems_than_a_terminal_shows_are_counted() -> None:
    error = problems("services:\n" + "".join(f"  s{i}: {{imge: a}}\n" for i in range(120)))
    assert len(error.problems) == 120
    assert error.message.endswith("and 70 more problems")


def test_a_bad_stack_name_is_refused() -> None:
    with pytest.raises(errors.Invalid, match='"My Stack" cannot be the name of a stack'):
        load(["-"], stack="My Stack", environment={}, stdin=WEB)


def test_no_file_is_refused() -> None:
    with pytest.raises(errors.Invalid, match="no compose file is given"):
        load([], stack="st", environment={})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.mkdir(), "is a folder"),
        (lambda p: p.write_bytes(b"services:\n  web: \xff\n"), "0xff is not valid UTF-8"),
    ],
    ids=["missing", "folder", "bytes"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "compose.yml"
    assert callable(make)
    make(path)
    with pytest.raises(ComposeError) as caught:
        load([str(path)], stack="st", environment={})
    assert message in caught.value.message
    assert caught.value.problems[0].file == str(path)


def test_bytes_that_are_no_text_have_a_place(tmp_path: Path) -> None:
    path = tmp_path / "compose.yml"
    path.write_bytes(b"services:\n  web: \xff\n")
    with pytest.raises(ComposeError) as caught:
        load([str(path)], stack="st", environment={})
    assert (caught.value.problems[0].line, caught.value.problems[0].column) == (2, 8)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_mistake(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "compose.yml"
    path.write_bytes(WEB.encode(encoding))
    assert load([str(path)], stack="st", environment={}).spec.services[0].name == "st_web"


@pytest.mark.parametrize(("kind", "limit"), [("secret", 512_000), ("config", 1_024_000)])
def test_content_may_reach_its_limit_and_not_pass_it(tmp_path: Path, kind: str, limit: int) -> None:
    path = tmp_path / "data"
    text = f"{WEB}{kind}s: {{a: {{file: {path}}}}}\n"
    path.write_bytes(b"x" * limit)
    assert loaded(text)
    path.write_bytes(b"x" * (limit + 1))
    assert f"the {kind} is larger than" in problems(text).message


# ------------------------------------------------------------------ mutations

GOOD = (Path(__file__).parent / "data" / "good.yml").read_text()
_WORDS = [
    "services",
    "&a",
    "*a",
    "<<",
    "'",
    '"',
    "{",
    "}",
    "[",
    "]",
    ": ",
    "- ",
    "\t",
    "${",
    "$$",
    "!!int",
    "|",
    ">",
    "#",
    "~",
    "-1",
    "9" * 30,
    "true",
    "\u2028",
    "%",
    "@",
    "image",
    "null",
]


def mutated(seed: int) -> str:
    """The good file with one to four changes."""
    rng = random.Random(seed)
    text = GOOD
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        position = rng.randrange(max(len(text), 1))
        match rng.randrange(8):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, lines[rng.randrange(len(lines))])
            case 2:
                lines[at] = " " * rng.randint(0, 8) + lines[at].lstrip()
            case 3:
                lines = lines[:at] or [""]
            case 4:
                words = lines[at].split(" ")
                words[rng.randrange(len(words))] = rng.choice(_WORDS)
                lines[at] = " ".join(words)
            case 5:
                other = rng.randrange(len(lines))
                lines[at], lines[other] = lines[other], lines[at]
            case 6:
                lines = (text[:position] + rng.choice(_WORDS) + text[position:]).split("\n")
            case _:
                lines = (text[:position] + text[position + rng.randint(1, 30) :]).split("\n")
        text = "\n".join(lines)
    return text


def test_the_good_file_loads() -> None:
    found = loaded(GOOD)
    assert len(found.spec.services) == 4
    assert found.warnings == ()


@pytest.mark.parametrize("seed", range(300))
def test_a_damaged_file_loads_or_says_where_it_is_wrong(seed: int) -> None:
    text = mutated(seed)
    found: tuple[Problem, ...] = ()
    try:
        loaded(text)
    except ComposeError as error:
        found = error.problems
        assert re.search(r":\d+:\d+: ", error.message)  # noqa: PT017 - either outcome is right
    lines = text.splitlines() or [""]
    for problem in found:
        assert problem.message
        assert 1 <= problem.line <= len(lines) + 1, problem
        assert problem.column >= 1
