"""Rewriting one fact in a trained model through a few rows of a table, and seeing what else moves.

An edit changes only the rows that stand for a person: either Engram's rows of the token runs that contain the last two
tokens of the name (`memory`), or the rows of these two tokens in the input embedding (`embedding`).
They are moved by Adam until the model gives the new value in the wordings it was trained on; then the same questions as
before are put again, and everything is put back. What a model says is read by teacher forcing: a value counts as said
when each of its tokens is the most likely one.
"""

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.chat import encode_messages
from rorqual.data.tasks import World
from rorqual.data.tasks.answers import IDK
from rorqual.data.tasks.world import ATTRIBUTES, Attribute, Person
from rorqual.model import Transformer
from rorqual.model.engram import memories
from rorqual.tokenizer import Tokenizer

STEPS = 80
SURE = 0.05
"""Nats per text below which an edit is finished."""
RATE = 0.3
"""Adam's step as a share of the table's root mean square."""
_BY_NAME = {attribute.name: attribute for attribute in ATTRIBUTES}


@dataclass(frozen=True)
class Fact:
    """Something a person has."""

    person: Person
    attribute: Attribute

    @property
    def value(self) -> str:
        return self.person.facts[self.attribute.name]


@dataclass(frozen=True)
class Text:
    """A beginning and the tokens that should follow it."""

    ids: tuple[int, ...]
    wanted: tuple[int, ...]


class Asker:
    """Puts questions to one model without generating."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def answer(self, fact: Fact, wording: int, value: str) -> Text:
        """The question in one of the attribute's wordings, answered without thinking up to the value."""
        name, attribute = fact.person.name, fact.attribute
        before = attribute.answer.format(name=name, value="\0").split("\0")[0].rstrip()
        question = attribute.questions[wording].format(name=name)
        return self._text(_prompt(question) + before, " " + value)

    def statement(self, fact: Fact, wording: int, value: str) -> Text | None:
        """A biography's sentence up to the value; None for a sentence that does not end in it."""
        template = fact.attribute.statements[wording]
        before, _, after = template.format(name=fact.person.name, value="\0").partition(" \0")
        return self._text(before, " " + value) if after == "." else None

    def refusal(self, name: str, attribute: Attribute) -> Text:
        """A question about a name, and the beginning of the admission that it is not known."""
        ids = self.tokenizer.encode(_prompt(attribute.questions[0].format(name=name)))
        return Text((self.tokenizer.bos_token_id, *ids), (self.tokenizer.encode(IDK)[0],))

    def _text(self, before: str, value: str) -> Text:
        tok = self.tokenizer
        return Text((tok.bos_token_id, *tok.encode(before)), tuple(tok.encode(value)))

    def scores(self, texts: Sequence[Text]) -> list[Tensor]:
        """Log-probabilities [len(wanted), V] where each wanted token is due."""
        rows = [text.ids + text.wanted[:-1] for text in texts]
        width = max(map(len, rows))
        tokens = torch.tensor([row + (0,) * (width - len(row)) for row in rows])
        logits = self.model(tokens, lengths=torch.tensor([len(row) for row in rows])).log_softmax(-1)
        return [logits[i, len(t.ids) - 1 : len(t.ids) - 1 + len(t.wanted)] for i, t in enumerate(texts)]

    @torch.no_grad()
    def says(self, texts: Sequence[Text], at_once: int = 64) -> list[bool]:
        """Whether each text goes on as wanted."""
        found: list[bool] = []
        for start in range(0, len(texts), at_once):
            part = texts[start : start + at_once]
            pairs = zip(self.scores(part), part, strict=True)
            found += [scores.argmax(-1).tolist() == list(text.wanted) for scores, text in pairs]
        return found

    def loss(self, texts: Sequence[Text]) -> Tensor:
        """Mean cross-entropy of a text's wanted tokens, in nats per text."""
        pairs = zip(self.scores(texts), texts, strict=True)
        return torch.stack([F.nll_loss(scores, torch.tensor(t.wanted), reduction="sum") for scores, t in pairs]).mean()


def _prompt(question: str) -> str:
    return encode_messages([{"role": "user", "content": question}], thinking_mode="chat", add_default_bos_token=False)


def name_ends(ids: Sequence[int], name: Sequence[int]) -> Iterator[int]:
    """Places of the last token of `name` in `ids`, found by its last two tokens."""
    for place in range(1, len(ids)):
        if tuple(ids[place - 1 : place + 1]) == tuple(name[-2:]):
            yield place


@torch.no_grad()
def memory_rows(model: Transformer, texts: Iterable[Text], name: Sequence[int]) -> list[Tensor]:
    """Rows of every memory that runs of tokens with the name's last two tokens hash to, in any of the texts."""
    found: list[set[int]] = [set() for _ in memories(model)]
    for text in texts:
        tokens = torch.tensor([text.ids])
        layout = model._layout(tokens, None, None, None)
        for number, memory in enumerate(memories(model)):
            rows = memory._addresses(tokens, layout, None)[0]
            per_order = memory.settings.heads
            for end in name_ends(text.ids, name):
                for at, order in enumerate(memory.settings.orders):
                    last = min(end + order - 2, len(text.ids) - 1)  # the run still reaches back to both tokens
                    found[number] |= set(rows[end : last + 1, at * per_order : (at + 1) * per_order].flatten().tolist())
    return [torch.tensor(sorted(rows), dtype=torch.int64) for rows in found]


@dataclass
class Edit:
    """What an edit took."""

    steps: int
    rows: int
    loss: float


