"""A web page that draws on a Triton server, and the small server that a browser gets it from.

    python -m l2p_runtime.client.page http://127.0.0.1:8000 [PORT]

A browser lets no page speak to a Triton server, which sends no CORS headers. So the page's files and the two calls that
the page makes come from one place: this server passes only these two on. Standard library only.
"""

from __future__ import annotations

import http.client
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from l2p_runtime.client.page.handler import Handler
from l2p_runtime.client.transport import parse_address
from l2p_runtime.errors import HostError, L2PError, UsageError

PORT = 8080
TIMEOUT_S = 600.0
CONNECTIONS_MAX = 64
CONNECT_SECONDS = 10.0
_LOCAL = ("127.0.0.1", "::1", "localhost")
_BUSY = b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class PageSpec:
    """Where the page is shown, and whose pictures.

    Attributes:
        server: of Triton's HTTP side, `http://host:8000`.
        host: address to listen on; other machines reach the page only where this is none of this machine's own.
        port: 0 for any that is free.
        timeout_s: how long the server may be silent, a wait in its queue included.
        names: host names that a browser knows the page by beside this machine's own, behind a web server.
    """

    server: str
    host: str = "127.0.0.1"
    port: int = PORT
    timeout_s: float = TIMEOUT_S
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if parse_address(self.server).scheme != "http":
            raise UsageError(f"`{self.server[:80]}` is gRPC, a page needs HTTP", hint="use http://host:8000")
        if not 0 <= self.port <= 65535:
            raise UsageError(f"port is {self.port}, expected 0 to 65535")
        if not 0 < self.timeout_s <= 86_400:
            raise UsageError(f"time-out is {self.timeout_s:g} s, expected more than 0 and at most 86400")


class PageServer(ThreadingHTTPServer):
    """Serves the page until it is shut down; made by `open_page`, to be closed.

    Attributes:
        spec: what was asked for.
        upstream: host and port of the Triton server.
        local: whether only this machine reaches it.
    """

    daemon_threads = True
    request_queue_size = CONNECTIONS_MAX

    def __init__(self, spec: PageSpec) -> None:
        address = parse_address(spec.server)
        self.spec, self.local = spec, spec.host in _LOCAL
        self.upstream = (address.host, address.port)
        self._free = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self.address_family = socket.AF_INET6 if ":" in spec.host else socket.AF_INET
        super().__init__((spec.host, spec.port), Handler)

    @property
    def url(self) -> str:
        """Where a browser finds the page."""
        host, port = self.spec.host, self.server_address[1]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def server_bind(self) -> None:
        """Bind; the base would ask a name server for this machine's name besides."""
        TCPServer.server_bind(self)

    def connect(self) -> http.client.HTTPConnection:
        """A connection to the Triton server.

        Raises:
            OSError: no server answers.
        """
        connection = http.client.HTTPConnection(*self.upstream, timeout=min(CONNECT_SECONDS, self.spec.timeout_s))
        connection.connect()
        connection.sock.settimeout(self.spec.timeout_s)
        return connection

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, or at once with 503 where too many are busy."""
        if not self._free.acquire(blocking=False):
            with suppress(OSError):
                request.sendall(_BUSY)
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, then make room for another."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say what failed, unless it is a browser that went away."""
        del request, client_address
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            sys.stderr.write(f"the page's server failed: {type(error).__name__}: {error}\n")


def open_page(spec: PageSpec) -> PageServer:
    """Listen; `serve_forever` answers.

    Raises:
        HostError: the port is taken, or the address is not this machine's.
    """
    try:
        return PageServer(spec)
    except OSError as error:
        raise HostError(
            f"cannot listen on {spec.host}:{spec.port}: {error.strerror or error}", hint="choose another --port"
        ) from error


def main(arguments: Sequence[str]) -> int:
    """Serve until interrupted; the URL goes to stdout."""
    try:
        port = int(arguments[1]) if len(arguments) > 1 else PORT
        with open_page(PageSpec(arguments[0] if arguments else "http://127.0.0.1:8000", port=port)) as server:
            sys.stdout.write(f"{server.url}\n")
            sys.stdout.flush()
            server.serve_forever()
    except (L2PError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code if isinstance(error, L2PError) else UsageError.exit_code
    except KeyboardInterrupt:
        return 130
    return 0
