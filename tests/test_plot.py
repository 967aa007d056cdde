"""plot_loss.py：各种输入，有没有中文字体，参考线。字形缺失（方框）一律当错误。"""

import json
import math
import struct
import warnings
import zlib

import matplotlib.pyplot as plt
import pytest
from conftest import call, error_of
from matplotlib import font_manager

import plot_loss

CONFIG = {"vocab_size": 3000, "unigram_entropy": 6.4, "steps_per_epoch": 40.0}


@pytest.fixture(autouse=True)
def clean_matplotlib():
    """字体设置用完还原；缺字形的警告当错误。"""
    with plt.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Gg]lyph.*missing.*")
        yield
    plt.close("all")


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


def log_rows(steps=100, factor=1.3, start=8.0):
    rows = []
    for step in range(0, steps + 1, 5):
        loss = start * math.exp(-step / 200) + 0.1 * math.sin(step)
        if step:
            rows.append(
                {"step": step, "epoch": step / 40, "loss": loss, "learning_rate": 1e-3, "grad_norm": 1.0}
            )
        if step % 25 == 0:
            rows.append({"step": step, "eval_loss": loss, "eval_bits_per_char": loss * factor})
    return rows


def make_run(folder, **kwargs):
    folder.mkdir(parents=True)
    (folder / "train_log.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in log_rows(**kwargs)), "utf-8"
    )
    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    return folder


def decode_png(path):
    """不靠 matplotlib，直接解 PNG：返回 (宽, 高, 不同字节值的个数)。坏的 PNG 会抛异常。"""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    position, pixels, size = 8, b"", None
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position:position + 8])
        body = data[position + 8:position + 8 + length]
        assert struct.unpack(">I", data[position + 8 + length : position + 12 + length])[0] == zlib.crc32(
            kind + body
        )
        size = struct.unpack(">II", body[:8]) if kind == b"IHDR" else size
        pixels += body if kind == b"IDAT" else b""
        position += 12 + length
    return (*size, len(set(zlib.decompress(pixels))))


def check_png(path):
    width, height, values = decode_png(path)
    assert width > 600 and height > 400 and values > 50
    assert path.stat().st_size > 20_000


def captured_figure(monkeypatch, runs, language):
    """画一次但不关图，返回 Figure，好看里面有什么。"""
    monkeypatch.setattr(plt, "close", lambda *args: None)
    figures = set(plt.get_fignums())
    plot_loss.draw(runs, runs[0]["output"], language)
    number = (set(plt.get_fignums()) - figures).pop()
    return plt.figure(number)


