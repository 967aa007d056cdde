"""本机上的一个小 Hub：只会 publish.py 用到的那几样接口，可以按吩咐出错。"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_correct_token_for_tests"


class FakeHub:
    def __init__(self):
        self.repos = {}
        self.objects = {}
        self.faults = []
        self.requests = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.server.daemon_threads = self, True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def repo(self, name, kind="model"):
        return self.repos[f"{kind}s/{name}"]

    def content(self, name, path, kind="model"):
        """仓库里一个文件的字节。"""
        oid = self.repo(name, kind)["files"][path]
        return self.objects[oid]

    def sent(self, pattern):
        """收到过多少个这样的请求。"""
        return sum(bool(re.search(pattern, request)) for request in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, value, status=200, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self):
        hub = self.server.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        line = f"{self.command} {self.path.split('?')[0]}"
        hub.requests.append(line)
        fault = next((fault for fault in hub.faults if re.search(fault[0], line)), None)
        if fault:
            hub.faults.remove(fault)
            if fault[1] == "drop":  # 收下了，还没回答就断
                if "commit" in line:
                    self.commit(*re.match(r"/api/(\w+s)/(.+)/commit/main", self.path).groups())
                self.close_connection = True
                return self.connection.close()
            return self.reply({"error": "fault"}, fault[1])
        if not self.path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid user token"}, 401)
        return self.route(line)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def route(self, line):
        for pattern, action in ROUTES:
            found = re.fullmatch(pattern, line)
            if found:
                return action(self, *found.groups())
        return self.reply({"error": f"no such page {line}"}, 404)

    def whoami(self):
        self.reply({"name": "me", "type": "user", "orgs": []})

    def create(self):
        asked = json.loads(self.body)
        kind = asked.get("type") or "model"
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if f"{kind}s/{name}" in self.server.hub.repos:
            return self.reply({"error": "exists"}, 409)
        self.server.hub.repos[f"{kind}s/{name}"] = {
            "private": asked.get("private", asked.get("visibility") == "private"),
            "files": {},
            "commits": 0,
            "variables": {},
            "sdk": asked.get("sdk"),
        }
        return self.reply({"url": f"{self.server.hub.url}/{name}", "name": name})

    def info(self, kind, name):
        repo = self.server.hub.repos.get(f"{kind}/{name}")
        if repo is None:
            return self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return self.reply(
            {
                "id": name,
                "_id": "1",
                "private": repo["private"],
                "siblings": [{"rfilename": path} for path in repo["files"]],
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "sha": "a" * 40,
                "disabled": False,
                "gated": False,
            }
        )

    def resolve(self, kind, name, path):
        """下载一个文件；HEAD 只要头。"""
        repo = self.server.hub.repos.get(f"{kind or 'models/'}{name}", {"files": {}})
        oid = repo["files"].get(path)
        if oid is None:
            return self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        body = self.server.hub.objects[oid]
        self.send_response(200)
        self.send_header("ETag", f'"{oid}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return None if self.command == "HEAD" else self.wfile.write(body)

    def validate(self):
        self.reply({"errors": [], "warnings": []})

    def preupload(self, kind, name):
        files = self.server.hub.repos[f"{kind}/{name}"]["files"]
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        large = [path for path in paths if path.endswith((".safetensors", ".parquet", ".png"))]
        self.reply(
            {
                "files": [
                    {
                        "path": path,
                        "shouldIgnore": False,
                        "oid": files.get(path),
                        "uploadMode": "lfs" if path in large else "regular",
                    }
                    for path in paths
                ]
            }
        )

    def batch(self, name):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.server.hub.url}/lfs/{wanted['oid']}"}}
            objects.append(entry)
        self.reply({"transfer": "basic", "objects": objects})

    def put(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.hub.objects[oid] = self.body
        self.reply({})

    def commit(self, kind, name):
        repo = self.server.hub.repos[f"{kind}/{name}"]
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "lfsFile":
                assert entry["value"]["oid"] in self.server.hub.objects
                repo["files"][entry["value"]["path"]] = entry["value"]["oid"]
            elif entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.server.hub.objects[oid] = content
                repo["files"][entry["value"]["path"]] = oid
        repo["commits"] += 1

    def answer_commit(self, kind, name):
        self.commit(kind, name)
        self.reply(
            {
                "success": True,
                "commitOid": "b" * 40,
                "commitUrl": f"{self.server.hub.url}/{name}/commit/{'b' * 40}",
            }
        )

    def variable(self, name):
        asked = json.loads(self.body)
        self.server.hub.repos[f"spaces/{name}"]["variables"][asked["key"]] = asked["value"]
        self.reply({asked["key"]: {"value": asked["value"], "updatedAt": "2026-01-01T00:00:00.000Z"}})


ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (r"(?:GET|HEAD) /((?:datasets|spaces)/)?([^/]+/[^/]+)/resolve/\w+/(.+)", Handler.resolve),
    (r"GET /api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/revision/main)?", Handler.info),
    (r"POST /api/(models|datasets|spaces)/([^/]+/[^/]+)/preupload/main", Handler.preupload),
    (r"POST /(?:datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(\w+)", Handler.put),
    (r"POST /api/(models|datasets|spaces)/([^/]+/[^/]+)/commit/main", Handler.answer_commit),
    (r"POST /api/spaces/([^/]+/[^/]+)/variables", Handler.variable),
]
