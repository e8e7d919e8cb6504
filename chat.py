"""Talk to a trained model, in the terminal or through a pipe.

    python chat.py                                   # the demo's model; /help lists the commands
    python chat.py --out_dir=out/sft --system="你是一个助手。" --temperature=0
    echo 你好 | python chat.py                       # stdin is one message; prints the answer alone
    python chat.py --prompt="你好" --json=True       # one JSON record

In a terminal you have a conversation: when the context is full, the model forgets the oldest
questions and answers; the system prompt stays. What you type is always text: <|im_end|> is read as
these ten characters.

Exit status: 0; 2 after a mistake that you can correct, with one line on stderr; 130 after Ctrl-C.
"""
if __name__ == "__main__":
    import minillm.early_exit        # first: no traceback while the rest is imported
import json
import os
import sys
from dataclasses import dataclass

from minillm.configurator import NonNegative, configure
from minillm.conversation import Conversation
from minillm.errors import UserError, run
from minillm.generation_settings import GenerationSettings, check_folder, read_prompt
from minillm.text_stream import show


@dataclass
class Settings(GenerationSettings):
    out_dir: str = "out/demo_sft"          # folder of the model, as train.py leaves it
    prompt: str = ""                       # answer this one message and exit
    system: str = ""                       # the system prompt
    truncate_ctx: NonNegative = 0          # at most this many tokens of context; 0: all it has


def load_model(s):
    # late: torch takes a second, and wrong flags are reported before
    from model import GPT
    return GPT.from_checkpoint(s.out_dir, device=s.device, dtype=s.dtype, which=s.checkpoint)


def answer_once(s, options, message):
    """Print the answer to `message`: text as it is made, or one JSON record. UserError if empty."""
    if not message.strip():
        source = "stdin" if s.prompt in ("", "-") else "--prompt"
        state = "holds only spaces" if message else "is empty"
        raise UserError(f"there is no message: {source} {state}")
    conversation = Conversation(load_model(s), s.system, s.truncate_ctx)
    text = ""
    for piece in conversation.ask(message, seed=s.seed, **options):
        text += piece
        if not s.json:
            show(piece)
    if s.json:
        print(record(message, text, conversation))
    else:
        print()
    from minillm.before_sft import warn_before_sft       # late: it imports torch
    warn_before_sft(s.out_dir)                           # last: a mistake has one line on stderr


def record(prompt, answer, conversation):
    """The JSON line of an answer."""
    fields = {}
    for key, value in conversation.last.items():
        fields[key] = round(value, 4) if isinstance(value, float) else value
    return json.dumps({"prompt": prompt, "answer": answer} | fields, ensure_ascii=False)


def main():
    s = configure(Settings)
    sys.stdout.reconfigure(errors="replace")
    options = s.sampling()
    check_folder(s.out_dir)
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if in_terminal and not s.prompt:
        from minillm.before_sft import warn_before_sft   # late: it imports torch
        from minillm.terminal import Terminal            # late: it imports torch
        model = load_model(s)
        warn_before_sft(s.out_dir)
        Terminal(s, model).run()
        return
    try:
        answer_once(s, options, read_prompt(s.prompt or "-"))
    except KeyboardInterrupt:
        # keep the text so far; exit at once, without waiting for torch's threads
        sys.stdout.flush()
        os._exit(130)


if __name__ == "__main__":
    run(main)
