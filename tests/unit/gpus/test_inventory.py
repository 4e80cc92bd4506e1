"""The file that declares GPUs: everything in it is taken, or told with its field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.gpus.device import Device
from agent.gpus.inventory import GPUS_MAX, merge, parse, read
from swarm import errors
from swarm.v1 import Gpu, GpuLink, GpuProximity

WHOLE = """
gpus:
  - uuid: MI300-0
    index: 3
    model: AMD Instinct MI300X
    memory: 192GiB
    cdi: amd.com/gpu=0
    compute_capability: 9.4
    numa_node: 1
    pci_address: 0000:3B:00.0
    nvlink_peers: [MI300-1]
    links: {MI300-1: one-switch}
    devices: [/dev/kfd, /dev/dri/renderD128]
    env: {ROCR_VISIBLE_DEVICES: 0}
  - uuid: MI300-1
    devices: [/dev/kfd]
    healthy: false
    health_message: fan stands still
"""


def test_every_field_reaches_the_gpu() -> None:
    one, two = parse(WHOLE.encode(), "f").devices
    assert one == Device(
        Gpu(
            uuid="MI300-0",
            index=3,
            model="AMD Instinct MI300X",
            memory_bytes=192 << 30,
            compute_capability="9.4",
            numa_node=1,
            nvlink_peers=("MI300-1",),
            healthy=True,
            driver="cdi",
            cdi_name="amd.com/gpu=0",
            pci_address="0000:3b:00.0",
            links=(GpuLink(uuid="MI300-1", proximity=GpuProximity.ONE_SWITCH),),
        ),
        nodes=("/dev/kfd", "/dev/dri/renderD128"),
        env={"ROCR_VISIBLE_DEVICES": "0"},
    )
    assert (two.gpu.index, two.gpu.numa_node, two.gpu.driver) == (1, -1, "none")
    assert (two.gpu.healthy, two.gpu.health_message) == (False, "fan stands still")


def test_the_pipe_directory_of_mps_is_a_path() -> None:
    assert parse(b"mps: /run/mps", "f").mps == "/run/mps"
    with pytest.raises(errors.Invalid, match="mps: .*the path of MPS's pipe directory"):
        parse(b"mps: run/mps", "f")


def test_an_instance_is_called_by_its_profile_too() -> None:
    text = b"gpus: [{uuid: M, parent: G, model: NVIDIA A100, mig_profile: 1g.5gb}]"
    assert parse(text, "f").devices[0].gpu.model == "NVIDIA A100 MIG 1g.5gb"


def test_json_is_read_too_and_discovery_can_be_turned_off() -> None:
    text = json.dumps({"discovery": "none", "gpus": [{"uuid": "GPU-1", "memory": 1024}]})
    inventory = parse(text.replace(" ", "\t").encode(), "f.json")
    assert not inventory.discovery
    assert inventory.devices[0].gpu.driver == "nvidia"
    assert inventory.devices[0].gpu.memory_bytes == 1024


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "the file: [] is not a mapping"),
        ("gpus: 3", "gpus: 3 is not a list"),
        ("gpu: []", "gpu: no such field; did you mean gpus?"),
        ("discovery: maybe", 'discovery: "maybe" is not nvml or none'),
        ("gpus: [3]", "gpus[0]: 3 is not a mapping"),
        ("gpus: [{}]", "gpus[0]: uuid is missing"),
        ("gpus: [{uuid: 7}]", "gpus[0].uuid: 7 is not"),
        ("gpus: [{uuid: 'a,b'}]", "gpus[0].uuid"),
        ("gpus: [{uuid: a, memroy: 1}]", "gpus[0].memroy: no such field; did you mean memory?"),
        ("gpus: [{uuid: a, memory: lots}]", "gpus[0].memory"),
        ("gpus: [{uuid: a, memory: -1}]", "gpus[0].memory"),
        ("gpus: [{uuid: a, memory: true}]", "gpus[0].memory"),
        ("gpus: [{uuid: a, index: -1}]", "gpus[0].index: -1 is not a number from 0"),
        ("gpus: [{uuid: a, index: true}]", "gpus[0].index"),
        ("gpus: [{uuid: a, model: 5}]", "gpus[0].model"),
        (
            "gpus: [{uuid: a, driver: intel}]",
            'gpus[0].driver: "intel" is not one of nvidia, cdi, none',
        ),
        ("gpus: [{uuid: a, driver: cdi}]", "gpus[0].driver: cdi needs the GPU's name"),
        ("gpus: [{uuid: a, driver: none}]", "gpus[0].driver: none needs device nodes"),
        ("gpus: [{uuid: a, cdi: gpu0}]", "gpus[0].cdi"),
        ("gpus: [{uuid: a, compute_capability: x}]", "gpus[0].compute_capability"),
        ("gpus: [{uuid: a, pci_address: 3b}]", "gpus[0].pci_address"),
        ("gpus: [{uuid: a, devices: /dev/kfd}]", 'gpus[0].devices: "/dev/kfd" is not a list'),
        ("gpus: [{uuid: a, devices: [kfd]}]", "gpus[0].devices[0]"),
        ("gpus: [{uuid: a, devices: [/dev/../etc/x]}]", "gpus[0].devices[0]"),
        ("gpus: [{uuid: a, env: [A]}]", "gpus[0].env"),
        ("gpus: [{uuid: a, env: {1A: b}}]", "gpus[0].env.1A"),
        ("gpus: [{uuid: a, links: {b: near}}]", 'gpus[0].links.b: "near" is not one of board'),
        ("gpus: [{uuid: a, links: {b: []}}]", "gpus[0].links.b"),
        ("gpus: [{uuid: a, healthy: 1}]", "gpus[0].healthy: 1 is not true or false"),
        (
            "gpus: [{uuid: a, health_message: x}]",
            "gpus[0].health_message: only with healthy: false",
        ),
        ("gpus: [{uuid: a}, {uuid: a}]", "gpus[1].uuid: a is the UUID of gpus[0] too"),
        ("gpus: [{uuid: a, nvlink_peers: [a]}]", "gpus[0]: refers to itself"),
        ("gpus: [{uuid: a, uuid: b}]", "uuid is there twice"),
        ("gpus: [", "line 1"),
        ("gpus: !!python/object:os.system x", "line 1"),
        ("? [a]\n: b", "f:"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_field(text: str, said: str) -> None:
    with pytest.raises(errors.Invalid) as raised:
        parse(text.encode(), "f")
    assert "GPU inventory f: " in raised.value.message
    assert said in raised.value.message


def test_a_mistake_in_json_is_told_with_its_place() -> None:
    with pytest.raises(errors.Invalid, match=r"f.json: line 1, column 11"):
        parse(b'{"gpus": [}', "f.json")


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(errors.Invalid) as raised:
        parse(b"gpus: [{uuid: a, index: x}, {model: y}, {uuid: b, memory: z}]", "f")
    assert len(raised.value.message.splitlines()) == 3


def test_limits_of_size_hold(tmp_path: Path) -> None:
    file = tmp_path / "gpus.yml"
    file.write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(errors.Invalid, match="longer than"):
        read(file)
    many = json.dumps({"gpus": [{"uuid": f"g{i}"} for i in range(GPUS_MAX + 1)]})
    with pytest.raises(errors.Invalid, match="at most 1024"):
        parse(many.encode(), "f")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.Unavailable, match="nothing.yml: cannot be read"):
        read(tmp_path / "nothing.yml")


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(errors.Invalid, match="UTF-8"):
        parse(b"\xff\xfe", "f")


def test_what_the_file_says_of_a_gpu_adds_to_what_the_driver_finds() -> None:
    found = Device(
        Gpu(uuid="GPU-1", model="A100", memory_bytes=5, numa_node=0, healthy=True, driver="nvidia"),
        nodes=("/dev/nvidia0",),
    )
    text = b"gpus: [{uuid: GPU-1, cdi: nvidia.com/gpu=0, healthy: false}, {uuid: other}]"
    merged = merge([found], parse(text, "f").devices)
    assert [d.gpu.uuid for d in merged] == ["GPU-1", "other"]
    gpu = merged[0].gpu
    assert (gpu.model, gpu.memory_bytes, gpu.numa_node, gpu.driver) == ("A100", 5, 0, "cdi")
    assert (gpu.healthy, gpu.health_message) == (False, "declared so in the inventory")
    assert merged[0].nodes == ("/dev/nvidia0",)


def test_the_file_does_not_make_a_sick_gpu_healthy() -> None:
    sick = Device(Gpu(uuid="g", healthy=False, health_message="lost", driver="nvidia"))
    (gpu,) = (d.gpu for d in merge([sick], parse(b"gpus: [{uuid: g, healthy: true}]", "f").devices))
    assert (gpu.healthy, gpu.health_message) == (False, "lost")
