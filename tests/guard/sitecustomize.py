"""Close the network of a test process, loopback apart, and of every Python that it starts.

A process that a test starts goes without bitsandbytes too, unless it asks for it.

`tests/conftest.py` imports this file and puts its folder on PYTHONPATH, where a child's interpreter
looks for `sitecustomize` before it runs anything. An audit hook sees connections that libraries
make without going through a patched `socket` class, and cannot be taken off again.
"""

import ipaddress
import os
import socket
import sys

_OWN_NAMES = {"", "localhost", "localhost.localdomain", "ip6-localhost", socket.gethostname()}


SHOWS_BITSANDBYTES = "SELECTUNE_TESTS_SHOW_BITSANDBYTES"


class NetworkUsedError(RuntimeError):
    """Something in a test reached for the network; no OSError, so that nothing retries it."""


def is_loopback(host: object) -> bool:
    """Tell whether a host, by name or number, is this machine."""
    if host is None:
        return True
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name in _OWN_NAMES:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _refuse_network(event: str, args: tuple[object, ...]) -> None:
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host = args[1][0]  # a unix socket's address is no tuple
    else:
        return
    if not is_loopback(host):
        raise NetworkUsedError(f"tests run offline, yet {event} asked for {host!r}")


sys.addaudithook(_refuse_network)

# peft imports it wherever it is installed, which takes as long as torch itself; the tests of
# quantised models run inside of pytest.
if "PYTEST_CURRENT_TEST" in os.environ and SHOWS_BITSANDBYTES not in os.environ:
    sys.modules["bitsandbytes"] = None  # pyright: ignore[reportArgumentType]
