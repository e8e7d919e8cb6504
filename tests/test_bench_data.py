"""The benchmark of preparation: it runs, and its figures belong together."""
import re

from bench import data as bench
from support.preparation_runs import command


def test_it_runs():
    output = command("bench.data", "--megabytes=1", "--repeats=1")

    for stage in ("prepare_pretrain.py", "prepare_sft.py"):
        figures = output.split(stage)[1]
        assert re.search(r"bare loop +[\d.]+ s +[\d.]+ MB/s +[\d,]+ tokens/s", figures)
        assert re.search(r"preparation +[\d.]+ s +[\d.]+ MB/s +[\d,]+ tokens/s", figures)
        assert re.search(r"ratio +[\d.]+%", figures)
        peak = re.search(r"peak memory of the preparation ([\d,]+) MiB", figures)[1]
        assert 20 < int(peak.replace(",", "")) < 1024


def test_medians_and_their_ratio(monkeypatch, capsys):
    seconds = {bench.BARE: iter([9, 4, 3]), "prepare_sft": iter([5, 80, 6])}
    peaks = iter([2 << 20, 1 << 20, 1 << 20])

    def measured(arguments):
        name = arguments[0]
        record = {"seconds": next(seconds[name])}
        if name == bench.BARE:
            return record | {"bytes": 12_000_000, "tokens": 6_000_000}
        return record | {"peak": next(peaks)}
    monkeypatch.setattr(bench, "in_a_child", measured)

    bench.compare(bench.Settings(repeats=3), "prepare_sft", "chats.jsonl", "tokenizer", "out")

    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        "prepare_sft.py 12 MB of text, 6,000,000 tokens".split(),
        "bare loop 4.00 s 3.00 MB/s 1,500,000 tokens/s".split(),
        "preparation 6.00 s 2.00 MB/s 1,000,000 tokens/s".split(),
        "ratio 66.7% peak memory of the preparation 2 MiB".split(),
    ]
