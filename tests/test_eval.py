"""eval.py: against transformers on the export, multiple choice by hand, and what may go wrong."""
import json
import math
import os
import shutil

import pytest
import torch

import eval as evaluation
from minillm import checkpoint, exact_match, multiple_choice
from minillm.multiple_choice import parse_record, read_questions, score
from minillm.tokenizer import END_OF_TEXT
from support import processes, training_runs
from support.exports import export_folder, lively_model

CPU = torch.device("cpu")
FLAGS = ["--device=cpu", "--dtype=float32"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """(the folder of a tiny trained model, its data)"""
    folder = tmp_path_factory.mktemp("eval")
    data = training_runs.make_data(folder / "data")
    training_runs.finish([*training_runs.TINY, "--max_iters=20", f"--data_dir={data}",
                          f"--out_dir={folder}/out"])
    return folder / "out", data


def evaluate(folder, *argv, **options):
    """eval.py --json in a process of its own: the results, and what it said besides."""
    output = processes.finish("eval", [f"--out_dir={folder}", *FLAGS, "--json", *argv], **options)
    lines = [line for line in output.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]), output


def write_lines(path, records):
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def chat(question, answer="好"):
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]}


def test_two_evaluations_agree_to_the_bit(run_folder, tmp_path):
    folder, _ = run_folder
    choices = write_lines(tmp_path / "mc.jsonl", [
        {"question": f"问题{i}", "choices": ["好", "不好吗", "a", "bc"], "answer": 1} for i in range(9)])
    argv = [f"--choices={choices}"]

    first, _ = evaluate(folder, *argv)
    second, _ = evaluate(folder, *argv)

    assert first.pop("seconds") > 0 and second.pop("seconds") > 0
    assert first == second
    with open(folder / "eval.json") as file:
        assert json.load(file)["multiple_choice"] == first["multiple_choice"]


def written(folder):
    return json.loads((folder / "eval.json").read_text(encoding="utf-8"))


def test_parts_that_are_measured_one_by_one_stand_side_by_side(run_folder, tmp_path):
    """Each command writes what it measured, and keeps the rest."""
    shutil.copytree(run_folder[0], tmp_path / "out")
    questions = write_lines(tmp_path / "q.jsonl", [chat("天"), chat("气")])

    loss, _ = evaluate(tmp_path / "out")
    evaluate(tmp_path / "out", "--data_dir=none", f"--questions={questions}")
    last, _ = evaluate(tmp_path / "out", "--data_dir=none", "--choices=demo")
    one_batch, _ = evaluate(tmp_path / "out", "--eval_iters=1")

    whole = written(tmp_path / "out")
    assert "loss" not in last and "exact_match" not in last
    assert (whole["questions_file"], whole["questions"]) == (str(questions), 2)
    assert whole["multiple_choice"] == last["multiple_choice"]
    assert whole["multiple_choice"]["choices_file"] == "demo"
    assert (whole["loss"], whole["eval_iters"]) == (one_batch["loss"], 1) != (loss["loss"], 0)


def other_weights(out):
    """The same step, as after a rollback and another training."""
    path = str(out / "ckpt_00000020.pt")
    state = checkpoint.load(path)
    state["model"]["norm.weight"] += 1
    checkpoint.save(path, state)


def written_before(text):
    return lambda out: (out / "eval.json").write_text(text)


@pytest.mark.parametrize("change, argv", [
    (other_weights, []), (lambda out: None, ["--checkpoint=15"]),
    (written_before('{"step": 20, "exact_match": 1}'), []), (written_before("{"), []),
    (written_before("[]"), [])],
    ids=["other weights", "another step", "of an older version", "damaged", "a list"])
def test_what_was_measured_of_other_weights_is_dropped(run_folder, tmp_path, change, argv):
    out = tmp_path / "out"
    shutil.copytree(run_folder[0], out)
    evaluate(out, "--choices=demo", "--data_dir=none")
    change(out)

    results, _ = evaluate(out, *argv)

    assert written(out) == results and "multiple_choice" not in results


def test_right_answers_that_are_too_long_are_counted(run_folder, tmp_path):
    folder, _ = run_folder
    questions = write_lines(tmp_path / "q.jsonl", [chat("问", "好" * 40), chat("问", "好")])

    output = processes.finish("eval", [f"--out_dir={folder}", "--data_dir=none", *FLAGS,
                                       "--max_new_tokens=3", f"--questions={questions}"])

    assert "1 right answer of more than max_new_tokens=3: no answer can match" in output


