"""Files with events, as people have them, and sending what is in them."""
