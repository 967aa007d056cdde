"""prepare_corpus.py：读得对（格式、压缩、编码、列），洗得对，分得对，写得对。"""

import csv
import gzip
import io
import json
import lzma
import random
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import call, error_of, write_jsonl

import prepare_corpus

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
    return [text for _, text in prepare_corpus.read_source("x", [path], text_column)]


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


def test_clean():
    counts = Counter()
    assert prepare_corpus.clean("\u3000 正文▁里▁有\r\n换行 \n", counts) == "正文 里 有\n换行"
    assert prepare_corpus.clean("坏\ud83d字\udc00", counts) == "坏\ufffd字\ufffd"
    assert prepare_corpus.clean("本来就有 \ufffd 和 😀", counts) == "本来就有 \ufffd 和 😀"
    assert counts == {"replaced_u2581": 2, "replaced_surrogates": 2}


# ==== 去重与切分 ====

def split(documents):
    """[(source, text)] -> ({"train": {text}, "eval": {text}}, counts)；顺便查每一边没有重复。"""
    counts, sides = {}, {"train": [], "eval": []}
    for side, _, text, _ in prepare_corpus.split_documents(documents, counts):
        sides[side].append(text)
    assert all(len(set(texts)) == len(texts) for texts in sides.values())
    return {side: set(texts) for side, texts in sides.items()}, counts


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
    ("n", "expected"), [(1, 0), (2, 1), (3, 1), (60, 30), (100, 50), (101, 50), (3000, 50)]
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
    texts = [f"第 {i} 篇" for i in range(200)] + ["第 7 篇", " 第 8 篇 ", "", "  ", "有▁记号▁的", "坏\ud800字"]
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
    assert sorted(texts) == sorted({f"第 {i} 篇" for i in range(200)} | {"有 记号 的", "坏\ufffd字"})


def test_many_shards_keep_every_document(tmp_path, monkeypatch):
    """分片写：内容、次序都不变。"""
    monkeypatch.setattr(prepare_corpus, "SHARD_BYTES", 1000)
    writer = prepare_corpus.ShardWriter(tmp_path, "train")
    for i in range(100):
        writer.add(f"文档 {i}", "甲")
        if i % 10 == 9:
            writer.row_bytes = 1000
            writer.flush()
    writer.close()
    paths = sorted(tmp_path.glob("train-*.parquet"))
    assert len(paths) > 1
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    assert rows == [{"text": f"文档 {i}", "source": "甲"} for i in range(100)]


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
