"""Muon: the optimizer of the matrices inside the blocks. AdamW does the rest, see optimizer.py.

    muon = Muon([{"params": matrices, "weight_decay": 0.02},
                 {"params": qkv, "weight_decay": 0.02, "split": (1024, 512, 512)}], lr=0.03)

Muon moves a matrix by its momentum with all singular values made equal, so that directions which
the gradient rarely shows learn as fast as the common ones. NorMuon then evens out the rows: an
output neuron that keeps getting large updates gets smaller ones.

Guarantees: a step whose gradient is not finite changes nothing, without a GPU sync. Any number of
processes computes what one computes: each keeps the momentum of its share of the matrices (ZeRO-1)
and orthogonalises it. Gradients are not reduced over processes here: DDP has done that.

Muon: kellerjordan.github.io/posts/muon. Polar Express: arXiv 2505.16932. NorMuon: 2510.05491.
"""
import math

import torch
import torch.distributed as dist

# The numbers of inverse_root() for its two calls, (a, ((b, c), …)): the Gram matrix g goes through
# g ← b g + c g² for each pair, and a + g is then near the inverse square root of the first g. The
# first call maps singular values in [0.0012, 1] (as shares of the matrix's norm) into [0.029, 1],
# the second maps those into [0.24, 1.37]. No quadratics do better. Longer polynomials would, but
# with them the model learns no more per token: what counts is how far small values are raised.
# Every b g + c g² is 0 at 0, so where g is small, what bfloat16 loses is small too.
FIRST_HALF = 23.931, ((3.7592, -3.5329), (3.703, -3.4281), (3.1022, -2.4059), (-55.681, 32.741))
SECOND_HALF = 8.947, ((2.814, -1.9797), (-23.375, 16.003))
NEURON_BETA = 0.95           # decay of the mean squared update of an output neuron
# How many parameters a compiled function takes at once. More take longer to compile: with all 12
# layers 47 s of the first step, with three 23 s, with one 18 s. Fewer need more kernel launches: a
# step of 16 rows is 6% slower with three, 30% with one. (One H200 beside slow cores; at 64 rows
# even one costs nothing.)
AT_ONCE = 3

