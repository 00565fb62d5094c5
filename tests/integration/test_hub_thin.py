"""A client of a server reads some megabytes of a hub model's weights where they lie, and knows it by the same print."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from colqwen3_retrievers.models.checkpoint import open_checkpoint
from tests.checkpoints import make_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = """
from colqwen3_retrievers.models.checkpoint import open_checkpoint
found = open_checkpoint("owner/tiny", weights=False)
print(found.fingerprint, found.family.name, found.dim, any(r.file.exists() for r in found.tensors.values()))
"""


@dataclass
class Hub:
    """A hub on this machine; the weights' bytes come from another port, as from the hub's store."""

    folder: Path
    ranges: bool = True
    weights_sent: int = 0
    whole_weights: int = 0
    keys_at_the_store: list[str] = field(default_factory=list)


def serve(hub: Hub, store: str | None) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            files = sorted(hub.folder.iterdir())
            if path.startswith("/api/models/owner/tiny/tree/"):
                tree = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
                self.send(200, json.dumps(tree).encode(), {}, with_body=with_body)
                return
            if path.startswith("/api/models/owner/tiny"):
                about = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": f.name} for f in files]}
                self.send(200, json.dumps(about).encode(), {}, with_body=with_body)
                return
            file = hub.folder / path.rpartition("/")[2]
            if not file.is_file():
                self.send(404, b"", {}, with_body=False)
            elif file.suffix != ".safetensors":
                body = file.read_bytes()
                tag = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
                self.send(200, body, tag, with_body=with_body)
            elif store is not None:
                size = {"X-Linked-Size": str(file.stat().st_size)}
                self.send(302, b"", {"Location": f"{store}/{file.name}", **size}, with_body=False)
            else:
                self.weights(file)

        def weights(self, file: Path) -> None:
            hub.keys_at_the_store += [self.headers["Authorization"]] if "Authorization" in self.headers else []
            body, asked = file.read_bytes(), self.headers.get("Range")
            if asked is None or not hub.ranges:
                hub.whole_weights += 1
                self.send(200, body, {}, with_body=True)
                return
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            part = body[first : last + 1]
            hub.weights_sent += len(part)
            told = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(body)}"}
            self.send(206, part, told, with_body=True)

        def send(self, status: int, body: bytes, headers: dict[str, str], *, with_body: bool) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Hub, str]]:
    made = Hub(tmp_path / "repository")
    store = serve(made, None)
    front = serve(made, f"http://127.0.0.1:{store.server_port}")
    yield made, f"http://127.0.0.1:{front.server_port}"
    for server in (front, store):
        server.shutdown()
        server.server_close()


def run(endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_secret",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120, check=False, env=environment
    )


@pytest.mark.parametrize("shards", [1, 3])
def test_same_print_as_from_the_folder_without_the_weights(hub: tuple[Hub, str], tmp_path: Path, shards: int) -> None:
    made, endpoint = hub
    checkpoint = make_checkpoint(made.folder, "tomoro")
    checkpoint.write(shards=shards)
    done = run(endpoint, tmp_path / "home")
    assert done.stdout.split() == [open_checkpoint(made.folder).fingerprint, "tomoro", "48", "False"], done.stderr
    total = sum(file.stat().st_size for file in made.folder.glob("*.safetensors"))
    assert 0 < made.weights_sent < total
    assert made.whole_weights == 0
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not made.keys_at_the_store


def test_a_hub_that_gives_no_parts_is_an_error_and_not_a_download(hub: tuple[Hub, str], tmp_path: Path) -> None:
    made, endpoint = hub
    make_checkpoint(made.folder, "tomoro")
    made.ranges = False
    done = run(endpoint, tmp_path / "home")
    assert "CheckpointError: owner/tiny: model.safetensors: HTTP 200 instead of a part of it" in done.stderr
    assert made.whole_weights == 1
