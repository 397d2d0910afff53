"""prepare/hub.py: sets as the Hugging Face hub lays them out, in folders and from a local server
that behaves like the hub; what was written is read back from the shards."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from conftest import assert_refused, small_talk, write_jsonl
from forked import Forked
from test_prepare import everything, exchange, files_in, read_back

from nanochatgpt.configurator import run
from nanochatgpt.shards import open_shard
from nanochatgpt.tokenizer import Tokenizer
from prepare import corpus, hub, jsonl, retry

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("datasets")
from pyarrow import csv, parquet  # noqa: E402


@pytest.fixture
def prepare(tmp_path, monkeypatch, in_process):
    """Run the script in this process in an empty folder: prepare(dataset="talk")."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))

    def call(**knobs):
        args = [f"--{name}={value}" for name, value in knobs.items()]
        return in_process(lambda: run(hub.main, hub.Config), "hub.py", *args)

    return call


@pytest.fixture
def prepared(prepare):
    """Run the script as `prepare` does; return the two splits that it wrote to `out_dir`."""

    def call(out_dir="out", **knobs):
        done = prepare(out_dir=out_dir, **knobs)
        assert done.returncode == 0, done.stderr
        return read_back(out_dir)

    return call


def write_parquet(folder, rows, split="train", n_files=1, row_group_size=20):
    """Write rows as the hub stores them: data/train-00000-of-00002.parquet."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for i in range(n_files):
        table = pyarrow.Table.from_pylist(rows[i::n_files])
        path = folder / "data" / f"{split}-{i:05}-of-{n_files:05}.parquet"
        parquet.write_table(table, path, row_group_size=row_group_size)
    return folder


def rows_of_talk(n, seed=0):
    """Conversations with columns next to them that no model learns from."""
    return [{"id": i, "messages": talk} for i, talk in enumerate(small_talk(n, seed))]


# ---- layouts and formats


def test_a_parquet_set_of_messages_keeps_its_splits(tmp_path, prepared):
    train = small_talk(50, seed=1)
    test = small_talk(5, seed=2)
    folder = tmp_path / "talk"
    write_parquet(folder, [{"messages": talk, "source": "x"} for talk in train], n_files=2)
    write_parquet(folder, [{"messages": talk, "source": "y"} for talk in test], "test")
    splits = prepared(dataset="talk", val_split="test")
    assert splits["train"] == train[::2] + train[1::2]
    assert splits["val"] == test


def test_a_parquet_set_of_sharegpts_conversations_is_divided_as_jsonl_does(
    tmp_path, prepared, in_process
):
    rows = []
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    for talk in small_talk(60):
        turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in talk]
        rows.append({"conversations": turns})
    write_parquet(tmp_path / "sharegpt", rows)
    splits = prepared(dataset="sharegpt")

    source = write_jsonl(tmp_path / "talk.jsonl", small_talk(60))
    args = [f"--source={source}", "--out_dir=jsonl"]
    assert in_process(lambda: run(jsonl.main, jsonl.Config), "jsonl.py", *args).returncode == 0
    assert splits == read_back("jsonl")
    assert [len(splits[split]) for split in ("train", "val")] != [60, 0]


@pytest.mark.parametrize("numbers", [False, True])
def test_the_columns_of_a_csv_are_named_by_hand_and_stay_text(tmp_path, prepared, numbers):
    answers = ["4", "NA", "null", "1e3", "007", "yes"] * 5
    if numbers:
        answers = [f"{i:03}" for i in range(30)]
    columns = {"q": [f"question {i}" for i in range(30)], "a": answers, "unused": [0.5] * 30}
    csv.write_csv(pyarrow.table(columns), tmp_path / "faq.csv")
    (tmp_path / "folder").mkdir()
    csv.write_csv(pyarrow.table(columns), tmp_path / "folder" / "train.csv")
    expected = [exchange(f"question {i}", answer) for i, answer in enumerate(answers)]
    for dataset in ("faq.csv", "folder"):
        splits = prepared(dataset=dataset, columns="prompt=q,completion=a")
        assert everything(splits) == sorted(expected, key=str)


@pytest.mark.parametrize("form", ["json list", "json lines", "gzip", "arrow", "parquet"])
def test_a_single_file_of_each_kind_is_read(tmp_path, prepared, form):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(rows_of_talk(30))
    if form == "json list":
        path = tmp_path / "talk.json"
        path.write_text(json.dumps(rows_of_talk(30)))
    elif form == "json lines":
        path = tmp_path / "talk.jsonl"
        dataset.to_json(path)
    elif form == "gzip":
        path = tmp_path / "talk.jsonl.gz"
        dataset.to_json(path, compression="gzip")
    elif form == "arrow":
        dataset.save_to_disk(tmp_path / "saved")
        [path] = (tmp_path / "saved").glob("*.arrow")
    else:
        path = tmp_path / "talk.parquet"
        dataset.to_parquet(path)
    assert everything(prepared(dataset=path)) == sorted(small_talk(30), key=str)


def test_json_lines_with_mixed_types_are_read_as_jsonl_reads_them(tmp_path, prepared):
    rows = [{"messages": exchange(f"question {i}", "yes\n“quoted”")} for i in range(20)]
    expected = [row["messages"] for row in rows]
    parts = [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]
    rows.append({"messages": [{"role": "user", "content": parts}, expected[0][1]]})
    rows.append({"messages": [*exchange("a", "b"), *exchange("c", "d")], "meta": {"x": [1, "a"]}})
    rows[-1]["messages"][1]["weight"] = 0
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected += [exchange("in parts", expected[0][1]["content"])]
    expected += [[*exchange("a", "b"), *exchange("c", "d")]]
    assert everything(prepared(dataset="mixed.jsonl")) == sorted(expected, key=str)


def test_pairs_make_the_shard_that_retry_makes(tmp_path, prepare, in_process):
    rows = []
    for i in range(60):
        chosen = exchange(f"hi {i}", "hello, how are you?")
        rows.append({"prompt": f"hi {i}", "chosen": chosen, "rejected": exchange(f"hi {i}", "no")})
    rows.append({"prompt": "x", "chosen": exchange("x", "same"), "rejected": exchange("x", "same")})
    write_parquet(tmp_path / "pairs", rows)
    assert prepare(dataset="pairs", out_dir="a").returncode == 0
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ["--source=pairs.jsonl", "--out_dir=b"]
    assert in_process(lambda: run(retry.main, retry.Config), "retry.py", *args).returncode == 0
    assert files_in("a") == files_in("b")
    shard = open_shard("a/train.bin")
    assert 0 < shard.mask(0, len(shard.tokens)).mean() < 1


def test_texts_of_hh_rlhf_are_pairs(tmp_path, prepare):
    start = "\n\nHuman: hi {}\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"
    rows = [
        {"chosen": start.format(i) + " yes", "rejected": start.format(i) + " no"} for i in "abcde"
    ]
    write_parquet(tmp_path / "hh", rows)
    assert prepare(dataset="hh").returncode == 0
    shard = open_shard("data/hh/train.bin")
    tokenizer = Tokenizer()
    n = shard.offsets[1]
    learned = shard.tokens[:n][shard.mask(0, n)]
    assert tokenizer.decode(learned.tolist()) == " yes<|endoftext|>"


def test_replies_with_labels_make_the_shard_that_retry_makes(tmp_path, prepare, in_process):
    rows = []
    for i in range(60):
        rows.append({"prompt": f"hi {i}", "completion": "yes", "label": i % 3 > 0})
    write_parquet(tmp_path / "labels", rows)
    columns = "prompt=prompt,completion=completion,label=label"
    for out_dir, knobs in (("a", {}), ("c", {"columns": columns})):
        assert prepare(dataset="labels", out_dir=out_dir, **knobs).returncode == 0
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ["--source=labels.jsonl", "--out_dir=b"]
    assert in_process(lambda: run(retry.main, retry.Config), "retry.py", *args).returncode == 0
    assert files_in("a") == files_in("b") == files_in("c")


def tree(root, lang="en"):
    """Messages of one tree as OpenAssistant has them, a row each:

    root -> worse reply (rank 1), best reply (rank 0) -> thanks -> welcome; best reply -> more
    """
    rows = []

    def add(name, parent, role, text, rank=None):
        parent = parent and f"{root} {parent}"
        row = {"message_id": f"{root} {name}", "parent_id": parent, "role": role, "rank": rank}
        rows.append(row | {"text": text, "lang": lang})

    add("start", None, "prompter", f"hi from {root}")
    add("worse", "start", "assistant", "go away", rank=1)
    add("best", "start", "assistant", "hello!", rank=0)
    add("thanks", "best", "prompter", "thanks")
    add("welcome", "thanks", "assistant", "you are welcome")
    add("more", "best", "prompter", "tell me more")
    return rows


@pytest.mark.parametrize("order", [1, -1])  # of the rows, and so of the paths
def test_conversations_are_the_best_paths_through_trees_and_learned_once(
    tmp_path, prepare, prepared, monkeypatch, order
):
    rows = [row for i in range(10) for row in tree(f"tree {i}")]
    rows += tree("baum", lang="de")
    write_parquet(tmp_path / "trees", rows[::order])
    splits = prepared(dataset="trees", where="lang=en")
    talks = everything(splits)
    start = exchange("hi from tree 3", "hello!")
    paths = [[*start, *exchange("thanks", "you are welcome")]]
    if order == -1:  # else "hello!" has been learned, and there is no other reply
        paths.insert(0, [*start, {"role": "user", "content": "tell me more"}])
    assert sorted([talk for talk in talks if talk[:2] == start], key=len) == paths
    assert len(talks) == 10 * len(paths)
    # an interrupted run starts anew: it has to read all messages first
    with monkeypatch.context() as patch:
        interrupt_at_the_end(patch)
        done = prepare(dataset="trees", where="lang=en", out_dir="again")
        assert done.returncode == 3
    done = prepare(dataset="trees", where="lang=en", out_dir="again")
    assert done.returncode == 0
    assert "going on" not in done.stdout
    assert files_in("again") == files_in("out")

    # each reply and its end token once
    learned = []
    for split in ("train", "val"):
        shard = open_shard(f"out/{split}.bin")
        learned += shard.tokens[shard.mask(0, len(shard.tokens))].tolist()
    text = Tokenizer().decode(learned)
    assert text.count("hello!") == 10
    assert text.count("you are welcome") == 10


def test_max_examples_where_and_a_persona_column(tmp_path, prepared):
    rows = []
    for i in range(40):
        language = "en" if i % 2 else "fr"
        rows.append({"who": "a cook", "ask": f"q{i}", "reply": "yes", "lang": language})
    write_parquet(tmp_path / "faq", rows)
    columns = "system=who,prompt=ask,completion=reply"
    splits = prepared(dataset="faq", columns=columns, where="lang=en", max_examples=7)
    talks = [*splits["train"], *splits["val"]]
    assert {talk[1]["content"] for talk in talks} == {f"q{i}" for i in range(1, 15, 2)}
    assert all(talk[0] == {"role": "system", "content": "a cook"} for talk in talks)


# ---- going on after an interruption


def interrupt(monkeypatch, n):
    """Let batch n of the conversations be interrupted, and a state be saved after each batch."""
    monkeypatch.setattr(corpus, "SAVE_INTERVAL", -1)
    render_batch = corpus.render_batch
    calls = iter(range(1000))

    def failing(*args):
        if next(calls) == n:
            raise KeyboardInterrupt
        return render_batch(*args)

    monkeypatch.setattr(corpus, "render_batch", failing)


def interrupt_at_the_end(monkeypatch):
    """Let a run stop when all batches are written, and a state be saved after each batch."""
    monkeypatch.setattr(corpus, "SAVE_INTERVAL", -1)
    monkeypatch.setattr(corpus.ShardWriter, "finish", lambda writer: sys.exit(3))


@pytest.mark.parametrize(("n", "val_split"), [(1, ""), (2, ""), (1, "test"), (4, "test")])
def test_a_run_goes_on_where_it_was_interrupted(tmp_path, prepare, monkeypatch, n, val_split):
    folder = write_parquet(tmp_path / "talk", rows_of_talk(3500), n_files=3, row_group_size=300)
    write_parquet(folder, rows_of_talk(1500, seed=5), "test")
    knobs = {"dataset": "talk", "val_split": val_split}
    whole = prepare(out_dir="whole", **knobs)
    with monkeypatch.context() as patch:
        interrupt(patch, n)
        done = prepare(out_dir="out", **knobs)
    assert done.returncode == 130
    assert not list(Path("out").glob("*.bin"))
    done = prepare(out_dir="out", **knobs)
    assert done.returncode == 0
    assert "going on" in done.stdout
    assert files_in("out") == files_in("whole")
    assert done.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1]


def test_a_run_goes_on_when_all_rows_have_been_read(tmp_path, prepare, monkeypatch):
    write_parquet(tmp_path / "talk", rows_of_talk(2500))
    knobs = {"dataset": "talk", "max_examples": 2000}
    assert prepare(out_dir="whole", **knobs).returncode == 0
    with monkeypatch.context() as patch:
        interrupt_at_the_end(patch)
        assert prepare(out_dir="out", **knobs).returncode == 3
    done = prepare(out_dir="out", **knobs)
    assert "going on" in done.stdout
    assert files_in("out") == files_in("whole")


def test_with_other_knobs_or_files_or_a_part_gone_it_starts_anew(tmp_path, prepare, monkeypatch):
    write_parquet(tmp_path / "talk", rows_of_talk(2500))
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert prepare(dataset="talk", out_dir="out").returncode == 130
    Path("out/train.bin.mask.part").unlink()
    assert prepare(dataset="talk", out_dir="out").returncode == 0
    assert prepare(dataset="talk", out_dir="whole").returncode == 0
    assert files_in("out") == files_in("whole")

    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert prepare(dataset="talk", out_dir="out", max_examples=2400).returncode == 130
    assert prepare(dataset="talk", out_dir="out").returncode == 0
    assert files_in("out") == files_in("whole")

    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert prepare(dataset="talk", out_dir="out").returncode == 130
    write_parquet(tmp_path / "talk", rows_of_talk(2600, seed=9))
    assert prepare(dataset="talk", out_dir="out").returncode == 0
    assert prepare(dataset="talk", out_dir="whole").returncode == 0
    assert files_in("out") == files_in("whole")


# ---- what cannot be read


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({}, ["dataset"]),
        ({"dataset": "talk", "split": "dev"}, ["dev", "train"]),
        ({"dataset": "talk", "val_split": "train"}, ["val_split"]),
        (
            {"dataset": "tree", "columns": "message_id=id,parent_id=up"},
            ["row 1", "message_id"],
        ),
        ({"dataset": "talk", "val_split": "dev"}, ["dev", "train"]),
        ({"dataset": "talk", "config": "large"}, ["large", "default"]),
        ({"dataset": "talk", "columns": "messages"}, ["messages", "columns"]),
        ({"dataset": "talk", "columns": "messages=chats"}, ["chats", "messages"]),
        ({"dataset": "talk", "columns": "mesages=messages"}, ["mesages", "did you mean messages"]),
        ({"dataset": "talk", "where": "lang=en"}, ["lang", "messages"]),
        ({"dataset": "talk", "where": "id=1,id=2"}, ["id=1,id=2"]),
        ({"dataset": "talk", "where": "id=none"}, ["where"]),
        ({"dataset": "talk", "max_examples": -1}, ["max_examples"]),
        ({"dataset": "texts"}, ["texts", "row 1", "text", "columns"]),
        ({"dataset": "./nothing"}, ["nothing"]),
        ({"dataset": "json"}, ["json", "org/name"]),
        ({"dataset": "empty"}, ["empty"]),
        ({"dataset": "damaged"}, ["damaged"]),
    ],
)
def test_a_mistake_is_named_with_its_remedy(tmp_path, prepare, knobs, words):
    write_parquet(tmp_path / "talk", rows_of_talk(30))
    write_parquet(tmp_path / "texts", [{"text": "no chat", "url": "x"}] * 30)
    write_parquet(tmp_path / "tree", [{"id": "a", "up": None, "t": "hi"}] * 30)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged" / "data").mkdir(parents=True)
    bytes_ = (tmp_path / "talk/data/train-00000-of-00001.parquet").read_bytes()
    (tmp_path / "damaged/data/train-00000-of-00001.parquet").write_bytes(bytes_[:-100])
    assert_refused(prepare(**knobs), *words)
    assert not list(tmp_path.glob("data/**/*.bin"))


def test_a_bad_row_is_named_or_skipped_and_counted(tmp_path, prepare):
    rows = rows_of_talk(40)
    rows[28] = {"id": 28, "messages": [{"role": "narrator", "content": "once"}]}
    write_parquet(tmp_path / "talk", rows)
    assert_refused(prepare(dataset="talk"), "row 29", "narrator", "skip_bad")
    done = prepare(dataset="talk", skip_bad="true", out_dir="out")
    assert done.returncode == 0
    assert "1 row" in done.stdout
    talks = everything(read_back("out"))
    assert talks == sorted((row["messages"] for row in rows if row is not rows[28]), key=str)


# ---- from a server that behaves like the hub


class FakeHub(BaseHTTPRequestHandler):
    """Serves root/org/name/REVISION/...; commits are called like revisions, in 40 characters."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).replace("refs/convert/parquet", "converted")
        kind, *parts = parts.strip("/").split("/")
        parts = parts[1:] if kind == "api" else parts
        repo = self.server.root / "/".join(parts[:2])
        if repo.name == "gated":
            self.answer(403, b"{}", X_Error_Code="GatedRepo")
        elif not (repo / "main").exists():
            self.answer(401, b"{}", X_Error_Code="RepoNotFound")
        elif kind == "api":
            self.api(repo, parts[2:])
        else:
            self.file(repo / parts[3].rstrip("_"), "/".join(parts[4:]), parts[3])

    do_HEAD = do_GET

    def api(self, repo, parts):
        action, revision, *path = parts or ["revision", "main"]
        folder = repo / revision.rstrip("_")
        if not folder.exists():
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        elif action == "revision":
            sha = revision.rstrip("_").ljust(40, "_")
            answer = {"id": "/".join(repo.parts[-2:]), "sha": sha, "siblings": []}
            self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")
        else:
            entries = []
            for entry in sorted(folder.joinpath(*path).glob("*")):
                kind = "directory" if entry.is_dir() else "file"
                name = str(entry.relative_to(folder))
                size = entry.stat().st_size
                entries.append({"type": kind, "path": name, "size": size, "oid": "1" * 40})
            self.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    def file(self, folder, name, revision):
        sha = revision.rstrip("_").ljust(40, "_")
        if not folder.exists():
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        elif not (folder / name).is_file():
            self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        else:
            body = (folder / name).read_bytes()
            headers = {"X_Repo_Commit": sha, "ETag": f'"{len(body)}"', "Accept_Ranges": "bytes"}
            status = 200
            if asked := self.headers.get("Range"):
                first, last = asked.removeprefix("bytes=").split("-")
                start = int(first)
                stop = min(int(last or len(body)) + 1, len(body))
                headers["Content_Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
                body = body[start:stop]
                status = 206
            self.answer(status, body, **headers)


@pytest.fixture
def from_hub(tmp_path):
    """Run the script against a local hub whose repositories are in tmp_path/hub."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.root = tmp_path / "hub"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    env = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}

    def call(*args):
        return Forked(["prepare/hub.py", *args], tmp_path, env).wait()

    yield call
    server.shutdown()


def test_a_set_of_the_hub_is_streamed(tmp_path, from_hub):
    write_parquet(tmp_path / "hub/org/talk/main", rows_of_talk(60), n_files=2)
    done = from_hub("--dataset=org/talk")
    assert done.returncode == 0, done.stderr
    assert everything(read_back(tmp_path / "data/talk")) == sorted(small_talk(60), key=str)
    origin = json.loads((tmp_path / "data/talk/source.json").read_text())
    assert origin["hub"] == "org/talk"
    # nothing of the data is kept but the shards
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".arrow", ".incomplete")]


def test_of_a_set_with_a_loading_script_the_hubs_conversion_is_taken(tmp_path, from_hub):
    (tmp_path / "hub/org/scripted/main").mkdir(parents=True)
    (tmp_path / "hub/org/scripted/main/scripted.py").write_text("raise SystemExit('run')")
    for seed, config in enumerate(("default", "large")):
        folder = tmp_path / "hub/org/scripted/converted" / config / "train"
        folder.mkdir(parents=True)
        table = pyarrow.Table.from_pylist(rows_of_talk(30, seed))
        parquet.write_table(table, folder / "0000.parquet")
        knobs = [f"--config={config}"] if seed else []
        done = from_hub("--dataset=org/scripted", *knobs)
        assert done.returncode == 0, done.stderr
        talks = everything(read_back(tmp_path / "data/scripted"))
        assert talks == sorted(small_talk(30, seed), key=str)


@pytest.mark.parametrize(("name", "word"), [("org/wrong", "name"), ("org/gated", "HF_TOKEN")])
def test_a_wrong_or_a_gated_name_is_refused_with_the_remedy(from_hub, name, word):
    assert_refused(from_hub(f"--dataset={name}"), name, word)


def test_a_tree_may_be_as_deep_as_it_likes(tmp_path, prepared):
    rows = []
    for i in range(3000):
        role = "assistant" if i % 2 else "prompter"
        parent = str(i - 1) if i else None
        rows.append({"message_id": str(i), "parent_id": parent, "role": role, "text": f"t{i}"})
    write_parquet(tmp_path / "deep", [*rows, *tree("another")])
    splits = prepared(dataset="deep")
    assert max(map(len, everything(splits))) == 3000


def test_the_name_of_a_file_may_look_like_a_pattern(tmp_path, prepared):
    path = write_jsonl(tmp_path / "my[1].jsonl", small_talk(30))
    assert everything(prepared(dataset=path)) == sorted(small_talk(30), key=str)
