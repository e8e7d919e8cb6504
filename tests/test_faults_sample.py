"""Bad input to sample.py."""
from support.bad_input import Case, check, common, parametrize
from support.damage import cut, forbid
from support.small_project import CHECKPOINT, LONG

CASES = [
    Case("no model", "--out_dir=nowhere", "no model in nowhere"),
    Case("no model, and no text on stdin", "--out_dir=nowhere --prompt=-", "no model in nowhere",
         stdin=b"\xc3\x28\xff"),
    Case("a file for the model", "--out_dir=corpus.jsonl", "no model in corpus.jsonl"),
    Case("no such checkpoint", "--out_dir=out/ckpt_00000009.pt",
         "no model in out/ckpt_00000009.pt: there is no such file"),
    Case("no exported model", "--out_dir=hf:out", "no model of export.py in out"),
    Case("half a checkpoint", "--out_dir=out",
         "ckpt_00000002.pt, it is damaged or cut short", cut(CHECKPOINT, 0.5)),
    Case("unknown checkpoint", "--out_dir=out --checkpoint=oldest", "'oldest' must be newest, best or the number of a step"),
    Case("prompt longer than the context", f"--out_dir=out --prompt={LONG}",
         r"the prompt is \d+ tokens long, the context holds 64.*--truncate_ctx"),
    Case("prompt is not UTF-8", "--out_dir=out --prompt=-",
         "the prompt is not UTF-8 text", stdin=b"\xff\xfe\xfd"),
    Case("no samples", "--out_dir=out --num_samples=0", "num_samples=0 must be at least 1"),
    Case("more samples than memory", "--out_dir=out --num_samples=1e13",
         "num_samples=10000000000000 must be"),
    Case("no tokens", "--out_dir=out --max_new_tokens=0", "max_new_tokens"),
    Case("negative temperature", "--out_dir=out --temperature=-1", "temperature"),
    Case("temperature is no number", "--out_dir=out --temperature=nan", "temperature"),
    Case("negative top_k", "--out_dir=out --top_k=-1", "top_k"),
    Case("top_p 0", "--out_dir=out --top_p=0", "top_p"),
    Case("top_p above 1", "--out_dir=out --top_p=1.5", "top_p"),
    Case("repetition_penalty 0", "--out_dir=out --repetition_penalty=0", "repetition_penalty"),
    Case("negative truncate_ctx", "--out_dir=out --truncate_ctx=-5", "truncate_ctx=-5"),
    Case("unknown dtype", "--out_dir=out --dtype=half-ish", "unknown dtype"),
    Case("no GPU", "--out_dir=out --device=cuda", "torch sees 0 GPUs"),
    Case("unreadable checkpoint", "--out_dir=out",
         "ckpt_00000002.pt.*Permission denied", forbid(CHECKPOINT)),
]


@parametrize(CASES + common("num_samples", near="num_sample"))
def test_bad_input(project, case):
    check(project, "sample", case)
