"""The chat page in a real browser: with the model in the box, and with a stub of the server that
answers what no model can be made to answer."""

import contextlib
import json
import re
import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from prepare import jsonl

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

PAGE = Path(__file__).resolve().parents[1] / "serving" / "page.html"
DEFAULTS = {
    "max_tokens": 128,
    "temperature": 0.6,
    "top_k": 50,
    "top_p": 0.8,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.7,
}
ATTACK = "<img src=x onerror=attacked=1><script>attacked=1</script>"
ATTACK += "\"'&amp;</textarea></title><b>not bold</b>"


class Stub(ThreadingHTTPServer):
    """Answers instead of the server.

    `script` has a list for each of the next replies: a text is sent as a piece, an event is waited
    for, a dictionary is sent as it is, None cuts the stream, a number is an HTTP status.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.script, self.asked, self.judged = [], [], []
        self.key, self.has_reward_model, self.sampling = None, False, dict(DEFAULTS)

    def plan(self, *replies):
        self.script += [reply if isinstance(reply, list) else [reply] for reply in replies]


class StubHandler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", kind="application/json", **headers):
        self.send_response(status)
        for name, value in {"Content-Type": kind, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    def refuse(self, status, message, **headers):
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self.answer(status, {"error": error}, **headers)

    def is_refused(self):
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.refuse(401, "no such key")
            return True
        return False

    def do_GET(self):
        if self.path == "/":
            self.answer(200, PAGE.read_bytes(), "text/html; charset=utf-8")
        elif not self.is_refused():
            model = {
                "id": "nano",
                "object": "model",
                "created": 0,
                "owned_by": "nanochatgpt",
                "context_length": 1024,
            }
            model |= {"best_of": self.server.has_reward_model, "sampling": self.server.sampling}
            self.answer(200, {"object": "list", "data": [model]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/feedback":
            self.server.judged.append(body)
            self.answer(204)
        elif not self.is_refused():
            self.server.asked.append(body)
            self.reply(self.server.script.pop(0) if self.server.script else [" I see."])

    def reply(self, pieces):
        if pieces[0] in (400, 429, 500):
            return self.refuse(
                pieces[0], "not now", **({"Retry_After": "2"} if pieces[0] == 429 else {})
            )
        self.answer(200, kind="text/event-stream")
        self.chunk({"role": "assistant", "content": ""})
        for piece in pieces:
            if piece is None:
                return None
            if isinstance(piece, threading.Event):
                piece.wait(10)
            elif isinstance(piece, dict):
                self.event(piece)
            else:
                self.chunk({"content": piece})
        self.chunk({}, "stop")
        self.event(
            {
                "choices": [],
                "usage": {"prompt_tokens": 200, "completion_tokens": 56, "total_tokens": 256},
            }
        )
        return self.event("[DONE]")

    def chunk(self, delta, finish_reason=None):
        self.event(
            {
                "choices": [
                    {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
                ]
            }
        )

    def event(self, data):
        with contextlib.suppress(OSError):  # it was stopped
            self.wfile.write(
                f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
            )


@pytest.fixture
def stub():
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Open the page of a server as a new user: visit(url) -> page. It must work without an error,
    and send nothing elsewhere."""
    contexts, requested, wrong = [], [], []

    def open_page(url, **options):
        context = browser.new_context(**({"viewport": {"width": 1100, "height": 700}} | options))
        context.set_default_timeout(10_000)
        contexts.append(context)
        context.on("request", lambda request: requested.append((url, request.url)))
        context.on("weberror", lambda error: wrong.append(str(error.error)))
        context.on(
            "console",
            lambda m: wrong.append(m.text) if "Content Security Policy" in m.text else None,
        )
        page = context.new_page()
        page.goto(url)
        expect(
            page.get_by_text("tokens of the conversation").or_(page.get_by_label("API key"))
        ).to_be_visible()
        return page

    yield open_page
    for context in contexts:
        for page in context.pages:
            assert page.evaluate("typeof attacked") == "undefined", (
                "a script of somebody else's ran"
            )
        context.close()
    assert wrong == []
    for page_url, url in requested:
        assert urlsplit(url).netloc == urlsplit(page_url).netloc or url.startswith("data:")


