"""A Hub on loopback: over real sockets, the parts of the Hub's HTTP API that huggingface_hub and transformers use.

    with Hub() as hub:  # hub.endpoint is what HF_ENDPOINT names; "hf_writer" is its token
        ...

Repositories have commits, branches and tags; large files go to a second server, the storage, as on the Hub, which
never sees a token. Xet is not spoken: clients set HF_HUB_DISABLE_XET=1 and take the LFS way.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard


TOKEN, USER = "hf_writer", "me"
LARGE = ("*.safetensors", "*.bin", "*.parquet", "*.onnx", "*.png", "*.jpg")  # or above 10 MB
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    """One version of a file; what is large lies in the storage under its SHA-256."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git


@dataclass(frozen=True)
class Commit:
    """A whole tree under one id."""

    oid: str
    title: str
    files: dict[str, Blob]
    parent: str | None


@dataclass
class Repository:
    """Commits, and the names that point at them."""

    kind: str
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        parent = self.branches.get(branch)
        tree = [(path, blob.git) for path, blob in sorted(files.items())]
        oid = hashlib.sha1(json.dumps([title, tree, parent, len(self.commits)]).encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, files, parent)
        self.branches[branch] = oid
        return self.commits[oid]

    def find(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]


class Refusal(Exception):
    """An answer that is no success: status, the Hub's error code, a message."""


