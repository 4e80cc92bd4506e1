"""What the order of placement has to know from tick to tick; it can be had anew from a view.

Each service's terms, what queues hold, who is blocked or held back, and what is kept for whom. A
group that is held back (by its queue's quota, by a place kept for others) is named in `due` once
that may have changed. Owned by the Placer, which tells it of changes; a tick's turns (turns.py)
read and write it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from manager.control.holds import Holds
from manager.control.template import spec_of_version
from manager.control.tick import Tick
from manager.scheduler import Group, NodeTable
from manager.scheduler.queues import Amounts, Ledger, amounts_of, specs_by_name, totals_of
from manager.scheduler.ranking import GroupKey, Terms, Turn, job_since_ns, terms_of
from manager.scheduler.table import Claim
from manager.store import View
from swarm.v1 import Cluster, Service, Task

_STOPS = -(10**9)  # lower than any priority


class Admission:
    """The order of things, as far as it is remembered."""

    def __init__(self, table: NodeTable) -> None:
        self._table = table
        self.ledger = Ledger()
        self.holds = Holds()
        # Groups to be tried anew, for what held them back has changed.
        self.due: set[GroupKey] = set()
        self._terms: dict[str, Terms] = {}
        self.priorities: Counter[int] = Counter()
        self._totals_known = False
        # Jobs that fit nowhere, those apart that cannot have a reservation.
        self.blocked: dict[GroupKey, tuple[Turn, Group]] = {}
        self.hopeless: dict[GroupKey, tuple[Turn, Group]] = {}
        # Who is held back by what, in words; by a queue's quota, by holds of others.
        self.held_back: dict[GroupKey, str] = {}
        self.by_quota: dict[GroupKey, str] = {}
        self.by_hold: set[GroupKey] = set()
        # Groups that may take places of others, but have not found enough of them.
        self.preemptors: dict[GroupKey, Terms] = {}
        # Service -> its groups that any of the above may name.
        self._known: dict[str, set[GroupKey]] = {}
        # Service -> what one task of each version holds.
        self._amounts: dict[str, dict[int, Amounts]] = {}

    # -------------------------------------------------------------- taking in changes

    @classmethod
    def of(cls, table: NodeTable, view: View) -> Admission:
        """Begins with a view; `table` was built from it."""
        made = cls(table)
        for service in view.all(Service):
            made.observe_service(None, service)
        for cluster in view.all(Cluster):
            made._configure(cluster)
        return made

    def observe_service(self, old: Service | None, new: Service | None) -> bool:
        """Takes a change of a service; True: others that wait may come before it now."""
        service = new or old
        assert service is not None
        before = self._terms.pop(service.id, None)
        if before is not None:
            self.priorities[before.priority] -= 1
            if not self.priorities[before.priority]:
                del self.priorities[before.priority]
        if new is None or old is None or new.spec_version != old.spec_version:
            self._amounts.pop(service.id, None)
        if new is None:
            return False
        after = self._terms[new.id] = terms_of(new.spec)
        self.priorities[after.priority] += 1
        return before is not None and after.priority < before.priority

    def observe_cluster(self, old: Cluster | None, new: Cluster | None) -> None:
        """Takes a change of the cluster: queues may have other quotas."""
        if new is None:
            return
        before = old.spec.scheduling if old and old.spec else None
        if before != (new.spec.scheduling if new.spec else None):
            self._configure(new)
            self.due.update(self.by_quota)

    def _configure(self, cluster: Cluster) -> None:
        self.ledger.configure(specs_by_name(cluster.spec.scheduling if cluster.spec else None))

    def observe_node(self, node_id: str) -> None:
        """Takes a change of a node. What is held there may not do any more."""
        self._totals_known = False
        self.due.update(hold.turn.key for hold in self.holds.on(node_id))
        self.due.update(self.preemptors)
        self.blocked |= self.hopeless
        self.hopeless.clear()

    def enter(self, task_id: str, service_id: str, view: View) -> None:
        """Makes the ledger say of the task what the table does."""
        terms = self._terms.get(service_id)
        if terms is None or not terms.job:
            # A service that was a job once leaves nothing behind: it would have to be another one.
            claim = None
        else:
            claim = self._table.claim_of(task_id)
        amounts = self._claimed(claim, task_id, view) if claim is not None else None
        if amounts is None and terms is not None and not terms.job:
            return
        queue = self.ledger.sync(task_id, terms.queue if terms else "", amounts)
        if queue:
            self.due.update(k for k, q in self.by_quota.items() if q == queue)

    def _claimed(self, claim: Claim, task_id: str, view: View) -> Amounts:
        task = view.get(Task, task_id)
        each = self.each(claim.service_id, task.spec_version if task else 0, view)
        return each.given(len(claim.gpus))

    def moved_queue(self, service: Service, view: View) -> None:
        """The job is in another queue now."""
        for task in view.by(Task, "service", service.id):
            self.enter(task.id, service.id, view)

    def claim_freed(self, service_id: str, node_id: str) -> None:
        """A task of the service has given up its claim on the node. Who could have taken its place
        knew of it already; who could not may fit there now if others go as well.
        """
        if not self.preemptors:
            return
        priority = self.priority(service_id)
        lowest = self._lowest(node_id)
        if lowest is None:
            return
        for key, terms in self.preemptors.items():
            if lowest < terms.priority <= priority:
                self.due.add(key)

    def _lowest(self, node_id: str) -> int | None:
        """The lowest priority of what has a place on the node; what stops there has none at all."""
        info = self._table.nodes.get(node_id)
        if info is None:
            return None
        if len(self._table.claims_on(node_id)) > info.active:
            return _STOPS
        return min((self.priority(i) for i in info.by_service), default=None)

    def _wake_preemptors(self, released: Mapping[GroupKey, Iterable[str]]) -> None:
        """What was kept for these owners on these nodes is not kept any more. Who found no victims
        there for that reason may find some now; an owner that gave up its own place knows.
        """
        lowest: list[tuple[int, GroupKey]] = []
        for owner, nodes in released.items():
            here = [p for p in map(self._lowest, nodes) if p is not None]
            if here:
                lowest.append((min(here), owner))
        lowest.sort()
        for key, terms in self.preemptors.items():
            other = next((p for p, owner in lowest[:2] if owner != key), None)
            if other is not None and other < terms.priority:
                self.due.add(key)

    def note(self, key: GroupKey) -> None:
        """Something will be remembered of the group, until it is forgotten."""
        self._known.setdefault(key[0], set()).add(key)

    def known(self, service_id: str) -> frozenset[GroupKey]:
        """The groups of the service of which something is remembered."""
        return frozenset(self._known.get(service_id, ()))

    def forget_service(self, service_id: str) -> None:
        """Nothing of the service waits any more."""
        for key in self.known(service_id):
            self.forget(key)

    def forget(self, key: GroupKey) -> None:
        """The group does not wait any more."""
        keys = self._known.get(key[0], set())
        keys.discard(key)
        if not keys:
            self._known.pop(key[0], None)
        self.clear(key)
        self.due.discard(key)
        self.holds.drop(key)
        self.wake_held()

    def clear(self, key: GroupKey) -> None:
        """What was found out about the group at its last turn does not count any more."""
        self.blocked.pop(key, None)
        self.held_back.pop(key, None)
        self.by_quota.pop(key, None)
        self.preemptors.pop(key, None)
        self.by_hold.discard(key)
        self.hopeless.pop(key, None)

    def wake_held(self) -> None:
        """Who was kept off a place that is not kept any more is to be tried anew."""
        if self.holds.freed:
            self.holds.freed = 0
            self.due.update(self.by_hold)
        if self.holds.released:
            self._wake_preemptors(self.holds.released)
            self.holds.released = {}

    # -------------------------------------------------------------- answers

    def terms(self, service_id: str) -> Terms:
        """Of a service that is gone: those of a service without a priority."""
        return self._terms.get(service_id) or _NO_TERMS

    def priority(self, service_id: str) -> int:
        return self.terms(service_id).priority

    def each(self, service_id: str, version: int, view: View) -> Amounts:
        """What one task of the version holds."""
        known = self._amounts.setdefault(service_id, {})
        found = known.get(version)
        if found is None:
            service = view.get(Service, service_id)
            spec = spec_of_version(view, service, version) if service is not None else None
            found = known[version] = amounts_of(spec)
        return found

    def turn(self, group: Group, view: View, now_ns: int) -> Turn:
        """The group's turn. A job waits since it was queued."""
        service = view.get(Service, group.service_id)
        terms = self.terms(group.service_id)
        since_ns = min(t.meta.created_at_ns if t.meta else now_ns for t in group.tasks)
        if terms.job and service is not None:
            since_ns = job_since_ns(service)
        return Turn(
            key=(group.service_id, group.spec_version, group.node_id),
            terms=terms,
            since_ns=since_ns,
            name=service.spec.name if service is not None and service.spec is not None else "",
        )

    # -------------------------------------------------------------- one tick

    def undo(self, tick: Tick, view: View) -> None:
        """What was entered in the tick is not so. What is held may be so because of it: all of it
        is found anew.
        """
        for hold in list(self.holds.all()):
            self.due.add(hold.turn.key)
            self.holds.drop(hold.turn.key)
        self.wake_held()
        self.due |= tick.due
        for task_id in tick.touched:
            task = view.get(Task, task_id)
            if task is not None:
                self.enter(task_id, task.service_id, view)
            else:
                self.ledger.sync(task_id, "", None)

    def totals(self) -> None:
        """Makes the ledger know the cluster's totals."""
        if not self._totals_known:
            self.ledger.totals = totals_of(i.node for i in self._table.nodes.values())
            self._totals_known = True


_NO_TERMS = Terms()
