"""The rows of SFT: whole exchanges, what is too long, the mask, and what --show prints of them."""
import re

import pytest

import prepare_sft
from minillm import packing
from minillm.report import Report
from minillm.tokenizer import IM_START, Tokenizer
from support.preparation_runs import (chats, finish, read_rows, refused, write_chats, write_lines)


def expected_parts(tokenizer, messages, capacity, long):
    """By the contract: [(ids, mask)] of the parts of a conversation without a system turn."""
    exchanges = [messages[start: start + 2] for start in range(0, len(messages), 2)]
    parts = []
    while exchanges:
        # as many exchanges as fit, with one <|endoftext|>
        for count in range(len(exchanges), 0, -1):
            ids, mask = tokenizer.encode_chat(sum(exchanges[:count], []))
            if len(ids) + 1 <= capacity:
                parts.append((ids, mask))
                break
        exchanges = exchanges[count:]
        if long == "truncate":
            break
    return parts


def conversations_in(rows):
    return [conversation for row, _ in rows for conversation in row]


@pytest.mark.parametrize("long", ["split", "truncate"])
@pytest.mark.parametrize("block_size", [60, 100, 255, 1000])
def test_rows_hold_whole_exchanges(small_corpus, tmp_path, block_size, long):
    capacity, expected = block_size + 1, []
    for messages in chats(120):
        expected += expected_parts(small_corpus.tokenizer, messages, capacity, long)

    _, made = small_corpus.sft(tmp_path / "s", f"--long={long}", block_size=block_size)

    found = []
    for split, counts in made["splits"].items():
        rows = read_rows(tmp_path / "s", split, capacity)
        conversations = conversations_in(rows)
        assert counts["rows"] == len(rows) and counts["tokens"] == len(rows) * capacity
        assert counts["documents"] == len(conversations)
        assert counts["padding_tokens"] == sum(padding for _, padding in rows)
        assert counts["learned_tokens"] == sum(sum(mask) for _, mask in conversations)
        found += conversations
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("long", ["split", "truncate"])
@pytest.mark.parametrize("block_size", [60, 100, 255, 1000])
def test_what_does_not_fit_is_counted(small_corpus, tmp_path, block_size, long):
    continued = cut = dropped = lost = 0
    for messages in chats(120):
        parts = expected_parts(small_corpus.tokenizer, messages, block_size + 1, long)
        exchanges = len(messages) // 2
        kept = sum(ids.count(IM_START) for ids, _ in parts) // 2
        continued += len(parts) > 1
        cut += 0 < kept < exchanges
        dropped += not parts
        lost += exchanges - kept

    output, made = small_corpus.sft(tmp_path / "s", f"--long={long}", block_size=block_size)

    if long == "split":
        skipped = {"exchange longer than a row": lost}
        repaired = {"long conversation continued as another one": continued}
        assert continued > 5 or block_size > 255
    else:
        skipped = {"too long for a row, with its first answer": dropped}
        repaired = {"later turns cut off to fit a row": cut}
    for verb, reasons in (("skipped", skipped), ("repaired", repaired)):
        reasons = {reason: count for reason, count in reasons.items() if count}
        counted = {reason: entry["count"] for reason, entry in made[verb].items()}
        assert counted == reasons
        assert all(f"{verb} {count}: {reason}" in output for reason, count in reasons.items())


def test_parts_of_a_conversation_share_system_turn_and_split(small_corpus, tmp_path):
    """Every answer is supervised once."""
    conversations = []
    for number, messages in enumerate(chats(40)):
        conversations.append([{"role": "system", "content": f"善{number}"}, *messages])
    path = write_chats(tmp_path / "system.jsonl", conversations)

    small_corpus.sft(tmp_path / "s", "--dedup=True", files=[path], block_size=300, fraction=0.3)

    start = re.compile(r"<\|im_start\|>system\n(善\d+)<\|im_end\|>\n<\|im_start\|>user\n")
    answer = re.compile(r"<\|im_start\|>assistant\n(.*?)<\|im_end\|>", re.S)
    sides, answers = {}, []
    for split in ("train", "val"):
        for ids, _ in conversations_in(read_rows(tmp_path / "s", split, 301)):
            text = small_corpus.tokenizer.decode(ids, skip_special=False)
            sides.setdefault(start.match(text)[1], set()).add(split)
            answers += answer.findall(text)
    assert len(sides) == 40 and all(len(splits) == 1 for splits in sides.values())
    said = [message["content"] for messages in chats(40) for message in messages[1::2]]
    assert sorted(answers) == sorted(said)


JUST_FITS = [{"role": "user", "content": "的"}, {"role": "assistant", "content": "人" * 40}]


