"""The desk's practice tasks: conversations read as a run's would, and the grader looks at what was sent."""

import io
import json
import random
from email.message import EmailMessage
from pathlib import Path

import pytest
from openpyxl import Workbook

from rorqual.agents.dialogue import Dialogue
from rorqual.agents.models.choose import BUNDLED
from rorqual.agents.practice import DeskTask, conversation, draw_task, grade, main, replies
from rorqual.chat import encode_messages
from rorqual.data.tasks import split_of
from rorqual.tokenizer import Tokenizer

ADA = "ada@example.org"


def mail(rows: list[list[object]], to: str = ADA, name: str = "found.xlsx") -> EmailMessage:
    book = Workbook()
    for row in [["Document", "Paragraph", "Text"], *rows]:
        book.active.append(row)
    data = io.BytesIO()
    book.save(data)
    message = EmailMessage()
    message["To"] = to
    message.add_attachment(data.getvalue(), maintype="application", subtype="octet-stream", filename=name)
    return message


def test_a_conversation_is_made_of_the_ids_a_run_would_have(tmp_path: Path) -> None:
    task = draw_task("train", 3, 0)
    made = conversation(task, tmp_path)
    tokenizer = Tokenizer.from_folder(BUNDLED)
    dialogue = Dialogue(tokenizer, made["tools"])
    ids = dialogue.prompt_ids(made["messages"][:2])
    results = iter([m["content"] for m in made["messages"] if m["role"] == "tool"])
    for reply in replies(task):
        calls = [(call["name"], call["arguments"]) for call in reply.get("calls", ())]
        ids += dialogue.reply_ids(reply["reasoning"], reply.get("content", ""), calls)
        if calls:
            ids += dialogue.observation_ids([next(results)])
    text = encode_messages(made["messages"], tools=made["tools"], thinking_mode="thinking")
    assert tokenizer.decode(ids) == text and ids == tokenizer.encode(text)


@pytest.mark.parametrize("index", range(4))
def test_the_scripted_solution_finds_what_is_to_be_found(index: int, tmp_path: Path) -> None:
    task = draw_task("test", 5, index)
    conversation(task, tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert sorted(row[2] for row in rows) == sorted(task.found)
    message = EmailMessage()
    message["To"] = ADA
    data = (tmp_path / "out" / "found.xlsx").read_bytes()
    message.add_attachment(data, maintype="application", subtype="octet-stream", filename="found.xlsx")
    assert grade(task, [message], ADA)


def test_wrong_mails_are_refused() -> None:
    task = next(t for t in (draw_task("test", 1, i) for i in range(50)) if len(t.found) == 2)
    right = [["a.pdf", 1, text] for text in task.found]
    assert grade(task, [mail(right)], ADA)
    other = next(p for ps in task.documents.values() for p in ps if p not in task.found)
    wrong = [
        [],
        [mail(right), mail(right)],
        [mail(right, to="eve@example.org")],
        [mail(right, name="found.txt")],
        [mail(right[:1])],
        [mail([*right, right[0]])],
        [mail([*right, ["a.pdf", 2, other]])],
        [mail([["a.pdf", 1, text[:-5]] for text in task.found])],
    ]
    for inbox in wrong:
        assert not grade(task, inbox, ADA)
    broken = EmailMessage()
    broken["To"] = ADA
    broken.add_attachment(b"no zip", maintype="application", subtype="octet-stream", filename="found.xlsx")
    assert not grade(task, [broken], ADA)


def test_tasks_are_functions_of_their_place_and_split_by_phrase(tmp_path: Path) -> None:
    for split in ("train", "cal", "test"):
        tasks = [draw_task(split, 2, i) for i in range(20)]  # type: ignore[arg-type]
        assert tasks == [draw_task(split, 2, i) for i in range(20)]  # type: ignore[arg-type]
        assert {split_of("desk", task.phrase.lower()) for task in tasks} == {split}
        for task in tasks:
            holding = [p for ps in task.documents.values() for p in ps if task.phrase.lower() in p.lower()]
            assert sorted(holding) == sorted(task.found), random.Random(0)
    main(["--count", "2", "--out", str(tmp_path / "x.jsonl")])
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert len(lines) == 2 and isinstance(draw_task("train", 1, 0), DeskTask)
    assert draw_task("train", 1, 1).phrase in lines[1]
