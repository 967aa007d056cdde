"""README 里网页的截图：桌面 1280 像素宽，手机 390 像素宽（六个标签页拼成一张）。

apt-get install -y chromium chromium-driver fonts-noto-cjk
python docs/screenshots.py --model gpt2-chinese          # 写 docs/images/space-*.png
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium.webdriver.common.by import By

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
import space_speed  # noqa: E402
import test_space  # noqa: E402

TABS = {
    "generate": ("生成", "start", "output"),
    "growth": ("成长", "both", "growth-右"),
    "training": ("训练中", None, "progress"),
    "pieces": ("分词", None, "pieces"),
    "next": ("下一个词", None, "bars"),
    "inside": ("里面", None, "inside"),
}


def shoot(browser, name, path, width):
    """打开一个标签页，按下它的按钮，等写完，拍下整页。"""
    tab, button, output = TABS[name]
    test_space.go_to(browser, tab)
    test_space.wait(browser, lambda: browser.find_element(By.ID, output).is_displayed())
    if button:
        browser.find_element(By.ID, button).click()
        time.sleep(5)
    browser.execute_script("document.activeElement.blur(); scrollTo(0, 0)")
    if width > 500:
        browser.set_window_size(width, 600)  # 上一页可能更高
        height = browser.execute_script("return document.querySelector('.gradio-container').scrollHeight")
        browser.set_window_size(width, height + 180)
    time.sleep(1)
    browser.save_screenshot(str(path))
    save(Image.open(path), path)


def save(picture, path):
    """256 种颜色够了：文件小一半。"""
    picture.convert("RGB").quantize(256).save(path, optimize=True)


def side_by_side(paths, output):
    """手机的几张拼成一张，缩小一半（截图是两倍像素）。"""
    pictures = [Image.open(path).convert("RGB") for path in paths]
    height = max(picture.height for picture in pictures)
    gap = 24
    canvas = Image.new("RGB", (sum(picture.width + gap for picture in pictures) - gap, height), "#bbbbbb")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width + gap
    half = canvas.resize((canvas.width // 2, canvas.height // 2), Image.Resampling.LANCZOS)
    save(half, output)


def main():
    parser = argparse.ArgumentParser(description="截图", allow_abbrev=False)
    parser.add_argument("--model", default="gpt2-chinese", help="训练好的工作目录")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "docs" / "images", help="图放在哪里")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    port = space_speed.free_port()
    process = subprocess.Popen(
        [sys.executable, ROOT / "space" / "app.py", "--model", args.model],
        env=os.environ | {"GRADIO_SERVER_PORT": str(port)},
        stdout=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        space_speed.wait_for(url)
        with tempfile.TemporaryDirectory() as temporary:
            for width in (1280, 390):
                browser = test_space.open_browser(url, f"{temporary}/{width}", width)
                for name in TABS:
                    folder = args.output_dir if width > 500 else Path(temporary)
                    shoot(browser, name, folder / f"space-{name}.png", width)
                browser.quit()
            phones = [Path(temporary) / f"space-{name}.png" for name in TABS]
            side_by_side(phones, args.output_dir / "space-phone.png")
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main()
