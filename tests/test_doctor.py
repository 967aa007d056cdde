"""体检脚本：每一行说得对，坏的情况说得清。"""

import http.server
import importlib.metadata
import re
import threading
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call, error_of

import a100_train
import doctor


@pytest.fixture
def server():
    """本机的小网站：数据集的文件有 5 MB，/slow 开头的不应答，其余 404。"""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/slow"):
                time.sleep(2)
            found = self.path.endswith(f"/resolve/main/{doctor.WIKI}.json")
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(bytes(5_000_000 if found else 0))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_presets_and_model_are_the_ones_that_are_trained():
    column = {"full": 3, "demo": -1}
    for preset, values in doctor.PRESETS.items():
        trained = {row[0]: row[column[preset]] for row in a100_train.SETTINGS}
        for name in (
            "vocab_size",
            "n_layer",
            "n_embd",
            "n_head",
            "block_size",
            "batch_size",
            "effective_batch_size",
        ):
            assert values[name] == trained[name], (preset, name)
    values = doctor.PRESETS["demo"]
    trained = a100_train.build_model(SimpleNamespace(**values, attn="sdpa", liger=False, seed=0))
    model = doctor.new_model(**values)
    model.load_state_dict(trained.state_dict())
    tokens = torch.randint(4, 3000, (4, 65), generator=torch.Generator().manual_seed(0))
    expected = trained(tokens[:, :-1], tokens[:, 1:])["loss"].item()
    assert doctor.micro_step(model, tokens, None)[1] == pytest.approx(expected, abs=1e-5)


def test_demo_run(tmp_path, capsys, monkeypatch):
    """每行一个级别；速度、时间、花费对得上；不留下任何文件；不打印 token。"""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(doctor.examine_speed, "__defaults__", (0.2,))
    call(doctor, "--preset", "demo", "--offline", "--work_dir", tmp_path / "work", "--price_per_hour", 3600)
    output = capsys.readouterr().out
    assert "hf_secret" not in output and all(
        re.match("(正常|注意|不行)  ", line) for line in output.splitlines()
    )
    assert list(tmp_path.iterdir()) == []
    speed = float(re.search(r"每秒 ([\d,]+) token", output)[1].replace(",", ""))
    cost = float(re.search(r"共 ([\d.]+) 元", output)[1])
    assert cost == pytest.approx(1350 * 2048 / speed, rel=0.01)  # 每小时 3600 元就是每秒 1 元
    assert "980,992 参数，微批量 32" in output


def test_full_without_gpu_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "examine_speed", lambda *_: iter([]))  # CPU 上全尺寸的一步要十来秒
    with pytest.raises(SystemExit) as stop:
        call(doctor, "--offline", "--work_dir", tmp_path)
    assert stop.value.code == 1 and "不行  没有 CUDA 显卡" in capsys.readouterr().out


def test_bad_price():
    assert "--price_per_hour" in error_of(doctor, "--price_per_hour", "-1")


def test_disk(tmp_path, monkeypatch):
    ((level, text),) = doctor.examine_disk(tmp_path / "a" / "b", 0.001)
    assert level == doctor.OK and not (tmp_path / "a").exists()
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1 << 30))
    ((level, text),) = doctor.examine_disk(tmp_path, 14)
    assert level == doctor.BAD and "剩 1.0 GB" in text and "--work_dir" in text
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert doctor.BAD in [level for level, _ in doctor.examine_disk(tmp_path / "file", 0)]


def test_versions(tmp_path, monkeypatch):
    """太旧、没装：不行；可选的或更新的：注意；别的平台的不看。"""
    found = {"torch": "2.4.0+cu121", "transformers": "6.0.1", "accelerate": "1.15.0", "bitsandbytes": "0.40"}

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# 说明\n\ntorch>=2.6,<2.14   # 张量\ntransformers>=5.0,<6\naccelerate>=1.1,<2\npyarrow>=18\n"
        'datasets>=4\nbitsandbytes>=0.45; python_version > "3"\nfoo>=1; python_version < "3"\n',
        encoding="utf-8",
    )
    lines = [line for line in doctor.examine_versions(path) if "有驱动" not in line[1]]
    assert [level for level, _ in lines] == ["不行", "注意", "不行", "注意", "注意", "正常"]
    assert "torch 2.4.0+cu121" in lines[0][1] and "accelerate 1.15.0" in lines[-1][1]
    assert "foo" not in str(lines)


