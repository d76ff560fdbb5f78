"""A Hub on this machine: the endpoints of huggingface.co that `huggingface_hub` uses, over real HTTP, in memory.

    with LoopbackHub(tokens={"hf_ann": "ann"}) as hub:
        subprocess.run(..., env=hub.environment(cache, token="hf_ann"))
        assert "config.json" in hub.files("ann/model")

Repositories with branches and pull requests, private ones, small files inside the commit and large ones beforehand by
LFS, downloads with ETags and redirects to another host. A commit is applied whole or not at all. No xet: its clients
have it disabled.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from huggingface_hub import ModelCard


LARGE_FILES = (".safetensors", ".bin", ".mp4")


@dataclass
class Repository:
    """Commits by their hash, each a whole tree: path → content. `refs`: branch or `refs/pr/N` → commit."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, tree: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {sorted(tree)}".encode()).hexdigest()
        self.commits[sha] = tree
        self.refs[ref] = sha
        return sha


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class LoopbackHub:
    """
    The server, with all it holds. `requests` lists (method, path, user or None) as they came.

    Args:
        tokens: token → user. A user may write to the repositories under the own name, and sees the own private ones.
    """

    def __init__(self, tokens: dict[str, str]):
        self.tokens = tokens
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.failures: list[list] = []
        self.lock = threading.Lock()

    def __enter__(self) -> "LoopbackHub":
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: str | Path, token: str | None = None) -> dict[str, str]:
        """The environment of a process whose Hub this is, with an empty cache of its own in `home`."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        own |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        own |= {"NO_PROXY": "127.0.0.1,localhost"}
        return {**inherited, **own, **({} if token is None else {"HF_TOKEN": token})}

    def fail(self, method: str, path: str, after: int = 0, status: int = 403) -> None:
        """Refuses requests whose path contains the pattern, after the first `after` of them."""
        self.failures.append([method, path, after, status])

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """What anybody would find: path → content. `KeyError` if there is no such repository or revision."""
        repository = self.repositories[kind, repo_id]
        return repository.commits[repository.refs[revision]]

    def create(self, kind: str, repo_id: str, private: bool = False) -> Repository:
        repository = Repository(private)
        repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self.repositories[kind, repo_id] = repository
        return repository


class Handler(BaseHTTPRequestHandler):
    """One request: finds the route by method and path, answers with what it returns, as JSON."""

    protocol_version = "HTTP/1.1"
    server: ThreadingHTTPServer

    def handle_any(self):
        self.hub: LoopbackHub = self.server.hub
        self.url = urlsplit(self.path)
        self.query = parse_qs(self.url.query)
        self.body = self.read_body()
        self.user = self.hub.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        try:
            with self.hub.lock:
                self.hub.requests.append((self.command, self.url.path, self.user))
                self.fail_if_told()
                for methods, pattern, route in ROUTES:
                    match = re.fullmatch(pattern, self.url.path)
                    if match and self.command in methods:
                        return route(self, *[part and unquote(part) for part in match.groups()])
            raise HubError(404, f"no route for {self.command} {self.path}")
        except HubError as error:
            self.answer(
                {"error": str(error)}, error.status, {"X-Error-Code": error.code, "X-Error-Message": str(error)}
            )

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def log_message(self, *_):
        pass

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self, content, status: int = 200, headers: dict[str, str] | None = None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail_if_told(self):
        for failure in self.hub.failures:
            method, pattern, after, status = failure
            if method == self.command and re.search(pattern, self.url.path):
                if after == 0:
                    raise HubError(status, "told to fail")
                failure[2] -= 1

    # Who may do what, and where

    def repository(self, kind: str, repo_id: str, write: bool = False) -> Repository:
        repository = self.hub.repositories.get((kind, repo_id))
        owner = repo_id.split("/")[0]
        if repository is None or (repository.private and self.user != owner):
            raise HubError(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user != owner:
            raise HubError(403 if self.user else 401, "You don't have the rights to write here")
        return repository

    def commit_of(self, repository: Repository, revision: str) -> str:
        sha = repository.refs.get(revision, revision)
        if sha not in repository.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha

    # Repositories

    def whoami(self):
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        self.answer({"type": "user", "name": self.user, "orgs": [], "auth": {"type": "access_token"}})

    def create_repository(self):
        asked = json.loads(self.body)
        if self.user is None:
            raise HubError(401, "Invalid username or password.")
        owner, kind = asked.get("organization") or self.user, asked.get("type", "model") + "s"
        repo_id = f"{owner}/{asked['name']}"
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        if owner != self.user:
            raise HubError(403, f"You don't have the rights to create a repository under {owner}")
        if (kind, repo_id) in self.hub.repositories:
            return self.answer({"error": "You already created this repository", "url": url}, 409)
        self.hub.create(kind, repo_id, asked.get("visibility") == "private" or asked.get("private") is True)
        self.answer({"url": url, "name": repo_id})

    def info(self, kind: str, repo_id: str, revision: str | None = None):
        repository = self.repository(kind, repo_id)
        sha = self.commit_of(repository, revision or "main")
        tree = repository.commits[sha]
        metadata = ModelCard(tree.get("README.md", b"").decode()).data.to_dict()
        tags = [*metadata.get("tags", []), *(f"license:{metadata[key]}" for key in metadata if key == "license")]
        about = {"id": repo_id, "modelId": repo_id, "sha": sha, "private": repository.private}
        siblings = [{"rfilename": path} for path in sorted(tree)]
        self.answer({**about, "siblings": siblings, "tags": tags, "cardData": metadata})

    def tree(self, kind: str, repo_id: str, revision: str, folder: str | None = None):
        repository = self.repository(kind, repo_id)
        tree = repository.commits[self.commit_of(repository, revision)]
        under = {path: data for path, data in tree.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not under:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if "true" not in [value.lower() for value in self.query.get("recursive", [])]:
            depth = folder.count("/") + 1 if folder else 0
            under = {path: data for path, data in under.items() if path.count("/") == depth}
        self.answer([file_entry(path, data) for path, data in sorted(under.items())])

    def refs(self, kind: str, repo_id: str):
        refs = self.repository(kind, repo_id).refs.items()
        pulls = [{"name": name, "ref": name, "targetCommit": sha} for name, sha in refs if name.startswith("refs/")]
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
            for name, sha in refs
            if not name.startswith("refs/")
        ]
        self.answer({"branches": branches, "tags": [], "converts": [], "pullRequests": pulls})

    def create_branch(self, kind: str, repo_id: str, branch: str):
        repository = self.repository(kind, repo_id, write=True)
        if branch in repository.refs:
            raise HubError(409, f"Reference refs/heads/{branch} already exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.refs[branch] = self.commit_of(repository, start)
        self.answer({})

    # Uploads

    def validate_yaml(self):
        self.answer({"errors": [], "warnings": []})

    def preupload(self, kind: str, repo_id: str, revision: str):
        pull_request = "create_pr" in self.query
        repository = self.repository(kind, repo_id, write=not pull_request)
        tree = repository.commits[self.commit_of(repository, revision)]
        files = json.loads(self.body)["files"]
        self.answer(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE_FILES) else "regular",
                        "shouldIgnore": False,
                        "oid": oid(file["path"], tree[file["path"]]) if file["path"] in tree else None,
                    }
                    for file in files
                ]
            }
        )

    def lfs_batch(self, kind_prefix: str | None, repo_id: str):
        self.repository((kind_prefix or "models/").rstrip("/"), repo_id)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"},
                "verify": {"href": f"{self.hub.endpoint}/lfs-verify/{asked['oid']}"},
            }
            there = asked["oid"] in self.hub.large_files
            objects.append({**asked, "authenticated": True, **({} if there else {"actions": actions})})
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, sha256: str):
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise HubError(400, "the content is not that of its hash")
        self.hub.large_files[sha256] = self.body
        self.answer(b"")

    def lfs_verify(self, sha256: str):
        if len(self.hub.large_files.get(sha256, b"")) != json.loads(self.body)["size"]:
            raise HubError(404, "not uploaded")
        self.answer({})

    def commit(self, kind: str, repo_id: str, revision: str):
        pull_request = "create_pr" in self.query
        repository = self.repository(kind, repo_id, write=not pull_request)
        tree = dict(repository.commits[self.commit_of(repository, revision)])
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large_files:
                    raise HubError(400, f"{value['path']} was never uploaded")
                tree[value["path"]] = self.hub.large_files[value["oid"]]
            elif key == "deletedFile":
                del tree[value["path"]]
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        sha = repository.commit(f"refs/pr/{number}" if pull_request else revision, tree)
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else kind + '/'}{repo_id}"
        pull_url = f"{url}/discussions/{number}" if pull_request else None
        self.answer(
            {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "pullRequestUrl": pull_url}
        )

    # Downloads

    def resolve(self, kind_prefix: str | None, repo_id: str, revision: str, path: str):
        repository = self.repository((kind_prefix or "models/").rstrip("/"), repo_id)
        sha = self.commit_of(repository, revision)
        if path not in repository.commits[sha]:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        data = repository.commits[sha][path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{oid(path, data)}"'}
        if not path.endswith(LARGE_FILES):
            return self.answer(data, 200, headers)
        linked = {"X-Linked-ETag": headers.pop("ETag"), "X-Linked-Size": str(len(data))}
        sha256 = oid(path, data)
        self.hub.large_files.setdefault(sha256, data)
        storage = f"http://localhost:{self.server.server_port}/lfs/{sha256}"  # not the Hub's host: no token for it
        self.answer(b"", 302, {**headers, **linked, "Location": storage})

    def lfs_download(self, sha256: str):
        self.answer(self.hub.large_files[sha256], 200, {"ETag": f'"{sha256}"'})


def oid(path: str, data: bytes) -> str:
    """A file's hash as the Hub reports it: LFS's for large files, git's for others."""
    if path.endswith(LARGE_FILES):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def file_entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": oid(path, data)}
    if path.endswith(LARGE_FILES):
        entry["lfs"] = {"oid": oid(path, data), "size": len(data), "pointerSize": 134}
    return entry


