"""Tasks as host processes: see runtime.ProcessRuntime and ../README.md."""

from agent.runtime.process.runtime import HostPorts, ProcessRuntime

__all__ = ["HostPorts", "ProcessRuntime"]
