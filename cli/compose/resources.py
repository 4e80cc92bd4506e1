"""How many tasks a service has and what each may use; from `deploy` and from the older keys of the
service that say the same.

Where both are given, `deploy` must agree with the older key or the older key is refused: one of two
contradicting numbers would be dropped.
"""

from __future__ import annotations

from cli.compose import keys
from cli.compose.around import deep
from cli.compose.at import At
from cli.compose.shorts import pairs
from swarm import errors, gpus
from swarm.v1 import (
    DeviceRequest,
    GenericResource,
    Global,
    GlobalJob,
    Replicated,
    ReplicatedJob,
    ResourceRequirements,
    Resources,
    ServiceMode,
)

MODES = ("replicated", "global", "replicated-job", "global-job")
REPLICAS_MAX = 1_000_000
CPU_PERIOD_US = 100_000  # the kernel's default


# ------------------------------------------------------------------ mode


def service_mode(at: At) -> ServiceMode:
    """How many tasks. As in Docker, a replicated job of N runs N at once and completes N."""
    mode_at, replicas_at, scale = (
        deep(at, "deploy", "mode"),
        deep(at, "deploy", "replicas"),
        at.set_at("scale"),
    )
    mode = mode_at.choice(MODES) if mode_at is not None else "replicated"
    number = None
    if replicas_at is not None:
        number = replicas_at.integer(least=0, most=REPLICAS_MAX, what="for example replicas: 3")
    if scale is not None:
        scaled = scale.integer(least=0, most=REPLICAS_MAX)
        if number is not None and scaled != number:
            scale.fail(f"scale is {scaled} and deploy.replicas is {number}", "remove scale")
        number = scaled if number is None else number
    is_global = mode in ("global", "global-job")
    if is_global and (most := deep(at, "deploy", "placement", "max_replicas_per_node")) is not None:
        most.fail(f"a service of mode {mode} runs once on each node anyway", "remove it")
    if is_global and number is not None:
        (replicas_at or scale or at).fail(
            f"a service of mode {mode} runs once on each node, it has no number of replicas",
            "remove replicas, or write mode: replicated",
        )
    match mode:
        case "global":
            return ServiceMode(global_service=Global())
        case "global-job":
            return ServiceMode(global_job=GlobalJob())
        case "replicated-job":
            return ServiceMode(
                replicated_job=ReplicatedJob(max_concurrent=number, total_completions=number)
            )
        case _:
            return ServiceMode(replicated=Replicated(replicas=number))


# ------------------------------------------------------------------ resources


def requirements(at: At) -> ResourceRequirements:
    """Limits and reservations; each absent where nothing is asked for."""
    limits_at = deep(at, "deploy", "resources", "limits")
    reservations_at = deep(at, "deploy", "resources", "reservations")
    cpus = _either(at, limits_at, "cpus", "cpus", _cpus)
    memory = _either(at, limits_at, "memory", "mem_limit", At.memory)
    pids = _either(at, limits_at, "pids", "pids_limit", _pids)
    quota = _quota(at)
    if quota and cpus and quota != cpus:
        at.fail_key("cpu_quota", "cpu_quota and the limit of cpus differ", "remove cpu_quota")
    cpus = cpus or quota
    limits = None
    if limits_at is not None or cpus or memory or pids:
        limits = Resources(cpu_nano=cpus, memory_bytes=memory, pids=pids)
    generic = _generic(reservations_at)
    devices = _devices(reservations_at, at, generic)
    reservations = None
    if reservations_at is not None or devices:
        cpu_at = reservations_at.set_at("cpus") if reservations_at is not None else None
        memory_at = reservations_at.set_at("memory") if reservations_at is not None else None
        reservations = Resources(
            cpu_nano=_cpus(cpu_at) if cpu_at is not None else 0,
            memory_bytes=memory_at.memory() if memory_at is not None else 0,
            generic=generic,
            devices=devices,
        )
        if limits is not None:
            _fits(cpu_at, reservations.cpu_nano, limits.cpu_nano)
            _fits(memory_at, reservations.memory_bytes, limits.memory_bytes)
    return ResourceRequirements(limits=limits, reservations=reservations)


def _fits(at: At | None, reserved: int, limit: int) -> None:
    if at is not None and 0 < limit < reserved:
        at.fail(
            f"the reservation ({at.shown()}) is above the limit",
            "lower the reservation or raise the limit",
        )


def _either(at: At, limits: At | None, key: str, older: str, read: object) -> int:
    """A limit from deploy or from the service's older key; both must agree."""
    assert callable(read)
    new_at = limits.set_at(key) if limits is not None else None
    old_at = at.set_at(older)
    new = int(read(new_at)) if new_at is not None else None
    old = int(read(old_at)) if old_at is not None else None
    if new is not None and old is not None and new != old:
        assert old_at is not None
        old_at.fail(
            f"{older} and deploy.resources.limits.{key} say different things", f"remove {older}"
        )
    return new if new is not None else old or 0


