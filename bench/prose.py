"""Invented Chinese-like text of any size, for the benchmark of preparation.

    write_documents("text.jsonl", megabytes=64)
    write_conversations("chats.jsonl", megabytes=32)

The same seed writes the same text.
"""
import json
import random

WORDS = 30_000
CHARACTERS = 4_000
INVENTED = 64                           # megabytes; beyond that they come again


class Writer:
    """Writes prose without spaces: words of one to three characters, few of them frequent.

    Word frequencies follow Zipf's law; one word in a hundred is a number or Latin letters. All
    writers share the words, whatever their seed.
    """

    def __init__(self, seed):
        self.random = random.Random(0)
        characters = [chr(0x4E00 + i) for i in self.random.sample(range(20_000), CHARACTERS)]
        weights = [1 / (rank + 3) ** 0.8 for rank in range(CHARACTERS)]
        self.words = []
        for _ in range(WORDS):
            length = self.random.choice((1, 2, 2, 2, 3))
            self.words.append("".join(self.random.choices(characters, weights, k=length)))
        for i, rank in enumerate(range(100, WORDS, 100)):
            if i % 2:
                self.words[rank] = str(i * 7)
            else:
                self.words[rank] = "".join(self.random.choices("aeinorst", k=5))
        self.frequencies = [1 / (rank + 5) for rank in range(WORDS)]
        self.random.seed(seed)

    def text(self, words):
        """Prose of about `words` words."""
        drawn = self.random.choices(self.words, self.frequencies, k=words)
        at = 0
        while at < words:
            at += self.random.randrange(4, 16)
            if at <= words:
                drawn[at - 1] += self.random.choice("，，，。。？！")
        return "".join(drawn)


def write_documents(path, megabytes, seed=0):
    """Write documents of 100 to 4,000 characters in seq-monkey's form."""
    writer = Writer(seed)

    def document():
        return {"text": writer.text(int(50 * 40 ** writer.random.random()))}
    write(path, megabytes, document)


def write_conversations(path, megabytes, seed=1):
    """Write conversations of one to four exchanges in Belle's form."""
    writer = Writer(seed)

    def conversation():
        turns = []
        for _ in range(writer.random.choice((1, 1, 1, 2, 3, 4))):
            question = writer.text(writer.random.randrange(4, 30))
            answer = writer.text(writer.random.randrange(4, 120))
            turns += [{"from": "human", "value": question}, {"from": "assistant", "value": answer}]
        return {"id": "", "conversations": turns}
    write(path, megabytes, conversation)


def write(path, megabytes, make):
    """Write records as JSON lines. Where lines come again, a number before each text differs."""
    lines, size = [], 0
    while size < min(megabytes, INVENTED) * 10**6:
        lines.append(json.dumps(make(), ensure_ascii=False).encode() + b"\n")
        size += len(lines[-1])
    number = written = 0
    with open(path, "wb", buffering=1 << 20) as file:
        while written < megabytes * 10**6:
            line = lines[number % len(lines)]
            number += 1
            for marker in (b'"text": "', b'"value": "'):
                line = line.replace(marker, marker + b"%d " % number, 1)
            written += file.write(line)
