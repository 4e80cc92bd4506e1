"""Several managers under load, from one fault to the next: what must hold after each of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from deploy.testbed import Host
from swarm.v1 import Kind, ListRequest, RemoveRequest
from swarm.v1.services import ControlClient
from tests.e2e.cluster import wait_for
from tests.e2e.history import Absence, check_runs
from tests.e2e.load import Load
from tests.e2e.managers import Managers, heal, since_boot

# How long after its network is back a host may take until it has stopped what was given up.
TOLD_S = 15.0
ASK_S = 30.0


class Scene:
    """A cluster, and what its tasks were excused from over its whole life."""

    def __init__(self, cluster: Managers) -> None:
        self.cluster = cluster
        self.absences: list[Absence] = []
        self._seeds = 0

    @contextmanager
    def load(self) -> Iterator[Load]:
        """Clients at work; at the end it is judged what they were told and what tasks did. The
        cluster must be whole again by then, or become so.
        """
        self._clear()
        self._seeds += 1
        with Load(self.cluster.sockets, self.cluster.beats, seed=self._seeds) as load:
            load.progress()
            yield load
            load.progress()
        took_s = self.cluster.converge()
        load.judge()
        problems = check_runs(self.cluster.runs(), self.absences)
        assert not problems, "\n".join(problems[:5])
        self.cluster.check_live()
        print(f"whole after {took_s:.1f} s; {load.summary()}")

    @contextmanager
    def absent(self, hosts: Sequence[Host], *, cut: Sequence[Host] = ()) -> Iterator[None]:
        """Workers that no manager reaches meanwhile; afterwards the network of all is healed."""
        since = since_boot()
        try:
            yield
        finally:
            heal((*hosts, *cut))
            until = since_boot() + TOLD_S
            self.absences += [Absence(host.name, since, until) for host in hosts]

    def _clear(self) -> None:
        """Removes what an earlier load's history began with."""

        async def remove(control: ControlClient) -> bool:
            found = await control.list(ListRequest(kind=Kind.SERVICE), timeout_s=ASK_S)
            names = [o.service.spec.name for o in found.objects if o.service and o.service.spec]
            registers = [name for name in names if name.startswith("reg")]
            for name in registers:
                request = RemoveRequest(kind=Kind.SERVICE, ref=name)
                await control.remove(request, timeout_s=ASK_S)
            return not registers

        wait_for("there are no registers", lambda: self.cluster.ask(remove, stale=False))
