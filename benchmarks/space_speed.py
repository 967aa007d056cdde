"""网页启动要多久，点了“续写”多久出第一个字：完整大小（82 M 参数）的模型，权重随机，CPU。

    python benchmarks/space_speed.py          # 写 results/space_speed.md、results/space_speed.json

每次都是新的进程：从启动到网页打得开，再到第一次、第二次续写的第一个词块。速度与权重的值无关，所以不用训练。
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import gradio
import psutil
from common import ROOT, provenance, write_atomic

sys.path.insert(0, str(ROOT / "tests"))
import tiny_run

FULL = {"n_layer": 8, "n_embd": 768, "n_head": 12, "n_positions": 1024}
COLUMNS = {
    "start": "启动到网页打得开",
    "start_cpu": "其中 CPU 时间",
    "first": "第一次续写的第一个词块",
    "second": "第二次续写的第一个词块",
    "per_token": "之后每个词块",
    "load": "开始前的系统负载",
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(url):
    while True:
        try:
            return urllib.request.urlopen(url, timeout=5).read()
        except OSError:
            time.sleep(0.02)


def start_button(url):
    """“续写”按钮背后的函数的编号。"""
    config = json.load(urllib.request.urlopen(f"{url}/config"))
    button = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "start")
    return next(event["id"] for event in config["dependencies"] if [button, "click"] in event["targets"])


def continue_once(url, function, tokens=30):
    """像网页那样请求一次续写，返回 (到第一个词块的秒数，到最后一个的秒数)。"""
    session = os.urandom(5).hex()
    start = time.perf_counter()
    first = None
    data = ["中国的历史", "", 0.8, 50, 0.9, 1.1, tokens, 1]
    body = json.dumps({"data": data, "fn_index": function, "session_hash": session}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/gradio_api/queue/join", body, headers)
    urllib.request.urlopen(request).read()
    with urllib.request.urlopen(f"{url}/gradio_api/queue/data?session_hash={session}") as stream:
        for line in stream:
            if b'"process_generating"' in line and first is None:
                first = time.perf_counter() - start
            if b'"process_completed"' in line:
                return first, time.perf_counter() - start
    raise RuntimeError("续写没有完成")


def measure(folder, tokens=30):
    """启动一次网页，量一遍，关掉。"""
    port = free_port()
    load = os.getloadavg()[0]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    url = f"http://127.0.0.1:{port}"
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, ROOT / "space" / "app.py", "--model", folder / "final_model"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(url)
        used = psutil.Process(process.pid).cpu_times()
        row = {"start": time.perf_counter() - start, "start_cpu": used.user + used.system, "load": load}
        function = start_button(url)
        row["first"], _ = continue_once(url, function, tokens)
        row["second"], last = continue_once(url, function, tokens)
        row["per_token"] = (last - row["second"]) / (tokens - 1)
        return {name: round(value, 3) for name, value in row.items()}
    finally:
        process.terminate()
        process.wait()


def report(result):
    lines = [
        "# 网页的启动和第一个词块",
        "",
        f"日期 {result['date']}。机器：{result['machine']}。{result['versions']}，"
        f"gradio {result['gradio']}。",
        "",
        f"    {result['command']}",
        "",
        f"模型 {result['parameters']:,} 参数，随机权重，fp32。每行一个新的进程；秒。CPU 时间与别的程序抢不抢无关；"
        "系统负载大于 2（核数）就是有别的程序在抢，那一行的其余几列会偏大。",
        "",
        "| 次 | " + " | ".join(COLUMNS.values()) + " |",
        "|---:" * (len(COLUMNS) + 1) + "|",
    ]
    for number, row in enumerate(result["rows"], 1):
        lines.append(f"| {number} | " + " | ".join(f"{row[name]:.2f}" for name in COLUMNS) + " |")
    medians = " | ".join(f"**{value:.2f}**" for value in result["median"].values())
    lines.append(f"| **中位数** | {medians} | |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description="量网页的速度", allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=5, help="启动几次；默认 5")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "results" / "space_speed", help="结果，不带扩展名"
    )
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        folder = tiny_run.make(Path(temporary), vocab_size=32_000, **FULL)
        parameters = tiny_run.model(32_000, **FULL).num_parameters()
        rows = []
        for _ in range(args.runs):
            rows.append(measure(folder))
            print(rows[-1], flush=True)
    median = {name: statistics.median(row[name] for row in rows) for name in list(COLUMNS)[:-1]}
    result = provenance() | {
        "command": "python benchmarks/space_speed.py",
        "gradio": gradio.__version__,
        "parameters": parameters,
        "rows": rows,
        "median": median,
    }
    write_atomic(args.output.with_suffix(".json"), json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    write_atomic(args.output.with_suffix(".md"), report(result))
    print(report(result))


if __name__ == "__main__":
    main()
