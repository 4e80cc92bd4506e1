"""What a task asks of GPUs, read from its reservations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm import errors, gpus
from swarm.gpus import WHOLE, GpuAsk, ask_of
from swarm.v1 import DeviceRequest, GenericResource, Gpu, Resources

GIB = 1 << 30


def request(**fields: object) -> DeviceRequest:
    return DeviceRequest(**{"capabilities": ("gpu",), **fields})  # type: ignore[arg-type]


def asked(*requests: DeviceRequest, generic: tuple[GenericResource, ...] = ()) -> GpuAsk | None:
    return ask_of(Resources(devices=requests, generic=generic))


@pytest.mark.parametrize(
    ("requests", "ask"),
    [
        pytest.param((request(),), GpuAsk(count=1), id="one where nothing is said"),
        pytest.param((request(count=2),), GpuAsk(count=2), id="count"),
        pytest.param((request(count=-1),), GpuAsk(all=True), id="all"),
        pytest.param((request(device_ids=("b", "a")),), GpuAsk(ids=("a", "b")), id="ids"),
        pytest.param((request(count=1), request(count=2)), GpuAsk(count=3), id="requests add up"),
        pytest.param(
            (request(count=1), request(device_ids=("a",))),
            GpuAsk(count=1, ids=("a",)),
            id="a number and names",
        ),
        pytest.param((request(count=-1), request(count=2)), GpuAsk(all=True), id="all and more"),
        pytest.param(
            (request(options={"fraction": "0.5", "memory": "10GiB"}),),
            GpuAsk(count=1, share=WHOLE // 2, memory_bytes=10 * GIB),
            id="fraction",
        ),
        pytest.param(
            (request(device_ids=("a",), options={"fraction": "1/3"}),),
            GpuAsk(ids=("a",), share=333_333),
            id="fraction of a named one",
        ),
        pytest.param(
            (request(count=3, options={"fraction": "1.0"}),), GpuAsk(count=3), id="fraction of 1"
        ),
        pytest.param(
            (request(options={"model": "H100|  A100 |A100", "capability": "8"}),),
            GpuAsk(count=1, models=("A100", "H100"), capability=">=8.0"),
            id="model and capability",
        ),
        pytest.param(
            (DeviceRequest(driver="NVIDIA", capabilities=()),),
            GpuAsk(count=1, vendor="nvidia"),
            id="by driver",
        ),
        pytest.param((DeviceRequest(capabilities=("tpu",), count=2),), None, id="no GPU"),
        pytest.param((request(count=0),), GpuAsk(), id="none asked for"),
    ],
)
def test_device_requests_are_one_ask(
    requests: tuple[DeviceRequest, ...], ask: GpuAsk | None
) -> None:
    assert asked(*requests) == ask


def test_generic_resources_of_gpu_kinds_are_an_ask() -> None:
    ask = asked(
        generic=(
            GenericResource(kind="NVIDIA-GPU", count=2),
            GenericResource(kind="gpu", name="GPU-7"),
            GenericResource(kind="licence", count=1),
        )
    )
    assert ask == GpuAsk(
        count=2,
        ids=("GPU-7",),
        vendor="nvidia",
        generic=(("NVIDIA-GPU", 2),),
        generic_named=(("gpu", "GPU-7"),),
    )


def test_a_kind_that_the_node_declares_itself_takes_no_gpu_there() -> None:
    ask = asked(
        request(count=1),
        generic=(
            GenericResource(kind="gpu", count=2),
            GenericResource(kind="NVIDIA-GPU", name="GPU-7"),
        ),
    )
    assert ask is not None
    assert ask.served_by(()) == ask
    assert ask.served_by({"licence"}) == ask
    left = ask.served_by({"gpu"})
    assert left is not None
    assert (left.count, left.ids, left.generic) == (1, ("GPU-7",), ())
    rest = left.served_by({"NVIDIA-GPU"})
    assert rest is not None
    assert (rest.count, rest.ids) == (1, ())
    only = asked(generic=(GenericResource(kind="gpu", count=2),))
    assert only is not None
    assert only.served_by({"gpu"}) is None


def test_reservations_without_gpus_ask_for_nothing() -> None:
    assert ask_of(None) is None
    assert ask_of(Resources(cpu_nano=1)) is None
    assert asked(generic=(GenericResource(kind="licence", count=1),)) is None


@pytest.mark.parametrize(
    ("requests", "said"),
    [
        pytest.param((request(options={"mem": "1g"}),), ("'mem'", "model, memory"), id="unknown"),
        pytest.param((request(options={"fractoin": "1"}),), ("did you mean fraction",), id="near"),
        pytest.param((request(options={"memory": "lots"}),), ("memory", "40GiB"), id="memory"),
        pytest.param((request(options={"memory": "0"}),), ("memory", "nothing"), id="no memory"),
        pytest.param((request(options={"fraction": "0"}),), ("fraction", "1/3"), id="0"),
        pytest.param((request(options={"fraction": "1.5"}),), ("fraction", "not a part"), id="1.5"),
        pytest.param((request(options={"fraction": "1/0"}),), ("fraction",), id="1/0"),
        pytest.param((request(options={"fraction": "nan"}),), ("fraction",), id="nan"),
        pytest.param((request(options={"fraction": "0.0000001"}),), ("millionth",), id="tiny"),
        pytest.param((request(options={"model": "A100|"}),), ("model", "empty"), id="model"),
        pytest.param((request(options={"capability": "sm_80"}),), (">=8.0",), id="capability"),
        pytest.param(
            (request(count=2, options={"fraction": "0.5"}),), ("only one GPU",), id="two halves"
        ),
        pytest.param(
            (request(count=-1, options={"fraction": "0.5"}),), ("all GPUs",), id="all halves"
        ),
        pytest.param(
            (request(options={"fraction": "0.5"}), request(options={"fraction": "0.5"})),
            ("fractions of several",),
            id="two requests of halves",
        ),
        pytest.param(
            (request(options={"model": "A100"}), request()), ("model", "same options"), id="differ"
        ),
        pytest.param((request(driver="nvidia"), request(driver="amd")), ("one vendor",), id="both"),
        pytest.param((request(count=65),), ("at most 64",), id="too many"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_with_its_reason(
    requests: tuple[DeviceRequest, ...], said: tuple[str, ...]
) -> None:
    with pytest.raises(errors.Invalid) as caught:
        asked(*requests)
    for words in said:
        assert words in caught.value.message


@pytest.mark.parametrize(
    ("want", "model", "matches"),
    [
        ("A100", "NVIDIA A100-SXM4-40GB", True),
        ("a100-sxm4", "NVIDIA A100-SXM4-40GB", True),
        ("nvidia a100", "NVIDIA A100-SXM4-40GB", True),
        ("A10", "NVIDIA A100-SXM4-40GB", False),
        ("A100 40GB", "NVIDIA A100-SXM4-40GB", False),
        ("H100", "NVIDIA A100-SXM4-40GB", False),
        ("Tesla V100", "Tesla V100-PCIE-16GB", True),
        ("RTX 4090", "NVIDIA GeForce RTX 4090", True),
        ("A100", "", False),
    ],
)
def test_a_model_matches_by_whole_words(want: str, model: str, matches: bool) -> None:
    assert gpus.model_matches(want, model) is matches


@pytest.mark.parametrize(
    ("want", "capability", "holds"),
    [
        (">=8.0", "8.0", True),
        (">=8.0", "10.0", True),
        (">8.0", "8.0", False),
        ("<9.0", "8.9", True),
        ("<=8.6", "8.9", False),
        ("==8.6", "8.6", True),
        (">=8.0", "", False),
        (">=8.0", "gfx942", False),
    ],
)
def test_capabilities_compare_as_numbers(want: str, capability: str, holds: bool) -> None:
    assert gpus.capability_holds(want, capability) is holds


def test_a_gpu_says_in_what_it_is_not_as_asked() -> None:
    gpu = Gpu(
        uuid="GPU-1",
        index=3,
        model="NVIDIA A100-SXM4-40GB",
        memory_bytes=40 * GIB,
        compute_capability="8.0",
        driver="nvidia",
        cdi_name="nvidia.com/gpu=3",
    )
    assert gpus.misfit(GpuAsk(count=1), gpu) == ""
    assert gpus.misfit(GpuAsk(count=1, models=("A100", "H100"), memory_bytes=40 * GIB), gpu) == ""
    assert gpus.misfit(GpuAsk(count=1, models=("H100",)), gpu) == "model"
    assert gpus.misfit(GpuAsk(count=1, memory_bytes=41 * GIB), gpu) == "gpu_memory"
    assert gpus.misfit(GpuAsk(count=1, capability=">=9.0"), gpu) == "capability"
    assert gpus.misfit(GpuAsk(count=1, vendor="amd"), gpu) == "vendor"
    assert all(gpus.is_named(name, gpu) for name in ("GPU-1", "3", "nvidia.com/gpu=3"))
    assert not gpus.is_named("0", gpu)
    instance = Gpu(uuid="MIG-1", index=3, parent_uuid="GPU-1")
    assert not gpus.is_named("3", instance)
    assert not gpus.is_named("", instance)


@pytest.mark.parametrize(
    ("gpu", "vendor"),
    [
        (Gpu(driver="nvidia"), "nvidia"),
        (Gpu(driver="cdi", cdi_name="amd.com/gpu=0"), "amd"),
        (Gpu(driver="none", model="AMD Instinct MI300X"), "amd"),
        (Gpu(driver="none", model="Gaudi"), ""),
    ],
)
def test_the_vendor_is_known_by_driver_name_or_model(gpu: Gpu, vendor: str) -> None:
    assert gpus.vendor_of(gpu) == vendor


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (GpuAsk(count=1), "1 GPU"),
        (GpuAsk(count=2, memory_bytes=40 * GIB), "2 GPUs with 40 GiB each"),
        (GpuAsk(all=True, models=("A100",)), "all GPUs of a node of model A100"),
        (GpuAsk(ids=("a", "b")), "2 GPUs a, b"),
        (GpuAsk(count=1, ids=("a",)), "2 GPUs (among them a)"),
        (GpuAsk(count=1, share=WHOLE // 2, memory_bytes=GIB), "0.5 of a GPU with 1 GiB"),
        (GpuAsk(ids=("a",), share=WHOLE // 4), "0.25 of GPU a"),
        (GpuAsk(count=1, capability=">=8.0"), "1 GPU, compute capability >=8.0"),
    ],
)
def test_an_ask_reads_as_a_sentence(ask: GpuAsk, text: str) -> None:
    assert str(ask) == text


@given(st.integers(1, WHOLE))
def test_a_share_that_is_printed_reads_back(share: int) -> None:
    assert gpus.parse_share(gpus.format_share(share)) == share
