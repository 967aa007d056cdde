"""train_tokenizer.py：无损、两种实现一致、只用训练集、装不下时说清楚、不通过就什么也不写。"""

import io
import json
import random
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sentencepiece as spm
from conftest import ROOT, VOCAB_SIZE, call, environment, error_of
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train_tokenizer

# HARD_LINES 之外再想的难句：像字节词块、像特殊记号、不可见字符、组合字符、各种空白
MORE_HARD_LINES = [
    "<",
    "<<",
    "<0",
    "<0x",
    "<0x4",
    "<0x41",
    "<0x41>",
    "<0X41>",
    "<0xg1>",
    "<<0x41>>",
    "a<0x41>b<0xFF><0x00>",
    "<s>",
    "</s>",
    "<<s>>",
    "< s >",
    "<s></s><s>",
    "中</s>文",
    "</s",
    "/s>",
    "<pad><unk>",
    "<unk",
    "[MASK][CLS]",
    "<|im_start|>user",
    "<extra_id_0>",
    "",
    " ",
    "  ",
    "   a   ",
    "a ",
    " a",
    "\n",
    "\n\n\n",
    "\r",
    "\r\n",
    "\t\t \t",
    "\x7f\x80\x85\xa0",
    "\u2028\u2029\u200d\u200e\u202e",
    "\ufeff开头",
    "\ufffd",
    "\uffff",
    "\U0010ffff",
    "\ue000",
    "𠮷野家 𪚥 𰻝",
    "e\u0301\u0323",
    "각",
    "ﬁ Ⅳ ㎏ ½ ①",
    "０１２ＡＢＣ",
    "ＧＰＴ－２",
    "👨‍👩‍👧‍👦👍🏽🏳️‍🌈",
    "𝕳𝖊𝖑𝖑𝖔",
    "哈" * 300,
    "!" * 300,
    " " * 300,
    "1" * 300,
    "ab" * 300,
    "“‘（【《〈「『",
    "C:\\路径\\n\\t",
    '{"a": [1, 2]}',
]


