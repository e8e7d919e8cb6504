"""Whether a fast version still computes what the plain one does. For fast_versions.py.

A change of model.py, moe.py or sampling.py counts at once: a fast version that computes something
else is left out, with one line on stderr. Each check compares on small copies of the model, in some
10 ms.
"""
import warnings

import torch

from minillm import generation
from minillm.distributed import warn0
from minillm.errors import UserError
from minillm.generation import DecodeState, KVCache, decode_one_token, prefill
from minillm.same_function import copies, in_a_line, one_thread, same, text
from minillm.sampling_params import SamplingParams

STEPS = 4                            # of decoding that are compared
TOKENS = 40                          # rows for the experts and the loss


def agrees(model, name, check, *args):
    """check(copy, *args) of the model's small copies; if it is False, a line says so, once a model.

    name: the fast version's file, perhaps with the function in it.
    """
    verdicts = model.__dict__.setdefault("_agreements", {})
    if name in verdicts:
        return verdicts[name]
    problem = disagreement(model, check, *args)
    verdicts[name] = problem is None
    if problem:
        warn0(f"{name} {problem}: it is left out, the plain code runs instead; "
              "make the same change there to have it back")
    return verdicts[name]


def insist(model, name, check, *args, advice):
    """Raise UserError where agrees() would be False, for what has no plain version to run."""
    if problem := disagreement(model, check, *args):
        raise UserError(f"{name} {problem}: make the same change there, or {advice}")


@one_thread()
def disagreement(model, check, *args):
    """None if the check holds, else what is wrong: words to follow the file's name."""
    try:
        with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")      # flex_attention warns of what is not compiled
            if all(check(copy, *args) for copy in copies(model)):
                return None
    except Exception as error:       # a changed model's own: a size that it refuses, another shape
        return f"does not fit the model ({in_a_line(error)})"
    return "computes something else than model.py, moe.py or sampling.py"


def normal_numbers(*shape):
    """Normally distributed numbers, float64, the same for every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def decodes(copy, step, cache_type, rows=1):
    """Do decode steps make the logits of generation.decode_one_token?"""
    ids = text(copy).repeat(rows, 1)
    fast, plain = cache_type(copy, rows), KVCache(copy, rows)
    for cache in (fast, plain):
        prefill(copy, cache, ids[:, :-STEPS].tolist())
    for t in range(ids.shape[1] - STEPS, ids.shape[1]):
        place = ids[:, t: t + 1], torch.full((rows, 1), t), t + 1
        if not same(step(copy, fast, *place), decode_one_token(copy, plain, *place)):
            return False
    return True


def draws(copy, sample_next):
    """Does it draw the tokens that generation.sample_next draws, whatever the settings?"""
    logits = 4 * normal_numbers(8, 5000).float()
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=0.8, top_k=20),
                   SamplingParams(top_k=50, top_p=0.9),
                   SamplingParams(top_k=20, repetition_penalty=1.3)):
        states = []
        for function in (sample_next, generation.sample_next):
            state = DecodeState(copy, len(logits), STEPS)
            state.u.copy_(normal_numbers(*state.u.shape).abs() % 1)
            state.seen = normal_numbers(*logits.shape) > 0.5
            tokens = []
            for _ in range(STEPS):
                function(state, logits, params)
                tokens.append(state.token.clone())
            states.append((torch.cat(tokens), state.seen, state.step))
        if not all(map(torch.equal, *states)):
            return False
    return True


def multiplies_experts(copy, experts, tolerance=1e-4):
    """Do the fast experts give what those of moe.py give in each layer, and the same gradients?"""
    x_ND = normal_numbers(TOKENS, copy.config.n_embd)
    for _, moe in copy.moe_layers():
        gate_NK, expert_NK = moe.router(x_ND)
        results = []
        for function in (experts, moe.experts):
            inputs = [x.detach().clone().requires_grad_()
                      for x in (x_ND, gate_NK, moe.w1_EDF, moe.w2_EFD)]
            x, gate, w1, w2 = inputs
            with torch.enable_grad():
                y = function(x, gate, expert_NK, w1, w2)
            results.append([y, *torch.autograd.grad(y, inputs, normal_numbers(*y.shape))])
        if not all(same(found, expected, tolerance) for found, expected in zip(*results)):
            return False
    return True


def chooses_experts(copy, top_experts):
    """Does it choose the experts that moe.py's function chooses?"""
    logits_NE = normal_numbers(TOKENS, copy.config.n_expert)
    for _, moe in copy.moe_layers():
        expected = moe.router.top_experts(logits_NE, moe.router.k)
        if not torch.equal(top_experts(logits_NE, moe.router.k), expected):
            return False
    return True


def has_the_loss(copy, cross_entropy):
    """Does it give the loss of copy.cross_entropy, and the same gradients?"""
    targets = torch.arange(TOKENS) % (len(copy.wte.weight) + 1) - 1
    results = []
    for function in (cross_entropy, copy.cross_entropy):
        inputs = [normal_numbers(TOKENS, copy.config.n_embd).requires_grad_(),
                  copy.wte.weight.clone().requires_grad_()]
        with torch.enable_grad():
            loss = function(*inputs, targets)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    return all(same(found, expected) for found, expected in zip(*results))


def runs_the_blocks(copy, trunk):
    """Does trunk(model, idx, rope, attend) give what GPT.trunk gives, statistics included?"""
    seen = []

    def keep(idx, rope, attend):
        seen.append((trunk(copy, idx, rope, attend), plain(idx, rope, attend)))
        return seen[0][1]
    plain, copy.trunk = copy.trunk, keep
    copy(text(copy))
    found, expected = seen[0]
    tensors, others = [[x, *(stats or ())] for x, stats in (found, expected)]
    return len(tensors) == len(others) and all(map(same, tensors, others))