def rewrite(asker: Asker, tables: Sequence[tuple[torch.nn.Parameter, Tensor]], texts: Sequence[Text]) -> Edit:
    """Move only the given rows of the given tables until the texts go on as wanted, at most `STEPS` times."""
    for parameter in asker.model.parameters():
        parameter.requires_grad_(False)
    masks = []
    for table, rows in tables:
        table.requires_grad_(True)
        masks.append(torch.zeros(len(table), 1).index_fill_(0, rows, 1.0))
    groups = [{"params": [table], "lr": RATE * table.detach().square().mean().sqrt().item()} for table, _ in tables]
    optimizer = torch.optim.Adam(groups)
    step, loss = 0, asker.loss(texts)
    while loss.item() > SURE and step < STEPS:
        optimizer.zero_grad()
        loss.backward()
        for (table, _), mask in zip(tables, masks, strict=True):
            assert table.grad is not None
            table.grad *= mask
        optimizer.step()
        step, loss = step + 1, asker.loss(texts)
    for table, _ in tables:
        table.requires_grad_(False)
    return Edit(step, sum(len(rows) for _, rows in tables), loss.item())


def _tables(
    asker: Asker, kind: str, texts: Sequence[Text], name: Sequence[int]
) -> list[tuple[torch.nn.Parameter, Tensor]]:
    if kind == "memory":
        rows = memory_rows(asker.model, texts, name)
        return [(memory.table, own) for memory, own in zip(memories(asker.model), rows, strict=True)]
    spelled = {i for text in texts for end in name_ends(text.ids, name) for i in text.ids[end - 1 : end + 1]}
    return [(asker.model.get_parameter("embed.weight"), torch.tensor(sorted(spelled)))]


def neighbours(world: World, fact: Fact, rng: random.Random, count: int) -> dict[str, list[Fact]]:
    """Facts that an edit should leave alone, by how near they are."""
    people = [p for p in world.people if not p.is_graded and p is not fact.person]
    first, family = fact.person.name.split(" ")
    name, value = fact.attribute.name, fact.value
    near = {
        "same person": [Fact(fact.person, _BY_NAME[other]) for other in fact.person.facts if other != name],
        "same first name": _facts_of([p for p in people if p.name.split(" ")[0] == first], name),
        "same family name": _facts_of([p for p in people if p.name.split(" ")[1] == family], name),
        "same value": _facts_of([p for p in people if p.facts.get(name) == value], name),
        "anybody": _facts_of(people, name),
    }
    return {kind: rng.sample(facts, min(count, len(facts))) for kind, facts in near.items()}


def _facts_of(people: Iterable[Person], attribute: str) -> list[Fact]:
    return [Fact(person, _BY_NAME[attribute]) for person in people if attribute in person.facts]


def known_facts(asker: Asker, world: World, rng: random.Random, count: int) -> list[Fact]:
    """Facts that the model says in a trained wording and in a new one, of different people."""
    people = [p for p in world.people if not p.is_graded and p.facts]
    rng.shuffle(people)
    found: list[Fact] = []
    for person in people:
        fact = Fact(person, _BY_NAME[rng.choice(list(person.facts))])
        texts = [asker.answer(fact, wording, fact.value) for wording in (0, len(fact.attribute.questions) - 1)]
        if all(asker.says(texts)):
            found.append(fact)
        if len(found) == count:
            break
    return found


def study(
    asker: Asker, world: World, kind: str, *, count: int, seed: int, near: int = 12
) -> tuple[dict[str, list[bool]], list[Edit]]:
    """Edit `count` known facts one after the other; which checks held by name, and what each edit took.

    Kept means: of what the model said before the edit, whether it still does.
    """
    rng = random.Random(seed)
    held: dict[str, list[bool]] = defaultdict(list)
    edits = []
    for fact in known_facts(asker, world, rng, count):
        attribute = fact.attribute
        new = rng.choice([v for v in world.values[attribute.name] if v != fact.value])
        wordings = len(attribute.questions)
        learned = [asker.answer(fact, wording, new) for wording in range(wordings - 2)]
        told = [text for i in range(4) if (text := asker.statement(fact, i, new)) is not None]
        checks = {
            "new value, new wording": [asker.answer(fact, wording, new) for wording in range(wordings - 2, wordings)],
            "new value, other sentences": [
                text for i in range(4, len(attribute.statements)) if (text := asker.statement(fact, i, new)) is not None
            ],
        }
        before = {
            f"kept: {name}": [asker.answer(other, 0, other.value) for other in facts]
            for name, facts in neighbours(world, fact, rng, near).items()
        }
        strangers = [world.fresh_name(rng, "test") for _ in range(near)]
        before["kept: refusals"] = [asker.refusal(name, attribute) for name in strangers]
        before = {name: _said(asker, texts) for name, texts in before.items()}
        name_ids = asker.tokenizer.encode(" " + fact.person.name)
        tables = _tables(asker, kind, [*learned, *told], name_ids)
        saved = [table.detach().clone() for table, _ in tables]
        edits.append(rewrite(asker, tables, learned + told))
        held["new value"] += asker.says(learned)
        for name, texts in (checks | before).items():
            held[name] += asker.says(texts) if texts else []
        with torch.no_grad():
            for (table, _), old in zip(tables, saved, strict=True):
                table.copy_(old)
    return dict(held), edits


def _said(asker: Asker, texts: list[Text]) -> list[Text]:
    said = asker.says(texts) if texts else []
    return [text for text, flag in zip(texts, said, strict=True) if flag]
