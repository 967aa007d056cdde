"""train_tokenizer.py：无损、两种实现一致、只用训练集、装不下时说清楚、不通过就什么也不写。"""

import json
import random
import re

import pytest
import sentencepiece as spm
from conftest import VOCAB_SIZE, call, error_of
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import train_tokenizer

# HARD_LINES 之外再想的难句：像字节词块、像特殊记号、不可见字符、组合字符、各种空白
MORE_HARD_LINES = [
    "<", "<<", "<0", "<0x", "<0x4", "<0x41", "<0x41>", "<0X41>", "<0xg1>", "<<0x41>>",
    "a<0x41>b<0xFF><0x00>", "<s>", "</s>", "<<s>>", "< s >", "<s></s><s>", "中</s>文", "</s", "/s>",
    "<pad><unk>", "<unk", "[MASK][CLS]", "<|im_start|>user", "<extra_id_0>", "", " ", "  ", "   a   ",
    "a ", " a", "\n", "\n\n\n", "\r", "\r\n", "\t\t \t", "\x7f\x80\x85\xa0",
    "\u2028\u2029\u200d\u200e\u202e", "\ufeff开头", "\ufffd", "\uffff", "\U0010ffff", "\ue000", "𠮷野家 𪚥 𰻝",
    "e\u0301\u0323", "각", "ﬁ Ⅳ ㎏ ½ ①", "０１２ＡＢＣ", "ＧＰＴ－２", "👨‍👩‍👧‍👦👍🏽🏳️‍🌈", "𝕳𝖊𝖑𝖑𝖔",
    "哈" * 300,
    "!" * 300,
    " " * 300,
    "1" * 300,
    "ab" * 300,
    "“‘（【《〈「『",
    "C:\\路径\\n\\t",
    '{"a": [1, 2]}',
]


@pytest.fixture(scope="session")
def fast(work_dir):
    return AutoTokenizer.from_pretrained(work_dir / "tokenizer")


@pytest.fixture(scope="session")
def lines(real_texts):
    """分词器没见过的真实文本 4,000 行（训练只用了每个来源的前 1,500 篇），加上难句。"""
    unseen = [text for texts in real_texts.values() for text in texts[1500:3500]]
    assert len(unseen) >= 4000
    return unseen + train_tokenizer.HARD_LINES + MORE_HARD_LINES


def test_auto_tokenizer_loads_it(fast):
    assert isinstance(fast, PreTrainedTokenizerFast)
    assert len(fast) == VOCAB_SIZE


def test_special_ids(fast, sp):
    assert fast.convert_tokens_to_ids(["<pad>", "<unk>", "<s>", "</s>"]) == [0, 1, 2, 3]
    assert (fast.pad_token_id, fast.unk_token_id, fast.bos_token_id, fast.eos_token_id) == (0, 1, 2, 3)
    assert (sp.pad_id(), sp.unk_id(), sp.bos_id(), sp.eos_id()) == (0, 1, 2, 3)
    assert fast("你好")["input_ids"] == fast("你好", add_special_tokens=False)["input_ids"], "编码时不自动加特殊记号"


def test_sentencepiece_is_lossless(sp, lines):
    assert [sp.decode(ids) for ids in sp.encode(lines)] == lines


def test_fast_tokenizer_is_lossless(fast, lines):
    assert fast.batch_decode(fast(lines)["input_ids"]) == lines


def test_no_unk_and_no_special_ids(fast, sp, lines):
    """任何文字都编码成普通词块：字面的 </s>、<unk> 也不会变成特殊记号。"""
    for ids in (*sp.encode(lines), *fast(lines)["input_ids"]):
        assert not {0, 1, 2, 3} & set(ids)


def test_sentencepiece_and_fast_tokenizer_agree(fast, sp, lines):
    """编号一致的行不少于 99.9 %（剩下的只可能是分数相同的两种切法）。"""
    pairs = list(zip(sp.encode(lines), fast(lines)["input_ids"], strict=True))
    different = [lines[i] for i, (a, b) in enumerate(pairs) if a != b]
    assert len(different) <= len(lines) // 1000, different[:5]


def test_fullwidth_punctuation_has_its_own_pieces(fast):
    """公开参考的毛病：全角标点变成 <unk> 或半角。"""
    for mark in "，。！？：；":
        ids = fast(mark)["input_ids"]
        assert len(ids) == 1 and fast.decode(ids) == mark


def test_report(work_dir, sp):
    """报告里的每 token 字符数等于另算一遍的结果。"""
    report = json.loads((work_dir / "tokenizer/report.json").read_text("utf-8"))
    held_out = [line for text, _ in train_tokenizer.iter_corpus(work_dir / "corpus", "eval")
                for line in train_tokenizer.short_lines(text)]
    tokens = sum(map(len, sp.encode(held_out)))
    assert report["held_out_lines"] == len(held_out) > 50
    assert report["characters_per_token"] == pytest.approx(sum(map(len, held_out)) / tokens, abs=1e-4)
    assert 0.5 < report["characters_per_token"] < 2.0
    assert report["unk_rate"] == 0 and report["round_trip_rate"] == 1 and report["ids_agree_rate"] >= 0.999
    assert report["vocab_size"] == VOCAB_SIZE and len(report["examples"]) == 3


