#!/usr/bin/env python3
"""在真的 Jupyter 内核里把 kaggle_pretrain_combined.py 从头到尾运行一遍，截成 docs/kaggle/ 里的图。

    mkdir -p /kaggle/working /kaggle/input            # 假的 Kaggle；要没有别的东西在里面
    python docs/kaggle/pictures.py /tmp/kaggle-guide  # 几分钟；要 chromium 和 requirements-dev.txt
没有显卡，所以用 PRESET = "demo"；其余一字不改。
"""

import sys
from pathlib import Path

import jupytext
import nbclient
import nbconvert
from selenium import webdriver
from selenium.webdriver.common.by import By

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "kaggle_pretrain_combined.py"
PICTURES = {
    "settings.png": "1. 设置",
    "machine.png": "3. 环境",
    "training.png": "9. 训练",
    "results.png": "10. 结果",
}


def execute(folder):
    """运行，写下 .ipynb 和 .html。"""
    source = SOURCE.read_text(encoding="utf-8").replace('PRESET = "full"', 'PRESET = "demo"')
    notebook = jupytext.reads(source, "py:percent")
    nbclient.NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
    jupytext.write(notebook, folder / "kaggle_pretrain_combined.ipynb")
    html, _ = nbconvert.HTMLExporter(template_name="lab").from_notebook_node(notebook)
    (folder / "notebook.html").write_text(html, encoding="utf-8")


def take_pictures(page):
    """每个标题以下、下一个标题以上是一张图；太长的代码只留开头，太长的输出留开头和结尾。"""
    options = webdriver.ChromeOptions()
    for argument in "--headless=new", "--no-sandbox", "--window-size=1000,1600":
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options)
    driver.get(page.as_uri())
    driver.execute_script("""
        for (const box of document.querySelectorAll('.jp-InputArea-editor .highlight pre'))
            if (box.scrollHeight > 900) { box.style.maxHeight = '130px'; box.style.overflow = 'hidden'; }
        for (const box of document.querySelectorAll('.jp-OutputArea')) {
            const outputs = [...box.children];
            outputs.slice(16, -10).forEach((each, i) =>
                i ? each.remove() : each.querySelector('pre').textContent = '……');
        }""")
    for name, title in PICTURES.items():
        heading = driver.find_element(By.XPATH, f"//h2[contains(., '{title}')]")
        driver.execute_script(
            """
            const cells = [...document.querySelectorAll('.jp-Cell')];
            const first = cells.findIndex(cell => cell.contains(arguments[0]));
            let next = cells.findIndex((cell, i) => i > first && cell.querySelector('h2'));
            cells.forEach((cell, i) =>
                cell.style.display = i >= first && i < next ? '' : 'none');""",
            heading,
        )
        driver.find_element(By.TAG_NAME, "main").screenshot(str(HERE / name))
    driver.quit()


if __name__ == "__main__":
    work = Path(sys.argv[1])
    work.mkdir(parents=True, exist_ok=True)
    execute(work)
    take_pictures(work / "notebook.html")
