"""The documentation tells the truth: links lead somewhere, code has the names it is said to have,
commands are accepted by their scripts, examples run, the file tree is complete."""

import ast
import importlib
import json
import re
import shlex

import pytest
from conftest import ROOT
from forked import Forked

from nanochatgpt.configurator import parse

DOCS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"]
DOCS += [ROOT / "assets/nano/README.md", ROOT / "docs/finetune.ipynb"]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def read(path):
    """Return a page as Markdown; a notebook's commands are shell blocks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            commands = re.findall(r"^ *!((?:.*\\\n)*.*)", source, re.MULTILINE)
            source = "\n".join(["```sh", *commands, "```"])
        parts.append(source)
    return "\n\n".join(parts)


def anchors(path):
    """Return the anchors that GitHub makes of a file's headings."""
    text = BLOCK.sub("", read(path))
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", h).strip().lower().replace(" ", "-") for h in headings}


def commands():
    """Yield (file, command) for each `python SCRIPT.py ...` in a shell block or inline code."""
    for path in DOCS:
        text = read(path)
        inline = re.findall(r"`(python [^`\n]+\.py[^`]*)`", BLOCK.sub("", text))
        lines = [line.replace("\n", " ") for line in inline]
        for language, block in BLOCK.findall(text):
            if language == "sh":
                lines += block.replace("\\\n", " ").splitlines()
        for line in lines:
            line = line.partition("#")[0]
            for command in re.split(r"&&|\|", line):
                if re.search(r"(python|torchrun)\b.*\.py\b", command) and " -c " not in command:
                    yield path, command.strip()


COMMANDS = [pytest.param(*pair, id=pair[1][:60]) for pair in dict.fromkeys(commands())]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_anchors_and_names(path):
    text = BLOCK.sub("", read(path))
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        file = (path.parent / file).resolve() if file else path
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target
        name = re.fullmatch(r"`([\w.]+)`", label)
        if name and file.suffix == ".py" and file.name != name[1]:  # [`Class.method`](file.py)
            names = {"": ast.parse(file.read_text(encoding="utf-8"))}
            for part in name[1].split("."):
                body = [node for scope in names.values() for node in scope.body]
                names = {node.name: node for node in body if getattr(node, "name", "") == part}
                assert names, f"{name[1]} is not in {target}"


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_a_command_is_one_that_its_script_takes(path, command):
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    elsewhere = ("SCRIPT.py", "llama.cpp/convert_hf_to_gguf.py")
    assert (ROOT / script).exists() or "/NAME.py" in script or script in elsewhere, script
    arguments = words[words.index(script) + 1 :]
    if not (ROOT / script).exists() or script == "evaluation/plot.py" or "[" in command:
        return
    for argument in arguments:
        if argument.endswith(".py"):
            assert (ROOT / argument).exists(), argument
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    placeholders = ("FILE", "DTYPE", "DIR", "N")
    knobs = [a for a in arguments if a.startswith("--") and a.partition("=")[2] not in placeholders]
    configs = [str(ROOT / a) for a in arguments if a.endswith(".py")]
    parse(module.Config, [*configs, *(k for k in knobs if k != "--help")])


def test_the_readme_is_short_and_its_file_tree_is_complete():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    assert len(text.split()) <= 2000
    [tree] = [block for _, block in BLOCK.findall(text) if block.startswith("model.py")]
    root = {path.name for path in ROOT.glob("*.py")}
    library = {path.stem for path in (ROOT / "nanochatgpt").glob("[!_]*.py")}
    folders = {"prepare", "rlhf", "evaluation", "serving", "benchmarks", "config", "docs"}
    folders |= {"nanochatgpt", "assets", "tests"}
    assert set(re.findall(r"^(\w+\.py)", tree, re.MULTILINE)) == root
    assert set(re.findall(r"^    (\w+) ", tree, re.MULTILINE)) == library
    assert set(re.findall(r"^(\w+)/", tree, re.MULTILINE)) == folders


def test_the_python_example_of_the_readme_runs():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = [block for language, block in BLOCK.findall(text) if language == "python"]
    done = Forked(["-c", code], ROOT).wait()
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
