"""Template filter for amounts kept in cents."""

from django import template

register = template.Library()


@register.filter
def euros(cents):
    """1234567 becomes `12,345.67 €`."""
    return f"{int(cents) // 100:,}.{int(cents) % 100:02d} €"
