"""The benchmark of training: what it prints belongs together, and its batches from files are those of train.py."""
import re

import torch

from bench import train as bench
from minillm.dataloader import TokenData, batch_windows
from support.preparation_runs import command
from support.tiny_tokenizer import VOCAB
from support.training_runs import make_data


def test_train_from_files(tmp_path):
    data = make_data(tmp_path / "data")
    output = command("bench.train", "train", "--device=cpu", "--compile=False", "--repeats=3", "--batch_size=4", f"--data_dir={data}")
    step, rate = float(re.search(r"step +([\d.]+) ms", output)[1]), float(re.search(r"tokens/s +([\d,]+)", output)[1].replace(",", ""))
    assert abs(rate * step / 1e3 / (4 * 128) - 1) < 0.02
    read, drawn, more = (float(number) for number in re.search(r"from files +([\d.]+) ms.*with it ([\d.]+) ms: ([-+\d.]+)%", output).groups())
    assert read > 0 and abs((read / drawn - 1) * 100 - more) < 0.2


def test_batches_from_files_are_those_of_the_training(tmp_path):
    s = bench.Settings(data_dir=str(make_data(tmp_path / "data")), batch_size=3, block_size=16, vocab_size=VOCAB)
    data = TokenData(s.data_dir, "train", 16)
    for step, batch in zip(range(5), bench.file_batches(s, torch.device("cpu"))):
        expected = data.windows(batch_windows(0, step, 3, data.n_windows))
        assert all(map(torch.equal, batch, expected))
