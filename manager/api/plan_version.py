"""The version of a plan: names what is asked for and the state that the plan was made upon.

`<stack revision>.<mark>.<ask>.<state>`. `ask` is a digest of the wanted spec, with its content;
`state` is one of the stack's objects by name, id and version. Both are keyed with the manager's
sealing key, so that a version tells nothing about secrets. `mark` is the store revision of the
youngest of these objects: what is younger than it when a deploy refuses the plan has changed since,
which lets the refusal name it.

Not in it: credentials (registries hand out tokens that live for minutes), and the nodes and other
stacks: where tasks land may change at any moment, and is no reason to refuse a deploy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from manager.api.lookup import quoted, seen_version, spec_of, task_of
from manager.api.services import PAUSED
from manager.api.stack_request import Wanted
from manager.ca import Sealer
from manager.store import Draft, View
from swarm import errors
from swarm.v1 import (
    Config,
    Kind,
    Network,
    Secret,
    Service,
    ServiceRevision,
    Stack,
    StackSpec,
    Volume,
)

_DIGITS = 16  # hex: 64 bits of a keyed digest
_FORM = re.compile(r"(\d+)\.(\d+)\.([0-9a-f]{16})\.([0-9a-f]{16})")
_SHOWN_MAX = 5
_KINDS: tuple[tuple[Kind, type[Any]], ...] = (
    (Kind.NETWORK, Network),
    (Kind.SECRET, Secret),
    (Kind.CONFIG, Config),
    (Kind.VOLUME, Volume),
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One object that the plan rests upon. `version`: of its spec."""

    what: str
    id: str
    version: int
    # The store revision at which this version came to be.
    since: int
    # What must still be so at the commit: row -> version; 0: must not exist.
    guard: tuple[tuple[Kind, str], int]
    more: str = ""


def plan_version(view: View, wanted: Wanted, *, sealer: Sealer) -> str:
    """The same for the same request upon the same state of the stack."""
    revision, entries = _state(view, wanted)
    mark = max((e.since for e in entries), default=0)
    return f"{revision}.{mark}.{_ask(wanted, sealer)}.{_digest(entries, sealer)}"


def check_expected(draft: Draft, wanted: Wanted, expected: str, *, sealer: Sealer) -> None:
    """Raises Conflict, saying what has changed, unless the same plan would come out now; Invalid
    for what is no version.

    The draft's commit relies on it as well: objects that the deploy leaves alone must not have been
    changed meanwhile through another manager. (To be called before the draft is changed.)
    """
    form = _FORM.fullmatch(expected)
    if form is None:
        raise errors.Invalid(
            f"{expected!r} is not the version of a plan; take it from what `swarmctl stack deploy "
            "--dry-run` shows"
        )
    revision, entries = _state(draft, wanted)
    asked, state = _ask(wanted, sealer), _digest(entries, sealer)
    if (form[3], form[4]) == (asked, state):
        for entry in entries:
            row, version = entry.guard
            draft.expected.setdefault(row, version)
        return
    causes = []
    if form[3] != asked:
        causes.append(
            "what is asked for is not what was planned (other files, variables or --prune)"
        )
    if form[4] != state:
        causes += _changed(entries, was=int(form[1]), revision=revision, mark=int(form[2]))
    raise errors.Conflict(
        f'the plan for stack "{wanted.spec.name}" has gone stale: {"; ".join(causes)}. Make a new '
        "plan with --dry-run, look at it, and deploy that one"
    )


def _changed(entries: Sequence[_Entry], *, was: int, revision: int, mark: int) -> list[str]:
    out = []
    if revision != was:
        at = f"it is at revision {revision} now" if revision else "the stack does not exist now"
        out.append(f"{at}, the plan was made at revision {was}" if was else f"{at}, it was new")
    younger = [e.what for e in entries if e.since > mark]
    shown = younger[:_SHOWN_MAX]
    if len(younger) > len(shown):
        shown.append(f"{len(younger) - len(shown)} more")
    if shown:
        out.append(f"changed since: {', '.join(shown)}")
    return out or ["something that it uses or would change was removed, paused or resumed since"]


