"""prepare_corpus.py：读得对（格式、压缩、编码、列），洗得对，分得对，写得对；用户的错只有一行话。"""

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
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(data))
    return path


def read_texts(path, text_column=None):
    return list(prepare_corpus.read_texts(path, text_column))


def corpus_of(folder, split="*"):
    return [
        row for path in sorted(folder.glob(f"{split}-*.parquet")) for row in pq.read_table(path).to_pylist()
    ]


def report_of(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


# ==== 格式、压缩、编码 ====


@pytest.mark.parametrize("packed", ["", ".gz", ".xz", ".zst"])
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


def test_one_bad_byte_does_not_change_the_encoding(tmp_path, real_texts):
    """GBK 的文件坏了一个字节：还是 GB18030，报错说在哪里。"""
    data = "\n".join(real_texts["news"][:300]).encode("gb18030")
    path = write_packed(tmp_path / "a.txt", data[:5000] + b"\xff" + data[5000:])
    assert "gb18030" in error_of(prepare_corpus, "--corpus", path, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(
    ("row", "column", "expected"),
    [
        ({"text": "甲", "completion": "乙"}, None, "甲"),
        ({"completion": "乙", "source": "x"}, None, "乙"),
        ({"INSTRUCTION": "问", "RESPONSE": "答", "SOURCE": "x"}, None, "问\n答"),
        ({"INSTRUCTION": "问", "RESPONSE": None}, None, "问\n"),
        ({"content": "丙", "text": "别的"}, "content", "丙"),
        ({"text": None}, None, ""),
        ("一个字符串", None, "一个字符串"),
    ],
)
def test_text_columns(row, column, expected):
    assert prepare_corpus.text_of(row, column) == expected


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
    text, counts, example = prepare_corpus.clean(raw)
    assert text == expected
    assert (step in counts) == (step in example) == (raw != expected)


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
    first, again = build(tmp_path, texts), build(tmp_path, texts[::-1] + texts[:9], "again")
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
    assert (count["replaced_u2581"], count["html"]) == (2, 14)
    assert count["documents"] == 203 == count["train_documents"] + count["eval_documents"]
    assert count["eval_documents"] == 10 and report["sources"]["乙"]["duplicates"] == 1
    rows = corpus_of(tmp_path / "out")
    assert sum(len(row["text"]) for row in rows if row["source"] == "甲") == count["characters"]
    assert {"有 记号 的", "坏字了啊", "有标签的"} < {row["text"] for row in rows}
    assert len(report["examples"]["html"]) == 5 and report["examples"]["html"][0] == "有【<b>】标签</b>的"
    out = capsys.readouterr().out
    assert "HTML 标签和实体：14 处" in out and "有【<b>】标签" in out


def test_shuffled_and_always_the_same(tmp_path, real_texts, monkeypatch):
    """训练文档打乱一次；再做一遍，一批几篇都不影响结果。"""
    source = write_jsonl(tmp_path / "a.jsonl", real_texts["news"][:3000])
    call(prepare_corpus, "--corpus", source, "--output_dir", tmp_path / "one")
    monkeypatch.setattr(prepare_corpus, "BATCH", 7)
    call(prepare_corpus, "--corpus", source, "--output_dir", tmp_path / "again")
    one, again = report_of(tmp_path / "one"), report_of(tmp_path / "again")
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
BAD = {
    "empty.jsonl": (b"", "0 行"),
    "blank.jsonl": (b'{"text": "  "}\n{"text": null}\n', "2 行"),
    "one.jsonl": ('{"text": "全都一样"}\n'.encode() * 9, "只剩 1 篇"),
    "short.jsonl": ('{"text": "短"}\n'.encode() * 9, "读了 9 行"),
    "column.jsonl": (
        '{"text": "好"}\n{"标题": "一", "正文": "二"}\n'.encode(),
        "第 2 行（篇）没有文本列 text，或里面不是文字；有的是 ['标题', '正文']",
    ),
    "number.jsonl": (b'{"text": 12345}\n', "第 1 行"),
    "json.jsonl": ('{"text": "好"}\n\n{"text": "坏\n'.encode(), "第 3 行（篇）不是 JSON"),
    "huge.jsonl": (b'{"text": ' + b"9" * 5000 + b"}\n", "第 1 行"),
    "deep.jsonl": (b"[" * 200_000 + b"\n", "第 1 行"),
    "half.json": ('[{"text": "一"}, {"text": "二'.encode(), "第 1 行（篇）不是 JSON"),
    "end.json": (b'[{"text": "a"}, ', "JSON"),
    "lists.json": (b'[["a"], ["b"]]', "第 1 行"),
    "42.json": (b"42", "42"),
    "csv.csv": ("甲,乙\n1,2\n".encode(), "['甲', '乙']"),
    "parquet.parquet": (b"0" * 999, "损坏"),
    "half.parquet": (encode_rows("parquet", TEXTS)[:200], "损坏"),
    "empty.parquet": (b"", "损坏"),
    "not.jsonl.gz": (LINES, "损坏"),
    "half.txt.gz": (gzip.compress(LINES)[:200], "损坏"),
    "bad.jsonl.gz": (gzip.compress(LINES)[:60] + b"\x55" * 300, "损坏"),
    "half.jsonl.xz": (lzma.compress(LINES)[:200], "损坏"),
    "bad.jsonl.zst": (b"0" * 999, "损坏"),
    "half.jsonl.zst": (pa.compress(LINES, codec="zstd", asbytes=True)[:300], "损坏"),
    "noise.txt": (b"\xff\x00\x81 \xfa\xff\xff\n" * 40, "认不出编码"),
    "big5.txt": ("這是繁體中文的小說，編碼是老式的，讀不了。".encode("big5") * 9, "认不出编码"),
    "byte.txt": (UTF8 + "好".encode() + b"\x81\x81\x81" + UTF8, "第 1 行"),
    "far.txt": ("好的中文\n".encode() * 100_000 + b"\xff" + UTF8, "第 125 行"),
    "odd.txt": ("好的".encode("utf-16") * 9 + b"x", "utf-16"),
    "word.docx": (b"PK", ".jsonl .json .csv"),
}


def test_missing_text_column(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["第一篇文章", "第二篇文章"])
    message = error_of(
        prepare_corpus, "--corpus", path, "--text_column", "正文", "--output_dir", tmp_path / "out"
    )
    assert "没有文本列 正文" in message and "有的是 ['text']" in message


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
            (tmp_path / "bad.jsonl", "out", "第 1 行"),
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
    """下载好的文件与自己的文件走同一条路；行数不符要说。"""
    rows = "".join(
        json.dumps({"completion": f"第 {i} 篇条目", "source": "w"}, ensure_ascii=False) + "\n"
        for i in range(50)
    )
    (tmp_path / "wiki.json").write_text(rows, encoding="utf-8")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **settings: str(tmp_path))
    call(prepare_corpus, "--corpus", "wiki", "--output_dir", tmp_path / "run/out")
    assert report_of(tmp_path / "run/out")["sources"]["wiki"]["documents"] == 50
    assert "已知的是 254,547 行" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows 没有 SIGTERM 的处理")
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing_behind(tmp_path, real_texts, which):
    """清洗到一半 Ctrl-C 或 SIGTERM：退出码 130、143，没有 traceback，没有半成品；再跑同一条命令就成。"""
    source = write_jsonl(
        tmp_path / "big.jsonl", [f"{i} {text}" for i in range(9) for text in real_texts["news"][:3000]]
    )
    command = [
        sys.executable,
        str(ROOT / "prepare_corpus.py"),
        "--corpus",
        source,
        "--output_dir",
        tmp_path / "out",
    ]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, encoding="utf-8")
    while not (tmp_path / ".out.tmp/cleaned.arrow").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(which)
    error = process.communicate(timeout=15)[1]
    assert process.returncode == 128 + which and "Traceback" not in error, error
    assert not [path for path in tmp_path.iterdir() if path.name in ("out", ".out.tmp")]
    call(prepare_corpus, *command[2:])
    assert report_of(tmp_path / "out")["sources"]


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
