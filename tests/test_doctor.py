"""体检脚本：每一行说得对，坏的情况说得清，共用的定义一字不差。"""

import ast
import http.server
import importlib.metadata
import re
import shutil
import threading
import time
from collections import namedtuple

import pytest
import torch
from conftest import ROOT, call, run_script

import a100_train
import doctor

MODEL_KEYS = ("vocab_size", "n_layer", "n_embd", "n_head", "block_size")
DEMO = ("--preset", "demo", "--seconds", "0.3", "--offline")


def definitions(name):
    """脚本顶层的函数、类和常量：{名字: 源码}。"""
    source = (ROOT / name).read_text("utf-8")
    return {getattr(node, "name", None) or ast.unparse(node.targets[0]): ast.get_source_segment(source, node)
            for node in ast.parse(source).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign))}


def levels(lines):
    return [level for level, _ in lines]


@pytest.fixture
def requirements(tmp_path):
    def write(text):
        path = tmp_path / "requirements.txt"
        path.write_text(text, "utf-8")
        return path
    return write


@pytest.fixture
def server():
    """本机的小网站：/file 是 1 MB，/slow 不应答，其余 404。"""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/slow":
                time.sleep(1.5)
            found = self.path == "/file" or self.path.endswith(f"/resolve/main/{doctor.WIKI}.json")
            self.send_response(200 if found else int(self.path[1:]) if self.path[1:].isdigit() else 404)
            self.end_headers()
            if found:
                self.wfile.write(bytes(1 << 20))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


# ==== 共用的定义 ====

def test_shared_definitions_are_identical():
    mine, shared = definitions("doctor.py"), 0
    for script in sorted(path.name for path in ROOT.glob("*.py") if path.name != "doctor.py"):
        for name, source in definitions(script).items():
            if name in mine and name not in ("main", "PRESETS"):
                assert mine[name] == source, f"{name} 与 {script} 不一样"
                shared += 1
    assert {"PEAK_TFLOPS", "peak_flops", "flops_per_token", "run", "FONTS"} <= set(mine) and shared >= 12


def test_preset_agrees_with_training():
    for preset, values in a100_train.PRESETS.items():
        mine = doctor.PRESETS[preset]
        assert {key: mine[key] for key in mine.keys() & values.keys()} == {
            key: values[key] for key in mine.keys() & values.keys()}
        assert set(MODEL_KEYS) <= mine.keys() & values.keys()
    full = doctor.PRESETS["full"]
    assert full["steps"] * full["effective_batch_size"] * full["block_size"] == a100_train.REFERENCE_TOKENS
    assert doctor.PRESETS["demo"]["steps"] == a100_train.PRESETS["demo"]["max_steps"]


def test_model_is_the_one_that_is_trained():
    """同样的权重和输入，损失与 a100_train.py 的模型完全一样。"""
    values = doctor.PRESETS["demo"]
    trained = a100_train.build_model(*(values[key] for key in MODEL_KEYS), "sdpa", False, 0)
    model = doctor.new_model(**values)
    model.load_state_dict(trained.state_dict())
    tokens = torch.randint(4, 3000, (4, 65), generator=torch.Generator().manual_seed(0))
    expected = trained(input_ids=tokens[:, :-1], labels=tokens[:, 1:])["loss"]
    assert doctor.micro_step(model, tokens, None)[1] == pytest.approx(expected.item(), abs=1e-6)


def test_lines_and_functions_are_short():
    source = (ROOT / "doctor.py").read_text("utf-8")
    assert max(map(len, source.split("\n"))) <= 110
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 40, node.name


# ==== 整个运行 ====

def test_demo_run(tmp_path, capsys, monkeypatch):
    """每行一个级别；速度、时间、花费对得上；不留下任何文件；不打印 token。"""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder = tmp_path / "work"
    code = call(doctor, *DEMO, "--work-dir", folder, "--price_per_hour", 3600)
    output = capsys.readouterr().out
    assert code == 0 and "hf_secret" not in output
    assert all(re.match("(正常|注意|不行)  ", line) for line in output.splitlines())
    assert list(tmp_path.iterdir()) == []
    speed = float(re.search(r"每秒 ([\d,]+) token", output)[1].replace(",", ""))
    cost = float(re.search(r"共 ([\d.]+) 元", output)[1])
    demo = a100_train.PRESETS["demo"]
    tokens = demo["max_steps"] * demo["effective_batch_size"] * demo["block_size"]
    assert cost == pytest.approx(tokens / speed, rel=0.01)              # 每小时 3600 元就是每秒 1 元
    assert f"980,992 参数，微批量 {demo['batch_size']}" in output and "CPU" in output


def test_full_without_gpu_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "examine_speed", lambda *_: iter([]))      # CPU 上全尺寸的一步要十来秒
    assert call(doctor, "--offline", "--work_dir", tmp_path) == 1
    assert "不行  没有 CUDA 显卡" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [
    ["--preset", "big"], ["--seconds", "0"], ["--seconds", "soon"], ["--price_per_hour", "-1"], ["--speed"]])
