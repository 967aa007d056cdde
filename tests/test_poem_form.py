"""benchmarks/poem_form.py：手造的诗上数得对；在一个随机的小模型上从头到尾跑得通。"""

import json
import math
import random
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
import torch
from conftest import ROOT, call

sys.path.insert(0, str(ROOT / "benchmarks"))
pytest.importorskip("pypinyin")
import poem_form

QUATRAIN = "静夜思\n床前明月光，疑是地上霜。\n举头望明月，低头思故乡。"  # 古绝：押韵，平仄不合
REGULATED = "登鹳雀楼\n白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。"


def verses(text):
    return poem_form.split_verses(text)


def test_verses():
    assert verses(QUATRAIN) == ["床前明月光", "疑是地上霜", "举头望明月", "低头思故乡"]
    assert verses("只有标题") == [] and verses("") == []
    unfinished = "春\n春眠不觉晓，处处闻"
    assert poem_form.complete_verses(unfinished, False) == ["春眠不觉晓"]
    assert poem_form.complete_verses(unfinished, True) == ["春眠不觉晓", "处处闻"]
    assert poem_form.complete_verses("春\n春眠不觉晓，", False) == ["春眠不觉晓"]


@pytest.mark.parametrize(
    "lines, equal, even",
    [
        ("床前明月光，疑是地上霜。", True, True),
        ("白日放歌须纵酒，青春作伴好还乡。", True, True),
        ("大江东去，浪淘尽。", False, True),  # 长短不一
        ("关关雎鸠，在河之洲。", False, True),  # 四字
        ("床前明月光，疑是地上霜，举头望明月。", True, False),
        ("床前明月光。", False, False),  # 只有一句，说不上一样长
        ("", False, False),
    ],
)
def test_lengths(lines, equal, even):
    poem = verses("题\n" + lines)
    assert poem_form.equal_lengths(poem) == [equal]
    assert poem_form.even_count(poem) == [even]


def test_rhymes():
    assert poem_form.rhymes(verses(QUATRAIN)) == [True]  # 霜、乡
    assert poem_form.rhymes(verses(REGULATED)) == [True]  # 流、楼
    assert poem_form.rhymes(["一", "天", "一", "年", "一", "山", "一", "水"]) == [True, True, False]
    assert poem_form.rhymes(["一", "天", "一", "天"]) == [False]  # 同一个字不算押韵
    assert poem_form.rhymes(["一", "天", "一"]) == []


@pytest.mark.parametrize(
    "character, rhyme, level",
    [
        ("霜", "ang", "平"),
        ("诗", "i", "平"),
        ("女", "i", "仄"),
        ("月", "ie", "仄"),
        ("风", "eng", "平"),
        ("，", None, None),
    ],
)
def test_sound(character, rhyme, level):
    assert poem_form.sound(character) == (rhyme, level)


def test_every_final_has_a_rhyme():
    """常用的三千多字，除了“嗯”这样的，都分得进十三辙。"""
    characters = [
        bytes([high, low]).decode("gb2312") for high in range(0xB0, 0xD7) for low in range(0xA1, 0xFF)
    ]
    missing = [character for character in characters if poem_form.sound(character)[0] is None]
    assert len(missing) <= 3, missing


def test_tones():
    assert poem_form.tones(verses(REGULATED)) == [True, True]  # 日山、河海：仄平、平仄
    assert poem_form.tones(verses(QUATRAIN)) == [False, False]
    assert poem_form.tones(["一二", "三四"]) == []  # 没有第四个字


def test_repeats():
    found = poem_form.repeats(["春眠不觉晓", "处处闻啼鸟"])
    assert sum(found) == 1 and found[6]  # 第二个“处”
    assert poem_form.repeats([]) == []


def test_recited():
    known = {"床前明月光"}
    assert poem_form.recited(["床前明月光", "疑是地上霜", "四字的句"], known) == [True, False]


def test_figures_are_shares_over_all_poems():
    poems = [verses(QUATRAIN), verses(REGULATED), []]
    numbers = poem_form.figures(poems, {"床前明月光"}, [True, True, False])
    assert numbers["equal_lengths"] == pytest.approx(2 / 3, abs=1e-4)
    assert numbers["rhymes"] == 1 and numbers["tones"] == 0.5
    assert numbers["recited"] == 0.125 and numbers["finished"] == pytest.approx(2 / 3, abs=1e-4)
    assert poem_form.figures([[]], set())["rhymes"] is None  # 没有可数的


def test_distinct_2():
    assert poem_form.distinct_2([["明月明月"], ["明月"]]) == 2 / 4  # 明月、月明、明月；明月
    assert poem_form.distinct_2([[]]) is None


def test_shuffling_keeps_lengths_and_characters():
    before = verses(QUATRAIN)
    after = poem_form.shuffle_characters(before, random.Random(1))
    assert list(map(len, after)) == list(map(len, before)) and after != before
    assert sorted("".join(after)) == sorted("".join(before))


def test_body_han():
    pieces = ["明月", "▁", "<0xE9>", "<0x0A>", "明月", "，", "<0xE9>", "<0xBE>", "<0x98>", "<0x0A>", "光"]
    expected = [False] * 4 + [True, False, True, True, True, False, True]
    assert poem_form.is_body_han(pieces) == expected


def test_nats_of_a_model_that_knows_nothing():
    """所有 token 一样可能时，每个 token 的损失是 ln V：总数和正文汉字的数都算得出来。"""
    tokenizer = tiny_run.tokenizer()
    model = tiny_run.model(len(tokenizer))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    text = "天气\n今天很好，" + "我们学习" * 20 + "。\n龘"  # 比上下文（64）长
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > tiny_run.CONTEXT
    losses = poem_form.nats_per_character(model, tokenizer, [text])
    uniform = math.log(len(tokenizer))
    assert losses["all"] == pytest.approx(uniform * (len(ids) + 1) / len(text), abs=1e-3)
    han = sum(poem_form.is_body_han(tokenizer.convert_ids_to_tokens(ids)))
    assert losses["tagged"] == pytest.approx(uniform * (len(ids) + 1) / (len(text) - 2 + 3), abs=1e-3)
    assert losses["body_han"] == pytest.approx(uniform * han / 85, abs=1e-3)


def test_runs_on_a_small_model(tmp_path):
    folder = tiny_run.make(tmp_path / "work")
    poem = "天气\n今天天气好，我们是中国。\n教育的历史，科学研究人。"
    held_out = [poem, "没有正文", "历史\n中国，历史。", "题" * 30 + "\n中国，历史。"]
    for split, texts in (("eval", held_out), ("train", [poem, "今天\n今天天气好。"])):
        rows = pa.table({"text": texts, "source": ["poems"] * len(texts)})
        pq.write_table(rows, folder / "corpus" / f"{split}-00000.parquet")
    call(poem_form, "--work_dir", folder, "--poems", 2, "--output", tmp_path / "form")
    result = json.loads((tmp_path / "form.json").read_text(encoding="utf-8"))
    assert result["held_out"]["poems"] == 3  # 没有正文的不算，标题长的也算
    assert result["poems"] == 2 and result["real"]["recited"] == 1
    assert [row["step"] for row in result["snapshots"]] == sorted(tiny_run.STEPS)
    assert (tmp_path / "form.png").stat().st_size > 10_000
    assert "| **真诗** |" in (tmp_path / "form.md").read_text(encoding="utf-8")


def test_no_snapshots(tmp_path):
    with pytest.raises(SystemExit, match="没有快照"):
        call(poem_form, "--work_dir", tmp_path)
