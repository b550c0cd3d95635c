"""Runs inside the sandbox as `python3 tools.pyz TOOL`, with the arguments as JSON on stdin; needs Python 3.9 alone.

What it prints is what the model is shown. Exit code 1 with one sentence on stderr: the request was wrong.
Nothing of Rorqual is imported here.
"""

from __future__ import annotations

import glob
import io
import json
import os
import sys
import zipfile
from typing import Any

MAX_SHOWN = 24_000  # characters of one answer


class Wrong(Exception):
    """The request cannot be fulfilled, and why."""


def read_file(path: str, offset: int = 1, limit: int | None = None) -> None:
    """Lines of a text file, from line `offset`."""
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = file.read().splitlines(keepends=True)
    first = max(int(offset), 1) - 1
    chosen = lines[first : None if limit is None else first + int(limit)]
    print(shown("".join(chosen)), end="")


def write_file(path: str, content: str) -> None:
    """Write text; the folder is made."""
    make_folder(path)
    replace(path, content.encode("utf-8", "replace"))
    print(f"wrote {path}: {len(content):,} characters")


def edit_file(path: str, old: str, new: str, all: bool = False) -> None:
    """Replace a piece of text that stands in the file once (or, with `all`, everywhere)."""
    with open(path, encoding="utf-8") as file:
        text = file.read()
    count = text.count(old) if old else 0
    if count == 0:
        raise Wrong(f"the text to replace does not stand in {path}; read the file and copy it exactly")
    if count > 1 and not all:
        raise Wrong(f"the text to replace stands {count} times in {path}; give more of it, or set all")
    replace(path, text.replace(old, new).encode("utf-8"))
    print(f"replaced {count} time{'s' if count > 1 else ''} in {path}")


def list_files(path: str = ".", depth: int = 3) -> None:
    """Files below a folder with their sizes."""
    if not os.path.isdir(path):
        raise Wrong(f"{path} is no folder")
    lines = []
    base = path.rstrip("/").count("/")
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if folder.rstrip("/").count("/") - base >= int(depth):
            folders[:] = []
        for name in sorted(files):
            place = os.path.join(folder, name)
            size = os.lstat(place).st_size
            lines.append(f"{os.path.relpath(place, path)}  {size:,} bytes")
    print(shown("\n".join(lines) or "(no files)"))


def pdf_to_text(path: str, out: str | None = None) -> None:
    """Text of one PDF, of all in a folder, or of all that a pattern matches; with `out`, into files there."""
    from pypdf import PdfReader

    if os.path.isdir(path):
        names = sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.[pP][dD][fF]"), recursive=True))
    else:
        names = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
    if not names:
        raise Wrong(f"no PDF at {path}")
    failures = 0
    for name in names:
        try:
            reader = PdfReader(name)
            pages = [tidy(page.extract_text(extraction_mode="layout")) for page in reader.pages]
        except Exception as error:  # a damaged or hostile file can fail in any way; the others are still read
            print(f"{name}: cannot be read ({type(error).__name__}: {error})")
            failures += 1
            continue
        text = "\n\n".join(pages).strip() + "\n"
        if out is None:
            print(shown(f"== {name} ({len(pages)} pages)\n{text}"))
            continue
        target = os.path.join(out, os.path.splitext(os.path.basename(name))[0] + ".txt")
        make_folder(target)
        replace(target, text.encode("utf-8", "replace"))
        note = "" if text.strip() else " (no text: it may be scanned pictures)"
        print(f"{name} -> {target}: {len(pages)} pages, {len(text):,} characters{note}")
    if failures == len(names):
        raise Wrong("none of them could be read")


def write_spreadsheet(
    path: str,
    columns: list[str] | None = None,
    rows: Any = None,
    rows_file: str | None = None,
    sheet: str = "Sheet1",
) -> None:
    """An Excel file of one sheet: bold first row, filter, and text that stays text."""
    from openpyxl import Workbook

    if rows_file is not None:
        with open(rows_file, encoding="utf-8") as file:
            rows = json.load(file)
    if not isinstance(rows, list):
        raise Wrong("give rows as a list, or rows_file with a JSON list in it")
    if columns is None and rows and isinstance(rows[0], dict):
        columns = list(rows[0])
    table = ([columns] if columns else []) + [as_list(row, columns, i) for i, row in enumerate(rows)]
    book = Workbook()
    page = book.active
    page.title = "".join(c for c in str(sheet) if c not in "[]:*?/\\")[:31] or "Sheet1"
    fill(page, table, bool(columns))
    make_folder(path)
    save_same(book, path)
    print(f"wrote {path}: sheet {page.title!r}, {len(rows)} rows, {max(map(len, table), default=0)} columns")


def as_list(row: Any, columns: list[str] | None, index: int) -> list[Any]:
    """A row as a list, in the order of the columns."""
    if isinstance(row, dict) and columns is not None:
        return [row.get(name) for name in columns]
    if isinstance(row, list):
        return row
    raise Wrong(f"row {index} is neither a list nor an object of the columns")


