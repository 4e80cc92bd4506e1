"""Tasks as host processes: see runtime.ProcessRuntime and ../README.md."""

from agent.runtime.process.ports import HostPorts
from agent.runtime.process.runtime import ProcessRuntime

__all__ = ["HostPorts", "ProcessRuntime"]
