# Copyright 2026 The transformers-aurea authors. Licensed under the Apache License, Version 2.0.
"""`aurea serve` and `transformers serve`, asked over HTTP by OpenAI's own client: each answer is the model's own."""

import base64
import io
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, islice, product
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import WITHOUT_PACKAGE
from PIL import Image

from transformers_aurea import AureaForConditionalGeneration, AureaProcessor, embedded_model_path
from transformers_aurea.cli.answering import user_message
from transformers_aurea.cli.serve import REQUIRED
from transformers_aurea.scenes import make_scene, test_seeds


openai = pytest.importorskip("openai", reason="the extra `serve` has it")
for name in REQUIRED:
    pytest.importorskip(name, reason="the extra `serve` has it")
pytest.importorskip("transformers.cli.transformers", exc_type=ImportError)  # some releases want `requests` there

pytestmark = [pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ("Describe the image.", "How many objects are there?", "Do you see a cross?", "What is in the image?")
NUM_SCENES = 3
# The pixels of a request alone are 0.3 MiB: 160 that left them behind would be 48 MiB.
MAX_GROWTH = 24 * 2**20


class Question(NamedTuple):
    """Words, numbers of scenes that are shown with them, and how they are sent."""

    words: str
    scenes: tuple[int, ...] = (0,)
    by_url: bool = False
    is_streamed: bool = False
    stop: str | None = None


class Server(NamedTuple):
    process: subprocess.Popen
    address: str
    model: str

    def client(self) -> "openai.OpenAI":
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=300)

    def memory(self) -> int:
        """Bytes that its process holds in memory."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    return [make_scene(seed)[0] for seed in test_seeds(NUM_SCENES)]


@pytest.fixture(scope="module")
def address_of_pictures(scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, scene in enumerate(scenes):
        scene.save(folder / f"{number}.png")
    handler = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def ask_itself(scenes):
    """Answer of the model's own `generate`, and how many tokens were read and made."""
    model = AureaForConditionalGeneration.from_pretrained(embedded_model_path())
    processor = AureaProcessor.from_pretrained(embedded_model_path())
    known = {}

    def ask(question: Question) -> tuple[str, int, int]:
        key = question._replace(by_url=False, is_streamed=False)
        if key not in known:
            inputs = processor.apply_chat_template(
                [user_message([scenes[number] for number in question.scenes], question.words)],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            length = inputs["input_ids"].shape[1]
            stop = {"stop_strings": [question.stop], "tokenizer": processor} if question.stop else {}
            generated = model.generate(**inputs, do_sample=False, max_new_tokens=1024, **stop)[0, length:]
            known[key] = processor.decode(generated, skip_special_tokens=True), length, len(generated)
        return known[key]

    return ask


def start(command: list[str], model: str, folder: Path, environment: dict[str, str], *options: str) -> Server:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["serve", model, "--port", str(port), "--host", "127.0.0.1", "--device", "cpu", *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, *options], stdout=log, stderr=log, cwd=folder, env=environment)
    server = Server(process, f"http://127.0.0.1:{port}", model)
    while process.poll() is None:
        try:
            urllib.request.urlopen(f"{server.address}/health", timeout=5).close()
            return server
        except OSError:
            time.sleep(0.5)
    raise AssertionError((folder / "log").read_text()[-4000:])


def stop(server: Server):
    server.process.terminate()
    assert server.process.wait(60) is not None


@pytest.fixture(scope="module")
def aurea(tmp_path_factory):
    folder = tmp_path_factory.mktemp("aurea")
    environment = os.environ | {"AUREA_PRIVATE_URLS": "1", "HF_HOME": str(folder / "home")}
    server = start([sys.executable, "-m", "transformers_aurea"], embedded_model_path(), folder, environment)
    yield server
    stop(server)


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """Of a saved folder, where the package cannot be imported."""
    folder = tmp_path_factory.mktemp("transformers")
    script = WITHOUT_PACKAGE + "from transformers.cli.transformers import app\napp(sys.argv[1:])"
    environment = os.environ | {
        "AUREA_PRIVATE_URLS": "1",
        "HF_HOME": str(folder / "home"),
        "HF_MODULES_CACHE": str(folder / "modules"),
    }
    model = embedded_model_path(folder / "saved")
    server = start([sys.executable, "-c", script], model, folder, environment, "--trust-remote-code")
    yield server
    stop(server)


def arguments_for(server: Server, question: Question, scenes: list[Image.Image], address: str, **settings) -> dict:
    content = []
    for number in question.scenes:
        url = f"{address}/{number}.png" if question.by_url else data_url(scenes[number])
        content.append({"type": "image_url", "image_url": {"url": url}})
    content.append({"type": "text", "text": question.words})
    stop = {"stop": [question.stop]} if question.stop else {}
    messages = [{"role": "user", "content": content}]
    return {"model": server.model, "messages": messages, "temperature": 0, **stop, **settings}


def data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(server: Server, question: Question, scenes, address: str, **settings) -> tuple[str, int, int]:
    """The answer, and how many tokens were read and made, as the server has them."""
    arguments = arguments_for(server, question, scenes, address, **settings)
    with server.client() as client:
        if not question.is_streamed:
            answer = client.chat.completions.create(**arguments)
            assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
            return answer.choices[0].message.content, answer.usage.prompt_tokens, answer.usage.completion_tokens
        with client.chat.completions.create(**arguments, stream=True) as chunks:
            chunks = [chunk for chunk in chunks if chunk.choices or chunk.usage]
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert sum(bool(delta) for delta in deltas) > 1 or question.stop or len("".join(deltas)) < 10
    usage = chunks[-1].usage
    return "".join(deltas), usage.prompt_tokens, usage.completion_tokens


