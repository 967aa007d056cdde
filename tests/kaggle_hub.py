"""本机上的一个小 Hub：够 kaggle_pretrain_combined.py 新建私有仓库、上传、删旧文件、整个下载。"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_token_for_tests"
SHA = "a" * 40


class KaggleHub:
    def __init__(self, private=True):
        self.files = {}
        self.objects = {}
        self.commits = 0
        self.exists = False
        self.private = private
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub, self.server.daemon_threads = self, True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, value, status=200, headers=()):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in dict(headers).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.reply({"error": "Invalid user token"}, 401)
        line = f"{self.command} {self.path.split('?')[0]}"
        for pattern, action in ROUTES:
            found = re.fullmatch(pattern, line)
            if found:
                return action(self, *found.groups())
        return self.reply({"error": line}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def create(self):
        hub = self.server.hub
        if hub.exists:
            return self.reply({"error": "exists", "url": f"{hub.url}/me/state"}, 409)
        asked = json.loads(self.body)
        private = asked.get("visibility") == "private" or asked.get("private")
        hub.exists = True
        hub.private = hub.private and private
        return self.reply({"url": f"{hub.url}/me/state", "name": "me/state"})

    def info(self):
        hub = self.server.hub
        self.reply(
            {
                "id": "me/state",
                "_id": "1",
                "private": hub.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "sha": SHA,
                "siblings": [{"rfilename": path} for path in hub.files],
            }
        )

    def tree(self):
        files = self.server.hub.files
        self.reply(
            [
                {"type": "file", "oid": oid, "path": path, "size": len(self.server.hub.objects[oid])}
                for path, oid in files.items()
            ]
        )

    def preupload(self):
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        large = (".safetensors", ".pt", ".bin")
        modes = {path: "lfs" if path.endswith(large) else "regular" for path in paths}
        self.reply(
            {
                "files": [
                    {
                        "path": path,
                        "shouldIgnore": False,
                        "uploadMode": mode,
                        "oid": self.server.hub.files.get(path),
                    }
                    for path, mode in modes.items()
                ]
            }
        )

    def batch(self):
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

    def commit(self):
        hub = self.server.hub
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "lfsFile":
                assert value["oid"] in hub.objects
                hub.files[value["path"]] = value["oid"]
            elif entry["key"] == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                hub.objects[oid] = content
                hub.files[value["path"]] = oid
            elif entry["key"] == "deletedFile":
                del hub.files[value["path"]]
        hub.commits += 1
        self.reply({"success": True, "commitOid": SHA, "commitUrl": f"{hub.url}/me/state/commit/{SHA}"})

    def resolve(self, path):
        oid = self.server.hub.files[path]
        self.reply(self.server.hub.objects[oid], headers={"ETag": f'"{oid}"', "X-Repo-Commit": SHA})


API = r"/api/models/me/state"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"GET /api/whoami-v2", lambda self: self.reply({"name": "me"})),
    (rf"GET {API}(?:/revision/\w+)?", Handler.info),
    (rf"GET {API}/tree/\w+.*", Handler.tree),
    (r"POST /api/validate-yaml", lambda self: self.reply({"errors": [], "warnings": []})),
    (rf"POST {API}/preupload/main", Handler.preupload),
    (r"PUT /lfs/(\w+)", Handler.put),
    (r"POST /me/state\.git/info/lfs/objects/batch", Handler.batch),
    (rf"POST {API}/commit/main", Handler.commit),
    (r"(?:GET|HEAD) /me/state/resolve/\w+/(.+)", Handler.resolve),
]
