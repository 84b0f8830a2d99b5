"""Markdown and JSON from runs."""

import json
import statistics
import time
from dataclasses import asdict, dataclass

from . import backends, machine, measurements
from .network import congestion_control

BEGIN, END = "<!-- perf/compare begins -->", "<!-- perf/compare ends -->"

# A bulk run below this share of its median counts as a stall.
STALL_SHARE = 0.6


@dataclass(frozen=True)
class Row:
    """A metric, or one of the other figures that come with it."""

    metric: measurements.Metric
    figure: str | None = None

    @property
    def title(self):
        """The head of the row."""
        return f"{self.metric.title}{', ' + self.figure if self.figure else ''} ({self.metric.unit})"

    def value(self, run):
        """What a run says about it."""
        return run.also.get(self.figure) if self.figure else run.value


class Results:
    """All runs of a comparison, and what they amount to."""

    @classmethod
    def of(cls, rounds, command, count, seconds):
        """Of rounds that are over."""
        results = cls()
        results.runs, results.notes, results.versions = rounds.runs, rounds.notes, rounds.versions
        results.head = {"command": command, "machine": machine.describe(), "date": time.strftime("%Y-%m-%d"),
                        "rounds": count, "seconds": seconds}
        results.backends = list(rounds.versions)
        measured = {run.metric for run in rounds.runs}
        results.metrics = [metric for metric in rounds.metrics if metric.name in measured]
        return results

    def of_cell(self, metric, backend):
        """The runs of a backend and a metric."""
        return [run for run in self.runs if run.metric == metric.name and run.backend == backend]

    def median(self, row, backend):
        """Of the runs that gave a value, or None."""
        values = [row.value(run) for run in self.of_cell(row.metric, backend)]
        values = [value for value in values if value is not None]
        return statistics.median(values) if values else None

    def rows(self):
        """The metrics, each with its other figures below it."""
        for metric in self.metrics:
            yield Row(metric)
            figures = {figure: None for run in self.runs if run.metric == metric.name for figure in run.also}
            yield from (Row(metric, figure) for figure in figures)

    def json(self):
        """Everything, for programs."""
        runs = [asdict(run) for run in self.runs]
        whole = self.head | {"versions": self.versions, "notes": self.notes, "runs": runs}
        return json.dumps(whole, indent=1) + "\n"

    def markdown(self):
        """The whole report."""
        return "\n".join(["# perf/compare", "", self.summary(), "## Every run", "", *self._every_run(), ""])

    def summary(self):
        """Medians, ratios, prices, shares and stalls."""
        return "\n".join([*self._opening(), "", *self._medians(), *self._ratios(), "",
                          *self._prices(), "", *self._shares(), "", *self._stalls(), ""])

    def _opening(self):
        head = self.head
        noise = [run.noise["others_pct"] for run in self.runs if run.noise]
        yield f"- Command: `{head['command']}`, {head['date']}"
        yield f"- Machine: {head['machine']}; all namespaces share these processors; TCP: {congestion_control()}"
        if noise:
            worst, median = max(noise), statistics.median(noise)
            yield (f"- Noise: in the median run other processes took {median:.0f} % of one processor, "
                   f"in the worst {worst:.0f} %")
        yield from (f"- {name}: {text}" for name, text in self.versions.items() if not backends.ALL[name].is_bound)
        yield from (f"- {note}" for note in self.notes)

    def _medians(self):
        yield from _table_head("Median", self.backends)
        for row in self.rows():
            yield _table_row(row.title, [self._cell(row, backend) for backend in self.backends])

    def _cell(self, row, backend):
        value = self.median(row, backend)
        if value is not None:
            return _number(value)
        return "failed" if any(run.error for run in self.of_cell(row.metric, backend)) else "–"

    def _ratios(self):
        for subject in dict.fromkeys(kind.beside for kind in backends.ALL.values()):
            yield from self._ratios_of(subject)

    def _ratios_of(self, subject):
        others = [name for name in self.backends if backends.ALL[name].beside == subject and not name.startswith("hythe")]
        if subject not in self.backends or not others:
            return
        yield ""
        yield from _table_head(f"{subject} against: above 1 is better", others)
        for row in self.rows():
            cells = [_ratio(self.advantage(row, subject, other)) for other in others]
            if any(cell != "–" for cell in cells):
                yield _table_row(row.title.rsplit(" (", 1)[0], cells)

    def advantage(self, row, subject, other):
        """How many times better one of ours is than another, or None."""
        ours, theirs = self.median(row, subject), self.median(row, other)
        if not ours or not theirs:
            return None
        return ours / theirs if row.metric.more_is_better else theirs / ours

    def _prices(self):
        programs = [name for name in self.backends if any(run.cpu_s_per_gb for run in self.runs if run.backend == name)]
        if not programs:
            return
        yield from _table_head("The forwarder's CPU seconds a GB", programs)
        for metric in self.metrics:
            cells = [_price(self.of_cell(metric, backend)) for backend in programs]
            if any(cell != "–" for cell in cells):
                yield _table_row(metric.title, cells)

    def _shares(self):
        # Round trips and connections move no bytes worth counting.
        runs = [run for run in self.runs if run.cpu_pct is not None and run.cpu_s_per_gb is None]
        metrics = [metric for metric in self.metrics
                   if metric.unit in ("µs", "/s") and any(run.metric == metric.name for run in runs)]
        shown = {metric.name for metric in metrics}
        programs = [name for name in self.backends if any(run.backend == name and run.metric in shown for run in runs)]
        if not metrics:
            return
        yield from _table_head("The forwarder's CPU meanwhile, % of one processor", programs)
        for metric in metrics:
            yield _table_row(metric.title, [_share(self.of_cell(metric, backend)) for backend in programs])

    def _stalls(self):
        bulk = [metric for metric in self.metrics if metric.is_bulk]
        if not bulk:
            return
        yield from _table_head(f"Bulk runs below {STALL_SHARE:.0%} of their median", self.backends)
        for metric in bulk:
            yield _table_row(metric.title, [_stalled(self.of_cell(metric, backend)) for backend in self.backends])

    def _every_run(self):
        yield from _table_head("Runs, in turn; others' CPU % in brackets", self.backends)
        for row in self.rows():
            yield _table_row(row.title, [" ".join(_single(row, run) for run in self.of_cell(row.metric, backend))
                                         for backend in self.backends])
        failed = [run for run in self.runs if run.error]
        yield from (f"\n{run.backend}, {run.metric}, round {run.round} failed: {run.error}" for run in failed)