def _cpus(at: At) -> int:
    """An empty text is no limit, as in Docker: what ${CPUS:-} becomes."""
    return 0 if at.node.value == "" else at.cpus()


def _pids(at: At) -> int:
    """0 and -1 mean no limit."""
    return max(at.integer(least=-1), 0)


def _quota(at: At) -> int:
    quota, period = at.set_at("cpu_quota"), at.set_at("cpu_period")
    if quota is None:
        if period is not None:
            at.fail_key("cpu_period", "cpu_period says nothing without cpu_quota", "write cpus")
        return 0
    amount = quota.integer(least=0)
    every = period.integer(least=1) if period is not None else CPU_PERIOD_US
    return amount * 1_000_000_000 // every


def _generic(at: At | None) -> tuple[GenericResource, ...]:
    found = at.set_at("generic_resources") if at is not None else None
    if found is None or not found.is_list("- discrete_resource_spec: {kind: gpu, value: 1}"):
        return ()
    given: list[GenericResource] = []
    for each in found.elements():
        if not each.check_keys(keys.GENERIC, context="generic_resources"):
            continue
        spec = each.set_at("discrete_resource_spec")
        if spec is None:
            each.lacks(
                "discrete_resource_spec",
                "write - discrete_resource_spec: {kind: gpu, value: 1}",
            )
            continue
        if not spec.check_keys(keys.DISCRETE, context="discrete_resource_spec"):
            continue
        kind, value = spec.set_at("kind"), spec.set_at("value")
        if kind is None or value is None:
            spec.fail("kind and value are both needed", "write {kind: gpu, value: 1}")
            continue
        resource = GenericResource(kind=kind.text(empty=False), count=value.integer(least=1))
        if resource in given:
            continue  # two files say the same
        if resource.kind in {other.kind for other in given}:
            kind.fail(f'"{resource.kind}" is reserved twice', "add the numbers up")
        given.append(resource)
    return tuple(given)


def _devices(
    reservations: At | None, at: At, generic: tuple[GenericResource, ...]
) -> tuple[DeviceRequest, ...]:
    """Device claims of deploy, then those of `gpus`, which has the capability gpu unless said."""
    claims: list[DeviceRequest] = []
    last = None
    found = reservations.set_at("devices") if reservations is not None else None
    places: list[tuple[At, tuple[str, ...]]] = []
    if found is not None and found.is_list("- capabilities: [gpu]"):
        places.append((found, ()))
    gpus_at = at.set_at("gpus")
    if gpus_at is not None:
        places.append((gpus_at, ("gpu",)))
    sound = True
    for place, implied in places:
        for each in place.elements():
            claim = _device(each, implied)
            sound &= claim is not None and _is_sound(each, claim)
            claims += [claim] if claim is not None else []
            last = each
    if sound and last is not None:
        try:
            gpus.ask_of(Resources(devices=tuple(claims), generic=generic))
        except errors.Invalid as error:
            last.fail(error.message)
    return tuple(claims)


def _is_sound(at: At, claim: DeviceRequest) -> bool:
    """Whether a claim on GPUs can be asked for; what else it names, the manager judges."""
    try:
        gpus.ask_of(Resources(devices=(claim,)))
    except errors.Invalid as error:
        options = at.set_at("options")
        (options or at).fail(error.message)
        return False
    return True


def _device(at: At, implied: tuple[str, ...]) -> DeviceRequest | None:
    if not at.check_keys(keys.DEVICE, context="devices"):
        return None
    capabilities_at, count_at = at.set_at("capabilities"), at.set_at("count")
    ids_at, driver = at.set_at("device_ids"), at.set_at("driver")
    capabilities = capabilities_at.texts() if capabilities_at is not None else implied
    if implied and implied[0] not in capabilities:
        capabilities = (*implied, *capabilities)
    if not capabilities:
        at.lacks("capabilities", "add capabilities: [gpu]")
    options_at = at.set_at("options")
    given = pairs(options_at) if options_at is not None else None
    options = At(given, f"{at.path}.options", at.report).mapping() if given is not None else {}
    ids = ids_at.texts() if ids_at is not None else ()
    # The specification's default; a part can be had of one only.
    count = None if ids or "fraction" in options else -1
    if count_at is not None:
        word = count_at.node.value
        count = -1 if word in ("all", -1) else count_at.integer(least=1, what="all, or a number")
    if ids_at is not None and len(set(ids)) != len(ids):
        ids_at.fail("a device is named twice", "name each once")
    if count is not None and ids:
        at.fail_key("count", "count and device_ids exclude each other", "keep one of them")
    return DeviceRequest(
        driver=driver.text() if driver is not None else "",
        count=count,
        device_ids=ids,
        capabilities=capabilities,
        options=options,
    )