def fill(page: Any, table: list[list[Any]], has_names: bool) -> None:
    """Put a table into a sheet."""
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    from openpyxl.styles import Alignment, Font
    from openpyxl.utils import get_column_letter

    widths: dict[int, int] = {}
    for r, row in enumerate(table, start=1):
        for c, value in enumerate(row, start=1):
            if isinstance(value, (list, dict)):
                value = json.dumps(value, ensure_ascii=False)
            if isinstance(value, str):
                value = ILLEGAL_CHARACTERS_RE.sub("", value)[:32_767]
            cell = page.cell(r, c, value)
            if isinstance(value, str):
                cell.data_type = "s"  # text that begins with = is no formula: it may come from a stranger's file
                cell.alignment = Alignment(wrap_text=True, vertical="top")
            if r == 1 and has_names:
                cell.font = Font(bold=True)
            widths[c] = min(max(widths.get(c, 8), len(str(value or "")) + 2), 80)
    for c, width in widths.items():
        page.column_dimensions[get_column_letter(c)].width = width
    if has_names:
        page.freeze_panes = "A2"
        page.auto_filter.ref = page.dimensions


def read_spreadsheet(path: str, sheet: str | None = None, limit: int = 200) -> None:
    """Rows of a sheet as JSON lines."""
    from openpyxl import load_workbook

    book = load_workbook(path, read_only=True, data_only=True)
    if sheet is not None and sheet not in book.sheetnames:
        raise Wrong(f"{path} has no sheet {sheet!r}; it has {', '.join(book.sheetnames)}")
    page = book[sheet] if sheet else book[book.sheetnames[0]]
    print(f"sheet {page.title!r} of {', '.join(book.sheetnames)}")
    lines = []
    for i, row in enumerate(page.iter_rows(values_only=True)):
        if i >= int(limit):
            lines.append(f"... (only {limit} rows shown)")
            break
        lines.append(json.dumps(list(row), ensure_ascii=False, default=str))
    print(shown("\n".join(lines)))


def save_same(book: Any, path: str) -> None:
    """Save so that the same content gives the same bytes: no time of writing, neither inside nor in the zip."""
    import datetime

    from openpyxl.writer.excel import ExcelWriter

    fixed = datetime.datetime(2000, 1, 1)
    book.properties.created = book.properties.modified = fixed
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
        ExcelWriter(book, archive).save()
    again = io.BytesIO()
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(again, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), source.read(name), zipfile.ZIP_DEFLATED)
    replace(path, again.getvalue())


def tidy(text: str) -> str:
    """Without the spaces that only place text on the page, and with one empty line between paragraphs."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    kept = [line for i, line in enumerate(lines) if line or (i and lines[i - 1])]
    return "\n".join(kept).strip()


def make_folder(path: str) -> None:
    folder = os.path.dirname(path)
    if folder:
        os.makedirs(folder, exist_ok=True)


def replace(path: str, data: bytes) -> None:
    """Whole or not at all."""
    partial = f"{path}.part{os.getpid()}"
    with open(partial, "wb") as file:
        file.write(data)
    os.replace(partial, path)


def shown(text: str) -> str:
    """Text cut in its middle when it is too long to be read at once."""
    if len(text) <= MAX_SHOWN:
        return text
    half = MAX_SHOWN // 2
    return f"{text[:half]}\n... ({len(text) - 2 * half:,} characters left out) ...\n{text[-half:]}"


def unpack_once() -> None:
    """Packages load faster from files than from the zip: Python keeps what it compiled of files."""
    archive = sys.path[0]
    folder = archive + ".d"
    if not os.path.isdir(folder):
        partial = f"{folder}.{os.getpid()}"
        try:
            with zipfile.ZipFile(archive) as file:
                file.extractall(partial)
            os.rename(partial, folder)
        except OSError:
            return  # full or read-only, or another was first: the zip works too
    sys.path.insert(0, folder)


TOOLS = {
    tool.__name__: tool
    for tool in (read_file, write_file, edit_file, list_files, pdf_to_text, write_spreadsheet, read_spreadsheet)
}


def main() -> None:
    name = sys.argv[1]
    if len(sys.argv) > 2:
        with open(sys.argv[2], encoding="utf-8") as file:  # it stays, for the call may be run again
            arguments = json.load(file)
    else:
        arguments = json.load(sys.stdin)
    sys.stdout.reconfigure(  # type: ignore[union-attr]
        encoding="utf-8", errors="replace"
    )
    if name in ("pdf_to_text", "write_spreadsheet", "read_spreadsheet"):
        unpack_once()
    try:
        TOOLS[name](**arguments)
    except Wrong as error:
        sys.exit(str(error))
    except (OSError, zipfile.BadZipFile, ValueError, TypeError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
