"""How tokens are sampled, with limits, and the flags that sample.py and chat.py share.

    params = SamplingParams(max_new_tokens=64, temperature=0.8, top_k=50)

Nothing here imports torch: a wrong flag is reported at once, without a second of loading.
"""
import contextlib
import math
import os
import shlex
import sys
import threading
from dataclasses import dataclass, fields, replace
from functools import cached_property

from minillm.configurator import NonNegative
from minillm.errors import UserError

WAIT = 2.0                               # seconds without the end of stdin until a line says so


@dataclass(frozen=True)
class SamplingParams:
    """One request's settings. Raises UserError for a value out of range (a NaN too)."""
    max_new_tokens: int = 256              # most tokens to make
    temperature: float = 1.0               # 0: greedy; 1: the model's own distribution
    top_k: int = 0                         # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0                     # sample from the likeliest with this total probability
    repetition_penalty: float = 1.0        # above 1: tokens that have occurred become less likely

    def __post_init__(self):
        if not self.max_new_tokens >= 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature={self.temperature} must be 0 or more")
        if not self.top_k >= 0:
            raise UserError(f"top_k={self.top_k} must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be at least 0.01 "
                            "and at most 100")

    def for_sample(self):
        """The arguments of sampling.sample after the logits and u; a new rule's belong here too."""
        return self.temperature, self.top_k, self.top_p

    @cached_property                     # asked for every row in every step of a server
    def without_length(self):
        """What two requests must share to be drawn together, or by the same CUDA graph."""
        return replace(self, max_new_tokens=1)


# of sample.py, chat.py, serve.py and GPT.chat; GPT.generate has those of SamplingParams, which
# leave the model's distribution as it is
DEFAULTS = SamplingParams(temperature=0.8, top_k=50)


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
    compile: bool = False                  # GPU: compile the decode step; slower start, faster run

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
