"""Bad input to python -m bench.train."""
from support.bad_input import Case, check, common, parametrize

CASES = [
    Case("no GPU", "--device=cuda", "torch sees 0 GPUs"),
    Case("unknown dtype", "--device=cpu --dtype=int8", "unknown dtype 'int8'"),
    Case("negative batch", "--device=cpu --batch_size=-4", "batch_size=-4"),
    Case("no repeats", "--device=cpu --repeats=0", "repeats=0"),
    Case("no token files", "--device=cpu --data_dir=nowhere", "cannot read nowhere/meta.json"),
    Case("a vocabulary smaller than the tokenizer's", "--device=cpu --data_dir=pre --vocab_size=50",
         "pre has 300 tokens: give --vocab_size=300"),
    Case("a word", "decode", "unexpected argument 'decode'"),
]


@parametrize(CASES + common("repeats", near="repeat"))
def test_bad_input(project, case):
    check(project, "bench.train", case)
