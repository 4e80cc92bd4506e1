"""What engines and registries say, word by word, and what it amounts to."""

from __future__ import annotations

import pytest

from agent.runtime.base import Failed, Rejected
from agent.runtime.docker import causes
from agent.runtime.docker.engine import Refusal

GET = 'Get "https://registry.example/v2/": '


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (GET + "dial tcp 10.0.0.1:443: connect: connection refused", "image_unreachable"),
        (GET + "dial tcp: lookup registry.example on 127.0.0.1:53: no such host", "image_unreachable"),
        (GET + "dial tcp 10.0.0.1:443: i/o timeout", "image_unreachable"),
        (GET + "context deadline exceeded (Client.Timeout exceeded while awaiting headers)", "image_unreachable"),
        (GET + "net/http: TLS handshake timeout", "image_unreachable"),
        (GET + "tls: failed to verify certificate: x509: certificate signed by unknown authority", "image_unreachable"),
        (GET + "x509: certificate has expired or is not yet valid", "image_unreachable"),
        (GET + "http: server gave HTTP response to HTTPS client", "image_unreachable"),
        (GET + "EOF", "image_unreachable"),
        ("unexpected EOF", "image_unreachable"),
        ("received unexpected HTTP status: 503 Service Unavailable", "image_unreachable"),
        ("toomanyrequests: You have reached your pull rate limit", "image_unreachable"),
        ("i/o timeout: no sign of progress within 600 s", "image_unreachable"),
        ("pull access denied for nothing, repository does not exist or may require 'docker login': denied", "image_denied"),
        (GET + "no basic auth credentials", "image_denied"),
        ("unauthorized: authentication required", "image_denied"),
        ("manifest for registry.example/a:2 not found: manifest unknown: manifest unknown", "image_missing"),
        ("no matching manifest for linux/amd64 in the manifest list entries", "image_missing"),
        ("failed to register layer: write /usr/lib/x: no space left on device", "disk_full"),
        ("write /var/lib/docker/tmp/GetImageBlob1: no space left on device", "disk_full"),
        ("failed to register layer: open /x: disk quota exceeded", "disk_full"),
        ("invalid reference format", "unsupported"),
        ("filesystem layer verification failed for digest sha256:0", "engine_failed"),
    ],
)  # fmt: skip
def test_the_cause_of_a_pull_that_did_not_work(said: str, cause: str) -> None:
    trouble = causes.pull_trouble("registry.example/a:2", "registry.example", said)
    assert trouble.cause == cause
    assert said in trouble.message
    final = cause in ("image_missing", "image_denied", "unsupported")
    assert isinstance(trouble, Rejected if final else Failed), "what may pass is not final"


def test_a_refused_pull_says_what_to_do() -> None:
    trouble = causes.pull_trouble("a:2", "docker.io", "denied")
    assert trouble.message == (
        "image 'a:2' cannot be pulled: denied; see that the name is right, log in to docker.io "
        "and deploy with --with-registry-auth"
    )


@pytest.mark.parametrize(
    ("status", "said", "cause", "final"),
    [
        (500, "mkdir /var/lib/docker/overlay2/x: no space left on device", "disk_full", False),
        (500, "layer does not exist", "engine_failed", False),
        (400, "invalid IP address in add-host", "unsupported", True),
        (409, "conflict", "", True),
    ],
)
def test_the_cause_of_a_create_that_was_refused(
    status: int, said: str, cause: str, final: bool
) -> None:
    trouble = causes.create_trouble("a", Refusal(status, said))
    assert (trouble.cause, isinstance(trouble, Rejected)) == (cause, final)


@pytest.mark.parametrize(
    ("status", "said", "cause", "final"),
    [
        (
            400,
            'OCI runtime create failed: exec: "nope": executable file not found in $PATH: unknown',
            "program_missing",
            True,
        ),
        (500, "OCI runtime create failed: runc create failed: cannot set cwd", "", False),
        (500, "driver failed: Bind for 0.0.0.0:80 failed: port is already allocated", "engine_failed", False),
        (500, "failed to create task: containerd: connection error", "engine_failed", False),
        (500, "mkdir /run/x: no space left on device", "disk_full", False),
        (500, 'could not select device driver "nvidia" with capabilities: [[gpu]]', "unsupported", True),
    ],
)  # fmt: skip
def test_the_cause_of_a_start_that_was_refused(
    status: int, said: str, cause: str, final: bool
) -> None:
    trouble = causes.start_trouble(Refusal(status, said))
    assert (trouble.cause, isinstance(trouble, Rejected)) == (cause, final)
