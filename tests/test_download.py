"""scripts/download_data.sh against a server on loopback that breaks connections and does worse."""
import http.server
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tarfile
import threading
import time

import pytest

from support import ROOT
from support.processes import LIMIT
from support.preparation_runs import belle, chats, texts

SCRIPT = f"{ROOT}/scripts/download_data.sh"
TEXT, CHATS = "mobvoi_seq_monkey_general_open_corpus.jsonl.tar.bz2", "train_3.5M_CN.json"
PATHS = {f"/datasets/ddzhu123/seq-monkey/resolve/master/{TEXT}": TEXT, f"/datasets/BelleGroup/train_3.5M_CN/resolve/main/{CHATS}": CHATS}

pytestmark = pytest.mark.skipif(not shutil.which("curl") or not shutil.which("bash"), reason="needs bash and curl")


def corpora():
    content = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts(2000)).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:bz2") as archive:
        entry = tarfile.TarInfo("mobvoi_seq_monkey_general_open_corpus.jsonl")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return {TEXT: buffer.getvalue(), CHATS: "".join(json.dumps(belle(messages), ensure_ascii=False) + "\n" for messages in chats(400)).encode()}


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `.asked` lists (name, first byte asked for or None, bytes sent).

    The switches break it.
    """

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = files, []
        self.drop = 0                # hang up after so many bytes of each answer
        self.ranges = True           # understands Range
        self.redirect = False        # sends every file by a redirect, as both real servers do
        self.refuse = 0              # answers 503 so many times first
        self.silent = False          # sends not a byte of a body
        self.hold_at = None          # after so many bytes of an answer, wait until `go_on` is set
        self.go_on = threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def base(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def do_GET(self):
        server = self.server
        if server.redirect and not self.path.startswith("/cdn"):
            self.send_response(302)
            self.send_header("Location", "/cdn" + self.path)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        name = PATHS.get(self.path.removeprefix("/cdn"))
        if name not in server.files:
            return self.send_error(404)
        if server.refuse:
            server.refuse -= 1
            return self.send_error(503)
        data, first, last = server.files[name], 0, None
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if server.ranges else None
        if asked:
            first, last = int(asked[1]), int(asked[2]) if asked[2] else None
            if first >= len(data):
                return self.send_error(416)
            body = data[first: last + 1 if last is not None else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        else:
            body = data
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        whole = len(body)
        body = b"" if server.silent else body[: server.drop or None]
        sent = 0
        try:
            for start in range(0, len(body), 4096):
                self.wfile.write(body[start: start + 4096])
                sent += len(body[start: start + 4096])
                if sent == server.hold_at:
                    self.wfile.flush()
                    server.go_on.wait(LIMIT)
        except OSError:
            pass
        finally:
            # the question for the size is not counted
            if last is None:
                server.asked.append((name, first if asked else None, sent))
            self.close_connection = sent < whole


@pytest.fixture
def server():
    server = Server(corpora())
    yield server
    server.shutdown()
    server.server_close()


def start(server, tmp_path, *arguments, **env):
    env = os.environ | {"MODELSCOPE_ENDPOINT": server.base, "HF_ENDPOINT": server.base, "RETRIES": "3", "RETRY_DELAY": "0.05", "no_proxy": "127.0.0.1"} | env
    return subprocess.Popen([SCRIPT, *arguments], cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def download(server, tmp_path, *arguments, **env):
    child = start(server, tmp_path, *arguments, **env)
    out, err = child.communicate(timeout=LIMIT)
    return child.returncode, out, err


def fetched(tmp_path):
    folder = tmp_path / "data" / "raw"
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.mark.parametrize("redirect", [False, True])
def test_broken_connections_are_resumed(server, tmp_path, redirect):
    server.drop, server.redirect = 20_000, redirect
    code, out, err = download(server, tmp_path)
    assert code == 0, err
    assert fetched(tmp_path) == server.files
    for name, data in server.files.items():
        starts = [first or 0 for asked, first, _ in server.asked if asked == name]
        assert len(starts) == -(-len(data) // 20_000) > 2
        # nothing is fetched twice
        assert starts == sorted(starts) and len(set(starts)) == len(starts)
        assert sum(sent for asked, _, sent in server.asked if asked == name) < 1.2 * len(data) + 20_000


def test_next_steps_can_be_run(server, tmp_path):
    code, out, _ = download(server, tmp_path)
    steps = [line.split() for line in out.split("next:\n")[1].splitlines()]
    assert [step[1] for step in steps] == ["train_tokenizer.py", "prepare_pretrain.py", "prepare_sft.py", "train.py", "train.py"]
    for _, script, argument in steps:
        assert os.path.exists(f"{ROOT}/{script}")
        assert os.path.exists(tmp_path / argument) or os.path.exists(f"{ROOT}/{argument}")
    # the first records, shown
    assert texts(1)[0][:10].split()[0] in out and chats(1)[0][0]["content"][:8].split()[0] in out


def wait_until(condition):
    limit = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_killed_and_started_again(server, tmp_path):
    server.hold_at = 16384
    child = start(server, tmp_path, "belle")
    part = tmp_path / "data" / "raw" / f"{CHATS}.part"
    wait_until(lambda: part.exists() and part.stat().st_size >= 4096)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    had = part.stat().st_size
    assert 0 < had < len(server.files[CHATS]) and CHATS not in fetched(tmp_path)
    server.go_on.set()
    wait_until(lambda: server.asked)             # the broken transfer is counted
    server.hold_at, server.asked = None, []
    code, out, err = download(server, tmp_path, "belle")
    assert code == 0, err
    assert f"going on at byte {had} of" in out and server.asked[0][1] == had
    assert fetched(tmp_path) == {CHATS: server.files[CHATS]}


def test_what_is_there_is_not_fetched_again(server, tmp_path):
    assert download(server, tmp_path, "belle")[0] == 0
    server.asked = []
    code, out, _ = download(server, tmp_path, "belle")
    assert code == 0 and not server.asked and "is there" in out and "prepare_sft.py" in out and "prepare_pretrain" not in out


def test_server_busy_at_first(server, tmp_path):
    server.refuse = 2
    assert download(server, tmp_path, "belle")[0] == 0
    assert fetched(tmp_path)[CHATS] == server.files[CHATS]


def test_server_that_cannot_resume(server, tmp_path):
    server.ranges = False
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / "data" / "raw" / f"{CHATS}.part").write_bytes(server.files[CHATS][:5000])
    code, out, err = download(server, tmp_path, "belle")
    assert code == 0, err
    assert "cannot resume" in out and fetched(tmp_path) == {CHATS: server.files[CHATS]}


def test_part_larger_than_the_file(server, tmp_path):
    (tmp_path / "data" / "raw").mkdir(parents=True)
    (tmp_path / "data" / "raw" / f"{CHATS}.part").write_bytes(b"x" * (len(server.files[CHATS]) + 1))
    code, out, _ = download(server, tmp_path, "belle")
    assert code == 0 and "starting over" in out and fetched(tmp_path) == {CHATS: server.files[CHATS]}


@pytest.mark.parametrize("fault", ["missing", "silent", "refusing", "gone"])
def test_server_that_gives_nothing(server, tmp_path, fault):
    if fault == "missing":
        del server.files[CHATS]
    server.silent, server.refuse = fault == "silent", 1000 if fault == "refusing" else 0
    env = {"HF_ENDPOINT": "http://127.0.0.1:9"} if fault == "gone" else {}
    code, out, err = download(server, tmp_path, "belle", **env)
    assert code == 2 and CHATS not in fetched(tmp_path)
    assert err.splitlines()[-1].startswith("download_data.sh: ") and "/datasets/BelleGroup/train_3.5M_CN" in err.splitlines()[-1]


@pytest.mark.parametrize("content", [b"<html>please log in</html>\n" * 50, b'{"text": "not a conversation"}\n' * 50])
def test_what_does_not_parse_is_set_aside(server, tmp_path, content):
    server.files[CHATS] = content
    code, out, err = download(server, tmp_path, "belle")
    assert code == 2 and "cannot be read" in err and "next:" not in out
    assert fetched(tmp_path) == {f"{CHATS}.damaged": content}


def test_two_at_once(server, tmp_path):
    if not shutil.which("flock"):
        pytest.skip("needs flock")
    server.hold_at = 4096
    first = start(server, tmp_path, "belle")
    wait_until((tmp_path / "data" / "raw" / f"{CHATS}.part").exists)
    code, _, err = download(server, tmp_path, "belle")
    assert code == 2 and "under way" in err
    server.go_on.set()
    assert first.communicate(timeout=LIMIT) and first.returncode == 0
    assert fetched(tmp_path) == {CHATS: server.files[CHATS]}


def test_where_it_fetches_from(tmp_path):
    """The real addresses, by a curl that only writes down what it is asked for."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "curl").write_text('#!/bin/sh\nfor last; do :; done\necho "$last" >>"$LOG"\nexit 6\n')
    (tmp_path / "bin" / "curl").chmod(0o755)
    log = tmp_path / "log"
    env = {key: value for key, value in os.environ.items() if not key.endswith("_ENDPOINT")}
    env |= {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "LOG": str(log), "RETRIES": "1", "RETRY_DELAY": "0"}
    for arguments, address in ((["belle"], "https://hf-mirror.com/datasets/BelleGroup/train_3.5M_CN/resolve/main/train_3.5M_CN.json"),
                               (["belle", "--huggingface"], "https://huggingface.co/datasets/BelleGroup/train_3.5M_CN/resolve/main/train_3.5M_CN.json"),
                               (["seq-monkey"], f"https://www.modelscope.cn/datasets/ddzhu123/seq-monkey/resolve/master/{TEXT}")):
        log.write_text("")
        assert subprocess.run([SCRIPT, *arguments, f"--out={tmp_path}/raw"], env=env, capture_output=True).returncode == 2
        assert log.read_text().split() == [address]


