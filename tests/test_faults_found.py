"""Bad input that was found by trying to break the programs: one line, and nothing left behind."""
import json
import math
from typing import NamedTuple

import pytest
import torch

from support.bad_input import Case, check
from support.damage import make, planned, put
from support.processes import finish
from support.small_project import CHECKPOINT, TRAIN


class Found(NamedTuple):
    program: str
    case: Case


@planned
def spoil(change):
    """Change the checkpoint of out."""
    state = torch.load(CHECKPOINT)
    change(state)
    torch.save(state, CHECKPOINT)


@planned
def spoil_tokenizer(change):
    with open("tok/tokenizer.json", encoding="utf-8") as file:
        content = json.load(file)
    change(content)
    with open("tok/tokenizer.json", "w", encoding="utf-8") as file:
        json.dump(content, file)


@planned
def spoil_counts(**counts):
    with open("pre/meta.json", encoding="utf-8") as file:
        content = json.load(file)
    content["splits"]["val"] |= counts
    with open("pre/meta.json", "w", encoding="utf-8") as file:
        json.dump(content, file)


def config(**changes):
    return spoil(lambda state: state["model_config"].update(changes))


def not_finite(state):
    state["model"]["norm.weight"][0] = math.nan


def of_words(content):
    content["model"] = {"type": "WordLevel", "unk_token": "a", "vocab": content["model"]["vocab"]}


def without_a_byte(content):
    """The token of byte 0xE5, with which the characters of 天 and 好 begin, has another name."""
    model = content["model"]
    model["vocab"]["zzzz"] = model["vocab"].pop("å")
    model["merges"] = [pair for pair in model["merges"] if "å" not in str(pair)]


PREPARE = "corpus.jsonl --tokenizer=tok --out_dir=new"
NOT_OURS = "tok/tokenizer.json was not trained by train_tokenizer.py: it "

CASES = [
    # weights and shapes that give NaN: text of nothing, with exit status 0
    Found("sample", Case("weights with NaN", "--out_dir=out", "the model computes NaN or infinity",
                         spoil(not_finite))),
    Found("chat", Case("weights with NaN", "--out_dir=out --prompt=天",
                       "the model computes NaN or infinity", spoil(not_finite))),
    Found("eval", Case("weights with NaN", "--out_dir=out",
                       "the loss on pre is nan: the model's weights are not finite",
                       spoil(not_finite))),
    Found("sample", Case("rope_theta NaN", "--out_dir=out",
                         "model_config has rope_theta=nan, which is no finite number",
                         config(rope_theta=math.nan))),
    Found("train", Case("rope_theta 0", TRAIN + "--init_from=out",
                        "model_config has rope_theta=0.0, which must be at least 1",
                        config(rope_theta=0.0))),
    Found("sample", Case("a width that fills all memory", "--out_dir=out",
                         r"wte.weight is torch.float32 of shape \(300, 16\), not \(300, 4194304\)",
                         config(n_embd=2**22))),
    # settings whose numbers leave float32
    Found("sample", Case("a penalty of 1e300", "--out_dir=out --repetition_penalty=1e300",
                         "repetition_penalty=1e.300 must be at least 0.01 and at most 100")),
    Found("chat", Case("a penalty of 1e-300",
                       "--out_dir=out --repetition_penalty=1e-300 --prompt=天",
                       "repetition_penalty=1e-300 must be at least 0.01 and at most 100")),
    Found("chat", Case("a context of one token", "--out_dir=out --prompt=天 --truncate_ctx=1",
                       "a context of 1 tokens holds no question")),
    # counts of another type: TypeError after the scoring
    Found("eval", Case("bytes are text", "--out_dir=out",
                       "meta.json does not count 'bytes'", spoil_counts(bytes="1800"))),
    Found("eval", Case("no bytes", "--out_dir=out",
                       "meta.json does not count 'bytes'", spoil_counts(bytes=0))),
    # tokenizers that other programs write: text was lost, or had other ids each time
    Found("prepare_pretrain", Case("BPE with dropout", PREPARE,
                                   NOT_OURS + "must be BPE.*no dropout",
                                   spoil_tokenizer(lambda t: t["model"].update(dropout=0.1)))),
    Found("prepare_pretrain", Case("a tokenizer of words", PREPARE, NOT_OURS + "must be BPE",
                                   spoil_tokenizer(of_words))),
    Found("prepare_pretrain", Case("no token for a byte", PREPARE,
                                   NOT_OURS + "has no token for 1 of the 256 bytes",
                                   spoil_tokenizer(without_a_byte))),
    Found("prepare_pretrain", Case("no pre-tokenizer", PREPARE, NOT_OURS + "loses text",
                                   spoil_tokenizer(lambda t: t.update(pre_tokenizer=None)))),
    Found("prepare_pretrain", Case("lower case", PREPARE, NOT_OURS + "loses text",
                                   spoil_tokenizer(lambda t: t.update(
                                       normalizer={"type": "Lowercase"})))),
    # names
    Found("prepare_pretrain", Case("an encoding of host names", PREPARE + " --encoding=idna",
                                   "unknown encoding 'idna'")),
    Found("train_tokenizer", Case("a special token that is not UTF-8",
                                  "corpus.jsonl --vocab_size=300 --out_dir=new "
                                  "--special_tokens=<\udcff>", "is not UTF-8 text")),
    Found("export", Case("an export of an export", "--out_dir=hf:out",
                         "no model in hf:out: --out_dir is the folder of a run")),
    Found("export", Case("an export of a file", "--out_dir=out/best.pt",
                         "no model in out/best.pt: --out_dir is the folder of a run")),
    # a folder in the place of a file, and the temporary file that stayed
    Found("scripts.plot", Case("a folder for the picture", "out --out=pictures",
                               "cannot write pictures: it is not a file", make("pictures"))),
    # metrics.jsonl of another program
    Found("scripts.plot", Case("nested too deep", "out", "it is not JSON lines",
                               put("out/metrics.jsonl", "[" * 100_000 + "\n"))),
    Found("scripts.plot", Case("a loss that is text", "out", "metrics.jsonl:1 .* loss is no number",
                               put("out/metrics.jsonl", '{"step": 1, "loss": "low"}\n'))),
    Found("scripts.plot", Case("a step beyond numbers", "out", "step is no number",
                               put("out/metrics.jsonl", f'{{"step": {10**400}, "loss": 1}}\n'))),
    Found("scripts.plot", Case("loads of two shapes", "out --what=load", "load is not as train.py",
                               put("out/metrics.jsonl", '{"step": 1, "load": [[1], [1, 2]]}\n'))),
]


@pytest.mark.parametrize("found", CASES, ids=[f"{f.program}: {f.case.name}" for f in CASES])
def test_bad_input(project, found):
    if found.program == "scripts.plot":
        pytest.importorskip("matplotlib")
    check(project, found.program, found.case)


def test_an_export_that_counts_a_billion_layers(project):
    """Their names alone would have filled the memory."""
    pytest.importorskip("safetensors")
    finish("export", ["--out_dir=out"], folder=project)
    case = Case("", TRAIN + "--init_from=hf:out/hf",
                "num_hidden_layers is 1000000000, but model.safetensors holds only",
                change_layers())

    check(project, "train", case)


@planned
def change_layers():
    with open("out/hf/config.json", encoding="utf-8") as file:
        content = json.load(file)
    with open("out/hf/config.json", "w", encoding="utf-8") as file:
        json.dump(content | {"num_hidden_layers": 10**9}, file)
