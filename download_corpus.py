#!/usr/bin/env python3
"""第 0 步（prepare_corpus.py 会自己调用）：下载内置的两个数据集。

读什么：wiki（中文维基百科，254,547 篇）、zhihu（知乎问答，1,006,218 条），从 Hub、它的镜像或 ModelScope。
留下什么：<output_dir>/wiki/、<output_dir>/zhihu/ 里的数据文件，和 report.json（从哪里下的，每个文件的大小）。

    python download_corpus.py wiki zhihu                        # 三处各试几秒，用最快的
    python download_corpus.py wiki --source mirror              # 只用镜像：HF_ENDPOINT，默认 hf-mirror.com
    python download_corpus.py zhihu --source modelscope         # 要先 pip install modelscope-hub

断了重跑同一条命令，从断的地方接着下。下完核对每个文件的大小和 sha256，不对就重下。
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import sys
import time
import urllib.request
from pathlib import Path

import filelock

DATASETS = {
    "wiki": dict(hub="pleisto/wikipedia-cn-20230720-filtered",
                 modelscope="AI-ModelScope/wikipedia-cn-20230720-filtered"),
    "zhihu": dict(hub="wangrui6/Zhihu-KOL", modelscope="OmniData/Zhihu-KOL"),
}
HUB_ENDPOINT, MIRROR_ENDPOINT = "https://huggingface.co", "https://hf-mirror.com"
PLATFORMS = {"hub": "Hub", "mirror": "镜像", "modelscope": "ModelScope"}
KINDS = (".jsonl", ".json", ".parquet", ".csv", ".txt")             # 数据文件；说明、图片之类不下载
PROBE_SECONDS = 3                                                   # 每处试几秒
RETRIES, RETRY_SECONDS = 5, 2                                       # 失败重试几次；等 2、4、8……秒


# ==== 0. 控制台与出错（各脚本里一字不差，由 tests/test_consistency.py 看守）====

class UserError(Exception):
    """使用者自己能改正的错误：只打印一行中文，退出码 1，没有 traceback。"""


class ArgumentParser(argparse.ArgumentParser):
    """argparse，但报错是一行中文，而且 --work-dir 和 --work_dir 都认。"""

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        dashes = re.compile(r"^--[\w-]+")
        args = [dashes.sub(lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in args]
        args = [re.sub(r"^--no_(?=\w)", "--no-", a) for a in args]
        return super().parse_args(args, namespace)

    def error(self, message):
        for english, chinese in (("ignored explicit argument", "不接受取值"), ("argument ", "参数 "),
                                 ("unrecognized arguments:", "不认识的参数："),
                                 ("expected one argument", "后面要跟一个值"),
                                 ("expected at least one argument", "后面至少要跟一个值"),
                                 ("invalid choice:", "没有这个选项："), ("choose from", "可选")):
            message = message.replace(english, chinese)
        print(f"错误：{message}（--help 列出全部参数）", file=sys.stderr)
        sys.exit(2)


def run(main):
    """运行 main()，把使用者能造成的错误变成一行中文和非零退出码。"""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))      # 让 finally 里的清理有机会执行
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        sys.exit(main())
    except UserError as error:
        message = str(error)
    except OSError as error:
        full = error.errno == 28 or "No space left" in str(error)
        where = f"{error.filename}：" if error.filename else ""
        message = f"磁盘写满了：{where}清出空间后重跑同一条命令" if full else f"读写文件失败：{error}；检查路径和权限"
    except KeyboardInterrupt:
        print("已按 Ctrl-C 停下，未完成的部分不算数；重跑同一条命令即可", file=sys.stderr)
        sys.exit(130)
    print("错误：" + " ".join(message.split()), file=sys.stderr)
    sys.exit(1)


# ==== 1. 三个平台 ====

def installed(package):
    return importlib.util.find_spec(package) is not None


def endpoint_of(platform):
    if platform == "modelscope":
        return os.environ.get("MODELSCOPE_ENDPOINT", "https://modelscope.cn").rstrip("/")
    return HUB_ENDPOINT if platform == "hub" else os.environ.get("HF_ENDPOINT", MIRROR_ENDPOINT).rstrip("/")


def network_errors():
    """下载失败时两家的客户端会抛的异常。"""
    from huggingface_hub.errors import HTTPError
    errors = (OSError, ValueError, HTTPError)        # ValueError：应答不是 JSON，多半是网关的登录页
    if installed("modelscope_hub"):
        from modelscope_hub import HubError
        errors += (HubError,)
    return errors


def remote_files(platform, name):
    """平台上这个数据集的数据文件：[(文件名, 下载地址, 字节数, sha256 或 None)]。"""
    endpoint = endpoint_of(platform)
    if platform == "modelscope":
        from modelscope_hub import HubApi
        repo = DATASETS[name]["modelscope"]
        listed = HubApi(endpoint=endpoint).list_repo_files(repo, "dataset")
        files = [(file.path, f"{endpoint}/api/v1/datasets/{repo}/repo?Revision=master&FilePath={file.path}",
                  file.size, file.sha256) for file in listed]
    else:
        from huggingface_hub import HfApi, hf_hub_url
        repo = DATASETS[name]["hub"]
        # token=False：公开的数据不用令牌，更不能把它发给镜像
        info = HfApi(endpoint=endpoint, token=False).dataset_info(repo, files_metadata=True, timeout=10)
        files = [(file.rfilename, hf_hub_url(repo, file.rfilename, repo_type="dataset", endpoint=endpoint),
                  file.size, file.lfs and file.lfs.sha256) for file in info.siblings]
    data = [file for file in files if file[0].endswith(KINDS)
            and not re.search(r"(?i)info|config|readme", file[0])]      # dataset_infos.json 之类是说明
    if not data:
        raise OSError(f"{endpoint} 的 {repo} 里没有数据文件")
    return data


def measure_speed(platform, name):
    """试下几秒最大的那个文件。返回每秒字节数；连不上返回 0。"""
    try:
        _, url, _, _ = max(remote_files(platform, name), key=lambda file: file[2] or 0)
        request = urllib.request.Request(url, headers={"Range": "bytes=0-33554431"})
        start, received = time.monotonic(), 0
        with urllib.request.urlopen(request, timeout=PROBE_SECONDS) as response:
            while time.monotonic() - start < PROBE_SECONDS and (block := response.read(1 << 16)):
                received += len(block)
        return received / (time.monotonic() - start)
    except network_errors():
        return 0.0


def choose_platforms(name):
    """每处试几秒，返回连得上的，快的在前。"""
    candidates = [key for key in PLATFORMS if key != "modelscope" or installed("modelscope_hub")]
    speeds = {platform: measure_speed(platform, name) for platform in candidates}
    usable = sorted((key for key in speeds if speeds[key]), key=lambda key: -speeds[key])
    found = "，".join(f"{PLATFORMS[key]} {speed / 1e6:.1f} MB/s" if speed else f"{PLATFORMS[key]} 连不上"
                     for key, speed in speeds.items())
    print(f"{name}：{found}" + (f"；用 {PLATFORMS[usable[0]]}" if usable else ""))
    return usable


# ==== 2. 下载 ====

def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download_file(platform, name, file, size, sha256, folder):
    """下载一个文件到 folder；断点续传由客户端做。内容与平台公布的不符就整个重下一次，再不符抛 OSError。"""
    from huggingface_hub import hf_hub_download
    for force in (False, True):
        if platform == "modelscope":
            from modelscope_hub import HubApi
            if force:
                (folder / file).unlink(missing_ok=True)
            HubApi(endpoint=endpoint_of(platform)).download_repo(
                DATASETS[name]["modelscope"], "dataset", local_dir=folder, allow_patterns=[file])
        else:
            hf_hub_download(DATASETS[name]["hub"], file, repo_type="dataset", local_dir=folder,
                            force_download=force, endpoint=endpoint_of(platform), token=False)
        path = folder / file
        if size in (None, path.stat().st_size) and sha256 in (None, "", sha256_of(path)):
            return
        print(f"{file} 的大小或 sha256 与平台公布的不符，{'放弃' if force else '重新下载'}")
        path.unlink()
    raise OSError(f"{file} 下载下来的内容不对")


def download_dataset(name, platform, folder):
    """从一个平台下载整个数据集，失败了等一会儿再试。成功返回文件名，失败返回 None。"""
    for attempt in range(1, RETRIES + 1):
        try:
            files = remote_files(platform, name)
            missing = sum((size or 0) for file, _, size, _ in files if not (folder / file).exists())
            if shutil.disk_usage(folder).free < missing:
                raise UserError(f"{folder} 只剩 {shutil.disk_usage(folder).free / 1e9:.1f} GB，下载 {name} 还要 "
                                f"{missing / 1e9:.1f} GB；清出空间，或用 --output_dir 换一块盘")
            for file, _, size, sha256 in files:
                download_file(platform, name, file, size, sha256, folder)
            return [file[0] for file in files]
        except network_errors() as error:
            if getattr(error, "errno", None) == 28:          # 磁盘写满了，不是网络的事
                raise
            reason = " ".join(f"{type(error).__name__} {error}".split())[:120]
            print(f"从 {PLATFORMS[platform]} 下载 {name} 失败，第 {attempt}/{RETRIES} 次（{reason}）")
            status = getattr(getattr(error, "response", None), "status_code", 0)
            offline = type(error).__name__ == "OfflineModeIsEnabled"         # 设了 HF_HUB_OFFLINE
            if offline or 400 <= status < 500 and status not in (408, 429):  # 没有这个数据集、没有权限：再试也一样
                return None
            if attempt < RETRIES:
                time.sleep(RETRY_SECONDS * 2 ** (attempt - 1))
    return None


def complete(folder):
    """已经下载完、一个字节也不少。"""
    try:
        files = json.loads((folder / "report.json").read_text("utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def fetch(name, source, output_dir):
    """保证 output_dir/name/ 里有完整的数据集。"""
    folder = output_dir / name
    if complete(folder):
        print(f"{name} 已经下载好，沿用 {folder}")
        return
    folder.mkdir(parents=True, exist_ok=True)
    platforms = choose_platforms(name) if source == "auto" else [source]
    for platform in platforms:
        files = download_dataset(name, platform, folder)
        if files is not None:
            report = {"platform": platform, "endpoint": endpoint_of(platform),
                      "files": {file: (folder / file).stat().st_size for file in files}}
            temporary = folder / ".report.json.tmp"
            temporary.write_text(json.dumps(report, ensure_ascii=False, indent=1), "utf-8")
            os.replace(temporary, folder / "report.json")
            shutil.rmtree(folder / ".cache", ignore_errors=True)         # 客户端记断点用的
            print(f"{name} 下载好了：{folder}")
            return
    raise UserError(
        f"下载 {DATASETS[name]['hub']} 失败：{'、'.join(PLATFORMS[key] for key in platforms) or '哪里也'}连不上或下不全（已下的"
        f"部分留着，重跑接着下）。三条路：设 HF_ENDPOINT=https://hf-mirror.com 走镜像；pip install modelscope-hub 后加 "
        f"--source modelscope；从 ModelScope 网页 https://modelscope.cn/datasets/{DATASETS[name]['modelscope']} "
        f"下载数据文件，再用 --corpus {name}=文件 读本地。没有网就先跑 --corpus demo")


def main():
    parser = ArgumentParser(description="第 0 步：下载维基百科和知乎", allow_abbrev=False)
    default_dir = "/root/autodl-tmp/gpt2-chinese" if Path("/root/autodl-tmp").is_dir() else "gpt2-chinese"
    parser.add_argument("names", nargs="+", choices=list(DATASETS), metavar="名字", help="wiki、zhihu")
    parser.add_argument("--source", choices=["auto", *PLATFORMS], default="auto",
                        help="从哪里下载；auto 各试几秒，用最快的，不行再换下一个")
    parser.add_argument("--output_dir", type=Path, default=Path(default_dir) / "downloads", help="写到哪里")
    args = parser.parse_args()
    # Xet 协议会绕过镜像直连；普通 HTTP 也能断点续传。要在导入 huggingface_hub 之前设
    os.environ["HF_HUB_DISABLE_XET"] = "1"
    os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "CRITICAL")
    for client in ("modelscope_hub", "huggingface_hub"):
        logging.getLogger(client).setLevel(logging.CRITICAL)         # 失败由我们自己说，一行
    if args.source == "modelscope" and not installed("modelscope_hub"):
        raise UserError("指定了 --source modelscope，但没有装它的客户端：pip install modelscope-hub")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(args.output_dir.with_name(f".{args.output_dir.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"另一个进程正在往 {args.output_dir} 下载；等它结束") from None
    with lock:
        for name in args.names:
            fetch(name, args.source, args.output_dir)


if __name__ == "__main__":
    run(main)
