"""Results as tables on the terminal (standard error, so that standard output stays for paths and JSON)."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from sfc.core.config import ActivationsConfig, Experiment
from sfc.core.progress import console

if TYPE_CHECKING:
    import pandas as pd

    from sfc.studies.doctor import Check


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
    rows = [("nodes", result["n_nodes"]), ("edges", result["n_edges"])]
    for name in ("faithfulness", "completeness", "completeness_normalised"):
        rows.append((name.replace("_", " "), _with_interval(result, name)))
    rows += [("random faithfulness", result["random_faithfulness"]), ("p-value", result["p_value"])]
    scores = {"f_model": "F(M)", "f_circuit": "F(C)", "f_complement": "F(M\\C)", "f_empty": "F(0)"}
    rows += [(label, result[name]) for name, label in scores.items()] + [("error share", result["error_share"])]
    if result.get("refused_circuit") is not None:
        kept, ablated = (_with_interval(result, f"refused_{part}") for part in ("circuit", "complement"))
        rows += [("replies that refuse", result["refused_model"]), ("the circuit alone", kept), ("without it", ablated)]
    show_table(f"{result['category']} · {result['method']} · {result['preset']}: test split", ("figure", "value"), rows)


def show_base(base: dict[str, Any]) -> None:
    """What a circuit's nodes were in the base model, and what they do there."""
    rows = [
        ("F(base)", base["f_base"]),
        ("F(base with the circuit)", base["f_base_with_circuit"]),
        ("F(base with all nodes)", base["f_base_with_all"]),
        *((f"nodes: {change}", count) for change, count in base["changes"].items()),
    ]
    show_table("The base model on the same prompts", ("figure", "value"), rows)


def show_comparison(result: dict[str, Any]) -> None:
    """The overlaps of a comparison of categories, and what they say."""
    columns = ("within", "between", "shuffled", "difference", "difference_low", "difference_high")
    rows = [(name, *(verdict[column] for column in columns)) for name, verdict in result["overlap"].items()]
    titles = ("overlap", "within", "between", "shuffled", "difference", "low", "high")
    show_table(f"Circuits of {result['size']} nodes, found on half of the prompts", titles, rows)
    console.print(escape(result["verdict"]))


def show_evaluation(result: dict[str, Any]) -> None:
    """The figures of circuits from files, a row each."""
    columns = {
        "circuit": "name", "nodes": "n_nodes", "faithfulness": "faithfulness", "low": "faithfulness_low",
        "high": "faithfulness_high", "random": "random_faithfulness", "p": "p_value",
        "completeness": "completeness_normalised", "edges": "n_edges", "of edges": "edge_faithfulness",
        "random edges": "random_edge_faithfulness",
    }  # fmt: skip
    first = result["circuits"][0]
    title = (
        f"{result['category']} · {result['preset']}: faithfulness on {result['n_prompts']} {result['population']} test"
        f" prompts, completeness normalised; F(M) {_text(first['f_model'])}, F(0) {_text(first['f_empty'])}"
    )
    show_table(title, list(columns), ([circuit[key] for key in columns.values()] for circuit in result["circuits"]))


def show_collection(takes: dict[str, Any]) -> None:
    """What a collection will take."""
    sizes = {"size": takes["bytes"], "free on the disk": takes["bytes_free"]}
    counts = [(name.removeprefix("n_"), takes[name]) for name in ("n_prompts", "n_tokens", "n_rows", "n_sites")]
    rows = [*counts, *((name, f"{value / 1e9:,.2f} GB") for name, value in sizes.items())]
    show_table("A collection, not run", ("what", "how much"), rows)


def show_quality(quality: "pd.DataFrame") -> None:
    """The quality of a run's SAEs over all rows, in 80 columns; `quality.csv` has it by role, and more."""
    columns = {"site": "site", "fvu": "fvu", "cosine": "cosine", "l0": "L0", "dead_share": "dead"}
    columns |= {"loss_recovered": "loss", "score_recovered": "score"}
    of_all = quality.loc[quality["role"] == "all", list(columns)]
    title = "SAEs on held-out rows (loss, score: share recovered of mean-ablation)"
    show_table(title, list(columns.values()), of_all.itertuples(index=False))


def show_behaviour(result: dict[str, Any]) -> None:
    """Refusal rates by category and label."""
    columns = ("category", "label", "n", "refusals", "rate", "low", "high")
    show_table("Judged refusals (Wilson 95 %)", columns, ([group[c] for c in columns] for group in result["groups"]))
    console.print(f"AUROC of the refusal score against judged refusals: {_text(result['auroc'])}")


def show_heads(result: dict[str, Any]) -> None:
    """The heads of a logit attribution that tell toxic from safe prompts best."""
    columns = {
        "head": "component", "role": "role", "toxic": "toxic_mean", "low": "toxic_low", "high": "toxic_high",
        "safe": "safe_mean", "toxic - safe": "difference", "q": "q_value",
    }  # fmt: skip
    counts = ", ".join(f"{len(result[role])} {role}" for role in ("guardrail", "compliance"))
    title = f"{result['category']}: {result['n_heads']} heads, {counts}; the strongest, in nats with 95 % intervals"
    show_table(title, list(columns), ([head[key] for key in columns.values()] for head in result["heads"]))
    difference = result["logit_difference"]
    console.print(
        f"logit difference: toxic {_text(difference['toxic']['mean'])}, safe {_text(difference['safe']['mean'])};"
        f" AUROC {_text(result['auroc'])}, correlation with the refusal score {_text(result['score_correlation'])}"
    )


