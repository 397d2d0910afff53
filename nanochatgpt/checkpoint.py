"""
Weights in and out. A checkpoint is a Hugging Face GPT-2 directory; `init_from` says which one:

    nano                    the small chat model in assets/nano/
    a directory             config.json with safetensors or .bin; or nanoGPT's ckpt.pt
    a file                  nanoGPT's ckpt.pt
    gpt2, gpt2-medium, ...  OpenAI's weights, from the Hugging Face hub
    org/name                any GPT-2 on the hub
"""

import contextlib
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import GPT, Conv1D
from nanochatgpt import huggingface
from nanochatgpt.device import FBGEMM
from nanochatgpt.files import check_format, replacing
from nanochatgpt.tokenizer import Tokenizer
from nanochatgpt.weights import WEIGHTS, match_model, open_weights

NANO = Path(__file__).parents[1] / "assets" / "nano"  # its README.md says how it was trained
PICKLES = (".pt", ".pth", ".ckpt")  # what checkpoints of nanoGPT end in
FILES = (*PICKLES, ".safetensors", ".bin", ".gguf")  # what no name on the hub ends in
# weights that other programs read, by their files
FOREIGN = {
    "*.gguf": "GGUF",
    "*.h5": "TensorFlow",
    "*.ckpt.index": "TensorFlow",
    "*.msgpack": "Flax",
    "*.onnx": "ONNX",
}


@torch.no_grad()
def load_model(
    init_from,
    device="cpu",
    dtype=torch.float32,
    dropout=0.0,
    inference=False,
    model_class=GPT,
    attention_dropout=0.0,
):
    """Return (model, Tokenizer) of `init_from` (see above), with weights in `dtype` on `device`.
    The dropouts of its config.json are not read: OpenAI's are 0.1.

    inference: on an x86 CPU, pack 16- and 8-bit weights into the layers of quantize.py, which can
    be neither trained nor saved. model_class: GPT or RewardModel. Raises FileNotFoundError or
    ConnectionError if there is no such model, ValueError if it is damaged or not a GPT-2.
    """
    stored, config, tokenizer = find(init_from)
    if config.vocab_size < tokenizer.n_vocab:
        sizes = f"{config.vocab_size} embeddings but its tokenizer has {tokenizer.n_vocab} tokens"
        raise ValueError(f"{init_from}: the model has {sizes}")

    config.dropout = dropout
    config.attention_dropout = attention_dropout
    with torch.device("meta"):  # no memory for the weights yet
        model = model_class(config)

    # load one tensor at a time: a second copy of the model may not fit into memory
    read = match_model(stored, model)
    del stored  # each tensor is freed once it has been read
    if inference and FBGEMM and torch.device(device).type == "cpu" and dtype != torch.float32:
        from nanochatgpt.quantize import pack

        return pack(model, read, dtype), tokenizer
    tensors = {}
    for name in model.state_dict().keys() - {"lm_head.weight"}:
        # copy: mapped tensors may be misaligned, which changes the last bits of sums
        tensors[name] = read(name).to(device, dtype, copy=True)
    model.load_state_dict(tensors, strict=False, assign=True)  # all but lm_head, which is tied
    model.tie_weights()
    return model, tokenizer


def save_model(model, tokenizer, directory):
    """Write a Hugging Face GPT-2 directory. If that fails, the old files stay. Raises ValueError
    for a model that was loaded for inference."""
    if not isinstance(model.transformer.h[0].mlp.c_fc, Conv1D):
        raise ValueError("a model loaded for inference is packed and cannot be saved")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)

    tensors = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # tied to the embedding
            tensors[name] = tensor.detach().cpu().contiguous()
    texts = huggingface.config_files(model, tokenizer)
    texts |= huggingface.tokenizer_files(tokenizer.template, model.config.block_size)

    # write all files before the first replaces an old one
    with contextlib.ExitStack() as stack:
        for name, text in texts.items():
            path = stack.enter_context(replacing(directory / name))
            path.write_text(text, encoding="utf-8")
        weights = stack.enter_context(replacing(directory / "model.safetensors"))
        save_file(tensors, weights, metadata={"format": "pt"})
        shutil.copymode(path, weights)  # safetensors makes files that only their owner can read


def default_model():
    """Return the chat model that train.py wrote, else nano."""
    return "out/chat" if Path("out/chat/model.safetensors").exists() else "nano"


def find(init_from):
    """Return ({name: StoredTensor}, GPTConfig, Tokenizer)."""
    path = NANO if init_from == "nano" else Path(init_from)
    if not path.exists() and path.suffix not in FILES:
        from nanochatgpt.hub import find_on_hub  # most runs need no download

        return find_on_hub(init_from)

    folder = path if path.is_dir() else path.parent
    if any(folder.glob("adapter_*")):  # adapter_config.json, adapter_model.safetensors
        raise ValueError(f"{path} {huggingface.ADAPTER}")
    if path != folder:
        check_format(path)  # raises FileNotFoundError
        if path.suffix not in PICKLES:
            raise ValueError(f"{path} is one file of a model: pass its directory, {folder}")
        from nanochatgpt.nanogpt import open_nanogpt

        return *open_nanogpt(path), Tokenizer()

    for name in WEIGHTS:
        if (path / name).is_file():
            config = huggingface.read_config(path / "config.json")
            tokenizer = huggingface.read_tokenizer(path)
            return open_weights(path / name, path.joinpath), config, tokenizer
    if (path / "ckpt.pt").is_file():
        return find(path / "ckpt.pt")

    # no weights: say what there is instead
    for pattern, program in FOREIGN.items():
        for file in path.glob(pattern):
            problem = f"{path} has only {program} weights, {file.name}"
            raise ValueError(f"{problem}: save the model as model.safetensors with transformers")
    raise FileNotFoundError(f"{path} has none of {', '.join(WEIGHTS[::2])}, ckpt.pt")
