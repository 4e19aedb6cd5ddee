"""A stand-in for the Hugging Face Hub on this machine: it serves folders to the real client libraries.

`python server.py ROOT` serves ROOT/datasets/OWNER/NAME and ROOT/models/OWNER/NAME, and prints its port. Models can be
created, and files committed to them. The commit of a repository is a digest of its files. ROOT/outage, read at each
request, holds a status to answer with instead, or is "cut": connections are closed in the middle of a parquet file,
once for each file. ROOT/requests has a line for each request: path, status, bytes sent.
"""

import base64
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(sys.argv[1])
CUT: set[str] = set()  # paths whose connection was cut before


def commit(folder: Path) -> str:
    """Return the digest of the names and contents of all files."""
    digest = hashlib.sha1()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def entry(folder: Path, path: Path) -> dict[str, object]:
    """Return the description of a file or folder, as in the hub's listings."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    return {"type": "file", "oid": commit(path.parent), "size": path.stat().st_size, "path": name}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send an answer; a HEAD request gets its headers only."""
        sent = body if self.command != "HEAD" else b""
        outage = self.outage()
        cut = outage == "cut" and len(sent) > 1000 and ".parquet" in self.path and self.path not in CUT
        with open(ROOT / "requests", "a") as log:
            log.write(f"{unquote(self.path)} {status} {len(sent)}\n")
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if cut:
            CUT.add(self.path)
            self.close_connection = True
        self.wfile.write(sent[: len(sent) // 2] if cut else sent)

    def outage(self) -> str:
        path = ROOT / "outage"
        return path.read_text().strip() if path.exists() else ""

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.outage().isdigit():
            return self.answer(int(self.outage()), b"{}")
        url = urlsplit(unquote(self.path))
        listing = re.fullmatch(
            r"/api/(datasets|models)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?", url.path
        )
        file = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", url.path)
        if listing:
            kind, name, what, revision, below = listing.groups()
        elif file:
            kind, name, revision, below = file.groups()
            kind, what = (kind or "models").strip("/"), "file"
        else:
            return self.answer(404, b"{}")
        folder = ROOT / kind / name
        if not folder.is_dir():
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        newest = commit(folder)
        old = ROOT / "old" / str(revision)  # the files of an earlier commit
        folder, found = (old, str(revision)) if old.is_dir() else (folder, newest)
        if revision not in (None, "main", found):
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        if what == "file":
            return self.send_file(folder / below, found)
        return self.send_listing(folder, what, below or "", found, name, body, url.query)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        """Create a model, accept files for it, or answer a question, whose words are in the body."""
        path = unquote(urlsplit(self.path).path)
        step = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
        if not step and path not in ("/api/repos/create", "/api/validate-yaml"):
            return self.do_GET()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/validate-yaml":
            return self.answer(200, b"{}")
        if not step:
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            (ROOT / "models" / name).mkdir(parents=True, exist_ok=True)
            return self.answer_json({"url": f"{self.address()}/{name}"})
        folder = ROOT / "models" / step[1]
        if step[2] == "preupload":
            files = json.loads(body)["files"]
            return self.answer_json(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                (folder / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
        found = commit(folder)
        url = f"{self.address()}/{step[1]}/commit/{found}"
        return self.answer_json({"success": True, "commitOid": found, "commitUrl": url})

    def address(self) -> str:
        return f"http://{self.headers['Host']}"

    def answer_json(self, content: object) -> None:
        self.answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def send_file(self, path: Path, found: str) -> None:
        if not path.is_file():
            return self.answer(404, b"", X_Error_Code="EntryNotFound", X_Repo_Commit=found)
        content = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X_Repo_Commit": found, "Accept_Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[first : last + 1], **headers)
        return self.answer(200, content, **headers)

    def send_listing(
        self, folder: Path, what: str | None, below: str, found: str, name: str, body: bytes, query: str
    ) -> None:
        if what == "tree":
            start = folder / below
            if not start.is_dir():
                return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
            recursive = parse_qs(query).get("recursive", ["false"])[0].lower() in ("true", "1")
            answer: object = [
                entry(folder, path) for path in sorted(start.rglob("*") if recursive else start.iterdir())
            ]
        elif what == "paths-info":
            wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode())["paths"]
            answer = [entry(folder, folder / path) for path in wanted if (folder / path).exists()]
        else:
            files = [{"rfilename": path.relative_to(folder).as_posix()} for path in folder.rglob("*") if path.is_file()]
            answer = {"id": name, "sha": found, "private": False, "gated": False, "tags": [], "siblings": files}
        return self.answer_json(answer)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
