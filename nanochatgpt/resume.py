"""A training run that can be stopped and resumed: everything it needs is in out_dir/last/."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from nanochatgpt.checkpoint import save_model
from nanochatgpt.distributed import FULL_STATE_DICT, Distributed
from nanochatgpt.files import load_tensors, replacing
from nanochatgpt.tokenizer import Tokenizer


@dataclass
class Run:
    """The parts of a training run; `restore` fills in the last four."""

    script: str  # "train", "train_ppo" or "train_reward": only this script can resume the run
    config: object  # the knobs of this call
    distributed: Distributed
    must_match: tuple = ()  # names of knobs that a resumed run must share with the original
    tokenizer: Tokenizer = None
    model: torch.nn.Module = None  # the module that the optimizer updates, maybe sharded
    optimizer: torch.optim.Optimizer = None
    scaler: torch.amp.GradScaler = None  # scales the loss for float16

    @property
    def last(self):
        return Path(self.config.out_dir) / "last"

    def load(self):
        """Return what `save` last wrote, None for a new run. Raises ValueError if a new run would
        overwrite one, or if state.pt is invalid, comes from another script, or disagrees on the
        template or a knob in must_match; FileNotFoundError if there is no run to resume."""
        config = self.config
        distributed = self.distributed
        path = self.last / "state.pt"
        resume = config.init_from == "resume"  # the user asks for it

        # torchrun --max_restarts starts all processes again: they resume what this job has begun
        if distributed.world_size > 1 and distributed.store.check(["begun"]):
            resume = path.exists()
        if not resume and path.exists():
            remedy = "continue it with --init_from=resume, or set another --out_dir"
            raise ValueError(f"{self.last} holds a run: {remedy}")
        if distributed.world_size > 1:
            dist.barrier()  # every process has looked
            distributed.store.set("begun", "1")  # survives a restart of the processes
        if not resume:
            return None

        # read the state and check that it is a run of this script
        if not path.exists():
            raise FileNotFoundError(f"no {path} to resume; start from a model with --init_from")
        state = load_tensors(path)
        needed = {"script", "knobs", "iter", "template", "config", "model"}
        if not isinstance(state, dict) or not needed <= state.keys():
            raise ValueError(f"{path} is not the state of a run; start one in another --out_dir")
        if state["script"] != self.script:
            remedy = "resume it with that, or set another --out_dir"
            raise ValueError(f"{self.last} is a run of {state['script']}.py: {remedy}")
        # knobs that may not change within a run; template="" asks for none
        knobs = {name: state["knobs"][name] for name in self.must_match}
        if getattr(config, "template", ""):
            knobs["template"] = state["template"]
        for name, before in knobs.items():
            value = getattr(config, name)
            if value != before:
                raise ValueError(f"{name}={value}, but the run in {config.out_dir} has {before}")
        return state

    def restore(self, state, tokenizer, model, optimizer, scaler):
        """Fill in the parts of the run; load the optimizer's moments and the gradient scaler from
        `state`, if they are there. Raises ValueError for a state beyond max_iters."""
        self.tokenizer = tokenizer
        self.model = model
        self.optimizer = optimizer
        self.scaler = scaler
        if state["iter"] > self.config.max_iters:  # equal: a finished run just ends
            beyond = f"beyond max_iters={self.config.max_iters}: raise max_iters"
            raise ValueError(f"{self.last} is at iter {state['iter']}, {beyond}")
        # pop: free the moments once the optimizer has its copy
        if moments := state.pop("optimizer", None):
            # only the moments are restored: learning rate and weight decay come from the knobs
            groups = get_optimizer_state_dict(model, optimizer)
            set_optimizer_state_dict(
                model, optimizer, groups | {"state": moments}, options=FULL_STATE_DICT
            )
        if scaling := state.pop("scaler", None):  # the loss scale that float16 has settled on
            scaler.load_state_dict(scaling)

    def save(self, exported, module, **progress):
        """Write last/: a checkpoint for others, and state.pt with everything a resumed run needs.

        exported: the GPT or RewardModel to save as a checkpoint; module: the one whose state dict a
        resumed run loads. progress: `iter` and more tensors or plain values. All processes call it.
        """
        moments = {}  # of all processes, on rank 0
        if self.optimizer.state:  # the call below runs a dummy step on a fresh optimizer
            moments = get_optimizer_state_dict(self.model, self.optimizer, options=FULL_STATE_DICT)
            moments = moments.get("state", {})  # without the parameter groups, which hold knobs
        if not self.distributed.master:
            return
        save_model(exported, self.tokenizer, self.last)
        state = progress | {  # `needed` in `load` lists what must be there
            "script": self.script,  # checked by `load`
            "knobs": {name: getattr(self.config, name) for name in self.must_match},
            "template": self.tokenizer.template,
            "config": asdict(exported.config),  # sizes of the model
            "model": module.state_dict(),
            "optimizer": moments,  # by parameter name
            "scaler": self.scaler.state_dict(),
        }
        with replacing(self.last / "state.pt") as path:  # a kill while writing leaves the old one
            torch.save(state, path)

    def print_stopped(self, it):
        if self.distributed.master:
            remedy = "continue with the same command and --init_from=resume"
            print(f"stopped at iter {it}, saved to {self.last}; {remedy}")
