"""One module a verb: its arguments and what it calls. The work itself lives in the rooms below."""
