"""Practice for a desk: generated tasks of one kind (PDFs, the paragraphs that mention something, a spreadsheet, a mail)
with a scripted solution, the conversation it makes, and a grader that looks at the mail alone.

    python -m rorqual.agents.practice --count 2000 --seed 1 --out runs/desk.jsonl

The solution's calls are made by the very program that answers them in the sandbox, on real PDFs in a folder of their
own, so a conversation reads as a run's would; only the mail is not sent. What is to be found decides the split of a
task: phrases of `test` occur in no training conversation. Needs the extras `agents` and, for the PDFs, `test`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Any

from rorqual.agents.courier import Server, message_id
from rorqual.agents.environment import INPUT, OUTPUT
from rorqual.agents.prompt import opening
from rorqual.agents.toolkit import guest
from rorqual.agents.tools import ToolBox, standard_tools
from rorqual.agents.tools.mail import mail_tool
from rorqual.data.tasks import words
from rorqual.data.tasks.base import Split, split_of
from rorqual.errors import MissingExtraError
from rorqual.seeds import derive

_ASKS = (
    "Convert all PDFs in my folder to text, extract every paragraph mentioning '{p}', format as Excel, send to my "
    "email",
    "Find every paragraph about '{p}' in my PDFs, put them into a spreadsheet and mail it to me.",
    "Read the PDFs in my folder, collect the paragraphs that mention '{p}' in an Excel file, and send it to my email.",
    "Send me a spreadsheet with all paragraphs of my PDFs in which '{p}' occurs.",
    "I need every paragraph with '{p}' from the PDFs, as Excel, by mail.",
)
_PROGRAM = """import json, pathlib
rows = []
for path in sorted(pathlib.Path('text').glob('*.txt')):
    for number, part in enumerate(path.read_text().split('\\n\\n'), 1):
        text = ' '.join(part.split())
        if '{p}'.lower() in text.lower():
            rows.append([path.stem + '.pdf', number, text])
