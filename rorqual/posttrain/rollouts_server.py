"""Any OpenAI-compatible server as rollout engine: `/v1/completions` with token ids, streamed, with log probabilities.

Such a server computes with other kernels, perhaps other precision, so its probabilities are not the trainer's. Hence
`correct`: the trainer's own log probabilities become pi_old, and each token weighs min(pi_train / pi_server, cap),
truncated importance sampling, which bounds the variance at the price of a small bias. A server that tells no log
probabilities leaves weights of 1: its mismatch is then in the gradient, and nobody can see how large it is.

What is drawn is logged as it comes, and a reply that breaks off goes on behind its last token, with another seed: it
samples the same distribution, though not the same tokens, since a server's draws are its own.
Source: training specification, section 13.4; truncated importance sampling: Ionides 2008, for this mismatch Yao 2025.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rorqual.engine import SamplingParams
from rorqual.errors import ConfigError, MissingExtraError, RequestError
from rorqual.posttrain.rollout_log import Drawn, RolloutLog
from rorqual.posttrain.rollouts import (
    Prompt,
    Reward,
    Rollout,
    check_prompts,
    rollout_id,
    rollout_of,
    settings_of,
    settle,
)
from rorqual.posttrain.rollouts_batch import RolloutBatch, stack
from rorqual.seeds import derive
from rorqual.tokenizer import Tokenizer

CONNECT_S = 10.0
TRIES = 5
"""Times in a row that a reply may break off without a token."""
UNKNOWN = math.nan
"""The log probability of a token that the server did not tell."""


@dataclass
class ServerRollout(Rollout):
    """A rollout of a server. `trajectory.logprobs` are the server's (UNKNOWN where it told none) until `correct` puts
    the trainer's in their place.

    importance: one weight an id for the loss, 1.0 where the token was given or the server told nothing.
    """

    server_logprobs: list[float] = field(default_factory=list)
    importance: list[float] = field(default_factory=list)


class ServerRollouts:
    """Makes rollouts with the model `model` (the first one otherwise) behind a URL, with or without `/v1`.

    version: says which version of the weights the server has now. key: sent as bearer token. parallel: requests at a
    time. Other arguments as for `RolloutWorker`.
    Raises: ConfigError for an address that is none; MissingExtraError without the extra `serve`.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Tokenizer,
        *,
        model: str | None = None,
        key: str | None = None,
        parallel: int = 8,
        patience_s: float = 300.0,
        seed: int = 0,
        log: RolloutLog | None = None,
        reward: Reward | None = None,
        version: Callable[[], int] = lambda: 0,
    ) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise MissingExtraError(
                'talking to a model server needs httpx2. Install it with: pip install "rorqual[serve]"'
            ) from error
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"{url!r} is no address of a model server. Give one such as http://127.0.0.1:8000.")
        self._url = url.rstrip("/").removesuffix("/v1")
        self._errors: type[Exception] = httpx2.HTTPError
        self._client = httpx2.Client(
            headers={} if key is None else {"authorization": f"Bearer {key}"},
            timeout=httpx2.Timeout(patience_s, connect=CONNECT_S),
            limits=httpx2.Limits(max_connections=parallel, max_keepalive_connections=parallel),
            trust_env=False,
        )
        self.tokenizer, self.parallel, self.seed = tokenizer, parallel, seed
        self.log, self.reward, self._version = log, reward, version
        self._names = token_names(tokenizer)
        self.model = model or self._first_model()

    def generate(
        self, prompts: Sequence[Prompt], group_size: int, sampling: SamplingParams | None = None
    ) -> Iterator[list[ServerRollout]]:
        """Groups in the order of their prompts. Raises: RequestError for settings under which a server's log
        probabilities are not those of what it drew from, or when it fails.
        """
        params = checked(sampling or SamplingParams())
        check_prompts(prompts, group_size)
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="rorqual-server-rollouts") as threads:
            groups = [
                [threads.submit(self._rollout, prompt, group, index, params) for index in range(group_size)]
                for group, prompt in enumerate(prompts)
            ]
            try:
                for group in groups:
                    made = [future.result() for future in group]
                    if self.log is not None:
                        self.log.commit()
                    yield made
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _rollout(self, prompt: Prompt, group: int, index: int, params: SamplingParams) -> ServerRollout:
        id = rollout_id(prompt.id, index)
        seed = derive(self.seed, "rollout", id)
        number, drawn, ending = 0, Drawn(), None
        if self.log is not None:
            number, drawn = self.log.open(id, prompt.ids, seed, {**settings_of(params), "server": self.model})
            ending = self.log.ending(number)
        failures = 0
        while ending is None:
            before = len(drawn.ids)
            try:
                ending = self._draw(prompt, drawn, number, seed, params)
            except RequestError as error:
                failures = failures + 1 if len(drawn.ids) == before else 0
                if error.status not in (429, 502, 503, 504) or failures >= TRIES:
                    raise
                time.sleep(min(4.0, 0.1 * 2**failures))
        plain = rollout_of(prompt.ids, drawn, (), keep_masks=False)
        rollout = ServerRollout(
            plain.trajectory, prompt.id, group, versions=plain.versions, index=index,
            server_logprobs=list(plain.trajectory.logprobs), importance=[1.0] * len(plain.trajectory),
        )  # fmt: skip
        settle(rollout, prompt, ending, self.reward, self.log, number)
        return rollout

    def _draw(self, prompt: Prompt, drawn: Drawn, number: int, seed: int, params: SamplingParams) -> str | None:
        """Ask for the rest of a reply, up to its end or where it breaks off; how it ended, None if it did not."""
        left = None if params.max_tokens is None else params.max_tokens - len(drawn.ids)
        if drawn.ids and drawn.ids[-1] in (self.tokenizer.eos_token_id, *params.stop_token_ids):
            return "stop"
        if left is not None and left <= 0:
            return "length"
        body: dict[str, Any] = {
            "model": self.model, "prompt": [*prompt.ids, *drawn.ids], "stream": True, "logprobs": 1,
            "temperature": params.temperature, "seed": derive(seed, len(drawn.ids)) % (1 << 53),
            "return_token_ids": True,
        }  # fmt: skip
        if left is not None:
            body["max_tokens"] = left
        finish = None
        for choice in self._choices(body):
            for token, logprob in self._tokens(choice):
                self._keep(drawn, number, token, logprob)
            finish = choice.get("finish_reason") or finish
        if finish is None:
            raise RequestError(f"the reply of {self._url} broke off without a finish_reason.", status=502)
        eos = self.tokenizer.eos_token_id
        if finish == "stop" and (not drawn.ids or drawn.ids[-1] not in (eos, *params.stop_token_ids)):
            self._keep(drawn, number, eos, UNKNOWN)  # many servers do not show it
        return "length" if finish == "length" else "stop"

    def _keep(self, drawn: Drawn, number: int, token: int, logprob: float) -> None:
        if self.log is not None:
            self.log.token(number, drawn, token, logprob, self._version())
        drawn.add(token, logprob, self._version())

    def _choices(self, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The choices of a streamed reply. Raises: RequestError (502) when it breaks off, or as the server refuses."""
        for optional in ((), ("return_token_ids",)):  # a strict server refuses what it does not know
            sent = {name: value for name, value in body.items() if name not in optional}
            try:
                with self._client.stream("POST", f"{self._url}/v1/completions", json=sent) as answer:
                    if answer.status_code == 200:
                        yield from _streamed(answer.iter_lines())
                        return
                    answer.read()
                    status, text = answer.status_code, answer.text
            except self._errors as error:
                raise RequestError(
                    f"the model server {self._url} broke off ({type(error).__name__}: {error}).", status=502
                ) from None
            if status not in (400, 422) or "return_token_ids" not in text:
                break
        raise RequestError(
            f"the model server {self._url} refused the prompt ({status}): {text[:300]}. Check key and model, and that "
            "it takes token ids at /v1/completions.",
            status=status if status in (429, 503, 504) else 400,
        )

    def _tokens(self, choice: Mapping[str, Any]) -> list[tuple[int, float]]:
        """Ids and log probabilities of a piece. Raises: RequestError when it has text and does not say which tokens."""
        told = choice.get("logprobs") or {}
        names, scores = list(told.get("tokens") or ()), list(told.get("token_logprobs") or ())
        ids = choice.get("token_ids")
        if ids is None and names:
            ids = [self._id_of(name) for name in names]
        if ids is None:
            if choice.get("text"):
                raise RequestError(
                    f"the server {self._url} sent text without token_ids or logprobs, and text alone does not say "
                    "which tokens were drawn. Serve the model with a server that tells one of them.",
                    status=400,
                )
            return []
        known = [UNKNOWN if score is None else float(score) for score in scores]
        if len(known) != len(ids):
            known = [UNKNOWN] * len(ids)
        return list(zip([int(token) for token in ids], known, strict=True))

    def _id_of(self, name: str) -> int:
        if name.startswith("token_id:"):
            return int(name.removeprefix("token_id:"))
        found = self._names.get(name)
        if found is None:
            raise RequestError(
                f"the server {self._url} drew the token {name[:40]!r}, which this tokenizer has not. Use the tokenizer "
                "of the model that it serves.",
                status=400,
            )
        return found

    def _first_model(self) -> str:
        try:
            answer = self._client.get(f"{self._url}/v1/models")
            return str(answer.json()["data"][0]["id"])
        except (self._errors, ValueError, KeyError, IndexError, TypeError) as error:
            raise ConfigError(
                f"{self._url}/v1/models names no model ({type(error).__name__}: {error}). Check the address, or give "
                "the model's name."
            ) from None


Score = Callable[[RolloutBatch], Tensor]
"""Log probabilities fp32 [B, S - 1] by the trainer's present weights."""


def correct(rollouts: Sequence[ServerRollout], score: Score, cap: float = 2.0) -> None:
    """Put the trainer's log probabilities in place of the server's, and the weights of truncated importance sampling
    beside them: min(exp(trainer - server), cap), 1 where the server told nothing.

    score: usually `scoring.token_logprobs` of the trainer's model, without gradient. Raises: ConfigError for a cap
    below 1, which would scale down what is right.
    """
    if not cap >= 1:
        raise ConfigError(f"the cap of importance weights is {cap}, below 1. Use about 2.")
    batch = stack(rollouts)
    logprobs_BS = score(batch).detach().double().cpu().tolist()
    for rollout, scores in zip(rollouts, logprobs_BS, strict=True):
        for place, chosen in enumerate(rollout.trajectory.mask):
            if not chosen:
                continue
            ours, theirs = scores[place - 1], rollout.server_logprobs[place]
            rollout.trajectory.logprobs[place] = ours
            rollout.importance[place] = 1.0 if math.isnan(theirs) else math.exp(min(ours - theirs, math.log(cap)))


def checked(params: SamplingParams) -> SamplingParams:
    """Raises: RequestError for settings whose draws a server's log probabilities do not describe."""
    filters = (params.top_p != 1, params.top_k is not None, params.min_p != 0, params.suppress_token_ids, params.stop)
    if params.temperature != 1 or any(filters):
        raise RequestError(
            "rollouts of a server need temperature 1 and no filters, suppressed ids or stop strings: its log "
            "probabilities are those of the plain model, and would not be those of what was drawn.",
            param="temperature" if params.temperature != 1 else "top_p",
        )
    return params


def token_names(tokenizer: Tokenizer) -> dict[str, int]:
    """Ids by the names that servers give them in `logprobs.tokens`: text, `bytes:\\xf0\\x9f` for pieces of characters,
    markers as they are and with doubled bars.
    """
    names: dict[str, int] = {}
    for token in range(tokenizer.vocab_size):
        raw = tokenizer.token_bytes(token)
        text = raw.decode("utf-8", "replace")
        names.setdefault("bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), token)
        if text.encode() == raw and text:
            names.setdefault(text, token)
            if token in tokenizer.control_token_ids:
                names.setdefault(text.replace("｜", "｜｜"), token)
    return names


def _streamed(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        text = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if not text or text == "[DONE]":
            continue
        try:
            part = json.loads(text)
        except ValueError:
            raise RequestError(f"the model server sent {text[:80]!r}, which is no JSON.", status=502) from None
        if part.get("error"):
            raise RequestError(f"the model server failed: {json.dumps(part['error'])[:300]}", status=502)
        yield from part.get("choices") or ()
