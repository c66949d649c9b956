"""A stand-in for the Hugging Face Hub: the part of its protocol that from_pretrained, peft and load_dataset use.

ROOT/models/{org}/{name}/ and ROOT/datasets/{org}/{name}/ are repositories with one branch. `with serve(root) as hub:` gives
hub.url, for HF_ENDPOINT, and hub.log, the requests as "METHOD path -> status". hub.cut: names of files whose first download
breaks off half way. hub.stall: accept connections and never answer.
"""

import contextlib
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body, kind="application/json", cut=False, **headers):
        self.server.log.append(f"{self.command} {self.path} -> {status}")
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = self.close_connection or cut

    def json(self, content):
        self.reply(200, json.dumps(content).encode())

    def missing(self, code, status=404):
        self.reply(status, json.dumps({"error": code}).encode(), X_Error_Code=code, X_Error_Message=code)

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        found = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/paths-info/.+", unquote(urlsplit(self.path).path))
        folder = found and self.server.root / found[1] / found[2]
        if not folder or not folder.is_dir():
            return self.missing("EntryNotFound")
        wanted = set(re.findall(r"paths=([^&]*)", unquote(body)) or json.loads(body).get("paths", []))
        return self.json([entry for entry in self.tree(folder, folder, True) if entry["path"] in wanted])

    def tree(self, folder, under, recursive):
        entries = []
        for path in sorted(under.rglob("*") if recursive else under.glob("*")):
            name = path.relative_to(folder).as_posix()
            own = {"oid": hashlib.sha1(name.encode()).hexdigest(), "path": name}
            size = path.stat().st_size if path.is_file() else 0
            entries.append(own | {"type": "file" if path.is_file() else "directory", "size": size})
        return entries

    def do_GET(self):
        if self.server.stall:
            time.sleep(60)
        path = unquote(urlsplit(self.path).path)
        if path == "/":
            return self.reply(200, b"")
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+|refs/pr/\d+)/(.+)", path):
            return self.file("datasets" if found[1] else "models", found[2], found[3], found[4])
        found = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path)
        if not found:
            return self.missing("EntryNotFound")
        kind, repo, rest = found[1], found[2], found[3] or "revision/main"
        folder = self.server.root / kind / repo
        if not folder.is_dir():
            return self.missing("RepoNotFound", 401)
        if rest.startswith("revision/"):
            files = [{"rfilename": entry["path"]} for entry in self.tree(folder, folder, True) if entry["type"] == "file"]
            return self.json({"id": repo, "sha": COMMIT, "private": False, "gated": False, "tags": [], "siblings": files})
        if tree := re.fullmatch(r"tree/[^/]+(?:/(.*))?", rest):
            under = folder / (tree[1] or "")
            if not under.is_dir():
                return self.missing("EntryNotFound")
            return self.json(self.tree(folder, under, "recursive=true" in self.path.lower()))
        return self.missing("EntryNotFound")

    def file(self, kind, repo, revision, name):
        path = self.server.root / kind / repo / name
        if not path.parents[len(Path(name).parts) - 1].is_dir():
            return self.missing("RepoNotFound", 401)
        if revision not in ("main", COMMIT):
            return self.missing("RevisionNotFound")
        if not path.is_file():
            return self.reply(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        data = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": COMMIT, "Accept_Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(part[1]), int(part[2] or len(data) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.reply(206, data[first : last + 1], "application/octet-stream", **headers)
        cut = self.command == "GET" and name in self.server.cut
        self.server.cut.discard(name if cut else None)
        return self.reply(200, data, "application/octet-stream", cut, **headers)


@contextlib.contextmanager
def serve(root):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.root, server.log, server.cut, server.stall = Path(root), [], set(), False
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
