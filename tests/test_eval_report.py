"""What eval.py prints of the numbers that it has found."""
import json
import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest

import eval as evaluation
from minillm import exact_match, multiple_choice, validation
from minillm.exact_match import Question
from minillm.multiple_choice import Question as ChoiceQuestion
from support import processes
from support.tiny_models import tiny_model
from support.tiny_tokenizer import tokenizer

RESULTS = {"data_dir": "data/pre", "tokens": 12345, "doc_mask": False, "loss": 2.5,
           "perplexity": 12.1825, "bits_per_byte": 1.25, "accuracy": 0.4567}


def validation_lines(**results):
    lines = []
    evaluation.report_validation(RESULTS | results, lines.append)
    return lines


@pytest.mark.parametrize("doc_mask, masked", [(False, ""), (True, ", documents masked")])
def test_each_number_stands_behind_its_name(doc_mask, masked):
    [line] = validation_lines(doc_mask=doc_mask)

    assert line == (f"data/pre, 12,345 tokens{masked}: loss 2.5000 · perplexity 12.18 · "
                    "1.2500 bits per byte · accuracy 45.67%")


def test_the_table_of_experts_is_in_multiples_of_the_fair_share():
    """A row per MoE layer and a column per expert, both counted from 0 as everywhere."""
    _, _, header, *rows = validation_lines(load=[[0.5, 0.25, 0.125, 0.125], [0.25] * 4],
                                           moe_layers=[0, 2])

    assert header.split() == ["layer", "0", "1", "2", "3"]
    assert [row.split() for row in rows] == [["0", "2.00", "1.00", "0.50", "0.50"],
                                             ["2", "1.00", "1.00", "1.00", "1.00"]]
    assert {len(line) for line in (header, *rows)} == {len(header)}


# ---- the program

ARGV = ["--out_dir=out", "--device=cpu", "--dtype=float32"]
QUESTIONS = ["--questions=chats.jsonl"]


def test_json_is_one_line_and_nothing_else(project):
    """Also where questions were skipped, which is said otherwise."""
    with open(project / "chats.jsonl", "a") as file:
        file.write("no JSON\n")

    line = processes.run("eval", [*ARGV, *QUESTIONS, "--json"], folder=project).out
    text = processes.run("eval", [*ARGV, *QUESTIONS], folder=project).out

    results = json.loads(line)
    assert line.count("\n") == 1
    assert results["perplexity"] == pytest.approx(math.exp(results["loss"]))
    assert 0 < results["seconds"] < processes.LIMIT
    assert "skipped 1: malformed JSON (first: chats.jsonl:41)" in text and "{" not in text


def test_results_that_could_not_be_written_are_printed(project):
    def before():
        evaluation.write_results = lambda s, results: "cannot write"
    done = processes.run("eval", ARGV, folder=project, before=before)

    assert done.status == 0 and done.err == "eval.py: cannot write\n"
    assert json.loads(done.out.splitlines()[-1])["loss"] > 0


@pytest.mark.parametrize("owner, name, kept", [
    (exact_match, "answer_all", "loss"), (multiple_choice, "score", "exact_match")])
def test_what_is_scored_stays_when_the_rest_is_interrupted(project, owner, name, kept):
    def before():
        def interrupt(*arguments):
            raise KeyboardInterrupt
        setattr(owner, name, interrupt)
    argv = [*ARGV, *QUESTIONS, "--choices=demo"]

    done = processes.run("eval", argv, folder=project, before=before)

    assert done.status == 130
    assert kept in json.loads((project / "out/eval.json").read_text())


class Scored(NamedTuple):
    name: str
    flags: str
    batches: int                   # of the validation data; 0: all
    tokens: int
    answers: str                   # what answer_all is given
    choices: str                   # what score is given


@pytest.mark.parametrize("case", [
    Scored("as is usual", "", 0, 320, "torch.float32 16 64", "text chat 16 cpu torch.float32"),
    Scored("in float32 all the same", "--dtype=bfloat16 --batch_size=2 --eval_iters=1 "
           "--max_new_tokens=5 --answer_by=letters --template=plain",
           1, 128, "torch.float32 2 5", "letters plain 2 cpu torch.bfloat16"),
], ids=lambda case: case.name)
def test_each_part_is_scored_as_the_settings_say(project, case):
    """Numbers of two people compare where neither gave flags. A window has 64 tokens."""
    def before():
        def answer_all(model, questions, *arguments):
            print(model.wte.weight.dtype, *arguments)
            return [""] * len(questions)

        def score(model, questions, *arguments):
            print(*arguments)
            return SCORES, [0] * len(questions)
        validate = validation.score

        def score_validation(*arguments):
            print("validation in", arguments[-1])
            return validate(*arguments)
        exact_match.answer_all, multiple_choice.score = answer_all, score
        validation.score = score_validation
    argv = [*ARGV, *QUESTIONS, "--choices=demo", *case.flags.split()]

    output = processes.finish("eval", argv, folder=project, before=before)

    assert output.startswith("out, step 2 · CPU")
    results = json.loads((project / "out/eval.json").read_text())
    assert (results["eval_iters"], results["tokens"]) == (case.batches, case.tokens)
    dtype = case.choices.split()[-1]
    assert f"validation in {dtype}\n" in output
    assert f"{case.answers}\n" in output and f"{case.choices}\n" in output
    assert output.count("  wrong: ") == 6        # three answers and three choices


