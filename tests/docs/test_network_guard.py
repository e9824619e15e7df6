"""The guard that closes the network works, here and in child processes."""

import socket
import subprocess
import sys

import pytest

OUTSIDE = "192.0.2.1"  # reserved for documentation (RFC 5737): nobody answers there


def test_a_connection_to_the_outside_is_refused() -> None:
    with pytest.raises(RuntimeError, match="tests run offline"):
        socket.create_connection((OUTSIDE, 80), timeout=1)


def test_a_name_outside_is_not_even_looked_up() -> None:
    with pytest.raises(RuntimeError, match="tests run offline"):
        socket.getaddrinfo("example.com", 80)


def test_a_child_process_is_refused_too() -> None:
    code = f"import socket; socket.create_connection(({OUTSIDE!r}, 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "NetworkUsedError" in done.stderr


def test_loopback_stays_open() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        assert client.getpeername() == server.getsockname()
