"""A small hub on loopback: one repository that huggingface_hub can list and read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.files.file_server import FileServer, Reply, run_server

COMMIT = "c" * 40
REPO = "org/set"


class Hub:
    """A repository of the hub, as far as listing and downloading need it."""

    def __init__(self, server: FileServer, kind: str = "datasets") -> None:
        self.server = server
        self.kind = kind
        server.headers = {"X-Repo-Commit": COMMIT}
        self.tree: list[dict[str, object]] = []
        self._publish()

    def add(self, path: str, body: bytes, *replies: Reply, large: bool = False) -> None:
        self.server.serve(self.place(path), body, *replies)
        oid = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(body), "oid": oid}
        if large:
            digest = hashlib.sha256(body).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(body), "pointerSize": 130}
        self.tree.append(entry)
        self._publish()

    def place(self, path: str) -> str:
        prefix = "datasets/" if self.kind == "datasets" else ""
        return f"{prefix}{REPO}/resolve/{COMMIT}/{path}"

    def _publish(self) -> None:
        info = {"id": REPO, "sha": COMMIT, "siblings": []}
        for revision in ("", "/revision/main", "/revision/v1"):
            self.server.serve(f"api/{self.kind}/{REPO}{revision}", json.dumps(info).encode())
        tree = json.dumps([*self.tree, {"type": "directory", "path": "bbox", "oid": "d" * 40}])
        for revision in (COMMIT, "main"):
            self.server.serve(f"api/{self.kind}/{REPO}/tree/{revision}", tree.encode())


@contextmanager
def run_hub(kind: str = "datasets") -> Iterator[Hub]:
    """Let huggingface_hub talk to a hub on loopback until the block ends."""
    from huggingface_hub import close_session, constants

    with run_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", server.address)
        # Whatever might pass the endpoint by ends here, too, and not on the real hub.
        place = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", place)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        close_session()
        yield Hub(server, kind)
        close_session()
