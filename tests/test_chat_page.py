"""The chat page in a browser, as people use it: the real server, the demo model, Debian's chromium.

Where a test is about what a model may write, or about how a server may fail, the browser is handed
the response in the server's place: the demo model cannot be made to write an attack.

`make screenshots` has this file take the pictures of the docs as well.
"""

import json
import os
import random
import re
import socket
import socketserver
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest

from bitnet_rs.server.page import page as served_page

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = sync_api.expect

CHROMIUM = Path("/usr/bin/chromium")
if not CHROMIUM.exists():
    pytest.skip(f"no browser at {CHROMIUM}: sudo apt-get install chromium", allow_module_level=True)

IMAGES = Path(__file__).parent.parent / "docs" / "images"
# With it, the demo model goes on for 107 tokens.
LONG = {"seed": "98", "temperature": "1"}
LONG_QUESTION = "Write a long story about a whale and the sea."

SAMPLE = """\
# Ternary *models*

A **ternary** weight is `-1`, `0` or ***one***; see [the paper](https://arxiv.org/abs/2402.17764),
https://example.org/a_b_c. and ~~nothing~~ else.

## How

1. Pack
2. Add:
   - `+1` adds
   - the rest
3. Scale

```python
def dot(weights):
    return "**not bold**"
```

> Simple things
> should be simple.

| Format | Bits |
|:-------|-----:|
| i2     |    2 |
| t5 `x` |  1.6 |

---

2 * 3 * 4 = snake_case_name
"""

HOSTILE = """\
<script>window.pwned = 1</script>
<img src="https://evil.example/a.png" onerror="window.pwned = 2">
<iframe srcdoc="<script>parent.pwned = 3</script>"></iframe><style>* { display: none }</style>

![picture](https://evil.example/b.png) [one](javascript:window.pwned=4)
[two](JaVaScRiPt:window.pwned=5) [three](data:text/html,<script>pwned=6</script>)
[four](vbscript:x) [five](//evil.example/c) [six](https://good.example@evil.example/d)
[https://good.example](https://evil.example/e) <javascript:window.pwned=7>
[seven](https://evil.example/"onmouseover="window.pwned=8) <a href="javascript:pwned=9">eight</a>

| <img src=x onerror=pwned=10> | b |
|---|---|
| <svg onload=pwned=11> | [x](javascript:pwned=12) |

# <b onclick="pwned=13">heading</b>

```"><img src=x onerror=pwned=14>
<script>window.pwned = 15</script>
"""


@contextmanager
def serving(*arguments: str) -> Iterator[str]:
    """A server of the demo model; its address."""
    command = [sys.executable, "-m", "bitnet_rs", "serve", "demo", "--port", "0", *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            # Warnings may come first; a server that cannot start ends the lines.
            lines = iter(process.stderr.readline, "")
            found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in lines)
            yield next(address.group() for address in found if address)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving() as address:
        yield address


class _Pacing(socketserver.BaseRequestHandler):
    """Passes a connection on, and what comes back event by event, with a pause after each."""

    server: "Pace"

    def handle(self) -> None:
        with socket.create_connection(self.server.upstream) as upstream:
            Thread(target=self._forth, args=(upstream,), daemon=True).start()
            with suppress(OSError):  # the page has left
                while received := upstream.recv(65536):
                    for part in re.split(rb"(?<=\n\n)", received):
                        self.request.sendall(part)
                        if b"data: " in part:
                            time.sleep(self.server.pause)
            # Ends the other direction, too: the server sees that the page has left.
            with suppress(OSError):
                self.request.shutdown(socket.SHUT_RDWR)

    def _forth(self, upstream: socket.socket) -> None:
        with suppress(OSError):
            while received := self.request.recv(65536):
                upstream.sendall(received)
            upstream.shutdown(socket.SHUT_WR)


