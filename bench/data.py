"""Measured speed of preparation, beside a bare loop over the tokenizer, and the memory it takes.

    python -m bench.data                                 # generated text
    python -m bench.data corpus.jsonl chats.jsonl        # text and conversations of your own
    python -m bench.data --megabytes=4000 --repeats=1 --bare=False   # memory, on more of it

The bare loop has all texts in memory and calls `tokenizer.encode_batch` on a million characters at
a time, nothing else. Preparation is the main() of prepare_pretrain.py or prepare_sft.py from the
file to the files: reading, parsing, hashing, shuffling, packing, writing, syncing. Both see the
same texts with the same threads, take turns, and each has a process of its own. Times are medians,
without interpreter start-up.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

from bench.prose import write_conversations, write_documents
from minillm.configurator import Positive, configure, positional
from minillm.errors import UserError, run
from minillm.report import Report
from minillm.text_files import Source
from minillm.text_reader import conversations, documents
from minillm.tokenizer import Tokenizer

BATCH = 1_000_000                       # characters in one call
BARE, PREPARATION = "bare loop", "preparation"


@dataclass
class Settings:
    files: list[str] = positional()     # two files of JSON lines: text, chats; none: generated ones
    tokenizer: str | None = None        # its folder; default: one of 8,000 tokens is trained
    megabytes: Positive = 64            # of generated text, and half as much of conversations
    repeats: Positive = 3               # runs of each kind
    bare: bool = True                   # run the bare loop, which has all text in memory
    folder: str | None = None           # where files are generated; default: a temporary folder


def main():
    s = configure(Settings)
    if len(s.files) not in (0, 2):
        raise UserError("give two files, one of text and one of conversations; or none")
    with tempfile.TemporaryDirectory(dir=s.folder) as folder:
        text, chats = s.files or generate(folder, s.megabytes)
        tokenizer = s.tokenizer or train_tokenizer(folder, text)
        threads = os.environ.get("RAYON_NUM_THREADS") or os.cpu_count()
        print(f"{threads} threads, medians of {s.repeats}")
        for stage, path in (("prepare_pretrain", text), ("prepare_sft", chats)):
            compare(s, stage, path, tokenizer, os.path.join(folder, stage))


def generate(folder, megabytes):
    """The paths of generated text and conversations."""
    text, chats = os.path.join(folder, "text.jsonl"), os.path.join(folder, "chats.jsonl")
    half = (megabytes + 1) // 2
    print(f"generating {megabytes} MB of text and {half} MB of conversations", flush=True)
    write_documents(text, megabytes)
    write_conversations(chats, half)
    return text, chats


def train_tokenizer(folder, text):
    """The folder of a tokenizer trained on `text`."""
    print("training a tokenizer", flush=True)
    out_dir = os.path.join(folder, "tokenizer")
    in_a_child(["train_tokenizer", text, "--vocab_size=8000", "--max_bytes=10_000_000",
                f"--out_dir={out_dir}"])
    return out_dir


def compare(s, stage, path, tokenizer, out_dir):
    """Run the bare loop and the preparation in turns; print what they took."""
    runs = {BARE: [], PREPARATION: []}
    for _ in range(s.repeats):
        if s.bare:
            runs[BARE].append(in_a_child([BARE, stage, path, tokenizer]))
        runs[PREPARATION].append(
            in_a_child([stage, path, f"--tokenizer={tokenizer}", f"--out_dir={out_dir}"]))

    size, tokens = count(out_dir, runs[BARE])
    print(f"{stage}.py   {size / 1e6:,.0f} MB of text, {tokens:,} tokens")
    seconds = {}
    for name, records in runs.items():
        if records:
            seconds[name] = value = statistics.median(record["seconds"] for record in records)
            print(f"  {name:<12} {value:8.2f} s  {size / value / 1e6:7.2f} MB/s  "
                  f"{tokens / value:12,.0f} tokens/s")
    ratio = "not measured"
    if s.bare:
        ratio = f"{seconds[BARE] / seconds[PREPARATION]:.1%}"
    peak = max(record["peak"] for record in runs[PREPARATION])
    print(f"  ratio        {ratio:>10}    "
          f"peak memory of the preparation {peak / 2**20:,.0f} MiB", flush=True)


def count(out_dir, bare):
    """(bytes, tokens): what the bare loop encoded; without it, what meta.json says."""
    if bare:
        return bare[0]["bytes"], bare[0]["tokens"]
    with open(os.path.join(out_dir, "meta.json"), encoding="utf-8") as file:
        splits = json.load(file)["splits"].values()
    return sum(split["bytes"] for split in splits), sum(split["tokens"] for split in splits)


# ---- in a process of its own

def in_a_child(arguments):
    """Run this file again to measure one thing; returns what it found."""
    command = [sys.executable, "-m", "bench.data", "--measure", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(result.returncode)                      # it has said why
    return json.loads(result.stdout.splitlines()[-1])


def measure(name, *arguments):
    """Run the bare loop, or a stage's main() on its command line; prints a JSON record."""
    if name == BARE:
        record = bare_loop(*arguments)
    else:
        stage = importlib.import_module(name)
        sys.argv = [f"{name}.py", *arguments]
        begun = time.perf_counter()
        run(stage.main)
        record = {"seconds": time.perf_counter() - begun, "peak": peak_memory()}
    print(json.dumps(record))


def bare_loop(stage, path, folder):
    tokenizer = Tokenizer.load(folder)
    source = Source([path], Report())
    texts = []
    if stage == "prepare_pretrain":
        for _, text in documents(source):
            texts.append(text)
    else:
        for _, messages in conversations(source):
            texts += [message["content"] for message in messages]
    batches, tokens = in_batches(texts), 0
    begun = time.perf_counter()
    for batch in batches:
        tokens += sum(map(len, tokenizer.encode_batch(batch)))
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "tokens": tokens, "bytes": sum(len(t.encode()) for t in texts)}


def in_batches(texts):
    """Lists of texts, each of about BATCH characters."""
    batches, size = [[]], 0
    for text in texts:
        if size >= BATCH:
            batches.append([])
            size = 0
        batches[-1].append(text)
        size += len(text)
    return batches


def peak_memory():
    """Bytes of this process's largest resident set."""
    try:
        # of this program alone: getrusage would count what the parent held when it started us
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except OSError:
        import resource                                  # late: Windows lacks it
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        run(main)
