"""A real registry (Debian's docker-registry) on a test host's address, with or without a password.

The engines of the bed take the bed's subnet as insecure registries, so plain HTTP is enough.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterable

from deploy.testbed.host import Host, missing_tools
from deploy.testbed.processes import TestbedError, poll

PORT = 5000
TIMEOUT_S = 20.0
USER = "tester"
PASSWORD = "opensesame"
# bcrypt of PASSWORD, the only form docker-registry takes.
_HTPASSWD = f"{USER}:$2b$04$yZb.zvALI81ITn/779AycOEfWV3YfifmSqdDRTjVYcVexl8tR/RJq\n"


class Registry:
    """One registry process."""

    def __init__(self, host: Host, *, port: int = PORT, password: bool = False) -> None:
        if missing_tools(["docker-registry"]):
            raise TestbedError("docker-registry is not installed; `make test` installs it")
        self._host = host
        self._name = f"registry-{port}"
        self.address = f"{host.address}:{port}"
        folder = host.folder / self._name
        folder.mkdir(exist_ok=True)
        (folder / "htpasswd").write_text(_HTPASSWD)
        auth = {"auth": {"htpasswd": {"realm": "test", "path": str(folder / "htpasswd")}}}
        config = {
            "version": 0.1,
            "log": {"level": "warn"},
            "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
            "http": {"addr": f"{host.address}:{port}"},
            **(auth if password else {}),
        }
        self._config = folder / "config.yml"
        self._config.write_text(json.dumps(config))  # JSON is YAML

    def start(self) -> None:
        """Returns once it answers."""
        self._host.spawn(self._name, "docker-registry", "serve", self._config)
        if not poll(lambda: self._status() in (200, 401), TIMEOUT_S):
            said = self._host.log(self._name).strip().splitlines()[-2:]
            raise TestbedError(f"the registry on {self.address} does not answer: {said}")

    def stop(self) -> None:
        self._host.stop(self._name)

    def _status(self) -> int:
        host, _, port = self.address.partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=2)
        try:
            connection.request("GET", "/v2/")
            return connection.getresponse().status
        except OSError:
            return 0
        finally:
            connection.close()

    def push(self, host: Host, image: str, names: Iterable[str]) -> str:
        """Pushes an image of a host's engine under the names (`repo:tag`); its digest."""
        digest = ""
        for name in names:
            target = f"{self.address}/{name}"
            host.docker("tag", image, target)
            said = host.docker("push", target)
            digest = said.rpartition("digest: ")[2].split()[0]
            host.docker("rmi", target)
        return digest

    def login(self, host: Host) -> None:
        """Lets the docker command on a host push; undone with `logout`."""
        host.docker("login", "-u", USER, "-p", PASSWORD, self.address)

    def logout(self, host: Host) -> None:
        host.docker("logout", self.address, check=False)
