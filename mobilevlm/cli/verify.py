"""``mobilevlm verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobilevlm.cli import show_json
from mobilevlm.cli.options import checkpoint_options, engine_option, html_option, threads_option
from mobilevlm.console import progress

if TYPE_CHECKING:
    from mobilevlm.console.tables import Table
    from mobilevlm.export.verification.verify import Verification

EXAMPLES = """\b
Examples:
  mobilevlm verify bundle/ MobileVLM_V2-1.7B
  mobilevlm verify bundle/ MobileVLM_V2-1.7B --data samples.jsonl --html report.html
  mobilevlm verify nano nano --suite scenes --questions 600 --json
"""


@click.command("verify", epilog=EXAMPLES)
@click.argument("bundle", type=click.Path(path_type=Path))
@checkpoint_options
@click.option(
    "--data",
    default="scenes",
    show_default=True,
    metavar="scenes|FILE.jsonl",
    help="Images, prompts and answers to measure on.",
)
@click.option("--suite", type=click.Choice(["scenes"]), help="Ask its questions too.")
@click.option(
    "--questions",
    type=click.IntRange(12),
    help="Number of questions of the suite.  [default: 2000]",
)
@engine_option("What runs the stages.")
@threads_option
@click.option(
    "--layers", is_flag=True, help="Measure each layer alone too (--html does in any case)."
)
@html_option("Write a report with plots and the worst answers.")
@click.option(
    "--require-measured",
    is_flag=True,
    help="Fail too where a limit of the recipe was not checked, as accuracy_loss without --suite.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
def command(
    bundle: Path,
    checkpoint: Path,
    data: str,
    suite: str | None,
    questions: int | None,
    engine: str,
    threads: int | None,
    layers: bool,
    html: Path | None,
    require_measured: bool,
    as_json: bool,
    quiet: bool,
    **origin: Any,
) -> None:
    """Compare BUNDLE with the float32 reference of the CHECKPOINT that it was exported from. Fails
    with exit code 1 when a figure is beyond a limit of the bundle's recipe, and says which layer
    hurts most."""
    if questions and not suite:
        raise click.UsageError("--questions goes with --suite")
    progress.enable(not quiet)
    from mobilevlm.export.verification.verify import verify

    if html is not None:
        from mobilevlm.export.verification.report import write_report
        from mobilevlm.page import check_page_target

        check_page_target(html)
    found = verify(
        bundle,
        checkpoint,
        data=data,
        engine=engine,
        questions=(questions or 2000) if suite else 0,
        threads=threads,
        layers=layers or html is not None,
        require_measured=require_measured,
        **origin,
    )
    if html is not None:
        write_report(found, html)
        progress.say(f"report      {html}")
    if as_json:
        show_json(found.to_dict())
    else:
        from mobilevlm.console.tables import show

        show(_figures_table(found))
        if found.layers:
            show(_layers_table(found))
    if found.error is not None:
        raise found.error


def _figures_table(found: Verification) -> Table:
    """Return the measured figures beside their limits."""
    from mobilevlm.console.tables import Column, Table

    name = found.bundle.manifest.spec.name
    view = Table(
        (
            Column("stage", whole=True),
            Column("figure", whole=True),
            Column("value", whole=True, right=True),
            Column("limit", whole=True, right=True),
            Column("", whole=True),
        ),
        title=f"{name}, recipe {found.recipe.name}, engine {found.engine}, "
        f"{found.num_samples} samples of {found.data}",
    )
    checks = {(check.stage, check.figure): check for check in found.checks}
    for stage, quality in found.stages.items():
        for figure, value in quality.figures.items():
            check = checks.get((stage, figure))
            sign = {"most": "≤", "least": "≥"}[check.sense] if check else ""
            limit = f"{sign} {check.limit:.4g}" if check else ""
            verdict = ("ok" if check.passed else "missed") if check else ""
            style = "bold red" if verdict == "missed" else ""
            view.add(stage, figure, f"{value:.4g}", limit, verdict, style=style)
        view.rule()
    return view


def _layers_table(found: Verification) -> Table:
    """Return the layers that hurt most."""
    from mobilevlm.console.tables import Column, Table

    view = Table(
        (
            Column("layer", whole=True),
            Column("weight error", right=True),
            Column("kl", whole=True, right=True),
            Column("visual tokens off", right=True),
        ),
        title="layers that hurt most, each alone",
    )
    tried = [(item, item.effect) for item in found.layers if item.effect is not None]
    for item, effect in sorted(tried, key=lambda pair: -pair[1].kl)[:8]:
        off = "" if effect.visual_error is None else f"{effect.visual_error:.2%}"
        view.add(item.label, f"{item.weight_error:.2%}", f"{effect.kl:.3g}", off)
    return view