# the name since torch 2.13, and the one before
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Muon(torch.optim.Optimizer):
    """Muon for matrices (out, in) as in nn.Linear, or (E, in, out) for E experts, each on its own.

    A step: momentum ← β momentum + (1 - β) gradient; direction = orthogonalise(β momentum +
    (1 - β) gradient); weight ← (1 - lr · decay) weight - lr · sqrt(max(1, out / in)) · (direction,
    rows evened out).

    A group's "split": the rows of an (out, in) matrix that belong together, such as (q, k, v); each
    part is orthogonalised on its own. compile: for a GPU. Where torch.distributed is initialized,
    all processes must call step together, and every parameter that requires a gradient must have
    one in every step.
    """

    def __init__(self, groups, lr, momentum=0.9, compile=False):
        defaults = {"lr": lr, "weight_decay": 0.0, "split": None, "momentum": momentum}
        super().__init__(groups, defaults)
        self.grad_scale = self.found_inf = None
        self.world, self.rank = 1, 0
        if dist.is_initialized():
            self.world, self.rank = dist.get_world_size(), dist.get_rank()
        # {parameter: the rows of the matrix, or the experts, whose momentum this rank keeps}
        self.own_rows = {p: slice(None) for group in self.param_groups for p in group["params"]}
        for group in self.param_groups:
            for stack in same_shapes(p for p in group["params"] if p.requires_grad):
                share = self._share(stack)
                self.own_rows |= rows_of(stack, self.rank * share, share)
        self._look_ahead, self._orthogonalise = look_ahead, orthogonalise
        self._row_scales, self._move = row_scales, move
        if compile:
            # a graph for each shape, and on several ranks for each part of it
            torch._dynamo.config.recompile_limit = 64
            for name in ("_look_ahead", "_orthogonalise", "_row_scales", "_move"):
                # combo kernels: the work on several matrices in one launch
                options = {"combo_kernels": True}
                function = torch.compile(getattr(self, name), dynamic=False, options=options)
                setattr(self, name, function)

    def new_state(self, p):
        """The whole state of a parameter before its first step, over all ranks."""
        return {"momentum": torch.zeros_like(p), "neuron": torch.zeros_like(neuron_means(p))}

    def own_state(self, p, state):
        """This rank's part of the whole state of a parameter. All ranks keep its "neuron"."""
        if self.world == 1:
            return state
        return state | {"momentum": state["momentum"][self.own_rows[p]].clone()}

    def _share(self, params):
        """How many matrices of a stack each rank orthogonalises; the last ranks may get fewer."""
        return math.ceil(sum(len(as_stack(p)) for p in params) / self.world)

    @torch.no_grad()
    def step(self):
        """Update all parameters from .grad / grad_scale; where found_inf is 1, change nothing.

        grad_scale and found_inf: scalar tensors on the parameters' device, or None.
        """
        moves = []
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for stack in same_shapes(params):
                moves.append(self._start(group, stack))
        # the exchange of all shares has begun before the first is waited for
        for finish in moves:
            finish()

    def _start(self, group, params):
        """Orthogonalise this rank's share of a stack, and begin to exchange the shares.

        Returns a function that waits for the others' and moves the weights.
        """
        one = torch.ones((), dtype=params[0].dtype, device=params[0].device)
        grad_scale = one if self.grad_scale is None else self.grad_scale
        apply = one if self.found_inf is None else one - self.found_inf      # 1, or 0 to skip
        # on the device: a Python number would be compiled into the code
        lr = torch.full_like(one, group["lr"])
        ahead = self._update_momenta(params, group["momentum"], grad_scale, apply)
        rows = list(group["split"] or ahead.shape[1:2])
        parts = [self._orthogonalise(part) for part in ahead.split(rows, dim=1)]
        directions = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        directions, arrived = self._exchange(directions)

        def finish():
            if arrived is not None:
                arrived.wait()
            self._move_all(params, directions, rows, lr, group["weight_decay"], apply)
        return finish

    def _update_momenta(self, params, beta, grad_scale, apply):
        """Update this rank's momenta; returns its matrices to orthogonalise, (share, out, in)."""
        for p in params:
            if not self.state[p]:
                self.state[p] = self.own_state(p, self.new_state(p))
        mine = [p for p in params if len(self.state[p]["momentum"])]
        sizes = [len(as_stack(self.state[p]["momentum"])) for p in mine]
        shape = as_stack(params[0]).shape[1:]
        stack = params[0].new_empty(self._share(params), *shape, dtype=matmul_dtype(params[0]))
        stack[sum(sizes):].zero_()               # the last ranks may have less to do
        outs = dict(zip(mine, stack[: sum(sizes)].split(sizes)))
        for some in in_groups(mine):
            grads = [p.grad[self.own_rows[p]] for p in some]
            momenta = [self.state[p]["momentum"] for p in some]
            self._look_ahead(grads, momenta, [outs[p] for p in some], grad_scale, apply, beta)
        return stack

    def _exchange(self, directions):
        """(the directions of all ranks, what to wait for before they are read, or None)."""
        if self.world == 1:
            return directions, None
        whole = directions.new_empty(self.world * len(directions), *directions.shape[1:])
        return whole, _all_gather(whole, directions, async_op=True)

    def _move_all(self, params, directions, rows, lr, weight_decay, apply):
        """Move the weights along the directions (n, out, in), each row scaled by its factor."""
        sizes = [len(as_stack(p)) for p in params]
        directions = directions[: sum(sizes)]    # the rest is padding: the last ranks had less work
        neurons = [as_stack(self.state[p]["neuron"]) for p in params]
        running, scale = self._row_scales(directions, torch.cat(neurons), lr, apply, rows)
        torch._foreach_copy_(neurons, running.split(sizes))
        sizes = [sum(len(as_stack(p)) for p in some) for some in in_groups(params)]
        for some, *parts in zip(in_groups(params), directions.split(sizes), scale.split(sizes)):
            self._move(some, *parts, lr, weight_decay, apply)


def same_shapes(params):
    """Lists of the parameters that share a shape, in order of first appearance."""
    stacks = {}
    for p in params:
        stacks.setdefault(p.shape, []).append(p)
    return list(stacks.values())


def in_groups(params):
    """Lists of AT_ONCE parameters, the last of what is left."""
    return [params[i: i + AT_ONCE] for i in range(0, len(params), AT_ONCE)]


def as_stack(p):
    """A view of a parameter as matrices (n, out, in)."""
    return p.mT if p.dim() == 3 else p[None]