def show_formats(result: dict[str, Any]) -> None:
    """Scores by prompt format, and the tests between formats."""
    columns = {
        "format": "format", "refuse - comply": "mean", "low": "low", "high": "high", "harmless": "harmless_mean",
        "refused": "refused", "AUROC": "auroc", "z": "z_mean",
    }  # fmt: skip
    title = f"{result['n_harmful']} harmful instructions by format, in nats with 95 % intervals"
    show_table(title, list(columns), ([row[key] for key in columns.values()] for row in result["formats"]))
    columns = {
        "first": "first", "second": "second", "z first - second": "mean_difference", "p": "p_value",
        "p, Holm": "p_holm", "rank-biserial r": "rank_biserial",
    }  # fmt: skip
    test = result["friedman"]
    title = (
        f"Standardised within format: Friedman chi2({test['degrees']}) = {_text(test['chi2'])},"
        f" p = {_text(test['p_value'])}, Kendall's W = {_text(test['kendall_w'])}; Wilcoxon between pairs"
    )
    show_table(title, list(columns), ([row[key] for key in columns.values()] for row in result["pairs"]))


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


def show_batch(result: dict[str, Any]) -> None:
    """A line per model, and what failed."""
    columns = {
        "model": "model", "toxic": "refused_toxic", "safe": "refused_safe", "separation": "separation",
        "probe": "probe_accuracy", "guardrail": "n_guardrail", "critical": "n_critical",
    }  # fmt: skip
    rows = ([row[key] for key in columns.values()] for row in result["models"])
    show_table(f"{result['category']}: shares refused, the probe, and heads or components", list(columns), rows)
    for failure in result["failures"]:
        console.print(escape(f"failed: {failure['model']}, {failure['stage']}: {failure['reason']}"), soft_wrap=True)


def show_steering(result: dict[str, Any]) -> None:
    """What the dial does at its operating points."""
    columns = {
        "alpha": "alpha", "changed": "changed", "of": "eligible", "rate": "changed_rate", "low": "changed_low",
        "high": "changed_high", "random": "random_mean", "highest": "random_highest", "loss": "loss_rise",
    }  # fmt: skip
    token = "" if result["token"] is None else f" read at token {result['token']}"
    title = (
        f"{result['direction']} at {result['site']}{token}: test prompts changed as intended (Wilson 95 %), and by"
        " random directions; loss: rise of ordinary replies' cross-entropy"
    )
    points = result["operating_points"].items()
    rows = ([intent, *(point[key] for key in columns.values())] for intent, point in points)
    show_table(title, ["turned to", *columns], rows)


def show_repair(result: dict[str, Any]) -> None:
    """What the chosen edits do to test prompts, beside the model as it is."""
    columns = ("size", "hard", "toxic", "safe", "random_hard", "random_toxic", "loss_rise")
    title = "Shares of test prompts refused; random: features matched by site and firing rate, mean"
    points = {"as it is": result["unedited"], **result["chosen"]}
    rows = (
        [name, *(point.get(column, "") for column in columns)] for name, point in points.items() if point is not None
    )
    show_table(title, ["edit", *(column.replace("_", " ") for column in columns)], rows)


def show_replication(result: dict[str, Any]) -> None:
    """Both circuits of a replication, and how far they agree."""
    circuits = [result["original"], result["replication"]]
    names = ("faithfulness", "completeness", "completeness_normalised")
    rows = [
        ("nodes", *(circuit["n_nodes"] for circuit in circuits)),
        *((name.replace("_", " "), *(_with_interval(circuit, name) for circuit in circuits)) for name in names),
        ("share with a partner", *(circuit["share_with_partner"] for circuit in circuits)),
    ]
    seeds = [f"SAE seed {circuit['sae_seed']}" for circuit in circuits]
    show_table(f"{result['category']} · {result['method']} · {result['preset']}: test split", ["figure", *seeds], rows)
    rows = [
        ("Jaccard, all nodes", result["jaccard"], result["chance"]),
        ("Jaccard, nodes with a partner", result["matched_jaccard"], result["matched_chance"]),
        ("rank correlation of shared effects", result["rank_correlation"], ""),
        ("equal signs of shared effects", result["sign_agreement"], ""),
    ]
    share, same = _text(result["matched_share"]), result["same_from_cosine"]
    title = f"{result['n_shared']} shared nodes; {share} of all features have a partner of cosine {same} or more"
    show_table(title, ("agreement", "value", "by chance"), rows)


def show_presets(experiments: Iterable[Experiment]) -> None:
    """The presets, a line each."""
    show_table(
        "Presets",
        ("preset", "model", "sites", "what it is"),
        ((e.name, e.model.source, _span(e.activations), e.description) for e in experiments),
    )


def _span(activations: ActivationsConfig) -> str:
    kinds = [activations.kind] if isinstance(activations.kind, str) else activations.kind
    return f"{', '.join(kinds)} {activations.layers[0]}–{activations.layers[-1]}"


def show_checks(checks: Iterable["Check"]) -> None:
    """What the doctor found."""
    show_table("sfc doctor", ("what", "ok", "finding"), ((c.what, "ok" if c.ok else "no", c.finding) for c in checks))


def _with_interval(result: dict[str, Any], name: str) -> str | None:
    """The figure and, behind it, its 95 % interval."""
    if result[name] is None:
        return None
    return f"{result[name]:.3f} ({result[f'{name}_low']:.3f} to {result[f'{name}_high']:.3f})"


def _text(value: Any) -> str:
    if value is None or value != value:  # NaN
        return "not measurable"
    if isinstance(value, float):
        return f"{value:,.3f}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))
