"""几个基准共用的：机器和版本、准备一次数据、跑一次训练、写结果。"""

import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "benchmarks" / "patched_train.py"


def cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def provenance():
    """每个结果都带上的：机器、版本、日期。"""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "无显卡"
    return {
        "machine": f"{cpu_name()}，{os.cpu_count()} 核，{gpu}",
        "date": str(date.today()),
        "versions": f"python {platform.python_version()}，torch {torch.__version__}，"
        f"transformers {transformers.__version__}",
    }


def write_atomic(path, text):
    """先写到旁边再改名：中途被杀，原来的结果还在。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, "utf-8")
    os.replace(temporary, path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line] if path.exists() else []


def prepare(base, arguments):
    """语料、分词器、打包只做一次，放在 base；每次训练都用它。"""
    if not (base / "packed" / "meta.json").exists():
        command = [
            sys.executable,
            str(ROOT / "a100_train.py"),
            *arguments,
            "--prepare_only",
            "--work_dir",
            str(base),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def link_data(base, work_dir):
    """一个准备好数据、还没有训练过的工作目录：数据只是指向 base 的链接，完整语料 3 GB 不必每次都拷。"""
    work_dir.mkdir(parents=True)
    for name in ("corpus", "tokenizer", "packed"):
        (work_dir / name).symlink_to((base / name).resolve(), target_is_directory=True)


def train(work_dir, arguments, patches=(), timeout=None):
    """以子进程训练一次。返回 {"error"（成功是 None）, "rows"（日志）, "config", "report", "seconds"}。"""
    report = work_dir / "report.json"
    command = [
        sys.executable,
        str(LAUNCHER),
        *(part for patch in patches for part in ("--patch", patch)),
        "--report",
        str(report),
        "--",
        *map(str, arguments),
        "--work_dir",
        str(work_dir),
    ]
    start = time.time()
    error = None
    try:
        process = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, encoding="utf-8"
        )
        if process.returncode:
            lines = process.stderr.strip().splitlines() or ["没有输出"]
            error = lines[-1][:200]
    except subprocess.TimeoutExpired:
        error = f"超过 {timeout:.0f} 秒没有跑完"
    result = {
        "error": error,
        "seconds": round(time.time() - start, 1),
        "rows": read_lines(work_dir / "train_log.jsonl"),
    }
    for key, path in (("config", work_dir / "config.json"), ("report", report)):
        result[key] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return result
