"""publish.py：对着本机上一个会出错的小 Hub（fake_hub.py）；模型卡里的数与记录一致。"""

import json
import os
import re
import subprocess
import sys
import threading

import pytest
import tiny_run
from conftest import ROOT, call, error_of
from fake_hub import TOKEN, FakeHub

import publish


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    return tiny_run.make(tmp_path_factory.mktemp("publish") / "gpt2-chinese")


@pytest.fixture
def hub():
    made = FakeHub()
    yield made
    made.server.shutdown()
    made.server.server_close()


def run(hub, work, *argv, token=TOKEN):
    """在子进程里跑：HF_ENDPOINT 要在 import 之前设好。"""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(work.parent / "no-login"),
    }
    environment.pop("HF_TOKEN", None)
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, ROOT / "publish.py", "--work_dir", work, *argv]
    done = subprocess.run(command, env=environment, timeout=120, capture_output=True, encoding="utf-8")
    assert TOKEN not in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr
    return done


def test_model_is_private_and_complete(hub, work):
    done = run(hub, work, "--repo", "demo")
    assert done.returncode == 0, done.stderr
    repo = hub.repo("me/demo")
    assert repo["private"] and repo["commits"] == 1
    assert "run_config.json" not in repo["files"] and "report.json" not in repo["files"]  # 里面有本机的路径
    assert {
        "model.safetensors",
        "tokenizer.json",
        "config.json",
        "train_log.jsonl",
        "README.md",
        "snapshots/step-100/model.safetensors",
        "snapshots/step-0/snapshot.json",
    } <= set(repo["files"])
    weights = (work / "final_model" / "model.safetensors").read_bytes()
    assert hub.content("me/demo", "model.safetensors") == weights
    assert b'"me/demo"' in hub.content("me/demo", "README.md")


def test_rerun_sends_nothing_twice(hub, work):
    run(hub, work, "--repo", "me/demo")
    uploads = hub.sent("PUT /lfs")
    assert uploads == 5 and run(hub, work, "--repo", "me/demo").returncode == 0
    assert hub.sent("PUT /lfs") == uploads and hub.repo("me/demo")["commits"] == 1


def test_all_three(hub, work):
    done = run(hub, work, "--repo", "me/all", "--what", "model,dataset,space", "--public")
    assert done.returncode == 0, done.stderr
    assert not any(hub.repo("me/all", kind)["private"] for kind in ("model", "dataset", "space"))
    dataset = hub.repo("me/all", "dataset")
    assert set(dataset["files"]) == {"train-00000.parquet", "eval-00000.parquet", "README.md"}
    card = publish.collect("dataset", work, "me/all")["README.md"].decode()
    assert "| news | 95 | 9,500 | 5 |" in card and "许可" in card
    space = hub.repo("me/all", "space")
    assert space["sdk"] == "gradio" and space["variables"] == {"MODEL_ID": "me/all"}
    assert set(space["files"]) == {"app.py", "requirements.txt", "README.md"}


@pytest.mark.parametrize(
    "existing_private, argv, word", [(False, [], "公开的"), (True, ["--public"], "私有的")]
)
def test_visibility_is_never_changed(hub, work, existing_private, argv, word):
    hub.repos["models/me/demo"] = {"private": existing_private, "files": {}, "commits": 0, "variables": {}}
    done = run(hub, work, "--repo", "me/demo", *argv)
    assert done.returncode == 1 and re.search(f"错误：.*已经有了，是{word}", done.stderr)
    assert hub.repo("me/demo")["private"] == existing_private and hub.repo("me/demo")["commits"] == 0


@pytest.mark.parametrize(
    "faults",
    [
        [("preupload", 429), ("batch", "drop")],
        [("PUT /lfs", 503), ("PUT /lfs", "drop")],
    ],
)
def test_faults_while_uploading_are_survived(hub, work, faults):
    """文件传到一半忙、断线：huggingface_hub 自己等一会儿再传，只有一次提交。"""
    hub.faults += faults
    done = run(hub, work, "--repo", "demo")
    assert done.returncode == 0 and not hub.faults, done.stderr
    assert hub.repo("me/demo")["private"] and hub.repo("me/demo")["commits"] == 1
    assert hub.sent("PUT /lfs") == 5 + sum("PUT" in place for place, _ in faults)


@pytest.mark.parametrize(
    "fault",
    [
        ("whoami", 503),
        ("repos/create", 503),
        ("repos/create", "drop"),
        ("GET /api/models", 429),
        ("commit", 503),
    ],
)
def test_other_faults_stop_in_one_line(hub, work, fault):
    """别的步骤忙、断线：一句话停下；再跑就接着，最后什么都在，没有一个文件多传一遍。"""
    hub.faults.append(fault)
    done = run(hub, work, "--repo", "demo")
    last = done.stderr.strip().splitlines()[-1]  # 前面可能有 huggingface_hub 的进度条
    assert done.returncode == 1 and last.startswith("错误：上传没有完成") and "接着传" in last
    assert run(hub, work, "--repo", "demo").returncode == 0
    assert hub.repo("me/demo")["private"] and hub.repo("me/demo")["commits"] == 1
    assert hub.sent("PUT /lfs") == 5


def test_bad_name(hub, work):
    done = run(hub, work, "--repo", "我的模型")
    assert done.returncode == 1 and "错误：--repo 是 我的模型；只能用英文字母" in done.stderr
    assert not hub.repos


