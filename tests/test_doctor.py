"""体检脚本：每一行说得对，坏的情况说得清。"""

import http.server
import importlib.metadata
import re
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, call, environment, error_of

import a100_train
import doctor

PAGES = {
    "/data": b'{"completion": "..."}' * 100_000,  # 2.1 MB
    "/login": b"<!DOCTYPE html><p>please log in",
}
MOVED = {"/moved": lambda: "http://localhost:{port}/data"}


@pytest.fixture
def server():
    """本机的小网站：/data 是数据，/login 是网页，/moved 转到另一个主机名下的数据，/slow 不应答，其余 404。"""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            port = self.server.server_port
            if self.path.startswith("/slow"):
                time.sleep(2)
            if self.path in MOVED:
                self.send_response(302)
                self.send_header("Location", MOVED[self.path]().format(port=port))
            elif self.path in PAGES:
                self.send_response(200)
            else:
                self.send_response(404)
            self.end_headers()
            self.wfile.write(PAGES.get(self.path, b""))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_presets_and_model_are_the_ones_that_are_trained(monkeypatch):
    for preset, values in doctor.PRESETS.items():
        monkeypatch.setattr(sys, "argv", ["a100_train.py", "--preset", preset])
        trained = a100_train.read_settings()
        for name in ("n_layer", "n_embd", "n_head", "block_size", "effective_batch_size"):
            assert values[name] == getattr(trained, name), (preset, name)
        assert values["vocab_size"] == a100_train.VOCAB_SIZE[preset]
        assert values["batch_size"] == min(48, trained.effective_batch_size)  # 显存够时的微批量
        assert values["steps"] == (trained.max_steps or 11_838)
    values = doctor.PRESETS["demo"]
    trained = a100_train.build_model(SimpleNamespace(**values, attn="sdpa", seed=0)).eval()
    model = doctor.new_model(values).eval()
    model.load_state_dict(trained.state_dict())
    tokens = torch.randint(4, 3000, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, trained(tokens)["logits"], atol=1e-5)
    parameters = trained.num_parameters()
    assert doctor.flops_per_token(parameters, values) == 6_033_408  # README 写着


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
    """太旧、没装：不行；比试过的更新、只为下载的没装：注意；别的平台的不看。"""
    found = {"torch": "2.4.0+cu121", "transformers": "6.0.1", "accelerate": "1.15.0", "bitsandbytes": "0.40"}

    def version(name):
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    path = tmp_path / "requirements.txt"
    path.write_text(
        "# 说明\n\ntorch>=2.6,<2.14   # 张量\ntransformers>=5.0,<6\naccelerate>=1.1,<2\npyarrow>=18\n"
        'datasets>=4\nbitsandbytes>=0.45; python_version > "3"\nfoo>=1; python_version < "3"\nsocksio>=1\n',
        encoding="utf-8",
    )
    lines = [line for line in doctor.examine_versions(path) if "有驱动" not in line[1]]
    assert [level for level, _ in lines] == ["不行", "注意", "不行", "不行", "不行", "注意", "正常"]
    assert "torch 2.4.0+cu121" in lines[0][1] and "accelerate 1.15.0" in lines[-1][1]
    assert "foo" not in str(lines)


def test_project_requirements():
    """真正的 requirements.txt 每一行都认得，这台机器上没有“不行”。"""
    lines = list(doctor.examine_versions(ROOT / "requirements.txt"))
    assert "不行" not in [level for level, _ in lines], lines


