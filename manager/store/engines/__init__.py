"""Logs of changes beneath the store; each module is one engine."""
