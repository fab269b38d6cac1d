"""Where this product differs from Polar on purpose, case by case, each with its reason.

Every suite that runs conformance cases takes its exceptions from here. A case named here must indeed come out
differently: an entry that has become untrue fails, so the list is never longer than the truth.
"""

DIFFERENCES: dict[str, str] = {
    "fv-int-2147483648": "integers of any size are taken in a filter: a 32-bit column is Polar's limit, not ours",
    "fv-float-1.5": "fractions are taken in a filter: prices are fractions, and here they are compared exactly",
    "fx-gte-bool-error": "ordering by a boolean is refused when the meter is made, instead of failing when it is read",
    "mu-aggregation-locked": "nothing is billed here, so what a meter counts can always be changed",
    "inx-cost-float-noise": "a cost of more than 12 decimals is rounded: it is what 0.1 + 0.2 gives in a client",
}

_INVOICES = "no invoices are made here: usage is priced for whoever looks at it, and billed elsewhere"

NOT_HERE: dict[str, str] = {
    "bl-sum": _INVOICES,
    "bl-credit": _INVOICES,
    "bl-count-system-excluded": _INVOICES,
    "bl-cutoff": _INVOICES,
    "bl-price-change-max": _INVOICES,
    "bl-e2e-meter-cycle": _INVOICES,
}
"""Cases that nothing here could hold, each with its reason."""
