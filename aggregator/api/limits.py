"""Limits of HTTP requests and their parameters, each with its reason."""

BODY_BYTES_MAX = 2 * 1024 * 1024
"""Of a request: a filter of a hundred clauses fits, with every text at its longest."""

ECHO_LENGTH_MAX = 4 * 1024
"""Characters of the ``input`` in a complaint, some kilobytes: a longer one is null, because whoever sent it has it. A
filter that lacks something at each of twenty levels would be sent back twenty times."""

POLAR_BODY_BYTES_MAX = 512 * 1024
"""Of a webhook of Polar's, which anybody may send and every secret is held against. Its longest ones are subscriptions
and orders: a product, a customer and benefits, each with metadata of 27 kB at most."""

PAGE_ROWS_MAX = 100
"""Items of one page; Polar's limit, and like there a larger wish is cut down silently."""

PAGE_ROWS_DEFAULT = 10
"""Items of one page when nobody says (Polar's default)."""

WAIT_S_MAX = 30.0
"""The longest that ``Prefer: wait`` is honored; clients of Polar give up after 5 to 30 seconds."""

AGGREGATE_FIELDS_MAX = 10
"""Fields to add up along traces in one request: each walks the traces of the page once."""

AGGREGATE_FIELD_LENGTH_MAX = 255
"""Characters of such a field (Polar's limit)."""

SEARCH_LENGTH_MIN = 3
"""Characters of a search for events (Polar's limit): fewer would find nearly everything."""

SEARCH_LENGTH_MAX = 1000
"""Characters of a search: as long as a filter's text."""

DEPTH_MAX = 5
"""Levels of a trace that may be asked for (Polar's limit)."""

IDENTIFIERS_MAX = 1000
"""Values of one repeated parameter, such as customers; a URL hardly holds more."""

METADATA_KEYS_MAX = 50
"""Different keys of ``metadata[key]=value``, as many as a resource's metadata has. Each is another place to plan for
and to read in every event: fifty cost a second of a processor, a thousand took twenty."""

PREVIEW_CUSTOMERS = 10
"""Customers that a preview names: enough to recognize one's own."""

FEED_ROWS_MAX = 10_000
"""Events of one page of the feed: a few megabytes, and half a second."""

FEED_ROWS_DEFAULT = 1_000
"""Events of such a page when nobody says."""

FEED_CUSTOMERS_DEFAULT = 100
"""Customers with most events that are named when nobody says how many."""

FEED_METERS_MAX = 100
"""Meters that are rolled up in one question: each reads the events once."""

FEED_WINDOW_S_MAX = 86_400
"""Seconds of a rollup's window: a day. What is sent later than that belongs to no bill any more."""
