"""Bad input to chat.py."""
from support.bad_input import Case, check, common, parametrize
from support.damage import cut, put
from support.small_project import CHECKPOINT, LONG

CASES = [
    Case("no model", "--out_dir=nowhere --prompt=你好", "no model in nowhere"),
    Case("no model for the demo", "--prompt=你好", "no model in out/demo_sft: `make demo`"),
    Case("no model, and nothing on stdin", "--out_dir=nowhere", "no model in nowhere"),
    Case("nothing on stdin", "--out_dir=out", "there is no message: stdin is empty"),
    Case("stdin is not UTF-8", "--out_dir=out", "not UTF-8", stdin=b"\xc3\x28\xff"),
    Case("message longer than the context", f"--out_dir=out --prompt={LONG}",
         r"the message is \d+ tokens long.*the context holds 64"),
    Case("system prompt longer than the context", f"--out_dir=out --prompt=你好 --system={LONG}",
         r"a system prompt of \d+ tokens does not fit"),
    Case("no room at all", "--out_dir=out --prompt=你好 --truncate_ctx=3", "context|truncate_ctx"),
    Case("negative truncate_ctx", "--out_dir=out --prompt=你好 --truncate_ctx=-1", "truncate_ctx=-1"),
    Case("temperature is infinite", "--out_dir=out --prompt=你好 --temperature=inf", "temperature"),
    Case("no tokens", "--out_dir=out --prompt=你好 --max_new_tokens=-3", "max_new_tokens"),
    Case("a checkpoint of zeros", "--out_dir=out --prompt=你好",
         "ckpt_00000002.pt, it is damaged", put(CHECKPOINT, bytes(5000))),
    Case("tokenizer cut short", "--out_dir=out --prompt=你好",
         "out/tokenizer/tokenizer.json is damaged", cut("out/tokenizer/tokenizer.json", 0.9)),
]


@parametrize(CASES + common("max_new_tokens", near="max_new_token"))
def test_bad_input(project, case):
    check(project, "chat", case)
