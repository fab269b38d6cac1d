"""Times as a person types them: ISO 8601, in UTC (or another zone) where they do not say."""

from datetime import UTC, datetime, tzinfo

from deploy.giving_up import USAGE, GiveUp


def parse_instant(text: str, option: str, zone: tzinfo = UTC) -> datetime:
    """The instant that was given for an option; ``zone`` is for one that does not say. Raises GiveUp."""
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise GiveUp(f"{option} takes a time such as 2026-03-01T00:00:00Z, and not {text!r}", USAGE) from None
    return instant if instant.tzinfo else instant.replace(tzinfo=zone)
