"""Bad input to python -m bench.decode."""
from support.bad_input import Case, check, common, parametrize

CASES = [
    Case("no GPU", "--device=cuda", "torch sees 0 GPUs"),
    Case("unknown dtype", "--device=cpu --dtype=int8", "unknown dtype 'int8'"),
    Case("no batch", "--device=cpu --batch_size=0", "batch_size=0"),
    Case("no repeats", "--device=cpu --repeats=-1", "repeats=-1"),
    Case("fewer than no tokens", "--device=cpu --new_tokens=-1", "new_tokens=-1"),
    Case("no prompt", "--device=cpu --prompt=0", "prompt=0"),
]


@parametrize(CASES + common("prompt", near="promt"))
def test_bad_input(project, case):
    check(project, "bench.decode", case)
