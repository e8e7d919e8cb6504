"""serve.py before it serves: its address and its key, and a host that is half an address."""
import re

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import serve                                     # late: it needs the two
from minillm.errors import UserError
from minillm.http_app import Limits, check_caller
from minillm.request_fields import ApiError


@pytest.mark.parametrize("host", ["a" * 64, ".", "\udcff"], ids=ascii)
def test_a_host_that_no_name_can_be(host):
    with pytest.raises(UserError, match=re.escape(f"--host={host} is no name or address")):
        serve.listen(host, 0)


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
