"""The flags that sample.py and chat.py share, and where they find the model and the prompt.

Nothing here imports torch: a wrong flag is reported at once, without a second of loading.
"""
import contextlib
import os
import shlex
import sys
import threading
from dataclasses import dataclass, fields

from minillm.configurator import NonNegative
from minillm.errors import UserError
from minillm.sampling_params import DEFAULTS, SamplingParams

WAIT = 2.0                               # seconds without the end of stdin until a line says so


@dataclass
class GenerationSettings:
    """The flags that sample.py and chat.py share."""
    out_dir: str = ""                      # folder of the model, as train.py leaves it
    checkpoint: str = "newest"             # which one to load from out_dir: newest, best or a step
    prompt: str = ""                       # the text to continue
    max_new_tokens: int = DEFAULTS.max_new_tokens        # longest answer, in tokens
    temperature: float = DEFAULTS.temperature            # 0: greedy; 1: the model's distribution
    top_k: int = DEFAULTS.top_k            # sample from the k likeliest tokens; 0: from all
    top_p: float = DEFAULTS.top_p          # sample from the likeliest with this total probability
    repetition_penalty: float = DEFAULTS.repetition_penalty  # above 1: repeats become less likely
    seed: int | None = None                # same seed, same text; auto: another one each time
    stop: str = ""                         # end before this text; several: a|b; \n is a line end
    truncate_ctx: NonNegative = 0          # at most this many tokens of context; 0: all
    json: bool = False                     # print a JSON record instead of text
    device: str = "auto"                   # auto, cpu, mps, cuda, cuda:N
    dtype: str = "auto"                    # auto, float32, bfloat16, float16
    compile: bool = False                  # GPU: Triton kernels; slower start, faster run

    def sampling(self):
        """The keyword arguments of Conversation.ask. Raises UserError if one is out of range."""
        options = {field.name: getattr(self, field.name) for field in fields(SamplingParams)}
        SamplingParams(**options)
        stop = self.stop.replace("\\n", "\n").replace("\\t", "\t").split("|")
        options["stop"] = tuple(text for text in stop if text)
        options["compile"] = self.compile
        return options


def check_folder(out_dir):
    """Raise UserError if there is no folder out_dir of a model; it says which command makes it."""
    if os.path.isdir(out_dir) or out_dir.startswith("hf:") or out_dir.endswith(".pt"):
        return                                   # checkpoint.py opens these, or says why not
    name = os.path.basename(os.path.normpath(out_dir))
    command = "train.py"
    config = f"config/{name}.py"
    if os.path.exists(config):
        command = f"`python train.py {shlex.quote(config)}`"
    if name == "demo_pretrain":
        command = "`make demo`, or `python train.py`,"
    if name == "demo_sft":
        command = "`make demo`, or `python train.py config/demo_sft.py`,"
    raise UserError(f"no model in {out_dir}: {command} makes it")


def _read_stdin():
    """All bytes of stdin. UserError if it cannot be read."""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        # another process on the same terminal or pipe may have made it non-blocking
        os.set_blocking(sys.stdin.fileno(), True)
    # a pipe that nobody closes, as of ssh, would look like a model that hangs
    note = threading.Timer(WAIT, print, ["waiting for the end of stdin; --prompt=TEXT reads none"],
                           {"file": sys.stderr, "flush": True})
    if not sys.stdin.isatty():
        note.start()
    try:
        return sys.stdin.buffer.read()
    except OSError as error:                     # opened for writing alone
        raise UserError(f"cannot read stdin: {error.strerror or error}") from None
    finally:
        note.cancel()


def read_prompt(text):
    """The prompt: `text`, or all of stdin if that is '-'.

    stdin is UTF-8, or in the terminal's own encoding (GBK). Raises UserError if it is neither.
    """
    if text != "-":
        try:
            text.encode("utf-8")
        except UnicodeError:
            raise UserError("the prompt is not UTF-8 text") from None
        return text
    if sys.stdin.isatty():
        print("type the text; Ctrl-D on a line of its own ends it", file=sys.stderr, flush=True)
    data = _read_stdin()
    for encoding in ("utf-8-sig", sys.stdin.encoding):
        try:
            # one line end comes from the command that wrote the text, not from its author
            return data.decode(encoding).replace("\r\n", "\n").removesuffix("\n")
        except UnicodeError:
            pass
    raise UserError("the prompt is not UTF-8 text: `iconv -f GBK -t UTF-8` converts GBK")