class Hub:
    """The server, its repositories, and ways to disturb it.

    Attributes:
        endpoint: What HF_ENDPOINT names.
        repositories: By kind (`model`, `dataset`, `space`) and id.
        storage: Large files by their SHA-256, whether a commit names them or not.
        requests: `(method, path, whether a token came along)` of every request, in order.
        refuse: `METHOD path` pattern, such as `"POST */commit/*"`: requests like that get status 403 from now on.
        stall: The same for requests that are never answered; `stalled` is set when one has come.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, bool]] = []
        self.refuse = self.stall = ""
        self.stalled, self.released, self.lock = threading.Event(), threading.Event(), threading.RLock()

    def __enter__(self) -> "Hub":
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(2)]
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        self.endpoint, self.store = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        return self

    def __exit__(self, *reason) -> None:
        self.released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def environment(self, home) -> dict[str, str]:
        """What makes a process use this Hub and keep everything in a folder of its own."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_MODULES_CACHE": f"{home}/modules",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories[kind, name]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path, self.query = parts.path, parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.requests.append((self.command, unquote(path), bool(token)))
        line = f"{self.command} {unquote(path)}"
        if self.hub.stall and fnmatch(line, self.hub.stall):
            self.hub.stalled.set()
            self.hub.released.wait(60)
            self.close_connection = True
            return
        try:
            if self.hub.refuse and fnmatch(line, self.hub.refuse):
                raise Refusal(403, "Forbidden", "refused by the test")
            if token not in ("", TOKEN):
                raise Refusal(401, "", "Invalid credentials in Authorization header")
            self.writer = token == TOKEN
            for methods, pattern, answer in _ROUTES:
                if self.command in methods and (found := re.fullmatch(pattern, path)):
                    with self.hub.lock:
                        answer(self, **{name: unquote(text or "") for name, text in found.groupdict().items()})
                    return
            raise Refusal(404, "", f"this Hub does not answer {line}")
        except Refusal as refusal:
            status, code, message = refusal.args
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self._send(status, json.dumps({"error": message}).encode(), {k: v for k, v in headers.items() if v})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _given(self) -> dict:
        return json.loads(self.body or b"{}")

    def _repository(self, kind: str, name: str, write: bool = False) -> Repository:
        found = self.hub.repositories.get((kind.removesuffix("s") or "model", name))
        if found is None or (found.private and not self.writer):
            raise Refusal(404 if self.writer else 401, "RepoNotFound", "Repository not found")
        if write and not self.writer:
            raise Refusal(401, "", "Invalid username or password.")
        return found

    # ---- about people and repositories

    def whoami(self) -> None:
        if not self.writer:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        role = {"displayName": "test", "role": "write"}
        self._json({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": role}})

    def create(self) -> None:
        if not self.writer:
            raise Refusal(401, "", "Invalid username or password.")
        given = self._given()
        kind, name = given.get("type") or "model", f"{given.get('organization') or USER}/{given['name']}"
        url = f"{self.hub.endpoint}/{'' if kind == 'model' else kind + 's/'}{name}"
        if (kind, name) in self.hub.repositories:
            self._json({"error": "You already created this repo", "url": url}, 409)
            return
        made = Repository(kind, name, given.get("visibility") == "private")
        made.add("main", "initial commit", {".gitattributes": Blob("\n".join(LARGE).encode(), False)})
        self.hub.repositories[kind, name] = made
        self._json({"url": url, "name": name, "id": "1"})

    def delete(self) -> None:
        given = self._given()
        name = f"{given.get('organization') or USER}/{given['name']}"
        self._repository(given.get("type") or "model", name, write=True)
        del self.hub.repositories[given.get("type") or "model", name]
        self._json({})

    def validate(self) -> None:
        # The Hub's own checks are not public; these are the ones its documentation names and that need no network.
        try:
            card = ModelCard(self._given()["content"]).data
            wrong = (
                [] if card.license is None or re.fullmatch(r"[a-z0-9.+-]+", card.license) else ['"license" must be']
            )
        except ValueError as error:
            wrong = [str(error)]
        messages = [{"message": message} for message in wrong]
        self._json({"errors": messages, "warnings": []}, 400 if wrong else 200)

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        found = self._repository(kind, name)
        commit = found.find(revision or "main")
        told = {"id": name, "modelId": name, "sha": commit.oid, "private": found.private, "tags": [], "downloads": 0}
        self._json(told | {"siblings": [{"rfilename": path} for path in commit.files], "lastModified": DATE})

    def refs(self, kind: str, name: str) -> None:
        found = self._repository(kind, name)
        told = {
            plural: [{"name": key, "ref": f"refs/{short}/{key}", "targetCommit": oid} for key, oid in named.items()]
            for plural, short, named in (("branches", "heads", found.branches), ("tags", "tags", found.tags))
        }
        self._json(told | {"converts": []})

    def commits(self, kind: str, name: str, revision: str) -> None:
        found, told = self._repository(kind, name), []
        commit = found.find(revision)
        while commit:
            told.append({"id": commit.oid, "title": commit.title, "message": "", "date": DATE, "authors": []})
            commit = found.commits[commit.parent] if commit.parent else None
        self._json(told)

    def branch(self, kind: str, name: str, branch: str) -> None:
        found = self._repository(kind, name, write=True)
        if branch in found.branches:
            raise Refusal(409, "", "Reference already exists")
        found.branches[branch] = found.find(self._given().get("startingPoint") or "main").oid
        self._json({})

    def tag(self, kind: str, name: str, revision: str) -> None:
        found, given = self._repository(kind, name, write=True), self._given()
        if given["tag"] in found.tags:
            raise Refusal(409, "", "Tag already exists")
        found.tags[given["tag"]] = found.find(revision).oid
        self._json({})

    # ---- files, in

    def preupload(self, kind: str, name: str, revision: str) -> None:
        files = self._repository(kind, name, write=True).find(revision).files
        told = []
        for entry in self._given()["files"]:
            large = entry["size"] > 10_000_000 or any(fnmatch(entry["path"], pattern) for pattern in LARGE)
            old = files.get(entry["path"])
            told.append(
                {
                    "path": entry["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": old.etag if old else None,
                }
            )
        self._json({"files": told})

    def batch(self, kind: str, name: str) -> None:
        self._repository(kind, name, write=True)
        told = []
        for entry in self._given()["objects"]:
            place = {"href": f"{self.hub.store}/storage/{entry['oid']}"}
            verify = {"href": f"{self.hub.endpoint}/verify"}
            new = entry["oid"] not in self.hub.storage
            told.append(entry | ({"actions": {"upload": place, "verify": verify}} if new else {}))
        self._json({"transfer": "basic", "objects": told})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "the content does not match its SHA-256")
        self.hub.storage[oid] = self.body
        self._send(200)

    def verify(self) -> None:
        given = self._given()
        if len(self.hub.storage.get(given["oid"], b"")) != given["size"]:
            raise Refusal(404, "", "no such object")
        self._send(200)

    def commit(self, kind: str, name: str, revision: str) -> None:
        found = self._repository(kind, name, write=True)
        head, *operations = (json.loads(line) for line in self.body.splitlines())
        if revision not in found.branches:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        expected = head["value"].get("parentCommit")
        if expected and not found.branches[revision].startswith(expected):
            raise Refusal(412, "", "A commit has happened since. Please refresh and try again.")
        files = dict(found.find(revision).files)
        for operation in operations:
            path, value = operation["value"]["path"], operation["value"]
            if operation["key"] == "file":
                files[path] = Blob(base64.b64decode(value["content"]), False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.hub.storage:
                    raise Refusal(400, "", f"no object {value['oid']} for {path}")
                files[path] = Blob(self.hub.storage[value["oid"]], True)
            elif operation["key"] == "deletedFile":
                del files[path]
            else:
                files = {name: blob for name, blob in files.items() if not name.startswith(path.rstrip("/") + "/")}
        made = found.add(revision, head["value"]["summary"], files)
        self._json(
            {"success": True, "commitOid": made.oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{made.oid}"}
        )

    # ---- files, out

    def _entry(self, path: str, blob: Blob) -> dict:
        told = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git}
        lfs = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
        return told | ({"lfs": lfs} if blob.large else {})

    def tree(self, kind: str, name: str, revision: str, folder: str = "") -> None:
        commit = self._repository(kind, name).find(revision)
        start = f"{folder}/" if folder else ""
        told = [self._entry(path, blob) for path, blob in sorted(commit.files.items()) if path.startswith(start)]
        if not told:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        if self.query.get("recursive") not in (["true"], ["True"], ["1"]):
            deep = {entry["path"][len(start) :].split("/")[0] for entry in told if "/" in entry["path"][len(start) :]}
            told = [entry for entry in told if "/" not in entry["path"][len(start) :]]
            told += [{"type": "directory", "path": start + name, "size": 0, "oid": "0" * 40} for name in sorted(deep)]
        self._json(told)

    def paths(self, kind: str, name: str, revision: str) -> None:
        commit = self._repository(kind, name).find(revision)
        asked = parse_qs(self.body.decode()).get("paths") or self._given().get("paths")
        self._json([self._entry(path, commit.files[path]) for path in asked if path in commit.files])

    def resolve(self, kind: str, name: str, revision: str, path: str) -> None:
        commit = self._repository(kind, name).find(revision)
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        blob = commit.files[path]
        if blob.large:
            linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            self._send(302, b"", headers | linked | {"Location": f"{self.hub.store}/storage/{blob.sha256}"})
        else:
            self._send_part(blob.content, headers | {"ETag": f'"{blob.git}"'})

    def get(self, oid: str) -> None:
        if oid not in self.hub.storage:
            raise Refusal(404, "", "no such object")
        self._send_part(self.hub.storage[oid], {"ETag": f'"{oid}"'})

    def _send_part(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self._send(200, content, headers | {"Accept-Ranges": "bytes"})
            return
        start, stop = int(asked[1]), min(int(asked[2] or len(content)) + 1, len(content))
        place = {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}
        self._send(206, content[start:stop], headers | place)


_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
_PLACE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+/[^/]+)"
_ROUTES = [
    (("GET",), r"/api/whoami-v2", _Handler.whoami),
    (("POST",), r"/api/repos/create", _Handler.create),
    (("DELETE",), r"/api/repos/delete", _Handler.delete),
    (("POST",), r"/api/validate-yaml", _Handler.validate),
    (("GET",), _API, _Handler.info),
    (("GET",), _API + r"/revision/(?P<revision>[^/]+)", _Handler.info),
    (("GET",), _API + r"/refs", _Handler.refs),
    (("GET",), _API + r"/commits/(?P<revision>[^/]+)", _Handler.commits),
    (("POST",), _API + r"/branch/(?P<branch>[^/]+)", _Handler.branch),
    (("POST",), _API + r"/tag/(?P<revision>[^/]+)", _Handler.tag),
    (("POST",), _API + r"/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (("POST",), _API + r"/commit/(?P<revision>[^/]+)", _Handler.commit),
    (("GET",), _API + r"/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    (("POST",), _API + r"/paths-info/(?P<revision>[^/]+)", _Handler.paths),
    (("POST",), _PLACE + r"\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), r"/storage/(?P<oid>[0-9a-f]{64})", _Handler.put),
    (("GET", "HEAD"), r"/storage/(?P<oid>[0-9a-f]{64})", _Handler.get),
    (("POST",), r"/verify", _Handler.verify),
    (("GET", "HEAD"), _PLACE + r"/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