def test_bad_arguments(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        call(doctor, *argv)
    output = capsys.readouterr()
    assert stop.value.code == 2 and output.out == "" and re.fullmatch("错误：.*\n", output.err)


def test_as_a_program():
    result = run_script("doctor.py", "--memory_table")
    assert result.returncode == 0 and result.stderr == "" and "按公式算，未测" in result.stdout
    result = run_script("doctor.py", "--preset", "big")
    assert result.returncode == 2 and "Traceback" not in result.stderr and result.stderr.count("\n") == 1


# ==== 各项检查 ====

def test_disk_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1 << 30))
    (level, text), = doctor.examine_disk(tmp_path / "a" / "b", {"语料": 2 << 30, "打包": 1 << 30})
    assert level == doctor.BAD and "剩 1.0 GB" in text and "= 3.00 GB" in text and "--work_dir" in text


def test_disk_needs_include_the_download(tmp_path, monkeypatch):
    """完整训练要下载数据，磁盘的账里有它；演示没有。"""
    for name in ("examine_devices", "examine_versions", "examine_host", "examine_speed"):
        monkeypatch.setattr(doctor, name, lambda *_: iter([]))
    (_, text), = doctor.examine("full", tmp_path / "work", 1, True, None)
    assert "下载 " in text and "检查点 2.75" in text
    assert "下载" not in str(list(doctor.examine("demo", tmp_path / "work", 1, True, None)))


def test_work_dir_is_a_file(tmp_path):
    (tmp_path / "work").write_text("")
    (level, text), = doctor.examine_disk(tmp_path / "work", {"语料": 1})
    assert level == doctor.BAD and "是文件" in text


def test_disk_not_writable(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    (level, text), = doctor.examine_disk(tmp_path, {"语料": 1})
    assert level == doctor.BAD and "写不进去" in text


def test_versions(requirements, monkeypatch):
    """太旧、没装：不行；可选的或更新的：注意；别的平台的不看。"""
    found = {"torch": "2.4.0+cu121", "transformers": "6.0.1", "accelerate": "1.15.0", "bitsandbytes": "0.40"}

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]
    monkeypatch.setattr(importlib.metadata, "version", version)
    path = requirements(
        "# 说明\n\ntorch>=2.5,<2.14   # 张量\ntransformers>=5.0,<6\naccelerate>=1.1,<2\npyarrow>=18\n"
        'datasets>=4\nbitsandbytes>=0.45; python_version > "3"\nfoo>=1; python_version < "3"\n')
    lines = [line for line in doctor.examine_versions(path) if "有驱动" not in line[1]]
    assert levels(lines) == ["不行", "注意", "不行", "注意", "注意", "正常"]
    assert "torch 2.4.0+cu121" in lines[0][1] and "更新的没试过" in lines[1][1] and "没有装" in lines[2][1]
    assert "accelerate 1.15.0" in lines[-1][1] and "foo" not in str(lines)


def test_versions_without_requirements(tmp_path, requirements):
    assert doctor.NOTE in levels(doctor.examine_versions(tmp_path / "requirements.txt"))
    assert doctor.NOTE in levels(doctor.examine_versions(requirements("torch >= 什么\n")))


def test_project_requirements_parse():
    """真正的 requirements.txt 每一行都认得，这台机器上没有“不行”。"""
    lines = list(doctor.examine_versions(ROOT / "requirements.txt"))
    assert f"torch {importlib.metadata.version('torch')}" in lines[-1][1]
    text = (ROOT / "requirements.txt").read_text("utf-8")
    assert doctor.REQUIRED <= set(re.findall(r"^([\w-]+)[>=]", text, re.M))


@pytest.mark.parametrize(("path", "level", "words"), [
    ("/file", "正常", "每秒"), ("/missing", "正常", "HTTP 404"), ("/503", "注意", "HTTP 503"), ("/slow", "注意", "")])
def test_reach(server, path, level, words):
    start = time.perf_counter()
    found, text = doctor.reach(server + path, 0.4)
    assert found == level and words in text and time.perf_counter() - start < 3


def test_unreachable():
    assert doctor.reach("http://127.0.0.1:9/", 1)[0] == doctor.NOTE          # 没有人在听
    assert doctor.reach("not a url", 1)[0] == doctor.NOTE


def test_network_with_endpoint(server, monkeypatch):
    """用 HF_ENDPOINT 指的那个；网址里的密码不打印；提醒 Xet。"""
    monkeypatch.setattr(doctor, "HUB", "http://127.0.0.1:9")
    monkeypatch.setattr(doctor, "MIRROR", server)
    monkeypatch.setattr(doctor, "MODELSCOPE", "http://127.0.0.1:9/modelscope")
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server + "/")
    lines = list(doctor.examine_network(1))
    assert levels(lines) == ["注意", "正常", "注意", "注意"] and "HF_HUB_DISABLE_XET=1" in lines[-1][1]
    monkeypatch.setenv("HF_ENDPOINT", "http://user:hf_secret@127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    lines = list(doctor.examine_network(1))
    assert "网络 127.0.0.1:9：连不上" in lines[2][1]
    assert len(lines) == 4 and "hf_secret" not in str(lines) and "export HF_ENDPOINT" in lines[2][1]


def fake_gpus(monkeypatch, *cards):
    """假装有这些显卡：(名字, 主版本, 次版本)。"""
    card = namedtuple("Card", "name major minor total_memory")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)       # T4 上靠模拟，也说 True
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card(*cards[i], 16 << 30))
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    backends = {"SDPAParams": lambda *_: None, "can_use_flash_attention": lambda _: cards[0][1] >= 8,
                "can_use_efficient_attention": lambda _: True, "can_use_cudnn_attention": lambda _: False}
    for name, function in backends.items():
        monkeypatch.setattr(torch.backends.cuda, name, function, raising=False)


