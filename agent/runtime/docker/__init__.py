"""Tasks as containers of a Docker Engine or Podman."""

from agent.runtime.docker.runtime import DockerRuntime

__all__ = ["DockerRuntime"]