class Pace(socketserver.ThreadingTCPServer):
    """What the demo model writes is there at once; this stands between, and gives it time."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), _Pacing)
        self.pause = 0.0
        self.upstream = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture(scope="module")
def pace(url: str) -> Iterator[Pace]:
    with Pace(url) as pace:
        thread = Thread(target=pace.serve_forever, args=(0.05,))
        thread.start()
        yield pace
        pace.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Root, as in containers, may not use the sandbox.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@contextmanager
def opened(chromium: Any, url: str, **options: Any) -> Iterator[Any]:
    """A page in a browser of its own. At the end, nothing must have gone wrong in it."""
    options.setdefault("viewport", {"width": 1000, "height": 720})
    context = chromium.new_context(base_url=url, **options)
    context.set_default_timeout(10_000)
    trouble: list[str] = []
    context.add_init_script(
        "document.addEventListener('securitypolicyviolation', (event) =>"
        " console.error(`violates ${event.violatedDirective}: ${event.blockedURI}`))"
    )

    def log(message: Any) -> None:
        # The browser logs each status of an error, which tests provoke.
        if message.type in ("error", "warning") and "Failed to load" not in message.text:
            trouble.append(message.text)

    def request(each: Any) -> None:
        if not each.url.startswith((url, "data:")):
            trouble.append(f"requests {each.url}")

    def dialog(each: Any) -> None:
        trouble.append(f"says {each.message}")
        each.dismiss()

    context.on("console", log)
    context.on("request", request)
    context.on("dialog", dialog)
    context.on("weberror", lambda error: trouble.append(str(error.error)))
    page = context.new_page()
    page.trouble = trouble
    page.goto("/")
    expect(page.locator("#model")).to_have_text("demo")
    yield page
    context.close()
    assert trouble == []


@pytest.fixture
def page(chromium: Any, url: str) -> Iterator[Any]:
    with opened(chromium, url) as page:
        yield page


@pytest.fixture
def slow_page(chromium: Any, pace: Pace) -> Iterator[Any]:
    with opened(chromium, pace.url, viewport={"width": 500, "height": 400}) as page:
        yield page


def say(page: Any, text: str) -> None:
    page.fill("#message", text)
    page.keyboard.press("Enter")


def answers(page: Any) -> Any:
    """The finished answers."""
    return page.locator(".answer:not([aria-busy])")


def ask(page: Any, text: str) -> str:
    """Says something and returns the answer when it is complete."""
    before = answers(page).count()
    say(page, text)
    expect(answers(page)).to_have_count(before + 1)
    return str(answers(page).last.locator(".prose").inner_text())


def choose(page: Any, **settings: str) -> None:
    page.click("#open-settings")
    page.evaluate("document.querySelector('details').open = true")
    for name, value in settings.items():
        page.fill(f"#{name}", value)
    page.click("#close-settings")


def chunk(**fields: Any) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def stream(text: str, size: int = 9) -> str:
    """A response's body that streams the text, so many characters at a time."""
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    usage = {"prompt_tokens": 7, "completion_tokens": len(pieces), "total_tokens": 7 + len(pieces)}
    return "".join(
        [
            ": keep-alive\n\n",
            *(chunk(choices=[{"index": 0, "delta": {"content": each}}]) for each in pieces),
            chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
            chunk(choices=[], usage=usage),
            "data: [DONE]\n\n",
        ]
    )


def answer_with(page: Any, *responses: dict[str, Any]) -> list[dict[str, Any]]:
    """Answers requests for completions in the server's place, the last response ever again.

    Returns the bodies and, under `authorization`, the keys of the requests, as they come.
    """
    asked: list[dict[str, Any]] = []

    def handle(route: Any) -> None:
        given = responses[min(len(asked), len(responses) - 1)]
        key = route.request.headers.get("authorization")
        asked.append({**route.request.post_data_json, "authorization": key})
        if given.get("abort"):
            route.abort("connectionrefused")
        else:
            route.fulfill(**given)

    page.route("**/v1/chat/completions", handle)
    return asked


def writes(text: str, size: int = 9) -> dict[str, Any]:
    return {"status": 200, "content_type": "text/event-stream", "body": stream(text, size)}


def refuses(status: int, message: str, code: str = "x", **headers: str) -> dict[str, Any]:
    return {
        "status": status,
        "headers": headers,
        "json": {"error": {"message": message, "code": code}},
    }


def requests_of(page: Any) -> list[dict[str, Any]]:
    """The bodies of the requests for completions, as they come; the server answers them."""
    asked: list[dict[str, Any]] = []
    page.on(
        "request",
        lambda each: asked.append(each.post_data_json) if "chat/completions" in each.url else None,
    )
    return asked


