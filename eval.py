"""How good is a model: on its validation data, and on questions with a known answer.

    python eval.py                                             # the demo: what SFT never taught
    python eval.py --out_dir=out/sft --questions=FILE.jsonl    # chats that end with the answer
    python eval.py --out_dir=out/sft --choices=FILE.csv        # multiple choice, C-Eval's shape
    python eval.py --out_dir=out/pretrain --eval_iters=0       # all of the validation split

Validation: the loss in nats per supervised token (without the load-balancing loss), perplexity,
bits per byte of text (comparable between tokenizers), next-token accuracy, and for an MoE model
each expert's share of the tokens. Questions are answered greedily; an answer is right if every
character matches. Multiple choice compares the likelihood of the choices, see
minillm/multiple_choice.py. A question longer than the context counts as wrong. The same model and
data give the same numbers. They are also written to out_dir/eval.json, beside what an earlier
command measured of the same weights.

Exit status: 0; 2 after a mistake that you can correct, with one line on stderr; 130 after Ctrl-C.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import hashlib
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from minillm import checkpoint, exact_match, multiple_choice, validation
from minillm.atomic_folder import replaced_file
from minillm.chat_names import Names
from minillm.configurator import NonNegative, Positive, configure
from minillm.dataloader import TokenData
from minillm.device import describe, pick_device, pick_dtype
from minillm.errors import UserError, run
from minillm.report import counted
from minillm.run_folder import read_settings
from minillm.text_stream import printable
from minillm.token_files import fingerprint
from model import GPT

# what meta.json says of the demo's conversations, now and in older versions
DEMO_SFT = (["demo.town.conversations()"], ["demo_corpus.conversations()"])


@dataclass
class Settings:
    out_dir: str = "out/demo_sft"         # folder of the model, as train.py leaves it
    checkpoint: str = "newest"            # which one to load from out_dir: newest, best or a step
    # what is scored
    data_dir: str = ""                    # token files; empty: those it was trained on; or none
    eval_iters: NonNegative = 0           # validation batches; 0: all
    doc_mask: bool | None = None          # no attention across documents; auto: see open_data
    questions: str = "auto"               # file of chats, demo or none; auto: demo after demo SFT
    max_new_tokens: Positive = 64         # longest answer, in tokens
    map: str = ""                         # names in the file of questions, as for prepare_sft.py
    choices: str = "none"                 # file of multiple-choice questions, demo or none
    answer_by: Literal["text", "letters"] = "text"      # compare the choices, or A, B, C ...
    template: Literal["chat", "plain"] = "chat"         # of multiple choice; plain: no ChatML
    encoding: str = "utf-8"               # of both files; a byte order mark overrides it
    # how
    batch_size: Positive = 16             # sequences, questions or choices at once
    show: NonNegative = 3                 # wrong answers to print
    json: bool = False                    # print the results as one line of JSON, and nothing else
    device: str = "auto"                  # auto, cpu, mps, cuda, cuda:N
    dtype: str = "auto"                   # auto, float32, bfloat16, float16; answers: float32


def main():
    s = configure(Settings)
    started = time.monotonic()
    device = pick_device(s.device)
    dtype = pick_dtype(s.dtype, device)
    model = GPT.from_checkpoint(s.out_dir, s.device, "float32", s.checkpoint, check=True)
    report = (lambda line: None) if s.json else print

    # 1) find what is missing before anything is scored
    data = None
    if s.data_dir != "none":
        data = open_data(s, model)
    questions = open_questions(s, data, report)
    choices = open_choices(s)
    if not (data or questions or choices):
        raise UserError("nothing to score: data_dir, questions and choices are all none")

    # 2) score, part by part; what is scored is written at once
    report(f"{s.out_dir}, step {model.step} · {describe(device)} · {sizes(model)}")
    results = {"step": model.step, "weights": weights_id(model)}
    if data:
        results |= {"data_dir": s.data_dir, "doc_mask": s.doc_mask, "eval_iters": s.eval_iters,
                    "other_data": is_other_data(s, data)}
        results |= validation.score(model, data, s.doc_mask, s.batch_size, s.eval_iters,
                                    device, dtype)
        results["perplexity"] = math.exp(min(results["loss"], 700))
        results["bits_per_byte"] = validation.bits_per_byte(results["loss"], data.meta)
        report_validation(results, report)
        write_results(s, results)
    if questions:
        answers = exact_match.answer_all(model, questions, s.batch_size, s.max_new_tokens)
        results |= report_answers(s, questions, answers, model.tokenizer, report)
        write_results(s, results)
    if choices:
        scores, chosen = multiple_choice.score(model, choices, s.answer_by, s.template,
                                               s.batch_size, device, dtype)
        results["multiple_choice"] = {"choices_file": s.choices, "answer_by": s.answer_by,
                                      "template": s.template} | scores
        report_choices(s, choices, chosen, scores, report)
    results["seconds"] = time.monotonic() - started
    problem = write_results(s, results)
    if problem:
        print(f"eval.py: {problem}", file=sys.stderr)
    if s.json or problem:
        print(json.dumps(results, ensure_ascii=False))


def open_data(s, model):
    """The validation split. Fills in data_dir and doc_mask; UserError if it is not of this model.

    On the data that the model was trained on, doc_mask is the model's own. On other data train.py's
    rule holds for every model, so that their numbers compare: SFT data have it. Without config.py
    (best.pt was copied alone) data_dir must be given.
    """
    trained = {}
    if os.path.exists(os.path.join(s.out_dir, "config.py")):
        trained = read_settings(s.out_dir, data_dir=str, doc_mask=bool)
    elif not s.data_dir:
        raise UserError(f"{s.out_dir} has no config.py that names its data: give --data_dir=DIR, "
                        "or none")
    s.data_dir = s.data_dir or trained["data_dir"]
    data = TokenData(s.data_dir, "val", model.config.block_size)
    if data.meta["tokenizer_hash"] != model.tokenizer.hash:
        raise UserError(f"{s.data_dir} was prepared with another tokenizer than the model in "
                        f"{s.out_dir} has")
    validation.check_counts(data.meta)
    if s.doc_mask is None and trained and is_same_folder(trained["data_dir"], s.data_dir):
        s.doc_mask = trained["doc_mask"]
    elif s.doc_mask is None:
        s.doc_mask = data.meta["kind"] == "sft"
    return data


def is_same_folder(a, b):
    return os.path.realpath(a) == os.path.realpath(b)


def is_other_data(s, data):
    """Does the folder that the run names hold other data than these weights were trained on?

    Then a line says so: it was prepared again, or the run moved to it after this checkpoint.
    """
    saved = checkpoint.load_for_inference(s.out_dir, s.checkpoint)
    identity, settings = saved.get("identity"), os.path.join(s.out_dir, "config.py")
    if not isinstance(identity, dict) or not os.path.exists(settings):
        return False
    trained = read_settings(s.out_dir, data_dir=str)["data_dir"]
    if not is_same_folder(trained, s.data_dir) or identity.get("data") == fingerprint(data.meta):
        return False
    print(f"eval.py: {s.data_dir} is not what step {saved['step']} was trained on, or was prepared "
          "again since: its validation data may be what the model was trained on", file=sys.stderr)
    return True


def open_questions(s, data, report):
    """The questions to answer, or None."""
    if s.questions == "auto":
        sources = data.meta.get("sources") if data else None
        s.questions = "demo" if sources in DEMO_SFT else "none"
    if s.questions == "none":
        return None
    if s.questions == "demo":
        # the demo is imported only where it is asked for
        from demo.town import held_out_questions
        return exact_match.demo_questions(held_out_questions())
    questions, skipped = exact_match.read_questions(s.questions, s.encoding, Names(s.map))
    for line in skipped:
        report(line)
    return questions


def open_choices(s):
    """The multiple-choice questions, or None."""
    if s.choices == "none":
        return None
    if s.choices == "demo":
        # the demo is imported only where it is asked for
        from demo.town import choice_questions
        records = enumerate(choice_questions(), 1)
        return [multiple_choice.parse_record(f"demo:{i}", record) for i, record in records]
    return multiple_choice.read_questions(s.choices, s.encoding)


def sizes(model):
    total, active = model.n_params()
    return f"{total:,} parameters" + (f", {active:,} active" if active != total else "")


def report_validation(results, report):
    masked = ", documents masked" if results["doc_mask"] else ""
    report(f"{results['data_dir']}, {results['tokens']:,} tokens{masked}: "
           f"loss {results['loss']:.4f} · perplexity {results['perplexity']:.2f} · "
           f"{results['bits_per_byte']:.4f} bits per byte · accuracy {results['accuracy']:.2%}")
    if "load" in results:
        n_expert = len(results["load"][0])
        report("share of tokens per expert, as a multiple of the fair share")
        report("layer  " + "".join(f"{expert:>7}" for expert in range(n_expert)))
        for layer, row in zip(results["moe_layers"], results["load"]):
            report(f"{layer:>5}  " + "".join(f"{share * n_expert:7.2f}" for share in row))


def report_answers(s, questions, answers, tokenizer, report):
    """Say how many answers are right; returns the numbers."""
    right, shown, too_long = 0, 0, []
    for question, answer in zip(questions, answers):
        if answer is None:
            too_long.append(question.location)
        elif answer == question.expected:
            right += 1
        elif shown < s.show:
            shown += 1
            made = printable(answer).replace("\ufffd", "")
            report(f"  wrong: {question.messages[-1]['content']} → {made} "
                   f"(right: {question.expected})")
    report_too_long(too_long, report)
    count = len(questions)
    report(f"{s.questions}: {right} of {count} questions answered exactly, {right / count:.1%}")
    longer = sum(len(tokenizer.encode(question.expected)) > s.max_new_tokens
                 for question in questions)
    if longer:
        report(f"  {counted(longer, 'right answers')} of more than max_new_tokens="
               f"{s.max_new_tokens}: no answer can match")
    return {"questions_file": s.questions, "questions": count, "right": right,
            "exact_match": right / count, "too_long": len(too_long)}


def report_too_long(locations, report):
    """Count the questions that are longer than the context, and name the first."""
    if locations:
        report(f"  not answered {len(locations):,}: longer than the context "
               f"(first: {locations[0]})")


def report_choices(s, questions, chosen, scores, report):
    shown, too_long = 0, []
    for question, index in zip(questions, chosen):
        if index is None:
            too_long.append(question.location)
        elif index != question.answer and shown < s.show:
            shown += 1
            report(f"  wrong: {question.question} → {question.choices[index]} "
                   f"(right: {question.choices[question.answer]})")
    report_too_long(too_long, report)
    report(f"{s.choices}, {counted(scores['questions'], 'questions')}, by {s.answer_by}: "
           f"accuracy {scores['accuracy']:.1%} ± {scores['accuracy_stderr']:.1%} · per character "
           f"{scores['accuracy_norm']:.1%} ± {scores['accuracy_norm_stderr']:.1%} · "
           f"chance {scores['chance']:.1%}")


def weights_id(model):
    """A hash of some of each matrix: step 700 of a run that was rolled back is another one."""
    digest = hashlib.sha256()
    for weight in model.state_dict().values():
        # as bfloat16, so that the number type they are loaded in makes no difference
        digest.update(weight.flatten()[:1000].bfloat16().view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def earlier_results(path, results):
    """What the eval.json at `path` says of the same weights as `results`; else {}."""
    try:
        with open(path, encoding="utf-8") as file:
            earlier = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(earlier, dict):
        return {}
    same = all(earlier.get(key) == results[key] for key in ("step", "weights"))
    return earlier if same else {}


def write_results(s, results):
    """Write out_dir/eval.json, the old one or the new; returns what went wrong, or None."""
    path = os.path.join(s.out_dir, "eval.json")
    try:
        with replaced_file(path) as new, open(new, "w", encoding="utf-8") as file:
            json.dump(earlier_results(path, results) | results, file, indent=1)
    except OSError as error:
        return f"cannot write {path} ({error.strerror}); the results are the last line of stdout"


if __name__ == "__main__":
    run(main)
