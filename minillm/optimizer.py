"""Which optimizer moves which parameter; several torch optimizers as one.

The learning rate of a step, warm-up and schedule, is `learning_rate` in train.py.

A step whose gradient is not finite changes nothing, without a GPU sync: each optimizer takes two
numbers on the device, grad_scale (what gradients are divided by) and found_inf (1: change nothing),
as torch's fused AdamW does. For an optimizer that does not know these numbers (AdamW on mps, or one
that somebody adds) the host reads them.
"""
import copy
import math
from functools import partial

import torch
import torch.distributed as dist

from minillm.distributed import gather_rows, print0
from minillm.errors import UserError
from minillm.muon import Muon

ADAMW_MOMENTS = ("step", "exp_avg", "exp_avg_sq")        # as torch names them
OF_ONE = {"adamw": "exp_avg", "muon": "momentum"}        # a moment that no other optimizer has


def make_optimizer(model, s, compile=False, shard=False):
    """The optimizer of a training run. s: the Settings of train.py.

    shard: each process keeps only its share of AdamW's state, as it does of Muon's (ZeRO-1).
    """
    # fused: one kernel, which can also skip a step by itself
    fused = model.wte.weight.device.type in ("cpu", "cuda")
    options = {"lr": s.learning_rate, "betas": (s.beta1, s.beta2), "fused": fused}
    adamw = torch.optim.AdamW
    if shard:
        # late: importing it takes half a second
        from torch.distributed.optim import ZeroRedundancyOptimizer
        adamw = partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.AdamW)
    if s.optimizer == "adamw":
        matrices = [p for _, p in trained_parameters(model) if is_matrix(p)]
        vectors = [p for _, p in trained_parameters(model) if not is_matrix(p)]
        groups = [{"params": matrices, "weight_decay": s.weight_decay, "lr_scale": 1.0},
                  {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0}]
        return Optimizer(model, [adamw(groups, **options)], shard)

    by_role = parameters_by_role(model)
    decayed = {"weight_decay": s.weight_decay, "lr_scale": 1.0}
    muon = Muon([{"params": by_role["matrices"], **decayed},
                 {"params": by_role["qkv"], "split": q_k_v_rows(model), **decayed}],
                lr=s.learning_rate, compile=compile)
    groups = [{"params": by_role["embedding"], "lr_scale": s.embedding_rate,
               "weight_decay": s.weight_decay},
              {"params": by_role["routers"], "lr_scale": s.vector_rate,
               "weight_decay": s.weight_decay},
              {"params": by_role["vectors"], "lr_scale": s.vector_rate, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return Optimizer(model, [muon, adamw(groups, **options)], shard)


def trained_parameters(model):
    """(name, parameter) of those that require a gradient: a changed model may freeze some."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def is_matrix(parameter):
    """Is it a matrix, or a stack of them? A scale per head, (n_head, 1, 1), is none."""
    return parameter.dim() in (2, 3) and sum(size > 1 for size in parameter.shape) > 1


def q_k_v_rows(model):
    """How many rows of a qkv matrix make the queries, the keys and the values."""
    attention = model.blocks[0].attn
    heads = (attention.n_head, attention.n_kv_head, attention.n_kv_head)
    return tuple(count * attention.head_dim for count in heads)


def parameters_by_role(model):
    """{"matrices", "qkv", "embedding", "routers", "vectors": parameters}, without frozen ones.

    matrices: those of the blocks, except qkv (a qkv that somebody gave other rows is among them);
    embedding: all matrices outside the blocks, with an output layer that somebody adds; vectors:
    norms, biases, scales.
    """
    roles = {"matrices": [], "qkv": [], "embedding": [], "routers": [], "vectors": []}
    for name, parameter in trained_parameters(model):
        if not is_matrix(parameter):
            role = "vectors"
        elif not name.startswith("blocks."):
            role = "embedding"
        elif "router" in name:
            role = "routers"
        elif name.endswith("qkv.weight") and len(parameter) == sum(q_k_v_rows(model)):
            role = "qkv"
        else:
            role = "matrices"
        roles[role].append(parameter)
    return roles


class Optimizer:
    """The optimizers in `parts` as one. A group's learning rate is the step's × its "lr_scale"."""
    # torch's GradScaler then hands over found_inf, instead of reading it back to skip `step`
    _step_supports_amp_scaling = True

    def __init__(self, model, parts, shard=False):
        self.parts, self.shard = parts, shard
        # where the state is: ZeroRedundancyOptimizer wraps an optimizer of this rank's parameters
        self.keepers = [getattr(part, "optim", part) for part in parts]
        self.skips_on_host = not all(map(skips_by_itself, self.keepers))
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.begun = False

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def set_rate(self, lr):
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def set_clipping(self, norm, largest):
        """Let the next `step` scale gradients of this norm, a tensor, to `largest` (0: don't)."""
        self.grad_scale = (norm / (largest or math.inf)).clamp(min=1).float()
        self.found_inf = (~norm.isfinite()).float()

    def step(self):
        if not self.begun:
            self.begun = True
            self._name_unused()
        if self.skips_on_host:
            return self._step_on_host()
        for part, keeper in zip(self.parts, self.keepers):
            keeper.grad_scale, keeper.found_inf = self.grad_scale, self.found_inf
            part.step()

    def _name_unused(self):
        trained = [p for part in self.parts for p in parameters_of(part)]
        unused = [self.names[p] for p in trained if p.grad is None]
        if not unused:
            return
        fact = f"the loss does not depend on {shortened(unused, 3)}"
        if dist.is_initialized():                # DDP would stop in the next step
            raise UserError(f"{fact}: on several processes every parameter must count; use it, "
                            "remove it, or call requires_grad_(False) on it")
        print0(f"{fact}: not trained")

    def _step_on_host(self):
        if self.found_inf:
            return
        for group in self.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            if gradients:
                torch._foreach_div_(gradients, self.grad_scale)
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    # ---- saving

    def state_dict(self):
        """{name of a parameter: {name of a moment: tensor}}; {} before the first step.

        All ranks must call it together, and rank 0 gets the state of all.
        """
        state = {self.names[parameter]: dict(moments)
                 for keeper in self.keepers for parameter, moments in keeper.state.items()}
        if not dist.is_initialized():
            return state
        if dist.get_rank() > 0:                  # of what every rank keeps whole, one is enough
            shares = ("momentum", *ADAMW_MOMENTS) if self.shard else ("momentum",)
            state = {name: {key: moments[key] for key in shares if key in moments}
                     for name, moments in state.items()}
        return gather_rows(state, next(iter(self.names)).device)

    def load_state_dict(self, saved):
        """Load the moments of a checkpoint; learning rates and weight decays stay as they are.

        A parameter without moments, because it was frozen or unused so far, starts from zero: a
        line says so. Raises UserError if the shapes do not fit: torch does not check them, and a
        fused kernel would read past their end.
        """
        if saved and all(isinstance(key, int) for key in saved):
            saved = self._by_name(saved)
        if not saved:
            return
        trained = [self.names[p] for part in self.parts for p in parameters_of(part)]
        if fresh := [name for name in trained if name not in saved]:
            print0(f"the checkpoint has no optimizer state of {shortened(fresh, 1)}: frozen or "
                   "unused so far; its state starts from zero")
        for part, keeper in zip(self.parts, self.keepers):
            # all parameters are checked, so that all ranks refuse the same checkpoints
            moments = {p: self._moments(keeper, p, saved) for p in parameters_of(part)
                       if self.names[p] in saved}
            if isinstance(keeper, Muon):
                moments = {p: keeper.own_state(p, whole) for p, whole in moments.items()}
            state = {i: moments[p] for i, p in enumerate(parameters_of(keeper)) if p in moments}
            groups = keeper.state_dict()["param_groups"]
            keeper.load_state_dict({"state": state, "param_groups": groups})

    def _by_name(self, saved):
        """Older checkpoints number the parameters: first matrices, then norms and biases."""
        order = sorted(self.names, key=lambda parameter: parameter.dim() < 2)
        return {self.names[parameter]: saved.get(i) for i, parameter in enumerate(order)}

    def _moments(self, part, parameter, saved):
        name, moments = self.names[parameter], {}
        found = saved.get(name)
        if not isinstance(part, (Muon, torch.optim.AdamW)):      # somebody's: any moments will do
            return copy.deepcopy(found)
        was, now = ("adamw", "muon") if isinstance(part, Muon) else ("muon", "adamw")
        if isinstance(found, dict) and OF_ONE[was] in found:
            raise UserError(f"the checkpoint has optimizer={was}, these settings say {now}: "
                            f"--optimizer={was} resumes; --init_from=DIR --out_dir=NEW starts a "
                            "new run from its weights")
        for key, shape in _moment_shapes(part, parameter).items():
            moment = found.get(key) if isinstance(found, dict) else None
            if not isinstance(moment, torch.Tensor) or moment.shape != shape:
                raise UserError(f"the optimizer state in the checkpoint does not fit: {key} of "
                                f"{name} is missing, or not of the shape {tuple(shape)}")
            # a copy: torch would keep a CPU tensor as it is, and so the mapped file too; AdamW's
            # "step" stays on the CPU
            moments[key] = moment.clone() if parameter.is_cpu or key == "step" else moment
        return moments


def skips_by_itself(part):
    """Does its `step` use grad_scale and found_inf? One that ignores them would never clip."""
    return isinstance(part, Muon) or bool(part.defaults.get("fused"))


def shortened(names, count):
    """The first `count` names, and how many there are besides."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def parameters_of(part):
    return [parameter for group in part.param_groups for parameter in group["params"]]


def _moment_shapes(part, parameter):
    """{name of a moment: its shape} that an optimizer keeps of a parameter, over all ranks."""
    if isinstance(part, Muon):
        return {key: value.shape for key, value in part.new_state(parameter).items()}
    return dict.fromkeys(ADAMW_MOMENTS, parameter.shape) | {"step": torch.Size()}
