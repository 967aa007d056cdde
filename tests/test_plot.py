"""plot_loss.py：各种输入，有没有中文字体，参考线和参考带。字形缺失（方框）一律当错误。"""

import json
import math
import subprocess
import sys
import warnings

import matplotlib
import numpy as np
import pytest
from conftest import ROOT, call, environment, error_of
from matplotlib import font_manager, image

import plot_loss

CONFIG = {
    "vocab_size": 3000,
    "unigram_entropy": 6.4,
    "steps_per_epoch": 40.0,
    "effective_batch_size": 32,
    "block_size": 64,
    "logging_steps": 5,
}


@pytest.fixture(autouse=True)
def clean_matplotlib():
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Gg]lyph.*missing.*")
        yield


@pytest.fixture
def no_chinese_font(monkeypatch):
    """一台没有中文字体的机器：matplotlib 认识的、系统里能找到的都没有。"""
    latin = [font for font in font_manager.fontManager.ttflist if font.name.startswith("DejaVu")]
    assert latin
    monkeypatch.setattr(font_manager.fontManager, "ttflist", latin)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda *args, **kwargs: [])


@pytest.fixture
def chinese_font():
    if plot_loss.use_chinese_font() != "zh":
        pytest.skip("这台机器没有中文字体（apt-get install fonts-wqy-microhei）")


def make_run(folder, factor=1.3, start=8.0, config=CONFIG):
    rows = []
    for step in range(0, 101, 5):
        loss = start * math.exp(-step / 200) + 0.1 * math.sin(step)
        rows += [{"step": step, "loss": loss, "learning_rate": 1e-3}] if step else []
        if step % 25 == 0:
            rows += [{"step": step, "eval_loss": loss, "eval_bits_per_char": loss * factor}]
    folder.mkdir(parents=True)
    (folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def check_png(path):
    picture = image.imread(path)  # 坏的 PNG 会抛异常
    assert picture.shape[:2] == (780, 1300) and picture.std() > 0.01


@pytest.mark.parametrize("name", ["", "train_log.jsonl"])
def test_folder_or_log(tmp_path, name):
    run = make_run(tmp_path / "run")
    call(plot_loss, run / name, "--output", tmp_path / "new" / "curve.png")
    check_png(tmp_path / "new" / "curve.png")
    data = plot_loss.read_run(run / name)
    assert data["train"][0].tolist() == list(range(5, 101, 5))
    assert data["eval"][0].tolist() == [0, 25, 50, 75, 100]
    assert data["factor"] == pytest.approx(1.3)


@pytest.mark.parametrize("half", [b"", b'{"step": 110, "loss": 5.', b'{"step": 110, "text": "\xe4\xb8', b"{"])
def test_unfinished_line_and_nan_are_left_out(tmp_path, half):
    """训练还在写：末行只有一半，连字也只有一半。"""
    run = make_run(tmp_path / "run")
    with open(run / "train_log.jsonl", "ab") as file:
        file.write(b'{"step": 105, "loss": NaN}\n' + half)
    assert plot_loss.read_run(run)["train"][0][-1] == 100
    call(plot_loss, run, "--output", tmp_path / "curve.png")
    check_png(tmp_path / "curve.png")


def test_three_lines_without_config(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 8.0}\n' * 3, encoding="utf-8")
    call(plot_loss, tmp_path / "log.jsonl", "--output", tmp_path / "curve.png")
    check_png(tmp_path / "curve.png")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("不是日志\n", "不是训练日志"),
        ('{"step": "一", "loss": 1}\n', "不是训练日志"),
        ("[1]\n", "不是训练日志"),
        ('{"step": 1, "loss": "高"}\n', "不是训练日志"),
        ("", "还没有一个能画的"),
        ('{"step": 1, "loss": NaN}\n', "还没有一个能画的"),
    ],
)
def test_rubbish_keeps_the_old_picture(tmp_path, text, words):
    (tmp_path / "curve.png").write_bytes(b"old")
    (tmp_path / "log.jsonl").write_text(text, encoding="utf-8")
    assert words in error_of(plot_loss, tmp_path / "log.jsonl", "--output", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes() == b"old"


def test_only_the_first_evaluation_yet(tmp_path):
    """训练刚开始：只有第 0 步的验证，还没有一行训练损失。"""
    run = make_run(tmp_path / "run")
    (run / "train_log.jsonl").write_text('{"step": 0, "eval_loss": 8.0}\n', encoding="utf-8")
    call(plot_loss, run, "--output", tmp_path / "curve.png")
    check_png(tmp_path / "curve.png")


@pytest.mark.parametrize("config", ["", "{", "[1]", "{}", '{"vocab_size": 3000}', '{"vocab_size": null}'])
def test_config_without_what_is_needed(tmp_path, config):
    """config.json 里缺什么，就少画什么。"""
    run = make_run(tmp_path / "run")
    (run / "config.json").write_text(config, encoding="utf-8")
    call(plot_loss, run, "--output", tmp_path / "curve.png")
    check_png(tmp_path / "curve.png")


def test_what_the_terminal_says(tmp_path, capsys):
    call(plot_loss, make_run(tmp_path / "run"), "--output", tmp_path / "curve.png")
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["", "第 4 步，共 4 步：画损失曲线"] and len(said) == 4
    assert said[3].startswith(f"写好 {tmp_path / 'curve.png'}")


def test_nothing_and_a_folder_as_output(tmp_path):
    assert "找不到日志" in error_of(plot_loss, tmp_path / "nothing", "--output", tmp_path / "curve.png")
    assert "是文件夹" in error_of(plot_loss, make_run(tmp_path / "run"), "--output", tmp_path)


def test_as_a_program(tmp_path):
    """输出写不进去是一行；我们自己打开的文件都写明了编码（中文 Windows 默认 GBK）。"""
    run = make_run(tmp_path / "run")
    command = [sys.executable, ROOT / "plot_loss.py", run, "--output"]
    pipes = dict(capture_output=True, text=True, encoding="utf-8", timeout=100)
    bad = subprocess.run([*command, run / "train_log.jsonl" / "x.png"], env=environment(), **pipes)
    assert bad.returncode == 1 and bad.stderr.startswith("错误：") and bad.stderr.count("\n") == 1
    good = subprocess.run(
        [*command, tmp_path / "x.png"], **pipes, env=environment() | {"PYTHONWARNDEFAULTENCODING": "1"}
    )
    assert good.returncode == 0 and f"{ROOT / 'plot_loss.py'}" not in good.stderr, good.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "x.png"]  # 没有留下临时文件