@pytest.fixture
def page(stub, visit):
    return visit(stub.url)


def composer(page):
    return page.get_by_role("textbox", name="Message", exact=True)


def say(page, words, wait=True):
    composer(page).fill(words)
    composer(page).press("Enter")
    if wait:
        finished(page)


def finished(page):
    expect(page.get_by_role("button", name="Send (Enter)")).to_be_visible()


def press(page, name, nth=-1):
    page.get_by_role("button", name=name, exact=True).nth(nth).click()


def texts(page, who="Bot"):
    return page.get_by_role("article", name=who).locator(".text")


def titles(page):
    return page.get_by_role("list", name="Earlier conversations").get_by_role("listitem")


def trouble(page):
    return page.locator(".failure p")


def contents(body):
    return [message["content"] for message in body["messages"]]


def saved(page, name, folder):
    """Press an export button; return the conversations as prepare/jsonl.py reads them."""
    with page.expect_download() as download:
        press(page, name)
    download.value.save_as(folder / "saved.jsonl")
    return [messages for _, messages in jsonl.read(folder / "saved.jsonl")]


def import_file(page, path):
    page.locator("input[type=file]").set_input_files(path)


# ---- with the model in the box


def test_the_model_answers(chat_server, visit):
    page = visit(chat_server.url)
    say(page, "Hello! My name is Nora.")
    assert texts(page).inner_text().strip()
    expect(page.get_by_text(re.compile(r"\d+ of [\d,]+ tokens · \d+ tokens/s"))).to_be_visible()
    expect(titles(page)).to_have_text(["Hello! My name is Nora."])
    say(page, "What is my name?")
    expect(texts(page)).to_have_count(2)


def test_a_judgement_lands_in_the_feedback_file(chat_server, visit):
    page = visit(chat_server.url)
    page.get_by_label("Persona").fill("i like tea.")
    say(page, "What do you like?")
    for name, label in (("Good reply", 1), ("Poor reply", 0)):
        with page.expect_response("**/feedback") as response:
            press(page, name)
        assert response.value.status == 204
        expect(page.get_by_role("button", name=name)).to_have_attribute("aria-pressed", "true")
        record = json.loads(chat_server.feedback.read_text(encoding="utf-8").splitlines()[-1])
        assert record["label"] == label
        assert contents(record) == ["i like tea.", "What do you like?", texts(page).inner_text()]
    expect(page.get_by_role("button", name="Good reply")).to_have_attribute("aria-pressed", "false")


def test_an_export_is_what_prepare_reads(chat_server, visit, tmp_path):
    page = visit(chat_server.url)
    page.get_by_label("Persona").fill("i am a zookeeper.\ni like tea.")
    say(page, 'Hello "you" \\ ü 😀')
    press(page, "New chat Alt N")
    say(page, "How are you?")
    second, first = saved(page, "Export all", tmp_path)
    assert [m["role"] for m in first] == ["system", "user", "assistant"]
    assert [m["content"] for m in first[:2]] == [
        "i am a zookeeper.\ni like tea.",
        'Hello "you" \\ ü 😀',
    ]
    assert [m["role"] for m in second] == ["user", "assistant"]
    assert saved(page, "Export this conversation", tmp_path) == [second]


def test_the_sampling_that_is_set_is_what_the_server_takes(chat_server, visit):
    page = visit(chat_server.url)
    press(page, "Sampling")
    for name, value in {
        "Temperature": "0.9",
        "Top k": "0",
        "Repetition penalty": "1.1",
        "Max tokens": "5",
    }.items():
        page.get_by_role("spinbutton", name=name).fill(value)
    page.keyboard.press("Escape")
    say(page, "Tell me about yourself.")
    expect(texts(page)).not_to_have_text("")
    expect(trouble(page)).to_have_count(0)


# ---- a reply, as it comes


