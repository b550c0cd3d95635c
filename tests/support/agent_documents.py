"""PDFs for the agents' examples, written by a PDF library, and what is to be found in them."""

from pathlib import Path

from fpdf import FPDF

BUDGET = {
    "minutes-march.pdf": [
        "Minutes of the council of March, taken by the clerk and read to all members at the end of the meeting.",
        "The 2025 budget foresees 1.2 million for the new crane, which the council approved after two long "
        "meetings about where the money should come from.",
        "The ferry ran on time in all weeks but one.",
    ],
    "letter.pdf": [
        "Dear members, the storm of January did less harm than we feared.",
        "=SUM(A1:A9) is how the clerk wrote his total, and he asks that the 2025 Budget be read with care.",
        "We thank the crew of the lifeboat. Repairs are part of the 2025 budget too.",
    ],
    "menu.pdf": ["Soup, fish, and a pudding. The budget of 2024 was kept."],
}
FOUND = [
    ("letter.pdf", "=SUM(A1:A9) is how the clerk"),
    ("letter.pdf", "We thank the crew"),
    ("minutes-march.pdf", "The 2025 budget foresees 1.2 million"),
]
HARBOUR = [
    "The harbour in the third quarter",
    "Traffic grew by a tenth and the new crane came into use. Costs stayed within plan. Nobody was hurt.",
    "The crane was tested for two weeks before the first ship came, and it needed no repair since.",
    "Ships: 412",
    "Tonnes moved: 96,500",
    "Days of frost: 0",
]


def write_pdf(path: Path, paragraphs: list[str], compress: bool = True) -> None:
    """One PDF, a new page after every third paragraph."""
    pdf = FPDF()
    pdf.set_compression(compress)
    pdf.set_font("helvetica", size=12)
    for i, paragraph in enumerate(paragraphs):
        if i % 3 == 0:
            pdf.add_page()
        pdf.multi_cell(0, 6, paragraph)
        pdf.ln(8)
    path.parent.mkdir(parents=True, exist_ok=True)
    pdf.output(str(path))


def budget_folder(folder: Path) -> Path:
    """The folder of the first example."""
    for name, paragraphs in BUDGET.items():
        write_pdf(folder / name, paragraphs)
    return folder


def harbour_folder(folder: Path) -> Path:
    """The folder of the second."""
    write_pdf(folder / "harbour.pdf", HARBOUR)
    return folder