def test_network(server, monkeypatch):
    """下载成的说速度；转到别的主机的说出名字；打不开的、给网页的、不应答的，各说下一条路。"""
    monkeypatch.setattr(doctor, "HUB", f"{server}/data")
    monkeypatch.setattr(doctor, "MIRROR", f"{server}/moved")
    monkeypatch.setattr(doctor, "MODELSCOPE", f"{server}/login")
    hub, mirror, modelscope = doctor.examine_network(1)
    assert hub[0] == "正常" and re.search(r"网络 Hub：每秒 [\d.]+ MB", hub[1]) and "下一条路" not in hub[1]
    assert mirror[0] == "正常" and "转到 localhost 去下载" in mirror[1]
    assert (
        modelscope[0] == "注意" and "不是数据文件" in modelscope[1] and "--corpus wiki=文件" in modelscope[1]
    )
    monkeypatch.setattr(doctor, "HUB", "http://127.0.0.1:9")
    monkeypatch.setattr(doctor, "MIRROR", f"{server}/slow")
    monkeypatch.setattr(doctor, "MODELSCOPE", "hf-mirror.com/data")  # 忘了 https://
    hub, mirror, modelscope = doctor.examine_network(0.5)
    assert [level for level, _ in (hub, mirror, modelscope)] == ["注意"] * 3
    assert "export HF_ENDPOINT" in hub[1] and "0.5 秒里" in mirror[1] and "--source modelscope" in mirror[1]


def test_mirror_that_sends_back_to_the_hub(server, monkeypatch):
    """2026 年 8 月 hf-mirror 把数据集转回 Hub：下载成不成，都说出转到了哪里。"""
    addresses = []

    def resolve(host, *arguments, real=socket.getaddrinfo):
        addresses.append(host)
        return real("127.0.0.1" if host.endswith("hf.co") else host, *arguments)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    port = server.rpartition(":")[2]
    target = {"host": "cas-bridge.xethub.hf.co", "path": "data"}
    monkeypatch.setitem(MOVED, "/moved-to-hub", lambda: f"http://{target['host']}:{port}/{target['path']}")
    level, text = doctor.examine_source("镜像", f"{server}/moved-to-hub", "ModelScope", 1)
    assert level == "注意" and "转到 cas-bridge.xethub.hf.co" in text and "回到了 Hub" in text
    assert "每秒" in text and addresses[-1] == "cas-bridge.xethub.hf.co"
    target["host"] = "cas.invalid"
    level, text = doctor.examine_source("镜像", f"{server}/moved-to-hub", "ModelScope", 2)
    assert (
        level == "注意"
        and "没有下载成" in text
        and "转到 cas.invalid" in text
        and "下一条路：ModelScope" in text
    )


def test_address_is_not_printed(tmp_path):
    """HF_ENDPOINT 里的密码不打印。"""
    code = "import doctor; doctor.HUB = doctor.MODELSCOPE = 'http://127.0.0.1:9'; print(*doctor.examine_network(2))"
    variables = environment() | {"HF_ENDPOINT": "http://user:hf_secret@127.0.0.1:9/", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, encoding="utf-8")
    assert done.returncode == 0 and done.stdout.count("没有下载成") == 3, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr


def card(monkeypatch, name, capability, count=1, architectures=None):
    """假装插着 count 张这样的显卡；架构是 torch 2.13 的 CUDA 13.0 安装包里的。"""
    fields = namedtuple("Card", "name major minor total_memory")(name, *capability, 16 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: fields)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures or CU130)


CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("name", "capability", "architectures", "words"),
    [
        ("Tesla T4", (7, 5), CU130, "没有 bf16，用 fp16"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), CU130, "；bf16；torch 自带 FlashAttention"),
        ("NVIDIA GeForce RTX 4090", (8, 9), CU126, "；bf16；"),
        ("NVIDIA GB10", (12, 1), CU130, "；bf16；"),
        ("Tesla V100-SXM2-16GB", (7, 0), CU126, "没有 bf16，用 fp16"),
        ("Tesla V100-SXM2-16GB", (7, 0), CU130, "里没有它的代码；torch 2.11 起，只有 CUDA 12.6"),
        ("NVIDIA GeForce RTX 5090", (12, 0), CU126, "里没有它的代码；要 CUDA 12.8 或更新的"),
        ("NVIDIA GB10", (12, 1), CU126, "里没有它的代码；要 CUDA 12.8 或更新的"),
        ("Tesla P100-PCIE-16GB", (6, 0), CU130, "最好换一张"),
    ],
)
def test_cards(monkeypatch, name, capability, architectures, words):
    """模拟的显卡：能用的说怎么用，不能用的一行说装哪一种 torch，而且不去试跑。"""
    card(monkeypatch, name, capability, 2, architectures)
    monkeypatch.setattr(doctor, "compiler_is_complete", lambda: True)
    lines = list(doctor.examine_devices("full"))
    level, text = lines[0]
    assert words in text and "16 GB" in text and "\n" not in text
    assert "--nproc_per_node=2" in lines[-1][1]
    if "没有它的代码" in text:
        index = "cu126" if capability < (7, 5) else "cu130"
        assert level == doctor.BAD and f"https://download.pytorch.org/whl/{index}" in text
        assert list(doctor.examine_speed("full", 0)) == []
    else:
        assert level == doctor.OK


