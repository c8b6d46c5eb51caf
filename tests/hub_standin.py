"""A loopback stand-in for the Hugging Face Hub, to which unchanged clients publish and from which they load.

It serves repositories of models and datasets as far as `huggingface_hub` 2 and `datasets` 5 ask: text travels inside a
commit, weights and tables through Git LFS, every commit stays loadable by its hash, errors carry the Hub's codes. The
name of a dataset begins with `datasets/` here. Not served: Xet, branches, the dataset viewer and Spaces.
"""

import base64
import json
import re
from functools import partial
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote

import yaml

REPO_ID = "(?P<repo_id>(?:datasets/)?[^/]+(?:/[^/]+)?)"
REVISION = "(?P<revision>[^/]+)"


class HubError(Exception):
    """An answer that is an error: status, message, and the Hub's code for what was not found."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **fields):
        super().__init__(message)
        headers = (headers or {}) | ({"X-Error-Code": code} if code else {})
        self.answer = (json.dumps({"error": message} | fields).encode(), status, headers)


class Repository:
    """A model repository with one branch: the files of every commit of `main`, the newest last."""

    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.commit({".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit")

    def resolve(self, revision: str) -> str:
        """Returns the hash of the commit that `"main"` or a hash stands for."""
        commit = list(self.commits)[-1] if revision == "main" else revision
        if commit not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def files(self, revision: str) -> dict[str, bytes]:
        return dict(self.commits[self.resolve(revision)])

    def commit(self, files: dict[str, bytes], message: str) -> str:
        """Adds a commit and returns its hash: that of the files, the earlier commits and the message."""
        commit = sha1(f"{hash_files(files)} {list(self.commits)} {message}".encode()).hexdigest()
        self.commits[commit] = files
        return commit


class HubStandIn:
    """A Hub on 127.0.0.1 for as long as its `with` block lasts.

    Attributes:
        endpoint: The value for `HF_ENDPOINT`.
        token: The only access token, which every write needs, and so does reading a private repository.
        user: Its owner, and the namespace of a repository that is created without one.
        requests: What was answered, in order: method, path (decoded, without the query) and status.
    """

    def __init__(self):
        self.token = "hf_stand_in"
        self.user = "tester"
        self.requests: list[tuple[str, str, int]] = []
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.lock = Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), partial(HubRequestHandler, self))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubStandIn":
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: str | Path) -> dict[str, str]:
        """Returns the variables with which a new process uses this Hub and keeps its caches in the folder `home`."""
        # Where hf_xet is installed, the client uploads weights by Xet without asking whether the server has it.
        switches = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        return switches | {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": self.token}

    def add_repo(self, repo_id: str, folder: str | Path, private: bool = False) -> str:
        """Adds a folder's files to `main` of a repository, new or not, and returns the hash of the commit."""
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        added = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        repository = self.repositories.setdefault(repo_id, Repository(private))
        return repository.commit(repository.files("main") | added, "Upload folder")

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Returns the files of a repository at a branch or commit, from path to content."""
        return self.repositories[repo_id].files(revision)


class HubRequestHandler(BaseHTTPRequestHandler):
    """Answers the requests of one connection from the repositories of a `HubStandIn`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    routes = (
        ("POST", "/api/validate-yaml", "validate_yaml"),
        ("POST", "/api/repos/create", "create_repo"),
        ("GET", f"/api/models/{REPO_ID}(?:/revision/{REVISION})?", "model_info"),
        ("GET", f"/api/models/{REPO_ID}/tree/{REVISION}(?:/(?P<path>.+))?", "tree"),
        ("POST", f"/api/models/{REPO_ID}/paths-info/{REVISION}", "paths_info"),
        ("POST", f"/api/models/{REPO_ID}/preupload/{REVISION}", "preupload"),
        ("POST", f"/api/models/{REPO_ID}/commit/{REVISION}", "commit"),
        ("POST", f"/{REPO_ID}.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT POST", "/lfs/(?P<oid>[0-9a-f]{64})", "lfs_object"),
        ("GET HEAD", f"/{REPO_ID}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    )

    def __init__(self, hub: HubStandIn, *arguments):
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *arguments):
        """Keeps the server's log out of the tests' output."""

    def answer(self):
        path, _, self.query = self.path.partition("?")
        self.has_token = "Authorization" in self.headers
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            with self.hub.lock:
                content, status, headers = self.dispatch(path)
        except HubError as error:
            content, status, headers = error.answer
        self.hub.requests.append((self.command, unquote(path), status))
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def dispatch(self, path: str) -> tuple[bytes, int, dict]:
        if path.startswith("/api/datasets/"):
            path = path.replace("/api/datasets/", "/api/models/datasets/", 1)
        if self.headers.get("Authorization") not in (None, f"Bearer {self.hub.token}"):
            raise HubError(401, "Invalid credentials in Authorization header")
        for methods, pattern, name in self.routes:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split():
                if self.command == "POST" and name != "validate_yaml" and not self.has_token:
                    raise HubError(401, "Invalid username or password.")
                found = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                answer = getattr(self, name)(**found)
                return answer if isinstance(answer, tuple) else (json.dumps(answer).encode(), 200, {})
        raise HubError(404, f"The stand-in does not serve {self.command} {path}")

    def find(self, repo_id: str) -> Repository:
        """Hides a private repository as if it were missing; without a token both are answered with 401, not 404."""
        repository = self.hub.repositories.get(repo_id)
        if repository is None or (repository.private and not self.has_token):
            raise HubError(404 if self.has_token else 401, "Repository not found", "RepoNotFound")
        return repository

    def validate_yaml(self) -> dict:
        try:
            metadata = read_metadata(json.loads(self.body)["content"])
        except yaml.YAMLError as error:
            raise HubError(400, "Invalid metadata", errors=[{"message": str(error)}]) from error
        return {"errors": [], "warnings": [] if metadata else [{"message": "empty or missing yaml metadata"}]}

    def create_repo(self) -> dict:
        options = json.loads(self.body)
        repo_id = f"{options['organization'] or self.hub.user}/{options['name']}"
        repo_id = f"datasets/{repo_id}" if options.get("type") == "dataset" else repo_id
        url = f"{self.hub.endpoint}/{repo_id}"
        if repo_id in self.hub.repositories:
            raise HubError(409, "You already created this model repo", url=url)
        self.hub.repositories[repo_id] = Repository(private=options.get("visibility") == "private")
        return {"url": url}

    def model_info(self, repo_id: str, revision: str = "main") -> dict:
        repository = self.find(repo_id)
        files = repository.files(revision)
        card = read_metadata(files.get("README.md", b"").decode())
        info = {"id": repo_id.removeprefix("datasets/"), "sha": repository.resolve(revision)}
        info |= {"private": repository.private, "cardData": card}
        blobs = "blobs=true" in self.query
        siblings = [{"rfilename": path} | (describe(path, files[path], "blobId") if blobs else {}) for path in files]
        return info | {"siblings": siblings} | {name: card[name] for name in card if name in ("library_name", "tags")}

    def tree(self, repo_id: str, revision: str, path: str = ".") -> list[dict]:
        entries = self.entries(repo_id, revision)
        depth = None if "recursive=true" in self.query else 1
        listed = [entries[name] for name in sorted(entries) if path in list_parents(name)[:depth]]
        if not listed:
            raise HubError(404, f"{path} does not exist on {revision}", "EntryNotFound")
        return listed

    def entries(self, repo_id: str, revision: str) -> dict[str, dict]:
        """Describes files and folders by their paths, as listings do."""
        files = self.find(repo_id).files(revision)
        entries = {name: {"type": "file", "path": name} | describe(name, files[name], "oid") for name in files}
        for folder in {parent for name in files for parent in list_parents(name)[:-1]}:
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": hash_files(files, folder)}
        return entries

    def paths_info(self, repo_id: str, revision: str) -> list[dict]:
        entries = self.entries(repo_id, revision)
        form = parse_qs(self.body.decode()) if b"{" not in self.body[:1] else json.loads(self.body)
        return [entries[path] for path in form["paths"] if path in entries]

    def preupload(self, repo_id: str, revision: str) -> dict:
        files = self.find(repo_id).files(revision)
        answers = json.loads(self.body)["files"]
        for file in answers:
            path, sample = file["path"], base64.b64decode(file.pop("sample"))
            file |= {"uploadMode": "lfs" if is_lfs(path, sample) else "regular", "shouldIgnore": False}
            file["oid"] = entity_tag(path, files[path]) if path in files else None
        return {"files": answers}

    def lfs_batch(self, repo_id: str) -> dict:
        self.find(repo_id)
        objects = json.loads(self.body)["objects"]
        for missing in (entry for entry in objects if entry["oid"] not in self.hub.objects):
            link = {"href": f"{self.hub.endpoint}/lfs/{missing['oid']}"}
            missing["actions"] = {"upload": link, "verify": link}
        return {"objects": objects}

    def lfs_object(self, oid: str) -> dict:
        """Takes an upload (PUT) or verifies that there was one (POST)."""
        content = self.body if self.command == "PUT" else self.hub.objects.get(oid, b"")
        if sha256(content).hexdigest() != oid:
            raise HubError(400, "The object's content does not have the announced SHA-256")
        self.hub.objects[oid] = content
        return {}

    def commit(self, repo_id: str, revision: str) -> dict:
        if revision != "main" or "create_pr" in self.query:
            raise HubError(400, "The stand-in has no branches but main, and no pull requests")
        repository = self.find(repo_id)
        files = repository.files("main")
        header, *operations = map(json.loads, self.body.splitlines())
        for kind, value in ((operation["key"], operation["value"]) for operation in operations):
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                self.lfs_object(value["oid"])
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind != "deletedFile":
                raise HubError(400, f"The stand-in does not serve {kind}")
            elif files.pop(value["path"], None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        commit = repository.commit(files, header["value"]["summary"])
        return {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit}", "commitOid": commit}

    def resolve(self, repo_id: str, revision: str, path: str) -> tuple[bytes, int, dict]:
        repository = self.find(repo_id)
        headers = {"X-Repo-Commit": repository.resolve(revision), "Accept-Ranges": "bytes"}
        content = repository.files(revision).get(path)
        if content is None:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        headers["ETag"] = f'"{entity_tag(path, content)}"'
        if is_lfs(path, content):
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": len(content)}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return content, 200, headers
        start, stop = int(wanted[1]), min(int(wanted[2] or len(content)) + 1, len(content))
        return content[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"}


def is_lfs(path: str, content: bytes) -> bool:
    """Whether a file is kept by Git LFS: weights, and what git takes for binary."""
    return bool(content) and (path.endswith((".safetensors", ".parquet")) or b"\0" in content[:512])


def hash_blob(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


def hash_files(files: dict[str, bytes], folder: str = ".") -> str:
    entries = sorted((path, hash_blob(files[path])) for path in files if folder in list_parents(path))
    return sha1(repr(entries).encode()).hexdigest()


def entity_tag(path: str, content: bytes) -> str:
    """The hash under which clients cache a file: SHA-256 if it is kept by Git LFS, else git's own."""
    return sha256(content).hexdigest() if is_lfs(path, content) else hash_blob(content)


def describe(path: str, content: bytes, hash_name: str) -> dict:
    """A file's size and hashes as listings give them; they differ in what they call git's hash."""
    size, digest = len(content), entity_tag(path, content)
    if not is_lfs(path, content):
        return {"size": size, hash_name: digest}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {size}\n".encode()
    lfs = {"oid": digest, "sha256": digest, "size": size, "pointerSize": len(pointer)}
    return {"size": size, hash_name: hash_blob(pointer), "lfs": lfs}


def list_parents(path: str) -> list[str]:
    """The folders that a file lies in, innermost first, ending in `"."`."""
    return [str(parent) for parent in PurePosixPath(path).parents]


def read_metadata(card: str) -> dict:
    """The YAML block at the head of a model card."""
    block = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    return (yaml.safe_load(block[1]) or {}) if block else {}
