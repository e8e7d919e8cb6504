"""The benchmarks: what they print belongs together; batches from files are those of train.py."""
import itertools
import re

import torch

from bench import measure
from bench import train as bench
from minillm.dataloader import TokenData, batch_windows
from support.preparation_runs import command
from support.tiny_tokenizer import VOCAB
from support.training_runs import make_data


def figures(pattern, text):
    """The numbers that the groups of `pattern` match."""
    return [float(number.replace(",", "")) for number in re.search(pattern, text).groups()]


def test_train_from_files(tmp_path):
    data = make_data(tmp_path / "data")

    output = command("bench.train", "--device=cpu", "--compile=False", "--repeats=3",
                     "--batch_size=4", f"--data_dir={data}")

    [step] = figures(r"step +([\d.]+) ms", output)
    [rate] = figures(r"tokens/s +([\d,]+)", output)
    assert abs(rate * step / 1e3 / (4 * 128) - 1) < 0.02
    read, drawn, more = figures(r"from files +([\d.]+) ms.* ([\d.]+) ms: ([-+\d.]+)%", output)
    assert read > 0 and abs((read / drawn - 1) * 100 - more) < 0.2


def test_batches_from_files_are_those_of_the_training(tmp_path):
    s = bench.Settings(data_dir=str(make_data(tmp_path / "data")), batch_size=3, block_size=16,
                       vocab_size=VOCAB)
    data = TokenData(s.data_dir, "train", 16)

    batches = list(itertools.islice(bench.file_batches(s, torch.device("cpu")), 5))

    for step, batch in enumerate(batches):
        expected = data.windows(batch_windows(0, step, 3, data.n_windows))
        assert all(map(torch.equal, batch, expected))


def test_decode_on_a_cpu():
    output = command("bench.decode", "--device=cpu", "--dtype=float32", "--repeats=2", "--prompt=5",
                     "--new_tokens=4", "--n_layer=1", "--n_embd=64", "--n_head=4", "--n_kv_head=2",
                     "--vocab_size=300", "--n_expert=4")

    rate, step = figures(r"float32 +([\d.]+) tokens/s +([\d.]+) ms per step", output)
    assert abs(rate * step / 1e3 - 1) < 0.01 + 0.005 / step


def test_median_time_leaves_the_warm_up_out(monkeypatch):
    now = 0
    took = iter([50, 40, 1, 2, 9])

    def work():
        nonlocal now
        now += next(took)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)

    assert measure.median_time(work, 3, torch.device("cpu"), warmup=2) == 2


def test_kernels_are_told_apart():
    assert measure.kind_of("void flash_fwd_kernel") == "attention"
    assert measure.kind_of("nvjet_hsh_128x256") == "matmul"
    assert measure.kind_of("triton_poi_fused_add") == "fused element-wise and reductions"
    assert measure.kind_of("memcpy") == "other"
