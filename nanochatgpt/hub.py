"""Models and files of the Hugging Face hub."""

import contextlib
import os
from pathlib import Path

from nanochatgpt.files import NO_PAGE, download, is_finished

# short name -> sha256 of its model.safetensors
HUB = {
    "gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    "gpt2-medium": "fc5a354a19255ad494f3d71549390baca1ccf61d1d822b9408971705c687c9cd",
    "gpt2-large": "5f47f3e12f91cd33b662ce7e433b6150ad5512b5884a2cee961b50e9c3bbebce",
    "gpt2-xl": "0f8b28eb05a8075f48b61b6f35332978c74fc7763fa9fb4051a1c30511736a6a",
    "distilgpt2": "e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b",
}


def hub_id(init_from):
    """Return the "org/name" on the hub that `init_from` means, None if it means something else."""
    path = Path(init_from)
    if path.exists():
        return None
    if init_from in HUB:
        owner = "distilbert" if init_from == "distilgpt2" else "openai-community"
        return f"{owner}/{init_from}"
    # out/NAME is not an org/name: train.py writes there
    if init_from.count("/") != 1 or path.parent.is_dir() or path.parts[0] == "out":
        return None
    return init_from


def find_on_hub(name):
    """Return ({name: StoredTensor}, GPTConfig, Tokenizer) of a short name in HUB, or of org/name.
    Raises FileNotFoundError if it is neither."""
    # here, because those who prepare data need none of it
    from model import PRESETS, GPTConfig
    from nanochatgpt.huggingface import ADAPTER, read_config, read_tokenizer
    from nanochatgpt.tokenizer import Tokenizer
    from nanochatgpt.weights import WEIGHTS, open_tensors, open_weights

    repo = hub_id(name)
    if name in HUB:
        weights = hub_file(repo, "model.safetensors", sha256=HUB[name])
        return open_tensors(weights), GPTConfig(**PRESETS[name]), Tokenizer()
    if not repo:
        names = f"one of nano, {', '.join(HUB)}, or an org/name on the hub"
        raise FileNotFoundError(f"init_from={name}: train this directory first, or take {names}")

    def fetch(file):  # None if the repository lacks it
        with contextlib.suppress(FileNotFoundError):
            return hub_file(name, file)

    # download before reading
    config = fetch("config.json")
    if not config and fetch("adapter_config.json"):
        raise ValueError(f"{name} {ADAPTER}")
    config = config or hub_file(name, "config.json")  # raises the error
    fetch("tokenizer_config.json")  # has the chat template in older repositories
    with contextlib.suppress(ConnectionError):  # what older versions cached lacks this file
        fetch("chat_template.jinja")
    # older repositories have two files in place of tokenizer.json
    tokenizer = fetch("tokenizer.json") or fetch("vocab.json") or config
    if tokenizer.name == "vocab.json":
        fetch("added_tokens.json")
    weights = next(filter(None, map(fetch, WEIGHTS)), None)
    weights = weights or hub_file(name, WEIGHTS[0])  # raises the error
    stored = open_weights(weights, lambda shard: hub_file(name, shard))
    return stored, read_config(config), read_tokenizer(tokenizer.parent)


def hub_file(repo, name, size=None, sha256=None, begins=NO_PAGE, kind="models", hurry=False):
    """Return the path of a file of `repo` ("org/name") on the Hugging Face hub, downloaded if it is
    in no cache. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to transformers. For
    the other arguments and errors see `hub_path` and `download`."""
    env = os.environ
    path = hub_path(repo, name, size, kind)
    offline = env.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    if offline and not is_finished(path, size):
        remedy = f"unset HF_HUB_OFFLINE, or place the file at {path} (or in {hub_cache()})"
        raise FileNotFoundError(f"{repo}/{name} is not here, and HF_HUB_OFFLINE is set\n{remedy}")

    endpoint = (env.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    folder = "datasets/" if kind == "datasets" else ""
    url = f"{endpoint}/{folder}{repo}/resolve/main/{name}"
    token = env.get("HF_TOKEN", "").strip()
    headers = {"Authorization": f"Bearer {token}"} if token else {}  # not sent to other hosts
    return download(url, path, size, sha256, begins, headers, hurry)


def hub_path(repo, name, size=None, kind="models"):
    """Return the path of a file of `repo` in transformers' cache if it is there, with this size in
    bytes if it is known, else its path in ours. kind: "models" or "datasets"."""
    # gpt2 and distilgpt2 had no organization until 2024; transformers caches either name
    short = repo.removeprefix("openai-community/").removeprefix("distilbert/")
    for alias in (repo, short):
        folder = hub_cache() / f"{kind}--{alias.replace('/', '--')}"
        if (folder / "refs/main").exists():
            revision = (folder / "refs/main").read_text().strip()
            path = folder / "snapshots" / revision / name
            if is_finished(path, size):
                return path
    return Path(os.path.expanduser(user_cache())) / "nanochatgpt" / kind / repo / name


def hub_cache():
    """Return the folder of transformers' cache, for which HF_HUB_CACHE and HF_HOME are read."""
    home = os.environ.get("HF_HOME") or f"{user_cache()}/huggingface"
    return Path(os.path.expanduser(os.environ.get("HF_HUB_CACHE") or f"{home}/hub"))


def user_cache():
    return os.environ.get("XDG_CACHE_HOME") or "~/.cache"
