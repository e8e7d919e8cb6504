"""Muon on any number of ranks, which are threads here, and what of it is compiled."""
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from minillm import muon
from support.compiled import count_graphs
from support.muon_matrices import all_of, matrices, muon_of, set_gradients
from support.processes import LIMIT

# ---- on several ranks

class Ranks:
    """Ranks of a job, as threads: what minillm/muon.py needs of torch.distributed."""

    def __init__(self, monkeypatch, world):
        self.world, self.here = world, threading.local()
        self.barrier, self.sent = threading.Barrier(world, timeout=LIMIT), {}
        fake = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: world,
                               get_rank=lambda: self.here.rank)
        monkeypatch.setattr(muon, "dist", fake)
        monkeypatch.setattr(muon, "_all_gather", self.all_gather)

    def run(self, job):
        """[job(rank) of each rank], side by side."""
        def begin(rank):
            self.here.rank, self.here.exchanges = rank, 0
            try:
                return job(rank)
            except BaseException:
                self.barrier.abort()             # the others wait for nobody
                raise
        with ThreadPoolExecutor(self.world) as pool:
            return [done.result() for done in [pool.submit(begin, r) for r in range(self.world)]]

    def all_gather(self, whole, part, async_op):
        assert async_op and part.is_contiguous() and part.isfinite().all()
        number = self.here.exchanges
        self.here.exchanges += 1
        self.sent[number, self.here.rank] = part

        def wait():
            self.barrier.wait()
            torch.cat([self.sent[number, rank] for rank in range(self.world)], out=whole)
        return SimpleNamespace(wait=wait)


def train_a_little(p):
    """Four steps, the third of them bad; one matrix and one stack of experts are frozen.

    Returns the Muon.
    """
    frozen = {p["up"][1], p["experts"][0]}
    for x in frozen:
        x.requires_grad_(False)
    optimizer = muon_of(p)
    for step in range(4):
        set_gradients([x for x in all_of(p) if x not in frozen], step)
        optimizer.grad_scale = torch.tensor(2.0)
        optimizer.found_inf = torch.tensor(float(step == 2))
        if step == 2:
            for x in p["down"]:
                x.grad.view(-1)[3] = float("nan")
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("world", [2, 3, 4, 5, 17])
def test_any_number_of_ranks_computes_what_one_computes(monkeypatch, world):
    """Experts of a parameter on two ranks, ranks that have nothing to do."""
    expected = matrices()
    one = train_a_little(expected)
    parameters = [matrices() for _ in range(world)]
    # what nobody writes is NaN
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *shape, **options:
                        self.new_full(shape, float("nan"), **options))

    muons = Ranks(monkeypatch, world).run(lambda rank: train_a_little(parameters[rank]))

    for p, optimizer in zip(parameters, muons):
        for x, y in zip(all_of(p), all_of(expected)):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
            assert x in optimizer.state or not x.requires_grad
            if x.requires_grad:
                own = one.state[y]["momentum"][optimizer.own_rows[x]]
                torch.testing.assert_close(optimizer.state[x]["momentum"], own, rtol=1e-10,
                                           atol=1e-12)


# ---- compiled

def step_compiled(monkeypatch, count, rank=0, world=1):
    """The graphs that are compiled in two steps with `count` matrices of each shape."""
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        graphs = count_graphs(patch)
        p = matrices(count=count)
        if world > 1:
            fake = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: world,
                                   get_rank=lambda: rank)
            patch.setattr(muon, "dist", fake)
            patch.setattr(muon, "_all_gather", lambda whole, part, async_op: SimpleNamespace(
                wait=lambda: whole.view(world, *part.shape).copy_(part)))
        optimizer = muon_of(p, compile=True)
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for step in range(2):
                set_gradients(all_of(p), step)
                optimizer.step()
    return graphs, p


def test_more_layers_are_no_more_to_compile(monkeypatch):
    """They are compiled for a few at once; the next few share the graph."""
    few, _ = step_compiled(monkeypatch, 6)
    many, p = step_compiled(monkeypatch, 12)

    sizes = [sum(len(graph.graph.nodes) for graph in graphs) for graphs in (few, many)]
    assert sizes[0] == sizes[1]
    # four shapes; the product also sees q apart from k and v, which are alike
    assert len(few) == len(many) == 4 * 3 + 5
    plain = matrices(count=12)
    optimizer = muon_of(plain)
    for step in range(2):
        set_gradients(all_of(plain), step)
        optimizer.step()
    torch.testing.assert_close(all_of(p), all_of(plain))


def test_the_parts_of_every_rank_are_compiled(monkeypatch):
    """Each kind of part is a graph; torch gives up at eight, without a word."""
    graphs, _ = step_compiled(monkeypatch, 29, rank=1, world=4)

    # of its 8 matrices of each shape: 3 and what is left; experts begin and end within a parameter
    look_ahead = 3 * 2 + 3
    assert look_ahead > 8
    assert len(graphs) == look_ahead + 5 + 4 + 4 * 2
