"""Published ports in user space: see proxy.Proxy and README.md."""

from agent.proxy.proxy import Proxy

__all__ = ["Proxy"]
