"""A headless Chromium, driven over its DevTools pipe: no package is needed for it.

    with Browser(folder) as browser:
        browser.open(url)
        browser.wait("document.title")                 # until the expression is true
        browser.run("document.title")                  # its value
"""
import base64
import fcntl
import json
import os
import shutil
import subprocess
import threading

from support.processes import LIMIT

PATIENCE = LIMIT
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--no-first-run", "--disable-extensions", "--disable-background-networking",
         "--disable-component-update", "--remote-debugging-pipe", "about:blank"]


def find_chromium():
    """Its path, or None."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return shutil.which(name)
    return None


class Browser:
    """A browser with a profile of its own in `folder`, and one tab of it."""

    def __init__(self, folder):
        # the browser reads its orders from 3 and writes what happens to 4
        orders, self.orders = os.pipe()
        self.news, news = os.pipe()
        orders, news = (fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (orders, news))

        def connect():
            os.dup2(orders, 3)
            os.dup2(news, 4)
        argv = [find_chromium(), f"--user-data-dir={folder}", *FLAGS]
        self.process = subprocess.Popen(argv, pass_fds=(3, 4), preexec_fn=connect,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(orders), os.close(news)
        self.buffer, self.number, self.session = b"", 0, None
        self.errors = []                         # what the page's console complained of

    def __enter__(self):
        # a browser that says nothing is ended, and then reading from it fails
        self.watchdog = threading.Timer(PATIENCE * 5, self.process.kill)
        self.watchdog.start()
        self.session = self.new_tab()
        return self

    def __exit__(self, *error):
        self.watchdog.cancel()
        self.process.kill()
        self.process.wait()
        os.close(self.orders), os.close(self.news)

    def new_tab(self):
        """Returns a session: whose `session` it is, that tab does what the methods say."""
        before, self.session = self.session, None
        page = self.order("Target.createTarget", url="about:blank")["targetId"]
        target = self.order("Target.attachToTarget", targetId=page, flatten=True)
        self.session = target["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.order(f"{domain}.enable")
        new, self.session = self.session, before
        return new

    def order(self, method, **params):
        """Send a DevTools command; returns its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.orders, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(answer["params"])[:500])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        while b"\0" not in self.buffer:
            data = os.read(self.news, 1 << 16)
            assert data, "the browser has ended"
            self.buffer += data
        message, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(message)

    def open(self, url):
        self.order("Page.navigate", url=url)
        here = f"location.href.startsWith({json.dumps(url)})"
        self.wait(f"{here} && document.readyState === 'complete'")

    def run(self, expression):
        """The value of a JavaScript expression, of a promise what it comes to."""
        result = self.order("Runtime.evaluate", expression=expression, awaitPromise=True,
                            returnByValue=True, userGesture=True)
        assert "exceptionDetails" not in result, (expression, result["exceptionDetails"])
        return result["result"].get("value")

    def wait(self, expression):
        """Until the expression is true; it is looked at 20 times a second. Returns its value."""
        value = self.run(f"""new Promise((done, fail) => {{
            const end = Date.now() + {PATIENCE * 1000};
            (function look() {{
                const value = {expression};
                if (value || Date.now() > end) done(value); else setTimeout(look, 50);
            }})();
        }})""")
        assert value, f"waited in vain for {expression}"
        return value

    def type(self, text):
        """Into what has the focus, as a keyboard does."""
        self.order("Input.insertText", text=text)

    def press(self, key, code=0, **more):
        """Press and release a key; code: its number, as 13 for Enter."""
        event = {"key": key, "windowsVirtualKeyCode": code} | more
        if code == 13:
            event["text"] = "\r"
        self.order("Input.dispatchKeyEvent", type="keyDown", **event)
        event.pop("text", None)
        self.order("Input.dispatchKeyEvent", type="keyUp", **event)

    def resize(self, width, height, mobile=False, scale=1):
        self.order("Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=mobile,
                   deviceScaleFactor=scale)

    def colors(self, scheme):
        """light or dark"""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.order("Emulation.setEmulatedMedia", features=[feature])

    def screenshot(self, path):
        data = self.order("Page.captureScreenshot", format="png")["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))
