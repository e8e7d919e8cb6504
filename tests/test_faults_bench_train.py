"""Bad input to python -m bench.train."""
from support.bad_input import Case, check, common, parametrize
from support.damage import no_gpu

CASES = [
    Case("unknown bench", "speed", "bench.train measures train, decode or data, not 'speed'"),
    Case("no GPU", "train --device=cuda", "torch sees 0 GPUs", no_gpu),
    Case("unknown dtype", "train --device=cpu --dtype=int8", "unknown dtype 'int8'"),
    Case("negative batch", "train --device=cpu --batch_size=-4", "batch_size=-4"),
    Case("no repeats", "train --device=cpu --repeats=0", "repeats=0"),
    Case("no repeats of decoding", "decode --device=cpu --repeats=-1", "repeats=-1"),
    Case("no token files", "train --device=cpu --data_dir=nowhere",
         "cannot read nowhere/meta.json"),
    Case("no tokens", "decode --device=cpu --new_tokens=0", "new_tokens=0"),
    Case("no prompt", "decode --device=cpu --prompt=0", "prompt=0"),
]


@parametrize(CASES + common("repeats", near="repeat"))
def test_bad_input(project, case):
    check(project, "bench.train", case)