KIND, PREFIX, REPO, REVISION = "(models|datasets)", "((?:models|datasets)/)?", "([^/]+/[^/]+?)", "([^/]+)"
ROUTES = [
    (("GET",), "/api/whoami-v2", Handler.whoami),
    (("POST",), "/api/repos/create", Handler.create_repository),
    (("POST",), "/api/validate-yaml", Handler.validate_yaml),
    (("GET",), f"/api/{KIND}/{REPO}", Handler.info),
    (("GET",), f"/api/{KIND}/{REPO}/revision/{REVISION}", Handler.info),
    (("GET",), f"/api/{KIND}/{REPO}/tree/{REVISION}(?:/(.+))?", Handler.tree),
    (("GET",), f"/api/{KIND}/{REPO}/refs", Handler.refs),
    (("POST",), f"/api/{KIND}/{REPO}/branch/{REVISION}", Handler.create_branch),
    (("POST",), f"/api/{KIND}/{REPO}/preupload/{REVISION}", Handler.preupload),
    (("POST",), f"/api/{KIND}/{REPO}/commit/{REVISION}", Handler.commit),
    (("POST",), rf"/{PREFIX}{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (("PUT",), "/lfs/([0-9a-f]{64})", Handler.lfs_upload),
    (("POST",), "/lfs-verify/([0-9a-f]{64})", Handler.lfs_verify),
    (("GET", "HEAD"), f"/{PREFIX}{REPO}/resolve/{REVISION}/(.+)", Handler.resolve),
    (("GET", "HEAD"), "/lfs/([0-9a-f]{64})", Handler.lfs_download),
]
