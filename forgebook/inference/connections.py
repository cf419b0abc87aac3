"""Limits on clients of the endpoint: how many may be connected, and how long a request may take to arrive.

    uvicorn.Server(http_settings(app)).run()

A client that sends half of its headers, or nothing, is disconnected; where all connections are taken, the one that
has waited longest for its client makes room for a new one.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["BODY_SECONDS", "HEADER_SECONDS", "MAX_CONNECTIONS", "http_settings"]

# A server answers some requests at a time and lets others wait; more open connections are not of use to anybody.
MAX_CONNECTIONS = 512
# For all of a request's headers, and then for all of its body, to arrive.
HEADER_SECONDS = 10
BODY_SECONDS = 20

BUSY = b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def http_settings(app: Any, **settings: Any) -> uvicorn.Config:
    """Return uvicorn's settings for the endpoint, with these limits. The body's time is checked where it is read."""
    usual = {"log_level": "error", "access_log": False, "timeout_graceful_shutdown": 5, "lifespan": "off"}
    return uvicorn.Config(app, **{**usual, **settings}, http=_LimitedProtocol, ws="none")


class _LimitedProtocol(H11Protocol):
    """One connection. since: when it began to wait for its client."""

    since = 0.0
    timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as H11Protocol's
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS and not self._make_room():
            transport.write(BUSY)
            transport.close()
            return
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _awaits_headers(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _awaits_client(self) -> bool:
        return self._awaits_headers() or self.cycle.more_body

    def _watch(self) -> None:
        """Start the clock where headers are awaited, once per request; stop it where they are complete."""
        if not self._awaits_headers():
            self._stop_timer()
        elif self.timer is None:
            self.since = self.loop.time()
            self.timer = self.loop.call_later(HEADER_SECONDS, self._end_waiting)

    def _end_waiting(self) -> None:
        self.timer = None
        if self._awaits_headers():
            self.transport.abort()

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _make_room(self) -> bool:
        """Disconnect the client that has kept its connection waiting for longest; return False if all are served."""
        others = (one for one in self.connections if isinstance(one, _LimitedProtocol) and one is not self)
        waiting = [one for one in others if one._awaits_client() and not one.transport.is_closing()]
        if waiting:
            min(waiting, key=lambda one: one.since).transport.abort()
        return bool(waiting)
