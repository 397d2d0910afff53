"""The README can be followed: its commands run, one after the other, each on what those before it have made; its links
lead to what they name.

`PYTHONPATH=.:prepare python tests/test_readme.py` puts the lines into the links that they lead to now.
"""

import ast
import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass

import pytest
import torch
from conftest import ROOT, small_talk, write_jsonl
from test_prepare import columned, questions

from model import GPT, GPTConfig
from nanochatgpt.checkpoint import save_model
from nanochatgpt.tokenizer import Tokenizer

README = ROOT / "README.md"
LINES = 20  # of code that a link shows, at most
LINK = re.compile(r"\[(`[^`\]\n]+`|[^`\]\[\n]+)\]\(([\w./-]+\.\w+)(#L\d+(?:-L\d+)?)?\)")


@dataclass
class Elsewhere:
    """A command that another test runs, or none can here: which one, or why."""

    test: str = ""
    why: str = ""


CI = Elsewhere(why=".ci/run does it")
TINY = "--batch_size=2 --block_size=64 --gradient_accumulation_steps=1 --max_epochs=0 --eval_iters=1 --device=cpu"
TRAIN = f"--init_from=tiny --max_iters=1 {TINY}"
SAID = "--device=cpu --max_new_tokens=4"
EVALUATE = f"{SAID} --dtype=float32 --replies=2 --probes=1 --batch_size=2"
FIGURE = f"--device=cpu --png=figure.png --prompts=2 --data_dir=data --dataset=personachat --init_from=out/chat {SAID}"
FINETUNE = "python train.py config/finetune_chat.py"
BESIDE = f"{EVALUATE} --base=tiny"
# the README's commands in their order, and what makes each of them small, or puts a file in the place of a download
RUNS = {
    "make demo": CI,
    "make test": CI,
    "make demo DATA=mine.jsonl": Elsewhere(
        why="make demo with another corpus: prepare/jsonl.py, which is run below"
    ),
    "source .venv/bin/activate": Elsewhere(why="make does without"),
    "python prepare/personachat.py": "--source=personachat.txt",
    "python prepare/eli5.py": "--source=eli5.json",
    "python prepare/chitchat.py": "",
    "python train.py config/finetune_chat.py": TRAIN,
    "python chat.py": SAID,
    "pip install -e '.[plot]'": Elsewhere(why="make test installs it"),
    "python prepare/recall.py --conversations=2000": "",
    "python figures.py attention --png=assets/attention.png": "--png=figure.png --row=0",
    "python plot.py assets/nano --png=assets/loss.png": "--png=loss.png",
    "python figures.py repetition --png=assets/repetition.png": f"{FIGURE} --max_new_tokens=20",
    "python evaluate.py --init_from=nano --dataset=personachat": f"{EVALUATE} --max_conversations=2",
    "python prepare/retry.py --source=saved.jsonl": "",
    "python train_reward.py config/train_reward.py": f"{TRAIN} --eval_iters=9",
    "python chat.py --best_of=8 --reward=out/reward": SAID,
    "python figures.py best_of --png=assets/best_of.png": f"{FIGURE} --most=2 --n=2",
    "python train_ppo.py config/ppo_chat.py": "--rollouts=4 --batch_size=2 --max_iters=1 --max_new_tokens=4"
    " --max_prompt=48 --normalize_on=4 --eval_replies=2 --device=cpu",
    "pip install -e '.[serve]'": Elsewhere(why="make test installs it"),
    "python serve.py": Elsewhere(
        "test_serve.py::test_a_reply_is_the_engines_and_its_usage_is_counted"
    ),
    "python train.py --help": "",
    f"{FINETUNE} --batch_size=2 --compile=true --out_dir=out/small": f"{TRAIN} --compile=false",
    "python train.py config/finetune_chat.py --init_from=resume": f"{TINY} --max_iters=2",
    "python train.py config/finetune_chat.py --dataset=personachat,eli5:0.5,recall:3 --out_dir=out/mix": TRAIN,
    "python train.py config/finetune_chat_xl.py --gradient_checkpointing=true": TRAIN,
    "python plot.py out/chat out/small": "--png=loss.png",
    "python prepare/jsonl.py --source=mine.jsonl --out_dir=data/mine": "",
    "python train.py config/finetune_chat.py --dataset=mine --out_dir=out/mine": TRAIN,
    'python chat.py --init_from=out/mine --persona="i am a zookeeper."': SAID,
    "python train.py config/demo.py --dataset=mine:20,recall:0.005 --out_dir=out/mine": f"{TRAIN} --out_dir=out/more",
    'echo "hi there" | python chat.py': SAID,
    'python sample.py --init_from=nano --start="Once upon a time"': SAID,
    "python evaluate.py --init_from=out/chat --base=gpt2 --dataset=personachat --json=figures.json": BESIDE,
    "python evaluate.py --init_from=out/chat --dataset=personachat --report=report.html": EVALUATE,
    "python evaluate.py --init_from=out/chat --dataset=": EVALUATE,
    "python chat.py --init_from=Locutusque/gpt2-conversational-or-qa": f"{SAID} --init_from=out/mine",
    "python prepare/columned_chat.py --max_examples=245000": "--source=formatted_data.json",
    "python train.py config/finetune_columned.py": TRAIN,
    "python evaluate.py --init_from=out/columned --base=gpt2 --dataset=mine --first_batches=15": "--device=cpu"
    " --base=tiny --init_from=out/chat --batch_size=2 --first_batches=2",
    "python prepare/eli5.py --mask=all --max_examples=5000 --out_dir=data/eli5-text": "--source=eli5.json",
    "python train.py config/finetune_eli5.py": TRAIN,
    "python train.py config/finetune_eli5.py --dataset=eli5 --block_size=1024 --out_dir=out/eli5-chat": TRAIN,
    f"{FINETUNE} --dataset=personachat --max_epochs=2 --eval_interval=50 --out_dir=out/convai2": TRAIN,
    "python evaluate.py config/eval_convai2.py --init_from=out/convai2": f"{SAID} --convai2=personachat.txt",
    "python bench.py fidelity": "--init_from=out/chat --dataset=mine --positions=50 --device=cpu",
    "python bench.py fidelity --init_from=gpt2 --dtype=int8": Elsewhere(
        "test_bench.py::test_fidelity_is_near_to_float32_as_the_dtype_is"
    ),
    "torchrun --nproc_per_node=4 train.py config/finetune_chat.py": Elsewhere(
        "test_train.py::test_two_processes_are_one_process_with_the_same_global_batch"
    ),
    "torchrun --nproc_per_node=4 --max_restarts=3 train.py config/finetune_chat.py": Elsewhere(
        "test_train.py::test_torchrun_starts_a_job_again_whose_process_was_killed_and_it_goes_on_from_its_last_save"
    ),
    "torchrun --nproc_per_node=8 train.py config/finetune_chat_xl.py --strategy=fsdp": Elsewhere(
        "test_train.py::test_weights_that_are_sharded_over_two_processes_train_as_copies_do"
    ),
    "torchrun --nnodes=2 --nproc_per_node=8 --node_rank=0 --master_addr=FIRST --master_port=29500 train.py"
    " config/finetune_chat_xl.py --strategy=fsdp": Elsewhere(why="two machines: tried by hand"),
    "pip install -e '.[lm-eval]'": Elsewhere(why="make test-all installs it"),
    "pip install transformers jinja2": Elsewhere(why="make test installs them"),
    "lm_eval --model hf --model_args pretrained=out/chat --tasks arc_easy,hellaswag,mmlu,truthfulqa_mc2": Elsewhere(
        "test_lm_eval.py::test_its_loglikelihoods_are_our_own"
    ),
    "vllm serve out/chat": Elsewhere(why="gigabytes: tried by hand"),
    "python llama.cpp/convert_hf_to_gguf.py out/chat --outfile chat.gguf": Elsewhere(
        "test_checkpoint.py::test_a_saved_config_has_what_llama_cpps_converter_asks_for"
    ),
    "llama-server -m chat.gguf --jinja": Elsewhere(why="another program: tried by hand"),
    "git apply exercises/NAME.patch": Elsewhere(
        "test_exercises.py::test_a_template_of_ones_own_is_learned_and_spoken"
    ),
}


