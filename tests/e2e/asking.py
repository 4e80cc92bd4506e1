"""Clients that ask a published port without a pause, and the web server that answers them."""

from __future__ import annotations

import http.client
import itertools
import threading
import time
from collections.abc import Sequence

from deploy.testbed import Host
from tests.e2e.cluster import wait_for

PORT = 4002
CLIENTS = 4  # of each host
# Answers at /cgi-bin/slow after a while, and ends at once when told to: whoever is being answered
# then gets nothing.
SERVE = """
mkdir -p /tmp/www/cgi-bin && hostname >/tmp/www/index.html
printf '#!/bin/sh\\nsleep 0.2\\nprintf "Content-Type: text/plain\\\\r\\\\n\\\\r\\\\n"\\nhostname\\n' \
>/tmp/www/cgi-bin/slow
chmod +x /tmp/www/cgi-bin/slow
trap 'exit 0' TERM
httpd -f -p 80 -h /tmp/www &
wait
"""


class Asking:
    """Clients that ask all hosts without a pause, each over a new connection; a context."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self._hosts = hosts
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self.answered = 0
        self.failed: list[str] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Asking:
        for host, number in itertools.product(self._hosts, range(CLIENTS)):
            path = "/cgi-bin/slow" if number % 2 else "/"
            thread = threading.Thread(target=self._ask, args=(host, path))
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def _ask(self, host: Host, path: str) -> None:
        while not self._over.is_set():
            began = time.monotonic()
            connection = http.client.HTTPConnection(host.address, PORT, timeout=10)
            try:
                connection.request("GET", path)
                answer = connection.getresponse()
                said = answer.read().decode().strip()
                problem = "" if answer.status == 200 and said else f"{answer.status} {said!r}"
            except (OSError, http.client.HTTPException) as error:
                problem = repr(error)
            finally:
                connection.close()
            with self._lock:
                self.answered += not problem
                if problem:
                    took = time.monotonic() - began
                    self.failed.append(f"{host.name} {path} after {took:.3f} s: {problem}")

    def more(self, requests: int = 200) -> None:
        """Waits until so many more were answered."""
        until = self.answered + requests
        wait_for(f"{requests} more requests", lambda: self.answered >= until, timeout_s=60)

    def check(self) -> None:
        """Not one request has failed."""
        assert not self.failed, f"{len(self.failed)} of {self.answered}: {self.failed[:20]}"
        assert self.answered
