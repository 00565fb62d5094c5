"""A real vLLM server process on loopback, started with the very command line that users are told.

Needs an environment with vLLM: the one that ``make test`` builds. Use it as a context manager::

    with ServerProcess(checkpoint.folder, tmp_path) as server:
        ColQwen3Encoder(checkpoint.folder, engine="server", url=server.url)
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from colqwen3_retrievers.engines.options import VLLMOptions
from colqwen3_retrievers.engines.vllm.serving import serve_command

START_SECONDS = 600.0
"""Far beyond the fifteen seconds that a tiny checkpoint takes on a quiet machine, for a machine may be busy."""

# vLLM on a CPU: little memory for keys and values, one thread, and no attempt to bind it to a core others use.
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


class ServerProcess:
    """A vLLM server over one checkpoint folder.

    Args:
        model: the checkpoint's folder; what vLLM needs beside the weights is written into ``work``.
        work: a folder of the test's own, for that and for the log.
        port: to listen on; None takes a free one, which a restart keeps.
        environment: variables beyond those of this process.
        extra: further arguments for vLLM.
        api_key: asked of clients, passed as a variable.
        dtype: of the backbone.
        max_visual_tokens: most visual tokens a page.
        worker_processes: whether the model runs in a process of its own below the engine's, as on several GPUs; without
            it the server starts ten seconds sooner.
        command: the whole command instead of ours, to see what a server somebody else started does; ``{port}`` in it
            is filled in.
    """

    def __init__(
        self,
        model: str | Path,
        work: Path,
        *,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
        extra: Sequence[str] = (),
        api_key: str | None = None,
        dtype: str = "float32",
        max_visual_tokens: int | None = None,
        worker_processes: bool = False,
        command: Sequence[str] | None = None,
    ) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = work / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._environment = {**os.environ, **CPU_ENVIRONMENT}
        self._environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1" if worker_processes else "0"
        self._environment.update(environment or {})
        if api_key is not None:
            self._environment["VLLM_API_KEY"] = api_key
        if command is None:
            command = serve_command(
                model,
                folder=work / "served",
                port=self.port,
                dtype=dtype,
                max_visual_tokens=max_visual_tokens,
                options=VLLMOptions(enforce_eager=True),
                launcher="python",  # the CPU package has no `vllm` command that works
                extra=(*extra, "--distributed-executor-backend", "mp" if worker_processes else "uni"),
            )
        self.command = [part.replace("{port}", str(self.port)) for part in command]

    def start(self, *, wait: bool = True, seconds: float = START_SECONDS) -> Self:
        """Start the process, and wait until it answers."""
        assert self.process is None, "it is running"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # one signal then reaches the engine's processes too
            )
        if wait:
            self.wait(seconds)
        return self

    def wait(self, seconds: float = START_SECONDS) -> None:
        """Wait until ``/health`` answers 200; a process that died, or time that ran out, fails with the log's end."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                code = self.process.returncode
                self.kill()
                raise AssertionError(f"the server ended with code {code}:\n{self.log_tail()}")
            if self.healthy():
                return
            time.sleep(0.2)
        self.kill()
        raise AssertionError(f"the server did not answer within {seconds:.0f} s:\n{self.log_tail()}")

    def healthy(self) -> bool:
        """Whether it answers 200 to ``/health`` now."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def terminate(self, seconds: float = 30.0) -> int | None:
        """Ask it to end (SIGTERM), and make it end when it does not. Returns the exit code."""
        return self._end(signal.SIGTERM, seconds)

    def kill(self) -> int | None:
        """End it and everything it started at once (SIGKILL)."""
        return self._end(signal.SIGKILL, 30.0)

    def log_text(self) -> str:
        """What it has written so far, over all restarts."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def log_tail(self, lines: int = 40) -> str:
        """The end of it."""
        return "\n".join(self.log_text().splitlines()[-lines:])

    def _end(self, how: signal.Signals, seconds: float) -> int | None:
        process, self.process = self.process, None
        if process is None:
            return None
        _signal_group(process, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        _signal_group(process, signal.SIGKILL)  # whoever of its children is left
        return process.wait(30)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.terminate()


def free_port() -> int:
    """A port nobody listens on at the moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def has_vllm() -> bool:
    """Whether this environment can run such a server."""
    import importlib.util

    return importlib.util.find_spec("vllm") is not None


def _signal_group(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


if __name__ == "__main__":  # python -m tests.server_process FOLDER: for looking around by hand
    import tempfile

    with tempfile.TemporaryDirectory() as made, ServerProcess(sys.argv[1], Path(made)) as running:
        sys.stdout.write(f"{running.url} {running.log}\n")
        sys.stdout.flush()
        signal.pause()
