"""One run: a plan, from its begin to the verdict."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from tests.sim import liveness
from tests.sim.cluster import Cluster
from tests.sim.faults import Faults
from tests.sim.plan import FAULTS, Item, Plan
from tests.sim.trace import Trace, Violation
from tests.sim.users import Users

BOOKS_S = 60.0  # between two looks at what is remembered


@dataclass(frozen=True, slots=True)
class Result:
    """What came of it. `digest`: of the whole trace; two runs of one plan have the same."""

    plan: Plan
    violation: Violation | None
    digest: int
    commits: int
    messages: int
    callbacks: int
    containers: int
    done: int
    refused: int
    trace: Trace


def run(plan: Plan, *, print_all: bool = False) -> Result:
    """Runs it to its end, or to the first violation."""
    trace = Trace(print_all=print_all)
    collecting = gc.isenabled()
    gc.disable()  # when it runs depends on the machine, and it costs a quarter of the time
    cluster = Cluster(plan, trace)
    users, faults = Users(cluster), Faults(cluster)
    with _errors_of(cluster):
        try:
            _play(cluster, users, faults)
        finally:
            cluster.end()
            if collecting:
                gc.enable()
    return Result(
        plan=plan,
        violation=cluster.violation,
        digest=trace.digest,
        commits=cluster.safety.model.revision,
        messages=cluster.net.messages,
        callbacks=cluster.loop.callbacks,
        containers=sum(a.engine.starts for a in cluster.agents),
        done=users.done,
        refused=users.refused,
        trace=trace,
    )


def _play(cluster: Cluster, users: Users, faults: Faults) -> None:
    plan, loop = cluster.plan, cluster.loop
    cluster.begin()
    for item in plan.items:
        loop.outside(item.at_s, _begin, cluster, users, faults, item)
    loop.outside(plan.heal_s, faults.heal)
    at_s = BOOKS_S
    try:
        while at_s < plan.seconds and cluster.violation is None:
            loop.run_until(at_s)
            if cluster.violation is None:
                check_books(cluster)
            at_s += BOOKS_S
        if cluster.violation is None:
            loop.run_until(plan.seconds)
        if cluster.violation is None:
            check_books(cluster)
            liveness.judge(cluster)
    except RuntimeError as error:
        if "busy without end" not in str(error):
            raise
        cluster.violate("livelock", str(error))


def _begin(cluster: Cluster, users: Users, faults: Faults, item: Item) -> None:
    if item.kind not in FAULTS:
        cluster.loop.spawn(None, users.act(item))
    elif item.at_s < cluster.plan.heal_s:
        cluster.loop.spawn(None, faults.act(item))


def check_books(cluster: Cluster) -> None:
    """What managers remember agrees with the objects; where nothing is on its way."""
    for manager in cluster.managers:
        if not manager.up or manager.store is None or manager.store._state != "open":
            continue
        try:
            manager.store.check_invariants()
        except Exception as error:
            cluster.violate("books", f"{manager.host}: {error}")
            return
        found = manager.control_loop()
        if found is None:
            continue
        loop, watch = found
        # What it has not heard of yet is in its watch, which only it can read.
        if loop._controller._tick is not None or watch.pending:
            continue
        try:
            loop._controller.check_invariants(manager.store)
        except Exception as error:
            cluster.violate("books", f"{manager.host}: {error}")


@contextmanager
def _errors_of(cluster: Cluster) -> Iterator[None]:
    """An error in the log of the code under test is a defect; anything less is not looked at."""
    before = structlog.get_config()

    def take(logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        error = event.get("exc_info")
        what = f"logged {event.get('event')}: { {k: v for k, v in event.items() if k != 'event'} }"
        cluster.defect("log", error if isinstance(error, BaseException) else None, what)
        raise structlog.DropEvent

    structlog.configure(
        processors=[take],
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        logger_factory=structlog.ReturnLoggerFactory(),
        cache_logger_on_first_use=False,
    )
    try:
        yield
    finally:
        structlog.configure(**before)
