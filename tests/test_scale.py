"""scale/pipeline.py：datatrove 分成几个任务，与 prepare_corpus.py 一次做完的文档一样；杀掉一个任务再跑也一样。"""

import os
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest
from conftest import ROOT, call, environment, write_jsonl

import prepare_corpus

pytest.importorskip("datatrove", reason="没有装 datatrove（pip install -r requirements-dev.txt）")


@pytest.fixture(scope="module")
def sources(tmp_path_factory, real_texts):
    """五个文件、三个来源，有跨文件和跨来源的重复、要清洗的文字；有一个来源很小。"""
    folder = tmp_path_factory.mktemp("scale")
    news = real_texts["news"]
    reviews = real_texts["reviews"]
    files = {
        "a0": news[:1200],
        "a1": news[1000:2200] + ["<p>带标签的一段</p>"] * 3,
        "b0": reviews[:1500] + news[50:90],
        "b1": ["短"] * 5 + reviews[1400:2400],
        "c0": [f"{text}\n编辑于 2020-01-01" for text in news[2500:2530]],
    }
    for name, texts in files.items():
        write_jsonl(folder / f"{name}.jsonl", texts)
    return [f"甲={folder}/a*.jsonl", f"乙={folder}/b*.jsonl", f"丙={folder}/c0.jsonl"]


def documents(folder):
    """{(切分, 来源, 文本)}；顺便查没有重复。"""
    rows = [
        (path.name.split("-")[0], row["source"], row["text"])
        for path in folder.glob("*.parquet")
        for row in pq.read_table(path).to_pylist()
    ]
    assert len({text for _, _, text in rows}) == len(rows)
    return set(rows)


@pytest.fixture(scope="module")
def expected(sources, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "corpus"
    call(prepare_corpus, "--corpus", *sources, "--output_dir", out)
    found = documents(out)
    assert {(split, source) for split, source, _ in found} == {
        (split, source) for split in ("train", "eval") for source in "甲乙丙"
    }
    return found


def command(sources, output_dir, tasks, workers):
    return [
        sys.executable,
        str(ROOT / "scale/pipeline.py"),
        "--corpus",
        *sources,
        "--output_dir",
        str(output_dir),
        "--tasks",
        str(tasks),
        "--workers",
        str(workers),
    ]


def run_pipeline(*arguments):
    result = subprocess.run(
        command(*arguments), env=environment(), capture_output=True, text=True, encoding="utf-8", timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("tasks", [1, 2])
def test_same_documents_as_one_run(sources, expected, tmp_path, tasks):
    run_pipeline(sources, tmp_path, tasks, 1)
    assert documents(tmp_path / "corpus") == expected


def test_five_tasks_one_of_them_killed_and_rerun(sources, expected, tmp_path):
    """五个任务，做完一些之后整个进程组被 SIGKILL；再跑同一条命令，做完的不重做，结果一样。"""
    process = subprocess.Popen(
        command(sources, tmp_path, 5, 1),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    done = tmp_path / "logs/clean/completions"
    deadline = time.time() + 120
    while len(list(done.glob("*"))) < 2:
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in done.glob("*")}
    assert len(finished) >= 2 and not list(tmp_path.glob("corpus/*"))
    run_pipeline(sources, tmp_path, 5, 1)
    assert documents(tmp_path / "corpus") == expected
    assert {name: (done / name).stat().st_mtime_ns for name in finished} == finished


def test_other_settings_are_refused(sources, tmp_path):
    """换了语料或设置，旧任务不算数：一行说清，而不是悄悄沿用。"""
    run_pipeline(sources[2:], tmp_path, 1, 1)
    for changed, tasks in (([sources[0]], 1), (sources[2:], 2)):
        result = subprocess.run(
            command(changed, tmp_path, tasks, 1),
            env=environment(),
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert result.returncode == 1 and "换一个 --output_dir" in result.stderr
        assert "Traceback" not in result.stderr


def test_builtin_sources_are_refused_in_one_line(tmp_path):
    result = subprocess.run(
        command(["wiki"], tmp_path, 1, 1), env=environment(), capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 1 and "内置来源" in result.stderr
    assert "Traceback" not in result.stderr
