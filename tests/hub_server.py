"""A small model hub on the loopback interface: downloads, uploads, and faults to order."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

_LARGE = (".safetensors", ".pth", ".bin")


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Repo:
    """Files of a repository by branch; a commit is named by the hash of its files."""

    def __init__(self, files: dict[str, bytes] | None = None, private: bool = False) -> None:
        self.branches = {"main": dict(files or {})}
        self.private = private

    def resolve(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = {self.commit(branch): files for branch, files in self.branches.items()}
        if revision in self.branches:
            return self.commit(revision), self.branches[revision]
        return (revision, commits[revision]) if revision in commits else None

    def commit(self, branch: str) -> str:
        listing = sorted((name, _blob_id(data)) for name, data in self.branches[branch].items())
        return hashlib.sha1(json.dumps([branch, listing]).encode()).hexdigest()


class Hub:
    """State of the server.

    Attributes:
        repos: Repositories by id.
        faults: Any of `gated`, `truncate` (the connection ends in the middle of large files), `corrupt` (large files
            with a flipped byte), `error` (status 500), `forbid` (uploads get status 403).
        requests: Log of (method, path).
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: set[str] = set()
        self.requests: list[tuple[str, str]] = []
        self.objects: dict[str, bytes] = {}
        self.url = ""


@contextlib.contextmanager
def serve() -> Iterator[Hub]:
    """Run a hub while the block runs."""
    hub = Hub()
    handler = type("BoundHandler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _ = self._begin()
        if "error" in self.hub.faults:
            return self._fail(500, None)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*match.groups())
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self._info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path):
            return self._tree(*match.groups())
        return self._fail(404, None)

    def do_POST(self) -> None:
        path, query = self._begin()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if "forbid" in self.hub.faults:
            return self._fail(403, None)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._lfs_batch(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path):
            repo, action, revision = match.groups()
            if repo not in self.hub.repos:
                return self._fail(404, "RepoNotFound")
            return getattr(self, f"_{action}")(repo, revision, body, query)
        return self._fail(404, None)

    def do_PUT(self) -> None:
        path, _ = self._begin()
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if _sha256(data) != path.rpartition("/")[2]:
            return self._fail(400, None)
        self.hub.objects[_sha256(data)] = data
        return self._send(200, b"")

    def _begin(self) -> tuple[str, dict]:
        parts = urlsplit(self.path)
        self.hub.requests.append((self.command, unquote(parts.path)))
        return unquote(parts.path), parse_qs(parts.query)

    def _find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in self.hub.repos:
            # Hubs do not tell strangers whether a repository is missing or private.
            self._fail(401, "RepoNotFound")
            return None
        found = self.hub.repos[repo].resolve(revision)
        if found is None:
            self._fail(404, "RevisionNotFound")
        return found

    def _file(self, repo: str, revision: str, name: str) -> None:
        found = self._find(repo, revision)
        if found is None:
            return
        commit, files = found
        if "gated" in self.hub.faults:
            return self._fail(403, "GatedRepo")
        if name not in files:
            return self._fail(404, "EntryNotFound")
        data = files[name]
        large = name.endswith(_LARGE)
        headers = {"ETag": f'"{_sha256(data) if large else _blob_id(data)}"', "X-Repo-Commit": commit}
        if large and "corrupt" in self.hub.faults:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self._send(200, data, headers, cut=large and "truncate" in self.hub.faults)

    def _info(self, repo: str, revision: str) -> None:
        found = self._find(repo, revision)
        if found is None:
            return
        commit, files = found
        siblings = []
        for name, data in files.items():
            entry = {"rfilename": name, "size": len(data), "blobId": _blob_id(data)}
            if name.endswith(_LARGE):
                entry["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        self._json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def _tree(self, repo: str, revision: str) -> None:
        found = self._find(repo, revision)
        if found is None:
            return
        entries = []
        for name, data in found[1].items():
            entry = {"type": "file", "path": name, "size": len(data), "oid": _blob_id(data)}
            if name.endswith(_LARGE):
                entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
            entries.append(entry)
        self._json(entries)

    def _create(self, body: dict) -> None:
        name = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
        if name in self.hub.repos:
            return self._fail(409, None)
        private = body.get("visibility") == "private" or bool(body.get("private"))
        # A new repository on a hub is never empty.
        self.hub.repos[name] = Repo({".gitattributes": b"*.safetensors filter=lfs\n"}, private)
        self._json({"url": f"{self.hub.url}/{name}", "id": name})

    def _branch(self, repo: str, branch: str, body: bytes, query: dict) -> None:
        branches = self.hub.repos[repo].branches
        if branch in branches:
            return self._fail(409, None)
        branches[branch] = dict(branches["main"])
        self._json({})

    def _preupload(self, repo: str, revision: str, body: bytes, query: dict) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": files})

    def _lfs_batch(self, body: dict) -> None:
        objects = []
        for item in body["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/objects/{item['oid']}"}}
            objects.append({**item, "actions": action} if item["oid"] not in self.hub.objects else item)
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, revision: str, body: bytes, query: dict) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        branches = self.hub.repos[repo].branches
        request = "create_pr" in query
        if revision not in branches:
            return self._fail(404, "RevisionNotFound")
        branch = "refs-pr-1" if request else revision
        files = dict(branches[revision])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        branches[branch] = files
        commit = self.hub.repos[repo].commit(branch)
        answer = {"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit}
        if request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/1"
        self._json(answer)

    def _json(self, value) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str | None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        start = 0
        if (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) and status == 200:
            start, status = int(match[1]), 206
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        # A cut connection never gets past the middle, however often the client resumes.
        self.wfile.write(data[start : len(data) // 2] if cut else data[start:])
        self.close_connection = self.close_connection or cut
