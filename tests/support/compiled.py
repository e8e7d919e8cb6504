"""What torch.compile is given to compile."""
import torch


def count_graphs(monkeypatch):
    """A list that every graph joins when it is compiled; the graphs then run as they are."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: torch_compile(f, backend=count))
    return graphs
