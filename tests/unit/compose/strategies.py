"""Compose files for property tests: legal ones, that both the docker CLI and the loader take."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

Strategy = st.SearchStrategy[Any]

NAMES = ("alpha", "beta", "gamma")
words = st.sampled_from(
    ("a", "b-c", "D_e", "x.y", "0", "yes", "no", "~", "null", "1e3", "0o17", "017", "12:30", "1.0")
)
# Whatever may stand in a string; readers of YAML stumble over some of these.
texts = st.one_of(
    words,
    st.sampled_from(
        (
            "",
            " ",
            "a b",
            "- a",
            "a: b",
            "#x",
            "x #y",
            "{{.Task.Slot}}",
            "$$HOME",
            "$${A:-b}",
            "ünï",
            "\U0001f600",
            "a\nb",
            " a\n\n b\n",
            "\t",
            "2001-01-01",
            "2001-01-01 10:00:00",
            "=",
            "<<",
            "&a",
            "*a",
            "!x",
            "%x",
            "@x",
            "`x`",
            "'",
            '"',
            "\\n",
            "0x1f",
            "+1",
            ".5",
            ".inf",
            "1_000",
            "0b11",
            "\u2028",
            "\x85",
            "a" * 200,
        )
    ),
    st.text(
        st.characters(codec="utf-8", exclude_characters="$\x00", exclude_categories=("Cs", "Cc")),
        max_size=8,
    ),
)
plain_values: Strategy = st.one_of(
    texts, st.integers(-(10**12), 10**12), st.none(), st.sampled_from((0.5, 1e-7, 123456.75, 1e21))
)
durations = st.sampled_from(("0s", "1s", "90s", "1.5h", "100ms", "2m30s", "1h", "1us", "0.5s"))
sizes = st.sampled_from(("64M", "1g", "512mb", "104857600", "1.5GiB", "200000k"))
ports = st.integers(1, 65535)
paths = st.sampled_from(("/data", "/var/lib/x", "/etc/a b", "/q"))


def _some(required: dict[str, Strategy], **optional: Strategy) -> Strategy:
    """The required keys, and some of the others: a few, or generating takes longer than testing."""
    chosen = (
        st.lists(st.sampled_from(sorted(optional)), max_size=5, unique=True)
        if optional
        else st.just([])
    )
    return chosen.flatmap(
        lambda names: st.fixed_dictionaries({**required, **{n: optional[n] for n in names}})
    )


def _unique(each: Strategy, most: int = 3) -> Strategy:
    return st.lists(each, max_size=most, unique_by=repr)


def _maps(values: Strategy) -> Strategy:
    """A mapping, or what says the same as a list."""
    as_map = st.dictionaries(words, values, max_size=4)
    as_list = _unique(st.one_of(words, st.builds("{}={}".format, words, texts)))
    return st.one_of(as_map, as_list)


update = _some(
    {},
    parallelism=st.integers(0, 5),
    delay=durations,
    failure_action=st.sampled_from(("continue", "pause")),
    monitor=st.sampled_from(("1s", "90s")),  # 0s is not in Docker's form
    max_failure_ratio=st.sampled_from((0, 0.1, 0.25, 1, 0.333)),
    order=st.sampled_from(("start-first", "stop-first")),
)
deploy = _some(
    {},
    mode=st.just("replicated"),
    replicas=st.integers(0, 5),
    labels=_maps(plain_values),
    endpoint_mode=st.just("vip"),
    update_config=update,
    rollback_config=update,
    restart_policy=_some(
        {},
        condition=st.sampled_from(("none", "on-failure", "any")),
        delay=durations,
        max_attempts=st.integers(0, 3),
        window=durations,
    ),
    placement=_some(
        {},
        constraints=_unique(st.sampled_from(("node.role == manager", "node.labels.a!=b"))),
        preferences=_unique(_some({"spread": st.sampled_from(("node.labels.a", "node.labels.b"))})),
        max_replicas_per_node=st.integers(0, 3),
    ),
    resources=_some(
        {},
        limits=_some({}, memory=sizes, pids=st.integers(0, 100)),
        reservations=_some({}, cpus=st.sampled_from(("0.5", "1", "2.25"))),
    ),
)
mounts = st.one_of(
    st.builds("{}:{}".format, st.sampled_from((".", "./x", "../y", "/z", "~/w", "data")), paths),
    st.builds("{}:{}:{}".format, st.just("data"), paths, st.sampled_from(("ro", "rw", "nocopy"))),
    paths,
    _some(
        {"type": st.just("bind"), "source": st.just("./l"), "target": paths},
        read_only=st.booleans(),
        bind=_some({}, propagation=st.just("rslave")),
    ),
    _some({"type": st.just("tmpfs"), "target": paths}, tmpfs=_some({}, size=st.integers(0, 10**9))),
    _some(
        {"type": st.just("volume"), "source": st.just("data"), "target": paths},
        volume=_some({}, nocopy=st.booleans()),
    ),
)


def _target(mount: Any) -> str:
    """Where a mount is mounted."""
    if isinstance(mount, dict):
        return str(mount["target"])
    return str(next(part for part in reversed(mount.split(":")) if part.startswith("/")))


published = st.one_of(
    ports,
    st.builds("{}:{}".format, ports, ports),
    st.builds("127.0.0.1:{}:{}/udp".format, ports, ports),
    _some(
        {"target": ports},
        published=ports,
        mode=st.sampled_from(("host", "ingress")),
        protocol=st.sampled_from(("tcp", "udp")),
    ),
)


def _published(port: Any) -> object:
    if isinstance(port, dict):
        return port.get("published", repr(port))
    return int(port.split(":")[-2]) if isinstance(port, str) else f"target {port}"


def _source(reference: Any) -> str:
    return str(reference["source"]) if isinstance(reference, dict) else str(reference)


references = st.lists(
    st.one_of(
        st.sampled_from(("one", "two")),
        _some(
            {"source": st.just("three")},
            target=paths,
            uid=st.just("1"),
            gid=st.just("0"),
            mode=st.sampled_from((0o440, 0o400, 0)),
        ),
    ),
    max_size=3,
    unique_by=_source,
)
service: Strategy = _some(
    {"image": st.sampled_from(("nginx", "reg:5000/a/b:1.0", "x:latest"))},
    cap_add=_unique(st.sampled_from(("NET_ADMIN", "CHOWN"))),
    command=st.one_of(st.sampled_from(("a 'b c'", 'x "y z"  w', "")), st.lists(texts, max_size=3)),
    entrypoint=st.one_of(st.just("/bin/sh -c"), st.lists(words, max_size=2)),
    configs=references,
    secrets=references,
    depends_on=st.just([]),
    deploy=deploy,
    dns=st.one_of(st.just("1.1.1.1"), _unique(st.sampled_from(("8.8.8.8", "9.9.9.9")))),
    dns_search=_unique(words),
    environment=_maps(plain_values),
    extra_hosts=_unique(st.sampled_from(("a:1.1.1.1", "b=::1", "c:host-gateway"))),
    hostname=st.just("h"),
    healthcheck=_some(
        {"test": st.one_of(st.just("curl -f x || exit 1"), st.just(["CMD", "a", ""]))},
        interval=st.sampled_from(("5s", "1m30s")),
        timeout=st.just("2s"),
        retries=st.integers(0, 5),
        start_period=st.just("1h"),
        start_interval=st.just("500ms"),
    ),
    init=st.booleans(),
    labels=_maps(plain_values),
    logging=_some({"driver": st.just("json-file")}, options=st.dictionaries(words, texts)),
    networks=st.one_of(
        st.sampled_from((["front"], ["back", "front"])),
        st.dictionaries(
            st.sampled_from(("front", "back")),
            st.one_of(st.none(), _some({}, aliases=_unique(st.sampled_from(("y", "z"))))),
            min_size=1,
        ),
    ),
    ports=st.lists(published, max_size=3, unique_by=_published),
    read_only=st.booleans(),
    stdin_open=st.booleans(),
    stop_grace_period=durations,
    stop_signal=st.just("SIGINT"),
    sysctls=_maps(st.integers(0, 9)),
    tty=st.booleans(),
    ulimits=st.dictionaries(
        st.sampled_from(("nofile", "nproc")),
        st.one_of(st.integers(1, 9), st.just({"soft": 1, "hard": 5})),
    ),
    user=st.sampled_from(("0", "1000:1000", "root")),
    volumes=st.lists(mounts, max_size=4, unique_by=_target),
    working_dir=paths,
)
# Where a file has one of these, the docker CLI does not take it.
beyond_docker: Strategy = _some(
    {},
    cgroup_parent=st.just("m"),
    gpus=st.sampled_from(("all", 2)),
    mem_reservation=sizes,
    oom_score_adj=st.integers(-5, 5),
    tmpfs=st.just(["/run:size=1m", "/tmp"]),
    group_add=st.just([0, "a"]),
    devices=_unique(st.sampled_from(("/dev/a:/dev/b", "/dev/c", "nvidia.com/gpu=0"))),
    shm_size=sizes,
)


def _objects(**more: Strategy) -> Strategy:
    own = _some({}, name=st.sampled_from(("n1", "n2")), labels=_maps(plain_values), **more)
    return st.one_of(own, _some({"external": st.just(True)}, name=st.just("outside")))


def _files() -> Strategy:
    return st.one_of(
        _some(
            {"file": st.sampled_from(("./content", "content"))},
            labels=_maps(plain_values),
            template_driver=st.just("golang"),
        ),
        _some({"external": st.just(True)}),
    )


def _three(each: Strategy) -> Strategy:
    return st.fixed_dictionaries({"one": each, "two": each, "three": each})


extensions = st.dictionaries(
    st.sampled_from(("x-a", "x-b")),
    st.one_of(
        plain_values, _unique(plain_values), st.dictionaries(words, plain_values, max_size=2)
    ),
    max_size=2,
)


def _document(parts: tuple[Any, Any, Any, Any, Any, Any, Any]) -> dict[str, Any]:
    services, front, back, data, secrets, configs, own = parts
    for name in sorted(services)[1:]:  # or two services publish the same port
        services[name].pop("ports", None)
    return {
        "services": services,
        "networks": {"front": front, "back": back},
        "volumes": {"data": data},
        "secrets": secrets,
        "configs": configs,
        **own,
    }


def _documents(each: Strategy) -> Strategy:
    network = _objects(
        driver=st.just("overlay"),
        driver_opts=st.dictionaries(words, texts),
        internal=st.booleans(),
        attachable=st.booleans(),
    )
    volume = _objects(driver=st.just("local"), driver_opts=st.dictionaries(words, texts))
    return st.tuples(
        st.dictionaries(st.sampled_from(NAMES), each, min_size=1, max_size=2),
        network,
        st.one_of(st.none(), st.just({})),
        st.one_of(st.none(), volume),
        _three(_files()),
        _three(_files()),
        extensions,
    ).map(_document)


documents: Strategy = _documents(service)
full_documents: Strategy = _documents(
    st.tuples(service, beyond_docker).map(lambda both: {**both[0], **both[1]})
)