def test_arguments(tmp_path):
    result = subprocess.run([SCRIPT, "wiki"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "unknown argument wiki" in result.stderr and not list(tmp_path.iterdir())
    result = subprocess.run([SCRIPT, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and "seq-monkey" in result.stdout and "set -" not in result.stdout


def test_a_part_of_seq_monkey_is_unpacked_to_whole_lines(server, tmp_path):
    source = random.Random(1)
    lines = [json.dumps({"text": "".join(chr(source.randrange(0x4E00, 0x9FFF)) for _ in range(400))})
             for _ in range(2000)]
    content = "".join(f"{line}\n" for line in lines).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:bz2") as archive:
        entry = tarfile.TarInfo("corpus.jsonl")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    server.files[TEXT] = buffer.getvalue()
    assert len(server.files[TEXT]) > 1_100_000
    server.drop = 400_000

    code, out, err = download(server, tmp_path, "seq-monkey", "--part=1")

    assert code == 0, err
    [(name, data)] = fetched(tmp_path).items()
    assert name == "seq_monkey_part.jsonl" and name in out.split("next:")[1]
    assert content.startswith(data) and data.endswith(b"\n")
    assert len(content) / 4 < len(data) < len(content)
    assert {first or 0 for _, first, _ in server.asked} <= {0, 400_000, 800_000}


@pytest.mark.parametrize("flag", ["--part=x", "--part=0", "--part=1.5"])
def test_a_part_that_is_no_number_of_megabytes(server, tmp_path, flag):
    code, _, err = download(server, tmp_path, flag)

    assert code == 2 and flag in err and not fetched(tmp_path)
