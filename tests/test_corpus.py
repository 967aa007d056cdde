"""prepare_corpus.py：读得对（格式、压缩、编码、列），洗得对，分得对，写得对；用户的错只有一行话。"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import time

import filelock
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, call, error_of, run_script, write_jsonl

import prepare_corpus

TEXTS = [
    "今天天气不错，我们去公园。",
    "第二篇：含“引号”、逗号,和\n换行",
    "Third: mixed 英文 😀 龘",
    "最后一篇。",
]


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
    if path.suffix == ".zst":
        data = pa.compress(data, codec="zstd", asbytes=True)
    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    path.write_bytes(packers.get(path.suffix.lower(), bytes)(data))
    return path


def read_texts(path, columns=None):
    """一个文件里的各篇，不清洗。"""
    shapes = [columns] if columns else prepare_corpus.SHAPES
    return [text for text, _ in prepare_corpus.read_file(path, shapes) if text is not None]


def corpus_of(folder, split="*"):
    return [
        row for path in sorted(folder.glob(f"{split}-*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def report_of(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


# ==== 格式、压缩、编码 ====


@pytest.mark.parametrize("packed", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json-array", "json-lines", "csv", "txt"])
def test_formats(tmp_path, kind, packed):
    path = write_packed(tmp_path / f"a.{kind.split('-')[0]}{packed}", encode_rows(kind, TEXTS))
    assert read_texts(path) == (["\n".join(TEXTS)] if kind == "txt" else TEXTS)


def test_parquet_and_one_json_object(tmp_path):
    assert read_texts(write_packed(tmp_path / "a.parquet", encode_rows("parquet", TEXTS))) == TEXTS
    path = write_packed(tmp_path / "a.json", '{\n "text": "只有一个对象"\n}\n'.encode())
    assert read_texts(path) == ["只有一个对象"]


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "gb18030"]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_encodings(tmp_path, real_texts, kind, encoding, newline):
    """同一份真实文本，各种编码读出来一样；\\r\\n 和 \\r 都读成 \\n。"""
    texts = real_texts["news"][:30] + ["龘靐，𠮷😀"]
    data = encode_rows(kind, texts).decode().replace("\n", newline)
    suffix = ".xz" if encoding == "gb18030" else ""  # 编码和压缩也要能叠在一起
    path = write_packed(tmp_path / f"a.{kind}{suffix}", data.encode(encoding))
    assert read_texts(path) == (
        ["\n".join(texts)] if kind == "txt" and sum(map(len, texts)) < 3900 else texts
    ) or "".join(read_texts(path)) == "\n".join(texts)


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
@pytest.mark.parametrize("shift", range(4))
def test_encoding_of_large_files(tmp_path, encoding, shift):
    """判断编码只看 1 MiB：切口落在一个字的任何位置都不能认错。"""
    text = "a" * shift + "今天的天气很不错，我们去公园。𠮷" * 40_000
    assert "".join(read_texts(write_packed(tmp_path / "a.txt", text.encode(encoding)))) == text


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("size", [12, 200, 1000, 8000])
def test_encoding_of_real_pieces(real_texts, encoding, size):
    """真实文本里随便截一段，对话、全角、短的也在内：编码都认得对。"""
    text = (
        "\n".join(real_texts["news"][:1500])
        + "“走。”\n“你呢？”\n“我不走。”\n" * 300
        + "㊣★☆本书由某网整理☆★\n" * 9
    )
    for start in range(0, len(text) - size, len(text) // 60):
        piece = text[start : start + size]
        if piece.isascii():
            continue
        data = piece.encode(encoding)
        assert data.decode(prepare_corpus.find_encoding(data)).lstrip("\ufeff") == piece, piece[:60]


def test_sources(tmp_path, monkeypatch):
    """没写名字的以文件夹为名，同一个文件夹里的合成一个来源；名字里的怪字符换掉。"""
    for name in ("书/a.jsonl", "书/b.txt.gz", "书/sub/c.csv.xz", "书/README.md", "d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path / "书")

    def names(*specs):
        return {
            name: [file.name for file in files]
            for name, files in prepare_corpus.find_sources(map(str, specs)).items()
        }

    assert names("a.jsonl", "b.txt.gz", "sub/c.csv.xz") == {
        "书": ["a.jsonl", "b.txt.gz"],
        "sub": ["c.csv.xz"],
    }
    assert names(f"我 的={tmp_path / 'd.jsonl'}", "我 的=a.jsonl", "*.gz") == {
        "我_的": ["d.jsonl", "a.jsonl"],
        "书": ["b.txt.gz"],
    }
    assert names(".") == {"书": ["a.jsonl", "b.txt.gz", "c.csv.xz"]}
    assert names("wiki", "demo") == {"wiki": [], "demo": []}


@pytest.mark.parametrize("newline", ["\n", ""])
def test_long_txt_is_cut(tmp_path, real_texts, newline):
    """切成约 4,000 字的篇，有行就在行尾切；拼回去一字不差。"""
    novel = newline.join(real_texts["news"][:1500])
    pieces = read_texts(write_packed(tmp_path / "novel.txt", novel.encode()))
    assert "".join(pieces) == novel and len(pieces) > 10
    assert all(4000 <= len(piece) <= 8000 and piece.endswith(newline) for piece in pieces[:-1])


# ==== 人们手里的文件：每一种一个测试 ====


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(*rows, indent=None):
    return json.dumps(rows, ensure_ascii=False, indent=indent).encode()


def parquet_of(table):
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def prepare(folder, files, *options):
    """写下 files，整理整个文件夹；返回 (清洗后的各篇，不管次序；report)。"""
    for name, data in files.items():
        path = folder / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_packed(path, data)
    call(prepare_corpus, "--corpus", f"书={folder / 'data'}", "--output_dir", folder / "out", *options)
    return sorted(row["text"] for row in corpus_of(folder / "out")), report_of(folder / "out")


POEM = {
    "title": "靜夜思",
    "author": "李白",
    "paragraphs": ["牀前明月光，疑是地上霜。", "舉頭望明月，低頭思故鄉。"],
}
CI = {"rhythmic": "如梦令", "author": "李清照", "paragraphs": ["昨夜雨疏风骤，", "浓睡不消残酒。"]}
GOOD = [f"这是第 {i} 篇好好的文章" for i in range(400)]
WIKI = "".join(
    f'<doc id="{i}" url="https://zh.wikipedia.org/wiki?curid={i}" title="条目{i}">\n条目{i}\n\n这是条目{i}的正文。\n</doc>\n'
    for i in range(5)
)
WIKI_TEXTS = [f"条目{i}\n\n这是条目{i}的正文。" for i in range(5)]
CHINESE = "".join(f"第{i}回 宴桃园豪杰三结义，斩黄巾英雄首立功。\n" for i in range(300))
NOVEL = CHINESE.encode("gb18030")
FAR = pa.array([10**12, 10**12], pa.timestamp("s"))  # 公元 33658 年
READ = {  # 名字: (文件, 应当读到的各篇)
    "poems": (
        {"poet.tang.0.json": array(POEM, CI, indent=2)},
        ["\n".join([POEM["title"], *POEM["paragraphs"]]), "\n".join([CI["rhythmic"], *CI["paragraphs"]])],
    ),
    "list of strings": (
        {"a.jsonl": lines({"text": ["第一行字", "第二行字"]}, {"text": ["另外一篇"]})},
        ["第一行字\n第二行字", "另外一篇"],
    ),
    "conversations": (
        {
            "a.json": array(
                {
                    "conversations": [
                        {"from": "human", "value": "你好吗？"},
                        {"from": "gpt", "value": "我很好。"},
                    ]
                },
                {"conversations": [{"role": "user", "content": "再见了。"}]},
            )
        },
        ["你好吗？\n我很好。", "再见了。"],
    ),
    "messages": (
        {
            "a.jsonl": lines(
                {
                    "messages": [
                        {"role": "user", "content": "问一句话"},
                        {"role": "assistant", "content": "答一句话"},
                    ],
                    "id": 1,
                },
                {"messages": [{"role": "user", "content": "只有问的"}]},
            )
        },
        ["问一句话\n答一句话", "只有问的"],
    ),
    "messages in parquet": (
        {
            "a.parquet": parquet_of(
                pa.Table.from_pylist(
                    [
                        {
                            "messages": [
                                {"role": "user", "content": "问一句话"},
                                {"role": "assistant", "content": "答一句话"},
                            ]
                        }
                    ]
                    + [{"messages": [{"role": "user", "content": "只有问的"}]}]
                )
            )
        },
        ["问一句话\n答一句话", "只有问的"],
    ),
    "instruction": (
        {
            "a.json": array(
                {"instruction": "翻译成中文", "input": "good", "output": "好"},
                {"instruction": "写一句话", "input": "", "output": "春天来了。"},
            )
        },
        ["翻译成中文\ngood\n好", "写一句话\n春天来了。"],
    ),
    "instruction without input": (
        {"a.csv": "instruction,output\n写一句话,春天来了。\n再写一句,秋天来了。\n".encode()},
        ["写一句话\n春天来了。", "再写一句\n秋天来了。"],
    ),
    "news": (
        {
            "a.jsonl": lines(
                {"title": "一条新闻", "content": "新闻的正文", "time": 1},
                {"title": "又一条新闻", "content": "它的正文"},
            )
        },
        ["一条新闻\n新闻的正文", "又一条新闻\n它的正文"],
    ),
    "content": (
        {"a.jsonl": lines({"content": "只有正文的"}, {"content": "还是只有正文"})},
        ["只有正文的", "还是只有正文"],
    ),
    "question": (
        {
            "a.jsonl": lines(
                {"question": "天为什么是蓝的？", "answer": "因为散射。"},
                {"question": "没有人回答的", "answer": None},
            )
        },
        ["天为什么是蓝的？\n因为散射。", "没有人回答的"],
    ),
    "baike": (
        {
            "a.json": lines(
                {"qid": 1, "title": "头疼怎么办", "desc": "疼了三天", "answer": "多休息。"},
                {"title": "咳嗽怎么办", "desc": "", "answer": "多喝水。"},
            )
        },
        ["头疼怎么办\n疼了三天\n多休息。", "咳嗽怎么办\n多喝水。"],
    ),
    "modelscope poems": (
        {"train.csv": "text1\n锦城丝管日纷纷，半入江风半入云。\n此曲只应天上有，人间能得几回闻。\n".encode()},
        ["锦城丝管日纷纷，半入江风半入云。", "此曲只应天上有，人间能得几回闻。"],
    ),
    "text wins": (
        {
            "a.jsonl": lines(
                {"title": "标题", "content": "别的", "text": "就要这一列"},
                {"completion": "第二种形状", "source": "x"},
                {"INSTRUCTION": "问题是？", "RESPONSE": "答案是。"},
            )
        },
        ["就要这一列", "第二种形状", "问题是？\n答案是。"],
    ),
    "json strings": ({"a.json": array("一个字符串", "另一个字符串")}, ["一个字符串", "另一个字符串"]),
    "BOM in the middle": (
        {
            "a.jsonl": b"\xef\xbb\xbf"
            + lines({"text": "第一个文件"})
            + b"\xef\xbb\xbf"
            + lines({"text": "第二个文件"}),
            "b.csv": "\ufefftext,n\n表格的甲行,1\n\ufeff表格的乙行,2\n".encode(),
            "c.txt": "\ufeff上半部小说\n\ufeff下半部小说\n".encode(),
        },
        ["第一个文件", "第二个文件", "表格的甲行", "表格的乙行", "上半部小说\n下半部小说"],
    ),
    "parquet with a far date": (
        {"a.parquet": parquet_of(pa.table({"when": FAR, "text": ["第一篇文章", "第二篇文章"]}))},
        ["第一篇文章", "第二篇文章"],
    ),
    "parquet with an unknown zone": (
        {
            "a.parquet": parquet_of(
                pa.table(
                    {
                        "text": ["第一篇文章", "第二篇文章"],
                        "t": pa.array([1, 2], pa.timestamp("s", "Mars/Base")),
                    }
                )
            )
        },
        ["第一篇文章", "第二篇文章"],
    ),
    "binary parquet": (
        {
            "a.parquet": parquet_of(
                pa.table({"text": pa.array(["第一篇文章".encode(), "第二篇文章".encode()], pa.binary())})
            )
        },
        ["第一篇文章", "第二篇文章"],
    ),
    "any case": (
        {
            "A.TXT": "大写的后缀名".encode(),
            "B.JSONL": lines({"text": "又一个大写的"}),
            "C.Csv.GZ": "text\n还压缩过的\n".encode(),
        },
        ["大写的后缀名", "又一个大写的", "还压缩过的"],
    ),
    "WikiExtractor": ({"AA/wiki_00": WIKI.encode(), "AB/README": b"# not a corpus"}, WIKI_TEXTS),
    "WikiExtractor, packed": (
        {"AA/wiki_00.bz2": WIKI.encode(), "AA/wiki_01.txt.xz": WIKI.replace("条目", "又一条").encode()},
        WIKI_TEXTS + [text.replace("条目", "又一条") for text in WIKI_TEXTS],
    ),
    "tsv": (
        {
            "a.tsv": 'id\ttext\n1\t有,逗号的文字\n2\t"有\n换行的文字"\n'.encode(),
            "b.TSV.zst": "text\tid\n又一个表格\t3\n".encode(),
        },
        ["有,逗号的文字", "有\n换行的文字", "又一个表格"],
    ),
    "json lines named json": (
        {"a.json": lines({"text": "第一行的文字"}, {"text": "第二行的文字"})},
        ["第一行的文字", "第二行的文字"],
    ),
    "array named jsonl": (
        {"a.jsonl": array({"text": "第一行的文字"}, {"text": "第二行的文字"}, indent=1)},
        ["第一行的文字", "第二行的文字"],
    ),
    "null": (
        {"a.jsonl": lines({"text": None}, {"text": ""}, {"text": "第一篇文章"}, {"text": "第二篇文章"})},
        ["第一篇文章", "第二篇文章"],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_read(tmp_path, name):
    files, expected = READ[name]
    texts, report = prepare(tmp_path, files)
    assert texts == sorted(expected)
    assert report["sources"]["书"]["unreadable"] == report["sources"]["书"]["left_out"] == 0
    empty = 2 if name == "null" else 0
    assert report["sources"]["书"]["empty"] == empty


@pytest.mark.parametrize("packed", ["", ".zst"])
def test_csv_with_backslashes(tmp_path, packed):
    """MySQL 写的 csv，引号里的引号前面是反斜杠；别的 csv 里的反斜杠照原样。"""
    mysql = b'id,text\n1,"he said \\"hello, you\\" twice"\n2,"and \\"left"\n'
    texts, _ = prepare(tmp_path, {f"a.csv{packed}": mysql, "b.csv": b'text\nC:\\new and ""quotes""\n'})
    assert texts == ['C:\\new and ""quotes""', 'and "left', 'he said "hello, you" twice']


@pytest.mark.parametrize("packed", ["", ".xz"])
@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (b'{"text": NaN}\n', "nan"),
        (b'{"text": 12345}\n', "12345"),
        (b'{"text": {"a": {"b": 1}}}\n', "'a'"),
        (b'{"text": [["x"], 1]}\n', "[['x'], 1]"),
        (b'{"other": "x"}\n', "['other']"),
        (b'{"text": "cut\n', "不是 JSON"),
        (b"[" * 100_000 + b"\n", "不是 JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", "不是 JSON"),
    ],
)
def test_an_odd_row_is_skipped_and_counted(tmp_path, capsys, bad, why, packed):
    """许多行里有一行读不懂：跳过，数一数，说在哪里；一个文件里多于 3 行且多于 1 % 就停下。"""
    good = lines(*({"text": text} for text in GOOD))
    data = good + bad + lines({"text": "后面的一篇文章"}) + bad * 2
    texts, report = prepare(tmp_path, {f"a.jsonl{packed}": data})
    count = report["sources"]["书"]
    assert texts == sorted([*GOOD, "后面的一篇文章"]) and (count["rows"], count["unreadable"]) == (401, 3)
    places = report["examples"]["unreadable"]
    assert len(places) == 3 and f"a.jsonl{packed} 第 401 行：" in places[0] and why in places[0]
    assert "读不懂的行：3 处" in capsys.readouterr().out
    path = write_packed(tmp_path / f"bad.jsonl{packed}", good + bad * 5)
    message = error_of(prepare_corpus, "--corpus", path, "--output_dir", tmp_path / "out")
    assert f"bad.jsonl{packed}" in message and "第 401 行" in message and "5 行读不懂" in message
    many = write_packed(tmp_path / f"many.jsonl{packed}", good * 2 + bad * 8)  # 808 行里的 8 行，不到 1 %
    call(prepare_corpus, "--corpus", f"书={many}", "--output_dir", tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert report["sources"]["书"]["unreadable"] == 8 and len(report["examples"]["unreadable"]) == 5


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_bad_bytes_go_and_are_counted(tmp_path, capsys, encoding, name):
    body = "".join(GOOD) if ".txt" in name else lines(*({"text": text} for text in GOOD)).decode()
    data = body.encode(encoding)
    half = len(body[:1000].encode(encoding))
    other = {"other.txt": "另外一部好好的小说".encode()}
    texts, report = prepare(tmp_path, {name: data[:half] + b"\xff\xff" + data[half:]} | other)
    assert "".join(sorted(texts)).count("篇好好的文章") == 400 and report["sources"]["书"]["bad_bytes"] == 2
    assert f"{name} 第 " in report["examples"]["bad_bytes"][0]
    assert "解不开的字节：2 处" in capsys.readouterr().out
    path = write_packed(tmp_path / name, data[:half] + b"\xff" * (len(data) // 300) + data[half:])
    message = error_of(prepare_corpus, "--corpus", path, "--output_dir", tmp_path / "out")
    assert name in message and "字节解不开" in message


@pytest.mark.parametrize("pattern", ["", "*.json", "po*", "**"])
def test_files_of_another_kind_are_left_out(tmp_path, capsys, pattern):
    authors = array({"name": "李白", "desc": "字太白"}, {"name": "杜甫", "desc": "字子美"}, indent=1)
    for name, data in {"poet.0.json": array(POEM, CI), "poet.authors.json": authors}.items():
        (tmp_path / name).write_bytes(data)
    call(prepare_corpus, "--corpus", f"诗={tmp_path / pattern}", "--output_dir", tmp_path / "run/out")
    report = report_of(tmp_path / "run/out")
    assert report["sources"]["诗"]["documents"] == 2 and report["sources"]["诗"]["left_out"] == 1
    assert "poet.authors.json" in report["examples"]["left_out"][0]
    out = capsys.readouterr().out
    assert "没有读的文件：1 处" in out and "poet.authors.json" in out
    message = error_of(
        prepare_corpus, "--corpus", tmp_path / "poet.authors.json", "--output_dir", tmp_path / "run/out"
    )
    assert "poet.authors.json" in message and "['name', 'desc']" in message


def test_parquet_of_another_kind_is_left_out(tmp_path):
    other = parquet_of(pa.table({"name": ["李白"], "when": FAR[:1]}))
    texts, report = prepare(
        tmp_path, {"a.jsonl": lines({"text": "第一篇文章"}, {"text": "第二篇文章"}), "b.parquet": other}
    )
    assert len(texts) == 2 and "['name', 'when']" in report["examples"]["left_out"][0]


def test_text_columns(tmp_path):
    """--text_column 可以写几个，接成几行；写明了就不再猜。"""
    rows = lines(
        {"text": "不要", "标题": "甲的标题", "正文": "甲的正文"},
        {"text": "不要", "标题": "乙的标题", "正文": ["乙一", "乙二"]},
    )
    texts, _ = prepare(tmp_path, {"a.jsonl": rows}, "--text_column", "标题", "正文")
    assert texts == ["乙的标题\n乙一\n乙二", "甲的标题\n甲的正文"]
    arguments = ("--corpus", tmp_path / "data", "--output_dir", tmp_path / "out", "--text_column")
    message = error_of(prepare_corpus, *arguments, "题目", "正文")
    assert "没有文本列 题目 正文" in message and "['text', '标题', '正文']" in message


def test_simplify(tmp_path, monkeypatch, capsys):
    """繁体先转成简体，再去重；换了这个选项，语料要重做；没有装 opencc，一行话说清。"""
    pytest.importorskip("opencc")
    simple = {"title": "静夜思", "paragraphs": ["床前明月光，疑是地上霜。", "举头望明月，低头思故乡。"]}
    files = {"a.json": array(POEM, simple, CI)}
    texts, report = prepare(tmp_path, files, "--simplify")
    assert len(texts) == 2 and report["sources"]["书"]["duplicates"] == 1
    assert "静夜思\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。" in texts
    assert "书 的第一篇，读成这样：'静夜思\\n床前" in capsys.readouterr().out
    prepare(tmp_path, files, "--simplify")
    assert "沿用" not in capsys.readouterr().out  # 文件重写过
    arguments = ("--corpus", f"书={tmp_path / 'data'}", "--output_dir", tmp_path / "out")
    call(prepare_corpus, *arguments, "--simplify")
    assert "沿用" in capsys.readouterr().out
    call(prepare_corpus, *arguments)
    assert "沿用" not in capsys.readouterr().out
    assert report_of(tmp_path / "out")["sources"]["书"]["documents"] == 3
    monkeypatch.setitem(sys.modules, "opencc", None)
    assert "pip install opencc" in error_of(prepare_corpus, *arguments, "--simplify")


def test_poems(tmp_path):
    """--poems：有校注、缺字、数字、字母的诗整篇不要，各记一笔；不写它就都要。"""
    good = [
        "春曉\n春眠不覺曉，處處聞啼鳥。",
        "相思·其一\n红豆生南国，春来发几枝？\n“愿君多采撷”，此物最相思！",
    ]
    bad = [
        f"无题\n春眠不觉晓，{odd}。"
        for odd in (
            "处处闻□鸟",
            "处处（一作时时）闻啼鸟",
            "〖注〗啼鸟",
            "处处闻啼鸟2",
            "处处闻niao",
            "[啼]鸟",
            "{上/下}鸟",
            "《啼鸟》",
        )
    ]
    files = {"a.jsonl": lines(*({"text": text} for text in good + bad))}
    texts, report = prepare(tmp_path, files, "--poems")
    assert texts == sorted(good) and report["sources"]["书"]["not_a_poem"] == len(bad)
    assert len(prepare(tmp_path, files)[0]) == len(good + bad)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows 的权限是另一回事")
def test_closed_places(tmp_path, monkeypatch, capsys):
    """没有权限进的文件夹、打不开的文件：一行话，没有 traceback。管理员什么都打得开，所以另有一个模拟的。"""
    closed = tmp_path / "closed"
    closed.mkdir()
    good = write_jsonl(tmp_path / "a.jsonl", ["第一篇文章", "第二篇文章"])
    real_open = open
    real_stat = os.stat

    def refused(path, *args, **settings):
        if str(closed) in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, *args, **settings)

    write_jsonl(closed / "b.jsonl", ["第三篇文章"])
    monkeypatch.setattr("builtins.open", refused)
    message = error_of(prepare_corpus, "--corpus", closed / "b.jsonl", "--output_dir", tmp_path / "out")
    assert "b.jsonl" in message and "Permission denied" in message

    def no_look(path, *args, **settings):
        if str(closed) in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real_stat(path, *args, **settings)

    monkeypatch.setattr(os, "stat", no_look)
    message = error_of(prepare_corpus, "--corpus", closed, "--output_dir", tmp_path / "out")
    assert "打不开" in message
    monkeypatch.setattr(sys, "argv", ["x", "--corpus", str(good), "--output_dir", str(closed / "out")])
    with pytest.raises(SystemExit) as stop:
        prepare_corpus.run(prepare_corpus.main)
    assert "检查权限" in stop.value.code and "\n" not in stop.value.code


# ==== 清洗 ====

FAMILY = "👨\u200d👩\u200d👧"
CLEANED = [  # (步骤, 原文, 清洗后)
    ("html", "第一段<br/>第二段<p>第三段</p>完", "第一段\n第二段第三段\n完"),
    ("html", '看<a href="http://x.cn?a=1&b=2" class="y">这里</a>和<img src="a.png">图', "看这里和图"),
    ("html", "<script type='a'>var a = 1 < 2;</script>正文<!-- 注释 -->还在", "正文还在"),
    ("html", "A&amp;B &lt;标签&gt; &#20013;&#x56FD;&nbsp;空格", "A&B <标签> 中国 空格"),
    ("html", "如果 a<b 且 c>d，AT&T 和 x&y; 都不动", "如果 a<b 且 c>d，AT&T 和 x&y; 都不动"),
    ("invisible", "零\u200b宽\ufeff空\u2060格\xad和\x00控\x07制\x1b符", "零宽空格和控制符"),
    ("invisible", "制表\t留着，回车\r换行，分段\u2029也是", "制表\t留着，回车\n换行，分段\n也是"),
    ("invisible", f"一家{FAMILY}不拆，字\u200d间的去掉", f"一家{FAMILY}不拆，字间的去掉"),
    ("boilerplate", "这是正文。\n编辑于 2019-03-02 12:30\n发布于 2018年5月1日", "这是正文。"),
    ("boilerplate", "这是正文。编辑于 2019-03-02・著作权归作者所有", "这是正文。"),
    (
        "boilerplate",
        "链接：https://www.zhihu.com/question/1/answer/2\n来源：知乎\n"
        "著作权归作者所有。商业转载请联系作者获得授权，非商业转载请注明出处。\n正文在这里",
        "正文在这里",
    ),
    (
        "boilerplate",
        "著作权归作者所有。商业转载请联系作者获得授权。后面还有正文。",
        "著作权归作者所有。商业转载请联系作者获得授权。后面还有正文。",
    ),
    (
        "boilerplate",
        "该软件发布于 2019-03-02\n编辑于是走了，著作权归公司所有，来源：知乎日报",
        "该软件发布于 2019-03-02\n编辑于是走了，著作权归公司所有，来源：知乎日报",
    ),
    ("blank_lines", "一\n\n\n二\n \n\t\n\u3000\n三\n\n四\n  五", "一\n\n二\n\n三\n\n四\n  五"),
    ("short", "好评。", ""),
    ("short", "好评！！", "好评！！"),
    ("not_text", "————====★★★★ 12345 67890 一", ""),
    ("not_text", "😀😀😀😀", ""),
    ("not_text", "2024 年 GDP 增长 5.2%。", "2024 年 GDP 增长 5.2%。"),
]


@pytest.mark.parametrize(("step", "raw", "expected"), CLEANED)
def test_each_step(step, raw, expected):
    """改了就计数，并留下例子；没改就都没有。"""
    text, changes = prepare_corpus.clean(raw)
    assert text == expected
    assert (step in [name for name, times, example in changes if times]) == (raw != expected)


@pytest.mark.parametrize(
    "rubbish",
    [
        "<script " * 100_000,
        "<!--" * 200_000,
        "&" * 10**6,
        "\n" * 10**6,
        "<a " + "x" * 1_000_000,
        "<" * 1_000_000,
        " \n" * 500_000 + "完结了吧",
    ],
)
def test_rubbish_does_not_hang(rubbish):
    """正则遇到恶意的输入也不能变成平方时间：一百万字的垃圾，应在几秒内过去（超时由 CI 的总时限管）。"""
    prepare_corpus.clean(rubbish)


# ==== 去重、切分、写出 ====


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        (0, 0),
        (1, 0),
        (2, 1),
        (3, 1),
        (39, 1),
        (100, 5),
        (999, 49),
        (1000, 50),
        (9000, 50),
        (400_000, 2001),
        (3_000_000, 10_000),
    ],
)
def test_held_out_counts(documents, expected):
    """约 0.5 %，最少 50 篇，不超过 5 %，最多 10,000 篇。用均匀的哈希代表文档。"""
    step = 2**64 // max(1, documents)
    smallest = np.array([i * step + 1 for i in range(min(documents, prepare_corpus.EVAL_MAXIMUM))], np.uint64)
    assert int((smallest <= prepare_corpus.held_out_limit(documents, smallest)).sum()) == expected


def build(tmp_path, texts, name="out"):
    call(
        prepare_corpus,
        "--corpus",
        f"甲={write_jsonl(tmp_path / f'{name}.jsonl', texts)}",
        "--output_dir",
        tmp_path / name,
    )
    return {split: {row["text"] for row in corpus_of(tmp_path / name, split)} for split in ("train", "eval")}


def test_split_depends_on_content_only(tmp_path):
    """换次序，同一篇仍在同一边；两边没有相同的。"""
    texts = [f"这是第 {i} 篇文档" for i in range(2000)]
    first = build(tmp_path, texts)
    again = build(tmp_path, texts[::-1] + texts[:9], "again")
    assert first == again and len(first["eval"]) == 50 and not first["train"] & first["eval"]


def test_report_adds_up(tmp_path, capsys):
    """计数、例子、数据卡；跨来源的重复只留前面的；坏字符和 ▁ 修好。"""
    texts = [f"第 {i} 篇文章" for i in range(200)] + [
        "第 7 篇文章",
        " 第 8 篇文章 ",
        "",
        "  ",
        None,
        "短",
        "有▁记号▁的",
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [*texts, *["有<b>标签</b>的"] * 7])
    path.write_text(path.read_text(encoding="utf-8") + '{"text": "坏\\ud800字了啊"}\n', encoding="utf-8")
    other = write_jsonl(tmp_path / "b.jsonl", ["第 3 篇文章", "第 3 篇文章的续篇", "另外一篇文章"])
    call(prepare_corpus, "--corpus", f"甲={path}", f"乙={other}", "--output_dir", tmp_path / "out")
    report = report_of(tmp_path / "out")
    count = report["sources"]["甲"]
    assert (count["rows"], count["empty"], count["short"], count["duplicates"]) == (215, 3, 1, 8)
    assert (count["unreadable"], count["left_out"], count["bad_bytes"]) == (0, 0, 1)
    assert (count["replaced_u2581"], count["html"]) == (2, 14)
    assert count["documents"] == 203 == count["train_documents"] + count["eval_documents"]
    assert count["eval_documents"] == 10 and report["sources"]["乙"]["duplicates"] == 1
    rows = corpus_of(tmp_path / "out")
    assert sum(len(row["text"]) for row in rows if row["source"] == "甲") == count["characters"]
    assert {"有 记号 的", "坏字了啊", "有标签的"} < {row["text"] for row in rows}
    assert report["examples"]["html"] == ["有<b>标签</b>的"] * 5
    out = capsys.readouterr().out
    assert "HTML 标签和实体：14 处，例如 '有<b>标签</b>的'\n" in out
    assert "\n第 1 步，共 4 步：整理语料\n" in out and "甲 的第一篇，读成这样：'第 0 篇文章'\n" in out
    assert out.count("例如") == 5  # 每种改动至多一个例子


def test_shuffled_and_always_the_same(tmp_path, real_texts):
    """训练文档打乱一次；再做一遍，结果一样。"""
    source = write_jsonl(tmp_path / "a.jsonl", real_texts["news"][:3000])
    call(prepare_corpus, "--corpus", source, "--output_dir", tmp_path / "one")
    call(prepare_corpus, "--corpus", source, "--output_dir", tmp_path / "again")
    one = report_of(tmp_path / "one")
    again = report_of(tmp_path / "again")
    assert one["corpus_hash"] == again["corpus_hash"] and one["sources"] == again["sources"]
    rows = corpus_of(tmp_path / "one", "train")
    assert rows == corpus_of(tmp_path / "again", "train")
    order = [real_texts["news"].index(row["text"]) for row in rows[:50]]
    assert order != sorted(order)
    assert not list(tmp_path.glob(".*.tmp")) and not list(tmp_path.rglob("*.arrow"))


def test_demo_is_the_same_as_ever(tmp_path):
    """演示语料的篇数和验证集大小；README 和参考曲线都按它。"""
    call(prepare_corpus, "--corpus", "demo", "--output_dir", tmp_path / "out")
    counts = report_of(tmp_path / "out")["sources"]
    assert {
        name: (count["rows"], count["train_documents"], count["eval_documents"])
        for name, count in counts.items()
    } == {"news": (19_485, 18_260, 85), "reviews": (35_126, 17_258, 88)}
    assert report_of(tmp_path / "out")["corpus_hash"] == "3c6e8af1cfba0575def3f06da048307e"


def test_reuse_rebuild_and_refusal(tmp_path, capsys):
    source = write_jsonl(tmp_path / "a.jsonl", [f"第 {i} 篇文章" for i in range(100)])
    out = tmp_path / "out"
    arguments = ("--corpus", source, "--output_dir", out)
    call(prepare_corpus, *arguments)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    call(prepare_corpus, *arguments, "--no-rebuild")
    assert "沿用" in capsys.readouterr().out and before == {
        path: path.stat().st_mtime_ns for path in out.iterdir()
    }
    write_jsonl(source, [f"第 {i} 篇文章" for i in range(101)])
    message = error_of(prepare_corpus, *arguments, "--no-rebuild")
    assert "设置变了" in message and "--work_dir" in message and "--fresh" in message
    broken = write_packed(tmp_path / "broken.jsonl", b'{"text": \n')
    error_of(prepare_corpus, "--corpus", broken, "--output_dir", out)  # 重做到一半出错，旧的还在
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    call(prepare_corpus, *arguments)
    assert report_of(out)["sources"][tmp_path.name.replace("[", "_")]["documents"] == 101
    next(out.glob("train-*")).write_bytes(b"")
    call(prepare_corpus, *arguments)
    assert "沿用" not in capsys.readouterr().out and len(corpus_of(out)) == 101


# ==== 用户的错 ====

LINES = encode_rows("jsonl", [f"这是第 {i} 篇文档，内容不同。" for i in range(300)])
UTF8 = "好的中文".encode() * 50
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BIG5 = "這是繁體中文的小說，編碼是老式的，讀不了。".encode("big5") * 9
CUT = json.dumps([{"text": text} for text in TEXTS * 50], ensure_ascii=False, indent=1).encode()
BAD = {  # 文件名: (内容, 那一行错误里应当有的话)
    "empty.jsonl": (b"", "一行也没有读懂"),
    "empty.csv": (b"", "一行也没有读懂"),
    "blank.jsonl": (b'{"text": "  "}\n{"text": null}\n', "2 行"),
    "one.jsonl": ('{"text": "全都一样"}\n'.encode() * 9, "只剩 1 篇"),
    "short.jsonl": ('{"text": "短"}\n'.encode() * 9, "读了 9 行"),
    "column.jsonl": (
        lines({"标题": "一", "正文": "二"}),
        "第 1 行：没有文本列 text；有的是 ['标题', '正文']",
    ),
    "number.jsonl": (b'{"text": 12345}\n', "第 1 行：不是文字：12345"),
    "lists.json": (b'[["a"], ["b"]]', "第 1 行：['a']"),
    "42.json": (b"42", "42"),
    "object.json": (b'{\n "a": {"b": []}\n}', "['a']"),
    "half.json": ('[{"text": "一"}, {"text": "二'.encode(), "第 1 行不是 JSON"),
    "end.json": (b'[{"text": "a"}, ', "JSON"),
    "far.json": (CUT[:-40], "第 597 行不是 JSON"),
    "far.json.gz": (gzip.compress(CUT[:-40]), "第 597 行不是 JSON"),
    "csv.csv": ("甲,乙\n1,2\n".encode(), "['甲', '乙']"),
    "quote.csv": (
        'id,text\n1,"好的"\n2,"没有关的\n3,下一行\n4,再下一行\n'.encode(),
        "第 3 行有一个引号开了没有关",
    ),
    "quote.tsv": ('id\ttext\n1\t"两\n行"\n2\t"没有关的\n3\t下一行\n'.encode(), "第 4 行有一个引号开了没有关"),
    "large.csv": ('text,id\n好的,1\n"没有关的'.encode() + "很长的一行\n".encode() * 4_000_000, "large.csv"),
    "parquet.parquet": (b"0" * 999, "Parquet"),
    "half.parquet": (encode_rows("parquet", TEXTS)[:200], "Parquet"),
    "empty.parquet": (b"", "empty.parquet"),
    "not.jsonl.gz": (LINES, "not.jsonl.gz 读不了"),
    "half.txt.gz": (gzip.compress(LINES)[:200], "half.txt.gz"),
    "bad.jsonl.gz": (gzip.compress(LINES)[:60] + b"\x55" * 300, "bad.jsonl.gz 读不了"),
    "half.jsonl.xz": (lzma.compress(LINES)[:200], "half.jsonl.xz 读不了"),
    "bad.jsonl.zst": (b"0" * 999, "bad.jsonl.zst 读不了"),
    "half.jsonl.zst": (pa.compress(LINES, codec="zstd", asbytes=True)[:300], "half.jsonl.zst"),
    "noise.txt": (b"\xff\x00\x81 \xfa\xff\xff\n" * 40, "认不出编码"),
    "big5.txt": (BIG5, "像是 Big5"),
    "big5.jsonl.xz": (lzma.compress(b'{"text": "' + BIG5 + b'"}\n'), "iconv -f BIG5"),
    "byte.txt": (UTF8 + "好".encode() + b"\x81\x81\x81" + UTF8, "3 个字节解不开"),
    "word.docx": (b"PK", "另存为纯文本"),
    "book.epub": (b"PK", "Calibre"),
    "paper.PDF": (b"%PDF", "pdftotext"),
    "novels.zip": (b"PK", "解压"),
    "novels.rar": (b"Rar!", "解压"),
    **{f"lfs{kind}": (LFS, "git lfs pull") for kind in (".txt", ".jsonl", ".parquet", ".json.gz", ".csv")},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path, name):
    data, expected = BAD[name]
    (tmp_path / name).write_bytes(data)
    assert expected in error_of(
        prepare_corpus, "--corpus", tmp_path / name, "--output_dir", tmp_path / "run/out"
    )
    assert not [path for path in tmp_path.rglob("*") if path.name in ("out", ".out.tmp")]


@pytest.mark.parametrize("spec", ["gone.jsonl", "no/*.txt", "", "小说=", "~no_such_user/a.txt", "empty"])
def test_bad_paths(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "通配符" in error_of(prepare_corpus, "--corpus", spec, "--output_dir", tmp_path / "out")


def test_one_line_as_a_command(tmp_path):
    """真的当命令跑：退出码 1，stderr 恰好一行；别人的文件夹、正在写的文件夹不碰。"""
    good = write_jsonl(tmp_path / "good.jsonl", ["第一篇文章", "第二篇文章"])
    (tmp_path / "bad.jsonl").write_text("{\n", encoding="utf-8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/论文.md").write_text("三年的心血", encoding="utf-8")
    with filelock.FileLock(tmp_path / ".busy.lock"):
        for source, out, expected in (
            (tmp_path / "bad.jsonl", "out", "第 2 行不是 JSON"),
            (good, "mine", "不覆盖"),
            (good, "busy", "另一个进程"),
            (good, "good.jsonl/x", "读写失败"),
        ):
            result = run_script("prepare_corpus.py", "--corpus", source, "--output_dir", tmp_path / out)
            assert result.returncode == 1 and result.stderr.count("\n") == 1 and expected in result.stderr
    assert (tmp_path / "mine/论文.md").read_text(encoding="utf-8") == "三年的心血"


def test_hub_unreachable(tmp_path, monkeypatch, capsys):
    """哪里都连不上：一行里说清镜像、ModelScope、本地文件三条路。"""
    for name in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    message = error_of(
        prepare_corpus, "--corpus", "wiki", "--source", "mirror", "--output_dir", tmp_path / "out"
    )
    for word in (
        "pleisto/wikipedia-cn-20230720-filtered",
        "hf-mirror.com",
        "--source modelscope",
        "--corpus wiki=文件",
    ):
        assert word in message
    assert not (tmp_path / "out").exists()


def test_downloaded_files_are_read_and_counted(tmp_path, monkeypatch, capsys):
    """下载好的文件与自己的文件走同一条路；读了几行要说。"""
    rows = "".join(
        json.dumps({"completion": f"第 {i} 篇条目", "source": "w"}, ensure_ascii=False) + "\n"
        for i in range(50)
    )
    (tmp_path / "wiki.json").write_text(rows, encoding="utf-8")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **settings: str(tmp_path))
    call(prepare_corpus, "--corpus", "wiki", "--output_dir", tmp_path / "run/out")
    assert report_of(tmp_path / "run/out")["sources"]["wiki"]["documents"] == 50
    assert "wiki：读了 50 行" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows 没有这样的信号")
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGKILL])
def test_interruption(tmp_path, real_texts, which):
    """清洗到一半 Ctrl-C：退出码 130，一行话，没有半成品；kill -9 也一样能再来：再跑同一条命令就成。"""
    texts = [f"{i} {text}" for i in range(20) for text in real_texts["news"][:3000]]
    source = write_jsonl(tmp_path / "big.jsonl", texts)
    options = ("--corpus", source, "--output_dir", tmp_path / "out")
    command = [sys.executable, str(ROOT / "prepare_corpus.py"), *map(str, options)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8")
    while not list(tmp_path.glob(".out.tmp/cache/**/*.arrow")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(which)
    error = process.communicate(timeout=15)[1]
    if which == signal.SIGINT:
        assert process.returncode == 130 and error.startswith("停下了") and error.count("\n") == 1, error
        assert not (tmp_path / ".out.tmp").exists()
    assert not (tmp_path / "out").exists()
    call(prepare_corpus, *options)
    assert report_of(tmp_path / "out")["sources"] and not (tmp_path / ".out.tmp").exists()


def test_files_are_opened_as_utf8(tmp_path):
    """中文 Windows 默认用 GBK 读写：我们自己的每一处 open 都要写明 encoding。"""
    source = write_jsonl(tmp_path / "a.jsonl", ["第一篇文章", "第二篇文章"])
    result = subprocess.run(
        [
            sys.executable,
            "-X",
            "warn_default_encoding",
            str(ROOT / "prepare_corpus.py"),
            "--corpus",
            str(source),
            "demo",
            "--output_dir",
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONWARNINGS": "always"},
    )
    assert result.returncode == 0, result.stderr
    assert not [
        line for line in result.stderr.split("\n") if "EncodingWarning" in line and "prepare_corpus" in line
    ]


def test_a_file_may_not_take_the_name_of_a_built_in_source(tmp_path):
    """--corpus demo demo=more.txt：一行说清，不悄悄丢掉其中一样。"""
    (tmp_path / "more.txt").write_text("一行足够长的文字。\n" * 20, "utf-8")
    message = error_of(
        prepare_corpus, "--corpus", "demo", f"demo={tmp_path / 'more.txt'}", "--output_dir", tmp_path / "c"
    )
    assert "demo" in message and "换一个名字" in message and not (tmp_path / "c").exists()
