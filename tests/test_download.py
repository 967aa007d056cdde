"""download_corpus.py：对着本机上一个会出错的小 Hub 下载——断线、429、503、截断、坏字节、换平台。

服务器只说客户端用得到的那部分 API：列文件、HEAD、带 Range 的 GET（Hub 和镜像），repo/tree 和 repo（ModelScope）。
"""

import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import call, error_of, run_script

import download_corpus
import prepare_corpus

WIKI = b"".join(json.dumps({"completion": f"第 {i} 篇：中国的历史很长，这里是第 {i} 段文字。", "source": "wikipedia"},
                           ensure_ascii=False).encode() + b"\n" for i in range(4000))
FILES = {"wikipedia.json": WIKI, "README.md": b"# card", "dataset_infos.json": b"{}"}


class Hub(http.server.ThreadingHTTPServer):
    """一个数据集的 Hub。faults：{故障名: 还要出几次}；log：每次请求 (方法, 路径, Range, 状态)。"""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log, self.headers = dict(FILES), Counter(), [], []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def fault(self, name):
        """这一次要不要出这个故障。"""
        if self.faults[name] > 0:
            self.faults[name] -= 1
            return True
        return False

    def handle_error(self, request, client_address):
        pass                                         # 客户端自己断开，不是测试的错


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, status, body=b"", headers=None, length=None):
        self.server.log.append((self.command, self.path, self.headers.get("Range"), status))
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.headers.append(str(self.headers))
        path = urllib.parse.urlparse(self.path)
        for status in (429, 503, 404):
            if self.server.fault(f"{self.command} {status}"):
                self.reply(status, headers={"Retry-After": "0"} if status == 429 else None)
                return
        if path.path.endswith("/repo/tree"):                          # ModelScope：列文件
            files = [{"Path": name, "Name": name, "Size": len(data), "Type": "blob",
                      "Sha256": hashlib.sha256(data).hexdigest()} for name, data in self.server.files.items()]
            page = int(urllib.parse.parse_qs(path.query).get("PageNumber", ["1"])[0])
            self.reply(200, json.dumps({"Code": 200, "Success": True, "Data": {
                "Files": files if page == 1 else [], "TotalCount": len(files)}}).encode(),
                {"Content-Type": "application/json"})
        elif path.path.endswith("/repo"):                              # ModelScope：一个文件
            self.send_file(urllib.parse.parse_qs(path.query)["FilePath"][0])
        elif path.path.startswith("/api/datasets/"):                   # Hub：列文件
            siblings = [{"rfilename": name, "size": len(data), "blobId": "b", "lfs": {
                "sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 1}}
                for name, data in self.server.files.items()]
            self.reply(200, json.dumps({"id": "x/y", "sha": "c" * 40, "siblings": siblings}).encode(),
                       {"Content-Type": "application/json"})
        else:                                                          # Hub：/datasets/x/y/resolve/main/文件
            self.send_file(path.path.split("/resolve/")[1].split("/", 1)[1])

    def send_file(self, name):
        data = self.server.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": "c" * 40,
                   "X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                   "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self.reply(200, b"", headers, len(data))
            return
        if self.server.fault("corrupt"):                               # 长度对，内容错
            data = b"#" + data[1:]
        start, status = 0, 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, status = int(match[1]), 206
            end = min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data = data[:end + 1]
        body = data[start:]
        if self.server.fault("drop"):                                  # 说好这么长，传一半断开
            self.reply(status, body[:len(body) // 2], headers, len(body))
            self.close_connection = True
            self.connection.close()
        elif self.server.fault("truncate"):                            # 自称完整，其实少一截
            self.reply(status, body[:len(body) - 1000], headers)
        else:
            self.reply(status, body, headers)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """一个小 Hub，当作镜像；官方 Hub 和 ModelScope 指向没有人听的端口。重试不等。"""
    server = Hub()
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(download_corpus, "HUB_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(download_corpus, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(download_corpus, "PROBE_SECONDS", 0.5)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)      # 续传的粒度，平时 10 MB
    yield server
    server.shutdown()
    server.server_close()


def fetch(tmp_path, source="mirror"):
    call(download_corpus, "wiki", "--source", source, "--output_dir", tmp_path / "downloads")
    return tmp_path / "downloads/wiki"


def check_whole(folder):
    assert (folder / "wikipedia.json").read_bytes() == WIKI
    assert json.loads((folder / "report.json").read_text("utf-8"))["files"] == {"wikipedia.json": len(WIKI)}
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "wikipedia.json"]


FAULTS = {
    "none": {}, "drop": {"drop": 3}, "429": {"GET 429": 3, "HEAD 429": 2},
    "503": {"GET 503": 2, "HEAD 503": 2}, "truncate": {"truncate": 2}, "corrupt": {"corrupt": 1},
    "everything": {"drop": 1, "GET 503": 1, "GET 429": 1, "truncate": 1},
}


@pytest.mark.parametrize("faults", FAULTS)
def test_faults_are_survived(hub, tmp_path, faults):
    """每种故障之后文件都一个字节不差；断线是接着下，不是从头来。"""
    hub.faults.update(FAULTS[faults])
    check_whole(fetch(tmp_path))
    assert not +hub.faults, "故障都真的发生了"
    names = {urllib.parse.urlparse(path).path.rsplit("/", 1)[-1] for method, path, _, _ in hub.log
             if "resolve" in path}
    assert names == {"wikipedia.json"}, "说明文件不下载"
    if faults == "drop":
        starts = [int(span[6:].split("-")[0]) for _, _, span, status in hub.log if span and status == 206]
        assert starts == sorted(starts) and starts and starts[0] > 0


@pytest.mark.parametrize("fault", ["truncate", "corrupt", "GET 503", "GET 404"])
def test_a_fault_that_stays_is_one_line_and_no_corpus(hub, tmp_path, monkeypatch, fault):
    """一直坏：一行错误，没有 report.json，所以后面的步骤不会拿残缺的文件当语料。"""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.faults[fault] = 10**6
    message = error_of(download_corpus, "wiki", "--source", "mirror", "--output_dir", tmp_path / "downloads")
    for word in ("pleisto/wikipedia-cn-20230720-filtered", "hf-mirror.com", "--source modelscope",
                 "--corpus wiki=文件"):
        assert word in message
    assert not (tmp_path / "downloads/wiki/report.json").exists()
    hub.faults.clear()
    check_whole(fetch(tmp_path))                     # 网络好了，同一条命令


def test_finished_download_is_reused_and_a_damaged_one_is_not(hub, tmp_path, capsys):
    folder = fetch(tmp_path)
    requests = len(hub.log)
    fetch(tmp_path)
    assert "沿用" in capsys.readouterr().out and len(hub.log) == requests
    (folder / "wikipedia.json").write_bytes(WIKI[:-5])
    check_whole(fetch(tmp_path))


def test_auto_says_what_it_found_and_uses_what_answers(hub, tmp_path, capsys):
    check_whole(fetch(tmp_path, "auto"))
    out = capsys.readouterr().out
    assert "Hub 连不上" in out and "用 镜像" in out and re.search(r"镜像 [\d.]+ MB/s", out)


def test_auto_moves_on_when_the_first_one_fails(hub, tmp_path, monkeypatch, capsys):
    """最快的那个下到一半总是坏：换下一个平台。"""
    pytest.importorskip("modelscope_hub", reason="没有装 modelscope-hub")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.endpoint)
    monkeypatch.setattr(download_corpus, "choose_platforms", lambda name: ["mirror", "modelscope"])
    hub.faults["corrupt"] = 2 * download_corpus.RETRIES
    check_whole(fetch(tmp_path, "auto"))
    assert "从 镜像 下载 wiki 失败" in capsys.readouterr().out


@pytest.mark.parametrize("faults", [{}, {"drop": 1}, {"GET 503": 1}], ids=["none", "drop", "503"])
def test_modelscope(hub, tmp_path, monkeypatch, faults):
    pytest.importorskip("modelscope_hub", reason="没有装 modelscope-hub")
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.endpoint)
    hub.faults.update(faults)
    folder = fetch(tmp_path, "modelscope")
    assert (folder / "wikipedia.json").read_bytes() == WIKI


def test_modelscope_without_its_client(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download_corpus, "installed", lambda package: False)
    message = error_of(download_corpus, "wiki", "--source", "modelscope", "--output_dir", tmp_path / "d")
    assert "pip install modelscope-hub" in message


def test_prepare_corpus_downloads_and_checks_the_rows(hub, tmp_path, monkeypatch, capfd):
    """prepare_corpus.py 一条命令：下载（子进程，经镜像）、清洗、核对行数。"""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    call(prepare_corpus, "--corpus", "wiki", "--source", "mirror", "--output_dir", tmp_path / "corpus")
    out = capfd.readouterr().out
    assert "wiki：已知 254,547 行" in out and "这次 4,000 行" in out
    report = json.loads((tmp_path / "corpus/report.json").read_text("utf-8"))
    assert report["sources"]["wiki"]["documents"] == 4000
    card = (tmp_path / "corpus/README.md").read_text("utf-8")
    assert "pleisto/wikipedia-cn-20230720-filtered" in card and "CC BY-SA" in card
    monkeypatch.setitem(prepare_corpus.DATASETS["wiki"], "rows", 4000)
    call(prepare_corpus, "--corpus", "wiki", "--minimum_characters", 5, "--output_dir", tmp_path / "corpus")
    assert "与已知的一致" in capfd.readouterr().out


def test_parquet_dataset(hub, tmp_path):
    """知乎的样子：data/ 里的几个 parquet。"""
    sink = pa.BufferOutputStream()
    row = {"INSTRUCTION": ["问"], "RESPONSE": ["答"], "SOURCE": ["z"], "METADATA": ["{}"]}
    pq.write_table(pa.table(row), sink)
    data = sink.getvalue().to_pybytes()
    hub.files = {f"data/train-{i}-of-2.parquet": data for i in range(2)} | {"README.md": b"x"}
    call(download_corpus, "zhihu", "--source", "mirror", "--output_dir", tmp_path / "downloads")
    assert (tmp_path / "downloads/zhihu/data/train-1-of-2.parquet").read_bytes() == data


def test_xet_is_off_and_no_token_is_sent(hub, tmp_path, monkeypatch):
    """Xet 会绕过镜像；下载公开数据不需要令牌，不能发给镜像，也不打印。"""
    monkeypatch.setenv("HF_TOKEN", "hf_secret_for_the_test")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    result = run_script("download_corpus.py", "wiki", "--source", "mirror", "--output_dir", tmp_path / "d")
    check_whole(tmp_path / "d/wiki")
    assert "hf_secret_for_the_test" not in result.stdout + result.stderr + str(hub.headers)
    assert not any("xet" in path.lower() for _, path, _, _ in hub.log)


def test_offline_is_said_at_once(hub, tmp_path):
    """HF_HUB_OFFLINE=1：不重试，一行。"""
    result = run_script("download_corpus.py", "wiki", "--source", "mirror", "--output_dir", tmp_path / "d")
    assert result.returncode == 1 and "第 1/5 次" in result.stdout and "第 2/5 次" not in result.stdout


def test_disk_is_checked_before_downloading(hub, tmp_path, monkeypatch):
    disk = type("Disk", (), {"free": 1000})()
    monkeypatch.setattr(download_corpus.shutil, "disk_usage", lambda folder: disk)
    message = error_of(download_corpus, "wiki", "--source", "mirror", "--output_dir", tmp_path / "downloads")
    assert "只剩 0.0 GB" in message and "--output_dir" in message
    assert not any("resolve" in path for method, path, _, _ in hub.log if method == "GET")