def roles(body: dict[str, Any]) -> str:
    return "".join(message["role"][0] for message in body["messages"])


# ---- Talking ---------------------------------------------------------------------------------


def test_an_answer_streams_in_and_says_how_fast(slow_page: Any, pace: Pace) -> None:
    page, pace.pause = slow_page, 0.02
    choose(page, **LONG)
    say(page, LONG_QUESTION)
    prose = page.locator(".answer .prose")
    expect(page.locator(".thinking")).to_be_visible()
    lengths = set()
    while page.locator("[aria-busy]").count():
        lengths.add(len(prose.inner_text()))
        time.sleep(0.02)
    assert len(lengths) >= 4
    expect(page.locator(".stats")).to_have_text(
        re.compile(r"^107 tokens · [\d.]+ tokens/s · first after \d+\.\d\d s · prompt 20\b")
    )
    expect(page.locator("#room")).to_have_text("127 of 512 tokens used.")
    # A screen reader has heard it all, too, but for the marks of Markdown.
    heard = page.locator("#speech").inner_text()
    assert heard.split() == prose.inner_text().split()


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop_keeps_what_there_is(slow_page: Any, pace: Pace, how: str) -> None:
    page, pace.pause = slow_page, 0.1
    choose(page, **LONG)
    say(page, LONG_QUESTION)
    expect(page.locator(".answer p").first).not_to_be_empty()
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop").click()
    expect(page.get_by_text("Stopped.", exact=True)).to_be_visible()
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    kept = page.locator(".prose").inner_text()
    pace.pause = 0.0
    asked = requests_of(page)
    ask(page, "And then?")
    assert [m["content"] for m in asked[0]["messages"]][:2] == [LONG_QUESTION, kept]


def test_answer_again(page: Any) -> None:
    asked = requests_of(page)
    ask(page, "Hello!")
    page.click("[title='Answer again']")
    expect(page.locator("[title='Answer again']")).to_be_visible()
    expect(answers(page)).to_have_count(1)
    assert asked[0] == asked[1]
    # Where there is no new answer, the old one stays.
    old = page.locator(".prose").inner_text()
    answer_with(page, {"abort": True}, writes("new"))
    page.click("[title='Answer again']")
    expect(page.locator(".trouble")).to_contain_text("does not answer")
    assert page.locator(".prose").inner_text() == old
    page.click("text=Try again")
    expect(page.locator(".prose")).to_have_text("new")


def test_edit_and_send_again(page: Any) -> None:
    asked = requests_of(page)
    for text in ("Hello!", "How are you?", "Good."):
        ask(page, text)
    page.locator(".turn.user").nth(1).hover()
    page.locator("[title='Edit and send again']").nth(1).click()
    box = page.get_by_label("Edit the message")
    expect(box).to_be_focused()
    box.fill("Who are you?")
    page.keyboard.press("Enter")
    expect(page.locator(".said")).to_have_text(["Hello!", "Who are you?"])
    expect(answers(page)).to_have_count(2)
    assert roles(asked[-1]) == "uau"
    assert asked[-1]["messages"][2]["content"] == "Who are you?"


def test_the_conversation_survives_a_reload_until_cleared(page: Any) -> None:
    answer = ask(page, "Hello!")
    choose(page, system="Be brief.")
    page.reload()
    expect(page.locator(".said")).to_have_text("Hello!")
    assert page.locator(".prose").inner_text() == answer
    expect(page.locator(".stats")).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".turn")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".turn")).to_have_count(2)
    page.click("#open-settings")
    assert page.input_value("#system") == "Be brief."
    page.click("text=Clear all of it")
    page.click("text=Really clear")
    expect(page.locator("#welcome")).to_be_visible()
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0
    page.reload()
    expect(page.locator("#welcome")).to_be_visible()


def test_a_message_without_an_answer_is_answered_after_a_reload(page: Any) -> None:
    answer_with(page, {"abort": True})
    say(page, "Hello!")
    expect(page.locator(".trouble")).to_be_visible()
    page.unroute("**/v1/chat/completions")
    page.reload()
    page.click("text=Answer it")
    expect(page.locator(".stats")).to_be_visible()