# ---- questions

def answers_reported(answers, expected="好天", show=3, max_new_tokens=64):
    """(the lines, the numbers) for answers to questions that all have one right answer."""
    s = SimpleNamespace(show=show, max_new_tokens=max_new_tokens, questions="q.jsonl")
    questions = []
    for i in range(len(answers)):
        messages = [{"role": "system", "content": "短"}, {"role": "user", "content": f"问{i}"}]
        questions.append(Question(f"q.jsonl:{i + 1}", messages, expected))
    lines = []
    numbers = evaluation.report_answers(s, questions, answers, tokenizer(), lines.append)
    return lines, numbers


def test_an_answer_is_right_if_every_character_is():
    lines, numbers = answers_reported(["好天", "好", "好天气", None, None], show=9)

    assert lines == ["  wrong: 问1 → 好 (right: 好天)", "  wrong: 问2 → 好天气 (right: 好天)",
                     "  not answered 2: longer than the context (first: q.jsonl:4)",
                     "q.jsonl: 1 of 5 questions answered exactly, 20.0%"]
    assert numbers == {"questions_file": "q.jsonl", "questions": 5, "right": 1,
                       "exact_match": 0.2, "too_long": 2}


@pytest.mark.parametrize("show", [0, 1, 3])
def test_as_many_wrong_answers_are_shown_as_asked(show):
    lines, _ = answers_reported([f"错{i}" for i in range(5)], show=show)

    assert [line.split()[1] for line in lines[:-1]] == [f"问{i}" for i in range(show)]


def test_half_a_character_and_control_characters_of_an_answer_are_not_shown():
    lines, _ = answers_reported(["\x1b\x07好\ufffd"])

    assert lines[0] == "  wrong: 问0 → 好 (right: 好天)"


def test_an_answer_may_take_all_of_max_new_tokens():
    """In tokens: a rare character is several of them."""
    assert len(tokenizer().encode("龘")) == 3

    assert len(answers_reported(["龘"], expected="龘", max_new_tokens=3)[0]) == 1
    lines, _ = answers_reported(["龘"] * 2, expected="龘", max_new_tokens=2)
    assert lines[1:] == ["  2 right answers of more than max_new_tokens=2: no answer can match"]


# ---- choices

SCORES = {"questions": 4, "accuracy": 0.25, "accuracy_stderr": 0.217, "accuracy_norm": 0.5,
          "accuracy_norm_stderr": 0.289, "chance": 0.125}


def choices_reported(chosen, show):
    s = SimpleNamespace(show=show, choices="mc.csv", answer_by="letters")
    questions = [ChoiceQuestion(f"mc.csv:{i + 2}", f"问{i}", ["山", "庙", "水"], 1)
                 for i in range(len(chosen))]
    lines = []
    evaluation.report_choices(s, questions, chosen, SCORES, lines.append)
    return lines


def test_choices_are_reported_with_their_errors_and_what_chance_gives():
    lines = choices_reported([1, 0, None, None], show=1)

    assert lines == ["  wrong: 问1 → 山 (right: 庙)",
                     "  not answered 2: longer than the context (first: mc.csv:4)",
                     "mc.csv, 4 questions, by letters: accuracy 25.0% ± 21.7% · "
                     "per character 50.0% ± 28.9% · chance 12.5%"]


@pytest.mark.parametrize("show", [0, 2])
def test_as_many_wrong_choices_are_shown_as_asked(show):
    assert len(choices_reported([0] * 4, show)) == show + 1


def test_active_parameters_are_named_where_they_are_fewer():
    moe = tiny_model(n_expert=4)
    total, active = moe.n_params()

    assert evaluation.sizes(moe) == f"{total:,} parameters, {active:,} active"
    assert evaluation.sizes(tiny_model()) == f"{tiny_model().n_params()[0]:,} parameters"
