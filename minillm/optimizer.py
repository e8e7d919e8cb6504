"""Several torch optimizers as one: one step, one learning rate, one saved state.

A step whose gradient is not finite changes nothing, and the host is not asked: each part takes two
numbers on the device, grad_scale (what gradients are divided by) and found_inf (1: change nothing),
as torch's fused AdamW does. Where there is no fused kernel (mps), the host asks.
"""
import math

import torch

from minillm.errors import UserError


class Optimizer:
    """The optimizers in `parts` as one. A group's learning rate is the step's times its "multiple"."""
    _step_supports_amp_scaling = True            # torch's GradScaler: this optimizer takes found_inf

    def __init__(self, model, parts, asks_host=False):
        self.parts, self.asks_host = parts, asks_host
        self.names = {parameter: name for name, parameter in model.named_parameters()}

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def set_rate(self, lr):
        for group in self.param_groups:
            group["lr"] = lr * group["multiple"]

    def clip_to(self, norm, largest):
        """Say before `step` that the gradients' norm is `norm` (a tensor), and to clip it; 0: not to."""
        self.grad_scale = (norm / (largest or math.inf)).clamp(min=1)
        self.found_inf = (~norm.isfinite()).float()

    def step(self):
        if self.asks_host:
            return self._step_on_host()
        for part in self.parts:
            part.grad_scale, part.found_inf = self.grad_scale, self.found_inf
            part.step()

    def _step_on_host(self):
        if self.found_inf:
            return
        for group in self.param_groups:
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            torch._foreach_div_(gradients, self.grad_scale)
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    # ---- saving

    def state_dict(self):
        """{name of a parameter: {name of a moment: tensor}}; {} before the first step."""
        return {self.names[parameter]: dict(moments)
                for part in self.parts for parameter, moments in part.state.items()}

    def load_state_dict(self, saved):
        """Take the moments of a checkpoint, but keep the own rates and decays.

        Raises UserError where they do not fit: torch would not look, and a fused kernel would read
        past their end.
        """
        if saved and all(isinstance(key, int) for key in saved):
            saved = self._by_name(saved)
        if not saved:
            return
        for part in self.parts:
            state = {}
            parameters = [p for group in part.param_groups for p in group["params"]]
            for i, parameter in enumerate(parameters):
                state[i] = self._moments(part, parameter, saved)
            part.load_state_dict({"state": state, "param_groups": part.state_dict()["param_groups"]})

    def _by_name(self, saved):
        """Older checkpoints number the parameters: first matrices, then norms and biases."""
        order = sorted(self.names, key=lambda parameter: parameter.dim() < 2)
        return {self.names[parameter]: saved.get(i) for i, parameter in enumerate(order)}

    def _moments(self, part, parameter, saved):
        name, found = self.names[parameter], saved.get(self.names[parameter])
        for key in MOMENTS[type(part)]:
            moment = found.get(key) if isinstance(found, dict) else None
            shape = () if key == "step" else parameter.shape
            if not isinstance(moment, torch.Tensor) or moment.shape != shape:
                raise UserError(f"the optimizer state in the checkpoint does not fit: {key} of "
                                f"{name} is missing, or not of the shape {tuple(shape)}")
        return {key: found[key] for key in MOMENTS[type(part)]}


MOMENTS = {torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq")}
