"""Naming a hub model downloads its data files, and nothing else: against a small hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"

CODE = """
import sys
from colqwen3_retrievers import ColQwen3Encoder
with ColQwen3Encoder("owner/tiny", revision=sys.argv[1] or None, device="cpu") as encoder:
    print(encoder.info.family, encoder.info.dim, len(encoder.encode_queries(["revenue"])[0]))
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("repository") / "tiny", "tomoro").folder
    (folder / "modeling_colqwen3.py").write_text("raise SystemExit('remote code was run')")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture(scope="module")
def hub(repository: Path) -> Iterator[tuple[str, list[str]]]:
    """Answers what ``snapshot_download`` asks: the list of files of a revision, and the files."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            asked.append(path)
            if path.startswith("/api/models/owner/tiny/tree/"):
                tree = [
                    {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                    for file in sorted(repository.iterdir())
                ]
                self.send(json.dumps(tree).encode(), "application/json", with_body=with_body)
                return
            if path.startswith("/api/models/owner/tiny"):
                files = [{"rfilename": file.name} for file in sorted(repository.iterdir())]
                body = json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": files}).encode()
                self.send(body, "application/json", with_body=with_body)
                return
            file = repository / path.rpartition("/")[2]
            if path.startswith(f"/owner/tiny/resolve/{COMMIT}/") and file.is_file():
                self.send(file.read_bytes(), "application/octet-stream", with_body=with_body)
                return
            self.send_error(404)

        def send(self, body: bytes, kind: str, *, with_body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def run(endpoint: str, home: Path, revision: str = "", *, offline: bool) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", CODE, revision],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=environment,
    )


def test_data_files_are_downloaded_and_code_is_not(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    done = run(endpoint, tmp_path, offline=False)
    assert done.stdout.split() == ["tomoro", "48", "11"], done.stderr
    assert any(path.endswith("/model.safetensors") for path in asked)
    assert not [path for path in asked if path.endswith((".py", ".bin"))]
    again = run(endpoint, tmp_path, offline=True)
    assert again.stdout == done.stdout, "offline, what was downloaded is enough"


def test_a_revision_is_asked_for_by_name(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    assert run(endpoint, tmp_path, "v2", offline=False).returncode == 0
    assert "/api/models/owner/tiny/revision/v2" in asked


def test_offline_without_a_copy_is_an_error_and_asks_nobody(hub: tuple[str, list[str]], tmp_path: Path) -> None:
    endpoint, asked = hub
    before = len(asked)
    done = run(endpoint, tmp_path, offline=True)
    assert "CheckpointError: owner/tiny: cannot be downloaded from the hub" in done.stderr
    assert len(asked) == before
