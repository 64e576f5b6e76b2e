"""The demo's server process, and the questions put to it through the official openai client."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from openai import AsyncOpenAI
from tasks import Example

MAX_ANSWER_TOKENS = 64
START_TIMEOUT_S = 120


class Server:
    """`python -m deltazip.server` as a child process, for the length of a with block."""

    def __init__(self, base: Path, variants: dict[str, Path], port: int, log: Path) -> None:
        self.port = port if is_free(port) else free_port()
        self.log = log
        self.command = [sys.executable, "-m", "deltazip.server", "--port", str(self.port)]
        self.command += ["--base", str(base), "--base-name", "base"]
        for name, folder in variants.items():
            self.command += ["--variant", f"{name}={folder}"]

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # it may outlive this process and its terminal
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            if self.is_healthy():
                return self
            time.sleep(0.1)
        self.stop()
        raise SystemExit(f"the server did not start; from {self.log}:\n{self.log_tail()}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def is_healthy(self) -> bool:
        """Whether /health answers 200."""
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def log_tail(self) -> str:
        """The last lines the server wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])

    def stop(self) -> None:
        """SIGTERM, which lets running requests finish."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout=40)
            except subprocess.TimeoutExpired:
                self.process.kill()


def is_free(port: int) -> bool:
    """Whether nothing listens on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A port nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Answers:
    """What every model said to every question, and how fast."""

    texts: dict[str, list[str]]  # model -> an answer per question
    num_requests: int
    num_tokens: int
    seconds: float


def ask_everyone(url: str, models: list[str], questions: list[Example]) -> Answers:
    """Puts every question to every model, all at once."""
    return asyncio.run(_ask_everyone(url, models, questions))


async def _ask_everyone(url: str, models: list[str], questions: list[Example]) -> Answers:
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

        async def ask(model: str, example: Example) -> tuple[str, int]:
            completion = await client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": example.question}],
                max_tokens=MAX_ANSWER_TOKENS,
                temperature=0,
            )
            usage = completion.usage
            text = completion.choices[0].message.content or ""
            return text.strip(), usage.completion_tokens if usage else 0

        start = time.perf_counter()
        asked = [ask(model, example) for model in models for example in questions]
        answers = await asyncio.gather(*asked)
        seconds = time.perf_counter() - start
    texts = {
        model: [text for text, _ in answers[i * len(questions) : (i + 1) * len(questions)]]
        for i, model in enumerate(models)
    }
    return Answers(texts, len(answers), sum(tokens for _, tokens in answers), seconds)
