"""serve.py before it serves: its address and its key, and what compiles."""
import os
import re
import signal
import socket
import sys
import time
from errno import EACCES, EADDRINUSE

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn                                   # late: these need the two

import serve
from minillm.configurator import configure
from minillm.errors import UserError
from minillm.http_app import Limits, check_caller
from minillm.generation import decode_one_token
from minillm.request_fields import ApiError
from minillm.sampling_params import SamplingParams
from model import GPT, fast_versions
from support import processes
from support.processes import LIMIT, Fork
from support.tiny_models import tiny_model, write_folder


@pytest.mark.parametrize("host", ["a" * 64, ".", "\udcff"], ids=ascii)
def test_a_host_that_no_name_can_be(host):
    with pytest.raises(UserError, match=re.escape(f"--host={host} is no name or address")):
        serve.bind(host, 0)


@pytest.mark.parametrize("host", ["256.0.0.1", "192.0.2.1", ""])
def test_a_host_that_is_not_this_machine(host):
    with pytest.raises(UserError) as error:
        serve.bind(host, 0)

    message = str(error.value)
    assert message.startswith(f"cannot listen on {host}:0: ")
    assert message.endswith("; --host takes a name or address of this machine")


def test_a_port_that_is_taken():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError) as error:
            serve.bind("127.0.0.1", port)

    assert str(error.value) == (f"cannot listen on 127.0.0.1:{port}: {os.strerror(EADDRINUSE)}; "
                                "--port=0 takes any free port")


def test_a_port_that_only_root_may_take():
    error = serve.cannot_listen("127.0.0.1", 80, PermissionError(EACCES, os.strerror(EACCES)))

    assert str(error).endswith(f"{os.strerror(EACCES)}; --port=0 takes any free port")


@pytest.mark.parametrize("flag, environment, key", [
    ("secret", "", "secret"), ("", "secret", "secret"), ("flag", "environment", "flag"),
    ("", "", ""), ("  secret\n", "", "secret"), ("", "secret\r\n", "secret"),
    ("two words", "", "two words"), ("密钥", "", "密钥")])
def test_spaces_around_a_key_are_no_part_of_it(monkeypatch, flag, environment, key):
    """A file or a copy brings them along; no client sends them, so that nobody would be let in."""
    monkeypatch.setenv("MINILLM_API_KEY", environment)

    assert serve.read_api_key(flag) == key


@pytest.mark.parametrize("flag, environment, says", [
    (" ", "", "the API key is blank"), ("", "\n", "the API key is blank"),
    ("\udcff", "", "one line of UTF-8 text"), ("a\nb", "", "one line of UTF-8 text")])
def test_a_key_that_nobody_can_send(monkeypatch, flag, environment, says):
    """A blank one would let everybody in, where somebody meant to let few."""
    monkeypatch.setenv("MINILLM_API_KEY", environment)

    with pytest.raises(UserError, match=says):
        serve.read_api_key(flag)


@pytest.mark.parametrize("argv, length", [
    ([], 256), (["--max_tokens=2"], 2), (["--max_new_tokens=2", "--max_tokens=2"], 2)])
def test_a_request_without_a_length_may_have_the_default(argv, length):
    assert configure(serve.Settings, argv).defaults().max_new_tokens == length


def test_a_request_that_says_nothing_gets_what_the_flags_say():
    argv = ["--max_new_tokens=9", "--temperature=0.5", "--top_k=3", "--top_p=0.4",
            "--repetition_penalty=1.5"]

    assert configure(serve.Settings, argv).defaults() == SamplingParams(9, 0.5, 3, 0.4, 1.5)


def test_a_default_length_that_no_request_may_have_is_refused():
    settings = configure(serve.Settings, ["--max_new_tokens=100", "--max_tokens=2"])

    with pytest.raises(UserError, match="max_new_tokens=100 is more than max_tokens=2"):
        settings.defaults()


@pytest.mark.parametrize("host", ["[::1", "[", "]", "", ":", "a:b:c", "127.0.0.1.evil.example"])
def test_half_an_address_is_refused_like_any_other(host):
    class Request:
        headers = {"host": host}

        class app:
            class state:
                limits = Limits()

    with pytest.raises(ApiError) as error:
        check_caller(Request)

    assert error.value.status == 403


# ---- the program

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("served") / "model", tiny_model())


def flags(folder, *more):
    return [f"--out_dir={folder}", "--port=0", "--device=cpu", "--dtype=float32", *more]


def with_decode(decode):
    """For the child: `decode` is what minillm/speed gives, and the server ends as it starts."""
    def before():
        fast_versions.for_batch_decoder = lambda model, rows, compile: {"decode": decode}
        uvicorn.Server.run = lambda self, sockets: print("serving")
    return before


def seen(argv, look, **options):
    """What `look` says of uvicorn's server when serve.py would begin to serve."""
    def before():
        uvicorn.Server.run = lambda self, sockets: print(look(self))
    return processes.run("serve", argv, before=before, **options)


@pytest.mark.parametrize("host, checked", [
    ("localhost", True), ("127.0.0.1", True), ("127.0.0.2", True), ("0.0.0.0", False)])
def test_names_are_checked_where_this_machine_alone_can_ask(folder, host, checked):
    if host == "127.0.0.2" and sys.platform != "linux":
        pytest.skip("only Linux has more than one local address from the start")

    server = seen(flags(folder, f"--host={host}"),
                  lambda server: server.config.app.state.limits.loopback_only)

    assert server.out.splitlines()[-1] == str(checked)