def commands(text):
    """Return the commands of the README, in its code blocks and in its sentences, each once."""
    found = []
    for block, span in re.findall(
        r"```sh\n(.*?)```|(?<!`)`((?:python|make|pip|torchrun|git apply)\s[^`]+)`", text, re.DOTALL
    ):
        if span:
            found += " ".join(span.split()).split(" && ")
        for line in block.replace("\\\n", " ").splitlines():
            found += [" ".join(c.split()) for c in re.sub(r"\s+#\s.*$", "", line).split(" && ")]
    passed_over = (
        "curl ",
        "python -X dev train.py ...",
        "git apply -R",
    )  # the first has a test of its own
    return [
        command
        for command in dict.fromkeys(found)
        if command and not command.startswith(passed_over)
    ]


def test_every_command_of_the_readme_is_run():
    assert set(commands(README.read_text())) == set(RUNS)


def test_what_is_said_to_be_run_elsewhere_is():
    for command, how in RUNS.items():
        if isinstance(how, Elsewhere):
            assert bool(how.test) != bool(how.why), command
            file, _, name = how.test.partition("::")
            assert not file or f"def {name}(" in (ROOT / "tests" / file).read_text(), how.test


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny model, and small files for downloads."""
    folder = tmp_path_factory.mktemp("clone")
    for name in (
        "assets",
        "config",
    ):  # what commands name by a relative path and do not write; scripts run from ROOT
        (folder / name).symlink_to(ROOT / name)
    torch.manual_seed(0)
    save_model(
        GPT(GPTConfig(block_size=512, n_layer=1, n_head=2, n_embd=32)), Tokenizer(), folder / "tiny"
    )
    write_jsonl(folder / "mine.jsonl", small_talk(60))
    saved = [
        {"messages": talk, "retried": [{"before": 1, "content": "what?"}]}
        for talk in small_talk(80)
        if talk[0]["role"] == "user"
    ]
    (folder / "saved.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, saved))))
    (folder / "eli5.json").write_text(json.dumps(questions(40, "q")))
    examples = {
        "train": [columned(i, "be kind") for i in range(40)],
        "validation": [columned(i) for i in range(5)],
    }
    (folder / "formatted_data.json").write_text(json.dumps(examples))
    lines = [
        f"1 your persona: i like tea {i} .\n2 hi\thello {i} , how are you ?\n3 fine\ti am {i} .\n"
        for i in range(40)
    ]
    (folder / "personachat.txt").write_text("".join(lines))
    return folder


@pytest.mark.parametrize(
    ("command", "small"), [(c, how) for c, how in RUNS.items() if isinstance(how, str)]
)
def test_a_command_of_the_readme(command, small, folder, monkeypatch, as_main):
    monkeypatch.chdir(folder)
    script, *arguments = shlex.split(
        command.removeprefix('echo "hi there" | ').removeprefix("python ")
    )
    done = as_main(script, *arguments, *small.split(), input="hi there\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_readmes_curl_is_answered(chat_server):
    (command,) = re.findall(r"^curl .*?(?=```)", README.read_text(), re.DOTALL | re.MULTILINE)
    if not shutil.which("curl"):
        pytest.skip("there is no curl")
    command = command.replace("http://127.0.0.1:8000", chat_server.url)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


@pytest.mark.parametrize("number", range(3))
def test_the_readmes_python_runs(number, folder, monkeypatch, capsys, chat_server):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    if not (folder / "out" / "chat").exists():
        torch.manual_seed(0)
        save_model(
            GPT(GPTConfig(block_size=512, n_layer=1, n_head=2, n_embd=32)),
            Tokenizer(),
            folder / "out" / "chat",
        )
    monkeypatch.chdir(folder)
    exec(blocks[number].replace("http://127.0.0.1:8000", chat_server.url), {})
    assert capsys.readouterr().out


# links


def place(path, label):
    """Return (first, last) line of what a link's label names in a file: a definition, or a comment that it begins.

    Of a definition the docstring is passed over.
    """
    lines = (ROOT / path).read_text().splitlines()
    label = label.strip("`")
    if " " in label:
        first = next(i for i, line in enumerate(lines) if line.lstrip().startswith(f"# {label}"))
        return first + 1, min(first + LINES, len(lines))
    owner, _, name = label.rpartition(".")
    begin = next(
        (i for i, line in enumerate(lines) if owner and line.startswith(f"class {owner}")), 0
    )
    pattern = re.compile(rf"\s*(?:async )?(?:def|class) {name}\b|{name} = ")
    first = next(i for i, line in enumerate(lines) if i >= begin and pattern.match(line))
    behind = first + 1
    if lines[behind].lstrip().startswith('"""'):
        behind = next(i for i in range(behind, len(lines)) if lines[i].endswith('"""')) + 1
    indent, last = len(lines[first]) - len(lines[first].lstrip()), first
    for i in range(first + 1, min(len(lines), behind + LINES)):
        text = lines[i].strip()
        if text and len(lines[i]) - len(text) <= indent and text[0] not in ")]}":
            break
        last = i if text else last
    return first + 1, last + 1