def write_corpus(folder, train, held_out=("验证集。",), shards=1):
    """一份最小的 corpus/：train 按次序分成 shards 个文件。"""
    folder.mkdir(parents=True)
    cuts = [len(train) * i // shards for i in range(shards + 1)]
    parts = {f"train-{i:05}": train[cuts[i] : cuts[i + 1]] for i in range(shards)}
    for name, texts in (parts | {"eval-00000": list(held_out)}).items():
        pq.write_table(pa.table({"text": texts, "source": ["x"] * len(texts)}), folder / f"{name}.parquet")
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    report = json.dumps({"corpus_hash": "1", "files": files})
    (folder / "report.json").write_text(report, encoding="utf-8")
    return folder


def read_folder(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def fast(work_dir):
    return AutoTokenizer.from_pretrained(work_dir / "tokenizer")


@pytest.fixture(scope="module")
def lines(real_texts):
    """分词器没见过的真实文本 4,000 篇，难句，和 2,000 行随机的任意 Unicode（不含代理字符和 ▁）。"""
    rng = random.Random(0)
    ranges = [(0, 0x7F), (0x80, 0x2FFF), (0x3000, 0x9FFF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    noise = [
        "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randrange(60))) for _ in range(2000)
    ]
    unseen = [text for texts in real_texts.values() for text in texts[1500:3500]]
    assert len(unseen) >= 4000
    noise = [text.replace("\u2581", "") for text in noise]
    return unseen + train_tokenizer.HARD_LINES + MORE_HARD_LINES + noise


@pytest.fixture(scope="module")
def encoded(sp, fast, lines):
    return sp.encode(lines), fast(lines)["input_ids"]


# ==== 无损 ====


def test_auto_tokenizer_loads_it(fast, sp):
    assert isinstance(fast, PreTrainedTokenizerFast) and len(fast) == VOCAB_SIZE
    assert fast.convert_tokens_to_ids(train_tokenizer.SPECIAL) == [0, 1, 2, 3]
    assert (fast.pad_token_id, fast.unk_token_id, fast.bos_token_id, fast.eos_token_id) == (0, 1, 2, 3)
    assert (sp.pad_id(), sp.unk_id(), sp.bos_id(), sp.eos_id()) == (0, 1, 2, 3)
    assert fast("你好")["input_ids"] == fast("你好", add_special_tokens=False)["input_ids"], (
        "编码时不自动加特殊记号"
    )


def test_lossless(sp, fast, lines, encoded):
    """两种实现都一字不差；字面的 </s>、<unk> 也不会变成特殊记号。"""
    assert [sp.decode(ids) for ids in encoded[0]] == lines
    assert fast.batch_decode(encoded[1]) == lines
    assert not {0, 1, 2, 3} & {i for side in encoded for ids in side for i in ids}


def test_both_implementations_agree(lines, encoded):
    """编号一致的行不少于 99.9 %（剩下的只可能是概率相同的两种切法）。"""
    different = [line for line, a, b in zip(lines, *encoded, strict=True) if a != b]
    assert len(different) <= len(lines) // 1000, different[:5]


def test_punctuation_and_space_have_their_own_pieces(fast, sp):
    """公开参考的毛病：全角标点变成 <unk> 或半角。"""
    for mark in "，。！？：； ":
        assert len(fast(mark)["input_ids"]) == 1 and fast.decode(fast(mark)["input_ids"]) == mark
        assert len(sp.encode(mark)) == 1


def test_report(work_dir, sp):
    """报告里的每 token 字符数等于另算一遍的结果。"""
    report = json.loads((work_dir / "tokenizer/report.json").read_text(encoding="utf-8"))
    texts = [
        text
        for path in (work_dir / "corpus").glob("eval-*")
        for text in pq.read_table(path)["text"].to_pylist()
    ]
    held_out = [line for text in texts for line in text.split("\n") if line.strip()]
    assert report["held_out_lines"] == len(held_out) > 50
    tokens = sum(map(len, sp.encode(held_out)))
    assert report["characters_per_token"] == pytest.approx(sum(map(len, held_out)) / tokens, abs=1e-4)
    assert 0.5 < report["characters_per_token"] < 2.0
    assert report["unk_rate"] == 0 and report["round_trip_rate"] == 1 and report["ids_agree_rate"] >= 0.999
    assert report["vocab_size"] == VOCAB_SIZE and len(report["examples"]) == 3
    assert report["files"].keys() == {"tokenizer.json", "tokenizer_config.json", "sentencepiece.model"}


# ==== 读语料 ====


@pytest.fixture
def trained_on(monkeypatch):
    """截下真正送进 SentencePiece 的行，到此为止，不训练。"""
    trained = []

    def record(lines, vocab_size):
        trained.extend(lines)
        sys.exit("错误：只看到这里")

    monkeypatch.setattr(train_tokenizer, "train_sentencepiece", record)
    return trained


def test_held_out_documents_are_never_trained_on(work_dir, tmp_path, trained_on):
    error_of(
        train_tokenizer,
        "--corpus_dir",
        work_dir / "corpus",
        "--output_dir",
        tmp_path / "t",
        "--vocab_size",
        9000,
    )
    train, held_out = (
        set(train_tokenizer.read_lines(work_dir / "corpus", split)) for split in ("train", "eval")
    )
    assert set(trained_on) == train, "词表够大时每一行原样送进去"
    assert len(held_out - train) >= 90 and not set(trained_on) & (held_out - train)


def test_shards_do_not_matter(tmp_path, trained_on, monkeypatch):
    """同样的文档分成几个文件都一样；只读到够数为止。"""
    monkeypatch.setattr(train_tokenizer, "MAX_LINES", 50)
    texts = [f"第{i}行\n再一行" for i in range(100)]
    for shards in (1, 7):
        corpus = write_corpus(tmp_path / f"c{shards}", texts, shards=shards)
        error_of(
            train_tokenizer, "--corpus_dir", corpus, "--output_dir", tmp_path / "t", "--vocab_size", 9000
        )
    assert len(trained_on) == 100 and trained_on[:50] == trained_on[50:] == "\n".join(texts[:25]).split("\n")


def test_long_lines_are_cut_and_blank_lines_dropped(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", ["甲" * 2500 + "\n\n  \n乙\n", "丙\r丁\u2028戊"])
    lines = list(train_tokenizer.read_lines(corpus, "train"))
    assert lines == ["甲" * 1000, "甲" * 1000, "甲" * 500, "乙", "丙\r丁\u2028戊"]


# ==== 词表装不下，或凑不出 ====


def test_small_vocabulary_keeps_room_for_words(work_dir, tmp_path):
    """字比词表多：罕见字拆成字节，仍然无损；单字不占满词表。"""
    call(
        train_tokenizer,
        "--corpus_dir",
        work_dir / "corpus",
        "--output_dir",
        tmp_path / "t",
        "--vocab_size",
        600,
    )
    report = json.loads((tmp_path / "t/report.json").read_text(encoding="utf-8"))
    assert 0.4 < report["character_coverage"] < 0.9
    sp = spm.SentencePieceProcessor(model_file=str(tmp_path / "t/sentencepiece.model"))
    assert sp.get_piece_size() == 600
    assert sp.decode(sp.encode("龘靐齉，罕见字拆成字节")) == "龘靐齉，罕见字拆成字节"
    assert sum(len(sp.id_to_piece(i)) > 1 for i in range(260, 600)) > 100


def test_coverage():
    """装得下就原样；500 种字而只有 200 个空位：一半给最常见的 100 个字，罕见字处断开，正则的特殊字符也不出错。"""
    lines = ["甲乙丙" * 10, "丁"]
    assert train_tokenizer.limit_characters(lines, 1000) == (lines, 0.9999)
    lines = [chr(0x4E00 + i) * (1000 - i) for i in range(500)] + ["\u4e00]^\\-[a-z]\u4e01"]
    kept, coverage = train_tokenizer.limit_characters(lines, 4 + 256 + 200)
    assert coverage == pytest.approx((sum(1000 - i for i in range(100)) + 2) / sum(map(len, lines)))
    assert kept == lines[:100] + ["\u4e00", "\u4e01"]


def test_unreachable_vocabulary_and_its_advice(real_texts):
    lines = real_texts["news"][:60]
    with pytest.raises(SystemExit, match="凑不出 20,000 个词块") as stop:
        train_tokenizer.train_sentencepiece(lines, 20_000)
    most = int(re.search(r"最多 (\d+)", stop.value.code)[1])
    model = train_tokenizer.train_sentencepiece(lines, most)
    assert spm.SentencePieceProcessor(model_proto=model).get_piece_size() == most


# ==== 自检和输出文件夹 ====


@pytest.mark.parametrize(
    "fault",
    [{"byte_fallback": False}, {"normalization_rule_name": "nmt_nfkc"}, {"remove_extra_whitespaces": True}],
)
def test_self_check_refuses_a_lossy_tokenizer(work_dir, tmp_path, fault):
    """公开参考的几处设置，每一处都会丢信息；自检必须发现。"""
    model = io.BytesIO()
    settings = (
        dict(byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False) | fault
    )
    spm.SentencePieceTrainer.train(
        sentence_iterator=train_tokenizer.read_lines(work_dir / "corpus", "eval"),
        model_writer=model,
        vocab_size=3000,
        hard_vocab_limit=False,
        character_coverage=0.98,
        required_chars="\u2581",
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        pad_piece="<pad>",
        minloglevel=2,
        add_dummy_prefix=False,
        **settings,
    )
    model = model.getvalue()
    with pytest.raises(SystemExit, match="自检不通过"):
        train_tokenizer.self_check(model, train_tokenizer.convert(model), work_dir / "corpus")


def test_self_check_refuses_special_tokens_in_text(work_dir):
    """文字里写着 </s>，快速分词器却当成了文档结束：原样解码看不出，自检要看得出。"""
    model = (work_dir / "tokenizer/sentencepiece.model").read_bytes()
    fast = train_tokenizer.convert(model)
    fast.split_special_tokens = False
    fast.backend_tokenizer.encode_special_tokens = False
    assert fast.eos_token_id in fast("中</s>文")["input_ids"]
    assert fast.decode(fast("中</s>文")["input_ids"]) == "中</s>文"
    with pytest.raises(SystemExit, match="自检不通过"):
        train_tokenizer.self_check(model, fast, work_dir / "corpus")


def test_failing_self_check_leaves_the_old_tokenizer(copied, monkeypatch):
    """解码时把逗号变成半角：报错，旧的一个字节不动，不留半成品。"""
    original = train_tokenizer.convert

    def lossy(model):
        fast = original(model)
        decode = fast.batch_decode
        fast.batch_decode = lambda *args, **rest: [text.replace("，", ",") for text in decode(*args, **rest)]
        return fast

    monkeypatch.setattr(train_tokenizer, "convert", lossy)
    before = read_folder(copied / "tokenizer")
    message = error_of(
        train_tokenizer,
        "--corpus_dir",
        copied / "corpus",
        "--output_dir",
        copied / "tokenizer",
        "--vocab_size",
        600,
    )
    assert "自检不通过" in message and "，" in message
    assert read_folder(copied / "tokenizer") == before and not list(copied.glob(".tokenizer.tmp*"))


def test_reuse_rebuild_and_refuse(copied, capsys):
    folder = copied / "tokenizer"
    arguments = ("--corpus_dir", copied / "corpus", "--output_dir", folder)
    before = read_folder(folder)
    call(train_tokenizer, *arguments, "--vocab_size", VOCAB_SIZE)
    said = capsys.readouterr().out
    assert "第 2 步，共 4 步：训练分词器" in said and "沿用" in said
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["key"] == f"{report['corpus_hash']} {VOCAB_SIZE} 0.9999 200000", "旧版本做好的也要能沿用"
    assert "设置变了" in error_of(train_tokenizer, *arguments, "--vocab_size", 700, "--no-rebuild")
    assert read_folder(folder) == before
    call(train_tokenizer, *arguments, "--vocab_size", 600)
    said = ["", *capsys.readouterr().out.splitlines()[-4:]]
    assert said[1] == "第 2 步，共 4 步：训练分词器" and said[2].startswith("从语料里学出 600 个词块")
    assert said[3].startswith("例：") and said[4].startswith(f"写好 {folder}：验证集 ")
    assert json.loads((folder / "report.json").read_text(encoding="utf-8"))["vocab_size"] == 600
    small = read_folder(folder)
    # 不完整的重做，结果相同
    (folder / "sentencepiece.model").write_bytes(small["sentencepiece.model"][:1000])
    call(train_tokenizer, *arguments, "--vocab_size", 600)
    assert read_folder(folder) == small


def test_foreign_folder_is_refused(work_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/笔记.txt").write_text("别动", encoding="utf-8")
    assert "不覆盖" in error_of(
        train_tokenizer, "--corpus_dir", work_dir / "corpus", "--output_dir", tmp_path / "out"
    )
    assert read_folder(tmp_path / "out") == {"笔记.txt": "别动".encode()}


# ==== 使用者的差错：一行话，什么也不写 ====


def damage(name, change):
    def apply(corpus):
        path = corpus / name
        path.write_bytes(change(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (damage("report.json", lambda data: data[: len(data) // 2]), "prepare_corpus.py"),
        (damage("report.json", lambda data: b'{"files": {}}'), "prepare_corpus.py"),
        (damage("report.json", lambda data: b"[1]"), "prepare_corpus.py"),
        (lambda corpus: (corpus / "train-00000.parquet").unlink(), "prepare_corpus.py"),
        (damage("train-00000.parquet", lambda data: data[:-100]), "prepare_corpus.py"),
        (damage("train-00000.parquet", lambda data: b"x" * len(data)), "train-00000.parquet 已损坏"),
        (damage("train-00000.parquet", lambda data: data[:40] + b"\x99" * 400 + data[440:]), "已损坏"),
    ],
)
def test_damaged_corpus(tmp_path, real_texts, spoil, words):
    corpus = write_corpus(tmp_path / "corpus", real_texts["news"][:500])
    spoil(corpus)
    message = error_of(
        train_tokenizer, "--corpus_dir", corpus, "--output_dir", tmp_path / "t", "--vocab_size", 320
    )
    assert words in message and str(corpus) in message and not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("texts", "vocab_size", "words"),
    [
        (["😀", "😀😃", "😃😄😀", "👍"], 3000, "凑不出 3,000 个词块"),
        (["一" * i for i in range(1, 9)], 300, "凑不出 300 个词块"),
        ([chr(i) * 2 for i in range(0x4E00, 0x5200)], 400, "凑不出 400 个词块"),
        (["一"], 299, "--vocab_size 要在 300"),
        (["一"], 65_537, "65,536"),
        (["一"], 0, "得到 0"),
        (["一"], -5, "得到 -5"),
    ],
)
def test_wrong_vocabulary_size(tmp_path, texts, vocab_size, words):
    corpus = write_corpus(tmp_path / "corpus", texts)
    assert words in error_of(
        train_tokenizer, "--corpus_dir", corpus, "--output_dir", tmp_path / "t", "--vocab_size", vocab_size
    )
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")) == ["corpus"]


def test_missing_corpus(tmp_path):
    assert "nowhere" in error_of(train_tokenizer, "--corpus_dir", tmp_path / "nowhere")


def test_no_encoding_warnings(work_dir, tmp_path):
    """中文 Windows 默认用 GBK 开文本文件：我们自己的每一处都写明了编码（别的库的警告不算）。"""
    result = subprocess.run(
        [
            sys.executable,
            ROOT / "train_tokenizer.py",
            "--corpus_dir",
            work_dir / "corpus",
            "--output_dir",
            tmp_path / "t",
            "--vocab_size",
            "320",
        ],
        env=environment() | {"PYTHONWARNDEFAULTENCODING": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert result.returncode == 0 and "EncodingWarning" not in "".join(
        line for line in result.stderr.splitlines() if line.startswith(str(ROOT / "train_tokenizer.py"))
    ), result.stderr
