"""prepare_corpus.py：读得对（格式、压缩、编码、列），洗得对，分得对，写得对。"""

import csv
import gzip
import io
import json
import lzma
import random
import re
import subprocess
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, call, error_of, write_jsonl

import prepare_corpus

OPTIONS = prepare_corpus.Options(None, (), None, prepare_corpus.MINIMUM_CHARACTERS, False)
TEXTS = ["今天天气不错，我们去公园。", "第二篇：含“引号”、逗号,和\n换行", "Third: mixed 英文 😀 龘", "最后一篇。"]


def encode_rows(kind, texts):
    """把几篇文档写成某种格式的 bytes。"""
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    if kind == "parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    if kind == "csv":
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, ["id", "text"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue().encode()
    if kind == "json-array":
        return json.dumps(rows, ensure_ascii=False, indent=1).encode()
    if kind == "txt":
        return "\n".join(texts).encode()
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_packed(path, data):
    """按后缀压缩后写文件。"""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".xz":
        path.write_bytes(lzma.compress(data))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(data)
    return path


def read_texts(path, text_column=None):
    return [prepare_corpus.row_text(row, where, text_column)
            for batch in prepare_corpus.source_batches("x", [path])
            for where, row in prepare_corpus.parsed_rows(batch)]


# ==== 格式、压缩、编码 ====

@pytest.mark.parametrize("packed", ["", ".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json-array", "json-lines", "parquet", "csv", "txt"])
def test_formats(tmp_path, kind, packed):
    path = write_packed(tmp_path / f"a.{kind.split('-')[0]}{packed}", encode_rows(kind, TEXTS))
    assert read_texts(path) == (["\n".join(TEXTS)] if kind == "txt" else TEXTS)


ENCODINGS = {
    "utf-8": lambda text: text.encode("utf-8"),
    "utf-8-bom": lambda text: text.encode("utf-8-sig"),
    "utf-16-le-bom": lambda text: b"\xff\xfe" + text.encode("utf-16-le"),
    "utf-16-be-bom": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
    "utf-16-le": lambda text: text.encode("utf-16-le"),
    "utf-16-be": lambda text: text.encode("utf-16-be"),
    "gb18030": lambda text: text.encode("gb18030"),
}


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json-array", "csv"])
def test_encodings(tmp_path, real_texts, kind, encoding, newline):
    """同一份真实文本，各种编码读出来一样；\\r\\n 读成 \\n。"""
    texts = real_texts["news"][:30] + ["龘靐，𠮷😀"]
    data = encode_rows(kind, texts).decode().replace("\n", newline)
    suffix = ".xz" if encoding == "gb18030" else ""                # 编码和压缩也要能叠在一起
    path = write_packed(tmp_path / f"a.{kind.split('-')[0]}{suffix}", ENCODINGS[encoding](data))
    assert read_texts(path) == (["\n".join(texts)] if kind == "txt" else texts)


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
@pytest.mark.parametrize("shift", range(4))
def test_encoding_of_large_files(tmp_path, encoding, shift):
    """判断编码只看开头 1 MiB：切口落在一个字的任何位置都不能认错。"""
    text = "a" * shift + "中文𠮷" * 150_000
    path = write_packed(tmp_path / "a.txt", text.encode(encoding))
    assert "".join(read_texts(path)) == text


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
def test_encoding_after_a_long_ascii_head(tmp_path, encoding):
    """开头 1 MiB 全是英文，中文在后面。"""
    text = "plain English line\n" * 70_000 + "后面才有中文。"
    path = write_packed(tmp_path / "a.txt", text.encode(encoding))
    assert "".join(read_texts(path)) == text


def test_large_json_array(tmp_path):
    """大数组一段一段地读（每段 1 MiB），元素跨段也完整。"""
    texts = [f"{i}：" + "甲乙丙丁\\\"[{," * 300 for i in range(500)]
    path = write_packed(tmp_path / "a.json.gz", encode_rows("json-array", texts))
    assert read_texts(path) == texts


@pytest.mark.parametrize(("row", "column", "expected"), [
    ({"text": "甲", "completion": "乙"}, None, "甲"),
    ({"completion": "乙", "source": "x"}, None, "乙"),
    ({"INSTRUCTION": "问", "RESPONSE": "答", "SOURCE": "x"}, None, "问\n答"),
    ({"INSTRUCTION": "问", "RESPONSE": None}, None, "问\n"),
    ({"content": "丙", "id": 1}, "content", "丙"),
    ({"content": "丙", "text": "别的"}, "content", "丙"),
    ({"text": None}, None, ""),
    ("一个字符串", None, "一个字符串"),
])
def test_text_columns(row, column, expected):
    assert prepare_corpus.row_text(row, "某处", column) == expected


def test_sources(tmp_path):
    """文件、文件夹、通配符、名字=路径。"""
    for name in ("a.jsonl", "b.txt.gz", "sub/c.csv.xz", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(spec):
        source, files = prepare_corpus.parse_source(str(spec))
        return source, [file.name for file in files]

    assert names(tmp_path / "a.jsonl") == ("a", ["a.jsonl"])
    assert names(f"我的={tmp_path / 'a.jsonl'}") == ("我的", ["a.jsonl"])
    assert names(tmp_path)[1] == ["a.jsonl", "b.txt.gz", "c.csv.xz"]
    assert names(tmp_path / "*.gz")[1] == ["b.txt.gz"]
    assert prepare_corpus.parse_source("wiki") == ("wiki", None)


# ==== 长文、清洗 ====

def test_long_txt_is_cut_at_line_ends(tmp_path, real_texts):
    """长小说切成约 4,000 字符的段：只在行尾切，拼回去一字不差。"""
    novel = "\n".join(real_texts["news"][:1500])
    pieces = read_texts(write_packed(tmp_path / "novel.txt", novel.encode()))
    assert "".join(pieces) == novel
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    longest_line = max(map(len, novel.split("\n")))
    assert longest_line < 4000
    assert all(4000 - longest_line <= len(piece) <= 4000 + longest_line for piece in pieces[:-1])


@pytest.mark.parametrize("newline", ["\n", ""])
def test_short_txt_is_one_document_and_a_long_line_is_cut(tmp_path, newline):
    """8,000 字符以内是一篇；更长的切开，一行就有 50,000 字也切。"""
    short = "甲乙丙" * 2666 + newline
    assert read_texts(write_packed(tmp_path / "short.txt", short.encode())) == [short]
    one_line = "".join(chr(0x4E00 + i % 5000) for i in range(50_000)) + newline
    pieces = read_texts(write_packed(tmp_path / "long.txt", one_line.encode()))
    assert "".join(pieces) == one_line
    assert max(map(len, pieces)) <= 8000


def test_always_cleaned():
    """▁、坏字符、\\r\\n：关掉全部清洗也要处理，否则编码再解码会变。"""
    cleaner = prepare_corpus.Cleaner(skip=prepare_corpus.CLEANING)
    assert cleaner.clean("\u3000 正文▁里▁有\r\n换行 \n") == "正文 里 有\n换行"
    assert cleaner.clean("坏\ud83d字\udc00") == "坏\ufffd字\ufffd"
    assert cleaner.clean("本来就有 \ufffd 和 😀") == "本来就有 \ufffd 和 😀"
    assert cleaner.counts == {"replaced_u2581": 2, "replaced_surrogates": 2}
    assert not any(cleaner.examples.values())


FAMILY = "👨\u200d👩\u200d👧"
CLEANED = [      # (步骤, 原文, 清洗后)
    ("html", "第一段<br/>第二段<p>第三段</p>完", "第一段\n第二段第三段\n完"),
    ("html", '看<a href="http://x.cn?a=1&b=2" class="y">这里</a>和<img src="a.png">图', "看这里和图"),
    ("html", "<script type='a'>var a = 1 < 2;</script>正文<!-- 注释 -->还在", "正文还在"),
    ("html", "A&amp;B &lt;标签&gt; &#20013;&#x56FD;&nbsp;空格", "A&B <标签> 中国 空格"),
    ("html", "如果 a<b 且 c>d，AT&T 和 x&y; 都不动", "如果 a<b 且 c>d，AT&T 和 x&y; 都不动"),
    ("invisible", "零\u200b宽\ufeff空\u2060格\xad和\x00控\x07制\x1b符", "零宽空格和控制符"),
    ("invisible", "制表\t留着，回车\r换行，分段\u2029也是", "制表\t留着，回车\n换行，分段\n也是"),
    ("invisible", f"一家{FAMILY}不拆，字\u200d间的去掉", f"一家{FAMILY}不拆，字间的去掉"),
    ("boilerplate", "正文。\n编辑于 2019-03-02 12:30\n发布于 2018年5月1日", "正文。"),
    ("boilerplate", "正文。编辑于 2019-03-02・著作权归作者所有", "正文。"),
    ("boilerplate", "链接：https://www.zhihu.com/question/1/answer/2\n来源：知乎\n"
                    "著作权归作者所有。商业转载请联系作者获得授权，非商业转载请注明出处。\n\n正文", "正文"),
    ("boilerplate", "著作权归作者所有。商业转载请联系作者获得授权。后面还有正文。",
     "著作权归作者所有。商业转载请联系作者获得授权。后面还有正文。"),
    ("boilerplate", "看视频[视频]和图[图片]\nhttps://www.zhihu.com/video/123456\n完", "看视频和图\n\n完"),
    ("boilerplate", "该软件发布于 2019-03-02\n编辑于是走了，著作权归公司所有，来源：知乎日报",
     "该软件发布于 2019-03-02\n编辑于是走了，著作权归公司所有，来源：知乎日报"),
    ("blank_lines", "一\n\n\n二\n \n\t\n\u3000\n三\n\n四\n  五", "一\n\n二\n\n三\n\n四\n  五"),
    ("short", "好评。", ""),
    ("short", "好评！！", "好评！！"),
    ("not_text", "————====★★★★ 12345 67890 一", ""),
    ("not_text", "😀😀😀😀", ""),
    ("not_text", "2024 年 GDP 增长 5.2%。", "2024 年 GDP 增长 5.2%。"),
]


@pytest.mark.parametrize(("step", "raw", "expected"), CLEANED)
def test_each_step_alone_and_switched_off(step, raw, expected):
    """每一步单独开着有用，关掉就原样；改了就计数，并留下例子。"""
    others = set(prepare_corpus.CLEANING) - {step}
    cleaner = prepare_corpus.Cleaner(skip=others)
    assert cleaner.clean(raw) == expected
    changed = expected != raw and not (step == "invisible" and "\u2029" in raw)
    assert bool(cleaner.counts[step]) == bool(cleaner.examples[step]) == changed
    assert prepare_corpus.Cleaner(skip=prepare_corpus.CLEANING).clean(raw) == raw


def test_all_steps_leave_ordinary_text_alone(real_texts):
    """真实的新闻和评论，全部步骤开着，几乎不动：改了的只能是空白和看不见的字符，或整篇丢掉。"""
    cleaner, kept = prepare_corpus.Cleaner(), 0
    for text in real_texts["news"][:3000] + real_texts["reviews"][:3000]:
        cleaned = cleaner.clean(text)
        assert cleaned in (text.strip(), "") or cleaner.examples["invisible"] or cleaner.examples["html"]
        kept += bool(cleaned)
    assert kept > 5800


def test_fullwidth_is_kept_unless_asked_for():
    text = "ＧＰＴ－２，２０２４年！（ａｂｃ）①²"
    assert prepare_corpus.Cleaner().clean(text) == text
    cleaner = prepare_corpus.Cleaner(normalize="nfkc_alnum")
    assert cleaner.clean(text) == "GPT－2，2024年！（abc）①²"
    assert cleaner.counts["normalized"] == 11


@pytest.mark.parametrize("rubbish", ["<script " * 100_000, "<!--" * 200_000, "&" * 10**6, "\n" * 10**6,
                                     "<a " + "x" * 1_000_000, "<" * 1_000_000, " \n" * 500_000 + "完结了吧"])
def test_rubbish_does_not_hang(rubbish):
    """正则遇到恶意的输入也不能变成平方时间：一百万字的垃圾，每种应在几秒内过去（超时由 CI 的总时限管）。"""
    prepare_corpus.Cleaner().clean(rubbish)


# ==== 去重与切分 ====

def split(documents):
    """[(source, text)] -> ({"train": {text}, "eval": {text}}, counts)；顺便查每一边没有重复。"""
    with tempfile.TemporaryDirectory() as folder:
        folder, sources = Path(folder), []
        for number, (source, group) in enumerate(groupby(documents, key=lambda pair: pair[0])):
            sources.append((source, [write_jsonl(folder / f"{number}.jsonl", [text for _, text in group])]))
        staging = folder / "out"
        staging.mkdir()
        totals, _ = prepare_corpus.build(sources, OPTIONS, staging, 1)
        sides = {side: [row["text"] for path in sorted(staging.glob(f"{side}-*.parquet"))
                        for row in pq.read_table(path).to_pylist()] for side in ("train", "eval")}
    assert all(len(set(texts)) == len(texts) for texts in sides.values())
    return {side: set(texts) for side, texts in sides.items()}, totals.counts


def numbered(n, start=0):
    return [("甲", f"这是第 {i} 篇文档") for i in range(start, start + n)]


def test_split_counts_and_disjoint():
    documents = numbered(500)
    noisy = documents + documents[:70] + [("甲", "  "), ("甲", "\n\t\u3000"), ("乙", " 这是第 3 篇文档\n")]
    sides, counts = split(noisy)
    assert not sides["train"] & sides["eval"]
    assert sides["train"] | sides["eval"] == {text for _, text in documents}
    assert counts["甲"]["rows"] == 572 and counts["甲"]["empty"] == 2 and counts["甲"]["duplicates"] == 70
    assert counts["甲"]["documents"] == 500
    assert counts["乙"]["rows"] == counts["乙"]["duplicates"] == 1 and counts["乙"]["documents"] == 0   # 跨来源去重


def test_split_is_about_half_a_percent():
    sides, _ = split(numbered(40_000))
    assert 150 <= len(sides["eval"]) <= 250                 # 期望 200，标准差 14


def test_split_depends_on_content_only():
    """换顺序、加文档，同一篇仍在同一边。"""
    documents = numbered(14_000)
    before, _ = split(documents)
    assert len(before["eval"]) > 50
    shuffled = random.Random(0).sample(documents, len(documents))
    assert split(shuffled)[0] == before
    after, _ = split(numbered(6_000, start=50_000) + documents)
    assert before["eval"] <= after["eval"] and before["train"] <= after["train"]
    small = numbered(300)                                   # 小来源取哈希最小的 50 篇，也与顺序无关
    assert split(small)[0] == split(small[::-1])[0]


@pytest.mark.parametrize(
    ("n", "expected"), [(2, 1), (3, 1), (60, 30), (100, 50), (101, 50), (3000, 50)]
)
def test_small_sources_hold_out_fifty(n, expected):
    """不够 10,000 篇的来源留 50 篇，但至多一半。"""
    assert len(split(numbered(n))[0]["eval"]) == expected


def test_every_source_has_held_out_documents(tmp_path, real_texts):
    sources = [
        f"{name}={write_jsonl(tmp_path / f'{name}.jsonl', texts[:400])}" for name, texts in real_texts.items()
    ]
    novel = write_packed(tmp_path / "小说.txt", "\n".join(real_texts["news"][2000:2400]).encode())
    call(prepare_corpus, "--corpus", *sources, novel, "--output_dir", tmp_path / "corpus")
    eval_rows = pq.read_table(sorted((tmp_path / "corpus").glob("eval-*.parquet"))[0]).to_pylist()
    assert {row["source"] for row in eval_rows} == {"news", "reviews", "小说"}


# ==== 输出文件夹 ====

@pytest.fixture
def source(tmp_path):
    """一个有空行、重复、▁ 和坏字符的小来源。"""
    texts = [f"第 {i} 篇" for i in range(200)] + ["第 7 篇", " 第 8 篇 ", "", "  ", "有▁记号▁的", "坏\ud800字了"]
    path = tmp_path / "source.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def read_folder(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_report_adds_up(tmp_path, source):
    call(prepare_corpus, "--corpus", source, "--output_dir", tmp_path / "out")
    count = json.loads((tmp_path / "out/report.json").read_text("utf-8"))["sources"]["source"]
    rows = {split: pq.read_table(sorted((tmp_path / "out").glob(f"{split}-*.parquet"))).to_pylist()
            for split in ("train", "eval")}
    assert count["rows"] == 206 and count["empty"] == 2 and count["duplicates"] == 2
    assert count["replaced_u2581"] == 2 and count["replaced_surrogates"] == 1
    assert count["documents"] == 202 == count["rows"] - count["empty"] - count["duplicates"]
    for split_ in ("train", "eval"):
        assert count[f"{split_}_documents"] == len(rows[split_])
        assert count[f"{split_}_characters"] == sum(len(row["text"]) for row in rows[split_])
        assert set(rows[split_][0]) == {"text", "source"}
    assert count["train_documents"] + count["eval_documents"] == count["documents"]
    assert count["train_characters"] + count["eval_characters"] == count["characters"]
    texts = [row["text"] for row in rows["train"] + rows["eval"]]
    assert sorted(texts) == sorted({f"第 {i} 篇" for i in range(200)} | {"有 记号 的", "坏\ufffd字了"})


@pytest.mark.parametrize(("processes", "kind"), [(1, "jsonl"), (2, "jsonl"), (2, "parquet")])
def test_many_chunks_and_shards_give_the_same_corpus(tmp_path, real_texts, monkeypatch, processes, kind):
    """块和分片的大小、进程数都不改变结果：同样的文档、同样的次序、同样的切分。"""
    texts = real_texts["news"][:2000] + real_texts["news"][:300] + real_texts["reviews"][:500]
    source = write_packed(tmp_path / f"a.{kind}", encode_rows(kind, texts))
    call(prepare_corpus, "--corpus", source, "--output_dir", tmp_path / "one", "--processes", 1)
    monkeypatch.setattr(prepare_corpus, "CHUNK_BYTES", 40_000)
    monkeypatch.setattr(prepare_corpus, "SHARD_CHUNKS", 3)
    call(prepare_corpus, "--corpus", source, "--output_dir", tmp_path / "many", "--processes", processes)
    assert len(list((tmp_path / "many").glob("train-*.parquet"))) > 2
    for side in ("train", "eval"):
        one, many = (pq.read_table(sorted((tmp_path / name).glob(f"{side}-*.parquet"))).to_pylist()
                     for name in ("one", "many"))
        assert one == many and one
    one, many = (json.loads((tmp_path / name / "report.json").read_text("utf-8"))["sources"]
                 for name in ("one", "many"))
    assert one == many


def test_unchanged_source_is_reused(tmp_path, source, capsys):
    arguments = ("--corpus", source, "--output_dir", tmp_path / "out")
    call(prepare_corpus, *arguments)
    before = read_folder(tmp_path / "out")
    capsys.readouterr()
    call(prepare_corpus, *arguments)
    assert "沿用" in capsys.readouterr().out
    assert read_folder(tmp_path / "out") == before


def test_changed_source_is_rebuilt_and_says_why(tmp_path, source, capsys):
    arguments = ("--corpus", source, "--output_dir", tmp_path / "out")
    call(prepare_corpus, *arguments)
    first = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    with open(source, "a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "新来的一篇"}) + "\n")
    capsys.readouterr()
    assert "来源或设置变了" in error_of(prepare_corpus, *arguments, "--no-rebuild")
    assert json.loads((tmp_path / "out/report.json").read_text("utf-8")) == first
    call(prepare_corpus, *arguments)
    assert "重做语料：来源或设置变了" in capsys.readouterr().out
    second = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert second["sources"]["source"]["documents"] == first["sources"]["source"]["documents"] + 1
    assert second["corpus_hash"] != first["corpus_hash"]


def test_truncated_output_is_rebuilt_and_says_why(tmp_path, source, capsys):
    arguments = ("--corpus", source, "--output_dir", tmp_path / "out")
    call(prepare_corpus, *arguments)
    shard = tmp_path / "out/train-00000.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    capsys.readouterr()
    call(prepare_corpus, *arguments)
    out = capsys.readouterr().out
    assert "重做语料" in out and shard.name in out
    assert shard.read_bytes() == data


def test_foreign_folder_is_refused(tmp_path, source):
    """不是我们生成的文件夹，一个字节也不动。"""
    foreign = tmp_path / "out"
    foreign.mkdir()
    (foreign / "我的论文.txt").write_text("很重要", "utf-8")
    before = read_folder(foreign)
    assert "不覆盖" in error_of(prepare_corpus, "--corpus", source, "--output_dir", foreign)
    assert read_folder(foreign) == before


def test_failure_leaves_the_old_corpus(tmp_path, source):
    """重做到一半出错，旧语料原样还在，也不留下半成品。"""
    out = tmp_path / "out"
    call(prepare_corpus, "--corpus", source, "--output_dir", out)
    before = read_folder(out)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "好的"}\n{"text": \n', "utf-8")
    assert "第 2 行" in error_of(prepare_corpus, "--corpus", broken, "--output_dir", out)
    assert read_folder(out) == before
    assert not (tmp_path / ".out.tmp").exists()


# ==== 大语料：哈希集合、近似重复、中断后接着做 ====

def test_seen_hashes_equal_a_python_set():
    """任意分批，与 Python 的 set 一样；内存是每个哈希 8 字节。"""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 20_000, 50_000, dtype=np.uint64) * np.uint64(2**49 - 1)
    seen, expected, found = prepare_corpus.SeenHashes(), [], []
    known = set()
    for batch in np.split(hashes, np.sort(rng.integers(0, len(hashes), 60))):
        found += seen.add(batch).tolist()
        for value in batch.tolist():
            expected.append(value not in known)
            known.add(value)
    assert found == expected
    assert sum(run.nbytes for run in seen.runs) == 8 * len(known)
    assert len(seen.runs) < 20


def test_near_duplicates(tmp_path, real_texts):
    """改了几个字的算近似重复，不同的文章不算；默认不做。"""
    pytest.importorskip("datasketch", reason="没有装 datasketch")
    long = [text for text in real_texts["news"] if len(text) > 150][:120]
    edited = [text[:60] + "改" + text[61:] for text in long[:40]]
    source = write_jsonl(tmp_path / "a.jsonl", long + edited)

    def documents(*switch):
        call(prepare_corpus, "--corpus", source, "--output_dir", tmp_path / "out", *switch)
        return json.loads((tmp_path / "out/report.json").read_text("utf-8"))["sources"]["a"]

    assert documents()["documents"] == 160
    count = documents("--near_dedup")
    assert 34 <= count["near_duplicates"] <= 42 and count["documents"] + count["near_duplicates"] == 160


def build_in_process(source, folder, monkeypatch):
    """小块、小分片地做一次；返回做过的块号。"""
    cleaned, clean = [], prepare_corpus.Cleaner.clean
    monkeypatch.setattr(prepare_corpus, "CHUNK_BYTES", 40_000)
    monkeypatch.setattr(prepare_corpus, "SHARD_CHUNKS", 3)
    monkeypatch.setattr(prepare_corpus.Cleaner, "clean",
                        lambda self, text: cleaned.append(text) or clean(self, text))
    folder.mkdir(exist_ok=True)
    prepare_corpus.build([("a", [source])], OPTIONS, folder, 1)
    monkeypatch.undo()
    return len(cleaned)


@pytest.mark.parametrize("damage", ["none", "part", "part_note", "shard", "mask"])
def test_interrupted_build_reuses_only_intact_chunks(tmp_path, real_texts, monkeypatch, damage):
    """写分片时被杀：做完的块和分片沿用，坏了的那一块重做；结果与一口气做完的一样。"""
    source = write_jsonl(tmp_path / "a.jsonl", real_texts["news"][:1500])
    total = build_in_process(source, tmp_path / "whole", monkeypatch)
    shards, write_shard = [], prepare_corpus.write_shard

    def killed(number, *args):
        if number == 2:
            raise KeyboardInterrupt
        return write_shard(number, *args)

    monkeypatch.setattr(prepare_corpus, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        build_in_process(source, tmp_path / "again", monkeypatch)
    again, rows = tmp_path / "again", {}
    for path in again.glob("part-*.json"):
        rows[path.stem] = json.loads(path.read_text("utf-8"))["counts"]["a"]["rows"]
    victims = {"part": "part-00001.parquet", "part_note": "part-00001.json", "shard": "train-00001.parquet",
               "mask": "part-00001.npy"}
    if damage in victims:
        victim = again / victims[damage]
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    monkeypatch.setattr(prepare_corpus, "write_shard", lambda number, *args: (
        shards.append((number, (again / f"shard-{number:05d}.json").exists())) or write_shard(number, *args)))
    cleaned = build_in_process(source, again, monkeypatch)
    assert cleaned == (rows["part-00001"] if damage.startswith("part") else 0) < total
    assert [number for number, done in shards if done] == [0, 1]
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert {path.name: path.read_bytes() for path in again.iterdir()} == whole


def test_killed_run_leaves_no_orphans_and_goes_on(tmp_path, real_texts):
    """SIGKILL 主进程：工作进程跟着退出；再跑一次，结果完整，没有半成品。"""
    texts = [f"{i} {text}" for i in range(200) for text in real_texts["news"][:1000]]
    source = write_jsonl(tmp_path / "big.jsonl", texts)
    command = [sys.executable, str(ROOT / "prepare_corpus.py"), "--corpus", str(source), "--output_dir",
               str(tmp_path / "out"), "--processes", "2", "--skip_cleaning", "all"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (children := psutil.Process(process.pid).children(recursive=True)) or not list(
            tmp_path.glob(".out.tmp/part-*.json")):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    psutil.wait_procs(children, timeout=20)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert list(tmp_path.glob(".out.tmp/part-*.json"))
    call(prepare_corpus, *command[2:])
    rows = pq.read_table(sorted((tmp_path / "out").glob("*.parquet"))).num_rows
    assert rows == len(set(texts)) and not (tmp_path / ".out.tmp").exists()
    assert all(re.fullmatch(r"(train|eval)-\d+\.parquet|report\.json|README\.md", path.name)
               for path in (tmp_path / "out").iterdir())


def test_corpus_loads_as_a_dataset(tmp_path, real_texts):
    """corpus/ 就是一个数据集：load_dataset 读得出两个切分，篇数与报告一致；数据卡写明来源和去掉了什么。"""
    datasets = pytest.importorskip("datasets")
    source = write_jsonl(tmp_path / "a.jsonl", [*real_texts["news"][:300], "<b>加粗</b>的文档", "短"])
    call(prepare_corpus, "--corpus", f"我的={source}", "--output_dir", tmp_path / "out")
    count = json.loads((tmp_path / "out/report.json").read_text("utf-8"))["sources"]["我的"]
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(rows) for name, rows in loaded.items()} == {
        "train": count["train_documents"], "validation": count["eval_documents"]}
    assert loaded["train"].column_names == ["text", "source"]
    card = (tmp_path / "out/README.md").read_text("utf-8")
    assert "| 我的 | 302 |" in card and "HTML 标签和实体：2" in card
    assert f"太短的文档：{count['short']}" in card and count["short"] > 0


def test_report_shows_examples(tmp_path, capsys):
    """每一步打印数量和至多五个例子，报告里也有。"""
    texts = [f"第 {i} 篇有<b>标签</b>和正文" for i in range(9)] + ["短"] * 3 + ["第 1 篇有标签和正文"] * 2
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    call(prepare_corpus, "--corpus", source, "--output_dir", tmp_path / "out")
    out = capsys.readouterr().out
    assert "去掉HTML 标签和实体：18 处" in out and "去掉太短的文档：3 篇" in out and "去掉重复的文档：2 篇" in out
    assert 1 <= out.count("【<b>】") <= 5
    report = json.loads((tmp_path / "out/report.json").read_text("utf-8"))
    assert len(report["examples"]["html"]) == 5 and report["examples"]["duplicates"] == ["第 1 篇有标签和正文"] * 2


@pytest.mark.parametrize(("documents", "expected"), [(0, 0), (1, 0), (2, 1), (99, 49), (100, 50), (9000, 50),
                                                     (400_000, 2001), (3_000_000, 10_000)])
def test_eval_limit_counts(documents, expected):
    """验证集约 0.5 %，最少 50 篇（不超过一半），最多 10,000 篇。用均匀的哈希代表文档。"""
    step = 2**64 // max(1, documents)
    hashes = [i * step + 1 for i in range(min(documents, prepare_corpus.EVAL_MAXIMUM))]
    smallest = np.array(hashes, dtype=np.uint64)
    limit = prepare_corpus.eval_limit(documents, smallest)
    assert int((smallest <= np.uint64(limit)).sum()) == expected
