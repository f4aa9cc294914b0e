"""Tables for LaTeX (booktabs): names with any sign in them, the best number of a column bold."""

from __future__ import annotations

from collections.abc import Sequence

_SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
    '"': r"\textquotedbl{}", "\n": " ",
}  # fmt: skip


def escape(text: str) -> str:
    """A name as LaTeX shows it."""
    return "".join(_SIGNS.get(sign, sign) for sign in text)


def latex_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], bold: set[tuple[int, int]], caption: str, label: str
) -> str:
    """A `table` environment; needs `\\usepackage{booktabs}` (and `[T1]{fontenc}` for names with quotation marks).

    Args:
        head: Plain text.
        rows: Plain text, the first column to the left.
        bold: (row, column) of bold cells.
        caption: Plain text.
        label: As of `\\label`; letters and digits are kept.
    """
    name = "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in label)
    lines = [
        " & ".join(rf"\textbf{{{escape(cell)}}}" if (i, j) in bold else escape(cell) for j, cell in enumerate(row)) + r" \\"
        for i, row in enumerate(rows)
    ]
    return "\n".join(
        [
            "% needs \\usepackage{booktabs}", r"\begin{table}", r"\centering", rf"\caption{{{escape(caption)}}}",
            rf"\label{{tab:{name}}}", rf"\begin{{tabular}}{{l{'c' * (len(head) - 1)}}}", r"\toprule",
            " & ".join(map(escape, head)) + r" \\", r"\midrule", *lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", "",
        ]
    )  # fmt: skip
