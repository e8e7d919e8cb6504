"""chat.py in a pseudo-terminal: what is typed, what is on the screen, Ctrl-C, resizing.

Its model has random weights, says letters only and never stops by itself (tiny_models.py), so that
an answer can be told from what the program says about it.
"""
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time

from support import ROOT
from support.processes import LIMIT, stat_fields
from support.tiny_models import talkative, tiny_model, write_folder

LETTERS = r"[A-Za-z\u4e00-\u9fff]"
STATS = r"\[(\d+) tokens · [\d.]+ tokens/s · context (\d+)/(\d+)(.*?)\]"
SETTINGS = ("max_new_tokens=5 temperature=0.8 top_k=50 top_p=1.0 repetition_penalty=1.0 seed=1 "
            "stop=")
FLAGS = ["--out_dir=tiny", "--device=cpu", "--seed=1"]
CHAT = [sys.executable, os.path.join(ROOT, "chat.py"), *FLAGS]
GATED_CHAT = [sys.executable, os.path.join(ROOT, "tests/support/gated_chat.py"), *FLAGS]
# what a terminal draws with: no text. At the end it may have come in part
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|[\x01\x02\x07]|\x1b(\[[0-9;?]*)?$|\r$")


def write_model(folder):
    """Write the model that FLAGS name. Returns the folder."""
    write_folder(folder / "tiny", talkative(tiny_model(block_size=2000)))
    return folder


class Session:
    """`command` in a terminal of its own, in `folder`; it is killed where the with block fails.

    screen: what it has written, without colours. raw: the same with colours, in bytes.
    """

    def __init__(self, folder, command, **environment):
        self.folder = folder
        self.raw, self.screen, self.at = b"", "", 0
        self.status = None
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            self._child(command, environment)
        self.resize(24, 80)

    def _child(self, command, environment):
        try:
            # no LANG: the harder case, as in a container
            names = {"PATH", "HOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV"} & os.environ.keys()
            kept = {name: os.environ[name] for name in names}
            own = {"TERM": "xterm", "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT}
            os.chdir(self.folder)
            os.execvpe(command[0], command, kept | own | environment)
        finally:
            os._exit(127)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.terminal)

    # ---- the terminal

    def resize(self, rows, columns):
        """As a window does: the kernel tells the foreground process with SIGWINCH."""
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, keys):
        os.write(self.terminal, keys.encode())

    def read(self, seconds):
        """Add to the screen what comes within `seconds`. Returns False once nothing can come."""
        if not select.select([self.terminal], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.terminal, 1 << 16)
        except OSError:                          # how Linux says that the program has gone
            return False
        self.raw += data
        self.screen = ESCAPES.sub("", self.raw.decode("utf-8", "ignore")).replace("\r\n", "\n")
        return bool(data)

    def expect(self, pattern):
        """Wait until `pattern` stands behind the last match. Returns its match."""
        pattern = re.compile(pattern, re.S)
        limit = time.monotonic() + LIMIT
        more = True
        while not (match := pattern.search(self.screen, self.at)):
            rest = self.screen[self.at:]
            assert more and time.monotonic() < limit, f"no {pattern.pattern!r} in {rest!r}"
            more = self.read(0.2)
        self.at = match.end()
        return match

    def ended(self):
        """Wait for the end. Returns the exit status."""
        limit = time.monotonic() + LIMIT
        while self.status is None:
            assert time.monotonic() < limit, f"still there: {self.screen[-500:]!r}"
            self.read(0.05)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    # ---- chat.py

    def prompt(self):
        self.expect("› ")

    def say(self, text, answer=STATS):
        """Enter a line, wait for `answer` and the next prompt. Returns the answer's match."""
        self.send(text + "\r")
        match = self.expect(answer)
        self.prompt()
        return match

    def saved(self, name="now.jsonl"):
        """The messages of the conversation, by way of /save."""
        self.say(f"/save {name}", r"messages written to " + name)
        return json.loads((self.folder / name).read_text("utf-8"))["messages"]

    def questions(self):
        """What the user said."""
        return [message["content"] for message in self.saved() if message["role"] == "user"]

    def reset(self):
        """An empty conversation with SETTINGS."""
        self.say("/clear", "cleared")
        self.say("/system", "no system prompt")
        self.say(f"/set {SETTINGS}", re.escape(SETTINGS))

    @contextlib.contextmanager
    def _file(self, name):
        path = self.folder / name
        path.touch()
        try:
            yield
        finally:
            path.unlink()

    def gate_shut(self):
        """Answers stop after their tenth token until the with block ends."""
        return self._file("shut")

    def still_pasting(self):
        """No line is the last of a pasted text until the with block ends."""
        return self._file("pasting")

    def ctrl_c(self):
        """Ctrl-C at the prompt, once the program sleeps there.

        readline would see a signal that comes before with the next key only.
        """
        limit = time.monotonic() + LIMIT
        while self._state() != "S":
            assert time.monotonic() < limit, "never sleeps"
            time.sleep(0.001)
        self.send("\x03")

    def _state(self):
        """R where the program runs, S where it sleeps (Linux)."""
        return stat_fields(f"/proc/{self.pid}/stat")[0]


@contextlib.contextmanager
def chat_session(folder, *argv, **environment):
    """A Session of chat.py with a gate, at its first prompt."""
    with Session(folder, [*GATED_CHAT, *argv], **environment) as session:
        session.prompt()
        yield session