# ==== 字体 ====


def test_without_a_chinese_font_labels_are_english(tmp_path, no_chinese_font):
    runs = [make_run(tmp_path / name) for name in ("实验一", "run-2")]
    assert plot_loss.use_chinese_font() == "en"
    call(plot_loss, *runs, "--output", tmp_path / "curve.png")
    check_png(tmp_path / "curve.png")
    assert "中文字体" in error_of(plot_loss, runs[0], "--language", "zh", "--output", tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


@pytest.mark.parametrize("language", ["zh", "en"])
def test_both_languages_with_a_chinese_font(tmp_path, chinese_font, language):
    runs = [make_run(tmp_path / name) for name in ("实验一", "run-2")]
    call(plot_loss, *runs, "--language", language, "--output", tmp_path / "curve.png")
    check_png(tmp_path / "curve.png")


def test_font_installed_after_matplotlib_looked(chinese_font, monkeypatch):
    latin = [font for font in font_manager.fontManager.ttflist if font.name.startswith("DejaVu")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", latin)
    assert plot_loss.use_chinese_font() == "zh"


def test_fonts_in_closed_or_broken_files(tmp_path, chinese_font, monkeypatch):
    """字体在关着的文件夹里（测试多半是 root，所以假装），或者坏了：看下一个，一个也没有就用英文。"""
    listed = font_manager.fontManager.ttflist
    closed = {font.fname for font in listed if plot_loss.re.search(plot_loss.FONTS, font.name)}
    assert closed
    real_access = plot_loss.os.access
    monkeypatch.setattr(
        plot_loss.os, "access", lambda path, mode: path not in closed and real_access(path, mode)
    )
    broken = tmp_path / "NotoSansCJK-broken.ttc"
    broken.write_bytes(b"no font")
    monkeypatch.setattr(
        font_manager, "findSystemFonts", lambda: [str(broken), str(tmp_path / "closed/SimHei.ttf")]
    )
    assert plot_loss.use_chinese_font() == "en"
    call(plot_loss, make_run(tmp_path / "run"), "--output", tmp_path / "curve.png")
    check_png(tmp_path / "curve.png")


# ==== 图里有什么 ====


def test_lines_hold_the_data(tmp_path):
    """浅色是原始值、圆点是验证集，一个点也不少；ln V、词频的熵、每一遍的边界；右边的轴是每字比特。"""
    run = plot_loss.read_run(make_run(tmp_path / "run"))
    axes = plot_loss.draw([run], "en").axes[0]
    lines = axes.get_lines()
    assert list(lines[0].get_ydata()) == list(run["train"][1]) and lines[0].get_alpha() < 0.5
    points = next(line for line in lines if line.get_marker() == "o")
    assert list(points.get_ydata()) == list(run["eval"][1])
    flat = [line.get_ydata()[0] for line in lines if list(line.get_xdata()) == [0, 1]]
    assert flat == pytest.approx([math.log(3000), 6.4])
    assert [line.get_xdata()[0] for line in lines if list(line.get_ydata()) == [0, 1]] == [40.0, 80.0]
    axes.figure.draw_without_rendering()  # 右边的轴画的时候才定
    low, high = axes.get_ylim()
    assert low < 6.4 < math.log(3000) < high
    assert axes.child_axes[0].get_ylim() == pytest.approx((low * 1.3, high * 1.3))


def test_different_tokenizers_are_compared_in_bits(tmp_path):
    runs = [
        plot_loss.read_run(make_run(tmp_path / name, factor)) for name, factor in (("a", 1.3), ("b", 0.9))
    ]
    axes = plot_loss.draw(runs, "en").axes[0]
    assert axes.get_ylabel() == plot_loss.LABELS["en"]["bits"]
    points = [line for line in axes.get_lines() if line.get_marker() == "o"]
    for line, run, factor in zip(points, runs, (1.3, 0.9), strict=True):
        assert list(line.get_ydata()) == pytest.approx(list(run["eval"][1] * factor))


def test_reference_band_only_for_the_same_settings(tmp_path, monkeypatch):
    curve = {
        "settings": {"vocab_size": 3000, "logging_steps": 5},
        "corpus": {"train_tokens": 1000},
        "tokens": [0, 100 * 2048],
        "loss": [8, 5],
        "spread": [0.1, 0.1],
    }
    (tmp_path / "reference.json").write_text(json.dumps([curve]), encoding="utf-8")
    monkeypatch.setattr(plot_loss, "REFERENCE", tmp_path / "reference.json")
    for name, config, bands in (("same", {"train_tokens": 1005}, 1), ("other", {"train_tokens": 1100}, 0)):
        run = plot_loss.read_run(make_run(tmp_path / name, config=CONFIG | config))
        found = plot_loss.draw([run], "en").axes[0].collections
        assert len(found) == bands
        for band in found:
            assert band.get_datalim(band.axes.transData).x1 == pytest.approx(100)  # token 换成了步


def test_smooth_does_not_lag():
    """直线平滑后还是那条直线（不落后）；起伏变小；长度不变。"""
    line = np.linspace(8, 5, 200)
    assert plot_loss.smooth(line) == pytest.approx(line)
    assert np.abs(plot_loss.smooth(np.arange(200) % 2)[50:150] - 0.5).max() < 0.1


def test_smooth_window():
    """中间的窗口正好是前后各四十分之一：一个尖峰摊成 2 × 10 + 1 个点。宽一倍、窄一半都不行。"""
    spike = np.zeros(400)
    spike[200] = 21
    expected = np.zeros(400)
    expected[190:211] = 1
    assert plot_loss.smooth(spike) == pytest.approx(expected)


def test_smooth_at_the_ends():
    """开头前后至多各四分之一，末尾不超出：第一个和最后一个点原样，第 20 个点前后各 5 个。"""
    falling = 8 / (1 + np.arange(400))
    smoothed = plot_loss.smooth(falling)
    assert smoothed[[0, -1]] == pytest.approx(falling[[0, -1]])
    assert smoothed[20] == pytest.approx(falling[15:26].mean())
    assert smoothed[-4] == pytest.approx(falling[-7:].mean())


def test_both_languages_have_the_same_labels():
    assert set(plot_loss.LABELS["zh"]) == set(plot_loss.LABELS["en"])
    assert all(label.isascii() for label in plot_loss.LABELS["en"].values())