def test_architectures_as_torch_sees_them(monkeypatch):
    """哪些卡能跑哪些代码，与 torch 自己的表一样（Jetson 一类的板子除外：7.2、8.7、10.1 不与同代的显卡通用）。"""
    if not hasattr(torch.cuda, "_code_compatible_with_device"):
        pytest.skip("这个版本的 torch 没有这张表")
    cards = [
        (5, 0),
        (6, 0),
        (6, 1),
        (7, 0),
        (7, 5),
        (8, 0),
        (8, 6),
        (8, 9),
        (9, 0),
        (10, 0),
        (10, 3),
        (12, 0),
        (12, 1),
    ]
    for major, minor in cards:
        for code in (50, 60, 70, 75, 80, 86, 90, 100, 120):
            expected = torch.cuda._code_compatible_with_device(10 * major + minor, code)
            assert doctor.torch_has_code_for((major, minor), [f"sm_{code}"]) == expected, (major, minor, code)
    assert doctor.torch_has_code_for((13, 0), ["sm_90a", "compute_120"])  # 中间代码，更新的卡也行
    assert not doctor.torch_has_code_for((9, 0), ["sm_100", "compute_120"])
    assert not doctor.torch_has_code_for((8, 0), [])
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert doctor.torch_has_code_for((9, 0), ["gfx90a"])


@pytest.mark.parametrize("missing", ["nothing", "g++", "triton", "Python.h"])
def test_compiler(monkeypatch, tmp_path, missing):
    """缺一样就不用 torch.compile，也说怎么装。"""
    card(monkeypatch, "NVIDIA A100-SXM4-40GB", (8, 0))
    if missing != "Python.h":
        (tmp_path / "Python.h").write_text("", encoding="utf-8")
    monkeypatch.setattr(doctor.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if missing == name else f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if missing == name else 1)
    complete = missing == "nothing"
    assert doctor.compiler_is_complete() == complete
    level, text = doctor.examine_card(0)
    assert level == ("正常" if complete else "注意")
    assert ("torch.compile 可用" if complete else "apt-get install g++ python3-dev") in text
    if missing == "triton":  # 只有 CPU 时不要 Triton
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert doctor.compiler_is_complete()


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H20", 148),
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("Tesla V100-PCIE-16GB", 112),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", 147),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A10G", None),
        ("CPU", None),
    ],
)
def test_peak(monkeypatch, name, tflops):
    peak = doctor.peak_flops(name)
    assert peak == (tflops and tflops * 1e12)
    assert peak == a100_train.peak_flops(name), "两个脚本各有一份峰值的表，要一样"
    card(monkeypatch, name, (8, 0))
    text = doctor.share_of_peak(62.4e12, "cuda")
    assert (f"MFU {62.4 / tflops:.0%}" if tflops else "不知道") in text


def test_out_of_memory_halves_the_micro_batch(monkeypatch):
    real = doctor.training_step
    sizes = []

    def scarce(model, optimizer, tokens, dtype):
        sizes.append(len(tokens))
        if len(tokens) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, optimizer, tokens, dtype)

    monkeypatch.setattr(doctor, "training_step", scarce)
    values = doctor.PRESETS["demo"]
    model = doctor.new_model(values)
    batch_size, seconds, loss = doctor.measure(model, values, "cpu", torch.float32, 0.05)
    assert batch_size == 4 and [size for size in sizes if size > 1][:4] == [32, 16, 8, 4]
    assert seconds > 0 and 7 < loss < 9


@pytest.mark.parametrize("loss", [float("nan"), 99.0])
def test_wrong_loss(monkeypatch, loss):
    monkeypatch.setattr(doctor, "measure", lambda *_: (16, 0.1, loss))
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
