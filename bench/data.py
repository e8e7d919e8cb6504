"""Measured speed of preparation, beside a bare loop over the tokenizer, and the memory it takes.

    python -m bench.train data                                 # generated text
    python -m bench.train data corpus.jsonl chats.jsonl        # text and conversations of your own
    python -m bench.data --megabytes=4000 --repeats=1 --bare=False   # memory, on more of it

The bare loop has all texts in memory and does nothing but `tokenizer.encode_batch`, a million characters
a call. Preparation is the main() of prepare_pretrain.py or prepare_sft.py from the file to the files:
reading, parsing, hashing, shuffling, packing, writing, syncing. Both see the same texts with the same
threads, take turns, and each has a process of its own; times are medians, without interpreter start-up.
"""
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from minillm.configurator import configure, positional
from minillm.errors import UserError, run

BATCH = 1_000_000                     # characters in one call


@dataclass
class Settings:
    files: list[str] = positional()   # text in JSON lines, conversations in JSON lines; none: generated ones
    tokenizer: str | None = None      # folder of the tokenizer; default: one of 8,000 tokens is trained on the input
    megabytes: int = 64               # of generated text, and half as much of conversations
    repeats: int = 3                  # runs of each kind
    bare: bool = True                 # run the bare loop, which has all text in memory; False: for a corpus larger than that
    folder: str | None = None         # where the generated and prepared files go; default: a temporary folder


def bench_data(files=()):
    """What `python -m bench.train data [TEXT CHATS]` does."""
    measure(Settings(files=list(files)))


