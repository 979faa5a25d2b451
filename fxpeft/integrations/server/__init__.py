"""Transformers' own server and continuous batching, with adapters; tried with Transformers 5.23 and 5.24."""

from fxpeft.integrations.server.running import open_server

__all__ = ["open_server"]
