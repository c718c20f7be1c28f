"""Statistics over all order lines, in plain Python: the part of the sales report that keeps the CPU busy."""

from collections import defaultdict
from statistics import fmean


def monthly_sales(rows):
    """`rows` are (placed, quantity, unit price in cents); returns one dictionary per month, oldest first."""
    months = defaultdict(list)
    for placed, quantity, unit_price_cents in rows:
        months[placed.year, placed.month].append(quantity * unit_price_cents)
    return [summary(month, sorted(amounts)) for month, amounts in sorted(months.items())]


def summary(month, amounts):
    year, number = month
    return {
        "month": f"{year}-{number:02d}",
        "lines": len(amounts),
        "cents": sum(amounts),
        "median_cents": percentile(amounts, 50),
        "p95_cents": percentile(amounts, 95),
        "gini": gini(amounts),
    }


def percentile(ordered, percent):
    """Nearest rank: the smallest value that at least `percent` of all values do not exceed."""
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def gini(ordered):
    """0 when every line is worth the same, near 1 when one line is worth everything."""
    total = sum(ordered)
    if not total:
        return 0.0
    weighted = sum(rank * amount for rank, amount in enumerate(ordered, start=1))
    return 2 * weighted / (len(ordered) * total) - (len(ordered) + 1) / len(ordered)


def trend(months):
    """Slope of the least-squares line through the months' turnover, in cents per month."""
    if len(months) < 2:
        return 0.0
    turnover = [month["cents"] for month in months]
    middle, mean = (len(months) - 1) / 2, fmean(turnover)
    rise = sum((x - middle) * (y - mean) for x, y in enumerate(turnover))
    return rise / sum((x - middle) ** 2 for x in range(len(months)))