def measure(s):
    if s.megabytes < 1 or s.repeats < 1:
        raise UserError("--megabytes and --repeats must be positive")
    if len(s.files) not in (0, 2):
        raise UserError("two files: one of text, one of conversations; or none")
    with tempfile.TemporaryDirectory(dir=s.folder) as folder:
        text, chats = s.files or (os.path.join(folder, "text.jsonl"), os.path.join(folder, "chats.jsonl"))
        if not s.files:
            print(f"generating {s.megabytes} MB of text and {-(-s.megabytes // 2)} MB of conversations", flush=True)
            write_documents(text, s.megabytes)
            write_conversations(chats, -(-s.megabytes // 2))
        tokenizer = s.tokenizer or os.path.join(folder, "tokenizer")
        if not s.tokenizer:
            print("training a tokenizer", flush=True)
            _child(["train_tokenizer.py", text, "--vocab_size=8000", "--max_bytes=10_000_000", f"--out_dir={tokenizer}"])
        threads = os.environ.get("RAYON_NUM_THREADS") or str(os.cpu_count())
        print(f"{threads} threads, medians of {s.repeats}")
        for stage, path in (("prepare_pretrain", text), ("prepare_sft", chats)):
            runs = {"bare loop": [], "preparation": []}
            for _ in range(s.repeats):
                if s.bare:
                    runs["bare loop"].append(_child(["bare", stage, path, tokenizer]))
                runs["preparation"].append(_child([f"{stage}.py", path, f"--tokenizer={tokenizer}", f"--out_dir={folder}/{stage}"]))
            size, tokens = _counts(os.path.join(folder, stage), runs["bare loop"])
            print(f"{stage}.py   {size / 1e6:,.0f} MB of text, {tokens:,} tokens")
            seconds = {name: statistics.median(run["seconds"] for run in of) for name, of in runs.items() if of}
            for name, value in seconds.items():
                print(f"  {name:<12} {value:8.2f} s  {size / value / 1e6:7.2f} MB/s  {tokens / value:12,.0f} tokens/s")
            ratio = f"{seconds['bare loop'] / seconds['preparation']:.1%}" if s.bare else "not measured"
            peak = max(run["peak"] for run in runs["preparation"]) / 2**20
            print(f"  ratio        {ratio:>10}    peak memory of the preparation {peak:,.0f} MiB", flush=True)


def _counts(folder, bare):
    """(bytes, tokens): what the bare loop encoded; without it, what the token files say they hold."""
    if bare:
        return bare[0]["bytes"], bare[0]["tokens"]
    with open(os.path.join(folder, "meta.json"), encoding="utf-8") as file:
        splits = json.load(file)["splits"].values()
    return tuple(sum(split[key] for split in splits) for key in ("bytes", "tokens"))


def _child(arguments):
    """Run this file again to measure one thing; returns what it found."""
    command = [sys.executable, "-m", "bench.data", "--measure", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(result.returncode)                      # it has said why
    return json.loads(result.stdout.splitlines()[-1])


def _measure(arguments):
    """In the child: run a stage's main() with its own command line, or the bare loop; prints a JSON record."""
    if arguments[0] == "bare":
        record = _bare(*arguments[1:])
    else:
        sys.argv = arguments
        stage = __import__(arguments[0].removesuffix(".py"))
        begun = time.perf_counter()
        run(stage.main)
        record = {"seconds": time.perf_counter() - begun, "peak": _peak_memory()}
    print(json.dumps(record))


def _bare(stage, path, folder):
    from minillm.text_reader import Report, Source, conversations, documents
    from minillm.tokenizer import Tokenizer
    tokenizer = Tokenizer.load(folder)
    source = Source([path], Report())
    if stage == "prepare_pretrain":
        texts = [text for _, text in documents(source)]
    else:
        texts = [message["content"] for _, messages in conversations(source) for message in messages]
    batches, total = [[]], 0
    for text in texts:
        batches[-1].append(text)
        total += len(text)
        if total >= BATCH * len(batches):
            batches.append([])
    begun, tokens = time.perf_counter(), 0
    for batch in batches:
        tokens += sum(map(len, tokenizer.encode_batch(batch)))
    return {"seconds": time.perf_counter() - begun, "tokens": tokens, "bytes": sum(len(text.encode()) for text in texts)}


def _peak_memory():
    """Bytes of this process's largest resident set."""
    try:
        # of this program alone: getrusage would count what the parent held when it started us
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Writer:
    """Invents Chinese-like prose without spaces: words of one to three characters, few of them frequent
    (Zipf), with punctuation, numbers and some Latin. The same seed writes the same text; all share the words."""

    def __init__(self, seed, words=30_000):
        self.random = random.Random(0)
        characters = [chr(0x4E00 + i) for i in self.random.sample(range(20_000), 4_000)]
        weights = [1 / (rank + 3) ** 0.8 for rank in range(4_000)]
        self.words = ["".join(self.random.choices(characters, weights, k=self.random.choice((1, 2, 2, 2, 3)))) for _ in range(words)]
        self.words[100::100] = [str(rank * 7) if rank % 2 else "".join(self.random.choices("aeinorst", k=5)) for rank in range(len(self.words[100::100]))]
        self.random.seed(seed)
        total, self.cumulative = 0.0, []
        for rank in range(words):
            total += 1 / (rank + 5)
            self.cumulative.append(total)

    def text(self, words):
        """Prose of about `words` words."""
        drawn = self.random.choices(self.words, cum_weights=self.cumulative, k=words)
        at = 0
        while at < words:
            at += self.random.randrange(4, 16)
            drawn[at - 1: at] = [drawn[min(at, words) - 1] + self.random.choice("，，，。。？！")] if at <= words else []
        return "".join(drawn)


def write_documents(path, megabytes, seed=0):
    """Write about `megabytes` MB of generated documents, in seq-monkey's form, of 100 to 4,000 characters."""
    writer = Writer(seed)
    _write(path, megabytes, lambda: {"text": writer.text(int(50 * 40 ** writer.random.random()))})


def write_conversations(path, megabytes, seed=1):
    """Write about `megabytes` MB of generated conversations, in Belle's form, of one to four exchanges."""
    writer = Writer(seed)

    def conversation():
        turns = []
        for _ in range(writer.random.choice((1, 1, 1, 2, 3, 4))):
            turns += [{"from": "human", "value": writer.text(writer.random.randrange(4, 30))},
                      {"from": "assistant", "value": writer.text(writer.random.randrange(4, 120))}]
        return {"id": "", "conversations": turns}
    _write(path, megabytes, conversation)


def _write(path, megabytes, make):
    """64 MB are invented; beyond that they come again, each line with another number before its text."""
    lines, size = [], 0
    while size < min(megabytes, 64) * 10**6:
        lines.append(json.dumps(make(), ensure_ascii=False).encode())
        size += len(lines[-1]) + 1
    number, written, markers = 0, 0, (b'"text": "', b'"value": "')
    with open(path, "wb", 1 << 20) as file:
        while written < megabytes * 10**6:
            for line in lines:
                number += 1
                for marker in markers:
                    line = line.replace(marker, marker + b"%d " % number, 1)
                written += file.write(line + b"\n")
                if written >= megabytes * 10**6:
                    break


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        _measure(sys.argv[2:])
    else:
        run(lambda: measure(configure(Settings)))
