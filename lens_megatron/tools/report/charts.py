"""Draws charts as Vega-Lite specifications; colours come from the page, which has a light and a dark set of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair

from lens_megatron.tools.report.browser import script_json
from lens_megatron.tools.report.phases import NAMES, PhaseSeconds
from lens_megatron.tools.report.seeds import Band, BandPoint
from lens_megatron.tools.report.shares import ScoreBin, StepShares

HEIGHT, ROW_HEIGHT = 230, 34
"""Pixels of a chart, and of one bar with its gap. The width is that of the page's column."""
FEW_POINTS = 40
"""Curves with no more points than this show every one of them by a mark."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart of the page."""

    title: str
    """Says what is shown, in one sentence without a full stop."""
    caption: str
    """What a reader must know to read it; may be empty."""
    spec: str
    """The chart in Vega-Lite's JSON, safe within a <script>."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A band with the kind of curve it is, where a configuration has several in one chart."""

    band: Band
    kind: str = ""


@dataclass(frozen=True, slots=True)
class NamedShares:
    """The shares of the groups of a configuration, by steps."""

    configuration: str
    steps: tuple[StepShares, ...]


@dataclass(frozen=True, slots=True)
class NamedScores:
    """The distribution of scores of a configuration."""

    configuration: str
    bins: tuple[ScoreBin, ...]


def curves(
    title: str, caption: str, unit: str, found: Sequence[Curve], *, percent: bool = False, zero: bool = False
) -> Figure:
    """Draws curves over optimizer steps: configurations differ in colour, kinds in dashes.

    Args:
        unit: the title of the vertical axis.
        percent: the values are shares, shown in per cent.
        zero: the axis begins at 0.
    """
    rows = [_row(curve, point, percent) for curve in found for point in curve.band.points]
    style = ".1%" if percent else ".4~g"
    names = _unique(curve.band.configuration for curve in found)
    kinds = _unique(curve.kind for curve in found)
    x = altair.X("step:Q", title="optimizer step", axis=altair.Axis(tickMinStep=1, format="d"))
    axis = altair.Axis(format="%") if percent else altair.Axis()
    y = altair.Y("value:Q", title=unit, axis=axis, scale=altair.Scale(zero=zero))
    # Of one configuration the kinds differ in colour too; two kinds of dashes alone are hard to tell apart.
    coloured, sort = ("kind:N", kinds) if len(names) == 1 else ("configuration:N", names)
    colour = altair.Color(coloured, sort=sort, title=None, legend=_legend(len(sort) > 1))
    dash = altair.StrokeDash("kind:N", sort=kinds, title=None, legend=_legend(len(kinds) > 1 and len(names) > 1))
    tip = [
        altair.Tooltip("configuration:N"),
        *([altair.Tooltip("kind:N")] if len(kinds) > 1 else []),
        altair.Tooltip("step:Q", format="d"),
        altair.Tooltip("value:Q", format=style),
        altair.Tooltip("low:Q", format=style, title="band from"),
        altair.Tooltip("high:Q", format=style, title="to"),
        altair.Tooltip("runs:Q", format="d"),
    ]
    base = altair.Chart(altair.InlineData(values=rows))
    longest = max((len(curve.band.points) for curve in found), default=0)
    opacity = altair.value(1 if longest <= FEW_POINTS else 0)
    interval = altair.Y("low:Q", title=unit)
    area = base.mark_area(opacity=0.18).encode(x=x, y=interval, y2="high:Q", color=colour, detail="kind:N")
    layers = (
        *((area.transform_filter("datum.low !== null"),) if any(row["low"] is not None for row in rows) else ()),
        base.mark_line().encode(x=x, y=y, color=colour, strokeDash=dash),
        base.mark_point(filled=True, size=40).encode(x=x, y=y, color=colour, opacity=opacity, tooltip=tip),
    )
    return _figure(title, caption, altair.LayerChart(layer=layers))


def _row(curve: Curve, point: BandPoint, share: bool) -> dict[str, Any]:
    low, high = point.low, point.high
    if share and low is not None and high is not None:  # an interval around a share may leave 0 to 1, the share cannot
        low, high = max(0.0, low), min(1.0, high)
    return {
        "step": point.step,
        "value": _short(point.mean),
        "low": _short(low),
        "high": _short(high),
        "runs": point.runs,
        "configuration": curve.band.configuration,
        "kind": curve.kind,
    }