def relink(text):
    """Return the README with the lines in its links that they lead to now."""

    def link(match):
        label, path, lines = match.groups()
        return (
            f"[{label}]({path}#L{'-L'.join(map(str, place(path, label)))})" if lines else match[0]
        )

    return LINK.sub(link, text)


def test_links_lead_to_what_they_name():
    text = README.read_text()
    links = LINK.findall(text)
    assert sum(bool(lines) for *_, lines in links) > 30
    for _, path, _ in links:
        assert (ROOT / path).exists(), path
    headings = [
        re.sub(r"[^\w\s-]", "", h).strip().lower().replace(" ", "-")
        for h in re.findall(r"^#+ (.*)", text, re.M)
    ]
    for anchor in re.findall(r"\]\(#([^)]*)\)", text):
        assert anchor in headings, anchor
    assert relink(text) == text, "PYTHONPATH=.:prepare python tests/test_readme.py mends them"


def test_the_map_has_every_file():
    text = README.read_text().partition("## What is where")[2]
    files = [path for pattern in ("*.py", "serving/*.py") for path in ROOT.glob(pattern)]
    for path in files:
        assert f"| `{path.relative_to(ROOT)}` |" in text, path
    for path in (ROOT / "prepare").glob("*.py"):
        assert f"`{path.stem}`" in text or f"`prepare/{path.name}`" in text, path
    for path in re.findall(r"^\| `([^`]+)`", text, re.M):
        assert (ROOT / path).exists() or "NAME" in path, path


def test_no_file_imports_from_a_floor_above_its_own():
    tables = README.read_text().partition("## What is where")[2].split("\n| ")
    floor, floors = 3, {}
    for row in tables:
        floor = {"run it": 2, "build on it": 1, "foundations": 0}.get(row.partition(" |")[0], floor)
        if (name := re.match(r"`([\w/]+)\.py`", row)) and "NAME" not in name[1]:
            floors[name[1].replace("/", ".")] = floor
    assert set(floors.values()) == {0, 1, 2}
    for name, floor in floors.items():
        for node in ast.walk(ast.parse((ROOT / (name.replace(".", "/") + ".py")).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in floors:
                assert floors[node.module] <= floor, f"{name} imports {node.module}"


if __name__ == "__main__":
    README.write_text(relink(README.read_text()))
