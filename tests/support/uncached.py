"""The referee of generation: the model without a cache, sampling written in plain Python.

Also the prompts and the options that several test files generate with.
"""
import math
import random

import torch

from support.tiny_tokenizer import VOCAB

DENSE, MOE = dict(n_expert=0), dict(n_expert=4)
GREEDY = dict(temperature=0)
SAMPLED = dict(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.2)


def random_ids(length, seed):
    """`length` ids without the control tokens; another seed draws others."""
    return random.Random(seed).choices(range(3, VOCAB), k=length)


def uncached(model, prompt, n, seed=0, stop_ids=(), repetition_penalty=1.0, **sampling):
    """The ids that `generate` must give for one prompt: a full forward pass per token."""
    us = torch.rand(n, generator=torch.Generator().manual_seed(seed)).tolist()
    ids, answer = list(prompt), []
    while len(answer) < n and len(ids) < model.config.block_size:
        logits = model(torch.tensor([ids]))[0, -1].double().tolist()
        for token in set(ids) - set(stop_ids):
            if logits[token] > 0:
                logits[token] /= repetition_penalty
            else:
                logits[token] *= repetition_penalty
        token = draw(logits, us[len(answer)], **sampling)
        answer.append(token)
        ids.append(token)
        if token in stop_ids:
            break
    return answer


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """The token that arrives first: the larger its probability, the shorter it waits."""
    ranked = sorted(range(len(logits)), key=lambda token: -logits[token])
    if temperature == 0:
        return ranked[0]
    ranked = ranked[:top_k or None]
    weights = [math.exp((logits[token] - logits[ranked[0]]) / temperature) for token in ranked]
    arrival, mass = {}, 0.0
    for token, weight in zip(ranked, weights):
        if weight and mass < top_p * sum(weights):
            arrival[token] = waiting_time(u, token) / weight
        mass += weight
    return min(arrival, key=arrival.get)


def waiting_time(u, token):
    """The exponential number that a row's u gives to a token."""
    mixed = mix(mix(token + 1) ^ int(u * 2**24))
    return -math.log1p(-(mixed + 0.5) / 2**32)


def mix(x):
    """A hash of 32 bits."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
    return x ^ (x >> 16)


def rows(model, prompts, n, **options):
    """The rows that one batch gives, each up to its end."""
    steps = list(model.generate(prompts, n, **options))
    answers = []
    for b in range(len(prompts)):
        column = [step[b] for step in steps]
        answer = [token for token in column if token is not None]
        assert column[:len(answer)] == answer, "None stands only behind the end"
        answers.append(answer)
    return answers
