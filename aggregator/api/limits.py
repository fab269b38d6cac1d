"""Limits of the API, each with its reason."""

BODY_BYTES_MAX = 2 * 1024 * 1024
"""Of a request: a filter of a hundred clauses fits, with every text at its longest."""

ECHO_LENGTH_MAX = 4 * 1024
"""Characters of the ``input`` in a complaint, some kilobytes: a longer one is null, because whoever sent it has it. A
filter that lacks something at each of twenty levels would be sent back twenty times."""

POLAR_BODY_BYTES_MAX = 512 * 1024
"""Of a webhook of Polar's, which anybody may send and every secret is held against. Its longest ones are subscriptions
and orders: a product, a customer and benefits, each with metadata of 27 kB at most."""

VERIFICATIONS_AT_ONCE = 1
"""Webhooks whose signatures are looked at side by side: who has no secret keeps one thread busy and no more."""

VERIFICATIONS_WAITING_MAX = 64
"""Webhooks in line behind that one: 32 MiB. More are turned away, and whoever sent them comes again."""

PAGE_ROWS_MAX = 100
"""Items of one page; Polar's limit, and like there a larger wish is cut down silently."""

PAGE_ROWS_DEFAULT = 10
"""Items of one page when nobody says (Polar's default)."""

QUERIES_AT_ONCE = 4
"""Questions that the store answers side by side; each uses every thread of DuckDB, so more only share memory."""

QUERIES_OF_ONE_AT_ONCE = 3
"""Of one organization, one less: whoever asks slow questions leaves others a thread."""

QUERIES_WAITING_MAX = 30
"""Questions in line behind those. At half a second each the last one waits four seconds; more are turned away. With
those that wait for a position they are fewer than a gateway passes on at once (64), so short reads have room."""

QUERIES_OF_ONE_WAITING_MAX = 20
"""Of one organization: others find a place in line."""

TURN_S_MAX = 10.0
"""How long anything waits for its turn: behind so many slow ones it may as well come again. With QUERY_S_MAX it is less
than a gateway waits for an answer (60 s), so nothing is worked at that nobody waits for."""

QUERY_S_MAX = 30.0
"""How long a question may take: Polar's statement timeout, and half of the command line's patience."""

INTERRUPT_AGAIN_S = 0.02
"""How often a question that took too long is interrupted, until it ends: between two statements it is not heard."""

WAIT_S_MAX = 30.0
"""The longest that ``Prefer: wait`` is honored; clients of Polar give up after 5 to 30 seconds."""

WAITS_MAX = 24
"""Requests that wait for a position, of all organizations."""

WAITS_OF_ONE_MAX = 12
"""Requests of one organization that wait for a position, half as many, so that another may. What was just written is
there within a tenth of a second."""

CHANGES_AT_ONCE = 500
"""Of decisions that stand each for itself, so many changes are one record: of a few hundred bytes each, far below what
the log takes."""

IN_DOUBT_S = 10.0
"""How long a decision waits to hear of one before it that may be durable: a restart of the engine takes less."""

RETRY_AFTER_S = 1
"""When to come back after 503: the line has moved, or the view has restarted, in about a second."""

AGGREGATE_FIELDS_MAX = 10
"""Fields to add up along traces in one request: each walks the traces of the page once."""

AGGREGATE_FIELD_LENGTH_MAX = 255
"""Characters of such a field (Polar's limit)."""

SEARCH_LENGTH_MIN = 3
"""Characters of a search for events (Polar's limit): fewer would find nearly everything."""

SEARCH_LENGTH_MAX = 1000
"""Characters of a search: as long as a filter's text."""

PRESENT_S_MAX = 5.0
"""Seconds that a decision about a balance waits for usage that came before it; then it is to be asked for again."""

SETTLED_S = 1.0
"""Seconds after a moment until what was stamped before it is in the log, where no clock is far behind. What a gateway
stamped is durable long before: a group commit takes milliseconds. Who counts earlier leaves out usage on its way."""

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
