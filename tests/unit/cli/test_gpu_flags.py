"""Flags that ask for GPUs."""

from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from cli.gpu_flags import DEVICES, devices_of_flags, edit_gpus, gpu_options, parse_gpus
from cli.spec_paths import at, put
from swarm.v1 import DeviceRequest, ServiceSpec

GPU = ("gpu",)


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("2", DeviceRequest(count=2, capabilities=GPU)),
        ("all", DeviceRequest(count=-1, capabilities=GPU)),
        ("0", DeviceRequest(count=0, capabilities=GPU)),
        ("none", DeviceRequest(count=0, capabilities=GPU)),
        ("count=3", DeviceRequest(count=3, capabilities=GPU)),
        ("device=GPU-1", DeviceRequest(device_ids=("GPU-1",), capabilities=GPU)),
        ("device=GPU-1,GPU-2", DeviceRequest(device_ids=("GPU-1", "GPU-2"), capabilities=GPU)),
        ('"device=0,2"', DeviceRequest(device_ids=("0", "2"), capabilities=GPU)),
        ("driver=nvidia,count=1", DeviceRequest(driver="nvidia", count=1, capabilities=GPU)),
        (
            '2,"capabilities=compute,utility"',
            DeviceRequest(count=2, capabilities=("gpu", "compute", "utility")),
        ),
        (
            "device=nvidia.com/gpu=0,nvidia.com/gpu=1,driver=cdi",
            DeviceRequest(
                driver="cdi",
                device_ids=("nvidia.com/gpu=0", "nvidia.com/gpu=1"),
                capabilities=GPU,
            ),
        ),
        (
            "device=nvidia.com/gpu=0",
            DeviceRequest(device_ids=("nvidia.com/gpu=0",), capabilities=GPU),
        ),
    ],
)
def test_gpus_as_docker_takes_them(text: str, request_: DeviceRequest) -> None:
    assert parse_gpus(text) == request_


@pytest.mark.parametrize(
    "text",
    ["", "-2", "x", "device=", "device=a,a", "1,2", "count=1,count=2", "2,device=a", "size=1", '"'],
)
def test_other_forms_are_refused_with_the_accepted_ones(text: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        parse_gpus(text)
    assert caught.value.param_hint == "'--gpus'"


def flags(**values: Any) -> dict[str, Any]:
    if "gpus" in values:
        values["gpus"] = parse_gpus(values["gpus"])
    return values


def test_options_alone_ask_for_one_gpu() -> None:
    found = devices_of_flags(flags(gpu_model="A100", gpu_fraction="0.5", gpu_memory=None))
    assert found == (
        DeviceRequest(count=1, capabilities=GPU, options={"model": "A100", "fraction": "0.5"}),
    )


def test_an_update_changes_what_is_named_and_keeps_the_rest() -> None:
    tpu = DeviceRequest(count=1, capabilities=("tpu",))
    spec = put(ServiceSpec(), DEVICES, (tpu,))
    spec = edit_gpus(spec, flags(gpus="2", gpu_model="A100"))
    spec = edit_gpus(spec, flags(gpus="4"))
    assert at(spec, DEVICES) == (
        tpu,
        DeviceRequest(count=4, capabilities=GPU, options={"model": "A100"}),
    )
    spec = edit_gpus(spec, flags(gpu_model="", gpu_memory="40GiB"))
    assert at(spec, DEVICES)[1].options == {"memory": "40GiB"}
    assert edit_gpus(spec, flags()) is spec
    assert at(edit_gpus(spec, flags(gpus="0")), DEVICES) == (tpu,)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (flags(gpus="2", gpu_fraction="0.5"), "only one GPU can be shared"),
        (flags(gpus="all", gpu_fraction="0.5"), "only one GPU can be shared"),
        (flags(gpus="0", gpu_model="A100"), "--gpus 0"),
        (flags(gpus="100"), "at most 64"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(click.UsageError, match=said):
        edit_gpus(ServiceSpec(), given)


def command() -> click.Command:
    def run(**values: Any) -> None:
        click.echo(devices_of_flags(values))

    function: Any = run
    for decorate in gpu_options():
        function = decorate(function)
    return click.command()(function)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu-memory", "much"], "40GiB"),
        (["--gpu-fraction", "2"], "not a part of one GPU"),
        (["--gpu-capability", "new"], ">=8.0"),
        (["--gpu-model", "|"], "model"),
        (["--gpus", "many"], "--gpus"),
    ],
)
def test_a_wrong_value_names_its_flag_and_the_accepted_form(
    arguments: list[str], said: str
) -> None:
    done = CliRunner().invoke(command(), arguments)
    assert done.exit_code == 2
    assert arguments[0] in done.output
    assert said in " ".join(done.output.replace("│", " ").split())


def test_the_flags_read_into_requests() -> None:
    done = CliRunner().invoke(command(), ["--gpus", "2", "--gpu-model", "A100|H100"])
    assert done.exit_code == 0, done.output
    assert "'model': 'A100|H100'" in done.output