def test_private_space_needs_a_secret(hub, work, tmp_path):
    """模型和网页都私有：印出令牌在哪里建、填到哪里；照做以后，Space 里的程序读得到模型。"""
    done = run(hub, work, "--repo", "demo", "--what", "model,space")
    assert done.returncode == 0, done.stderr
    steps = done.stdout.partition("模型是私有的")[2]
    for words in (f"{hub.url}/settings/tokens", f"{hub.url}/spaces/me/demo/settings", "HF_TOKEN", "Read"):
        assert words in steps
    assert "模型是私有的" not in run(hub, work, "--repo", "open", "--what", "model,space", "--public").stdout
    (tmp_path / "app.py").write_bytes(hub.content("me/demo", "app.py", "space"))
    variables = hub.repo("me/demo", "space")["variables"]
    variables["HF_TOKEN"] = TOKEN  # 没有令牌，这个 Hub 什么都不给
    shown = start_space(tmp_path, variables | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"})
    assert re.search(r"http://127\.0\.0\.1:\d+", shown), shown


def start_space(folder, variables):
    """像 Space 那样运行 app.py；返回它印的话，直到印出网址，或者自己停下。"""
    settings = {"HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1", "GRADIO_ANALYTICS_ENABLED": "0"}
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=folder,
        env=os.environ | settings | variables | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
    )
    timer = threading.Timer(120, process.kill)
    timer.start()
    shown = ""
    for line in process.stdout:
        shown += line
        if "127.0.0.1:" in line and "http" in line and "错误" not in line:
            break
    timer.cancel()
    process.kill()
    process.wait()
    return shown


def test_rerun_continues(hub, work):
    """一直不行就停下，说一句话；下次只传还没有的。"""
    hub.faults += [("commit", 503)] * 40
    done = run(hub, work, "--repo", "demo")
    assert done.returncode == 1 and "错误：上传没有完成" in done.stderr and "接着传" in done.stderr
    hub.faults.clear()
    assert hub.sent("PUT /lfs") == 5 and hub.repo("me/demo")["commits"] == 0
    assert run(hub, work, "--repo", "demo").returncode == 0
    assert hub.sent("PUT /lfs") == 5 and hub.repo("me/demo")["commits"] == 1


@pytest.mark.parametrize("token, word", [("hf_wrong", "检查令牌"), (None, "没有令牌")])
def test_token(hub, work, token, word):
    done = run(hub, work, "--repo", "demo", token=token)
    assert done.returncode == 1 and word in done.stderr and "hf_wrong" not in done.stderr
    assert not hub.repos


def test_mirror_gets_no_token(work, monkeypatch):
    monkeypatch.setattr(publish.constants, "ENDPOINT", "https://hf-mirror.com")
    assert "令牌不能交给镜像" in error_of(publish, "--repo", "demo", "--work_dir", work)


def test_dry_run_needs_nothing(work, capsys, monkeypatch):
    monkeypatch.setattr(publish, "get_token", lambda: pytest.fail("要了令牌"))
    call(publish, "--repo", "demo", "--work_dir", work, "--dry_run", "--what", "model,dataset,space")
    shown = capsys.readouterr().out
    assert (
        "model demo（私有）" in shown
        and "snapshots/step-200/model.safetensors" in shown
        and "app.py" in shown
    )
    size = (work / "final_model" / "model.safetensors").stat().st_size
    assert f"{size:,}  model.safetensors" in shown and "# 中文 GPT-2（演示）" in shown


@pytest.mark.parametrize("argv", [["--what", "modle"], ["--work_dir", "nowhere"], ["--what", "model,"]])
def test_nothing_to_send(work, argv, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert re.search(
        "没有文件可传|不认识", error_of(publish, "--repo", "demo", "--work_dir", work, "--dry_run", *argv)
    )


def test_card_holds_the_figures(work):
    card = publish.model_card(work, "me/demo")
    assert "（演示）" in card and "| 参数 | 49,000 |" in card and "| torch 的版本 | 2.13.0 |" in card
    assert "| 训练用时 | 0.03 小时 |" in card  # 200 步 × 0.5 秒
    assert "| news | 95 | 9,500 | 5 |" in card and "平均每个词块 1.29 字" in card
    assert (
        "| 第 200 步 |" in card and "| 全部 | 2.500 | 2.800 |" in card and "| news | 2.400 | 2.700 |" in card
    )
    assert "    中国的历史，第 200 步写的 <b>一段</b>| 话。" in card and "第 0 步写的" not in card


def test_card_of_a_full_run(work, tmp_path):
    """不是演示就不说演示；没有记录的不写。"""
    tiny_run.write_json(tmp_path / "config.json", {"preset": "full", "n_layer": 8, "parameters": 82_066_944})
    card = publish.model_card(tmp_path, "me/full")
    assert (
        "演示" not in card and "| 参数 | 82,066,944 |" in card and "硬件" not in card and "None" not in card
    )
    assert "（未记）" in card


def test_card_snippet_runs(work, tmp_path, capsys):
    """模型卡里加载模型的代码，把仓库名换成文件夹，原样运行。"""
    block = re.search(r"```python\n(.*?)```", publish.model_card(work, str(work / "final_model")), re.S)[1]
    exec(compile(block, "card", "exec"), {})
    assert capsys.readouterr().out.startswith("中国的历史")


def test_tables_of_a_real_run(finished):
    """真的训练出来的 report.json、config.json 里，表格要的都在。"""
    config = json.loads((finished / "config.json").read_text("utf-8"))
    assert publish.FIELDS.keys() <= config.keys() and config["device_name"]
    sources = json.loads((finished / "corpus/report.json").read_text("utf-8"))["sources"]
    table = publish.corpus_table(finished)
    assert len(sources) == 2 and all(
        f"{count[key]:,}" in table for count in sources.values() for key in ("train_documents", "characters")
    )
