"""A worker keeps a bundle loaded and draws for clients on the same machine, through a Unix socket (docs/farm.md)."""

from l2p_runtime.worker.client import draw, log_path, request_drawing, stop_worker, worker_status
from l2p_runtime.worker.messages import Message
from l2p_runtime.worker.server import IDLE_SECONDS, Emit, Handle, serve
from l2p_runtime.worker.sockets import bind, make_private_folder

__all__ = [
    "IDLE_SECONDS",
    "Emit",
    "Handle",
    "Message",
    "bind",
    "draw",
    "log_path",
    "make_private_folder",
    "request_drawing",
    "serve",
    "stop_worker",
    "worker_status",
]
