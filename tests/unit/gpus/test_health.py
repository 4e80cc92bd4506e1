"""When a GPU is given no work, and when it is again."""

from __future__ import annotations

import math

import pytest

from agent.gpus.health import (
    HARMLESS,
    LASTING,
    QUIET_S_FIRST,
    QUIET_S_MAX,
    Fault,
    Faults,
    Signs,
    judge,
)


@pytest.mark.parametrize("xid", sorted(HARMLESS))
def test_what_a_program_causes_by_itself_is_no_fault_of_the_gpu(xid: int) -> None:
    faults = Faults()
    assert not faults.note("g", xid, 0.0)
    assert faults.of("g", 0.0, driver_tells=False) is None


def test_no_xid_is_both_harmless_and_lasting() -> None:
    assert not HARMLESS & set(LASTING)


def test_after_any_other_xid_the_gpu_rests_twice_as_long_each_time() -> None:
    faults, now_s = Faults(), 100.0
    for times in range(1, 12):
        assert faults.note("g", 32, now_s)
        rest_s = min(QUIET_S_MAX, QUIET_S_FIRST * 2 ** (times - 1))
        assert faults.of("g", now_s + rest_s - 0.1, driver_tells=False) is not None
        assert faults.of("g", now_s + rest_s, driver_tells=False) is None
        now_s += rest_s
    assert faults.of("other", now_s, driver_tells=False) is None


@pytest.mark.parametrize("xid", sorted(LASTING))
def test_what_needs_a_reset_lasts_until_the_driver_is_loaded_anew(xid: int) -> None:
    faults = Faults()
    faults.note("g", xid, 0.0)
    assert faults.of("g", 1e9, driver_tells=False) is not None
    faults.driver_loaded()
    assert faults.of("g", 1e9, driver_tells=False) is None


def test_a_driver_that_tells_when_a_reset_is_needed_is_believed() -> None:
    faults = Faults()
    faults.note("g", 79, 0.0)
    assert faults.of("g", QUIET_S_FIRST - 1, driver_tells=True) is not None
    assert faults.of("g", QUIET_S_FIRST, driver_tells=True) is None


def test_a_new_driver_does_not_shorten_the_rest_after_a_passing_error() -> None:
    faults = Faults()
    faults.note("g", 32, 0.0)
    faults.driver_loaded()
    assert faults.of("g", 1.0, driver_tells=False) is not None


@pytest.mark.parametrize(
    ("signs", "fault", "why"),
    [
        (Signs(), None, ""),
        (Signs(recovery=""), None, ""),
        (Signs(lost="the GPU does not answer"), Fault(79, 0, 1), "the GPU does not answer"),
        (Signs(recovery="a reset of the GPU"), None, "the driver asks for a reset of the GPU"),
        (
            Signs(recovery="a reset"),
            Fault(95, 0, 1),
            "asks for a reset after XID 95 (uncontained memory error)",
        ),
        (Signs(remap_failed=True), None, "exchanged"),
        (Signs(retirement_pending=True), None, "reset the GPU"),
        (Signs(ecc_errors=2), None, "2 uncorrectable memory errors; reset the GPU"),
        (Signs(ecc_errors=2, recovery=""), None, ""),
        (Signs(), Fault(32, 0, 2), "XID 32; in use again after 120 s without another"),
        (
            Signs(),
            Fault(79, 0, 1),
            "XID 79 (fallen off the bus); reset the GPU or load its driver anew",
        ),
        (Signs(recovery=""), Fault(79, 0, 1), "in use again after 60 s"),
    ],
)
def test_the_reason_says_what_happened_and_what_to_do(
    signs: Signs, fault: Fault | None, why: str
) -> None:
    said = judge(signs, fault)
    assert (why in said) if why else said == ""


def test_a_rest_ends_and_is_never_longer_than_an_hour() -> None:
    assert Fault(32, 0.0, 10_000).quiet_s == QUIET_S_MAX
    assert Fault(32, 0.0, 1).over(math.inf, driver_tells=False)
