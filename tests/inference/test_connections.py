"""Clients that send half a request, nothing, or come in crowds, against a server of one line, over raw sockets."""

import socket
import threading
import time

import httpx
import pytest
import uvicorn

from forgebook.inference import connections
from forgebook.inference.connections import http_settings


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def address(monkeypatch):
    """A running server (host, port) that holds 8 connections and waits 0.3 s for headers."""
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 8)
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    server = uvicorn.Server(http_settings(answer, port=0, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join(10)


WHOLE = b"GET / HTTP/1.1\r\nhost: here\r\n\r\n"


def is_disconnected(connection) -> bool:
    """Read until the server closes the connection; False if it does not within 2 s."""
    connection.settimeout(2)
    try:
        while connection.recv(4096):
            pass
    except TimeoutError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: he", WHOLE + WHOLE[:20]],
    ids=["nothing", "line", "headers", "2nd"],
)
def test_half_a_request_is_disconnected(address, sent):
    with socket.create_connection(address) as connection:
        connection.sendall(sent)
        started = time.monotonic()
        assert is_disconnected(connection) and time.monotonic() - started < 1.5


def test_headers_that_drip_are_disconnected(address):
    with socket.create_connection(address) as connection, pytest.raises(ConnectionError):
        for _ in range(100):
            connection.sendall(b"x")
            time.sleep(0.02)


def test_a_connection_is_used_again(address):
    with httpx.Client(base_url="http://{}:{}".format(*address)) as client:
        for _ in range(3):
            assert client.get("/").text == "ok"
            time.sleep(0.2)  # longer in all than headers may take


def test_clients_that_send_nothing_do_not_block_others(address, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 60)
    crowd = [socket.create_connection(address) for _ in range(30)]
    assert httpx.get("http://{}:{}".format(*address)).text == "ok"
    assert sum(map(is_disconnected, crowd[:22])) == 22  # the first have waited longest
    for connection in crowd:
        connection.close()


def test_where_all_connections_are_served_a_new_one_is_refused(monkeypatch):
    """Answers that are being generated are not cut off for clients that come later."""
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    release = threading.Event()

    async def slowly(scope, receive, send):
        import asyncio

        while not release.is_set():
            await asyncio.sleep(0.01)
        await answer(scope, receive, send)

    server = uvicorn.Server(http_settings(slowly, port=0, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    served = [socket.create_connection(address) for _ in range(2)]
    for connection in served:
        connection.sendall(WHOLE)
    time.sleep(0.1)
    with socket.create_connection(address) as third:
        assert third.recv(4096).startswith(b"HTTP/1.1 503 ") and is_disconnected(third)
    release.set()
    assert [connection.recv(4096)[:15] for connection in served] == [b"HTTP/1.1 200 OK"] * 2
    for connection in served:
        connection.close()
    server.should_exit = True
    thread.join(10)
