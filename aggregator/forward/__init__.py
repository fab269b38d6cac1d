"""The forwarder: sends counted events on to Polar, within Polar's request limit."""
