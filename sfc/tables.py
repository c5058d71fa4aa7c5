"""Results as tables on the terminal (standard error, so that standard output stays for paths and JSON)."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from sfc.config import ActivationsConfig, Experiment
from sfc.progress import console

if TYPE_CHECKING:
    import pandas as pd

    from sfc.doctor import Check


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table whose numbers stand on the right and whose text is never taken for markup."""
    rows = [[_text(value) for value in row] for row in rows]
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column in (columns[0], "what it is", "finding") else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_circuit(result: dict[str, Any]) -> None:
    """The figures of a reported circuit."""
    ratios = ("n_nodes", "n_edges", "faithfulness", "completeness", "completeness_normalised", "random_faithfulness")
    rows = [(name.replace("n_", "").replace("_", " "), result[name]) for name in ratios]
    scores = {"f_model": "F(M)", "f_circuit": "F(C)", "f_complement": "F(M\\C)", "f_empty": "F(0)"}
    rows += [(label, result[name]) for name, label in scores.items()] + [("error share", result["error_share"])]
    show_table(f"{result['category']} · {result['method']} · {result['preset']}: test split", ("figure", "value"), rows)


def show_quality(quality: "pd.DataFrame") -> None:
    """The quality of a run's SAEs."""
    columns = ("site", "fvu", "cosine", "l0", "dead_share", "loss_recovered")
    titles = [column.replace("_", " ") for column in columns]
    show_table("SAEs on held-out prompts", titles, quality[list(columns)].itertuples(index=False))


def show_behaviour(result: dict[str, Any]) -> None:
    """Refusal rates by category and label."""
    columns = ("category", "label", "n", "refusals", "rate", "low", "high")
    show_table("Judged refusals (Wilson 95 %)", columns, ([group[c] for c in columns] for group in result["groups"]))
    console.print(f"AUROC of the refusal score against judged refusals: {_text(result['auroc'])}")


def show_patching(result: dict[str, Any]) -> None:
    """The strongest critical components of each direction and kind, and how the pairs were chosen."""
    columns = {
        "component": "component", "direction": "direction", "positions": "positions", "pairs": "n_pairs",
        "effect": "effect", "low": "low", "high": "high", "q": "q_value", "first order": "first_order",
    }  # fmt: skip
    lost = "; ".join(f"{count} {reason}" for reason, count in result["lost"].items()) or "none"
    used = f"{result['n_pairs']} of {result['n_tried']} pairs by {result['require']} (lost: {lost})"
    strongest = [row for row in result["critical"] if row["rank"] <= 5]
    title = f"{used}: strongest components with q of at most 0.05"
    show_table(title, list(columns), ([row[key] for key in columns.values()] for row in strongest))
    columns = ("direction", "kind", "n", "pearson", "spearman", "mean_difference", "best", "shared")
    titles = [column.replace("_", " ") for column in columns]
    rows = ([row[column] for column in columns] for row in result["agreement"])
    show_table("First-order effects against exact ones", titles, rows)


def show_presets(experiments: Iterable[Experiment]) -> None:
    """The presets, a line each."""
    show_table(
        "Presets",
        ("preset", "model", "sites", "what it is"),
        ((e.name, e.model.source, _span(e.activations), e.description) for e in experiments),
    )


def _span(activations: ActivationsConfig) -> str:
    return f"{activations.kind} {activations.layers[0]}–{activations.layers[-1]}"


def show_checks(checks: Iterable["Check"]) -> None:
    """What the doctor found."""
    show_table("sfc doctor", ("what", "ok", "finding"), ((c.what, "ok" if c.ok else "no", c.finding) for c in checks))


def _text(value: Any) -> str:
    if value is None:
        return "not measurable"
    if isinstance(value, float):
        return f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
