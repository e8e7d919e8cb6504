"""Continue a text with a trained model.

    python sample.py                      # a document of the demo's model, from its start
    python sample.py --prompt="从前有座山" --out_dir=out/pretrain --temperature=0
    python sample.py --num_samples=8 --seed=1              # eight at once, in one batch
    cat chapter.txt | python sample.py --truncate_ctx=256  # stdin is the text to continue

Without --prompt, stdin is read to its end if it is a pipe or a file; --prompt= (empty) ignores it.

The text streams to stdout, and nothing else does; speed and the reason for the end go to stderr. A
text ends with <|endoftext|>, a --stop text, max_new_tokens, or the model's context. Sample i uses
seed + i. With --dtype=float32 the same seed gives the same text, alone and in a batch; in 16 bits a
batch rounds differently, so now and then another token is drawn.

Exit status: 0; 2 after a mistake that you can correct, with one line on stderr; 130 after Ctrl-C.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import json
import random
import sys
import time
from dataclasses import dataclass

from minillm.answer import STOP_IDS, Answer
from minillm.configurator import NonNegative, configure, whole
from minillm.errors import UserError, run
from minillm.generation_settings import GenerationSettings, check_folder, read_prompt
from minillm.sampling_params import SamplingParams
from minillm.text_stream import show
from minillm.tokenizer import END_OF_TEXT


@dataclass
class Settings(GenerationSettings):
    out_dir: str = "out/demo_pretrain"     # folder of the model, as train.py leaves it
    prompt: str = ""                       # the text to continue; - reads stdin; empty: a new text
    num_samples: whole(1, 10_000) = 1      # texts to make, in one batch
    truncate_ctx: NonNegative = 0          # use only this many tokens from the prompt's end; 0: all


def main():
    s = configure(Settings)
    sys.stdout.reconfigure(errors="replace")
    options = s.sampling()
    check_folder(s.out_dir)
    piped = "prompt" not in s.given and not sys.stdin.isatty()
    prompt = read_prompt("-" if piped else s.prompt)
    # late: torch takes a second, and wrong flags are reported before
    from model import GPT
    model = GPT.from_checkpoint(s.out_dir, device=s.device, dtype=s.dtype, which=s.checkpoint)
    ids = [END_OF_TEXT] + model.tokenizer.encode(prompt)
    if s.truncate_ctx:
        ids = ids[-s.truncate_ctx:]
    if len(ids) >= model.config.block_size:
        context = model.config.block_size
        raise UserError(f"the prompt is {len(ids)} tokens long, the context holds {context} "
                        f"and must take the answer too; "
                        f"--truncate_ctx={context // 2} keeps the end of the prompt")

    seed = random.SystemRandom().getrandbits(31) if s.seed is None else s.seed
    stop = options.pop("stop")
    params = SamplingParams(s.max_new_tokens)
    samples = [Answer(model.tokenizer, lambda made: ids, params, seed + number, stop)
               for number in range(s.num_samples)]
    if not s.json:
        show(prompt)
    start = time.perf_counter()
    for step in model.generate([ids] * s.num_samples, stop_ids=STOP_IDS, seed=seed, **options):
        for sample, token in zip(samples, step):
            if not sample.finish:
                sample.push(token)
        if not s.json:                           # the first streams, the others follow it whole
            show(samples[0].take())
        if all(sample.finish for sample in samples):
            break
    seconds = time.perf_counter() - start
    for number, sample in enumerate(samples):
        if not sample.finish:
            sample.end("context")
        text = sample.take()
        if s.json:
            record = dict(prompt=prompt, text=text, tokens=sample.tokens, finish=sample.finish,
                          seed=sample.seed)
            print(json.dumps(record, ensure_ascii=False))
        elif number == 0:
            show(text)                           # the rest of what has streamed
        else:
            show("\n---------------\n" + prompt + text)
    if not s.json:
        print()
    if sys.stderr.isatty():
        count = sum(sample.tokens for sample in samples)
        reasons = " ".join(sample.finish for sample in samples)
        print(f"[{count} tokens · {count / seconds:.1f} tokens/s · {reasons} · seed {seed}]",
              file=sys.stderr)


if __name__ == "__main__":
    run(main)
