"""A machine with NVIDIA GPUs that is a text file: builds tests/fakes/nvml.c in place of the driver's library."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest

GIB = 1 << 30
_numbers = itertools.count(1)  # the library tells each number once in its life
SOURCE = Path(__file__).with_suffix(".c")


def build(folder: Path) -> Path:
    """Compiles the library; the folder that holds libnvidia-ml.so.1, for LD_LIBRARY_PATH."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler: install gcc and libc6-dev")
    subprocess.run(
        [
            compiler,
            "-shared",
            "-fPIC",
            "-Wl,-soname,libnvidia-ml.so.1",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-Wno-format-truncation",
            "-o",
            folder / "libnvidia-ml.so.1",
            SOURCE,
        ],
        check=True,
    )
    return folder


class Machine:
    """Eight GPUs of 80 GiB: four on each of two NUMA nodes, 0 to 3 joined by NVLink one with the next, 4 to 7 by a switch."""

    def __init__(self, file: Path, gpus: int = 8) -> None:
        self.file = file
        self.fields: dict[tuple[int, str], str] = {}
        self.extra: dict[str, list[str]] = {}
        self.absent = False
        for i in range(gpus):
            for name, value in {
                "uuid": uuid(i),
                "name": "NVIDIA A100-SXM4-80GB",
                "memory": 80 * GIB,
                "used": i * GIB,
                "busy": 10 * i,
                "minor": i,
                "pci": f"1f00:{16 + i:02x}:00",
                "capability": "8.0",
                "numa": i // 4,
            }.items():
                self.fields[i, name] = str(value)
        links = self.extra["topology"] = []
        for a in range(gpus):
            for b in range(a + 1, gpus):
                level = 10 if a // 2 == b // 2 else 30 if a // 4 == b // 4 else 50
                links.append(f"level {a} {b} {level}")
            if a < 4:
                links += [f"nvlink {a} 0 {(a + 1) % 4}", f"nvlink {a} 1 {(a - 1) % 4}"]
            else:
                links += [f"nvlink {a} {n} -1" for n in range(6)]
        self.write()

    def write(self) -> None:
        lines = ["absent"] if self.absent else []
        lines += ["driver 580.65.06"]
        lines += [f"gpu {i} {name} {value}" for (i, name), value in self.fields.items()]
        for more in self.extra.values():
            lines += more
        new = self.file.with_suffix(".new")
        new.write_text("\n".join(lines) + "\n")
        new.replace(self.file)

    def set(self, index: int, **fields: object) -> None:
        for name, value in fields.items():
            self.fields[index, name] = str(value)
        self.write()

    def add(self, *lines: str) -> None:
        self.extra.setdefault("added", []).extend(lines)
        self.write()

    def xid(self, index: int, number: int, instance: int = -1) -> None:
        """An event of the driver."""
        self.add(f"event {next(_numbers)} {index} {number} {instance}")

    def load(self, *, driver: bool) -> None:
        """Loads the driver, or takes it away."""
        self.absent = not driver
        self.write()


def uuid(index: int) -> str:
    return f"GPU-0000000{index}-aaaa-bbbb-cccc-000000000000"
