"""Bad input to eval.py."""
from support.bad_input import Case, check, common, parametrize
from support.damage import append, cut, meta, no_gpu, put, put_token, remove, uncounted
from support.small_project import CHECKPOINT

GOOD = '{"question": "q", "choices": ["a", "b"], "answer": 0}\n'

CASES = [
    Case("no model", "--out_dir=nowhere", "no model in nowhere.*train.py"),
    Case("no checkpoint", "--out_dir=pre", "no newest checkpoint in pre"),
    Case("no best", "--out_dir=out --checkpoint=best",
         "no best checkpoint in out", remove("out/best.pt")),
    Case("unknown checkpoint", "--out_dir=out --checkpoint=oldest",
         "'oldest' must be newest, best or the number of a step"),
    Case("half a checkpoint", "--out_dir=out",
         "ckpt_00000002.pt, it is damaged or cut short", cut(CHECKPOINT, 0.5)),
    Case("no tokenizer in it", "--out_dir=out",
         "cannot read out/tokenizer/tokenizer.json", remove("out/tokenizer/tokenizer.json")),
    Case("another tokenizer in it", "--out_dir=out",
         "is not the tokenizer that the model in out was trained with",
         append("out/tokenizer/tokenizer.json", b" ")),
    Case("no config.py", "--out_dir=out", "out/config.py", remove("out/config.py")),
    Case("config.py lacks what is needed", "--out_dir=out",
         "out/config.py lacks data_dir, doc_mask", put("out/config.py", "seed = 1\n")),
    Case("data gone", "--out_dir=out", "cannot read pre/meta.json", remove("pre")),
    Case("data of another tokenizer", "--out_dir=out",
         "pre was prepared with another tokenizer", meta("pre", tokenizer_hash="0" * 64)),
    Case("SFT data of another block_size", "--out_dir=out --data_dir=sft",
         "sft was packed for block_size=32", meta("sft", block_size=32)),
    Case("meta.json counts no bytes", "--out_dir=out",
         "meta.json does not count 'bytes'", uncounted("pre", "bytes")),
    Case("no questions file", "--out_dir=out --questions=nowhere.jsonl",
         "no such file or directory: nowhere.jsonl"),
    Case("questions without answers", "--out_dir=out --questions=corpus.jsonl",
         "corpus.jsonl holds no chat that ends with an answer"),
    Case("no choices file", "--out_dir=out --choices=nowhere.csv",
         "cannot read nowhere.csv: No such file or directory"),
    Case("choices that are not JSON", "--out_dir=out --choices=mc.jsonl",
         "mc.jsonl:2: not a line of JSON", put("mc.jsonl", GOOD + "{\n")),
    Case("choices that are a list", "--out_dir=out --choices=mc.jsonl",
         "mc.jsonl:1: not a JSON object", put("mc.jsonl", "[1]\n")),
    Case("no question", "--out_dir=out --choices=mc.jsonl",
         "mc.jsonl:1: no question", put("mc.jsonl", '{"choices": ["a", "b"], "answer": 0}\n')),
    Case("a single choice", "--out_dir=out --choices=mc.csv",
         "mc.csv:2: fewer than two choices", put("mc.csv", "question,A,answer\nq,a,A\n")),
    Case("a choice that is a number", "--out_dir=out --choices=mc.jsonl",
         "mc.jsonl:1: a choice that is not text",
         put("mc.jsonl", '{"question": "q", "choices": [1, 2], "answer": 0}\n')),
    Case("an answer that is no choice", "--out_dir=out --choices=mc.csv",
         "mc.csv:2: answer 'E' is none of its choices",
         put("mc.csv", "question,A,B,answer\nq,a,b,E\n")),
    Case("an answer beyond the choices", "--out_dir=out --choices=mc.jsonl",
         "mc.jsonl:1: answer 2 is none",
         put("mc.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": 2}\n')),
    Case("choices are not UTF-8", "--out_dir=out --choices=mc.csv",
         "mc.csv is not UTF-8 text", put("mc.csv", b"question,A,B,answer\n\xff,a,b,A\n")),
    Case("no multiple-choice question", "--out_dir=out --choices=mc.csv",
         "mc.csv holds no questions", put("mc.csv", "question,A,B,answer\n")),
    Case("no batch", "--out_dir=out --batch_size=0", "batch_size"),
    Case("negative eval_iters", "--out_dir=out --eval_iters=-1", "eval_iters"),
    Case("negative show", "--out_dir=out --show=-1", "show"),
    Case("no tokens", "--out_dir=out --max_new_tokens=0", "max_new_tokens"),
    Case("no GPU", "--out_dir=out --device=cuda:7", "torch sees", no_gpu),
    Case("unknown dtype", "--out_dir=out --dtype=bits", "unknown dtype 'bits'"),
    Case("id outside the vocabulary", "--out_dir=out",
         "pre/val.bin: token 3 is 999, outside the vocabulary", put_token("pre/val.bin", 3, 999)),
]


@parametrize(CASES + common("batch_size", near="batchsize"))
def test_bad_input(project, case):
    check(project, "eval", case)