def test_conversation_that_just_fits(small_corpus, tmp_path):
    block_size = len(small_corpus.tokenizer.encode_chat(JUST_FITS)[0])
    path = write_chats(tmp_path / "one.jsonl", [JUST_FITS])

    _, made = small_corpus.sft(tmp_path / "s", files=[path], block_size=block_size, fraction=0)

    counts = made["splits"]["train"]
    assert counts["rows"] == 1 and counts["padding_tokens"] == 0


@pytest.mark.parametrize("long, reason", [("split", "exchange longer than a row"),
                                          ("truncate", "too long for a row")])
def test_conversation_that_is_a_token_too_long(small_corpus, tmp_path, long, reason):
    block_size = len(small_corpus.tokenizer.encode_chat(JUST_FITS)[0]) - 1
    path = write_chats(tmp_path / "one.jsonl", [JUST_FITS])

    argv = small_corpus.argv(tmp_path / "s", [path], f"--block_size={block_size}",
                             f"--long={long}", "--val_fraction=0")

    assert reason in refused("prepare_sft", *argv)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("long", ["split", "truncate"])
def test_conversation_far_too_long_is_not_encoded(small_corpus, monkeypatch, long):
    """The part that cannot fit is not even encoded, and what is kept is the same."""
    short = [{"role": "user", "content": "的"}, {"role": "assistant", "content": "人"}]
    question = {"role": "user", "content": "在" * 5000}
    endless = [*short, question, {"role": "assistant", "content": "是"}]
    encode_packed, seen = Tokenizer.encode_packed, []

    def watched(self, texts):
        seen.extend(texts)
        return encode_packed(self, texts)
    monkeypatch.setattr(Tokenizer, "encode_packed", watched)
    report = Report()

    first, second = prepare_sft.encode_conversations(
        small_corpus.tokenizer, [("x", endless), ("y", short)], 64, long, report)

    assert first.payload == second.payload and first.digest != second.digest
    assert seen and not any(len(text) > 1000 for text in seen)
    counted = report.skipped if long == "split" else report.repaired
    assert [entry["count"] for entry in counted.values()] == [1]


def test_turns_of_weight_0_are_not_supervised(small_corpus, tmp_path):
    messages = [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "不学", "weight": 0},
        {"role": "user", "content": "二"},
        {"role": "assistant", "content": "要学", "weight": 1},
    ]
    path = write_lines(tmp_path / "weight.jsonl", [{"messages": messages}])

    _, made = small_corpus.sft(tmp_path / "s", files=[path], fraction=0)

    [(ids, mask)] = conversations_in(read_rows(tmp_path / "s", "train", 256))
    supervised = [id for id, m in zip(ids, mask) if m]
    decode = small_corpus.tokenizer.decode
    assert decode(supervised, skip_special=False) == "要学<|im_end|>" and "不学" in decode(ids)
    assert made["splits"]["train"]["learned_bytes"] == len("要学".encode())


def test_pools_are_packed_one_by_one(small_corpus, tmp_path):
    def small_pools():
        packing.POOL_TOKENS = 500
    expected = []
    for messages in chats(120):
        expected += expected_parts(small_corpus.tokenizer, messages, 256, "split")

    small_corpus.sft(tmp_path / "s", fraction=0, before=small_pools)

    assert sorted(conversations_in(read_rows(tmp_path / "s", "train", 256))) == sorted(expected)


def test_show(small_corpus, tmp_path):
    """A line per token, * on the supervised ones; nothing is written."""
    expected = []
    for messages in chats(2):
        for token, supervised in zip(*small_corpus.tokenizer.encode_chat(messages)):
            expected.append(f"  {'*' if supervised else ' '} {token:>5}")

    output = finish("prepare_sft", *small_corpus.argv(tmp_path / "s", ["chats.jsonl"], "--show=2"))

    heads = [line for line in output.splitlines() if line.startswith("---")]
    shown = [line[:9] for line in output.splitlines() if not line.startswith("---")]
    assert len(heads) == 2 and shown == expected
    assert not (tmp_path / "s").exists()


def test_show_abridges_and_says_what_was_skipped(small_corpus, tmp_path):
    long = [{"role": "user", "content": "长" * 2000}, {"role": "assistant", "content": "短"}]
    path = write_chats(tmp_path / "c.jsonl", [*chats(2), long])
    with open(path, "a", encoding="utf-8") as file:
        file.write("{\n")

    output = finish("prepare_sft", *small_corpus.argv(tmp_path / "s", [path], "--show=9"))

    assert "skipped 1: malformed JSON" in output
    assert "… 5,9" in output and output.count("\n") < 700


def test_show_where_nothing_is_understood(small_corpus, tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [{"a": 1}])

    line = refused("prepare_sft", *small_corpus.argv(tmp_path / "s", [path], "--show=1"))

    assert "no conversation was understood (skipped 1: no conversation" in line