def test_bits_per_byte_are_those_of_transformers(run_folder):
    """On the exported model, to 1e-3: the same windows, with transformers' own loss."""
    transformers = pytest.importorskip("transformers")
    folder, data = run_folder
    results, _ = evaluate(folder)
    with open(os.path.join(data, "meta.json")) as file:
        counts = json.load(file)["splits"]["val"]
    with open(os.path.join(data, "val.bin"), "rb") as file:
        tokens = torch.frombuffer(bytearray(file.read()), dtype=torch.uint16).long()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(export_folder(folder))

    losses = []
    for start in range(0, len(tokens) - training_runs.BLOCK, training_runs.BLOCK):
        window = tokens[None, start: start + training_runs.BLOCK + 1]
        losses.append(theirs(window, labels=window).loss.item())
    expected = sum(losses) / len(losses) / math.log(2) * counts["tokens"] / counts["bytes"]

    assert abs(results["bits_per_byte"] - expected) < 1e-3


@torch.no_grad()
def chosen_by_hand(model, question, template):
    """The index of the likeliest choice, one choice at a time."""
    values = []
    for choice in question.choices:
        if template == "chat":
            messages = [{"role": "user", "content": question.question}]
            prompt, _ = model.tokenizer.encode_chat(messages, add_generation_prompt=True)
        else:
            prompt = [END_OF_TEXT, *model.tokenizer.encode(question.question + "\n答案：")]
        rest = model.tokenizer.encode(choice)
        logs = model(torch.tensor([prompt + rest]))[0].log_softmax(-1)
        values.append(sum(logs[len(prompt) + i - 1, id].item() for i, id in enumerate(rest)))
    return values.index(max(values))


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_choices_are_scored_as_by_hand(template):
    """Batches of rows of different length give what each choice gives alone."""
    model = lively_model(block_size=128)
    words = ["山", "有座庙，很老的和尚", "The cat sat", "1234", "晴", "天气怎么样"]
    questions = []
    for i in range(20):
        offered = words[i % 3: i % 3 + 4]
        questions.append(multiple_choice.Question(f"q:{i}", "从前" * (i % 5 + 1), offered, i % 4))

    result, chosen = score(model, questions, "text", template, 7, CPU, torch.float32)

    expected = [chosen_by_hand(model, question, template) for question in questions]
    assert chosen == expected and len(set(chosen)) > 1
    right = sum(index == question.answer for index, question in zip(chosen, questions))
    assert result["accuracy"] == right / 20 and result["chance"] == 0.25
    share = right / 20
    assert math.isclose(result["accuracy_stderr"], math.sqrt(share * (1 - share) / 19))


def test_letters_stand_in_the_prompt():
    model = lively_model()
    question = parse_record("q:1", {"question": "选", "choices": ["山", "庙"], "answer": "B"})

    pairs = multiple_choice.encode(model.tokenizer, question, "letters", "chat")

    assert [model.tokenizer.decode(rest) for _, rest in pairs] == ["A", "B"]
    assert "选\nA. 山\nB. 庙" in model.tokenizer.decode(pairs[0][0]) and question.answer == 1


SHAPES = [
    ({"question": "q", "choices": ["a", "b", "c"], "answer": 2}, 2),
    ({"question": "q", "choices": ["a", "b", "c"], "answer": "c"}, 2),
    ({"question": "q", "choices": ["a", "b", "c"], "answer": "C"}, 2),
    ({"question": "q", "choices": ["B", "A"], "answer": "A"}, 1),        # the text comes first
    ({"id": "0", "question": "q", "A": "B", "B": "A", "C": "x", "D": "y", "answer": "A"}, 0),
    ({"": "0", "Question": "q", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "D"}, 3),
]


@pytest.mark.parametrize("record, answer", SHAPES)
def test_shapes_of_a_question(record, answer):
    assert parse_record("f:1", record).answer == answer


def test_batches_answer_as_each_question_does_alone(monkeypatch):
    """One cache serves all batches of a size, and keeps nothing of the batch before."""
    model = lively_model(block_size=128)
    caches, new_cache = [], model.new_cache
    monkeypatch.setattr(model, "new_cache",
                        lambda *shape: caches.append(new_cache(*shape)) or caches[-1])
    questions = []
    for i in range(10):
        messages = [{"role": "user", "content": "有座庙" * (i % 4 + 1)}]
        questions.append(exact_match.Question(f"q:{i}", messages, ""))

    answers = exact_match.answer_all(model, questions, 4, 20)

    assert [len(cache.tokens) for cache in caches] == [4, 2]
    encode = model.tokenizer.encode_chat
    prompts = [encode(question.messages, add_generation_prompt=True)[0] for question in questions]
    assert sum(cache.n_prefilled for cache in caches) == sum(map(len, prompts))
    alone = [exact_match.answer(model, [prompt], 20, new_cache())[0] for prompt in prompts]
    assert answers == alone and len(set(answers)) > 1


