"""Which questions eval.py takes, where an answer ends, and how choices are compared."""
import json
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
from minillm import exact_match, multiple_choice
from minillm.errors import UserError
from minillm.multiple_choice import LETTERS, Question, parse_record, read_questions, score
from minillm.tokenizer import IM_END
from support.exports import lively_model
from support.preparation_runs import finish
from support.tiny_models import talkative, tiny_model
from support.tiny_tokenizer import VOCAB, tokenizer

CPU = torch.device("cpu")


# ---- questions that are answered

def message(role, content):
    return {"role": role, "content": content}


def test_only_chats_that_end_with_an_answer_to_something_are_questions():
    chats = [("f:1", [message("user", "问"), message("assistant", "答")]),
             ("f:2", [message("user", "问"), message("assistant", "答"), message("user", "再")]),
             ("f:3", [message("assistant", "答")])]

    questions = exact_match.questions_of(chats)

    assert questions == [exact_match.Question("f:1", [message("user", "问")], "答")]
    assert exact_match.questions_of(chats[1:]) == []


def test_an_answer_ends_where_the_model_ends_it():
    """And is greedy. What a row makes beside others after its end is not part of it."""
    said = [*tokenizer().encode("好天气"), IM_END, *tokenizer().encode("很")]

    def generate(prompts, max_new_tokens, temperature, stop_ids, cache):
        assert temperature == 0
        ended = False
        for token in said:
            yield [None if ended else token]
            ended = ended or token in stop_ids
    model = SimpleNamespace(generate=generate, tokenizer=tokenizer())

    [text] = exact_match.answer(model, [[1]], 20, SimpleNamespace())

    assert text == "好天气"


def test_a_long_question_leaves_room_for_the_answer():
    """The cache is sized for both: 256 slots would end this answer after a few tokens."""
    model = talkative(tiny_model(block_size=512))
    question = exact_match.Question("f:1", [message("user", "a" * 230)], "")
    prompt, _ = model.tokenizer.encode_chat(question.messages, add_generation_prompt=True)
    assert 230 < len(prompt) < 256

    [text] = exact_match.answer_all(model, [question], 4, 40)

    assert [text] == exact_match.answer(model, [prompt], 40, model.new_cache(1, 512))


def test_a_question_that_fills_the_context_is_not_answered():
    """One token less, and there is room for one of the answer."""
    question = exact_match.Question("f:1", [message("user", "a" * 50)], "")
    prompt, _ = tokenizer().encode_chat(question.messages, add_generation_prompt=True)

    for block_size, answered in ((len(prompt), False), (len(prompt) + 1, True)):
        model = talkative(tiny_model(block_size=block_size))
        [text] = exact_match.answer_all(model, [question], 4, 40)
        assert (text is not None) == answered


def test_both_files_may_have_another_encoding_and_questions_other_names(tmp_path):
    """What the report of a file that is not understood advises, eval.py takes."""
    questions, choices = tmp_path / "q.jsonl", tmp_path / "c.csv"
    questions.write_text('{"题": "问", "解": "答"}', encoding="gb18030")
    choices.write_text("question,A,B,answer\n哪个,第一,第二,B\n", encoding="gb18030")
    s = evaluation.Settings(questions=str(questions), choices=str(choices),
                            encoding="gb18030", map="题:user,解:assistant")

    [question] = evaluation.open_questions(s, None, print)
    [choice] = evaluation.open_choices(s)

    assert question == (f"{questions}:1", [message("user", "问")], "答")
    assert choice[1:] == ("哪个", ["第一", "第二"], 1)


@pytest.mark.parametrize("sources, asked", [
    (["demo.town.conversations()"], "demo"), (["demo_corpus.conversations()"], "demo"),
    (["chats.jsonl"], "none"), (None, "none")],
    ids=["the demo", "the demo of an older version", "other chats", "not said"])
def test_the_demo_s_questions_are_asked_after_its_sft(sources, asked):
    """By what prepare_sft.py writes into meta.json."""
    s = evaluation.Settings()

    questions = evaluation.open_questions(s, SimpleNamespace(meta={"sources": sources}), print)

    assert (s.questions, bool(questions)) == (asked, asked == "demo")


