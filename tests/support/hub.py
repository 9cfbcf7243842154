"""A stand-in of the Hugging Face hub on localhost: the routes that pushing and fetching a model use, over a few dicts.

Large files go by the LFS protocol (what huggingface_hub speaks where hf_xet is switched off). Faults are set by tests.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secretSecretSecretSecret"
USER = "me"


@dataclass
class Repo:
    """A repository: its files after each commit, and the messages."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        content = self.files | files
        names = sorted((name, hashlib.sha1(data).hexdigest()) for name, data in content.items())
        sha = hashlib.sha1(repr((len(self.commits), names)).encode()).hexdigest()
        self.commits.append((sha, content))
        return sha

    @property
    def head(self) -> str:
        return self.commits[-1][0]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1] if self.commits else {}


class Fault(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str = "", code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class Hub:
    """The hub's state. log: (method, path) of each request; before: called with them before each answer;
    makes_private: what the owner has settled for repositories of which the request does not say."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # large files by their sha256
        self.log: list[tuple[str, str]] = []
        self.before: Callable[[str, str], None] = lambda method, path: None
        self.url = ""
        self.makes_private = False

    def new(self, name: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> Repo:
        self.repos[name] = Repo(private)
        self.repos[name].commit(files or {".gitattributes": b""})
        return self.repos[name]

    def asked(self, method: str, part: str) -> int:
        """How many requests there were of that kind."""
        return sum(method == each and part in path for each, path in self.log)

    # ---- the routes ----

    def answer(self, method: str, path: str, authorized: bool, body: bytes) -> tuple[dict[str, str], bytes]:
        """(headers, content) of a request's answer; Fault."""
        for pattern, route in ROUTES:
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                return route(self, authorized, body, **found.groupdict())
        raise Fault(404, f"no such route: {method} {path}")

    def repo(self, name: str, authorized: bool, write: bool = False) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and not authorized):
            raise Fault(404 if authorized else 401, "Repository not found", "RepoNotFound")
        if write and (not authorized or not name.startswith(f"{USER}/")):
            raise Fault(403, "You don't have the required permissions")
        return repo

    def whoami(self, authorized: bool, body: bytes) -> Any:
        if not authorized:
            raise Fault(401, "Invalid credentials in Authorization header")
        return _json({"name": USER, "type": "user", "orgs": []})

    def create(self, authorized: bool, body: bytes) -> Any:
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        if not authorized or wanted["organization"] != USER:
            raise Fault(
                403, f"You don't have the rights to create a model under the namespace {wanted['organization']}"
            )
        said = wanted.keys() & {"private", "visibility"}
        private = wanted.get("private") or wanted.get("visibility") == "private" if said else self.makes_private
        self.new(name, private=bool(private))
        return _json({"url": f"{self.url}/{name}"})

    def info(self, authorized: bool, body: bytes, repo: str, revision: str = "") -> Any:
        known = self.repo(repo, authorized)
        names = [{"rfilename": name} for name in known.files]
        return _json({"id": repo, "sha": known.head, "private": known.private, "siblings": names, "tags": []})

    def tree(self, authorized: bool, body: bytes, repo: str, revision: str) -> Any:
        files = self.repo(repo, authorized).files
        return _json(
            [{"type": "file", "path": name, "size": len(data), "oid": _oid(data)} for name, data in files.items()]
        )

    def validate(self, authorized: bool, body: bytes) -> Any:
        return _json({"errors": [], "warnings": []})

    def preupload(self, authorized: bool, body: bytes, repo: str) -> Any:
        known = self.repo(repo, authorized, write=True)
        files = []
        for each in json.loads(body)["files"]:
            large = each["path"].endswith((".safetensors", ".gguf"))
            there = known.files.get(each["path"])
            oid = None if there is None else hashlib.sha256(there).hexdigest() if large else _oid(there)
            files.append({"path": each["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                         | ({"oid": oid} if oid else {}))  # fmt: skip
        return _json({"files": files})

    def batch(self, authorized: bool, body: bytes, repo: str) -> Any:
        self.repo(repo, authorized, write=True)
        objects = []
        for each in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.url}/store/{each['oid']}?X-Signature=signed", "header": {}}}
            objects.append(each | ({} if each["oid"] in self.stored else {"actions": upload}))
        return _json({"transfer": "basic", "objects": objects})

    def store(self, authorized: bool, body: bytes, oid: str) -> Any:
        self.stored[oid] = body  # as S3 does, whatever it is
        return {}, b""

    def commit(self, authorized: bool, body: bytes, repo: str) -> Any:
        known = self.repo(repo, authorized, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        if (parent := lines[0]["value"].get("parentCommit")) and parent != known.head:
            raise Fault(412, "A commit has happened since. Please refresh and try again.")
        files = {}
        for line in lines[1:]:
            value = line["value"]
            files[value["path"]] = (
                base64.b64decode(value["content"]) if line["key"] == "file" else self.stored[value["oid"]]
            )
        sha = known.commit(files)
        return _json({"commitUrl": f"{self.url}/{repo}/commit/{sha}", "commitOid": sha})

    def resolve(self, authorized: bool, body: bytes, repo: str, revision: str, name: str) -> Any:
        known = self.repo(repo, authorized)
        data = known.files.get(unquote(name))
        if data is None:
            raise Fault(404, "Entry not found", "EntryNotFound")
        return {"X-Repo-Commit": known.head, "ETag": f'"{_oid(data)}"'}, data


def _json(content: Any) -> tuple[dict[str, str], bytes]:
    return {"Content-Type": "application/json"}, json.dumps(content).encode()


def _oid(data: bytes) -> str:
    """git's, of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


REPO = r"(?P<repo>[^/ ]+/[^/ ]+?)"
ROUTES: list[tuple[str, Callable[..., Any]]] = [
    (r"GET /api/whoami-v2", Hub.whoami),
    (r"POST /api/repos/create", Hub.create),
    (r"POST /api/validate-yaml", Hub.validate),
    (rf"POST /api/models/{REPO}/preupload/main", Hub.preupload),
    (rf"POST /api/models/{REPO}/commit/main", Hub.commit),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Hub.batch),
    (r"PUT /store/(?P<oid>\w+)", Hub.store),
    (rf"GET /api/models/{REPO}/tree/(?P<revision>\w+)", Hub.tree),
    (rf"GET /api/models/{REPO}(/revision/(?P<revision>\w+))?", Hub.info),
    (rf"(GET|HEAD) /{REPO}/resolve/(?P<revision>\w+)/(?P<name>.+)", Hub.resolve),
]


@contextlib.contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers at `hub.url` inside."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle_one_request()

        def work(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            hub.log.append((self.command, path))
            headers: dict[str, str] = {}
            try:
                hub.before(self.command, path)
                status = 200
                headers, content = hub.answer(
                    self.command, path, self.headers.get("Authorization") == f"Bearer {TOKEN}", body
                )
            except Fault as fault:
                status, content = fault.status, json.dumps({"error": fault.message}).encode()
                headers = {"Content-Type": "application/json", "X-Error-Message": fault.message}
                if fault.code:
                    headers["X-Error-Code"] = fault.code
            except ConnectionError:  # a test's word for: the line goes dead
                self.close_connection = True
                self.connection.close()
                return
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = work

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
