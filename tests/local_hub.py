"""A small Hub on 127.0.0.1: folders are its repositories, and the released clients read from it.

    with LocalHub(root) as hub:
        subprocess.run(command, env=hub.environment(home))

A model lies in root/user/name, a data set in root/datasets/user/name, another revision than main in user/name@revision.
It also answers a commit of small files, which it only remembers. (Facts: hf_api.py and file_download.py of
huggingface_hub.)
"""

import hashlib
import http.server
import json
import os
import re
import threading
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
CHUNK = 1 << 20


class Missing(Exception):
    """There is no such repository, revision or file: `code` is what the Hub calls that."""

    def __init__(self, code: str):
        super().__init__(code)
        self.code = code


class LocalHub:
    """Serves the folders under `root`. `posts` are the uploads so far: path, body and Authorization of each;
    `commit_status` is the answer to the next commits."""

    def __init__(self, root: Path):
        self.root, self.posts, self.commit_status = root, [], 200
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

    def commit(self, kind: str, name: str, revision: str) -> str:
        """The commit that a revision names. Raises `Missing`."""
        if revision in self._folders:
            return revision
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

    def do_GET(self):
        url = urlsplit(self.path)
        try:
            if match := RESOLVE.fullmatch(url.path):
                self._resolve("datasets" if match[1] else "models", *map(unquote, match.groups()[1:]))
            elif match := API.fullmatch(url.path):
                self._describe(*(unquote(part or "") for part in match.groups()), query=parse_qs(url.query))
            else:
                raise Missing("EntryNotFound")
        except Missing as missing:
            self._json({"error": missing.code}, 404, {"X-Error-Code": missing.code, "X-Error-Message": missing.code})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.hub.posts.append((self.path, body, self.headers.get("Authorization")))
        self._upload(body)

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
            while start < end:
                block = file.read(min(CHUNK, end - start))
                self.wfile.write(block)
                start += len(block)

    # ---- writing

    def _upload(self, body: str) -> None:
        if self.path == "/api/repos/create":
            name = json.loads(body)["organization"] + "/" + json.loads(body)["name"]
            return self._json({"url": f"http://127.0.0.1/{name}", "name": name})
        if "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self._json({"files": [file | {"shouldIgnore": False} for file in files]})
        if "/commit/" not in self.path:
            return self._json({})
        if self.hub.commit_status != 200:
            return self._json({"error": "no room left"}, self.hub.commit_status)
        name = self.path.split("/api/models/")[1].split("/commit/")[0]
        self._json({"success": True, "commitOid": "c" * 40, "commitUrl": f"http://127.0.0.1/{name}/commit/ccc"})

    # ---- answers

    def _json(self, values, status: int = 200, headers: dict | None = None) -> None:
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
