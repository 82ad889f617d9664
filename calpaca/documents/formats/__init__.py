"""One file per kind of document: from bytes to the text that is split and shown."""
