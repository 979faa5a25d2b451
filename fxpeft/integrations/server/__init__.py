"""Transformers' own server and continuous batching, with adapters (tried with 5.24); the extra ``serve`` is for it."""

from fxpeft.integrations.server.running import open_server

__all__ = ["open_server"]