def test_settings_reach_the_request(page: Any) -> None:
    asked = requests_of(page)
    ask(page, "Hello!")
    assert asked[0] == {
        "model": "demo",
        "messages": [{"role": "user", "content": "Hello!"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    choose(page, system="Be brief.", temperature="0", max_tokens="3", top_p="0.5", seed="7")
    ask(page, "Tell me a story.")
    expect(page.locator(".aside")).to_have_text("Cut off at the max tokens of the settings.")
    assert asked[1]["messages"][0] == {"role": "system", "content": "Be brief."}
    numbers = {name: asked[1][name] for name in ("temperature", "max_tokens", "top_p", "seed")}
    assert numbers == {"temperature": 0, "max_tokens": 3, "top_p": 0.5, "seed": 7}
    # A value that no request may have is not taken.
    choose(page, temperature="9")
    ask(page, "And?")
    assert asked[2]["temperature"] == 0


def test_copy(page: Any) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    text = "Look:\n\n```py\nx = 1\n\ty  = 2\n```\n"
    answer_with(page, writes(text))
    ask(page, "Code, please")
    page.get_by_role("button", name="Copy the code").click()
    expect(page.get_by_text("Copied", exact=True).first).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1\n\ty  = 2\n"
    page.locator(".answer [title='Copy']").click()
    page.wait_for_timeout(50)
    assert page.evaluate("navigator.clipboard.readText()") == text


def test_the_end_is_followed_unless_one_scrolls_up(slow_page: Any, pace: Pace) -> None:
    page, pace.pause = slow_page, 0.1
    answer_with(page, writes("line\n\n" * 60))
    ask(page, "Hello!")
    at = "document.querySelector('#scroller').scrollTop"
    size = "document.querySelector('#scroller').scrollHeight"
    assert page.evaluate(f"{size} - {at}") < 400
    page.unroute("**/v1/chat/completions")
    choose(page, **LONG)
    say(page, LONG_QUESTION)
    expect(page.locator(".answer").nth(1).locator("p").first).not_to_be_empty()
    page.mouse.move(250, 150)
    page.mouse.wheel(0, -400)
    expect(page.get_by_role("button", name="Scroll to the latest")).to_be_visible()
    page.wait_for_timeout(200)  # the wheel turns smoothly
    top, height = page.evaluate(at), page.evaluate(size)
    while page.evaluate(size) == height and page.locator("[aria-busy]").count():
        time.sleep(0.02)
    assert page.evaluate(size) > height
    assert page.evaluate(at) == top
    page.get_by_role("button", name="Scroll to the latest").click()
    page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped.", exact=True)).to_be_in_viewport()


# ---- What a model may write ------------------------------------------------------------------


def test_markdown(page: Any) -> None:
    answer_with(page, writes(SAMPLE))
    ask(page, "Show me")
    prose = page.locator(".prose")
    expect(prose.locator("h1")).to_have_text("Ternary models")
    expect(prose.locator("h1 em")).to_have_text("models")
    expect(prose.locator("p strong").first).to_have_text("ternary")
    expect(prose.locator("p strong em, p em strong")).to_have_text("one")
    expect(prose.locator("p code").first).to_have_text("-1")
    expect(prose.locator("del")).to_have_text("nothing")
    expect(prose.locator("a")).to_have_text(["the paper", "https://example.org/a_b_c"])
    expect(prose.locator(".host")).to_have_text("(arxiv.org)")
    expect(prose.locator("ol > li")).to_have_count(3)
    expect(prose.locator("ol > li > ul > li")).to_have_text(["+1 adds", "the rest"])
    expect(prose.locator(".code > div")).to_contain_text("python")
    expect(prose.locator("pre")).to_have_text(
        'def dot(weights):\n    return "**not bold**"\n', use_inner_text=True
    )
    expect(prose.locator("blockquote")).to_contain_text("Simple things")
    expect(prose.locator("th")).to_have_text(["Format", "Bits"])
    expect(prose.locator("td")).to_have_text(["i2", "2", "t5 x", "1.6"])
    expect(prose.locator("td.right")).to_have_text(["2", "1.6"])
    expect(prose.locator("hr")).to_have_count(1)
    expect(prose.locator("p").last).to_have_text("2 * 3 * 4 = snake_case_name")


def test_nothing_a_model_writes_is_run_or_loaded(page: Any) -> None:
    answer_with(page, writes(HOSTILE), writes(HOSTILE, 1))
    for text in ("Attack", "Slowly"):
        ask(page, text)
        prose = page.locator(".prose").last
        made = prose.evaluate("(all) => [...all.querySelectorAll('*')].map((e) => e.localName)")
        assert set(made) <= set(
            re.findall(r"\w+", "p br a span h1 div table thead tbody tr th td pre code button")
        )
        links = prose.locator("a").evaluate_all(
            "(all) => all.map((a) => [a.href, a.rel, a.textContent + a.nextSibling?.textContent])"
        )
        assert links
        assert {urlsplit(href).hostname for href, _, _ in links} == {"evil.example"}
        assert all("noopener" in rel for _, rel, _ in links)
        # Each says where it leads, whatever its label says.
        assert all(re.search(r"^https://evil\.example/|\(evil\.example\)$", x) for *_, x in links)
        for shown in ("<script>window.pwned = 1</script>", "[one](javascript:window.pwned=4)"):
            expect(prose).to_contain_text(shown)
        expect(prose.locator("pre")).to_contain_text("<script>window.pwned = 15</script>")
        attributes = prose.evaluate(
            "(all) => [...all.querySelectorAll('*')].flatMap((e) => e.getAttributeNames())"
        )
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    page.reload()
    expect(answers(page)).to_have_count(2)
    assert page.evaluate("typeof pwned") == "undefined"


def test_even_a_hole_in_the_page_would_run_nothing(page: Any) -> None:
    inject = """() => {
        try { document.body.insertAdjacentHTML("beforeend", "<img src=x onerror=pwned=1>"); }
        catch (error) { return error.name; }
    }"""
    assert page.evaluate(inject) == "TypeError"
    page.wait_for_timeout(100)
    assert any("violates require-trusted-types-for" in each for each in page.trouble)
    page.trouble.clear()
    policy = served_page().headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


def test_long_code_stays_quick(page: Any) -> None:
    code = "".join(f"x{i} = {i}  # a line of code\n" for i in range(10_000))
    answer_with(page, writes(f"```py\n{code}```\n", 300))
    began = time.perf_counter()
    ask(page, "Long code")
    assert time.perf_counter() - began < 5
    assert page.locator("pre").evaluate("(pre) => pre.textContent") == code


def test_no_text_makes_the_page_hang(page: Any) -> None:
    texts = [
        *("*a " * 40_000, "**a *b " * 20_000, "[" * 80_000, "[a](b" * 20_000, "http://[" * 10_000),
        *(">" * 80_000, "- " * 40_000, "- " * 40_000 + "x", "`a ``b " * 10_000),
        *("a|b\n" + "|" * 80_000, "a|b\n" + "-" * 80_000 + "x", "```" + " " * 80_000 + "x`\n"),
        *("# a" + " " * 80_000 + "b\n", "a" + " " * 80_000 + "b\n", "\n" * 80_000),
    ]
    seconds = page.evaluate(
        """(texts) => texts.map((text) => {
            const began = performance.now();
            const markdown = new Markdown(document.createElement("div"));
            markdown.push(text);
            markdown.paint();
            markdown.end();
            return (performance.now() - began) / 1000;
        })""",
        texts,
    )
    # Linear is some tens of milliseconds; what is not takes minutes.
    assert max(seconds) < 2, dict(zip((text[:9] for text in texts), seconds, strict=True))


def test_text_in_pieces_ends_as_text_in_one(page: Any) -> None:
    marks = (
        "# |## |- |  - |1. |2) |> |> > |```|```py|~~~|---|***|**|*|_|`|``|[|](|)|]|!|~~| |    |\t"
        "|\\|1984.|<b>|the hat|a_b_c|](http://x.y/z)|http://a.b/c|<https://q.r>"
    )
    lines = ("\n", "\n\n", "| a | b |\n", "|---|:-:|\n", "a | b\n--- | ---\n", "end\n", "\r\n")
    pieces = [*marks.split("|"), *lines]
    chance = random.Random(20)
    texts = ["".join(chance.choices(pieces, k=chance.randint(1, 30))) for _ in range(300)]
    differing = page.evaluate(
        """(texts) => texts.filter((text) => {
            const made = [text.length, 1, 3].map((size) => {
                const into = document.createElement("div");
                const markdown = new Markdown(into);
                for (let at = 0; at < text.length; at += size) {
                    markdown.push(text.slice(at, at + size));
                    markdown.paint();
                }
                markdown.end();
                return into.innerHTML;
            });
            return made.some((each) => each !== made[0]);
        })""",
        [SAMPLE, HOSTILE, *texts],
    )
    assert differing == []


def test_nothing_changes_its_kind_while_it_grows(page: Any) -> None:
    seen = page.evaluate(
        """(text) => {
            const into = document.createElement("div");
            const markdown = new Markdown(into);
            return [...text].map((character) => {
                markdown.push(character);
                markdown.paint();
                // A table's row has all its cells from the start.
                const made = [...into.querySelectorAll(":not([hidden], td *)")];
                const prose = [...into.children].filter((each) => each.className !== "code");
                return [
                    made.map((each) => each.localName).join(" "),
                    prose.map((each) => each.textContent).join("\\n"),
                ];
            });
        }""",
        SAMPLE,
    )
    for (shape, _), (later, _) in pairwise(seen):
        # What links to nowhere yet is no link, and an address grows a path after its host.
        assert re.sub(r" (a|span)\b", "", later).startswith(re.sub(r" (a|span)\b", "", shape))
    # Marks do not show for a moment before they are understood.
    assert not [text for _, text in seen if re.search(r"\*\*|`|~~|^#|\|", text)]


# ---- What may go wrong -----------------------------------------------------------------------


def test_a_server_that_wants_a_key(chromium: Any) -> None:
    with serving("--api-key", "right") as url:
        context = chromium.new_context(base_url=url)
        page = context.new_page()
        page.goto("/")
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("This server wants a key")
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("The last one was not accepted")
        page.click("text=Cancel")
        expect(page.locator(".trouble")).to_contain_text("This server wants an API key.")
        page.click("text=Enter the key")
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("right")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("demo")
        ask(page, "Hello!")
        page.reload()
        ask(page, "Still there?")
        assert page.evaluate("Object.values(sessionStorage)") == ["right"]
        assert "right" not in page.evaluate("Object.values(localStorage).join()")
        context.close()


def test_a_full_queue(page: Any) -> None:
    busy = refuses(429, "64 requests are waiting", "queue_full", **{"Retry-After": "3"})
    answer_with(page, busy, writes("At last."))
    say(page, "Hello!")
    expect(page.get_by_role("alert")).to_contain_text("its queue is full")
    expect(page.get_by_role("alert")).to_contain_text("It suggests waiting 3 seconds.")
    page.click("text=Try again")
    expect(page.locator(".prose")).to_have_text("At last.")
    expect(page.get_by_role("alert")).to_be_empty()


def test_a_full_context(page: Any) -> None:
    ask(page, "Hello!")
    say(page, "word " * 600)
    expect(page.locator(".trouble")).to_contain_text("longer than the model can read")
    expect(page.locator(".trouble")).to_contain_text("the context holds 512")
    page.locator(".trouble >> text=New chat with this message").click()
    expect(page.locator(".said")).to_have_count(1)
    # It alone is too long as well.
    page.locator(".trouble >> text='New chat'").click()
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#message")).to_be_focused()


def test_errors_in_words(page: Any) -> None:
    broken_off = {"status": 200, "body": chunk(choices=[{"delta": {"content": "Some"}}])}
    cases: list[tuple[dict[str, Any], str]] = [
        (refuses(400, "temperature must be positive"), "temperature must be positive"),
        (refuses(503, "the server is about to end"), "shutting down"),
        ({"status": 502, "body": "<html>Bad gateway"}, "HTTP status 502"),
        ({"status": 200, "body": chunk(error={"message": "out of memory"})}, "out of memory"),
        ({"abort": True}, "does not answer"),
        (broken_off, "stopped in the middle"),
    ]
    for i, (response, words) in enumerate(cases):
        answer_with(page, response, writes(f"Answer {i}."))
        say(page, "Hello!")
        expect(page.get_by_role("alert")).to_contain_text(words)
        page.click("text=Try again")
        expect(page.locator(".prose")).to_have_text([f"Answer {n}." for n in range(i + 1)])
        expect(page.locator(".said")).to_have_count(i + 1)
        page.unroute("**/v1/chat/completions")


# ---- For everyone ----------------------------------------------------------------------------


def background(page: Any) -> int:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(int(value) for value in re.findall(r"\d+", colour)[:3])


def test_dark_and_light(chromium: Any, url: str) -> None:
    with opened(chromium, url, color_scheme="dark") as page:
        assert background(page) < 200
        page.get_by_role("button", name="Light colours").click()
        assert background(page) > 600
        page.reload()
        assert background(page) > 600
        page.get_by_role("button", name="Dark colours").click()
        assert background(page) < 200
        page.emulate_media(color_scheme="light")
        assert background(page) > 600


def test_the_keyboard_is_enough(page: Any) -> None:
    asked = requests_of(page)
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(answers(page)).to_have_count(1)
    assert asked[0]["messages"][0]["content"] == "One\ntwo"
    page.keyboard.press("ArrowUp")
    page.keyboard.type(" three")
    page.keyboard.press("Escape")
    expect(page.locator("#message")).to_be_focused()
    expect(page.locator(".said")).to_have_text("One\ntwo")
    page.keyboard.press("ArrowUp")
    page.keyboard.type(" three")
    page.keyboard.press("Enter")
    expect(page.locator(".said")).to_have_text("One\ntwo three")
    expect(page.locator("[title='Answer again']")).to_be_visible()
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        name, outlined = page.evaluate(
            """() => {
                const on = document.activeElement;
                const name = on.ariaLabel ?? on.labels?.[0]?.textContent ?? on.localName;
                return [name, getComputedStyle(on).outlineStyle !== "none"];
            }"""
        )
        reached.append(name)
        assert outlined or name in ("Message", "body"), name
    wanted = {"New chat", "Settings", "Dark colours", "Copy", "Edit and send again"}
    assert wanted | {"Answer again", "Message", "Send"} <= set(reached)
    page.locator("#open-settings").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#open-settings")).to_be_focused()


@pytest.mark.parametrize("width", [320, 390])
def test_a_phone_has_no_sideways_scrolling(chromium: Any, url: str, width: int) -> None:
    options = {"is_mobile": True, "has_touch": True, "viewport": {"width": width, "height": 600}}
    wide = f"{'W' * 300}\n\n`{'x' * 200}`\n\n```\n{'code ' * 80}\n```\n\n"
    table = "| " + " | ".join(["wide column"] * 9) + " |\n" + "|---" * 9 + "|\n" + "| cell " * 9
    with opened(chromium, url, **options) as page:
        answer_with(page, writes(wide + table), refuses(400, "y" * 300))
        page.fill("#message", "V" * 300)
        page.click("#go")
        expect(answers(page)).to_have_count(1)
        page.fill("#message", "And?")
        page.click("#go")
        expect(page.locator(".trouble")).to_be_visible()
        for element in ("document.documentElement", "document.querySelector('#scroller')"):
            sizes = page.evaluate(f"[{element}.scrollWidth, {element}.clientWidth]")
            assert sizes[0] == sizes[1]
        page.click("#open-settings")
        sheet = page.locator("#settings-dialog")
        assert sheet.evaluate("(e) => e.scrollWidth === e.clientWidth")
        assert sheet.bounding_box()["width"] <= width
        page.click("#close-settings")
        assert page.locator("#message").evaluate("(e) => e.getBoundingClientRect().bottom") <= 600


@pytest.mark.skipif(
    "BITNET_RS_SCREENSHOTS" not in os.environ,
    reason="takes the pictures of the docs: make screenshots",
)
def test_screenshots(chromium: Any, url: str) -> None:
    IMAGES.mkdir(exist_ok=True)
    views: dict[str, dict[str, Any]] = {
        "chat.png": {"viewport": {"width": 1000, "height": 720}},
        "chat-dark.png": {"viewport": {"width": 1000, "height": 720}, "color_scheme": "dark"},
    }
    for name, options in views.items():
        with opened(chromium, url, **options) as page:
            choose(page, seed="3", temperature="0.6")
            for text in (
                "Hello! How are you today?",
                "What did you do at the weekend?",
                "What kind of films do you like?",
            ):
                ask(page, text)
            page.mouse.move(0, 0)
            page.wait_for_timeout(300)
            page.screenshot(path=IMAGES / name)
        assert (IMAGES / name).stat().st_size < 200_000
