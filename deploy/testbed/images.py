"""Images for tests, made from the static busybox of the machine: no registry is needed.

`busybox:latest` runs a shell; `web:latest` answers HTTP on port 80 with its hostname, so that a
client sees which replica answered. Both are the same layer with another configuration.
"""

from __future__ import annotations

import io
import shutil
import tarfile
from typing import TYPE_CHECKING

from deploy.testbed.processes import TestbedError, run

if TYPE_CHECKING:
    from deploy.testbed.host import Host

BASE = "busybox:latest"
WEB = "web:latest"
# Name -> changes in Dockerfile syntax, as `docker import --change` takes them.
IMAGES: dict[str, tuple[str, ...]] = {
    BASE: ("ENV PATH=/bin:/sbin:/usr/bin:/usr/sbin", 'CMD ["sh"]'),
    WEB: (
        "ENV PATH=/bin:/sbin:/usr/bin:/usr/sbin",
        "EXPOSE 80",
        'CMD ["/bin/serve"]',
    ),
}
_FOLDERS = ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "var")
_PASSWD = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
# Ends at once when asked to; as process 1, busybox httpd itself would ignore SIGTERM.
_SERVE = """#!/bin/sh
trap 'exit 0' TERM INT
mkdir -p /tmp/www && hostname >/tmp/www/index.html
httpd -f -p 80 -h /tmp/www &
wait
"""
_GROUP = "root:x:0:\nnogroup:x:65534:\n"


def root_archive() -> bytes:
    """A tar of a root file system with busybox and a link for each of its commands."""
    busybox = shutil.which("busybox")
    if busybox is None:
        raise TestbedError("busybox is not installed; `bash deploy/test-tools.sh` installs it")
    commands = run([busybox, "--list"]).split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for folder in _FOLDERS:
            entry = tarfile.TarInfo(folder)
            entry.type = tarfile.DIRTYPE
            entry.mode = 0o1777 if folder == "tmp" else 0o755
            archive.addfile(entry)
        with open(busybox, "rb") as file:
            binary = file.read()
        for name, data, mode in (
            ("bin/busybox", binary, 0o755),
            ("bin/serve", _SERVE.encode(), 0o755),
            ("etc/passwd", _PASSWD.encode(), 0o644),
            ("etc/group", _GROUP.encode(), 0o644),
        ):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            entry.mode = mode
            archive.addfile(entry, io.BytesIO(data))
        for command in commands:
            if command == "busybox":
                continue
            entry = tarfile.TarInfo(f"bin/{command}")
            entry.type = tarfile.SYMTYPE
            entry.linkname = "busybox"
            archive.addfile(entry)
    return buffer.getvalue()


def provide(host: Host) -> None:
    """Makes the images that the host's engine lacks, and tries once that a container runs."""
    listed = host.docker("image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
    missing = [name for name in IMAGES if name not in listed]
    if not missing:
        return
    archive = root_archive()
    for name in missing:
        changes = [word for change in IMAGES[name] for word in ("--change", change)]
        host.docker("import", *changes, "-", name, stdin=archive)
    if host.docker("run", "--rm", BASE, "echo", "runs").strip() != "runs":
        raise TestbedError(f"containers do not run on {host.name}; see {host.folder}/dockerd.log")
