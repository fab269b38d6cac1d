"""Times as a person types them: ISO 8601, in UTC where they do not say."""

from datetime import UTC, datetime

from deploy.giving_up import USAGE, GiveUp


def parse_instant(text: str, option: str) -> datetime:
    """The instant that was given for an option. Raises GiveUp."""
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise GiveUp(f"{option} takes a time such as 2026-03-01T00:00:00Z, and not {text!r}", USAGE) from None
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)