def _ask(wanted: Wanted, sealer: Sealer) -> str:
    data = msgspec.json.encode((wanted.spec, wanted.prune), order="deterministic")
    return sealer.digest(data)[:_DIGITS]


def _digest(entries: Iterable[_Entry], sealer: Sealer) -> str:
    rows = sorted((e.what, e.id, e.version, e.more) for e in entries)
    return sealer.digest(msgspec.json.encode(rows))[:_DIGITS]


def _state(view: View, wanted: Wanted) -> tuple[int, list[_Entry]]:
    """The stack's revision, and everything that a deploy of the spec looks at or changes, in order.

    Left out: what waits to be cleaned away, for it goes at any moment and no plan shows it.
    """
    spec = wanted.spec
    stack = next(iter(view.by(Stack, "name", spec.name)), None)
    out = _services(view, spec)
    names = _names(spec)
    leftovers = frozenset(stack.leftover_ids) if stack is not None else frozenset()
    for kind, cls in _KINDS:
        found: dict[str, Any] = {}
        for name in names[kind]:
            found.update((o.id, o) for o in view.by(cls, "name", name))
        for o in view.by(cls, "stack", spec.name):
            if o.id not in leftovers and not getattr(o, "superseded", False):
                found[o.id] = o
        for id_ in sorted(found):
            version = found[id_].meta.version if found[id_].meta is not None else 0
            seen = seen_version(found[id_])
            out.append(_Entry(quoted(found[id_]), id_, seen, seen, ((kind, id_), version)))
    if stack is None:
        return 0, out
    version = stack.meta.version if stack.meta is not None else 0
    guard = ((Kind.STACK, stack.id), version)
    leaving = str(stack.pending_delete)
    out.append(_Entry(quoted(stack), stack.id, stack.revision, 0, guard, leaving))
    return stack.revision, out


def _services(view: View, spec: StackSpec) -> list[_Entry]:
    found = {s.id: s for s in view.by(Service, "stack", spec.name) if not s.pending_delete}
    for named in spec.services:
        found.update((s.id, s) for s in view.by(Service, "name", named.name))
    out = []
    for id_ in sorted(found, key=lambda i: (spec_of(found[i]).name, i)):
        service = found[id_]
        paused = service.update_status is not None and service.update_status.state in PAUSED
        revision = view.get(ServiceRevision, f"{id_}.{service.spec_version}")
        since = seen_version(revision)
        # A service changes with each step of a roll-out; its spec, when there is a next one.
        guard = ((Kind.SERVICE_REVISION, f"{id_}.{service.spec_version + 1}"), 0)
        more = f"{service.pending_delete} {paused}"
        out.append(_Entry(quoted(service), id_, service.spec_version, since, guard, more))
    return out


def _names(spec: StackSpec) -> dict[Kind, list[str]]:
    """Names of what the spec declares, expects to exist, or refers to."""
    out: dict[Kind, set[str]] = {
        Kind.NETWORK: {n.name for n in spec.networks} | set(spec.external_networks),
        Kind.SECRET: {s.name for s in spec.secrets} | set(spec.external_secrets),
        Kind.CONFIG: {c.name for c in spec.configs} | set(spec.external_configs),
        Kind.VOLUME: {v.name for v in spec.volumes},
    }
    for service in spec.services:
        task = task_of(service)
        out[Kind.NETWORK] |= {n.target for n in task.networks}
        if task.container is not None:
            out[Kind.SECRET] |= {s.secret_name for s in task.container.secrets}
            out[Kind.CONFIG] |= {c.config_name for c in task.container.configs}
    return {kind: sorted(names - {""}) for kind, names in out.items()}
