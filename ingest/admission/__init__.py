"""Admission: from the body of a request to records in the log and an answer."""
