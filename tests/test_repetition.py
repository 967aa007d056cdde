"""benchmarks/repetition.py：两个数算得对；在一个小模型上从头到尾跑得通。"""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_run
from conftest import ROOT, call

sys.path.insert(0, str(ROOT / "benchmarks"))
import repetition


@pytest.mark.parametrize(
    "tokens, distinct, repeated",
    [
        ([1, 2, 3, 4, 5], 1, 0),
        ([7] * 9, 1 / 8, 5 / 6),  # 8 对里 1 种；6 个 4 连里 5 个重复
        ([1, 2, 1, 2, 1, 2, 1, 2], 2 / 7, 3 / 5),
    ],
)
def test_figures(tokens, distinct, repeated):
    assert repetition.distinct_2(tokens) == pytest.approx(distinct)
    assert repetition.repeated_4(tokens) == pytest.approx(repeated)
    assert repetition.figures([tokens, [1, 2]]) == repetition.figures([tokens])  # 太短的不算


def test_runs_on_a_small_model(tmp_path, capsys):
    folder = tiny_run.make(tmp_path / "work")
    texts = ["今天天气很好，我们研究历史的目的是教育人工智能！" * 5, "短"]
    pq.write_table(pa.table({"text": texts, "source": ["a", "a"]}), folder / "corpus" / "eval-00000.parquet")
    call(repetition, "--work_dir", folder, "--output", tmp_path / "result")
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    greedy, penalised = (
        next(row for row in result["rows"] if row["setting"] == name)
        for name in list(repetition.SETTINGS)[:2]
    )
    assert result["documents"] == 1 and greedy["distinct_2"] < penalised["distinct_2"]
    assert "| 真实文本 |" in (tmp_path / "result.md").read_text(encoding="utf-8")
