"""A task gets exactly the GPUs that it claims, in each way of giving."""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from agent.gpus import Device, as_claimed, hand_over
from swarm.v1 import Gpu

NOWHERE = Path("/nowhere")


def device(uuid: str, driver: str = "nvidia", *nodes: str, cdi: str = "", **env: str) -> Device:
    return Device(Gpu(uuid=uuid, driver=driver, cdi_name=cdi, healthy=True), nodes=nodes, env=env)


def rule(node: str) -> str:
    found = os.stat(node).st_rdev
    return f"c {os.major(found)}:{os.minor(found)} rwm"


def test_each_gpu_is_given_in_its_own_way() -> None:
    devices = (
        device("GPU-1"),
        device("AMD-1", "cdi", "/dev/zero", cdi="amd.com/gpu=1"),
        device("GPU-2", "cdi", cdi="nvidia.com/gpu=2"),
        device("X-1", "none", "/dev/full", X_DEVICES="1"),
        device("X-2", "none", "/dev/full", X_DEVICES="2"),
    )
    got = hand_over(devices, ("GPU-1", "AMD-1", "GPU-2", "X-1", "X-2"), dev=NOWHERE)
    assert got.uuids == ("GPU-1",)
    assert got.cuda == ("GPU-1", "GPU-2")
    assert got.cdi == ("amd.com/gpu=1", "nvidia.com/gpu=2")
    assert got.nodes == ("/dev/full",)
    assert got.env == {"X_DEVICES": "1,2"}
    assert (got.denied, got.missing, got.engine_only, got.hide) == ((), (), (), True)


def test_what_is_not_claimed_is_denied_and_what_several_share_is_not() -> None:
    devices = (
        device("a", "none", "/dev/full", "/dev/null"),
        device("b", "none", "/dev/zero", "/dev/null"),
    )
    assert hand_over(devices, ("a",), dev=NOWHERE).denied == (rule("/dev/zero"),)
    nothing = hand_over(devices, (), dev=NOWHERE)
    assert set(nothing.denied) == {rule("/dev/full"), rule("/dev/zero"), rule("/dev/null")}
    assert nothing.hide


def test_a_node_without_gpus_hides_none() -> None:
    got = hand_over((), (), dev=NOWHERE)
    assert (got.hide, got.denied, got.uuids) == (False, (), ())


def test_gpus_that_were_not_discovered_are_hidden_all_the_same(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).symlink_to(
            {"nvidia0": "/dev/zero", "nvidia1": "/dev/full"}.get(name, "/dev/null")
        )
    got = hand_over((), (), dev=tmp_path)
    assert got.hide
    assert set(got.denied) == {rule("/dev/zero"), rule("/dev/full"), rule("/dev/null")}
    mine = device("GPU-1", "nvidia", str(tmp_path / "nvidia1"))
    # The driver's own node is left to a task that has a GPU.
    assert hand_over((mine,), ("GPU-1",), dev=tmp_path).denied == (rule("/dev/zero"),)


def test_an_unknown_gpu_is_missing_or_the_drivers_to_judge_before_the_first_look() -> None:
    assert hand_over((device("GPU-1"),), ("GPU-9",), dev=NOWHERE).missing == ("GPU-9",)
    early = hand_over((), ("GPU-9",), strict=False, dev=NOWHERE)
    assert (early.missing, early.uuids, early.cuda) == ((), ("GPU-9",), ("GPU-9",))


def test_a_cdi_name_alone_is_for_engines_only() -> None:
    one = device("AMD-1", "cdi", cdi="amd.com/gpu=1")
    assert hand_over((one,), ("AMD-1",), dev=NOWHERE).engine_only == ("AMD-1",)


def test_where_nothing_is_known_claims_are_passed_on() -> None:
    assert as_claimed(("GPU-1",)).uuids == ("GPU-1",)
    assert not as_claimed(()).hide


@given(st.lists(st.sampled_from("abcdefgh"), unique=True), st.sets(st.sampled_from("abcdefgh")))
def test_given_and_claimed_are_the_same(claimed: list[str], known: set[str]) -> None:
    got = hand_over([device(u) for u in sorted(known)], tuple(claimed), dev=NOWHERE)
    assert set(got.uuids) | set(got.missing) == set(claimed)
    assert set(got.uuids) <= known and not set(got.missing) & known
    assert [u for u in claimed if u in got.uuids] == list(got.uuids)
