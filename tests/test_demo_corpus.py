"""The demo's town is a fair exam: nothing that SFT says answers the questions at the end.

The facts they ask for stand in the pretraining text alone, and guessing does not find them.
"""
import collections
import json
import os
import subprocess
import sys

import pytest

from demo import town as corpus
from support import ROOT
from support.preparation_runs import fingerprint


@pytest.fixture(scope="module")
def town():
    return corpus.taught_and_held_out()


@pytest.fixture(scope="module")
def texts():
    return list(corpus.biographies())


def run_town(*argv, **env):
    """`python -m demo.town` as a user runs it."""
    command = [sys.executable, "-m", "demo.town", *map(str, argv)]
    env = os.environ | {"PYTHONIOENCODING": "utf-8"} | env
    return subprocess.run(command, cwd=ROOT, env=env, text=True, encoding="utf-8",
                          capture_output=True)


def test_same_bytes_in_another_process_with_another_hash_seed(tmp_path):
    runs = [
        ("first", "--seed=7", "1"),
        ("again", "--seed=7", "2"),
        ("other", "--seed=8", "1"),
    ]

    for name, seed, hash_seed in runs:
        run_town(f"--out_dir={tmp_path}/{name}", seed, PYTHONHASHSEED=hash_seed)

    first, again, other = [fingerprint(tmp_path / name) for name, _, _ in runs]
    assert len(first) == 4 and first == again
    assert not set(first.values()) & set(other.values())


def test_halves_are_equal_and_share_nobody(town):
    taught, held_out = ({person["name"] for person in half} for half in town)
    assert len(taught) == len(held_out) == 60 and not taught & held_out


def test_sft_never_names_a_held_out_person(town):
    taught, held_out = town

    sft = json.dumps(list(corpus.conversations()), ensure_ascii=False)

    assert not [person["name"] for person in held_out if person["name"] in sft]
    assert all(person["name"] in sft for person in taught)


def sentences(text):
    return [sentence + "。" for sentence in text.rstrip("。").split("。")]


def test_every_fact_is_told_often_in_every_wording(town, texts):
    seen = collections.Counter()
    for text in texts:
        seen.update(sentences(text))

    for person in town[0] + town[1]:
        for key in corpus.ATTRIBUTES:
            assert len(corpus.SENTENCES[key]) == 5
            for wording in corpus.SENTENCES[key]:
                assert seen[corpus.fill(wording, person, key)] >= 5, (person["name"], wording)


def test_the_facts_of_a_person_come_in_many_orders(town, texts):
    person = town[1][0]
    key_of = {}
    for key in corpus.ATTRIBUTES:
        for wording in corpus.SENTENCES[key]:
            key_of[corpus.fill(wording, person, key)] = key

    orders = set()
    for text in texts:
        if person["name"] in text:
            orders.add(tuple(key_of[sentence] for sentence in sentences(text)))

    assert len(orders) > 30


def test_biographies_of_one_person_stand_apart(town, texts):
    """A context holds about four; a paraphrase in the same context is copied, not learned."""
    names = [person["name"] for half in town for person in half]
    last, near = {}, 0

    for place, text in enumerate(texts):
        name = next(name for name in names if name in text)
        if name in last and place - last[name] < 4:
            near += 1
        last[name] = place

    assert near < 0.01 * len(texts)


def test_chance_is_under_ten_percent(town):
    """For each attribute always the most frequent answer, known in hindsight."""
    _, held_out = town
    right = 0
    for key in corpus.ATTRIBUTES:
        answers = collections.Counter(person[key] for person in held_out)
        right += answers.most_common(1)[0][1]

    assert right < 0.1 * len(held_out) * len(corpus.ATTRIBUTES)


def test_held_out_questions_ask_each_fact_once_and_answer_it(town):
    _, held_out = town
    facts = []
    for person in held_out:
        for key in corpus.ATTRIBUTES:
            facts.append((person["name"], corpus.fill(corpus.ANSWERS[key], person, key)))

    asked = []
    for chat in corpus.held_out_questions():
        question, answer = (message["value"] for message in chat["conversations"])
        name = next(person["name"] for person in held_out if person["name"] in question)
        asked.append((name, answer))

    assert sorted(asked) == sorted(facts)


def test_conversations_alternate_and_answer_truly(town):
    """One to three exchanges about one person, perhaps after small talk; he stays he."""
    small_talk = dict(corpus.SMALL_TALK).values()
    lengths, pronouns, without_person = collections.Counter(), set(), 0

    for chat in corpus.conversations():
        messages = chat["conversations"]
        assert [m["from"] for m in messages] == ["human", "assistant"] * (len(messages) // 2)
        lengths[len(messages) // 2] += 1
        questions = "".join(message["value"] for message in messages[::2])
        named = [person for person in town[0] if person["name"] in questions]
        if not named:
            without_person += 1
            continue
        [person] = named
        true = [corpus.fill(corpus.ANSWERS[key], person, key) for key in corpus.ATTRIBUTES]
        for message in messages[1::2]:
            assert message["value"] in true or message["value"] in small_talk
        pronouns |= {"他", "她"} & set("".join(message["value"] for message in messages))
        other = {"他": "她", "她": "他"}[person["pronoun"]]
        assert not any(other in message["value"] for message in messages)

    assert {1, 2, 3} <= set(lengths) and without_person > 50
    assert pronouns == {"他", "她"}


def test_command_line_prints_samples():
    shown = run_town()
    assert shown.returncode == 0 and next(corpus.biographies()) in shown.stdout


def test_command_line_writes_json_lines(tmp_path):
    assert run_town(f"--out_dir={tmp_path}/town", "--seed=5").returncode == 0

    expected = {
        "pretrain": [{"text": text} for text in corpus.biographies(5)],
        "sft": list(corpus.conversations(5)),
        "held_out": list(corpus.held_out_questions(5)),
        "choices": list(corpus.choice_questions(5)),
    }
    for name, items in expected.items():
        with open(tmp_path / "town" / f"{name}.jsonl", encoding="utf-8") as file:
            assert [json.loads(line) for line in file] == items


def test_command_line_refuses_an_unknown_flag():
    wrong = run_town("--sead=5")
    assert wrong.returncode == 2 and "seed" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")

    done = run_town(f"--out_dir={tmp_path}/file/raw")

    assert done.returncode == 2
    assert done.stderr == f"demo.town: {tmp_path}/file/raw: Not a directory\n"
