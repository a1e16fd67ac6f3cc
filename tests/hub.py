"""A local server that stands in for the Hugging Face hub: what a download asks of it, and faults.

Repositories have commits, branches name them, large files lie on a host of their own as on the real
one, and the answers to what is gated or missing are the real ones' too.
"""

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_someone_who_agreed"
LARGE = (".safetensors", ".bin", ".model", ".gguf", ".pth")  # kept in large-file storage


def blob_id(content: bytes) -> str:
    """Git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        revision = self.branches.get(revision, revision)
        return revision if revision in self.commits else None


class StandInHub:
    """`requests` counts what was asked, `cuts` says how often a file's sending breaks off."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: Counter[str] = Counter()
        self.cuts: Counter[str] = Counter()
        self.cut_at = 0.5  # share of what was asked for that is sent before it breaks off
        self.silent = threading.Event()  # set, no request is answered
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.storage = f"http://localhost:{self.server.server_port}/lfs"  # another host's name

    def publish(self, name: str, folder: Path, branch: str = "main") -> str:
        """A new commit with the files of `folder` and those that every repository has."""
        files = {
            str(file.relative_to(folder)): file.read_bytes()
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        files |= {"README.md": b"# A model\n", ".gitattributes": b"*.bin filter=lfs\n"}
        repository = self.repositories.setdefault(name, Repository())
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    @contextmanager
    def running(self) -> Iterator["StandInHub"]:
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield self
        finally:
            self.silent.clear()
            self.server.shutdown()
            self.server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def log_message(self, format: str, *values: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests[f"{self.command} {path}"] += 1
        if self.hub.silent.is_set():
            while self.hub.silent.is_set():
                time.sleep(0.02)
            self.close_connection = True
            return
        if path.startswith("api/models/"):
            owner, name, *rest = path.removeprefix("api/models/").split("/")
            self.describe(f"{owner}/{name}", rest)
        elif path.startswith("lfs/"):
            _, commit, owner, name, file = path.split("/", 4)
            content = self.hub.repositories[f"{owner}/{name}"].commits[commit][file]
            self.send_content(content, {"ETag": '"of-the-storage"'}, file)
        elif path.count("/") > 3:
            owner, name, _, *rest = path.split("/")
            self.resolve(f"{owner}/{name}", "/".join(rest))
        else:  # what the client asks besides, and can do without
            self.answer(404, {}, b"")

    def describe(self, name: str, rest: list[str]) -> None:
        """What a revision is, or the list of its files."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.refuse(401, "RepoNotFound", "Repository not found")
            return
        kind, revision = rest[0] if rest else "revision", "/".join(rest[1:]) or "main"
        commit = repository.commit(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        files = repository.commits[commit]
        if kind == "tree":
            self.send_json([entry(path, content) for path, content in files.items()])
        else:
            siblings = [{"rfilename": path} for path in files]
            self.send_json({"id": name, "sha": commit, "siblings": siblings})

    def resolve(self, name: str, revision_and_file: str) -> None:
        repository = self.hub.repositories[name]
        token = self.headers.get("Authorization")
        if repository.gated and token != f"Bearer {TOKEN}":
            self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted")
            return
        revision, _, file = revision_and_file.partition("/")
        commit = repository.commit(revision)
        if commit is None or file not in repository.commits[commit]:
            self.refuse(404, "EntryNotFound", "Entry not found")
            return
        content = repository.commits[commit][file]
        heads = {"X-Repo-Commit": commit, "ETag": f'"{blob_id(content)}"'}
        if file.endswith(LARGE):
            heads |= {
                "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
                "X-Linked-Size": str(len(content)),
                "Location": f"{self.hub.storage}/{commit}/{name}/{file}",
            }
            self.answer(302, heads, b"")
        else:
            self.send_content(content, heads, file)

    def send_content(self, content: bytes, heads: dict[str, str], file: str) -> None:
        """All of it, or the part that is asked for."""
        wanted = self.headers.get("Range", "")
        status, start = 200, 0
        if wanted:
            status, start = 206, int(wanted.removeprefix("bytes=").partition("-")[0])
            heads["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        part = content[start:]
        if self.command == "GET" and self.hub.cuts[file] > 0:
            self.hub.cuts[file] -= 1
            sent = part[: int(self.hub.cut_at * len(part))]
            self.answer(status, heads, sent, length=len(part))
            self.close_connection = True
        else:
            self.answer(status, heads | {"Accept-Ranges": "bytes"}, part)

    def send_json(self, value: Any) -> None:
        self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def refuse(self, status: int, code: str, message: str) -> None:
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": message}, b"{}")

    def answer(
        self, status: int, heads: dict[str, str], body: bytes, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in heads.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def entry(path: str, content: bytes) -> dict[str, Any]:
    """A file in the list of a repository's files."""
    described: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": blob_id(content),
    }
    if path.endswith(LARGE):
        sha256 = hashlib.sha256(content).hexdigest()
        described["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return described
