"""The gateway's HTTP side: connections, routes, and the proxy to the query API."""