def test_prepare_sft_names_the_demo_as_eval_knows_it(tmp_path):
    finish("train_tokenizer", "--vocab_size=400", f"--out_dir={tmp_path}/tok")
    finish("prepare_sft", f"--tokenizer={tmp_path}/tok", f"--out_dir={tmp_path}/sft")

    meta = json.loads((tmp_path / "sft/meta.json").read_text(encoding="utf-8"))
    assert meta["sources"] in evaluation.DEMO_SFT


# ---- choices

SUMS = {(0, 0): -4.0, (0, 1): -5.0}
CHOICES = Question("f:1", "问", ["两字", "这是五个字"], 1)


@pytest.mark.parametrize("form, per_character", [("text", 1), ("letters", 0)])
def test_the_sum_is_divided_by_the_characters_that_it_stands_for(monkeypatch, form, per_character):
    """-4 of two characters is likelier than -5 of five, but less likely per character."""
    monkeypatch.setattr(multiple_choice, "log_probabilities", lambda *arguments: SUMS)

    result, chosen = score(tiny_model(block_size=99), [CHOICES], form, "chat", 4, CPU, None)

    assert (chosen, result["accuracy"], result["accuracy_norm"]) == ([0], 0, per_character)


def test_a_choice_may_fill_the_context_to_the_last_token():
    """The last token of all is only predicted."""
    pairs = multiple_choice.encode(tokenizer(), CHOICES, "text", "chat")
    longest = max(len(prompt) + len(rest) for prompt, rest in pairs)

    for block_size, too_long in ((longest - 1, 0), (longest - 2, 1)):
        model = tiny_model(block_size=block_size)
        result, chosen = score(model, [CHOICES], "text", "chat", 4, CPU, torch.float32)
        assert result["too_long"] == too_long == chosen.count(None)


def test_rows_of_the_embedding_without_a_token_take_no_probability():
    model = lively_model(vocab_size=VOCAB + 20)
    rows = [("key", [5, 6, 7], [8, 9])]
    before = multiple_choice.log_probabilities(model, rows, 4, CPU, torch.float32)

    model.wte.weight[VOCAB:] *= 100

    assert multiple_choice.log_probabilities(model, rows, 4, CPU, torch.float32) == before


def test_a_token_over_the_border_is_the_continuation_where_there_is_no_other():
    """Without one, every continuation that melts into the prompt would have probability 1."""
    def in_twos(text):
        return [hash(text[i: i + 2]) for i in range(0, len(text), 2)]
    question = Question("f:1", "q", ["x", "xyz"], 0)

    pairs = multiple_choice.encode(SimpleNamespace(encode=in_twos), question, "text", "plain")

    assert len(in_twos("q\n答案：")) == len(in_twos("q\n答案：x"))
    assert [rest for _, rest in pairs] == [[hash("：x")], [hash("yz")]]


@pytest.mark.parametrize("answer, index", [
    (" b ", 1), ("B", 1), ("第二", 1), (0, 0), (True, None), (-1, None), (2, None), ("C", None)])
def test_what_an_answer_may_be(answer, index):
    assert multiple_choice.find_answer(answer, ["第一", "第二"], named=False) == index


def test_there_are_as_many_choices_as_letters_at_most():
    columns = {letter: letter.lower() for letter in LETTERS}

    question = parse_record("f:1", {"question": "q", "answer": "Z"} | columns)

    assert (len(question.choices), question.answer) == (26, 25)
    with pytest.raises(UserError, match="more than 26 choices"):
        parse_record("f:1", {"question": "q", "choices": list(map(str, range(27))), "answer": 0})


def test_cells_that_a_spreadsheet_leaves_empty(tmp_path):
    """Behind the last choice of a question, and behind the last question; but not between."""
    path = tmp_path / "q.csv"
    path.write_text("question,A,B,C,D,answer\nq,a,b,,,B\nr,a,b,c,d,D\n,,,,,\n")

    questions = read_questions(str(path))

    assert [question.choices for question in questions] == [["a", "b"], ["a", "b", "c", "d"]]
    path.write_text("question,A,B,C,D,answer\nq,a,,c,,A\n")
    with pytest.raises(UserError, match="q.csv:2: a choice that is not text, or empty"):
        read_questions(str(path))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name, text", [
    ("q.csv", "question,A,B,answer\nq,a,b,B\n"),
    ("q.jsonl", '{"question": "q", "choices": ["a", "b"], "answer": 1}\n')])
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path, name, text, encoding):
    (tmp_path / name).write_text(text, encoding=encoding)

    [question] = read_questions(str(tmp_path / name))

    assert question[1:] == ("q", ["a", "b"], 1)