def shares(title: str, caption: str, found: NamedShares) -> Figure:
    """Draws the shares of failed, mid and high groups over the steps, stacked to 100 %."""
    rows = [
        {"step": s.step, "kind": kind, "order": order, "share": _short(value), "groups": s.groups}
        for s in found.steps
        for order, (kind, value) in enumerate((("failure", s.failure), ("mid", s.mid), ("high", s.high)))
    ]
    kinds = ["failure", "mid", "high"]
    chart = (
        altair.Chart(altair.InlineData(values=rows))
        .mark_bar(width=altair.RelativeBandSize(1))
        .encode(
            x=altair.X("step:O", title="optimizer step", axis=_few_labels([s.step for s in found.steps])),
            y=altair.Y("share:Q", title="share of groups", axis=altair.Axis(format="%")).stack("normalize"),
            color=altair.Color("kind:N", sort=kinds, title=None, legend=_legend(True, columns=3)),
            order=altair.Order("order:Q"),
            tooltip=["step:O", "kind:N", altair.Tooltip("share:Q", format=".1%"), "groups:Q"],
        )
    )
    return _figure(title, caption, chart)


def scores(title: str, caption: str, found: NamedScores) -> Figure:
    """Draws the distribution of scores: the share of deleted and of kept tokens in every bin, on a logarithmic axis."""
    totals = {kind: sum(getattr(b, kind) for b in found.bins) for kind in ("deleted", "kept")}
    rows = [
        {"low": b.low, "high": b.high, "kind": kind, "share": _short(count / totals[kind]), "tokens": count}
        for b in found.bins
        for kind, count in (("deleted", b.deleted), ("kept", b.kept))
        if totals[kind]
    ]
    logarithmic = altair.Scale(type="log")
    chart = (
        altair.Chart(altair.InlineData(values=rows))
        .mark_rect(opacity=0.55)
        .encode(
            x=altair.X("low:Q", title="score (interference: nats)", scale=logarithmic),
            x2="high:Q",
            y=altair.Y("share:Q", title="share of the tokens", axis=altair.Axis(format="%")).stack(None),
            y2=altair.datum(0),
            color=altair.Color("kind:N", sort=["deleted", "kept"], title=None, legend=_legend(True)),
            tooltip=[
                "kind:N",
                altair.Tooltip("low:Q", format=".3~g", title="score from"),
                altair.Tooltip("high:Q", format=".3~g", title="to"),
                altair.Tooltip("share:Q", format=".1%"),
                "tokens:Q",
            ],
        )
    )
    return _figure(title, caption, chart)


def phase_bars(title: str, caption: str, found: Sequence[PhaseSeconds]) -> Figure:
    """Draws a stacked bar of mean seconds per configuration."""
    names = _unique(part.configuration for part in found)
    y = altair.Y("configuration:N", sort=names, title=None, axis=altair.Axis(labelLimit=160))
    chart = _phase_chart(found).encode(y=y, x=altair.X("seconds:Q", title="mean seconds per step", stack="zero"))
    return _figure(title, caption, chart, height=ROW_HEIGHT * len(names) + 10)


def phase_steps(title: str, caption: str, found: Sequence[PhaseSeconds]) -> Figure:
    """Draws stacked seconds over the steps of one configuration."""
    steps = _unique(part.step for part in found)
    chart = _phase_chart(found).encode(
        x=altair.X("step:O", title="optimizer step", axis=_few_labels(steps)),
        y=altair.Y("seconds:Q", title="seconds", stack="zero"),
    )
    return _figure(title, caption, chart)


def _phase_chart(found: Sequence[PhaseSeconds]) -> altair.Chart:
    used = {part.phase for part in found if part.seconds > 0}
    names = [name for name in NAMES if name in used]
    rows = [
        {"configuration": part.configuration, "step": part.step, "phase": part.phase, "seconds": _short(part.seconds)}
        | {"order": names.index(part.phase)}
        for part in found
        if part.phase in used
    ]
    return (
        altair.Chart(altair.InlineData(values=rows))
        .mark_bar()
        .encode(
            color=altair.Color("phase:N", sort=names, title=None, legend=_legend(True)),
            order=altair.Order("order:Q"),
            tooltip=["configuration:N", "step:Q", "phase:N", altair.Tooltip("seconds:Q", format=".3~g")],
        )
    )


def _few_labels(steps: Sequence[int]) -> altair.Axis:
    """Returns an axis of ordered steps with about ten labels: a label per step would overlap."""
    stride = max(1, len(steps) // 10)
    return altair.Axis(values=list(steps[::stride]), labelAngle=0)


def _legend(shown: bool, columns: int = 2) -> altair.Legend | None:
    if not shown:
        return None
    return altair.Legend(orient="top", direction="horizontal", columns=columns, labelLimit=180, symbolOpacity=1)


def _figure(title: str, caption: str, chart: altair.Chart | altair.LayerChart, height: int = HEIGHT) -> Figure:
    sized = chart.properties(width="container", height=height, description=title)
    return Figure(title, caption, script_json(_plain(sized.to_dict(validate=True))))


def _plain(spec: dict[str, Any]) -> dict[str, Any]:
    """Returns `spec` without altair's default configuration, which would hide the page's."""
    return {key: value for key, value in spec.items() if key != "config"}


def _short(value: float | None) -> float | None:
    """Rounds to four digits, which no chart can show more of: a page must stay small."""
    return None if value is None else float(f"{value:.4g}")


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
