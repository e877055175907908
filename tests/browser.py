"A headless Chromium that a test looks through: pages, clicks, files, what was loaded, pictures."

import base64
import json
import shutil
import subprocess
import time
from pathlib import Path
from urllib.request import urlopen

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_chromium():
    "The browser's path, or None where there is none."
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    "One tab, driven over the DevTools protocol; a context manager that ends the browser."

    def __init__(self, folder, width=1280, height=1000):
        self.folder = Path(folder)
        self.size = (width, height)
        self.requests, self.complaints = [], []
        self.count = 0

    def __enter__(self):
        import websocket

        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        options += ["--remote-debugging-port=0", "--remote-allow-origins=*", "--hide-scrollbars"]
        # a page that asks for another machine finds none
        options += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
        options += [
            f"--user-data-dir={self.folder}",
            f"--window-size={','.join(map(str, self.size))}",
        ]
        silent = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([find_chromium(), *options, "about:blank"], **silent)
        try:
            told = self.folder / "DevToolsActivePort"
            self.wait(lambda: told.exists() and told.read_text().strip(), "the browser to start")
            port = told.read_text().splitlines()[0]
            with urlopen(f"http://127.0.0.1:{port}/json") as answer:
                tabs = json.load(answer)
            address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            self.socket = websocket.create_connection(address, timeout=60)
            for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
                self.send(f"{domain}.enable")
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *exc):
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)

    def send(self, method, **parameters):
        "One command; its result. What the browser tells meanwhile is kept."
        self.count += 1
        self.socket.send(json.dumps(dict(id=self.count, method=method, params=parameters)))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == self.count:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self.note(message)

    def note(self, message):
        "Requests and complaints."
        method, parameters = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(parameters["exceptionDetails"]["text"])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.complaints.append(
                f"{parameters['entry']['text']} {parameters['entry'].get('url')}"
            )

    def wait(self, ready, what, seconds=60):
        "Until `ready()` is true; its value."
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := ready():
                return value
            time.sleep(0.2)
        raise TimeoutError(f"waited {seconds} s for {what}")

    def open(self, address):
        self.send("Page.navigate", url=address)

    def js(self, code):
        "The value of an expression in the page."
        answer = self.send("Runtime.evaluate", expression=code, returnByValue=True)
        return answer["result"].get("value")

    def wait_js(self, code, what, seconds=60):
        return self.wait(lambda: self.js(code), what, seconds)

    def upload(self, selector, path):
        "Put a file into an input of type file."
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path):
        data = self.send("Page.captureScreenshot", format="png")["data"]
        Path(path).write_bytes(base64.b64decode(data))

    def foreign(self):
        "Addresses of other machines that the page asked for."
        own = ("http://127.0.0.1:", "data:", "blob:", "about:", "chrome")
        return [url for url in self.requests if not url.startswith(own)]