json.dump(rows, open('rows.json', 'w'))
print(len(rows), 'paragraphs')
"""
_TABLE = f"{OUTPUT}/found.xlsx"
_COLUMNS = ["Document", "Paragraph", "Text"]


@dataclass(frozen=True)
class DeskTask:
    """One task. documents: paragraphs by file name. found: the paragraphs to be sent, in any order."""

    phrase: str
    text: str
    documents: dict[str, list[str]]
    found: tuple[str, ...]

    def write(self, folder: Path) -> Path:
        """Its PDFs. Raises: MissingExtraError."""
        try:
            from fpdf import FPDF
        except ImportError:
            raise MissingExtraError(
                'writing PDFs needs fpdf2, which is not installed. Install it with: pip install "rorqual[test]"'
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        for name, paragraphs in self.documents.items():
            pdf = FPDF()
            pdf.set_font("helvetica", size=12)
            pdf.add_page()
            for paragraph in paragraphs:
                pdf.multi_cell(0, 6, paragraph)
                pdf.ln(8)
            pdf.output(str(folder / name))
        return folder


def draw_task(split: Split, seed: int, index: int) -> DeskTask:
    """The `index`-th task of a split."""
    rng = random.Random(derive(seed, "desk-task", split, index))
    while split_of("desk", (phrase := _phrase(rng)).lower()) != split:
        pass
    names = words.distinct_words(rng, rng.randint(2, 4), set())
    documents = {f"{name.lower()}.pdf": [_paragraph(rng) for _ in range(rng.randint(2, 4))] for name in names}
    found = []
    for name in rng.sample(list(documents), rng.randint(1, len(documents))):
        place = rng.randrange(len(documents[name]))
        said = phrase if rng.random() < 0.7 else phrase.lower()
        documents[name][place] = _paragraph(rng, said)
        found.append(documents[name][place])
    return DeskTask(phrase, rng.choice(_ASKS).format(p=phrase), documents, tuple(found))


def _phrase(rng: random.Random) -> str:
    first = rng.choice((str(rng.randrange(1990, 2060)), words.invented_word(rng), rng.choice(words.COLOURS)))
    phrase = f"{first} {rng.choice((rng.choice(words.NOUNS), 'budget', 'report', 'plan'))}"
    return phrase.title() if rng.random() < 0.2 else phrase


def _paragraph(rng: random.Random, phrase: str | None = None) -> str:
    said = rng.choices(words.FILLER, k=rng.randint(8, 16))
    if phrase is not None:
        said.insert(rng.randrange(len(said)), phrase)
    return " ".join(said).capitalize() + "." if phrase is None else "We say " + " ".join(said) + "."


def replies(task: DeskTask) -> list[dict[str, Any]]:
    """The solution, in the form of a reply script (`models/script.py`): four calls and an answer.

    Every reasoning says the phrase again, so that the next call has it near.
    """
    p = task.phrase

    def call(reasoning: str, name: str, **arguments: Any) -> dict[str, Any]:
        return {"reasoning": f"'{p}'. {reasoning}", "calls": [{"name": name, "arguments": arguments}]}

    return [
        call("First the PDFs become text.", "pdf_to_text", path=INPUT, out="text"),
        call("Now I look for it.", "python", code=_PROGRAM.format(p=p)),
        call(
            "Now the spreadsheet.", "write_spreadsheet",
            path=_TABLE, columns=_COLUMNS, rows_file="rows.json", sheet=p,
        ),
        call(
            "Now the mail.", "send_mail",
            subject=f"Paragraphs on {p}", body=f"The paragraphs that mention {p}.", attachments=[_TABLE],
        ),
        {"reasoning": f"'{p}'. All is done.", "content": f"I sent you the paragraphs on '{p}' as found.xlsx."},
    ]  # fmt: skip


def tools(address: str = "ada@example.org") -> list[dict[str, Any]]:
    """What a run with mail declares."""
    return ToolBox([*standard_tools(), mail_tool(Server("localhost", 25), address, [address])]).schemas()


def conversation(
    task: DeskTask, folder: Path, *, address: str = "ada@example.org", key: str = "0" * 32
) -> dict[str, Any]:
    """`messages` and `tools` of a run that solves the task, its calls really made in the empty `folder`."""
    task.write(folder / INPUT)
    messages = opening(task.text, {}, address)
    for i, reply in enumerate(replies(task)):
        message: dict[str, Any] = {
            "role": "assistant", "content": reply.get("content", ""), "reasoning_content": reply["reasoning"],
        }  # fmt: skip
        results = []
        for j, call in enumerate(reply.get("calls", ())):
            name, arguments = call["name"], call["arguments"]
            identity = f"call_{i}_{j}"
            function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
            message.setdefault("tool_calls", []).append({"id": identity, "type": "function", "function": function})
            if name == "send_mail":
                result = f"sent to {address} as {message_id(key)}"
            else:
                result = _made(name, arguments, folder)
            results.append({"role": "tool", "tool_call_id": identity, "content": result})
        messages += [message, *results]
    return {"messages": messages, "tools": tools(address)}


def _made(name: str, arguments: Mapping[str, Any], folder: Path) -> str:
    """What the call prints, made here by the sandbox's own program: the script is ours, and so are the files."""
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        if name == "python":
            Path("program.py").write_text(arguments["code"], encoding="utf-8")
            runpy.run_path("program.py")
        else:
            guest.TOOLS[name](**arguments)
    return out.getvalue().rstrip("\n") or "(no output)"


def grade(task: DeskTask, inbox: Sequence[EmailMessage], address: str) -> bool:
    """Whether exactly one mail came, to `address`, with one spreadsheet that holds just the paragraphs asked for.

    Raises: MissingExtraError without openpyxl.
    """
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise MissingExtraError('reading Excel needs openpyxl: pip install "rorqual[agents]"') from None
    if len(inbox) != 1 or inbox[0]["To"] != address:
        return False
    attached = [part for part in inbox[0].iter_attachments() if str(part.get_filename()).endswith(".xlsx")]
    if len(attached) != 1:
        return False
    data = attached[0].get_payload(decode=True)
    if not isinstance(data, bytes):
        return False
    try:
        page = load_workbook(io.BytesIO(data), read_only=True).worksheets[0]
        rows = [[str(value) for value in row if value is not None] for row in page.iter_rows(values_only=True)]
    except Exception:  # what the agent attached need be no spreadsheet, and fails in any way then
        return False
    told = [row for row in rows if any(len(value.split()) > 3 for value in row)]  # not the line of names
    return sorted(_plain(max(row, key=len)) for row in told) == sorted(map(_plain, task.found))


def _plain(text: str) -> str:
    return " ".join(text.split())


def main(argv: Sequence[str] | None = None) -> None:
    """Write training conversations, one a line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as file:
        for index in range(args.count):
            key = f"{derive(args.seed, 'desk-key', index):032x}"[:32]
            with tempfile.TemporaryDirectory() as folder:
                made = conversation(draw_task("train", args.seed, index), Path(folder), key=key)
            file.write(json.dumps(made, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{args.out}: {args.count} conversations\n")


if __name__ == "__main__":
    main()
