"""A real Triton server for tests: binaries from a wheel, the Python backend, explicit model control.

The wheel `nvidia-pytriton` is only a carrier of `tritonserver`. Its Python stub works with NumPy 1 alone, so models run
in an environment of their own. Both are installed once into a cache folder, `build/triton` or `L2P_TRITON_CACHE`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CARRIER = "nvidia-pytriton==0.7.0"
STUB = ("numpy==1.26.4", "onnxruntime==1.31.1", "tokenizers==0.23.3")
STUB_NUMPY_2 = ("numpy==2.4.6", "onnxruntime==1.31.1", "tokenizers==0.23.3")
EXIT_SECONDS = 10
READY_SECONDS = 30
CACHE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs; ports are on 127.0.0.1."""

    process: subprocess.Popen[bytes]
    http_port: int
    grpc_port: int
    metrics_port: int
    log: Path
    shm_prefix: str

    @property
    def http(self) -> str:
        """URL of its HTTP side."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        """URL of its gRPC side."""
        return f"grpc://127.0.0.1:{self.grpc_port}"

    def load(self, model: str, timeout: float = 120) -> str:
        """Load a model, or load it again; the reason where that fails, else empty."""
        return self._control(model, "load", timeout)

    def unload(self, model: str) -> None:
        """Unload a model; one whose stub was killed stays in state UNLOADING, which does not keep it from loading."""
        assert not self._control(model, "unload")

    def index(self) -> list[dict[str, Any]]:
        """Name, version, state and reason of every model."""
        status, body = self.post("/v2/repository/index", {})
        assert status == 200, body
        return json.loads(body)  # type: ignore[no-any-return]

    def post(self, path: str, body: dict[str, Any] | bytes, timeout: float = 120) -> tuple[int, bytes]:
        """Status and body of a call over HTTP."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.http + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def metrics(self) -> str:
        """What `/metrics` shows."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as reply:
            return reply.read().decode()  # type: ignore[no-any-return]

    def metric(self, name: str, **labels: str) -> float:
        """The value of one counter; 0 before it is first counted."""
        for line in self.metrics().splitlines():
            if line.startswith(f"{name}{{") and all(f'{key}="{value}"' in line for key, value in labels.items()):
                return float(line.rpartition(" ")[2])
        return 0.0

    def stubs(self, model: str) -> list[int]:
        """Process numbers of a model's Python stubs."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        found = [int(child) for file in children for child in file.read_text().split()]
        return [pid for pid in found if f"/{model}/" in Path(f"/proc/{pid}/cmdline").read_text()]

    def _control(self, model: str, what: str, timeout: float = 120) -> str:
        status, body = self.post(f"/v2/repository/models/{model}/{what}", {}, timeout)
        return "" if status == 200 else json.loads(body)["error"]


@contextmanager
def serve(
    repository: Path,
    work: Path,
    packages: tuple[str, ...] = STUB,
    exit_seconds: int = EXIT_SECONDS,
    *,
    control: str = "explicit",
    cache: bool = False,
) -> Iterator[Server]:
    """Run a server on a repository; under explicit control, nothing is loaded yet.

    Args:
        repository: the model repository.
        work: an empty folder for its log, backends and environment.
        packages: what the models' Python has, beside the runtime of this checkout.
        exit_seconds: how long it may take to stop; a model whose stub was killed never does.
        control: `none` loads every model of the repository, and the server stops if one fails.
        cache: whether models may cache responses.
    """
    carrier = _cached("server", (CARRIER,), "--no-deps")
    binaries = carrier / "pytriton" / "tritonserver"
    backends, python = work / "backends", _environment(work / "venv", packages)
    _copy_backend(binaries, backends / "python")
    ports = _free_ports(3)
    prefix = f"l2p_{os.getpid()}_{ports[0]}"
    command = [
        str(binaries / "bin" / "tritonserver"),
        f"--model-repository={repository}",
        f"--backend-directory={backends}",
        *(f"--{side}-address=127.0.0.1" for side in ("http", "grpc", "metrics")),
        *(f"--{side}-port={port}" for side, port in zip(("http", "grpc", "metrics"), ports, strict=True)),
        f"--model-control-mode={control}",
        "--disable-auto-complete-config",
        "--allow-gpu-metrics=false",
        f"--exit-timeout-secs={exit_seconds}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
    ]
    if cache:
        command += [f"--cache-directory={binaries / 'caches'}", f"--cache-config=local,size={CACHE_BYTES}"]
    libraries = [str(carrier / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
    environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(libraries)}
    environment["PATH"] = f"{python.parent}{os.pathsep}{environment['PATH']}"
    log = work / "server.log"
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file, env=environment) as process:
        server = Server(process, *ports, log, prefix)
        try:
            _wait_ready(server)
            yield server
        finally:
            _stop(server)


def _stop(server: Server) -> None:
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(timeout=EXIT_SECONDS + 10)
    except subprocess.TimeoutExpired:
        server.process.kill()
    for region in Path("/dev/shm").glob(f"{server.shm_prefix}*"):  # noqa: S108 - where the kernel keeps them
        region.unlink()


def _wait_ready(server: Server) -> None:
    """Wait for every side that a test asks: a server opens HTTP first, metrics last."""
    urls = [f"{server.http}/v2/health/live", f"http://127.0.0.1:{server.metrics_port}/metrics"]
    end = time.monotonic() + READY_SECONDS
    while urls and time.monotonic() < end and server.process.poll() is None:
        try:
            with urllib.request.urlopen(urls[0], timeout=5):
                urls.pop(0)
        except OSError:
            time.sleep(0.05)
    if urls:
        raise AssertionError(f"no answer from {urls[0]}\n{server.log.read_text()}")


def _cached(name: str, packages: tuple[str, ...], *options: str) -> Path:
    """A folder with packages in it, installed on first use; a folder that is there is whole."""
    cache = Path(os.environ.get("L2P_TRITON_CACHE", ROOT / "build" / "triton"))
    key = "-".join(package.replace("==", "-") for package in packages)
    folder = cache / f"{name}-py{sys.version_info.major}{sys.version_info.minor}-{key}"
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=cache))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options]
        subprocess.run([*command, "--target", str(partial), *packages], check=True)
        try:
            partial.rename(folder)
        except OSError:  # another session was faster
            shutil.rmtree(partial)
    return folder


def _environment(folder: Path, packages: tuple[str, ...]) -> Path:
    """A Python that has cached packages and this checkout's runtime; the stub does not read PYTHONPATH."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    paths = [str(_cached("stub", packages)), str(ROOT / "runtime")]
    (folder / "lib" / version / "site-packages" / "serving.pth").write_text("\n".join(paths) + "\n")
    return folder / "bin" / "python3"


def _copy_backend(binaries: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    source = binaries / "backends" / "python"
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        shutil.copy2(source / name, folder)
    stub = f"{sys.version_info.major}.{sys.version_info.minor}"
    copied = shutil.copy2(binaries / "python_backend_stubs" / stub / "triton_python_backend_stub", folder)
    Path(copied).chmod(0o755)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
