"""A judge of claims whose error rates are known, as a chat endpoint: it reads the prompt, and a truth it was given.

`miss`: how often a fault is called supported. `alarm`: how often what is supported is called a fault, with a span that
exists. Errors are drawn anew for each claim and each time it is asked, from one seed. `fixes`: how often a sentence
that is asked for again comes back right.
"""

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from rorqual.referee.answer import Answer, read_answer

CLAIM = re.compile(r"(?m)^(\d+)\. (.+)$")


@dataclass
class ClaimJudge:
    """truth: `supported`, `contradicted` or `not found` of a claim's text. right: what a wrong sentence should be."""

    truth: Callable[[str], str]
    miss: float = 0.0
    alarm: float = 0.0
    fixes: float = 1.0
    right: Callable[[str], str] = lambda sentence: "-"
    seed: int = 0
    bodies: list[Mapping[str, Any]] = field(default_factory=list)
    asked: dict[str, int] = field(default_factory=dict)

    async def __call__(self, body: Mapping[str, Any]) -> Answer:
        """As a referee asks in the same process."""
        return read_answer(self.reply(body))

    def reply(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """A chat completion."""
        self.bodies.append(body)
        prompt = str(body["messages"][-1]["content"])
        is_judging = "\n\nClaims:\n" in prompt
        text = self._verdicts(prompt) if is_judging else self._sentences(prompt)
        count = {"prompt_tokens": sum(len(str(m["content"])) for m in body["messages"]) // 4,
                 "completion_tokens": max(1, len(text) // 4)}  # fmt: skip
        message = {"role": "assistant", "content": text}
        return {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": count}

    def _draw(self, what: str) -> float:
        self.asked[what] = self.asked.get(what, 0) + 1
        return random.Random(f"{self.seed} {what} {self.asked[what]}").random()

    def _verdicts(self, prompt: str) -> str:
        sources, _, claims = prompt.partition("\n\nClaims:\n")
        lines = []
        for number, said in CLAIM.findall(claims):
            verdict, draw = self.truth(said), self._draw(said)
            if verdict != "supported" and draw < self.miss:
                verdict = "supported"
            elif verdict == "supported" and draw < self.alarm:
                verdict = "not found"
            if verdict == "contradicted":
                words = set(said.casefold().split())
                near = (one for one in sources.split("\n")[1:] if len(words & set(one.casefold().split())) > 1)
                span = next(near, "")
                lines.append(f'{number} contradicted "{span}"')
            elif verdict == "not found":
                lines.append(f'{number} not found "{" ".join(said.split()[-2:])}"')
            else:
                lines.append(f"{number} supported")
        return "\n".join(lines)

    def _sentences(self, prompt: str) -> str:
        wrong = CLAIM.findall(prompt.rpartition("are not what the sources say:\n")[2])
        return "\n".join(
            f"{number}. {self.right(said) if self._draw(said) < self.fixes else said}" for number, said in wrong
        )

    def serve(self) -> ThreadingHTTPServer:
        """The same over HTTP on a free port of this machine, until `shutdown`."""
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                data = json.dumps(judge.reply(body)).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=server.serve_forever, daemon=True).start()
        return server
