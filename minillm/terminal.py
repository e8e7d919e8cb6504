"""The terminal side of chat.py: line editing, streaming, interrupts, commands.

A message is a line. Several lines are one message if they are pasted, if a line ends with \\, or
between two lines of three double quotes. Ctrl-C stops an answer and keeps its text so far; twice in
a row it exits; Ctrl-D exits. Colour only if the terminal has it and NO_COLOR is not set.
"""
import difflib
import json
import os
import select
import signal
import sys

from minillm.atomic_folder import replaced_file
from minillm.configurator import configure
from minillm.conversation import Conversation
from minillm.device import describe
from minillm.errors import UserError
from minillm.report import counted
from minillm.tab_completion import completions
from minillm.text_stream import printable

if sys.flags.utf8_mode:
    # The locale is C or is not installed: Python still reads UTF-8, but readline follows the locale
    # and would take the bytes of a Chinese character for Meta keys
    os.environ["LC_ALL"] = "C.UTF-8"
try:
    import readline
except ImportError:                              # Windows; input() then has no history
    readline = None

PASTE_SECONDS = 0.03                             # what follows a line this soon was pasted with it
SETTABLE = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop")
SAVED_KEYS = {"messages", "role", "content"}     # all that /save writes


class Terminal:
    def __init__(self, settings, model):
        self.settings, self.model = settings, model
        self.conversation = Conversation(model, settings.system, settings.truncate_ctx)
        self.colour = "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
        # in the order of the class, in which /help lists them
        self.commands = {name.removeprefix("command_"): getattr(self, name)
                         for name in vars(Terminal) if name.startswith("command_")}
        self.interrupts = 0                      # Ctrl-C since the last line that was entered
        self.n_answers = 0                       # since the seed was set
        self.totals = {"tokens": 0, "seconds": 0.0, "answers": 0}

    def run(self):
        """Talk until the user leaves."""
        self.dim(self.banner())
        if readline:
            self.set_up_readline()
        while True:
            try:
                message = self.read_message()
                self.interrupts = 0
                if message.startswith("/"):
                    self.command(message)
                elif message.strip():
                    self.say(lambda: self.conversation.ask(message, **self.options()))
            except EOFError:
                print()
                break
            except KeyboardInterrupt:
                print()
                self.interrupts += 1
                if self.interrupts > 1:
                    sys.exit(130)
                self.dim("Ctrl-C again, Ctrl-D or /exit leaves")
            except UnicodeError:
                self.dim("that was not UTF-8 text")
            except UserError as error:
                self.dim(str(error))

    def banner(self):
        model = self.model
        c, (total, active) = model.config, model.n_params()
        kind = f"{total / 1e6:.1f}M parameters"
        if c.n_expert:
            kind += f" ({c.n_expert} experts, {active / 1e6:.1f}M active)"
        weight = model.wte.weight
        dtype = str(weight.dtype).removeprefix("torch.")
        return (f"{self.settings.out_dir} step {model.step} · {kind}"
                f" · {describe(weight.device)} · {dtype}"
                f" · context {self.conversation.context} · /help")

    # What is written

    def paint(self, text, code):
        return f"\033[{code}m{text}\033[0m" if self.colour else text

    def dim(self, text):
        print(self.paint(text, "2"), flush=True)

    def say(self, ask):
        """Stream the answer that ask() begins. The first Ctrl-C stops it, keeping what was said."""
        forgotten = self.conversation.first
        pieces = ask()                           # a message that doesn't fit raises here

        def interrupt(signum, frame):
            self.interrupts += 1
            if self.interrupts > 1:
                raise KeyboardInterrupt
        # A flag, looked at between tokens: an exception in the middle of a step would leave half of
        # it in the cache
        before = signal.signal(signal.SIGINT, interrupt)
        end = ""
        try:
            for piece in pieces:
                shown = printable(piece)
                print(shown, end="", flush=True)
                end = shown[-1:] or end
                if self.interrupts:
                    break
        finally:
            pieces.close()
            signal.signal(signal.SIGINT, before)
            self.n_answers += 1
            if end != "\n":
                print()
        last = self.conversation.last
        for key in ("tokens", "seconds"):
            self.totals[key] += last[key]
        self.totals["answers"] += 1
        self.dim(self.stats_line(last))
        if self.conversation.first > forgotten:
            self.dim("the context was full: "
                     f"the model no longer sees the oldest {self.conversation.first} messages")

    def stats_line(self, last):
        ends = {"stop": "", "interrupt": " · stopped", "context": " · cut, the context is full",
                "length": f" · cut at max_new_tokens={self.settings.max_new_tokens}"}
        rate = last["tokens"] / last["seconds"] if last["seconds"] else 0
        return (f"[{last['tokens']} tokens · {rate:.1f} tokens/s · "
                f"context {last['context_tokens']}/{self.conversation.context}"
                f"{ends[last['finish']]}]")

    # What is read

    def set_up_readline(self):
        """History, completion, pasting. Works with GNU readline and, less well, with libedit."""
        if "libedit" in (readline.__doc__ or ""):
            readline.parse_and_bind("bind ^I rl_complete")
        else:
            readline.parse_and_bind("tab: complete")
            readline.parse_and_bind("set enable-bracketed-paste on")
            # Alt-Enter: a line end in the message
            readline.parse_and_bind('"\\e\\C-m": "\\C-v\\C-j"')
        readline.set_completer_delims(" \t\n")
        readline.set_completer(self.complete)
        readline.set_auto_history(True)

    def complete(self, text, state):
        """readline's completer: the state-th completion of the word `text`."""
        line = readline.get_line_buffer()[:readline.get_endidx()]
        found = completions(line, text, self.commands, SETTABLE)
        return found[state] if state < len(found) else None

    def read_message(self):
        """One message. Raises EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C."""
        # lines typed while the model spoke are messages of their own
        typed_ahead = waiting(0)
        line = self.read_line("› ", "1;32")
        if line.startswith("/"):
            return line
        while not typed_ahead and waiting(PASTE_SECONDS):
            # pasted into a terminal without bracketed paste
            line += "\n" + self.read_line("", "")
        if line.strip() == '"""':
            lines = []
            while (line := self.read_line("… ", "2")).strip() != '"""':
                lines.append(line)
            return "\n".join(lines)
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self.read_line("… ", "2")
        return line

    def read_line(self, prompt, code):
        if self.colour and prompt:
            # \001 \002: readline must not count what takes no place on the screen
            if readline:
                prompt = f"\001\033[{code}m\002{prompt}\001\033[0m\002"
            else:
                prompt = self.paint(prompt, code)
        return input(prompt).encode("utf-8", "ignore").decode()

    # Commands: each takes the text behind its name; its docstring is its line in /help

    def command(self, line):
        name, _, rest = line[1:].partition(" ")
        if name not in self.commands:
            near = difflib.get_close_matches(name, self.commands, 1, 0.5)
            hint = f"did you mean /{near[0]}?" if near else "/help lists them"
            raise UserError(f"unknown command /{name}: {hint}")
        self.commands[name](rest.strip())

    def command_help(self, rest):
        """this list"""
        for name, command in self.commands.items():
            usage, _, meaning = (command.__doc__ or "").rpartition(" — ")   # -OO: none
            self.dim(f"  /{name + ' ' + usage:<24}{meaning}")
        self.dim("  several lines: paste them, end a line with \\, "
                 'or put """ on the lines before and after\n'
                 "  Ctrl-C stops the answer, twice leaves; Ctrl-D leaves; "
                 "a space before / makes it a message")

    def command_clear(self, rest):
        """forget the conversation, keep the system prompt"""
        self.conversation.clear()
        self.dim("cleared")

    def command_retry(self, rest):
        """another answer to the last message"""
        self.say(lambda: self.conversation.retry(**self.options()))

    def command_undo(self, rest):
        """take back the last message and its answer"""
        question = self.conversation.undo()
        if question is None:
            raise UserError("there is nothing to undo")
        self.dim(f"taken back: {question}")

    def command_system(self, rest):
        """[TEXT] — set the system prompt; without TEXT take it away"""
        self.conversation.set_system(rest)
        self.dim(f"system prompt: {rest}" if rest else "no system prompt")

    def command_set(self, rest):
        """[KEY=VALUE ...] — set sampling options; without any show them"""
        changes = []
        for word in rest.split():
            if "=" in word or not changes:
                changes.append(word)
            else:
                changes[-1] += " " + word        # --stop may hold spaces
        keys = [change.partition("=")[0] for change in changes]
        for key, change in zip(keys, changes):
            if "=" not in change or key not in SETTABLE:
                near = difflib.get_close_matches(key, SETTABLE, 1, 0.5)
                hint = f"; did you mean {near[0]}?" if near and near[0] != key else ""
                raise UserError(f"/set takes KEY=VALUE, not {change}: "
                                f"the keys are {', '.join(SETTABLE)}{hint}")
        new = configure(type(self.settings), [f"--{change}" for change in changes])
        old = {key: getattr(self.settings, key) for key in keys}
        for key in keys:
            setattr(self.settings, key, getattr(new, key))
        try:
            self.settings.sampling()
        except UserError:
            for key in keys:
                setattr(self.settings, key, old[key])
            raise
        self.n_answers = 0 if "seed" in keys else self.n_answers
        self.dim(" ".join(f"{key}={getattr(self.settings, key)}" for key in keys or SETTABLE))

    def command_save(self, rest):
        """FILE — write the conversation as one JSON line, as prepare_sft.py reads it"""
        path = self.path(rest, "/save")
        if os.path.isfile(path) and os.path.getsize(path) and read_saved(path, alone=True) is None:
            raise UserError(f"{path} exists and is not a conversation that /save wrote: "
                            "give another name")
        line = json.dumps({"messages": self.conversation.messages()}, ensure_ascii=False) + "\n"
        try:
            # a lone surrogate becomes JSON's escape for it
            with (replaced_file(path) as new,
                  open(new, "w", encoding="utf-8", errors="backslashreplace") as file):
                file.write(line)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None
        self.dim(f"{len(self.conversation.turns)} messages written to {path}")

    def command_load(self, rest):
        """FILE — go on with a conversation that /save wrote"""
        path = self.path(rest, "/load")
        messages = read_saved(path)
        if messages is None:
            raise UserError(f"{path} is not a conversation that /save wrote")
        self.conversation.load(messages)
        self.dim(f"{len(self.conversation.turns)} messages read from {path}")

    def command_stats(self, rest):
        """what the last answer and the whole session took"""
        if not self.totals["answers"]:
            raise UserError("nothing has been said yet")
        last, totals = self.conversation.last, self.totals
        n_messages = len(self.conversation.turns)
        self.dim(f"{self.stats_line(last)[1:-1]}"
                 f" · first token after {last['first_token_seconds']:.2f} s,"
                 f" {last['prompt_tokens']} prompt tokens computed · seed {last['seed']}")
        self.dim(f"session: {counted(totals['answers'], 'answers')} · {totals['tokens']} tokens"
                 f" · {totals['tokens'] / totals['seconds']:.1f} tokens/s · {n_messages} messages,"
                 f" the model sees the last {n_messages - self.conversation.first}")

    def command_exit(self, rest):
        """leave, as Ctrl-D does"""
        raise EOFError

    def path(self, text, command):
        if not text or "\0" in text:
            raise UserError(f"{command} needs a file name, as in {command} chat.jsonl")
        return os.path.expanduser(text)

    def options(self):
        """The sampling options; with a seed, each answer gets a different one derived from it."""
        seed = self.settings.seed
        if seed is not None:
            seed += 7919 * self.n_answers
        return self.settings.sampling() | {"seed": seed}


def read_saved(path, alone=False):
    """The messages in a file's first line, or None. alone: None also if it holds more than that."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            record = json.loads(file.readline())
            more = alone and (file.read(1) or set(record).union(*record["messages"]) - SAVED_KEYS)
            return None if more else record["messages"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def waiting(seconds):
    """Whether there is input to read, or will be within `seconds`."""
    try:
        return bool(select.select([sys.stdin], [], [], seconds)[0])
    except (OSError, ValueError):                # Windows selects on sockets only
        return False