def rows_of(params, start, share):
    """{parameter: slice of its first dimension} of matrices start to start + share of a stack.

    A slice holds some of the experts; or a whole matrix, or nothing of it.
    """
    rows, first = {}, 0
    for p in params:
        count = len(as_stack(p))
        height = len(p) // count                 # rows per matrix; of experts, 1 of the first dim
        low = min(max(start - first, 0), count)
        high = min(max(start + share - first, 0), count)
        rows[p] = slice(low * height, high * height)
        first += count
    return rows


def neuron_means(square):
    """The mean over a matrix's inputs, one number per output neuron: (out, 1), or (E, 1, out)."""
    return square.mean(1, keepdim=True)          # in (out, in) and in (E, in, out) inputs are dim 1


def look_ahead(grads, momenta, outs, grad_scale, apply, beta):
    """Update the momenta; write what is to be orthogonalised (Nesterov) to outs (n, out, in).

    In a skipped step (apply is 0) gradients are zero and have weight 0: no momentum becomes NaN.
    """
    for grad, momentum, out in zip(grads, momenta, outs):
        grad = torch.where(apply > 0, grad / grad_scale, 0)
        momentum.lerp_(grad, (1 - beta) * apply)
        out.copy_(as_stack(grad.lerp(momentum, beta)))


def matmul_dtype(x):
    """bfloat16 on a GPU; elsewhere the weights' own type: some CPUs are very slow in bfloat16."""
    return torch.bfloat16 if x.is_cuda else x.dtype


def orthogonalise(x):
    """x (n, a, b) with all singular values near 1: U Vᵀ of x = U S Vᵀ. Zero stays zero.

    That is (x xᵀ)^(-1/2) x, in two halves, because rounding loses a Gram matrix's small values.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    gram = x @ x.mT
    at_least_float32 = torch.promote_types(x.dtype, torch.float32)
    # the numbers on the diagonal; torch 2.13 warns while it compiles gram.diagonal()
    trace = gram.flatten(1)[:, ::gram.shape[1] + 1].sum(1, dtype=at_least_float32)
    norm = trace.sqrt()[:, None, None] + 1e-15
    gram = (gram / norm**2).to(x.dtype)
    x = (inverse_root(gram, *FIRST_HALF) / norm).to(x.dtype) @ x
    root = inverse_root(x @ x.mT, *SECOND_HALF)
    return x.mT @ root if tall else root @ x     # root is symmetric; the result lies row by row


def inverse_root(gram, a, pairs):
    """gram (n, k, k) to the power of -1/2, roughly."""
    # eye at least in float32, which a and b need. Not baddbmm: it would copy what it adds to
    dtype = torch.promote_types(gram.dtype, torch.float32)
    eye = torch.eye(gram.shape[-1], dtype=dtype, device=gram.device)
    for b, c in pairs:
        gram = gram @ (b * eye + c * gram).to(gram.dtype)
    return (a * eye + gram).to(gram.dtype)


def row_scales(directions, running, lr, apply, rows):
    """NorMuon: what each output neuron's row of the directions (n, out, in) is multiplied by.

    Row i is divided by the running root mean square of its updates; then all rows of a part (rows:
    the heights of the parts) are scaled by one number that gives back the part's norm. A step is
    lr * sqrt(max(1, out / in)) long in the spectral norm: one lr serves every width. Returns the
    new running mean squares and the factors, both (n, out, 1).
    """
    square = directions.to(running.dtype).square().mean(-1, keepdim=True)
    running = running.lerp(square, (1 - NEURON_BETA) * apply)
    inverse_rms = running.clamp_min(1e-10).rsqrt()
    scales = []
    for part_square, part_inverse in zip(square.split(rows, 1), inverse_rms.split(rows, 1)):
        evened = part_square * part_inverse.square()     # the mean squares after the division
        norm = part_square.sum(1, keepdim=True) / evened.sum(1, keepdim=True).clamp_min(1e-10)
        width = math.sqrt(max(1, part_square.shape[1] / directions.shape[2]))
        scales.append(part_inverse * norm.sqrt() * width)
    return running, torch.cat(scales, dim=1) * (lr * apply)


def move(params, directions, scale, lr, weight_decay, apply):
    """Decay the weights and move them along directions (n, out, in), times scale (n, out, 1)."""
    sizes = [len(as_stack(p)) for p in params]
    for p, direction, factor in zip(params, directions.split(sizes), scale.split(sizes)):
        p = as_stack(p)
        p.mul_(1 - lr * weight_decay * apply).sub_(direction.to(p.dtype) * factor)