def test_t4_twice(monkeypatch):
    fake_gpus(monkeypatch, ("Tesla T4", 7, 5), ("Tesla T4", 7, 5))
    lines = list(doctor.examine_devices("full"))
    assert "bf16 不可用" in lines[0][1] and "flash、" not in lines[0][1] and "efficient" in lines[0][1]
    assert lines[-1][0] == "注意" and "--nproc_per_node=2" in lines[-1][1] and "不行" not in levels(lines)


def test_a100(monkeypatch):
    fake_gpus(monkeypatch, ("NVIDIA A100-SXM4-40GB", 8, 0))
    (_, text), = doctor.examine_devices("full")
    assert "bf16 可用" in text and "flash、efficient" in text and "16 GB" in text


def test_driver_without_cuda(monkeypatch, requirements):
    """有驱动而 torch 用不了显卡（装成了 CPU 版）：不行。"""
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: namedtuple("Result", "stdout")("550.54\n"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    level, text = next(doctor.examine_versions(requirements("")))
    assert level == "不行" and "550.54" in text and "pytorch.org" in text


def test_platform_hints(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "AUTODL", tmp_path)
    monkeypatch.setattr(doctor, "KAGGLE", tmp_path)
    monkeypatch.setattr(doctor, "FONTS", ["没有这个字体"])
    _, font, autodl, kaggle = doctor.examine_host(tmp_path.parent / "elsewhere", 1)
    assert font[0] == "注意" and "fonts-wqy" in font[1]
    assert autodl[0] == "注意" and "--work_dir" in autodl[1] and "--max_hours 11" in kaggle[1]
    assert list(doctor.examine_host(tmp_path / "work", 1))[2][0] == "正常"
    assert next(doctor.examine_host(tmp_path, 10**6))[0] == "注意"


def test_out_of_memory_halves_the_micro_batch(monkeypatch):
    real, sizes = doctor.micro_step, []

    def scarce(model, tokens, dtype):
        sizes.append(len(tokens))
        if len(tokens) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, tokens, dtype)
    monkeypatch.setattr(doctor, "micro_step", scarce)
    values = doctor.PRESETS["demo"]
    batch_size, micro, update, loss = doctor.measure(doctor.new_model(**values), values, "cpu", None, 0.05)
    assert batch_size == 4 and [size for size in sizes if size > 1][:4] == [32, 16, 8, 4]
    assert micro > 0 and update > 0 and 7 < loss < 9


def test_slow_cpu_uses_micro_batch_1(monkeypatch):
    real, values = doctor.micro_step, doctor.PRESETS["demo"]
    monkeypatch.setattr(doctor, "micro_step", lambda *a: (10.0, real(*a)[1]))
    assert doctor.measure(doctor.new_model(**values), values, "cpu", None, 0.1)[:2] == (1, 10.0)


@pytest.mark.parametrize(("loss", "words"), [(float("nan"), "先别训练"), (99.0, "先别训练")])
def test_wrong_loss(monkeypatch, loss, words):
    monkeypatch.setattr(doctor, "measure", lambda *_: (16, 0.1, 0.1, loss))
    level, text = next(doctor.examine_speed("demo", 0.1, None))
    assert level == "不行" and words in text


def test_broken_gpu_is_one_line(monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: no kernel image is available\nmore\n")
    monkeypatch.setattr(doctor, "measure", fail)
    (level, text), = doctor.examine_speed("demo", 0.1, None)
    assert level == "不行" and "no kernel image" in text and "\n" not in text


def test_memory_formula():
    """参数个数和优化器状态与实测一致：32 位比 8 位多 322 MiB（FACTS）；微批量多一倍，激活也多一倍。"""
    assert doctor.memory_needed(0, False) - 2**30 == 18 * 82_066_944
    saved = doctor.memory_needed(8, False) - doctor.memory_needed(8, True)
    assert saved / 2**20 == pytest.approx(322, rel=0.02)
    first, second, fourth = (doctor.memory_needed(b, True) for b in (1, 2, 4))
    assert fourth - second == 2 * (second - first)


def test_memory_table(capsys):
    assert not call(doctor, "--memory_table")
    rows = re.findall(r"^ *(\d+) GB +(\d+)（.*?GB） +(\d+)（", capsys.readouterr().out, re.M)
    assert [int(row[0]) for row in rows] == [8, 16, 24, 40, 80]
    assert int(rows[3][1]) >= 48 and all(int(row[1]) >= int(row[2]) for row in rows)
