"""docs/one_step.ipynb：提交的是运行过的；在真的 Jupyter 内核里从头再跑一遍，每个 assert 都成立。"""

import importlib.util
import re
import shutil

import pytest
from conftest import ROOT

SCRIPT = ROOT / "docs" / "one_step.py"
NOTEBOOK = ROOT / "docs" / "one_step.ipynb"
nbformat = pytest.importorskip("nbformat", reason="没有装 Jupyter：pip install -r requirements-dev.txt")


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, 4)


def output_text(notebook):
    """全部文字输出，连在一起。"""
    text = ""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text += output.get("text", "") + "\n".join(output.get("traceback", []))
    return text


def count_pictures(notebook):
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def test_notebook_has_the_cells_of_the_script(notebook):
    """失败了就在 docs/ 里运行 jupytext --to ipynb --execute one_step.py，再提交。"""
    jupytext = pytest.importorskip("jupytext")
    script = jupytext.read(SCRIPT)
    assert [cell.source for cell in notebook.cells] == [cell.source for cell in script.cells]


def test_outputs_are_committed(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    source = "\n".join(cell.source for cell in code)
    assert count_pictures(notebook) == source.count("plt.show()") >= 10
    text = output_text(notebook)
    for cell in code:
        if "print(" in cell.source and "def " not in cell.source:
            assert any(output.output_type == "stream" for output in cell.outputs), cell.source[:60]
    assert "Warning" not in text and "Traceback" not in text
    assert not re.search(r"/(root|home|work|tmp|usr|Users)\b", text)
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_every_section_asks_shows_and_concludes(notebook):
    sections = re.split(r"(?m)^## (?=\d)", "\n".join(cell.source for cell in notebook.cells))[1:]
    for section in sections[1:]:  # 第 0 节是准备
        title = section.splitlines()[0]
        assert title.endswith("？"), title
        assert "assert " in section and "**带走一句**" in section, title
    assert len(sections) == 12


def test_runs_in_a_real_kernel(notebook, tmp_path, monkeypatch):
    if not importlib.util.find_spec("ipykernel"):
        pytest.skip("没有装 ipykernel：pip install -r requirements-dev.txt")
    nbclient = pytest.importorskip("nbclient")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "docs").mkdir()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("MPLBACKEND", raising=False)  # conftest 为脚本设的；内核要把图放进输出
    changed = [cell for cell in notebook.cells if "STEPS = 300 " in cell.source]
    assert len(changed) == 1
    changed[0].source = changed[0].source.replace("STEPS = 300 ", "STEPS = 20 ")
    expected = count_pictures(notebook)
    resources = {"metadata": {"path": str(tmp_path / "docs")}}
    client = nbclient.NotebookClient(notebook, timeout=580, kernel_name="python3", resources=resources)
    client.execute()
    assert count_pictures(notebook) == expected
    assert str(tmp_path) not in output_text(notebook)
    assert (tmp_path / "run-20-steps" / "final_model").is_dir()