def test_a_reply_is_shown_as_it_comes_and_read_out_once(stub, page):
    gate = threading.Event()
    stub.plan([" One", gate, " two."])
    say(page, "Count.", wait=False)
    expect(texts(page)).to_have_text("One")
    expect(page.locator("#status")).to_have_text("The bot is writing")
    gate.set()
    expect(texts(page)).to_have_text("One two.")
    expect(page.locator("#status")).to_have_text("Bot: One two.")
    body = stub.asked[0]
    assert body == {
        "model": "nano",
        "messages": [{"role": "user", "content": "Count."}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "truncation": "auto",
    }


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_what_came_before_a_stop_stays(stub, page, by):
    stub.plan([" One two", threading.Event(), " three."])
    say(page, "Count.", wait=False)
    expect(texts(page)).to_have_text("One two")
    if by == "button":
        press(page, "Stop (Esc)")
    else:
        page.keyboard.press(by)
    expect(page.get_by_text("stopped", exact=True)).to_be_visible()
    say(page, "Go on.")
    assert contents(stub.asked[1]) == ["Count.", "One two", "Go on."]


def test_tries_are_kept_and_the_conversation_goes_on_from_the_one_that_is_shown(
    stub, page, tmp_path
):
    stub.plan(" first", " second", " third")
    say(page, "Say something.")
    for _ in range(2):
        press(page, "Another try")
        finished(page)
    assert [contents(body) for body in stub.asked] == [["Say something."]] * 3
    expect(texts(page)).to_have_text("third")
    press(page, "Earlier try")
    expect(texts(page)).to_have_text("second")
    expect(page.get_by_text("2/3")).to_be_visible()
    page.reload()
    expect(texts(page)).to_have_text("second")
    say(page, "Go on.")
    assert contents(stub.asked[-1]) == ["Say something.", "second", "Go on."]
    saved(page, "Export all", tmp_path)
    record = json.loads((tmp_path / "saved.jsonl").read_text())
    assert record["retried"] == [
        {"before": 1, "content": "first"},
        {"before": 1, "content": "third"},
    ]
    press(page, "Delete this conversation")
    import_file(page, tmp_path / "saved.jsonl")
    expect(texts(page)).to_have_text(["second", "I see."])
    saved(page, "Export all", tmp_path)
    assert json.loads((tmp_path / "saved.jsonl").read_text()) == record


def test_an_earlier_message_is_edited_and_the_conversation_goes_on_from_there(stub, page):
    stub.plan(" tea", " coffee", " water")
    say(page, "one")
    say(page, "two")
    page.get_by_role("article", name="You").first.hover()
    press(page, "Edit", nth=0)
    editor = page.get_by_label("Edit your message")
    expect(editor).to_be_focused()
    editor.fill("three")
    editor.press("Enter")
    finished(page)
    assert contents(stub.asked[-1]) == ["three"]
    expect(texts(page)).to_have_text(["water"])
    press(page, "Undo")
    expect(texts(page)).to_have_text(["tea", "coffee"])
    expect(texts(page, "You")).to_have_text(["one", "two"])


def test_the_view_follows_only_from_the_end(stub, page):
    gate = threading.Event()
    stub.plan(
        "\n".join(map(str, range(100))),
        ["\n".join(map(str, range(50))), gate, "\n".join(map(str, range(50)))],
    )
    from_end = "document.getElementById('scroll')"
    from_end = (
        f"Math.round({from_end}.scrollHeight - {from_end}.scrollTop - {from_end}.clientHeight)"
    )
    say(page, "Much, please.")
    expect(page.get_by_role("button", name="To the end")).to_be_hidden()
    assert page.evaluate(from_end) <= 1
    say(page, "More.", wait=False)
    expect(texts(page).last).to_contain_text("49")
    page.locator("#scroll").hover()
    page.mouse.wheel(0, -600)
    expect(page.get_by_role("button", name="To the end")).to_be_visible()
    gate.set()
    finished(page)
    assert page.evaluate(from_end) > 600
    press(page, "To the end")
    assert page.evaluate(from_end) <= 1


# ---- conversations


def test_a_reload_finds_everything_as_it_was(stub, page):
    page.get_by_label("Persona").fill("i am a zookeeper.")
    say(page, "Hello!\nHow are you?")
    page.reload()
    expect(page.get_by_label("Persona")).to_have_value("i am a zookeeper.")
    expect(texts(page, "You")).to_have_text("Hello!\nHow are you?", use_inner_text=True)
    expect(texts(page)).to_have_text("I see.")
    expect(titles(page)).to_have_text(["Hello! How are you?"])
    say(page, "And now?")
    assert contents(stub.asked[1]) == [
        "i am a zookeeper.",
        "Hello!\nHow are you?",
        "I see.",
        "And now?",
    ]


def test_a_reload_keeps_what_came_of_a_reply(stub, page):
    stub.plan([" One two", threading.Event()])
    say(page, "Count.", wait=False)
    expect(texts(page)).to_have_text("One two")
    page.reload()
    expect(texts(page)).to_have_text("One two")
    expect(page.get_by_text("cut off")).to_be_visible()


def test_conversations_are_switched_renamed_and_deleted(stub, page):
    stub.plan(" to the first", " to the second", " again")
    say(page, "first")
    press(page, "New chat Alt N")
    expect(texts(page)).to_have_count(0)
    say(page, "second")
    expect(titles(page)).to_have_text(["second", "first"])
    press(page, "first")
    expect(texts(page)).to_have_text("to the first")
    page.get_by_label("Title of this conversation").fill("The dog")
    composer(page).click()
    expect(titles(page)).to_have_text(["second", "The dog"])
    page.get_by_label("Title of this conversation").fill("My dog")
    page.keyboard.press("Alt+n")
    expect(page.get_by_label("Title of this conversation")).to_have_value("New chat")
    press(page, "My dog")
    say(page, "more")
    assert contents(stub.asked[2]) == ["first", "to the first", "more"]
    press(page, "Delete this conversation")
    expect(titles(page)).to_have_text(["second"])
    press(page, "Undo")
    expect(titles(page)).to_have_text(["My dog", "second"])
    page.reload()
    expect(titles(page)).to_have_text(["My dog", "second"])


def test_a_reply_goes_to_its_conversation_while_another_is_open(stub, page):
    gate = threading.Event()
    stub.plan([" One", gate, " two."], " Meanwhile.")
    say(page, "slow", wait=False)
    expect(texts(page)).to_have_text("One")
    press(page, "New chat Alt N")
    say(page, "quick")
    expect(texts(page)).to_have_text("Meanwhile.")
    gate.set()
    press(page, "slow")
    expect(texts(page)).to_have_text("One two.")


def test_two_tabs_keep_each_others_conversations(stub, page):
    gates = threading.Event(), threading.Event()
    say(page, "from the start")
    other = page.context.new_page()
    other.goto(stub.url)
    expect(texts(other)).to_have_text("I see.")
    other.get_by_role("button", name="New chat").click()
    say(other, "from the other tab")
    expect(titles(page)).to_have_text(["from the other tab", "from the start"])
    press(other, "from the start")
    stub.plan([" Here", gates[0], " I am."])
    say(page, "in this tab", wait=False)
    expect(texts(page).last).to_have_text("Here")
    expect(texts(other, "You")).to_have_count(2)  # both tabs have it open, and now both write to it
    stub.plan([" There", gates[1], " I am."])
    say(other, "in that tab", wait=False)
    expect(texts(other).last).to_have_text("There")
    for gate in gates:
        gate.set()
    finished(page)
    finished(other)
    page.reload()
    expect(titles(page)).to_have_count(3)
    kept = page.evaluate("Object.values(localStorage).join()")
    assert "Here I am." in kept and "There I am." in kept


def test_what_cannot_be_read_from_storage_does_no_harm(stub, page):
    say(page, "kept")
    page.evaluate(
        """() => {
            const empty = '{"title": "", "persona": "", "changed": 1, "messages": [{}]}';
            const bad = ["{", "null", "7", "[]", '{"messages": 1}', empty];
            bad.forEach((value, i) => localStorage.setItem(`nanochatgpt.chat.bad${i}`, value));
            const settings = '{"temperature": "<b>", "top_p": null, "unknown": 1}';
            localStorage.setItem("nanochatgpt.settings", settings);
            localStorage.setItem("nanochatgpt.theme", '"constructor"');
            localStorage.setItem("somebody.else", "}");
        }"""
    )
    page.reload()
    expect(titles(page)).to_have_text(["kept"])
    say(page, "and used")
    assert set(stub.asked[1]) == set(stub.asked[0])


def test_full_storage_is_said_and_the_conversation_goes_on(stub, page):
    page.evaluate(
        "for (let n = 2 ** 22; n; n >>= 1) try { localStorage[n] = 'a'.repeat(n) } catch {}"
    )
    say(page, "is there room?")
    expect(page.get_by_text("storage is full")).to_be_visible()
    say(page, "never mind")
    assert contents(stub.asked[1]) == ["is there room?", "I see.", "never mind"]


def test_a_file_is_imported_and_lines_that_are_no_conversation_are_named(stub, page, tmp_path):
    good = {
        "messages": [
            {"role": "system", "content": "i like tea."},
            {"role": "user", "content": "hi"},
        ]
    }
    good["messages"].append({"role": "assistant", "content": "hello"})
    lines = [
        json.dumps(good),
        "",
        "{",
        '{"messages": [{"role": "pirate", "content": "arr"}]}',
        '{"messages": []}',
    ]
    (tmp_path / "some.jsonl").write_text("\n".join(lines))
    import_file(page, tmp_path / "some.jsonl")
    expect(page.get_by_text("imported. Line 3 is not a conversation")).to_be_visible()
    expect(page.get_by_label("Persona")).to_have_value("i like tea.")
    expect(texts(page)).to_have_text("hello")
    assert saved(page, "Export all", tmp_path) == [good["messages"]]


def test_an_export_leaves_out_what_has_no_reply(stub, page, tmp_path):
    stub.plan(" hello", 500)
    say(page, "hi")
    say(page, "are you there?")
    expect(trouble(page)).to_contain_text("not now (500)")
    assert [len(messages) for messages in saved(page, "Export all", tmp_path)] == [2]


# ---- text stays text


def test_nothing_that_is_said_is_taken_as_html(stub, page, tmp_path):
    gate = threading.Event()
    stub.plan([ATTACK, gate], {"error": {"message": ATTACK}})
    page.get_by_label("Persona").fill(ATTACK)
    say(page, ATTACK, wait=False)
    expect(texts(page, "You")).to_have_text(ATTACK)
    expect(texts(page)).to_have_text(ATTACK)
    gate.set()
    finished(page)
    expect(texts(page)).to_have_text(ATTACK)
    expect(titles(page)).to_have_text([ATTACK[:80]])
    page.get_by_label("Title of this conversation").fill(ATTACK)
    say(page, "break off")
    expect(trouble(page)).to_have_text(f"The reply failed: {ATTACK}")
    saved(page, "Export all", tmp_path)
    press(page, "Delete this conversation")
    expect(page.get_by_text(f"Deleted: {ATTACK}")).to_be_visible()
    import_file(page, tmp_path / "saved.jsonl")
    expect(page.get_by_label("Persona")).to_have_value(ATTACK)
    expect(texts(page)).to_have_text(ATTACK)
    assert page.evaluate("typeof attacked") == "undefined"
    page.reload()
    expect(texts(page)).to_have_text(ATTACK)
    assert page.locator("img, b, main script").count() == 0


# ---- sampling


def test_only_settings_that_differ_from_the_servers_are_sent(stub, page):
    def sampling(body):
        return {
            name: value
            for name, value in body.items()
            if name in DEFAULTS or name in ("seed", "best_of")
        }

    press(page, "Sampling")
    expect(page.get_by_role("spinbutton", name="Temperature")).to_have_value("0.6")
    expect(page.get_by_role("spinbutton", name="Best of")).to_have_count(0)
    values = {
        "Temperature": "0.9",
        "Top p": "0.8",
        "Top k": "10",
        "Seed": "7",
        "Min p": "5",
    }  # 0.8 is the default
    for name, value in values.items():  # and 5 is out of range
        page.get_by_role("spinbutton", name=name).fill(value)
    page.keyboard.press("Escape")
    say(page, "one")
    assert sampling(stub.asked[0]) == {"temperature": 0.9, "top_k": 10, "seed": 7}
    page.reload()
    say(page, "two")
    assert sampling(stub.asked[1]) == {"temperature": 0.9, "top_k": 10, "seed": 7}
    press(page, "Sampling, 3 changed")
    page.get_by_role("button", name="Reset to defaults").click()
    expect(page.get_by_role("spinbutton", name="Temperature")).to_have_value("0.6")
    page.keyboard.press("Escape")
    say(page, "three")
    assert sampling(stub.asked[2]) == {}


def test_the_best_of_several_is_offered_where_there_is_a_reward_model(stub, visit):
    stub.has_reward_model = True
    page = visit(stub.url)
    press(page, "Sampling")
    page.get_by_role("spinbutton", name="Best of").fill("4")
    page.keyboard.press("Escape")
    say(page, "hi")
    assert stub.asked[0]["best_of"] == 4


# ---- what can go wrong


def test_a_key_is_asked_for_kept_and_sent(stub, visit):
    stub.key = "sesame"
    page = visit(stub.url)
    expect(trouble(page)).to_contain_text("This server asks for an API key.")
    for key in ("wrong", "sesame"):
        page.get_by_label("API key").fill(key)
        page.get_by_label("API key").press("Enter")
        if key == "wrong":
            expect(trouble(page)).to_contain_text("does not accept this API key")
    expect(page.get_by_text("Talk to nano")).to_be_visible()
    page.reload()
    say(page, "hi")
    expect(texts(page)).to_have_text("I see.")


def test_a_busy_server_is_asked_again_when_it_said(stub, page):
    stub.plan(429, " now")
    say(page, "hi")
    expect(trouble(page)).to_contain_text("The server is busy: not now")
    again = page.get_by_role("button", name="Try again")
    expect(again).to_be_disabled()
    start = time.monotonic()
    again.click()  # waits until it can be pressed
    assert time.monotonic() - start > 1
    expect(texts(page)).to_have_text("now")


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ({"error": {"message": "out of memory"}}, "The reply failed: out of memory"),
        (None, "The connection ended before the reply did."),
    ],
)
def test_a_reply_that_breaks_off_stays_and_can_be_asked_for_again(stub, page, ends, words):
    stub.plan([" One two", ends, None], " One two three.")
    say(page, "Count.")
    expect(texts(page)).to_have_text("One two")
    expect(page.get_by_text("cut off")).to_be_visible()
    expect(trouble(page)).to_contain_text(words)
    page.get_by_role("button", name="Try again").click()
    finished(page)
    expect(texts(page)).to_have_text("One two three.")
    expect(page.get_by_text("2/2")).to_be_visible()