def texts_of(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


# ==== 输入 ====

@pytest.mark.parametrize("kind", ["folder", "log", "trainer_state", "trainer_folder"])
def test_inputs(tmp_path, kind):
    run = make_run(tmp_path / "run")
    state = tmp_path / "hf" / "trainer_state.json"
    state.parent.mkdir()
    state.write_text(json.dumps({"global_step": 100, "log_history": log_rows()}), "utf-8")
    path = {
        "folder": run,
        "log": run / "train_log.jsonl",
        "trainer_state": state,
        "trainer_folder": state.parent,
    }[kind]
    call(plot_loss, path, "--output", tmp_path / "out" / "curve.png")
    check_png(tmp_path / "out" / "curve.png")
    data = plot_loss.read_run(path)
    assert [step for step, _ in data["train"]] == list(range(5, 101, 5))
    assert [step for step, *_ in data["eval"]] == [0, 25, 50, 75, 100]


def test_several_runs(tmp_path):
    runs = [make_run(tmp_path / name, start=start) for name, start in (("a", 8.0), ("b", 7.0), ("c", 6.0))]
    call(plot_loss, *runs, "--output", tmp_path / "curve.png")
    check_png(tmp_path / "curve.png")


def test_incomplete_last_line(tmp_path):
    """训练正写到一半：最后半行丢掉，其余照画。"""
    run = make_run(tmp_path / "run")
    with open(run / "train_log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 105, "loss": 5.')
    assert plot_loss.read_run(run)["train"][-1][0] == 100
    call(plot_loss, run, "--output", tmp_path / "curve.png")
    check_png(tmp_path / "curve.png")


def test_log_without_config_or_evaluation(tmp_path):
    """只有几行训练损失也能画：没有参考线，不出错。"""
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 8.0}\n', "utf-8")
    call(plot_loss, tmp_path / "train_log.jsonl", "--output", tmp_path / "curve.png")
    assert decode_png(tmp_path / "curve.png")[0] > 600


def test_bad_log_keeps_the_old_picture(tmp_path):
    run = make_run(tmp_path / "run")
    output = tmp_path / "curve.png"
    output.write_bytes(b"old")
    (run / "train_log.jsonl").write_text("不是日志\n", "utf-8")
    assert "不是训练日志" in error_of(plot_loss, run, "--output", output)
    assert "找不到日志" in error_of(plot_loss, tmp_path / "nothing", "--output", output)
    assert output.read_bytes() == b"old"


# ==== 字体 ====

def test_without_a_chinese_font_labels_are_english(tmp_path, no_chinese_font, monkeypatch):
    """没有中文字体就用英文标注，没有一个方框。"""
    assert plot_loss.use_chinese_font() == "en"
    run = plot_loss.read_run(make_run(tmp_path / "run")) | {"output": tmp_path / "curve.png"}
    figure = captured_figure(monkeypatch, [run], "en")
    labels = [
        figure.axes[0].get_xlabel(),
        figure.axes[0].get_ylabel(),
        figure.axes[0].get_title(),
        *texts_of(figure),
    ]
    assert all(label.isascii() for label in labels), labels
    call(plot_loss, tmp_path / "run", "--output", tmp_path / "curve.png")
    check_png(tmp_path / "curve.png")


def test_chinese_run_names_without_a_chinese_font(tmp_path, no_chinese_font):
    """训练目录叫中文名、机器上没有中文字体：也不能出现方框。"""
    runs = [make_run(tmp_path / name) for name in ("实验一", "实验二")]
    call(plot_loss, *runs, "--output", tmp_path / "curve.png")
    check_png(tmp_path / "curve.png")


def test_asking_for_chinese_without_a_font_is_an_error(tmp_path, no_chinese_font):
    message = error_of(
        plot_loss, make_run(tmp_path / "run"), "--language", "zh", "--output", tmp_path / "curve.png"
    )
    assert "中文字体" in message and not (tmp_path / "curve.png").exists()


def test_with_a_chinese_font_labels_are_chinese(tmp_path, chinese_font, monkeypatch):
    run = plot_loss.read_run(make_run(tmp_path / "run")) | {"output": tmp_path / "curve.png"}
    figure = captured_figure(monkeypatch, [run], "zh")
    assert "损失" in figure.axes[0].get_ylabel() and figure.axes[0].get_xlabel() == "步"
    check_png(tmp_path / "curve.png")


@pytest.mark.parametrize("language", ["zh", "en"])
def test_both_languages_with_a_chinese_font(tmp_path, chinese_font, language):
    runs = [make_run(tmp_path / name) for name in ("实验一", "run-2")]
    call(plot_loss, *runs, "--language", language, "--output", tmp_path / "curve.png")
    check_png(tmp_path / "curve.png")


def test_font_is_found_when_matplotlib_has_not_cached_it(chinese_font, monkeypatch):
    """字体是后装的：matplotlib 的缓存里没有，也要在系统里找到。"""
    latin = [font for font in font_manager.fontManager.ttflist if font.name.startswith("DejaVu")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", latin)
    assert plot_loss.use_chinese_font() == "zh"


# ==== 图里有什么 ====

def test_reference_lines(tmp_path, monkeypatch):
    """ln V 和词频的熵两条横线，每一遍的边界竖线，右边一条每字比特的轴。"""
    run = plot_loss.read_run(make_run(tmp_path / "run")) | {"output": tmp_path / "curve.png"}
    figure = captured_figure(monkeypatch, [run], "en")
    lines = figure.axes[0].get_lines()
    flat = [line.get_ydata()[0] for line in lines if list(line.get_xdata()) == [0, 1]]
    upright = [line.get_xdata()[0] for line in lines if list(line.get_ydata()) == [0, 1]]
    assert flat == pytest.approx([math.log(3000), 6.4])
    assert upright == [40.0, 80.0]
    texts = " ".join(texts_of(figure))
    assert f"{math.log(3000):.2f}" in texts and "6.40" in texts
    low, high = figure.axes[0].get_ylim()
    assert low < 6.4 < math.log(3000) < high, "参考线要在图内"
    second = figure.axes[0].child_axes[0]
    second_low, second_high = second.get_ylim()
    assert (second_low, second_high) == pytest.approx((low * 1.3, high * 1.3))


def test_curves_hold_the_data(tmp_path, monkeypatch):
    """浅色是原始值、深色是平滑、圆点是验证集，一个点也不少。"""
    run = plot_loss.read_run(make_run(tmp_path / "run")) | {"output": tmp_path / "curve.png"}
    figure = captured_figure(monkeypatch, [run], "en")
    raw, smooth, points = figure.axes[0].get_lines()[:3]
    assert list(zip(raw.get_xdata(), raw.get_ydata(), strict=True)) == run["train"]
    assert len(smooth.get_xdata()) == len(run["train"]) and raw.get_alpha() < 0.5
    assert list(zip(points.get_xdata(), points.get_ydata(), strict=True)) == [row[:2] for row in run["eval"]]


def test_runs_with_different_tokenizers_share_the_bits_axis(tmp_path, monkeypatch):
    """词表不同的两次训练，nat/token 不能比：纵轴换成每字比特。"""
    runs = [plot_loss.read_run(make_run(tmp_path / name, factor=factor)) | {"output": tmp_path / "curve.png"}
            for name, factor in (("a", 1.3), ("b", 0.9))]
    figure = captured_figure(monkeypatch, runs, "en")
    assert figure.axes[0].get_ylabel() == plot_loss.LABELS["en"]["bits"]
    evaluated = [line for line in figure.axes[0].get_lines() if line.get_marker() == "o"]
    for line, run in zip(evaluated, runs, strict=True):
        assert list(line.get_ydata()) == pytest.approx([bits for _, _, bits in run["eval"]])


def test_smooth():
    """常数平滑后不变（起点校正）；平滑后的起伏更小。"""
    assert plot_loss.smooth([(i, 5.0) for i in range(50)], 10) == [(i, pytest.approx(5.0)) for i in range(50)]
    noisy = plot_loss.smooth([(i, float(i % 2)) for i in range(200)], 20)
    assert all(abs(value - 0.5) < 0.05 for _, value in noisy[-50:])


def test_both_languages_have_the_same_labels():
    assert set(plot_loss.LABELS["zh"]) == set(plot_loss.LABELS["en"])
    assert all(label.isascii() for label in plot_loss.LABELS["en"].values())
