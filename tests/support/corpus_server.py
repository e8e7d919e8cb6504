"""A server of the two corpora on loopback, which breaks connections and does worse."""
import http.server
import io
import json
import re
import tarfile
import threading

from support.preparation_runs import belle, chats, texts
from support.processes import LIMIT

TEXT = "mobvoi_seq_monkey_general_open_corpus.jsonl.tar.bz2"
CHATS = "train_3.5M_CN.json"
TEXT_PATH = f"/datasets/ddzhu123/seq-monkey/resolve/master/{TEXT}"
CHATS_PATH = f"/datasets/BelleGroup/train_3.5M_CN/resolve/main/{CHATS}"
PATHS = {TEXT_PATH: TEXT, CHATS_PATH: CHATS}


def json_lines(records):
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    return "".join(f"{line}\n" for line in lines).encode()


def text_archive(content):
    """The tar.bz2 of a file of JSON lines."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:bz2") as archive:
        entry = tarfile.TarInfo("mobvoi_seq_monkey_general_open_corpus.jsonl")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def corpora():
    """{name: bytes} of both."""
    return {
        TEXT: text_archive(json_lines({"text": text} for text in texts(2000))),
        CHATS: json_lines(map(belle, chats(400))),
    }


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; the switches break it.

    `asked` lists [name, first byte asked for or None, bytes sent], but no question for the size.
    """

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.asked = files, []
        self.drop = None             # hang up after so many bytes of each answer
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
            self.answer(302, 0, ("Location", "/cdn" + self.path))
            return
        name = PATHS.get(self.path.removeprefix("/cdn"))
        if name not in server.files:
            self.send_error(404)
        elif server.refuse:
            server.refuse -= 1
            self.send_error(503)
        else:
            self.send_file(name, server.files[name])

    def answer(self, status, length, *headers):
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def send_file(self, name, data):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or not self.server.ranges:
            self.answer(200, len(data))
            self.send_body(data, [name, None, 0])
            return
        first, last = int(asked[1]), asked[2]
        if first >= len(data):
            self.send_error(416)
            return
        body = data[first:]
        if last:
            body = data[first: int(last) + 1]
        end = first + len(body) - 1
        self.answer(206, len(body), ("Content-Range", f"bytes {first}-{end}/{len(data)}"))
        self.send_body(body, [name, first, 0], is_question=bool(last))

    def send_body(self, body, record, is_question=False):
        """Send as much of it as the switches allow; `record` goes to `asked`, and counts."""
        server = self.server
        if not is_question:
            server.asked.append(record)
        sent = b"" if server.silent else body[: server.drop]
        self.close_connection = len(sent) < len(body)
        try:
            for start in range(0, len(sent), 4096):
                part = sent[start: start + 4096]
                record[2] += len(part)
                self.wfile.write(part)
                if record[2] == server.hold_at:
                    self.wfile.flush()
                    server.go_on.wait(LIMIT)
        except OSError:                          # the other side has hung up
            self.close_connection = True