def test_a_server_that_is_away_is_said_and_tried_again(stub, page):
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "hi")
    expect(trouble(page)).to_contain_text("The server cannot be reached. Is it running?")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    expect(texts(page)).to_have_text("I see.")


def test_a_reply_without_a_word_is_not_kept(stub, page):
    stub.plan(" \n", " better")
    say(page, "hi")
    expect(trouble(page)).to_contain_text("empty")
    expect(texts(page)).to_have_count(0)
    page.get_by_role("button", name="Try again").click()
    expect(texts(page)).to_have_text("better")


# ---- whoever reads it, on whatever


def test_the_enter_that_ends_a_composition_sends_nothing(stub, page):
    composer(page).fill("今日は")
    for sign in ({"isComposing": True}, {"keyCode": 229}):  # the second is Safari's
        composer(page).dispatch_event("keydown", {"key": "Enter", **sign})
    expect(composer(page)).to_have_value("今日は")
    composer(page).press("Enter")
    expect(texts(page)).to_have_text("I see.")
    assert [contents(body) for body in stub.asked] == [["今日は"]]


def test_a_keyboard_is_enough(stub, page):
    expect(composer(page)).to_be_focused()
    page.keyboard.type("first line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second line")
    page.keyboard.press("Enter")
    expect(texts(page)).to_have_text("I see.")
    assert contents(stub.asked[0]) == ["first line\nsecond line"]
    for _ in range(20):  # back from the composer to the tools of the reply
        page.keyboard.press("Shift+Tab")
        if page.evaluate("document.activeElement.ariaLabel") == "Another try":
            break
    page.keyboard.press("Enter")
    expect(page.get_by_text("2/2")).to_be_visible()
    expect(composer(page)).to_be_focused()
    page.get_by_role("button", name="Poor reply").focus()
    page.keyboard.press("Space")
    expect(page.get_by_role("button", name="Poor reply")).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_role("button", name="Poor reply")).to_be_focused()
    page.keyboard.press("Alt+n")
    expect(texts(page)).to_have_count(0)
    expect(composer(page)).to_be_focused()