def test_project_requirements():
    """真正的 requirements.txt 每一行都认得，这台机器上没有“不行”。"""
    lines = list(doctor.examine_versions(ROOT / "requirements.txt"))
    assert "不行" not in [level for level, _ in lines], lines
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert set(re.findall(r"^([\w-]+)[>=]", text, re.M)) >= doctor.REQUIRED


def test_network(server, monkeypatch):
    """用 HF_ENDPOINT 指的那个；网址里的密码不打印；不应答的有时限；提醒 Xet。"""
    monkeypatch.setattr(doctor, "HUB", "http://127.0.0.1:9")
    monkeypatch.setattr(doctor, "MIRROR", server)
    monkeypatch.setattr(doctor, "MODELSCOPE", f"{server}/slow")
    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server + "/")
    lines = list(doctor.examine_network(0.5))
    assert [level for level, _ in lines] == ["注意", "正常", "注意", "注意"]
    assert "HF_HUB_DISABLE_XET=1" in lines[-1][1]
    monkeypatch.setenv("HF_ENDPOINT", "http://user:hf_secret@127.0.0.1:9")
    lines = list(doctor.examine_network(0.5))
    assert "hf_secret" not in str(lines) and "export HF_ENDPOINT" in lines[2][1]


@pytest.mark.parametrize(
    ("name", "major", "minor", "words"),
    [
        ("Tesla T4", 7, 5, "没有 bf16，用 fp16"),
        ("NVIDIA A100-SXM4-40GB", 8, 0, "；bf16；torch 自带 FlashAttention"),
        ("Tesla K80", 3, 7, "太旧"),
    ],
)
def test_cards(monkeypatch, name, major, minor, words):
    card = namedtuple("Card", "name major minor total_memory")(name, major, minor, 16 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    lines = list(doctor.examine_devices("full"))
    assert words in lines[0][1] and "16 GB" in lines[0][1] and "--nproc_per_node=2" in lines[-1][1]


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


@pytest.mark.parametrize("loss", [float("nan"), 99.0])
def test_wrong_loss(monkeypatch, loss):
    monkeypatch.setattr(doctor, "measure", lambda *_: (16, 0.1, 0.1, loss))
    level, text = next(doctor.examine_speed("demo", 0, 0.1))
    assert level == "不行" and "先别训练" in text


def test_broken_gpu_is_one_line(monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA error: no kernel image is available\nmore\n")

    monkeypatch.setattr(doctor, "measure", broken)
    ((level, text),) = doctor.examine_speed("demo", 0, 0.1)
    assert level == "不行" and "no kernel image" in text and "\n" not in text


def test_memory_formula(capsys):
    """参数个数和优化器状态与实测一致：32 位比 8 位多 322 MiB；微批量多一倍，激活和 logits 也多一倍。"""
    parts = doctor.memory_needed(8, "adamw_torch_fused")
    assert parts["gradients"] == 4 * 82_066_944 and parts["weights"] == 6 * 82_066_944
    saved = parts["optimizer"] - doctor.memory_needed(8, "adamw_bnb_8bit")["optimizer"]
    assert saved / 2**20 == pytest.approx(322, rel=0.02)
    double = doctor.memory_needed(16)
    assert all(double[name] == 2 * parts[name] for name in ("activations", "logits"))
    call(doctor, "--memory_table")
    rows = re.findall(r"^ *(\d+) GB +(\d+)（.*?GB） +(\d+)（.*?GB） +(\d+)（", capsys.readouterr().out, re.M)
    assert [int(row[0]) for row in rows] == [8, 16, 24, 40, 80] and int(rows[3][1]) >= 48
    assert all(int(eight) >= int(muon) >= int(adamw) for _, eight, muon, adamw in rows)
