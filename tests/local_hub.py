"""A small Hub on 127.0.0.1: folders are its repositories, and the released clients read from it.

    with LocalHub(root) as hub:
        subprocess.run(command, env=hub.environment(home))

A model lies in root/user/name, a data set in root/datasets/user/name, another revision than main in user/name@revision.
It also takes a commit of small files to a model. A data set takes commits of small and of
large files (git-LFS; the clients need HF_HUB_DISABLE_XET=1), by whoever `tokens` lets. (Facts: hf_api.py,
_commit_api.py, lfs.py and file_download.py of huggingface_hub.)
"""

import base64
import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
CHUNK = 1 << 20


COMMIT = re.compile(r"/api/datasets/([^/]+/[^/]+)/commit/main")
LARGE = (".parquet",)  # files that go by git-LFS


class Refused(Exception):
    """The answer is an error: its status, and what the Hub says."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Missing(Exception):
    """There is no such repository, revision or file: `code` is what the Hub calls that."""

    def __init__(self, code: str):
        super().__init__(code)
        self.code = code


class LocalHub:
    """Serves the folders under `root`. `posts` are the uploads so far: path, body and Authorization of each;
    `commit_status` is the answer to the next commits to models. `tokens` are (user, role) by token; if empty, every
    token may do everything. `commits` are those to data sets, by name, and `is_private` says of each that was created
    how."""

    def __init__(self, root: Path):
        self.root, self.posts, self.commit_status = root, [], 200
        self.tokens: dict[str, tuple[str, str]] = {}
        self.commits: dict[str, list[str]] = {}
        self.is_private: dict[str, bool] = {}
        self.faults: list[list] = []
        self.num_model_commits = 0
        self._lock = threading.RLock()
        self._folders: dict[str, Path] = {}  # by the name of their commit
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that reads from this Hub into `home`: the clients read it when imported."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
        return kept | {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}

    def fault(self, method: str, path: str, action: int | str | Callable, times: int = 1) -> None:
        """What happens to the next requests whose path holds `path`: a status is answered, "cut" drops the connection
        in the middle of the body (of the request, or of the answer to GET), "lose" does what is asked and drops it
        before the answer, a function is called. With 429 comes Retry-After: 0."""
        self.faults.append([method, path, action, times])

    def next_fault(self, method: str, path: str) -> int | str | Callable | None:
        with self._lock:
            for fault in self.faults:
                if fault[0] == method and fault[1] in path and fault[3] > 0:
                    fault[3] -= 1
                    return fault[2]
        return None

    def create(self, name: str, *, private: bool) -> None:
        """Make a data set with the file that the Hub puts into a new one."""
        self.is_private[name] = private
        (self.root / "datasets" / name).mkdir(parents=True)
        (self.root / "datasets" / name / ".gitattributes").write_text("*.parquet filter=lfs\n")

    def add_commit(self, name: str, parent: str | None, files: dict[str, bytes | Path]) -> str:
        """Put files upon the newest commit of a data set. Raises `Refused` if that is not `parent`."""
        with self._lock:
            head = self.commit("datasets", name, "main")
            if parent is not None and parent != head:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            commit = hashlib.sha1(f"{head} {sorted(files)}".encode()).hexdigest()
            self._folders[commit] = shutil.copytree(self._folders[head], self.root / ".commits" / commit)
            for path, content in files.items():
                target = self._folders[commit] / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
            self.commits.setdefault(name, []).append(commit)
            return commit

    def write(self, name: str, files: list[dict]) -> None:
        """Put the files of a commit into the folder of a model."""
        self.num_model_commits += 1
        for file in files:
            target = self.root / name / file["path"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(base64.b64decode(file["content"]))

    def large_file(self, oid: str) -> Path:
        return self.root / ".lfs" / oid

    def commit(self, kind: str, name: str, revision: str) -> str:
        """The commit that a revision names. Raises `Missing`."""
        if revision in self._folders:
            return revision
        if kind == "datasets" and revision == "main" and name in self.commits:
            return self.commits[name][-1]
        base = self.root / ("datasets" if kind == "datasets" else "")
        if not ((base / name).is_dir() or any(base.glob(f"{name}@*"))):
            raise Missing("RepoNotFound")
        folder = base / (name if revision == "main" else f"{name}@{revision}")
        if not folder.is_dir():
            raise Missing("RevisionNotFound")
        commit = hashlib.sha1(f"{kind}/{name}@{revision}".encode()).hexdigest()
        self._folders[commit] = folder
        return commit

    def files(self, commit: str) -> dict[str, Path]:
        """The files of a commit, by their paths in the repository."""
        folder = self._folders[commit]
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def oid(path: Path) -> str | None:
    """What git calls a file's content; None of a file that is not there."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def etag(path: Path) -> str:
    stat = path.stat()
    return hashlib.sha1(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()


def entries(files: dict[str, Path], under: str, *, recursive: bool) -> list[dict]:
    """The files and folders in the folder `under`, as the Hub lists them. Raises `Missing`."""
    prefix, found = f"{under}/" if under else "", {}
    for name, path in files.items():
        if not name.startswith(prefix):
            continue
        parts = name.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folder = prefix + "/".join(parts[:depth])
            found[folder] = {"type": "directory", "path": folder, "oid": hashlib.sha1(folder.encode()).hexdigest()}
        if recursive or len(parts) == 1:
            found[name] = {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)}
    if not found:
        raise Missing("EntryNotFound")
    return [{"size": 0} | values for values in found.values()]


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    lost = False  # whether the answer is not sent
    cut = False  # whether half of the answer is sent

    def do_GET(self):
        url = urlsplit(self.path)
        fault = self.hub.next_fault(self.command, self.path)
        if isinstance(fault, int):
            return self._fail(fault)
        self.cut = fault == "cut"
        try:
            if url.path == "/api/whoami-v2":
                return self._who()
            if match := RESOLVE.fullmatch(url.path):
                self._resolve("datasets" if match[1] else "models", *map(unquote, match.groups()[1:]))
            elif match := API.fullmatch(url.path):
                self._describe(*(unquote(part or "") for part in match.groups()), query=parse_qs(url.query))
            else:
                raise Missing("EntryNotFound")
        except Missing as missing:
            self._json({"error": missing.code}, 404, {"X-Error-Code": missing.code, "X-Error-Message": missing.code})
        except Refused as refused:
            self._refuse(refused)

    do_HEAD = do_GET

    def do_POST(self):
        fault = self.hub.next_fault(self.command, self.path)
        length = int(self.headers.get("Content-Length") or 0)
        if fault == "cut":
            self.rfile.read(length // 2)
            return self._hang_up()
        body = self.rfile.read(length)
        if isinstance(fault, int):
            return self._fail(fault)
        if callable(fault):
            fault()
        self.lost = fault == "lose"
        try:
            if self.command == "PUT":
                return self._store(body)
            self.hub.posts.append((self.path, body.decode(), self.headers.get("Authorization")))
            self._upload(body.decode())
        except Refused as refused:
            self._refuse(refused)

    do_PUT = do_POST

    # ---- reading

    def _describe(self, kind: str, name: str, verb: str, revision: str, under: str, query: dict) -> None:
        commit = self.hub.commit(kind, name, revision or "main")
        files = self.hub.files(commit)
        if verb == "tree":
            return self._json(entries(files, under, recursive=query.get("recursive") == ["true"]))
        values = {"id": name, "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0}
        self._json(values | {"siblings": [{"rfilename": file} for file in files]})

    def _resolve(self, kind: str, name: str, revision: str, file: str) -> None:
        commit = self.hub.commit(kind, name, revision)
        path = self.hub.files(commit).get(file)
        if path is None:
            raise Missing("EntryNotFound")
        size = path.stat().st_size
        start, end = self._range(size)
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if (start, end) != (0, size):
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self._head(206 if "Content-Range" in headers else 200, end - start, headers)
        if self.command == "GET":
            self._send_part(path, start, end)

    def _range(self, size: int) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        return (int(match[1]), min(size, int(match[2]) + 1) if match[2] else size) if match else (0, size)

    def _send_part(self, path: Path, start: int, end: int) -> None:
        with path.open("rb") as file:
            file.seek(start)
            if self.cut:
                self.wfile.write(file.read((end - start) // 2))
                return self._hang_up()
            while start < end:
                block = file.read(min(CHUNK, end - start))
                self.wfile.write(block)
                start += len(block)

    # ---- writing

    def _upload(self, body: str) -> None:
        if self.path == "/api/repos/create" and json.loads(body).get("type") == "dataset":
            return self._create(json.loads(body))
        if self.path.endswith("/info/lfs/objects/batch"):
            return self._json({"transfer": "basic", "objects": list(map(self._large, json.loads(body)["objects"]))})
        if match := COMMIT.match(self.path):
            return self._commit(match[1], list(map(json.loads, body.splitlines())))
        if self.path == "/api/repos/create":
            name = json.loads(body)["organization"] + "/" + json.loads(body)["name"]
            return self._json({"url": f"http://127.0.0.1/{name}", "name": name})
        if "/preupload/" in self.path:
            is_large = lambda file: "/datasets/" in self.path and file["path"].endswith(LARGE)
            modes = {True: "lfs", False: "regular"}
            files = [{"path": file["path"], "uploadMode": modes[is_large(file)]} for file in json.loads(body)["files"]]
            folder = self.hub.root / self.path.split("/api/models/")[-1].split("/preupload/")[0]
            return self._json({"files": [f | {"shouldIgnore": False, "oid": oid(folder / f["path"])} for f in files]})
        if "/commit/" not in self.path:
            return self._json({})
        if self.hub.commit_status != 200:
            return self._json({"error": "no room left"}, self.hub.commit_status)
        name = self.path.split("/api/models/")[1].split("/commit/")[0]
        self.hub.write(name, [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"])
        self._json({"success": True, "commitOid": "c" * 40, "commitUrl": f"http://127.0.0.1/{name}/commit/ccc"})

    # ---- data sets

    def _create(self, values: dict) -> None:
        name = f"{values['organization']}/{values['name']}"
        self._check(name)
        if (self.hub.root / "datasets" / name).exists():
            return self._json({"error": "exists", "url": f"{self.hub.endpoint}/datasets/{name}"}, 409)
        self.hub.create(name, private=values.get("visibility") == "private" or values.get("private") is True)
        self._json({"url": f"{self.hub.endpoint}/datasets/{name}", "name": name})

    def _large(self, values: dict) -> dict:
        """Where a large file goes; nowhere if it is there already."""
        upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{values['oid']}"}}
        return values | ({} if self.hub.large_file(values["oid"]).exists() else {"actions": upload})

    def _store(self, body: bytes) -> None:
        oid = self.path.rsplit("/", 1)[-1]
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "the file has another SHA-256")
        self.hub.large_file(oid).parent.mkdir(exist_ok=True)
        self.hub.large_file(oid).write_bytes(body)
        self._json({})

    def _commit(self, name: str, lines: list[dict]) -> None:
        self._check(name)
        parent = next(line["value"].get("parentCommit") for line in lines if line["key"] == "header")
        files: dict[str, bytes | Path] = {}
        for value in (line["value"] for line in lines if line["key"] == "file"):
            files[value["path"]] = base64.b64decode(value["content"])
        for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
            files[value["path"]] = self.hub.large_file(value["oid"])
        commit = self.hub.add_commit(name, parent, files)
        url = f"{self.hub.endpoint}/datasets/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url})

    def _user(self) -> tuple[str, str]:
        """Name and role of who asks. Raises `Refused`."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def _who(self) -> None:
        user, role = self._user()
        self._json({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def _check(self, name: str) -> None:
        """Raises `Refused` if who asks may not write to a data set."""
        if self.hub.tokens:
            user, role = self._user()
            if role != "write" or name.split("/")[0] != user:
                raise Refused(403, "You don't have the rights to write here")

    # ---- answers

    def _fail(self, status: int) -> None:
        self._json({"error": "try again"}, status, {"Retry-After": "0"} if status == 429 else {})

    def _refuse(self, refused: Refused) -> None:
        self._json({"error": str(refused)}, refused.status, {"X-Error-Message": str(refused)})

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _json(self, values, status: int = 200, headers: dict | None = None) -> None:
        if self.lost:
            return self._hang_up()
        data = json.dumps(values).encode()
        self._head(status, len(data), {"Content-Type": "application/json"} | (headers or {}))
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass
