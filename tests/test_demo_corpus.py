"""The demo's town proves something only if its two halves never meet: the facts asked for at the
end must stand in the pretraining text alone, and guessing must not answer them."""
import collections
import hashlib
import itertools
import json
import os
import subprocess
import sys

import pytest

from demo import town as corpus
from support import ROOT



@pytest.fixture(scope="module")
def town():
    return corpus.taught_and_held_out()


@pytest.fixture(scope="module")
def texts():
    return list(corpus.biographies())


def digest(seed):
    lines = itertools.chain(corpus.biographies(seed), (json.dumps(c, ensure_ascii=False) for c in corpus.conversations(seed)),
                            (json.dumps(c, ensure_ascii=False) for c in corpus.held_out_questions(seed)))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_same_bytes_in_another_process_with_another_hash_seed():
    code = "import sys; sys.path.insert(0, 'tests'); from test_demo_corpus import digest; print(digest(7))"
    for hash_seed in ("1", "2"):
        out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                             env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ROOT})
        assert out.stdout.strip() == digest(7)
    assert digest(8) != digest(7)


def test_halves_are_equal_and_share_nobody(town):
    taught, held_out = ({person["name"] for person in half} for half in town)
    assert len(taught) == len(held_out) == 60 and not taught & held_out


def test_sft_never_names_a_held_out_person(town):
    sft = json.dumps(list(corpus.conversations()), ensure_ascii=False)
    assert not [person["name"] for person in town[1] if person["name"] in sft]
    assert all(person["name"] in sft for person in town[0])


def test_every_fact_is_told_often_in_every_wording_and_order(town, texts):
    seen = collections.Counter()
    wordings = {(key, wording): corpus.SENTENCES[key][wording] for key in corpus.ATTRIBUTES for wording in range(5)}
    for text in texts:
        for sentence in text.rstrip("。").split("。"):
            seen[sentence + "。"] += 1
    for person in town[0] + town[1]:
        for (key, _), template in wordings.items():
            assert seen[corpus.fill(template, person, key)] >= 5, (person["name"], template)
    one = town[1][0]["name"]
    orders = {tuple(next(key for key in corpus.ATTRIBUTES if any(sentence + "。" == corpus.fill(t, town[1][0], key) for t in corpus.SENTENCES[key]))
                    for sentence in text.rstrip("。").split("。")) for text in texts if one in text}
    assert len(orders) > 30


def test_biographies_of_one_person_stand_apart(texts, town):
    names = {person["name"] for half in town for person in half}
    who = [next(name for name in names if name in text) for text in texts]
    last, gaps = {}, []
    for place, name in enumerate(who):
        gaps.append(place - last.get(name, -999))
        last[name] = place
    # a window holds about four biographies: a paraphrase in the same window would be copied, not
    # learned
    assert sum(gap < 4 for gap in gaps) < 0.01 * len(gaps)


def test_chance_is_under_ten_percent(town):
    """No constant answer per attribute, not even the best one in hindsight, answers a tenth of the questions."""
    right = 0
    for key in corpus.ATTRIBUTES:
        right += collections.Counter(person[key] for person in town[1]).most_common(1)[0][1]
    assert right < 0.1 * len(town[1]) * len(corpus.ATTRIBUTES)


def test_held_out_questions_ask_each_fact_once_and_answer_it(town):
    questions = list(corpus.held_out_questions())
    assert len(questions) == len(town[1]) * len(corpus.ATTRIBUTES)
    facts = {(person["name"], corpus.fill(corpus.ANSWERS[key], person, key)) for person in town[1] for key in corpus.ATTRIBUTES}
    for chat in questions:
        question, answer = (message["value"] for message in chat["conversations"])
        facts.remove((next(p["name"] for p in town[1] if p["name"] in question), answer))
    assert not facts


def test_conversations_alternate_and_answer_truly(town):
    people = {person["name"]: person for person in town[0]}
    lengths, small_talk = collections.Counter(), 0
    for chat in corpus.conversations():
        messages = chat["conversations"]
        assert [m["from"] for m in messages] == ["human", "assistant"] * (len(messages) // 2)
        lengths[len(messages) // 2] += 1
        named = [name for name in people if name in messages[0]["value"] or len(messages) > 2 and name in messages[2]["value"]]
        if not named:
            small_talk += 1
            continue
        true = {corpus.fill(corpus.ANSWERS[key], people[named[0]], key) for key in corpus.ATTRIBUTES}
        answers = [m["value"] for m in messages[1::2]]
        assert len(named) == 1 and all(answer in true for answer in answers if answer not in dict(corpus.SMALL_TALK).values())
        # he stays he and she stays she
        other = {"他": "她", "她": "他"}[people[named[0]]["pronoun"]]
        assert not any(other in m["value"] for m in messages)
    assert {1, 2, 3} <= set(lengths) and small_talk > 50


def test_command_line(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, "-m", "demo.town", *arguments], cwd=ROOT, capture_output=True, text=True,
                              env=os.environ | {"PYTHONIOENCODING": "utf-8"})
    shown = run()
    assert shown.returncode == 0 and next(corpus.biographies()) in shown.stdout
    assert run(f"--out_dir={tmp_path}/town", "--seed=5").returncode == 0
    for name, items in (("pretrain", ({"text": text} for text in corpus.biographies(5))), ("sft", corpus.conversations(5)),
                        ("held_out", corpus.held_out_questions(5)), ("choices", corpus.choice_questions(5))):
        with open(tmp_path / "town" / f"{name}.jsonl", encoding="utf-8") as file:
            assert [json.loads(line) for line in file] == list(items)
    wrong = run("--sead=5")
    assert wrong.returncode == 2 and "seed" in wrong.stderr and "Traceback" not in wrong.stderr