def questions(count: int) -> list[Question]:
    """One and two pictures, whole and streamed, in the request and by URL."""
    shown = [*((number,) for number in range(NUM_SCENES)), (0, 1), (2, 0)]
    kinds = product(QUESTIONS, shown, (False, True), (False, True))
    return [*islice(cycle(Question(*kind) for kind in kinds), count)]


@pytest.mark.parametrize("name", ["aurea", "transformers"])
@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
class TestAnswers:
    @pytest.mark.parametrize("by_url", [False, True], ids=["in the request", "by URL"])
    @pytest.mark.parametrize("shown", [(0,), (1, 2), ()], ids=["one picture", "two pictures", "no picture"])
    def test_pictures(self, request, scenes, address_of_pictures, ask_itself, name, is_streamed, by_url, shown):
        server = request.getfixturevalue(name)
        for words in QUESTIONS[:2]:
            question = Question(words, shown, by_url, is_streamed)
            assert ask(server, question, scenes, address_of_pictures) == ask_itself(question)

    def test_stop(self, request, scenes, address_of_pictures, ask_itself, name, is_streamed):
        server = request.getfixturevalue(name)
        whole = ask_itself(Question(QUESTIONS[0]))[0]
        question = Question(QUESTIONS[0], is_streamed=is_streamed, stop=whole.split()[2])
        answer = ask(server, question, scenes, address_of_pictures)
        assert answer == ask_itself(question) and whole.startswith(answer[0]) and answer[0] != whole

    def test_length(self, request, scenes, address_of_pictures, ask_itself, name, is_streamed):
        server = request.getfixturevalue(name)
        question = Question(QUESTIONS[0], is_streamed=is_streamed)
        text, _, made = ask(server, question, scenes, address_of_pictures, max_tokens=3)
        assert made == 3 and ask_itself(question)[0].startswith(text)


def test_the_blocks_of_the_page_run_as_printed(tmp_path):
    page = (ROOT / "docs" / "serving.md").read_text()
    [first] = re.findall(r"```bash\n(python -c .*)\naurea serve scenes\n```", page)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(first, shell=True, check=True, cwd=tmp_path, env=environment)
    server = start([sys.executable, "-m", "transformers_aurea"], "scenes", tmp_path, environment)
    try:
        printed = []
        for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            script = block.replace("http://localhost:8000", server.address)
            done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout.splitlines())
    finally:
        stop(server)
    answers = [answer for seed in range(1, 17, 2) for kind, _, answer in make_scene(seed)[1] if kind == "describe"]
    (whole, streamed), batch = printed
    assert whole.split()[:-1] == streamed.split() == answers[0].split()
    assert sum(said == answer for said, answer in zip(batch, answers, strict=True)) >= 7  # of 8; it is 98.6 % right


class TestManyRequests:
    def test_a_client_that_hangs_up_keeps_no_other_waiting(self, aurea, scenes, address_of_pictures, ask_itself):
        end = AureaForConditionalGeneration.config_class.from_pretrained(
            embedded_model_path()
        ).text_config.eos_token_id
        # without an end the answer is as long as it may be
        endless = {"max_tokens": 500, "logit_bias": {str(end): -100.0}}
        question = Question(QUESTIONS[0], is_streamed=True)
        begin = time.monotonic()
        assert ask(aurea, question, scenes, address_of_pictures, **endless)[2] == 500
        whole = time.monotonic() - begin
        arguments = arguments_for(aurea, question, scenes, address_of_pictures, **endless)
        with aurea.client() as client, client.chat.completions.create(**arguments, stream=True) as chunks:
            next(chunk for chunk in chunks if chunk.choices[0].delta.content)
        begin = time.monotonic()
        assert ask(aurea, question, scenes, address_of_pictures) == ask_itself(question)
        assert time.monotonic() - begin < whole / 2

    def test_two_hundred_eight_at_once_are_answered_and_leave_nothing(
        self, aurea, scenes, address_of_pictures, ask_itself, record_property
    ):
        many = questions(200)
        expected = [ask_itself(question) for question in many]
        with ThreadPoolExecutor(8) as pool:
            one = partial(ask, aurea, scenes=scenes, address=address_of_pictures)
            answers, begin = [*pool.map(one, many[:40])], time.monotonic()
            before = aurea.memory()
            answers += pool.map(one, many[40:])
        assert answers == expected
        seconds, growth = time.monotonic() - begin, aurea.memory() - before
        record_property("requests_per_second", 160 / seconds)
        record_property("growth_in_bytes", growth)
        print(f"160 requests in {seconds:.1f} s; memory {before / 2**20:.0f} MiB, {growth / 2**20:+.1f} MiB")
        assert growth < MAX_GROWTH

    def test_what_cannot_be_answered_is_told_and_the_server_goes_on(
        self, aurea, scenes, address_of_pictures, ask_itself
    ):
        question = Question(QUESTIONS[1])
        arguments = arguments_for(aurea, question, scenes, address_of_pictures)
        arguments["messages"][0]["content"][0]["image_url"]["url"] = f"{address_of_pictures}/none.png"
        with aurea.client() as client, pytest.raises(openai.APIStatusError):
            client.chat.completions.create(**arguments)
        assert ask(aurea, question, scenes, address_of_pictures) == ask_itself(question)
