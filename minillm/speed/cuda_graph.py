"""Prefill and decode step as CUDA graphs: recorded once, then launched as one.

Launched one by one, the 750 operations of a token keep the GPU waiting for the host: 10 ms and more
for 12 layers. A graph replays them over the same memory, so everything it reads lies in buffers
that never move: the cache's keys and values, and its DecodeState.
"""
from functools import partial

import torch

from minillm.errors import UserError
from minillm.generation import KVCache, cached_forward, decode_one_token, decode_step, sample_next
from minillm.sampling import sample
from minillm.speed import decode_gpu, decode_ops
from minillm.speed.grouped_mm import ALL_EXPERTS_TOKENS
from minillm.speed.topk import topk_by_parts


class GraphCache(KVCache):
    """A KVCache with the graphs that were recorded over its buffers."""

    def allocate(self, like, n_layer, shape):
        super().allocate(like, n_layer, shape)
        self.prefill_graphs = {}                 # (width, end) → (idx, position, replay, x)
        self.decode_graphs = {}                  # (params, compile) → replay


def capture(function):
    """Record `function`, which takes no arguments, after two calls to warm up.

    Returns (replay, output): replay() runs the function again; output is the tensor it overwrites.
    """
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph.replay, output


def forward(model, cache, idx, position, end):
    """Fast version of generation.cached_forward for prompts. idx, position: still on the host.

    One by one, the operations of 64 tokens took 10 to 20 ms, all of it launching (H200,
    `python -m bench.decode`).
    """
    B, n = idx.shape
    width = next_power_of_two(n)                 # few different widths, since each is captured once
    # more tokens go through grouped_mm, which may sync for its offsets: no graph can hold that
    if model.config.n_expert and B * width > ALL_EXPERTS_TOKENS:
        return cached_forward(model, cache, idx, position, end)
    # a single row, whose prompts grow from turn to turn: always the whole cache, for fewer graphs
    end = cache.size if B == 1 else min(next_power_of_two(end), cache.size)
    if (width, end) not in cache.prefill_graphs:
        cache.prefill_graphs[width, end] = capture_forward(model, cache, B, width, end)
    idx_buffer, position_buffer, replay, x = cache.prefill_graphs[width, end]
    padding = (0, width - n)
    idx_buffer.copy_(torch.nn.functional.pad(idx, padding))
    position_buffer.copy_(torch.nn.functional.pad(position, padding, value=cache.size))
    replay()
    return x


def capture_forward(model, cache, batch, width, end):
    """(idx, position, replay, x): the buffers to fill, the graph, and the tensor it overwrites."""
    device = model.wte.weight.device
    idx = torch.zeros(batch, width, dtype=torch.long, device=device)
    position = torch.full_like(idx, cache.size)  # padding: warming up writes nothing that is read
    replay, x = capture(lambda: cached_forward(model, cache, idx, position, end))
    return idx, position, replay, x


def decode_graph(model, cache, state, params, logits, steps, compile=False, draws=False):
    """Fast version of generation.decode_loop: the GPU is one token ahead of what the host reads.

    compile: with Triton kernels, draws: also the draw; 135,925 tokens/s with 64 rows (H200,
    `python -m bench.decode --batch_size=64`).
    """
    sample_next(state, logits, params, topk_by_parts)
    # one row per step: into a column, torch would copy through memory that is not pinned, and wait
    host = torch.empty(steps, len(state.token), dtype=torch.long, pin_memory=True)
    done = [torch.cuda.Event() for _ in range(steps)]
    host[0].copy_(state.token[:, 0], non_blocking=True)
    done[0].record()
    if steps > 1:
        step = capture_decode(model, cache, state, params, compile, draws)
    for t in range(steps):
        if t + 1 < steps:
            step()
            host[t + 1].copy_(state.token[:, 0], non_blocking=True)
            done[t + 1].record()
        done[t].synchronize()
        yield host[t].tolist()