# ==== 只用训练集 ====

def test_held_out_documents_are_never_trained_on(work_dir, tmp_path, monkeypatch):
    """截下真正送进 SentencePiece 的行：全部来自训练文档，没有一篇验证文档。"""
    trained = []
    original = train_tokenizer.train_sentencepiece
    monkeypatch.setattr(train_tokenizer, "train_sentencepiece",
                        lambda lines, *rest: trained.extend(lines) or original(lines, *rest))
    call(train_tokenizer, "--corpus_dir", work_dir / "corpus", "--output_dir", tmp_path / "tokenizer",
         "--vocab_size", 8200, "--threads", 1)
    train, held_out = ({line for text, _ in train_tokenizer.iter_corpus(work_dir / "corpus", split)
                        for line in train_tokenizer.short_lines(text)} for split in ("train", "eval"))
    assert set(trained) == train, "词表够大时每一行原样送进去"
    assert len(held_out - train) >= 90
    assert not set(trained) & (held_out - train)


def test_sampling_is_uniform_and_seeded(work_dir):
    """抽样只从训练集里取，取够 limit 行；同一个种子结果相同，后面的文档也抽得到。"""
    sample = train_tokenizer.sample_lines(work_dir / "corpus", 300, seed=1)
    everything = [line for text, _ in train_tokenizer.iter_corpus(work_dir / "corpus", "train")
                  for line in train_tokenizer.short_lines(text)]
    assert len(sample) == 300 and set(sample) <= set(everything)
    assert sample == train_tokenizer.sample_lines(work_dir / "corpus", 300, seed=1)
    assert sample != train_tokenizer.sample_lines(work_dir / "corpus", 300, seed=2)
    second_half = set(everything[len(everything) // 2:]) - set(everything[:len(everything) // 2])
    assert 90 < sum(line in second_half for line in sample) < 210


def test_short_lines_lose_only_blank_lines():
    text = "甲" * 2500 + "\n\n  \n乙\n"
    assert list(train_tokenizer.short_lines(text)) == ["甲" * 1000, "甲" * 1000, "甲" * 500, "乙"]


# ==== 词表装不下，或凑不出 ====

def test_coverage_is_lowered_with_a_line(work_dir, tmp_path, capsys):
    """字比词表多：降低覆盖率，说一声，仍然无损。"""
    call(train_tokenizer, "--corpus_dir", work_dir / "corpus", "--output_dir", tmp_path / "tokenizer",
         "--vocab_size", 600, "--threads", 1)
    assert "字符覆盖率从 0.9999 降到" in capsys.readouterr().out
    report = json.loads((tmp_path / "tokenizer/report.json").read_text("utf-8"))
    assert 0.4 < report["character_coverage"] < 0.9
    sp = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer/sentencepiece.model"))
    assert sp.get_piece_size() == 600
    assert sp.decode(sp.encode("龘靐齉，罕见字拆成字节")) == "龘靐齉，罕见字拆成字节"
    pieces = [sp.id_to_piece(i) for i in range(260, 600)]
    assert sum(len(piece) > 1 for piece in pieces) > 100, "单字不占满词表，留位置给词"


def test_coverage_is_kept_when_it_fits(capsys):
    lines = ["甲乙丙" * 10, "丁"]
    assert train_tokenizer.limit_characters(lines, 1000, 0.9999) == (lines, 0.9999)
    assert capsys.readouterr().out == ""


def test_coverage_number(capsys):
    """500 种字、词表只有 200 个空位：一半给单字，覆盖率正好是最常见的 100 个字占的比例；罕见字处断开。"""
    lines = [chr(0x4E00 + i) * (1000 - i) for i in range(500)] + [
        chr(0x4E00) + chr(0x4E00 + 499) + chr(0x4E01)
    ]
    kept, coverage = train_tokenizer.limit_characters(lines, 4 + 256 + 200, 0.9999)
    assert coverage == pytest.approx((sum(1000 - i for i in range(100)) + 2) / sum(map(len, lines)))
    assert kept == lines[:100] + [chr(0x4E00), chr(0x4E01)]
    assert "500 种字符" in capsys.readouterr().out


def test_odd_rare_characters_are_only_cut_out():
    """罕见字里有正则表达式的特殊字符，也照样去得干净。"""
    lines = ["常用" * 500] * 3 + ["常]用^\\-[a-z]用"]
    kept, _ = train_tokenizer.limit_characters(lines, 4 + 256 + 4, 0.9999)
    assert set("".join(kept)) == {"常", "用"} and "".join(kept[3:]) == "常用用"


def suggested(message):
    return int(re.search(r"--vocab_size (\d+)", message)[1])


def test_unreachable_vocabulary_is_one_line_and_the_advice_works(real_texts):
    lines = real_texts["news"][:60]
    with pytest.raises(train_tokenizer.UserError, match="凑不出 20,000 个词块") as caught:
        train_tokenizer.train_sentencepiece(lines, 20_000, 0.9999, 1)
    size = suggested(str(caught.value))
    sp = spm.SentencePieceProcessor(model_proto=train_tokenizer.train_sentencepiece(lines, size, 0.9999, 1))
    assert sp.get_piece_size() == size


def test_space_has_its_own_piece(sp):
    """空格总有自己的词块，不会拆成字节：否则空格还原不了。"""
    assert len(sp.encode(" ")) == 1 and sp.decode(sp.encode(" ")) == " "


# ==== 输出文件夹 ====

def read_folder(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def lossy(original):
    """一个会丢信息的转换：解码时把逗号变成半角，像公开参考那样。"""
    def convert(model_bytes):
        fast = original(model_bytes)
        decode = fast.batch_decode
        fast.batch_decode = lambda *args, **kwargs: [t.replace("，", ",") for t in decode(*args, **kwargs)]
        return fast
    return convert


def test_failing_self_check_leaves_the_old_tokenizer(copied, monkeypatch):
    """自检不通过：报错，旧的一个字节不动，不留半成品。"""
    before = read_folder(copied / "tokenizer")
    monkeypatch.setattr(train_tokenizer, "convert", lossy(train_tokenizer.convert))
    message = error_of(
        train_tokenizer, "--corpus_dir", copied / "corpus", "--output_dir", copied / "tokenizer",
        "--vocab_size", 700, "--threads", 1,
    )
    assert "自检不通过" in message and "，" in message
    assert read_folder(copied / "tokenizer") == before
    assert not list(copied.glob(".tokenizer.tmp*"))


def test_self_check_refuses_a_tokenizer_without_byte_fallback(work_dir):
    """没有 byte fallback 的模型会把生僻字编码成 <unk>，自检必须发现。"""
    import io
    lines = train_tokenizer.sample_lines(work_dir / "corpus", 1000, 0)
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model, model_type="unigram", vocab_size=6000, num_threads=1, hard_vocab_limit=False,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        pad_id=0, unk_id=1, bos_id=2, eos_id=3,
        pad_piece="<pad>",
        minloglevel=2,
    )
    sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
    with pytest.raises(train_tokenizer.UserError, match="<unk>"):
        train_tokenizer.self_check(sp, train_tokenizer.convert(model.getvalue()), work_dir / "corpus")


def test_unchanged_is_reused_and_changed_is_rebuilt(copied, capsys):
    arguments = ("--corpus_dir", copied / "corpus", "--output_dir", copied / "tokenizer", "--threads", 1)
    before = read_folder(copied / "tokenizer")
    call(train_tokenizer, *arguments, "--vocab_size", VOCAB_SIZE)
    assert "沿用" in capsys.readouterr().out and read_folder(copied / "tokenizer") == before
    assert "设置变了" in error_of(train_tokenizer, *arguments, "--vocab_size", 700, "--no-rebuild")
    assert read_folder(copied / "tokenizer") == before
    call(train_tokenizer, *arguments, "--vocab_size", 700)
    assert "重做分词器：语料或设置变了" in capsys.readouterr().out
    assert json.loads((copied / "tokenizer/report.json").read_text("utf-8"))["vocab_size"] == 700


def test_truncated_tokenizer_is_rebuilt(copied, capsys):
    path = copied / "tokenizer/sentencepiece.model"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    call(train_tokenizer, "--corpus_dir", copied / "corpus", "--output_dir", copied / "tokenizer",
         "--vocab_size", VOCAB_SIZE, "--threads", 1)
    assert "不完整" in capsys.readouterr().out
    assert path.read_bytes() == data


def test_foreign_folder_is_refused(work_dir, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/笔记.txt").write_text("别动", "utf-8")
    assert "不覆盖" in error_of(
        train_tokenizer, "--corpus_dir", work_dir / "corpus", "--output_dir", tmp_path / "out"
    )
    assert read_folder(tmp_path / "out") == {"笔记.txt": "别动".encode()}


def test_random_unicode_round_trips(sp, fast):
    """随机的任意 Unicode 字符串（不含代理字符和 ▁）也一字不差。"""
    rng = random.Random(0)
    ranges = [(0, 0x7F), (0x80, 0x2FFF), (0x3000, 0x9FFF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    texts = [
        "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(40)).replace("\u2581", "")
        for _ in range(500)
    ]
    assert [sp.decode(ids) for ids in sp.encode(texts)] == texts
    assert fast.batch_decode(fast(texts)["input_ids"]) == texts