def test_nothing_is_wider_than_a_phone(stub, visit):
    page = visit(stub.url, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    stub.plan("a" * 500)
    page.get_by_label("Persona").fill("b" * 200)
    say(page, "c" * 200)
    press(page, "Another try")
    finished(page)
    overflow = (
        "['html', '#scroll'].some((name) => document.querySelector(name).scrollWidth > innerWidth)"
    )
    assert not page.evaluate(overflow)
    box = page.get_by_role("button", name="Send (Enter)").bounding_box()
    assert box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640
    expect(page.get_by_role("button", name="New chat")).to_be_hidden()
    press(page, "Conversations")
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("button", name="New chat")).to_be_hidden()
    expect(texts(page)).to_have_count(0)
    press(page, "Sampling")
    expect(page.get_by_role("spinbutton", name="Temperature")).to_be_in_viewport()
    assert not page.evaluate(overflow)


def test_every_control_has_a_name(stub, page):
    say(page, "hi")
    press(page, "Sampling")
    unnamed = """() => {
        const name = (node) => node.ariaLabel || node.labels?.[0]?.textContent || node.textContent;
        const nodes = [...document.querySelectorAll("button, input, textarea")];
        return nodes.filter((node) => !name(node).trim()).map((node) => node.outerHTML);
    }"""
    assert page.evaluate(unnamed) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(stub, visit, scheme):
    """WCAG 2.2, 1.4.3 (AA): 4.5:1 for text; 1.4.11: 3:1 for the edges of fields and the focus."""
    page = visit(stub.url, color_scheme=scheme)

    def luminance(name):
        color = page.evaluate(
            """(name) => {
                document.body.style.color = `var(--${name})`;
                return getComputedStyle(document.body).color;
            }""",
            name,
        )
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
        ]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    grounds = ("paper", "margin", "raised", "wash")
    pairs = {(ink, ground): 4.5 for ink in ("ink", "soft", "accent") for ground in grounds}
    pairs |= {
        ("on-accent", "accent"): 4.5,
        ("edge", "paper"): 3,
        ("edge", "raised"): 3,
        ("wrong", "raised"): 3,
    }
    for (ink, ground), least in pairs.items():
        dark, bright = sorted([luminance(ink), luminance(ground)])
        assert (bright + 0.05) / (dark + 0.05) >= least, (scheme, ink, ground)


def test_the_theme_can_be_switched_and_is_kept(stub, visit):
    page = visit(stub.url, color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    day = page.evaluate(ground)
    press(page, "Theme: auto")
    assert page.evaluate(ground) == day
    press(page, "Theme: light")
    night = page.evaluate(ground)
    assert night != day
    page.reload()
    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    assert page.evaluate(ground) == night
