"""Latencies as text: quantiles side by side, and where the time of the exchanges lies."""

# The keys of the traffic tool's line, and what they are called.
QUANTILES = {"min_us": "min", "p50_us": "p50", "p90_us": "p90", "p99_us": "p99", "p999_us": "p99.9",
             "p9999_us": "p99.99", "max_us": "max"}
BAR_WIDTH = 50

# Bars that hold fewer of the exchanges are left out at both ends of the picture.
SMALLEST_SHARE = 1e-4


def quantile_table(results):
    """One row a backend; `results` maps its name to the traffic tool's line."""
    yield f"{'µs':14}" + "".join(f"{name:>10}" for name in QUANTILES.values()) + f"{'exchanges':>12}{'lost':>8}"
    for backend, said in results.items():
        numbers = "".join(f"{said[key]:>10,.1f}" for key in QUANTILES)
        yield f"{backend:14}{numbers}{said['n']:>12,.0f}{said['lost']:>8,.0f}"


def bars(said):
    """A bar for each span of time; each is √2 times as long as the one before."""
    most = max((count for _, count in said["histogram"]), default=0)
    spans = [(upper, count) for upper, count in said["histogram"] if count >= SMALLEST_SHARE * said["n"] and count]
    for upper, count in spans:
        bar = "█" * max(1, round(BAR_WIDTH * count / most))
        yield f"  < {upper:>10,.1f} µs {100 * count / said['n']:>7.2f} %  {bar}"
