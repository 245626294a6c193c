# Copyright 2026 The modeling_tdd authors. Licensed under the Apache License, Version 2.0.
"""A server that speaks the part of the Hub's HTTP API that `huggingface_hub` uses to push and pull models.

It holds everything in memory, listens on the loopback interface alone and trusts everybody. Uploads go as on the Hub:
the client asks which files are large (`preupload`), sends those one by one (git LFS), and then makes one commit.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


LARGE_FILES = (".safetensors", ".png")
USER = "user"


@dataclass
class Repository:
    """Files of each revision, as hashes of their content, and the content. `main` is the newest revision."""

    main: str
    revisions: dict[str, dict[str, str]]
    blobs: dict[str, bytes] = field(default_factory=dict)

    def add_blob(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

    def commit(self, files: dict[str, str]) -> str:
        parent = self.main
        self.main = hashlib.sha1(json.dumps([files, parent]).encode()).hexdigest()
        self.revisions[self.main] = files
        return self.main


class HubServer(ThreadingHTTPServer):
    """Serves until the `with` block ends. `url` is its address; `fail_at` makes uploads fail: `"lfs"` refuses weights
    after other large files were taken, `"commit"` drops the connection in the middle of the commit."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRequestHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.fail_at: str | None = None

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        self.server_close()


class HubRequestHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args: Any) -> None:
        """Tests print nothing."""

    def handle_request(self) -> None:
        self.body = self.read_body()
        path = self.path.partition("?")[0]
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split():
                return action(self, *match.groups())
        self.reply({"error": f"This server knows no {self.command} {path}."}, status=404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def reply_missing(self, what: str) -> None:
        """`what` is "Repo", "Revision" or "Entry"."""
        self.reply({"error": f"{what} not found"}, status=404, headers={"X-Error-Code": f"{what}NotFound"})

    def find(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """A repository and a revision's hash, or None after a reply that there is none."""
        repository = self.server.repositories.get(name)
        if repository is None:
            return self.reply_missing("Repo")
        revision = repository.main if revision == "main" else revision
        if revision not in repository.revisions:
            return self.reply_missing("Revision")
        return repository, revision

    # ---- Account, repositories, cards

    def who_am_i(self) -> None:
        self.reply({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create_repository(self) -> None:
        request = json.loads(self.body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        answer = {"url": f"{self.server.url}/{name}", "id": name, "name": name}
        if name in self.server.repositories:
            return self.reply({"error": "You already created this model repo", **answer}, status=409)
        empty = hashlib.sha1(name.encode()).hexdigest()
        self.server.repositories[name] = Repository(main=empty, revisions={empty: {}})
        self.reply(answer)

    def validate_card(self) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.reply(answer, status=400 if errors else 200)

    # ---- Upload

    def choose_upload_modes(self, name: str, revision: str) -> None:
        if self.find(name, revision):
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            modes = {path: "lfs" if path.endswith(LARGE_FILES) else "regular" for path in paths}
            files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
            self.reply({"files": files})

    def choose_upload_places(self, name: str) -> None:
        objects = [
            {**file, "actions": {"upload": {"href": f"{self.server.url}/lfs/{name}/{file['oid']}", "header": {}}}}
            for file in json.loads(self.body)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def take_large_file(self, name: str, digest: str) -> None:
        is_picture = self.body.startswith(b"\x89PNG")
        if self.server.fail_at == "lfs" and not is_picture:
            return self.reply({"error": "Storage quota exceeded"}, status=403)
        if self.server.repositories[name].add_blob(self.body) != digest:
            return self.reply({"error": "The content has another hash"}, status=400)
        self.reply({})

    def commit(self, name: str, revision: str) -> None:
        found = self.find(name, revision)
        if not found:
            return
        if self.server.fail_at == "commit":
            self.close_connection = True  # and no reply
            return
        repository, parent = found
        files = dict(repository.revisions[parent])
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = repository.add_blob(base64.b64decode(value["content"]))
            elif operation["key"] == "lfsFile":
                files[value["path"]] = value["oid"]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        revision = repository.commit(files)
        self.reply({"commitUrl": f"{self.server.url}/{name}/commit/{revision}", "commitOid": revision})

    # ---- Download

    def describe(self, name: str, revision: str | None = None) -> None:
        if found := self.find(name, revision or "main"):
            repository, revision = found
            siblings = [{"rfilename": path} for path in repository.revisions[revision]]
            self.reply({"id": name, "sha": revision, "private": False, "tags": [], "siblings": siblings})

    def list_files(self, name: str, revision: str, folder: str | None = None) -> None:
        if found := self.find(name, revision):
            repository, revision = found
            prefix = f"{folder}/" if folder else ""
            files = repository.revisions[revision]
            entries = [
                {"type": "file", "path": path, "size": len(repository.blobs[digest]), "oid": digest[:40]}
                for path, digest in files.items()
                if path.startswith(prefix)
            ]
            if folder and not entries:
                return self.reply_missing("Entry")
            self.reply(entries)

    def download(self, name: str, revision: str, path: str) -> None:
        if found := self.find(name, revision):
            repository, revision = found
            digest = repository.revisions[revision].get(path)
            if digest is None:
                return self.reply_missing("Entry")
            self.reply(repository.blobs[digest], headers={"X-Repo-Commit": revision, "ETag": f'"{digest}"'})


NAME = "([^/]+/[^/]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", HubRequestHandler.who_am_i),
    ("POST", "/api/repos/create", HubRequestHandler.create_repository),
    ("POST", "/api/validate-yaml", HubRequestHandler.validate_card),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", HubRequestHandler.choose_upload_modes),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", HubRequestHandler.choose_upload_places),
    ("PUT", f"/lfs/{NAME}/([0-9a-f]+)", HubRequestHandler.take_large_file),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", HubRequestHandler.commit),
    ("GET", f"/api/models/{NAME}", HubRequestHandler.describe),
    ("GET", f"/api/models/{NAME}/revision/([^/]+)", HubRequestHandler.describe),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", HubRequestHandler.list_files),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)/(.+)", HubRequestHandler.list_files),
    ("GET HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", HubRequestHandler.download),
)


def card_errors(card: str) -> list[str]:
    """What the Hub refuses of a card's metadata: no mapping, or fields of another type than its specification has."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    metadata = yaml.safe_load(match[1]) if match else None
    if not isinstance(metadata, dict):
        return ["The card has no metadata."]
    errors = [
        f"`{name}` must be a string."
        for name in ("license", "library_name", "pipeline_tag")
        if name in metadata and not isinstance(metadata[name], str)
    ]
    for name in ("tags", "datasets", "metrics"):
        values = metadata.get(name, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f"`{name}` must be a list of strings.")
    for model in metadata.get("model-index", []):
        for result in model["results"]:
            missing = {"task", "dataset", "metrics"} - result.keys()
            errors += [f"A result of `model-index` lacks `{name}`." for name in sorted(missing)]
    return errors