@pytest.mark.parametrize("name", ["q.csv", "Q.CSV"])
def test_csv_and_json_lines_give_the_same_questions(tmp_path, name):
    """C-Eval's CSV, with a line end in a quoted question and a byte-order mark."""
    (tmp_path / name).write_text(
        'id,question,A,B,C,D,answer,explanation\n0,"一,\n二",甲,乙,丙,丁,C,\n', encoding="utf-8-sig")
    record = {"question": "一,\n二", "choices": ["甲", "乙", "丙", "丁"], "answer": 2}

    from_csv = read_questions(str(tmp_path / name))
    from_json = read_questions(str(write_lines(tmp_path / "q.jsonl", [record])))

    assert [question[1:] for question in from_csv] == [question[1:] for question in from_json]


def test_a_question_longer_than_the_context_is_counted_and_named(run_folder, tmp_path):
    folder, _ = run_folder
    questions = write_lines(tmp_path / "q.jsonl", [chat("天"), chat("天" * 500), chat("气")])
    choices = write_lines(tmp_path / "mc.jsonl", [
        {"question": text, "choices": ["好", "坏"], "answer": 0} for text in ("天", "天" * 500)])
    argv = [f"--out_dir={folder}", *FLAGS, f"--questions={questions}", f"--choices={choices}"]

    output = processes.finish("eval", argv)
    results, _ = evaluate(folder, *argv[1:])

    assert f"not answered 1: longer than the context (first: {questions}:2)" in output
    assert f"not answered 1: longer than the context (first: {choices}:2)" in output
    assert (results["questions"], results["too_long"]) == (3, 1)
    multiple = results["multiple_choice"]
    assert (multiple["questions"], multiple["too_long"]) == (2, 1)


def test_what_is_missing_is_found_before_the_scoring(run_folder):
    folder, _ = run_folder

    for flag in ("--questions=nowhere.jsonl", "--choices=nowhere.jsonl"):
        line = processes.refused("eval", [f"--out_dir={folder}", *FLAGS, flag])
        assert "nowhere.jsonl" in line


def full_disk():
    """In the child: no file can be written."""
    inner = open

    def no_writing(path, mode="r", *args, **options):
        if "w" in mode and str(path).endswith(".tmp"):
            raise OSError(28, "No space left on device")
        return inner(path, mode, *args, **options)
    evaluation.open = no_writing


def test_a_full_disk_loses_nothing(run_folder):
    folder, _ = run_folder

    results, output = evaluate(folder, before=full_disk)

    assert "cannot write" in output and "No space left on device" in output
    assert results["loss"] > 0


def test_validation_may_be_left_out(run_folder, tmp_path):
    """A model whose data are gone still answers multiple choice; the demo's questions are 300."""
    folder, _ = run_folder

    results, _ = evaluate(folder, "--data_dir=none", "--choices=demo", "--answer_by=letters")

    assert "loss" not in results and results["multiple_choice"]["questions"] == 300
    assert results["multiple_choice"]["chance"] == 0.25


@pytest.mark.parametrize("which", ["newest", "best"])
def test_data_that_were_prepared_again_are_named(run_folder, tmp_path, which):
    """With a larger validation split, which takes texts that the model was trained on."""
    out, data = run_folder
    shutil.copytree(out, tmp_path / "out")
    shutil.copytree(data, tmp_path / "data")
    settings = (out / "config.py").read_text(encoding="utf-8")
    settings = settings.replace(str(data), str(tmp_path / "data"))
    (tmp_path / "out/config.py").write_text(settings, encoding="utf-8")
    argv = [f"--checkpoint={which}"]

    unchanged, said = evaluate(tmp_path / "out", *argv)
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    meta["splits"]["train"]["documents"] -= 1
    (tmp_path / "data/meta.json").write_text(json.dumps(meta))
    changed, said_then = evaluate(tmp_path / "out", *argv)
    elsewhere, _ = evaluate(tmp_path / "out", *argv, f"--data_dir={data}")

    line = "is not what step 20 was trained on, or was prepared again since"
    assert line not in said and not unchanged["other_data"]
    assert line in said_then and changed["other_data"]
    assert not elsewhere["other_data"]


def test_best_alone_is_scored_as_the_whole_folder(run_folder, tmp_path):
    """best.pt and the tokenizer, copied to share the model: there is no config.py."""
    out, data = run_folder
    shutil.copytree(out / "tokenizer", tmp_path / "share/tokenizer")
    shutil.copy(out / "best.pt", tmp_path / "share/best.pt")

    alone, _ = evaluate(tmp_path / "share", f"--data_dir={data}")
    whole, _ = evaluate(out, "--checkpoint=best")

    assert (alone["loss"], alone["step"]) == (whole["loss"], whole["step"])
    line = processes.refused("eval", [f"--out_dir={tmp_path}/share", *FLAGS])
    assert line.endswith("names its data: give --data_dir=DIR, or none")