def _table_head(title, columns):
    yield _table_row(title, columns)
    yield _table_row("---", ["---:"] * len(columns))


def _table_row(title, cells):
    return f"| {title} | {' | '.join(cells)} |"


def _number(value):
    """Three digits are what a measurement on a shared machine can tell."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ratio(value):
    return "–" if value is None else f"{value:.2f}"


def _price(runs):
    values = [run.cpu_s_per_gb for run in runs if run.cpu_s_per_gb is not None]
    return f"{statistics.median(values):.2f}" if values else "–"


def _share(runs):
    values = [run.cpu_pct for run in runs if run.cpu_pct is not None]
    return f"{statistics.median(values):.0f}" if values else "–"


def _stalled(runs):
    values = [run.value for run in runs if run.value is not None]
    if len(values) < 2:
        return "–"
    floor = STALL_SHARE * statistics.median(values)
    return f"{sum(value < floor for value in values)} of {len(values)}"


def _single(row, run):
    value = row.value(run)
    noise = f" ({run.noise['others_pct']:.0f})" if run.noise else ""
    return "failed" if value is None else _number(value) + noise


def rewrite(path, text):
    """Puts a text between the markers of a file."""
    with open(path) as file:
        before, rest = file.read().split(BEGIN)
    after = rest.split(END)[1]
    with open(path, "w") as file:
        file.write(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