def capture_decode(model, cache, state, params, compile, draws=False):
    """decode_step over these buffers as one graph, kept in the cache. Returns its replay.

    Warming up leaves keys and values after the prompt; they are written again before they are read.
    """
    key = params.without_length, compile
    if key not in cache.decode_graphs:
        if compile:
            ops, kernels = triton_kernels()
            step = partial(decode_gpu.decode_step, ops, kernels.sample_next if draws else None,
                           model, cache, state, params)
        else:
            step = partial(decode_step, model, cache, state, params, cache.size,
                           topk=topk_by_parts)
        buffers = (state.token, state.step, state.seen)
        before = [buffer.clone() for buffer in buffers]
        replay, _ = capture(step)
        for buffer, value in zip(buffers, before):
            buffer.copy_(value)
        cache.decode_graphs[key] = replay
    return cache.decode_graphs[key]


def triton_kernels():
    """(decode_kernels, draw_kernels). Raises UserError where Triton is missing."""
    try:
        # late: torch for a CPU comes without it
        from minillm.speed import decode_kernels, draw_kernels
    except ImportError as error:
        raise UserError(f"--compile=True needs Triton, which torch brings along on Linux: {error}")
    return decode_kernels, draw_kernels


def next_power_of_two(n):
    return 1 << (n - 1).bit_length()


def decode_rows(model, cache, token, position, end, compile=False):
    """Fast version of generation.decode_one_token for batch_decoder.CacheRows, which own the graph.

    token, position: (B, 1), on the host. It always looks at all slots: one graph for every `end`.
    compile: with Triton kernels.
    """
    if cache.graph is None:
        device = model.wte.weight.device
        buffers = torch.zeros_like(token, device=device), torch.zeros_like(position, device=device)
        buffers[1].fill_(cache.size)             # padding: warming up writes nothing that is read
        if compile:
            step = partial(decode_gpu.decode_one_token, triton_kernels()[0], model, cache, *buffers)
        else:
            step = partial(decode_one_token, model, cache, *buffers, cache.size)
        cache.graph = *buffers, *capture(step)
    token_buffer, position_buffer, replay, logits = cache.graph
    token_buffer.copy_(token, non_blocking=True)
    position_buffer.copy_(position, non_blocking=True)
    replay()
    return logits


class RecordedSample:
    """Fast version of sampling.sample for a BatchDecoder: its 60 small kernels as one CUDA graph.

    compile: where it can be, four Triton kernels. Clients choose the settings, so only MOST graphs
    are recorded: the usual settings come early.
    """
    MOST = 16

    def __init__(self, rows, compile=False):
        self.rows, self.compile = rows, compile
        self.logits, self.u = None, None
        self.graphs = {}                         # (rows, settings) → (replay, tokens)

    def __call__(self, logits, u, *settings):
        count = len(u)
        rows = min(next_power_of_two(count), self.rows)
        draw = partial(sample, topk=topk_by_parts)
        if self.compile and decode_ops.from_few(settings, logits.shape[1]):
            draw = triton_kernels()[1].sample
        if self.logits is None:
            self.logits = u.new_zeros(self.rows, logits.shape[1])        # float32
            self.u = u.new_zeros(self.rows)
        if (rows, settings) not in self.graphs:
            if len(self.graphs) == self.MOST:
                return draw(logits, u, *settings)
            self.graphs[rows, settings] = capture(
                lambda: draw(self.logits[:rows], self.u[:rows], *settings))
        replay, tokens = self.graphs[rows, settings]
        self.logits[:count].copy_(logits)        # what the other rows hold does not matter
        self.u[:count].copy_(u)
        replay()
        return tokens[:count]


def read_row(model, cache, idx, position, end, staging):
    """Fast version of generation.cached_forward for a prompt of one of batch_decoder.CacheRows.

    staging: a GraphCache of one row, where the graphs are: one for each width, not for each row.
    The row is copied there and back, which takes a few microseconds. Together with RecordedSample
    64 clients get 18,905 tokens/s (H200, `python -m bench.serve`; 36,300 with --compile=True).
    """
    row, there = cache.k + cache.v, staging.k + staging.v
    # all of it: beyond the tokens that are kept the last prompt may have left NaN
    torch._foreach_copy_(there, row)
    x = forward(model, staging, idx, position, end)
    torch._foreach_copy_(row, there)
    return x


def power_of_two_rows(first, last, rows):
    """The rows to decode where those from first to last - 1 are active: few different graphs."""
    return 0, min(next_power_of_two(last), rows)