def limits_of(server):
    """Of who may ask, and how much at once."""
    state = server.config.app.state
    decoder, service = state.decoder, state.service
    return (state.limits.api_key, state.limits.max_body, len(decoder.rows), decoder.max_waiting,
            service.most_tokens, server.config.timeout_graceful_shutdown)


def test_every_limit_is_that_of_its_flag(folder):
    argv = flags(folder, "--api_key=key", "--max_body=2", "--rows=3", "--max_waiting=4",
                 "--max_tokens=5", "--drain_seconds=6")

    assert seen(argv, limits_of).out.endswith("\n('key', 2, 3, 4, 5, 6)\n")
    assert seen(flags(folder), limits_of).out.endswith("\n('', 1000000, 8, 64, 4096, 30)\n")


@pytest.mark.parametrize("end, argv, name", [
    ("", [], "model"), ("/", [], "model"), ("", ["--model_name=mine"], "mine")])
def test_the_name_for_clients(folder, end, argv, name):
    argv = flags(f"{folder}{end}", *argv)

    server = seen(argv, lambda server: server.config.app.state.service.name)

    first, last = server.out.splitlines()
    assert first.startswith(f"{name} · 8 answers at a time · http://127.0.0.1:") and last == name


def test_the_checkpoint_that_is_asked_for_is_served(folder):
    done = seen(flags(folder, "--checkpoint=best"), lambda server: "")

    assert done.status == 2 and "no best checkpoint" in done.err


def test_a_model_that_has_had_no_sft_is_named(project):
    done = seen(["--out_dir=out", "--port=0", "--device=cpu"], lambda server: "", folder=project)

    assert done.err.startswith("out was trained on text, not on chats")


def test_an_address_of_ipv6_stands_in_brackets(folder):
    try:
        serve.bind("::1", 0).close()
    except UserError:
        pytest.skip("this machine has no IPv6")

    server = seen(flags(folder, "--host=::1"), lambda server: "")

    assert re.search(r"http://\[::1\]:\d+\n", server.out)


def test_what_compiles_does_so_before_the_address_is_printed(folder):
    def decode(*arguments):
        print("a step")
        return decode_one_token(*arguments)

    warm = processes.run("serve", flags(folder, "--compile=True"), before=with_decode(decode))
    cold = processes.run("serve", flags(folder), before=with_decode(decode))

    assert re.fullmatch(r"(a step\n){8}model · 8 answers at a time · http:\S+\nserving\n", warm.out)
    assert re.fullmatch(r"--compile=True: compiling, with short answers … \d+\.\d s\n", warm.err)
    assert cold.out.startswith("model · ") and cold.err == ""


def test_a_compiler_that_fails_ends_the_server_before_it_serves(folder):
    def decode(*arguments):
        raise RuntimeError("InductorError: RuntimeError: Failed to find C compiler. Please …")

    line = processes.refused("serve", flags(folder, "--compile=True"), before=with_decode(decode))

    assert line == "serve.py: compile=True needs a C compiler: install gcc, or leave compile out"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one program alone binds a port")
def test_a_port_that_another_server_took_meanwhile_is_one_line(folder):
    """Both bind it, which is allowed, and load their models; one is the first to listen."""
    def before():
        inner = serve.bind

        def bind(host, port):
            mine = inner(host, port)
            serve.other = inner(*mine.getsockname())
            serve.other.listen()
            return mine
        serve.bind = bind

    line = processes.refused("serve", flags(folder), before=before)

    assert line.startswith("serve.py: cannot listen on 127.0.0.1:0: Address already in use")


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize("owner, name", [(serve, "bind"), (uvicorn.Server, "run")],
                         ids=["loading", "loaded"])
def test_a_signal_before_the_server_has_begun_ends_it(folder, number, status, owner, name):
    """Python drops an exception of a signal handler if the signal comes inside a __del__."""
    class SendsSignal:
        def __del__(self):
            os.kill(os.getpid(), number)

    def before():
        uvicorn.Server.run = lambda self, sockets: print("serving")
        inner = getattr(owner, name)

        def with_signal(*arguments, **options):
            SendsSignal()
            print("the signal is lost")
            return inner(*arguments, **options)
        setattr(owner, name, with_signal)

    server = processes.run("serve", flags(folder), before=before)

    assert server.status == status and server.err == ""
    assert "lost" not in server.out


def test_a_web_server_that_cannot_start_is_no_success(folder):
    """uvicorn says why; its older versions then return as if nothing had happened."""
    def before():
        uvicorn.Server.run = lambda self, sockets: None

    assert processes.run("serve", flags(folder), before=before).status == 3


def test_too_many_rows_for_the_memory_is_one_line(folder):
    def before():
        def new_cache(self, rows):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried …")
        GPT.new_cache = new_cache

    line = processes.refused("serve", flags(folder), before=before)

    assert re.search(r"out of memory \(.+\): a smaller .*rows", line)


def test_whoever_reads_the_address_can_connect(folder):
    """Also before the web server has begun, which takes a second on a busy machine."""
    def before():
        uvicorn.Server.run = lambda self, sockets: time.sleep(LIMIT)

    server = Fork("serve", flags(folder), before=before)
    try:
        server.wait_until(lambda: server.out.endswith("\n"))
        port = int(server.out.strip().rpartition(":")[2])
        socket.create_connection(("127.0.0.1", port)).close()
    finally:
        server.kill()
        server.wait()
